"""Measuring one case on a GPU: every peer in turn, round after round, in one process.

As measure.py does it, with two differences. Time is taken by CUDA events around the calls, which
run back to back as in a loop of training. And a slow peer has the least number of rounds only, so
that it does not take the time of the others. On the CPU, in a dry run, a host clock stands in for
the events; everything else is the same code.
"""

from __future__ import annotations

import gc
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import geometric_mean, median
from typing import Any

import torch
from cases import Arrays, Case, Problem, cudnn_persistent
from gpu_peers import GPU_PEERS, PRECISIONS
from measure import TOLERANCE as CPU_TOLERANCE
from measure import WARM_CALL, Row, calibrate, check, spread, turns
from peers import OURS, Prepared, torch_lstm
from torch.autograd.profiler import profile

MODES = {
    "inference": "Forward, inference",
    "forward": "Forward, training",
    "training": "Forward + backward",
}
HOST_CALLS = 5  # of which the host's cost is the median, in every round

# A result further off than this is wrong: 16 units in the last place of what products may be
# rounded to.
TOLERANCE = CPU_TOLERANCE | {"tf32": 2.0**-6}


@dataclass(frozen=True)
class Job:
    """One case in one precision."""

    case: Case
    precision: str
    peers: tuple[str, ...]
    modes: tuple[str, ...]
    device: str
    seconds: float  # for each mode
    rounds: int
    cold: bool
    left_out: dict[str, str] = field(default_factory=dict)  # why peers are not among `peers`


class HostClock:
    """Times calls by the host's clock."""

    def __init__(self, device: str, cold: bool) -> None:
        # What clears the L2 cache, before every call where caches are to be cold.
        size = self.flush_bytes() if cold else 0
        self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def flush_bytes(self) -> int:
        return 2**20

    def synchronize(self) -> None:
        pass

    def mark(self) -> Any:
        return time.perf_counter()

    def between(self, begin: Any, end: Any) -> float:
        return float(end - begin)

    def timed(self, call: Callable[[], Any], number: int) -> float:
        """The seconds of so many calls, without those that clear the cache."""
        spans = []
        for calls in [1] * number if self.flush.numel() else [number]:
            self.flush.zero_()
            begin = self.mark()
            for _ in range(calls):
                call()
            spans.append((begin, self.mark()))
        self.synchronize()
        return sum(self.between(*span) for span in spans)

    def host_cost(self, call: Callable[[], Any], number: int) -> float:
        """The seconds until a call returns, whose work the device may have yet to do."""
        found = []
        for _ in range(number):
            self.synchronize()
            begin = time.perf_counter()
            call()
            found.append(time.perf_counter() - begin)
        return median(found)


class EventClock(HostClock):
    """Times calls by CUDA events on the current stream."""

    def flush_bytes(self) -> int:
        return 2 * l2_bytes()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3


def measure(job: Job, tell: Callable[[str], None]) -> list[Row]:
    """A row for each mode; `tell` is told whose turn it is, for the case that nothing returns."""
    tell("reference")
    torch.backends.cudnn.allow_tf32 = job.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = job.precision == "tf32"
    clock = (EventClock if job.device == "cuda" else HostClock)(job.device, job.cold)
    dtype, _ = PRECISIONS[job.precision]
    problem = Problem.random(job.case, "float32").map(
        lambda array: torch.from_numpy(array).to(job.device, dtype)
    )
    expected = reference(problem)
    rows = []
    for training in (False, True):
        modes = [mode for mode in job.modes if (mode != "inference") == training]
        with torch.set_grad_enabled(training):
            found: Row = {"peers": {}, "left_out": dict(job.left_out), "served": ""}
            prepared = prepare(job, problem, expected, clock, tell, found) if modes else {}
            for mode in modes:
                row = new_row(job, mode) | {key: dict(found[key]) for key in ("peers", "left_out")}
                row["served"] = found["served"]
                row["sm_mhz"] = [sm_clock()]
                measured = interleave(
                    {n: p.forward if mode == "forward" else p.call for n, p in prepared.items()},
                    clock,
                    job,
                    tell,
                )
                row["sm_mhz"].append(sm_clock())
                row["peers"] = {n: row["peers"][n] | samples for n, samples in measured.items()}
                rows.append(row)
    return rows


def new_row(job: Job, mode: str) -> Row:
    case = job.case
    return {
        "case": case.label,
        **{size: getattr(case, size) for size in ("T", "N", "D", "H")},
        "dtype": job.precision,
        "mode": mode,
        "flops": case.flops(mode == "training"),
        "cudnn_persistent": cudnn_persistent(case, job.precision, mode),
    }


def reference(problem: Problem) -> Arrays:
    """The results of torch.nn.LSTM in float64 on the same numbers, without cuDNN."""
    torch.backends.cudnn.enabled = False  # not by flags(), which sets the others too
    try:
        with torch.enable_grad():
            prepared = torch_lstm(problem.map(torch.Tensor.double), training=True, threads=0)
            return prepared.results(prepared.call())
    finally:
        torch.backends.cudnn.enabled = True


