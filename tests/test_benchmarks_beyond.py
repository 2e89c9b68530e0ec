"""The parts of benchmarks/beyond.py that compare calls, on tiny cases."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import parts
from cases import Case
from measure import Settings
from peers import OURS, Prepared

SETTINGS = Settings(parts.PAIR, parts.MODES, "float32", threads=1, seconds=0.0, rounds=2)
RAGGED = Case("ragged", 6, 4, 3, 5, shortest=2)


def test_eager():
    pytest.importorskip("rich")
    import beyond_report

    row = parts.eager_row(Case("eager", 1, 1, 8, 8), SETTINGS)
    assert set(row["peers"]) == set(beyond_report.EAGER_PARTS)
    sheet = beyond_report.eager_sheet([row])
    assert [line[0] for line in sheet.rows[-2:]] == [
        "fastlstm less fastlstm without checks",
        "fastlstm less kernel alone",
    ]
    ours, kernel = (row["peers"][name]["samples"] for name in (OURS, "kernel"))
    less = sorted(1e6 * (a - b) for a, b in zip(ours, kernel, strict=True))
    assert sheet.rows[-1][1].startswith(f"{sum(less) / 2:+.2f} µs")  # the median of two


@pytest.mark.parametrize("mode", parts.MODES)
def test_ragged(mode):
    pytest.importorskip("rich")
    import beyond_report

    row = parts.module_row(RAGGED, mode, SETTINGS)
    assert list(row["peers"]) == [OURS, "torch", "padded"]
    other = {**row, "mode": next(m for m in parts.MODES if m != mode)}
    sheet = beyond_report.ragged_sheet([row, other])
    assert sheet.rows[0] == ["1 thread"]
    assert sheet.rows[1][0] == "6×4×3×5 ragged from 2" and len(sheet.rows[1]) == 7


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projection():
    row = parts.module_row(Case("projection", 3, 2, 4, 6, proj_size=2), "training", SETTINGS)
    assert row["label"] == "3×2×4×6 P=2" and list(row["peers"]) == [OURS, "torch"]


def test_stacked():
    row = parts.module_row(Case("stacked", 3, 2, 4, 6, num_layers=2), "inference", SETTINGS)
    assert row["label"] == "3×2×4×6 2 layers" and list(row["peers"]) == [OURS, "torch"]


@pytest.mark.parametrize("mode", parts.MODES)
def test_a_padded_batch_that_differs_is_an_error(mode, monkeypatch):
    right = parts.padded

    def wrong(problem, training, threads):
        changed = replace(problem, grad_y=2 * problem.grad_y, x=-problem.x)
        prepared: Prepared = right(changed, training, threads)
        return prepared

    monkeypatch.setattr(parts, "padded", wrong)
    with pytest.raises(ValueError, match="is off by"):
        parts.module_row(RAGGED, mode, SETTINGS)
