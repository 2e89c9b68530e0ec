"""fastlstm.nn under torch.compile, torch.export and torch.onnx.export, beside the eager results."""

from __future__ import annotations

import copy
import sys
import types

import pytest
from helpers import run_python, stdout_of

torch = pytest.importorskip("torch", reason="tests of the torch side")

import fastlstm.nn  # noqa: E402 - needs torch
from fastlstm import _dynamo  # noqa: E402
from helpers_torch import (  # noqa: E402
    F32,
    F64,
    D,
    H,
    N,
    T,
    assert_close,
    assert_same_outcome,
    flatten,
    leaf,
    old_weight_norm,
    pair,
)
from torch import nn  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.nn.utils import parametrizations, rnn  # noqa: E402

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Between(nn.Module):
    """Linear, LSTM, Linear."""

    def __init__(self, **options):
        super().__init__()
        self.first = nn.Linear(D, D)
        self.inner = fastlstm.nn.LSTM(D, H, **options)
        directions = 2 if self.inner.bidirectional else 1
        self.slots = self.inner.num_layers * directions
        self.sizes = (self.inner.proj_size or H, H)
        self.last = nn.Linear(directions * self.sizes[0], 2)

    def forward(self, x, hx=None):
        y, state = self.inner(self.first(x), hx)
        return self.last(y), state

    def state(self, *batch, dtype=F32):
        """h0 and c0."""
        return tuple(leaf(self.slots, *batch, n, dtype=dtype, seed=n) for n in self.sizes)


def train(f, model, *inputs):
    """The results of f, and the gradients of inputs and of the parameters of `model`."""
    torch.manual_seed(0)  # for dropout
    results = f(*inputs)
    outputs = [t for t in flatten(results) if t is not None and t.is_floating_point()]
    leaves = [t for t in flatten(inputs) if t is not None and t.requires_grad]
    incoming = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in outputs]
    return results, torch.autograd.grad(
        outputs, [*leaves, *model.parameters()], incoming, allow_unused=True
    )


def compiled(model, backend="aot_eager", **options):
    """The model compiled, and the counter of its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, **options), counter


def no_more_graphs():
    return torch.compiler.set_stance("fail_on_recompile")


def layers_in(graph_module):
    """How many nodes of ours a graph has; it must have no LSTM of another kind."""
    nodes = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    ours = [node for node in nodes if str(node.target).startswith("fastlstm.layer")]
    assert not any("lstm" in str(node.target) for node in nodes if node not in ours)
    return len(ours)


# --- torch.compile -------------------------------------------------------------------------------

GRAPHS = {
    "plain": ({}, False),
    "state, batch first": ({"batch_first": True}, True),
    "no bias": ({"bias": False}, False),
    "two layers, two directions, dropout": (
        {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
        False,
    ),
    "state, projection": ({"num_layers": 2, "proj_size": 3, "bidirectional": True}, True),
    "float64": ({"dtype": F64}, False),
    "state, bfloat16": ({"dtype": BF16, "num_layers": 2}, True),
}


@pytest.mark.parametrize("options, with_state", GRAPHS.values(), ids=GRAPHS)
def test_one_graph(options, with_state):
    """Training and inference: no break, and T and N cost one compilation each when they change."""
    torch.manual_seed(0)
    dtype = options.get("dtype", F32)
    model = Between(**options).to(dtype)
    f, counter = compiled(model, fullgraph=True)

    def inputs(steps, batch):
        time_and_batch = (batch, steps) if model.inner.batch_first else (steps, batch)
        x = leaf(*time_and_batch, D, dtype=dtype)
        return (x, model.state(batch, dtype=dtype)) if with_state else (x,)

    for count, sizes in enumerate([(T, N), (T + 1, N), (T + 1, N + 1)], 1):
        assert_close(train(f, model, *inputs(*sizes)), train(model, model, *inputs(*sizes)))
        assert counter.frame_count <= count
    assert layers_in(counter.graphs[0]) == model.inner.num_layers
    with no_more_graphs():
        for sizes in [(T + 4, N + 2), (2, N + 7), (T, N)]:
            assert_close(train(f, model, *inputs(*sizes)), train(model, model, *inputs(*sizes)))
    model.eval()
    with torch.no_grad():
        assert_close(f(*inputs(T, N)), model(*inputs(T, N)))
        with no_more_graphs():
            assert_close(f(*inputs(T + 2, N + 2)), model(*inputs(T + 2, N + 2)))


NOT_SET = """
import sys, torch
from torch import nn
{before}
import fastlstm.nn
assert ("torch._dynamo" in sys.modules) == {loaded}
model = nn.Sequential(nn.Linear(4, 4), fastlstm.nn.LSTM(4, 5))
x = torch.randn(6, 3, 4)
y, _ = torch.compile(model, fullgraph=True, backend="eager")(x)
assert torch.equal(y, model(x)[0])
assert not torch._dynamo.config.allow_rnn
assert not any("_AfterImport" in repr(finder) for finder in sys.meta_path)
try:
    torch.compile(nn.LSTM(4, 5), fullgraph=True, backend="eager")(x)
