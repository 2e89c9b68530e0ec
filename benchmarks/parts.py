"""What the parts of beyond.py share, and those that time calls: all but memory, growth, crowded.

A part is a function that measures in processes of its own and returns rows; what runs inside those
processes stands above it. Both peers are called the same way, and take turns as in measure.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
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
from peers import OURS, PEERS, Prepared

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
    """A row of both, timed in turn; a difference between their results is an error.

    There may be more than the two.
    """
    row = new_row(case, mode, settings)
    if checked:
        expected = prepared["torch"].results(prepared["torch"].call())
        for name, one in prepared.items():
            if name != "torch":
                check(one, expected, BOTH_FLOAT32)
    with watch(row):
        calls = {name: one.call for name, one in prepared.items()}
        row["peers"], row["fma_peak_gflops"] = interleave(calls, settings)
    summarise_row(row)
    return row


def module_row(case: Case, mode: str, settings: Settings, checked: bool = True) -> Row:
    training = mode == "training"
    with torch.set_grad_enabled(training):
        problem = Problem.random(case, settings.dtype)
        prepared = {n: PEERS[n].prepare(problem, training, settings.threads) for n in PAIR}
        if case.shortest:
            prepared["padded"] = padded(problem, training, settings.threads)
        return time_pair(case, mode, prepared, settings, checked)


def in_workers(
    cases: list[Case], row: Callable[[Case, str, Settings], Row], plan: Plan
) -> list[Row]:
    """A row of every case and mode with one thread and with two."""
    rows = []
    for threads in thread_counts(2):
        with worker(available_cpus()[:threads]) as process:
            for case in cases:
                for mode in MODES:
                    plan.tell(f"{case.label} {mode}, {threads} thread(s)")
                    work = process.submit(row, case, mode, plan.settings(threads))
                    rows.append(work.result())
    return rows


# eager: a plain call of a single step, taken apart

EAGER = [Case("eager", 1, 1, H, H) for H in (64, 128)]


class Empty(torch.nn.Module):
    """What any module costs."""

    def forward(self, input: torch.Tensor, hx: Any = None) -> torch.Tensor:
        return input


def eager_row(case: Case, settings: Settings) -> Row:
    """Ours and nn.LSTM in inference, beside what a call of ours is made of.

    The class without checks reads its weights anew and runs the layer, as any drop-in must; the
    rest of a call is what support of packed sequences, half precision, compilers, transforms and
    errors costs.
    """
    from fastlstm import _core
    from fastlstm._torch import run_layer

    class Unchecked(module_class(OURS)):  # type: ignore[misc]
        def forward(self, input: Any, hx: Any = None) -> Any:
            own = self._parameters
            y, h, c = run_layer(
                1, input, None, None, [own[name] for name in self._flat_weights_names]
            )
            return y, (h, c)

    problem = Problem.random(case, settings.dtype)
    x, arrays = torch.from_numpy(problem.x), list(problem.weights.values())
    y, h, c = (np.empty((1, 1, case.H), problem.x.dtype) for _ in range(3))
    unchecked = Unchecked(case.D, case.H).eval()
    unchecked.load_state_dict({n: torch.from_numpy(w) for n, w in problem.weights.items()})
    weights = list(unchecked.parameters())
    sizes = (case.D, case.H, 0, 1, 1, False, 3, 0)
    empty = Empty()

    def kernel() -> Any:
        nothing = None, None, None
        threads = settings.threads
        _core.forward(problem.x, None, None, arrays, y, h, c, *nothing, (), False, threads)
        return y, (h, c)

    prepared = {name: PEERS[name].prepare(problem, False, settings.threads) for name in PAIR}
    expected = prepared["torch"].results(prepared["torch"].call())
    prepared["unchecked"] = Prepared(lambda: unchecked(x), prepared[OURS].results)
    prepared["kernel"] = Prepared(kernel, lambda result: {"y": result[0]})
    row = new_row(case, "inference", settings)
    with torch.no_grad():
        for one in prepared.values():
            check(one, expected, BOTH_FLOAT32)
        assert _core.fits(x, None, weights, *sizes)
        calls = {name: one.call for name, one in prepared.items()}
        calls["fits"] = lambda: _core.fits(x, None, weights, *sizes)
        calls["empty"] = lambda: empty(x)
        with watch(row):
            row["peers"], row["fma_peak_gflops"] = interleave(calls, settings)
    summarise_row(row)
    return row


def eager(plan: Plan) -> list[Row]:
    rows = []
    with worker(available_cpus()[:1]) as process:
        for case in EAGER[:1] if plan.quick else EAGER:
            plan.tell(case.label)
            rows.append(process.submit(eager_row, case, plan.settings(1)).result())
    return rows


# ragged: sequences of many lengths; projection; stacked: several layers

RAGGED = [Case("ragged", 200, 64, H, H, shortest=20) for H in (128, 256)]
PROJECTED = [
    Case("projection", 100, 16, 128, 512, proj_size=128),
    Case("projection", 50, 64, 256, 1024, proj_size=256),
]
STACKED = [
    Case("stacked", 1, 1, 64, 64, num_layers=2),
    Case("stacked", 100, 1, 64, 64, num_layers=2),
    Case("stacked", 1000, 1, 64, 64, num_layers=4),
    Case("stacked", 1000, 1, 128, 128, num_layers=2),
    Case("stacked", 100, 1, 256, 256, num_layers=2),
    Case("stacked", 100, 32, 128, 128, num_layers=2),
]


def padded(problem: Problem, training: bool, threads: int) -> Prepared:
    """Ours on the same sequences, all of them padded to length T."""
    case = problem.case
    real = np.arange(case.T)[:, None] < case.lengths
    dense = replace(
        problem, case=replace(case, shortest=0), grad_y=problem.grad_y * real[:, :, None]
    )
    dense = dense.map(lambda array: array.astype(problem.x.dtype))
    prepared = PEERS[OURS].prepare(dense, training, threads)

    def results(result: Any) -> dict[str, Any]:
        found = prepared.results(result)
        return {n: a[real] if n in ("y", "grad x") else a for n, a in found.items()}

    return prepared._replace(results=results)


def ragged(plan: Plan) -> list[Row]:
    return in_workers(RAGGED[:1] if plan.quick else RAGGED, module_row, plan)


def projection(plan: Plan) -> list[Row]:
    return in_workers(PROJECTED[:1] if plan.quick else PROJECTED, module_row, plan)


def stacked(plan: Plan) -> list[Row]:
    return in_workers(STACKED[1:2] if plan.quick else STACKED, module_row, plan)


# cell: steps of an LSTMCell in a Python loop

CELL_SIZES = (1, 64, 64), (1, 256, 256), (32, 64, 128), (32, 256, 256)
CELLS = [Case("cell", 100, *sizes) for sizes in CELL_SIZES]


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
    return in_workers(CELLS, cell_row, plan)


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
