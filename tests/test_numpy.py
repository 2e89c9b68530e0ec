"""The NumPy layer: fastlstm.LSTM, and the manners of lstm_forward and lstm_backward."""

from __future__ import annotations

import copy
import itertools
from typing import NamedTuple

import fastlstm
import numpy as np
import pytest
from fastlstm import reference
from helpers import (
    assert_all_close,
    assert_all_same_bits,
    assert_close,
    assert_same_bits,
    make_problem,
    named_gradients,
    numeric_gradient,
    run_kernels,
    run_reference,
)
from hypothesis import given
from hypothesis import strategies as st

T, N, D, H = 7, 3, 5, 9


class Config(NamedTuple):
    """One way to build an LSTM and to call it."""

    num_layers: int
    bidirectional: bool
    bias: bool
    layout: str  # "time first", "batch first" or "unbatched"

    @property
    def batch_first(self) -> bool:
        return self.layout == "batch first"

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def build(self, input_size=D, hidden_size=H, dtype=np.float32, seed=0) -> fastlstm.LSTM:
        return fastlstm.LSTM(
            input_size,
            hidden_size,
            num_layers=self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
            dtype=dtype,
            rng=seed,
        )

    def shapes(self, T=T, N=N, D=D, H=H):
        """Of x, y and a state."""
        lead = {"time first": (T, N), "batch first": (N, T), "unbatched": (T,)}[self.layout]
        slots = self.num_layers * self.directions
        state = (slots, H) if self.layout == "unbatched" else (slots, N, H)
        return (*lead, D), (*lead, self.directions * H), state

    def inputs(self, rng, dtype=np.float32, T=T, N=N, D=D, H=H):
        """x, (h0, c0), grad_y, (grad_h, grad_c)."""
        x, y, state = self.shapes(T, N, D, H)
        x, h, c, dy, dh, dc = (
            rng.standard_normal(shape).astype(dtype) for shape in (x, state, state, y, state, state)
        )
        return x, (h, c), dy, (dh, dc)


CONFIGS = [
    Config(*values)
    for values in itertools.product(
        (1, 2, 3), (False, True), (True, False), ("time first", "batch first", "unbatched")
    )
]


def config_ids(config: Config) -> str:
    return "-".join(map(str, config))


every_config = pytest.mark.parametrize("config", CONFIGS, ids=config_ids)


def run(rnn, x, state=None, grad_y=None, grad_state=None):
    """Everything that an LSTM says about its inputs, by name."""
    y, (h, c) = rnn(x, state)
    y_train, (h_train, c_train), tape = rnn.forward(x, state)
    grads = rnn.backward(tape, grad_y, grad_state)
    return {
        "y": y,
        "h_n": h,
        "c_n": c,
        "y, training": y_train,
        "h_n, training": h_train,
        "c_n, training": c_train,
        "grad x": grads.x,
        "grad h0": grads.h0,
        "grad c0": grads.c0,
        **{f"grad {name}": g for name, g in grads.weights.items()},
    }


# --- results -------------------------------------------------------------------------------------


@every_config
def test_equals_torch(torch, config, dtype, rng):
    rnn = config.build(dtype=dtype)
    x, state, grad_y, grad_state = config.inputs(rng, dtype)
    actual = run(rnn, x, state, grad_y, grad_state)

    theirs = torch.nn.LSTM(
        D,
        H,
        config.num_layers,
        bias=config.bias,
        batch_first=config.batch_first,
        bidirectional=config.bidirectional,
        dtype=torch.float64,
    )
    theirs.load_state_dict({name: torch.tensor(w) for name, w in rnn.state_dict().items()})
    x, h0, c0 = (
        torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, state[0], state[1])
    )
    y, (h_n, c_n) = theirs(x, (h0, c0))
    grads = [torch.tensor(a, dtype=torch.float64) for a in (grad_y, *grad_state)]
    torch.autograd.backward((y, h_n, c_n), grads)

    expected = {"y": y, "h_n": h_n, "c_n": c_n}
    expected |= {f"{name}, training": a for name, a in expected.items()}
    expected |= {"grad x": x.grad, "grad h0": h0.grad, "grad c0": c0.grad}
    expected |= {f"grad {name}": w.grad for name, w in theirs.named_parameters()}
    expected = {name: a.detach().numpy() for name, a in expected.items()}
    assert list(actual) == list(expected)  # the order of the weights, too
    assert_all_close(actual, expected, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_layers_and_directions_equal_the_reference_put_together(bias, dtype, rng):
    config = Config(2, True, bias, "time first")
    rnn = config.build(dtype=dtype)
    x, (h0, c0), _, _ = config.inputs(rng, dtype)

    layer_input, h_n, c_n = x, [], []
    for layer in range(2):
        halves = []
        for direction, suffix in enumerate(("", "_reverse")):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if bias else 2]
            weights = [rnn.weights[f"{name}_l{layer}{suffix}"] for name in names]
            slot = 2 * layer + direction
            y, h, c, _, _ = reference.lstm_forward(
                layer_input, *weights, h0=h0[slot], c0=c0[slot], reverse=direction == 1
            )
            halves.append(y)
            h_n.append(h)
            c_n.append(c)
        layer_input = np.concatenate(halves, axis=-1)

    y, (h, c) = rnn(x, (h0, c0))
    for actual, expected in ((y, layer_input), (h, np.stack(h_n)), (c, np.stack(c_n))):
        assert actual.dtype == dtype
        assert_close(actual, expected)


