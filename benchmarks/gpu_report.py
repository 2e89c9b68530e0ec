"""The rows of gpu.py as tables for the terminal, as a markdown file and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_measure import MODES
from gpu_peers import GPU_PEERS, PRECISIONS
from measure import Row, alike, unique
from peers import OURS
from report import (
    Facts,
    Sheet,
    duration,
    error_of,
    opening,
    percent,
    picture_lines,
    print_facts,
    print_sheets,
    ratio,
    table_lines,
)
from rich.console import Console

METHOD = """\
Times are of CUDA events around calls that run back to back, at least 5 ms of them to a sample: what
a call costs in a loop, the greater of the host's and the device's part. Every time is the median of
samples, with half the distance of the quartiles; the peers take turns sample by sample in one
process. **Ratio** (the number with ×) is a peer's time over fastlstm's in the same round, median
over the rounds, in brackets the quartiles: above 1 fastlstm is the faster one. **Host** is the time
until one call returns, to an idle device. Forward, inference is in eval mode under `no_grad`;
forward, training keeps what a backward pass needs; the last table has gradients for the input and
every weight. *float32, TF32* has `allow_tf32` on for cuDNN and for products, *float32* has both
off. **Error** is the largest difference from float64 `torch.nn.LSTM` without cuDNN on the same
numbers, of the output and of every gradient, relative to the largest value of the array it is in.
Where a call of fastlstm went through `aten::lstm`, which is torch's own path, it counts as not
measured."""

CACHES = {
    "warm": "warm: calls on the same tensors follow each other, as in a loop",
    "cold": "cold: written over before every call, outside the time that counts",
}
MARKS = {
    OURS: ("o", "#2563eb"),
    "torch": ("s", "#c2410c"),
    "flashrnn": ("D", "#7c3aed"),
    "haste": ("v", "#15803d"),
    "scan": ("^", "#6b7280"),
}


def facts(data: dict[str, Any]) -> Facts:
    gpu, machine, rows = data.get("gpu", {}), data["machine"], data["rows"]
    name = gpu.get("name", "unknown")
    if "capability" in gpu:
        name += f", capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors"
        name += f", {gpu['memory_bytes'] / 2**30:.0f} GiB, L2 {gpu['l2_bytes'] / 2**20:.0f} MiB"
    found = [("Date", data["date"]), ("GPU", name)]
    if "cuda" in gpu:
        cudnn = sum(bool(row["peers"].get("torch", {}).get("cudnn")) for row in rows)
        driver = f"driver {gpu['driver'] or 'unknown'}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}"
        driver += f"; nn.LSTM ran on cuDNN in {cudnn} of {len(rows)} rows"
        found.append(("Driver, CUDA, cuDNN", driver))
        clocks = [row["sm_mhz"] for row in rows if None not in row["sm_mhz"]]
        for k, when in enumerate(("before", "after")):
            if clocks:
                seen = [pair[k] for pair in clocks]
                text = f"{min(seen)} to {max(seen)} MHz of {gpu['most_sm_mhz']}"
                found.append((f"SM clock {when} the rows", text))
    return [
        *found,
        ("L2 cache", CACHES[data["settings"]["l2"]]),
        ("CPU, system", f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['system']}"),
        ("Versions", ", ".join(f"{name} {text}" for name, text in data["versions"].items())),
        ("Command", data["command"]),
    ]


def sheets(data: dict[str, Any]) -> list[Sheet]:
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in data["rows"])]
    made = [case_sheet(alike(data["rows"], {"mode": mode}, "mode")) for mode in modes]
    return [*made, mean_sheet(data)] if data["geometric_means"] else made


def case_sheet(rows: list[Row]) -> Sheet:
    """Every case of one mode."""
    others = [
        name
        for name in GPU_PEERS
        if name not in (OURS, "torch") and any(name in row["peers"] for row in rows)
    ]
    header = ["T×N×D×H"]
    for title in ("fastlstm", "nn.LSTM"):
        header += [title, "a step", "host", "error"]
    header += [GPU_PEERS[name].title for name in others]
    lines = []
    for first in unique(rows, "case"):
        lines.append([first["case"]])
        for row in alike(rows, first, "case"):
            line = [PRECISIONS[row["dtype"]][1]]
            for name in (OURS, "torch"):
                if measured := row["peers"].get(name):
                    line += [
                        time_and_ratio(name, measured),
                        duration(measured["seconds"] / row["T"]),
                        duration(measured["host"]),
                        f"{error_of(measured):.0e}",
                    ]
                else:
                    line += ["–"] * 4
            for name in others:
                other = row["peers"].get(name)
                line.append(time_and_ratio(name, other) if other else "–")
            lines.append(line)
    return Sheet(MODES[rows[0]["mode"]], header, lines)


def time_and_ratio(name: str, measured: dict[str, Any]) -> str:
    """Of nn.LSTM and ours with the spread; the ratio of ours is 1 and left out."""
    text = duration(measured["seconds"])
    if name in (OURS, "torch"):
        low, high = measured["quartiles"]
        text += f" ±{percent(50 * (high - low) / measured['seconds'])}"
    if name != OURS and "ratio" in measured:
        text += f" {ratio(measured['ratio'])}"
        if name == "torch":
            low, high = measured["ratio_quartiles"]
            text += f" ({low:.2f}–{high:.2f})"
    return text


def mean_sheet(data: dict[str, Any]) -> Sheet:
    means = data["geometric_means"]
    names = [name for name in GPU_PEERS if any(name in one["ratios"] for one in means)]
    lines = []
    for one in means:
        where = "cuDNN's persistent kernels" if one["cudnn_persistent"] else "elsewhere"
        line = [f"{MODES[one['mode']]}, {where}"]
        for name in names:
            if found := one["ratios"].get(name):
                line.append(
                    f"{ratio(found['mean'])} (≥ {found['least']:.2f}, {found['rows']} rows)"
                )
            else:
                line.append("–")
        lines.append(line)
    header = ["", *(GPU_PEERS[name].title for name in names)]
    return Sheet("Geometric means of the ratios (the least of them, how many)", header, lines)


def notes(data: dict[str, Any]) -> list[str]:
    """What failed, where fastlstm is behind, and what was not measured and why."""
    rows = data["rows"]
    lines = [f"FAILED: {failure}" for failure in data["failures"]]
    for name in GPU_PEERS:
        ratios = {
            label(row): row["peers"][name]["ratio"]
            for row in rows
            if name != OURS and "ratio" in row["peers"].get(name, {})
        }
        if ratios:
            behind = [f"{text} ({value:.3f}×)" for text, value in ratios.items() if value < 1]
            lines.append(f"Below 1.0× {title(name)}: {'; '.join(behind) or 'no case'}.")
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["left_out"].items():
            reasons.setdefault((name, reason), []).append(label(row))
    for (name, reason), labels in reasons.items():
        where = "everywhere" if len(labels) == len(rows) else "; ".join(labels)
        lines.append(f"Not measured: {title(name)}, {reason}: {where}".replace("\n", " "))
    served = {row["served"]: label(row) for row in reversed(rows) if row["served"]}
    lines += [f"fastlstm at {text}: {how}" for how, text in reversed(served.items())]
    return lines


def title(name: str) -> str:
    return GPU_PEERS[name].title.replace("\n", " ")


def label(row: Row) -> str:
    return f"{row['case']} {row['dtype']} {row['mode']}"


def print_report(data: dict[str, Any], console: Console) -> None:
    print_facts(facts(data), console)
    print_sheets(sheets(data), console)
    for text in notes(data):
        console.print(text, highlight=False, markup=False)


def write_markdown(data: dict[str, Any], path: Path, picture: Path | None) -> None:
    lines = opening(facts(data), "On a GPU", "benchmarks/compare.py --device cuda")
    lines += ["", METHOD, "", *(f"- {line}" for line in notes(data))]
    if data["rows"]:
        lines += picture_lines(path, picture, "The time of a call, case by case")
    for sheet in sheets(data):
        lines += ["", f"## {sheet.title}", *table_lines(sheet)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def place(row: Row) -> str:
    return f"{row['case']}, {PRECISIONS[row['dtype']][1]}"


def draw(data: dict[str, Any], path: Path) -> None:
    """A panel for each mode: the time of every peer, and nn.LSTM's over ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = data["rows"]
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    labels = [place(row) for row in unique(rows, "case", "dtype")]
    figure, axes = plt.subplots(
        1,
        len(modes),
        figsize=(2.5 + 4.5 * len(modes), 2 + 0.24 * len(labels)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for mode, axis in zip(modes, axes.flat, strict=True):
        for row in alike(rows, {"mode": mode}, "mode"):
            y = labels.index(place(row))
            for name, measured in row["peers"].items():
                mark, colour = MARKS[name]
                axis.plot(measured["seconds"], y, mark, color=colour, markersize=5)
            if "ratio" in row["peers"].get("torch", {}):
                text = ratio(row["peers"]["torch"]["ratio"])
                beside = axis.get_yaxis_transform()
                axis.text(1.01, y, text, transform=beside, va="center", fontsize=8)
        axis.set_xscale("log")
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(color="#e5e7eb", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_title(MODES[mode], fontsize=10, fontweight="bold")
        axis.set_xlabel("time of a call", fontsize=9)
    shown = [name for name in MARKS if any(name in row["peers"] for row in rows)]
    handles = [
        Line2D([], [], marker=MARKS[name][0], color=MARKS[name][1], linestyle="", label=title(name))
        for name in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    versions = data["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in (OURS, "torch") if name in versions)
    figure.suptitle(
        "Time of a call; at the right of each panel nn.LSTM's time over fastlstm's\n"
        f"{data.get('gpu', {}).get('name', '')}; {named}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
