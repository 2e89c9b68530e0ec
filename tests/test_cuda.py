"""`fastlstm.nn.LSTM` on a GPU, against `torch.nn.LSTM` in float64 on the CPU. Skipped without one.

Run with ``FASTLSTM_CUDA_KERNELS=1 pytest tests/test_cuda.py``.
"""

from __future__ import annotations

import copy
import os

import pytest

torch = pytest.importorskip("torch", reason="tests of the torch side")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if os.environ.get("FASTLSTM_CUDA_KERNELS") != "1":
    pytest.skip("FASTLSTM_CUDA_KERNELS=1 is not set", allow_module_level=True)

import fastlstm.nn  # noqa: E402
from fastlstm import _cuda_layer, _cuda_plan  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402

MATHS = {
    "f64": (torch.float64, 1e-12),
    "f32": (torch.float32, 5e-6),
    "tf32": (torch.float32, 2e-2),
    "bf16": (torch.bfloat16, 1e-1),
    "f16": (torch.float16, 2e-2),
}


@pytest.fixture(params=MATHS)
def math(request, monkeypatch):
    tf32 = request.param == "tf32"
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    yield request.param
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def exact():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def pair(dtype, *args, **options):
    """The same LSTM as ours on CUDA in a dtype, and torch's on the CPU in float64."""
    torch.manual_seed(0)
    ours = fastlstm.nn.LSTM(*args, **options).to(dtype)
    theirs = torch.nn.LSTM(*args, **options).double()
    theirs.load_state_dict(ours.state_dict())
    return ours.cuda(), theirs


def leaves(dtype, *shapes):
    torch.manual_seed(1)
    theirs = [torch.randn(*shape).to(dtype).double().requires_grad_() for shape in shapes]
    return [t.detach().to("cuda", dtype).requires_grad_() for t in theirs], theirs


def flatten(result):
    y, (h, c) = result
    return [y.data if hasattr(y, "batch_sizes") else y, h, c]


def assert_close(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape
        scale = b.abs().max().item() or 1.0
        error = (a.detach().cpu().double() - b.detach()).abs().max().item() / scale
        assert error <= tolerance, f"result {k}: error {error:.3g}"


def gradients(result, tensors):
    outputs = flatten(result)
    torch.manual_seed(2)
    grads = [torch.randn(o.shape, dtype=torch.float64) for o in outputs]
    both = zip(grads, outputs, strict=True)
    torch.autograd.backward(outputs, [g.to(o.device, o.dtype) for g, o in both])
    return [t.grad for t in tensors]


def check(math, T, N, D, H, **options):
    dtype, tolerance = MATHS[math]
    ours, theirs = pair(dtype, D, H, **options)
    P = options.get("proj_size") or H
    states = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    mine, other = leaves(dtype, (T, N, D), (states, N, P), (states, N, H))
    a, b = ours(mine[0], tuple(mine[1:])), theirs(other[0], tuple(other[1:]))
    assert_close(flatten(a), flatten(b), tolerance)
    assert a[0].dtype == dtype
    found = gradients(a, [*mine, *ours.parameters()])
    assert_close(found, gradients(b, [*other, *theirs.parameters()]), tolerance)


SIZES = [
    (1, 1, 1, 1),
    (5, 3, 2, 7),
    (20, 16, 8, 64),
    (9, 1, 5, 200),
    (30, 33, 7, 130),
    (12, 16, 16, 768),
    (7, 70, 3, 257),
    (6, 8, 4, 1100),
    (4, 4, 4, 2100),
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_sizes(math, sizes):
    check(math, *sizes)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"num_layers": 3},
        {"bidirectional": True},
        {"num_layers": 2, "bidirectional": True, "proj_size": 9},
        {"proj_size": 5},
    ],
    ids=str,
)
def test_options(math, options):
    check(math, 11, 10, 6, 40, **options)


