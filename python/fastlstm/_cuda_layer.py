"""Layers of an LSTM on CUDA: memory, the products by torch, and the kernels of `_cuda`.

`run_forward` and `run_backward` have the signatures of those in `_torch`, which calls them for
tensors on CUDA; everything is queued on the current stream and nothing waits for the device.

Until they are measured against cuDNN the kernels are used only where the environment says
``FASTLSTM_CUDA_KERNELS=1``; otherwise `fastlstm.nn` on CUDA is `torch.nn.LSTM`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property, lru_cache, wraps
from itertools import accumulate
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from . import _cuda_plan, _tensors, _torch
from ._cuda_graphs import Replays, Tensors, without_replays
from ._cuda_plan import Device, Plan

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

_SWITCH = "FASTLSTM_CUDA_KERNELS"
_MATH = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64"}
_NO_CUDA_PART = "this build of fastlstm has no CUDA part (nvcc was not found or FASTLSTM_CUDA=off)"


def _load() -> Any:
    """Return the module of the kernels where the environment asks for it, else None."""
    value = os.environ.get(_SWITCH, "0")
    if value not in ("0", "1", ""):
        raise ValueError(f"{_SWITCH}: expected 0 or 1, got {value!r}")
    if value != "1":
        return None
    try:
        return importlib.import_module(f"{__package__}._cuda")
    except ModuleNotFoundError:
        raise ImportError(f"{_SWITCH}=1: {_NO_CUDA_PART}") from None


_cuda = _load()
ENABLED = _cuda is not None
if ENABLED:
    _tensors.DTYPES["cuda"] = tuple(_MATH)


_replays = Replays(most=8)
_MOST_REPLAYED = 64 << 20  # bytes of one graph's own memory, without the weights
_MOST_STEPS = 4096  # of one graph


@lru_cache(maxsize=64)
def properties(index: int) -> Device:
    """Return what the plan knows of a device."""
    return Device(*_cuda.properties(index))


def math_of(dtype: torch.dtype) -> str:
    """Return the arithmetic of the recurrence; TF32 where nn.LSTM on cuDNN would use it."""
    math = _MATH[dtype]
    return "tf32" if math == "f32" and _allows_tf32() else math


def _allows_tf32() -> bool:
    rnn = getattr(torch.backends.cudnn, "rnn", None)  # since torch 2.9
    if rnn is not None:
        return bool(rnn.fp32_precision == "tf32")
    return bool(torch.backends.cudnn.allow_tf32)


def _index(x: Tensor) -> int:
    return x.device.index or 0


def _plan(x: Tensor, N: int, H: int, P: int, directions: int, backward: bool) -> tuple[str, Plan]:
    math = math_of(x.dtype)
    device = properties(_index(x))
    replays = not without_replays.depth
    return math, _cuda_plan.plan(N, H, directions, math, backward, device, P, replays)


def _where(x: Tensor) -> tuple[int, int]:
    """Return device and stream as the kernels take them."""
    if not x.is_cuda:  # the emulation
        return 0, 0
    return _index(x), torch.cuda.current_stream(x.device).cuda_stream


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Offsets:
    """The first row of each time on a device, from an earlier call with those lengths if any.

    A copy from the host that a CUDA graph captured would read the host's memory at each replay. So
    while the caller captures one, the lengths have to be those of an earlier call.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[Any, tuple[Tensor, torch.cuda.Event]] = OrderedDict()
        self._captured: dict[Any, Tensor] = {}  # read by graphs of the caller, who knows how long

    def __call__(self, first: tuple[int, ...], device: torch.device) -> Tensor:
        stream = torch.cuda.current_stream(device)
        capturing = _is_capturing(device)
        key = first, device
        if capturing and key in self._captured:
            return self._captured[key]
        known = self._known.pop(key, None)
        if known is None:
            if capturing:
                raise RuntimeError(
                    "batch_sizes: expected lengths of a call before this CUDA graph was captured"
                )
            there = torch.tensor(first, dtype=torch.int64, device="cpu", pin_memory=True)
            known = there.to(device, non_blocking=True), stream.record_event()
        self._known[key] = known  # as the last one
        if len(self._known) > self._most:
            self._known.popitem(last=False)
        offsets, copied = known
        if capturing:
            self._captured[key] = offsets
        else:
            stream.wait_event(copied)
            offsets.record_stream(stream)
        return offsets


