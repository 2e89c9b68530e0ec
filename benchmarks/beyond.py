"""Show what the table of compare.py cannot: cells, ragged batches, memory, first calls, company.

python benchmarks/beyond.py                      every part this machine can run: some six minutes
python benchmarks/beyond.py --quick              the same in less than two, to see that it works
python benchmarks/beyond.py --parts memory growth --plot growth.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import beyond_report
import cli
import machine
from crowded import crowded
from measure import Row, active_isa
from memory import growth, memory
from parts import Plan, cell, eager, first, projection, ragged, scaling, stacked
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Part:
    run: Callable[[Plan], list[Row]]
    cpus: int = 1  # that it needs


PARTS = {
    "eager": Part(eager),
    "cell": Part(cell),
    "ragged": Part(ragged),
    "projection": Part(projection),
    "stacked": Part(stacked),
    "memory": Part(memory),
    "growth": Part(growth),
    "first": Part(first),
    "crowded": Part(crowded, cpus=2),
    "scaling": Part(scaling, cpus=2),
}


def parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    add = made.add_argument
    add("--parts", nargs="+", choices=PARTS, help="default: all that this machine can run")
    add("--seconds", type=float, default=1.0, help="for each row that is timed in turns")
    add("--rounds", type=int, default=3, help="at least so many, even past --seconds (default: 3)")
    add("--quick", action="store_true", help="few cases, --seconds 0.2 --rounds 2")
    cli.add_outputs(made, "a picture of growth")
    return made


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    made = parser()
    args = made.parse_args(arguments)
    args.command = cli.command(made, args, "benchmarks/beyond.py")
    if args.rounds < 1 or args.seconds < 0:
        made.error("--rounds must be at least 1, --seconds at least 0")
    if args.quick:
        args.seconds, args.rounds = 0.2, 2
    cpus = len(machine.available_cpus())
    for name in args.parts or []:
        if PARTS[name].cpus > cpus:
            made.error(f"{name} needs {PARTS[name].cpus} CPUs, this process may use {cpus}")
    chosen = args.parts or [name for name, part in PARTS.items() if part.cpus <= cpus]
    args.parts = [name for name in PARTS if name in chosen]
    if args.plot and "growth" not in args.parts:
        made.error("--plot shows the part growth")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    data = cli.head(args, ("parts", "seconds", "rounds", "quick"))
    data["settings"]["dtype"] = "float32"
    data["isa"] = active_isa()
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        for name in args.parts:

            def tell(what: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: {what}")

            for row in PARTS[name].run(Plan(args.seconds, args.rounds, args.quick, tell)):
                data["rows"].append({"part": name, **row})
    return data


def main() -> None:
    args = parse()
    cli.write(run(args), args, beyond_report)


if __name__ == "__main__":
    main()
