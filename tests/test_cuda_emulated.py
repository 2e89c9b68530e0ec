"""The CUDA kernels, compiled for the host against csrc/cuda/emulate.h, in the whole of their layer.

Every path, arithmetic and feature at small odd sizes against `torch.nn.LSTM` in float64 and the
float64 reference: what a GPU could show of indices, masks, layouts and barriers shows here.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from fastlstm import reference

torch = pytest.importorskip("torch", reason="tests of the torch side")
import fastlstm.nn  # noqa: E402
from fastlstm import (  # noqa: E402
    _composite,
    _cuda_graphs,
    _cuda_layer,
    _cuda_plan,
    _ops,
    _torch,
)

CSRC = Path(__file__).parent.parent / "csrc" / "cuda"
COMPILER = os.environ.get("CXX", "g++")
MATHS = {
    "f64": (torch.float64, 1e-12),
    "f32": (torch.float32, 3e-6),
    "tf32": (torch.float32, 6e-3),
    "bf16": (torch.bfloat16, 6e-2),
    "f16": (torch.float16, 8e-3),
}
H100 = _cuda_plan.Device(9, 0, 132, 232448, True, (66, 32, 16, 7))


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
    # Without the steps that share a node, which are for the CPU.
    run_backward = _cuda_layer.run_backward
    monkeypatch.setattr(_torch, "run_backward", lambda *args: run_backward(*args[:6]))

    def use(math, path, *, blocks=1, rows=1, per_direction=1, threads=64, chunks=1, wide=False):
        def plan(x, N, H, P, directions, backward):
            if path == "steps" or H != P:
                return math, _cuda_plan.STEPS
            units = -(-H // blocks)
            tiles = -(-(1 if backward else 4) * units // 16)
            own_wide = wide or tiles > threads // 32
            cut = _cuda_plan.Cut(path, -(-H // units), units, rows, chunks, own_wide)
            taken, operand, _ = _cuda_plan.memory(math, backward, H, cut, threads)
            groups = per_direction * directions
            sizes = units, rows, groups, chunks, own_wide, taken, operand
            return math, _cuda_plan.Plan(path, cut.blocks, *sizes, 0, "")

        monkeypatch.setattr(_cuda_layer, "_plan", plan)
        monkeypatch.setattr(_cuda_plan, "THREADS", threads)

    return use


# path, blocks of a group, rows of a slice, groups of a direction, threads, chunks, wide
PLANS = {
    "block": ("block", 1, 5, 1, 64),
    "block, several slices": ("block", 1, 2, 2, 96),
    "block, wide": ("block", 1, 5, 1, 32, 1, True),
    "cluster": ("cluster", 3, 3, 1, 64),
    "cluster, slices in turn": ("cluster", 2, 2, 1, 96),
    "cluster, wide": ("cluster", 4, 5, 1, 32, 1, True),
    "grid": ("grid", 3, 5, 1, 64),
    "grid, slices in turn": ("grid", 2, 2, 2, 96),
    "grid, in chunks": ("grid", 2, 5, 1, 64, 3),
    "grid, wide": ("grid", 2, 5, 1, 32, 2, True),
    "steps": ("steps", 1, 1, 1, 64),
}


def use_plan(emulated, math, name):
    path, *cut = PLANS[name]
    names = "blocks", "rows", "per_direction", "threads", "chunks", "wide"
    emulated(math, path, **dict(zip(names, cut, strict=False)))


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
    leaf = [
        None if t is None else t.to(dtype, copy=True).requires_grad_()
        for t in (x, *(hx or (None, None)))
    ]
    weights = [p.detach().to(dtype).requires_grad_() for p in rnn._flat_weights]
    directions = 2 if rnn.bidirectional else 1
    results = layer(directions, *leaf, weights, batch_sizes)
    torch.autograd.backward(results, [g.to(dtype) for g in grads])
    found = dict(zip(("y", "h_n", "c_n"), results, strict=True))
    inputs = zip(("x", "h0", "c0", *rnn._flat_weights_names), (*leaf, *weights), strict=True)
    found |= {f"grad {name}": t.grad for name, t in inputs if t is not None}
    return {name: t.detach().double().numpy() for name, t in found.items()}


def torch_layer(directions, x, h0, c0, weights, batch_sizes):
    """Ordinary operators of torch, which tests/test_transforms.py holds against nn.LSTM."""
    return _composite.forward(directions, x, h0, c0, weights, batch_sizes)


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
    check({**SMALL, **change}, "f64")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [None, [4, 3, 1, 1, 1]], ids=["dense", "ragged"])
def test_projections(emulated, bias, lengths):
    use_plan(emulated, "f64", "steps")
    check({**SMALL, "P": 4, "directions": 2, "bias": bias, "lengths": lengths}, "f64")


@pytest.mark.parametrize(
    "config", [{}, {"P": 4}, {"lengths": [4, 3, 1, 1, 1]}], ids=["plain", "projection", "ragged"]
)
def test_saved_tensor_hooks(emulated, config):
    """Other layouts make no difference; what does not fit is refused."""
    use_plan(emulated, "f64", "steps" if "P" in config else "block")
    case = problem(**SMALL, **config, directions=2, dtype=torch.float64)

    def found(unpack):
        places = itertools.count()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (next(places), t), unpack):
            results = run(*case, torch.float64, _torch.run_layer)
        return results, next(places)

    expected, count = found(lambda packed: packed[1])
    for change in (lambda t: torch.stack([t, t], -1)[..., 0], lambda t: torch._neg_view(-t)):
        actual, _ = found(lambda packed, change=change: change(packed[1]))
        for name, results in expected.items():
            np.testing.assert_array_equal(actual[name], results)
    every = set(range(count))
    for change in (torch.Tensor.float, lambda t: t[:1], lambda t: t[None]):
        for some in (*({place} for place in every), every):
            with pytest.raises(RuntimeError, match="in the backward pass"):
                found(lambda p, f=change, some=some: f(p[1]) if p[0] in some else p[1])


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("threads", [32, 256])
def test_many_tiles(emulated, math, threads):
    """More tiles than warps, more warps than tiles; five tiles of columns; several k-steps."""
    if threads == 32:
        emulated(math, "grid", blocks=5, rows=9, threads=threads, per_direction=2, wide=True)
    else:
        emulated(math, "block", rows=37, threads=threads)
    check({"T": 2, "N": 37, "D": 2, "H": 33 if threads == 32 else 13}, math)


@pytest.mark.parametrize("path", ["cluster", "grid"])
@pytest.mark.parametrize(
    ("math", "threads", "chunks"), [("bf16", 32, 1), ("f16", 32, 2), ("tf32", 64, 1)]
)
def test_weights_in_registers_and_in_memory(emulated, math, threads, chunks, path):
    """Backward some 70 k-steps, in one or two splits or chunks: more than the registers take."""
    if path == "cluster":
        chunks = 1
    H = 140 if math == "tf32" else 280 if chunks == 2 else 140
    blocks = -(-H // 16)
    emulated(math, path, blocks=blocks, rows=2, threads=threads, chunks=chunks)
    cut = _cuda_plan.Cut(path, blocks, -(-H // blocks), 2, chunks, False)
    _, _, kept = _cuda_plan.memory(math, True, H, cut, threads)
    _, _, all_of_them = _cuda_plan.memory("f32", True, H, cut, threads)
    assert 0 < kept < all_of_them
    check({"T": 3, "N": 2, "D": 2, "H": H}, math)


@pytest.mark.parametrize("path", ["cluster", "grid"])
@pytest.mark.parametrize("math", MATHS)
def test_many_blocks(emulated, math, path):
    """Sixteen blocks, the most of a cluster; rows of whole 16 bytes."""
    emulated(math, path, blocks=16, rows=2)
    check({"T": 3, "N": 3, "D": 2, "H": 64, "directions": 2}, math)


def test_a_real_plan(emulated):
    device = _cuda_plan.Device(8, 0, 6, 14000, True)
    found = _cuda_plan.plan(9, 40, 1, "bf16", True, device, 40)
    assert found.path == "grid"
    emulated("bf16", "grid", blocks=found.blocks, rows=found.rows, threads=_cuda_plan.THREADS)
    check({"T": 3, "N": 9, "D": 3, "H": 40}, "bf16")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_no_order_of_threads_changes_a_bit(emulated, monkeypatch, plan, seed):
    use_plan(emulated, "bf16", plan)
    config = {**SMALL, "lengths": [4, 4, 3, 1, 1], "directions": 2}
    first = check(config, "bf16")
    monkeypatch.setenv("FASTLSTM_EMULATE_SEED", seed)
    again = check(config, "bf16")
    assert all(np.array_equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("plan", PLANS)
def test_inference_gives_the_bits_of_training(emulated, plan):
    use_plan(emulated, "f32", plan)
    case = problem(**SMALL, dtype=torch.float32)
    trained = run(*case, torch.float32, _torch.run_layer)
    rnn, x, _, hx, _ = case
    with torch.no_grad():
        weights = [p.float() for p in rnn._flat_weights]
        result = _torch.run_layer(1, x.float(), *(s.float() for s in hx), weights)
    for name, value in zip(("y", "h_n", "c_n"), result, strict=True):
        assert np.array_equal(value.double().numpy(), trained[name])


class Recorded:
    """In the place of a CUDA graph: does nothing but what was recorded, when it is replayed."""

    made = 0

    def __init__(self, device, run):
        type(self).made += 1
        self.run, self.replayed, self.at_work = run, 0, False

    def replay(self):
        self.replayed += 1
        self.run()

    def busy(self):
        return self.at_work


@pytest.fixture
def replays(emulated, monkeypatch):
    emulated("f64", "steps")
    made = _cuda_graphs.Replays(8, type("Fresh", (Recorded,), {}))
    monkeypatch.setattr(_cuda_layer, "_replays", made)
    monkeypatch.setattr(_cuda_layer, "_replayable", lambda x: True)
    monkeypatch.setattr(_cuda_layer, "properties", lambda index: H100)
    return made


def recordings(replays):
    return [known.recording for known in replays._known.values() if known is not None]


@pytest.mark.parametrize("P", [0, 4])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("lengths", [None, [4, 3, 1, 1, 1]], ids=["dense", "ragged"])
def test_steps_replayed(replays, P, state, lengths):
    config = {**SMALL, "P": P, "directions": 2, "state": state, "lengths": lengths}
    for call in range(4):
        check({**config, "seed": call}, "f64")
        # forward and backward of two directions, recorded in the second call
        assert [r.replayed for r in recordings(replays)] == [call] * 4 * (call > 0)
    check({**config, "T": 4, "N": 3, "lengths": lengths and [4, 1, 1]}, "f64")  # others
    assert len(recordings(replays)) == 4 and len(replays._known) == 8


@pytest.mark.parametrize("P", [0, 4])
@pytest.mark.parametrize("state", [True, False])
def test_stretches_replayed(replays, monkeypatch, P, state):
    monkeypatch.setattr(_cuda_layer, "_MOST_STEPS", 2)
    config = {**SMALL, "P": P, "directions": 2, "state": state}
    for T, replayed in ((7, 2), (6, 5), (8, 9)):
        check({**config, "T": T}, "f64")
        # of both passes of both directions; the very first stretch was none
        assert [r.replayed for r in recordings(replays)] == [replayed] * 4


def test_stretches_change_no_bit(emulated, replays, monkeypatch):
    """What c is between two steps is not rounded where one stretch ends."""
    emulated("bf16", "steps")
    config = {**SMALL, "T": 9, "directions": 2}
    whole = check(config, "bf16")
    monkeypatch.setattr(_cuda_layer, "_MOST_STEPS", 2)
    parts = check(config, "bf16")
    for name in whole:
        assert np.array_equal(whole[name], parts[name]), name


def test_results_outlive_a_replay(replays):
    rnn, x, _, hx, _ = problem(**SMALL, P=4, dtype=torch.float64)
    weights = [p.detach() for p in rnn._flat_weights]
    found = []
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.no_grad):
        with mode():
            found.append((_torch.run_layer(1, x * len(found), *hx, weights), x * len(found)))
    assert [r.replayed for r in recordings(replays)] == [3]
    for result, given in found:
        expected = torch_layer(1, given, *hx, weights, [])
        for a, b in zip(result, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


def test_where_nothing_can_be_recorded(replays, monkeypatch):
    def fail(device, run):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(replays, "_record", fail)
    config = {**SMALL, "P": 4}
    check(config, "f64")
    with pytest.warns(UserWarning, match="no CUDA graph of a loop: no memory left"):
        check(config, "f64")
    check(config, "f64")  # it is not tried again
    assert not recordings(replays)


def test_what_is_not_replayed(replays, monkeypatch):
    config = {**SMALL, "P": 4}
    ragged = {**config, "lengths": [4, 3, 1, 1, 1]}
    for name, value, kind in (
        ("_MOST_REPLAYED", 100, config),  # less than a step
        ("_MOST_REPLAYED", 100, ragged),
        ("_MOST_STEPS", 3, ragged),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(_cuda_layer, name, value)
            for _ in range(3):
                check(kind, "f64")
    assert not replays._known
    for N in range(1, 6):  # more kinds than are known at a time: the oldest is forgotten
        check({**config, "N": N}, "f64")
        check({**config, "N": N}, "f64")
    assert len(replays._known) == 8 == len(recordings(replays))
    for recording in recordings(replays):
        recording.at_work = True
    known = list(replays._known)
    for _ in range(3):  # not while the device may be at it
        check({**config, "N": 6}, "f64")
    assert list(replays._known) == known


def test_operators_record_nothing(replays):
    """Their memory may belong to the graphs of torch.compile(mode="reduce-overhead")."""
    rnn, x, _, (h0, c0), (grad_y, *_) = problem(**SMALL, P=4, dtype=torch.float64)
    weights = [p.detach() for p in rnn._flat_weights]
    for _ in range(3):
        y, *_, gates, cells, raw = torch.ops.fastlstm.layer(x, h0, c0, weights, 1, True, None)
        kept, needed = [gates, cells, raw], [True] * 8
        inputs = x, h0, c0, weights, y, kept, 1, needed, None
        torch.ops.fastlstm.layer_backward(grad_y, None, None, *inputs)
    assert not replays._known
    _torch.run_layer(1, x, h0, c0, weights)
    assert replays._known


@pytest.mark.parametrize("plan", ["block", "steps"])
def test_backward_in_autocast(emulated, plan):
    """Of a call outside of it: its products stay those of the dtype."""
    use_plan(emulated, "f32", plan)
    rnn, x, _, (h0, c0), _ = problem(**SMALL, directions=2, dtype=torch.float32)
    found = []
    for autocast in (False, True):
        given = x.float().requires_grad_()
        weights = [p.detach().float().requires_grad_() for p in rnn._flat_weights]
        y, *_ = _torch.run_layer(2, given, h0.float(), c0.float(), weights)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(torch.autograd.grad(y.sum(), [given, *weights]))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_against_the_reference(emulated):
    """The oracle of the CPU kernels, which shares nothing with torch."""
    use_plan(emulated, "f64", "cluster")
    case = problem(**SMALL, bias=False, dtype=torch.float64)
    rnn, x, _, (h0, c0), grads = case
    ours = run(*case, torch.float64, _torch.run_layer)
    args = x, rnn.weight_ih_l0.detach(), rnn.weight_hh_l0.detach(), None, None, h0[0], c0[0]
    args = [None if a is None else a.numpy() for a in args]
    y, h, c, *_ = reference.lstm_forward(*args)
    found = reference.lstm_backward(
        *args, grads[0].numpy(), grads[1][0].numpy(), grads[2][0].numpy()
    )
    expected = {"y": y, "h_n": h[None], "c_n": c[None], "grad x": found.x}
    expected |= {"grad h0": found.h0[None], "grad c0": found.c0[None]}
    expected |= {"grad weight_ih_l0": found.weight_ih, "grad weight_hh_l0": found.weight_hh}
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(ours[name] - value).max() <= 1e-12 * np.abs(value).max(), name


def test_only_some_gradients(emulated):
    use_plan(emulated, "f64", "grid")
    rnn, x, _, hx, _ = problem(**SMALL, directions=2, dtype=torch.float64)
    weights = [p.detach() for p in rnn._flat_weights]
    weights[5].requires_grad_()  # weight_hh of the reverse direction
    y, _, c = _torch.run_layer(2, x, *hx, weights)
    (y.sum() + c.sum()).backward()
    found = weights[5].grad
    y, _, c = torch_layer(2, x, *hx, weights, [])
    (expected,) = torch.autograd.grad(y.sum() + c.sum(), weights[5])
    assert torch.allclose(found, expected, rtol=1e-11)
    assert all(w.grad is None for k, w in enumerate(weights) if k != 5)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("plan", PLANS)
def test_nan_of_any_bits(emulated, plan, math):
    """The NaN whose bits are all set is what the grid path takes for not yet come."""
    use_plan(emulated, math, plan)
    dtype = MATHS[math][0]
    rnn, x, _, hx, grads = problem(**SMALL, dtype=dtype)
    x, *hx = (t.to(dtype) for t in (x, *hx))
    grads = [g.to(dtype) for g in grads]
    for t in (x[1, 1], hx[0][0, 2], hx[1][0, 3], grads[0][2, 4], grads[1][0, 0]):
        t.view(torch.uint8).fill_(255)
        assert t.isnan().all()
    leaves = [t.requires_grad_() for t in (x, *hx)]
    results = _torch.run_layer(1, *leaves, [p.detach().to(dtype) for p in rnn._flat_weights])
    y, h, c = (t.detach().isnan() for t in results)
    assert y[:, 2].all() and c[0, 1:4].all() and h[0, 1:4].all()
    assert not y[:, 0].any() and not y[:, 4].any() and not y[0, 1].any()
    torch.autograd.backward(results, grads)
    dx = x.grad.isnan()
    assert dx[:, 0].all() and dx[:, 2].all() and dx[:3, 4].all() and not dx[3, 4].any()


def test_nan_stays_in_its_row(emulated):
    use_plan(emulated, "bf16", "grid, slices in turn")
    rnn, x, _, hx, _ = problem(**SMALL, dtype=torch.bfloat16)
    half = [t.bfloat16() for t in (x, *hx)]
    half[0][1, 2] = float("nan")
    y, h, c = _torch.run_layer(1, *half, [p.detach().bfloat16() for p in rnn._flat_weights])
    assert y[1:, 2].isnan().all() and h[:, 2].isnan().all() and c[:, 2].isnan().all()
    y[1:, 2] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_that_of_the_layout(module, math, backward):
    for H, units, rows, threads in ((1, 1, 1, 32), (100, 13, 9, 256), (768, 48, 8, 256)):
        for chunks, path in ((1, "cluster"), (1, "grid"), (3, "grid")):
            for wide in (False, True):
                blocks = -(-H // units)
                if blocks == 1 and path == "grid":
                    continue
                cut = _cuda_plan.Cut(
                    path if blocks > 1 else "block", blocks, units, rows, chunks, wide
                )
                sizes = cut._asdict() | {"threads": threads, "local": int(path == "cluster")}
                del sizes["path"]
                found = module.memory(math, backward, H=H, **sizes)
                expected = _cuda_plan.memory(math, backward, H, cut, threads)
                assert found == expected


def test_what_the_module_refuses(module):
    fits = dict(
        T=1, N=1, H=4, directions=1, threads=32, blocks=1, units=4, rows=1, groups=1, local=1
    )
    fits |= dict(total=1, weight=8, gx=8, y=8, h_n=8, c_n=8)
    for wrong, words in (
        ({"T": 0}, "T, N, H, total, chunks: expected at least 1"),
        ({"directions": 3}, "directions: expected 1 or 2"),
        ({"threads": 48}, "threads: expected a multiple of 32"),
        ({"blocks": 2}, "blocks, units: expected just enough blocks"),
        ({"units": 3}, "blocks, units: expected just enough blocks"),
        ({"rows": 65}, "rows: expected no more elements than a thread can own"),
        ({"directions": 2}, "groups: expected a multiple of directions"),
        ({"chunks": 2}, "chunks: expected 1 with local"),
        ({"local": 0}, "exchange: expected memory"),
        ({"local": 0, "exchange": 8}, r"exchanges: expected T \+ 1 for each slice"),
        ({"gates": 8}, "expected gx, y, h_n, c_n, both gates and cells or none"),
        ({"weight": 0}, "weight: expected memory"),
        ({"gx": 0}, "expected gx, y, h_n, c_n"),
        ({"other": 1}, "unknown keyword argument"),
    ):
        with pytest.raises(ValueError, match=words):
            module.recurrence("f32", False, 0, 0, **{**fits, **wrong})
    with pytest.raises(ValueError, match="expected gates, cells, dz, dh0, dc0"):
        module.recurrence("f32", True, 0, 0, **fits)
    with pytest.raises(ValueError, match="math: expected bf16, f16, tf32, f32 or f64, got f8"):
        module.recurrence("f8", False, 0, 0, **fits)
    with pytest.raises(ValueError, match="expected z, h"):
        module.step("f32", False, 0, 0, n=1, H=1, c=8)


@pytest.mark.parametrize("plan", ["cluster", "grid, slices in turn", "grid, in chunks", "steps"])
@pytest.mark.parametrize("proj_size", [0, 3])
def test_the_module(emulated, plan, proj_size):
    """Two layers, both directions, packed and unsorted, through fastlstm.nn and the operators."""
    use_plan(emulated, "f64", plan)
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "proj_size": proj_size}
    theirs = torch.nn.LSTM(3, 11, **options).double()
    ours = fastlstm.nn.LSTM(3, 11, **options).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [2, 4, 1, 4, 3], enforce_sorted=False)
    found = []
    for rnn in (ours, theirs):
        rnn.zero_grad()
        y, (h, c) = rnn(x)
        y_packed, (h_packed, c_packed) = rnn(packed)
        parts = y, h, c, y_packed.data, h_packed, c_packed
        sum(part.sin().sum() for part in parts).backward()
        found.append([*parts, *(p.grad for p in rnn.parameters())])
    for mine, other in zip(*found, strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-12)


def test_the_operators(emulated):
    use_plan(emulated, "f64", "grid")
    rnn, x, _, hx, _ = problem(**SMALL, directions=2, dtype=torch.float64)
    leaf = [t.clone().requires_grad_() for t in (x, *hx, *rnn._flat_weights)]
    found = []
    for layer in (_ops.layer_of_graph, _torch.run_layer):
        y, h, c = layer(2, *leaf[:3], leaf[3:])
        found.append([y, h, c, *torch.autograd.grad((y.sin().sum() + h.sum() * c.sum()), leaf)])
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


def test_transforms(emulated):
    """torch.func on these kernels, against a loop over nn.LSTM."""
    use_plan(emulated, "f64", "grid")
    torch.manual_seed(0)
    theirs = [torch.nn.LSTM(3, 11, bidirectional=True).double() for _ in range(2)]
    ours = fastlstm.nn.LSTM(3, 11, bidirectional=True).double()
    params = {
        n: torch.stack([dict(m.named_parameters())[n] for m in theirs]) for n in ours.state_dict()
    }
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)

    def loss(params, x):
        y, (_, c) = torch.func.functional_call(ours, params, (x,))
        return y.sin().sum() + c.sum()

    found = torch.func.vmap(torch.func.grad(loss))(params, x)
    for k, module in enumerate(theirs):
        y, (_, c) = module(x[k])
        (y.sin().sum() + c.sum()).backward()
        for name, p in module.named_parameters():
            assert torch.allclose(found[name][k], p.grad, rtol=1e-10, atol=1e-12)


def test_double_backward(emulated):
    use_plan(emulated, "f64", "cluster")
    rnn, x, _, hx, _ = problem(**SMALL, dtype=torch.float64)
    found = []
    for layer in (_torch.run_layer, torch_layer):
        leaf = [t.detach().clone().requires_grad_() for t in (x, *hx, *rnn._flat_weights)]
        y, *_ = layer(1, *leaf[:3], leaf[3:], [])
        (grad,) = torch.autograd.grad(y.square().sum(), leaf[0], create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), leaf))
    for mine, other in zip(*found, strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_only_right_shapes_reach_the_kernels(proj_size, bias, batch_first):
    """What nn.LSTM refuses is left to it, errors included."""
    rnn = torch.nn.LSTM(3, 5, 2, bias, batch_first, bidirectional=True, proj_size=proj_size)
    weights = list(rnn._flat_weights)
    P = proj_size or 5
    x, alone, rows = torch.zeros(7, 6, 3), torch.zeros(7, 3), torch.zeros(9, 3)
    N = 7 if batch_first else 6
    hx = torch.zeros(4, N, P), torch.zeros(4, N, 5)
    sizes = torch.tensor([N, 9 - N])

    def right(x, hx=None, weights=weights, sizes=None):
        return _cuda_layer._right_shapes(rnn, x, hx, weights, sizes)

    assert right(x) and right(x, hx) and right(alone) and right(alone, [s[:, 0] for s in hx])
    assert right(rows, None, sizes=sizes) and right(rows, hx, sizes=sizes)
    wrong_hx = [(hx[0][:3], hx[1]), (hx[0], hx[1][:, 1:]), (hx[0], hx[1][..., 1:]), hx[:1] * 2]
    for bad in wrong_hx if proj_size else wrong_hx[:3]:
        assert not right(x, bad)
    assert not right(x, [s[:, 0] for s in hx])
    for bad in (x[..., :2], x[:, :0], x[:0], x[0, 0], x[None]):
        assert not right(bad)
    assert not right(x, sizes=sizes)
    for k, weight in enumerate(weights):
        assert not right(x, weights=[*weights[:k], weight[1:], *weights[k + 1 :]])
    assert _cuda_layer.served(rnn, x, hx, weights) is None  # not on CUDA
