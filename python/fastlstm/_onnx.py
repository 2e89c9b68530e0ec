"""One LSTM layer as the standard LSTM operator, for `torch.onnx.export(..., dynamo=True)`.

https://onnx.ai/onnx/operators/onnx__LSTM.html
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._tensors import HALF, layer_in_float32


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def exporting() -> bool:
    """Return whether the graph becomes an ONNX model, and torch (since 2.8) can put nodes in it."""
    return hasattr(torch.onnx, "ops") and torch.onnx.is_in_onnx_export()


def layer(
    directions: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Put one LSTM node into the graph, of float32 for half precision: y, h_n, c_n of `_ops.layer`.

    Raises
    ------
    NotImplementedError
        With a projection, which the operator does not have.
    """
    if x.dtype in HALF:
        return layer_in_float32(layer, directions, x, h0, c0, weights, batch_sizes)
    count = len(weights) // directions
    H = weights[0].shape[0] // 4
    if count % 2:
        raise NotImplementedError(
            "proj_size: expected 0, since the LSTM operator of ONNX has no projection, "
            f"got {weights[1].shape[1]}"
        )
    lengths = None
    if batch_sizes is not None and h0 is not None:
        rows = x.shape[0]
        x, lengths = _padded(x, batch_sizes, h0.shape[1])
    T, N, _ = x.shape
    W, R, *B = (_stacked(weights[k::count]) for k in range(count))
    y, h_n, c_n = torch.onnx.ops.symbolic_multi_out(
        "LSTM",
        (x, W, R, torch.cat(B, 1) if B else None, lengths, h0, c0),
        {"hidden_size": H, "direction": "bidirectional" if directions == 2 else "forward"},
        dtypes=[x.dtype] * 3,
        shapes=[(T, directions, N, H), (directions, N, H), (directions, N, H)],
    )
    y = y.squeeze(1) if directions == 1 else y.transpose(1, 2).flatten(2)
    return y if batch_sizes is None else _packed(y, batch_sizes, rows), h_n, c_n


def _stacked(weights: list[Tensor]) -> Tensor:
    """Return one weight of all directions, its gates in the order of ONNX, i o f c."""
    H = weights[0].shape[0] // 4
    w = torch.stack(weights)
    return torch.cat((w[:, :H], w[:, 3 * H :], w[:, H : 3 * H]), 1)


def _padded(x: Tensor, batch_sizes: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """Return a ragged batch as (T, N, D), and its lengths (N,)."""
    n = torch.arange(N)
    valid = n < batch_sizes.unsqueeze(1)
    first = batch_sizes.cumsum(0) - batch_sizes
    row = torch.where(valid, first.unsqueeze(1) + n, 0)
    return x[row], valid.sum(0).to(torch.int32)


def _packed(y: Tensor, batch_sizes: Tensor, rows: int) -> Tensor:
    """Return the rows of a ragged batch in (T, N, columns): undo :func:`_padded`."""
    end = batch_sizes.cumsum(0)
    row = torch.arange(rows)
    t = (row.unsqueeze(1) >= end).sum(1)
    return y[t, row - (end - batch_sizes)[t]]