except torch._dynamo.exc.Unsupported:
    print("refused")
"""


@pytest.mark.parametrize("loaded", [False, True], ids=["compiler later", "compiler first"])
def test_nothing_need_be_set(loaded):
    """And torch's own modules compile as they did, which is not at all."""
    code = NOT_SET.format(before="import torch._dynamo" if loaded else "", loaded=loaded)
    assert stdout_of(run_python(code, timeout=120)) == "refused"


def test_on_other_devices_dynamo_does_as_it_did():
    """The kernels have no part in such a call, and torch's own would be taken to pieces."""
    model = fastlstm.nn.LSTM(D, H, device="meta")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"LSTM|DelayGraphBreakVariable"):
        torch.compile(model, fullgraph=True, backend="eager")(torch.ones(T, N, D, device="meta"))


def test_other_internals_of_torch_are_left_alone():
    class Builder:
        def wrap_module(self, value):
            return value

    before = Builder.wrap_module
    for missing in ({"VariableBuilder": Builder}, {"config": torch._dynamo.config}, {}):
        _dynamo._wrap(types.SimpleNamespace(**missing), fastlstm.nn.LSTM, ["cpu"])
    config = types.SimpleNamespace(patch=None)
    module = types.SimpleNamespace(VariableBuilder=Builder, config=config)
    _dynamo._wrap(module, fastlstm.nn.LSTM, ["cpu"])
    assert Builder.wrap_module is before


def compile_in_place(model):
    model.compile(fullgraph=True, backend="eager")
    return model


WAYS = {
    "torch.compile": lambda m: torch.compile(m, fullgraph=True, backend="eager"),
    "model.compile": compile_in_place,
    "of a function": lambda m: torch.compile(lambda x: m(x), fullgraph=True, backend="eager"),
    "of the module itself": lambda m: torch.compile(m[0], fullgraph=True, backend="eager"),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_ways_to_compile_a_converted_model(way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(D, H, 2))
    x = leaf(T, N, D)
    expected = train(model, model, x)
    f = way(fastlstm.nn.convert(model))
    assert_close(train(f, model, x), expected)
    assert type(model[0]) is fastlstm.nn.LSTM


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode):
    model = Between(num_layers=2, bidirectional=True)
    f = torch.compile(model, fullgraph=True, mode=mode)
    for steps in (T, T + 1) if mode == "default" else (T,):
        inputs = leaf(steps, N, D), model.state(N)
        assert_close(train(f, model, *inputs), train(model, model, *inputs))
    with torch.no_grad():
        assert_close(f(*inputs), model(*inputs))


class Convolutional(nn.Module):
    """An encoder of sound: its LSTM gets channels before time, transposed."""

    def __init__(self):
        super().__init__()
        self.before = nn.Sequential(
            nn.Conv1d(5, 60, 5), nn.MaxPool1d(3), nn.InstanceNorm1d(60, affine=True), nn.LeakyReLU()
        )
        self.inner = fastlstm.nn.LSTM(60, 32, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.inner(self.before(x).transpose(1, 2))[0]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_inductor_behind_a_transpose(one_thread):
    """The kernels that inductor (2.13) makes to read dx through the transpose would be wrong."""
    torch.manual_seed(0)
    model = Convolutional()
    f = torch.compile(model, fullgraph=True)
    x, found = torch.randn(2, 5, 349), []
    for run in (f, model):
        model.zero_grad()
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    scale = found[1][0].abs().max().item()  # the bias beside it has a gradient of zero
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * scale)


def test_weights_are_read_anew():
    model = Between()
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    f, _ = compiled(model, fullgraph=True)
    x = leaf(T, N, D)
    f(x)
    with no_more_graphs():
        for _ in range(2):
            optimizer.zero_grad()
            f(x)[0].square().sum().backward()
            optimizer.step()
            assert_close(f(x), model(x))
        model.load_state_dict(other.state_dict())
        assert_close(f(x), other(x))
        for p in model.inner.parameters():
            p.data.copy_(torch.randn_like(p))
        assert_close(f(x), model(x))