def prepare(
    job: Job,
    problem: Problem,
    expected: Arrays,
    clock: HostClock,
    tell: Callable[[str], None],
    found: Row,
) -> dict[str, Prepared]:
    """The peers that can do this case and do it right; puts errors and reasons into `found`."""
    prepared = {}
    training = torch.is_grad_enabled()
    for name in job.peers:
        tell(name)
        peer = GPU_PEERS[name]
        if reason := peer.refuses(job.case, job.precision):
            found["left_out"][name] = reason
            continue
        try:
            ready = peer.prepare(problem, training, torch.get_num_threads())
            errors = check(ready, expected, TOLERANCE[job.precision])
            operators = recorded(ready.call)
        except Exception as error:
            clock.synchronize()  # raises where the device is of no use to the others any more
            found["left_out"][name] = one_line(error)
            continue
        if name == OURS:
            found["served"] = explanation(ready)
            if "aten::lstm" in operators:
                found["left_out"][name] = f"ran on torch's own path {found['served']}".strip()
                continue
        if name == "torch":
            errors["cudnn"] = "aten::_cudnn_rnn" in operators
        found["peers"][name] = errors
        prepared[name] = ready
    return prepared


def recorded(call: Callable[[], Any]) -> set[str]:
    """The operators of torch that a call goes through."""
    with profile() as seen:
        call()
    return {event.name for event in seen.function_events or ()}


def explanation(prepared: Prepared) -> str:
    """What fastlstm itself says of how it serves this call."""
    import fastlstm.nn

    if not prepared.module_call:
        return ""
    try:
        return f"({fastlstm.nn.explain(*prepared.module_call)})"
    except Exception as error:
        return f"(explain: {one_line(error)})"


def one_line(error: BaseException) -> str:
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"


def interleave(
    calls: dict[str, Callable[[], Any]],
    clock: HostClock,
    job: Job,
    tell: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Samples (seconds per call, by the clock and of the host), those of a round paired.

    Each has `job.rounds` rounds, and more until it has had its share of `job.seconds`; ours stays
    with those that remain. So one that has left does not come back, and the first samples of any
    two are of the same rounds.
    """
    measured: dict[str, dict[str, Any]] = {}
    gc.collect()
    gc.disable()
    try:
        for name, call in calls.items():
            tell(name)
            number = calibrate(call, clock.timed)
            measured[name] = {"calls_per_sample": number, "samples": [], "host_samples": []}
        share = job.seconds / max(len(calls), 1)
        left = dict.fromkeys(calls, share)
        for order in turns(calls):
            active = {
                name
                for name in order
                if left[name] > 0 or len(measured[name]["samples"]) < job.rounds
            }
            if not active:
                break
            for name in order:
                if name not in active | {OURS}:
                    continue
                tell(name)
                begin = time.perf_counter()
                call, one = calls[name], measured[name]
                # These are the calls that warm up, too.
                slow = one["samples"] and one["samples"][-1] > WARM_CALL
                one["host_samples"].append(clock.host_cost(call, 1 if slow else HOST_CALLS))
                number = one["calls_per_sample"]
                one["samples"].append(clock.timed(call, number) / number)
                left[name] -= time.perf_counter() - begin
    finally:
        gc.enable()
    return measured


def summarise(rows: list[Row]) -> list[Row]:
    """Put medians and ratios into the rows; return means over cuDNN's persistent cells and others.

    A row in which ours was not measured has no ratios.
    """
    for row in rows:
        ours = row["peers"].get(OURS)
        for measured in row["peers"].values():
            measured["seconds"] = median(measured["samples"])
            measured["quartiles"] = spread(measured["samples"])
            measured["host"] = median(measured["host_samples"])
            measured["tflops"] = row["flops"] / measured["seconds"] / 1e12
            if ours:
                pairs = zip(measured["samples"], ours["samples"], strict=False)
                ratios = [theirs / own for theirs, own in pairs]
                measured["ratio"] = median(ratios)
                measured["ratio_quartiles"] = spread(ratios)

    means = []
    for mode in MODES:
        for persistent in (True, False):
            members = [
                row for row in rows if row["mode"] == mode and row["cudnn_persistent"] == persistent
            ]
            ratios = {}
            for name in GPU_PEERS:
                measured = [row["peers"][name] for row in members if name in row["peers"]]
                if name != OURS and (found := [m["ratio"] for m in measured if "ratio" in m]):
                    mean = geometric_mean(found)
                    ratios[name] = {"mean": mean, "least": min(found), "rows": len(found)}
            if ratios:
                means.append({"mode": mode, "cudnn_persistent": persistent, "ratios": ratios})
    return means


def describe(device: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """The GPU and what drives it. For a worker: it makes a CUDA context."""
    tell("the device")
    if device != "cuda":
        return {"name": f"none: a dry run on the CPU ({platform.machine()})"}
    properties = device_properties()
    driver, most = nvidia_smi("driver_version", "clocks.max.sm") or ("", "")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": l2_bytes(),
        "driver": driver,
        "most_sm_mhz": most,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def device_properties() -> Any:
    return torch.cuda.get_device_properties(torch.cuda.current_device())


def l2_bytes() -> int:
    return getattr(device_properties(), "L2_cache_size", 2**26)  # since torch 2.5


def sm_clock() -> int | None:
    """The clock of the multiprocessors now, in MHz."""
    found = nvidia_smi("clocks.sm") if torch.cuda.is_initialized() else []
    return int(found[0]) if found and found[0].isdigit() else None


def nvidia_smi(*fields: str) -> list[str]:
    """What nvidia-smi says of the GPU in use; nothing where there is none of it."""
    if not shutil.which("nvidia-smi"):
        return []
    uuid = getattr(device_properties(), "uuid", None)  # since torch 2.5
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    command += ["-i", f"GPU-{uuid}" if uuid else str(torch.cuda.current_device())]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [word.strip() for word in answer.stdout.split(",")]
