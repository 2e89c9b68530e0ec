"""What the parts of beyond.py share, and three of them: cell, first and scaling.

A part is a function that measures in processes of its own and returns rows; what runs inside those
processes stands above it. Both peers are called the same way, and take turns as in measure.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from cases import CASES, Case, Problem
from machine import available_cpus
from measure import (
    Row,
    Settings,
    check,
    interleave,
    measure_case,
    new_row,
    summarise_row,
    timed,
    watch,
    worker,
)
from peers import OURS, Prepared

PAIR = (OURS, "torch")
MODES = ("inference", "training")
BOTH_FLOAT32 = 1e-3  # the two are compared with one another, and their rounding errors add up


@dataclass(frozen=True)
class Plan:
    seconds: float  # for each row
    rounds: int
    quick: bool
    tell: Callable[[str], None]  # what is being measured

    def settings(self, threads: int, *modes: str) -> Settings:
        return Settings(PAIR, modes or MODES, "float32", threads, self.seconds, self.rounds)


def thread_counts(most: int) -> list[int]:
    return [count for count in (1, 2, 4, 8, 16) if count <= min(most, len(available_cpus()))]


def module_class(name: str, kind: str = "LSTM") -> Any:
    if name == "torch":
        return getattr(torch.nn, kind)
    import fastlstm.nn

    return getattr(fastlstm.nn, kind)


def module_call(module: Any, x: torch.Tensor, training: bool) -> Callable[[], Any]:
    """One call of a module, or one step with gradients for x and every weight."""
    if not training:
        return lambda: module(x)
    x.requires_grad_()
    grad_y = torch.randn(*x.shape[:2], module.hidden_size)

    def step() -> Any:
        module.zero_grad()
        x.grad = None
        y, _ = module(x)
        y.backward(grad_y)
        return y

    return step


def time_pair(
    case: Case, mode: str, prepared: dict[str, Prepared], settings: Settings, checked: bool = True
) -> Row:
    """A row of both, timed in turn; a difference between their results is an error."""
    row = new_row(case, mode, settings)
    if checked:
        theirs = prepared["torch"]
        check(prepared[OURS], theirs.results(theirs.call()), BOTH_FLOAT32)
    with watch(row):
        calls = {name: one.call for name, one in prepared.items()}
        row["peers"], row["fma_peak_gflops"] = interleave(calls, settings)
    summarise_row(row)
    return row


# cell: steps of an LSTMCell in a Python loop

CELLS = [Case("cell", 100, *sizes) for sizes in ((1, 64, 64), (32, 64, 128), (32, 256, 256))]


def cell_loop(name: str, problem: Problem, training: bool) -> Prepared:
    case, x = problem.case, torch.from_numpy(problem.x)
    cell = module_class(name, "LSTMCell")(case.D, case.H)
    weights = {n.removesuffix("_l0"): torch.from_numpy(w) for n, w in problem.weights.items()}
    cell.load_state_dict(weights)

    def steps() -> list[torch.Tensor]:
        outputs, state = [], None
        for x_t in x.unbind():
            state = cell(x_t, state)
            outputs.append(state[0])
        return outputs

    if not training:
        return Prepared(steps, lambda outputs: {"y": torch.stack(outputs).numpy()})

    leaves = {"x": x.requires_grad_(), **dict(cell.named_parameters())}

    def train() -> torch.Tensor:
        for leaf in leaves.values():
            leaf.grad = None
        y = torch.stack(steps())
        y.sum().backward()
        return y

    def results(y: torch.Tensor) -> dict[str, Any]:
        gradients = {f"grad {n}": leaf.grad.numpy() for n, leaf in leaves.items()}
        return {"y": y.detach().numpy(), **gradients}

    return Prepared(train, results)


def cell_row(case: Case, mode: str, settings: Settings) -> Row:
    training = mode == "training"
    with torch.set_grad_enabled(training):
        problem = Problem.random(case, settings.dtype)
        prepared = {name: cell_loop(name, problem, training) for name in PAIR}
        return time_pair(case, mode, prepared, settings)


def cell(plan: Plan) -> list[Row]:
    rows = []
    for threads in thread_counts(2):
        with worker(available_cpus()[:threads]) as process:
            for case in CELLS:
                for mode in MODES:
                    plan.tell(f"{case.name} {mode}, {threads} thread(s)")
                    work = process.submit(cell_row, case, mode, plan.settings(threads))
                    rows.append(work.result())
    return rows


# first: the first call of a process, and of a length

FIRST = Case("first", 50, 8, 64, 64)
NEW_LENGTHS = range(50, 61)
LATER_CALLS = 25


def first_calls(name: str, training: bool) -> list[tuple[float, float]]:
    """For every length the seconds of its first call and of later ones. For a fresh process."""
    module = module_class(name)(FIRST.D, FIRST.H)
    calls = [module_call(module, torch.randn(T, FIRST.N, FIRST.D), training) for T in NEW_LENGTHS]
    other = torch.ones(2, requires_grad=True)
    (2 * other).backward(torch.ones(2))  # the first of a process imports for a quarter second
    found = []
    with torch.set_grad_enabled(training):
        for call in calls:
            seconds = timed(call, 1)
            found.append((seconds, median(timed(call, 1) for _ in range(LATER_CALLS))))
    return found


def first(plan: Plan) -> list[Row]:
    def own_seconds() -> float:
        return sum(os.times()[:4])  # with those of the processes that have ended

    rows = []
    for threads in thread_counts(2)[-1:] if plan.quick else thread_counts(2):
        for mode in MODES:
            row = new_row(FIRST, mode, plan.settings(threads))
            row["peers"] = {name: {"first_and_later": []} for name in PAIR}
            with watch(row, own_seconds=own_seconds):
                for index in range(1 if plan.quick else 3):
                    for name, measured in row["peers"].items():
                        plan.tell(f"{mode}, {threads} thread(s), {name}, process {index + 1}")
                        with worker(available_cpus()[:threads]) as process:
                            work = process.submit(first_calls, name, mode == "training")
                            measured["first_and_later"].append(work.result())
            rows.append(row)
    return rows


# scaling: more threads

SCALING = [
    ((100, 64, 512, 512), "training"),
    ((100, 1, 512, 512), "inference"),
    ((200, 16, 40, 256), "inference"),
    ((200, 16, 40, 256), "training"),
]


def scaling(plan: Plan) -> list[Row]:
    cases = {(case.T, case.N, case.D, case.H): case for case in CASES}
    rows: list[Row] = []
    for threads in thread_counts(16):
        with worker(available_cpus()[:threads]) as process:
            for sizes, mode in SCALING:
                plan.tell(f"{cases[sizes].name} {mode}, {threads} thread(s)")
                settings = plan.settings(threads, mode)
                rows += process.submit(measure_case, cases[sizes], settings).result()
    for row in rows:
        summarise_row(row)
    return rows