# Dynamo looks at the .grad of every tensor that it finds.
looks_at_grad = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@looks_at_grad
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, nn.utils.weight_norm], ids=["parametrized", "hooked"]
)
def test_weight_norm(norm):
    torch.manual_seed(0)
    model = norm(fastlstm.nn.LSTM(D, H), "weight_hh_l0")
    f, counter = compiled(model, fullgraph=True)
    x = leaf(T, N, D)
    assert_close(train(f, model, x), train(model, model, x))
    assert layers_in(counter.graphs[0]) == 1


class Loop(nn.Module):
    """A cell in a loop over time."""

    def __init__(self):
        super().__init__()
        self.cell = fastlstm.nn.LSTMCell(D, H)

    def forward(self, x, state=None):
        outputs = []
        for step in x.unbind():
            state = self.cell(step, state)
            outputs.append(state[0])
        return torch.stack(outputs), state


def test_cell_in_a_loop():
    torch.manual_seed(0)
    model = Loop()
    f, counter = compiled(model, fullgraph=True)
    for batch in (N, N + 1, N + 4):
        inputs = [leaf(3, batch, D)]
        assert_close(train(f, model, *inputs), train(model, model, *inputs))
        inputs.append((leaf(batch, H), leaf(batch, H, seed=1)))
        assert_close(train(f, model, *inputs), train(model, model, *inputs))
    assert counter.frame_count <= 4  # two without a state, two with one
    assert layers_in(counter.graphs[0]) == 3


def test_a_cell_in_half_precision_without_a_batch():
    model = Loop().to(BF16)
    f, _ = compiled(model, fullgraph=True)
    inputs = leaf(2, D, dtype=BF16), (leaf(H, dtype=BF16), leaf(H, dtype=BF16, seed=1))
    assert_close(train(f, model, *inputs), train(model, model, *inputs))


def test_without_a_batch():
    model = Between(num_layers=2, bidirectional=True, batch_first=True)
    f, counter = compiled(model, fullgraph=True)
    for steps in (T, T + 1, T + 5):
        inputs = leaf(steps, D), model.state()
        assert_close(train(f, model, *inputs), train(model, model, *inputs))
    assert counter.frame_count <= 2


def test_autocast():
    """In and out of the compiled region, and switched on after it was compiled."""
    model = Between(num_layers=2)
    f, counter = compiled(model, fullgraph=True)
    x = leaf(T, N, D)

    def inside(x):
        with torch.autocast("cpu", torch.float16):
            return model(x)

    for enabled in (False, True, False, True):
        with torch.autocast("cpu", BF16, enabled=enabled):
            assert_close(train(f, model, x), train(model, model, x))
    assert counter.frame_count == 2
    g, _ = compiled(inside, fullgraph=True)
    assert_close(train(g, model, x), train(inside, model, x))


@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
def test_a_batch_of_unknown_size_under_autocast(dtype):
    model = fastlstm.nn.LSTM(D, H)

    def some(x, chosen):
        with torch.autocast("cpu", BF16), torch.no_grad():
            return model(x[:, torch.nonzero(chosen).squeeze(1)])[0]

    x, chosen = leaf(T, N, D, grad=False).to(dtype), torch.tensor([True, False, True])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        f, _ = compiled(some, fullgraph=True)
        assert_close(f(x, chosen), some(x, chosen))


def test_sizes_of_one_and_none():
    """Dynamo makes code of its own for a size of one, as of every model."""
    model = Between()
    f, counter = compiled(model, fullgraph=True)
    for sizes in [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (2, 2), (3, 3), (T, 0)]:
        x = leaf(*sizes, D)
        assert_close(train(f, model, x), train(model, model, x))
    assert layers_in(counter.graphs[0]) == 1


