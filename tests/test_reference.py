"""The NumPy oracle itself: against torch.nn.LSTM in float64 and against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from fastlstm import reference
from helpers import (
    assert_all_close,
    assert_close,
    make_problem,
    named_gradients,
    numeric_gradient,
    run_reference,
)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 5, 7), (9, 4, 3, 16), (5, 0, 3, 2)])
def test_equals_torch(torch, sizes, bias, reverse):
    p = make_problem(*sizes, bias=bias)
    leaves = {name: torch.tensor(a, requires_grad=True) for name, a in p.arrays().items()}
    rnn = torch.nn.LSTM(sizes[2], sizes[3], bias=bias, dtype=torch.float64)
    weights = {f"{name}_l0": leaves[name] for name in leaves if name.startswith(("weight", "bias"))}

    # nn.LSTM walks backwards only as half of a bidirectional layer, so time is turned round here.
    turn = (lambda a: a.flip(0)) if reverse else (lambda a: a)
    state = leaves["h0"][None], leaves["c0"][None]
    y, (h_n, c_n) = torch.func.functional_call(rnn, weights, (turn(leaves["x"]), state))
    y, h_n, c_n = turn(y), h_n[0], c_n[0]
    loss = (y * leaves["grad_y"]).sum()
    loss = loss + (h_n * leaves["grad_h"]).sum() + (c_n * leaves["grad_c"]).sum()
    loss.backward()

    expected = {"y": y, "h_n": h_n, "c_n": c_n}
    expected |= {f"{name}, training": value for name, value in expected.items()}
    inputs = ("x", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    expected |= {f"grad {name}": leaves[name].grad for name in inputs if name in leaves}
    expected = {name: value.detach().numpy() for name, value in expected.items()}
    assert_all_close(run_reference(p, reverse=reverse), expected, tolerance=1e-13)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 2, 3, 2), (4, 1, 2, 3)])
def test_gradients_equal_finite_differences(sizes, reverse):
    p = make_problem(*sizes)

    def loss():
        y, h_n, c_n, _, _ = reference.lstm_forward(*p.forward_args, *p.state, reverse=reverse)
        return (y * p.grad_y).sum() + (h_n * p.grad_h).sum() + (c_n * p.grad_c).sum()

    grads = reference.lstm_backward(
        *p.forward_args, *p.state, p.grad_y, *p.grad_state, reverse=reverse
    )
    for name, gradient in grads._asdict().items():
        numeric = numeric_gradient(loss, getattr(p, name))
        assert_close(gradient, numeric, tolerance=1e-10, name=name)


def test_none_means_zeros():
    p = make_problem(3, 2, 4, 5)
    zero_bias, zero_state = np.zeros(20), np.zeros((2, 5))
    y, h_n, c_n, gates, c = reference.lstm_forward(
        p.x, p.weight_ih, p.weight_hh, zero_bias, zero_bias, zero_state, zero_state
    )
    for a, b in zip(
        reference.lstm_forward(p.x, p.weight_ih, p.weight_hh), (y, h_n, c_n, gates, c), strict=True
    ):
        np.testing.assert_array_equal(a, b)

    grads = reference.lstm_backward(p.x, p.weight_ih, p.weight_hh, grad_h=p.grad_h)
    spelled_out = reference.lstm_backward(
        p.x,
        p.weight_ih,
        p.weight_hh,
        h0=zero_state,
        c0=zero_state,
        grad_y=np.zeros((3, 2, 5)),
        grad_h=p.grad_h,
        grad_c=zero_state,
    )
    assert grads.bias_ih is None
    assert grads.bias_hh is None
    for name, gradient in named_gradients(grads).items():
        np.testing.assert_array_equal(gradient, named_gradients(spelled_out)[name])


def test_gates_and_cells_are_those_of_the_formula():
    p = make_problem(4, 3, 2, 5)
    y, h_n, c_n, gates, c = reference.lstm_forward(*p.forward_args, *p.state)
    i, f, g, o = np.moveaxis(gates, 2, 0)
    before = np.concatenate((p.c0[None], c[:-1]))
    np.testing.assert_array_equal(c, f * before + i * g)
    np.testing.assert_array_equal(y, o * np.tanh(c))
    np.testing.assert_array_equal(h_n, y[-1])
    np.testing.assert_array_equal(c_n, c[-1])


def test_inputs_are_not_changed():
    p = make_problem(3, 2, 4, 5)
    kept = p.copy()
    run_reference(p)
    for name, a in p.arrays().items():
        np.testing.assert_array_equal(a, getattr(kept, name))


def test_sigmoid_is_stable():
    z = np.array([-np.inf, -1e308, -745.0, -40.0, -0.0, 0.0, 40.0, 1e308, np.inf])
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        s = reference.sigmoid(z)
    np.testing.assert_allclose(
        s, [0, 0, 5e-324, 4.248354255291589e-18, 0.5, 0.5, 1, 1, 1], rtol=1e-15, atol=0
    )
    assert np.isnan(reference.sigmoid(np.nan))
