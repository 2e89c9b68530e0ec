"""The same data as tables for the terminal, as a markdown file and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from cases import GROUPS
from measure import Row, alike, peak_dtype, unique
from peers import OURS, PEERS
from rich import box
from rich.console import Console
from rich.table import Table

METHOD = """\
Every time is the median of samples of at least 5 ms each. The peers take turns sample by sample in
one process, which is bound to as many CPUs as it may use threads. **Ratio** (the number with ×) is
a peer's time over that of fastlstm as a torch module in the same round, median over the rounds:
above 1 fastlstm is the faster one. Inference is the module in eval mode under `no_grad`; training
is forward and backward with gradients for the input and every weight. **Peak** is the share of the
FMA peak, measured in the same round on as many threads, that the operations of the matrix products
come to. **Error** is the largest difference from float64 `torch.nn.LSTM`, of the output and in
training of every gradient, relative to the largest value of the array it is in."""


Facts = list[tuple[str, str]]  # what the numbers were measured on and how, by name

# In the picture: the colours of the bar for nn.LSTM, mark and colour of the other peers.
BAR, BAR_BEHIND = "#93c5fd", "#fca5a5"
MARKS = {"onnxruntime": ("o", "#c2410c"), "openvino": ("D", "#7c3aed"), "jax": ("^", "#111827")}


@dataclass
class Sheet:
    """A table. Rows of one cell are headings; a cell may have a line break."""

    title: str
    header: list[str]
    rows: list[list[str]]


def sheets(data: dict[str, Any]) -> list[Sheet]:
    sections = unique(data["rows"], "mode", "threads")
    sections.sort(key=lambda row: (row["mode"], row["threads"]))
    made = [case_sheet(data, alike(data["rows"], row, "mode", "threads")) for row in sections]
    return made + [mean_sheet(data, row["mode"]) for row in unique(sections, "mode")]


def case_sheet(data: dict[str, Any], rows: list[Row]) -> Sheet:
    """Every case of one mode and thread count."""
    peers = [name for name in PEERS if any(name in row["peers"] for row in rows)]
    others = [name for name in peers if name != OURS]
    header = ["T×N×D×H", "fastlstm", "GFLOP\n/s", "peak", "error"]
    for name in others:
        header += [PEERS[name].title] + (["error"] if name == "torch" else [])
    lines, group = [], None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            lines.append([GROUPS[group]])
        ours = row["peers"][OURS]
        line = [
            row["case"],
            duration(ours["seconds"]),
            significant(ours["gflops"]),
            percent(ours["percent_of_peak"]),
            f"{error_of(ours):.0e}",
        ]
        for name in others:
            if measured := row["peers"].get(name):
                line.append(f"{duration(measured['seconds'])} {ratio(measured['ratio'])}")
            else:
                line.append("–")
            if name == "torch":
                line.append(f"{error_of(measured):.0e}" if measured else "–")
        lines.append(line)
    first = rows[0]
    title = f"{first['mode'].capitalize()}, {threads_text(first['threads'])}, {first['dtype']}"
    return Sheet(f"{title}: time and ratio to fastlstm", header, lines)


def mean_sheet(data: dict[str, Any], mode: str) -> Sheet:
    means = [one for one in data["geometric_means"] if one["mode"] == mode]
    peers = [name for name in PEERS if any(name in one["ratios"] for one in means)]
    lines = []
    for group in [*GROUPS, "all"]:
        for one in means:
            if one["group"] == group:
                ratios = [one["ratios"].get(name) for name in peers]
                lines.append(
                    [
                        GROUPS.get(group, "all cases"),
                        str(one["cases"]),
                        str(one["threads"]),
                        percent(one["percent_of_peak"]),
                        *("–" if value is None else ratio(value) for value in ratios),
                    ]
                )
    header = ["group", "cases", "threads", "peak", *(PEERS[name].title for name in peers)]
    return Sheet(f"{mode.capitalize()}: geometric means of the ratios", header, lines)


def slower_lines(data: dict[str, Any]) -> list[str]:
    """For every peer the cases in which it is ahead of fastlstm, and what could not be measured."""
    lines = []
    rows = data["rows"]
    for name in PEERS:
        if name in (OURS, "numpy") or not any(name in row["peers"] for row in rows):
            continue
        behind = [
            f"{label(row)} ({row['peers'][name]['ratio']:.3f}×)"
            for row in rows
            if name in row["peers"] and row["peers"][name]["ratio"] < 1
        ]
        lines.append(f"Below 1.0× {PEERS[name].title}: {'; '.join(behind) or 'no case'}.")
    for row in rows:
        for name, reason in row["left_out"].items():
            lines.append(f"Not measured: {PEERS[name].title}, {label(row)}: {reason}")
    return lines


def facts(data: dict[str, Any]) -> Facts:
    machine = data["machine"]
    timed = [row for row in data["rows"] if "fma_peak_gflops" in row]
    peaks = []
    for first in unique(timed, "threads"):
        rows = alike(timed, first, "threads")
        samples = sorted(peak for row in rows for peak in row["fma_peak_gflops"])
        peaks.append(
            f"{median(samples):.0f} GFLOP/s ({samples[0]:.0f} to {samples[-1]:.0f}) "
            f"on {threads_text(first['threads'])}"
        )
    found = [
        ("Date", data["date"]),
        ("Machine", f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['caches']}"),
        ("Memory, system", f"{machine['memory']}, {machine['system']}"),
        ("fastlstm kernels", data["isa"]),
        ("Versions", ", ".join(f"{name} {text}" for name, text in data["versions"].items())),
        ("Command", data["command"]),
    ]
    if peaks:
        found.insert(4, (f"FMA peak, {peak_dtype(data['settings']['dtype'])}", ", ".join(peaks)))
    key = "percent_taken_by_others"
    if taken := [row[key] for row in data["rows"] if key in row]:
        others = f"{median(taken):.0f}% while measuring, {max(taken):.0f}% in the worst row"
        found.insert(-1, ("CPU time others took", others))
    return found


def print_report(data: dict[str, Any], console: Console) -> None:
    print_facts(facts(data), console)
    print_sheets(sheets(data), console)
    for text in slower_lines(data):
        console.print(text, highlight=False, markup=False)


def print_facts(found: Facts, console: Console) -> None:
    for name, text in found:
        console.print(f"[bold]{name}[/]: {text}", highlight=False)


def print_sheets(sheets: list[Sheet], console: Console) -> None:
    for sheet in sheets:
        table = Table(
            title=sheet.title,
            title_style="bold",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=0,
            pad_edge=False,
        )
        # The width of a heading is left out of the first column's, or the rest would not fit.
        width = max(len(line[0]) for line in sheet.rows if len(line) > 1)
        table.add_column(sheet.header[0], width=width)
        for name in sheet.header[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        for line in sheet.rows:
            table.add_row(*line, style="bold" if len(line) == 1 else None)
        console.print(table, "")


def write_markdown(data: dict[str, Any], path: Path, picture: Path | None) -> None:
    lines = opening(facts(data), "Results", "benchmarks/compare.py")
    lines += ["", METHOD, "", *(f"- {line}" for line in slower_lines(data))]
    lines += picture_lines(path, picture, "How many times faster fastlstm is, case by case")
    for sheet in sheets(data):
        lines += ["", f"## {sheet.title}", *table_lines(sheet)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def opening(found: Facts, title: str, script: str) -> list[str]:
    lines = [f"# {title}", "", f"Written by `{script} --results`; not edited by hand."]
    lines += ["", "| | |", "|---|---|"]
    for name, text in found:
        lines.append(f"| {name} | {f'`{text}`' if name == 'Command' else text} |")
    return lines


def picture_lines(path: Path, picture: Path | None, text: str) -> list[str]:
    """The picture, if it lies beside the file that is to show it."""
    if picture is None or picture.resolve().parent != path.resolve().parent:
        return []
    return ["", f"![{text}]({picture.name})"]


def table_lines(sheet: Sheet) -> list[str]:
    header = " | ".join(sheet.header).replace("\n", "<br>")
    lines = ["", f"| {header} |", "|---" + "|--:" * (len(sheet.header) - 1) + "|"]
    for row in sheet.rows:
        blank = [""] * (len(sheet.header) - 1)
        cells = [f"**{row[0]}**", *blank] if len(row) == 1 else row
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(data: dict[str, Any], path: Path) -> None:
    """One panel for each mode and thread count: a bar for nn.LSTM, a mark for every other peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rows = data["rows"]
    modes, threads = data["settings"]["modes"], data["settings"]["threads"]
    shown = ["torch", *MARKS]
    ratios = [m["ratio"] for row in rows for name, m in row["peers"].items() if name in shown]
    limits = min([0.8, *ratios]) / 1.15, max([2.0, *ratios]) * 1.15

    # From the top: a heading for each group, then its cases.
    labels: list[str] = []
    headings: list[int] = []
    places: dict[str, int] = {}
    for first in unique(rows, "group"):
        headings.append(len(labels))
        labels.append(GROUPS[first["group"]])
        for row in unique(alike(rows, first, "group"), "case"):
            places[row["case"]] = len(labels)
            labels.append(row["case"])

    figure, axes = plt.subplots(
        len(threads),
        len(modes),
        figsize=(2 + 6 * len(modes), 1.6 + len(threads) * (0.9 + 0.2 * len(labels))),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for (count, mode), axis in zip(product(threads, modes), axes.flat, strict=True):
        for row in alike(rows, {"threads": count, "mode": mode}, "threads", "mode"):
            y = places[row["case"]]
            if torch := row["peers"].get("torch"):
                colour = BAR if torch["ratio"] >= 1 else BAR_BEHIND
                axis.barh(y, torch["ratio"] - 1, left=1, height=0.75, color=colour)
                right = (1.01, y)  # of the panel, where no bar and no mark is
                beside = axis.get_yaxis_transform()
                axis.text(*right, ratio(torch["ratio"]), transform=beside, va="center", fontsize=8)
            for name, (mark, colour) in MARKS.items():
                if other := row["peers"].get(name):
                    axis.plot(other["ratio"], y, mark, color=colour, markersize=4.5)
        axis.axvline(1, color="black", linewidth=1.2)
        axis.hlines(headings, *limits, color="#d1d5db", linewidth=0.6)
        axis.set_xscale("log")
        axis.set_xlim(*limits)
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params(axis="x", labelbottom=True)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="#e5e7eb", linewidth=0.6)
        axis.set_axisbelow(True)
        what = mode if mode == "inference" else "training (forward + backward)"
        axis.set_title(f"{what}, {threads_text(count)}", fontsize=10, fontweight="bold")
    for axis in axes[:, 0]:
        for place in headings:
            axis.get_yticklabels()[place].set_fontweight("bold")
    for axis in axes[-1]:
        axis.set_xlabel("← the other is faster  |  fastlstm is so many times faster →", fontsize=9)

    handles: list[Patch | Line2D] = [Patch(color=BAR, label="than torch.nn.LSTM (the number)")]
    present = [name for name in shown if any(name in row["peers"] for row in rows)]
    handles += [
        Line2D([], [], marker=mark, color=colour, linestyle="", label=f"than {name}")
        for name, (mark, colour) in MARKS.items()
        if name in present
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    versions = data["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in (OURS, *present) if name in versions)
    figure.suptitle(
        f"How many times faster fastlstm is on the CPU, {data['settings']['dtype']}\n"
        "cases: time steps × batch × input size × hidden size\n"
        f"{data['machine']['cpu']}, kernels: {data['isa']}\n{named}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def label(row: Row) -> str:
    return f"{row['case']} {row['mode']} {threads_text(row['threads'])}"


def threads_text(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")


def error_of(measured: dict[str, Any]) -> float:
    return float(max(measured["error_y"], measured.get("error_gradients", 0.0)))


def duration(seconds: float) -> str:
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{significant(seconds * factor)} {unit}"
    return f"{significant(seconds)} s"


def ratio(value: float) -> str:
    return f"{significant(value)}×"


def percent(value: float) -> str:
    return f"{value:.0f}%" if value >= 9.95 else f"{value:.1f}%"


def significant(value: float) -> str:
    """Three digits, but no more than two behind the point."""
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"
