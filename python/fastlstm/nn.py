"""Drop-ins for `torch.nn.LSTM` and `torch.nn.LSTMCell`, on the kernels of fastlstm.

Both are subclasses of torch's own and change one thing, how a forward call is computed. A call that
the kernels do not serve goes torch's own way, errors included.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from . import _core

__all__ = ["LSTM", "LSTMCell", "convert"]

# torch gives its memory away through DLPack's C table (since 2.10) or attribute by attribute.
_core.use_torch(Tensor, Parameter, getattr(Tensor, "__dlpack_c_exchange_api__", None))

_Module = TypeVar("_Module", bound=torch.nn.Module)
_Grads = tuple[Tensor | None, ...]
_Kept = tuple[Tensor | None, Tensor | None, Tensor | None]  # gates, cells, h before projection


def _observed() -> bool:
    """Return whether something must see torch's own operators: a tracer, a transform, autocast."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )


def _check_state_dtype(hx: Any, dtype: torch.dtype) -> None:
    """Raise where torch would complain of a oneDNN primitive."""
    if isinstance(hx, (tuple, list)):
        for k, state in enumerate(hx):
            if isinstance(state, Tensor) and state.dtype is not dtype:
                raise RuntimeError(f"hx[{k}]: expected dtype {dtype}, got {state.dtype}")


def _rows(tensor: Tensor) -> Tensor:
    """Return a tensor with its rows contiguous: a copy if they are not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _packed(input: Any, hx: Any, weights: list[Any]) -> tuple[Any, Any, list[Any]]:
    """Return the tensors contiguous, and whatever else there is as it came."""

    def packed(value: Any) -> Any:
        dense = isinstance(value, Tensor) and value.layout is torch.strided
        return value.contiguous() if dense else value

    if isinstance(hx, (tuple, list)):
        hx = [packed(state) for state in hx]
    return packed(input), hx, [packed(weight) for weight in weights]


def _gradient(grad: Tensor | None) -> Tensor | None:
    """Return a gradient that arrived as the kernels read it; None is zeros."""
    if grad is None or grad._is_zerotensor():
        return None
    if type(grad) is not Tensor:
        grad = grad.as_subclass(Tensor)
    return grad.resolve_neg()


def _run_forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    directions: int,
    batch_sizes: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, _Kept]:
    """Run one layer on x (T, N, D), h0 (directions, N, P) and c0 (directions, N, H).

    A state of None is zeros; the weights stand one direction after the other; P is H without a
    projection. Where `batch_sizes` is not empty the batch is ragged: (rows,) stands for (T, N).
    Returns y (T, N, directions*P), h_n, c_n, and with `keep` gates (directions, T, N, 4H), cells
    and, with a projection, h before it (directions, T, N, H).
    """
    *rows, _ = x.shape
    N = batch_sizes[0] if batch_sizes else rows[1]
    H, P = weights[0].shape[0] // 4, weights[1].shape[1]
    projects = len(weights) // directions % 2 == 1
    y = x.new_empty(*rows, directions * P)
    h_n = x.new_empty(directions, N, P)
    c_n = x.new_empty(directions, N, H)
    gates = x.new_empty(directions, *rows, 4 * H) if keep else None
    cells = x.new_empty(directions, *rows, H) if keep else None
    raw = x.new_empty(directions, *rows, H) if keep and projects else None
    threads = torch.get_num_threads()
    _core.forward(x, h0, c0, weights, y, h_n, c_n, gates, cells, raw, batch_sizes, False, threads)
    return y, h_n, c_n, (gates, cells, raw)


class _Layer(torch.autograd.Function):
    """One layer, in one or both directions, as a node of the autograd graph."""

    @staticmethod
    def forward(
        ctx: Any,
        directions: int,
        batch_sizes: list[int],
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, h_n, c_n, kept = _run_forward(
            x, h0, c0, list(weights), directions, batch_sizes, keep=True
        )
        ctx.layer = directions, batch_sizes
        ctx.save_for_backward(y, *kept, x, h0, c0, *weights)
        ctx.set_materialize_grads(False)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> _Grads:
        y, gates, cells, raw, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True
            layer = partial(_torch_layer, *ctx.layer)
            found = _differentiable_gradients(layer, inputs, grads, needed)
        else:
            kept = gates, cells, raw
            found = _run_backward(ctx.layer, inputs, y, kept, grads, needed)
        return None, None, *found


def _run_backward(
    layer: tuple[int, list[int]],
    inputs: list[Any],
    y: Tensor,
    kept: _Kept,
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> _Grads:
    x, h0, c0, *weights = inputs
    directions, batch_sizes = layer
    H, P = weights[0].shape[0] // 4, weights[1].shape[1]
    N = batch_sizes[0] if batch_sizes else x.shape[1]
    grad_y, grad_h, grad_c = map(_gradient, grads)
    needs_x, needs_h0, needs_c0, *needs_weights = needed
    dx = x.new_empty(directions, *x.shape) if needs_x else None
    dh0 = x.new_empty(directions, N, P) if needs_h0 else None
    dc0 = x.new_empty(directions, N, H)
    dweights = _like(weights, needs_weights)
    _core.backward(
        x,
        h0,
        c0,
        weights,
        y,
        *kept,
        None if grad_y is None else _rows(grad_y),
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
    summed = None if dx is None else dx[0] if directions == 1 else dx[0].add_(dx[1])
    return (summed, dh0, dc0 if needs_c0 else None, *dweights)


def _like(weights: list[Tensor], needed: list[bool]) -> list[Tensor | None]:
    """Return memory for the gradients that are needed."""
    return [torch.empty_like(w) if need else None for w, need in zip(weights, needed, strict=True)]


def _differentiable_gradients(
    function: Any,
    inputs: list[Any],
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> _Grads:
    """Compute the same gradients through torch's own LSTM, whose backward has a backward."""
    # Inputs may be one tensor, or depend on one another: a view each keeps the paths through the
    # others out of these gradients.
    inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    outputs = function(*inputs)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(found) if need else None for need in needed)


