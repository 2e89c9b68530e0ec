"""Layers of an LSTM on NumPy arrays: what the kernels read, and one layer for the caller."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np

from . import _check, _core
from ._check import Array
from ._config import get_num_threads

# weight_ih, weight_hh, bias_ih, bias_hh of each direction in turn; a bias may be None.
Weights = list[Any]


def _memory_to_keep(shape: tuple[int, ...], dtype: Any) -> Array:
    """Return memory for what only the backward pass reads: if large, that of an earlier step."""
    size = prod(shape) * dtype.itemsize
    if size < _core.LARGE:
        return np.empty(shape, dtype)
    return np.frombuffer(_core.block(size), dtype).reshape(shape)


class LayerTape:
    """What :func:`lstm_backward` needs of a forward call. Made by :func:`lstm_forward`.

    It holds the arrays of the call themselves, not copies, but for what `out` overwrites: `x`, the
    weights, the initial state and the returned `y` must stay unchanged until the backward call.
    Memory of its own: four gates and c for each (t, n, h).
    """

    __slots__ = ("_batched", "_c0", "_cells", "_gates", "_h0", "_reverse", "_weights", "_x", "_y")

    def __init__(
        self,
        x: Array,
        weights: Weights,
        h0: Array | None,
        c0: Array | None,
        y: Array,
        directions: int,
        reverse: bool,
    ) -> None:
        T, N, width = y.shape
        H = width // directions
        # Views: the caller may give an array of his another shape or dtype in place.
        self._x = x.view()
        self._weights = [None if weight is None else weight.view() for weight in weights]
        self._h0 = None if h0 is None else h0.view()
        self._c0 = None if c0 is None else c0.view()
        self._y = y.view()
        self._reverse = reverse
        self._gates = _memory_to_keep((directions, T, N, 4 * H), y.dtype)
        self._cells = _memory_to_keep((directions, T, N, H), y.dtype)
        self._batched = True


class LayerGradients(NamedTuple):
    """Gradients of a scalar loss with respect to what :func:`lstm_forward` was given.

    Each has the shape and dtype of what it belongs to; those of a bias that was not given are None.
    """

    x: Array
    h0: Array
    c0: Array
    weight_ih: Array
    weight_hh: Array
    bias_ih: Array | None
    bias_hh: Array | None


class PassGradients(NamedTuple):
    """What :func:`run_backward` computes, x summed over the directions; None for no weight."""

    x: Array
    h0: Array
    c0: Array
    weights: Weights


def run_forward(
    x: Array,
    weights: Weights,
    h0: Array | None,
    c0: Array | None,
    y: Array,
    h_n: Array,
    c_n: Array,
    need_tape: bool,
    reverse: bool = False,
) -> LayerTape | None:
    """Run the directions of a layer on checked arguments, as the kernels read them.

    x (T, N, D) and y (T, N, directions*H) with rows; h0, c0, h_n, c_n (directions, N, H) packed;
    four weights for each direction. Without a tape also several layers, one after the other in the
    weights and states.
    """
    tape = LayerTape(x, weights, h0, c0, y, len(h_n), reverse) if need_tape else None
    gates, cells = (None, None) if tape is None else (tape._gates, tape._cells)
    kept = gates, cells, None
    _core.forward(x, h0, c0, weights, y, h_n, c_n, *kept, (), reverse, get_num_threads())
    return tape


def run_backward(
    tape: LayerTape, grad_y: Array | None, grad_h: Array | None, grad_c: Array | None
) -> PassGradients:
    """Run checked arguments: grad_y (T, N, directions*H), grad_h and grad_c packed, or None."""
    T, N, D = tape._x.shape
    dtype = tape._y.dtype
    directions, _, _, H = tape._cells.shape
    dx = np.empty((directions, T, N, D), dtype)
    dh0 = np.empty((directions, N, H), dtype)
    dc0 = np.empty((directions, N, H), dtype)
    dweights = [None if w is None else np.empty(w.shape, dtype) for w in tape._weights]
    _core.backward(
        _check.rows(tape._x),  # a copy of a tape may have other strides
        tape._h0,
        tape._c0,
        tape._weights,
        _check.rows(tape._y),
        tape._gates,
        tape._cells,
        None,
        None if grad_y is None else _check.rows(grad_y),
        grad_h,
        grad_c,
        dx,
        dweights,
        dh0,
        dc0,
        None,
        (),
        tape._reverse,
        get_num_threads(),
    )
    x = dx[0] if directions == 1 else np.add(*dx)
    return PassGradients(x, dh0, dc0, dweights)


def check_weights(values: list[Any], suffix: str, D: int, H: int, dtype: np.dtype[Any]) -> Weights:
    """Return the four weights of a direction packed, each checked under its name + `suffix`."""
    weight_ih, weight_hh, bias_ih, bias_hh = values

    def bias(name: str, value: Any) -> Array | None:
        if value is None:
            return None
        return _check.packed(_check.shaped(name + suffix, value, (4 * H,), dtype))

    return [
        _check.packed(_check.shaped("weight_ih" + suffix, weight_ih, (4 * H, D), dtype)),
        _check.packed(_check.shaped("weight_hh" + suffix, weight_hh, (4 * H, H), dtype)),
        bias("bias_ih", bias_ih),
        bias("bias_hh", bias_hh),
    ]


def check_state(
    name: str, state: Any, shape: tuple[int, ...], dtype: Any, part: str = "{}0"
) -> tuple[Array | None, Array | None]:
    """Return a pair (h, c) of packed arrays of `shape`, or a pair of None for None."""
    if state is None:
        return None, None
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
        Where to write `y`, or all three results; any of the three may be None. It may overlap the
        inputs.

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
    x = _check.array("x", x)
    if x.ndim not in (2, 3):
        raise ValueError(f"x: expected shape (T, N, D) or (T, D), got {x.shape}")
    reverse = _check.flag("reverse", reverse)
    need_tape = _check.flag("need_tape", need_tape)
    dtype = x.dtype
    batched = x.ndim == 3
    T, *batch, D = x.shape
    weight_hh = _check.array("weight_hh", weight_hh, dtype)
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

    given = [target for target in targets if target is not None]

    def own(array: Any) -> Any:
        """Return a copy of what `out` overwrites."""
        overwritten = array is not None and any(np.may_share_memory(array, t) for t in given)
        return np.array(array) if overwritten else array

    if need_tape and given:
        x, h0, c0, *weights = map(own, (x, h0, c0, *weights))
    # The kernels write straight into a target that is packed, no input, and not kept by the tape.
    inputs = [array for array in (x, h0, c0, *weights) if array is not None]
    results = [
        np.asarray(target)
        if target is not None
        and target.flags.carray
        and not (need_tape and target is targets[0])
        and not any(np.may_share_memory(target, other) for other in inputs)
        else np.empty(shape, dtype)
        for target, shape in zip(targets, shapes, strict=True)
    ]
    y, h_n, c_n = results
    if not batched:
        x, y = x[:, None], y[:, None]
    one = (1, *batch, H) if batched else (1, 1, H)  # with the direction, as the kernels have it
    if h0 is not None and c0 is not None:
        h0, c0 = h0.reshape(one), c0.reshape(one)
    x = _check.rows(x)
    h_n, c_n = h_n.reshape(one), c_n.reshape(one)
    tape = run_forward(x, weights, h0, c0, y, h_n, c_n, need_tape, reverse)
    if tape is not None:
        tape._batched = batched
    for i, target in enumerate(targets):
        if target is not None:
            if not np.may_share_memory(target, results[i]):
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
        grad_y = _check.shaped("grad_y", grad_y, (T, *batch, H), dtype)
        grad_y = grad_y.reshape(T, 1, H) if not tape._batched else grad_y
    grad_h, grad_c = (
        None if grad is None else grad.reshape(1, N, H)
        for grad in check_grad_state(grad_state, (*batch, H), dtype)
    )
    grads = run_backward(tape, grad_y, grad_h, grad_c)
    x = grads.x if tape._batched else grads.x[:, 0]
    state = grads.h0.reshape(*batch, H), grads.c0.reshape(*batch, H)
    return LayerGradients(x, *state, *grads.weights)
