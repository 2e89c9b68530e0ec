"""The float64 NumPy oracle: one LSTM layer in one direction, forward and backward, plain and slow.

Nothing here is tuned, on purpose: it is meant to be read next to the formula, and every kernel is
tested against it.

The cell is that of Hochreiter & Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8),
1997, with the forget gate of Gers, Schmidhuber & Cummins, "Learning to Forget", Neural Computation
12(10), 2000. The weights lie as in ``torch.nn.LSTM``: the rows of ``weight_ih`` and ``weight_hh``
are four blocks of H, the gates i (input), f (forget), g (candidate), o (output)::

    z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
    i_t = sigmoid(z_i)   f_t = sigmoid(z_f)   g_t = tanh(z_g)   o_t = sigmoid(z_o)
    c_t = f_t * c_{t-1} + i_t * g_t
    h_t = o_t * tanh(c_t)

Sizes: T time steps, N batch rows, D inputs, H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Gradients(NamedTuple):
    """Gradients, each of the shape of the argument it belongs to."""

    x: Array
    h0: Array
    c0: Array
    weight_ih: Array
    weight_hh: Array
    bias_ih: Array | None
    bias_hh: Array | None


def sigmoid(z: ArrayLike) -> Array:
    """Return 1 / (1 + exp(-z)), without overflow for any z: exp sees only negative numbers."""
    z = np.asarray(z, np.float64)
    e = np.exp(-np.abs(z))
    sigma: Array = np.where(z < 0, e, 1.0) / (1.0 + e)
    return sigma


def lstm_forward(
    x: ArrayLike,
    weight_ih: ArrayLike,
    weight_hh: ArrayLike,
    bias_ih: ArrayLike | None = None,
    bias_hh: ArrayLike | None = None,
    h0: ArrayLike | None = None,
    c0: ArrayLike | None = None,
    *,
    reverse: bool = False,
) -> tuple[Array, Array, Array, Array, Array]:
    """Run one layer in one direction.

    Parameters
    ----------
    x : (T, N, D)
    weight_ih : (4H, D)
    weight_hh : (4H, H)
    bias_ih, bias_hh : (4H,), optional
        Zeros if None.
    h0, c0 : (N, H), optional
        The state before the first step; zeros if None.
    reverse : bool
        Walk from ``x[T-1]`` down to ``x[0]``; ``y[t]`` still belongs to ``x[t]``.

    Returns
    -------
    y : (T, N, H)
        The hidden state of every step.
    h_n, c_n : (N, H)
        The state after the last step taken.
    gates : (T, N, 4, H)
        i f g o after their activations.
    c : (T, N, H)
        The cell state of every step.
    """
    x, weight_ih, weight_hh = (np.asarray(a, np.float64) for a in (x, weight_ih, weight_hh))
    T, N, _ = x.shape
    H = weight_hh.shape[1]
    h, cell = _state(h0, N, H), _state(c0, N, H)

    y = np.empty((T, N, H))
    gates = np.empty((T, N, 4, H))
    c = np.empty((T, N, H))
    for t in _steps(T, reverse):
        z = x[t] @ weight_ih.T + h @ weight_hh.T
        for bias in (bias_ih, bias_hh):
            if bias is not None:
                z = z + np.asarray(bias, np.float64)
        z_i, z_f, z_g, z_o = np.split(z, 4, axis=1)
        i, f, g, o = sigmoid(z_i), sigmoid(z_f), np.tanh(z_g), sigmoid(z_o)
        cell = f * cell + i * g
        h = o * np.tanh(cell)
        y[t], gates[t], c[t] = h, np.stack((i, f, g, o), axis=1), cell
    return y, h, cell, gates, c


def lstm_backward(
    x: ArrayLike,
    weight_ih: ArrayLike,
    weight_hh: ArrayLike,
    bias_ih: ArrayLike | None = None,
    bias_hh: ArrayLike | None = None,
    h0: ArrayLike | None = None,
    c0: ArrayLike | None = None,
    grad_y: ArrayLike | None = None,
    grad_h: ArrayLike | None = None,
    grad_c: ArrayLike | None = None,
    *,
    reverse: bool = False,
) -> Gradients:
    """Compute the gradients of a scalar L through `lstm_forward`, backwards through time.

    With dh_t, dc_t all that reaches h_t, c_t from y_t and from the step after::

        dc_t += dh_t * o_t * (1 - tanh(c_t)^2)
        dz_i = dc_t * g_t     * i_t (1 - i_t)    dz_f = dc_t * c_{t-1}   * f_t (1 - f_t)
        dz_g = dc_t * i_t     * (1 - g_t^2)      dz_o = dh_t * tanh(c_t) * o_t (1 - o_t)
        dx_t = dz_t W_ih      dh_{t-1} = dz_t W_hh      dc_{t-1} = dc_t * f_t
        dW_ih = sum dz_t^T x_t      dW_hh = sum dz_t^T h_{t-1}      db_ih = db_hh = sum dz_t

    Parameters
    ----------
    x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, reverse
        As in `lstm_forward`, which is run again here.
    grad_y : (T, N, H), optional
        dL/dy; zeros if None.
    grad_h, grad_c : (N, H), optional
        dL/dh_n and dL/dc_n; zeros if None.

    Returns
    -------
    Gradients
        Each of the shape of its argument.
    """
    x, weight_ih, weight_hh = (np.asarray(a, np.float64) for a in (x, weight_ih, weight_hh))
    y, _, _, gates, c = lstm_forward(
        x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, reverse=reverse
    )
    T, N, H = y.shape
    h0, c0 = _state(h0, N, H), _state(c0, N, H)
    dh, dc = _state(grad_h, N, H), _state(grad_c, N, H)

    grad_x = np.zeros_like(x)
    grad_weight_ih = np.zeros_like(weight_ih)
    grad_weight_hh = np.zeros_like(weight_hh)
    grad_bias = np.zeros(4 * H)
    steps = list(_steps(T, reverse))
    for n in reversed(range(T)):
        t = steps[n]
        h_before, c_before = (y[steps[n - 1]], c[steps[n - 1]]) if n > 0 else (h0, c0)
        i, f, g, o = np.moveaxis(gates[t], 1, 0)
        tanh_c = np.tanh(c[t])

        if grad_y is not None:
            dh = dh + np.asarray(grad_y, np.float64)[t]
        dc = dc + dh * o * (1 - tanh_c**2)
        dz = np.concatenate(
            (
                dc * g * i * (1 - i),
                dc * c_before * f * (1 - f),
                dc * i * (1 - g**2),
                dh * tanh_c * o * (1 - o),
            ),
            axis=1,
        )
        grad_x[t] = dz @ weight_ih
        grad_weight_ih += dz.T @ x[t]
        grad_weight_hh += dz.T @ h_before
        grad_bias += dz.sum(axis=0)
        dh, dc = dz @ weight_hh, dc * f

    return Gradients(
        x=grad_x,
        h0=dh,
        c0=dc,
        weight_ih=grad_weight_ih,
        weight_hh=grad_weight_hh,
        bias_ih=None if bias_ih is None else grad_bias,
        bias_hh=None if bias_hh is None else grad_bias.copy(),
    )


def _steps(T: int, reverse: bool) -> Iterator[int]:
    """Return the time indices in the order in which they are walked."""
    return reversed(range(T)) if reverse else iter(range(T))


def _state(value: ArrayLike | None, N: int, H: int) -> Array:
    """Return a state or its gradient as an (N, H) array of its own; None means zeros."""
    return np.zeros((N, H)) if value is None else np.array(value, np.float64).reshape(N, H)
