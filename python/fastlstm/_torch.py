"""Layers and steps of an LSTM on torch tensors: their memory, the kernels and the autograd nodes.

Every tensor that comes here is one of `_core.fits`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _composite, _core

# torch gives its memory away through DLPack's C table (since 2.10) or attribute by attribute.
_core.use_torch(Tensor, Parameter, getattr(Tensor, "__dlpack_c_exchange_api__", None))

Grads = tuple[Tensor | None, ...]
Kept = tuple[Tensor | None, Tensor | None, Tensor | None]  # gates, cells, h before projection


def rows(tensor: Tensor) -> Tensor:
    """Return a tensor with its rows contiguous: a copy if they are not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def gradient(grad: Tensor | None) -> Tensor | None:
    """Return a gradient that arrived as the kernels read it; None is zeros."""
    if grad is None or grad._is_zerotensor():
        return None
    if type(grad) is not Tensor:
        grad = grad.as_subclass(Tensor)
    return grad.resolve_neg()


def as_float16(gates: Tensor | None) -> Tensor | None:
    """Return gates kept in half precision as the kernels take them: float16, in memory of either.

    They lie between -1 and 1, where float16 is eight times finer than bfloat16: that makes 1 of a
    forget gate of 0.998, an error that grows with every step back.
    """
    if gates is None or gates.dtype != torch.bfloat16:
        return gates
    return gates.view(torch.float16)


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
    y, h_n, c_n, kept = new_results(x, weights, directions, batch_sizes, keep)
    gates, cells, raw = kept
    given = as_float16(gates), cells, raw
    last = batch_sizes, False, torch.get_num_threads()
    _core.forward(x, h0, c0, weights, y, h_n, c_n, *given, *last)
    return y, h_n, c_n, kept


def new_results(
    x: Tensor, weights: list[Tensor], directions: int, batch_sizes: Sequence[int], keep: bool
) -> tuple[Tensor, Tensor, Tensor, Kept]:
    """Return memory for what :func:`run_forward` returns."""
    *time, _ = x.shape
    N = batch_sizes[0] if batch_sizes else time[1]
    four_h, P = weights[1].shape
    H = four_h // 4
    projects = len(weights) // directions % 2 == 1
    y = x.new_empty(*time, directions * P)
    h_n = x.new_empty(directions, N, P)
    c_n = x.new_empty(directions, N, H)
    large = type(x) is Tensor and x.is_cpu and 16 * y.numel() >= _core.LARGE

    def new(*shape: int) -> Tensor:
        return memory_of_a_step(x.dtype, *shape) if large else x.new_empty(shape)

    gates = new(directions, *time, 4 * H) if keep else None
    cells = new(directions, *time, H) if keep else None
    raw = new(directions, *time, H) if keep and projects else None
    return y, h_n, c_n, (gates, cells, raw)


