"""The cases, and the numbers each of them is run on.

T is the length of the sequence, N the batch, D the input size, H the hidden size, P the size of a
projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    group: str
    T: int
    N: int
    D: int
    H: int
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0  # none
    shortest: int = 0  # of a ragged batch; 0: every sequence has length T

    @property
    def name(self) -> str:
        return f"{self.T}×{self.N}×{self.D}×{self.H}"

    @property
    def label(self) -> str:
        """The name, and what else the case is."""
        words = [self.name]
        if self.num_layers > 1:
            words.append(f"{self.num_layers} layers")
        if self.bidirectional:
            words.append("bidirectional")
        if self.proj_size:
            words.append(f"P={self.proj_size}")
        if self.shortest:
            words.append(f"ragged from {self.shortest}")
        return " ".join(words)

    @property
    def plain(self) -> bool:
        """Whether it is one layer in one direction, without projection, of a dense batch."""
        return not (self.num_layers > 1 or self.bidirectional or self.proj_size or self.shortest)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def P(self) -> int:
        """Columns of h."""
        return self.proj_size or self.H

    @property
    def lengths(self) -> list[int]:
        """The length of each sequence, the longest first, spread evenly where they differ."""
        last = self.shortest or self.T
        return [int(n) for n in np.linspace(self.T, last, self.N).round()]

    def layers(self) -> Iterator[tuple[str, int]]:
        """The suffix of the parameter names and the input size, layer by layer and direction."""
        for layer in range(self.num_layers):
            input_size = self.D if layer == 0 else self.directions * self.P
            yield f"_l{layer}", input_size
            if self.bidirectional:
                yield f"_l{layer}_reverse", input_size

    def suffixes(self, layer: int) -> list[str]:
        """The suffixes of one layer, direction by direction."""
        own = slice(layer * self.directions, (layer + 1) * self.directions)
        return [suffix for suffix, _ in self.layers()][own]

    def flops(self, training: bool) -> int:
        """Operations of the matrix products; the backward pass has two for each of the forward."""
        forward = sum(self.lengths) * sum(
            2 * 4 * self.H * (input_size + self.P) + 2 * self.H * self.proj_size
            for _, input_size in self.layers()
        )
        return 3 * forward if training else forward


CASES = [
    Case("step", 1, 1, 64, 64),
    Case("step", 1, 1, 128, 128),
    Case("step", 1, 1, 512, 512),
    Case("streaming", 100, 1, 64, 64),
    Case("streaming", 100, 1, 256, 256),
    Case("streaming", 100, 1, 512, 512),
    Case("small", 10, 32, 1, 50),
    Case("small", 28, 16, 28, 64),
    Case("small", 100, 32, 64, 64),
    Case("small", 20, 256, 32, 64),
    Case("small", 1000, 16, 64, 128),
    Case("medium", 100, 8, 128, 128),
    Case("medium", 100, 32, 128, 128),
    Case("medium", 50, 64, 256, 256),
    Case("medium", 300, 20, 161, 800),
    Case("large", 100, 64, 512, 512),
    Case("large", 25, 128, 1024, 1024),
    Case("bidirectional", 200, 16, 40, 256, num_layers=2, bidirectional=True),
    Case("odd", 35, 20, 650, 650),
    Case("odd", 33, 7, 13, 37),
]

# What a group is called in a table or a picture; "own" has no cases but those asked for.
GROUPS = {
    "step": "step latency (T=1, N=1)",
    "streaming": "streaming (N=1)",
    "small": "small",
    "medium": "medium",
    "large": "large",
    "bidirectional": "two layers, bidirectional",
    "odd": "odd sizes",
    "own": "sizes asked for",
}


@dataclass(frozen=True)
class Problem:
    """One case with its weights (named as in torch.nn.LSTM), its input and a gradient of y."""

    case: Case
    weights: Arrays
    x: np.ndarray
    grad_y: np.ndarray

    @classmethod
    def random(cls, case: Case, dtype: str) -> Problem:
        rng = np.random.default_rng(0)
        bound = case.H**-0.5

        def uniform(*shape: int) -> np.ndarray:
            return rng.uniform(-bound, bound, shape).astype(dtype)

        weights = {}
        for suffix, input_size in case.layers():
            weights[f"weight_ih{suffix}"] = uniform(4 * case.H, input_size)
            weights[f"weight_hh{suffix}"] = uniform(4 * case.H, case.P)
            weights[f"bias_ih{suffix}"] = uniform(4 * case.H)
            weights[f"bias_hh{suffix}"] = uniform(4 * case.H)
            if case.proj_size:
                weights[f"weight_hr{suffix}"] = uniform(case.P, case.H)
        return cls(
            case,
            weights,
            x=rng.standard_normal((case.T, case.N, case.D)).astype(dtype),
            grad_y=rng.standard_normal((case.T, case.N, case.directions * case.P)).astype(dtype),
        )

    def map(self, function: Callable[[Any], Any]) -> Problem:
        """The same with every array changed, to another dtype or to a torch tensor."""
        return replace(
            self,
            weights={name: function(array) for name, array in self.weights.items()},
            x=function(self.x),
            grad_y=function(self.grad_y),
        )


# On a GPU (gpu.py), each with the precisions it is measured in. Float32 tensors come as "tf32",
# where torch may round the operands of products to TF32, and as "float32", where it may not.
GPU_CASES: list[tuple[Case, tuple[str, ...]]] = [
    (Case("gpu", 1024, 16, 768, 768), ("float16", "bfloat16", "tf32", "float32")),
    (Case("gpu", 1024, 1, 512, 512), ("bfloat16", "tf32")),
    (Case("gpu", 512, 64, 512, 512), ("float16", "bfloat16", "tf32")),
    (Case("gpu", 100, 32, 128, 128), ("bfloat16", "tf32")),
    (Case("gpu", 100, 256, 1024, 1024), ("bfloat16", "tf32")),
    (Case("gpu", 256, 8, 2048, 2048), ("bfloat16",)),
    (Case("gpu", 50, 64, 256, 256, num_layers=2, bidirectional=True), ("bfloat16", "tf32")),
    (Case("gpu", 200, 64, 512, 512, shortest=20), ("bfloat16", "tf32")),
    (Case("gpu", 1, 1, 256, 256), ("bfloat16", "tf32")),
    (Case("gpu", 128, 2048, 64, 128), ("bfloat16", "tf32")),  # as in reinforcement learning
]

# The same kinds in sizes for a dry run of gpu.py on the CPU.
DRY_CASES: list[tuple[Case, tuple[str, ...]]] = [
    (Case("gpu", 5, 3, 8, 16), ("bfloat16", "tf32", "float32")),
    (Case("gpu", 4, 3, 8, 8, num_layers=2, bidirectional=True), ("tf32",)),
    (Case("gpu", 6, 4, 8, 8, shortest=2), ("tf32",)),
    (Case("gpu", 1, 1, 8, 8), ("float16",)),
]


def cudnn_persistent(case: Case, precision: str, mode: str) -> bool:
    """Whether PyTorch has cuDNN run its persistent kernels: what is fast there already.

    The rule of aten/src/ATen/native/cudnn/RNN.cpp (get_algo) for large GPUs from capability 8 on.
    Of a training step the backward decides, whose rule is the narrower one.
    """
    if case.proj_size or case.shortest or precision == "float64":
        return False
    static = (
        precision == "float16"
        and case.num_layers == case.directions == 1
        and case.H <= 1024
        and case.H % 128 == case.D % 128 == 0
        and case.N % 8 == 0
        and case.N <= 128
    )
    return static or case.H <= (128 if mode == "training" else 192)