@pytest.mark.parametrize(
    "config",
    [
        Config(1, False, True, "time first"),
        Config(1, False, False, "unbatched"),
        Config(2, True, True, "batch first"),
        Config(3, False, True, "time first"),
    ],
    ids=config_ids,
)
def test_gradients_equal_finite_differences(config, rng):
    sizes = {"T": 3, "N": 2, "D": 2, "H": 3}
    rnn = config.build(2, 3, np.float64)
    x, (h0, c0), grad_y, (grad_h, grad_c) = config.inputs(rng, np.float64, **sizes)

    def loss():
        y, (h, c) = rnn(x, (h0, c0))
        return (y * grad_y).sum() + (h * grad_h).sum() + (c * grad_c).sum()

    _, _, tape = rnn.forward(x, (h0, c0))
    grads = rnn.backward(tape, grad_y, (grad_h, grad_c))
    for name, actual, array in [
        ("x", grads.x, x),
        ("h0", grads.h0, h0),
        ("c0", grads.c0, c0),
        *((name, grads.weights[name], w) for name, w in rnn.weights.items()),
    ]:
        assert_close(actual, numeric_gradient(loss, array), tolerance=1e-10, name=name)


@every_config
def test_no_state_means_zeros(config, dtype, rng):
    rnn = config.build(dtype=dtype)
    x, (h0, c0), grad_y, grad_state = config.inputs(rng, dtype)
    zeros = np.zeros_like(h0), np.zeros_like(c0)
    expected = run(rnn, x, zeros, grad_y, grad_state)
    assert_all_same_bits(run(rnn, x, None, grad_y, grad_state), expected)
    assert_all_same_bits(run(rnn, x, list(zeros), grad_y, list(grad_state)), expected)


@every_config
def test_gradients_that_are_none_mean_zeros(config, dtype, rng):
    rnn = config.build(dtype=dtype)
    x, state, grad_y, (grad_h, grad_c) = config.inputs(rng, dtype)
    zeros = np.zeros_like(grad_h)
    zero_y = np.zeros_like(grad_y)
    for short, spelled_out in [
        ((grad_y, None), (grad_y, (zeros, zeros))),
        ((None, (grad_h, grad_c)), (zero_y, (grad_h, grad_c))),
        ((None, (grad_h, None)), (zero_y, (grad_h, zeros))),
        ((None, (None, grad_c)), (zero_y, (zeros, grad_c))),
        ((None, None), (zero_y, (zeros, zeros))),
    ]:
        actual, expected = run(rnn, x, state, *short), run(rnn, x, state, *spelled_out)
        for name, a in actual.items():
            np.testing.assert_array_equal(a, expected[name], err_msg=name)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.layout != "unbatched"], ids=config_ids)
def test_empty_batch(config, dtype, rng):
    rnn = config.build(dtype=dtype)
    x, state, grad_y, grad_state = config.inputs(rng, dtype, N=0)
    results = run(rnn, x, state, grad_y, grad_state)
    assert results["y"].shape == grad_y.shape
    assert results["h_n"].shape == results["c_n"].shape == state[0].shape
    assert results["grad x"].shape == x.shape
    for name, w in rnn.weights.items():
        gradient = results[f"grad {name}"]
        assert gradient.shape == w.shape
        assert not gradient.any()


