"""Drop-ins for `torch.nn.LSTM` and `torch.nn.LSTMCell`, on the kernels of fastlstm.

Both are subclasses of torch's own and change one thing, how a forward call is computed. A call on
another device goes torch's own way, and so does a wrong one, for its error.
"""

from __future__ import annotations

import warnings
from functools import partial
from operator import is_
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from . import _check, _core, _cuda_layer, _dynamo, _fx, _ops, _tensors, _transforms
from ._torch import run_layer, run_step, seen_by_a_mode

__all__ = ["LSTM", "LSTMCell", "convert", "explain", "revert"]

_Module = TypeVar("_Module", bound=torch.nn.Module)
_State = tuple[Tensor, Tensor]


# By names of their own, since every call asks.
_tracing = torch._C._get_tracing_state
_transforming = torch._C._are_functorch_transforms_active
_profiled = torch._C._autograd._profiler_enabled


def _observed() -> bool:
    """Return whether a tracer or a transform must see operators of torch."""
    return (
        _tracing() is not None
        or _transforming()
        or seen_by_a_mode()
        or forward_ad._current_level >= 0
    )


def _infer_seen(*args: Any) -> Any:
    """Call `_core.infer` as a row of torch.profiler."""
    with torch.autograd.profiler.record_function("fastlstm::infer"):
        return _core.infer(*args)


_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_ONEDNN_BF16: bool = _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_ONEDNN_F16: bool = _ONEDNN and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _onednn_takes(x: Tensor) -> bool:
    """Return whether nn.LSTM gives this x to oneDNN: `use_mkldnn` in torch's RNN.cpp."""
    # A graph does not know of the switch, and may be for an x of any size.
    if not torch.compiler.is_compiling() and not (torch._C._get_mkldnn_enabled() and x.numel()):
        return False
    if x.dtype == torch.float16:
        return _ONEDNN_F16 and not torch.is_grad_enabled()
    return _ONEDNN_BF16 if x.dtype == torch.bfloat16 else _ONEDNN


def _autocast_dtype(x: Any, hx: Any, weights: list[Any], fused: bool) -> torch.dtype | None:
    """Return the dtype in which a call runs under autocast, None where autocast leaves it alone.

    nn.LSTM casts all tensors where oneDNN runs a whole layer (`fused`); else, and in nn.LSTMCell,
    only the products are cast, and c promotes what comes out.
    """
    if not torch.is_autocast_enabled("cpu"):
        return None
    states = hx if isinstance(hx, (tuple, list)) else ()
    if not all(
        isinstance(t, Tensor) and t.is_cpu and t.dtype in (torch.float32, *_tensors.HALF)
        for t in (x, *states, *weights)
    ):
        return None
    dtype = torch.get_autocast_dtype("cpu")
    if fused and _onednn_takes(x):
        return dtype
    return torch.promote_types((states[-1] if states else x).dtype, dtype)


def _projecting(layer: Any) -> Any:
    """Return the layer as under autocast: h of a projection is its product's, c is promoted."""

    def run(directions: int, x: Tensor, h0: Any, c0: Any, weights: Any, **ragged: Any) -> Any:
        dtype = torch.get_autocast_dtype("cpu")
        y, h, c = layer(directions, x.to(weights[0].dtype), h0, c0, weights, **ragged)
        return y.to(dtype), h.to(dtype), c

    return run


# What torch says of a state of another dtype, where the operator it came to minds.
_WORDS_FOR_DTYPE = ("mkldnn", "primitive", "same dtype")


def _wrong_dtype(hx: Any, expected: torch.dtype) -> RuntimeError | None:
    """Return an error that names the first state of another dtype."""
    for k, state in enumerate(hx if isinstance(hx, (tuple, list)) else ()):
        if isinstance(state, Tensor) and state.dtype != expected:
            return RuntimeError(f"hx[{k}]: expected dtype {expected}, got {state.dtype}")
    return None


