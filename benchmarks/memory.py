"""Two parts of beyond.py: memory, and what very long sequences cost in time and memory."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from cases import Case
from machine import available_cpus
from measure import Row, new_row, worker
from parts import MODES, PAIR, Plan, module_call, module_class, module_row
from torch.autograd.graph import saved_tensors_hooks

# memory: what a training step keeps, and its peak

KEPT = [
    Case("memory", *sizes)
    for sizes in ((100, 32, 64, 64), (100, 32, 128, 128), (1000, 32, 256, 256))
]


def saved_bytes(name: str, case: Case) -> dict[str, int]:
    """Bytes of the distinct storages that a forward call saves for its backward."""
    module = module_class(name)(case.D, case.H)
    x = torch.randn(case.T, case.N, case.D, requires_grad=True)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y, state = module(x)
    there_anyway = {t.untyped_storage().data_ptr() for t in (x, y, *state, *module.parameters())}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    extra = sum(size for at, size in storages.items() if at not in there_anyway)
    return {"saved_extra": extra, "saved": sum(storages.values())}


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def peak_bytes(name: str, case: Case, training: bool) -> int:
    """Resident memory at the peak of one call, less that just before it. For a fresh process.

    VmHWM is ru_maxrss of this process alone, and can be set back: ru_maxrss would start at the
    size of the parent, and the peak of an import would hide as much of the call's.
    """
    module = module_class(name)(case.D, case.H)
    x = torch.randn(case.T, case.N, case.D)
    with torch.set_grad_enabled(training):
        module_call(module, x[:2, :1].clone(), training)()
        call = module_call(module, x, training)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = status_bytes("VmHWM")
        result = call()
        after = status_bytes("VmHWM")
        del result
    return after - before


def peak(name: str, case: Case, training: bool) -> int:
    with worker(available_cpus()[:1]) as process:
        return process.submit(peak_bytes, name, case, training).result()


def memory(plan: Plan) -> list[Row]:
    cases = KEPT[:1] if plan.quick else KEPT
    rows = [new_row(case, "training", plan.settings(1)) for case in cases]
    with worker(available_cpus()[:1]) as process:
        for row, case in zip(rows, cases, strict=True):
            plan.tell(f"{case.name}, kept for backward")
            row["peers"] = {n: process.submit(saved_bytes, n, case).result() for n in PAIR}
    for name, measured in rows[-1]["peers"].items():
        plan.tell(f"{cases[-1].name}, peak of {name}")
        measured["peak"] = peak(name, cases[-1], True)
    return rows


# growth: short to very long sequences

GROWING = [(1, 64, 64), (16, 64, 128)]
LENGTHS = [10, 100, 1000, 10_000, 100_000]
LONG = 1000  # below it the memory of a call is lost in what the process has anyway
CHECKED = 10_000  # comparing longer outputs would take several times their memory
MOST_MEMORY = 4e9


def training_bytes(case: Case) -> float:
    """About what a training step needs: x twice and its gradient, y and its, gates and cells."""
    return 4 * case.T * case.N * (3 * case.D + 8 * case.H)


def growth(plan: Plan) -> list[Row]:
    lengths = LENGTHS[:3] if plan.quick else LENGTHS
    cases = [Case("growth", T, *sizes) for sizes in GROWING for T in lengths]
    rows = []
    with worker(available_cpus()[:1]) as process:
        for case in cases:
            for mode in MODES:
                if mode == "inference" or training_bytes(case) <= MOST_MEMORY:
                    plan.tell(f"{case.name} {mode}")
                    checked = case.T <= CHECKED
                    work = process.submit(module_row, case, mode, plan.settings(1), checked)
                    rows.append(work.result())
    for case in cases:
        if case.T >= LONG:
            row = new_row(case, "inference peak", plan.settings(1))
            for name in PAIR:
                plan.tell(f"{case.name}, peak of {name}")
                output = 4 * case.T * case.N * case.H
                row["peers"][name] = {"peak_beyond_output": peak(name, case, False) - output}
            rows.append(row)
    return rows