_offsets = _Offsets(most=64)


class _Rows:
    """Which rows of a (rows, columns) tensor belong to each time."""

    def __init__(self, x: Tensor, batch_sizes: Sequence[int]) -> None:
        self.ragged = bool(batch_sizes)
        self._batch_sizes = batch_sizes
        if batch_sizes:
            self.T, self.N, self.total = len(batch_sizes), batch_sizes[0], x.shape[0]
        else:
            self.T, self.N = x.shape[:2]
            self.total = self.T * self.N

    def stretch(self, T: int) -> _Rows:
        """Return those of so many times of a dense batch."""
        part = copy(self)
        part.T, part.total = T, T * self.N
        for name in ("sizes", "first"):
            part.__dict__.pop(name, None)
        return part

    @cached_property
    def sizes(self) -> list[int]:
        """How many rows each time has."""
        return list(self._batch_sizes) if self.ragged else [self.N] * self.T

    @cached_property
    def first(self) -> list[int]:
        """The first row of each time, and the end."""
        return [0, *accumulate(self.sizes)]

    def offsets(self, x: Tensor) -> Tensor | None:
        """Return the first row of each time, and the end, on the device of x; None if dense."""
        if not self.ragged:
            return None
        if not x.is_cuda:  # the emulation
            return torch.tensor(self.first, dtype=torch.int64)
        return _offsets(tuple(self.first), x.device)

    def recurrent_gradient(self, dz: Tensor, y: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
        """Return dL/dW_hh, which is dz^T h_{t-1}, from dz (total, 4H), y (total, P), h0 (N, P)."""
        if self.ragged or h0 is not None:
            return torch.mm(dz.t(), self._before(y, h0, reverse))
        later, earlier = slice(self.N, None), slice(self.total - self.N)
        if reverse:
            later, earlier = earlier, later
        return torch.mm(dz[later].t(), y[earlier])

    def _before(self, y: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
        """Return h_{t-1} of each row (total, P), from y (total, P) and h0 (N, P) or None."""
        start = y.new_zeros(self.N, y.shape[1]) if h0 is None else h0
        if not self.ragged:
            parts = (y[self.N :], start) if reverse else (start, y[: -self.N])
            return torch.cat(parts)
        offsets = self.offsets(y)
        assert offsets is not None
        sizes = offsets.diff()
        time = torch.arange(self.T, device=y.device)
        t = torch.repeat_interleave(time, sizes, output_size=self.total)
        n = torch.arange(self.total, device=y.device) - offsets[t]
        other = (t + 1 if reverse else t - 1).clamp(0, self.T - 1)
        starts = (n >= sizes[other]) | (other == t)
        row = torch.where(starts, n, self.N + offsets[other] + n)
        return torch.cat((start, y)).index_select(0, row)


def _order(rows: _Rows, direction: int) -> range:
    """Return the times in the order in which a direction walks through them."""
    return range(rows.T - 1, -1, -1) if direction else range(rows.T)


def _launch(
    x: Tensor,
    rows: _Rows,
    plan: Plan,
    math: str,
    backward: bool,
    weights: Sequence[Tensor],
    tensors: dict[str, Tensor | None],
) -> None:
    """Run a recurrence over all of T."""
    offsets = rows.offsets(x)
    exchange, exchanges = None, 0
    if not plan.local:
        slices = -(-rows.N // plan.rows)
        exchanges = -(-slices * len(weights) // plan.groups) * (rows.T + 1)
        size = plan.groups * exchanges * plan.operand_bytes
        exchange = x.new_empty(size, dtype=torch.uint8).fill_(255)
    device, stream = _where(x)
    _cuda.recurrence(
        math,
        backward,
        device,
        stream,
        T=rows.T,
        N=rows.N,
        H=weights[0].shape[0] // 4,
        directions=len(weights),
        threads=_cuda_plan.THREADS,
        blocks=plan.blocks,
        units=plan.units,
        rows=plan.rows,
        groups=plan.groups,
        chunks=plan.chunks,
        local=int(plan.local),
        wide=int(plan.wide),
        offsets=_address(offsets),
        total=rows.total,
        weight=_address(weights[0]),
        weight_reverse=_address(weights[-1]),
        exchange=_address(exchange),
        exchanges=exchanges,
        **{name: _address(tensor) for name, tensor in tensors.items()},
    )


def _split(weights: list[Any], directions: int) -> list[list[Any]]:
    """Return weight_ih, weight_hh, both biases (or None), weight_hr (or None) of each direction."""
    per = len(weights) // directions
    found = []
    for d in range(directions):
        w_ih, w_hh, *rest = weights[d * per : (d + 1) * per]
        biases = rest[:2] if len(rest) >= 2 else None
        found.append([w_ih, w_hh, biases, rest[-1] if len(rest) % 2 else None])
    return found


def run_forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    directions: int,
    batch_sizes: Sequence[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, _torch.Kept]:
    """Run one layer: arguments and results of `_torch.run_forward`."""
    rows = _Rows(x, batch_sizes)
    results = y, h_n, c_n, kept = _torch.new_results(x, weights, directions, batch_sizes, keep)
    parts = _split(weights, directions)
    H, P = parts[0][1].shape[0] // 4, parts[0][1].shape[1]
    math, plan = _plan(x, rows.N, H, P, directions, False)
    by_steps = plan.path == "steps"
    flat = x.reshape(rows.total, -1)
    gx = x.new_empty(directions, rows.total, 4 * H)
    for d, (w_ih, _, biases, _) in enumerate(parts):
        if biases is None:
            torch.mm(flat, w_ih.t(), out=gx[d])
        else:  # the kernels of all of T add the second one themselves
            bias = torch.add(*biases) if by_steps else biases[0]
            torch.addmm(bias, flat, w_ih.t(), out=gx[d])
    if by_steps:
        flat_y = y.view(rows.total, -1)
        for d, (_, w_hh, _, w_hr) in enumerate(parts):
            state = (None if s is None else s[d] for s in (h0, c0))
            own = (None if k is None else k[d].reshape(rows.total, -1) for k in kept)
            outputs = flat_y[:, d * P : (d + 1) * P], h_n[d], c_n[d], *own
            _run_steps(rows, math, H, (gx[d], *state, w_hh, w_hr), outputs, False, d)
        return results
    gates, cells, _ = kept
    tensors = {"gx": gx, "h0": h0, "c0": c0, "y": y, "h_n": h_n, "c_n": c_n}
    tensors |= {"gates": gates, "cells": cells}
    if parts[0][2] is not None:
        tensors |= {"bias": parts[0][2][1], "bias_reverse": parts[-1][2][1]}
    _launch(x, rows, plan, math, False, [part[1] for part in parts], tensors)
    return results


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# torch's allocator then has no pools for graphs.
_UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ


def _replayable(x: Tensor) -> bool:
    return x.is_cuda and not (_UNCACHED or _is_capturing(x.device))


def _is_capturing(device: torch.device) -> bool:
    """Return whether the caller captures a CUDA graph on the current stream of a device."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_current_stream_capturing())


def _run_steps(
    rows: _Rows, math: str, H: int, inputs: Tensors, outputs: Tensors, backward: bool, d: int
) -> None:
    """Run a direction step by step, or replay CUDA graphs of its steps where that pays."""
    loop = _steps_backward if backward else _steps_forward
    like = outputs[0]
    assert like is not None
    if not (
        rows.T > 1
        and _replayable(like)
        and _cuda_plan.replay_pays(rows.N, H, math, properties(_index(like)))
    ):
        loop(rows, math, d, inputs, outputs)
        return

    def replayed(rows: _Rows, inputs: Tensors, outputs: Tensors) -> None:
        def work(inputs: Tensors, outputs: Tensors) -> None:
            loop(rows, math, d, inputs, outputs)

        alike = tuple(None if t is None else (t.shape, t.dtype) for t in (*inputs, *outputs))
        key = (backward, d, math, _where(like), tuple(rows.sizes), alike, _precision())
        _replays(key, inputs, outputs, work)

    tensors = [t for t in (*inputs, *outputs) if t is not None]
    of_rows = sum(t.nbytes for t in tensors if t.shape[0] == rows.total)
    length = min(_MOST_STEPS, max(_MOST_REPLAYED * rows.T // of_rows, 1))  # steps of one graph
    if rows.T <= length:
        replayed(rows, inputs, outputs)
    elif rows.ragged or length == 1:
        loop(rows, math, d, inputs, outputs)
    else:
        _run_stretches(rows, length, replayed, inputs, outputs, backward, d)


def _run_stretches(
    rows: _Rows,
    length: int,
    run: Callable[[_Rows, Tensors, Tensors], None],
    inputs: Tensors,
    outputs: Tensors,
    backward: bool,
    d: int,
) -> None:
    """Run a direction of a dense batch in stretches of time, each from where the last one ended.

    All of a length are alike, so that one graph does for any number of them. What is c or its
    gradient goes on in the dtype of sums, as within a stretch.
    """
    if backward:
        gates, cells, w_hh, w_hr, grad_y, c0, h, c = inputs
        dz, h_out, c_out, dh_of_rows = outputs
        of_time = gates, cells, grad_y, dz, dh_of_rows
    else:
        gx, h, c, w_hh, w_hr = inputs
        y, h_out, c_out, gates, cells, raw = outputs
        of_time = gx, y, gates, cells, raw
    assert cells is not None or not backward
    assert h_out is not None and c_out is not None
    h = torch.zeros_like(h_out) if h is None else h
    sums = torch.zeros_like(c_out, dtype=_sum_dtype(c_out.dtype))
    if c is not None:
        sums.copy_(c)
    stretches = [(t, min(t + length, rows.T)) for t in range(0, rows.T, length)]
    for first, end in stretches[::-1] if backward != bool(d) else stretches:
        now = slice(first * rows.N, end * rows.N)
        own = [None if t is None else t[now] for t in of_time]
        states = torch.empty_like(h_out), torch.empty_like(sums)
        part = rows.stretch(end - first)
        if backward:
            assert cells is not None
            before = end if d else first - 1
            inside = 0 <= before < rows.T
            own_c0 = cells[before * rows.N : (before + 1) * rows.N] if inside else c0
            if own_c0 is None:
                own_c0 = torch.zeros_like(c_out)
            own_gates, own_cells, own_grad, own_dz, own_dh = own
            part_inputs = own_gates, own_cells, w_hh, w_hr, own_grad, own_c0, h, sums
            run(part, part_inputs, (own_dz, *states, own_dh))
        else:
            own_gx, own_y, *kept = own
            run(part, (own_gx, h, sums, w_hh, w_hr), (own_y, *states, *kept))
        h, sums = states
    h_out.copy_(h)
    c_out.copy_(sums)


def _precision() -> tuple[Any, ...]:
    """Return the settings that torch's matrix products follow."""
    settings = torch.backends.cuda.matmul
    tf32 = getattr(settings, "fp32_precision", None) or settings.allow_tf32  # since torch 2.9
    deterministic = torch.are_deterministic_algorithms_enabled()
    half = (
        settings.allow_fp16_reduced_precision_reduction,
        settings.allow_bf16_reduced_precision_reduction,
        getattr(settings, "allow_fp16_accumulation", False),  # since torch 2.7
    )
    return tf32, half, str(torch.backends.cuda.preferred_blas_library()), deterministic


def _steps_forward(rows: _Rows, math: str, d: int, inputs: Tensors, outputs: Tensors) -> None:
    """Run one direction step by step; gx is overwritten."""
    gx, h0, c0, w_hh, w_hr = inputs
    y, h, c_n, gates, cells, raw = outputs
    assert gx is not None and w_hh is not None and y is not None and h is not None
    H = w_hh.shape[0] // 4
    h.zero_() if h0 is None else h.copy_(h0)
    c = torch.zeros(rows.N, H, dtype=_sum_dtype(y.dtype), device=y.device)
    if c0 is not None:
        c.copy_(c0)
    spare = None if w_hr is None or raw is not None else y.new_empty(rows.N, H)
    device, stream = _where(y)
    for t in _order(rows, d):
        lo, hi = rows.first[t], rows.first[t + 1]
        n = hi - lo
        z = gx[lo:hi]
        z.addmm_(h[:n], w_hh.t())
        now = slice(lo, hi)
        out = h[:n] if w_hr is None else spare[:n] if spare is not None else raw[now]  # type: ignore[index]
        _cuda.step(
            math,
            False,
            device,
            stream,
            n=n,
            H=H,
            y_stride=y.stride(0),
            z=_address(z),
            c=_address(c),
            h=_address(out),
            y=_address(y[now]) if w_hr is None else 0,
            gates=0 if gates is None else _address(gates[now]),
            cells=0 if cells is None else _address(cells[now]),
        )
        if w_hr is not None:
            torch.mm(out, w_hr.t(), out=h[:n])
            y[now].copy_(h[:n])
    assert c_n is not None
    c_n.copy_(c)


def _packed(tensors: Sequence[Any]) -> list[Any]:
    """Return tensors whose memory is their numbers, one after the other."""
    return [None if t is None else t.resolve_neg().contiguous() for t in tensors]


def _checked(
    layer: tuple[int, Sequence[int]], inputs: list[Any], tensors: list[Any]
) -> tuple[list[Any], list[Any]]:
    """Return what a backward pass gets, contiguous: inputs; gradients, y and what was kept.

    Hooks of saved tensors give back what they like. Raises RuntimeError where the kernels would
    read out of bounds.
    """
    x, h0, c0, *weights = inputs
    if not (
        _tensors.layer_fits(x, h0, c0, weights, *layer)
        and _tensors.backward_fits(x, weights, *layer, tensors)
    ):
        got = [t if t is None else (tuple(t.shape), t.dtype, t.device) for t in inputs + tensors]
        raise RuntimeError(
            "expected x, h0, c0, the weights, gradients, y and what was kept in the backward pass "
            f"as they were in the forward one, got {got}"
        )

    return _packed(inputs), _packed(tensors)


def _without_autocast(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Return a function whose products do not follow the autocast of its caller."""

    @wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        with torch._C._DisableAutocast():
            return function(*args, **kwargs)

    return run


@_without_autocast
def run_backward(
    layer: tuple[int, Sequence[int]],
    inputs: Sequence[Any],
    y: Tensor,
    kept: _torch.Kept,
    grads: _torch.Grads,
    needed: Sequence[bool],
) -> _torch.Grads:
    """Run one layer backward: arguments and results of `_torch.run_backward`."""
    directions, batch_sizes = layer
    others: list[Any] = [*map(_torch.gradient, grads), y, *(k for k in kept if k is not None)]
    (x, h0, c0, *weights), others = _checked(layer, list(inputs), others)
    grad_y, grad_h, grad_c, y, gates, cells, raw = (*others, None)[:7]
    rows = _Rows(x, batch_sizes)
    parts = _split(weights, directions)
    H, P = parts[0][1].shape[0] // 4, parts[0][1].shape[1]
    dz = x.new_empty(directions, rows.total, 4 * H)
    dh0 = x.new_empty(directions, rows.N, P)
    dc0 = x.new_empty(directions, rows.N, H)
    projects = parts[0][3] is not None
    dh = x.new_empty(directions, rows.total, P) if projects else None  # dL/dh of every row
    math, plan = _plan(x, rows.N, H, P, directions, True)
    if plan.path == "steps":
        for d, (_, w_hh, _, w_hr) in enumerate(parts):
            own = (k[d].reshape(rows.total, -1) for k in (gates, cells))
            state = (None if s is None else s[d] for s in (c0, grad_h, grad_c))
            own_y = None if grad_y is None else grad_y.view(rows.total, -1)[:, d * P : (d + 1) * P]
            outputs = dz[d], dh0[d], dc0[d], None if dh is None else dh[d]
            _run_steps(rows, math, H, (*own, w_hh, w_hr, own_y, *state), outputs, True, d)
    else:
        named = {"gates": gates, "cells": cells, "c0": c0, "dz": dz, "dh0": dh0, "dc0": dc0}
        named |= {"grad_y": grad_y, "grad_h": grad_h, "grad_c": grad_c}
        _launch(x, rows, plan, math, True, [part[1] for part in parts], named)

    needs_x, needs_h0, needs_c0, *needs_weights = needed
    flat, flat_y = x.reshape(rows.total, -1), y.view(rows.total, -1)
    dx = None
    if needs_x:
        dx = torch.mm(dz[0], parts[0][0])
        if directions == 2:
            dx.addmm_(dz[1], parts[1][0])
        dx = dx.view(x.shape)
    per = len(weights) // directions
    dweights: list[Tensor | None] = []
    for d in range(directions):
        need_ih, need_hh, *need_rest = needs_weights[d * per : (d + 1) * per]
        dz_t = dz[d].t()
        dweights.append(torch.mm(dz_t, flat) if need_ih else None)
        own_y = flat_y[:, d * P : (d + 1) * P]
        own_h0 = None if h0 is None else h0[d]
        dw_hh = rows.recurrent_gradient(dz[d], own_y, own_h0, d == 1) if need_hh else None
        dweights.append(dw_hh)
        if len(need_rest) >= 2:
            # Both at once: a kernel less for the host to queue.
            both = dz[d].expand(2, -1, -1).sum(1) if any(need_rest[:2]) else (None, None)
            dweights += [db if need else None for db, need in zip(both, need_rest, strict=False)]
        if projects:
            assert dh is not None
            own_raw = raw[d].reshape(rows.total, H)
            dweights.append(torch.mm(dh[d].t(), own_raw) if need_rest[-1] else None)
    return (dx, dh0 if needs_h0 else None, dc0 if needs_c0 else None, *dweights)


def _steps_backward(rows: _Rows, math: str, d: int, inputs: Tensors, outputs: Tensors) -> None:
    """Run one direction backward step by step."""
    gates, cells, w_hh, w_hr, grad_y, c0, grad_h, grad_c = inputs
    dz, dh, dc0, dh_of_rows = outputs
    assert gates is not None and cells is not None and w_hh is not None
    assert dz is not None and dh is not None and dc0 is not None
    H = w_hh.shape[0] // 4
    dh.zero_() if grad_h is None else dh.copy_(grad_h)
    dc = torch.zeros(rows.N, H, dtype=_sum_dtype(dz.dtype), device=dz.device)
    if grad_c is not None:
        dc.copy_(grad_c)
    device, stream = _where(dz)
    for t in reversed(_order(rows, d)):
        lo, hi = rows.first[t], rows.first[t + 1]
        n = hi - lo
        now = slice(lo, hi)
        to_cell, grad = dh[:n], None if grad_y is None else grad_y[now]
        if w_hr is not None:
            assert dh_of_rows is not None
            total = dh_of_rows[now]
            total.copy_(dh[:n]) if grad is None else torch.add(dh[:n], grad, out=total)
            to_cell, grad = total @ w_hr, None
        before = t + 1 if d else t - 1
        inside = 0 <= before < rows.T
        _cuda.step(
            math,
            True,
            device,
            stream,
            n=n,
            H=H,
            before=min(n, rows.sizes[before]) if inside else 0,
            y_stride=0 if grad is None else grad.stride(0),
            c=_address(dc),
            gates=_address(gates[now]),
            cells=_address(cells[now]),
            cells_before=_address(cells[rows.first[before] :]) if inside else 0,
            c0=_address(c0),
            dh=_address(to_cell),
            grad_y=_address(grad),
            dz=_address(dz[now]),
        )
        torch.mm(dz[now], w_hh, out=dh[:n])
    dc0.copy_(dc)


def served(rnn: Any, input: Any, hx: Any, weights: list[Any]) -> tuple[Any, Any, list[Any]] | None:
    """Return x, hx and the weights as the kernels take them, or None for torch's own path.

    None also where anything is wrong with the call: torch's own path raises.
    """
    ragged = isinstance(input, PackedSequence)
    x: Any = input.data if ragged else input
    if not ENABLED or not isinstance(x, Tensor) or not x.is_cuda:
        return None
    states = list(hx) if isinstance(hx, (tuple, list)) else []
    tensors = [x, *states, *weights]
    if any(type(t) not in (Tensor, Parameter) or t.layout != torch.strided for t in tensors):
        return None
    dtype, found = x.dtype, {t.dtype for t in tensors}
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        if not found <= {torch.float32, *_tensors.HALF}:
            return None
    elif len(found) > 1:
        return None
    x, *tensors = (t.to(dtype) for t in tensors)
    tensors = _packed(tensors)
    hx, weights = hx if hx is None else tensors[: len(states)], tensors[len(states) :]
    if not _right_shapes(rnn, x, hx, weights, input.batch_sizes if ragged else None):
        return None
    return (x, hx, weights) if capable(x) else None


def capable(x: Tensor) -> bool:
    """Return whether there are kernels for the device of x."""
    return properties(_index(x)).major >= 8


def _right_shapes(
    rnn: Any, x: Tensor, hx: Any, weights: list[Any], batch_sizes: Tensor | None
) -> bool:
    N = None if batch_sizes is None else int(batch_sizes[0])
    layout = (rnn.num_layers, 2 if rnn.bidirectional else 1, rnn.batch_first, 3, N)
    sizes = (rnn.input_size, rnn.hidden_size, rnn.proj_size, *layout)
    return 0 not in x.shape and _tensors.fits(x, hx, weights, *sizes)


def explain(lstm: Any, input: Any, hx: Any, device: Any) -> str:
    """See :func:`fastlstm.nn.explain`."""
    if not isinstance(lstm, torch.nn.LSTM):
        raise TypeError(f"lstm: expected a torch.nn.LSTM, got {type(lstm).__name__}")
    ragged = isinstance(input, PackedSequence)
    x: Any = input.data if ragged else input
    if not isinstance(x, Tensor):
        raise TypeError(f"input: expected a Tensor or PackedSequence, got {type(input).__name__}")
    if x.dim() not in (2, 3) or 0 in x.shape:
        raise ValueError(f"input: expected 2 or 3 dimensions, none empty, got {tuple(x.shape)}")
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else x.dtype
    if dtype not in _MATH:
        raise TypeError(f"input: expected a dtype of {[str(d) for d in _MATH]}, got {dtype}")
    if device is not None:
        try:
            device = Device(*device)
        except TypeError:
            raise TypeError(f"device: expected {Device._fields}, got {device!r}") from None
    elif not ENABLED:
        built = importlib.util.find_spec("fastlstm._cuda") is not None
        off = f"the kernels are off; {_SWITCH}=1 in the environment switches them on"
        return f"torch.nn.LSTM's own path on CUDA: {off if built else _NO_CUDA_PART}"
    elif not x.is_cuda:
        raise ValueError(f"input: expected a tensor on CUDA, or a device to ask of, got {x.device}")
    else:
        weights = [getattr(lstm, name) for name in lstm._flat_weights_names]
        if served(lstm, input, hx, weights) is None:
            return (
                "torch.nn.LSTM's own path: the kernels take strided tensors of one dtype "
                "(bfloat16, float16, float32, float64) on one device that they were compiled for, "
                "of compute capability 8.0 or more, in the shapes of torch.nn.LSTM"
            )
        device = properties(_index(x))
    if ragged:
        N = int(input.batch_sizes[0])
    else:
        N = x.shape[0 if lstm.batch_first else 1] if x.dim() == 3 else 1
    math, H, P = math_of(dtype), lstm.hidden_size, lstm.proj_size or lstm.hidden_size
    directions = 2 if lstm.bidirectional else 1
    return "\n".join(
        f"{'backward' if backward else 'forward'}, {math}: "
        + _cuda_plan.plan(N, H, directions, math, backward, device, P).reason
        for backward in (False, True)
    )
