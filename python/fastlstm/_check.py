"""Checks of NumPy arguments, each before any memory is touched; the shapes of all weights."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_MAX_BYTES = 2**62  # below the range of int64 with room for what kernels add up


def float_dtype(name: str, dtype: Any) -> np.dtype[Any]:
    """Return `dtype` as a native float32 or float64, or raise TypeError."""
    if dtype is None or dtype not in FLOATS:  # None equals float64 for NumPy
        raise TypeError(
            f"{name}: expected dtype float32 or float64 (native byte order), got {dtype}"
        )
    found: np.dtype[Any] = np.dtype(dtype)
    return found


def array(name: str, value: Any, dtype: np.dtype[Any] | None = None) -> Array:
    """Return `value` if it is an ndarray of `dtype`, or of float32 or float64, as a plain one."""
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a numpy.ndarray, got {type(value).__name__}")
    if dtype is None:
        float_dtype(name, value.dtype)
    elif value.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {value.dtype}")
    return np.asarray(value)  # a np.matrix would have two dimensions whatever is taken of it


def shaped(name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return `value` if it is an ndarray of exactly this shape and dtype, as a plain one."""
    found = array(name, value, dtype)
    if found.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {found.shape}")
    return found


def packed(value: Array) -> Array:
    """Return `value` aligned and C-contiguous for the kernels: a copy if it is not."""
    return np.require(value, requirements=["C", "A"])


def rows(value: Array) -> Array:
    """Return a (T, N, columns) array as the kernels read it.

    A copy is made only where the last dimension is not contiguous or the memory is not aligned.
    """
    step_t, step_n, step = value.strides
    itemsize = value.itemsize
    if (
        (step != itemsize and value.shape[2] != 1)
        or step_t % itemsize
        or step_n % itemsize
        or not value.flags.aligned
    ):
        value = np.array(value, order="C")
    return value


def positive(name: str, value: Any) -> int:
    """Return an integer of at least 1."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected an int, got bool")
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """Return a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return bool(value)


def weight_shapes(
    D: int, H: int, P: int, layers: int, directions: int, bias: bool
) -> list[tuple[int, ...]]:
    """Return the shapes of all weights, in the order of `nn.LSTM._flat_weights`; P is proj_size."""
    shapes: list[tuple[int, ...]] = []
    for k in range(layers):
        inputs = directions * (P or H) if k else D
        biases = [(4 * H,), (4 * H,)] if bias else []
        projection = [(P, H)] if P else []
        shapes += [(4 * H, inputs), (4 * H, P or H), *biases, *projection] * directions
    return shapes


def sizes(name: str, T: int, N: int, D: int, H: int, itemsize: int) -> None:
    """Raise ValueError where a pass of these sizes could not be addressed."""
    # Activations, weights, and the widest padding of a panel (64 columns); eight times all of it is
    # more than a pass holds.
    if (
        8 * itemsize * (T * (N + 1) * (D + H + 64) + (D + 64) * (H + 64) + (H + 64) ** 2)
        > _MAX_BYTES
    ):
        raise ValueError(
            f"{name}: expected sizes that fit in memory, got T={T}, N={N}, D={D}, H={H}"
        )


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Return a tuple or list of two."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        got = (
            f"{type(value).__name__} of length {len(value)}"
            if isinstance(value, (Sequence, np.ndarray)) and np.ndim(value)
            else type(value).__name__
        )
        raise TypeError(f"{name}: expected a pair (h, c), got {got}")
    return value[0], value[1]
