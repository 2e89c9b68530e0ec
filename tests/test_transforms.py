"""Autograd in full: torch.func, forward mode, higher orders, checkpointing, modes.

The expected value is that of torch.nn, in float64, wherever it has one; a call under vmap, which it
refuses, is compared with a loop over the samples.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import pytest

torch = pytest.importorskip("torch", reason="tests of the torch side")

import fastlstm.nn  # noqa: E402 - needs torch
from fastlstm import _composite, _core, _torch  # noqa: E402
from torch import func, nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.autograd.graph import save_on_cpu  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.nn.utils import rnn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

T, N, D, H, P = 4, 2, 3, 4, 2
F32, F64 = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def no_way_back(monkeypatch):
    """No call of ours may end in torch's own LSTM, unless it ends in an error."""
    for theirs in (nn.LSTM, nn.LSTMCell):
        forward = theirs.forward

        def checked(self, *args, forward=forward, **kwargs):
            result = forward(self, *args, **kwargs)
            assert type(self).__module__ != "fastlstm.nn", "torch's own path"
            return result

        monkeypatch.setattr(theirs, "forward", checked)


# --- cases ---------------------------------------------------------------------------------------


class Case:
    """A module of ours, the same of torch's, an input x and the rest of its arguments."""

    def __init__(self, cell=False, layout="time", states=False, strange=False, **kwargs):
        torch.manual_seed(0)
        name = "LSTMCell" if cell else "LSTM"
        self.theirs = getattr(nn, name)(D, H, dtype=F64, **kwargs)
        self.ours = getattr(fastlstm.nn, name)(D, H, dtype=F64, **kwargs)
        self.ours.load_state_dict(self.theirs.state_dict())
        if cell:
            batch = () if layout == "unbatched" else (N,)
            x, shapes = (*batch, D), [(*batch, H)] * 2
        else:
            slots = self.ours.num_layers * (1 + self.ours.bidirectional)
            batch = () if layout == "unbatched" else (N,)
            x = (N, T, D) if layout == "batch" else (T, *batch, D)
            shapes = [(slots, *batch, self.ours.proj_size or H), (slots, *batch, H)]
        self.x = random(*x)
        self.states = [random(*shape) for shape in shapes] if states else None
        if strange:
            self.x = self.x.transpose(0, -1).contiguous().transpose(0, -1)
            assert not self.x.is_contiguous()

    def __call__(self, module, x, weights=None):
        """Every result, as a flat list; `weights` take the place of the module's own."""
        args = (x,) if self.states is None else (x, tuple(self.states))
        return tree_leaves(
            module(*args) if weights is None else func.functional_call(module, weights, args)
        )

    def loss(self, module, x, weights=None):
        return sum(t.square().sum() for t in self(module, x, weights))

    def both(self, run):
        """Compare what run(module) returns for ours and theirs."""
        assert_close(run(self.ours), run(self.theirs))


