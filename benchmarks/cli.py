"""What the commands have in common: options for output, the head of the results, writing them."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import machine
from rich.console import Console

OUTPUTS = ("json", "plot", "results")


def parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_outputs(made: argparse.ArgumentParser, picture: str = "a picture") -> None:
    add = made.add_argument
    add("--json", type=Path, metavar="PATH", help="write everything, raw samples too")
    add("--plot", type=Path, metavar="PATH", help=f"write {picture} (.png, .svg, .pdf)")
    add("--results", type=Path, metavar="PATH", help="write the tables as markdown")


def command(made: argparse.ArgumentParser, args: argparse.Namespace, script: str) -> str:
    """What to type for the same numbers: the options that were given, without those for output."""
    words = ["python", script]
    for action in made._actions:
        value = getattr(args, action.dest, None)
        if action.dest in OUTPUTS or value in (None, action.default):
            continue
        words.append(action.option_strings[-1])
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


def head(args: argparse.Namespace, settings: Iterable[str]) -> dict[str, Any]:
    """What results begin with: when, where and how they were measured."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": args.command,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "settings": {name: getattr(args, name) for name in settings},
        "rows": [],
    }


def write(data: dict[str, Any], args: argparse.Namespace, report: Any, width: int = 120) -> None:
    """Print the tables of `report` and write what was asked for; first what took the time."""
    if args.json:
        args.json.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    report.print_report(data, Console(width=None if sys.stdout.isatty() else width))
    if args.plot and data["rows"]:
        report.draw(data, args.plot)
    if args.results:
        report.write_markdown(data, args.results, args.plot)
    for path in (getattr(args, name) for name in OUTPUTS):
        if path and path.exists():
            print(f"wrote {path}", file=sys.stderr)
