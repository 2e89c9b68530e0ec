"""convert and revert: which modules change class, and that nothing else about them does."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch", reason="tests of the torch side")

import fastlstm.nn  # noqa: E402 - needs torch
from helpers_torch import (  # noqa: E402
    TRANSFORMS,
    D,
    H,
    N,
    T,
    assert_close,
    assert_same,
    backward,
    flatten,
    leaf,
    pair,
)
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(D, D)
        self.rnn = nn.LSTM(D, H, 2, batch_first=True, dropout=0.1, bidirectional=True)
        self.stack = nn.ModuleList(
            [nn.LSTMCell(2 * H, H), nn.ModuleDict({"cell": nn.LSTMCell(H, H)})]
        )
        self.alias = self.rnn  # one module under two names

    def forward(self, x):
        y, _ = self.rnn(self.embed(x))
        h, _ = self.stack[0](y[:, -1])
        return self.stack[1]["cell"](h)[0]


def test_convert_nested_and_shared_modules():
    torch.manual_seed(0)
    model = Model()
    parameters = dict(model.named_parameters())
    x = leaf(N, T, D, grad=False)
    expected = backward(model.eval(), x)

    assert fastlstm.nn.convert(model) is model
    assert type(model.rnn) is fastlstm.nn.LSTM
    assert type(model.stack[0]) is fastlstm.nn.LSTMCell
    assert type(model.stack[1]["cell"]) is fastlstm.nn.LSTMCell
    assert model.alias is model.rnn
    assert type(model.embed) is nn.Linear
    converted = dict(model.named_parameters())
    assert list(converted) == list(parameters)
    assert all(converted[name] is p for name, p in parameters.items())
    assert not model.training
    assert not model.rnn.training
    assert_close(backward(model, x), expected)

    assert fastlstm.nn.convert(model) is model  # a second time changes nothing
    assert_close(backward(model, x), expected)


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_convert_the_module_itself(cell):
    _, theirs = pair(D, H, cell=cell)
    x = leaf(N, D) if cell else leaf(T, N, D)
    expected = backward(theirs, x)
    parameters = list(theirs.parameters())
    ours = fastlstm.nn.convert(theirs)
    assert type(ours) is (fastlstm.nn.LSTMCell if cell else fastlstm.nn.LSTM)
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert_close(backward(ours, x), expected)


def test_convert_keeps_the_optimizer_working():
    models = []
    for convert in (True, False):
        torch.manual_seed(0)
        model = Model().eval()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        if convert:
            model = fastlstm.nn.convert(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(leaf(N, T, D, grad=False)).square().sum().backward()
            optimizer.step()
        models.append(model)
    for a, e in zip(*(m.parameters() for m in models), strict=True):
        assert_close(a, e, scale=20)  # Adam divides by small numbers


class Mine(nn.LSTM):
    def forward(self, x, hx=None):
        return "mine"


class MyCell(nn.LSTMCell):
    pass


class MyOurs(fastlstm.nn.LSTM):
    pass


def test_subclasses_are_left_alone():
    """A warning names what stays, and only that: what is ours already is no loss."""
    model = nn.ModuleList([Mine(D, H), MyCell(D, H), MyOurs(D, H), nn.GRU(D, H), nn.LSTM(D, H)])
    with pytest.warns(UserWarning, match=r"^convert: left as .*own: 0 \(Mine\), 1 \(MyCell\)$"):
        fastlstm.nn.convert(model)
    assert [type(m) for m in model] == [Mine, MyCell, MyOurs, nn.GRU, fastlstm.nn.LSTM]
    with pytest.warns(UserWarning, match=r"model \(Mine\)") as caught:
        assert type(fastlstm.nn.convert(Mine(D, H))) is Mine
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"^revert: left as they are, .*own: 2 \(MyOurs\)$"):
        fastlstm.nn.revert(model)
    assert [type(m) for m in model] == [Mine, MyCell, MyOurs, nn.GRU, nn.LSTM]


def test_subclasses_stay_when_parametrized():
    model = parametrizations.weight_norm(Mine(D, H), "weight_hh_l0")
    before = type(model)
    with pytest.warns(UserWarning, match=r"model \(ParametrizedMine\)"):
        fastlstm.nn.convert(model)
    assert type(model) is before


def test_replaced_forwards_are_left_alone():
    """Some libraries wrap a forward by setting it on the module; a class cannot change that."""
    model = nn.Sequential(nn.LSTM(D, H), nn.LSTM(H, H))
    model[0].forward = model[0].forward
    with pytest.warns(UserWarning, match=r"^convert: left as they are, .*own: 0 \(LSTM\)$"):
        fastlstm.nn.convert(model)
    assert [type(m) for m in model] == [nn.LSTM, fastlstm.nn.LSTM]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_modules_are_left_alone():
    model = nn.ModuleList(
        [
            torch.ao.nn.quantizable.LSTM(D, H),
            torch.ao.nn.quantizable.LSTMCell(D, H),
            torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(D, H))),
            torch.ao.nn.quantized.reference.LSTM(D, H),
            torch.ao.nn.quantized.reference.LSTMCell(D, H),
        ]
    )
    before = [type(m) for m in model.modules()]
    assert torch.ao.nn.quantized.dynamic.LSTM in before
    fastlstm.nn.convert(model)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantization_after_revert():
    """torch's quantization looks for nn.LSTM itself."""
    _, theirs = pair(D, H)
    x = leaf(T, N, D, grad=False)
    expected = torch.ao.quantization.quantize_dynamic(nn.Sequential(theirs))(x)
    model = fastlstm.nn.revert(fastlstm.nn.convert(nn.Sequential(theirs)))
    quantized = torch.ao.quantization.quantize_dynamic(model)
    assert type(quantized[0]) is torch.ao.nn.quantized.dynamic.LSTM
    assert_close(quantized(x), expected)