WRONG = {
    "no steps": lambda m: m(leaf(0, N, D)),
    "input size": lambda m: m(leaf(T, N, D + 1)),
    "4-D": lambda m: m(leaf(T, N, 1, D)),
    "dtype": lambda m: m(leaf(T, N, D, dtype=F64)),
    "one state": lambda m: m(leaf(T, N, D), (leaf(1, N, H),)),
    "state size": lambda m: m(leaf(T, N, D), (leaf(1, N + 1, H), leaf(1, N, H))),
    "2-D state": lambda m: m(leaf(T, N, D), (leaf(N, H), leaf(N, H))),
    "state dtype": lambda m: m(leaf(T, N, D), (leaf(1, N, H, dtype=F64), leaf(1, N, H))),
    "packed": lambda m: m(rnn.PackedSequence(leaf(5, D + 1), torch.tensor([3, 2]))),
    "batch sizes": lambda m: m(rnn.PackedSequence(leaf(5, D), torch.tensor([2, 3]))),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_errors_are_those_of_eager_calls(call):
    model = fastlstm.nn.LSTM(D, H)
    f = torch.compile(model, backend="eager")
    result = assert_same_outcome(lambda: call(f), lambda: call(model))
    assert issubclass(result[0], Exception)


def test_a_weight_of_a_wrong_shape():
    model = fastlstm.nn.LSTM(D, H)
    model.weight_hh_l0 = nn.Parameter(torch.zeros(4 * H, H - 1))
    f = torch.compile(model, backend="eager")
    assert_same_outcome(lambda: f(leaf(T, N, D)), lambda: model(leaf(T, N, D)))


@looks_at_grad
@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_func_grad_inside(cell):
    """The operators know no transforms, so it is as with torch's own modules."""
    model, _ = pair(D, H, cell=cell)
    x = leaf(N, D) if cell else leaf(T, N, D)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def grads(weights, x):
        def loss(weights):
            return torch.func.functional_call(model, weights, (x + 1,))[0].square().sum()

        return list(torch.func.grad(loss)(weights).values())

    assert_close(torch.compile(grads, backend="eager")(weights, x), grads(weights, x))


# --- packed sequences ----------------------------------------------------------------------------

LENGTHS = [[3, 6, 2], [2, 8, 5], [1, 9, 9, 3], [1, 2, 9, 9, 4]]


def pack(lengths, *, enforce_sorted=False, dtype=F32):
    if enforce_sorted:
        lengths = sorted(lengths, reverse=True)
    xs = [leaf(n, D, dtype=dtype, seed=k, grad=False) for k, n in enumerate(lengths)]
    packed = rnn.pack_sequence(xs, enforce_sorted=enforce_sorted)
    packed.data.requires_grad_()
    return packed


@pytest.mark.parametrize(
    "enforce_sorted, dtype", [(False, BF16), (True, F32)], ids=["unsorted", "sorted"]
)
def test_a_packed_argument_is_in_the_graph(enforce_sorted, dtype):
    """Where the batch is known without reading numbers: a state or sorted indices."""
    torch.manual_seed(0)
    model = fastlstm.nn.LSTM(D, H, 2, bidirectional=True, dtype=dtype)
    f, counter = compiled(model, fullgraph=True)

    def inputs(lengths):
        n = len(lengths)
        state = leaf(4, n, H, seed=1, dtype=dtype), leaf(4, n, H, seed=2, dtype=dtype)
        packed = pack(lengths, enforce_sorted=enforce_sorted, dtype=dtype)
        return (packed, state) if enforce_sorted else (packed,)

    for lengths in LENGTHS[:-1]:
        arguments = inputs(lengths)
        assert_close(train(f, model, *arguments), train(model, model, *arguments))
    assert layers_in(counter.graphs[0]) == 2
    with no_more_graphs():
        arguments = inputs(LENGTHS[-1])
        assert_close(train(f, model, *arguments), train(model, model, *arguments))


@pytest.mark.parametrize("capture", [False, True], ids=["break", "captured"])
def test_a_sorted_packed_argument_without_a_state(capture):
    """N stands in the numbers alone, where Dynamo breaks its graph unless told to go on."""
    model = fastlstm.nn.LSTM(D, H, 2)
    f, counter = compiled(model, fullgraph=capture)
    with torch._dynamo.config.patch(capture_scalar_outputs=capture):
        for lengths in LENGTHS:
            packed = pack(lengths, enforce_sorted=True)
            assert_close(train(f, model, packed), train(model, model, packed))
    assert layers_in(counter.graphs[-1]) == 2


class Packs(nn.Module):
    """Packs a padded batch, and pads the result."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(D, D)
        self.inner = fastlstm.nn.LSTM(D, H, batch_first=True)

    def forward(self, x, lengths):
        packed = rnn.pack_padded_sequence(
            self.first(x), lengths, batch_first=True, enforce_sorted=False
        )
        y, (h, _) = self.inner(packed)
        return rnn.pad_packed_sequence(y, batch_first=True)[0] * 2, h


@looks_at_grad
def test_packing_inside_the_model():
    """Dynamo breaks the graph at pack_padded_sequence and pad_packed_sequence, not at ours."""
    model = Packs()
    f, counter = compiled(model)
    for lengths in LENGTHS:
        x = leaf(len(lengths), max(lengths), D)
        lengths = torch.tensor(lengths)
        assert_close(train(f, model, x, lengths), train(model, model, x, lengths))
    assert any(layers_in(graph) for graph in counter.graphs)


# --- the operators -------------------------------------------------------------------------------


def operands(ragged=False, with_state=True, has_rows=True, **options):
    """What fastlstm::layer takes up to `directions`, and the batch sizes."""
    torch.manual_seed(0)
    module = fastlstm.nn.LSTM(D, H, **options)
    dtype = module.weight_ih_l0.dtype
    directions = 2 if module.bidirectional else 1
    sizes = (module.proj_size or H, H)
    weights = [w.detach().requires_grad_() for w in module.parameters()]
    batch_sizes = torch.tensor([3, 3, 2, 1]) if ragged else None
    x = leaf(*((9,) if ragged else (T, N)), D, dtype=dtype)
    if not has_rows:
        x = leaf(N, D, T, dtype=dtype).detach().permute(2, 0, 1).requires_grad_()
    starts = [leaf(directions, N, n, dtype=dtype, seed=n) for n in sizes]
    state = starts if with_state else [None, None]
    return [x, *state, weights, directions], batch_sizes


def detached(args):
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)


OPERANDS = {
    "plain": {"with_state": False},
    "state, no bias": {"bias": False},
    "two directions": {"bidirectional": True},
    "projection": {"proj_size": 3, "with_state": False},
    "ragged, two directions": {"ragged": True, "bidirectional": True},
    "bfloat16": {"dtype": BF16},
    "channels before time": {"has_rows": False},
}


@looks_at_grad
@pytest.mark.parametrize("options", OPERANDS.values(), ids=OPERANDS)
def test_operators(options):
    """torch's own checks of a registered operator: schema, fake results, autograd, tracing."""
    args, batch_sizes = operands(**options)
    layer, layer_backward = torch.ops.fastlstm.layer, torch.ops.fastlstm.layer_backward
    torch.library.opcheck(layer.default, (*args, True, batch_sizes))
    torch.library.opcheck(layer.default, (*args, False, batch_sizes))
    x, h0, c0, weights, directions = detached(args)
    y, _, c, *kept = layer(x, h0, c0, weights, directions, True, batch_sizes)
    needed = [True, h0 is not None, c0 is not None, *[True] * len(weights)]
    grads = [torch.ones_like(y), None, torch.ones_like(c)]
    torch.library.opcheck(
        layer_backward.default,
        (*grads, x, h0, c0, weights, y, kept, directions, needed, batch_sizes),
    )


@pytest.mark.parametrize("options", OPERANDS.values(), ids=OPERANDS)
def test_nothing_kept_costs_time_but_no_bits(options):
    args, batch_sizes = operands(**options)
    x, h0, c0, weights, _ = args
    leaves = [t for t in (x, h0, c0, *weights) if t is not None]

    def run(keep):
        y, h, c, *kept = torch.ops.fastlstm.layer(*args, keep, batch_sizes)
        assert bool(kept) == keep
        return [y, h, c, *torch.autograd.grad(y.square().sum() + c.sum() - h.sum(), leaves)]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", OPERANDS.values(), ids=OPERANDS)
def test_operators_check_what_they_get(options):
    """An exported program may be handed anything, and nothing checks it on the way."""
    args, batch_sizes = operands(**options)
    x, h0, c0, weights, directions = detached(args)
    layer = torch.ops.fastlstm.layer

    def refused(call=layer, match="x", **changed):
        good = {"x": x, "h0": h0, "c0": c0, "weights": weights, "directions": directions}
        with pytest.raises(RuntimeError, match=match):
            call(**{**good, "keep": True, "batch_sizes": batch_sizes} | changed)

    refused(x=x[..., 1:])
    refused(x=x.double())
    refused(x=x.half())
    refused(x=x.unsqueeze(0))
    refused(h0=x)
    refused(c0=None) if c0 is not None else refused(c0=x)
    refused(directions=3 - directions)
    refused(directions=0)
    refused(weights=weights[:-1])
    refused(weights=[])
    for k, weight in enumerate(weights):
        refused(weights=[*weights[:k], weight[1:], *weights[k + 1 :]])
        refused(weights=[*weights[:k], weight[0], *weights[k + 1 :]])
    if batch_sizes is None:
        refused(x=x[:0], match="sequence length to be larger than 0")
        refused(batch_sizes=torch.tensor([N] * T))
    else:
        refused(h0=None, c0=None)
        refused(batch_sizes=torch.tensor([4, 3, 2]))  # of four sequences, not three
        refused(batch_sizes=torch.tensor([3, 2, 3, 1]), match="batch_sizes")
        refused(batch_sizes=torch.tensor([3, 3]), match="batch_sizes")

    y, h, c, *kept = layer(x, h0, c0, weights, directions, True, batch_sizes)
    good = {"grad_y": y, "grad_h": h, "grad_c": c, "x": x, "h0": h0, "c0": c0, "weights": weights}
    good |= {"y": y, "kept": kept, "directions": directions, "batch_sizes": batch_sizes}
    good["needed"] = [True, False, False, *[True] * len(weights)]
    torch.ops.fastlstm.layer_backward(**good)
    for changed in (
        {"grad_y": y[1:]},
        {"grad_h": h[..., 1:]},
        {"grad_c": c.double()},
        {"y": y[1:]},
        {"kept": kept[:-1]},
        {"kept": []},
        {"kept": [kept[0][..., 1:], *kept[1:]]},
        {"x": x[..., 1:]},
        {"needed": good["needed"][1:]},
        {"needed": [*good["needed"], True]},
        *([{"needed": [True] * len(good["needed"])}] if h0 is None or c0 is None else []),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.fastlstm.layer_backward(**good | changed)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch's own doing
@pytest.mark.parametrize("module", [fastlstm.nn.LSTM(D, H), fastlstm.nn.LSTMCell(D, H)], ids=str)
def test_compiled_autograd(module):
    """A backward pass of eager calls that is compiled itself."""
    x = torch.randn(*((N,) if isinstance(module, nn.LSTMCell) else (T, N)), D, requires_grad=True)
    leaves = [x, *module.parameters()]
    expected = torch.autograd.grad(flatten(module(x))[0].square().sum(), leaves)
    loss = flatten(module(x))[0].square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    for tensor, right in zip(leaves, expected, strict=True):
        assert_close(tensor.grad, right)


# --- torch.export --------------------------------------------------------------------------------

DYNAMIC = torch.export.Dim.DYNAMIC

# What torch's exporters themselves warn of.
exports = pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning",
    "ignore:# The axis name:UserWarning",
    "ignore:# ONNX model has different number of inputs:UserWarning",
)


@exports
@pytest.mark.parametrize("strict", [False, True], ids=["export", "strict export"])
def test_export_keeps_one_node(strict):
    """One for each layer at any T and N; the program can be trained on."""
    ours, theirs = pair(D, H, 2, bidirectional=True)
    x = leaf(T, N, D)
    shapes = ({0: DYNAMIC, 1: DYNAMIC},)
    exported = torch.export.export(ours, (x,), dynamic_shapes=shapes, strict=strict)
    assert layers_in(exported) == 2
    assert layers_in(exported.run_decompositions()) == 2
    if not strict:
        ours = [node for node in exported.graph.nodes if "fastlstm" in str(node.target)]
        assert not any(node.args[5] for node in ours)  # nothing is kept for backward
    program = exported.module()
    for sizes in ((T, N), (3, 7), (50, 2)):
        x = leaf(*sizes, D)
        assert_close(train(program, program, x), train(theirs, theirs, x))


RELOAD = """
import sys, torch, fastlstm.nn
folder = sys.argv[1]
model = torch.export.load(folder + "/model.pt2").module()
inputs = torch.load(folder + "/inputs.pt")
torch.save([model(x) for x in inputs], folder + "/outputs.pt")
"""


def test_exported_programs_reload_from_disk(tmp_path):
    """In another process, which need only import fastlstm.nn."""
    ours, _ = pair(D, H, 2, batch_first=True)
    shapes = ({0: DYNAMIC, 1: DYNAMIC},)
    exported = torch.export.export(ours, (leaf(N, T, D, grad=False),), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "model.pt2")
    inputs = [leaf(*sizes, D, grad=False) for sizes in ((N, T), (7, 3), (2, 50))]
    torch.save(inputs, tmp_path / "inputs.pt")
    stdout_of(run_python(RELOAD, str(tmp_path), timeout=120))
    for actual, x in zip(torch.load(tmp_path / "outputs.pt"), inputs, strict=True):
        assert_close(actual, ours(x))


def test_export_of_cells_and_states():
    model = Loop()
    state = (leaf(N, H, grad=False), leaf(N, H, grad=False))
    shapes = {"x": {1: DYNAMIC}, "state": ({0: DYNAMIC}, {0: DYNAMIC})}
    exported = torch.export.export(model, (leaf(T, N, D), state), dynamic_shapes=shapes)
    assert layers_in(exported) == T
    inputs = leaf(T, N + 2, D), (leaf(N + 2, H, seed=1), leaf(N + 2, H, seed=2))
    assert_close(exported.module()(*inputs), model(*inputs))


class Unpacked(nn.Module):
    """Takes and gives the tensors of a PackedSequence."""

    def __init__(self, **options):
        super().__init__()
        self.inner = fastlstm.nn.LSTM(D, H, **options)

    def forward(self, data, batch_sizes, sorted_indices=None, unsorted_indices=None, hx=None):
        packed = rnn.PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices)
        y, state = self.inner(packed, hx)
        return y.data, state


