"""fastlstm.nn beside torch.nn: the same results, gradients, errors and manners."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re
import sys

import numpy as np
import pytest
from helpers import run_python, stdout_of

torch = pytest.importorskip("torch", reason="tests of the torch side")

import fastlstm.nn  # noqa: E402 - needs torch
from helpers_torch import (  # noqa: E402
    F32,
    F64,
    TRANSFORMS,
    D,
    H,
    Marked,
    N,
    T,
    assert_close,
    assert_same,
    assert_same_outcome,
    backward,
    copy_of,
    every_dtype,
    flatten,
    leaf,
    outcome,
    pair,
    transposed,
)
from torch import nn  # noqa: E402
from torch.nn.utils import rnn  # noqa: E402

# --- results and gradients -----------------------------------------------------------------------

# layers, bidirectional, bias, layout
CONFIGS = list(
    itertools.product((1, 2, 3), (False, True), (True, False), ("time", "batch", "unbatched"))
)


def config_id(config):
    layers, bidirectional, bias, layout = config
    parts = [f"{layers}", "both" if bidirectional else "one", "bias" if bias else "no_bias", layout]
    return "-".join(parts)


two_configs = pytest.mark.parametrize(
    "config", [(1, False, True, "time"), (2, True, True, "batch")], ids=config_id
)


def inputs_for(config, dtype=F32, T=T, N=N):
    layers, bidirectional, _, layout = config
    slots = layers * (2 if bidirectional else 1)
    x = {"time": (T, N, D), "batch": (N, T, D), "unbatched": (T, D)}[layout]
    state = (slots, H) if layout == "unbatched" else (slots, N, H)
    return [leaf(*shape, dtype=dtype, seed=k) for k, shape in enumerate((x, state, state))]


def build(config, dtype=F32, **kwargs):
    layers, bidirectional, bias, layout = config
    return pair(
        D,
        H,
        layers,
        bidirectional=bidirectional,
        bias=bias,
        batch_first=layout == "batch",
        dtype=dtype,
        **kwargs,
    )


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
@every_dtype
def test_lstm_equals_torch(config, dtype):
    ours, theirs = build(config, dtype)
    x, *state = inputs_for(config, dtype)
    assert_same(ours, theirs, x, *state)
    assert_same(ours, theirs, x)
    with torch.no_grad():
        assert_close(ours(x, tuple(state)), theirs(x, tuple(state)))
    assert_close(ours(x, list(state)), theirs(x, list(state)))


@pytest.mark.parametrize(
    "sizes", [(1, 1, 64, 64), (1, 3, 17, 33), (35, 20, 65, 97), (100, 1, 1, 1)]
)
@every_dtype
def test_lstm_equals_torch_at_other_sizes(sizes, dtype):
    steps, batch, features, hidden = sizes
    ours, theirs = pair(features, hidden, dtype=dtype)
    assert_same(ours, theirs, leaf(steps, batch, features, dtype=dtype))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (33,)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (4, 5), (17, 64)], ids=str)
@every_dtype
def test_cell_equals_torch(bias, batch, sizes, dtype):
    features, hidden = sizes
    ours, theirs = pair(features, hidden, bias=bias, dtype=dtype, cell=True)
    x = leaf(*batch, features, dtype=dtype)
    h, c = (leaf(*batch, hidden, dtype=dtype, seed=k) for k in (1, 2))
    assert_same(ours, theirs, x, h, c)
    assert_same(ours, theirs, x)
    with torch.no_grad():
        assert_close(ours(x, (h, c)), theirs(x, (h, c)))


def test_cell_in_a_loop():
    ours, theirs = pair(D, H, cell=True)
    x = leaf(T, N, D)

    def run(cell):
        state = None
        for step in x:
            state = cell(step, state)
        return [state, torch.autograd.grad(state[0].sum(), [x, *cell.parameters()])]

    assert_close(run(ours), run(theirs))


@two_configs
def test_empty_batch(config):
    ours, theirs = build(config)
    inputs = inputs_for(config, N=0)
    assert_same(ours, theirs, *inputs)
    assert_same(ours, theirs, inputs[0])


def test_cell_empty_batch():
    ours, theirs = pair(D, H, cell=True)
    assert_same(ours, theirs, leaf(0, D), leaf(0, H), leaf(0, H))


@pytest.mark.parametrize("sizes", [(2, 0), (0, 3)], ids=str)
def test_cell_of_size_zero(sizes):
    ours, theirs = pair(*sizes, cell=True)
    x = leaf(N, sizes[0])
    assert_same_outcome(lambda: backward(ours, x), lambda: backward(theirs, x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@every_dtype
def test_nan_and_inf(value, dtype):
    ours, theirs = pair(D, H, 2, bidirectional=True, dtype=dtype)
    x = leaf(T, N, D, dtype=dtype, grad=False)
    clean = ours(x)[0].detach()
    x[2, 1, 3] = value
    assert_same(ours, theirs, x)
    others = ours(x)[0].detach()[:, [0, 2]]
    assert torch.equal(others, clean[:, [0, 2]])


def sliced(x):
    return torch.stack((x, torch.full_like(x, float("nan"))), -1)[..., 0]


def expanded(x):
    return x[:1].expand_as(x)


@pytest.mark.parametrize("layout", [transposed, sliced, expanded], ids=lambda f: f.__name__)
@two_configs
def test_non_contiguous_inputs(layout, config):
    ours, theirs = build(config)
    inputs = [layout(x.detach()) for x in inputs_for(config)]
    assert any(not x.is_contiguous() for x in inputs)
    assert_same(ours, theirs, *inputs)

    x = copy_of(inputs[0]).requires_grad_()
    grads = [torch.autograd.grad(m(layout(x))[0].sum(), x) for m in (ours, theirs)]
    assert_close(*grads)


def test_gradients_that_arrive_non_contiguous():
    ours, theirs = pair(D, H)
    x = leaf(T, N, D)

    def grads(module):
        y, (h, c) = module(x)
        incoming = [transposed(leaf(*t.shape, seed=k, grad=False)) for k, t in enumerate((y, h, c))]
        return torch.autograd.grad((y, h, c), [x, *module.parameters()], incoming)

    assert_close(grads(ours), grads(theirs))


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_only_some_outputs_are_used(which):
    """y, h_n and c_n: a gradient that never arrives counts as zeros."""
    ours, theirs = pair(D, H, 2)
    x, h, c = leaf(T, N, D), leaf(2, N, H, seed=1), leaf(2, N, H, seed=2)

    def grads(module):
        y, state = module(x, (h, c))
        outputs = (y, *state)
        return torch.autograd.grad(
            sum(outputs[k].square().sum() for k in which), [x, h, c, *module.parameters()]
        )

    assert_close(grads(ours), grads(theirs))


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_negative_views(cell):
    """The imaginary part of a conjugate shares memory with numbers of the other sign."""

    def negative(*shape):
        return torch._neg_view(leaf(*shape, grad=False))

    ours, theirs = pair(D, H, cell=cell)
    shapes = [(N, D), (N, H), (N, H)] if cell else [(T, N, D), (1, N, H), (1, N, H)]
    weights = {name: negative(*p.shape) for name, p in ours.named_parameters()}

    def run(module):
        x, h, c = (negative(*shape).requires_grad_() for shape in shapes)
        results = flatten(module(x, (h, c)))
        incoming = [negative(*t.shape) for t in results]
        grads = torch.autograd.grad(results, [x, h, c, *module.parameters()], incoming)
        return [results, grads, torch.func.functional_call(module, weights, (x,))]

    assert_close(run(ours), run(theirs))


NAMES = ["x", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]


@pytest.mark.parametrize(
    "wanted", [*([name] for name in NAMES), ["x", "weight_hh_l0"], []], ids=str
)
def test_only_some_gradients_are_wanted(wanted):
    ours, theirs = pair(D, H)

    def run(module):
        leaves = {"x": leaf(T, N, D), "h0": leaf(1, N, H, seed=1), "c0": leaf(1, N, H, seed=2)}
        leaves |= dict(module.named_parameters())
        for name, tensor in leaves.items():
            tensor.requires_grad_(name in wanted)
        y, (h, c) = module(leaves["x"], (leaves["h0"], leaves["c0"]))
        flags = [t.requires_grad for t in (y, h, c)]
        if not wanted:
            return [y, flags]
        loss = y.square().sum() + h.sum() + c.sum()
        return [y, flags, torch.autograd.grad(loss, [leaves[name] for name in wanted])]

    assert_close(run(ours), run(theirs))


def test_no_grad_and_inference_mode():
    ours, theirs = pair(D, H)
    x = leaf(T, N, D)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = ours(x)[0]
            assert not y.requires_grad
            assert_close(y, theirs(x)[0])
            assert y.is_inference() == theirs(x)[0].is_inference()


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
@pytest.mark.parametrize("wanted", ["input", "weights"])
def test_enable_grad_does_not_end_inference_mode(wanted, cell):
    ours, theirs = pair(D, H, cell=cell)
    x = leaf(N, D, grad=wanted == "input") if cell else leaf(T, N, D, grad=wanted == "input")
    for module in (ours, theirs):
        module.requires_grad_(wanted == "weights")
    with torch.inference_mode(), torch.enable_grad():
        found, expected = (flatten(module(x)) for module in (ours, theirs))
        assert_close(found, expected)
        assert not any(t.requires_grad for t in found) and all(t.is_inference() for t in found)


@pytest.mark.parametrize("bias", [False, True])
def test_a_cell_whose_bias_flag_changes(bias):
    """torch's counts at construction only."""
    ours, theirs = pair(D, H, cell=True, bias=not bias)
    ours.bias = theirs.bias = bias
    assert_same(ours, theirs, leaf(N, D))