def _packed(
    input: Any, hx: Any, weights: list[Any], dtype: torch.dtype | None
) -> tuple[Any, Any, list[Any]]:
    """Return tensors contiguous, under autocast in its dtype, and the rest as it came."""

    def packed(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return value
        return (value if dtype is None else value.to(dtype)).contiguous()

    if isinstance(hx, (tuple, list)):
        hx = [packed(state) for state in hx]
    return packed(input), hx, [packed(weight) for weight in weights]


def _have_functions(weights: list[Any]) -> bool:
    """Return whether a weight answers torch's functions itself, as those of ExpandedWeights do."""
    of_torch = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    answers = (getattr(type(weight), "__torch_function__", None) for weight in weights)
    return any(getattr(answer, "__func__", of_torch) is not of_torch for answer in answers)


def _batch_sizes(packed: PackedSequence) -> list[int]:
    """Return the batch sizes of a PackedSequence, which anyone can make by hand, checked."""
    given = packed.batch_sizes
    if given.dim() != 1 or given.dtype != torch.int64:
        raise RuntimeError(
            "input.batch_sizes: expected shape (T,) and dtype torch.int64, got "
            f"{tuple(given.shape)} and {given.dtype}"
        )
    sizes: list[int] = given.tolist()
    _tensors.check_batch_sizes(sizes, packed.data.shape[0])
    return sizes


def _traced_batch(packed: PackedSequence, hx: Any) -> Any:
    """Return N of a PackedSequence from shapes; else from its numbers, where Dynamo stops."""
    if packed.sorted_indices is not None:
        return packed.sorted_indices.shape[0]
    if isinstance(hx, (tuple, list)) and hx and isinstance(hx[0], Tensor) and hx[0].dim() == 3:
        return hx[0].shape[1]
    return packed.batch_sizes[0].item()


def _for_script(module: _Module) -> _Module:
    """Return what torch.jit.script compiles in place of a module, and leaves in its place."""
    ours = type(module).__name__
    if not isinstance(revert(module), (LSTM, LSTMCell)):
        warnings.warn(
            f"torch.jit.script: this {ours} is torch's own from now on, as after "
            "fastlstm.nn.revert; fastlstm.nn.convert turns it back",
            stacklevel=2,
        )
    return module


class LSTM(torch.nn.LSTM):
    """`torch.nn.LSTM` on the kernels of fastlstm: the same constructor, parameters and results.

    float32 and float64 CPU tensors run on the kernels, forward and backward, packed sequences and
    `proj_size` included; so do bfloat16, float16 and autocast, with arithmetic in float32 and what
    is kept for backward in half precision.
    `torch.compile`, `torch.export` and dispatch modes see one operator for each layer,
    `torch.onnx.export` the LSTM operator of ONNX, `torch.fx` one node. `torch.func` and autograd of
    any order work, on the kernels for `grad`, `vjp`, `jacrev` and `vmap`; forward mode and
    derivatives of derivatives are composed of operators of torch. Other devices and jit tracing run
    as in `torch.nn.LSTM`, and so does CUDA unless FASTLSTM_CUDA_KERNELS=1 stands in the
    environment; see :func:`explain`. Scripting puts `torch.nn.LSTM` in its place.
    """

    __prepare_scriptable__ = _for_script

    @overload
    def forward(self, input: Tensor, hx: _State | None = None) -> tuple[Tensor, _State]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: _State | None = None
    ) -> tuple[PackedSequence, _State]: ...
    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run over `input`: shapes, results and errors of `torch.nn.LSTM`."""
        if torch.compiler.is_compiling():
            return self.__traced(input, hx, self.__weights())
        # Read anew at every call: others are looked for where these are not the parameters.
        weights: list[Any] = self._flat_weights
        if not all(map(is_, map(self._parameters.get, self._flat_weights_names), weights)):
            weights = self.__weights()
        observed = _observed()
        if observed and _tracing() is not None:
            return super().forward(input, hx)
        run: Any = run_layer
        ragged = isinstance(input, PackedSequence)
        x: Any = input.data if ragged else input
        batch_sizes = _batch_sizes(input) if ragged else []
        N = batch_sizes[0] if ragged else 0
        layout = (self.num_layers, 2 if self.bidirectional else 1, self.batch_first, 3, N)
        sizes = (self.input_size, self.hidden_size, self.proj_size, *layout)
        autocast = torch.is_autocast_enabled("cpu")
        plain = not (observed or autocast or torch.is_grad_enabled())
        if self.num_layers > 1 and self.dropout and self.training:
            plain = False  # dropout comes between the layers
        infer = _infer_seen if _profiled() else _core.infer
        if plain and not ragged:
            found = infer(x, hx, weights, *sizes, (), torch.get_num_threads())
            if found is not None:
                y, states = found
                return (y.transpose(0, 1), states) if self.batch_first and y.dim() == 3 else found
        if observed or autocast or not _core.fits(x, hx, weights, *sizes):
            if _have_functions(weights):
                return super().forward(input, hx)
            packed = None if observed else _cuda_layer.served(self, input, hx, weights)
            if packed is None:
                unequal = ragged and batch_sizes[0] != batch_sizes[-1]
                dtype = _autocast_dtype(x, hx, weights, not (unequal or self.proj_size))
                packed = _packed(x, hx, weights, dtype)
                if observed or not _core.fits(*packed, *sizes):
                    if not self.__serves(*packed, input.batch_sizes if ragged else None):
                        return self.__as_torch(input, hx, weights)
                    run = _transforms.run_layer
                if dtype is not None and self.proj_size:
                    run = _projecting(run)
            x, hx, weights = packed

        if not ragged:
            y, (h, c) = self.__run(x, hx, weights, run)
        else:
            if hx is not None:
                hx = self.permute_hidden(hx, input.sorted_indices)
            found = None
            if plain:
                threads = torch.get_num_threads()
                found = infer(x, hx, weights, *sizes, batch_sizes, threads)
            layer = partial(run, batch_sizes=batch_sizes)
            data, (h, c) = found or self.__layers(x, hx, weights, layer)
            y = PackedSequence(
                data, input.batch_sizes, input.sorted_indices, input.unsorted_indices
            )
            h, c = self.permute_hidden((h, c), input.unsorted_indices)
        return y, (h, c)

    def __weights(self) -> list[Any]:
        """Return the weights, wherever weight_norm, parametrize or functional_call put them."""
        names, own = self._flat_weights_names, self._parameters
        compiling = torch.compiler.is_compiling()
        if all(n in own for n in names):
            weights: list[Any] = [own[n] for n in names]
            # Some fill the list themselves that nn.LSTM computes with.
            if compiling or self._weights_have_changed():  # type: ignore[no-untyped-call]
                return weights
            return list(self._flat_weights)
        if compiling:
            return [getattr(self, n, None) for n in names]
        # As often as nn.LSTM reads them: each reading may draw numbers or step a power iteration.
        self._weights_have_changed()  # type: ignore[no-untyped-call]
        return [getattr(self, n) if hasattr(self, n) else None for n in names]

    def __run(self, x: Any, hx: Any, weights: list[Any], layer: Any) -> Any:
        """Run a dense batch, or no batch, in the layout that the caller has."""
        batched = x.dim() == 3
        if not batched:
            x = x.unsqueeze(1)
            hx = None if hx is None else [state.unsqueeze(1) for state in hx]
        elif self.batch_first:
            x = x.transpose(0, 1)
        y, (h, c) = self.__layers(x, hx, weights, layer)
        if not batched:
            return y.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return y.transpose(0, 1) if self.batch_first else y, (h, c)

    def __layers(
        self, x: Tensor, hx: Any, weights: list[Tensor], layer: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        directions = 2 if self.bidirectional else 1
        h0, c0 = hx or (None, None)
        if self.num_layers == 1:
            y, h, c = layer(directions, x, h0, c0, weights)
            return y, (h, c)
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
        return x, (h, c)

    def __traced(self, input: Any, hx: Any, weights: list[Any]) -> Any:
        """Run as operators, one for each layer."""
        ragged = isinstance(input, PackedSequence)
        x: Any = input.data if ragged else input
        N = _traced_batch(input, hx) if ragged else None
        layout = (self.num_layers, 2 if self.bidirectional else 1, self.batch_first, 3, N)
        sizes = (self.input_size, self.hidden_size, self.proj_size, *layout)
        # What is packed is ragged: whether it is stands in numbers that a graph does not have.
        dtype = _autocast_dtype(x, hx, weights, not (ragged or self.proj_size))
        given = x, hx, weights
        x, state, packed = given if dtype is None else _packed(*given, dtype)
        autocast = torch.is_autocast_enabled("cuda" if weights[0].is_cuda else "cpu")
        if (dtype is None and autocast) or not _tensors.fits(x, state, packed, *sizes):
            return self.__as_torch(input, hx, weights)

        projects = dtype is not None and self.proj_size > 0
        if not ragged:
            layer = _transforms.run_layer
            return self.__run(x, state, packed, _projecting(layer) if projects else layer)
        if state is None:  # the operator reads N off the state
            H, P = self.hidden_size, self.proj_size or self.hidden_size
            state = [x.new_zeros(layout[0] * layout[1], N, size) for size in (P, H)]
        else:
            state = self.permute_hidden(state, input.sorted_indices)
        layer = partial(_ops.layer_of_graph, batch_sizes=input.batch_sizes)
        layer = _projecting(layer) if projects else layer
        data, (h, c) = self.__layers(x, state, packed, layer)
        y = PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
        return y, self.permute_hidden((h, c), input.unsorted_indices)

    def __serves(self, x: Any, hx: Any, weights: list[Any], batch_sizes: Tensor | None) -> bool:
        """Return whether all are of one dtype, on one device with kernels, and nothing missing.

        False leaves the call, and its error, to nn.LSTM. Errors of shape are raised here, with the
        text of nn.LSTM: it would not see all of them, or not under every transform.
        """
        if hx is not None and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            return False
        states = list(hx or ())
        tensors = [x, *states, *weights]
        if not all(isinstance(t, Tensor) and t.layout is torch.strided for t in tensors):
            return False
        self.__check_weight_shapes(weights)
        if batch_sizes is not None and (x.dim() != 2 or x.dtype != weights[0].dtype):
            self.check_input(x, batch_sizes)  # nn.LSTM does so where nothing is packed
        if x.dtype != weights[0].dtype:
            return False
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
        if x.dtype not in _tensors.DTYPES.get(x.device.type, ()) or any(
            t.dtype != x.dtype or t.device != x.device for t in tensors
        ):
            return False
        if x.is_cuda and (
            0 in x.shape or torch.is_autocast_enabled("cuda") or not _cuda_layer.capable(x)
        ):
            return False
        if batch_sizes is None and x.shape[1 if self.batch_first else 0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return True

    def __as_torch(self, input: Any, hx: Any, weights: list[Any]) -> Any:
        """Run as nn.LSTM does, but raise where it would read out of bounds or report obscurely."""
        if all(w is not None for w in weights):
            self.__check_weight_shapes(weights)
            if isinstance(input, PackedSequence):
                if hx is None:
                    self.check_input(input.data, input.batch_sizes)
                else:
                    self.check_forward_args(input.data, (hx[0], hx[1]), input.batch_sizes)
        if torch.compiler.is_compiling() and _wrong_dtype(hx, weights[0].dtype):
            torch._dynamo.skip_frame()  # its graph would raise outside of `try`
        try:
            return super().forward(input, hx)
        except RuntimeError as error:
            if any(words in str(error) for words in _WORDS_FOR_DTYPE):
                raise _wrong_dtype(hx, weights[0].dtype) or error from error
            raise

    def __check_weight_shapes(self, weights: list[Any]) -> None:
        directions = 2 if self.bidirectional else 1
        sizes = (self.input_size, self.hidden_size, self.proj_size, self.num_layers, directions)
        shapes = _check.weight_shapes(*sizes, self.bias)
        if len(shapes) != len(weights):
            raise RuntimeError(
                "num_layers, bidirectional, proj_size, bias: expected as they were when the module "
                f"was made, with {len(weights)} weights, got {len(shapes)}"
            )
        for name, weight, shape in zip(self._flat_weights_names, weights, shapes, strict=True):
            if weight.shape != shape:
                raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(weight.shape)}")


class LSTMCell(torch.nn.LSTMCell):
    """`torch.nn.LSTMCell` on the kernels of fastlstm: the same constructor, parameters and results.

    What :class:`LSTM` says of dtypes, transforms and devices holds here.
    """

    __prepare_scriptable__ = _for_script
    __names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def forward(self, input: Tensor, hx: _State | None = None) -> _State:
        """Run one step on `input`: shapes, results and errors of `torch.nn.LSTMCell`."""
        own = self._parameters
        weights: list[Any] = [own[n] if n in own else getattr(self, n) for n in self.__names]
        if weights[2] is None and weights[3] is None:
            del weights[2:]
        if torch.compiler.is_compiling():
            return self.__traced(input, hx, weights)
        observed = _observed()
        if observed and _tracing() is not None:
            return super().forward(input, hx)
        sizes = (self.input_size, self.hidden_size, 0, 1, 1, False, 2, 0)
        readable = True
        autocast = torch.is_autocast_enabled("cpu")
        if not (observed or autocast or torch.is_grad_enabled()):
            infer = _infer_seen if _profiled() else _core.infer
            found: _State | None = infer(input, hx, weights, *sizes, (), torch.get_num_threads())
            if found is not None:
                return found
        if observed or autocast or not _core.fits(input, hx, weights, *sizes):
            if _have_functions(weights):
                return super().forward(input, hx)
            packed = _packed(input, hx, weights, _autocast_dtype(input, hx, weights, fused=False))
            readable = not observed and _core.fits(*packed, *sizes)
            if not readable and not self.__serves(*packed):
                return super().forward(input, hx)
            input, hx, weights = packed
        h0, c0 = hx or (None, None)
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            h0, c0 = (None if state is None else state.unsqueeze(0) for state in (h0, c0))
        h, c = (run_step if readable else _transforms.run_step)(input, h0, c0, weights)
        if not batched:
            h, c = h.squeeze(0), c.squeeze(0)
        return h, c

    def __traced(self, input: Any, hx: Any, weights: list[Any]) -> _State:
        """Run as the operator of a layer at T = 1."""
        dtype = _autocast_dtype(input, hx, weights, fused=False)
        given = input, hx, weights
        x, state, weights = given if dtype is None else _packed(*given, dtype)
        sizes = (self.input_size, self.hidden_size, 0, 1, 1, False, 2, None)
        autocast = dtype is None and torch.is_autocast_enabled("cpu")
        if autocast or not _tensors.fits(x, state, weights, *sizes):
            return super().forward(input, hx)
        step = (0,) if x.dim() == 2 else (0, 0)
        for _ in step:  # of time, and of a batch where there is none
            x = x.unsqueeze(0)
            state = None if state is None else [part.unsqueeze(0) for part in state]
        h0, c0 = state or (None, None)
        _, h, c = _transforms.run_layer(1, x, h0, c0, weights)
        return h[step], c[step]

    def __serves(self, x: Any, hx: Any, weights: list[Any]) -> bool:
        """Return whether this is a right call on CPU tensors of one floating dtype.

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
        shapes = _check.weight_shapes(D, H, 0, 1, 1, len(weights) == 4)
        return (
            x.dtype in _tensors.DTYPES["cpu"]
            and all((t.dtype, t.device.type) == (x.dtype, "cpu") for t in tensors)
            and all(w.shape == shape for w, shape in zip(weights, shapes, strict=True))
        )