def unpacked(lengths, kind, dtype=F32):
    """The arguments of Unpacked by name, and how their sizes may change."""
    packed = pack(lengths, enforce_sorted=kind != "unsorted", dtype=dtype)
    kwargs = {"data": packed.data.detach(), "batch_sizes": packed.batch_sizes}
    if kind == "unsorted":
        indices = packed.sorted_indices, packed.unsorted_indices
        kwargs |= {"sorted_indices": indices[0], "unsorted_indices": indices[1]}
    shapes = {name: {0: DYNAMIC} for name in kwargs}
    if kind == "sorted, state":
        n = len(lengths)
        kwargs["hx"] = leaf(4, n, H, seed=1, grad=False), leaf(4, n, H, seed=2, grad=False)
        shapes["hx"] = ({1: DYNAMIC}, {1: DYNAMIC})
    return kwargs, shapes


@pytest.mark.parametrize("kind", ["unsorted", "sorted", "sorted, state"])
def test_export_of_packed_sequences(kind):
    model = Unpacked(num_layers=2, bidirectional=True)
    kwargs, shapes = unpacked(LENGTHS[0], kind)
    exported = torch.export.export(model, (), kwargs, dynamic_shapes=shapes)
    assert layers_in(exported) == 2
    program = exported.module()
    for lengths in LENGTHS:
        kwargs, _ = unpacked(lengths, kind)
        assert_close(program(**kwargs), model(**kwargs))


