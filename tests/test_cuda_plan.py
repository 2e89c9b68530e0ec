"""The choice among the CUDA paths: a pure function, asked here of devices that need not exist."""

from __future__ import annotations

import importlib.util

import pytest
from fastlstm import _cuda_plan
from fastlstm._cuda_plan import Device
from hypothesis import given
from hypothesis import strategies as st

A100 = Device(8, 0, 108, 166912, True)
RTX3090 = Device(8, 6, 82, 101376, True)
H100 = Device(9, 0, 132, 232448, True, (66, 32, 16, 7))
B200 = Device(10, 0, 148, 232448, True, (74, 36, 18, 8))
RTX5090 = Device(12, 0, 170, 101376, True, (85, 42, 21, 0))
T4 = Device(7, 5, 40, 65536, True)
ALONE = Device(8, 0, 108, 166912, False)
MATHS = ("bf16", "f16", "tf32", "f32", "f64")

SIZE = st.one_of(st.integers(1, 130), st.integers(1, 5000))
ARGS = {
    "N": SIZE,
    "H": SIZE,
    "directions": st.integers(1, 2),
    "math": st.sampled_from(MATHS),
    "backward": st.booleans(),
    "device": st.sampled_from([A100, RTX3090, H100, B200, RTX5090, T4, ALONE]),
}


def plan(N, H, directions, math, backward, device, P=None):
    return _cuda_plan.plan(N, H, directions, math, backward, device, P or H)


@given(**ARGS)
def test_every_plan_fits_the_device(N, H, directions, math, backward, device):
    p = plan(N, H, directions, math, backward, device)
    assert p.reason.startswith(f"{p.path}: ")
    assert p.nanoseconds > 0
    if p.path == "steps":
        return
    assert device.major >= 8
    cut = _cuda_plan.Cut(p.path, p.blocks, p.units, p.rows, p.chunks, p.wide)
    shared, operand, _ = _cuda_plan.memory(math, backward, H, cut)
    assert (p.shared_bytes, p.operand_bytes) == (shared, operand)
    assert p.local == (p.path in ("block", "cluster"))
    assert p.chunks == 1 or not p.local
    assert p.shared_bytes <= device.shared_bytes
    # every unit has one block, and no block is without units
    assert (p.blocks - 1) * p.units < H <= p.blocks * p.units
    assert p.units <= _cuda_plan.THREADS
    per_pass = _cuda_plan.THREADS // p.units
    assert p.rows <= _cuda_plan.most_elements(math, p.wide) * per_pass
    assert p.groups % directions == 0
    assert 1 <= p.groups // directions <= -(-N // p.rows)
    assert p.rows <= N
    if p.path == "grid":
        assert device.cooperative
        assert p.groups * p.blocks <= device.multiprocessors
    elif p.path == "cluster":
        assert p.groups <= device.clusters[_cuda_plan.CLUSTERS.index(p.blocks)]
    else:
        assert p.path == "block"
        assert p.blocks == 1


@given(**ARGS)
def test_the_plan_is_pure(**args):
    _cuda_plan.plan.cache_clear()
    first = plan(**args)
    _cuda_plan.plan.cache_clear()
    assert plan(**args) == first


@pytest.mark.parametrize(
    ("args", "path"),
    [
        ((1, 8, 1, "f32", False, A100), "block"),
        ((1, 8, 1, "f32", True, H100), "block"),
        ((8, 128, 1, "bf16", False, H100), "cluster"),
        ((8, 256, 1, "bf16", False, A100), "grid"),
        ((16, 768, 1, "bf16", False, H100), "grid"),
        ((16, 768, 1, "bf16", True, H100), "grid"),
        ((16, 768, 1, "tf32", True, H100), "grid"),
        ((16, 512, 2, "f32", False, A100), "grid"),
        ((8, 2048, 1, "bf16", False, H100), "grid"),
        ((8, 2048, 1, "bf16", True, H100), "steps"),  # it does not fit
        ((16, 4096, 1, "bf16", False, H100), "steps"),
        ((256, 1024, 1, "bf16", False, H100), "steps"),  # a product that fills the device
        ((4096, 512, 1, "f32", False, H100), "steps"),
        ((8, 128, 1, "bf16", False, T4), "steps"),
        ((64, 512, 1, "f32", False, ALONE), "steps"),
    ],
)
def test_the_obvious_cases(args, path):
    assert plan(*args).path == path


