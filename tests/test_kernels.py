"""One layer, one direction: the compiled functions against the NumPy oracle, on every ISA."""

from __future__ import annotations

from functools import cache

import fastlstm
import numpy as np
import pytest
from fastlstm import _core
from helpers import (
    AWKWARD,
    TOLERANCE,
    Problem,
    assert_all_close,
    assert_all_same_bits,
    assert_close,
    assert_same_bits,
    make_problem,
    named_gradients,
    run_kernels,
    run_reference,
)

# (T, N, D, H): each size takes every awkward value while the others stay small, then all at once.
SIZES = sorted(
    {
        *((size, 2, 3, 5) for size in AWKWARD),
        *((3, size, 5, 9) for size in AWKWARD),
        *((3, 2, size, 7) for size in AWKWARD),
        *((3, 3, 5, size) for size in AWKWARD),
        *((1, 1, size, size) for size in AWKWARD),
        *((1, size, 7, 37) for size in (*AWKWARD, 12)),  # a single step, of few rows and of more
        (2, 1, 437, 453),  # one row on weights beyond L2
        *(
            (AWKWARD[k], AWKWARD[(k + 5) % 16], AWKWARD[(k + 9) % 16], AWKWARD[(k + 14) % 16])
            for k in range(16)
        ),
        # with the batch across the lanes
        *((1, size, 7, 37) for size in (14, 20, 26, 28, 33, 48, 49, 64)),
        (1, 150, 300, 180),
        *((2, size, 5, 50) for size in (7, 13, 32)),
        (1, 30, 400, 20),
        (2, 97, 97, 97),
        (2, 530, 5, 9),  # more rows in one step than one pass of a weight gradient takes
        (2, 530, 17, 50),
        (3, 20, 33, 257),  # a column past whole vectors, and products in passes
        (1, 64, 128, 200),
        # Rows and units enough for products of floats on tiles, where there are any.
        (3, 32, 30, 50),  # forward alone
        (3, 24, 32, 192),  # three quarters of two tiles
        *((3, size, 56, 200) for size in (15, 16, 17, 31, 33, 54, 100)),
        *((3, 32, size, 96) for size in (1, 31, 32, 33, 65, 130)),
        *((2, 47, 64, size) for size in (95, 97, 112, 127, 128, 129, 161)),
        (1, 130, 60, 100),
        *((35, size, 33, 129) for size in (8, 9, 15, 20)),  # backward, products over time alone
        (40, 37, 32, 128),  # several blocks of time
        (12, 16, 40, 200),  # one tile of rows
        (2, 400, 70, 130),  # rows in parts
        (11, 3, 350, 250),  # weights packed panel by panel
        # large panels, chain by chain: forward on every ISA that does so, rows in parts, backward
        (5, 5, 1400, 150),
        (2, 135, 700, 90),
        (2, 135, 20, 420),
        (5, 25, 1050, 270),  # the input product over time, in passes; sums in chains
    }
)
# More workers than the machine has cores, to reach the plans that split the work.
THREADS = (1, 3)


@cache
def problem_and_answer(sizes, dtype, bias, reverse) -> tuple[Problem, dict[str, np.ndarray]]:
    p = make_problem(*sizes, dtype, bias=bias)
    return p, run_reference(p, reverse=reverse)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_equals_reference(isa, dtype, sizes):
    again = _core.passes_run_again()
    for bias in (True, False):
        for reverse in (False, True):
            p, expected = problem_and_answer(sizes, dtype, bias, reverse)
            for threads in THREADS:
                fastlstm.set_num_threads(threads)
                assert_all_close(run_kernels(p, reverse=reverse), expected, dtype=dtype)
    assert _core.passes_run_again() == again  # what reads other memory often finds a NaN there


def test_long_sums_are_cut_into_chains(isa):
    # Gradients are sums over 4H terms: one chain for each would err by more.
    p = make_problem(3, 40, 8, 1024, np.float32)
    assert_all_close(run_kernels(p), run_reference(p), tolerance=1e-6)


def test_isas_are_known_and_ordered():
    assert _core.compiled_isas()[0] == "generic"
    assert set(_core.supported_isas()) <= set(_core.compiled_isas())
    assert _core.supported_isas()[0] == "generic"
    assert _core.active_isa() in _core.supported_isas()
    with pytest.raises((ValueError, ImportError, RuntimeError), match="sse9"):
        _core.use_isa("sse9")
    assert _core.active_isa() in _core.supported_isas()