class Scripted(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0]


def test_scripted_modules_are_left_alone():
    _, theirs = pair(D, H)
    scripted = torch.jit.script(Scripted(theirs))
    model = nn.ModuleList([scripted, nn.LSTM(D, H)])
    fastlstm.nn.convert(model)
    assert model[0] is scripted
    assert type(model[1]) is fastlstm.nn.LSTM
    x = leaf(T, N, D)
    assert torch.equal(scripted(x), theirs(x)[0])


def test_lazy_modules_may_wait():
    torch.manual_seed(0)
    model = fastlstm.nn.convert(nn.Sequential(nn.LazyLinear(D), nn.LSTM(D, H)))
    assert_same(model, nn.Sequential(model[0], *pair_of(model[1])), leaf(T, N, 7))
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is fastlstm.nn.LSTM


def pair_of(ours):
    """torch's twin of ours, in a list."""
    return [fastlstm.nn.revert(copy.deepcopy(ours))]


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel], ids=lambda f: f.__name__)
def test_inside_wrappers(wrap):
    torch.manual_seed(0)
    model = Model().eval()
    x = leaf(N, T, D, grad=False)
    expected = backward(model, x)
    wrapped = wrap(model).eval()
    fastlstm.nn.convert(wrapped)
    assert type(wrapped.module.rnn) is fastlstm.nn.LSTM
    assert_close(backward(wrapped, x), expected)