_dynamo.trace(LSTM, _tensors.DTYPES)
_fx.take_as_one(LSTM, LSTMCell)

_OURS = {torch.nn.LSTM: LSTM, torch.nn.LSTMCell: LSTMCell}
_Classes = dict[type[torch.nn.Module], type[torch.nn.Module]]

# Where torch makes a class for a single module, of what the module was and what it can do now.
_MADE_BY_TORCH = ("torch.nn.utils.parametrize", "torch.distributed.")


def _exchanged(old: type, classes: _Classes) -> type | None:
    """Return the class that takes the place of another, or None where it stays."""
    if old in classes or not old.__module__.startswith(_MADE_BY_TORCH):
        return classes.get(old)
    bases = tuple(_exchanged(base, classes) or base for base in old.__bases__)
    return None if bases == old.__bases__ else type(old.__name__, bases, dict(vars(old)))


def _exchange_classes(model: _Module, classes: _Classes) -> _Module:
    """Give the modules inside their other class, and warn of those that must stay."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    to_ours = LSTM in classes.values()
    left = []
    for name, module in model.named_modules():
        new = None if "forward" in vars(module) else _exchanged(type(module), classes)
        if new is not None:
            module.__class__ = new
        elif isinstance(module, tuple(classes)) and to_ours != isinstance(module, (LSTM, LSTMCell)):
            left.append(f"{name or 'model'} ({type(module).__name__})")
    if left:
        warnings.warn(
            f"{'convert' if to_ours else 'revert'}: left as they are, since they may have "
            f"a forward of their own: {', '.join(left)}",
            stacklevel=3,
        )
    return model


def convert(model: _Module) -> _Module:
    """Turn every `torch.nn.LSTM` and `torch.nn.LSTMCell` inside a model into fastlstm's.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place: each such module becomes an instance of the class here and keeps its
        parameters, parametrizations, buffers, hooks, mode and device. What may have a forward of
        its own is left alone, and a warning names it: subclasses of torch's, and modules whose
        `forward` was replaced. `DistributedDataParallel` and `fully_shard` may come before or
        after.

    Returns
    -------
    torch.nn.Module
        `model` itself.

    Raises
    ------
    TypeError
        If `model` is not a Module.
    """
    return _exchange_classes(model, dict(_OURS))


def revert(model: _Module) -> _Module:
    """Turn every LSTM and LSTMCell of fastlstm inside a model into torch's: undo :func:`convert`.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place; what `convert` keeps is kept, and what it would leave alone is left
        alone, with the same warning.

    Returns
    -------
    torch.nn.Module
        `model` itself.

    Raises
    ------
    TypeError
        If `model` is not a Module.
    """
    return _exchange_classes(model, {ours: torchs for torchs, ours in _OURS.items()})


def explain(lstm: torch.nn.LSTM, input: Any, hx: Any = None, *, device: Any = None) -> str:
    """Say which CUDA path a call would take, and why.

    Parameters
    ----------
    lstm : torch.nn.LSTM
    input : Tensor or PackedSequence
    hx : (h0, c0), optional
        What the call would get. No kernel runs; weights that are computed (parametrizations) are.
    device : tuple, optional
        Ask of a device that need not be here: (major, minor, multiprocessors, shared_bytes,
        cooperative), that is its compute capability, its number of multiprocessors, the bytes of
        shared memory that one block may take and whether it has cooperative launches; such as
        ``(9, 0, 132, 232448, True)`` for an H100. Only sizes and dtype of `input` count then.

    Returns
    -------
    str
        One line for the forward and one for the backward pass, or one where torch's own path runs.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    return _cuda_layer.explain(lstm, input, hx, device)