# --- ONNX ----------------------------------------------------------------------------------------


def to_onnx(path, model, args=(), kwargs=None, dynamic_shapes=None):
    """Export with nothing special; return a function that runs the file, and its nodes."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(
        model,
        args,
        path,
        kwargs=kwargs,
        dynamo=True,
        dynamic_shapes=dynamic_shapes,
        verbose=False,
    )
    stored = onnx.load(path)
    onnx.checker.check_model(stored, full_check=True)
    assert {node.domain for node in stored.graph.node} == {""}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*inputs):
        arrays = [t.detach().numpy() for t in flatten(inputs) if t is not None]
        return [
            torch.from_numpy(a) for a in session.run(None, dict(zip(names, arrays, strict=True)))
        ]

    return run, [node.op_type for node in stored.graph.node]


ONNX = {
    "plain": ({}, False),
    "state, batch first": ({"batch_first": True}, True),
    "no bias, two directions": ({"bias": False, "bidirectional": True}, False),
    "state, two layers, two directions": ({"num_layers": 2, "bidirectional": True}, True),
}


@exports
@pytest.mark.parametrize("options, with_state", ONNX.values(), ids=ONNX)
def test_onnx(tmp_path, options, with_state):
    """The standard operator, once for each layer, with the same numbers at any T and N."""
    torch.manual_seed(0)
    model = Between(**options).eval()
    batch_first = model.inner.batch_first

    def inputs(steps, batch):
        x = leaf(*((batch, steps) if batch_first else (steps, batch)), D, grad=False)
        return (x, model.state(batch)) if with_state else (x,)

    shapes = {"x": {batch_first: "T", 1 - batch_first: "N"}}
    if with_state:
        shapes["hx"] = ({1: "N"}, {1: "N"})
    run, operators = to_onnx(tmp_path / "model.onnx", model, inputs(T, N), dynamic_shapes=shapes)
    assert operators.count("LSTM") == model.inner.num_layers
    for sizes in ((T, N), (1, 1), (3, 7), (50, 2)):
        with torch.no_grad():
            assert_close(run(*inputs(*sizes)), flatten(model(*inputs(*sizes))))


@exports
@pytest.mark.parametrize(("kind", "dtype"), [("unsorted", F32), ("sorted", torch.float16)])
def test_onnx_of_packed_sequences(tmp_path, kind, dtype):
    """The lengths go to the operator as its sequence_lens."""
    model = Unpacked(num_layers=2, bidirectional=True).eval().to(dtype)
    kwargs, shapes = unpacked(LENGTHS[0], kind, dtype)
    run, operators = to_onnx(tmp_path / "model.onnx", model, (), kwargs, shapes)
    assert operators.count("LSTM") == 2
    for lengths in [*LENGTHS, [1], [5, 5]]:
        kwargs, _ = unpacked(lengths, kind, dtype)
        with torch.no_grad():
            expected = flatten(model(**kwargs))
        for actual, right in zip(run(*kwargs.values()), expected, strict=True):
            tolerance = 1e-3 if dtype == torch.float16 else 1e-6  # an ULP of float16
            torch.testing.assert_close(actual, right, rtol=0, atol=tolerance)


@exports
def test_onnx_of_a_cell(tmp_path):
    model = Loop().eval()
    shapes = {"x": {1: "N"}, "state": ({0: "N"}, {0: "N"})}

    def inputs(batch):
        return leaf(2, batch, D), (leaf(batch, H, seed=1), leaf(batch, H, seed=2))

    run, operators = to_onnx(tmp_path / "model.onnx", model, inputs(N), dynamic_shapes=shapes)
    assert operators.count("LSTM") == 2
    for batch in (N, 1, 9):
        with torch.no_grad():
            assert_close(run(*inputs(batch)), flatten(model(*inputs(batch))))


class Halves(nn.Module):
    """An LSTM in half precision, without a batch, between casts."""

    def __init__(self):
        super().__init__()
        self.inner = fastlstm.nn.LSTM(D, H, dtype=torch.float16)

    def forward(self, x):
        y, (h, c) = self.inner(x.half())
        return y.float(), h.float(), c.float()


@exports
def test_onnx_of_half_precision_without_a_batch(tmp_path):
    """The operator is in float32, which every runtime has."""
    model = Halves().eval()
    x = leaf(T, D, grad=False)
    run, operators = to_onnx(tmp_path / "model.onnx", model, (x,), dynamic_shapes=({0: "T"},))
    assert operators.count("LSTM") == 1
    for steps in (T, 1, 20):
        x = leaf(steps, D, grad=False)
        for actual, expected in zip(run(x), model(x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)  # an ULP of float16


def test_onnx_has_no_projection(tmp_path):
    pytest.importorskip("onnxscript")
    model = Between(proj_size=3).eval()
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"proj_size: expected 0.*got 3"):
        torch.onnx.export(
            model, (leaf(T, N, D),), tmp_path / "model.onnx", dynamo=True, verbose=False
        )


# --- torch.fx and TorchScript --------------------------------------------------------------------


class Both(nn.Module):
    """An LSTM and a cell."""

    def __init__(self, modules=fastlstm.nn, prepare=lambda module: module):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = prepare(modules.LSTM(D, H, 2, batch_first=True))
        self.cell = prepare(modules.LSTMCell(H, 3))

    def forward(self, x, h, c):
        y, (h_n, c_n) = self.lstm(x, (h, c))
        z, _ = self.cell(y[:, 0])
        return y, h_n, c_n, z


def weight_normed(module):
    name = "weight_hh" if isinstance(module, nn.LSTMCell) else "weight_hh_l0"
    return parametrizations.weight_norm(module, name)


def old_weight_normed(module):
    return old_weight_norm(module, "weight_hh" + "_l0" * isinstance(module, nn.LSTM))


def hooked(module):
    module.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    return module


@pytest.mark.parametrize(
    "prepare", [lambda module: module, weight_normed, old_weight_normed, hooked]
)
def test_symbolic_trace(prepare):
    """A call of a module is one node, with its hooks inside, as one of torch's own is."""
    ours, theirs = (Both(modules, prepare) for modules in (fastlstm.nn, nn))
    inputs = leaf(N, T, D), leaf(2, N, H, seed=1), leaf(2, N, H, seed=2)
    traced, expected = (torch.fx.symbolic_trace(model) for model in (ours, theirs))
    assert str(traced.graph) == str(expected.graph)
    assert isinstance(traced.lstm, fastlstm.nn.LSTM)
    assert_close(train(traced, traced, *inputs), train(expected, expected, *inputs))


