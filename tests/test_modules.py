"""PyTorch's own samples of LSTM and LSTMCell, run through our classes.

torch describes each of its modules for its tests: constructor arguments, inputs, a reference and
calls that must fail (`torch.testing._internal.common_modules.module_db`). Here our classes are
built from these descriptions, and checked for what torch checks of its own. Neither module has an
`inplace` option, and one that is moved between two GPUs needs two: those checks are not here.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import os
import pickle
import re
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import hypothesis
import pytest

torch = pytest.importorskip("torch", reason="tests of the torch side")
pytest.importorskip("expecttest", reason="torch's table of modules needs it")

import fastlstm.nn  # noqa: E402 - needs torch
from helpers_torch import (  # noqa: E402
    F32,
    F64,
    assert_close,
    assert_same_outcome,
    every_dtype,
    flatten,
)
from torch import nn  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_unflatten  # noqa: E402

OURS = {nn.LSTM: fastlstm.nn.LSTM, nn.LSTMCell: fastlstm.nn.LSTMCell}
both_classes = pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# What torch says of itself, once, when it has projections to compute in float32.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.fixture(scope="module")
def module_db():
    """torch's table by class; its import is kept from changing settings of the whole process."""
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(torch.backends, "disable_global_flags"),
    ):
        from torch.testing._internal.common_modules import module_db
    hypothesis.settings.load_profile("repeatable")  # see conftest.py
    return {info.module_cls: info for info in module_db}


@dataclass
class Sample:
    """Ours and theirs with equal parameters, what they are called with, and torch's reference."""

    constructor: tuple[tuple, dict]
    ours: nn.Module
    theirs: nn.Module
    args: tuple
    kwargs: dict
    reference: Any

    def call(self, module, *, args=None):
        return module(*(self.args if args is None else args), **self.kwargs)


@pytest.fixture
def samples(module_db):
    """All samples of a class."""

    def build(cls, dtype=F32, training=True, requires_grad=False):
        torch.manual_seed(0)
        info = module_db[cls]
        described = info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training
        )
        assert described
        for one in described:
            args, kwargs = one.constructor_input.args, one.constructor_input.kwargs
            print(cls.__name__, args, kwargs)  # pytest shows it where a check fails
            theirs = cls(*args, **kwargs).to(dtype).train(training)
            ours = OURS[cls](*args, **kwargs).to(dtype).train(training)
            ours.load_state_dict(theirs.state_dict())
            called = one.forward_input
            yield Sample((args, kwargs), ours, theirs, called.args, called.kwargs, one.reference_fn)

    return build


def sliced(x):
    """The same values, none next to another."""
    return torch.stack((x, torch.full_like(x, float("nan"))), -1)[..., 0]


def gradients(sample, module, layout=lambda x: x):
    """The result and the gradients of all inputs and parameters."""
    values, structure = tree_flatten(sample.args)
    leaves = [layout(value.detach()).requires_grad_() for value in values]
    result = sample.call(module, args=tree_unflatten(leaves, structure))
    outputs = flatten(result)
    incoming = [layout(torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)) for t in outputs]
    return [result, torch.autograd.grad(outputs, [*leaves, *module.parameters()], incoming)]


@both_classes
@both_modes
@every_dtype
def test_forward(monkeypatch, samples, cls, dtype, training):
    """Equal to torch's class, and to torch's reference with the module as ours."""
    for sample in samples(cls, dtype, training):
        expected = sample.call(sample.theirs)
        with monkeypatch.context() as patch:
            patch.setattr(cls, "forward", None)  # no way back to torch's own path
            result = sample.call(sample.ours)
            reference = sample.reference(sample.ours, *sample.args, **sample.kwargs)
        assert_close(result, expected)
        assert_close(result, reference)


@both_classes
@both_modes
@every_dtype
def test_gradients(samples, cls, dtype, training):
    for sample in samples(cls, dtype, training):
        assert_close(gradients(sample, sample.ours), gradients(sample, sample.theirs))


