"""The CUDA kernels, compiled for the host against csrc/cuda/emulate.h, in the whole of their layer.

Every path, arithmetic and feature at small odd sizes against `torch.nn.LSTM` in float64 and the
float64 reference: what a GPU could show of indices, masks, layouts and barriers shows here.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from fastlstm import reference

torch = pytest.importorskip("torch", reason="tests of the torch side")
from fastlstm import _cuda_layer, _cuda_plan, _torch  # noqa: E402

CSRC = Path(__file__).parent.parent / "csrc" / "cuda"
COMPILER = os.environ.get("CXX", "g++")
MATHS = {
    "f64": (torch.float64, 1e-12),
    "f32": (torch.float32, 3e-6),
    "tf32": (torch.float32, 6e-3),
    "bf16": (torch.bfloat16, 6e-2),
    "f16": (torch.float16, 8e-3),
}
H100 = _cuda_plan.Device(9, 0, 132, 232448, True)


@pytest.fixture(scope="session")
def module(tmp_path_factory):
    """Build the kernels for the host; FASTLSTM_EMULATE_FLAGS adds flags of the compiler."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no compiler {COMPILER}")
    target = tmp_path_factory.mktemp("emulated") / "_cuda_emulated.so"
    includes = [sysconfig.get_paths()["include"], Path(torch.__file__).parent / "include"]
    command = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += ["-fno-strict-aliasing", "-DFASTLSTM_CUDA_MODULE=_cuda_emulated"]
    command += [f"-isystem{path}" for path in includes]
    command += os.environ.get("FASTLSTM_EMULATE_FLAGS", "").split()
    command += [str(CSRC / "emulated.cpp"), str(CSRC / "bindings.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    spec = importlib.util.spec_from_file_location("_cuda_emulated", target)
    built = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(built)
    return built


@pytest.fixture
def emulated(module, monkeypatch):
    """The layer on CPU tensors; returns a function that fixes the plan of the next passes."""
    monkeypatch.setattr(_cuda_layer, "_cuda", module)
    monkeypatch.setattr(_torch, "run_forward", _cuda_layer.run_forward)
    monkeypatch.setattr(_torch, "run_backward", _cuda_layer.run_backward)

    def use(math, path, *, blocks=1, rows=1, per_direction=1, threads=64):
        def plan(x, N, H, P, directions, backward):
            if path == "steps" or H != P:
                return math, _cuda_plan.Plan("steps", 0, 0, 0, 0, 0, 0, 0, 0, "")
            units = -(-H // blocks)
            local = path != "grid"
            taken, operand = _cuda_plan.memory(math, backward, H, units, rows, threads, local)
            sizes = -(-H // units), units, rows, per_direction * directions, threads
            return math, _cuda_plan.Plan(path, *sizes, taken, operand, 0, "")

        monkeypatch.setattr(_cuda_layer, "_plan", plan)

    return use


# path, blocks of a group, rows of a slice, groups of a direction, threads
PLANS = {
    "block": ("block", 1, 5, 1, 64),
    "block, several slices": ("block", 1, 2, 2, 96),
    "cluster": ("cluster", 3, 3, 1, 64),
    "cluster, slices in turn": ("cluster", 2, 2, 1, 96),
    "grid": ("grid", 3, 5, 1, 64),
    "grid, slices in turn": ("grid", 2, 2, 2, 96),
    "steps": ("steps", 1, 1, 1, 64),
}


def use_plan(emulated, math, name):
    path, blocks, rows, per_direction, threads = PLANS[name]
    emulated(math, path, blocks=blocks, rows=rows, per_direction=per_direction, threads=threads)


def problem(T, N, D, H, *, directions=1, bias=True, P=0, lengths=None, state=True, dtype, seed=0):
    """An nn.LSTM in float64 whose values the dtype holds, its input, state and gradients."""
    torch.manual_seed(seed)
    rnn = torch.nn.LSTM(D, H, bias=bias, bidirectional=directions == 2, proj_size=P).double()

    def rounded(*shape):
        return torch.randn(*shape).to(dtype).double()

    with torch.no_grad():
        for p in rnn.parameters():
            p.copy_((1.5 * p).to(dtype))
    x = rounded(T, N, D)
    batch_sizes = []
    if lengths is not None:
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
        x, batch_sizes = packed.data, packed.batch_sizes.tolist()
    hx = (rounded(directions, N, P or H) / 2, rounded(directions, N, H)) if state else None
    grads = rounded(*x.shape[:-1], directions * (P or H)), rounded(directions, N, P or H)
    return rnn, x, batch_sizes, hx, (*grads, rounded(directions, N, H))


def run(rnn, x, batch_sizes, hx, grads, dtype, layer):
    """Results and gradients of one layer, by name."""
    leaf = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in (x, *(hx or (None, None)))]
    weights = [p.detach().to(dtype).requires_grad_() for p in rnn._flat_weights]
    directions = 2 if rnn.bidirectional else 1
    results = layer(directions, *leaf, weights, batch_sizes)
    torch.autograd.backward(results, [g.to(dtype) for g in grads])
    found = dict(zip(("y", "h_n", "c_n"), results, strict=True))
    inputs = zip(("x", "h0", "c0", *rnn._flat_weights_names), (*leaf, *weights), strict=True)
    found |= {f"grad {name}": t.grad for name, t in inputs if t is not None}
    return {name: t.detach().double().numpy() for name, t in found.items()}


def torch_layer(directions, x, h0, c0, weights, batch_sizes):
    return _torch.torch_layer(directions, batch_sizes, x, h0, c0, *weights)


def check(config, math, *, tolerance=None):
    dtype, default = MATHS[math]
    case = problem(**config, dtype=dtype)
    ours = run(*case, dtype, _torch.run_layer)
    theirs = run(*case, torch.float64, torch_layer)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = np.abs(ours[name] - expected).max() / np.abs(expected).max()
        assert error <= (tolerance or default), f"{name}: error {error:.3g}"
    return ours


SMALL = {"T": 4, "N": 5, "D": 3, "H": 11}


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_and_arithmetic(emulated, plan, math):
    use_plan(emulated, math, plan)
    check({**SMALL, "directions": 2}, math)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "change",
    [
        {"lengths": [6, 4, 4, 2, 1], "T": 6, "directions": 2},
        {"lengths": [3, 3, 1], "N": 3, "T": 3, "directions": 2, "state": False},
        {"bias": False, "state": False},
        {"T": 1, "N": 1},
        {"T": 1, "N": 1, "H": 1, "D": 1, "directions": 2},
    ],
    ids=["ragged", "ragged, no state", "no bias, no state", "one step", "size one"],
)
def test_features(emulated, plan, change):
    use_plan(emulated, "f64", plan)
    config = {**SMALL, **change}
    if plan in ("cluster", "grid") and config["H"] == 1:
        pytest.skip("one unit is one block")
    check(config, "f64")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [None, [4, 3, 1, 1, 1]], ids=["dense", "ragged"])
def test_projections(emulated, bias, lengths):
    use_plan(emulated, "f64", "steps")
    check({**SMALL, "P": 4, "directions": 2, "bias": bias, "lengths": lengths}, "f64")


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("threads", [32, 256])
def test_many_tiles(emulated, math, threads):
    """More tiles than warps, more warps than tiles; five tiles of columns; several k-steps."""
    emulated(math, "block", rows=37, threads=threads) if threads == 256 else emulated(
        math, "grid", blocks=5, rows=16, threads=threads, per_direction=2
    )
    check({"T": 2, "N": 37, "D": 2, "H": 27 if threads == 256 else 33}, math)


def test_the_grid_of_a_real_plan(emulated):
    device = _cuda_plan.Device(8, 0, 4, 30000, True)
    found = _cuda_plan.plan(9, 40, 1, "bf16", False, device)
    assert found.path == "grid"
    emulated("bf16", "grid", blocks=found.blocks, rows=found.rows, threads=found.threads)
    check({"T": 3, "N": 9, "D": 3, "H": 40}, "bf16")