def test_an_lstm_whose_layers_change():
    lstm = fastlstm.nn.LSTM(D, H, num_layers=2)
    lstm.num_layers = 1
    with pytest.raises(RuntimeError, match=r"num_layers, .*: expected .* 8 weights, got 4"):
        lstm(leaf(T, N, D))


def test_a_cell_without_the_biases_it_was_made_with():
    ours, theirs = pair(D, H, cell=True)
    for module in (ours, theirs):
        del module.bias_ih, module.bias_hh
    assert_same_outcome(lambda: ours(leaf(N, D)), lambda: theirs(leaf(N, D)))


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_gradients_accumulate(cell):
    ours, theirs = pair(D, H, cell=cell)
    x = leaf(N, D) if cell else leaf(T, N, D)
    for module in (ours, theirs):
        for _ in range(2):
            module(x)[0].sum().backward()
    for a, e in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a.grad, e.grad)


def test_rounding_is_no_coarser_than_torchs():
    """The terms of h are not added on top of the bias and x, which gave three times the error."""
    torch.manual_seed(0)
    ours = fastlstm.nn.LSTM(3, 300)
    theirs = fastlstm.nn.revert(copy.deepcopy(ours))
    x = torch.randn(20, 33, 3)
    with torch.no_grad():
        found, beside = ours(x)[0], theirs(x)[0]
        exact = theirs.double()(x.double())[0]
    assert (found - exact).square().mean() < 4 * (beside - exact).square().mean()


def test_eval_mode_backward():
    ours, theirs = pair(D, H, 2, dropout=0.5)
    assert_same(ours.eval(), theirs.eval(), leaf(T, N, D))


def test_several_calls_before_one_backward():
    """Each call has a tape of its own."""
    ours, theirs = pair(D, H)
    x, z = leaf(T, N, D), leaf(T + 3, N + 1, D, seed=1)

    def grads(module):
        first, second = module(x)[0], module(z)[0]
        return torch.autograd.grad(
            first.sum() + second.square().sum(), [x, z, *module.parameters()]
        )

    assert_close(grads(ours), grads(theirs))


def test_state_handed_from_call_to_call():
    """Truncated and full backpropagation through several calls."""
    ours, theirs = pair(D, H, 2)
    x = leaf(T, N, D)

    def run(module, detach):
        state, losses = None, []
        for part in x.split(2):
            y, state = module(part, state)
            losses.append(y.square().sum())
            if detach:
                state = tuple(s.detach() for s in state)
        return torch.autograd.grad(sum(losses), [x, *module.parameters()])

    for detach in (False, True):
        assert_close(run(ours, detach), run(theirs, detach))


# --- gradcheck -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [(1, False, True, "time"), (1, True, False, "unbatched"), (2, True, True, "batch")],
    ids=config_id,
)
def test_gradcheck_lstm(config):
    ours, _ = build(config, F64)
    names, parameters = zip(*ours.named_parameters(), strict=True)
    inputs = inputs_for(config, F64, T=3, N=2)

    def f(x, h, c, *weights):
        weights = dict(zip(names, weights, strict=True))
        return tuple(flatten(torch.func.functional_call(ours, weights, (x, (h, c)))))

    assert torch.autograd.gradcheck(f, (*inputs, *parameters), fast_mode=config[0] > 1)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_gradcheck_cell(bias):
    ours, _ = pair(D, H, bias=bias, cell=True, dtype=F64)
    names, parameters = zip(*ours.named_parameters(), strict=True)
    inputs = [leaf(2, size, dtype=F64, seed=size) for size in (D, H, H)]

    def f(x, h, c, *weights):
        weights = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(ours, weights, (x, (h, c)))

    assert torch.autograd.gradcheck(f, (*inputs, *parameters))


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_gradgradcheck(cell):
    ours, _ = pair(2, 2, cell=cell, dtype=F64)
    names, parameters = zip(*ours.named_parameters(), strict=True)
    shapes = [(2, 2), (2, 2), (2, 2)] if cell else [(2, 1, 2), (1, 1, 2), (1, 1, 2)]
    inputs = [leaf(*shape, dtype=F64, seed=k) for k, shape in enumerate(shapes)]

    def f(x, h, c, *weights):
        weights = dict(zip(names, weights, strict=True))
        return flatten(torch.func.functional_call(ours, weights, (x, (h, c))))[0]

    assert torch.autograd.gradgradcheck(f, (*inputs, *parameters))


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
@every_dtype
def test_double_backward_equals_torch(cell, dtype):
    """As in a gradient penalty."""
    ours, theirs = pair(D, H, cell=cell, dtype=dtype)
    x = leaf(N, D, dtype=dtype) if cell else leaf(T, N, D, dtype=dtype)

    def penalty(module):
        (g,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        return [
            g,
            torch.autograd.grad(g.square().sum(), [x, *module.parameters()], allow_unused=True),
        ]

    assert_close(penalty(ours), penalty(theirs), scale=4)


@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_one_tensor_in_two_places(cell, create_graph):
    """The same state as h0 and c0, one tensor as both biases: no gradient is counted twice."""
    x = leaf(N, D, dtype=F64) if cell else leaf(T, N, D, dtype=F64)
    state = leaf(N, H, dtype=F64) if cell else leaf(1, N, H, dtype=F64)

    def run(module):
        suffix = "" if cell else "_l0"
        setattr(module, f"bias_ih{suffix}", getattr(module, f"bias_hh{suffix}"))
        leaves = [x, state, *module.parameters()]
        loss = flatten(module(x, (state, state)))[0].square().sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=create_graph)
        if not create_graph:
            return grads
        return [grads, torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)]

    ours, theirs = pair(D, H, cell=cell, dtype=F64)
    assert_close(run(ours), run(theirs), scale=4)


@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_inputs_that_depend_on_each_other(cell, create_graph):
    """Each output is the next input, so x is a function of the state that comes with it."""
    start = leaf(N, D, dtype=F64) if cell else leaf(2, N, D, dtype=F64)

    def run(module):
        leaves = [start, *module.parameters()]
        x, state = start, None
        for _ in range(3):
            result = module(x, state)
            x, state = (result[0], result) if cell else result
        grads = torch.autograd.grad(x.square().sum(), leaves, create_graph=create_graph)
        if not create_graph:
            return grads
        return [grads, torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)]

    ours, theirs = pair(D, D, cell=cell, dtype=F64)
    assert_close(run(ours), run(theirs), scale=4)


# --- modules -------------------------------------------------------------------------------------


