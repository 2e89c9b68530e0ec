"""Which cases benchmarks/compare.py runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import compare
from cases import CASES, Case


def test_all_or_one_of_each_group():
    assert compare.select(None, quick=False) == CASES
    quick = compare.select(None, quick=True)
    assert [case.group for case in quick] == list(dict.fromkeys(case.group for case in CASES))


def test_groups_and_sizes_by_name():
    names = ["7x3x5×9", "100x32x64x64", "step", "7×3×5×9"]
    found = compare.select(names, quick=False)
    assert found[:3] == [case for case in CASES if case.group == "step"]
    assert found[3:] == [Case("small", 100, 32, 64, 64), Case("own", 7, 3, 5, 9)]


@pytest.mark.parametrize(
    "name", ["stp", "7x3x5", "7x3x5x0", "7x3x5x-9", "7x3x5x9x2", "7x3xax9", "x7x3x5x9"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"neither a group \(step, .*, odd\) nor T×N×D×H"):
        compare.select([name], quick=False)
