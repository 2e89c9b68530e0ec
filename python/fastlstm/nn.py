"""Drop-ins for `torch.nn.LSTM` and `torch.nn.LSTMCell`, on the kernels of fastlstm.

Both are subclasses of torch's own and change one thing, how a forward call is computed. A call on
another device goes torch's own way, and so does a wrong one, for its error.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _core, _transforms
from ._torch import Step, run_layer, run_step, wants_grad

__all__ = ["LSTM", "LSTMCell", "convert", "revert"]

_Module = TypeVar("_Module", bound=torch.nn.Module)


def _observed() -> bool:
    """Return whether a tracer, a compiler or a transform must see operators of torch."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
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
    `proj_size` included; so do bfloat16, float16 and autocast, with arithmetic in float32.
    `torch.compile`, `torch.export` and dispatch modes see one operator for each layer. `torch.func`
    and autograd of any order work, on the kernels for `grad`, `vjp`, `jacrev` and `vmap`; forward
    mode and derivatives of derivatives are composed of operators of torch. Other devices and jit
    tracing run as in `torch.nn.LSTM`.
    """

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run over `input`: shapes, results and errors of `torch.nn.LSTM`."""
        # Read anew at every call, wherever weight_norm, parametrize or functional_call put them.
        own = self._parameters
        weights: list[Any] = [
            own[n] if n in own else getattr(self, n, None) for n in self._flat_weights_names
        ]
        observed = _observed()
        if observed:
            if torch.compiler.is_compiling() and self._compiles(input, hx, weights):
                return self._run(input, hx, weights, _transforms.run_layer)
            if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
                return super().forward(input, hx)
        run: Any = run_layer
        ragged = isinstance(input, PackedSequence)
        x: Any = input.data if ragged else input
        batch_sizes = _batch_sizes(input) if ragged else []
        N = batch_sizes[0] if ragged else 0
        layout = (self.num_layers, 2 if self.bidirectional else 1, self.batch_first, 3, N)
        sizes = (self.input_size, self.hidden_size, self.proj_size, *layout)
        half = None
        autocast = torch.is_autocast_enabled("cpu")
        if observed or autocast or not _core.fits(x, hx, weights, *sizes):
            half = _half_dtype(x, hx, weights)
            packed = _packed(x, hx, weights, half)
            if observed or not _core.fits(*packed, *sizes):
                if not self._serves(*packed, input.batch_sizes if ragged else None):
                    return super().forward(input, hx)
                run = _transforms.run_layer
            x, hx, weights = packed

        if not ragged:
            y, (h, c) = self._run(x, hx, weights, run)
        else:
            if hx is not None:
                hx = self.permute_hidden(hx, input.sorted_indices)
            layer = partial(run, batch_sizes=batch_sizes)
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

    def _compiles(self, input: Any, hx: Any, weights: list[Any]) -> bool:
        """Return whether a compiler gets our operator for this call; nn.LSTM's checks raise."""
        if isinstance(input, PackedSequence) or torch.is_autocast_enabled("cpu"):
            return False
        return self._serves(input, hx, weights, None)

    def _serves(self, x: Any, hx: Any, weights: list[Any], batch_sizes: Tensor | None) -> bool:
        """Return whether all are CPU tensors of one dtype, float32 or float64, and nothing missing.

        False leaves the call, and its error, to nn.LSTM. Errors of shape are raised here, with the
        text of nn.LSTM: it would not see all of them, or not under every transform.
        """
        if hx is not None and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            return False
        states = list(hx or ())
        tensors = [x, *states, *weights]
        if not all(isinstance(t, Tensor) and t.layout is torch.strided for t in tensors):
            return False
        self._check_weight_shapes(weights)
        if batch_sizes is not None and (x.dim() != 2 or x.dtype != weights[0].dtype):
            self.check_input(x, batch_sizes)  # nn.LSTM does so where nothing is packed
        if x.dtype != weights[0].dtype:
            return False
        _check_state_dtype(hx, x.dtype)
        if batch_sizes is None:
            if x.dim() not in (2, 3) or any(state.dim() != x.dim() for state in states):
                return False
            if x.dim() == 2:
                x = x.unsqueeze(0 if self.batch_first else 1)
                states = [state.unsqueeze(1) for state in states]
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {x.shape[-1]}"
            )
        if states:
            sizes = self.get_expected_hidden_size, self.get_expected_cell_size
            for k in range(2):
                text = f"Expected hidden[{k}] size {{}}, got {{}}"
                self.check_hidden_size(states[k], sizes[k](x, batch_sizes), text)
        if x.dtype not in (torch.float32, torch.float64) or any(
            t.dtype != x.dtype or t.device.type != "cpu" for t in tensors
        ):
            return False
        if batch_sizes is None and x.shape[1 if self.batch_first else 0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return True

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

    What :class:`LSTM` says of dtypes, transforms and devices holds here.
    """

    _names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run one step on `input`: shapes, results and errors of `torch.nn.LSTMCell`."""
        observed = _observed()
        if observed and (
            torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        ):
            return super().forward(input, hx)
        own = self._parameters
        weights: list[Any] = [
            own[n] if n in own else getattr(self, n, None)
            for n in (self._names if self.bias else self._names[:2])
        ]
        sizes = (self.input_size, self.hidden_size, 0, 1, 1, False, 2, 0)
        half = None
        readable = True
        autocast = torch.is_autocast_enabled("cpu")
        if observed or autocast or not _core.fits(input, hx, weights, *sizes):
            half = _half_dtype(input, hx, weights)
            packed = _packed(input, hx, weights, half)
            readable = not observed and _core.fits(*packed, *sizes)
            if not readable and not self._serves(*packed):
                return super().forward(input, hx)
            input, hx, weights = packed
        h0, c0 = hx or (None, None)
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            h0, c0 = (None if state is None else state.unsqueeze(0) for state in (h0, c0))
        if not readable:
            h, c = _transforms.run_step(input, h0, c0, weights)
        elif wants_grad(input, h0, c0, weights):
            h, c = Step.apply(input, h0, c0, *weights)  # type: ignore[no-untyped-call]
        else:
            h, c, *_ = run_step(input, h0, c0, weights, keep=False)
        if not batched:
            h, c = h.squeeze(0), c.squeeze(0)
        return (h, c) if half is None else (h.to(half), c.to(half))

    def _serves(self, x: Any, hx: Any, weights: list[Any]) -> bool:
        """Return whether this is a right call on CPU tensors of one dtype, float32 or float64.

        False leaves the call, and its error, to nn.LSTMCell; what it would not see under vmap is
        raised here, with its text.
        """
        D, H = self.input_size, self.hidden_size
        if hx is not None and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            return False
        states = tuple(hx or ())
        tensors = (x, *states, *weights)
        if not all(isinstance(t, Tensor) and t.layout is torch.strided for t in tensors):
            return False
        if x.dim() not in (1, 2) or any(state.dim() != x.dim() for state in states):
            return False
        if x.shape[-1] != D:
            raise RuntimeError(f"input has inconsistent input_size: got {x.shape[-1]} expected {D}")
        for k, state in enumerate(states):
            if state.shape[:-1] != x.shape[:-1]:
                raise RuntimeError(
                    f"Input batch size {x.shape[0]} doesn't match hidden{k} "
                    f"batch size {state.shape[0]}"
                )
            if state.shape[-1] != H:
                raise RuntimeError(
                    f"hidden{k} has inconsistent hidden_size: got {state.shape[-1]}, expected {H}"
                )
        shapes = [(4 * H, D), (4 * H, H), (4 * H,), (4 * H,)]
        return (
            x.dtype in (torch.float32, torch.float64)
            and all((t.dtype, t.device.type) == (x.dtype, "cpu") for t in tensors)
            and all(w.shape == shape for w, shape in zip(weights, shapes, strict=False))
        )


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
