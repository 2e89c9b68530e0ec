"""The rows of beyond.py as tables for the terminal, as a markdown file and as a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from measure import Row, alike, spread, unique
from parts import MODES
from peers import OURS
from report import (
    Sheet,
    duration,
    facts,
    opening,
    percent,
    picture_lines,
    print_facts,
    print_sheets,
    ratio,
    significant,
    table_lines,
    threads_text,
)
from rich.console import Console

METHOD = """\
Float32. Inference is in eval mode under `no_grad`; training is forward and backward with gradients
for the input and every weight. Processes are bound to as many CPUs as they may use threads. Where a
number with × stands beside a time it is that time over fastlstm's in the same round, the median
over the rounds: above 1 fastlstm is the faster one. With memory × is the same quotient: above 1
fastlstm takes less."""

TEXTS = {
    "eager": """\
One step (T=1, N=1) in inference, one thread, and what such a call is made of: the kernel alone
(called with NumPy arrays and memory for its outputs), the check of shapes, dtypes and memory
(`fits`), a call of a `torch.nn.Module` that does nothing, and fastlstm's module without any check:
it reads its weights and runs the layer. What fastlstm takes beyond that is the cost of serving
packed sequences, half precision, compilers, transforms and errors. The last lines are differences
within a round, the median over the rounds, in brackets the quartiles.""",
    "ragged": """\
A batch of sequences whose lengths are spread evenly, from 20 to 200 steps, as a `PackedSequence`:
fastlstm, nn.LSTM, and fastlstm on the same sequences padded to 200 steps. Packing is not in the
times.""",
    "projection": """\
`proj_size=P`: h has P columns.""",
    "stacked": """\
Several layers. In inference one call runs them all; with two threads each of two layers may have
its own, the upper one a few steps behind.""",
    "cell": """\
`LSTMCell` called 100 times from a Python loop; training adds the backward of the sum of all h. The
time is that of one of the steps.""",
    "memory": """\
What the forward call of a training step keeps for backward, in bytes for each of the T·N·H outputs:
the distinct storages that `torch.autograd.graph.saved_tensors_hooks` sees. *Extra* is without those
that live anyway (input, weights, y, h_n, c_n), *all* is with them. For nn.LSTM this counts the
workspace of oneDNN, which is a tensor too. The peak is the resident memory at the highest point of
one training step (y and the gradients are in it) less that just before, each in a fresh process
after a tiny step, one thread.""",
    "growth": """\
Time of one of the T steps, one thread. The peak is the resident memory at the highest point of an
inference call less that just before it and less the size of y, each in a fresh process.""",
    "first": """\
What a first call takes beyond later calls of the same shape (the median of 25). *Process*: the
first call of a fresh process at T=50, after the module is built and an unrelated torch operation
has run, forward and backward; median over the processes. *Length*: the first call at each T from 51
to 60 after that, median over lengths and processes.""",
    "crowded": """\
Throughput with company, as a share of the same process's throughput alone right before, two threads
on two CPUs. *Pair*: two such processes at once on the same two CPUs, the share of each; two halves
are fair (a call that runs on one thread has a CPU to itself and keeps all). *Spinner*: beside a
Python busy loop bound to one of the CPUs; work that is split in equal parts can keep 50%, work that
moves to the free CPU 75%. The time alone is of one call; × is how many times more calls fastlstm
makes in the same situation.""",
    "scaling": """\
