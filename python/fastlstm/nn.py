"""Drop-ins for `torch.nn.LSTM` and `torch.nn.LSTMCell`, on the kernels of fastlstm.

Both are subclasses of torch's own and change one thing, how a forward call is computed. A call that
the kernels do not serve goes torch's own way, errors included.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from . import _core

__all__ = ["LSTM", "LSTMCell", "convert"]

_Module = TypeVar("_Module", bound=torch.nn.Module)
_Grads = tuple[Tensor | None, ...]


def _plain(tensor: Any, dtype: torch.dtype) -> bool:
    """Return whether the kernels may read this tensor's memory."""
    return (
        (type(tensor) is Tensor or type(tensor) is Parameter)
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_neg()  # a view whose memory holds the numbers negated
    )


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


def _rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """Return a (T, N, columns) tensor as the kernels read it, with its first two strides."""
    step_t, step_n, step = tensor.stride()
    if step != 1 and tensor.shape[2] != 1:
        tensor = tensor.contiguous()
        step_t, step_n, _ = tensor.stride()
    return tensor, step_t, step_n


_Address = int | None


def _at(tensor: Tensor | None, offset: int) -> _Address:
    return None if tensor is None else tensor.data_ptr() + offset


def _addresses(
    weights: tuple[Tensor, ...], d: int, directions: int
) -> tuple[_Address, _Address, _Address, _Address]:
    """Return the memory of weight_ih, weight_hh, bias_ih and bias_hh of direction d."""
    count = len(weights) // directions
    found = [w.data_ptr() for w in weights[d * count : (d + 1) * count]]
    return (
        (found[0], found[1], found[2], found[3]) if count == 4 else (found[0], found[1], None, None)
    )


