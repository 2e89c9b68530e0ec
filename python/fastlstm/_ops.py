"""One LSTM layer as operators of torch: what compilers, exporters and modes see as one node each.

Eager calls come here only with tensors that the kernels cannot read as they are, since dispatching
an operator written in Python takes longer than a small step does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _composite, _torch

_Shape = tuple[int, ...]


def _plain(*tensors: Tensor | None) -> list[Any]:
    """Return tensors contiguous and of no subclass."""
    return [None if t is None else t.as_subclass(Tensor).contiguous() for t in tensors]


def _refuse_forward_ad() -> None:
    """Raise where an operator of torch.library would lose the tangents of its inputs."""
    if torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError(
            "fastlstm::layer: expected no forward-mode AD, got a level of it; "
            "fastlstm.nn.LSTM itself supports it, an exported or traced graph does not"
        )


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
    _refuse_forward_ad()
    x = _torch.rows(x.as_subclass(Tensor))
    h0, c0 = _plain(h0, c0)
    packed = _plain(*weights)
    y, h_n, c_n, kept = _torch.run_forward(x, h0, c0, packed, directions, [], keep)
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
    _refuse_forward_ad()
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
    x, y = (_torch.rows(tensor.as_subclass(Tensor)) for tensor in (x, y))
    gates, cells, *raw = _plain(*kept)
    found = _torch.run_backward(
        (directions, []),
        [x, *_plain(h0, c0, *weights)],
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
    if _torch.observed() or _torch.batched(grads):
        inputs = [x, h0, c0, *weights]
        dx, dh0, dc0, *dweights = _composite.backward((directions, ()), inputs, grads[:3], needed)
        return dx, dh0, dc0, dweights, None, None
    if not kept:
        y, _, _, *kept = torch.ops.fastlstm.layer(x, h0, c0, weights, directions, True)
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


@register_flop_formula(torch.ops.fastlstm.layer)
def _(x: _Shape, h0: Any, c0: Any, weights: list[_Shape], *args: Any, **kwargs: Any) -> int:
    """Count the products with each matrix."""
    return 2 * x[0] * x[1] * sum(math.prod(shape) for shape in weights if len(shape) == 2)


@register_flop_formula(torch.ops.fastlstm.layer_backward)
def _(
    grad_y: Any,
    grad_h: Any,
    grad_c: Any,
    x: _Shape,
    h0: Any,
    c0: Any,
    weights: list[_Shape],
    y: Any,
    kept: Any,
    directions: int,
    needed: Sequence[bool],
    **kwargs: Any,
) -> int:
    """Count the products that go back through each matrix, and those that are its gradient."""
    count = len(weights) // directions
    products = 0
    for k, shape in enumerate(weights):
        back = needed[0] if k % count == 0 else True
        if len(shape) == 2:
            products += (back + needed[3 + k]) * math.prod(shape)
    return 2 * x[0] * x[1] * products
