"""Compare fastlstm on a GPU with cuDNN through torch.nn.LSTM, and with others that are installed.

python benchmarks/compare.py --device cuda                       everything, some three minutes
python benchmarks/compare.py --device cuda --cases 1x1x256x256 --dtypes bfloat16 --l2 cold
python benchmarks/gpu.py --device cpu                            a dry run of the same code
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from typing import Any

import cli
import gpu_report
from cases import DRY_CASES, GPU_CASES, Case
from gpu_measure import MODES, Job, describe, measure, summarise
from gpu_peers import GPU_PEERS, PRECISIONS
from gpu_worker import Lost, Worker
from peers import OURS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

NEEDED = (OURS, "torch")  # without them there is nothing to compare


def parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    add = made.add_argument
    add("--device", choices=["cuda", "cpu"], required=True, help="cpu: a dry run, tiny cases")
    add("--cases", nargs="+", metavar="T×N×D×H", help="default: all")
    add("--dtypes", nargs="+", choices=PRECISIONS, help="default: those listed with each case")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--peers", nargs="+", choices=GPU_PEERS, help="default: all; scan only on a GPU")
    add("--seconds", type=float, default=1.5, help="for each case, dtype and mode")
    add("--rounds", type=int, default=5, help="at least so many, even past --seconds (default: 5)")
    add("--within", type=float, default=480.0, metavar="SECONDS", help="for everything together")
    add("--limit", type=float, default=60.0, metavar="SECONDS", help="for a case; a hang ends so")
    add("--l2", choices=["warm", "cold"], default="warm", help="cold: cleared before every call")
    cli.add_outputs(made)
    return made


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    made = parser()
    args = made.parse_args(arguments)
    script = "benchmarks/compare.py" if args.device == "cuda" else "benchmarks/gpu.py"
    args.command = cli.command(made, args, script)
    if args.rounds < 1 or min(args.seconds, args.within, args.limit) <= 0:
        made.error("--rounds must be at least 1; --seconds, --within and --limit above 0")
    try:
        args.cases = select(GPU_CASES if args.device == "cuda" else DRY_CASES, args)
    except ValueError as error:
        made.error(f"--cases: {error}")
    default = [name for name in GPU_PEERS if args.device == "cuda" or name != "scan"]
    args.peers = [name for name in GPU_PEERS if name in (args.peers or default)]
    args.modes = [name for name in MODES if name in args.modes]
    return args


def select(
    cases: list[tuple[Case, tuple[str, ...]]], args: argparse.Namespace
) -> list[tuple[Case, str]]:
    """Each case with each of its precisions."""
    names = [name.replace("x", "×") for name in args.cases or []]
    known = [case.name for case, _ in cases]
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}")
    return [
        (case, precision)
        for case, precisions in cases
        if not names or case.name in names
        for precision in args.dtypes or precisions
    ]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything in one process, in a new one after a crash or a hang."""
    data = cli.head(args, ("device", "modes", "peers", "seconds", "rounds", "within", "l2"))
    data["failures"] = []
    end = time.monotonic() + args.within
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or each profile() would report itself
    worker = Worker()
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    try:
        data["gpu"] = worker.call(args.limit, describe, args.device)
        banned: dict[str, str] = {}
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=len(args.cases))
            for index, (case, precision) in enumerate(args.cases):
                label = f"{case.label} {precision}"
                progress.update(task, description=label)
                left = end - time.monotonic()
                # Half of what is left is for compiling, checking and finding the number of calls.
                share = left / 2 / (len(args.cases) - index) / len(args.modes)
                job = Job(
                    case,
                    precision,
                    tuple(name for name in args.peers if name not in banned),
                    tuple(args.modes),
                    args.device,
                    min(args.seconds, share),
                    args.rounds,
                    args.l2 == "cold",
                    dict(banned),
                )
                data["rows"] += measured(worker, job, args.limit, end, banned, data["failures"])
                progress.advance(task)
    except Lost as lost:
        data["failures"].append(str(lost))
    finally:
        worker.close()
    data["geometric_means"] = summarise(data["rows"])
    data["failures"] += wrong(data["rows"])
    return data


def measured(
    worker: Worker,
    job: Job,
    limit: float,
    end: float,
    banned: dict[str, str],
    failures: list[str],
) -> list[dict[str, Any]]:
    """The rows of a case, without the peers at whose turn the process died or hung."""
    label = f"{job.case.label} {job.precision}"
    while (left := end - time.monotonic()) > 0:
        try:
            rows: list[dict[str, Any]] = worker.call(min(limit, left), measure, job)
            return rows
        except Lost as lost:
            if lost.at not in job.peers:
                failures.append(f"{label}: {lost}")
                return []
            if lost.at not in NEEDED:  # what it did once it may do again
                banned[lost.at] = f"{lost.reason}, at {label}"
            job = replace(
                job,
                peers=tuple(name for name in job.peers if name != lost.at),
                left_out=job.left_out | {lost.at: lost.reason},
            )
    failures.append(f"{label}: not measured, the time of --within was over")
    return []


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """Where ours or nn.LSTM should have been measured and was not; torch's own path is no error."""
    found = {}
    for row in rows:
        for name, reason in row["left_out"].items():
            if name in NEEDED and not reason.startswith("ran on torch's own path"):
                found[f"{row['case']} {row['dtype']}: {name}: {reason}"] = None
    return list(found)


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 if something that should have been measured was not."""
    args = parse(arguments)
    data = run(args)
    cli.write(data, args, gpu_report, width=150)
    return 1 if data["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