def test_subclasses():
    assert issubclass(fastlstm.nn.LSTM, nn.LSTM)
    assert issubclass(fastlstm.nn.LSTMCell, nn.LSTMCell)
    ours, theirs = pair(D, H, 2, dropout=0.25, bidirectional=True)
    assert repr(ours) == repr(theirs)
    assert ours.mode == "LSTM"
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert len(ours.all_weights) == len(theirs.all_weights)
    assert ours.flatten_parameters() is None
    cells = pair(D, H, cell=True)
    assert repr(cells[0]) == repr(cells[1])


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_initial_parameters_are_those_of_torch(cell, bias):
    name = "LSTMCell" if cell else "LSTM"
    kwargs = {} if cell else {"num_layers": 2, "bidirectional": True}
    parameters = []
    for module in (fastlstm.nn, nn):
        torch.manual_seed(7)
        parameters.append(list(getattr(module, name)(D, H, bias=bias, **kwargs).named_parameters()))
    ours, theirs = parameters
    assert [n for n, _ in ours] == [n for n, _ in theirs]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_state_dict_both_ways(cell):
    first, second = pair(D, H, cell=cell), pair(D, H, cell=cell, seed=1)
    for source, target in [(first[0], second[1]), (first[1], second[0])]:
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        target.load_state_dict(torch.load(buffer, weights_only=True))
        for (a, x), (b, y) in zip(
            source.state_dict().items(), target.state_dict().items(), strict=True
        ):
            assert a == b
            assert torch.equal(x, y)


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_pickle_and_deepcopy(cell):
    ours, theirs = pair(D, H, cell=cell)
    x = leaf(N, D) if cell else leaf(T, N, D)
    ours(x)[0].sum().backward()  # leaves nothing behind that cannot be pickled
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for twin in (
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours),
        torch.load(buffer, weights_only=False),
    ):
        assert type(twin) is type(ours)
        assert_same(twin, theirs, x)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert not twin(x)[0].any()
    assert_same(ours, theirs, x)


def test_dtype_changes():
    ours, theirs = pair(D, H)
    x = leaf(T, N, D, dtype=F64)
    assert_same(ours.double(), theirs.double(), x)
    assert_same(ours.float(), theirs.float(), x.float())


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_has_the_random_stream_of_torch(layers, p, bidirectional):
    ours, theirs = pair(D, H, layers, dropout=p, bidirectional=bidirectional)
    x = leaf(T, N, D)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        results.append([backward(module, x), backward(module, x), torch.rand(3)])
    assert_close(*results)
    assert_same(ours.eval(), theirs.eval(), x)


def test_the_state_is_not_a_view_that_writes_through():
    """h_n and c_n may be changed in place without changing y, as with nn.LSTM."""
    for batch_first in (False, True):
        ours, _ = pair(D, H, batch_first=batch_first)
        with torch.no_grad():
            y, (h, c) = ours(leaf(T, N, D))
            kept = y.clone()
            h.zero_()
            c.zero_()
            assert torch.equal(y, kept)


def test_inputs_are_not_changed():
    ours, _ = pair(D, H, 2, bidirectional=True)
    inputs = inputs_for((2, True, True, "time"))
    tensors = [*inputs, *ours.parameters()]
    kept = [t.detach().clone() for t in tensors]
    versions = [t._version for t in tensors]
    backward(ours, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    assert versions == [t._version for t in tensors]


@pytest.mark.parametrize("batch_first", [False, True])
def test_memory_layout_of_the_output(batch_first):
    """`.view()` on the output works wherever it works on that of nn.LSTM."""
    ours, theirs = pair(D, H, batch_first=batch_first, bidirectional=True)
    x = leaf(T, N, D)
    for a, e in zip(flatten(ours(x)), flatten(theirs(x)), strict=True):
        if e.is_contiguous():
            assert a.is_contiguous()


# --- weights that are replaced or changed --------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "after_a_step"])
def test_reparametrized_weights(transform, twice):
    modules = pair(D, H)
    results = []
    for module in modules:
        torch.manual_seed(5)
        transformed = transform(module, "weight_hh_l0")
        x = leaf(T, N, D)
        if twice:
            transformed(x)[0].square().sum().backward()
            with torch.no_grad():
                for p in transformed.parameters():
                    p -= 0.1 * p.grad
        results.append(backward(transformed, x))
    assert_close(*results)


def test_weights_written_through_data():
    """RL target networks: p.data.copy_() leaves no trace that a cache could see."""
    ours, theirs = pair(D, H)
    other, _ = pair(D, H, seed=1)
    x = leaf(T, N, D)
    ours(x)
    for module in (ours, theirs):
        for p, q in zip(module.parameters(), other.parameters(), strict=True):
            p.data.copy_(q.data)
    assert_same(ours, theirs, x)
    for module in (ours, theirs):
        for p in module.parameters():
            p.data = p.data * 2
    assert_same(ours, theirs, x)


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_parameters_replaced(cell):
    ours, theirs = pair(D, H, cell=cell)
    x = leaf(N, D) if cell else leaf(T, N, D)
    name = "weight_hh" if cell else "weight_hh_l0"
    for module in (ours, theirs):
        setattr(module, name, nn.Parameter(leaf(4 * H, H, seed=9, grad=False)))
    assert_same(ours, theirs, x)
    for module in (ours, theirs):
        delattr(module, name)
        setattr(module, name, transposed(leaf(4 * H, H, seed=10, grad=False)))
    assert_same(ours, theirs, x)


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_functional_call(cell):
    ours, theirs = pair(D, H, cell=cell)
    x = leaf(N, D) if cell else leaf(T, N, D)
    weights = {name: leaf(*p.shape, seed=k) for k, (name, p) in enumerate(ours.named_parameters())}

    def run(module):
        result = flatten(torch.func.functional_call(module, weights, (x,)))
        return [result, torch.autograd.grad(result[0].sum(), [x, *weights.values()])]

    assert_close(run(ours), run(theirs))
    assert_same(ours, theirs, x)  # the module's own weights are back


def test_weights_of_strange_layout():
    """Parameters that are views or not contiguous."""
    ours, theirs = pair(D, H)
    x = leaf(T, N, D)
    for layout in (transposed, sliced):
        for module in (ours, theirs):
            for p in module.parameters():
                p.data = layout(p.data)
        assert_same(ours, theirs, x)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_weights_replaced_by_a_wrong_shape(name):
    """nn.LSTM reads past the end of such weights; an error is the only right answer."""
    module, _ = pair(D, H)
    setattr(module, name, nn.Parameter(torch.zeros(3, *getattr(module, name).shape[1:])))
    with pytest.raises((RuntimeError, ValueError), match=rf"{name}.*20.*3"):
        module(leaf(T, N, D))


# --- autograd's own errors -----------------------------------------------------------------------


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_backward_twice(cell):
    x = leaf(N, D) if cell else leaf(T, N, D)

    def run(module):
        loss = module(x)[0].sum()
        loss.backward()
        loss.backward()

    ours, theirs = pair(D, H, cell=cell)
    kind, text = assert_same_outcome(lambda: run(ours), lambda: run(theirs))
    assert kind is RuntimeError
    assert "second time" in text


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_backward_twice_with_retain_graph(cell):
    ours, theirs = pair(D, H, cell=cell)
    x = leaf(N, D) if cell else leaf(T, N, D)

    def run(module):
        loss = module(x)[0].square().sum()
        return [torch.autograd.grad(loss, x, retain_graph=True) for _ in range(3)]

    first, second, third = run(ours)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[0], third[0])
    assert_close(run(ours), run(theirs))


@pytest.mark.parametrize("what", ["x", "h0", "c0", "weight_ih", "weight_hh", "output"])
@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_changes_in_place_before_backward(what, cell):
    """A gradient of other numbers than those of the forward pass is refused."""

    def run(module):
        x = leaf(N, D) if cell else leaf(T, N, D)
        h0, c0 = (leaf(N, H, seed=k) if cell else leaf(1, N, H, seed=k) for k in (1, 2))
        output = module(x, (h0, c0))[0]
        changed = {"x": x, "h0": h0, "c0": c0, "output": output}.get(what)
        if changed is None:
            changed = getattr(module, what if cell else what + "_l0")
        with torch.no_grad():
            changed.add_(1)
        return torch.autograd.grad(output.square().sum(), [x, h0, c0, *module.parameters()])

    ours, theirs = pair(D, H, cell=cell)
    expected, _ = outcome(lambda: run(theirs))
    actual, _ = outcome(lambda: run(ours))
    if cell and what == "output":  # no LSTMCell needs its output again: h[done] = 0 is common
        assert_close(actual, expected)
    else:
        for kind, text in (actual, expected):
            assert kind is RuntimeError
            assert "modified by an inplace operation" in text


def test_anomaly_mode_and_hooks():
    ours, theirs = pair(D, H)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        assert_same(ours, theirs, leaf(T, N, D))


