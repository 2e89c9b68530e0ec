"""nn.LSTM and nn.LSTMCell to the letter: what people rely on beside results and gradients.

In the order of a module's life: constructor, parameters, weights that change, calls, packed
sequences, cells, dropout, devices. Each test compares with torch's class in the same process;
results, gradients and further errors are in test_nn.py.
"""

from __future__ import annotations

import collections
import math

import pytest
from helpers import run_python, stdout_of

torch = pytest.importorskip("torch", reason="tests of the torch side")

import fastlstm.nn  # noqa: E402 - needs torch
from helpers_torch import (  # noqa: E402
    F64,
    TRANSFORMS,
    D,
    H,
    N,
    T,
    assert_close,
    assert_same,
    assert_same_outcome,
    backward,
    flatten,
    leaf,
    outcome,
    pair,
    transposed,
)
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize, prune, rnn  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402

# What torch says of itself, once, when it has projections to compute in float32.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
both = pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
CLASSES = {
    "LSTM": (fastlstm.nn.LSTM, nn.LSTM),
    "LSTMCell": (fastlstm.nn.LSTMCell, nn.LSTMCell),
}
# The words below are those of this torch and later ones; older ones have their own.
SAME_WORDS = torch.__version__ >= "2.13"


def words_only(value):
    """The name of a case of `call, kind, words`."""
    return value if isinstance(value, str) else ""


def assert_same_words(call, ours, theirs, kind, words):
    """Both raise the same, and it is what is written here."""
    found = assert_same_outcome(lambda: call(ours), lambda: call(theirs))
    if SAME_WORDS:
        assert found[0] is kind
        assert words in found[1]


# --- constructor ---------------------------------------------------------------------------------


def test_constructor_takes_the_same_arguments():
    """By position and by name; everything a module says of itself is the same."""
    names = "input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size"
    values = (D, H, 2, False, True, 0.25, True, 3)
    for args, kwargs in [(values, {}), ((), dict(zip(names.split(), values, strict=True)))]:
        ours, theirs = (cls(*args, **kwargs, device="meta", dtype=F64) for cls in CLASSES["LSTM"])
        for name in (*names.split(), "mode", "training"):
            assert getattr(ours, name) == getattr(theirs, name)
            assert type(getattr(ours, name)) is type(getattr(theirs, name))
        assert {(p.dtype, p.device.type) for p in ours.parameters()} == {(F64, "meta")}
    for args, kwargs in [((D, H, False, "meta", F64), {}), ((), dict(input_size=D, hidden_size=H))]:
        ours, theirs = (cls(*args, **kwargs) for cls in CLASSES["LSTMCell"])
        for name in ("input_size", "hidden_size", "bias"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert [p.dtype for p in ours.parameters()] == [p.dtype for p in theirs.parameters()]
        assert [p.device for p in ours.parameters()] == [p.device for p in theirs.parameters()]


NOT_A_PROBABILITY = (
    "dropout should be a number in range [0, 1] representing the probability of an element being"
)
CONSTRUCTOR_MESSAGES = [
    ((0, 5), ValueError, "input_size must be greater than zero"),
    ((4, -1), ValueError, "hidden_size must be greater than zero"),
    ((4, 5, 0), ValueError, "num_layers must be greater than zero"),
    ((4.0, 5), TypeError, "input_size should be of type int, got: float"),
    ((4, 5.0), TypeError, "hidden_size should be of type int, got: float"),
    ((4, 5, 1, 1), TypeError, "bias should be of type bool, got: int"),
    ((4, 5, 1, True, 0), TypeError, "batch_first should be of type bool, got: int"),
    ((4, 5, 2, True, False, 1.5), ValueError, NOT_A_PROBABILITY),
    ((4, 5, 2, True, False, True), ValueError, NOT_A_PROBABILITY),
    (
        (4, 5, 1, True, False, 0.0, False, -1),
        ValueError,
        "proj_size should be a positive integer or zero to disable projections",
    ),
    (
        (4, 5, 1, True, False, 0.0, False, 5),
        ValueError,
        "proj_size has to be smaller than hidden_size",
    ),
]


@pytest.mark.parametrize("args, kind, words", CONSTRUCTOR_MESSAGES, ids=words_only)
def test_constructor_messages(args, kind, words):
    assert_same_words(lambda cls: cls(*args), *CLASSES["LSTM"], kind, words)


def test_dropout_of_one_layer_warns():
    ours, theirs = (
        outcome(lambda cls=cls: cls(D, H, dropout=0.5).dropout) for cls in CLASSES["LSTM"]
    )
    assert ours == theirs
    ((kind, text),) = ours[1]
    assert kind is UserWarning
    assert "dropout option adds dropout after all but last recurrent layer" in text


# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_parameters(bidirectional, bias, proj_size):
    """Names and shapes in their order, numbers within 1/sqrt(H), from the same random stream."""
    P, directions = proj_size or H, 2 if bidirectional else 1
    expected = {}
    for k in range(3):
        for suffix in ("", "_reverse")[:directions]:
            expected[f"weight_ih_l{k}{suffix}"] = (4 * H, D if k == 0 else directions * P)
            expected[f"weight_hh_l{k}{suffix}"] = (4 * H, P)
            if bias:
                expected[f"bias_ih_l{k}{suffix}"] = expected[f"bias_hh_l{k}{suffix}"] = (4 * H,)
            if proj_size:
                expected[f"weight_hr_l{k}{suffix}"] = (proj_size, H)
    made = []
    for cls in CLASSES["LSTM"]:
        torch.manual_seed(3)
        module = cls(D, H, 3, bias, bidirectional=bidirectional, proj_size=proj_size)
        assert {name: tuple(p.shape) for name, p in module.named_parameters()} == expected
        assert list(module.state_dict()) == list(expected) == module._flat_weights_names
        assert all(p.abs().max() <= 1 / math.sqrt(H) for p in module.parameters())
        drawn = list(module.parameters())
        module.reset_parameters()
        made.append([drawn, list(module.parameters()), torch.rand(1)])
    for ours, theirs in zip(*map(flatten, made), strict=True):
        assert torch.equal(ours, theirs)


def test_parameters_of_a_cell():
    """Without biases these are registered as None."""
    for cls in CLASSES["LSTMCell"]:
        shapes = {name: tuple(p.shape) for name, p in cls(D, H).named_parameters()}
        weights = {"weight_ih": (4 * H, D), "weight_hh": (4 * H, H)}
        assert shapes == weights | {"bias_ih": (4 * H,), "bias_hh": (4 * H,)}
        without = cls(D, H, bias=False)
        assert {name: tuple(p.shape) for name, p in without.named_parameters()} == weights
        assert without.bias_ih is None
        assert without.bias_hh is None
        assert list(without._parameters) == ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]


