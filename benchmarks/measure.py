"""Measuring one case: every peer in turn, round after round, in one process.

Each sample is a number of calls in a row, enough to last MIN_SAMPLE seconds. A round takes one
sample of every peer, in an order that changes from round to round, so that what disturbs the
machine disturbs all of them alike; ratios are taken within a round, and their median is reported.
The FMA peak of the machine is measured in every round too, for the same reason.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from statistics import geometric_mean, median, quantiles
from typing import Any

import numpy as np
import torch
from cases import GROUPS, Arrays, Case, Problem
from machine import available_cpus, bound_to, busy_seconds
from peers import OURS, PEERS, Prepared, torch_lstm

Row = dict[str, Any]

MIN_SAMPLE = 0.005  # seconds; perf_counter and the loop around the calls vanish in it
SETTLE = 0.010  # seconds between samples; the idle workers of OpenMP spin for less than this
WARM_CALL = 0.050  # a call that takes longer than this needs no warm-up before every sample
# A result further off than this is wrong; in half precision, 16 units in the last place.
TOLERANCE = {"float32": 1e-4, "float64": 1e-11, "bfloat16": 2.0**-3, "float16": 2.0**-6}
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    peers: tuple[str, ...]
    modes: tuple[str, ...]
    dtype: str
    threads: int
    seconds: float
    rounds: int


@contextmanager
def worker(cpus: list[int]) -> Iterator[ProcessPoolExecutor]:
    """A process of its own, on these CPUs from its start, with as many threads."""
    with ProcessPoolExecutor(1, get_context("spawn"), start_worker, (len(cpus),)) as process:
        with bound_to(cpus):
            first = process.submit(active_isa)  # starts the process, which is bound with us
        first.result()
        yield process


def start_worker(threads: int) -> None:
    """Run once in the process of a thread count, which is bound to as many CPUs already."""
    import fastlstm

    torch.set_num_threads(threads)
    fastlstm.set_num_threads(threads)


def active_isa() -> str:
    from fastlstm import _core

    return _core.active_isa()


def measure_case(case: Case, settings: Settings) -> list[Row]:
    """One row for each mode: sizes, samples, errors."""
    problem = random_problem(case, settings.dtype)
    expected = reference(problem, "training" in settings.modes)
    rows = []
    for mode in settings.modes:
        training = mode == "training"
        row = new_row(case, mode, settings)
        calls: dict[str, Callable[[], Any]] = {}
        with torch.set_grad_enabled(training):
            for name in settings.peers:
                peer = PEERS[name]
                if mode not in peer.modes or settings.dtype not in peer.dtypes:
                    continue
                try:
                    prepared = peer.prepare(problem, training, settings.threads)
                    errors = check(prepared, expected, TOLERANCE[settings.dtype])
                except Exception as error:
                    # nn.LSTM may be wrong in half precision: with torch 2.13 dx in bfloat16 is, on
                    # CPUs with AMX, at H=1024.
                    if name == OURS or (name == "torch" and settings.dtype not in HALF):
                        raise
                    first_line = str(error).partition("\n")[0]
                    row["left_out"][name] = f"{type(error).__name__}: {first_line}"
                    continue
                calls[name] = prepared.call
                row["peers"][name] = errors
            with watch(row):
                measured, row["fma_peak_gflops"] = interleave(calls, settings)
            for name, samples in measured.items():
                row["peers"][name].update(samples)
        rows.append(row)
    return rows


def random_problem(case: Case, dtype: str) -> Problem:
    """In half precision, which NumPy has only in part, its arrays are torch's tensors."""
    if half := HALF.get(dtype):
        return Problem.random(case, "float32").map(lambda array: torch.from_numpy(array).to(half))
    return Problem.random(case, dtype)


def peak_dtype(dtype: str) -> str:
    """The dtype of the FMA peak that operations are compared with."""
    return "float32" if dtype in HALF else dtype


def new_row(case: Case, mode: str, settings: Settings) -> Row:
    return {
        "case": case.name,
        "label": case.label,
        "group": case.group,
        **{size: getattr(case, size) for size in ("T", "N", "D", "H", "num_layers")},
        "bidirectional": case.bidirectional,
        "mode": mode,
        "threads": settings.threads,
        "dtype": settings.dtype,
        "flops": case.flops(mode == "training"),
        "peers": {},
        "left_out": {},
    }


def reference(problem: Problem, training: bool) -> Arrays:
    """The results of torch.nn.LSTM in float64, on the same numbers."""
    with torch.set_grad_enabled(training):
        doubles = problem.map(lambda array: torch.as_tensor(array).double())
        prepared = torch_lstm(doubles, training, threads=0)
        return prepared.results(prepared.call())


def check(prepared: Prepared, expected: Arrays, tolerance: float) -> dict[str, float]:
    """The largest errors, relative to the scale of the array they are in."""
    errors: dict[str, float] = {}
    for name, array in prepared.results(prepared.call()).items():
        if array.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {array.shape}, not {expected[name].shape}")
        scale = abs(expected[name]).max() or 1.0  # zero: the gradient of weight_hh at T=1
        difference = abs(array - expected[name]).max() / scale
        kind = "error_y" if name == "y" else "error_gradients"
        errors[kind] = max(errors.get(kind, 0.0), float(difference))
        if not difference <= tolerance:
            raise ValueError(f"{name} is off by {difference:.1e} of its scale")
    return errors


