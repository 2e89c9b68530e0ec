"""Loops over single steps: the gradients of the weights for many steps at once.

Step by step, a backward pass would write gradients as large as the weights for each step, and torch
would add them up: for few rows most of its time. So after some steps of a graph the others share a
node that gives the weights their gradients, :class:`Weights`. Each leaves it the factors of its
own; torch runs that node after them, and it multiplies those of many steps at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from . import _core

_ROWS = 1024  # so many are multiplied at once, and no more factors kept
# Gradients of fewer bytes are as fast step by step, and so are those of steps that wrote fewer.
_LEAST = 1 << 18
_WORTH = 3 << 20


class Node(_SingleLevelFunction):
    """torch.autograd.Function but for its `apply`, which first looks for transforms of torch.func.

    Those never come here.
    """

    apply: ClassVar[Callable[..., Any]]  # of the C++ class below
    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


class _Left:
    """What steps have left to one backward pass: factors, and the sum of those multiplied."""

    def __init__(self) -> None:
        self.factors: list[tuple[Tensor, Tensor, Tensor]] = []
        self.rows = 0
        self.total: list[Any] | None = None


class Steps:
    """What steps with these weights, of which `needed` need gradients, have left to their node."""

    def __init__(self, weights: Sequence[Tensor], needed: Sequence[bool]) -> None:
        self.weights = weights
        self.needed = needed
        self._left: dict[int, _Left] = {}  # for each backward pass that runs

    def leave(self, x: Tensor, h: Tensor | None, dz: Tensor) -> None:
        """Leave the factors of one step: x (N, D), h before it (N, H) or None, dz (N, 4H)."""
        # Copies: whoever unpacked x and h may use their memory again once the step's node has run.
        x = x.clone()
        h = x.new_zeros(x.shape[0], self.weights[1].shape[1]) if h is None else h.clone()
        task = torch._C._current_graph_task_id()
        left = self._left.get(task)
        if left is None:
            left = self._left[task] = _Left()
        left.factors.append((x, h, dz))
        left.rows += x.shape[0]
        if left.rows >= _ROWS:
            self._multiply(left)

    def take(self) -> Sequence[Any]:
        """Return the sum of what this backward pass was left, None for each where nothing was."""
        left = self._left.pop(torch._C._current_graph_task_id(), None)
        if left is None:
            return [None] * len(self.weights)
        if left.factors:
            self._multiply(left)
        assert left.total is not None
        return left.total

    def _multiply(self, left: _Left) -> None:
        x, h, dz = map(torch.cat, zip(*left.factors, strict=True))
        threads = torch.get_num_threads()
        found = _core.weight_gradients(x, h, dz, self.needed, threads)
        left.factors, left.rows = [], 0
        if left.total is not None:
            pairs = zip(left.total, found, strict=True)
            found = [None if part is None else total + part for total, part in pairs]
        left.total = found


def _compiled() -> bool:
    """Return whether it is not torch's own engine that runs a backward pass, but a compiled one."""
    if torch.compiler.is_compiling():
        return True
    dynamo = sys.modules.get("torch._dynamo.compiled_autograd")
    return getattr(dynamo, "in_compiled_autograd_region", False)


class Weights(Node):
    """The gradients of the weights of steps as a node of their graph, linked by an empty tensor."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, *weights: Tensor) -> Tensor:
        graph.node = ctx
        ctx.steps = Steps(weights, ctx.needs_input_grad[1:])
        ctx.set_materialize_grads(False)
        return weights[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if _compiled():  # no step has left anything, and no gradient may be None
            return None, *(torch.zeros_like(weight) for weight in ctx.steps.weights)
        return None, *ctx.steps.take()


class Graph:
    """What steps share that leave the gradients of their weights to one node."""

    node: Any  # Weights; it does not keep this object in turn

    def __init__(self, step: Any, weights: Sequence[Tensor]) -> None:
        self.step, self.weights = step, tuple(weights)
        self.sources = [weight.grad_fn for weight in weights]
        self.link: Tensor = Weights.apply(self, *weights)

    def serves(self, step: Any, weights: Sequence[Tensor]) -> bool:
        """Return whether these are the weights of such a step here."""
        if self.step is not step or len(self.weights) != len(weights):
            return False
        same = zip(self.weights, self.sources, self.node.steps.needed, weights, strict=True)
        return all(
            weight is own and weight.grad_fn is source and weight.requires_grad is need
            for own, source, need, weight in same
        )


class Shared(Node):
    """A step of a Graph, applied to that, its link and what the node of its own is applied to."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, link: Tensor, *args: Any) -> Any:
        ctx.graph = graph
        return graph.step.forward(ctx, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        graph, needed = ctx.graph, ctx.needs_input_grad[2:]
        if _compiled() or not torch._C._will_engine_execute_node(graph.node):
            link = graph.link.new_zeros(0)
            return None, link, *graph.step.gradients(ctx, needed, grads)
        return None, None, *graph.step.gradients(ctx, needed, grads, graph.node.steps)


class _Place(NamedTuple):
    """What the node of a step has as `_fastlstm_place`."""

    weight: Tensor  # W_hh
    steps: int  # up to this one
    graph: Graph | None


_FAR = 4  # a state that is masked, joined and cut is so many nodes away from its step
_MOST = 32  # nodes of a wide graph that are looked at


def _before(state: Tensor | None, weight: Tensor) -> _Place | None:
    """Return the place of the step with this W_hh that a state comes from."""
    nodes = [] if state is None else [state.grad_fn]
    for _ in range(_FAR):
        for node in nodes:
            place: _Place | None = getattr(node, "_fastlstm_place", None)
            if place and place.weight is weight:
                return place
        found = (after for node in nodes if node is not None for after, _ in node.next_functions)
        nodes = list(islice(found, _MOST))
    return None


def apply(step: Any, args: tuple[Any, ...], weights: Sequence[Tensor]) -> Any:
    """Apply `step`, the node Layer or Step of _torch.py, or Shared in its place.

    `args` end with x, h0 and c0. That h0 comes from a step before is what makes a loop: of steps in
    other graphs, the node of the weights would be an older one, which torch runs too late for those
    who wait for the gradients of a module, like FSDP.
    """
    w_ih, w_hh, *_ = weights
    size = w_ih.nbytes + w_hh.nbytes
    if size < _LEAST or w_hh.itemsize < 4:
        return step.apply(*args, *weights)
    before = _before(args[-2], w_hh)
    steps, graph = (before.steps, before.graph) if before else (0, None)
    if steps * size < _WORTH or not any(weight.requires_grad for weight in weights):
        graph = None
        result = step.apply(*args, *weights)
    else:
        if not (graph and graph.serves(step, weights)):
            graph = Graph(step, weights)
        result = Shared.apply(graph, graph.link, *args, *weights)
    result[0].grad_fn._fastlstm_place = _Place(w_hh, steps + 1, graph)
    return result