def test_inference_and_training_give_the_same_bits(isa, dtype):
    """Evaluation must not depend on whether a tape is kept."""
    # The second call of a single step reads the weights the other way round.
    for sizes in [
        (1, 1, 64, 64),
        (1, 1, 64, 300),
        (7, 3, 5, 17),
        (20, 33, 31, 65),
        (5, 40, 64, 128),
    ]:
        p = make_problem(*sizes, dtype)
        results = run_kernels(p)
        for name in ("y", "h_n", "c_n"):
            assert_same_bits(results[name], results[f"{name}, training"], name)


def test_inputs_are_never_changed(isa, dtype):
    p = make_problem(5, 3, 7, 9, dtype)
    kept = p.copy()
    run_kernels(p)
    run_kernels(p, reverse=True)
    assert_all_same_bits(p.arrays(), kept.arrays())


@pytest.mark.parametrize("which", ["y", "h", "c", "none"])
def test_one_gradient_alone(isa, dtype, which):
    """A gradient that is None counts as zeros."""
    p = make_problem(6, 5, 3, 11, dtype)
    for name in ("y", "h", "c"):
        if name != which:
            getattr(p, f"grad_{name}")[...] = 0
    expected = {k: v for k, v in run_reference(p).items() if k.startswith("grad")}

    _, _, tape = fastlstm.lstm_forward(*p.forward_args, p.state, need_tape=True)
    grad_y = p.grad_y if which == "y" else None
    grad_h = p.grad_h if which == "h" else None
    grad_c = p.grad_c if which == "c" else None
    grads = fastlstm.lstm_backward(tape, grad_y, (grad_h, grad_c))
    assert_all_close(named_gradients(grads), expected, dtype=dtype)
    if which in ("y", "none"):
        again = fastlstm.lstm_backward(tape, grad_y)
        assert_all_same_bits(named_gradients(again), named_gradients(grads))


