"""One LSTM layer, and its gradients, in ordinary operators of torch.

Slower than the kernels, and differentiable any number of times and in every way torch knows:
nothing is written in place, and no value decides what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._tensors import HALF, layer_in_float32, narrowed, widened

Rows = Sequence[Tensor]  # a tensor for h and one for c, with the same number of rows


class _Step(NamedTuple):
    """What a step computed, and the state that it began with; a row for each sequence in it."""

    i: Tensor
    f: Tensor
    g: Tensor
    o: Tensor
    c: Tensor
    c_before: Tensor
    h_before: Tensor
    raw: Tensor  # h before the projection
    h: Tensor


def _resized(state: Rows, n: int, others: Rows, done: list[Rows]) -> Rows:
    """Return n rows: those too many are put before `done`, those missing are of `others`."""
    have = state[0].shape[0]
    if n < have:
        done.insert(0, [rows[n:] for rows in state])
        return [rows[:n] for rows in state]
    if n > have:
        return [torch.cat((a, b[have:n])) for a, b in zip(state, others, strict=True)]
    return state


def _joined(state: Rows, done: list[Rows]) -> Rows:
    return [torch.cat(parts) for parts in zip(state, *done, strict=True)] if done else state


class _Direction:
    """One direction of a layer over x (rows, D), which `sizes` cuts into steps.

    `state` is h0 (N, P) and c0 (N, H), `last` is h_n and c_n.
    """

    def __init__(
        self, x: Tensor, state: Rows, weights: Rows, sizes: list[int], reverse: bool
    ) -> None:
        self.x, self.sizes = x, sizes
        self.w_ih, self.w_hh, *rest = weights
        bias = rest[0] + rest[1] if len(weights) >= 4 else None
        self.w_hr = rest[-1] if len(weights) % 2 else None
        self.order = range(len(sizes))[:: -1 if reverse else 1]

        inputs = torch.split(linear(x, self.w_ih, bias), sizes)
        steps: dict[int, _Step] = {}
        done: list[Rows] = []
        now = [rows[: sizes[self.order[0]]] for rows in state]
        for t in self.order:
            h_before, c_before = _resized(now, sizes[t], state, done)
            i, f, g, o = (inputs[t] + linear(h_before, self.w_hh)).chunk(4, -1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c_before + i * g
            raw = o * c.tanh()
            h = raw if self.w_hr is None else linear(raw, self.w_hr)
            steps[t] = _Step(i, f, g, o, c, c_before, h_before, raw, h)
            now = [h, c]
        self.steps = [steps[t] for t in range(len(sizes))]
        self.last = _joined(now, done)

    def rows_of(self, name: str) -> Tensor:
        """Return what all steps have under a name, as rows in the order of x."""
        return torch.cat([getattr(step, name) for step in self.steps])

    def gradients(
        self, grad_y: Tensor | None, grad_last: Rows, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradients of x, h0, c0 and the weights, None for those not needed."""
        grads = None if grad_y is None else torch.split(grad_y, self.sizes)
        dz, dh = {}, {}
        done: list[Rows] = []
        now = [rows[: self.sizes[self.order[-1]]] for rows in grad_last]
        for t in self.order[::-1]:
            s = self.steps[t]
            dh[t], dc = _resized(now, self.sizes[t], grad_last, done)
            if grads is not None:
                dh[t] = dh[t] + grads[t]
            draw = dh[t] if self.w_hr is None else dh[t].mm(self.w_hr)
            tanh_c = s.c.tanh()
            dc = dc + draw * s.o * (1 - tanh_c * tanh_c)
            di, df, dg = dc * s.g, dc * s.c_before, dc * s.i
            do = draw * tanh_c
            dz[t] = torch.cat(
                (
                    di * s.i * (1 - s.i),
                    df * s.f * (1 - s.f),
                    dg * (1 - s.g * s.g),
                    do * s.o * (1 - s.o),
                ),
                -1,
            )
            now = [dz[t].mm(self.w_hh), dc * s.f]
        dh0, dc0 = _joined(now, done)
        times = range(len(self.sizes))
        dzs = torch.cat([dz[t] for t in times])
        needs_x, needs_h0, needs_c0, needs_ih, needs_hh, *needs_rest = needed
        found = [
            dzs.mm(self.w_ih) if needs_x else None,
            dh0 if needs_h0 else None,
            dc0 if needs_c0 else None,
            dzs.t().mm(self.x) if needs_ih else None,
            dzs.t().mm(self.rows_of("h_before")) if needs_hh else None,
        ]
        if len(needs_rest) >= 2:
            found += [dzs.sum(0) if need else None for need in needs_rest[:2]]
        if self.w_hr is not None:
            dhs = torch.cat([dh[t] for t in times])
            found.append(dhs.t().mm(self.rows_of("raw")) if needs_rest[-1] else None)
        return found


