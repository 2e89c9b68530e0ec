"""What of torch's tensors the kernels take: devices, dtypes and shapes; half precision widened.

`_core.fits` says the same of plain tensors in memory, faster; a tracer has no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _check

HALF = (torch.bfloat16, torch.float16)

# For each kind of device that has kernels; `_cuda_layer` adds its own where they are switched on.
# The CPU's compute half precision in float32.
DTYPES: dict[str, tuple[torch.dtype, ...]] = {"cpu": (torch.float32, torch.float64, *HALF)}


def widened(*tensors: Tensor | None) -> list[Any]:
    """Return tensors in float32, contiguous: else windows that overlap could lose their rows."""
    packed = torch.contiguous_format
    return [None if t is None else t.to(torch.float32, memory_format=packed) for t in tensors]


def narrowed(half: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Return tensors of float32 in half precision."""
    return tuple(None if tensor is None else tensor.to(half) for tensor in tensors)


def layer_in_float32(
    layer: Callable[..., tuple[Tensor, Tensor, Tensor]],
    directions: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `layer` does for tensors in half precision, computed in float32."""
    states = widened(x, h0, c0)
    y, h_n, c_n = narrowed(x.dtype, *layer(directions, *states, widened(*weights), batch_sizes))
    return y, h_n, c_n


def fits(
    x: Any,
    hx: Any,
    weights: list[Any],
    D: int,
    H: int,
    P: int,
    layers: int,
    directions: int,
    batch_first: bool,
    dims: int,
    N: Any,
) -> bool:
    """Say what `_core.fits` says, for a tracer: of any strides, and of any T and N.

    N, which may be symbolic, is None where x is not ragged.
    """
    ragged = N is not None
    if not isinstance(x, Tensor) or x.dim() not in ((2,) if ragged else (dims, dims - 1)):
        return False
    batched = ragged or x.dim() == dims
    if batched and not ragged:
        N = x.shape[0 if dims == 2 or batch_first else 1]
    bias = len(weights) // (layers * directions) >= 4
    x_shape = (*x.shape[:-1], D)
    shapes = [x_shape, *_check.weight_shapes(D, H, P, layers, directions, bias)]
    tensors = [x, *weights]
    if hx is not None:
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            return False
        lead = ((layers * directions,) if dims == 3 else ()) + ((N,) if batched else ())
        shapes += [(*lead, P or H), (*lead, H)]
        tensors += hx
    return (
        min(D, H) > 0
        and x.dtype in DTYPES.get(x.device.type, ())
        and len(tensors) == len(shapes)
        and all(
            isinstance(tensor, Tensor)
            and tensor.dtype == x.dtype
            and tensor.device == x.device
            and tensor.layout == torch.strided
            and tensor.shape == shape
            for tensor, shape in zip(tensors, shapes, strict=True)
        )
    )


def layer_fits(
    x: Any,
    h0: Any,
    c0: Any,
    weights: Sequence[Any],
    directions: int,
    batch_sizes: Sequence[int],
) -> bool:
    """Say what `fits` says, of one layer: of x (T, N, D) or, where it is ragged, (rows, D)."""
    count = len(weights) // directions if directions in (1, 2) else 0
    if x.dim() != (2 if batch_sizes else 3) or not 2 <= count <= 5:
        return False
    if weights[0].dim() != 2 or weights[1].dim() != 2:
        return False
    if batch_sizes and sum(batch_sizes) != x.shape[0]:
        return False
    hx = None if h0 is None and c0 is None else (h0, c0)
    H, P = weights[0].shape[0] // 4, weights[1].shape[1] if count % 2 else 0
    N = batch_sizes[0] if batch_sizes else None
    return fits(x, hx, list(weights), x.shape[-1], H, P, 1, directions, False, 3, N)


def result_shapes(
    x: Tensor, weights: Sequence[Tensor], directions: int, batch_sizes: Sequence[int]
) -> tuple[tuple[Any, ...], ...]:
    """Return the shapes of y, h_n, c_n, gates, cells and, with a projection, h before it."""
    *time, _ = x.shape
    N = batch_sizes[0] if batch_sizes else time[1]
    four_h, P = weights[1].shape
    H = four_h // 4
    cells = (directions, *time, H)
    gates = (directions, *time, 4 * H)
    results = (*time, directions * P), (directions, N, P), (directions, N, H), gates, cells
    projects = len(weights) // directions % 2 == 1
    return (*results, cells) if projects else results


def backward_fits(
    x: Tensor,
    weights: Sequence[Tensor],
    directions: int,
    batch_sizes: Sequence[int],
    tensors: Sequence[Tensor | None],
) -> bool:
    """Say whether the gradients of y, h_n and c_n, y and what was kept are such a layer's."""
    of_y, *others = result_shapes(x, weights, directions, batch_sizes)
    shapes = [of_y, *others[:2], of_y, *others[2:]]
    return len(tensors) == len(shapes) and all(
        tensor is None or (tensor.shape, tensor.dtype, tensor.device) == (shape, x.dtype, x.device)
        for tensor, shape in zip(tensors, shapes, strict=True)
    )


def check_batch_sizes(sizes: list[int], rows: int) -> None:
    """Raise where the batch sizes of a PackedSequence, which anyone can make, are wrong."""
    right = sizes and all(a >= b for a, b in zip(sizes, [*sizes[1:], 1], strict=True))
    if not right or sum(sizes) != rows:
        raise RuntimeError(
            "input.batch_sizes: expected positive numbers that do not grow and add up to the rows "
            f"of input.data, {rows}, got {sizes}"
        )