@pytest.mark.parametrize("options", [{}, {"bias": False, "bidirectional": True}, {"proj_size": 3}])
def test_attributes_people_touch(options):
    ours, theirs = pair(D, H, 2, **options)
    names = [list(module._flat_weights_names) for module in (ours, theirs)]
    assert names[0] == names[1]
    assert ours._all_weights == theirs._all_weights
    assert all(getattr(ours, n) is w for n, w in zip(names[0], ours._flat_weights, strict=True))
    assert [len(row) for row in ours.all_weights] == [len(row) for row in theirs.all_weights]
    flat = [w for row in ours.all_weights for w in row]
    assert all(a is b for a, b in zip(flat, ours._flat_weights, strict=True))
    assert ours.flatten_parameters() is None
    before = backward(ours, leaf(T, N, D))
    ours.flatten_parameters()
    assert_close(backward(ours, leaf(T, N, D)), before)


def test_flat_weights_that_somebody_filled():
    """nn.LSTM computes with this list, as long as no parameter was replaced since."""
    results = []
    for cls in CLASSES["LSTM"]:

        class LowRank(cls):
            def forward(self, x, hx=None):
                delta = self.left @ self.right
                self._flat_weights = [
                    getattr(self, name) + (delta if name == "weight_hh_l0" else 0)
                    for name in self._flat_weights_names
                ]
                return super().forward(x, hx)

        torch.manual_seed(0)
        module = LowRank(D, H)
        module.left = torch.nn.Parameter(torch.randn(4 * H, 2))
        module.right = torch.nn.Parameter(torch.randn(2, H))
        x = torch.randn(T, N, D)
        module(x)[0].sum().backward()
        found = [module.left.grad, module.right.grad, module.weight_hh_l0.grad]
        # One that was replaced counts more than the list.
        plain = cls(D, H)
        plain._flat_weights = [torch.zeros_like(w) for w in plain._flat_weights]
        ones = {name: torch.ones_like(w) for name, w in plain.named_parameters()}
        found += [plain(x)[0], torch.func.functional_call(plain, ones, (x,))[0]]
        results.append(found)
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", CLASSES)
def test_names_that_subclasses_may_have_themselves(name):
    ours, theirs = CLASSES[name]
    own = set(vars(ours)) - set(dir(theirs)) - {"__prepare_scriptable__"}
    assert all(attribute.startswith(f"_{name}__") for attribute in own), own


@pytest.mark.parametrize("name", CLASSES)
def test_profiler(name):
    module = CLASSES[name][0](D, H)
    x = leaf(N, D) if name == "LSTMCell" else leaf(T, N, D)
    with torch.autograd.profiler.profile() as profile, torch.no_grad():
        y, _ = module(x)
    assert any(event.name == "fastlstm::infer" for event in profile.function_events)
    with torch.no_grad():
        assert torch.equal(module(x)[0], y)
    with torch.autograd.profiler.profile() as profile:
        module(x)
    step = "Step" if name == "LSTMCell" else "Layer"
    assert any(event.name == step for event in profile.function_events)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_saved_tensors_are_tensors(name, state):
    """Tools that draw a graph ask each of them for its size."""
    module = CLASSES[name][0](D, H)
    shape = (N, H) if name == "LSTMCell" else (1, N, H)
    hx = (leaf(*shape), leaf(*shape)) if state else None
    y, _ = module(leaf(N, D) if name == "LSTMCell" else leaf(T, N, D), hx)
    assert all(isinstance(t, torch.Tensor) for t in y.grad_fn.saved_tensors)