class Watched(TorchDispatchMode):
    """A mode that does nothing but watch."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return operator(*args, **(kwargs or {}))


def watched(f, x):
    with Watched():
        return f(x)


def random(*shape, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=dtype, generator=generator)


def parameters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_close(actual, expected, tolerance=1e-12):
    actual, expected = tree_leaves(actual), tree_leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        if e is None:
            assert a is None
            continue
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        scale = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance * scale)


def over(f, *stacked):
    """What vmap is to return: f of each sample, stacked."""
    results = [f(*sample) for sample in zip(*stacked, strict=True)]
    leaves = [tree_leaves(result) for result in results]
    return [torch.stack(parts) for parts in zip(*leaves, strict=True)]


CASES = {
    "plain": {},
    "two layers, two directions, batch first, states": {
        "num_layers": 2,
        "bidirectional": True,
        "batch_first": True,
        "layout": "batch",
        "states": True,
    },
    "no bias, unbatched, not contiguous": {"bias": False, "layout": "unbatched", "strange": True},
    "projection, two directions, states": {"proj_size": P, "bidirectional": True, "states": True},
    "cell, states": {"cell": True, "states": True},
    "cell, no bias, unbatched": {"cell": True, "bias": False, "layout": "unbatched"},
}
every_case = pytest.mark.parametrize("config", CASES.values(), ids=CASES)
some_cases = pytest.mark.parametrize(
    "config", [CASES[name] for name in list(CASES)[1::3]], ids=list(CASES)[1::3]
)


# --- torch.func and forward mode -----------------------------------------------------------------


def jvp_of_vjp(f, x):
    """The forward pass ends before forward mode begins."""
    _, backward = func.vjp(f, x)
    seed = [torch.ones_like(t) for t in f(x)]
    return func.jvp(lambda x: backward([x * s for s in seed]), (torch.ones(()).to(x),), (x.sum(),))


def dual(f, x):
    with forward_ad.dual_level():
        results = f(forward_ad.make_dual(x, x.cos()))
        return [tuple(forward_ad.unpack_dual(t)) for t in results]


def forward_over_reverse(f, x):
    """Tangents reach the gradients of a graph that was built without any."""
    x = x.clone().requires_grad_()
    results = f(x)
    with forward_ad.dual_level():
        seeds = [forward_ad.make_dual(torch.ones_like(t), t.detach()) for t in results]
        return tuple(forward_ad.unpack_dual(torch.autograd.grad(results, x, seeds)[0]))


def scalar(f):
    return lambda x: sum(t.square().sum() for t in f(x))


def squared_gradient(f):
    return scalar(lambda x: [func.grad(f)(x)])


TRANSFORMS = {
    "grad": lambda f, x: func.grad(scalar(f))(x),
    "vjp": lambda f, x: func.vjp(f, x)[1]([t.cos() for t in f(x)]),
    "jvp": lambda f, x: func.jvp(f, (x,), (x.cos(),)),
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "hessian": lambda f, x: func.hessian(scalar(f))(x),
    "jacrev of jacrev": lambda f, x: func.jacrev(func.jacrev(scalar(f)))(x),
    "jacrev of jacfwd": lambda f, x: func.jacrev(func.jacfwd(scalar(f)))(x),
    "third order": lambda f, x: func.grad(squared_gradient(squared_gradient(scalar(f))))(x),
    "jvp of vjp": jvp_of_vjp,
    "functionalize": lambda f, x: func.functionalize(f)(x),
    "dual": dual,
    "forward over reverse": forward_over_reverse,
}


@every_case
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_the_input(transform, config):
    case = Case(**config)
    case.both(lambda module: transform(partial(case, module), case.x))


@every_case
@pytest.mark.parametrize("name", ["grad", "jvp", "hessian vector"])
def test_transforms_of_the_weights(name, config):
    case = Case(**config)

    def run(module):
        def loss(weights):
            return case.loss(module, case.x, weights)

        weights = parameters(module)
        tangents = {key: value.cos() for key, value in weights.items()}
        if name == "grad":
            return func.grad_and_value(loss)(weights)
        if name == "jvp":
            return func.jvp(loss, (weights,), (tangents,))
        return func.jvp(func.grad(loss), (weights,), (tangents,))

    case.both(run)


@pytest.mark.parametrize("where", ["around the call", "around the gradient", "vjp"])
@every_case
def test_no_grad_holds_for_every_level(where, config):
    """The weights want gradients of plain autograd, below all levels of torch.func."""
    case = Case(**config)

    def run(module):
        def f(x):
            with torch.no_grad() if where == "around the call" else nullcontext():
                y = case(module, x)[0]
            return (y * x.sum()).sum()

        def g(x):
            if where == "vjp":
                backward = func.vjp(f, x)[1]
                with torch.no_grad():
                    return (backward(torch.ones((), dtype=F64))[0] * x).sum()
            return func.grad(f)(x).square().sum()

        with torch.no_grad() if where == "around the gradient" else nullcontext():
            results = [f(case.x), func.grad(f)(case.x), g(case.x), func.grad(g)(case.x)]
        return [results, [t.requires_grad for t in results]]

    actual, expected = run(case.ours), run(case.theirs)
    assert_close(actual[0], expected[0])
    assert actual[1] == expected[1]


@pytest.mark.parametrize("name", ["grad", "vjp", "jacrev", "jvp", "hessian"])
def test_transforms_in_float32(name):
    case = Case(num_layers=2)
    expected = TRANSFORMS[name](partial(case, case.theirs), case.x)
    actual = TRANSFORMS[name](partial(case, case.ours.float()), case.x.float())
    assert_close([t.double() for t in tree_leaves(actual)], expected, tolerance=1e-5)


@some_cases
def test_functions_of_autograd(config):
    """torch.autograd.functional, whose vmap is not that of torch.func."""
    case = Case(**config)
    whole = torch.autograd.functional

    def run(module):
        def f(x):
            return case(module, x)[0]

        loss = scalar(lambda x: [f(x)])
        return [
            whole.jacobian(f, case.x, vectorize=True),
            whole.hessian(loss, case.x, vectorize=True),
            whole.hvp(loss, case.x, case.x)[1],
            whole.vhp(loss, case.x, case.x)[1],
        ]

    case.both(run)
    forward = whole.jacobian(
        lambda x: case(case.ours, x)[0], case.x, vectorize=True, strategy="forward-mode"
    )
    assert_close(forward, func.jacrev(lambda x: case(case.theirs, x)[0])(case.x))


@pytest.mark.parametrize("how", ["exchange table", "attributes", "mode"])
@some_cases
def test_batched_gradients(config, how):
    case = Case(**config)
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if how == "attributes":
        _core.use_torch(torch.Tensor, nn.Parameter, _torch.memory_of_a_step, None)
    try:

        def run(module):
            x = case.x.clone().requires_grad_()
            with Watched() if how == "mode" else nullcontext():
                y = case(module, x)[0]
            seeds = random(3, *y.shape)
            leaves = [x, *module.parameters()]
            batched = torch.autograd.grad(
                y, leaves, seeds, is_grads_batched=True, retain_graph=True
            )
            again = func.vmap(lambda seed: torch.autograd.grad(y, leaves, seed, retain_graph=True))
            assert_close(again(seeds), batched)
            return batched

        case.both(run)
    finally:
        _core.use_torch(torch.Tensor, nn.Parameter, _torch.memory_of_a_step, exchange)


@every_case
def test_gradcheck_of_every_kind(config):
    case = Case(**config)
    names, weights = zip(*parameters(case.ours).items(), strict=True)

    def f(x, *weights):
        return tuple(case(case.ours, x, dict(zip(names, weights, strict=True))))

    inputs = [t.requires_grad_() for t in (case.x, *weights)]
    assert torch.autograd.gradcheck(
        f,
        inputs,
        fast_mode=True,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        f, inputs, fast_mode=True, check_fwd_over_rev=True, check_batched_grad=True
    )


def test_gradgradcheck_packed_and_projected():
    module = fastlstm.nn.LSTM(2, 3, 2, proj_size=2, bidirectional=True, dtype=F64)
    xs = [random(n, 2).requires_grad_() for n in (4, 2, 1)]

    def f(*inputs):
        y, (h, c) = module(rnn.pack_sequence(inputs[:3]))
        return y.data, h, c

    inputs = [*xs, *module.parameters()]
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["grad", "jvp", "hessian vector", "packed within"])
def test_packed_sequences_under_transforms(name):
    """nn.LSTM refuses them there, so it runs one sequence after the other."""
    case = Case(num_layers=2, bidirectional=True, proj_size=P)
    lengths = [2, T, 3]
    xs = [random(length, D) for length in lengths]
    layout = rnn.pack_sequence(xs, enforce_sorted=False)

    states = random(4, 3, P), random(4, 3, H)

    def weighted(y, h, c):
        """A loss in which every number counts for something else."""
        results = [torch.cat(parts, -1).flatten() for parts in (y, h, c)]
        return sum(
            (t * torch.linspace(1, 2, len(t), dtype=F64).sin()).square().sum() for t in results
        )

    order = layout.sorted_indices.tolist()
    steps = enumerate(layout.batch_sizes.tolist())
    places = [(k, t) for t, size in steps for k in order[:size]]  # of the rows

    def packed(weights, xs):
        if name == "packed within":
            x = rnn.pack_sequence(xs, enforce_sorted=False)
        else:  # torch.func has no derivative of packing
            x = layout._replace(data=torch.stack([xs[k][t] for k, t in places]))
        y, (h, c) = func.functional_call(case.ours, weights, (x, states))
        rows = [[row for row, (k, _) in enumerate(places) if k == one] for one in range(3)]
        return weighted([y.data[own].T for own in rows], h.unbind(1), c.unbind(1))

    def one_by_one(weights, xs):
        results = []
        for k, x in enumerate(xs):
            state = tuple(t[:, k] for t in states)
            y, (h, c) = func.functional_call(case.theirs, weights, (x, state))
            results.append((y.T, h, c))
        return weighted(*zip(*results, strict=True))

    def run(loss):
        primals = parameters(case.ours), xs
        tangents = {key: value.cos() for key, value in primals[0].items()}, [x.sin() for x in xs]
        gradient = func.grad(loss, argnums=(0, 1))
        if name == "packed within":
            return func.grad(loss)(*primals)
        if name == "grad":
            return gradient(*primals)
        return func.jvp(loss if name == "jvp" else gradient, primals, tangents)

    assert_close(run(packed), run(one_by_one))


# --- vmap ----------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap_over_data(config, dim):
    case = Case(**config)
    xs = random(3, *case.x.shape)
    actual = func.vmap(partial(case, case.ours), in_dims=dim)(xs.movedim(0, dim))
    assert_close(actual, over(partial(case, case.theirs), xs))


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_vmap_over_some_arguments(which):
    case = Case(bidirectional=True, states=True)
    arguments = [case.x, *case.states]
    stacked = [random(3, *t.shape, seed=5) if k in which else t for k, t in enumerate(arguments)]
    dims = tuple(0 if k in which else None for k in range(3))

    def run(module):
        return lambda x, h, c: tree_leaves(module(x, (h, c)))

    expected = over(
        run(case.theirs), *(t if k in which else [t] * 3 for k, t in enumerate(stacked))
    )
    assert_close(func.vmap(run(case.ours), in_dims=dims)(*stacked), expected)


@every_case
def test_vmap_within_vmap(config):
    case = Case(**config)
    xs = random(2, 3, *case.x.shape)
    actual = func.vmap(func.vmap(partial(case, case.ours)))(xs)
    assert_close(actual, over(lambda part: over(partial(case, case.theirs), part), xs))


@every_case
@pytest.mark.parametrize("name", ["grad", "jacrev", "jvp", "hessian", "jacrev of jacrev"])
def test_vmap_of_transforms(config, name):
    case = Case(**config)
    xs = random(2, *case.x.shape)

    def run(module):
        return lambda x: TRANSFORMS[name](partial(case, module), x)

    assert_close(func.vmap(run(case.ours))(xs), over(run(case.theirs), xs))


@every_case
def test_per_sample_gradients(config):
    case = Case(**config)
    xs = random(3, *case.x.shape)

    def per_sample(module):
        return func.grad(lambda weights, x: case.loss(module, x, weights))

    weights = parameters(case.ours)
    actual = func.vmap(per_sample(case.ours), in_dims=(None, 0))(weights, xs)
    expected = over(lambda x: per_sample(case.theirs)(weights, x), xs)
    assert_close(actual, expected)

    def penalty(module, weights):
        if module is case.theirs:
            return sum(g.square().sum() for g in over(lambda x: per_sample(module)(weights, x), xs))
        gradients = func.vmap(per_sample(module), in_dims=(None, 0))(weights, xs)
        return sum(g.square().sum() for g in gradients.values())

    case.both(lambda module: func.grad(lambda weights: penalty(module, weights))(weights))


@every_case
def test_ensembles(config):
    """Over the weights, over weights and data together, and one within the other."""
    cases = [Case(**config) for _ in range(3)]
    for k, case in enumerate(cases):
        for ours, theirs in zip(case.ours.parameters(), case.theirs.parameters(), strict=True):
            theirs.data = ours.data = random(*ours.shape, seed=k)
    case = cases[0]
    weights, _ = func.stack_module_state([one.ours for one in cases])
    base = copy.deepcopy(case.ours).to("meta")
    xs = random(3, *case.x.shape)

    def f(weights, x):
        return case(base, x, weights)

    expected = [case(one.theirs, x) for one, x in zip(cases, xs, strict=True)]
    expected = [torch.stack(parts) for parts in zip(*expected, strict=True)]
    assert_close(func.vmap(f)(weights, xs), expected)

    everywhere = func.vmap(func.vmap(f, in_dims=(None, 0)), in_dims=(0, None))(weights, xs)
    assert_close(
        [t[k, k] for t in everywhere for k in range(3)], [t[k] for t in expected for k in range(3)]
    )

    shared = func.vmap(f, in_dims=(0, None))(weights, xs[0])
    assert_close([t[0] for t in shared], [t[0] for t in expected])

    def loss(weights, x):
        return sum(t.square().sum() for t in f(weights, x))

    one_by_one = [
        torch.autograd.grad(case.loss(one.theirs, x), list(one.theirs.parameters()))
        for one, x in zip(cases, xs, strict=True)
    ]
    one_by_one = [torch.stack(parts) for parts in zip(*one_by_one, strict=True)]
    assert_close(func.vmap(func.grad(loss))(weights, xs), one_by_one)
    total = func.vmap(loss)(weights, xs).sum()  # plain autograd around vmap
    assert_close(torch.autograd.grad(total, list(weights.values())), one_by_one)


def test_vmap_of_nothing():
    case = Case(num_layers=2)
    xs = random(3, *case.x.shape)
    weights = {name: p.expand(3, *p.shape) for name, p in parameters(case.ours).items()}

    def f(weights, x):
        return case(case.ours, x, weights)

    for in_dims in ((None, 0), (0, 0)):
        none = (
            {name: p[:0] for name, p in weights.items()}
            if in_dims[0] == 0
            else parameters(case.ours)
        )
        empty = func.vmap(f, in_dims=in_dims)(none, xs[:0])
        assert [t.shape for t in empty] == [(0, *t.shape) for t in case(case.theirs, case.x)]
    gradients = func.vmap(func.grad(lambda w, x: case.loss(case.ours, x, w)), in_dims=(None, 0))(
        parameters(case.ours), xs[:, :, :0]
    )
    assert all(not g.any() for g in gradients.values())


def test_dropout_under_vmap():
    """torch's own rule: random operations are refused unless vmap is told how they shall differ."""
    module = fastlstm.nn.LSTM(D, H, 2, dropout=0.5)
    xs = random(T, N, D, dtype=F32).expand(2, T, N, D)
    with pytest.raises(RuntimeError, match="called random operation while in randomness error"):
        func.vmap(module)(xs)
    same, _ = func.vmap(module, randomness="same")(xs)
    assert torch.equal(same[0], same[1])
    different, _ = func.vmap(module, randomness="different")(xs)
    assert not torch.equal(different[0], different[1])
    quiet, _ = func.vmap(module.eval())(xs)
    assert_close(quiet[1], module(xs[1])[0], tolerance=1e-6)


