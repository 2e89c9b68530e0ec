"""Drop-ins for `torch.nn.LSTM` and `torch.nn.LSTMCell`, on the kernels of fastlstm.

Both are subclasses of torch's own and change one thing, how a forward call is computed. A call that
the kernels do not serve goes torch's own way, errors included.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _core, _dynamo, _ops
from ._torch import Step, run_layer, run_step, wants_grad

__all__ = ["LSTM", "LSTMCell", "convert", "revert"]

_Module = TypeVar("_Module", bound=torch.nn.Module)


def _observed() -> bool:
    """Return whether a tracer or a transform must see operators of torch."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )


_HALF = (torch.bfloat16, torch.float16)


def _half_dtype(x: Any, hx: Any, weights: list[Any]) -> torch.dtype | None:
    """Return the dtype of the results where they are in half precision, else None.

    The arithmetic is in float32 then. Under autocast it decides the dtype.
    """
    tensors = [x, *(hx if isinstance(hx, (tuple, list)) else ()), *weights]
    if not all(isinstance(t, Tensor) and t.is_cpu for t in tensors):
        return None
    found = {tensor.dtype for tensor in tensors}
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") if found <= {torch.float32, *_HALF} else None
    return x.dtype if found == {x.dtype} and x.dtype in _HALF else None


def _check_state_dtype(hx: Any, dtype: torch.dtype) -> None:
    """Raise where torch would complain of a oneDNN primitive."""
    if isinstance(hx, (tuple, list)):
        for k, state in enumerate(hx):
            if isinstance(state, Tensor) and state.dtype is not dtype:
                raise RuntimeError(f"hx[{k}]: expected dtype {dtype}, got {state.dtype}")