def test_per_sample_gradients_of_expanded_weights():
    """They answer for nn.LSTM; nn.LSTMCell refuses them."""
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    found = []
    for cls in CLASSES["LSTM"]:
        torch.manual_seed(0)
        module = cls(D, H, batch_first=True)
        x = torch.randn(N, T, D, requires_grad=True)
        call = call_for_per_sample_grads(module, batch_size=N, loss_reduction="sum")
        call(x)[0].sum().backward()
        found.append([p.grad_sample for p in module.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


SIZES = torch.tensor([3, 3, 2, 1])
CHECKS = {
    "check_input": lambda m: m.check_input(torch.zeros(T, N, D), None),
    "check_input, packed": lambda m: m.check_input(torch.zeros(9, D), SIZES),
    "check_input, rank": lambda m: m.check_input(torch.zeros(T, D), None),
    "check_input, packed rank": lambda m: m.check_input(torch.zeros(T, N, D), SIZES),
    "check_input, size": lambda m: m.check_input(torch.zeros(T, N, D + 1), None),
    "check_input, dtype": lambda m: m.check_input(torch.zeros(T, N, D, dtype=F64), None),
    "check_forward_args": lambda m: m.check_forward_args(
        torch.zeros(T, N, D), (torch.zeros(2, N, H), torch.zeros(2, N, H)), None
    ),
    "check_forward_args, h": lambda m: m.check_forward_args(
        torch.zeros(T, N, D), (torch.zeros(2, N + 1, H), torch.zeros(2, N, H)), None
    ),
    "check_forward_args, c": lambda m: m.check_forward_args(
        torch.zeros(T, N, D), (torch.zeros(2, N, H), torch.zeros(2, N, H + 1)), None
    ),
    "check_hidden_size": lambda m: m.check_hidden_size(torch.zeros(2, 3), (2, 4)),
    "get_expected_hidden_size": lambda m: m.get_expected_hidden_size(torch.zeros(T, N, D), None),
    "get_expected_hidden_size, packed": lambda m: m.get_expected_hidden_size(
        torch.zeros(9, D), SIZES
    ),
    "get_expected_cell_size": lambda m: m.get_expected_cell_size(torch.zeros(T, N, D), None),
    "permute_hidden": lambda m: m.permute_hidden(
        (leaf(2, N, H), leaf(2, N, H, seed=1)), torch.tensor([2, 0, 1])
    ),
    "permute_hidden, none": lambda m: m.permute_hidden((leaf(2, N, H), leaf(2, N, H)), None),
    "extra_repr": lambda m: m.extra_repr(),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_methods_people_call(check):
    ours, theirs = pair(D, H, 2)
    assert_same_outcome(lambda: check(ours), lambda: check(theirs))


def test_init_functions():
    """Such as ask `isinstance(m, nn.LSTM)`, go by names, and set the bias of the forget gate."""

    def init(m):
        if isinstance(m, nn.LSTM | nn.LSTMCell):
            for name, p in m.named_parameters():
                if "weight_hh" in name:
                    nn.init.orthogonal_(p)
                elif "weight_ih" in name:
                    nn.init.xavier_uniform_(p)
                else:
                    p.data.zero_()
                    p.data[H : 2 * H] = 1

    for name, x in (("LSTM", leaf(T, N, D)), ("LSTMCell", leaf(N, D))):
        ours, theirs = (nn.Sequential(cls(D, H)) for cls in CLASSES[name])
        for module in (ours, theirs):
            torch.manual_seed(1)
            module.apply(init)
        assert_same(ours, theirs, x)


@both
def test_skip_init(cell):
    """torch's helper takes a cell, and no LSTM, whose signature hides `device`."""
    made = [
        outcome(lambda cls=cls: nn.utils.skip_init(cls, D, H))[0]
        for cls in CLASSES["LSTMCell" if cell else "LSTM"]
    ]
    if cell:
        _, theirs = pair(D, H, cell=True)
        made[0].load_state_dict(theirs.state_dict())
        assert_same(made[0], theirs, leaf(N, D))
    else:
        assert made[0] == made[1]


@both
@pytest.mark.parametrize("way", ["torch.save", "safetensors", "safetensors model"])
@pytest.mark.parametrize("to_torch", [False, True], ids=["from torch", "to torch"])
def test_checkpoints_both_ways(tmp_path, cell, way, to_torch):
    """Bit for bit, through the file formats people keep weights in."""
    kwargs = {} if cell else {"num_layers": 2, "bidirectional": True, "proj_size": 3}
    ours, theirs = pair(D, H, cell=cell, **kwargs)
    source, target = (ours, theirs) if to_torch else (theirs, ours)
    source, target = nn.Sequential(source), nn.Sequential(target)
    x = leaf(N, D) if cell else leaf(T, N, D)
    expected = [p.detach().clone() for p in source.parameters()]
    file = tmp_path / "weights"
    if way == "torch.save":
        torch.save(source.state_dict(), file)
        state = torch.load(file, weights_only=True)
    else:
        safetensors = pytest.importorskip("safetensors.torch", reason="checks its file format")
        if way == "safetensors":
            safetensors.save_file(source.state_dict(), file)
            state = safetensors.load_file(file)
        else:
            safetensors.save_model(source, file)
    with torch.no_grad():
        for p in target.parameters():
            p.zero_()
    if way == "safetensors model":
        assert safetensors.load_model(target, file) == (set(), [])
    else:
        target.load_state_dict(state)
    assert all(torch.equal(p, e) for p, e in zip(target.parameters(), expected, strict=True))
    assert_same(target, source, x)


# --- weights that change: read anew at every call ------------------------------------------------


def modules_for(cell):
    """Twins, an input and a state for them, and the names of a weight of the state and a bias."""
    shapes = [(N, H)] * 3 if cell else [(T, N, H), (2, N, H), (2, N, H)]
    inputs = [leaf(*shape, seed=k) for k, shape in enumerate(shapes)]
    if cell:
        return *pair(H, H, cell=True), inputs, "weight_hh", "bias_ih"
    return *pair(H, H, 2), inputs, "weight_hh_l1", "bias_ih_l0"


def first_output(module, inputs):
    """y of a layer, h of a cell."""
    x, *state = inputs
    return flatten(module(x, state))[0]


def data_copy(module, weight, bias):
    for k, p in enumerate(module.parameters()):
        p.data.copy_(leaf(*p.shape, seed=k))


def data_replaced(module, weight, bias):
    for k, p in enumerate(module.parameters()):
        p.data = leaf(*p.shape, seed=k, grad=False)


def in_place(module, weight, bias):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)


def soft_update(module, weight, bias):
    """A target network that follows another one."""
    for k, p in enumerate(module.parameters()):
        p.data.lerp_(leaf(*p.shape, seed=k), 0.3)


def through_numpy(module, weight, bias):
    getattr(module, weight).detach().numpy()[:] *= 2


def load(module, weight, bias):
    module.load_state_dict({n: leaf(*p.shape) for n, p in module.named_parameters()})


def load_and_assign(module, weight, bias):
    state = {n: leaf(*p.shape, grad=False) for n, p in module.named_parameters()}
    module.load_state_dict(state, assign=True)


def from_a_vector(module, weight, bias):
    parameters = list(module.parameters())
    nn.utils.vector_to_parameters(leaf(sum(p.numel() for p in parameters)), parameters)


def parameter_replaced(module, weight, bias):
    setattr(module, weight, nn.Parameter(leaf(*getattr(module, weight).shape, grad=False)))


def parameter_becomes_a_tensor(module, weight, bias):
    other = leaf(*getattr(module, weight).shape, grad=False)
    delattr(module, weight)
    setattr(module, weight, other)


def parameter_becomes_a_buffer(module, weight, bias):
    other = leaf(*getattr(module, weight).shape, grad=False)
    delattr(module, weight)
    module.register_buffer(weight, other)


def tied(module, weight, bias):
    """One parameter in two places of one module."""
    setattr(module, weight, getattr(module, weight.replace("hh", "ih")))
    setattr(module, bias, getattr(module, bias.replace("ih", "hh")))


def there_and_back(module, weight, bias):
    module.double().float()


CHANGES = [
    data_copy,
    data_replaced,
    in_place,
    soft_update,
    through_numpy,
    load,
    load_and_assign,
    from_a_vector,
    parameter_replaced,
    parameter_becomes_a_tensor,
    parameter_becomes_a_buffer,
    tied,
    there_and_back,
]


@both
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_weights_that_change_between_calls(cell, change):
    ours, theirs, inputs, weight, bias = modules_for(cell)
    with torch.no_grad():
        before = first_output(ours, inputs)
    assert_same(ours, theirs, *inputs)
    for module in (ours, theirs):
        change(module, weight, bias)
    assert_same(ours, theirs, *inputs)
    if change is not there_and_back:
        assert not torch.allclose(first_output(ours, inputs), before, atol=1e-3)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.5, momentum=0.9, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.5, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.05, foreach=False),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.05, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.5, max_iter=3),
}


