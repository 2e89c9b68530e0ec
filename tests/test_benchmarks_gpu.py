"""The benchmark for GPUs, where there is none: measuring on the CPU, report, script around it."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu_measure  # noqa: E402
import gpu_peers  # noqa: E402
from cases import GPU_CASES, Case, Problem, cudnn_persistent  # noqa: E402
from gpu_measure import HostClock, Job, interleave, measure, summarise  # noqa: E402
from gpu_worker import Lost, Worker  # noqa: E402
from measure import check, reference  # noqa: E402
from peers import OURS, PEERS, torch_lstm  # noqa: E402

SMALL = Case("gpu", 5, 3, 4, 6)
RAGGED = Case("gpu", 6, 4, 4, 6, shortest=2)
JOB = Job(
    SMALL,
    "float32",
    (OURS, "torch"),
    tuple(gpu_measure.MODES),
    device="cpu",
    seconds=0.01,
    rounds=2,
    cold=False,
)


@pytest.fixture(autouse=True)
def _tf32_as_it_was():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def silent(_: str) -> None:
    pass


# What is measured


@pytest.mark.parametrize("cold", [False, True])
def test_rows(cold):
    turns = []
    rows = measure(replace(JOB, case=RAGGED, cold=cold), turns.append)
    assert [row["mode"] for row in rows] == ["inference", "forward", "training"]
    assert turns[0] == "reference" and {OURS, "torch"} <= set(turns)
    for row in rows:
        assert row["case"] == "6×4×4×6 ragged from 2"
        assert set(row["peers"]) == {OURS, "torch"} and not row["left_out"]
        assert row["flops"] == (3 if row["mode"] == "training" else 1) * 16 * 2 * 4 * 6 * 10
        for measured in row["peers"].values():
            assert measured["error_y"] < 1e-6
            assert ("error_gradients" in measured) == (row["mode"] != "inference")
            assert min(*measured["samples"], *measured["host_samples"]) > 0
            assert len(measured["samples"]) == len(measured["host_samples"]) >= 2

    means = summarise(rows)
    assert [mean["mode"] for mean in means] == ["inference", "forward", "training"]
    ours, theirs = (rows[0]["peers"][name] for name in (OURS, "torch"))
    assert ours["ratio"] == 1
    pairs = zip(theirs["samples"], ours["samples"], strict=False)
    assert theirs["ratio"] == pytest.approx(np.median([a / b for a, b in pairs]))
    assert theirs["ratio_quartiles"][0] <= theirs["ratio"] <= theirs["ratio_quartiles"][1]


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_the_reference_has_the_rounded_numbers(precision):
    dtype, _ = gpu_peers.PRECISIONS[precision]
    problem = Problem.random(SMALL, "float32").map(lambda a: torch.from_numpy(a).to(dtype))
    found = gpu_measure.reference(problem)
    expected = reference(problem.map(lambda tensor: tensor.double().numpy()), training=True)
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-12, atol=1e-12)


def test_torchs_own_path_is_never_reported_as_ours(monkeypatch):
    theirs = replace(gpu_peers.GPU_PEERS[OURS], prepare=torch_lstm)
    monkeypatch.setitem(gpu_peers.GPU_PEERS, OURS, theirs)
    rows = measure(JOB, silent)
    summarise(rows)
    for row in rows:
        assert set(row["peers"]) == {"torch"}
        assert row["left_out"][OURS].startswith("ran on torch's own path")
        assert "ratio" not in row["peers"]["torch"]


def test_what_fastlstm_says_of_a_call_is_noted(monkeypatch):
    import fastlstm.nn

    def explain(module, x):
        return f"{type(module).__name__}, {tuple(x.shape)}"

    monkeypatch.setattr(fastlstm.nn, "explain", explain, raising=False)
    (row,) = measure(replace(JOB, modes=("inference",)), silent)
    assert row["served"] == "(LSTM, (5, 3, 4))"


def test_a_wrong_peer_is_not_timed(monkeypatch):
    def wrong(problem, training, threads):
        return torch_lstm(problem.map(lambda tensor: 1.1 * tensor), training, threads)

    monkeypatch.setitem(
        gpu_peers.GPU_PEERS, "torch", replace(gpu_peers.GPU_PEERS["torch"], prepare=wrong)
    )
    rows = measure(JOB, silent)
    assert all(set(row["peers"]) == {OURS} for row in rows)
    assert all("is off by" in row["left_out"]["torch"] for row in rows)


def test_a_slow_peer_leaves_the_time_to_the_others():
    calls = {"slow": lambda: time.sleep(0.06), "fast": lambda: time.sleep(0.001)}
    clock = HostClock("cpu", cold=False)
    found = interleave(calls, clock, replace(JOB, seconds=0.3), silent)
    assert len(found["slow"]["samples"]) == JOB.rounds
    assert len(found["fast"]["samples"]) > 2 * JOB.rounds
    assert found["slow"]["samples"][0] > 0.06 > found["fast"]["samples"][0] > 0.001


def test_ours_stays_as_long_as_any_other():
    calls = {OURS: lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.001)}
    clock = HostClock("cpu", cold=False)
    found = interleave(calls, clock, replace(JOB, seconds=0.3), silent)
    assert len(found[OURS]["samples"]) == len(found["fast"]["samples"]) > 2 * JOB.rounds


def test_cold_caches_are_cleared_outside_the_time():
    cleared, clock = [], HostClock("cpu", cold=True)
    clock.flush = SimpleNamespace(
        numel=lambda: 1, zero_=lambda: (cleared.append(1), time.sleep(0.01))
    )
    assert clock.timed(lambda: None, 3) < 0.01
    assert len(cleared) == 3


# What asks the device, against stand-ins for it


class FakeEvent:
    """A device on which a millisecond passes from event to event."""

    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.now += 1
        self.at = FakeEvent.now

    def elapsed_time(self, end):
        return end.at - self.at


NVIDIA_SMI_STAND_IN = """#!/bin/sh
[ "$*" = "--query-gpu=$FIELDS --format=csv,noheader,nounits -i GPU-some-id" ] || exit 1
echo "$ANSWER"
"""


@pytest.fixture
def fake_gpu(tmp_path, monkeypatch):
    properties = {"name": "A GPU", "major": 9, "minor": 0, "multi_processor_count": 132}
    properties |= {"total_memory": 2**37, "L2_cache_size": 2**20, "uuid": "some-id"}
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**properties)
    )
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI_STAND_IN)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.parametrize("cold", [False, True])
def test_events(fake_gpu, cold):
    clock = gpu_measure.EventClock("cpu", cold)
    calls = []
    # One pair of events around all calls, or around each where the cache is cleared before it.
    assert clock.timed(lambda: calls.append(1), 3) == pytest.approx(3e-3 if cold else 1e-3)
    assert len(calls) == 3
    assert clock.flush.numel() == (2**21 if cold else 0)


def test_what_nvidia_smi_says(fake_gpu, monkeypatch):
    monkeypatch.setenv("FIELDS", "clocks.sm")
    monkeypatch.setenv("ANSWER", "1980")
    assert gpu_measure.sm_clock() == 1980
    monkeypatch.setenv("ANSWER", "[N/A]")
    assert gpu_measure.sm_clock() is None
    assert gpu_measure.nvidia_smi("no.such.field") == []
    monkeypatch.setenv("FIELDS", "driver_version,clocks.max.sm")
    monkeypatch.setenv("ANSWER", "580.159, 1980")
    found = gpu_measure.describe("cuda", silent)
    assert found["driver"] == "580.159" and found["most_sm_mhz"] == "1980"
    assert found["name"] == "A GPU" and found["capability"] == "9.0"

    pytest.importorskip("rich")
    import gpu_report

    row = {"peers": {"torch": {"cudnn": True}}, "sm_mhz": [1800, 1980]}
    machine = {"cpu": "", "cpus": "", "system": ""}
    data = {"date": "", "command": "", "machine": machine, "versions": {}, "rows": [row, row]}
    facts = dict(gpu_report.facts({**data, "gpu": found, "settings": {"l2": "warm"}}))
    assert facts["GPU"].startswith("A GPU, capability 9.0, 132 multiprocessors, 128 GiB, L2 1 MiB")
    assert "driver 580.159" in facts["Driver, CUDA, cuDNN"]
    assert facts["Driver, CUDA, cuDNN"].endswith("nn.LSTM ran on cuDNN in 2 of 2 rows")
    assert facts["SM clock after the rows"] == "1980 to 1980 MHz of 1980"


# The peers


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", [SMALL, Case("gpu", 6, 4, 4, 6, 2, bidirectional=True)])
def test_scan(case, training):
    problem = Problem.random(case, "float32")
    with torch.set_grad_enabled(training):
        expected = reference(problem, training)
        tensors = problem.map(torch.from_numpy)
        scan = gpu_peers.scan(tensors, training, 1, step_of=lambda: gpu_peers.step)
        check(scan, expected, 1e-5)


class HasteLSTM(torch.nn.Module):
    """As haste_pytorch documents its LSTM: weights (in, 4H), gates i g f o, one bias."""

    def __init__(self, input_size, hidden_size):
        super().__init__()

    def from_native_weights(self, weight_ih, weight_hh, bias_ih, bias_hh):
        def reordered(weight):
            i, f, g, o = weight.chunk(4, dim=-1)
            return torch.nn.Parameter(torch.cat([i, g, f, o], dim=-1))

        self.kernel = reordered(weight_ih.T)
        self.recurrent_kernel = reordered(weight_hh.T)
        self.bias = reordered(bias_ih + bias_hh)

    def forward(self, x):
        h = c = x.new_zeros(x.shape[1], len(self.recurrent_kernel))
        outputs = []
        for x_t in x:
            gates = x_t @ self.kernel + h @ self.recurrent_kernel + self.bias
            i, g, f, o = gates.chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])


@pytest.mark.parametrize("training", [False, True])
def test_haste(training, monkeypatch):
    module = ModuleType("haste_pytorch")
    module.LSTM = HasteLSTM
    monkeypatch.setitem(sys.modules, "haste_pytorch", module)
    problem = Problem.random(SMALL, "float32")
    with torch.set_grad_enabled(training):
        expected = reference(problem, training)
        haste = gpu_peers.haste(problem.map(torch.from_numpy), training, 1)
        check(haste, expected, 1e-5)


def test_what_peers_refuse():
    peers = gpu_peers.GPU_PEERS
    long = replace(SMALL, T=201)
    assert "T > 200" in peers["scan"].refuses(long, "float32")
    assert "dense" in peers["scan"].refuses(RAGGED, "float32")
    assert not peers["scan"].refuses(SMALL, "float32")
    haste = replace(peers["haste"], packages=())
    assert "float16" in haste.refuses(SMALL, "float16")
    assert "dense" in haste.refuses(RAGGED, "float32")
    assert not haste.refuses(SMALL, "float32")
    assert replace(haste, packages=("no_such_package",)).refuses(SMALL, "float32")


def test_cells_where_cudnn_is_persistent():
    big = Case("gpu", 1024, 16, 768, 768)
    assert cudnn_persistent(big, "float16", "training")
    assert not cudnn_persistent(big, "bfloat16", "inference")
    assert not cudnn_persistent(replace(big, N=17), "float16", "inference")
    small = Case("gpu", 10, 5, 3, 192)
    assert cudnn_persistent(small, "tf32", "forward")
    assert not cudnn_persistent(small, "tf32", "training")
    assert not cudnn_persistent(replace(small, shortest=2), "tf32", "forward")


def test_the_cases_are_the_ones_that_were_asked_for():
    assert [case.label for case, _ in GPU_CASES] == [
        "1024×16×768×768",
        "1024×1×512×512",
        "512×64×512×512",
        "100×32×128×128",
        "100×256×1024×1024",
        "256×8×2048×2048",
        "50×64×256×256 2 layers bidirectional",
        "200×64×512×512 ragged from 20",
        "1×1×256×256",
        "128×2048×64×128",
    ]


# Processes that die or hang


WORK = """
import os, time