def _packed(
    input: Any, hx: Any, weights: list[Any], half: torch.dtype | None
) -> tuple[Any, Any, list[Any]]:
    """Return tensors contiguous, those in half precision in float32, and the rest as it came."""

    def packed(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return value
        return (value if half is None else value.float()).contiguous()

    if isinstance(hx, (tuple, list)):
        hx = [packed(state) for state in hx]
    return packed(input), hx, [packed(weight) for weight in weights]


def _batch_sizes(packed: PackedSequence) -> list[int]:
    """Return the batch sizes of a PackedSequence, which anyone can make by hand, checked."""
    sizes: list[int] = packed.batch_sizes.tolist()
    _ops.check_batch_sizes(sizes, packed.data.shape[0])
    return sizes


def _traced_batch(packed: PackedSequence, hx: Any) -> Any:
    """Return N of a PackedSequence from shapes; else from its numbers, where Dynamo stops."""
    if packed.sorted_indices is not None:
        return packed.sorted_indices.shape[0]
    if isinstance(hx, (tuple, list)) and hx and isinstance(hx[0], Tensor) and hx[0].dim() == 3:
        return hx[0].shape[1]
    return packed.batch_sizes[0].item()


class LSTM(torch.nn.LSTM):
    """`torch.nn.LSTM` on the kernels of fastlstm: the same constructor, parameters and results.

    float32 and float64 CPU tensors run on the kernels, forward and backward, packed sequences and
    `proj_size` included; so do bfloat16, float16 and autocast, with arithmetic in float32.
    `torch.compile` and `torch.export` see one operator for each layer, `torch.onnx.export` the
    LSTM operator of ONNX. Everything else (other devices, functorch transforms, jit tracing,
    double backward) runs as in `torch.nn.LSTM`.
    """

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run over `input`: shapes, results and errors of `torch.nn.LSTM`."""
        # Read anew at every call, wherever weight_norm, parametrize or functional_call put them.
        own = self._parameters
        weights: list[Any] = [
            own[n] if n in own else getattr(self, n, None) for n in self._flat_weights_names
        ]
        if torch.compiler.is_compiling():
            return self._traced(input, hx, weights)
        if _observed():
            return super().forward(input, hx)
        ragged = isinstance(input, PackedSequence)
        x: Any = input.data if ragged else input
        batch_sizes = _batch_sizes(input) if ragged else []
        N = batch_sizes[0] if ragged else 0
        layout = (self.num_layers, 2 if self.bidirectional else 1, self.batch_first, 3, N)
        sizes = (self.input_size, self.hidden_size, self.proj_size, *layout)
        half = None
        autocast = torch.is_autocast_enabled("cpu")
        if autocast or not _core.fits(x, hx, weights, *sizes):
            half = _half_dtype(x, hx, weights)
            if half is None and not autocast:
                self._check(input, hx, weights)
            packed = _packed(x, hx, weights, half)
            if (autocast and half is None) or not _core.fits(*packed, *sizes):
                return super().forward(input, hx)
            x, hx, weights = packed

        if not ragged:
            y, (h, c) = self._run(x, hx, weights, run_layer)
        else:
            if hx is not None:
                hx = self.permute_hidden(hx, input.sorted_indices)
            layer = partial(run_layer, batch_sizes=batch_sizes)
            data, h, c = self._layers(x, hx, weights, layer)
            y = PackedSequence(
                data, input.batch_sizes, input.sorted_indices, input.unsorted_indices
            )
            h, c = self.permute_hidden((h, c), input.unsorted_indices)
        return (y, (h, c)) if half is None else (y.to(half), (h.to(half), c.to(half)))

    def _run(self, x: Any, hx: Any, weights: list[Any], layer: Any) -> Any:
        """Run a dense batch, or no batch, in the layout that the caller has."""
        batched = x.dim() == 3
        if not batched:
            x = x.unsqueeze(1)
            hx = None if hx is None else [state.unsqueeze(1) for state in hx]
        elif self.batch_first:
            x = x.transpose(0, 1)
        y, h, c = self._layers(x, hx, weights, layer)
        if not batched:
            return y.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return y.transpose(0, 1) if self.batch_first else y, (h, c)

    def _layers(
        self, x: Tensor, hx: Any, weights: list[Tensor], layer: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        directions = 2 if self.bidirectional else 1
        h0, c0 = hx or (None, None)
        if self.num_layers == 1:
            result: tuple[Tensor, Tensor, Tensor] = layer(directions, x, h0, c0, weights)
            return result
        per_layer = len(weights) // self.num_layers
        states = []
        for k in range(self.num_layers):
            one = slice(k * directions, (k + 1) * directions)
            x, *state = layer(
                directions,
                x,
                None if h0 is None else h0[one],
                None if c0 is None else c0[one],
                weights[k * per_layer : (k + 1) * per_layer],
            )
            states.append(state)
            if self.dropout and self.training and k < self.num_layers - 1:
                x = torch.dropout(x, self.dropout, True)
        h, c = (torch.cat(parts) for parts in zip(*states, strict=True))
        return x, h, c

    def _traced(self, input: Any, hx: Any, weights: list[Any]) -> Any:
        """Run as operators, one for each layer."""
        if torch._C._are_functorch_transforms_active():  # the operator knows none
            torch._dynamo.skip_frame()  # and Dynamo cannot trace nn.LSTM under one
            return super().forward(input, hx)
        ragged = isinstance(input, PackedSequence)
        x: Any = input.data if ragged else input
        N = _traced_batch(input, hx) if ragged else None
        layout = (self.num_layers, 2 if self.bidirectional else 1, self.batch_first, 3, N)
        sizes = (self.input_size, self.hidden_size, self.proj_size, *layout)
        half = _half_dtype(x, hx, weights)
        given = x, hx, weights
        x, state, weights = given if half is None else _packed(*given, half)
        autocast = torch.is_autocast_enabled("cpu")
        if (half is None and autocast) or not _ops.fits(x, state, weights, *sizes):
            if half is None and not autocast:
                self._check(input, hx, weights)
            return super().forward(input, hx)

        if not ragged:
            y, (h, c) = self._run(x, state, weights, _ops.layer_of_graph)
            return (y, (h, c)) if half is None else (y.to(half), (h.to(half), c.to(half)))
        if state is None:  # the operator reads N off the state
            H, P = self.hidden_size, self.proj_size or self.hidden_size
            state = [x.new_zeros(layout[0] * layout[1], N, size) for size in (P, H)]
        else:
            state = self.permute_hidden(state, input.sorted_indices)
        layer = partial(_ops.layer_of_graph, batch_sizes=input.batch_sizes)
        results = self._layers(x, state, weights, layer)
        y, h, c = results if half is None else [result.to(half) for result in results]
        y = PackedSequence(y, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
        return y, self.permute_hidden((h, c), input.unsorted_indices)

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
        directions = 2 if self.bidirectional else 1
        sizes = (self.input_size, self.hidden_size, self.proj_size, self.num_layers, directions)
        shapes = _ops.weight_shapes(*sizes, self.bias)
        for name, weight, shape in zip(self._flat_weights_names, weights, shapes, strict=True):
            if weight.shape != shape:
                raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(weight.shape)}")


class LSTMCell(torch.nn.LSTMCell):
    """`torch.nn.LSTMCell` on the kernels of fastlstm: the same constructor, parameters and results.

    What the kernels do not serve (see :class:`LSTM`) runs as in `torch.nn.LSTMCell`.
    """

    _names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run one step on `input`: shapes, results and errors of `torch.nn.LSTMCell`."""
        own = self._parameters
        weights: list[Any] = [
            own[n] if n in own else getattr(self, n, None)
            for n in (self._names if self.bias else self._names[:2])
        ]
        if torch.compiler.is_compiling():
            return self._traced(input, hx, weights)
        if _observed():
            return super().forward(input, hx)
        sizes = (self.input_size, self.hidden_size, 0, 1, 1, False, 2, 0)
        half = None
        autocast = torch.is_autocast_enabled("cpu")
        if autocast or not _core.fits(input, hx, weights, *sizes):
            half = _half_dtype(input, hx, weights)
            packed = _packed(input, hx, weights, half)
            if (autocast and half is None) or not _core.fits(*packed, *sizes):
                return super().forward(input, hx)
            input, hx, weights = packed
        h0, c0 = hx or (None, None)
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            h0, c0 = (None if state is None else state.unsqueeze(0) for state in (h0, c0))
        if wants_grad(input, h0, c0, weights):
            h, c = Step.apply(input, h0, c0, *weights)  # type: ignore[no-untyped-call]
        else:
            h, c, *_ = run_step(input, h0, c0, weights, keep=False)
        if not batched:
            h, c = h.squeeze(0), c.squeeze(0)
        return (h, c) if half is None else (h.to(half), c.to(half))

    def _traced(self, input: Any, hx: Any, weights: list[Any]) -> Any:
        """Run as the operator of a layer at T = 1."""
        if torch._C._are_functorch_transforms_active():  # the operator knows none
            return super().forward(input, hx)
        half = _half_dtype(input, hx, weights)
        given = input, hx, weights
        x, state, weights = given if half is None else _packed(*given, half)
        sizes = (self.input_size, self.hidden_size, 0, 1, 1, False, 2, None)
        autocast = half is None and torch.is_autocast_enabled("cpu")
        if autocast or not _ops.fits(x, state, weights, *sizes):
            return super().forward(input, hx)
        step = (0,) if x.dim() == 2 else (0, 0)
        for _ in step:  # of time, and of a batch where there is none
            x = x.unsqueeze(0)
            state = None if state is None else [part.unsqueeze(0) for part in state]
        h0, c0 = state or (None, None)
        _, h, c = _ops.layer_of_graph(1, x, h0, c0, weights)
        h, c = h[step], c[step]
        return (h, c) if half is None else (h.to(half), c.to(half))


_dynamo.trace(LSTM)

_OURS = {torch.nn.LSTM: LSTM, torch.nn.LSTMCell: LSTMCell}


def _exchange_classes(
    model: _Module, classes: dict[type[torch.nn.Module], type[torch.nn.Module]]
) -> list[str]:
    """Give the modules inside their other class; return the names of subclasses that stay."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    left = []
    for name, module in model.named_modules():
        old = type(module)
        # parametrize has made a class of its own for the module, whose one base is what it was.
        parametrized = torch.nn.utils.parametrize.is_parametrized(module)
        original = old.__base__ if parametrized else old
        if original in classes:
            new = classes[original]
            if parametrized:
                new = type(f"Parametrized{new.__name__}", (new,), dict(vars(old)))
            module.__class__ = new
        elif isinstance(module, tuple(classes)) and original not in classes.values():
            left.append(f"{name or 'model'} ({old.__name__})")
    return left


def convert(model: _Module) -> _Module:
    """Turn every `torch.nn.LSTM` and `torch.nn.LSTMCell` inside a model into fastlstm's.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place: each such module becomes an instance of the class here and keeps its
        parameters, parametrizations, buffers, hooks, mode and device. Subclasses of torch's are
        left alone, since they may have a forward of their own; a warning names them.

    Returns
    -------
    torch.nn.Module
        `model` itself.

    Raises
    ------
    TypeError
        If `model` is not a Module.
    """
    left = _exchange_classes(model, dict(_OURS))
    if left:
        warnings.warn(f"convert: left subclasses as they are: {', '.join(left)}", stacklevel=2)
    return model


def revert(model: _Module) -> _Module:
    """Turn every LSTM and LSTMCell of fastlstm inside a model into torch's: undo :func:`convert`.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place; everything that `convert` keeps is kept. Subclasses are left alone.

    Returns
    -------
    torch.nn.Module
        `model` itself.

    Raises
    ------
    TypeError
        If `model` is not a Module.
    """
    _exchange_classes(model, {ours: torchs for torchs, ours in _OURS.items()})
    return model