@both
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(cell, optimizer):
    """Losses of several steps; each is computed with the weights that the last one left."""

    def train(module):
        stepper = OPTIMIZERS[optimizer](module.parameters())
        losses = []

        def closure():
            stepper.zero_grad()
            loss = flatten(module(x))[0].square().sum()
            loss.backward()
            losses.append(loss.detach())
            return loss

        for _ in range(4):
            stepper.step(closure)
        return losses

    shape = (N, D) if cell else (T, N, D)
    x = leaf(*shape, dtype=F64, grad=False)
    ours, theirs = (train(module) for module in pair(D, H, cell=cell, dtype=F64))
    assert_close(ours, theirs, scale=100)  # optimizers divide by small numbers
    assert ours[-1] < 0.9 * ours[0]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Noisy(nn.Module):
    """Another weight at each reading while training."""

    def forward(self, weight):
        return weight + torch.rand_like(weight) if self.training else weight


def prune_by_hand(module, name):
    mask = torch.ones_like(getattr(module, name))
    mask[::2] = 0
    return prune.custom_from_mask(module, name, mask)


def old_spectral_norm(module, name):
    return nn.utils.spectral_norm(module, name)


def parametrized_by(kind):
    return lambda m, name: parametrize.register_parametrization(m, name, kind())


PUT_ON = {
    **TRANSFORMS,
    "spectral_norm_old": old_spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrize": parametrized_by(Doubled),
    "parametrize, noisy": parametrized_by(Noisy),
    "prune_by_hand": prune_by_hand,
}
TAKE_OFF = {
    "weight_norm_old": nn.utils.remove_weight_norm,
    "spectral_norm_old": nn.utils.remove_spectral_norm,
    "prune": prune.remove,
    "prune_by_hand": prune.remove,
}


@both
@pytest.mark.parametrize("name", PUT_ON)
def test_reparametrized_weights(cell, name):
    """On every weight matrix: before and after a step, in eval mode, copied back, taken off."""

    def run(module, weights):
        torch.manual_seed(5)
        for weight in weights:
            PUT_ON[name](module, weight)
        results = []
        for _ in range(2):
            results.append(first_output(module, inputs))
            results[-1].square().sum().backward()
            with torch.no_grad():
                for p in module.parameters():
                    p -= 0.1 * p.grad
            module.zero_grad()
        results.append(backward(module.eval(), *inputs))
        module.load_state_dict({n: 0.5 * t for n, t in module.state_dict().items()})
        results.append(first_output(module, inputs))
        for weight in weights:
            TAKE_OFF.get(name, parametrize.remove_parametrizations)(module, weight)
        return [*results, backward(module, *inputs)]

    ours, theirs, inputs, *_ = modules_for(cell)
    weights = [n for n, p in ours.named_parameters() if p.dim() == 2]
    results = [run(module, weights) for module in (ours, theirs)]
    assert_close(*results, scale=10)
    assert type(ours) is CLASSES["LSTMCell" if cell else "LSTM"][0]
    first, second, *_ = results[0]
    assert not torch.allclose(first, second, atol=1e-3)


