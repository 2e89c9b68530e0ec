"""What the tests of the torch side share: twins of ours and torch's, and their comparison.

"The same outcome" means that both return equal values or that both raise the same error, so these
tests hold for whatever torch version is installed.
"""

from __future__ import annotations

import warnings
from functools import partial

import fastlstm.nn
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, rnn

T, N, D, H = 6, 3, 4, 5
DTYPES = {"float32": torch.float32, "float64": torch.float64}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
F32, F64 = torch.float32, torch.float64
# More than in test_kernels.py, since nn.LSTM is off as well; other dtypes are torch's own: equal.
TOLERANCE = {F32: 1e-5, F64: 2e-14}


class Marked(torch.Tensor):
    """A subclass that means nothing by it."""


def flatten(value):
    """All tensors of a nested result; None stays."""
    if isinstance(value, rnn.PackedSequence):
        return [value.data, value.batch_sizes, value.sorted_indices, value.unsorted_indices]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in flatten(part)]
    return [value]


def assert_close(actual, expected, *, scale=1.0):
    """Nested results with the same structure, dtypes, devices and, up to rounding, values."""
    assert type(actual) is type(expected)
    for a, e in zip(flatten(actual), flatten(expected), strict=True):
        if e is None or not isinstance(e, torch.Tensor):
            assert a == e
            continue
        assert (a.shape, a.dtype, a.device) == (e.shape, e.dtype, e.device)
        if a.numel() == 0 or a.device.type == "meta":
            continue
        if not a.is_floating_point():
            assert torch.equal(a, e)
            continue
        limit = scale * TOLERANCE.get(a.dtype, 0) * max(1.0, e.detach().abs().max().item())
        torch.testing.assert_close(a, e, rtol=0, atol=limit, equal_nan=True)


def outcome(f):
    """What f returns, or the type and the text of what it raises, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = f()
        except Exception as error:
            result = (type(error), str(error))
    return result, [(w.category, str(w.message)) for w in caught]


def assert_same_outcome(ours, theirs, **kwargs):
    (a, a_warnings), (e, e_warnings) = outcome(ours), outcome(theirs)
    assert_close(a, e, **kwargs)
    assert a_warnings == e_warnings
    return e


def pair(*args, cell=False, seed=0, **kwargs):
    """Ours and theirs with the same parameters."""
    name = "LSTMCell" if cell else "LSTM"
    torch.manual_seed(seed)
    theirs = getattr(nn, name)(*args, **kwargs)
    ours = getattr(fastlstm.nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def leaf(*shape, dtype=F32, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_(grad)


def copy_of(x):
    """Of the same strides."""
    return x.detach().clone(memory_format=torch.preserve_format)


def backward(module, *inputs):
    """The result, and the gradients of inputs and parameters of a loss that uses all of it."""
    inputs = [copy_of(x).requires_grad_() for x in inputs]
    x, *state = inputs
    result = module(x, tuple(state)) if state else module(x)
    outputs = flatten(result)
    incoming = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in outputs]
    grads = torch.autograd.grad(
        outputs, [*inputs, *module.parameters()], incoming, allow_unused=True
    )
    return result, list(grads)


def assert_same(ours, theirs, *inputs):
    """Result and every gradient."""
    assert_close(backward(ours, *inputs), backward(theirs, *inputs))


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def old_weight_norm(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in use
        return nn.utils.weight_norm(module, name)


# What people do to a weight of a module, given by its name.
TRANSFORMS = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm_old": old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "prune": partial(prune.l1_unstructured, amount=0.5),
}