# --- what runs -----------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The calls of kernels, each with the N it had, and of the composition of operators."""
    seen = []

    def spy(where, name, tag, size):
        function = getattr(where, name)

        def spied(*args, **kwargs):
            seen.append((tag, size(args)))
            return function(*args, **kwargs)

        monkeypatch.setattr(where, name, spied)

    spy(_torch, "run_forward", "forward", lambda args: args[0].shape[1])
    spy(_torch, "run_backward", "backward", lambda args: args[1][0].shape[1])
    spy(_composite, "_run", "composite", lambda args: args[2].shape[1])
    return seen


def test_kernels_run_under_transforms(calls):
    case = Case()
    xs = random(3, *case.x.shape)
    weights = parameters(case.ours)

    def counted(f, *args):
        calls.clear()
        f(*args)
        return calls

    f = partial(case, case.ours)
    ensemble = {name: torch.stack((p, p)) for name, p in weights.items()}
    loss = lambda weights, x: case.loss(case.ours, x, weights)  # noqa: E731
    assert counted(func.vmap(f), xs) == [("forward", 3 * N)]
    assert counted(func.vmap(func.vmap(f)), xs.expand(2, *xs.shape)) == [("forward", 6 * N)]
    assert counted(func.grad(scalar(f)), case.x) == [("forward", N), ("backward", N)]
    assert counted(func.vmap(func.grad(scalar(f))), xs) == [("forward", 3 * N), ("backward", 3 * N)]
    assert counted(func.vmap(loss), ensemble, xs[:2]) == [("forward", N)] * 2
    per_sample = func.vmap(func.grad(loss), in_dims=(None, 0))
    assert counted(per_sample, weights, xs) == [("forward", 3 * N)] + [("backward", N)] * 3
    outputs = T * N * H + 2 * N * H
    assert counted(func.jacrev(lambda x: torch.cat([t.flatten() for t in f(x)])), case.x) == [
        ("forward", N),
        ("backward", outputs * N),
    ]
    kinds = {kind for kind, _ in counted(func.jvp, f, (case.x,), (case.x,))}
    assert kinds == {"composite"}