def _run_forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: tuple[Tensor, ...],
    directions: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run one layer: x (T, N, D), h0 and c0 (directions, N, H), weights of each direction in turn.

    A state of None is zeros. Returns y (T, N, directions*H), h_n, c_n, and with `keep` gates
    (directions, T, N, 4H) and cells (directions, T, N, H).
    """
    T, N, D = x.shape
    H = weights[1].shape[1]
    x, x_t, x_n = _rows(x)
    h0 = None if h0 is None else h0.contiguous()
    c0 = None if c0 is None else c0.contiguous()
    weights = tuple(w.contiguous() for w in weights)
    itemsize = x.element_size()
    y = x.new_empty((T, N, directions * H))
    h_n, c_n = x.new_empty((directions, N, H)), x.new_empty((directions, N, H))
    gates = x.new_empty((directions, T, N, 4 * H)) if keep else None
    cells = x.new_empty((directions, T, N, H)) if keep else None
    threads = torch.get_num_threads()
    for d in range(directions):
        state = d * N * H * itemsize
        steps = d * T * N * H * itemsize
        _core.forward(
            itemsize,
            threads,
            T,
            N,
            D,
            H,
            d == 1,
            *_addresses(weights, d, directions),
            x.data_ptr(),
            x_t,
            x_n,
            _at(h0, state),
            _at(c0, state),
            _at(y, d * H * itemsize),
            N * directions * H,
            directions * H,
            _at(h_n, state),
            _at(c_n, state),
            _at(gates, 4 * steps),
            _at(cells, steps),
        )
    return y, h_n, c_n, gates, cells


class _Layer(torch.autograd.Function):
    """One layer, in one or both directions, as a node of the autograd graph."""

    @staticmethod
    def forward(
        ctx: Any,
        directions: int,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, h_n, c_n, gates, cells = _run_forward(x, h0, c0, weights, directions, keep=True)
        ctx.directions = directions
        ctx.save_for_backward(y, gates, cells, x, h0, c0, *weights)
        ctx.set_materialize_grads(False)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> _Grads:
        y, gates, cells, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # create_graph=True
            return None, *_differentiable_backward(ctx.directions, inputs, grads, needed)
        return None, *_run_backward(ctx.directions, inputs, y, gates, cells, grads, needed)


def _run_backward(
    directions: int,
    inputs: list[Any],
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> _Grads:
    x, h0, c0, *weights = inputs
    T, N, D = x.shape
    H = weights[1].shape[1]
    per_direction = len(weights) // directions
    x, x_t, x_n = _rows(x)
    h0 = None if h0 is None else h0.contiguous()
    c0 = None if c0 is None else c0.contiguous()
    weights = [w.contiguous() for w in weights]
    itemsize = x.element_size()
    grad_y, grad_h, grad_c = grads
    grad_t = grad_n = 0
    if grad_y is not None:
        grad_y, grad_t, grad_n = _rows(grad_y.resolve_neg())
    grad_h = None if grad_h is None else grad_h.resolve_neg().contiguous()
    grad_c = None if grad_c is None else grad_c.resolve_neg().contiguous()
    needs_x, needs_h0, needs_c0, *needs_weights = needed
    dx = x.new_empty((directions, T, N, D)) if needs_x else None
    dh0 = x.new_empty((directions, N, H)) if needs_h0 else None
    dc0 = x.new_empty((directions, N, H))
    dw: list[Tensor | None] = [
        torch.empty_like(w) if need else None
        for w, need in zip(weights, needs_weights, strict=True)
    ]
    threads = torch.get_num_threads()

    for d in range(directions):
        first = d * per_direction
        state, steps = d * N * H * itemsize, d * T * N * H * itemsize
        # Either bias has the same gradient; the kernel writes it once.
        biases = [b for b in dw[first + 2 : first + per_direction] if b is not None]
        _core.backward(
            itemsize,
            threads,
            T,
            N,
            D,
            H,
            d == 1,
            weights[first].data_ptr(),
            weights[first + 1].data_ptr(),
            x.data_ptr(),
            x_t,
            x_n,
            _at(h0, state),
            _at(c0, state),
            _at(y, d * H * itemsize),
            N * directions * H,
            directions * H,
            _at(gates, 4 * steps),
            _at(cells, steps),
            _at(grad_y, d * H * itemsize),
            grad_t,
            grad_n,
            _at(grad_h, state),
            _at(grad_c, state),
            _at(dx, d * T * N * D * itemsize),
            N * D,
            D,
            _at(dw[first], 0),
            _at(dw[first + 1], 0),
            _at(biases[0], 0) if biases else None,
            _at(dh0, state),
            _at(dc0, state),
        )
        for other in biases[1:]:
            other.copy_(biases[0])
    summed = None if dx is None else dx[0] if directions == 1 else dx[0].add_(dx[1])
    return (summed, dh0, dc0 if needs_c0 else None, *dw)


def _differentiable_backward(
    directions: int,
    inputs: list[Any],
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> _Grads:
    """Compute the same gradients through torch's own LSTM, whose backward has a backward."""
    # Inputs may be one tensor, or depend on one another: a view each keeps the paths through the
    # others out of these gradients.
    inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    x, h0, c0, *weights = inputs
    has_biases = len(weights) == 4 * directions
    zeros = x.new_zeros((directions, x.shape[1], weights[1].shape[1]))
    state = (zeros if h0 is None else h0, zeros if c0 is None else c0)
    outputs = torch._VF.lstm(x, state, weights, has_biases, 1, 0.0, False, directions == 2, False)
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


