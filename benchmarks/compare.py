"""Compare fastlstm with torch.nn.LSTM and whichever of onnxruntime, openvino and jax is installed.

python benchmarks/compare.py                     everything: about a quarter of an hour
python benchmarks/compare.py --quick             one case of each group, few rounds
python benchmarks/compare.py --cases step 100x32x64x64 --modes inference --threads 1
python benchmarks/compare.py --cases 20x16x64x600           sizes of your own
python benchmarks/compare.py --device cuda       on a GPU: its own cases, peers and options (--help)
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import cli
import machine
import report
from cases import CASES, Case
from measure import TOLERANCE, Settings, active_isa, measure_case, summarise, worker
from peers import OURS, PEERS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

MODES = ["inference", "training"]


def parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    add = made.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--cases", nargs="+", metavar="CASE", help="groups, or any T×N×D×H (default: all listed)")
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add("--threads", nargs="+", type=int, default=[1, 2], metavar="N", help="default: 1 2")
    add("--dtype", choices=list(TOLERANCE), default="float32")
    add(
        "--peers",
        nargs="+",
        choices=[name for name in PEERS if name != OURS],
        help="what fastlstm is compared with (default: all that are installed); torch always is",
    )
    add("--seconds", type=float, default=4.0, help="for each case, mode and thread count")
    add("--rounds", type=int, default=5, help="at least so many, even past --seconds (default: 5)")
    add("--quick", action="store_true", help="one case of each group, --seconds 0.5 --rounds 3")
    cli.add_outputs(made)
    return made


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    made = parser()
    args = made.parse_args(arguments)
    args.command = cli.command(made, args, "benchmarks/compare.py")
    cpus = len(machine.available_cpus())
    for threads in args.threads:
        if not 1 <= threads <= cpus:
            made.error(f"--threads {threads}: this process may use {cpus} CPUs")
    if args.rounds < 1 or args.seconds < 0:
        made.error("--rounds must be at least 1, --seconds at least 0")
    try:
        args.cases = select(args.cases, args.quick)
    except ValueError as error:
        made.error(f"--cases: {error}")
    if args.quick:
        args.seconds, args.rounds = 0.5, 3
    chosen = [name for name in PEERS if name in {OURS, "torch", *(args.peers or PEERS)}]
    for name in chosen:
        if not PEERS[name].installed() and name in {OURS, "torch", *(args.peers or [])}:
            made.error(f"{name} needs to be installed: {', '.join(PEERS[name].packages)}")
    args.peers = [name for name in chosen if PEERS[name].installed()]
    return args


def select(names: list[str] | None, quick: bool) -> list[Case]:
    groups = {case.group: case for case in reversed(CASES)}  # the first of each
    if names is None:
        return [case for case in CASES if not quick or case is groups[case.group]]
    found = []
    for name in (name.replace("x", "×") for name in names):
        matches = [case for case in CASES if name in (case.group, case.name)]
        sizes = name.split("×")
        if not matches and len(sizes) == 4 and all(n.isdecimal() and int(n) for n in sizes):
            matches = [Case("own", *map(int, sizes))]
        if not matches:
            known = ", ".join(reversed(groups))
            raise ValueError(f"{name!r} is neither a group ({known}) nor T×N×D×H")
        found += matches
    own = [case for case in dict.fromkeys(found) if case not in CASES]
    return [case for case in CASES if case in found] + own


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, each thread count in a process of its own."""
    data = cli.head(args, ("modes", "threads", "dtype", "peers", "seconds", "rounds"))
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(args.threads) * len(args.cases))
        for threads in args.threads:
            settings = Settings(
                tuple(args.peers),
                tuple(args.modes),
                args.dtype,
                threads,
                args.seconds,
                args.rounds,
            )
            with worker(machine.available_cpus()[:threads]) as process:
                data["isa"] = process.submit(active_isa).result()
                for case in args.cases:
                    progress.update(task, description=f"{threads} thread(s), {case.name}")
                    data["rows"] += process.submit(measure_case, case, settings).result()
                    progress.advance(task)
    data["geometric_means"] = summarise(data["rows"])
    return data


def for_gpu(arguments: list[str]) -> bool:
    found = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    found.add_argument("--device")
    return found.parse_known_args(arguments)[0].device == "cuda"


def main() -> None:
    if for_gpu(sys.argv[1:]):
        import gpu

        sys.exit(gpu.main())
    args = parse()
    cli.write(run(args), args, report)


if __name__ == "__main__":
    main()
