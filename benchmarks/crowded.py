"""A part of beyond.py: throughput with more threads at work than there are CPUs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Problem
from machine import available_cpus
from measure import Row, new_row, watch, worker
from parts import MODES, PAIR, Plan
from peers import PEERS

CROWDED = [
    Case("crowded", *sizes)
    for sizes in (
        (1, 1, 64, 64),
        (100, 32, 64, 64),
        (100, 32, 128, 128),
        (50, 64, 256, 256),
        (100, 1, 256, 256),
    )
]
WINDOW = 0.15  # seconds for which calls are counted: many time slices of the scheduler
LEAD = 0.05  # seconds from handing out the work to its start, the same for both processes
calls_here: dict[tuple[str, str], Callable[[], Any]] = {}  # of a worker, by mode and peer


def get_ready(case: Case) -> None:
    calls_here.clear()
    problem = Problem.random(case, "float32")
    for mode in MODES:
        with torch.set_grad_enabled(mode == "training"):
            for name in PAIR:
                calls_here[mode, name] = PEERS[name].prepare(problem, mode == "training", 2).call
                calls_here[mode, name]()


def rate(mode: str, name: str, start: float) -> float:
    """Calls per second from `start`, by the clock that all processes share.

    It goes on a little after those it counts, or the last ones of the other would have company no
    more.
    """
    call = calls_here[mode, name]
    with torch.set_grad_enabled(mode == "training"):
        time.sleep(max(0.0, start - time.monotonic()))
        calls, now = 0, (begin := time.monotonic())
        while now < start + WINDOW:
            call()
            calls, now = calls + 1, time.monotonic()
        counted = calls / (now - begin)
        while time.monotonic() < start + 1.25 * WINDOW:
            call()
    return counted


def spin(start: float) -> None:
    while time.monotonic() < start + 1.25 * WINDOW:
        pass


def crowded(plan: Plan) -> list[Row]:
    cpus = available_cpus()[:2]
    rows: list[Row] = []
    with worker(cpus) as one, worker(cpus) as other, worker(cpus[1:]) as spinner:

        def rates(mode: str, name: str, *processes: Any) -> list[float]:
            start = time.monotonic() + LEAD
            works = [p.submit(rate, mode, name, start) for p in processes if p is not spinner]
            if spinner in processes:
                spinner.submit(spin, start)
            return [work.result() for work in works]

        def own_seconds() -> float:
            works = [p.submit(time.process_time) for p in (one, other, spinner)]
            return time.process_time() + sum(work.result() for work in works)

        for case in CROWDED[:2] if plan.quick else CROWDED:
            for process in (one, other):
                process.submit(get_ready, case).result()
            found = {mode: new_row(case, mode, plan.settings(2)) for mode in MODES}
            for row in found.values():
                row["peers"] = {name: {"alone": [], "pair": [], "spinner": []} for name in PAIR}
            taken: Row = {}
            with watch(taken, cpus, own_seconds):
                for index in range(1 if plan.quick else plan.rounds):
                    plan.tell(f"{case.name}, round {index + 1}")
                    for mode, row in found.items():
                        for name, measured in row["peers"].items():
                            alone = rates(mode, name, one) + rates(mode, name, other)
                            measured["alone"].append(alone)
                            measured["pair"].append(rates(mode, name, one, other))
                            measured["spinner"].append(rates(mode, name, one, spinner))
            rows += [{**row, **taken} for row in found.values()]
    return rows