Speed-up over one thread, and efficiency: speed-up over threads. Every thread count is a process of
its own: what disturbs the machine shows in both halves of a line alike, but not in every line.""",
}


def print_report(data: dict[str, Any], console: Console) -> None:
    print_facts(facts(data), console)
    print_sheets([SHEETS[name](rows) for name, rows in parts(data)], console)


def write_markdown(data: dict[str, Any], path: Path, picture: Path | None) -> None:
    lines = [*opening(facts(data), "Beyond the table", "benchmarks/beyond.py"), "", METHOD]
    for name, rows in parts(data):
        sheet = SHEETS[name](rows)
        lines += ["", f"## {sheet.title}", "", TEXTS[name], *table_lines(sheet)]
        if name == "growth":
            lines += picture_lines(path, picture, "Time of a step by the length of the sequence")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def parts(data: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    return [
        (name, alike(data["rows"], {"part": name}, "part")) for name in data["settings"]["parts"]
    ]


EAGER_PARTS = {
    "kernel": "kernel alone",
    "fits": "check of shapes, dtypes and memory",
    "empty": "empty module",
    "unchecked": "fastlstm without checks",
    OURS: "fastlstm",
    "torch": "nn.LSTM",
}


def eager_sheet(rows: list[Row]) -> Sheet:
    lines = [
        [title, *(duration(row["peers"][name]["seconds"]) for row in rows)]
        for name, title in EAGER_PARTS.items()
    ]
    for name in ("unchecked", "kernel"):
        title = f"fastlstm less {EAGER_PARTS[name]}"
        lines.append([title, *(difference(row, OURS, name) for row in rows)])
    header = ["T×N×D×H", *(row["case"] for row in rows)]
    return Sheet("A plain eager call of one step, taken apart", header, lines)


def difference(row: Row, one: str, other: str) -> str:
    """How much longer one takes, within a round."""
    pairs = zip(*(row["peers"][name]["samples"] for name in (one, other)), strict=True)
    found = [1e6 * (a - b) for a, b in pairs]
    low, high = spread(found)
    return f"{median(found):+.2f} µs ({low:+.2f} to {high:+.2f})"


def cell_sheet(rows: list[Row]) -> Sheet:
    peers = {OURS: "fastlstm", "torch": "LSTMCell"}
    return threads_sheet(rows, "LSTMCell in a Python loop: time of a step", peers, a_step=True)


def ragged_sheet(rows: list[Row]) -> Sheet:
    peers = {OURS: "fastlstm", "torch": "nn.LSTM", "padded": "fastlstm,\npadded"}
    return threads_sheet(rows, "Ragged batches", peers)


def projection_sheet(rows: list[Row]) -> Sheet:
    return threads_sheet(rows, "Projections", {OURS: "fastlstm", "torch": "nn.LSTM"})


def stacked_sheet(rows: list[Row]) -> Sheet:
    return threads_sheet(rows, "Stacked layers", {OURS: "fastlstm", "torch": "nn.LSTM"})


def threads_sheet(
    rows: list[Row], title: str, peers: dict[str, str], a_step: bool = False
) -> Sheet:
    """A line for every case, under a heading for every number of threads."""
    lines = []
    for count in unique(rows, "threads"):
        lines.append([threads_text(count["threads"])])
        section = alike(rows, count, "threads")
        for first in unique(section, "label"):
            modes = {row["mode"]: row for row in alike(section, first, "label")}
            line = [sizes(first) if a_step else first["label"]]
            for mode in MODES:
                line += times(modes[mode], first["T"] if a_step else 1, tuple(peers))
            lines.append(line)
    header = ["N×D×H" if a_step else "T×N×D×H"]
    header += [f"{mode}\n{name}" for mode in MODES for name in peers.values()]
    return Sheet(title, header, lines)


def memory_sheet(rows: list[Row]) -> Sheet:
    lines = []
    for row in rows:
        outputs = row["T"] * row["N"] * row["H"]
        line = [row["case"]]
        for key in ("saved_extra", "saved"):
            ours, theirs = (row["peers"][name][key] / outputs for name in (OURS, "torch"))
            line += [significant(ours), f"{significant(theirs)} {ratio(theirs / ours)}"]
        if "peak" in row["peers"][OURS]:
            line += mebibytes(*(row["peers"][name]["peak"] for name in (OURS, "torch")))
        else:
            line += ["–", "–"]
        lines.append(line)
    header = ["T×N×D×H"]
    for what in ("extra", "all", "peak"):
        header += [f"{what}\nfastlstm", f"{what}\nnn.LSTM"]
    return Sheet(
        "Memory of training: bytes kept per (t, n, h), and the peak of a step", header, lines
    )


def growth_sheet(rows: list[Row]) -> Sheet:
    lines = []
    for first in unique(rows, "case"):
        modes = {row["mode"]: row for row in alike(rows, first, "case")}
        line = [first["case"]]
        for mode in ("inference", "training"):
            line += times(modes.get(mode), first["T"])
        if row := modes.get("inference peak"):
            peers = row["peers"]
            line += mebibytes(*(peers[name]["peak_beyond_output"] for name in (OURS, "torch")))
        else:
            line += ["–", "–"]
        lines.append(line)
    header = ["T×N×D×H"]
    for what in ("inference", "training", "peak less y"):
        header += [f"{what}\nfastlstm", f"{what}\nnn.LSTM"]
    return Sheet("Length of the sequence: time of a step, peak of an inference call", header, lines)


def first_sheet(rows: list[Row]) -> Sheet:
    lines = []
    for row in rows:
        process, length, later = [], [], []
        for name in (OURS, "torch"):
            runs = row["peers"][name]["first_and_later"]
            extra = [[first - then for first, then in run] for run in runs]
            process.append(microseconds(median(run[0] for run in extra)))
            length.append(microseconds(median(one for run in extra for one in run[1:])))
            later.append(duration(median(then for run in runs for _, then in run)))
        lines.append([f"{row['mode']}, {threads_text(row['threads'])}", *process, *length, *later])
    header = [sizes(rows[0])]
    for what in ("process", "length", "later calls"):
        header += [f"{what}\nfastlstm", f"{what}\nnn.LSTM"]
    return Sheet("First calls: time beyond later calls", header, lines)


def crowded_sheet(rows: list[Row]) -> Sheet:
    lines = []
    for mode in unique(rows, "mode"):
        lines.append([mode["mode"]])
        for row in alike(rows, mode, "mode"):
            line = [row["case"]]
            for name, rates in row["peers"].items():
                seconds = median(1 / rate for both in rates["alone"] for rate in both)
                texts = {
                    "alone": duration(seconds),
                    "pair": " ".join(share_left(rates, "pair", k) for k in (0, 1)),
                    "spinner": share_left(rates, "spinner", 0),
                }
                for situation, text in texts.items():
                    if name != OURS:
                        theirs, ours = rates[situation], row["peers"][OURS][situation]
                        pairs = zip(ours, theirs, strict=True)
                        text += f" {ratio(median(sum(o) / sum(t) for o, t in pairs))}"
                    line.append(text)
            lines.append(line)
    header = ["T×N×D×H"]
    for peer in ("fastlstm", "nn.LSTM"):
        header += [f"{peer}\n{situation}" for situation in ("alone", "pair", "spinner")]
    return Sheet("Crowded CPUs: share of the throughput that is left", header, lines)


def share_left(rates: dict[str, list[list[float]]], situation: str, process: int) -> str:
    pairs = zip(rates[situation], rates["alone"], strict=True)
    return percent(100 * median(now[process] / alone[process] for now, alone in pairs))


def scaling_sheet(rows: list[Row]) -> Sheet:
    lines = []
    for one in unique(rows, "case", "mode"):
        for row in alike(rows, one, "case", "mode"):
            line = [f"{row['case']} {row['mode']}", str(row["threads"])]
            for (name, measured), time in zip(row["peers"].items(), times(row), strict=True):
                speed_up = one["peers"][name]["seconds"] / measured["seconds"]
                line += [time, ratio(speed_up), percent(100 * speed_up / row["threads"])]
            lines.append(line)
    header = ["T×N×D×H", "threads"]
    for name in ("fastlstm", "nn.LSTM"):
        header += [name, "speed-up", "efficiency"]
    return Sheet("Scaling with threads", header, lines)


SHEETS = {
    "eager": eager_sheet,
    "cell": cell_sheet,
    "ragged": ragged_sheet,
    "projection": projection_sheet,
    "stacked": stacked_sheet,
    "memory": memory_sheet,
    "growth": growth_sheet,
    "first": first_sheet,
    "crowded": crowded_sheet,
    "scaling": scaling_sheet,
}


def draw(data: dict[str, Any], path: Path) -> None:
    """Growth: a panel for each size and mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rows = [row for name, rows in parts(data) if name == "growth" for row in rows]
    timed = [row for row in rows if "fma_peak_gflops" in row]
    sections = unique(timed, "N", "D", "H", "mode")
    columns = len(unique(sections, "mode"))
    figure, axes = plt.subplots(
        len(sections) // columns,
        columns,
        figsize=(5 * columns, 3.2 * len(sections) // columns),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for first, axis in zip(sections, axes.flat, strict=True):
        lengths = alike(timed, first, "N", "D", "H", "mode")
        for name, colour, mark in ((OURS, "#2563eb", "o"), ("torch", "#c2410c", "s")):
            steps = [1e6 * row["peers"][name]["seconds"] / row["T"] for row in lengths]
            label = OURS if name == OURS else "nn.LSTM"
            axis.plot([row["T"] for row in lengths], steps, mark + "-", color=colour, label=label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(color="#e5e7eb", linewidth=0.6)
        axis.set_title(f"N×D×H {sizes(first)}, {first['mode']}", fontsize=10, fontweight="bold")
    for axis in axes[:, 0]:
        axis.set_ylabel("µs per step")
    for axis in axes[-1]:
        axis.set_xlabel("T, steps of the sequence")
    axes[0, 0].legend(frameon=False)
    versions, machine = data["versions"], data["machine"]
    figure.suptitle(
        "Time of a step by the length of the sequence, one thread, float32\n"
        f"{machine['cpu']}, kernels: {data['isa']}, "
        f"fastlstm {versions['fastlstm']}, torch {versions['torch']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def sizes(row: Row) -> str:
    return f"{row['N']}×{row['D']}×{row['H']}"


def times(row: Row | None, steps: int = 1, names: tuple[str, ...] = (OURS, "torch")) -> list[str]:
    """Of each, for one of so many steps."""
    if row is None:
        return ["–"] * len(names)
    texts = []
    for name in names:
        measured = row["peers"][name]
        text = duration(measured["seconds"] / steps)
        texts.append(text if name == OURS else f"{text} {ratio(measured['ratio'])}")
    return texts


def mebibytes(ours: float, theirs: float) -> list[str]:
    """Of both; a quotient of what is lost in the noise of other allocations says nothing."""
    mebi = [max(0.0, size / 2**20) for size in (ours, theirs)]
    texts = [f"{size:.{0 if size >= 100 else 1}f} MiB" for size in mebi]
    if min(mebi) >= 1:
        texts[1] += f" {ratio(theirs / ours)}"
    return texts


def microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:+.0f} µs"