@pytest.mark.parametrize("wanted", ["x", "weight_hh_l0", "bias_ih_l0", "h0"])
@pytest.mark.parametrize("how", ["autograd", "create_graph", "torch.func", "mode"])
def test_only_gradients_that_are_needed_are_computed(wanted, how, monkeypatch):
    """Frozen weights cost no product."""
    module = fastlstm.nn.LSTM(D, H, dtype=F64).requires_grad_(False)
    leaves = {"x": random(T, N, D), "h0": random(1, N, H)} | dict(module.named_parameters())
    names = ["x", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    asked = []
    kernels, gradients = _torch.run_backward, _composite.backward
    monkeypatch.setattr(
        _torch, "run_backward", lambda *args: (asked.append(args[5]), kernels(*args))[1]
    )
    monkeypatch.setattr(
        _composite, "backward", lambda *args: (asked.append(args[3]), gradients(*args))[1]
    )

    def loss(value):
        tensors = leaves | {wanted: value}
        weights = {name: tensors[name] for name in names[3:]}
        states = tensors["h0"], torch.zeros(1, N, H, dtype=F64)
        return func.functional_call(module, weights, (tensors["x"], states))[0].square().sum()

    value = leaves[wanted].detach().clone()
    if how == "torch.func":
        func.grad(loss)(value)
    else:
        value.requires_grad_()
        with Watched() if how == "mode" else nullcontext():
            torch.autograd.grad(loss(value), value, create_graph=how == "create_graph")
    assert [[bool(need) for need in needed] for needed in asked] == [[n == wanted for n in names]]


@some_cases
def test_a_mode_sees_backward_alone(config):
    """Also where the forward pass was run before the mode, or before the tracer."""
    case = Case(**config)
    x = case.x.clone().requires_grad_()
    y = case(case.ours, x)[0]
    leaves = [x, *case.ours.parameters()]
    backward = partial(torch.autograd.grad, y, leaves, retain_graph=True)
    seeds = random(*y.shape), random(*y.shape, seed=1)
    expected = [backward(seed) for seed in seeds]
    with FlopCounterMode(display=False) as counter:
        assert_close(backward(seeds[0]), expected[0])
    assert counter.get_total_flops() > 0
    traced = make_fx(backward)(seeds[0])
    for seed, right in zip(seeds, expected, strict=True):
        assert_close(traced(seed), right)


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_half_precision_under_transforms(dtype, autocast, cell):
    """As outside of them, with arithmetic in float32.

    There, matrices are floats; dots of bfloat16 round h and the gradients of the gates.
    """
    dots = dtype == torch.bfloat16 and _core.active_isa() == "avx512_bf16"
    rounding = torch.finfo(dtype).eps if dots else 0
    own = F32 if autocast else dtype
    module = (fastlstm.nn.LSTMCell if cell else fastlstm.nn.LSTM)(D, H, dtype=own)
    xs = random(3, N, D, dtype=own) if cell else random(3, T, N, D, dtype=own)

    def f(x):
        return tree_leaves(module(x))

    def loss(x):
        return sum(t.float().square().sum() for t in f(x))

    def eager(x, twice=False):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x, create_graph=twice)
        if not twice:
            return gradient
        return torch.autograd.grad(gradient.float().square().sum(), x)[0]

    with torch.autocast("cpu", dtype, enabled=autocast):
        result_dtype = F32 if autocast and cell else dtype  # as of nn.LSTMCell
        assert {t.dtype for t in func.vmap(f)(xs)} == {result_dtype}
        assert_close(func.vmap(f)(xs), over(f, xs), tolerance=rounding)
        assert_close(func.vmap(func.grad(loss))(xs), over(eager, xs)[0], tolerance=rounding)
        penalty = func.grad(lambda x: func.grad(loss)(x).float().square().sum())
        eps = torch.finfo(dtype).eps
        assert_close(penalty(xs[0]), eager(xs[0], twice=True), tolerance=eps)
        value, tangent = func.jvp(loss, (xs[0],), (xs[0],))
        expected = (eager(xs[0]).float() * xs[0].float()).sum()
        assert value.dtype == tangent.dtype == F32
        assert_close(tangent, expected, tolerance=4 * torch.finfo(dtype).eps)


