"""Layers and steps of an LSTM on torch tensors: their memory, the kernels and the autograd nodes.

Every tensor that comes here is one of `_core.fits`, unless a hook or a change of `data` has
replaced it since: both passes check that.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _composite, _core, _steps, _tensors
from ._steps import Node, Steps

Grads = tuple[Tensor | None, ...]
Kept = tuple[Tensor | None, Tensor | None, Tensor | None]  # gates, cells, h before projection


def gradient(grad: Tensor | None) -> Tensor | None:
    """Return a gradient that arrived, of no subclass; None is zeros."""
    if grad is None or grad._is_zerotensor():
        return None
    return grad if type(grad) is Tensor else grad.as_subclass(Tensor)


def run_forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    directions: int,
    batch_sizes: Sequence[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Kept]:
    """Run one layer on x (T, N, D), h0 (directions, N, P) and c0 (directions, N, H).

    A state of None is zeros; the weights stand one direction after the other; P is H without a
    projection. Where `batch_sizes` is not empty the batch is ragged: (rows,) stands for (T, N).
    Returns y (T, N, directions*P), h_n, c_n, and with `keep` gates (directions, T, N, 4H), cells
    and, with a projection, h before it (directions, T, N, H).
    """
    if x.is_cuda:
        from . import _cuda_layer

        return _cuda_layer.run_forward(x, h0, c0, weights, directions, batch_sizes, keep)
    threads = torch.get_num_threads()
    y, h_n, c_n, *kept = _core.run_layer(x, h0, c0, weights, directions, batch_sizes, keep, threads)
    return y, h_n, c_n, tuple(kept)


def new_results(
    x: Tensor, weights: list[Tensor], directions: int, batch_sizes: Sequence[int], keep: bool
) -> tuple[Tensor, Tensor, Tensor, Kept]:
    """Return memory for what :func:`run_forward` returns, for tracers and CUDA."""
    shapes = _tensors.result_shapes(x, weights, directions, batch_sizes)
    y, h_n, c_n, *kept = (x.new_empty(shape) for shape in (shapes if keep else shapes[:3]))
    gates, cells, raw = (*kept, None, None, None)[:3]
    return y, h_n, c_n, (gates, cells, raw)


def memory_of_a_step(like: Tensor, *shape: int) -> Tensor:
    """Return large memory on the CPU that one step of training needs: that of an earlier step.

    For what nobody has a reason to resize, which it does not allow. `_core` calls this.
    """
    size = prod(shape) * like.itemsize
    storage = torch.frombuffer(_core.block(size), dtype=like.dtype).untyped_storage()
    new = torch.empty(0, dtype=like.dtype, device="cpu")
    return new.set_(storage).resize_(shape)  # not a view of a tensor


# torch gives its memory away through DLPack's C table (since 2.10) or attribute by attribute.
_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_core.use_torch(Tensor, Parameter, memory_of_a_step, _EXCHANGE)


def observed() -> bool:
    """Return whether gradients may themselves be differentiated, or belong to a transform."""
    return (
        torch.is_grad_enabled()  # create_graph=True
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # of make_fx(pre_dispatch=True)
# By names of their own, since every call asks.
_modes = torch._C._len_torch_dispatch_stack
_included = torch._C._dispatch_tls_is_dispatch_key_included


def seen_by_a_mode() -> bool:
    """Return whether a mode of dispatch, or make_fx with one before it, sees what is called."""
    return _modes() > 0 or _included(_PRE_DISPATCH)


def on_kernels(
    layer: tuple[int, Sequence[int]] | None,
    inputs: Sequence[Any],
    y: Tensor | None,
    kept: Kept,
    grads: Grads,
    needed: Sequence[bool],
    steps: Steps | None,
) -> Grads | None:
    """Return what :func:`run_backward` does, or None where the kernels cannot."""
    if observed() or seen_by_a_mode():
        return None
    try:
        return run_backward(layer, inputs, y, kept, grads, needed, steps)
    except (TypeError, RuntimeError):
        if batched(grads):
            return None
        raise


def batched(grads: Sequence[Tensor | None]) -> bool:
    """Return whether these are of torch.autograd.grad(is_grads_batched=True): without memory."""
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return any(legacy(grad) for grad in grads if grad is not None)


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for backward, but not None, which tools that draw a graph do not expect."""
    ctx.save_for_backward(*[tensor for tensor in tensors if tensor is not None])
    ctx.missing = [k for k, tensor in enumerate(tensors) if tensor is None]


def saved(ctx: Any) -> list[Any]:
    """Return what :func:`save` was given."""
    tensors = list(ctx.saved_tensors)
    for k in ctx.missing:
        tensors.insert(k, None)
    return tensors


