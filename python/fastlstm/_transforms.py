"""Layers whose tensors only operators of torch may touch: those of transforms, modes and compilers.

The autograd of an operator does not know torch.func, so grad, vjp, jacrev and vmap run on the
kernels through the two nodes here. Forward-mode AD has no way into nodes or operators: it runs in
`_composite`, with all that is nested with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _composite, _ops


def run_layer(
    directions: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer: y, h_n, c_n. A ragged batch and sizes of zero have no node here."""
    composed = batch_sizes or 0 in weights[0].shape or _distributed(x, h0, c0, *weights)
    if composed or torch.autograd.forward_ad._current_level >= 0:
        return _composite.forward(directions, x, h0, c0, weights, batch_sizes)
    if not torch._C._are_functorch_transforms_active():
        return _ops.layer_of_graph(directions, x, h0, c0, weights)
    if torch.compiler.is_compiling() or _functionalizes():
        return _composite.forward(directions, x, h0, c0, weights)
    y, h_n, c_n, *_ = _apply(Layer, directions, torch.is_grad_enabled(), x, h0, c0, *weights)
    return y, h_n, c_n


def run_step(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Run one step of a cell: h and c (N, H)."""
    h0, c0 = (None if state is None else state.unsqueeze(0) for state in (h0, c0))
    _, h, c = run_layer(1, x.unsqueeze(0), h0, c0, weights)
    return h.squeeze(0), c.squeeze(0)


def _distributed(*tensors: Tensor | None) -> bool:
    """Return whether one is a DTensor, which the operator does not know how to divide."""
    if torch.compiler.is_compiling():  # Dynamo cannot tell
        return False
    return any(type(tensor).__module__.startswith("torch.distributed.") for tensor in tensors)


def _apply(node: Any, *args: Any) -> Any:
    """Apply a node: torch.func turns gradients on again for the levels under its own."""
    if not torch.is_grad_enabled():
        args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
    return node.apply(*args)


def _functionalizes() -> bool:
    """Return whether torch.func.functionalize is active, which has no rule for a node."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(one.key() == torch._C._functorch.TransformType.Functionalize for one in stack)


class Layer(torch.autograd.Function):
    """One layer as a node that torch.func can transform: y, h_n, c_n and what backward needs."""

    @staticmethod
    def forward(
        directions: int,
        keep: bool,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        return tuple(torch.ops.fastlstm.layer(x, h0, c0, list(weights), directions, keep, None))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        directions, _, *tensors = inputs
        y, _, _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.layer = directions, len(kept)
        ctx.save_for_backward(y, *kept, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        directions, count = ctx.layer
        y, *rest = ctx.saved_tensors
        kept, inputs = rest[:count], rest[count:]
        needed = ctx.needs_input_grad[2:]
        if torch.autograd.forward_ad._current_level >= 0 or _functionalizes():
            return None, None, *_composite.backward((directions, ()), inputs, grads[:3], needed)
        kept = [*kept, None][:3]  # two without a projection
        x, h0, c0, *weights = inputs
        states = x, h0, c0, y, *kept
        found = iter(_apply(Gradients, directions, needed, *grads[:3], *states, *weights))
        return None, None, *(next(found) if need else None for need in needed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        shared = all(dim is None for dim in in_dims[5:])
        return _vmap(Layer.apply, info.batch_size, in_dims, args, range(2, 5) if shared else ())


class Gradients(torch.autograd.Function):
    """The gradients of a layer that are needed, as a node that has gradients of its own."""

    @staticmethod
    def forward(
        directions: int,
        needed: Sequence[bool],
        grad_y: Tensor | None,
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        y: Tensor,
        gates: Tensor,
        cells: Tensor,
        raw: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        grads, inputs = (grad_y, grad_h, grad_c), (x, h0, c0, list(weights))
        kept = [gates, cells] if raw is None else [gates, cells, raw]
        return tuple(
            torch.ops.fastlstm.layer_backward(
                *grads, *inputs, y, kept, directions, list(needed), None
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        directions, needed, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.layer = directions, needed
        ctx.save_for_backward(*tensors[:6], *tensors[10:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # y and what was kept follow from the inputs, which is where their gradients go.
        directions, needed = ctx.layer
        tensors = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[2:8], *ctx.needs_input_grad[12:]]

        def function(*chosen: Tensor) -> list[Tensor]:
            new = iter(chosen)
            all_ = [next(new) if want else t for t, want in zip(tensors, wanted, strict=True)]
            found = _composite.backward((directions, ()), all_[3:], all_[:3], needed)
            results = [result for result in found if result is not None]
            return [r for r, grad in zip(results, grads, strict=True) if grad is not None]

        chosen = [t for t, want in zip(tensors, wanted, strict=True) if want]
        vjp = torch.func.vjp(function, *chosen)[1]
        found = iter(vjp([grad for grad in grads if grad is not None]))
        results = [next(found) if want else None for want in wanted]
        return None, None, *results[:6], None, None, None, None, *results[6:]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        _, needed, *_ = args
        shared = all(dim is None for dim in in_dims[12:]) and not any(needed[3:])
        folded = range(2, 12) if shared else ()
        return _vmap(Gradients.apply, info.batch_size, in_dims, args, folded)


def _vmap(
    node: Callable[..., tuple[Tensor, ...]],
    size: int,
    in_dims: tuple[Any, ...],
    args: tuple[Any, ...],
    folded: Sequence[int],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Apply a node to each of `size` parts of its arguments: the results, and where parts are.

    Where places are `folded` the dimension becomes part of N, the last dimension but one of the
    arguments there and of the results. Otherwise one call follows the other.
    """
    if folded and size:

        def fold(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is None:
                return None
            if dim is None:
                tensor = tensor.unsqueeze(-3)
                tensor = tensor.expand(*tensor.shape[:-3], size, *tensor.shape[-2:])
            else:
                tensor = tensor.movedim(dim, -3)
            return tensor.reshape(*tensor.shape[:-3], size * tensor.shape[-2], tensor.shape[-1])

        pairs = enumerate(zip(args, in_dims, strict=True))
        results = node(*(fold(arg, dim) if k in folded else arg for k, (arg, dim) in pairs))
        shapes = [(*t.shape[:-2], size, t.shape[-2] // size, t.shape[-1]) for t in results]
        parted = tuple(t.reshape(shape) for t, shape in zip(results, shapes, strict=True))
        return parted, tuple(t.dim() - 3 for t in parted)

    def part(arg: Any, dim: Any, k: int) -> Any:
        if not isinstance(arg, Tensor) or dim is None:
            return arg
        # Of nothing, the shapes still say what the results are.
        return arg.select(dim, k) if size else arg.new_zeros(arg.movedim(dim, 0).shape[1:])

    each = [
        node(*(part(arg, dim, k) for arg, dim in zip(args, in_dims, strict=True)))
        for k in range(size or 1)
    ]
    stacked = tuple(torch.stack(parts)[:size] for parts in zip(*each, strict=True))
    return stacked, (0,) * len(stacked)


if hasattr(_ops.layer, "register_vmap"):  # since torch 2.5; only graphs come here, see Layer

    @_ops.layer.register_vmap
    def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        x, h0, c0, weights, directions, keep, batch_sizes = args
        if batch_sizes is not None:
            raise NotImplementedError("fastlstm::layer: expected no vmap over a ragged batch")

        def node(x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor) -> Any:
            return torch.ops.fastlstm.layer(x, h0, c0, list(weights), directions, keep, None)

        shared = all(dim is None for dim in in_dims[3])
        dims = (*in_dims[:3], *in_dims[3])
        folded = range(3) if shared else ()
        results, parts = _vmap(node, info.batch_size, dims, (x, h0, c0, *weights), folded)
        return list(results), list(parts)