def test_convert_and_revert():
    def build():
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.LSTM(D, H), "b": nn.Sequential(nn.LSTMCell(D, H))})
        model["shared"] = model["a"]
        model["spectral"] = parametrizations.spectral_norm(nn.LSTM(D, H), "weight_hh_l0")
        return model.eval()

    def classes(model):
        return [type(m) for m in model.modules()]

    model, twin = build(), build()
    before = classes(model)
    state = copy.deepcopy(model.state_dict())
    assert fastlstm.nn.convert(model) is model
    converted = classes(model)
    assert isinstance(model["a"], fastlstm.nn.LSTM) and model["shared"] is model["a"]
    assert isinstance(model["spectral"], fastlstm.nn.LSTM)
    assert isinstance(model["b"][0], fastlstm.nn.LSTMCell) and not model["a"].training
    x = leaf(T, N, D)
    for name in ("a", "spectral"):
        assert_same(model[name], twin[name], x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlstm.nn.convert(model)
    assert classes(model) == converted
    assert fastlstm.nn.revert(model) is model
    assert [c.__name__ for c in classes(model)] == [c.__name__ for c in before]
    assert not any(isinstance(m, fastlstm.nn.LSTM | fastlstm.nn.LSTMCell) for m in model.modules())
    assert_same(model["spectral"], twin["spectral"], x)
    assert_close(list(model.state_dict().values()), list(state.values()))
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        fastlstm.nn.revert(3)


def test_flags_and_attributes_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(D, H))
    model[0].weight_hh_l0.requires_grad_(False)
    model[0].note = "mine"
    model[0].register_buffer("mean", torch.ones(3))
    model = fastlstm.nn.convert(model)
    model(leaf(T, N, D))[0].sum().backward()
    assert model[0].note == "mine"
    assert model[0].mean is model.get_buffer("0.mean")
    assert not model[0].weight_hh_l0.requires_grad
    assert model[0].weight_hh_l0.grad is None
    assert model[0].weight_ih_l0.grad is not None


HOOKS = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_run(cell, when):
    """Each once, whether it was registered before convert or after it."""
    _, module = pair(D, H, cell=cell)
    if when == "after":
        fastlstm.nn.convert(module)
    calls = []
    for name in HOOKS:
        getattr(module, name)(lambda *_, name=name: calls.append(name))
    fastlstm.nn.convert(module)
    module(leaf(N, D) if cell else leaf(T, N, D))[0].sum().backward()
    module.load_state_dict(module.state_dict())
    assert calls == list(HOOKS)


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_hooks_that_change_what_goes_in_and_out(cell):
    x = leaf(N, D) if cell else leaf(T, N, D)
    ours, theirs = pair(D, H, cell=cell)
    fastlstm.nn.revert(ours)
    for module in (ours, theirs):
        module.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
        module.register_forward_hook(lambda _, args, out: (out[0] + 1, out[1]))
    assert_same(fastlstm.nn.convert(ours), theirs, x)


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(cell, dtype):
    """The same module as one that was made as ours: its tests hold for both."""
    made, theirs = pair(D, H, cell=cell, dtype=dtype)
    x = leaf(N, D, dtype=dtype) if cell else leaf(T, N, D, dtype=dtype)
    converted = fastlstm.nn.convert(theirs)
    assert type(converted) is type(made)
    for a, e in zip(flatten(backward(converted, x)), flatten(backward(made, x)), strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, e)


def test_meta_device_then_a_checkpoint():
    """How large models are loaded: made without memory, converted, then given their weights."""
    torch.manual_seed(0)
    source = Model().eval()
    with torch.device("meta"):
        models = [fastlstm.nn.convert(Model()).eval() for _ in range(2)]
    assert all(p.is_meta for model in models for p in model.parameters())
    models[0].load_state_dict(source.state_dict(), assign=True)
    models[1].to_empty(device="cpu").load_state_dict(source.state_dict())
    x = leaf(N, T, D, grad=False)
    for model in models:
        assert type(model.rnn) is fastlstm.nn.LSTM
        assert_close(backward(model, x), backward(source, x))


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_copies_of_converted_models(way):
    torch.manual_seed(0)
    model = fastlstm.nn.convert(Model().eval())
    x = leaf(N, T, D, grad=False)
    expected = backward(model, x)
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin.rnn) is fastlstm.nn.LSTM
    assert type(twin.stack[0]) is fastlstm.nn.LSTMCell
    assert twin.alias is twin.rnn
    assert not twin.rnn.training
    for a, e in zip(flatten(backward(twin, x)), flatten(expected), strict=True):
        assert torch.equal(a, e)
    with torch.no_grad():  # nothing is shared with the model it was copied from
        for p in twin.parameters():
            p.zero_()
    assert_close(backward(model, x), expected)
    assert not twin(x).any()


