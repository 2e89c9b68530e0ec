"""One LSTM layer as operators of torch: what compilers and exporters see as one node each.

Eager calls do not come here, since dispatching an operator written in Python takes longer than a
small step does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _torch


@torch.library.custom_op("fastlstm::layer", mutates_args=())
def layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    directions: int,
    keep: bool,
) -> list[Tensor]:
    """Run `_torch.run_forward`: y, h_n, c_n and, with `keep`, what backward needs."""
    packed = [weight.contiguous() for weight in weights]
    h0, c0 = (None if state is None else state.contiguous() for state in (h0, c0))
    y, h_n, c_n, kept = _torch.run_forward(_torch.rows(x), h0, c0, packed, directions, [], keep)
    return [y, h_n, c_n, *(tensor for tensor in kept if tensor is not None)]


@layer.register_fake
def _(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    directions: int,
    keep: bool,
) -> list[Tensor]:
    y, h_n, c_n, kept = _torch.new_results(x, list(weights), directions, [], keep)
    return [y, h_n, c_n, *(tensor for tensor in kept if tensor is not None)]


@torch.library.custom_op("fastlstm::layer_backward", mutates_args=())
def layer_backward(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    kept: Sequence[Tensor],
    directions: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of x, h0, c0 and the weights that are `needed`."""
    packed = [weight.contiguous() for weight in weights]
    states = [None if state is None else state.contiguous() for state in (h0, c0)]
    gates, cells, *raw = kept
    found = _torch.run_backward(
        (directions, []),
        [_torch.rows(x), *states, *packed],
        y,
        (gates, cells, raw[0] if raw else None),
        (grad_y, grad_h, grad_c),
        tuple(needed),
    )
    return [grad for grad in found if grad is not None]


@layer_backward.register_fake
def _(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    kept: Sequence[Tensor],
    directions: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    inputs = [x, h0, c0, *weights]
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, need in zip(inputs, needed, strict=True)
        if need and tensor is not None
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, h0, c0, weights, directions, _ = inputs
    y, _, _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.layer = directions, len(kept)
    ctx.save_for_backward(y, *kept, x, h0, c0, *weights)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    directions, count = ctx.layer
    y, *rest = ctx.saved_tensors
    kept, (x, h0, c0, *weights) = rest[:count], rest[count:]
    needs_x, needs_h0, needs_c0, needs_weights, *_ = ctx.needs_input_grad
    if isinstance(needs_weights, bool):
        needs_weights = [needs_weights] * len(weights)
    needed = [needs_x, needs_h0, needs_c0, *needs_weights]
    found = iter(
        torch.ops.fastlstm.layer_backward(
            *grads[:3], x, h0, c0, weights, y, kept, directions, needed
        )
    )
    dx, dh0, dc0, *dweights = (next(found) if need else None for need in needed)
    return dx, dh0, dc0, dweights, None, None


layer.register_autograd(_backward, setup_context=_setup_context)


def layer_of_graph(
    directions: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer as an operator: y, h_n, c_n."""
    keep = _torch.wants_grad(x, h0, c0, weights)
    y, h_n, c_n, *_ = torch.ops.fastlstm.layer(x, h0, c0, weights, directions, keep)
    return y, h_n, c_n
