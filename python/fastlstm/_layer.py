"""One LSTM layer in one direction on NumPy arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import _check, _core
from ._check import Array
from ._config import get_num_threads


class Weights(NamedTuple):
    """The parameters of one layer and direction, packed for the kernels. Biases may be None."""

    weight_ih: Array
    weight_hh: Array
    bias_ih: Array | None
    bias_hh: Array | None


class LayerTape:
    """What :func:`lstm_backward` needs of a forward call. Made by :func:`lstm_forward`.

    It holds the arrays of the call themselves, not copies: `x`, the weights, the initial state and
    the returned `y` must stay unchanged until the backward call. Memory of its own: four gates and
    c for each (t, n, h).
    """

    __slots__ = ("_batched", "_c0", "_cells", "_gates", "_h0", "_reverse", "_weights", "_x", "_y")

    def __init__(
        self, x: Array, weights: Weights, h0: Array, c0: Array, y: Array, reverse: bool
    ) -> None:
        T, N, H = y.shape
        self._x = x
        self._weights = weights
        self._h0 = h0
        self._c0 = c0
        self._y = y
        self._reverse = reverse
        self._gates = np.empty((T, N, 4, H), y.dtype)
        self._cells = np.empty((T, N, H), y.dtype)
        self._batched = True


class LayerGradients(NamedTuple):
    """Gradients of a scalar loss with respect to what :func:`lstm_forward` was given."""

    x: Array
    h0: Array
    c0: Array
    weight_ih: Array
    weight_hh: Array
    bias_ih: Array | None
    bias_hh: Array | None


def run_forward(
    x: Array,
    weights: Weights,
    h0: Array,
    c0: Array,
    y: Array,
    h_n: Array,
    c_n: Array,
    reverse: bool,
    need_tape: bool,
) -> LayerTape | None:
    """Run checked arguments: x (T, N, D), h0 c0 h_n c_n packed (N, H), y (T, N, H) with rows."""
    T, N, H = y.shape
    itemsize = y.itemsize
    x, x_t, x_n = _check.rows(x)
    tape = LayerTape(x, weights, h0, c0, y, reverse) if need_tape else None
    _core.forward(
        itemsize,
        get_num_threads(),
        T,
        N,
        x.shape[2],
        H,
        reverse,
        *weights,
        x,
        x_t,
        x_n,
        h0,
        c0,
        y,
        y.strides[0] // itemsize,
        y.strides[1] // itemsize,
        h_n,
        c_n,
        None if tape is None else tape._gates,
        None if tape is None else tape._cells,
    )
    return tape


def run_backward(
    tape: LayerTape, grad_y: Array | None, grad_h: Array | None, grad_c: Array | None
) -> LayerGradients:
    """Run checked arguments: grad_y (T, N, H), grad_h and grad_c packed (N, H), or None."""
    T, N, H = tape._y.shape
    weights = tape._weights
    dtype = tape._y.dtype
    x, x_t, x_n = _check.rows(tape._x)
    y, y_t, y_n = _check.rows(tape._y)
    grad_t = grad_n = 0
    if grad_y is not None:
        grad_y, grad_t, grad_n = _check.rows(grad_y)
    dx = np.empty(x.shape, dtype)
    dh0 = np.empty((N, H), dtype)
    dc0 = np.empty((N, H), dtype)
    dw_ih = np.empty(weights.weight_ih.shape, dtype)
    dw_hh = np.empty(weights.weight_hh.shape, dtype)
    db = None if weights.bias_ih is None and weights.bias_hh is None else np.empty(4 * H, dtype)
    _core.backward(
        dtype.itemsize,
        get_num_threads(),
        T,
        N,
        x.shape[2],
        H,
        tape._reverse,
        weights.weight_ih,
        weights.weight_hh,
        x,
        x_t,
        x_n,
        tape._h0,
        tape._c0,
        y,
        y_t,
        y_n,
        tape._gates,
        tape._cells,
        grad_y,
        grad_t,
        grad_n,
        grad_h,
        grad_c,
        dx,
        N * x.shape[2],
        x.shape[2],
        dw_ih,
        dw_hh,
        db,
        dh0,
        dc0,
    )
    db_ih = None if weights.bias_ih is None else db
    db_hh = None if weights.bias_hh is None else db if db_ih is None else db.copy()  # type: ignore[union-attr]
    return LayerGradients(dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh)


def check_weights(values: list[Any], suffix: str, D: int, H: int, dtype: np.dtype[Any]) -> Weights:
    """Return the four weights packed, each checked under its name + `suffix`."""
    weight_ih, weight_hh, bias_ih, bias_hh = values

    def bias(name: str, value: Any) -> Array | None:
        if value is None:
            return None
        return _check.packed(_check.shaped(name + suffix, value, (4 * H,), dtype))

    return Weights(
        _check.packed(_check.shaped("weight_ih" + suffix, weight_ih, (4 * H, D), dtype)),
        _check.packed(_check.shaped("weight_hh" + suffix, weight_hh, (4 * H, H), dtype)),
        bias("bias_ih", bias_ih),
        bias("bias_hh", bias_hh),
    )


def check_state(
    name: str, state: Any, shape: tuple[int, ...], dtype: Any, part: str = "{}0"
) -> tuple[Array, Array]:
    """Return a pair (h, c) of packed arrays of `shape`; zeros for None."""
    if state is None:
        return np.zeros(shape, dtype), np.zeros(shape, dtype)
    h, c = _check.pair(name, state)
    return (
        _check.packed(_check.shaped(f"{name}[0] ({part.format('h')})", h, shape, dtype)),
        _check.packed(_check.shaped(f"{name}[1] ({part.format('c')})", c, shape, dtype)),
    )


def check_grad_state(
    state: Any, shape: tuple[int, ...], dtype: Any
) -> tuple[Array | None, Array | None]:
    """Return a pair (grad_h, grad_c) of packed arrays of `shape`, either of which may be None."""
    if state is None:
        return None, None
    grads = _check.pair("grad_state", state)
    names = "grad_state[0] (grad_h)", "grad_state[1] (grad_c)"
    h, c = (
        None if grad is None else _check.packed(_check.shaped(name, grad, shape, dtype))
        for name, grad in zip(names, grads, strict=True)
    )
    return h, c


def lstm_forward(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    state: tuple[Array, Array] | None = None,
    *,
    reverse: bool = False,
    need_tape: bool = False,
    out: Any = None,
) -> Any:
    """Run one LSTM layer in one direction.

    ::

        z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o);  g = tanh(z_g)
        c_t = f * c_{t-1} + i * g;  h_t = o * tanh(c_t)

    (Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000; gate
    order i, f, g, o and two biases as in `torch.nn.LSTM`.)

    Parameters
    ----------
    x : ndarray, shape (T, N, D) or (T, D)
        Input, float32 or float64, T >= 1. Any strides. Without N, the state has none either.
    weight_ih : ndarray, shape (4*H, D)
    weight_hh : ndarray, shape (4*H, H)
    bias_ih, bias_hh : ndarray, shape (4*H,), optional
    state : (h0, c0), each of shape (N, H) or (H,), optional
        Initial state; zeros if None.
    reverse : bool
        Run from the last time to the first. `y[t]` still belongs to `x[t]`.
    need_tape : bool
        Also return what :func:`lstm_backward` needs.
    out : ndarray or (y, h_n, c_n), optional
        Where to write `y`, or all three results; any of the three may be None.

    Returns
    -------
    y : ndarray, shape (T, N, H) or (T, H)
    (h_n, c_n) : ndarrays, shape (N, H) or (H,)
    tape : LayerTape
        Only with `need_tape`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    _check.array("x", x)
    if x.ndim not in (2, 3):
        raise ValueError(f"x: expected shape (T, N, D) or (T, D), got {x.shape}")
    reverse = _check.flag("reverse", reverse)
    need_tape = _check.flag("need_tape", need_tape)
    dtype = x.dtype
    batched = x.ndim == 3
    T, *batch, D = x.shape
    _check.array("weight_hh", weight_hh, dtype)
    if weight_hh.ndim != 2 or weight_hh.shape[0] != 4 * weight_hh.shape[1] or weight_hh.size == 0:
        raise ValueError(f"weight_hh: expected shape (4*H, H) with H >= 1, got {weight_hh.shape}")
    H = weight_hh.shape[1]
    if T == 0 or D == 0:
        raise ValueError(f"x: expected at least one time step and one feature, got {x.shape}")
    _check.sizes("x, weight_hh", T, batch[0] if batched else 1, D, H, dtype.itemsize)
    weights = check_weights([weight_ih, weight_hh, bias_ih, bias_hh], "", D, H, dtype)
    h0, c0 = check_state("state", state, (*batch, H), dtype)
    shapes = (T, *batch, H), (*batch, H), (*batch, H)
    targets = _check_out(out, shapes, dtype)

    # The kernels write straight into a target that is packed, no input, and not kept by the tape.
    inputs = [x, h0, c0, *(w for w in weights if w is not None)]
    results = [
        target
        if target is not None
        and target.flags.carray
        and not (need_tape and target is targets[0])
        and not any(np.may_share_memory(target, other) for other in inputs)
        else np.empty(shape, dtype)
        for target, shape in zip(targets, shapes, strict=True)
    ]
    y, h_n, c_n = results
    if not batched:
        x, h0, c0, y, h_n, c_n = x[:, None], h0[None], c0[None], y[:, None], h_n[None], c_n[None]
    tape = run_forward(x, weights, h0, c0, y, h_n, c_n, reverse, need_tape)
    if tape is not None:
        tape._batched = batched
    for i, target in enumerate(targets):
        if target is not None and target is not results[i]:
            np.copyto(target, results[i])
            results[i] = target
    y, h_n, c_n = results
    return (y, (h_n, c_n), tape) if need_tape else (y, (h_n, c_n))