def test_symbolic_trace_looks_into_what_has_a_forward_of_its_own():
    class Residual(fastlstm.nn.LSTMCell):
        def forward(self, input, hx=None):
            return input + 1

    model = nn.Sequential(Residual(D, H))
    (node,) = (n for n in torch.fx.symbolic_trace(model).graph.nodes if n.op == "call_function")
    assert node.args[1] == 1


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch.jit.script needs Python < 3.14")
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_script(tmp_path):
    """TorchScript compiles torch's own modules in the place of ours, with their parameters."""
    model, theirs = Both(), Both(nn)
    inputs = leaf(N, T, D), leaf(2, N, H, seed=1), leaf(2, N, H, seed=2)
    weight = model.lstm.weight_hh_l0
    with pytest.warns(UserWarning, match=r"this LSTM(Cell)? is torch's own from now on"):
        scripted = torch.jit.script(model)
    assert type(model.lstm) is nn.LSTM and type(model.cell) is nn.LSTMCell
    assert_close(train(scripted, model, *inputs), train(theirs, theirs, *inputs))
    scripted.save(tmp_path / "model.pt")
    assert_close(torch.jit.load(tmp_path / "model.pt")(*inputs), theirs(*inputs))
    fastlstm.nn.convert(model)
    assert type(model.lstm) is fastlstm.nn.LSTM and model.lstm.weight_hh_l0 is weight