@both_classes
@both_modes
def test_non_contiguous_tensors(samples, cls, training):
    """Inputs, states and gradients that are not contiguous: the results are those of copies."""
    for sample in samples(cls, F32, training):
        contiguous = gradients(sample, sample.ours)
        for a, e in zip(
            flatten(gradients(sample, sample.ours, sliced)), flatten(contiguous), strict=True
        ):
            assert torch.equal(a, e)


def as_function(sample):
    """The module of a sample as a function of inputs and parameters alone."""
    values, structure = tree_flatten(sample.args)
    names, parameters = zip(*sample.ours.named_parameters(), strict=True)

    def f(*tensors):
        args = tree_unflatten(tensors[: len(values)], structure)
        weights = dict(zip(names, tensors[len(values) :], strict=True))
        called = torch.func.functional_call(sample.ours, weights, args, sample.kwargs)
        return tuple(flatten(called))

    return f, (*values, *parameters)


@both_classes
def test_gradcheck(samples, cls):
    for k, sample in enumerate(samples(cls, F64, requires_grad=True)):
        sample.ours.train(k % 2 == 0)  # test_training_and_eval shows that both give the same
        assert torch.autograd.gradcheck(*as_function(sample))


@both_classes
def test_gradgradcheck(samples, cls):
    for k, sample in enumerate(samples(cls, F64, requires_grad=True)):
        sample.ours.train(k % 2 == 1)
        assert torch.autograd.gradgradcheck(*as_function(sample), fast_mode=True)


@both_classes
def test_factory_kwargs(samples, cls):
    """Device and dtype reach every parameter, and the numbers drawn are torch's."""
    for sample, device, dtype in itertools.product(
        samples(cls), ("cpu", "meta"), (F32, F64, torch.bfloat16)
    ):
        args, kwargs = sample.constructor
        made = []
        for kind in (OURS[cls], cls):
            torch.manual_seed(1)
            made.append(kind(*args, **kwargs, device=device, dtype=dtype))
        assert {(p.device.type, p.dtype) for p in made[0].parameters()} == {(device, dtype)}
        assert_close(*(list(module.state_dict().values()) for module in made))


@both_classes
def test_made_under_a_device_and_a_default_dtype(samples, cls):
    for sample in samples(cls):
        args, kwargs = sample.constructor
        with torch.device("meta"):
            assert all(p.is_meta for p in OURS[cls](*args, **kwargs).parameters())
        torch.set_default_dtype(F64)
        try:
            assert all(p.dtype == F64 for p in OURS[cls](*args, **kwargs).parameters())
        finally:
            torch.set_default_dtype(F32)


@both_classes
def test_repr(samples, cls):
    for sample in samples(cls):
        assert repr(sample.ours) == repr(sample.theirs)
        assert str(sample.ours) == str(sample.theirs)


@both_classes
def test_signature(cls):
    """The same arguments; `inplace`, whose effects torch would check, is none of them."""
    signatures = [inspect.signature(kind.__init__) for kind in (OURS[cls], cls)]
    assert signatures[0] == signatures[1]
    assert "inplace" not in signatures[0].parameters


@both_classes
@both_modes
def test_inputs_stay_as_they_are(samples, cls, training):
    for sample in samples(cls, F32, training):
        values = tree_flatten(sample.args)[0]
        kept, versions = copy.deepcopy(values), [value._version for value in values]
        sample.call(sample.ours)
        assert all(torch.equal(a, e) for a, e in zip(values, kept, strict=True))
        assert [value._version for value in values] == versions


@both_classes
@both_modes
def test_pickle(samples, cls, training):
    for sample in samples(cls, F32, training):
        buffer = io.BytesIO()
        torch.save(sample.ours, buffer)
        buffer.seek(0)
        expected = flatten(gradients(sample, sample.ours))
        for twin in (
            pickle.loads(pickle.dumps(sample.ours)),
            torch.load(buffer, weights_only=False),
            copy.deepcopy(sample.ours),
        ):
            assert type(twin) is OURS[cls]
            assert twin.training == training
            actual = flatten(gradients(sample, twin))
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@both_classes
def test_state_dict(samples, cls):
    for sample in samples(cls):
        args, kwargs = sample.constructor
        assert list(sample.ours.state_dict()) == list(sample.theirs.state_dict())
        twin = OURS[cls](*args, **kwargs)
        twin.load_state_dict(sample.theirs.state_dict())
        assert_close(sample.call(twin), sample.call(sample.theirs))
        back = cls(*args, **kwargs)
        back.load_state_dict(twin.state_dict())
        assert_close(sample.call(back), sample.call(sample.theirs))


