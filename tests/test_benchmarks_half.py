"""benchmarks/compare.py in half precision, on a tiny case."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import measure
import peers
from cases import Case
from peers import OURS, PEERS

CASE = Case("small", 3, 4, 5, 6)


def settings(dtype):
    modes = "inference", "training"
    return measure.Settings(tuple(PEERS), modes, dtype, threads=1, seconds=0.0, rounds=2)


@pytest.mark.parametrize("dtype", measure.HALF)
def test_ours_and_torch_are_compared(dtype):
    for row in measure.measure_case(CASE, settings(dtype)):
        assert set(row["peers"]) == {OURS, "torch"} and not row["left_out"]
        for peer in row["peers"].values():
            assert 1e-5 < peer["error_y"] < measure.TOLERANCE[dtype]
            assert len(peer["samples"]) == 2
        assert row["fma_peak_gflops"]


def wrong(problem, training, threads):
    prepared = peers.torch_lstm(problem, training, threads)
    return prepared._replace(results=lambda result: {"y": prepared.results(result)["y"] + 1})


def test_torch_is_left_out_where_it_is_wrong_in_half_precision_only(monkeypatch):
    monkeypatch.setitem(PEERS, "torch", replace(PEERS["torch"], prepare=wrong))
    for row in measure.measure_case(CASE, settings("bfloat16")):
        assert set(row["peers"]) == {OURS}
        assert "y is off by" in row["left_out"]["torch"]
    with pytest.raises(ValueError, match="y is off by"):
        measure.measure_case(CASE, settings("float32"))


def test_ours_is_never_left_out(monkeypatch):
    monkeypatch.setitem(PEERS, OURS, replace(PEERS[OURS], prepare=wrong))
    with pytest.raises(ValueError, match="y is off by"):
        measure.measure_case(CASE, settings("bfloat16"))