@pytest.mark.parametrize("weight", [None, np.nan, np.inf])
@pytest.mark.parametrize(
    "sizes",
    [
        (4, 3, 2, 5),
        (7, 3, 5, 17),
        (9, 20, 5, 37),
        (11, 3, 350, 250),
        (1, 1, 3, 20),
        (1, 2, 5, 17),
        (1, 13, 40, 33),
        (1, 50, 3, 70),
        (1, 600, 4, 9),
    ],
)
def test_state_none_means_zeros(isa, dtype, sizes, weight):
    """Nothing is multiplied by such a state, but where 0 * weight_hh is NaN."""
    p = make_problem(*sizes, dtype)
    p.h0[...] = 0
    p.c0[...] = 0
    if weight is not None:
        p.weight_hh[-1, 3] = weight
    for reverse in (False, True):
        for threads in THREADS:
            fastlstm.set_num_threads(threads)
            expected = run_kernels(p, reverse=reverse)
            assert np.isnan(expected["y"][-1 if reverse else 0]).any() == (weight is not None)
            y, (h_n, c_n) = fastlstm.lstm_forward(*p.forward_args, reverse=reverse)
            for name, a in {"y": y, "h_n": h_n, "c_n": c_n}.items():
                assert_same_bits(a, expected[name], name)
            y, (h_n, c_n), tape = fastlstm.lstm_forward(
                *p.forward_args, reverse=reverse, need_tape=True
            )
            grads = fastlstm.lstm_backward(tape, p.grad_y, p.grad_state)
            for name, a in {"y": y, "h_n": h_n, "c_n": c_n, **named_gradients(grads)}.items():
                assert_same_bits(a, expected[name], name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("N", [2, 40, 600])
def test_zeros_times_an_infinite_gradient(isa, dtype, N, value):
    p = make_problem(1, N, 5, 18, dtype)
    p.h0[...] = 0
    p.c0[...] = 0
    p.grad_y[0, 1, 16] = value
    for threads in THREADS:
        fastlstm.set_num_threads(threads)
        expected = run_kernels(p)
        *_, tape = fastlstm.lstm_forward(*p.forward_args, need_tape=True)
        found = named_gradients(fastlstm.lstm_backward(tape, p.grad_y, p.grad_state))
        dw = found["grad weight_hh"]
        assert np.isnan(dw[16]).all() and np.isfinite(dw[15]).all()
        assert_all_same_bits(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("present", ["bias_ih", "bias_hh"])
def test_one_bias_alone(isa, dtype, present):
    p = make_problem(4, 3, 2, 5, dtype)
    setattr(p, {"bias_ih": "bias_hh", "bias_hh": "bias_ih"}[present], None)
    assert_all_close(run_kernels(p), run_reference(p), dtype=dtype)


def test_a_tape_can_be_used_again(isa, dtype):
    p = make_problem(4, 3, 2, 5, dtype)
    _, _, tape = fastlstm.lstm_forward(*p.forward_args, p.state, need_tape=True)
    fastlstm.lstm_forward(*p.forward_args, need_tape=True)  # another call in between
    first = fastlstm.lstm_backward(tape, p.grad_y, p.grad_state)
    second = fastlstm.lstm_backward(tape, p.grad_y, p.grad_state)
    assert_all_same_bits(named_gradients(first), named_gradients(second))


def test_unbatched_equals_a_batch_of_one(isa, dtype):
    p = make_problem(6, 1, 3, 9, dtype)
    expected = run_kernels(p, reverse=True)
    y, (h_n, c_n), tape = fastlstm.lstm_forward(
        p.x[:, 0],
        *p.forward_args[1:],
        (p.h0[0], p.c0[0]),
        reverse=True,
        need_tape=True,
    )
    grads = fastlstm.lstm_backward(tape, p.grad_y[:, 0], (p.grad_h[0], p.grad_c[0]))
    assert (y.shape, h_n.shape, c_n.shape) == ((6, 9), (9,), (9,))
    assert (grads.x.shape, grads.h0.shape, grads.c0.shape) == ((6, 3), (9,), (9,))
    for name, a in {"y": y, "h_n": h_n, "c_n": c_n, **named_gradients(grads)}.items():
        assert a.tobytes() == expected[name].tobytes(), name


def test_empty_batch(isa, dtype):
    for T in (1, 3):
        p = make_problem(T, 0, 4, 5, dtype)
        results = run_kernels(p)
        expected = run_reference(p)
        for name, a in results.items():
            assert (a.shape, a.dtype) == (expected[name].shape, dtype), name
            assert not a.any(), name  # weight gradients are sums of nothing


@pytest.mark.parametrize("T", [1, 4, 40])
def test_rows_do_not_depend_on_their_batch(isa, dtype, T):
    """A row of a batch is computed on its own, up to rounding."""
    p = make_problem(T, 33, 5, 17, dtype)
    y, _ = fastlstm.lstm_forward(*p.forward_args, p.state)
    for n in (0, 7, 32):
        alone, _ = fastlstm.lstm_forward(
            p.x[:, n : n + 1], *p.forward_args[1:], (p.h0[n : n + 1], p.c0[n : n + 1])
        )
        assert_close(alone, y[:, n : n + 1].astype(np.float64), name=f"row {n}")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "T, N, H", [(6, 1, 19), (6, 2, 19), (6, 9, 19), (6, 33, 19), (6, 31, 122), (20, 14, 128)]
)
def test_nan_and_inf_stay_in_their_row_and_go_where_the_formula_sends_them(
    isa, dtype, T, N, H, bad
):
    p = make_problem(T, N, 5, H, dtype)
    clean = run_kernels(p)
    row = N // 2
    p.x[2, row, 3] = bad
    with np.errstate(invalid="ignore"):
        expected = run_reference(p)
    actual = run_kernels(p)
    for name in ("y", "h_n", "c_n", "y, training", "grad x", "grad h0", "grad c0"):
        a, e = actual[name], expected[name]
        np.testing.assert_array_equal(np.isnan(a), np.isnan(e), err_msg=name)
        np.testing.assert_array_equal(np.isinf(a), np.isinf(e), err_msg=name)
        finite = np.isfinite(e)
        assert_close(a[finite], e[finite], name=name)
        others = np.arange(N) != row
        a, before = a[..., others, :], clean[name][..., others, :]
        if isa == "amx" and N * H > 1000:  # on tiles, but not where there is a NaN
            assert_close(a, before.astype(np.float64), name=name)
        else:
            assert_same_bits(a, before, name)
    for name in ("grad weight_ih", "grad weight_hh", "grad bias_ih"):
        np.testing.assert_array_equal(
            np.isnan(actual[name]), np.isnan(expected[name]), err_msg=name
        )


@pytest.mark.parametrize("name", ["h0", "c0", "weight_ih", "weight_hh", "bias_ih"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("N, H", [(3, 19), (31, 122)])
def test_nan_and_inf_in_states_and_weights(isa, dtype, name, bad, N, H):
    p = make_problem(4, N, 5, H, dtype)
    getattr(p, name).flat[7] = bad
    with np.errstate(invalid="ignore"):
        expected = run_reference(p)
    actual = run_kernels(p)
    for result in ("y", "h_n", "c_n"):
        a, e = actual[result], expected[result]
        np.testing.assert_array_equal(np.isnan(a), np.isnan(e), err_msg=result)
        np.testing.assert_array_equal(np.isinf(a), np.isinf(e), err_msg=result)
        finite = np.isfinite(e)
        assert_close(a[finite], e[finite], name=result)


@pytest.mark.parametrize("N, H", [(3, 9), (32, 122)])
def test_nan_after_the_last_use_does_not_leak(isa, dtype, N, H):
    """Padding beside a row, or workspace of an earlier call, must not reach the results."""
    p = make_problem(5, N, 7, H, dtype)
    expected = run_kernels(p)
    poisoned = make_problem(5, N, 7, H, dtype, seed=1)
    for a in poisoned.arrays().values():
        a[...] = np.nan
    run_kernels(poisoned)
    assert_all_same_bits(run_kernels(p), expected)


@pytest.mark.parametrize("N, H", [(3, 9), (32, 122)])
def test_saturated_gates(isa, dtype, N, H):
    """Pre-activations of +-1e4: every gate is exactly 0 or 1, nothing overflows."""
    p = make_problem(5, N, 1, H, dtype)
    p.x = np.sign(p.x)
    p.weight_ih = np.sign(p.weight_ih) * dtype(1e4)
    assert_all_close(run_kernels(p), run_reference(p), dtype=dtype)


def test_decay_through_denormals_stays_right(isa, dtype):
    """Zero input, closing forget gate: c halves every step until it is a denormal, then zero."""
    T, N, D, H = 1400, 2, 3, 5
    p = make_problem(T, N, D, H, dtype)
    for a in (p.x, p.weight_ih, p.weight_hh, p.bias_ih, p.bias_hh):
        a[...] = 0
    y, (h_n, c_n), tape = fastlstm.lstm_forward(*p.forward_args, p.state, need_tape=True)

    # Without input every sigmoid is 1/2 and the candidate 0, so c_t = c_0 / 2**t and h = tanh(c)/2.
    c = p.c0.astype(np.float64) * 0.5 ** np.arange(1, T + 1)[:, None, None]
    smallest = np.finfo(dtype).tiny
    np.testing.assert_allclose(y, np.tanh(c) / 2, rtol=1e-6, atol=2 * smallest)
    np.testing.assert_allclose(h_n, 0, atol=smallest)
    np.testing.assert_allclose(c_n, 0, atol=smallest)

    expected = run_reference(p)
    grads = fastlstm.lstm_backward(tape, p.grad_y, p.grad_state)
    for name, a in named_gradients(grads).items():
        if np.abs(expected[name]).max() == 0:
            np.testing.assert_array_equal(a, 0, err_msg=name)
        else:
            assert_close(a, expected[name], name=name)


@pytest.mark.parametrize("N, H", [(2, 5), (32, 122)])
def test_denormal_inputs_are_right_up_to_the_smallest_normal(isa, dtype, N, H):
    """Flushing a denormal to zero is an error of less than the smallest normal number."""
    tiny = np.finfo(dtype).tiny
    p = make_problem(3, N, 3, H, dtype)
    for a in (p.x, p.h0, p.c0):
        a *= tiny / 8
    expected = run_reference(p)
    for name, a in run_kernels(p).items():
        scale = np.abs(expected[name]).max()
        atol = max(TOLERANCE[a.dtype] * scale, 64 * tiny)
        np.testing.assert_allclose(a, expected[name], rtol=0, atol=atol, err_msg=name)


def test_the_callers_floating_point_mode_is_restored(isa, dtype):
    """The kernels may flush denormals; the caller's own arithmetic must not."""
    p = make_problem(3, 2, 3, 5, dtype)
    run_kernels(p)
    tiny = np.full(64, np.finfo(dtype).tiny, dtype)
    assert ((tiny / 2) > 0).all()
    assert ((tiny / 2) * 2 == tiny).all()