# Every path at every size that it can hold, whatever the plan would choose.
@pytest.mark.parametrize("path", ["block", "cluster", "grid", "steps"])
@pytest.mark.parametrize("sizes", [(6, 3, 2, 7), (9, 20, 5, 72)], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_path(math, path, sizes, bidirectional, monkeypatch):
    device = _cuda_layer.properties(0)
    if path == "cluster" and device.major < 9:
        pytest.skip("no clusters")

    def widest(backward):
        directions = 2 if bidirectional else 1
        candidates = _cuda_plan._candidates(*sizes[1::2], directions, math, backward, device)
        own = [p for p in candidates if p.path == path]
        return max(own, key=lambda p: p.blocks) if own else None

    plans = [_cuda_plan.STEPS if path == "steps" else widest(b) for b in (False, True)]
    if None in plans:
        pytest.skip("W_hh does not fit")

    def plan(x, N, H, P, directions, backward):
        return math, plans[backward]

    monkeypatch.setattr(_cuda_layer, "_plan", plan)
    check(math, *sizes, bidirectional=bidirectional)


@pytest.mark.parametrize("H", [24, 300, 2100])
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed(math, H, enforce_sorted, bidirectional):
    dtype, tolerance = MATHS[math]
    ours, theirs = pair(dtype, 6, H, bidirectional=bidirectional)
    lengths = [9, 7, 7, 3, 1] if enforce_sorted else [3, 9, 1, 7, 7]
    mine, other = leaves(dtype, (9, 5, 6))
    results = [
        rnn(pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted))
        for rnn, x in ((ours, mine[0]), (theirs, other[0]))
    ]
    assert_close(flatten(results[0]), flatten(results[1]), tolerance)
    padded = [pad_packed_sequence(y)[0] for y, _ in results]
    assert_close(padded[:1], padded[1:], tolerance)
    found = gradients(results[0], [*mine, *ours.parameters()])
    assert_close(found, gradients(results[1], [*other, *theirs.parameters()]), tolerance)


@pytest.mark.parametrize("batch_first", [False, True])
def test_batch_first_and_unbatched(batch_first, exact):
    ours, theirs = pair(torch.float32, 6, 24, batch_first=batch_first)
    for shape in ((7, 4, 6), (7, 6)):
        mine, other = leaves(torch.float32, shape)
        assert_close(flatten(ours(mine[0])), flatten(theirs(other[0])), 5e-6)


def test_backward_in_eval_mode(exact):
    ours, theirs = pair(torch.float32, 6, 24)
    ours.eval()
    mine, other = leaves(torch.float32, (7, 4, 6))
    found = gradients(ours(mine[0]), [*mine, *ours.parameters()])
    assert_close(found, gradients(theirs(other[0]), [*other, *theirs.parameters()]), 5e-6)


