"""convert and revert: which modules change class, and that nothing else about them does."""

from __future__ import annotations

import copy
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
    leaf,
    pair,
)
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402


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


def test_convert_leaves_subclasses_alone():
    class Mine(nn.LSTM):
        def forward(self, x, hx=None):
            return "mine"

    class MyCell(nn.LSTMCell):
        pass

    model = nn.ModuleList([Mine(D, H), MyCell(D, H), nn.GRU(D, H), nn.LSTM(D, H)])
    with pytest.warns(UserWarning, match=r"left subclasses as they are: 0 \(Mine\), 1 \(MyCell\)$"):
        fastlstm.nn.convert(model)
    assert [type(m) for m in model] == [Mine, MyCell, nn.GRU, fastlstm.nn.LSTM]
    with pytest.warns(UserWarning, match=r"model \(Mine\)"):
        assert type(fastlstm.nn.convert(Mine(D, H))) is Mine
    fastlstm.nn.revert(model)
    assert [type(m) for m in model] == [Mine, MyCell, nn.GRU, nn.LSTM]


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


def test_convert_keeps_hooks_flags_and_attributes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(D, H))
    model[0].weight_hh_l0.requires_grad_(False)
    model[0].note = "mine"
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    model = fastlstm.nn.convert(model)
    y, _ = model(leaf(T, N, D))
    y.sum().backward()
    assert calls == ["forward", "backward"]
    assert model[0].note == "mine"
    assert not model[0].weight_hh_l0.requires_grad
    assert model[0].weight_hh_l0.grad is None


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