def test_state_dicts_are_those_of_torch():
    torch.manual_seed(0)
    model = Model()
    before = model.state_dict()
    after = fastlstm.nn.convert(model).state_dict()
    assert list(after) == list(before)
    assert after._metadata == before._metadata
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    Model().load_state_dict(after)
    fastlstm.nn.convert(Model()).load_state_dict(before)


def shown_classes(model):
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_parametrized_modules(cell):
    """Converted, copied, converted again, freed of their parametrizations, reverted."""
    weights = ("weight_ih", "weight_hh") if cell else ("weight_ih_l0", "weight_hh_l0")
    twins = []
    for _ in range(2):
        _, module = pair(D, H, cell=cell)
        parametrizations.weight_norm(module, weights[0])
        parametrizations.orthogonal(module, weights[1])
        twins.append(nn.ModuleDict({"inner": module}))
    model, twin = twins
    x = leaf(N, D) if cell else leaf(T, N, D)
    fastlstm.nn.convert(model)
    inner = model["inner"]
    ours = fastlstm.nn.LSTMCell if cell else fastlstm.nn.LSTM
    assert isinstance(inner, ours)
    assert type(inner).__name__ == type(twin["inner"]).__name__
    assert list(model.state_dict()) == list(twin.state_dict())
    assert_same(inner, twin["inner"], x)

    classes = shown_classes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlstm.nn.convert(model)
    assert shown_classes(model) == classes

    copied = copy.deepcopy(model)["inner"]
    assert isinstance(copied, ours)
    assert_same(copied, twin["inner"], x)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(inner)  # as torch says of its own

    fastlstm.nn.revert(copied)
    assert not isinstance(copied, ours)
    assert_same(copied, twin["inner"], x)

    for module in (inner, twin["inner"]):
        for name in weights:
            parametrize.remove_parametrizations(module, name)
    assert type(inner) is ours
    assert_same(inner, twin["inner"], x)


def test_convert_what_is_no_module():
    with pytest.raises(TypeError, match=r"(?s)expected.*Module.*got.*int"):
        fastlstm.nn.convert(3)


def test_convert_transformed_modules():
    """weight_norm and pruning leave hooks or subclasses behind; the results stay."""
    x = leaf(T, N, D)
    for name in ("weight_norm", "weight_norm_old", "prune"):
        twins = []
        for _ in range(2):  # some transformed modules cannot be deep-copied
            torch.manual_seed(0)
            twins.append(TRANSFORMS[name](nn.LSTM(D, H), "weight_hh_l0"))
        assert_same(fastlstm.nn.convert(twins[0]), twins[1], x)


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning_trains_a_converted_model(tmp_path):
    """Its Trainer, with a checkpoint: the same weights as with the model as it was."""
    lightning = pytest.importorskip("lightning", reason="lightning (PyTorch Lightning) is missing")

    class Module(lightning.LightningModule):
        def __init__(self, convert):
            super().__init__()
            self.model = Model()
            if convert:
                fastlstm.nn.convert(self.model)

        def training_step(self, batch):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.5)

    def train(convert):
        lightning.seed_everything(0)
        module = Module(convert)
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            default_root_dir=tmp_path / str(convert),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = leaf(4 * N, T, D, grad=False)
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=N))
        assert trainer.global_step == 8
        checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)
        assert [type(m) is nn.LSTM for m in module.modules()].count(True) == (not convert)
        return module.state_dict(), checkpoint["state_dict"]

    ours, theirs = train(True), train(False)
    for actual, expected in zip(ours, theirs, strict=True):
        assert list(actual) == list(expected)
        assert_close(list(actual.values()), list(expected.values()), scale=10)
