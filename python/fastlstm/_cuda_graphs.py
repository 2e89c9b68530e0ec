"""Work that is queued again and again, as CUDA graphs: one launch in the place of hundreds."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]
Work = Callable[[Tensors, Tensors], None]  # writes its outputs from its inputs, and may change both


class Recording(Protocol):
    """Work that was recorded."""

    def replay(self) -> None:
        """Queue it on the current stream."""

    def busy(self) -> bool:
        """Return whether the device may not have finished what was queued."""


class Graph:
    """What `run` queues, as a CUDA graph; `run` has run before, so that nothing is set up in it.

    While it is recorded, other threads cannot draw random numbers on the device: torch raises.
    """

    def __init__(self, device: torch.device, run: Callable[[], None]) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream(device)
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(current)
        # Not torch.cuda.graph, which waits for the device. cuBLAS takes a workspace for each stream
        # and keeps it: the graph has one of its own, and nobody else has that.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.stream(aside):
                self._graph.capture_begin(capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    self._graph.capture_end()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        current.wait_stream(aside)

    def replay(self) -> None:
        self._graph.replay()
        self._done.record(torch.cuda.current_stream(self._device))

    def busy(self) -> bool:
        return not self._done.query()  # type: ignore[no-untyped-call]


class _WithoutReplays(threading.local):
    """A context in which a thread records and replays nothing: for operators of torch.

    Under `torch.compile(mode="reduce-overhead")` the memory that one takes belongs to graphs of
    torch, which record it as they do all others, and is not a recording's to keep.
    """

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1


without_replays = _WithoutReplays()


class _Known(NamedTuple):
    inputs: Tensors
    outputs: Tensors
    recording: Recording


class Replays:
    """Runs work; from the second call with the same key on, by replaying a recording of it.

    A recording has memory of its own, so no address of the caller's is in it: inputs are copied in,
    and outputs out. Those with the same key must be alike, on one stream, and of one kind of work.
    """

    def __init__(self, most: int, record: Callable[..., Recording] = Graph) -> None:
        self._most = most
        self._record = record
        self._known: OrderedDict[Hashable, _Known | None] = OrderedDict()
        self._failed: set[Hashable] = set()  # of those known
        self._lock = threading.Lock()

    def __call__(self, key: Hashable, inputs: Tensors, outputs: Tensors, work: Work) -> None:
        if without_replays.depth:
            return work(inputs, outputs)
        with self._lock:
            known = self._find(key, inputs, outputs, work)
            if known is not None:
                _copy(inputs, known.inputs)
                known.recording.replay()
                _copy(known.outputs, outputs)
                return
        work(inputs, outputs)

    def _find(self, key: Hashable, inputs: Tensors, outputs: Tensors, work: Work) -> _Known | None:
        if key in self._known:
            self._known.move_to_end(key)
            known = self._known[key]
            if known is None and key not in self._failed:
                try:
                    known = self._known[key] = self._recorded(inputs, outputs, work)
                except RuntimeError as error:  # also where memory is short
                    self._failed.add(key)
                    warnings.warn(f"fastlstm: no CUDA graph of a loop: {error}", stacklevel=2)
            return known
        if len(self._known) == self._most:
            oldest = next(iter(self._known.values()))
            if oldest is not None and oldest.recording.busy():
                return None
            self._failed.discard(self._known.popitem(last=False)[0])
        self._known[key] = None
        return None

    def _recorded(self, inputs: Tensors, outputs: Tensors, work: Work) -> _Known:
        device = next(tensor.device for tensor in outputs if tensor is not None)
        with torch.inference_mode(False), torch.no_grad():  # memory for calls in any mode
            own_inputs, own_outputs = (
                [None if t is None else torch.empty_like(t) for t in tensors]
                for tensors in (inputs, outputs)
            )
            recording = self._record(device, lambda: work(own_inputs, own_outputs))
        return _Known(own_inputs, own_outputs, recording)


def _copy(from_: Tensors, to: Tensors) -> None:
    for source, target in zip(from_, to, strict=True):
        if source is not None and target is not None:
            target.copy_(source)