@both_classes
def test_training_and_eval(samples, cls):
    """None of the samples has dropout, so both modes give the same, bit for bit."""
    for sample in samples(cls):
        results = [flatten(gradients(sample, sample.ours.train(mode))) for mode in (True, False)]
        assert all(torch.equal(a, e) for a, e in zip(*results, strict=True))
        assert not sample.ours.eval().training


@both_classes
@pytest.mark.parametrize("swap", [False, True], ids=["set_data", "swap_tensors"])
def test_to(samples, cls, swap):
    """To another dtype and back, and to a device without memory, in both ways torch does it."""
    for sample in samples(cls):
        parameters = list(sample.ours.parameters())
        values, structure = tree_flatten(sample.args)
        args = tree_unflatten([value.to(F64) for value in values], structure)
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            for module in (sample.ours, sample.theirs):
                module.to(F64)
            with torch.no_grad():  # what a graph holds cannot be swapped
                results = [sample.call(m, args=args) for m in (sample.ours, sample.theirs)]
            for module in (sample.ours, sample.theirs):
                module.to("cpu", F32).to(memory_format=torch.contiguous_format)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert_close(*results)
        assert_close(gradients(sample, sample.ours), gradients(sample, sample.theirs))
        assert all(a is b for a, b in zip(sample.ours.parameters(), parameters, strict=True))
        assert all(p.is_meta for p in sample.ours.to("meta").parameters())


@both_classes
@both_modes
def test_to_empty(samples, cls, training):
    for sample in samples(cls, F32, training):
        args, kwargs = sample.constructor
        module = OURS[cls](*args, **kwargs, device="meta").train(training)
        module.to_empty(device="cpu")
        assert all(p.device.type == "cpu" for p in module.parameters())
        with torch.no_grad():
            for p, q in zip(module.parameters(), sample.theirs.parameters(), strict=True):
                p.copy_(q)
        assert_close(gradients(sample, module), gradients(sample, sample.theirs))


@both_classes
def test_meta_device(samples, cls):
    for sample in samples(cls):
        values, structure = tree_flatten(sample.args)
        args = tree_unflatten([value.to("meta") for value in values], structure)
        for module in (sample.ours, sample.theirs):
            module.to("meta")
        result = assert_same_outcome(
            partial(sample.call, sample.ours, args=args),
            partial(sample.call, sample.theirs, args=args),
        )
        assert all(t.is_meta for t in flatten(result))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@both_classes
def test_cpu_and_gpu_agree(samples, cls):
    for sample in samples(cls, F64):
        expected = flatten(sample.call(sample.ours))
        values, structure = tree_flatten(sample.args)
        args = tree_unflatten([value.cuda() for value in values], structure)
        actual = flatten(sample.call(sample.ours.cuda(), args=args))
        assert_close([a.cpu() for a in actual], expected)


@both_classes
@every_dtype
def test_errors(module_db, cls, dtype):
    """The calls that torch says must fail do, with the error torch expects, word for word."""
    info = module_db[cls]
    found = info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=True
    )
    assert found
    for error in found:
        constructor = error.module_error_input.constructor_input
        called = error.module_error_input.forward_input
        print(cls.__name__, constructor.args, constructor.kwargs)

        def fail(kind, constructor=constructor, called=called):
            module = kind(*constructor.args, **constructor.kwargs)
            return called and module.to(dtype)(*called.args, **called.kwargs)

        kind, text = assert_same_outcome(
            lambda fail=fail: fail(OURS[cls]), lambda fail=fail: fail(cls)
        )
        assert issubclass(kind, error.error_type)
        assert re.search(error.error_regex, text)