# --- plain autograd: higher orders, checkpoints, saved tensors -----------------------------------


def penalty(case, module, x=None):
    """The gradients of a gradient penalty."""
    x = case.x.clone().requires_grad_() if x is None else x
    (g,) = torch.autograd.grad(case.loss(module, x), x, create_graph=True)
    leaves = [x, *module.parameters()]
    return torch.autograd.grad(g.square().sum(), leaves, allow_unused=True)


@every_case
def test_gradient_penalty(config):
    case = Case(**config)
    case.both(partial(penalty, case))

    def saved_elsewhere(module):
        with save_on_cpu():
            return penalty(case, module)

    case.both(saved_elsewhere)


@every_case
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "penalty inside"])
def test_checkpoints(config, how):
    case = Case(**config)

    def run(module):
        x = case.x.clone().requires_grad_()
        leaves = [x, *module.parameters()]

        def region(x):
            if how != "penalty inside":
                return case.loss(module, x)
            (g,) = torch.autograd.grad(case.loss(module, x), x, create_graph=True)
            return g.square().sum()

        checkpoint(region, x, use_reentrant=how == "reentrant").backward()
        return [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]

    case.both(run)


@pytest.mark.parametrize("save", [True, False], ids=["saved", "recomputed"])
def test_selective_checkpoints(save, calls):
    """A policy names the operator of a layer, which then runs once or twice."""
    case = Case(num_layers=2)
    names = [torch.ops.fastlstm.layer.default] if save else [torch.ops.aten.mm.default]
    contexts = partial(create_selective_checkpoint_contexts, names)

    def run(module):
        x = case.x.clone().requires_grad_()
        options = {"context_fn": contexts} if module is case.ours else {}
        loss = checkpoint(partial(case.loss, module), x, use_reentrant=False, **options)
        return torch.autograd.grad(loss, [x, *module.parameters()])

    actual = run(case.ours)
    assert [kind for kind, _ in calls].count("forward") == (2 if save else 4)
    assert_close(actual, run(case.theirs))