def test_double_backward():
    ours, theirs = pair(torch.float64, 3, 5)
    mine, other = leaves(torch.float64, (4, 2, 3))
    found = []
    for rnn, x in ((ours, mine[0]), (theirs, other[0])):
        y, _ = rnn(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append([*torch.autograd.grad(grad.square().sum(), [x, *rnn.parameters()])])
    assert_close(found[0], found[1], 1e-10)


@pytest.mark.parametrize("H", [24, 300, 2100])
def test_same_bits_every_time(math, H):
    dtype, _ = MATHS[math]
    ours, _ = pair(dtype, 6, H, bidirectional=True)
    mine, _ = leaves(dtype, (50, 24, 6))
    found = []
    for _ in range(4):
        ours.zero_grad()
        mine[0].grad = None
        result = ours(mine[0])
        grads = [g.clone() for g in gradients(result, [*mine, *ours.parameters()])]
        found.append([*flatten(result), *grads])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@pytest.mark.parametrize("H", [24, 300])
def test_long_sequences(H, exact):
    """Thousands of exchanges: a missing fence shows late."""
    ours, theirs = pair(torch.float32, 4, H)
    mine, other = leaves(torch.float32, (5000, 8, 4))
    a = ours(mine[0])
    assert_close(flatten(a), flatten(theirs(other[0])), 2e-5)
    again = ours(mine[0])
    assert torch.equal(a[0], again[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    ours, theirs = pair(torch.float32, 6, 24)
    mine, other = leaves(torch.float32, (7, 4, 6))
    with torch.autocast("cuda", dtype):
        a = ours(mine[0])
    assert [t.dtype for t in flatten(a)] == [dtype] * 3
    assert_close(flatten(a), flatten(theirs(other[0])), 2e-2)
    found = gradients(a, [*mine, *ours.parameters()])
    assert [g.dtype for g in found] == [torch.float32] * len(found)


def test_another_stream(exact):
    ours, theirs = pair(torch.float32, 6, 300)
    mine, other = leaves(torch.float32, (50, 16, 6))
    expected = theirs(other[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = [ours(mine[0]) for _ in range(10)]
    torch.cuda.current_stream().wait_stream(stream)
    for result in results:
        assert_close(flatten(result), flatten(expected), 5e-6)


def test_two_streams_at_once(exact):
    """Two persistent launches that together exceed the device must not wait for one another."""
    ours, _ = pair(torch.float32, 6, 300)
    mine, _ = leaves(torch.float32, (200, 64, 6))
    expected = ours(mine[0])[0]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams * 3:
        with torch.cuda.stream(stream):
            results.append(ours(mine[0])[0])
    torch.cuda.synchronize()
    assert all(torch.equal(expected, y) for y in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device(exact):
    ours, theirs = pair(torch.float32, 6, 24)
    ours = ours.to("cuda:1")
    _, other = leaves(torch.float32, (7, 4, 6))
    x = other[0].detach().float().to("cuda:1")
    assert torch.cuda.current_device() == 0
    result = ours(x)
    assert torch.cuda.current_device() == 0
    assert result[0].device == x.device
    assert_close(flatten(result), flatten(theirs(other[0])), 5e-6)


def test_no_synchronisation():
    ours, _ = pair(torch.float32, 6, 300, num_layers=2, bidirectional=True)
    mine, _ = leaves(torch.float32, (9, 5, 6))
    packed = pack_padded_sequence(mine[0], [9, 7, 7, 3, 1])
    ours(mine[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in (mine[0], packed):
            y, _ = ours(x)
            (y.data if x is packed else y).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("H", [24, 300, 2100])
def test_graph_of_a_training_step(H, exact):
    ours, _ = pair(torch.float32, 6, H)
    twin = copy.deepcopy(ours)
    static = torch.randn(20, 8, 6, device="cuda")

    def step(rnn, x):
        y, _ = rnn(x)
        y.square().mean().backward()
        with torch.no_grad():
            for p in rnn.parameters():
                p -= 0.1 * p.grad
                p.grad.zero_()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(ours, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(ours, static)
    for _ in range(3):
        step(twin, static)
    for k in range(3):
        torch.manual_seed(k)
        static.copy_(torch.randn(20, 8, 6))
        graph.replay()
        step(twin, static)
    assert_close(list(ours.parameters()), [p.cpu().double() for p in twin.parameters()], 1e-6)


@pytest.mark.parametrize("ragged", [False, True])
def test_steps_as_a_graph(ragged, exact):
    """From the second call on the loop is replayed; what one call returned stays."""
    ours, theirs = pair(torch.float32, 6, 24, proj_size=12, bidirectional=True)
    kept = []
    for call in range(4):
        torch.manual_seed(call)
        x = torch.randn(9, 4, 6)
        given = pack_padded_sequence(x, [9, 7, 7, 2]) if ragged else x
        result = flatten(ours(given.to("cuda")))
        expected = flatten(theirs(given.to(torch.float64)))
        for module, parts in ((ours, result), (theirs, expected)):
            module.zero_grad()
            sum(part.square().sum() for part in parts).backward()
        grads = [p.grad.clone() for p in ours.parameters()]
        kept.append(([*result, *grads], [*expected, *(p.grad for p in theirs.parameters())]))
    assert any(known is not None for known in _cuda_layer._replays._known.values())
    for result, expected in kept:
        assert_close(result, expected, 1e-5)


def test_graph_of_a_ragged_step(exact, monkeypatch):
    monkeypatch.setattr(_cuda_layer._offsets, "_most", 2)
    ours, _ = pair(torch.float32, 6, 24)
    twin = copy.deepcopy(ours)
    static = torch.randn(4, 9, 6, device="cuda")

    def step(rnn, lengths):
        given = pack_padded_sequence(static, lengths, batch_first=True)
        return rnn(given)[0].data

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(ours, [9, 8, 8, 1])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(ours, [9, 8, 8, 1])
    for length in range(1, 4):  # with which the first lengths are forgotten
        step(ours, [9, 8, length, 1])
    static.copy_(torch.randn(4, 9, 6))
    graph.replay()
    assert_close([y], [step(twin, [9, 8, 8, 1]).cpu().double()], 1e-6)
    with pytest.raises(RuntimeError, match="lengths of a call before"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            step(ours, [9, 3, 3, 2])


def test_transforms(exact):
    ours, theirs = pair(torch.float32, 6, 24)
    x = torch.randn(3, 7, 4, 6)

    def grads(module, x):
        def loss(params, x):
            y, (_, c) = torch.func.functional_call(module, params, (x,))
            return y.sin().sum() + c.sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(module.named_parameters()), x)

    found = grads(ours, x.cuda())
    for k in range(3):
        y, (_, c) = theirs(x[k].double())
        theirs.zero_grad()
        (y.sin().sum() + c.sum()).backward()
        mine = [found[name][k] for name, _ in theirs.named_parameters()]
        assert_close(mine, [p.grad for p in theirs.parameters()], 1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_compile(bidirectional, exact):
    ours, theirs = pair(torch.float32, 6, 24, bidirectional=bidirectional)
    mine, other = leaves(torch.float32, (7, 4, 6))
    with torch._dynamo.config.patch(allow_rnn=True):
        result = torch.compile(ours, backend="aot_eager", fullgraph=True)(mine[0])
    assert_close(flatten(result), flatten(theirs(other[0])), 5e-6)
    found = gradients(result, [*mine, *ours.parameters()])
    b = theirs(other[0])
    assert_close(found, gradients(b, [*other, *theirs.parameters()]), 5e-6)


def test_what_is_not_served_is_torchs():
    rnn = fastlstm.nn.LSTM(6, 24).cuda()
    for bad, error in (
        (torch.zeros(3, 2, 7, device="cuda"), RuntimeError),
        (torch.zeros(3, 2, 6), RuntimeError),
        (torch.zeros(3, 2, 6, device="cuda", dtype=torch.float64), (RuntimeError, ValueError)),
    ):
        with pytest.raises(error):
            rnn(bad)
    assert rnn(torch.zeros(3, 0, 6, device="cuda"))[0].shape == (3, 0, 24)


def test_saved_memory():
    """Four gates and c per (t, n, h), and the output."""
    T, N, H = 100, 16, 256
    ours, _ = pair(torch.bfloat16, H, H)
    x = torch.randn(T, N, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ours(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y, _ = ours(x)
    assert torch.cuda.memory_allocated() - before <= 1.1 * 6 * T * N * H * 2
    y.sum().backward()


def test_explain():
    rnn = fastlstm.nn.LSTM(6, 24).cuda()
    x = torch.zeros(3, 2, 6, device="cuda")
    forward, backward = fastlstm.nn.explain(rnn, x).splitlines()
    assert forward.startswith("forward, ")
    assert backward.startswith("backward, ")
    assert "torch.nn.LSTM's own path" in fastlstm.nn.explain(rnn, x.double())