def _rows(tensor: Tensor) -> Tensor:
    """Return a (T, N, columns) tensor as rows; that of a ragged batch has rows already."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _run(
    directions: int,
    batch_sizes: Sequence[int],
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
) -> list[_Direction]:
    sizes = list(batch_sizes) or [x.shape[1]] * x.shape[0]
    count = len(weights) // directions
    H, P = weights[0].shape[0] // 4, weights[1].shape[1]
    found = []
    for d in range(directions):
        state = [
            x.new_zeros(max(sizes), columns) if start is None else start[d]
            for start, columns in ((h0, P), (c0, H))
        ]
        own = weights[d * count : (d + 1) * count]
        found.append(_Direction(_rows(x), state, own, sizes, reverse=d == 1))
    return found


def forward(
    directions: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, h_n and c_n of a layer; arguments and shapes are those of `_torch.run_forward`."""
    if x.dtype in HALF:
        return layer_in_float32(forward, directions, x, h0, c0, weights, batch_sizes)
    with torch.autocast("cpu", enabled=False):
        found = _run(directions, batch_sizes, x, h0, c0, weights)
        y = torch.cat([one.rows_of("h") for one in found], -1)
        h_n, c_n = (torch.stack(parts) for parts in zip(*(one.last for one in found), strict=True))
        return y.reshape(*x.shape[:-1], y.shape[-1]), h_n, c_n


def backward(
    layer: tuple[int, Sequence[int]],
    inputs: Sequence[Any],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, h0, c0 and the weights, None for those not needed.

    `layer` are its directions and batch sizes, `inputs` those tensors, `grads` the gradients of y,
    h_n and c_n; None is zeros. The gates are computed anew from the inputs, so that these gradients
    have all of their own derivatives.
    """
    directions, batch_sizes = layer
    x, h0, c0, *weights = inputs
    if x.dtype in HALF:
        return narrowed(x.dtype, *backward(layer, widened(*inputs), widened(*grads), needed))
    grad_y, *grad_last = grads
    with torch.autocast("cpu", enabled=False):
        parts = []
        for d, one in enumerate(_run(directions, batch_sizes, x, h0, c0, weights)):
            count = len(weights) // directions
            parts.append(
                one.gradients(
                    None if grad_y is None else _rows(grad_y.chunk(directions, -1)[d]),
                    [
                        torch.zeros_like(rows) if grad is None else grad[d]
                        for rows, grad in zip(one.last, grad_last, strict=True)
                    ],
                    [*needed[:3], *needed[3 + d * count : 3 + (d + 1) * count]],
                )
            )
        dx, dh0, dc0, *_ = (
            None if part[0] is None else torch.stack(part)
            for part in zip(*(part[:3] for part in parts), strict=True)
        )
        return (
            None if dx is None else dx.sum(0).reshape(x.shape),
            dh0,
            dc0,
            *(grad for part in parts for grad in part[3:]),
        )


def step_backward(
    inputs: Sequence[Any], grads: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the same for one step of a cell: x (N, D), states and their gradients (N, H)."""
    x, h0, c0, grad_h, grad_c = (
        None if tensor is None else tensor.unsqueeze(0) for tensor in (*inputs[:3], *grads)
    )
    found = backward((1, ()), [x, h0, c0, *inputs[3:]], [None, grad_h, grad_c], needed)
    return (*(None if grad is None else grad.squeeze(0) for grad in found[:3]), *found[3:])