@pytest.mark.parametrize("what", ["x", "weight", "nothing"])
@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_errors_of_a_second_backward(what, cell):
    """Tensors changed in place in between, or a graph that is gone."""
    case = Case(cell=cell)

    def run(module):
        x = case.x.clone().requires_grad_()
        (g,) = torch.autograd.grad(case.loss(module, x), x, create_graph=True)
        changed = {"x": x, "weight": module.weight_ih if cell else module.weight_ih_l0}.get(what)
        if changed is None:
            torch.autograd.grad(g.sum(), x)
        else:
            with torch.no_grad():
                changed.add_(1)
        with pytest.raises(RuntimeError) as error:
            torch.autograd.grad(g.sum(), x)
        return str(error.value)

    word = "second time" if what == "nothing" else "modified by an inplace operation"
    assert word in run(case.ours)
    assert word in run(case.theirs)


@pytest.mark.parametrize("way", ["grad", "jvp", "vmap of grad", "mode"])
def test_states_changed_in_place_between_steps(way):
    """As an agent does where an episode ends; what the caller gets is what no backward needs."""
    case = Case(cell=True)
    xs = random(T, N, D)

    def loss(module, xs):
        states, total = None, 0
        for x in xs:
            states = module(x, states)
            states[0][0] = 0
            states[1][1].mul_(0.5)
            total = total + states[0].square().sum()
        return total

    ours, theirs = (partial(loss, module) for module in (case.ours, case.theirs))
    if way == "jvp":
        assert_close(func.jvp(ours, (xs,), (xs,)), func.jvp(theirs, (xs,), (xs,)))
        return
    expected = func.grad(theirs)(xs)
    if way == "mode":
        leaf = xs.clone().requires_grad_()
        assert_close(torch.autograd.grad(watched(ours, leaf), leaf), [expected])
    elif way == "grad":
        assert_close(func.grad(ours)(xs), expected)
    else:
        assert_close(func.vmap(func.grad(ours))(xs[None])[0], expected)