def _torch_layer(
    directions: int, batch_sizes: list[int], x: Tensor, h0: Any, c0: Any, *weights: Tensor
) -> tuple[Tensor, ...]:
    biases = len(weights) >= 4 * directions
    N = batch_sizes[0] if batch_sizes else x.shape[1]
    if h0 is None or c0 is None:
        h0 = x.new_zeros((directions, N, weights[1].shape[1]))
        c0 = x.new_zeros((directions, N, weights[0].shape[0] // 4))
    state = (h0, c0)
    rest = (weights, biases, 1, 0.0, False, directions == 2)
    y, h, c = (
        torch._VF.lstm(x, torch.tensor(batch_sizes), state, *rest)
        if batch_sizes
        else torch._VF.lstm(x, state, *rest, False)
    )
    return y, h, c


def _wants_grad(x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, h0, c0, *weights)
    )


def _layer(
    directions: int,
    batch_sizes: list[int],
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    if _wants_grad(x, h0, c0, weights):
        result: Any = _Layer.apply(directions, batch_sizes, x, h0, c0, *weights)  # type: ignore[no-untyped-call]
        return result  # type: ignore[no-any-return]
    return _run_forward(x, h0, c0, weights, directions, batch_sizes, keep=False)[:3]


def _batch_sizes(packed: PackedSequence) -> list[int]:
    """Return the batch sizes of a PackedSequence, which anyone can make by hand, checked."""
    sizes: list[int] = packed.batch_sizes.tolist()
    right = all(a >= b for a, b in zip(sizes, [*sizes[1:], 1], strict=True))
    if not sizes or not right or sum(sizes) != packed.data.shape[0]:
        raise RuntimeError(
            "input.batch_sizes: expected positive numbers that do not grow and add up to the rows "
            f"of input.data, {packed.data.shape[0]}, got {sizes}"
        )
    return sizes


class LSTM(torch.nn.LSTM):
    """`torch.nn.LSTM` on the kernels of fastlstm: the same constructor, parameters and results.

    float32 and float64 CPU tensors run on the kernels, forward and backward, packed sequences and
    `proj_size` included. Everything else (half precision, other devices, functorch transforms,
    autocast, tracing and compiling, double backward) runs as in `torch.nn.LSTM`.
    """

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run over `input`: shapes, results and errors of `torch.nn.LSTM`."""
        # Read anew at every call, wherever weight_norm, parametrize or functional_call put them.
        own = self._parameters
        weights: list[Any] = [
            own[n] if n in own else getattr(self, n, None) for n in self._flat_weights_names
        ]
        directions = 2 if self.bidirectional else 1
        layers = self.num_layers
        if _observed():
            return super().forward(input, hx)
        ragged = isinstance(input, PackedSequence)
        x = input.data if ragged else input
        batch_sizes = _batch_sizes(input) if ragged else []
        N = batch_sizes[0] if ragged else 0
        layout = (layers, directions, self.batch_first, 3, N)
        sizes = (self.input_size, self.hidden_size, self.proj_size, *layout)
        if not _core.fits(x, hx, weights, *sizes):
            self._check(input, hx, weights)
            packed = _packed(x, hx, weights)
            if not _core.fits(*packed, *sizes):
                return super().forward(input, hx)
            x, hx, weights = packed

        batched = ragged or x.dim() == 3
        if ragged and hx is not None:
            hx = self.permute_hidden(hx, input.sorted_indices)
        h0, c0 = hx or (None, None)
        if not batched:
            x = x.unsqueeze(1)
            h0, c0 = (None if state is None else state.unsqueeze(1) for state in (h0, c0))
        elif self.batch_first and not ragged:
            x = x.transpose(0, 1)

        if layers == 1:
            x, h, c = _layer(directions, batch_sizes, x, h0, c0, weights)
        else:
            per_layer = len(weights) // layers
            states = []
            for k in range(layers):
                one = slice(k * directions, (k + 1) * directions)
                x, *state = _layer(
                    directions,
                    batch_sizes,
                    x,
                    None if h0 is None else h0[one],
                    None if c0 is None else c0[one],
                    weights[k * per_layer : (k + 1) * per_layer],
                )
                states.append(state)
                if self.dropout and self.training and k < layers - 1:
                    x = torch.dropout(x, self.dropout, True)
            h, c = (torch.cat(parts) for parts in zip(*states, strict=True))
        if ragged:
            y = PackedSequence(x, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            return y, self.permute_hidden((h, c), input.unsorted_indices)
        if not batched:
            return x.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return x.transpose(0, 1) if self.batch_first else x, (h, c)

    def _check(self, input: Any, hx: Any, weights: list[Any]) -> None:
        """Raise where nn.LSTM would read out of bounds or report obscurely."""
        if any(w is None for w in weights):
            return
        self._check_weight_shapes(weights)
        if not isinstance(input, PackedSequence):
            _check_state_dtype(hx, weights[0].dtype)
        elif isinstance(hx, (tuple, list)) and len(hx) == 2:
            self.check_forward_args(input.data, (hx[0], hx[1]), input.batch_sizes)
        elif hx is None:
            self.check_input(input.data, input.batch_sizes)

    def _check_weight_shapes(self, weights: list[Any]) -> None:
        H, P = self.hidden_size, self.proj_size or self.hidden_size
        directions = 2 if self.bidirectional else 1
        per_direction = len(self._all_weights[0])
        gates = 4 * H
        rest = ([(gates,), (gates,)] if self.bias else []) + ([(P, H)] if self.proj_size else [])
        for k, (name, weight) in enumerate(zip(self._flat_weights_names, weights, strict=True)):
            kind = k % per_direction
            if kind == 0:
                inputs = self.input_size if k < directions * per_direction else directions * P
                expected: tuple[int, ...] = (gates, inputs)
            else:
                expected = (gates, P) if kind == 1 else rest[kind - 2]
            if weight.shape != expected:
                raise RuntimeError(f"{name}: expected shape {expected}, got {tuple(weight.shape)}")


class _Step(torch.autograd.Function):
    """One step of a cell as a node of the autograd graph: x (N, D), h0 and c0 (N, H) or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        h, c, gates, cells = _run_step(x, h0, c0, list(weights), keep=True)
        # Not c itself, which the caller may change in place.
        ctx.save_for_backward(gates, cells, x, h0, c0, *weights)
        ctx.set_materialize_grads(False)
        return h, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> _Grads:
        gates, cells, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_gradients(_torch_step, inputs, grads, ctx.needs_input_grad)
        x, h0, c0, *weights = inputs
        grad_h, grad_c = map(_gradient, grads)
        needs_x, needs_h0, needs_c0, *needs_weights = ctx.needs_input_grad
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        dh0 = torch.empty_like(cells) if needs_h0 else None
        dc0 = torch.empty_like(cells)
        dweights = _like(weights, needs_weights)
        _core.backward(
            x,
            h0,
            c0,
            weights,
            None,
            gates,
            cells,
            None,
            None,
            None if grad_h is None else grad_h.contiguous(),
            None if grad_c is None else grad_c.contiguous(),
            dx,
            dweights,
            dh0,
            dc0,
            (),
            False,
            torch.get_num_threads(),
        )
        return (dx, dh0, dc0 if needs_c0 else None, *dweights)


def _run_step(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], keep: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    N, H = x.shape[0], weights[1].shape[1]
    h, c = x.new_empty(N, H), x.new_empty(N, H)
    gates = x.new_empty(N, 4 * H) if keep else None
    cells = torch.empty_like(c) if keep else None
    _core.forward(
        x, h0, c0, weights, h, None, c, gates, cells, None, (), False, torch.get_num_threads()
    )
    return h, c, gates, cells


def _torch_step(x: Tensor, h0: Any, c0: Any, *weights: Tensor) -> tuple[Tensor, ...]:
    zeros = x.new_zeros((x.shape[0], weights[1].shape[1]))
    state = (zeros if h0 is None else h0, zeros if c0 is None else c0)
    h, c = torch._VF.lstm_cell(x, state, *weights)
    return h, c


class LSTMCell(torch.nn.LSTMCell):
    """`torch.nn.LSTMCell` on the kernels of fastlstm: the same constructor, parameters and results.

    What the kernels do not serve (see :class:`LSTM`) runs as in `torch.nn.LSTMCell`.
    """

    _names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run one step on `input`: shapes, results and errors of `torch.nn.LSTMCell`."""
        if _observed():
            return super().forward(input, hx)
        own = self._parameters
        weights: list[Any] = [
            own[n] if n in own else getattr(self, n, None)
            for n in (self._names if self.bias else self._names[:2])
        ]
        sizes = (self.input_size, self.hidden_size, 0, 1, 1, False, 2, 0)
        if not _core.fits(input, hx, weights, *sizes):
            packed = _packed(input, hx, weights)
            if not _core.fits(*packed, *sizes):
                return super().forward(input, hx)
            input, hx, weights = packed
        h0, c0 = hx or (None, None)
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            h0, c0 = (None if state is None else state.unsqueeze(0) for state in (h0, c0))
        if _wants_grad(input, h0, c0, weights):
            h, c = _Step.apply(input, h0, c0, *weights)  # type: ignore[no-untyped-call]
        else:
            h, c, *_ = _run_step(input, h0, c0, weights, keep=False)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


def convert(model: _Module) -> _Module:
    """Turn every `torch.nn.LSTM` and `torch.nn.LSTMCell` inside a model into fastlstm's.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place: each such module becomes an instance of the class here and keeps its
        parameters, buffers, hooks and mode. Subclasses of torch's are left alone.

    Returns
    -------
    torch.nn.Module
        `model` itself.

    Raises
    ------
    TypeError
        If `model` is not a Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) is torch.nn.LSTM:
            module.__class__ = LSTM
        elif type(module) is torch.nn.LSTMCell:
            module.__class__ = LSTMCell
    return model
