"""The implementations that are compared on a GPU, in the form of peers.py.

They get problems of tensors that lie on the device. nn.LSTM and ours are called just as on the CPU;
the others are functions of the same weights. What each of them cannot do, its `refuses` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from cases import Arrays, Case, Problem
from peers import PEERS, Peer, Prepared, torch_call
from torch import Tensor
from torch.nn.functional import linear

PRECISIONS = {  # what the dtype column says: the dtype of the tensors, and the title
    "float16": (torch.float16, "float16"),
    "bfloat16": (torch.bfloat16, "bfloat16"),
    "tf32": (torch.float32, "float32, TF32"),
    "float32": (torch.float32, "float32"),
    "float64": (torch.float64, "float64"),
}


@dataclass(frozen=True)
class GpuPeer(Peer):
    dtypes: tuple[str, ...] = tuple(PRECISIONS)
    plain: bool = False  # nothing but one layer in one direction and a dense batch
    dense: bool = False  # no ragged batches and no projections
    longest: int | None = None  # more steps would take all the time

    def refuses(self, case: Case, precision: str) -> str:
        """Why this one is not measured, or an empty string."""
        if not self.installed():
            return "not installed"
        if precision not in self.dtypes:
            return f"has no {precision}"
        if self.plain and not case.plain:
            return "has one layer, one direction and dense batches only"
        if self.dense and (case.shortest or case.proj_size):
            return "has dense batches only, and no projections"
        if self.longest and case.T > self.longest:
            return f"left out where T > {self.longest}: a Python loop takes too long"
        return ""


def functional(
    forward: Callable[[dict[str, Tensor]], Tensor], problem: Problem, training: bool
) -> Prepared:
    """`forward` computes y from x and the weights."""
    leaves = {"x": problem.x, **problem.weights}
    if training:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
    run = partial(forward, leaves)
    return torch_call(run, lambda y: y, leaves, problem.grad_y, training)


def step(gates: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (gates + h @ weight_hh.T).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@cache
def compiled_step() -> Any:
    # One for all sizes; fullgraph makes an error of what would silently run uncompiled.
    torch._dynamo.config.cache_size_limit = 64
    return torch.compile(step, dynamic=True, fullgraph=True)


def scan(problem: Problem, training: bool, threads: int, step_of: Any = compiled_step) -> Prepared:
    """The input product, then a loop over time of a compiled step.

    A loop inside the compiled function would be unrolled, and torch's own scan operator does not
    compile (2.13: DataDependentOutputException).
    """
    case, run_step = problem.case, step_of()

    def direction(x: Tensor, weights: dict[str, Tensor], suffix: str) -> Tensor:
        bias = weights[f"bias_ih{suffix}"] + weights[f"bias_hh{suffix}"]
        steps = linear(x, weights[f"weight_ih{suffix}"], bias).unbind()
        backwards = suffix.endswith("reverse")
        h = c = x.new_zeros(case.N, case.H)
        outputs = []
        for gates in reversed(steps) if backwards else steps:
            h, c = run_step(gates, h, c, weights[f"weight_hh{suffix}"])
            outputs.append(h)
        return torch.stack(outputs[::-1] if backwards else outputs)

    def forward(leaves: dict[str, Tensor]) -> Tensor:
        y = leaves["x"]
        suffixes = [suffix for suffix, _ in case.layers()]
        for k in range(0, len(suffixes), case.directions):
            layer = suffixes[k : k + case.directions]
            y = torch.cat([direction(y, leaves, suffix) for suffix in layer], 2)
        return y

    return functional(forward, problem, training)


def flashrnn(
    problem: Problem, training: bool, threads: int, backend: str | None = None
) -> Prepared:
    """Its kernels hold the recurrence; the input product is torch's."""
    from flashrnn import FlashRNNConfig
    from flashrnn import flashrnn as recurrence

    case = problem.case
    dtype = {torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(problem.x.dtype, "float32")

    def with_backend(backend: str) -> Prepared:
        config = FlashRNNConfig(
            backend=backend,
            function="lstm",
            num_heads=1,
            head_dim=case.H,
            batch_size=case.N,
            dtype=dtype,
            input_shape="TBGHD",
            output_shape="STBHD",
        )

        def forward(leaves: dict[str, Tensor]) -> Tensor:
            gates = linear(leaves["x"], leaves["weight_ih_l0"]).view(case.T, case.N, 4, 1, case.H)
            weight_hh = leaves["weight_hh_l0"].view(4, 1, case.H, case.H)
            bias = (leaves["bias_ih_l0"] + leaves["bias_hh_l0"]).view(4, 1, case.H)
            states, _ = recurrence(gates, weight_hh, bias, config=config)
            return states[0].view(case.T, case.N, case.H)

        return functional(forward, problem, training)

    if backend is not None:
        return with_backend(backend)
    try:  # the fused kernels do not fit every H
        prepared = with_backend("cuda_fused")
        prepared.call()
        return prepared
    except Exception:
        return with_backend("cuda")


def haste(problem: Problem, training: bool, threads: int) -> Prepared:
    """A module with weights of its own: (in, 4H), gates in the order i g f o, one bias."""
    from haste_pytorch import LSTM

    case, x, weights = problem.case, problem.x, problem.weights
    module = LSTM(case.D, case.H)
    module.from_native_weights(*(weights[f"{kind}_l0"] for kind in NATIVE))
    module.to(x.device, x.dtype).train(training)
    if training:
        x = x.clone().requires_grad_()
    leaves = {"x": x, **(dict(module.named_parameters()) if training else {})}
    prepared = torch_call(lambda: module(x), lambda y: y[0], leaves, problem.grad_y, training)

    def results(result: Any) -> Arrays:
        found = prepared.results(result)
        i_f_g_o = [k * case.H + unit for k in (0, 2, 1, 3) for unit in range(case.H)]
        bias = found["grad bias"][i_f_g_o]
        return {
            "y": found["y"],
            "grad x": found["grad x"],
            "grad weight_ih_l0": found["grad kernel"][:, i_f_g_o].T,
            "grad weight_hh_l0": found["grad recurrent_kernel"][:, i_f_g_o].T,
            "grad bias_ih_l0": bias,
            "grad bias_hh_l0": bias,
        }

    return prepared._replace(results=results) if training else prepared


NATIVE = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


GPU_PEERS = {
    **{
        name: GpuPeer(PEERS[name].title, PEERS[name].prepare, PEERS[name].packages)
        for name in ("fastlstm", "torch")
    },
    "flashrnn": GpuPeer(
        "flashrnn", flashrnn, ("flashrnn",), dtypes=("float16", "bfloat16", "tf32"), plain=True
    ),
    "haste": GpuPeer("haste", haste, ("haste_pytorch",), dtypes=("tf32", "float32"), plain=True),
    "scan": GpuPeer("compiled\nscan", scan, ("torch",), dense=True, longest=200),
}