@both
def test_parametrizations_cached(cell):
    ours, theirs, inputs, weight, _ = modules_for(cell)

    def run(module):
        parametrize.register_parametrization(module, weight, Doubled())
        with parametrize.cached():
            loss = sum(first_output(module, [k * x for x in inputs]).sum() for k in (1, 2))
            return [loss, torch.autograd.grad(loss, list(module.parameters()))]

    assert_close(run(ours), run(theirs))
    assert_same(ours, theirs, *inputs)


class WeightDrop(nn.Module):
    """As language models do it: another dropout of the recurrent weight at each call."""

    def __init__(self, module, name):
        super().__init__()
        self.module, self.name = module, name
        raw = getattr(module, name)
        del module._parameters[name]
        self.raw = nn.Parameter(raw.data)
        if isinstance(module, nn.LSTM):
            module.flatten_parameters = lambda: None

    def forward(self, x, hx):
        weight = nn.functional.dropout(self.raw, 0.5, self.training)
        setattr(self.module, self.name, weight)
        return self.module(x, hx)


@both
def test_weight_drop(cell):
    ours, theirs, inputs, weight, _ = modules_for(cell)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(2)
        wrapped = WeightDrop(module, weight)
        results.append([backward(wrapped.train(mode), *inputs) for mode in (True, True, False)])
    assert_close(*results)
    first, second, _ = (flatten(result)[0] for result in results[0])
    assert not torch.allclose(first, second, atol=1e-3)


@both
def test_weights_tied_between_modules(cell):
    """Two layers with the same parameters: their gradients add up, and a step moves both."""

    def train(made):
        shape = (N, H) if cell else (T, N, H)
        first, second = made, type(made)(H, H, dtype=F64)
        for name, p in first.named_parameters():
            setattr(second, name, p)
        assert sum(1 for _ in nn.ModuleList([first, second]).parameters()) == 4
        optimizer = torch.optim.SGD(first.parameters(), 0.5)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            y = flatten(second(flatten(first(leaf(*shape, dtype=F64)))[0]))[0]
            loss = y.square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [losses, list(second.parameters())]

    ours, theirs = pair(H, H, cell=cell, dtype=F64)
    assert_close(train(ours), train(theirs), scale=10)


@both
def test_averaged_models(cell):
    """An average of the weights, kept by torch beside the model."""

    def train(module):
        average = AveragedModel(module, use_buffers=True)
        optimizer = torch.optim.SGD(module.parameters(), 0.5)
        results = []
        for _ in range(3):
            optimizer.zero_grad()
            first_output(module, inputs).square().sum().backward()
            optimizer.step()
            average.update_parameters(module)
            results.append(first_output(average, inputs))
        return results

    ours, theirs, inputs, *_ = modules_for(cell)
    assert_close(train(ours), train(theirs), scale=10)


@both
def test_functional_call_with_some_and_with_tied_weights(cell):
    ours, theirs, inputs, weight, _ = modules_for(cell)
    x, *state = inputs
    one = leaf(4 * H, H, seed=4)

    def run(module):
        def call():
            called = torch.func.functional_call(module, {weight: one}, (x, state))
            return flatten(called)[0].square().sum()

        some = call()
        setattr(module, weight.replace("hh", "ih"), getattr(module, weight))
        tied = call()  # one name now stands for both
        return [some, tied, torch.autograd.grad(some + tied, [*inputs, one])]

    assert_close(run(ours), run(theirs))
    assert_same(ours, theirs, *inputs)  # the module's own weights are back


# --- calls ---------------------------------------------------------------------------------------


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


S = (1, 4, 3)  # of the letter's own example: LSTM(2, 3) on a batch of 4 or 5
LSTM_MESSAGES = [
    (lambda m: m(zeros(1, 6, 4, 2)), ValueError, "LSTM: Expected input to be 2D or 3D, got 4D"),
    (
        lambda m: m(zeros(6, 4, 7)),
        RuntimeError,
        "input.size(-1) must be equal to input_size. Expected 2, got 7",
    ),
    (
        lambda m: m(zeros(6, 4, 2, dtype=F64)),
        ValueError,
        "RNN input dtype (torch.float64) does not match weight dtype (torch.float32). Convert",
    ),
    (
        lambda m: m(zeros(6, 5, 2), (zeros(*S), zeros(1, 5, 3))),
        RuntimeError,
        "Expected hidden[0] size (1, 5, 3), got [1, 4, 3]",
    ),
    (
        lambda m: m(zeros(6, 5, 2), (zeros(1, 5, 3), zeros(*S))),
        RuntimeError,
        "Expected hidden[1] size (1, 5, 3), got [1, 4, 3]",
    ),
    (
        lambda m: m(zeros(6, 4, 2), (zeros(1, 3), zeros(*S))),
        RuntimeError,
        "For batched 3-D input, hx and cx should also be 3-D but got (2-D, 3-D) tensors",
    ),
    (
        lambda m: m(zeros(6, 2), (zeros(1, 3), zeros(1, 1, 3))),
        RuntimeError,
        "For unbatched 2-D input, hx and cx should also be 2-D but got (2-D, 3-D) tensors",
    ),
    (
        lambda m: m(zeros(0, 4, 2)),
        RuntimeError,
        "Expected sequence length to be larger than 0 in RNN",
    ),
    (
        lambda m: m(zeros(6, 4, 2), (zeros(*S),) * 3),
        RuntimeError,
        "lstm expects two hidden states",
    ),
    (
        lambda m: m(zeros(6, 4, 2, device="meta")),
        RuntimeError,
        "Input and parameter tensors are not at the same device",
    ),
    (
        lambda m: m(zeros(6, 4, 2), (zeros(*S, device="meta"),) * 2),
        RuntimeError,
        "Input and hidden tensors are not at the same device",
    ),
]


