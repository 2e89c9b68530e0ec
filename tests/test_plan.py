"""The thread plan: a pure function from sizes and threads to the way the work is split."""

from __future__ import annotations

import pytest
from fastlstm import _core
from hypothesis import given
from hypothesis import strategies as st

SIZE = st.one_of(st.integers(1, 200), st.integers(1, 1 << 20), st.integers(1, 1 << 40))
PLAN_ARGS = {
    "T": SIZE,
    "N": st.one_of(st.just(0), SIZE),
    "D": SIZE,
    "H": SIZE,
    "threads": st.integers(1, 512),
    "itemsize": st.sampled_from([4, 8]),
    "backward": st.booleans(),
    "layers": st.integers(1, 20),
}


@given(**PLAN_ARGS)
def test_the_split_is_legal(**args):
    plan = _core.plan(**args)
    assert 1 <= plan["threads"] <= args["threads"]
    assert plan["row_groups"] >= 1
    assert plan["panel_groups"] >= 1
    assert plan["row_groups"] * plan["panel_groups"] == plan["threads"]
    # no worker without work
    assert plan["row_groups"] <= max(args["N"], 1)
    assert plan["panel_groups"] <= args["H"]
    assert 1 <= plan["block"] <= args["T"]
    assert 1 <= plan["layers_at_once"] <= min(args["layers"], args["threads"])


