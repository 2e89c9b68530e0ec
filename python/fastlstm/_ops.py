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

from . import _composite, _tensors, _torch
from ._cuda_graphs import without_replays

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


_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


def _has_rows(x: Tensor) -> bool:
    """Return whether the last dimension of x, whose rows may lie anywhere, is contiguous."""
    return bool(x.shape[-1] == 1 or x.stride(-1) == 1)


def _checked(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    directions: int,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor], list[int]]:
    """Return the inputs as the kernels read them; raise where they would read out of bounds."""
    sizes: list[int] = []
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
        _tensors.check_batch_sizes(sizes, x.shape[0])
    elif x.dim() == 3 and x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # as nn.LSTM
    right = _tensors.layer_fits(x, h0, c0, weights, directions, sizes)
    if not right or (sizes and h0 is None):
        given = {"x": x, "h0": h0, "c0": c0, **{f"weights[{k}]": w for k, w in enumerate(weights)}}
        got = (
            f"{name} " + ("None" if t is None else f"{tuple(t.shape)} {t.dtype} {t.device}")
            for name, t in given.items()
        )
        raise RuntimeError(
            f"fastlstm::layer: expected tensors of one device and dtype, of {_tensors.DTYPES}: "
            "x (T, N, D), h0 (directions, N, P), c0 (directions, N, H) and for each direction "
            f"weights (4H, D), (4H, P), ...; got directions {directions}, {', '.join(got)}"
        )
    x = x.as_subclass(Tensor)
    if not _has_rows(x):
        x = x.contiguous()
    return x, *_plain(h0, c0), _plain(*weights), sizes


# The schemas are written out, since older torch (2.4 to 2.6 at least) cannot read the annotations.
@torch.library.custom_op(
    "fastlstm::layer",
    mutates_args=(),
    schema="(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, int directions, bool keep, "
    "Tensor? batch_sizes) -> Tensor[]",
)
def layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    directions: int,
    keep: bool,
    batch_sizes: Tensor | None,
) -> list[Tensor]:
    """Run `_torch.run_forward`: y, h_n, c_n and, with `keep`, what backward needs.

    With `batch_sizes` (T,), x (rows, D) is ragged, and h0 and c0 must be given.
    """
    _refuse_forward_ad()
    x, h0, c0, packed, sizes = _checked(x, h0, c0, weights, directions, batch_sizes)
    with without_replays:
        y, h_n, c_n, kept = _torch.run_forward(x, h0, c0, packed, directions, sizes, keep)
    return [y, h_n, c_n, *(tensor for tensor in kept if tensor is not None)]


@layer.register_fake
def _(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    directions: int,
    keep: bool,
    batch_sizes: Tensor | None,
) -> list[Tensor]:
    _refuse_forward_ad()
    N = [] if batch_sizes is None or h0 is None else [h0.shape[1]]
    y, h_n, c_n, kept = _torch.new_results(x, list(weights), directions, N, keep)
    return [y, h_n, c_n, *(tensor for tensor in kept if tensor is not None)]