@contextmanager
def watch(
    row: Row, cpus: list[int] | None = None, own_seconds: Callable[[], float] = time.process_time
) -> Iterator[None]:
    """Note how much of the CPUs everyone else had meanwhile: a busy machine spoils the numbers."""
    cpus = cpus or available_cpus()
    wall, busy, own = time.perf_counter(), busy_seconds(cpus), own_seconds()
    yield
    wall, busy, own = (
        time.perf_counter() - wall,
        busy_seconds(cpus) - busy,
        own_seconds() - own,
    )
    row["percent_taken_by_others"] = max(0.0, 100 * (busy - own) / (wall * len(cpus)))


def interleave(
    calls: dict[str, Callable[[], Any]], settings: Settings
) -> tuple[dict[str, dict[str, Any]], list[float]]:
    """Samples (seconds per call) of every call and of the FMA peak (GFLOP/s), paired by round.

    Goes on for `settings.seconds`, and past them until there are `settings.rounds` rounds.
    """
    from fastlstm import _core

    itemsize = np.dtype(peak_dtype(settings.dtype)).itemsize
    peaks: list[float] = []
    gc.collect()
    gc.disable()
    try:
        numbers = {name: calibrate(call) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        start = time.perf_counter()
        for order in turns(calls):
            if len(peaks) >= settings.rounds and time.perf_counter() - start >= settings.seconds:
                break
            for name in order:
                time.sleep(SETTLE)
                if not samples[name] or samples[name][-1] < WARM_CALL:
                    calls[name]()
                samples[name].append(timed(calls[name], numbers[name]) / numbers[name])
            time.sleep(SETTLE)
            peaks.append(_core.fma_peak(settings.threads, itemsize))
    finally:
        gc.enable()
    measured = {
        name: {"calls_per_sample": numbers[name], "samples": samples[name]} for name in calls
    }
    return measured, peaks


def turns(names: Iterable[str]) -> Iterator[list[str]]:
    """In which order they take their turns, round by round."""
    order = list(names)
    for done in count(1):
        yield order
        order = order[1:] + order[:1]
        if done % len(order) == 0:
            order.reverse()  # or each would always follow the same other one


def timed(call: Callable[[], Any], number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return time.perf_counter() - start


def calibrate(
    call: Callable[[], Any], clock: Callable[[Callable[[], Any], int], float] = timed
) -> int:
    """The number of calls that last MIN_SAMPLE; check() has made the first one."""
    number = 1
    while (elapsed := clock(call, number)) < MIN_SAMPLE:
        number = math.ceil(1.2 * number * MIN_SAMPLE / elapsed)
    return number


def summarise(rows: list[Row]) -> list[Row]:
    """Put medians, ratios and speeds into the rows; return the geometric means of the groups."""
    for row in rows:
        summarise_row(row)

    means = []
    for first in unique(rows, "mode", "threads"):
        section = alike(rows, first, "mode", "threads")
        for group in [*GROUPS, "all"]:
            members = [row for row in section if group in (row["group"], "all")]
            if members:
                means.append(
                    {
                        **{key: first[key] for key in ("mode", "threads", "dtype")},
                        "group": group,
                        "cases": len(members),
                        "percent_of_peak": mean(members, OURS, "percent_of_peak"),
                        "ratios": {
                            name: mean(members, name, "ratio")
                            for name in PEERS
                            if name != OURS and any(name in row["peers"] for row in members)
                        },
                    }
                )
    return means


def summarise_row(row: Row) -> None:
    ours = row["peers"][OURS]["samples"]
    for measured in row["peers"].values():
        ratios = [theirs / own for theirs, own in zip(measured["samples"], ours, strict=True)]
        measured["seconds"] = median(measured["samples"])
        measured["ratio"] = median(ratios)
        measured["ratio_quartiles"] = spread(ratios)
        measured["gflops"] = row["flops"] / measured["seconds"] / 1e9
        pairs = zip(measured["samples"], row["fma_peak_gflops"], strict=True)
        shares = [row["flops"] / seconds / (peak * 1e9) for seconds, peak in pairs]
        measured["percent_of_peak"] = 100 * median(shares)


def spread(values: list[float]) -> list[float]:
    """The lower and the upper quartile."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = quantiles(values, n=4)
    return [low, high]


def mean(rows: list[Row], peer: str, quantity: str) -> float:
    return geometric_mean(row["peers"][peer][quantity] for row in rows if peer in row["peers"])


def alike(rows: list[Row], one: Row, *keys: str) -> list[Row]:
    return [row for row in rows if all(row[key] == one[key] for key in keys)]


def unique(rows: list[Row], *keys: str) -> list[Row]:
    """The first row of each combination of these keys."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), row)
    return list(found.values())