class Layer(Node):
    """One layer, in one or both directions, as a node of the autograd graph."""

    @staticmethod
    def forward(
        ctx: Any,
        directions: int,
        batch_sizes: Sequence[int],
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, h_n, c_n, kept = run_forward(
            x, h0, c0, list(weights), directions, batch_sizes, keep=True
        )
        ctx.layer = directions, batch_sizes
        save(ctx, y, *kept, x, h0, c0, *weights)
        ctx.set_materialize_grads(False)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        return Layer.gradients(ctx, ctx.needs_input_grad, grads)

    @staticmethod
    def gradients(
        ctx: Any, needed: Sequence[bool], grads: Grads, steps: Steps | None = None
    ) -> Grads:
        y, gates, cells, raw, *inputs = saved(ctx)
        needed = needed[2:]
        found = on_kernels(ctx.layer, inputs, y, (gates, cells, raw), grads, needed, steps)
        if found is None:
            found = _composite.backward(ctx.layer, inputs, grads, needed)
        return None, None, *found


def run_backward(
    layer: tuple[int, Sequence[int]] | None,
    inputs: Sequence[Any],
    y: Tensor | None,
    kept: Kept,
    grads: Grads,
    needed: Sequence[bool],
    steps: Steps | None = None,
) -> Grads:
    """Return the gradients of x, h0, c0 and the weights, None for those not needed.

    `layer` are its directions and batch sizes, `inputs` those tensors, `y` and `kept` what
    :func:`run_forward` returned, `grads` the gradients of y, h_n and c_n; None is zeros. For a step
    `layer`, y and its gradient are None, and no tensor has a dimension of time or directions. Those
    of the weights are left to `steps` if given.
    """
    x, h0, c0, *weights = inputs
    if layer and x.is_cuda:
        from . import _cuda_layer

        assert y is not None
        return _cuda_layer.run_backward(layer, inputs, y, kept, grads, needed)
    directions, batch_sizes = layer or (1, ())
    grad_y, grad_h, grad_c = map(gradient, grads)
    both = None
    if directions == 2 and needed[0]:
        dtype = None if x.dtype == torch.float64 else torch.float32
        both = x.new_empty(2, *x.shape, dtype=dtype)
    if steps:
        needed = [*needed[:3], *[False] * len(weights)]
    dx, *others = _core.run_layer_backward(
        x,
        h0,
        c0,
        weights,
        y,
        *kept,
        grad_y,
        grad_h,
        grad_c,
        both,
        needed,
        steps is not None,
        directions,
        batch_sizes,
        torch.get_num_threads(),
    )
    if steps:
        dz = others.pop()
        steps.leave(*((x[0], h0 if h0 is None else h0[0]) if layer else (x, h0)), dz)
    if both is not None:
        dx = torch.add(*both).to(x.dtype)
    return (dx, *others)


def wants_grad(x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, h0, c0, *weights)
    )


def run_layer(
    directions: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer, with a node of the autograd graph where one is wanted: y, h_n, c_n."""
    # enable_grad() does not end inference mode.
    if wants_grad(x, h0, c0, weights) and not torch.is_inference_mode_enabled():
        result: tuple[Tensor, Tensor, Tensor]
        step = x.shape[0] == directions == 1 and not (batch_sizes or x.is_cuda)
        if step and len(weights) % 2 == 0:  # without a projection
            result = _steps.apply(Layer, (1, (), x, h0, c0), weights)
        else:
            result = Layer.apply(directions, batch_sizes, x, h0, c0, *weights)
        return result
    return run_forward(x, h0, c0, weights, directions, batch_sizes, keep=False)[:3]


class Step(Node):
    """One step of a cell as a node of the autograd graph: x (N, D), h0 and c0 (N, H) or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        h, _, c, (gates, cells, _) = run_forward(x, h0, c0, list(weights), 1, (), keep=True)
        # Not c itself, which the caller may change in place.
        save(ctx, gates, cells, x, h0, c0, *weights)
        ctx.set_materialize_grads(False)
        return h, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        return Step.gradients(ctx, ctx.needs_input_grad, grads)

    @staticmethod
    def gradients(
        ctx: Any, needed: Sequence[bool], grads: Grads, steps: Steps | None = None
    ) -> Grads:
        gates, cells, *inputs = saved(ctx)
        kept = gates, cells, None
        found = on_kernels(None, inputs, None, kept, (None, *grads), needed, steps)
        return _composite.step_backward(inputs, grads, needed) if found is None else found


def run_step(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Run one step of a cell, with a node of the autograd graph where one is wanted: h and c."""
    if wants_grad(x, h0, c0, weights) and not torch.is_inference_mode_enabled():
        result: tuple[Tensor, Tensor] = _steps.apply(Step, (x, h0, c0), weights)
        return result
    h, _, c, _ = run_forward(x, h0, c0, weights, 1, (), keep=False)
    return h, c