def double(value, tell):
    tell("doubling")
    return 2 * value

def fail(tell):
    tell("failing")
    raise ValueError("a reason\\nand more")

def die(tell):
    tell("dying")
    os._exit(7)

def hang(tell):
    tell("hanging")
    time.sleep(60)
"""


def test_worker(tmp_path, monkeypatch):
    # A module of its own, for the processes need not import all that is above.
    (tmp_path / "work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    work = importlib.import_module("work")
    worker = Worker()
    try:
        assert worker.call(60, work.double, 4) == 8
        assert worker.call(60, work.double, 5) == 10
        with pytest.raises(Lost) as lost:
            worker.call(60, work.fail)
        assert str(lost.value) == "failing: ValueError: a reason"
        with pytest.raises(Lost) as lost:
            worker.call(60, work.die)
        assert str(lost.value) == "dying: its process died with exit code 7"
        assert worker.call(60, work.double, 6) == 12
        begin = time.monotonic()
        with pytest.raises(Lost, match=r"hanging: no result within \d s"):
            worker.call(2, work.hang)
        assert time.monotonic() - begin < 20
    finally:
        worker.close()


class FakeWorker:
    """Loses a case at the turns of some peers."""

    def __init__(self, *bad):
        self.bad = bad

    def call(self, limit, function, job):
        for name in job.peers:
            if name in self.bad:
                raise Lost(name, "no result within 1 s")
        if "reference" in self.bad:
            raise Lost("reference", "RuntimeError: out of memory")
        return [{"case": "c", "dtype": "d", "left_out": job.left_out, "peers": job.peers}]


def test_a_case_is_measured_again_without_the_peer_that_hung():
    pytest.importorskip("rich")
    import gpu

    job = replace(JOB, peers=(OURS, "torch", "scan"))
    banned, failures = {}, []
    end = time.monotonic() + 60
    (row,) = gpu.measured(FakeWorker(OURS, "scan"), job, 1, end, banned, failures)
    assert row["peers"] == ("torch",) and set(row["left_out"]) == {OURS, "scan"}
    assert set(banned) == {"scan"}  # ours gets another chance
    assert gpu.wrong([row]) == ["c d: fastlstm: no result within 1 s"] and not failures
    assert gpu.measured(FakeWorker("reference"), job, 1, end, banned, failures) == []
    assert "out of memory" in failures[0]
    assert gpu.measured(FakeWorker(), job, 1, time.monotonic(), banned, failures) == []
    assert "--within" in failures[1]


# The commands


def test_dry_run_from_the_command_line(tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    paths = {name: tmp_path / f"gpu.{name}" for name in ("json", "png", "md")}
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu"]
    command += ["--cases", "5x3x8x16", "--dtypes", "tf32", "--seconds", "0.01", "--rounds", "2"]
    command += ["--json", paths["json"], "--plot", paths["png"], "--results", paths["md"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert len(data["rows"]) == 3 and not data["failures"]
    assert data["gpu"]["name"].startswith("none: a dry run")
    text = paths["md"].read_text(encoding="utf-8")
    assert "## Forward + backward" in text and "| float32, TF32 | " in text
    assert "warm" in text and "![" in text
    assert paths["png"].read_bytes().startswith(b"\x89PNG")


def test_the_report_says_what_was_torchs_own(monkeypatch, tmp_path):
    pytest.importorskip("rich")
    import gpu_report

    theirs = replace(gpu_peers.GPU_PEERS[OURS], prepare=torch_lstm)
    monkeypatch.setitem(gpu_peers.GPU_PEERS, OURS, theirs)
    rows = measure(JOB, silent)
    data = {
        "date": "d",
        "command": "c",
        "machine": {"cpu": "", "cpus": "", "system": ""},
        "versions": {},
        "settings": {"l2": "cold"},
        "gpu": {"name": "G"},
        "rows": rows,
        "geometric_means": summarise(rows),
        "failures": ["one thing"],
    }
    gpu_report.write_markdown(data, tmp_path / "t.md", None)
    lines = (tmp_path / "t.md").read_text(encoding="utf-8").splitlines()
    assert "- FAILED: one thing" in lines
    (missing,) = (line for line in lines if line.startswith("- Not measured: fastlstm"))
    assert "ran on torch's own path (" in missing and missing.endswith("): everywhere")
    times = [line for line in lines if line.startswith("| float32 | – | – | – | – | ")]
    assert len(times) == 3
    assert all("±" in line and "×" not in line for line in times)


def test_compare_hands_over_to_gpu():
    pytest.importorskip("rich")
    import compare

    assert compare.for_gpu(["--quick", "--device", "cuda", "--cases", "a"])
    assert not compare.for_gpu(["--device", "cpu"]) and not compare.for_gpu([])


PYTHON_STAND_IN = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$1 $2" in
  -c*) echo "torch 9 on A GPU" ;;
  "-m pip")
    [ "$BUILD" ] || exit 3
    echo "Successfully installed fastlstm-1"
    seq 100000 ;;  # more than a pipe holds
  "-m pytest") echo "1 failed, 2 passed"; exit 1 ;;
  benchmarks/gpu_short.py*) echo "all right" ;;
  benchmarks/compare.py*) echo "the table"; echo "wrote x/gpu.md" ;;
esac
"""
SANITIZER_STAND_IN = """#!/bin/sh
[ "$2" = memcheck ] && { echo "ERROR SUMMARY: 0 errors"; "$PYTHON" benchmarks/gpu_short.py; }
exit 0
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("builds", [True, False])
def test_the_script_goes_on_and_fails_loudly(builds, tmp_path):
    calls = tmp_path / "calls"
    for name, text in (("python", PYTHON_STAND_IN), ("compute-sanitizer", SANITIZER_STAND_IN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "OUT": str(tmp_path / "out"),
        "CALLS": str(calls),
        "BUILD": "yes" if builds else "",
    }
    done = subprocess.run(
        ["bash", BENCHMARKS / "gpu_check.sh"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    summary = done.stdout.partition("== summary")[2].splitlines()[1:]
    verdicts = {line.split()[0]: line.split()[1] for line in summary}
    if builds:
        assert verdicts == {
            "device": "ok",
            "build": "ok",
            "tests": "FAILED",  # one test did
            "memcheck": "ok",
            "racecheck": "FAILED",  # exits with 0 but has looked at nothing
            "benchmark": "ok",
        }
        assert "exit status 1; 1 failed, 2 passed" in done.stdout
    else:
        assert verdicts["build"] == verdicts["tests"] == verdicts["memcheck"] == "FAILED"
        assert verdicts["benchmark"] == "ok"
    measured = next(line for line in calls.read_text().splitlines() if "compare.py" in line)
    assert measured.startswith("benchmarks/compare.py --device cuda --within ")
    assert f"--json {tmp_path}/out/gpu.json" in measured
    assert measured.endswith("--peers torch flashrnn haste scan") == (not builds)
    assert (
        "the table" in done.stdout and "the table" in (tmp_path / "out/gpu_check.log").read_text()
    )


def test_peers_are_called_as_on_the_cpu():
    for name in (OURS, "torch"):
        assert gpu_peers.GPU_PEERS[name].prepare is PEERS[name].prepare