def memory_of_a_step(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return memory on the CPU that one step of training needs: if large, that of an earlier step.

    For what nobody has a reason to resize, which large memory does not allow.
    """
    size = prod(shape) * dtype.itemsize
    if size < _core.LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    storage = torch.frombuffer(_core.block(size), dtype=dtype).untyped_storage()
    new = torch.empty(0, dtype=dtype, device="cpu")
    return new.set_(storage).resize_(shape)  # not a view of a tensor


def memory_like(weight: Tensor) -> Tensor:
    """Return memory for the gradient of a weight."""
    if weight.nbytes < _core.LARGE:
        return torch.empty_like(weight)
    return memory_of_a_step(weight.dtype, *weight.shape)


def observed() -> bool:
    """Return whether gradients may themselves be differentiated, or belong to a transform."""
    return (
        torch.is_grad_enabled()  # create_graph=True
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def on_kernels(run: Callable[[], Grads], grads: tuple[Tensor | None, ...]) -> Grads | None:
    """Return gradients that the kernels compute, or None where they cannot."""
    if observed():
        return None
    try:
        return run()
    except (TypeError, RuntimeError):
        if batched(grads):
            return None
        raise


def batched(grads: Sequence[Tensor | None]) -> bool:
    """Return whether these are of torch.autograd.grad(is_grads_batched=True): without memory."""
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return any(legacy(grad) for grad in grads if grad is not None)


class Layer(torch.autograd.Function):
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
        ctx.save_for_backward(y, *kept, x, h0, c0, *weights)
        ctx.set_materialize_grads(False)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        y, gates, cells, raw, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        kernels = partial(run_backward, ctx.layer, inputs, y, (gates, cells, raw), grads, needed)
        found = on_kernels(kernels, grads) or _composite.backward(ctx.layer, inputs, grads, needed)
        return None, None, *found


def run_backward(
    layer: tuple[int, Sequence[int]] | None,
    inputs: list[Any],
    y: Tensor | None,
    kept: Kept,
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> Grads:
    """Return the gradients of x, h0, c0 and the weights, None for those not needed.

    `layer` are its directions and batch sizes, `inputs` those tensors, `y` and `kept` what
    :func:`run_forward` returned, `grads` the gradients of y, h_n and c_n; None is zeros. For a step
    `layer`, y and its gradient are None, and no tensor has a dimension of time or directions.
    """
    x, h0, c0, *weights = inputs
    if layer and x.is_cuda:
        from . import _cuda_layer

        assert y is not None
        return _cuda_layer.run_backward(layer, inputs, y, kept, grads, needed)
    gates, cells, raw = kept
    directions, batch_sizes = layer or (1, ())
    grad_y, grad_h, grad_c = map(gradient, grads)
    needs_x, needs_h0, needs_c0, *needs_weights = needed
    dx = dh0 = dc0 = None
    if needs_x:
        dx = (
            torch.empty_like(x, memory_format=torch.contiguous_format)
            if directions == 1
            else x.new_empty(2, *x.shape, dtype=None if x.dtype == torch.float64 else torch.float32)
        )
    if needs_h0:
        dh0 = torch.empty_like(h0)
    if needs_c0:
        dc0 = torch.empty_like(c0)
    dweights = [
        memory_like(w) if need else None for w, need in zip(weights, needs_weights, strict=True)
    ]
    _core.backward(
        x,
        h0,
        c0,
        weights,
        y,
        as_float16(gates),
        cells,
        raw,
        None if grad_y is None else rows(grad_y),
        None if grad_h is None else grad_h.contiguous(),
        None if grad_c is None else grad_c.contiguous(),
        dx,
        dweights,
        dh0,
        dc0,
        batch_sizes,
        False,
        torch.get_num_threads(),
    )
    if directions == 2 and dx is not None:
        dx = dx[0].add_(dx[1]).to(x.dtype)
    return (dx, dh0, dc0, *dweights)


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
    if wants_grad(x, h0, c0, weights):
        result: Any = Layer.apply(directions, batch_sizes, x, h0, c0, *weights)  # type: ignore[no-untyped-call]
        return result  # type: ignore[no-any-return]
    return run_forward(x, h0, c0, weights, directions, batch_sizes, keep=False)[:3]


class Step(torch.autograd.Function):
    """One step of a cell as a node of the autograd graph: x (N, D), h0 and c0 (N, H) or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        h, c, gates, cells = run_step(x, h0, c0, list(weights), keep=True)
        # Not c itself, which the caller may change in place.
        ctx.save_for_backward(gates, cells, x, h0, c0, *weights)
        ctx.set_materialize_grads(False)
        return h, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        gates, cells, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad
        kept, all_grads = (gates, cells, None), (None, *grads)
        kernels = partial(run_backward, None, inputs, None, kept, all_grads, needed)
        return on_kernels(kernels, grads) or _composite.step_backward(inputs, grads, needed)


def run_step(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], keep: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run one step of a cell on x (N, D): h and c (N, H) and, with `keep`, gates and cells."""
    N, H = x.shape[0], weights[1].shape[1]
    h, c = x.new_empty(N, H), x.new_empty(N, H)
    gates = x.new_empty(N, 4 * H) if keep else None
    cells = torch.empty_like(c) if keep else None
    given = as_float16(gates), cells, None
    last = (), False, torch.get_num_threads()
    _core.forward(x, h0, c0, weights, h, None, c, *given, *last)
    return h, c, gates, cells