@pytest.mark.parametrize("call, kind, words", LSTM_MESSAGES, ids=words_only)
def test_messages_of_a_call(call, kind, words):
    assert_same_words(call, *pair(2, 3), kind, words)


def test_the_dtype_check_is_skipped_under_autocast():
    """A float16 input to float32 weights, refused otherwise."""
    ours, _ = pair(2, 3)
    x = leaf(6, 4, 2, grad=False)
    with pytest.raises(ValueError, match="RNN input dtype"):
        ours(x.half())
    with torch.autocast("cpu", torch.float16):
        y, _ = ours(x.half())
    assert (y.float() - ours(x)[0]).abs().max() < 1e-3


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [F64, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("batch, packed", [(0, False), (4, False), (4, True)])
def test_states_of_another_dtype(which, dtype, options, batch, packed):
    """Accepted where nn.LSTM accepts them; else the message names the argument and the dtypes."""
    ours, theirs = pair(2, 3, **options)
    x = zeros(6, batch, 2).to(ours.weight_ih_l0.dtype)
    x = rnn.pack_sequence(list(x.unbind(1))) if packed else x
    state = [leaf(1, batch, size, grad=False).to(x.data.dtype) for size in (ours.proj_size or 3, 3)]
    state[which] = state[which].to(dtype)
    expected, _ = outcome(lambda: theirs(x, state))
    actual, _ = outcome(lambda: ours(x, state))
    if isinstance(expected[0], type):
        own = ours.weight_ih_l0.dtype
        assert actual == (RuntimeError, f"hx[{which}]: expected dtype {own}, got {dtype}")
    else:
        assert_close(flatten(actual), flatten(expected))


def test_the_first_of_two_mistakes_is_named():
    """As by nn.LSTM, which looks at shapes before dtypes."""
    ours, theirs = pair(D, H)
    state = zeros(1, N + 1, H, dtype=F64), zeros(1, N, H)
    kind, text = assert_same_outcome(
        lambda: ours(zeros(T, N, D), state), lambda: theirs(zeros(T, N, D), state)
    )
    assert kind is RuntimeError
    assert "Expected hidden[0] size" in text


Pair = collections.namedtuple("Pair", "h c")


@pytest.mark.parametrize("make", [tuple, list, lambda states: Pair(*states)])
@pytest.mark.parametrize("batched", [True, False])
def test_kinds_of_states(make, batched):
    """A tuple, a list or a named tuple goes in; (out, (h, c)) comes out, as plain tuples."""
    ours, theirs = pair(D, H, 2, bidirectional=True)
    batch = (N,) if batched else ()
    x, *state = leaf(T, *batch, D), leaf(4, *batch, H, seed=1), leaf(4, *batch, H, seed=2)
    results = [module(x, make(state)) for module in (ours, theirs)]
    assert_close(*results)
    for y, hidden in results:
        assert type(hidden) is tuple
        assert len(hidden) == 2
        assert y.shape == (T, *batch, 2 * H)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 3}], ids=str)
@pytest.mark.parametrize("layers", [1, 2])
def test_batch_first_is_for_input_and_output_alone(options, layers):
    """States keep their layout, and an unbatched input has none to choose."""
    ours, theirs = pair(D, H, layers, batch_first=True, **options)
    plain, _ = pair(D, H, layers, **options)
    slots = layers * (2 if ours.bidirectional else 1)
    x = leaf(N, T, D)
    state = [leaf(slots, N, size, seed=size) for size in (ours.proj_size or H, H)]
    assert_same(ours, theirs, x, *state)
    y, hidden = ours(x, state)
    expected, expected_hidden = plain(x.transpose(0, 1), state)
    assert_close(y, expected.transpose(0, 1))
    assert_close(hidden, expected_hidden)

    x, state = x[0], [s[:, 0] for s in state]
    assert_same(ours, theirs, x, *state)
    assert_close(ours(x, state), plain(x, state))
    assert_close(ours(x), plain(x))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_batch_first_copies_no_input(monkeypatch, batch_first, grad):
    """The kernels read x where it is and write y where it stays, whatever the order of its axes."""
    seen = []
    run_layer, infer = fastlstm._torch._core.run_layer, fastlstm._torch._core.infer

    def spy_on_layer(x, *rest):
        results = run_layer(x, *rest)
        seen.append((x.data_ptr(), x.stride(), results[0].data_ptr()))
        return results

    def spy_on_infer(x, *rest):
        result = infer(x, *rest)
        seen.append((x.data_ptr(), x.stride(), result[0].data_ptr()))
        return result

    monkeypatch.setattr(fastlstm._torch._core, "run_layer", spy_on_layer)
    monkeypatch.setattr(fastlstm._torch._core, "infer", spy_on_infer)
    ours, _ = pair(D, H, batch_first=batch_first)
    x = leaf(N, T, D, grad=grad)
    with torch.set_grad_enabled(grad):
        y, _ = ours(x)
    strides = (D, T * D, 1) if batch_first and grad else (T * D, D, 1)
    assert seen == [(x.data_ptr(), strides, y.data_ptr())]


MEMORY = """
import itertools, resource
import torch, fastlstm.nn
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MiB
torch.set_num_threads(1)
N, T, D, H = 64, 512, 512, 2
x = torch.ones(N, T, D)  # 64 MiB
before = peak()
for batch_first, grad in itertools.product((True, False), repeat=2):
    with torch.set_grad_enabled(grad):
        fastlstm.nn.LSTM(D, H, batch_first=batch_first)(x)
print(peak() - before)
"""