# --- packed, projected, half precision, other devices --------------------------------------------


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences(enforce_sorted, bidirectional):
    ours, theirs = pair(D, H, 2, bidirectional=bidirectional)
    lengths = [T, 4, 2] if enforce_sorted else [2, T, 4]
    x = leaf(T, N, D)
    slots = 4 if bidirectional else 2
    state = leaf(slots, N, H, seed=1), leaf(slots, N, H, seed=2)

    def run(module, state):
        packed = rnn.pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
        y, (h, c) = module(packed, state)
        assert isinstance(y, rnn.PackedSequence)
        loss = y.data.square().sum() + h.sum() + c.sum()
        return [(y, (h, c)), torch.autograd.grad(loss, [x, *module.parameters()])]

    for hx in (None, state):
        assert_close(run(ours, hx), run(theirs, hx))


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


RAGGED = {
    "one step": [1],
    "one sequence": [7],
    "equal": [4, 4, 4],
    "steps": [9, 2, 1, 1, 1],
    "blocks": [20] * 3 + [11] * 5 + [2] * 9,
    "ramp": list(range(40, 0, -1)),
    "long": [400, 390, 3],
}
projected = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@projected
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("sizes", [(4, 5, 0), (13, 37, 11), (20, 150, 130)], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_ragged_batches_equal_torch(monkeypatch, lengths, sizes, bidirectional, restore_threads):
    D, H, P = sizes
    ours, theirs = pair(D, H, 2, proj_size=P, bidirectional=bidirectional, dtype=F64)
    order = np.random.default_rng(0).permutation(len(lengths)).tolist()
    xs = [leaf(lengths[k], D, dtype=F64, seed=k) for k in order]
    slots = 4 if bidirectional else 2
    state = [leaf(slots, len(lengths), size, dtype=F64, seed=size) for size in (P or H, H)]
    weighting = torch.from_numpy(
        np.random.default_rng(1).standard_normal((sum(lengths), (P or H) * (slots // 2)))
    )

    def run(module, hx):
        y, (h, c) = module(rnn.pack_sequence(xs, enforce_sorted=False), hx)
        loss = (y.data * weighting).sum() + (h * 1.3).sum() + c.square().sum()
        inputs = [*xs, *(hx or ()), *module.parameters()]
        return [y.data, h, c, *torch.autograd.grad(loss, inputs)]

    expected = [run(theirs, hx) for hx in (None, state)]
    monkeypatch.setattr(torch.nn.LSTM, "forward", None)  # no way back to torch's own path
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for hx, results in zip((None, state), expected, strict=True):
            assert_close(run(ours, hx), results)


def test_a_ragged_batch_is_its_sequences(restore_threads):
    """Bit for bit what each sequence gives on its own rows of a padded batch."""
    module = fastlstm.nn.LSTM(6, 20)
    lengths = [9, 7, 7, 4, 1]
    padded = torch.randn(9, 5, 6)
    packed = rnn.pack_padded_sequence(padded, lengths)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            y, (h, c) = module(packed)
            whole, _ = module(padded)
        y, _ = rnn.pad_packed_sequence(y)
        for n, length in enumerate(lengths):
            assert torch.equal(y[:length, n], whole[:length, n])
            assert torch.equal(h[0, n], whole[length - 1, n])
            assert not y[length:, n].any()
        results.append((y, h, c))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


STACKS = {
    "two layers": {"num_layers": 2},
    "five": {"num_layers": 5, "bias": False},
    "projections": {"num_layers": 3, "proj_size": 4},
    "two directions": {"num_layers": 3, "bidirectional": True, "batch_first": True},
    "all": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    "dropout": {"num_layers": 2, "dropout": 0.5},
}


@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("kind", ["dense", "no batch", "packed"])
@pytest.mark.parametrize("with_state", [False, True])
@every_dtype
def test_layers_at_once(options, kind, with_state, dtype, restore_threads, monkeypatch):
    """Without gradients one call runs all layers: the bits of one layer after the other."""
    module = fastlstm.nn.LSTM(7, 18, dtype=dtype, **options).eval()
    steps, batch = 100, 2
    slots = module.num_layers * (2 if module.bidirectional else 1)
    x = leaf(steps, 7, dtype=dtype) if kind == "no batch" else leaf(batch, steps, 7, dtype=dtype)
    if kind == "packed":
        x = rnn.pack_padded_sequence(x.detach(), [60, 100], True, enforce_sorted=False)
    elif not module.batch_first and kind == "dense":
        x = x.transpose(0, 1)
    one = () if kind == "no batch" else (batch,)
    sizes = (module.proj_size or 18, 18)
    state = tuple(leaf(slots, *one, n, dtype=dtype, seed=n) for n in sizes) if with_state else None
    expected = flatten(module(x, state))
    calls = []
    for name in ("infer", "run_layer"):
        call = getattr(fastlstm._core, name)
        spy = lambda *args, name=name, call=call: calls.append(name) or call(*args)  # noqa: E731
        monkeypatch.setattr(fastlstm.nn._core, name, spy)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        with torch.no_grad():
            found = flatten(module(x, state))
        for mine, right in zip(found, expected, strict=True):
            assert torch.equal(mine, right)
    assert calls == 4 * ["infer"]
    module.train()
    with torch.no_grad():
        module(x, state)
    assert calls[4:] == (["run_layer"] * 2 if module.dropout else ["infer"])  # it comes between


@pytest.mark.parametrize("sizes", [[], [2, 3], [3, 0], [3, 1], [5, 1, -1], [6, 6]], ids=str)
def test_packed_sequences_made_by_hand(sizes):
    packed = rnn.PackedSequence(torch.zeros(5, D), torch.tensor(sizes, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"input.batch_sizes: expected positive numbers"):
        fastlstm.nn.LSTM(D, H)(packed)


@pytest.mark.parametrize("sizes", [[[3, 2]], 5, [3.0, 2.0], [True, True]], ids=str)
def test_batch_sizes_that_are_no_list_of_integers(sizes):
    ours, theirs = pair(D, H)
    packed = rnn.PackedSequence(torch.zeros(5, D), torch.tensor(sizes))
    with pytest.raises((TypeError, IndexError, RuntimeError)):
        theirs(packed)
    with pytest.raises(RuntimeError, match=r"input.batch_sizes: expected shape \(T,\) and dtype"):
        ours(packed)


@projected
@pytest.mark.parametrize("create_graph", [False, True])
def test_double_backward_of_packed_and_projected(create_graph):
    ours, theirs = pair(D, H, proj_size=3, bidirectional=True, dtype=F64)
    xs = [leaf(n, D, dtype=F64, seed=n) for n in (5, 3, 1)]

    def run(module):
        y, _ = module(rnn.pack_sequence(xs))
        (grad,) = torch.autograd.grad(y.data.square().sum(), xs[0], create_graph=create_graph)
        if not create_graph:
            return grad
        return torch.autograd.grad(grad.square().sum(), [*xs, *module.parameters()])

    assert_close(run(ours), run(theirs))


@projected
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (T, N, D, H, 3),
        (1, 1, 9, 33, 32),
        (1, 5, 9, 37, 19),
        (3, 2, 5, 70, 1),
        (40, 19, 30, 130, 67),
    ],
    ids=str,
)
@every_dtype
def test_projections(bidirectional, bias, sizes, dtype, restore_threads):
    T, N, D, H, P = sizes
    ours, theirs = pair(D, H, 2, proj_size=P, bidirectional=bidirectional, bias=bias, dtype=dtype)
    slots = 4 if bidirectional else 2
    state = [leaf(slots, N, size, dtype=dtype, seed=size) for size in (P, H)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same(ours, theirs, leaf(T, N, D, dtype=dtype), *state)
        assert_same(ours, theirs, leaf(T, N, D, dtype=dtype))
        ours.zero_grad()
        ours(leaf(T, N, D, dtype=dtype), tuple(state))[0].square().sum().backward()
        results.append([w.grad.clone() for w in ours.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@projected
def test_gradcheck_packed_and_projected():
    module = fastlstm.nn.LSTM(2, 5, proj_size=3, bidirectional=True, dtype=F64)
    xs = [leaf(n, 2, dtype=F64, seed=n) for n in (4, 2, 2)]

    def run(*inputs):
        y, (h, c) = module(rnn.pack_sequence(inputs[:3]))
        return y.data, h, c

    assert torch.autograd.gradcheck(run, [*xs, *module.parameters()])


def in_float64(module, *inputs):
    """What the module computes in float64 from the same numbers, and the same gradients."""
    twin = copy.deepcopy(module).double()
    return flatten(backward(twin, *(x.detach().double().requires_grad_() for x in inputs)))


def assert_no_worse(actual, other, exact):
    """Same dtypes and shapes, and errors that are no larger than those of `other`, or rounding."""
    for mine, theirs, right in zip(*map(flatten, (actual, other)), exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        error, bound = ((t.double() - right).abs().max() for t in (mine, theirs))
        rounding = torch.finfo(mine.dtype).eps * right.abs().max()
        assert error <= max(bound, rounding)


HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_half_precision(dtype, cell):
    """Half in, half out, float32 between: no less exact than nn.LSTM, forward and backward."""
    ours, theirs = pair(20, 33, cell=cell, dtype=dtype)
    x = leaf(5, 20, dtype=dtype) if cell else leaf(12, 5, 20, dtype=dtype)
    state = [leaf(5, 33, dtype=dtype, seed=k) for k in (1, 2)]
    state = state if cell else [s.detach()[None].requires_grad_() for s in state]
    exact = in_float64(theirs, x, *state)
    assert_no_worse(backward(ours, x, *state), backward(theirs, x, *state), exact)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("forget", [2, 4, 6])
def test_half_precision_of_gates_near_one(dtype, forget):
    """Over many steps a forget gate of 0.998 must not be taken for 1."""
    ours, theirs = pair(8, 16, dtype=dtype)
    for module in (ours, theirs):
        with torch.no_grad():
            module.bias_ih_l0[16:32] = forget
    x = leaf(300, 4, 8, dtype=dtype)
    exact = in_float64(theirs, x)
    assert_no_worse(backward(ours, x), backward(theirs, x), exact)


@pytest.mark.parametrize("dtype", [*HALF, F32], ids=str)
@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_windows_that_overlap(dtype, cell):
    """Rows that share memory: Tensor.float() would not keep them apart."""
    ours, _ = pair(8, 5, cell=cell, dtype=dtype)
    signal = leaf(10, dtype=dtype)
    windows = [signal.unfold(0, 8, 1), signal.unfold(0, 8, 1).contiguous()]
    found = []
    for x in windows:
        y = flatten(ours(x))[0]
        found.append([y, *torch.autograd.grad(y.float().sum(), [signal, *ours.parameters()])])
        with torch.no_grad():
            found[-1].append(flatten(ours(x))[0])
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_half_precision_keeps_half(dtype, cell):
    """What is kept for backward takes half the memory too: 6 numbers a unit and step."""
    ours, _ = pair(20, 33, cell=cell, dtype=dtype)
    x = leaf(5, 20, dtype=dtype) if cell else leaf(12, 5, 20, dtype=dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        flatten(ours(x))[0].sum().backward()
    own = {t.data_ptr() for t in (x, *ours.parameters())}
    assert {t.dtype for t in saved} == {dtype}
    assert {t.data_ptr() for t in saved if t.data_ptr() in own} == own  # no copies
    of_steps = sum(t.numel() for t in saved if t.data_ptr() not in own)
    assert of_steps == (5 * 33 * 5 if cell else 12 * 5 * 33 * 6)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_of_packed_and_projected(dtype):
    ours, _ = pair(6, 9, 2, proj_size=4, bidirectional=True, dtype=dtype)
    xs = [leaf(n, 6, dtype=dtype, seed=n) for n in (7, 4, 1)]
    twin = copy.deepcopy(ours).double()
    y, (h, c) = ours(rnn.pack_sequence(xs))
    exact, states = twin(rnn.pack_sequence([x.detach().double() for x in xs]))
    assert {t.dtype for t in (y.data, h, c)} == {dtype}
    for mine, right in zip((y.data, h, c), (exact.data, *states), strict=True):
        assert (mine.double() - right).abs().max() <= torch.finfo(dtype).eps
    y.data.sum().backward()
    assert all(w.grad.dtype == dtype for w in ours.parameters())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("proj_size", [0, 9])
def test_half_precision_of_frozen_weights(dtype, proj_size):
    """Each gradient is the same whichever others are wanted, in either direction."""
    ours, _ = pair(20, 33, bidirectional=True, proj_size=proj_size, dtype=dtype)
    x = torch.randn(12, 5, 20).to(dtype)
    ours(x)[0].float().square().sum().backward()
    for name, weight in ours.named_parameters():
        ours.requires_grad_(False)
        weight.requires_grad_()
        expected, weight.grad = weight.grad, None
        ours(x)[0].float().square().sum().backward()
        assert torch.equal(weight.grad, expected), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("N", [1, 7])
@pytest.mark.parametrize("way", ["dense", "unbatched", "packed", "cell"])
def test_inference_in_half_precision_has_the_bits_of_training(dtype, N, way):
    """All layers in one call or each by itself: what lies between them is rounded likewise."""
    options = {"bidirectional": True, "proj_size": 9, "batch_first": True, "dtype": dtype}
    ours, _ = pair(20, 33, cell=True, dtype=dtype) if way == "cell" else pair(20, 33, 3, **options)
    states = [(N, 33)] * 2 if way == "cell" else [(6, N, 9), (6, N, 33)]
    x = torch.randn(*([N] if way == "cell" else [N, 12]), 20).to(dtype)
    hx = [torch.randn(shape).to(dtype) for shape in states]
    if way == "unbatched":
        x, hx = x[0], [state[:, 0].contiguous() for state in hx]
    if way == "packed":
        x = rnn.pack_padded_sequence(x, [12, 9, 9, 4, 2, 2, 1][:N], batch_first=True)
    trained = flatten(ours(x, hx))
    with torch.no_grad():
        for found, expected in zip(flatten(ours(x, hx)), trained, strict=True):
            assert found is expected is None or torch.equal(found, expected)


def test_torch_without_its_exchange_table():
    """Before 2.10 torch had none; its tensors are then read attribute by attribute."""
    code = """
import torch, fastlstm.nn
from fastlstm import _core, _torch
_core.use_torch(torch.Tensor, torch.nn.Parameter, _torch.memory_of_a_step, None)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    theirs = torch.nn.LSTM(5, 7, num_layers=2, bidirectional=True, dtype=dtype)
    ours = fastlstm.nn.LSTM(5, 7, num_layers=2, bidirectional=True, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 5, dtype=dtype)
    weights = list(ours.parameters())
    fits = lambda x: _core.fits(x, None, weights, 5, 7, 0, 2, 2, False, 3, 0)
    others = {torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int16} - {dtype}
    assert fits(x) and not fits(x.to("meta")) and not any(fits(x.to(other)) for other in others)
    eps = torch.finfo(dtype).eps
    close = {} if eps < 1e-6 else {"rtol": 4 * eps, "atol": 4 * eps}
    for module in (theirs, ours):
        module(x)[0].square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), **close)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine.grad, other.grad, **close)
print("equal")
"""
    assert stdout_of(run_python(code)) == "equal"


def test_what_the_kernels_may_read():
    module = fastlstm.nn.LSTM(4, 5)
    weights = list(module.parameters())

    def fits(x, weights=weights, state=None):
        return fastlstm._core.fits(x, state, weights, 4, 5, 0, 1, 1, False, 3, 0)

    x, h = leaf(3, 2, 4), leaf(1, 2, 5)
    assert fits(x) and fits(x[:, 0]) and fits(x.transpose(0, 1)) and fits(x, state=[h, h])
    negative = torch._neg_view(x.detach())
    no_memory = torch._efficientzerotensor((3, 2, 4))
    for other in (
        *(
            negative,
            no_memory,
            x.double(),
            x.half(),
            x.to_sparse(),
            x.to("meta"),
            x.detach().numpy(),
        ),
        *(x[:0], x[:, :0], x[..., :3], x[0, 0], x[None], x.detach().as_subclass(Marked), None),
        x.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert not fits(other)
    for state in (
        h,
        [h],
        [h, h, h],
        [h, h.double()],
        [h, h[0]],
        [h, None],
        [h, h.expand(1, 2, 5)[:, :1]],
    ):
        assert not fits(x, state=state)
    for k, weight in enumerate(weights):
        data = weight.detach()
        wrong = [data.double(), torch._neg_view(data), data[:-1], None, data.numpy()]
        if data.dim() == 2:
            wrong.append(data.t().contiguous().t())
        for other in wrong:
            assert not fits(x, [*weights[:k], other, *weights[k + 1 :]])
    assert not fits(x, weights[:3]) and not fits(x, tuple(weights))
    half = [w.detach().half() for w in (x, *weights)]
    assert fits(half[0], half[1:]) and not fits(half[0].bfloat16(), half[1:])
    module(no_memory)  # through an operator, which finds memory there
    module(x)[0].backward(torch._efficientzerotensor((3, 2, 5)))
    assert not any(w.grad.any() for w in weights)


def test_gradients_of_a_subclass():
    ours, theirs = pair(4, 5)
    grad = torch.randn(3, 2, 5)
    for module in (ours, theirs):
        module(torch.ones(3, 2, 4))[0].backward(grad.as_subclass(Marked))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_meta_device(cell):
    ours, theirs = (module.to("meta") for module in pair(D, H, cell=cell))
    x = (leaf(N, D) if cell else leaf(T, N, D)).to("meta")
    result = assert_same_outcome(lambda: ours(x), lambda: theirs(x))
    assert flatten(result)[0].device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_cuda_device(cell):
    ours, theirs = (module.cuda() for module in pair(D, H, cell=cell))
    x = (leaf(N, D) if cell else leaf(T, N, D)).detach().cuda()

    def run(module):
        result = module(x)
        return [result, torch.autograd.grad(flatten(result)[0].sum(), list(module.parameters()))]

    assert_close(run(ours), run(theirs))
    with pytest.raises(RuntimeError):
        ours(x.cpu())


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(cell, dtype):
    """Dtypes of nn.LSTM, results no less exact. It has only the halves that the CPU has."""
    ours, theirs = pair(20, 33, cell=cell)
    x = leaf(5, 20) if cell else leaf(12, 5, 20)

    def run(module, x, *state):
        with torch.autocast("cpu", dtype):
            results = flatten(module(x, state or None))
        leaves = [x, *module.parameters()]
        return [*results, *torch.autograd.grad(results[0].float().sum(), leaves)]

    twin = copy.deepcopy(theirs).double()
    exact = x.detach().double().requires_grad_()
    results = flatten(twin(exact))
    exact = [*results, *torch.autograd.grad(results[0].sum(), [exact, *twin.parameters()])]
    mine = run(ours, x)
    try:
        assert_no_worse(mine, run(theirs, x), exact)
    except RuntimeError as error:
        has = f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported"
        assert "primitive" in str(error) and not getattr(torch.ops.mkldnn, has)()
        assert {t.dtype for t in mine[:3]} == {dtype} and {t.dtype for t in mine[3:]} == {F32}
        for one, right in zip(mine, exact, strict=True):
            assert (one - right).abs().max() <= 2 * torch.finfo(dtype).eps * right.abs().max()
        return
    lead = () if cell else (1,)
    for own, c_dtype in ((F32, dtype), (dtype, F32), (dtype, dtype)):
        state = [leaf(*lead, 5, 33, dtype=d, seed=k) for k, d in enumerate((F32, c_dtype))]
        args = (x.detach().to(own).requires_grad_(), *state)
        assert [t.dtype for t in run(ours, *args)] == [t.dtype for t in run(theirs, *args)]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", ["dense", "equal lengths", "ragged"])
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_under_autocast(dtype, bidirectional, proj_size, kind):
    """Those of nn.LSTM, wherever it has results: where oneDNN is not asked, c promotes."""
    ours, theirs = pair(D, H, 2, proj_size=proj_size, bidirectional=bidirectional)
    lengths = [T, T - 2, 1] if kind == "ragged" else [T] * N
    sizes = (proj_size or H, H)

    def run(module, x, state, training):
        with torch.autocast("cpu", dtype), torch.set_grad_enabled(training):
            return [t for t in flatten(module(x, state)) if t is not None]

    compared = 0
    for of_x, of_state, training in itertools.product(
        (F32, *HALF), (None, F32, *HALF), (False, True)
    ):
        x = leaf(T, N, D).detach().to(of_x)
        if kind != "dense":
            x = rnn.pack_padded_sequence(x, lengths)
        state = of_state and [
            leaf(4 if bidirectional else 2, N, size, dtype=of_state) for size in sizes
        ]
        mine = run(ours, x, state, training)
        try:
            expected = run(theirs, x, state, training)
        except RuntimeError:  # no instructions for it, or two halves of different dtypes
            continue
        compared += 1
        assert [t.dtype for t in mine] == [t.dtype for t in expected]
        for one, other in zip(mine, expected, strict=True):
            assert (one.float() - other.float()).abs().max() < 0.02
    assert compared


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_an_empty_batch_under_autocast(dtype):
    ours, theirs = pair(D, H)
    x = leaf(T, 0, D, grad=False)

    def run(module):
        with torch.autocast("cpu", dtype):
            return [t.dtype for t in flatten(module(x))]

    assert run(ours) == run(theirs)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_autocast_where_onednn_is_switched_off():
    ours, theirs = pair(D, H)
    with torch.backends.mkldnn.flags(enabled=False), torch.autocast("cpu", torch.bfloat16):
        found, expected = (flatten(m(leaf(T, N, D))) for m in (ours, theirs))
    assert [t.dtype for t in found] == [t.dtype for t in expected]


def test_autocast_leaves_float64_alone():
    ours, theirs = pair(D, H, dtype=F64)
    x = leaf(T, N, D, dtype=F64)

    def run(module):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    assert_same_outcome(lambda: run(ours), lambda: run(theirs))


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    ours, theirs = pair(D, H, 2)
    x = leaf(T, N, D)

    def grads(module):
        y, _ = checkpoint(module, x, use_reentrant=False)
        return torch.autograd.grad(y.square().sum(), [x, *module.parameters()])

    assert_close(grads(ours), grads(theirs))


def test_saved_tensor_hooks():
    """Such as those that move what backward needs elsewhere."""
    ours, theirs = pair(D, H, 2, bidirectional=True)
    with torch.autograd.graph.save_on_cpu():
        assert_same(ours, theirs, leaf(T, N, D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["strides", "negative"])
@pytest.mark.parametrize("what", ["layers", "projection", "packed", "cell"])
def test_saved_tensor_hooks_that_change_the_layout(what, layout, dtype):
    config = {"num_layers": 2, "bidirectional": True, "proj_size": 2 * (what == "projection")}
    module = fastlstm.nn.LSTMCell(D, H) if what == "cell" else fastlstm.nn.LSTM(D, H, **config)
    module.to(dtype)

    def grads(unpack):
        x = leaf(T, N, D).detach().to(dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            if what == "cell":
                state = module(x[0], module(x[1]))
                loss = state[0].square().sum() + state[1].sum()
            else:
                packed = rnn.pack_padded_sequence(x, [T, T - 1, 1]) if what == "packed" else x
                y, (h, c) = module(packed)
                loss = (y.data if what == "packed" else y).square().sum() + h.sum() + c.sum()
        return torch.autograd.grad(loss, [x, *module.parameters()])

    def other_layout(tensor):
        if not tensor.is_floating_point():  # indices, of torch's own nodes
            return tensor
        if layout == "negative":  # memory that holds the numbers negated
            return torch._neg_view(-tensor)
        backwards = tuple(reversed(range(tensor.dim())))
        other = tensor.permute(backwards).contiguous().permute(backwards)
        return torch.stack([other, other], -1)[..., 0] if tensor.dim() else other

    expected, found = grads(lambda tensor: tensor), grads(other_layout)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


UNFIT = {
    "dtype": lambda tensor: tensor.double(),
    "half": lambda tensor: tensor.half(),
    "no dimension": lambda tensor: tensor.sum(),
    "one dimension": lambda tensor: tensor.flatten(),
    "a dimension more": lambda tensor: tensor[None],
    "shorter": lambda tensor: tensor[:1],
    "longer": lambda tensor: tensor.repeat(2, *[1] * (tensor.dim() - 1)),
    "narrower": lambda tensor: tensor[..., :1],
    "empty": lambda tensor: tensor[..., :0],
    "of no memory": lambda tensor: tensor.to("meta"),
}


@pytest.mark.parametrize("unfit", UNFIT)
@pytest.mark.parametrize("cell", [False, True])
def test_saved_tensor_hooks_that_give_back_what_does_not_fit(cell, unfit):
    """For each tensor in turn, and for all at once."""
    module = (fastlstm.nn.LSTMCell if cell else fastlstm.nn.LSTM)(D, H)
    x = leaf(N, D) if cell else leaf(T, N, D)
    states = tuple(leaf(*([] if cell else [1]), N, H, seed=k) for k in (1, 2))

    def loss(unpack):
        saved = []

        def pack(tensor):
            saved.append(tensor.detach())
            return len(saved) - 1, tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return module(x, states)[0].sum(), saved

    changed = UNFIT[unfit]
    _, saved = loss(lambda packed: packed[1])
    places = [
        place
        for place, tensor in enumerate(saved)
        if changed(tensor).shape != tensor.shape or unfit in ("dtype", "half", "of no memory")
    ]
    assert len(places) >= 4
    for wrong in (*([place] for place in places), places):
        total, _ = loss(
            lambda packed, wrong=wrong: changed(packed[1]) if packed[0] in wrong else packed[1]
        )
        refused = "expected in the backward pass|expected a tensor of floats"
        with pytest.raises((RuntimeError, TypeError), match=refused):
            total.backward()


@pytest.mark.parametrize("cell", [False, True])
def test_other_data_between_forward_and_backward(cell):
    """nn.LSTM raises too; nn.LSTMCell keeps views of the weights before."""
    module = (fastlstm.nn.LSTMCell if cell else fastlstm.nn.LSTM)(D, H)
    x = leaf(N, D) if cell else leaf(T, N, D)
    for change in (module.double, lambda: setattr(module.float().weight_hh, "data", x.new_ones(1))):
        if not cell:
            module.weight_hh = module.weight_hh_l0
        loss = module.float()(x)[0].sum()
        change()
        with pytest.raises(RuntimeError, match=r"weight_.*expected in the backward pass"):
            loss.backward()


def test_other_data_between_layers():
    """Set by a hook that saves what the layer below keeps."""
    module = fastlstm.nn.LSTM(D, H, 2)

    def pack(tensor):
        module.weight_hh_l1.data = torch.zeros(4)
        return tensor

    x = leaf(T, N, D)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        pytest.raises(RuntimeError, match="weight_hh: expected as it was when the call began"),
    ):
        module(x)


def test_a_state_that_unpacks_to_others():
    class State(tuple):
        def __iter__(self):
            return iter((torch.ones(1), torch.ones(1)))

    ours, theirs = pair(D, H)
    state = State((leaf(1, N, H), leaf(1, N, H)))
    assert_same_outcome(lambda: ours(leaf(T, N, D), state), lambda: theirs(leaf(T, N, D), state))


@pytest.mark.parametrize("offset", [0, 1000, 4_000_000])  # the last in or past the program
@pytest.mark.parametrize("cell", [False, True])
def test_weights_that_lost_their_memory(cell, offset):
    """An error, where torch's own modules end the process."""
    module = (fastlstm.nn.LSTMCell if cell else fastlstm.nn.LSTM)(D, H)
    x = leaf(N, D) if cell else leaf(T, N, D)
    weight = next(module.parameters())
    flat = torch.cat([torch.zeros(offset), weight.detach().flatten()])
    weight.data = flat[offset:].view_as(weight)  # as FSDP has them
    loss = module(x)[0].sum()
    flat.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="expected a tensor of floats"):
        loss.backward()
    with pytest.raises(TypeError, match="expected a tensor of floats"):
        module(x)
    with torch.no_grad(), pytest.raises(TypeError, match="expected a tensor of floats"):
        module(x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace():
    ours, theirs = pair(D, H, 2)
    traced = torch.jit.trace(ours, leaf(T, N, D, grad=False))
    assert_same(traced, theirs, leaf(T, N, D, seed=1))


def test_tensor_subclasses():
    """The result is of the subclass again."""
    ours, theirs = pair(D, H)
    x = leaf(T, N, D, grad=False).as_subclass(Marked)
    assert_same_outcome(lambda: ours(x), lambda: theirs(x))


def test_shared_memory():
    """Weights in memory that processes share."""
    ours, theirs = pair(D, H)
    ours.share_memory()
    theirs.share_memory()
    assert_same(ours, theirs, leaf(T, N, D))


# --- errors --------------------------------------------------------------------------------------

CONSTRUCTOR_ERRORS = [
    (0, H),
    (D, 0),
    (D, H, 0),
    (-1, H),
    (1.5, H),
    (D, 2.0),
    (D, H, 1, 1),
    (D, H, 1, True, 1),
    (D, H, 2, True, False, 1.5),
    (D, H, 2, True, False, -0.1),
    (D, H, 2, True, False, True),
    (D, H, 2, True, False, "half"),
    (D, H, 1, True, False, 0.5),  # a warning
    (D, H, 1, True, False, 0.0, False, -1),
    (D, H, 1, True, False, 0.0, False, H),
    (D, H, 1, True, False, 0.0, False, 1.5),
    (D,),
    (),
    ("4", H),
]


def type_and_text(f):
    """The error of f (or None), without class names that must differ, and its warnings."""
    result, caught = outcome(f)
    if isinstance(result, tuple) and isinstance(result[0], type):
        return result, caught
    return None, caught


@pytest.mark.parametrize("args", CONSTRUCTOR_ERRORS, ids=str)
def test_constructor_errors(args):
    expected = type_and_text(lambda: nn.LSTM(*args))
    assert expected != (None, [])
    assert type_and_text(lambda: fastlstm.nn.LSTM(*args)) == expected


@pytest.mark.parametrize(
    "args", [(), (D,), ("4", H), (1.5, H), (-1, H), (D, -1), (2**40, 2**40)], ids=str
)
def test_cell_constructor_errors(args):
    expected = type_and_text(lambda: nn.LSTMCell(*args))
    assert expected != (None, [])
    assert type_and_text(lambda: fastlstm.nn.LSTMCell(*args)) == expected


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


S = (2, N, H)  # the state of two layers
LSTM_CALLS = {
    "rank 1": lambda m: m(zeros(D)),
    "rank 0": lambda m: m(torch.tensor(1.0)),
    "rank 4": lambda m: m(zeros(1, T, N, D)),
    "input size": lambda m: m(zeros(T, N, D + 3)),
    "input size 0": lambda m: m(zeros(T, N, 0)),
    "input size, unbatched": lambda m: m(zeros(T, D + 3)),
    "time 0": lambda m: m(zeros(0, N, D)),
    "time 0, unbatched": lambda m: m(zeros(0, D)),
    "time 0, batch 0": lambda m: m(zeros(0, 0, D)),
    "dtype": lambda m: m(zeros(T, N, D, dtype=F64)),
    "dtype int": lambda m: m(zeros(T, N, D, dtype=torch.int64)),
    "dtype half": lambda m: m(zeros(T, N, D, dtype=torch.float16)),
    "dtype complex": lambda m: m(zeros(T, N, D, dtype=torch.complex64)),
    "device": lambda m: m(zeros(T, N, D, device="meta")),
    "device of hx": lambda m: m(zeros(T, N, D), (zeros(*S, device="meta"),) * 2),
    "device of c": lambda m: m(zeros(T, N, D), (zeros(*S), zeros(*S, device="meta"))),
    "batch of h": lambda m: m(zeros(T, N, D), (zeros(2, N + 1, H), zeros(*S))),
    "batch of c": lambda m: m(zeros(T, N, D), (zeros(*S), zeros(2, N + 1, H))),
    "hidden of h": lambda m: m(zeros(T, N, D), (zeros(2, N, H + 1), zeros(*S))),
    "layers of h": lambda m: m(zeros(T, N, D), (zeros(1, N, H), zeros(1, N, H))),
    "rank of hx": lambda m: m(zeros(T, N, D), (zeros(2, H), zeros(2, H))),
    "rank of c": lambda m: m(zeros(T, N, D), (zeros(*S), zeros(2, H))),
    "rank of hx, unbatched": lambda m: m(zeros(T, D), (zeros(*S), zeros(*S))),
    "rank of h, unbatched": lambda m: m(zeros(T, D), (zeros(*S), zeros(2, H))),
    "size of h, unbatched": lambda m: m(zeros(T, D), (zeros(1, H), zeros(2, H))),
    "one state": lambda m: m(zeros(T, N, D), (zeros(*S),)),
    "one state, unbatched": lambda m: m(zeros(T, D), (zeros(2, H),)),
    "three states": lambda m: m(zeros(T, N, D), (zeros(*S),) * 3),
    "no states": lambda m: m(zeros(T, N, D), ()),
    "hx a stacked tensor": lambda m: m(zeros(T, N, D), zeros(2, *S)),
    "hx a tensor": lambda m: m(zeros(T, N, D), zeros(*S)),
    "hx of None": lambda m: m(zeros(T, N, D), (None, None)),
    "hx with None": lambda m: m(zeros(T, N, D), (zeros(*S), None)),
    "hx a number": lambda m: m(zeros(T, N, D), 3),
    "hx of arrays": lambda m: m(zeros(T, N, D), (np.zeros(S, "f4"),) * 2),
    "x an array": lambda m: m(np.zeros((T, N, D), "f4")),
    "x a list": lambda m: m([[[0.0] * D] * N] * T),
    "x None": lambda m: m(None),
    "no x": lambda m: m(),
    "too many arguments": lambda m: m(zeros(T, N, D), None, 1),
    "unknown argument": lambda m: m(zeros(T, N, D), state=None),
    "sparse x": lambda m: m(zeros(T, N, D).to_sparse()),
}


def comparable(text):
    """Addresses and the module's path differ; everything else must not."""
    text = re.sub(r"0x[0-9a-f]+", "0x", text)
    return re.sub(r"\b(fastlstm\.nn|torch\.nn\.modules\.rnn)\.", "", text)


@pytest.mark.parametrize("bad_call", LSTM_CALLS.values(), ids=LSTM_CALLS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_call_errors(bad_call, grad):
    ours, theirs = pair(D, H, 2)
    with torch.set_grad_enabled(grad):
        expected, _ = outcome(lambda: bad_call(theirs))
        actual, _ = outcome(lambda: bad_call(ours))
    assert isinstance(expected[0], type), "nn.LSTM accepts this call"
    assert isinstance(actual[0], type), "accepted"
    assert actual[0] is expected[0]
    assert comparable(actual[1]) == comparable(expected[1])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bad_call", ["time 0", "batch of h", "input size", "rank of hx"])
def test_call_errors_batch_first(bad_call, batch_first):
    ours, theirs = pair(D, H, 2, batch_first=batch_first)
    calls = LSTM_CALLS | {"time 0": lambda m: m(zeros(*((N, 0, D) if batch_first else (0, N, D))))}
    expected, _ = outcome(lambda: calls[bad_call](theirs))
    actual, _ = outcome(lambda: calls[bad_call](ours))
    assert isinstance(expected[0], type)
    assert actual == expected


@pytest.mark.parametrize("dtype", [F64, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_state_of_another_dtype(dtype, which):
    """nn.LSTM says "unsupported data type"; here the message names the argument and the dtypes."""
    ours, theirs = pair(D, H, 2)
    state = [zeros(*S), zeros(*S)]
    state[which] = state[which].to(dtype)
    with pytest.raises((RuntimeError, ValueError)):
        theirs(zeros(T, N, D), tuple(state))
    with pytest.raises((RuntimeError, ValueError)) as error:
        ours(zeros(T, N, D), tuple(state))
    for word in (f"hx[{which}]", "expected", "float32", "got", str(dtype)):
        assert word.lower() in str(error.value).lower()


C = (N, H)
CELL_CALLS = {
    "rank 3": lambda m: m(zeros(T, N, D)),
    "rank 0": lambda m: m(torch.tensor(1.0)),
    "input size": lambda m: m(zeros(N, D + 1)),
    "input size, unbatched": lambda m: m(zeros(D + 1)),
    "rank of h": lambda m: m(zeros(N, D), (zeros(1, N, H), zeros(*C))),
    "rank of c": lambda m: m(zeros(N, D), (zeros(*C), zeros(1, N, H))),
    "batch of h": lambda m: m(zeros(N, D), (zeros(N + 1, H), zeros(*C))),
    "batch of c": lambda m: m(zeros(N, D), (zeros(*C), zeros(N + 1, H))),
    "hidden of h": lambda m: m(zeros(N, D), (zeros(N, H + 1), zeros(*C))),
    "hidden of c": lambda m: m(zeros(N, D), (zeros(*C), zeros(N, H + 1))),
    "dtype": lambda m: m(zeros(N, D, dtype=F64)),
    "dtype int": lambda m: m(zeros(N, D, dtype=torch.int64)),
    "dtype of h": lambda m: m(zeros(N, D), (zeros(*C, dtype=F64), zeros(*C))),
    "device": lambda m: m(zeros(N, D, device="meta")),
    "device of hx": lambda m: m(zeros(N, D), (zeros(*C, device="meta"),) * 2),
    "one state": lambda m: m(zeros(N, D), (zeros(*C),)),
    "hx a tensor": lambda m: m(zeros(N, D), zeros(*C)),
    "hx with None": lambda m: m(zeros(N, D), (zeros(*C), None)),
    "hx a number": lambda m: m(zeros(N, D), 3),
    "x an array": lambda m: m(np.zeros((N, D), "f4")),
    "x None": lambda m: m(None),
    "no x": lambda m: m(),
}


@pytest.mark.parametrize("bad_call", CELL_CALLS.values(), ids=CELL_CALLS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_cell_call_errors(bad_call, grad):
    ours, theirs = pair(D, H, cell=True)
    with torch.set_grad_enabled(grad):
        expected, _ = outcome(lambda: bad_call(theirs))
        actual, _ = outcome(lambda: bad_call(ours))
    if not isinstance(expected[0], type):
        assert_close(actual, expected)  # nn.LSTMCell accepts some calls that look wrong
        return
    assert actual[0] is expected[0]
    assert comparable(actual[1]) == comparable(expected[1])


@pytest.mark.parametrize("lengths", [[T, 4, 2], [T, T, T]], ids=["ragged", "uniform"])
def test_packed_input_is_validated(lengths):
    """nn.LSTM reads past its weights here; an error is the only right answer."""
    ours, _ = pair(D, H, 2)
    packed = rnn.pack_padded_sequence(zeros(T, N, D + 3), lengths)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        ours(packed)
    packed = rnn.pack_padded_sequence(zeros(T, N, D), lengths)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(2, 3, 5\)"):
        ours(packed, (zeros(2, N + 1, H), zeros(2, N + 1, H)))


@pytest.mark.parametrize("shape", [(2**45, 1, 1), (1, 2**45, 1), (2**30, 2**30, 1)], ids=str)
def test_results_too_large_for_any_machine(shape):
    module = fastlstm.nn.LSTM(1, 64)
    x = zeros(1).expand(*shape)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError):
            module(x)


# --- threads -------------------------------------------------------------------------------------

THREADS = """
import os, sys
import torch, fastlstm.nn
torch.set_num_threads(int(sys.argv[1]))
def running():
    return len(os.listdir("/proc/self/task"))
torch.manual_seed(0)
m = fastlstm.nn.LSTM(128, 256)
x = torch.randn(20, 64, 128)
before = running()
with torch.no_grad():
    for _ in range(3):
        m(x)
print(running() - before + 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("n", [1, 2, 3])
def test_torch_set_num_threads_is_respected(n):
    assert stdout_of(run_python(THREADS, str(n), timeout=120)) == str(n)


@pytest.mark.parametrize("sizes", [(20, 64, 64, 64), (10, 1, 64, 512)], ids=str)
def test_same_bits_for_any_torch_thread_count(sizes):
    steps, batch, features, hidden = sizes
    ours, _ = pair(features, hidden)
    x = leaf(steps, batch, features)
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            results.append(flatten(backward(ours, x)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_torchs_own_threads_keep_their_floating_point_mode():
    """The kernels flush denormals on threads that torch may share; torch must not notice."""
    ours, _ = pair(128, 256)
    with torch.no_grad():
        ours(leaf(20, 64, 128))
    tiny = torch.full((1 << 20,), torch.finfo(F32).tiny)
    assert ((tiny / 2) > 0).all()


def test_concurrent_calls():
    from concurrent.futures import ThreadPoolExecutor

    ours, _ = pair(33, 65, 2, bidirectional=True)
    inputs = [leaf(9, 17, 33, seed=k) for k in range(12)]

    def run(x):
        return flatten(backward(ours, x))

    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        for actual, e in zip(pool.map(run, inputs), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(actual, e, strict=True))


DATALOADER = """
import sys
import torch, fastlstm.nn
from torch.utils.data import DataLoader, Dataset
torch.manual_seed(0)
m = fastlstm.nn.LSTM(64, 64)
inputs = torch.randn(4, 20, 16, 64)
def run(k):
    with torch.no_grad():
        return m(inputs[k])[0][-1]
class Data(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, k):
        torch.set_num_threads(int(sys.argv[1]))  # a worker starts with one
        return run(k)
if __name__ == "__main__":
    expected = [run(k) for k in range(4)]  # the parent has used threads
    m(inputs[0])[0].sum().backward()
    loader = DataLoader(Data(), num_workers=2, multiprocessing_context="fork", timeout=60)
    for batch, e in zip(loader, expected):
        assert torch.equal(batch[0], e)
    print("same bits")
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_forked_data_loader_workers(threads):
    assert stdout_of(run_python(DATALOADER, str(threads), timeout=120)) == "same bits"