@given(**(PLAN_ARGS | {"threads": st.just(1)}))
def test_one_thread_is_never_split(**args):
    plan = _core.plan(**args)
    assert (plan["row_groups"], plan["panel_groups"], plan["threads"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("sizes", "layers", "at_once"),
    [
        ((1, 1, 64, 64), 2, 1),  # nothing to run ahead on
        ((1000, 1, 64, 64), 1, 1),
        ((1000, 1, 64, 64), 2, 2),  # the steps are too small to be split
        ((1000, 1, 64, 64), 5, 2),
        ((1000, 64, 64, 64), 2, 1),  # splitting the batch is as good
        ((1000, 1, 512, 64), 2, 2),
        ((1000, 1, 4096, 64), 2, 1),  # the second would wait for the first, alone on its thread
        ((1000, 1, 512, 512), 2, 1),  # each thread would read all weights of a layer
    ],
)
def test_which_layers_run_at_the_same_time(isa, sizes, layers, at_once):
    assert _core.plan(*sizes, 2, 4, False, layers)["layers_at_once"] == at_once


@pytest.mark.parametrize(
    ("N", "D", "H", "pays"),
    [
        (15, 128, 128, False),  # less than a tile of rows
        (16, 128, 128, True),
        (16, 128, 256, False),  # W comes from afar
        (23, 128, 256, False),  # rows of two tiles that are empty
        (24, 128, 256, True),
        (33, 128, 256, False),
        (36, 128, 256, True),
        (64, 1, 94, False),  # terms of sums that are not there
        (64, 1, 95, True),
        (96, 64, 47, False),  # few units
        (96, 64, 48, True),
        (24, 32, 63, False),  # few cells
        (24, 32, 64, True),
    ],
)
def test_when_floats_go_on_tiles_forward(N, D, H, pays):
    for T, threads in ((100, 1), (5, 3)):  # of which nothing depends
        assert _core.plan(T, N, D, H, threads, 4, False)["floats_on_tiles"] == pays
    assert not _core.plan(1, 1, 8, 512, 1, 4, False)["floats_on_tiles"]


@pytest.mark.parametrize(
    ("N", "H", "pays"),
    [
        (15, 256, False),  # less than a tile of rows
        (16, 256, True),
        (16, 512, False),  # W_hh comes from afar
        (23, 512, False),  # rows of two tiles that are empty
        (24, 512, True),
        (100, 95, False),  # few units
        (100, 96, True),
        (16, 191, False),  # few cells
        (16, 192, True),
    ],
)
def test_when_floats_go_on_tiles_backward(N, H, pays):
    for T, D, threads in ((100, 1, 1), (5, 1000, 3)):  # of which nothing depends
        assert _core.plan(T, N, D, H, threads, 4, True)["floats_on_tiles"] == pays


@pytest.mark.parametrize(
    ("T", "N", "D", "H", "pays"),
    [
        (100, 1, 512, 512, True),
        (255, 1, 512, 512, True),
        (256, 1, 512, 512, False),  # each panel of W_ih once for each of two blocks
        (49, 20, 650, 650, True),  # the blocks are longer where W_ih is larger
        (50, 20, 650, 650, False),
        (100, 1, 128, 128, False),  # W is near
        (100, 4, 512, 512, False),  # the input product in the step
        (4, 1, 512, 512, False),  # nothing is packed
    ],
)
def test_when_weights_are_packed_panel_by_panel(isa, T, N, D, H, pays):
    assert _core.plan(T, N, D, H, 1, 4, False)["pack_at_use"] == pays


# Lanes of float32, and from how many rows on a batch goes across them.
LANES = {"avx2": (8, 13), "avx512": (16, 14)}


@pytest.mark.parametrize("isa", [i for i in LANES if i in _core.supported_isas()], indirect=True)
@pytest.mark.parametrize(
    ("T", "vectors", "more", "H", "across"),
    [
        (1, 1, -3, 64, 0),  # rows to spare: along the rows of W
        (1, 2, 0, 64, 2),
        (1, 2, 1, 64, 2),  # one goes along them
        (1, 2, -1, 64, "all"),  # nearly fill the last vector
        (1, 4, 0, 64, 4),
        (1, 4, 1, 64, 0),  # packed
        (1, 16, 0, 221, 0),
        (1, 4, 1, 222, 4),  # W is far: packing it takes longer
        (1, 16, 0, 222, 16),
        (1, 16, 1, 222, 0),
        (2, 8, 0, 222, 8),
        (2, 8, 1, 222, 0),
        (1, 2, 1, 627, 2),
        (1, 2, 1, 628, "all"),  # W would come from memory twice
        (1, 1, 4, 628, 0),
    ],
)
def test_which_rows_go_across_the_lanes(isa, T, vectors, more, H, across):
    lanes, first = LANES[isa]
    N = vectors * lanes + more
    expected = N if across == "all" else across * lanes
    for threads in (1, 2, 5):
        plan = _core.plan(T, N, H, H, threads, 4, False)
        assert plan["across"] == expected
        if plan["row_groups"] > 1 and expected:
            assert N % (plan["row_groups"] * lanes) == 0
    for N in (first - 1, first):
        assert (_core.plan(1, N, 64, 64, 1, 4, False)["across"] > 0) == (N == first)


@pytest.mark.parametrize(
    ("T", "N", "H", "steps", "products"),
    [
        (100, 8, 128, False, True),  # of a step few rows, over time many
        (100, 7, 128, False, False),
        (100, 8, 127, False, False),
        (31, 8, 512, False, False),
        (32, 8, 512, False, True),
        (100, 23, 128, False, True),
        (100, 24, 128, True, True),
        (100, 32, 96, True, True),
    ],
)
def test_when_products_over_time_go_on_tiles(T, N, H, steps, products):
    for D, threads in ((1, 1), (1000, 3)):
        plan = _core.plan(T, N, D, H, threads, 4, True)
        assert (plan["floats_on_tiles"], plan["products_on_tiles"]) == (steps, products)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("sizes", "split"),
    [
        ((1, 1, 4, 4), "serial"),
        ((3, 2, 3, 5), "serial"),
        ((100, 64, 256, 256), "rows"),
        ((100, 1, 512, 512), "panels"),
    ],
    ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else v,
)
def test_the_obvious_cases(isa, sizes, split, backward):
    plan = _core.plan(*sizes, 2, 4, backward)
    expected = {"serial": (1, 1), "rows": (2, 1), "panels": (1, 2)}[split]
    assert (plan["row_groups"], plan["panel_groups"]) == expected


def test_few_rows_and_far_weights(isa):
    """Each thread would read all weights from L3 in every step, for ten rows."""
    plan = _core.plan(35, 20, 650, 650, 2, 4, False)
    slow = isa == "generic"  # the product takes longer than that
    assert (plan["row_groups"], plan["panel_groups"]) == ((2, 1) if slow else (1, 2))