def test_batches_and_subclasses_that_no_kernel_reads():
    class Marked(torch.Tensor):
        pass

    case = Case(num_layers=2, bidirectional=True)
    x = case.x.as_subclass(Marked)
    result = case(case.ours, x)
    assert {type(t) for t in result} == {Marked}
    assert_close([t.as_subclass(torch.Tensor) for t in result], case(case.theirs, case.x))
    case.x = case.x[:, :0]
    case.both(partial(penalty, case))
    case.both(lambda module: func.grad(partial(case.loss, module))(case.x))


# --- modes and graphs ----------------------------------------------------------------------------


FIRST = ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")  # what meets x


@some_cases
def test_flops_are_counted(config):
    """One product for each matrix and row forward, two backward, less what is not needed."""
    case = Case(**config)
    module = case.ours
    sizes = {name: p.numel() for name, p in module.named_parameters() if p.dim() == 2}
    first = sum(size for name, size in sizes.items() if name in FIRST)
    for needs_x, frozen, expected in (
        (True, False, 3 * sum(sizes.values())),
        (False, False, 3 * sum(sizes.values()) - first),
        (True, True, 2 * sum(sizes.values())),
    ):
        module.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            case.loss(module, case.x.clone().requires_grad_(needs_x)).backward()
        assert counter.get_total_flops() == 2 * (case.x.numel() // D) * expected


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    case = Case(num_layers=2)

    def f(x):
        return func.grad(partial(case.loss, case.ours))(x)

    graph = make_fx(f, tracing_mode=mode, _allow_non_fake_inputs=True)(case.x)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("fastlstm.layer.default") == 2
    assert targets.count("fastlstm.layer_backward.default") == 2
    x = random(*case.x.shape, seed=9)
    assert_close(graph(x), func.grad(partial(case.loss, case.theirs))(x))


@pytest.mark.parametrize("cell", [False, True])
def test_make_fx_before_autograd(cell):
    """Where the mode is not among those of dispatch."""
    ours = (fastlstm.nn.LSTMCell if cell else fastlstm.nn.LSTM)(3, 4)
    x, other = random(2, 5, *(() if cell else (2,)), 3, dtype=torch.float32)
    graph = make_fx(lambda x: ours(x)[0], pre_dispatch=True, _allow_non_fake_inputs=True)(x)
    assert [str(node.target) for node in graph.graph.nodes].count("fastlstm.layer.default") == 1
    assert_close([graph(other)], [ours(other)[0]])


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = Case(num_layers=2, bidirectional=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(case.x).requires_grad_()
        found = penalty(case, case.ours, x)
    expected = penalty(case, case.theirs)
    assert [None if t is None else t.shape for t in found] == [
        None if t is None else t.shape for t in expected
    ]


def test_vmap_of_an_exported_program():
    case = Case(num_layers=2, bidirectional=True)
    program = torch.export.export(case.ours, (case.x,)).module()
    xs = random(3, *case.x.shape).requires_grad_()
    actual = tree_leaves(func.vmap(program)(xs))
    expected = over(partial(case, case.theirs), xs)
    assert_close(actual, expected)
    seeds = [t.cos() for t in expected]
    assert_close(torch.autograd.grad(actual, xs, seeds), torch.autograd.grad(expected, xs, seeds))


def test_an_exported_program_refuses_forward_mode():
    """An operator would lose the tangents without a word."""
    case = Case()
    program = torch.export.export(case.ours, (case.x,)).module()
    for run in (dual, lambda f, x: func.jvp(f, (x,), (x,))):
        with pytest.raises(NotImplementedError, match="expected no forward-mode AD"):
            run(program, case.x)


def test_an_exported_program_trains():
    """It was exported without a gradient in view, so nothing is kept for backward."""
    case = Case(bidirectional=True)
    with torch.no_grad():
        program = torch.export.export(case.ours, (case.x,)).module()
    x = case.x.clone().requires_grad_()
    actual = torch.autograd.grad(tree_leaves(program(x))[0].square().sum(), x)
    expected = torch.autograd.grad(case(case.theirs, x)[0].square().sum(), x)
    assert_close(actual, expected)


# Dynamo's own, which it hides.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", ["grad", "jvp", "vmap"])
def test_transforms_within_a_compiled_function(name):
    """In one graph."""
    case = Case()
    transforms = TRANSFORMS | {"vmap": lambda f, x: func.vmap(f)(torch.stack((x, 2 * x)))}

    def run(x):
        return transforms[name](partial(case, case.ours), x)

    torch._dynamo.reset()
    assert_close(torch.compile(run, backend="eager", fullgraph=True)(case.x), run(case.x))
    torch._dynamo.reset()


# --- errors --------------------------------------------------------------------------------------


def zeros(*shape, dtype=F64):
    return torch.zeros(*shape, dtype=dtype)


BAD_CALLS = {
    "rank": (zeros(1, T, N, D), None),
    "input size": (zeros(T, N, D + 1), None),
    "input size, unbatched": (zeros(T, D + 1), None),
    "time 0": (zeros(0, N, D), None),
    "dtype": (zeros(T, N, D, dtype=F32), None),
    "hidden of h": (zeros(T, N, D), (zeros(1, N, H + 1), zeros(1, N, H))),
    "batch of c": (zeros(T, N, D), (zeros(1, N, H), zeros(1, N + 1, H))),
    "size of c, unbatched": (zeros(T, D), (zeros(1, H), zeros(1, H + 1))),
    "rank of hx": (zeros(T, N, D), (zeros(1, H), zeros(1, H))),
}
BAD_CELL_CALLS = {
    "rank": (zeros(T, N, N, D), None),
    "input size": (zeros(N, D + 1), None),
    "rank of h": (zeros(N, D), (zeros(1, N, H), zeros(N, H))),
    "batch of h": (zeros(N, D), (zeros(N + 1, H), zeros(N, H))),
    "hidden of c": (zeros(N, D), (zeros(N, H), zeros(N, H + 1))),
}
WAYS = {
    "vmap": lambda f, x: func.vmap(f)(x.expand(2, *x.shape)),
    "grad": lambda f, x: func.grad(lambda x: f(x)[0].sum())(x),
    "jvp": lambda f, x: func.jvp(f, (x,), (x,)),
    "vmap of grad": lambda f, x: func.vmap(func.grad(lambda x: f(x)[0].sum()))(
        x.expand(2, *x.shape)
    ),
    "mode": lambda f, x: watched(f, x),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "cell, call",
    [(False, c) for c in BAD_CALLS.values()] + [(True, c) for c in BAD_CELL_CALLS.values()],
    ids=[*BAD_CALLS, *(f"cell, {name}" for name in BAD_CELL_CALLS)],
)
def test_errors_are_those_of_a_plain_call(way, cell, call):
    case = Case(cell=cell)
    x, states = call
    with pytest.raises((RuntimeError, ValueError)) as expected:
        case.theirs(x, states)
    with pytest.raises(type(expected.value)) as actual:
        way(lambda x: tree_leaves(case.ours(x, states)), x)
    assert str(actual.value) == str(expected.value)