def test_batch_first_needs_no_memory_for_the_input():
    """No copy below Python either: the peak grows by less than a quarter of the input."""
    pytest.importorskip("resource", reason="measures memory as Unix does")
    assert int(stdout_of(run_python(MEMORY, timeout=120))) < 16


LAYOUTS = {
    "time": (1, 0, 2),
    "features": (0, 2, 1),
    "reversed": (2, 1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{"batch_first": True}, {"proj_size": 3}], ids=str)
def test_inputs_in_any_layout(layout, options):
    """Memory in which the axes of x and the states stand in another order."""
    ours, theirs = pair(D, H, 2, bidirectional=True, **options)
    order = LAYOUTS[layout]
    back = [order.index(k) for k in range(3)]

    def stored(x):
        return x.permute(order).contiguous().permute(back)

    first = (N, T, D) if ours.batch_first else (T, N, D)
    sizes = (ours.proj_size or H, H)
    inputs = [leaf(*first), *(leaf(4, N, size, seed=size) for size in sizes)]
    inputs = [stored(x.detach()) for x in inputs]
    assert not all(x.is_contiguous() for x in inputs)
    assert_same(ours, theirs, *inputs)


@pytest.mark.parametrize("options", [{"batch_first": True}, {"proj_size": 3}], ids=str)
def test_empty_batches(options):
    ours, theirs = pair(D, H, 2, bidirectional=True, **options)
    x = leaf(0, T, D) if ours.batch_first else leaf(T, 0, D)
    state = [leaf(4, 0, size) for size in (ours.proj_size or H, H)]
    assert_same(ours, theirs, x, *state)
    assert_same(ours, theirs, x)


def test_options_changed_after_construction():
    """People set them on the module; each call goes by what it finds."""
    ours, theirs = pair(D, H, 2)
    x = leaf(T, T, D)

    def run(module):
        results = [module(x)]
        module.batch_first = True
        results.append(module(x))
        module.dropout = 0.5
        torch.manual_seed(1)
        results.append(module(x))
        module.training = False
        results.append(module(x))
        return results

    assert_close(run(ours), run(theirs))


@both
def test_arguments_by_name(cell):
    ours, theirs = pair(D, H, cell=cell)
    x = leaf(N, D) if cell else leaf(T, N, D)
    state = tuple(leaf(*(() if cell else (1,)), N, H, seed=k) for k in (1, 2))
    assert_close(ours(input=x, hx=state), theirs(hx=state, input=x))


@both
def test_no_result_is_left_unwritten(cell):
    """torch's deterministic mode fills new memory with NaN before it is written."""
    x = leaf(N, D) if cell else leaf(T, N, D)
    kwargs = {} if cell else {"num_layers": 2, "bidirectional": True, "proj_size": 3}
    ours, theirs = pair(D, H, cell=cell, **kwargs)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert_same(ours, theirs, x)
    finally:
        torch.use_deterministic_algorithms(before)


@both
def test_under_a_default_device(cell):
    """What is created inside a call is where the input is."""
    ours, theirs = pair(D, H, cell=cell)
    x = leaf(N, D) if cell else leaf(T, N, D)
    expected = backward(theirs, x)
    with torch.device("meta"):
        result = ours(x)
    assert_close(result, expected[0])


# --- packed sequences ----------------------------------------------------------------------------

LENGTHS = [2, T, 4]


def packed(x, **kwargs):
    return rnn.pack_padded_sequence(x, LENGTHS, enforce_sorted=False, **kwargs)


@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_states_go_with_their_sequences(batch_first):
    """hx is in the order of the caller, and so are h_n and c_n; `batch_first` changes nothing."""
    ours, theirs = pair(D, H, 2, bidirectional=True, batch_first=batch_first)
    x = leaf(N, T, D) if batch_first else leaf(T, N, D)
    state = [leaf(4, N, H, seed=k) for k in (1, 2)]
    results = [m(packed(x, batch_first=batch_first), state) for m in (ours, theirs)]
    assert_close(*results)
    y, (h, c) = results[0]
    assert torch.equal(y.sorted_indices, torch.tensor([1, 2, 0]))
    for n, length in enumerate(LENGTHS):
        one = (x[n] if batch_first else x[:, n])[:length]
        alone, hidden = ours(one, [s[:, n] for s in state])
        padded, _ = rnn.pad_packed_sequence(y, batch_first=True)
        assert_close(padded[n, :length], alone)
        assert_close((h[:, n], c[:, n]), hidden)


# Each on a dense batch, and on the same batch packed: one and the same error.
S2 = (2, N, H)
PACKED_MISTAKES = {
    "input size": lambda m, f: m(f(zeros(T, N, D + 3))),
    "smaller input": lambda m, f: m(f(zeros(T, N, D - 1)), (zeros(*S2), zeros(*S2))),
    "dtype": lambda m, f: m(f(zeros(T, N, D, dtype=F64))),
    "batch of h": lambda m, f: m(f(zeros(T, N, D)), (zeros(2, N + 1, H), zeros(*S2))),
    "batch of c": lambda m, f: m(f(zeros(T, N, D)), (zeros(*S2), zeros(2, N - 1, H))),
    "hidden size": lambda m, f: m(f(zeros(T, N, D)), (zeros(2, N, H + 1), zeros(*S2))),
    "layers": lambda m, f: m(f(zeros(T, N, D)), (zeros(1, N, H), zeros(*S2))),
    "one state": lambda m, f: m(f(zeros(T, N, D)), (zeros(*S2),)),
    "three states": lambda m, f: m(f(zeros(T, N, D)), [zeros(2, N + 1, H)] * 3),
    "stacked": lambda m, f: m(f(zeros(T, N, D)), zeros(2, 2, N + 1, H)),
}