def _layer(
    directions: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled():
        for tensor in (x, h0, c0, *weights):
            if tensor is not None and tensor.requires_grad:
                result: Any = _Layer.apply(directions, x, h0, c0, *weights)  # type: ignore[no-untyped-call]
                return result  # type: ignore[no-any-return]
    return _run_forward(x, h0, c0, weights, directions, keep=False)[:3]


class LSTM(torch.nn.LSTM):
    """`torch.nn.LSTM` on the kernels of fastlstm: the same constructor, parameters and results.

    Dense float32 and float64 CPU tensors run on the kernels, forward and backward. Everything else
    (packed sequences, `proj_size`, half precision, other devices, functorch transforms, autocast,
    tracing and compiling, double backward) runs as in `torch.nn.LSTM`.
    """

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run over `input`: shapes, results and errors of `torch.nn.LSTM`."""
        if _observed():
            return super().forward(input, hx)
        # Read anew at every call, wherever weight_norm, parametrize or functional_call put them.
        own = self._parameters
        weights: list[Any] = [
            own[n] if n in own else getattr(self, n, None) for n in self._flat_weights_names
        ]
        if not self._served(input, hx, weights):
            return super().forward(input, hx)

        batched = input.dim() == 3
        if not batched:
            x = input.unsqueeze(1)
        elif self.batch_first:
            x = input.transpose(0, 1)
        else:
            x = input
        h0 = c0 = None
        if hx is not None:
            h0, c0 = hx if batched else (state.unsqueeze(1) for state in hx)

        directions = 2 if self.bidirectional else 1
        layers = self.num_layers
        if layers == 1:
            x, h, c = _layer(directions, x, h0, c0, tuple(weights))
        else:
            per_layer = len(weights) // layers
            states = []
            for k in range(layers):
                one = slice(k * directions, (k + 1) * directions)
                x, *state = _layer(
                    directions,
                    x,
                    None if h0 is None else h0[one],
                    None if c0 is None else c0[one],
                    tuple(weights[k * per_layer : (k + 1) * per_layer]),
                )
                states.append(state)
                if self.dropout and self.training and k < layers - 1:
                    x = torch.dropout(x, self.dropout, True)
            h, c = (torch.cat(parts) for parts in zip(*states, strict=True))
        if not batched:
            return x.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return x.transpose(0, 1) if self.batch_first else x, (h, c)

    def _served(self, input: Any, hx: Any, weights: list[Any]) -> bool:
        """Return whether the kernels can run this call. Whatever is not exactly right is not.

        nn.LSTM's own path then runs it or raises; what it would read out of bounds or report
        obscurely is raised here.
        """
        if any(w is None for w in weights):
            return False
        dtype = weights[0].dtype
        self._check_weight_shapes(weights)
        if isinstance(input, PackedSequence):
            if isinstance(hx, (tuple, list)) and len(hx) == 2:
                self.check_forward_args(input.data, (hx[0], hx[1]), input.batch_sizes)
            elif hx is None:
                self.check_input(input.data, input.batch_sizes)
            return False
        _check_state_dtype(hx, dtype)
        if self.proj_size or (dtype is not torch.float32 and dtype is not torch.float64):
            return False
        if not _plain(input, dtype) or not all(_plain(w, dtype) for w in weights):
            return False
        batched = input.dim() == 3
        if not batched and input.dim() != 2:
            return False
        shape = input.shape
        if shape[-1] != self.input_size:
            return False
        T, N = (shape[0], 1) if not batched else shape[1::-1] if self.batch_first else shape[:2]
        if T == 0 or N == 0:
            return False
        if hx is None:
            return True
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            return False
        count = self.num_layers * (2 if self.bidirectional else 1)
        state = (count, N, self.hidden_size) if batched else (count, self.hidden_size)
        return all(_plain(s, dtype) and s.shape == state for s in hx)

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


class LSTMCell(torch.nn.LSTMCell):
    """`torch.nn.LSTMCell` on the kernels of fastlstm: the same constructor, parameters and results.

    What the kernels do not serve (see :class:`LSTM`) runs as in `torch.nn.LSTMCell`.
    """

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run one step on `input`: shapes, results and errors of `torch.nn.LSTMCell`."""
        if _observed() or not self._served(input, hx):
            return super().forward(input, hx)
        batched = input.dim() == 2
        x = input.unsqueeze(0) if batched else input.view(1, 1, -1)
        h0 = c0 = None
        if hx is not None:
            h0, c0 = (s.unsqueeze(0) if batched else s.view(1, 1, -1) for s in hx)
        weights: Any = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        _, h, c = _layer(1, x, h0, c0, weights if self.bias else weights[:2])
        return (h.squeeze(0), c.squeeze(0)) if batched else (h.view(-1), c.view(-1))

    def _served(self, input: Any, hx: Any) -> bool:
        D, H = self.input_size, self.hidden_size
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        shapes = ((4 * H, D), (4 * H, H), (4 * H,), (4 * H,))
        dtype = getattr(weights[0], "dtype", None)
        if (dtype is not torch.float32 and dtype is not torch.float64) or D == 0 or H == 0:
            return False
        for weight, shape in zip(weights, shapes, strict=True):
            if weight is None and not self.bias and len(shape) == 1:
                continue
            if not _plain(weight, dtype) or weight.shape != shape:
                return False
        if not _plain(input, dtype) or input.dim() not in (1, 2):
            return False
        batch = input.shape[:-1]
        if input.shape[-1] != D or batch == (0,):
            return False
        if hx is None:
            return True
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            return False
        return all(_plain(s, dtype) and s.shape == (*batch, H) for s in hx)


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