def _check_out(out: Any, shapes: tuple[tuple[int, ...], ...], dtype: Any) -> list[Array | None]:
    """Return the targets for y, h_n and c_n, each checked."""
    if out is None:
        return [None, None, None]
    if not isinstance(out, tuple):
        out = (out, None, None)
    if len(out) != 3:
        raise ValueError(
            f"out: expected an array or a tuple (y, h_n, c_n), got a tuple of {len(out)}"
        )
    for name, target, shape in zip(("y", "h_n", "c_n"), out, shapes, strict=True):
        if target is not None:
            _check.shaped(f"out ({name})", target, shape, dtype)
            if not target.flags.writeable:
                raise ValueError(f"out ({name}): expected a writeable array, got a read-only one")
    given = [target for target in out if target is not None]
    for i, target in enumerate(given):
        if any(np.may_share_memory(target, other) for other in given[:i]):
            raise ValueError("out: expected arrays that do not overlap, got overlapping ones")
    return list(out)


def lstm_backward(
    tape: LayerTape,
    grad_y: Array | None = None,
    grad_state: tuple[Array | None, Array | None] | None = None,
) -> LayerGradients:
    """Run :func:`lstm_forward` backward through time.

    Parameters
    ----------
    tape : LayerTape
        From `lstm_forward(..., need_tape=True)`; may be used more than once.
    grad_y : ndarray, shape of y, optional
        Gradient of the loss with respect to `y`; zeros if None. Any strides.
    grad_state : (grad_h, grad_c), each of the shape of h_n, optional
        Gradients with respect to `h_n` and `c_n`; zeros where None.

    Returns
    -------
    LayerGradients
        `x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh`; biases that were not given are None.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    if not isinstance(tape, LayerTape):
        raise TypeError(
            f"tape: expected the LayerTape of lstm_forward(..., need_tape=True), "
            f"got {type(tape).__name__}"
        )
    T, N, H = tape._y.shape
    dtype = tape._y.dtype
    batch = (N,) if tape._batched else ()
    if grad_y is not None:
        _check.shaped("grad_y", grad_y, (T, *batch, H), dtype)
        grad_y = grad_y.reshape(T, 1, H) if not tape._batched else grad_y
    grad_h, grad_c = check_grad_state(grad_state, (*batch, H), dtype)
    grads = run_backward(tape, grad_y, grad_h, grad_c)
    if not tape._batched:
        grads = grads._replace(x=grads.x[:, 0], h0=grads.h0[0], c0=grads.c0[0])
    return grads