@pytest.mark.parametrize("mistake", PACKED_MISTAKES.values(), ids=PACKED_MISTAKES)
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_packed_mistakes_are_those_of_a_dense_batch(mistake, enforce_sorted, autocast):
    """nn.LSTM checks no packed input, and reads past its weights."""
    ours, theirs = pair(D, H, 2)
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS

    def pack(x):
        return rnn.pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if autocast and mistake is PACKED_MISTAKES["dtype"]:
            return  # autocast accepts it
        expected, _ = outcome(lambda: mistake(theirs, lambda x: x))
        actual, _ = outcome(lambda: mistake(ours, pack))
    assert isinstance(expected[0], type)
    assert actual == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("proj_size", [0, 3])
def test_nan_stays_in_its_own_sequence(value, proj_size):
    ours, theirs = pair(D, H, 2, bidirectional=True, proj_size=proj_size)
    x = leaf(T, N, D, grad=False)
    clean, _ = rnn.pad_packed_sequence(ours(packed(x))[0])
    x[1, 1] = value
    results = [m(packed(x)) for m in (ours, theirs)]
    assert_close(*results)
    padded, _ = rnn.pad_packed_sequence(results[0][0])
    assert torch.equal(padded[:, [0, 2]], clean[:, [0, 2]])
    if math.isnan(value):
        assert padded[:, 1].isnan().any()


# --- cells ---------------------------------------------------------------------------------------

CELL_MESSAGES = [
    (
        lambda m: m(zeros(1, 4, 2)),
        ValueError,
        "LSTMCell: Expected input to be 1D or 2D, got 3D instead",
    ),
    (
        lambda m: m(zeros(4, 2), (zeros(1, 4, 3), zeros(4, 3))),
        ValueError,
        "LSTMCell: Expected hx[0] to be 1D or 2D, got 3D instead",
    ),
    (
        lambda m: m(zeros(4, 2), (zeros(4, 3), zeros(1, 4, 3))),
        ValueError,
        "LSTMCell: Expected hx[1] to be 1D or 2D, got 3D instead",
    ),
    (
        lambda m: m(zeros(4, 3)),
        RuntimeError,
        "input has inconsistent input_size: got 3 expected 2",
    ),
    (
        lambda m: m(zeros(5, 2), (zeros(4, 3), zeros(5, 3))),
        RuntimeError,
        "Input batch size 5 doesn't match hidden0 batch size 4",
    ),
    (
        lambda m: m(zeros(5, 2), (zeros(5, 4), zeros(5, 3))),
        RuntimeError,
        "hidden0 has inconsistent hidden_size: got 4, expected 3",
    ),
]


@pytest.mark.parametrize("call, kind, words", CELL_MESSAGES, ids=words_only)
def test_messages_of_a_cell(call, kind, words):
    assert_same_words(call, *pair(2, 3, cell=True), kind, words)


@pytest.mark.parametrize("batch", [(), (N,)], ids=["unbatched", "batched"])
@pytest.mark.parametrize("make", [tuple, list, lambda states: Pair(*states)])
def test_kinds_of_states_of_a_cell(make, batch):
    ours, theirs = pair(D, H, cell=True)
    x, *state = leaf(*batch, D), leaf(*batch, H, seed=1), leaf(*batch, H, seed=2)
    results = [module(x, make(state)) for module in (ours, theirs)]
    assert_close(*results)
    assert type(results[0]) is tuple
    assert_same(ours, theirs, x, *map(transposed, state))


# --- dropout between layers ----------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.4, 1, 1.0])
@pytest.mark.parametrize("layout", ["batch_first", "unbatched", "projected", "packed"])
def test_dropout_draws_as_torch_does(layout, p):
    """Once for each layer but the last, on its output as the next one reads it."""
    options = {"batch_first": layout == "batch_first", "proj_size": 3 * (layout == "projected")}
    ours, theirs = pair(D, H, 3, dropout=p, bidirectional=True, **options)
    x = leaf(T, D) if layout == "unbatched" else leaf(T, N, D)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        y = module(packed(x) if layout == "packed" else x)
        grads = torch.autograd.grad(flatten(y)[0].sum(), [x, *module.parameters()])
        results.append([y, grads, torch.rand(3)])
    assert_close(*results)


# --- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["time", "batch_first", "unbatched", "packed", "projected"])
def test_meta_device_is_torchs_own_path(monkeypatch, layout):
    """Shapes without numbers; the kernels, which have memory to read, are not asked."""
    options = {"batch_first": layout == "batch_first", "proj_size": 3 * (layout == "projected")}
    ours, theirs = (m.to("meta") for m in pair(D, H, 2, bidirectional=True, **options))
    x = leaf(T, D) if layout == "unbatched" else leaf(T, N, D)
    x = rnn.pack_sequence(list(x.unbind(1))).to("meta") if layout == "packed" else x.to("meta")
    for kernel in ("run_layer", "infer"):
        monkeypatch.setattr(fastlstm._torch._core, kernel, None)
    result = assert_same_outcome(lambda: ours(x), lambda: theirs(x))
    assert flatten(result)[0].is_meta


def test_cell_on_the_meta_device_is_torchs_own_path(monkeypatch):
    ours, theirs = (m.to("meta") for m in pair(D, H, cell=True))
    for kernel in ("run_layer", "infer"):
        monkeypatch.setattr(fastlstm._torch._core, kernel, None)
    for x in (leaf(N, D).to("meta"), leaf(D).to("meta")):
        result = assert_same_outcome(lambda x=x: ours(x), lambda x=x: theirs(x))
        assert all(t.is_meta for t in result)