@torch.library.custom_op(
    "fastlstm::layer_backward",
    mutates_args=(),
    schema="(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, Tensor x, Tensor? h0, Tensor? c0, "
    "Tensor[] weights, Tensor y, Tensor[] kept, int directions, bool[] needed, "
    "Tensor? batch_sizes) -> Tensor[]",
)
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
    batch_sizes: Tensor | None,
) -> list[Tensor]:
    """Return the gradients of x, h0, c0 and the weights that are `needed`.

    They are contiguous, but that of x is laid out as x where x has no contiguous rows. Inductor
    would otherwise read it across what comes before, in kernels of its own that can be wrong: with
    torch 2.13 after a convolution, a pooling, a norm and a transpose.
    """
    given = x
    x, h0, c0, packed, sizes = _checked(x, h0, c0, weights, directions, batch_sizes)
    inputs = [x, h0, c0, *packed]
    if len(needed) != len(inputs) or any(
        need and tensor is None for need, tensor in zip(needed, inputs, strict=True)
    ):
        raise RuntimeError(
            "fastlstm::layer_backward: expected needed to tell of x, h0, c0 and each weight, "
            f"{len(inputs)} in all, and False of a state of None, got {list(needed)}"
        )
    arrived = [grad_y, grad_h, grad_c, y, *kept]
    if not _tensors.backward_fits(x, packed, directions, sizes, arrived):
        shapes = _tensors.result_shapes(x, packed, directions, sizes)
        raise RuntimeError(
            "fastlstm::layer_backward: expected grad_y, grad_h, grad_c, and y and what was kept, "
            f"of the shapes of y, h_n, c_n and what was kept, {shapes}, and {x.dtype}, "
            f"got {[t if t is None else (tuple(t.shape), t.dtype) for t in arrived]}"
        )
    y, gates, cells, raw = (*_plain(y, *kept), None)[:4]
    with without_replays:
        dx, *found = _torch.run_backward(
            (directions, sizes),
            inputs,
            y,
            (gates, cells, raw),
            (grad_y, grad_h, grad_c),
            tuple(needed),
        )
    if dx is not None and not _has_rows(given):
        dx = torch.empty_like(given).copy_(dx)
    # An operator gives away no part of a memory that another of its results has a part of.
    return [
        grad if grad.nbytes == grad.untyped_storage().nbytes() else grad.clone()
        for grad in (dx, *found)
        if grad is not None
    ]


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
    batch_sizes: Tensor | None,
) -> list[Tensor]:
    dense, kept_layout = torch.contiguous_format, torch.preserve_format
    inputs = [x, h0, c0, *weights]
    formats = [dense if _has_rows(x) else kept_layout, *[dense] * (len(inputs) - 1)]
    return [
        torch.empty_like(tensor, memory_format=format)
        for tensor, format, need in zip(inputs, formats, needed, strict=True)
        if need and tensor is not None
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, h0, c0, weights, directions, _, batch_sizes = inputs
    y, _, _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.layer = directions, len(kept)
    ctx.save_for_backward(y, *kept, batch_sizes, x, h0, c0, *weights)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    directions, count = ctx.layer
    y, *rest = ctx.saved_tensors
    kept, (batch_sizes, x, h0, c0, *weights) = rest[:count], rest[count:]
    needs_x, needs_h0, needs_c0, needs_weights, *_ = ctx.needs_input_grad
    if isinstance(needs_weights, bool):
        needs_weights = [needs_weights] * len(weights)
    needed = [needs_x, needs_h0, needs_c0, *needs_weights]
    if _torch.observed() or _torch.batched(grads):
        sizes = () if batch_sizes is None else batch_sizes.tolist()
        inputs = [x, h0, c0, *weights]
        dx, dh0, dc0, *dweights = _composite.backward(
            (directions, sizes), inputs, grads[:3], needed
        )
        return dx, dh0, dc0, dweights, None, None, None
    if not kept:
        y, _, _, *kept = torch.ops.fastlstm.layer(x, h0, c0, weights, directions, True, batch_sizes)
    found = iter(
        torch.ops.fastlstm.layer_backward(
            *grads[:3], x, h0, c0, weights, y, kept, directions, needed, batch_sizes
        )
    )
    dx, dh0, dc0, *dweights = (next(found) if need else None for need in needed)
    return dx, dh0, dc0, dweights, None, None, None


layer.register_autograd(_backward, setup_context=_setup_context)


def layer_of_graph(
    directions: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer as an operator: y, h_n, c_n."""
    keep = _torch.wants_grad(x, h0, c0, weights)
    if _is_exporting():
        from . import _onnx

        if _onnx.exporting():
            return _onnx.layer(directions, x, h0, c0, weights, batch_sizes)
        # What is exported is mostly for inference, and backward can do without. Dynamo once said
        # of every graph that it is exported.
        keep = keep and torch.compiler.is_dynamo_compiling()
    y, h_n, c_n, *_ = torch.ops.fastlstm.layer(x, h0, c0, weights, directions, keep, batch_sizes)
    return y, h_n, c_n


@register_flop_formula(torch.ops.fastlstm.layer)
def _(x: _Shape, h0: Any, c0: Any, weights: list[_Shape], *args: Any, **kwargs: Any) -> int:
    """Count the products with each matrix."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)


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
    *args: Any,
    **kwargs: Any,
) -> int:
    """Count the products that go back through each matrix, and those that are its gradient."""
    count = len(weights) // directions
    products = 0
    for k, shape in enumerate(weights):
        back = needed[0] if k % count == 0 else True
        if len(shape) == 2:
            products += (back + needed[3 + k]) * math.prod(shape)
    return 2 * math.prod(x[:-1]) * products