@given(
    T=st.integers(1, 9),
    N=st.integers(0, 9),
    D=st.integers(1, 20),
    H=st.integers(1, 20),
    config=st.sampled_from(CONFIGS),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 1000),
)
def test_any_shape(T, N, D, H, config, dtype, seed):
    """Shapes, dtypes and, by turning the batch round, that no row disturbs another."""
    rnn = config.build(D, H, dtype, seed)
    x, state, grad_y, grad_state = config.inputs(np.random.default_rng(seed), dtype, T, N, D, H)
    results = run(rnn, x, state, grad_y, grad_state)
    shapes = [results[name].shape for name in ("y", "h_n", "c_n")]
    assert shapes == [grad_y.shape, state[0].shape, state[0].shape]
    assert {a.dtype for a in results.values()} == {np.dtype(dtype)}
    assert all(np.isfinite(a).all() for a in results.values())
    if config.layout == "unbatched":
        return  # there is no batch to turn round

    axis = 0 if config.batch_first else 1
    x, grad_y = np.flip(x, axis), np.flip(grad_y, axis)
    state, grad_state = ([np.flip(a, 1) for a in pair] for pair in (state, grad_state))
    turned = run(rnn, x, state, grad_y, grad_state)
    for name in ("y", "grad x"):
        assert_close(np.flip(turned[name], axis), results[name].astype(np.float64), name=name)
    for name in ("h_n", "c_n", "grad h0", "grad c0"):
        assert_close(np.flip(turned[name], 1), results[name].astype(np.float64), name=name)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_go_where_torch_puts_them(torch, dtype, rng, bad):
    config = Config(2, True, True, "time first")
    rnn = config.build(dtype=dtype)
    x, state, _, _ = config.inputs(rng, dtype)
    x[3, 1, 2] = bad
    clean = np.where(np.isfinite(x), x, dtype(0))
    y, (h, c) = rnn(x, state)
    clean_y, (clean_h, clean_c) = rnn(clean, state)
    others = [0, 2]
    for a, b in ((y, clean_y), (h, clean_h), (c, clean_c)):
        assert_same_bits(a[:, others], b[:, others])

    theirs = torch.nn.LSTM(D, H, 2, bidirectional=True, dtype=torch.float64)
    theirs.load_state_dict({name: torch.tensor(w) for name, w in rnn.state_dict().items()})
    y2, (h2, c2) = theirs(*(torch.tensor(x).double(), [torch.tensor(s).double() for s in state]))
    for a, b in ((y, y2), (h, h2), (c, c2)):
        b = b.detach().numpy()
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_array_equal(np.isinf(a), np.isinf(b))


# --- the arrays people bring ---------------------------------------------------------------------


