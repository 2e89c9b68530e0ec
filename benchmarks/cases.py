"""The cases, and the numbers each of them is run on.

T is the length of the sequence, N the batch, D the input size, H the hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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

    @property
    def name(self) -> str:
        return f"{self.T}×{self.N}×{self.D}×{self.H}"

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def layers(self) -> Iterator[tuple[str, int]]:
        """The suffix of the parameter names and the input size, layer by layer and direction."""
        for layer in range(self.num_layers):
            input_size = self.D if layer == 0 else self.directions * self.H
            yield f"_l{layer}", input_size
            if self.bidirectional:
                yield f"_l{layer}_reverse", input_size

    def flops(self, training: bool) -> int:
        """Operations of the matrix products; the backward pass has two for each of the forward."""
        forward = sum(
            2 * 4 * self.H * (input_size + self.H) * self.T * self.N
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

# What a group is called in a table or a picture.
GROUPS = {
    "step": "step latency (T=1, N=1)",
    "streaming": "streaming (N=1)",
    "small": "small",
    "medium": "medium",
    "large": "large",
    "bidirectional": "two layers, bidirectional",
    "odd": "odd sizes",
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
            weights[f"weight_hh{suffix}"] = uniform(4 * case.H, case.H)
            weights[f"bias_ih{suffix}"] = uniform(4 * case.H)
            weights[f"bias_hh{suffix}"] = uniform(4 * case.H)
        return cls(
            case,
            weights,
            x=rng.standard_normal((case.T, case.N, case.D)).astype(dtype),
            grad_y=rng.standard_normal((case.T, case.N, case.directions * case.H)).astype(dtype),
        )

    def astype(self, dtype: str) -> Problem:
        return replace(
            self,
            weights={name: array.astype(dtype) for name, array in self.weights.items()},
            x=self.x.astype(dtype),
            grad_y=self.grad_y.astype(dtype),
        )
