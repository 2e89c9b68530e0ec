"""A multi-layer, optionally bidirectional LSTM on NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from . import _check, _core
from ._check import Array
from ._layer import (
    LayerTape,
    check_grad_state,
    check_state,
    check_weights,
    run_backward,
    run_forward,
)

State = tuple[Array, Array]


def _on_cache_lines(values: Array, dtype: Any) -> Array:
    """Return a copy whose rows can begin with a cache line: single steps read W as it stands."""
    line = 64
    size = values.size * dtype.itemsize
    memory = np.empty(size + line, np.uint8)
    start = -memory.ctypes.data % line
    copy: Array = memory[start : start + size].view(dtype).reshape(values.shape)
    copy[...] = values
    return copy


class Tape:
    """What :meth:`LSTM.backward` needs of a forward call. Made by :meth:`LSTM.forward`.

    It holds the arrays of the call themselves, not copies: `x`, the weights, the initial state and
    the returned `y` must stay unchanged until the backward call.
    """

    __slots__ = ("_batch_first", "_batched", "_layers", "_owner", "_y_shape")

    def __init__(
        self,
        owner: LSTM,
        layers: list[LayerTape],
        batched: bool,
        y_shape: tuple[int, ...],
    ) -> None:
        self._owner = owner
        self._layers = layers
        self._batched = batched
        self._batch_first = owner.batch_first
        self._y_shape = y_shape


class Gradients(NamedTuple):
    """Gradients of a scalar loss: with respect to x, h0, c0, and each weight by its name.

    Each has the shape and dtype of what it belongs to; h0 and c0 are there without a state, too.
    """

    x: Array
    h0: Array
    c0: Array
    weights: dict[str, Array]


class LSTM:
    """A multi-layer LSTM with the parameters, shapes and results of `torch.nn.LSTM`.

    :func:`lstm_forward` has the formula of a layer, and its source.

    Parameters
    ----------
    input_size, hidden_size, num_layers : int
        D, H and the number of stacked layers, each at least 1.
    bias : bool
        With biases `bias_ih` and `bias_hh`.
    batch_first : bool
        x and y are (N, T, .) instead of (T, N, .). States always are (layers*directions, N, H).
    bidirectional : bool
        A second direction per layer, from the last time to the first; y is (T, N, 2*H).
    dtype : dtype
        float32 or float64.
    rng : None, int or numpy.random.Generator
        Source of the initial weights, U(-1/sqrt(H), 1/sqrt(H)).

    Attributes
    ----------
    weights : dict of str to ndarray
        The parameters under the names of `torch.nn.LSTM` (`weight_ih_l0`, (4*H, D), gates in the
        order i, f, g, o; `weight_hh_l0`, `bias_ih_l0`, `bias_hh_l0`, ..., `_reverse`). They are
        read anew at each call: change them in place to train.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    Examples
    --------
    >>> rnn = LSTM(8, 16, rng=0)
    >>> y, (h, c), tape = rnn.forward(np.ones((5, 3, 8), np.float32))
    >>> grads = rnn.backward(tape, np.ones_like(y))
    >>> grads.weights["weight_ih_l0"].shape
    (64, 8)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        dtype: Any = np.float32,
        rng: int | np.random.Generator | None = None,
    ) -> None:
        self.input_size = _check.positive("input_size", input_size)
        self.hidden_size = _check.positive("hidden_size", hidden_size)
        self.num_layers = _check.positive("num_layers", num_layers)
        self.bias = _check.flag("bias", bias)
        self.batch_first = _check.flag("batch_first", batch_first)
        self.bidirectional = _check.flag("bidirectional", bidirectional)
        self.dtype = _check.float_dtype("dtype", dtype)
        D, H = self.input_size, self.hidden_size
        _check.sizes(
            "input_size, hidden_size, num_layers", 1, self.num_layers, D, H, self.dtype.itemsize
        )
        self._directions = 2 if self.bidirectional else 1
        self._suffixes = [
            [
                f"_l{layer}" + ("_reverse" if direction else "")
                for direction in range(self._directions)
            ]
            for layer in range(self.num_layers)
        ]
        self._kinds = ("weight_ih", "weight_hh") + (("bias_ih", "bias_hh") if self.bias else ())
        self._names = [
            kind + suffix
            for suffixes in self._suffixes
            for suffix in suffixes
            for kind in self._kinds
        ]
        generator = np.random.default_rng(rng)
        bound = 1 / math.sqrt(H)
        shapes = _check.weight_shapes(D, H, 0, self.num_layers, self._directions, self.bias)
        self.weights: dict[str, Array] = {
            name: _on_cache_lines(generator.uniform(-bound, bound, shape), self.dtype)
            for name, shape in zip(self._names, shapes, strict=True)
        }

    def __repr__(self) -> str:
        options = "".join(
            f", {name}={getattr(self, name)}"
            for name, default in (
                ("num_layers", 1),
                ("bias", True),
                ("batch_first", False),
                ("bidirectional", False),
            )
            if getattr(self, name) != default
        )
        return f"LSTM({self.input_size}, {self.hidden_size}{options}, dtype={self.dtype})"

    def __call__(self, x: Array, state: State | None = None) -> tuple[Array, State]:
        """Run over `x` and keep nothing.

        Parameters
        ----------
        x : ndarray, shape (T, N, D), (N, T, D) if batch_first, or (T, D)
            Of the dtype of the weights; T >= 1. Any strides.
        state : (h0, c0), each of shape (num_layers*directions, N, H), optional
            Without N for an unbatched x. Zeros if None.

        Returns
        -------
        y : ndarray, shape (T, N, directions*H), (N, T, ...) if batch_first, or (T, directions*H)
        (h_n, c_n) : ndarrays, of the shape of the state

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was expected and what came.
        """
        y, state, _ = self._run(x, state, need_tape=False)
        return y, state

    def forward(self, x: Array, state: State | None = None) -> tuple[Array, State, Tape]:
        """Run as :meth:`__call__` does, and also return the tape that :meth:`backward` needs.

        Returns
        -------
        y : ndarray
        (h_n, c_n) : ndarrays
            Both as of :meth:`__call__`, as are the errors raised.
        tape : Tape
        """
        y, state, layers = self._run(x, state, need_tape=True)
        return y, state, Tape(self, layers, x.ndim == 3, y.shape)

    def _run(
        self, x: Array, state: State | None, need_tape: bool
    ) -> tuple[Array, State, list[LayerTape]]:
        D, H, directions, layers = (
            self.input_size,
            self.hidden_size,
            self._directions,
            self.num_layers,
        )
        dtype = self.dtype
        weights = [self.weights.get(name) for name in self._names]
        if not _core.fits(
            x, state, weights, D, H, 0, layers, directions, self.batch_first, 3, 0
        ) or (x.dtype != dtype):
            x, state, weights = self._checked(x, state)
        batched = x.ndim == 3
        if not batched:
            x = x[:, None]
        elif self.batch_first:
            x = x.transpose(1, 0, 2)
        T, N, _ = x.shape
        count = layers * directions
        h_n, c_n = np.empty((count, N, H), dtype), np.empty((count, N, H), dtype)
        h0 = c0 = None
        if state is not None:
            h0, c0 = (part.reshape(count, N, H) for part in state)
        if self.batch_first:
            y = np.empty((N, T, directions * H), dtype).transpose(1, 0, 2)
        else:
            y = np.empty((T, N, directions * H), dtype)
        tapes: list[LayerTape] = []
        if not need_tape:
            run_forward(x, weights, h0, c0, y, h_n, c_n, False)
        else:
            per_layer = len(weights) // layers
            for layer in range(layers):
                last = layer == layers - 1
                own = slice(layer * directions, (layer + 1) * directions)
                tape = run_forward(
                    x,
                    weights[layer * per_layer : (layer + 1) * per_layer],
                    None if h0 is None else h0[own],
                    None if c0 is None else c0[own],
                    y if last else np.empty((T, N, directions * H), dtype),
                    h_n[own],
                    c_n[own],
                    True,
                )
                assert tape is not None
                tapes.append(tape)
                x = tape._y
        if not batched:
            return y[:, 0], (h_n[:, 0], c_n[:, 0]), tapes
        return y.transpose(1, 0, 2) if self.batch_first else y, (h_n, c_n), tapes

    def _checked(self, x: Any, state: Any) -> tuple[Array, State | None, list[Any]]:
        """Check everything, and return it as the kernels read it: packed where it was not."""
        D, H, dtype = self.input_size, self.hidden_size, self.dtype
        x = _check.array("x", x, dtype)
        shape = "(N, T, D)" if self.batch_first else "(T, N, D)"
        if x.ndim not in (2, 3) or x.shape[-1] != D:
            raise ValueError(f"x: expected shape {shape} or (T, D) with D = {D}, got {x.shape}")
        batched = x.ndim == 3
        T, N = (
            (x.shape[0], 1) if not batched else x.shape[1::-1] if self.batch_first else x.shape[:2]
        )
        if T == 0:
            raise ValueError("x: expected at least one time step, got none")
        _check.sizes("x", T, N, D, self._directions * H, dtype.itemsize)
        count = self.num_layers * self._directions
        h0, c0 = check_state("state", state, (count, N, H) if batched else (count, H), dtype)
        x = _check.rows(x) if batched else _check.rows(x[:, None])[:, 0]
        return x, None if h0 is None or c0 is None else (h0, c0), self._checked_weights()

    def _checked_weights(self) -> list[Any]:
        D, H = self.input_size, self.hidden_size
        if self.num_layers != len(self._suffixes):
            raise ValueError(
                f"num_layers: expected {len(self._suffixes)}, of which there are weights, "
                f"got {self.num_layers}"
            )
        checked = []
        for layer, suffixes in enumerate(self._suffixes):
            inputs = D if layer == 0 else self._directions * H
            for suffix in suffixes:
                try:
                    values: list[Any] = [self.weights[kind + suffix] for kind in self._kinds]
                except KeyError as missing:
                    raise ValueError(f"weights: expected {missing} among them, got none") from None
                values += [None] * (4 - len(values))
                checked += check_weights(values, suffix, inputs, H, self.dtype)[: len(self._kinds)]
        return checked

    def backward(
        self,
        tape: Tape,
        grad_y: Array | None = None,
        grad_state: tuple[Array | None, Array | None] | None = None,
    ) -> Gradients:
        """Run a forward call backward through time.

        Parameters
        ----------
        tape : Tape
            From :meth:`forward` of this very LSTM; may be used more than once.
        grad_y : ndarray, shape of y, optional
            Gradient of the loss with respect to `y`; zeros if None. Any strides.
        grad_state : (grad_h, grad_c), each of the shape of h_n, optional
            Gradients with respect to `h_n` and `c_n`; zeros where None.

        Returns
        -------
        Gradients
            `x`, `h0`, `c0` of the shapes of the forward call, and `weights` by name.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was expected and what came.
        """
        if not isinstance(tape, Tape):
            raise TypeError(f"tape: expected the Tape of LSTM.forward, got {type(tape).__name__}")
        if tape._owner is not self:
            raise ValueError("tape: expected one from forward() of this LSTM, got another LSTM's")
        layers, dtype = len(tape._layers), tape._layers[0]._y.dtype
        directions, _, N, H = tape._layers[0]._cells.shape
        count = layers * directions
        grad: Array | None = None
        if grad_y is not None:
            grad = _check.shaped("grad_y", grad_y, tape._y_shape, dtype)
            if not tape._batched:
                grad = grad[:, None]
            elif tape._batch_first:
                grad = grad.transpose(1, 0, 2)
        grad_h, grad_c = check_grad_state(
            grad_state, (count, N, H) if tape._batched else (count, H), dtype
        )
        if grad_h is not None:
            grad_h = grad_h.reshape(count, N, H)
        if grad_c is not None:
            grad_c = grad_c.reshape(count, N, H)
        h0, c0 = np.empty((count, N, H), dtype), np.empty((count, N, H), dtype)
        weights: list[Any] = []
        for layer in reversed(range(layers)):
            own = slice(layer * directions, (layer + 1) * directions)
            grads = run_backward(
                tape._layers[layer],
                grad,
                None if grad_h is None else grad_h[own],
                None if grad_c is None else grad_c[own],
            )
            grad = grads.x
            h0[own], c0[own] = grads.h0, grads.c0
            weights[:0] = grads.weights
        assert grad is not None
        if not tape._batched:
            grad, h0, c0 = grad[:, 0], h0[:, 0], c0[:, 0]
        elif tape._batch_first:
            grad = grad.transpose(1, 0, 2)
        return Gradients(grad, h0, c0, dict(zip(self._names, weights, strict=True)))

    def state_dict(self) -> dict[str, Array]:
        """Return a copy of the weights, under the names of `torch.nn.LSTM`."""
        return {name: weight.copy() for name, weight in self.weights.items()}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Copy weights in, from a :meth:`state_dict` of this class or of `torch.nn.LSTM`.

        Parameters
        ----------
        mapping : mapping of str to array_like
            Exactly the names of :attr:`weights`, each of its shape; converted to :attr:`dtype`.

        Raises
        ------
        TypeError, ValueError
            Naming the missing, unexpected or misshapen entry; nothing has been copied then.
        """
        if not isinstance(mapping, Mapping):
            raise TypeError(f"mapping: expected a mapping, got {type(mapping).__name__}")
        missing = [name for name in self.weights if name not in mapping]
        unexpected = [name for name in mapping if name not in self.weights]
        if missing or unexpected:
            raise ValueError(f"mapping: missing {missing}, unexpected {unexpected}")
        loaded = {}
        for name, weight in self.weights.items():
            value = np.asarray(mapping[name])
            if value.dtype.kind not in "fiu":
                raise TypeError(f"{name}: expected real numbers, got dtype {value.dtype}")
            if value.shape != weight.shape:
                raise ValueError(f"{name}: expected shape {weight.shape}, got {value.shape}")
            if not weight.flags.writeable:
                raise ValueError(f"{name}: expected a writeable weight, got a read-only one")
            loaded[name] = value.astype(weight.dtype)  # a copy: it may be another weight here
        for name, value in loaded.items():
            self.weights[name][...] = value