def unaligned(a):
    """A copy whose data starts one byte off."""
    buffer = np.empty(a.nbytes + 1, np.uint8)
    view = buffer[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    assert not view.flags.aligned
    return view


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def every_other(a):
    big = np.full((*a.shape[:-1], 2 * a.shape[-1]), np.nan, a.dtype)
    big[..., ::2] = a
    return big[..., ::2]


def padded(a):
    """Contiguous rows, gaps in between."""
    big = np.full((*a.shape[:-1], a.shape[-1] + 3), np.nan, a.dtype)
    big[..., :-3] = a
    return big[..., :-3]


def in_records(a):
    """Rows of a structured array: their strides are no multiple of the item size."""
    records = np.zeros(a.shape[:-1], [("tag", np.uint8), ("row", a.dtype, a.shape[-1:])])
    records["row"] = a
    return records["row"]


def turned_round(a):
    """Every stride negative."""
    flips = (slice(None, None, -1),) * a.ndim
    return a[flips].copy()[flips]


def swapped_axes(a):
    return np.swapaxes(np.swapaxes(a, 0, -1).copy(), 0, -1)


LAYOUTS = {
    "fortran": np.asfortranarray,
    "every_other": every_other,
    "padded": padded,
    "negative_strides": turned_round,
    "swapped_axes": swapped_axes,
    "read_only": read_only,
    "unaligned": unaligned,
    "records": in_records,
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@every_layout
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_any_strides_give_the_same_bits(dtype, layout, reverse):
    p = make_problem(6, 4, 5, 9, dtype)
    expected = run_kernels(p, reverse=reverse)
    strange = p.copy()
    for name, a in p.arrays().items():
        setattr(strange, name, layout(a))
        np.testing.assert_array_equal(getattr(strange, name), a)
    assert_all_same_bits(run_kernels(strange, reverse=reverse), expected)
    for name, a in p.arrays().items():
        np.testing.assert_array_equal(getattr(strange, name), a)


@every_layout
def test_any_strides_into_the_class(dtype, layout, rng):
    config = Config(2, True, True, "batch first")
    rnn = config.build(dtype=dtype)
    x, state, grad_y, grad_state = config.inputs(rng, dtype)
    expected = run(rnn, x, state, grad_y, grad_state)
    strange = (
        layout(x),
        tuple(map(layout, state)),
        layout(grad_y),
        tuple(map(layout, grad_state)),
    )
    assert_all_same_bits(run(rnn, *strange), expected)


@pytest.mark.parametrize("axis", [0, 1, 2, (0, 1), (0, 1, 2)], ids=str)
def test_broadcast_inputs(dtype, axis):
    """Stride 0 in time, batch, features, or all of them."""
    p = make_problem(6, 4, 5, 9, dtype)
    for name in ("x", "grad_y"):
        a = getattr(p, name)
        mean = a.mean(axis=axis, keepdims=True, dtype=dtype)
        setattr(p, name, np.broadcast_to(mean, a.shape))
    for name in ("h0", "c0", "grad_h", "grad_c"):
        a = getattr(p, name)
        setattr(p, name, np.broadcast_to(a[:1], a.shape))
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        a = getattr(p, name)
        setattr(p, name, np.broadcast_to(a[..., :1], a.shape))
    assert_all_same_bits(run_kernels(p), run_kernels(p.copy()))
    assert_all_close(run_kernels(p), run_reference(p), dtype=dtype)


def test_byte_swapped_inputs_are_refused(dtype):
    """A foreign byte order is another dtype: never read as if it were the native one."""
    p = make_problem(3, 2, 3, 5, dtype)
    for name, a in p.arrays().items():
        swapped = p.copy()
        setattr(swapped, name, a.astype(a.dtype.newbyteorder()))
        with pytest.raises(TypeError, match="dtype"):
            run_kernels(swapped)


def test_subclasses_of_ndarray(dtype):
    """np.memmap and friends are arrays; the results are plain."""

    class Mine(np.ndarray):
        pass

    p = make_problem(3, 2, 3, 5, dtype)
    expected = run_kernels(p)
    for name, a in p.arrays().items():
        setattr(p, name, a.view(Mine))
    actual = run_kernels(p)
    assert_all_same_bits(actual, expected)
    assert {type(a) for a in actual.values()} == {np.ndarray}


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_matrices(dtype, rng):
    """All that is taken of a np.matrix has two dimensions, of what it holds here too."""
    p = make_problem(3, 1, 4, 5, dtype)
    x, grad_y, out = (np.array(a[:, 0]) for a in (p.x, p.grad_y, p.grad_y))
    weights = p.forward_args[1:]
    expected = fastlstm.lstm_forward(x, *weights, need_tape=True)
    found = fastlstm.lstm_forward(
        *map(np.asmatrix, (x, *weights[:2])), *weights[2:], need_tape=True, out=np.asmatrix(out)
    )
    assert_same_bits(np.asarray(found[0]), expected[0])
    pairs = zip(
        fastlstm.lstm_backward(found[2], np.asmatrix(grad_y)),
        fastlstm.lstm_backward(expected[2], grad_y),
        strict=True,
    )
    for actual, wanted in pairs:
        assert_same_bits(actual, wanted)
    rnn = fastlstm.LSTM(4, 5, dtype=dtype, rng=0)
    y, _, tape = rnn.forward(np.asmatrix(x))
    assert_same_bits(rnn.backward(tape, np.asmatrix(y)).x, rnn.backward(rnn.forward(x)[2], y).x)


@pytest.mark.parametrize("which", ["x", "h0", "weight_hh"])
def test_out_over_what_the_tape_keeps(which, dtype):
    """The results go there, and the tape has what was there."""
    p = make_problem(3, 5, 5, 5, dtype)

    def run(out):
        q = p.copy()
        place = getattr(q, which)
        out = out(place)
        y, state, tape = fastlstm.lstm_forward(*q.forward_args, q.state, need_tape=True, out=out)
        return [y, *state, *fastlstm.lstm_backward(tape, p.grad_y)]

    targets = {
        "x": lambda x: x,
        "h0": lambda h: (None, None, h),
        "weight_hh": lambda w: (None, w[:5], None),
    }
    for actual, expected in zip(run(targets[which]), run(lambda _: None), strict=True):
        assert_same_bits(np.asarray(actual), expected)


def test_strides_of_a_single_record(dtype):
    """A dimension of one may have any stride."""
    record = np.zeros(1, [("h", dtype, (2, 5)), ("c", dtype, (2, 5)), ("done", "?")])
    narrow = np.zeros((3, 2, 8), [("a", dtype), ("b", "i1")])["a"]
    record["h"], record["c"], narrow[...] = 0.5, -0.25, 0.75
    state = record["h"], record["c"]
    plain = tuple(np.array(part) for part in state)
    rnn, x = fastlstm.LSTM(1, 5, dtype=dtype, rng=0), narrow[..., :1]
    found, expected = rnn.forward(x, state), rnn.forward(np.array(x), plain)
    assert_same_bits(found[0], expected[0])
    found, expected = (rnn.backward(t[2], None, s) for t, s in ((found, state), (expected, plain)))
    assert_same_bits(found.weights["weight_ih_l0"], expected.weights["weight_ih_l0"])
    one = fastlstm.lstm_forward(x, np.ones((4, 1), dtype), np.ones((4, 1), dtype), need_tape=True)
    assert_same_bits(
        fastlstm.lstm_backward(one[2], x).x, fastlstm.lstm_backward(one[2], np.array(x)).x
    )


def test_the_class_never_changes_its_inputs(dtype, rng):
    config = Config(2, True, True, "time first")
    rnn = config.build(dtype=dtype)
    x, state, grad_y, grad_state = config.inputs(rng, dtype)
    arrays = [x, *state, grad_y, *grad_state, *rnn.weights.values()]
    kept = [a.copy() for a in arrays]
    run(rnn, x, state, grad_y, grad_state)
    for a, b in zip(arrays, kept, strict=True):
        assert_same_bits(a, b)


def test_results_are_new_arrays(dtype, rng):
    """A caller may write into what it got without changing a tape, a weight or an input."""
    config = Config(2, True, True, "time first")
    rnn = config.build(dtype=dtype)
    x, state, grad_y, grad_state = config.inputs(rng, dtype)
    expected = run(rnn, x, state, grad_y, grad_state)

    y, (h, c), tape = rnn.forward(x, state)
    for a in (h, c):
        a[...] = np.nan
    grads = rnn.backward(tape, grad_y, grad_state)
    for name, w in grads.weights.items():
        assert_same_bits(w, expected[f"grad {name}"], name)
        w[...] = np.nan
    again = rnn.backward(tape, grad_y, grad_state)
    for name, w in again.weights.items():
        assert_same_bits(w, expected[f"grad {name}"], name)
    assert not any(np.shares_memory(a, b) for a in (y, h, c) for b in (x, *state))


# --- out= ----------------------------------------------------------------------------------------


def outputs(p, **kwargs):
    y, (h_n, c_n) = fastlstm.lstm_forward(*p.forward_args, p.state, **kwargs)
    return y, h_n, c_n


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("sizes", [(6, 4, 5, 9), (1, 1, 5, 9), (9, 1, 3, 64)], ids=str)
def test_out_is_written_and_returned(isa, dtype, sizes, reverse):
    p = make_problem(*sizes, dtype)
    expected = outputs(p, reverse=reverse)

    y = np.full_like(expected[0], np.nan)
    results = outputs(p, reverse=reverse, out=y)
    assert results[0] is y
    for a, e in zip(results, expected, strict=True):
        assert_same_bits(a, e)

    out = tuple(np.full_like(e, np.nan) for e in expected)
    results = outputs(p, reverse=reverse, out=out)
    for a, o, e in zip(results, out, expected, strict=True):
        assert a is o
        assert_same_bits(a, e)

    for k in range(3):
        some = [None, None, None]
        some[k] = np.full_like(expected[k], np.nan)
        results = outputs(p, reverse=reverse, out=tuple(some))
        assert results[k] is some[k]
        for a, e in zip(results, expected, strict=True):
            assert_same_bits(a, e)


WRITABLE = {name: f for name, f in LAYOUTS.items() if name != "read_only"}


@pytest.mark.parametrize("layout", WRITABLE.values(), ids=WRITABLE.keys())
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_out_of_any_strides(dtype, layout, reverse):
    p = make_problem(6, 4, 5, 9, dtype)
    expected = outputs(p, reverse=reverse)
    out = tuple(layout(np.zeros_like(e)) for e in expected)
    results = outputs(p, reverse=reverse, out=out)
    for a, o, e in zip(results, out, expected, strict=True):
        assert a is o
        np.testing.assert_array_equal(o, e)


def test_out_leaves_its_surroundings_alone(dtype):
    p = make_problem(6, 4, 5, 9, dtype)
    frame = np.full((8, 6, 20), 7, dtype)
    outputs(p, out=frame[1:7, 1:5, 3:12])
    frame[1:7, 1:5, 3:12] = 7
    assert (frame == 7).all()


def test_out_with_a_tape(dtype):
    p = make_problem(6, 4, 5, 9, dtype)
    expected = run_kernels(p)
    wide = np.zeros((6, 4, 18), dtype)
    y, _, tape = fastlstm.lstm_forward(*p.forward_args, p.state, need_tape=True, out=wide[..., 9:])
    grads = fastlstm.lstm_backward(tape, p.grad_y, p.grad_state)
    assert_same_bits(np.ascontiguousarray(y), expected["y"])
    assert np.shares_memory(y, wide)
    for name, g in named_gradients(grads).items():
        assert_same_bits(g, expected[name], name)


def test_out_that_overlaps_an_input(dtype):
    """As with NumPy's own functions: the result is as if there were no overlap."""
    H = 9
    p = make_problem(6, 4, H, H, dtype)  # D = H, so that x can hold y
    expected = outputs(p)
    overlaps = {
        "x": lambda q: (q.x, None, None),
        "x, shifted": lambda q: (q.x[::-1], None, None),
        "h0": lambda q: (None, q.h0, None),
        "c0": lambda q: (None, None, q.c0),
        "states crossed": lambda q: (None, q.c0, q.h0),
        "h_n in x": lambda q: (None, q.x[2], q.x[3]),
        "weight_hh": lambda q: (q.weight_hh.reshape(-1)[: 24 * H].reshape(6, 4, H), None, None),
        "bias": lambda q: (None, q.bias_hh.reshape(4, H), None),
    }
    for name, make in overlaps.items():
        q = p.copy()
        out = make(q)
        results = outputs(q, out=out)
        for k in range(3):
            if out[k] is not None:
                assert results[k] is out[k], name
            np.testing.assert_array_equal(results[k], expected[k], err_msg=name)


# --- weights -------------------------------------------------------------------------------------


@every_config
def test_names_shapes_and_order_are_those_of_torch(torch, config, dtype):
    theirs = torch.nn.LSTM(
        D, H, config.num_layers, bias=config.bias, bidirectional=config.bidirectional
    )
    rnn = config.build(dtype=dtype)
    expected = [(name, tuple(w.shape)) for name, w in theirs.named_parameters()]
    assert [(name, w.shape) for name, w in rnn.weights.items()] == expected
    assert {w.dtype for w in rnn.weights.values()} == {np.dtype(dtype)}


def test_initial_weights_are_uniform(dtype):
    hidden = 25
    rnn = fastlstm.LSTM(30, hidden, num_layers=2, bidirectional=True, dtype=dtype, rng=0)
    values = np.concatenate([w.ravel() for w in rnn.weights.values()])
    bound = hidden**-0.5
    assert np.abs(values).max() <= bound
    assert np.abs(values).max() > 0.999 * bound
    assert abs(values.mean()) < 0.01 * bound
    assert abs(values.std() / (bound / 3**0.5) - 1) < 0.02
    assert len(np.unique(values)) > 0.99 * values.size


def test_rng():
    def weights(rng):
        return fastlstm.LSTM(3, 5, num_layers=2, rng=rng).weights

    assert_all_same_bits(weights(0), weights(0))
    assert_all_same_bits(weights(0), weights(np.random.default_rng(0)))
    assert any(
        (a != b).any() for a, b in zip(weights(0).values(), weights(1).values(), strict=True)
    )
    generator = np.random.default_rng(0)
    first, second = weights(generator), weights(generator)
    assert (first["weight_ih_l0"] != second["weight_ih_l0"]).any()
    assert (weights(None)["weight_ih_l0"] != weights(None)["weight_ih_l0"]).any()


def test_weights_are_live(dtype, rng):
    """An optimizer changes them in place; the next call sees it."""
    rnn = fastlstm.LSTM(D, H, dtype=dtype, rng=0)
    other = fastlstm.LSTM(D, H, dtype=dtype, rng=1)
    x = rng.standard_normal((T, N, D)).astype(dtype)
    before, _ = rnn(x)
    for name, w in rnn.weights.items():
        w[...] = other.weights[name]
    after, _ = rnn(x)
    assert (before != after).any()
    assert_same_bits(after, other(x)[0])


def test_a_weight_may_be_replaced_by_one_like_it(dtype, rng):
    rnn = fastlstm.LSTM(D, H, dtype=dtype, rng=0)
    other = fastlstm.LSTM(D, H, dtype=dtype, rng=1)
    x = rng.standard_normal((T, N, D)).astype(dtype)
    for name in rnn.weights:
        rnn.weights[name] = np.asfortranarray(other.weights[name])
    assert_same_bits(rnn(x)[0], other(x)[0])


@every_config
def test_state_dict_round_trip(config, dtype, rng):
    first, second = config.build(dtype=dtype, seed=0), config.build(dtype=dtype, seed=1)
    saved = first.state_dict()
    assert list(saved) == list(first.weights)
    live = dict(second.weights)
    second.load_state_dict(saved)
    assert_all_same_bits(second.state_dict(), first.state_dict())
    assert all(second.weights[name] is w for name, w in live.items())  # loaded in place

    # copies on the way out and on the way in
    for w in saved.values():
        w[...] = np.nan
    for rnn in (first, second):
        assert all(np.isfinite(w).all() for w in rnn.weights.values())


def test_load_state_dict_of_its_own_arrays(dtype):
    """Such as to swap the directions."""
    rnn = fastlstm.LSTM(4, 5, bidirectional=True, dtype=dtype, rng=0)
    before = rnn.state_dict()

    def other(name):
        return name.removesuffix("_reverse") if name.endswith("_reverse") else name + "_reverse"

    rnn.load_state_dict({name: rnn.weights[other(name)] for name in rnn.weights})
    for name, weight in rnn.weights.items():
        assert_same_bits(weight, before[other(name)])


def test_load_state_dict_into_a_read_only_weight(dtype):
    rnn = fastlstm.LSTM(4, 5, dtype=dtype, rng=0)
    before = rnn.state_dict()
    rnn.weights["bias_hh_l0"].setflags(write=False)
    with pytest.raises(ValueError, match="bias_hh_l0: expected a writeable weight"):
        rnn.load_state_dict({name: weight + 1 for name, weight in before.items()})
    for name, weight in rnn.weights.items():
        assert_same_bits(weight, before[name])


def test_load_state_dict_converts(dtype):
    """Lists, other floating-point types, foreign byte order: whatever np.asarray understands."""
    rnn = fastlstm.LSTM(D, H, dtype=dtype, rng=0)
    source = fastlstm.LSTM(D, H, dtype=np.float32, rng=1).state_dict()
    for convert in (
        np.ndarray.tolist,
        lambda w: w.astype(np.float64),
        lambda w: w.astype(">f4"),
        np.asfortranarray,
    ):
        rnn.load_state_dict({name: convert(w) for name, w in source.items()})
        for name, w in rnn.weights.items():
            assert w.dtype == dtype
            np.testing.assert_array_equal(w, source[name])


def test_a_failed_load_changes_nothing(dtype):
    rnn = fastlstm.LSTM(D, H, dtype=dtype, rng=0)
    kept = rnn.state_dict()
    broken = fastlstm.LSTM(D, H, dtype=dtype, rng=1).state_dict()
    broken["bias_hh_l0"] = np.zeros(3, dtype)
    with pytest.raises(ValueError, match="bias_hh_l0"):
        rnn.load_state_dict(broken)
    assert_all_same_bits(rnn.state_dict(), kept)


@pytest.mark.parametrize("config", [CONFIGS[0], Config(2, True, True, "batch first")], ids=str)
def test_state_dict_crosses_to_torch_and_back(torch, config, dtype, rng):
    rnn = config.build(dtype=dtype)
    theirs = torch.nn.LSTM(
        D,
        H,
        config.num_layers,
        bias=config.bias,
        batch_first=config.batch_first,
        bidirectional=config.bidirectional,
        dtype=getattr(torch, np.dtype(dtype).name),
    )
    theirs.load_state_dict({name: torch.from_numpy(w) for name, w in rnn.state_dict().items()})
    for name, w in theirs.named_parameters():
        assert_same_bits(w.detach().numpy(), rnn.weights[name], name)

    torch.manual_seed(0)
    theirs.reset_parameters()
    rnn.load_state_dict(theirs.state_dict())
    for name, w in theirs.named_parameters():
        assert_same_bits(rnn.weights[name], w.detach().numpy(), name)


def test_own_weights_begin_with_cache_lines():
    rnn = fastlstm.LSTM(3, 5, num_layers=2, rng=0)
    rnn.load_state_dict(rnn.state_dict())
    assert all(weight.ctypes.data % 64 == 0 for weight in rnn.weights.values())


def test_pickle_and_copy(dtype, rng):
    import pickle

    config = Config(2, True, True, "batch first")
    rnn = config.build(dtype=dtype)
    x, state, _, _ = config.inputs(rng, dtype)
    for twin in (pickle.loads(pickle.dumps(rnn)), copy.deepcopy(rnn)):
        assert_same_bits(twin(x, state)[0], rnn(x, state)[0])
        twin.weights["bias_hh_l0"][...] = 0
        assert rnn.weights["bias_hh_l0"].any()


# NumPy 2.5 warns of both.
@pytest.mark.filterwarnings("ignore:Setting the (shape|dtype) on:DeprecationWarning")
@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_arrays_that_change_in_place_before_backward(change, rng):
    """The tape keeps views, which a caller cannot give another shape or dtype."""
    config = Config(2, True, True, "batch first")
    rnn = config.build(dtype=np.float32)
    x, state, *_ = config.inputs(rng, np.float32)
    y, _, tape = rnn.forward(x, state)
    grad_y = np.ones_like(y)

    def gradients():
        *of_inputs, of_weights = rnn.backward(tape, grad_y)
        return *of_inputs, *of_weights.values()

    expected = gradients()
    for array in (x, *state, *rnn.weights.values()):
        if change == "shape":
            array.shape = (array.size,)
        else:
            array.dtype = np.int32
    for actual, wanted in zip(gradients(), expected, strict=True):
        assert_same_bits(actual, wanted)


def test_a_copied_tape(rng):
    """A copy of an array with strides of zero has others."""
    rnn = fastlstm.LSTM(3, 16, rng=0)
    x = np.broadcast_to(rng.standard_normal((1, 2, 3)).astype(np.float32), (7, 2, 3))
    y, _, tape = rnn.forward(x)
    twin, copied = copy.deepcopy((rnn, tape))
    expected = rnn.backward(tape, np.ones_like(y)).weights
    for name, grad in twin.backward(copied, np.ones_like(y)).weights.items():
        assert_same_bits(grad, expected[name], name)


def test_attributes_that_change():
    rnn = fastlstm.LSTM(3, 5, rng=0)
    x = np.ones((7, 2, 3), np.float32)
    y, _, tape = rnn.forward(x)
    expected = rnn.backward(tape, np.ones_like(y)).x
    rnn.batch_first = True
    assert_same_bits(rnn.backward(tape, np.ones_like(y)).x, expected)
    for num_layers in (0, 3):
        rnn.num_layers = num_layers
        for run in (rnn, rnn.forward):
            with pytest.raises(ValueError, match=f"num_layers: expected 1.*got {num_layers}"):
                run(x)


def test_attributes_and_repr():
    rnn = fastlstm.LSTM(3, 5, num_layers=2, bidirectional=True, batch_first=True)
    assert (rnn.input_size, rnn.hidden_size, rnn.num_layers) == (3, 5, 2)
    assert (rnn.bias, rnn.batch_first, rnn.bidirectional) == (True, True, True)
    assert rnn.dtype == np.float32
    for word in ("LSTM", "3", "5"):
        assert word in repr(rnn)


def test_training_from_numpy_alone(rng):
    """Gradient descent with nothing but the public interface: remember the input before last."""
    rnn = fastlstm.LSTM(1, 8, rng=0)
    x = rng.standard_normal((2, 64, 1)).astype(np.float32)
    target = np.sign(x[0, :, 0]) / 2
    losses = []
    for _ in range(100):
        y, _, tape = rnn.forward(x)
        error = y[-1, :, 0] - target
        losses.append((error**2).mean())
        grad_y = np.zeros_like(y)
        grad_y[-1, :, 0] = 2 * error / error.size
        for name, g in rnn.backward(tape, grad_y).weights.items():
            rnn.weights[name] -= 2 * g
    assert losses[-1] < 0.1 * losses[0]