def test_reasons():
    assert plan(16, 64, 1, "f32", False, H100, P=32).reason == (
        "steps: a projection is a second product in each step, "
        "as one CUDA graph from the second call of a kind on"
    )
    assert "compute capability 8.0" in plan(16, 64, 1, "f32", False, T4).reason
    assert plan(4096, 512, 1, "f32", False, H100).reason.startswith("steps: estimated ")
    chosen = plan(16, 768, 1, "bf16", False, H100)
    for part in (f"groups of {chosen.blocks} blocks", f"{chosen.units} units", "KiB", "us a step"):
        assert part in chosen.reason


def test_a_graph_pays_where_the_host_is_slower_than_the_device():
    def pays(*args):
        return _cuda_plan.replay_pays(*args)

    assert pays(1, 256, "f32", H100) and pays(64, 1024, "bf16", H100) and pays(16, 512, "f64", A100)
    assert not pays(4096, 512, "f32", H100)  # the device computes for longer
    assert not pays(20000, 64, "bf16", A100)  # copies
    assert not plan(4096, 512, 1, "f32", False, H100).reason.endswith("of a kind on")


def test_what_may_not_be_recorded_is_planned_as_queued_by_the_host():
    args = 256, 1024, 1, "bf16", False, H100
    with_graph = plan(*args)
    assert with_graph.path == "steps" and with_graph.reason.endswith("of a kind on")
    without = _cuda_plan.plan(*args, 1024, replays=False)
    assert "graph" not in without.reason and without.nanoseconds > with_graph.nanoseconds


def test_explain():
    torch = pytest.importorskip("torch", reason="tests of the torch side")
    import fastlstm.nn

    rnn = torch.nn.LSTM(3, 768, bidirectional=True)
    x = torch.zeros(5, 16, 3, dtype=torch.bfloat16)
    forward, backward = fastlstm.nn.explain(rnn, x, device=H100).splitlines()
    assert forward == "forward, bf16: " + plan(16, 768, 2, "bf16", False, H100).reason
    assert backward == "backward, bf16: " + plan(16, 768, 2, "bf16", True, H100).reason
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [5] * 7 + [2] * 9)
    assert fastlstm.nn.explain(rnn, packed, device=H100).splitlines() == [forward, backward]
    rnn.batch_first = True
    at_five = plan(5, 768, 2, "bf16", False, H100).reason
    assert fastlstm.nn.explain(rnn, x, device=tuple(H100)).startswith(f"forward, bf16: {at_five}")
    alone = fastlstm.nn.explain(rnn, x[0], device=H100)
    assert plan(1, 768, 2, "bf16", False, H100).reason in alone

    for wrong, error, words in (
        ((torch.nn.GRU(3, 4), x), TypeError, "lstm: expected a torch.nn.LSTM, got GRU"),
        ((rnn, [1.0]), TypeError, "input: expected a Tensor or PackedSequence, got list"),
        ((rnn, x[:0]), ValueError, r"input: expected 2 or 3 dimensions, none empty, got \(0,"),
        ((rnn, x.long()), TypeError, "input: expected a dtype of .*, got torch.int64"),
    ):
        with pytest.raises(error, match=words):
            fastlstm.nn.explain(*wrong, device=H100)
    with pytest.raises(TypeError, match=r"device: expected .*'major', 'minor'"):
        fastlstm.nn.explain(rnn, x, device=(9, 0))


def test_the_switch():
    pytest.importorskip("torch", reason="tests of the torch side")
    from helpers import run_python, stdout_of

    code = (
        "import torch, fastlstm.nn\n"
        "print(fastlstm.nn.explain(torch.nn.LSTM(2, 3), torch.zeros(1, 1, 2)))"
    )
    told = stdout_of(run_python(code, FASTLSTM_CUDA_KERNELS="0"))
    on = run_python("import fastlstm.nn", FASTLSTM_CUDA_KERNELS="1")
    if importlib.util.find_spec("fastlstm._cuda"):
        assert told.endswith("FASTLSTM_CUDA_KERNELS=1 in the environment switches them on")
        stdout_of(on)
    else:
        assert "this build of fastlstm has no CUDA part" in told
        last = on.stderr.strip().splitlines()[-1]
        assert last.startswith(
            "ImportError: FASTLSTM_CUDA_KERNELS=1: this build of fastlstm has no"
        )
    wrong = run_python("import fastlstm.nn", FASTLSTM_CUDA_KERNELS="yes")
    assert "FASTLSTM_CUDA_KERNELS: expected 0 or 1, got 'yes'" in wrong.stderr
