"""Bad input on the NumPy side: refused before memory is touched, by a message that helps.

Each message names the argument, what was expected and what came.
"""

from __future__ import annotations

import re

import fastlstm
import numpy as np
import pytest
from fastlstm import _core
from helpers import assert_all_same_bits, make_problem, run_python

T, N, D, H = 4, 3, 5, 7
F32 = np.float32


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def assert_message(error, name, expected, got):
    """Such as: "x: expected shape (T, N, 5), got (4, 3, 6)". Words and numbers match as wholes."""
    text = str(error.value)
    for part in (name, "expected", expected, "got", got):
        assert re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text), f"no {part!r} in {text!r}"


# What comes instead of an array: (value, words of the message that say what came)
NOT_ARRAYS = {
    "None": (None, "NoneType"),
    "list": ([[[1.0] * D] * N] * T, "list"),
    "string": ("abc", "str"),
    "number": (1.5, "float"),
    "object": (object(), "object"),
}
WRONG_DTYPES = ["int64", "int32", "float16", "longdouble", "complex64", "complex128", "bool", "O"]


def dtype_name(dtype):
    return np.dtype(dtype).name


# --- lstm_forward --------------------------------------------------------------------------------


def forward(**changes):
    """lstm_forward with good arguments, apart from the changes."""
    arguments = {
        "x": zeros(T, N, D),
        "weight_ih": zeros(4 * H, D),
        "weight_hh": zeros(4 * H, H),
        "bias_ih": zeros(4 * H),
        "bias_hh": zeros(4 * H),
        "state": (zeros(N, H), zeros(N, H)),
    } | changes
    return fastlstm.lstm_forward(**arguments)


def test_the_good_call_is_good():
    y, _ = forward()
    assert y.shape == (T, N, H)


@pytest.mark.parametrize(
    ("changes", "name", "expected", "got"),
    [
        # rank
        ({"x": zeros(D)}, "x", "(T, N, D)", "(5,)"),
        ({"x": zeros(T, N, D, 1)}, "x", "(T, N, D)", "(4, 3, 5, 1)"),
        ({"x": zeros()}, "x", "(T, N, D)", "()"),
        ({"weight_ih": zeros(4 * H * D)}, "weight_ih", "(28, 5)", "(140,)"),
        ({"weight_hh": zeros(4, H, H)}, "weight_hh", "(4*H, H)", "(4, 7, 7)"),
        ({"bias_ih": zeros(1, 4 * H)}, "bias_ih", "(28,)", "(1, 28)"),
        # size
        ({"x": zeros(T, N, 6)}, "weight_ih", "(28, 6)", "(28, 5)"),
        ({"x": zeros(T, N, 0)}, "x", "at least one", "(4, 3, 0)"),
        ({"x": zeros(0, N, D)}, "x", "at least one time step", "(0, 3, 5)"),
        ({"weight_ih": zeros(4 * H + 1, D)}, "weight_ih", "(28, 5)", "(29, 5)"),
        ({"weight_ih": zeros(4, D)}, "weight_ih", "(28, 5)", "(4, 5)"),
        ({"weight_hh": zeros(H, 4 * H)}, "weight_hh", "(4*H, H)", "(7, 28)"),
        ({"weight_hh": zeros(4 * H, H - 1)}, "weight_hh", "(4*H, H)", "(28, 6)"),
        ({"weight_hh": zeros(0, 0)}, "weight_hh", "(4*H, H)", "(0, 0)"),
        ({"bias_ih": zeros(H)}, "bias_ih", "(28,)", "(7,)"),
        ({"bias_hh": zeros(4 * H + 1)}, "bias_hh", "(28,)", "(29,)"),
        # state
        ({"state": (zeros(N + 1, H), zeros(N, H))}, "h0", "(3, 7)", "(4, 7)"),
        ({"state": (zeros(N, H), zeros(N, H + 1))}, "c0", "(3, 7)", "(3, 8)"),
        ({"state": (zeros(H), zeros(H))}, "h0", "(3, 7)", "(7,)"),
        ({"state": (zeros(1, N, H), zeros(1, N, H))}, "h0", "(3, 7)", "(1, 3, 7)"),
        ({"x": zeros(T, D)}, "h0", "(7,)", "(3, 7)"),
    ],
)
def test_forward_shapes(changes, name, expected, got):
    with pytest.raises(ValueError) as error:
        forward(**changes)
    assert_message(error, name, expected, got)


@pytest.mark.parametrize("dtype", WRONG_DTYPES)
def test_forward_dtype_of_x(dtype):
    with pytest.raises(TypeError) as error:
        forward(x=zeros(T, N, D).astype(dtype))
    assert_message(error, "x", "float32", dtype_name(dtype))


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "h0", "c0"])
@pytest.mark.parametrize("dtype", ["float64", "int64", "float16", "O"])
def test_forward_dtype_of_the_others(name, dtype):
    """Everything has the dtype of x: mixing would convert silently."""
    good = {"weight_ih": zeros(4 * H, D), "weight_hh": zeros(4 * H, H)}
    good |= {"bias_ih": zeros(4 * H), "bias_hh": zeros(4 * H), "h0": zeros(N, H), "c0": zeros(N, H)}
    bad = good | {name: good[name].astype(dtype)}
    h0, c0 = bad.pop("h0"), bad.pop("c0")
    with pytest.raises(TypeError) as error:
        forward(**bad, state=(h0, c0))
    assert_message(error, name, "float32", dtype_name(dtype))


@pytest.mark.parametrize(("value", "got"), NOT_ARRAYS.values(), ids=NOT_ARRAYS)
@pytest.mark.parametrize("name", ["x", "weight_ih", "weight_hh"])
def test_forward_objects_that_are_not_arrays(name, value, got):
    with pytest.raises(TypeError) as error:
        forward(**{name: value})
    assert_message(error, name, "numpy.ndarray", got)


@pytest.mark.parametrize("name", ["bias_ih", "bias_hh"])
def test_forward_bias_that_is_not_an_array(name):
    with pytest.raises(TypeError) as error:
        forward(**{name: [0.0] * 4 * H})
    assert_message(error, name, "numpy.ndarray", "list")


@pytest.mark.parametrize(
    ("state", "name", "expected", "got"),
    [
        ("hc", "state", "pair", "str"),
        (5, "state", "pair", "int"),
        (zeros(2, N, H), "state", "pair", "ndarray"),
        ({"h": 0, "c": 0}, "state", "pair", "dict"),
        ((zeros(N, H),), "state", "pair", "1"),
        ((zeros(N, H),) * 3, "state", "pair", "3"),
        ((zeros(N, H), None), "c0", "numpy.ndarray", "NoneType"),
        (([[0.0] * H] * N, zeros(N, H)), "h0", "numpy.ndarray", "list"),
    ],
    ids=["string", "number", "stacked", "dict", "one", "three", "None", "list"],
)
def test_forward_state_that_is_not_a_pair_of_arrays(state, name, expected, got):
    with pytest.raises((TypeError, ValueError)) as error:
        forward(state=state)
    assert_message(error, name, expected, got)


def test_forward_names_the_argument_for_torch_tensors(torch):
    """NumPy functions take arrays; a tensor has fastlstm.nn."""
    with pytest.raises(TypeError) as error:
        forward(x=torch.zeros(T, N, D))
    assert_message(error, "x", "numpy.ndarray", "Tensor")


@pytest.mark.parametrize(
    ("out", "kind", "name", "expected", "got"),
    [
        (zeros(T, N, H + 1), ValueError, "out", "(4, 3, 7)", "(4, 3, 8)"),
        (zeros(N, T, H), ValueError, "out", "(4, 3, 7)", "(3, 4, 7)"),
        (zeros(T * N * H), ValueError, "out", "(4, 3, 7)", "(84,)"),
        (zeros(T, N, H, dtype=np.float64), TypeError, "out", "float32", "float64"),
        (zeros(T, N, H, dtype=np.int32), TypeError, "out", "float32", "int32"),
        ([1.0], TypeError, "out", "numpy.ndarray", "list"),
        ("y", TypeError, "out", "numpy.ndarray", "str"),
        ((zeros(T, N, H), zeros(N, H)), ValueError, "out", "(y, h_n, c_n)", "2"),
        ((None, zeros(N, H + 1), None), ValueError, "out", "(3, 7)", "(3, 8)"),
        ((None, None, zeros(H)), ValueError, "out", "(3, 7)", "(7,)"),
        ((None, zeros(N, H, dtype=np.float64), None), TypeError, "out", "float32", "float64"),
        ((None, 3, None), TypeError, "out", "numpy.ndarray", "int"),
    ],
)
def test_forward_out(out, kind, name, expected, got):
    with pytest.raises(kind) as error:
        forward(out=out)
    text = str(error.value)
    assert name in text
    for part in ("expected", expected, "got", got):
        assert part in text, f"{part!r} is missing in {text!r}"


def read_only(*shape):
    a = zeros(*shape)
    a.flags.writeable = False
    return a


@pytest.mark.parametrize(
    "out",
    [
        read_only(T, N, H),
        (None, read_only(N, H), None),
        (None, None, read_only(N, H)),
        np.broadcast_to(zeros(H), (T, N, H)),
    ],
    ids=["y", "h_n", "c_n", "broadcast"],
)
def test_forward_out_that_cannot_be_written(out):
    with pytest.raises(ValueError, match=r"(?s)out.*(writ|read-only)"):
        forward(out=out)


def test_forward_outs_that_overlap():
    """Two results in the same place would overwrite each other."""
    shared = zeros(N, H)
    with pytest.raises(ValueError, match="out"):
        forward(out=(None, shared, shared))
    y = zeros(T, N, H)
    with pytest.raises(ValueError, match="out"):
        forward(out=(y, y[-1], None))


def test_forward_unknown_arguments():
    with pytest.raises(TypeError, match="weights"):
        fastlstm.lstm_forward(zeros(T, N, D), weights=zeros(4 * H, D))
    with pytest.raises(TypeError):
        fastlstm.lstm_forward(zeros(T, N, D))


def test_a_refused_call_leaves_out_alone():
    out = np.full((T, N, H), 7, F32)
    with pytest.raises(ValueError, match="bias_hh"):
        forward(bias_hh=zeros(3), out=out)
    assert (out == 7).all()


# --- lstm_backward -------------------------------------------------------------------------------


@pytest.fixture
def tape():
    return forward(need_tape=True)[2]


@pytest.mark.parametrize(
    ("grad_y", "grad_state", "kind", "name", "expected", "got"),
    [
        (zeros(T, N, H + 1), None, ValueError, "grad_y", "(4, 3, 7)", "(4, 3, 8)"),
        (zeros(T + 1, N, H), None, ValueError, "grad_y", "(4, 3, 7)", "(5, 3, 7)"),
        (zeros(T, N), None, ValueError, "grad_y", "(4, 3, 7)", "(4, 3)"),
        (zeros(T, N, H, dtype=np.float64), None, TypeError, "grad_y", "float32", "float64"),
        (zeros(T, N, H, dtype=np.int64), None, TypeError, "grad_y", "float32", "int64"),
        ([0.0], None, TypeError, "grad_y", "numpy.ndarray", "list"),
        (None, (zeros(N, H + 1), None), ValueError, "grad_h", "(3, 7)", "(3, 8)"),
        (None, (None, zeros(H)), ValueError, "grad_c", "(3, 7)", "(7,)"),
        (None, (zeros(N, H, dtype="f8"), None), TypeError, "grad_h", "float32", "float64"),
        (None, (None, [0.0]), TypeError, "grad_c", "numpy.ndarray", "list"),
        (None, zeros(N, H), (TypeError, ValueError), "grad_state", "pair", "ndarray"),
        (None, (zeros(N, H),), (TypeError, ValueError), "grad_state", "pair", "1"),
        (None, "hc", (TypeError, ValueError), "grad_state", "pair", "str"),
    ],
)
def test_backward_gradients(tape, grad_y, grad_state, kind, name, expected, got):
    with pytest.raises(kind) as error:
        fastlstm.lstm_backward(tape, grad_y, grad_state)
    assert_message(error, name, expected, got)


@pytest.mark.parametrize("tape", [None, zeros(T, N, H), "tape", (1, 2, 3), object()], ids=str)
def test_backward_without_a_tape(tape):
    with pytest.raises(TypeError) as error:
        fastlstm.lstm_backward(tape, zeros(T, N, H))
    assert_message(error, "tape", "lstm_forward", type(tape).__name__)


def test_backward_with_the_gradient_of_another_call(tape):
    other_y, _, _ = forward(x=zeros(T + 2, N, D), need_tape=True)
    with pytest.raises(ValueError) as error:
        fastlstm.lstm_backward(tape, np.zeros_like(other_y))
    assert_message(error, "grad_y", "(4, 3, 7)", "(6, 3, 7)")


def test_backward_with_the_tape_of_the_class():
    rnn = fastlstm.LSTM(D, H)
    _, _, tape = rnn.forward(zeros(T, N, D))
    with pytest.raises(TypeError) as error:
        fastlstm.lstm_backward(tape, zeros(T, N, H))
    assert_message(error, "tape", "lstm_forward", type(tape).__name__)


# --- the class -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "name", "expected", "got"),
    [
        ({"input_size": 0}, ValueError, "input_size", "1", "0"),
        ({"input_size": -3}, ValueError, "input_size", "1", "-3"),
        ({"hidden_size": 0}, ValueError, "hidden_size", "1", "0"),
        ({"num_layers": 0}, ValueError, "num_layers", "1", "0"),
        ({"input_size": 2.0}, TypeError, "input_size", "int", "float"),
        ({"hidden_size": "7"}, TypeError, "hidden_size", "int", "str"),
        ({"num_layers": None}, TypeError, "num_layers", "int", "NoneType"),
        ({"bias": 1}, TypeError, "bias", "bool", "int"),
        ({"batch_first": "yes"}, TypeError, "batch_first", "bool", "str"),
        ({"bidirectional": 0}, TypeError, "bidirectional", "bool", "int"),
        ({"dtype": np.int32}, TypeError, "dtype", "float32", "int32"),
        ({"dtype": np.float16}, TypeError, "dtype", "float32", "float16"),
        ({"dtype": complex}, TypeError, "dtype", "float32", "complex"),
        ({"dtype": None}, TypeError, "dtype", "float32", "None"),
    ],
)
def test_constructor(arguments, kind, name, expected, got):
    with pytest.raises(kind) as error:
        fastlstm.LSTM(**({"input_size": D, "hidden_size": H} | arguments))
    assert_message(error, name, expected, got)


def test_constructor_takes_numpy_integers_and_bools():
    rnn = fastlstm.LSTM(np.int64(D), np.int32(H), np.int8(2), np.bool_(True))
    assert rnn.weights["weight_ih_l0"].shape == (4 * H, D)


@pytest.mark.parametrize("rng", ["seed", 1.5, -1])
def test_constructor_rng(rng):
    with pytest.raises((TypeError, ValueError)):
        fastlstm.LSTM(D, H, rng=rng)


@pytest.mark.parametrize(
    ("x", "kind", "expected", "got"),
    [
        (zeros(D), ValueError, "(T, N, D)", "(5,)"),
        (zeros(1, T, N, D), ValueError, "(T, N, D)", "(1, 4, 3, 5)"),
        (zeros(T, N, D + 1), ValueError, "5", "(4, 3, 6)"),
        (zeros(0, N, D), ValueError, "at least one time step", "none"),
        (zeros(0, D), ValueError, "at least one time step", "none"),
        (zeros(T, N, D, dtype=np.float64), TypeError, "float32", "float64"),
        (zeros(T, N, D, dtype=np.int64), TypeError, "float32", "int64"),
        (zeros(T, N, D, dtype=np.float16), TypeError, "float32", "float16"),
        (zeros(T, N, D, dtype=complex), TypeError, "float32", "complex128"),
        (zeros(T, N, D, dtype=object), TypeError, "float32", "object"),
        (zeros(T, N, D).tolist(), TypeError, "numpy.ndarray", "list"),
        (None, TypeError, "numpy.ndarray", "NoneType"),
        ("abc", TypeError, "numpy.ndarray", "str"),
    ],
)
@pytest.mark.parametrize("call", ["__call__", "forward"])
def test_call_with_a_wrong_x(call, x, kind, expected, got):
    with pytest.raises(kind) as error:
        getattr(fastlstm.LSTM(D, H), call)(x)
    assert_message(error, "x", expected, got)


def test_call_with_zero_time_batch_first():
    with pytest.raises(ValueError) as error:
        fastlstm.LSTM(D, H, batch_first=True)(zeros(N, 0, D))
    assert_message(error, "x", "at least one time step", "none")


SLOTS = 4  # 2 layers, 2 directions
STATE = (SLOTS, N, H)


@pytest.mark.parametrize(
    ("state", "kind", "name", "expected", "got"),
    [
        ((zeros(1, N, H), zeros(*STATE)), ValueError, "h0", "(4, 3, 7)", "(1, 3, 7)"),
        ((zeros(*STATE), zeros(N, H)), ValueError, "c0", "(4, 3, 7)", "(3, 7)"),
        ((zeros(SLOTS, N + 1, H), zeros(*STATE)), ValueError, "h0", "(4, 3, 7)", "(4, 4, 7)"),
        ((zeros(N, SLOTS, H), zeros(*STATE)), ValueError, "h0", "(4, 3, 7)", "(3, 4, 7)"),
        ((zeros(*STATE, dtype="f8"), zeros(*STATE)), TypeError, "h0", "float32", "float64"),
        ((zeros(*STATE), zeros(*STATE, dtype=int)), TypeError, "c0", "float32", "int64"),
        ((zeros(*STATE), None), TypeError, "c0", "numpy.ndarray", "NoneType"),
        ((zeros(*STATE),), (TypeError, ValueError), "state", "pair", "1"),
        (zeros(2, *STATE), (TypeError, ValueError), "state", "pair", "ndarray"),
        (5, TypeError, "state", "pair", "int"),
    ],
)
def test_call_with_a_wrong_state(state, kind, name, expected, got):
    rnn = fastlstm.LSTM(D, H, num_layers=2, bidirectional=True)
    for call in (rnn, rnn.forward):
        with pytest.raises(kind) as error:
            call(zeros(T, N, D), state)
        assert_message(error, name, expected, got)


def test_call_with_an_unbatched_x_and_a_batched_state():
    rnn = fastlstm.LSTM(D, H)
    with pytest.raises(ValueError) as error:
        rnn(zeros(T, D), (zeros(1, N, H), zeros(1, N, H)))
    assert_message(error, "h0", "(1, 7)", "(1, 3, 7)")


@pytest.mark.parametrize(
    ("grad_y", "grad_state", "kind", "name", "expected", "got"),
    [
        (zeros(T, N, H), None, ValueError, "grad_y", "(4, 3, 14)", "(4, 3, 7)"),
        (zeros(T, N, 2 * H, dtype="f8"), None, TypeError, "grad_y", "float32", "float64"),
        ("gradient", None, TypeError, "grad_y", "numpy.ndarray", "str"),
        (None, (zeros(N, H), None), ValueError, "grad_h", "(4, 3, 7)", "(3, 7)"),
        (None, (None, zeros(1, N, H)), ValueError, "grad_c", "(4, 3, 7)", "(1, 3, 7)"),
        (None, (None, zeros(*STATE, dtype="f8")), TypeError, "grad_c", "float32", "float64"),
        (None, zeros(*STATE), (TypeError, ValueError), "grad_state", "pair", "ndarray"),
        (None, (zeros(*STATE),), (TypeError, ValueError), "grad_state", "pair", "1"),
    ],
)
def test_backward_of_the_class(grad_y, grad_state, kind, name, expected, got):
    rnn = fastlstm.LSTM(D, H, num_layers=2, bidirectional=True)
    _, _, tape = rnn.forward(zeros(T, N, D))
    with pytest.raises(kind) as error:
        rnn.backward(tape, grad_y, grad_state)
    assert_message(error, name, expected, got)


def test_tape_of_another_lstm():
    ours, other = fastlstm.LSTM(D, H), fastlstm.LSTM(D, H)
    _, _, tape = other.forward(zeros(T, N, D))
    with pytest.raises(ValueError, match="tape"):
        ours.backward(tape, zeros(T, N, H))


def test_tape_of_the_function_given_to_the_class(tape):
    with pytest.raises(TypeError) as error:
        fastlstm.LSTM(D, H).backward(tape, zeros(T, N, H))
    assert_message(error, "tape", "LSTM", type(tape).__name__)


@pytest.mark.parametrize("tape", [None, zeros(T, N, H), "tape", (1, 2), object()], ids=str)
def test_something_that_is_no_tape(tape):
    with pytest.raises(TypeError) as error:
        fastlstm.LSTM(D, H).backward(tape, zeros(T, N, H))
    assert_message(error, "tape", "forward", type(tape).__name__)


@pytest.mark.parametrize(
    ("weight", "kind", "expected", "got"),
    [
        (zeros(4 * H, D), ValueError, "(28, 7)", "(28, 5)"),
        (zeros(H, H), ValueError, "(28, 7)", "(7, 7)"),
        (zeros(4 * H * H), ValueError, "(28, 7)", "(196,)"),
        (zeros(4 * H, H, dtype=np.float64), TypeError, "float32", "float64"),
        (zeros(4 * H, H, dtype=np.int32), TypeError, "float32", "int32"),
        (zeros(4 * H, H).tolist(), TypeError, "numpy.ndarray", "list"),
        (None, TypeError, "numpy.ndarray", "NoneType"),
    ],
    ids=["columns", "rows", "rank", "float64", "int32", "list", "None"],
)
def test_weights_replaced(weight, kind, expected, got):
    rnn = fastlstm.LSTM(D, H)
    rnn.weights["weight_hh_l0"] = weight
    for call in (rnn, rnn.forward):
        with pytest.raises(kind) as error:
            call(zeros(T, N, D))
        assert_message(error, "weight_hh_l0", expected, got)


def test_weights_replaced_between_forward_and_backward():
    rnn = fastlstm.LSTM(D, H)
    _, _, tape = rnn.forward(zeros(T, N, D))
    rnn.weights["weight_hh_l0"] = zeros(2, 2)
    grads = rnn.backward(tape, zeros(T, N, H))
    assert grads.weights["weight_hh_l0"].shape == (4 * H, H)


def test_weights_missing():
    rnn = fastlstm.LSTM(D, H)
    del rnn.weights["bias_hh_l0"]
    with pytest.raises((KeyError, ValueError), match="bias_hh_l0"):
        rnn(zeros(T, N, D))


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"weight_ih_l0": None}, (KeyError, ValueError), ["missing", "weight_ih_l0"]),
        ({"weight_ih_l1": zeros(4 * H, H)}, (KeyError, ValueError), ["unexpected", "weight_ih_l1"]),
        (
            {"weight_hh_l0": zeros(4 * H, D)},
            ValueError,
            ["weight_hh_l0", "expected", "(28, 7)", "got", "(28, 5)"],
        ),
        ({"bias_hh_l0": "abc"}, (TypeError, ValueError), ["bias_hh_l0"]),
        ({"bias_hh_l0": [object()] * 4 * H}, (TypeError, ValueError), ["bias_hh_l0"]),
        ({"bias_hh_l0": zeros(4 * H) + 1j}, (TypeError, ValueError), ["bias_hh_l0"]),
    ],
    ids=["missing", "unexpected", "shape", "string", "objects", "complex"],
)
def test_load_state_dict(changes, kind, words):
    rnn = fastlstm.LSTM(D, H, rng=0)
    kept = rnn.state_dict()
    mapping = {name: w for name, w in (kept | changes).items() if w is not None}
    with pytest.raises(kind) as error:
        rnn.load_state_dict(mapping)
    text = str(error.value).lower()
    for word in words:
        assert word in text, f"{word!r} is missing in {text!r}"
    assert_all_same_bits(rnn.state_dict(), kept)


@pytest.mark.parametrize("mapping", [None, 3, [1, 2], zeros(3)], ids=str)
def test_load_state_dict_needs_a_mapping(mapping):
    with pytest.raises(TypeError) as error:
        fastlstm.LSTM(D, H).load_state_dict(mapping)
    assert_message(error, "mapping", "mapping", type(mapping).__name__)


# --- sizes whose product overflows ---------------------------------------------------------------

TOO_LARGE = (ValueError, MemoryError)


@pytest.mark.parametrize(
    ("input_size", "hidden_size"),
    [(2**40, 2**40), (1, 2**62), (2**62, 1), (2**31, 2**31), (3, 2**63), (2**70, 1)],
)
def test_constructor_with_huge_sizes(input_size, hidden_size):
    with pytest.raises((*TOO_LARGE, OverflowError)) as error:
        fastlstm.LSTM(input_size, hidden_size)
    assert str(error.value)


@pytest.mark.parametrize("hidden", [2**24, 2**27, 2**29])
def test_huge_weights_of_stride_zero(hidden):
    """np.broadcast_to makes a huge array of one number; packed, it would not fit anywhere."""
    one = np.zeros((), F32)
    x = np.broadcast_to(one, (1, 1, hidden))
    weight = np.broadcast_to(one, (4 * hidden, hidden))
    with pytest.raises(TOO_LARGE):
        fastlstm.lstm_forward(x, weight, weight)


@pytest.mark.parametrize("shape", [(2**30, 2**29, 1), (1, 2**45, 1), (2**45, 1, 1)], ids=str)
@pytest.mark.parametrize("need_tape", [False, True])
def test_huge_x_of_stride_zero(shape, need_tape):
    x = np.broadcast_to(np.zeros((), F32), shape)
    weights = zeros(4 * 1024, 1), zeros(4 * 1024, 1024)
    with pytest.raises(TOO_LARGE):
        fastlstm.lstm_forward(x, *weights, need_tape=need_tape)
    with pytest.raises(TOO_LARGE):
        fastlstm.LSTM(1, 1024)(x)


# --- threads, ISA, math --------------------------------------------------------------------------


def test_set_num_threads_none_is_the_default():
    before = fastlstm.get_num_threads()
    fastlstm.set_num_threads(before + 1)
    fastlstm.set_num_threads(None)
    assert fastlstm.get_num_threads() == before


@pytest.mark.parametrize(
    ("n", "expected", "got"), [(0, "1", "0"), (-1, "1", "-1"), (4097, "4096", "4097")]
)
def test_set_num_threads_values(n, expected, got):
    before = fastlstm.get_num_threads()
    with pytest.raises(ValueError) as error:
        fastlstm.set_num_threads(n)
    assert_message(error, "n", expected, got)
    assert fastlstm.get_num_threads() == before


@pytest.mark.parametrize("n", [1.5, "2", [1], True], ids=str)
def test_set_num_threads_types(n):
    with pytest.raises(TypeError):
        fastlstm.set_num_threads(n)


def test_more_threads_than_any_machine_has():
    """Refused, or used as far as there is work; never a crash."""
    code = """
import numpy as np, fastlstm
for n in (1000, 10**6, 2**31 - 1, 2**31, 2**70):
    try:
        fastlstm.set_num_threads(n)
    except (ValueError, OverflowError, TypeError):
        continue
    rnn = fastlstm.LSTM(64, 256, rng=0)
    y, state, tape = rnn.forward(np.ones((4, 600, 64), np.float32))
    rnn.backward(tape, y)
print("alive")
"""
    result = run_python(code, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "alive"


@pytest.mark.parametrize("name", ["sse9", "AVX2 ", "avx10"])
def test_unknown_isa(name):
    result = run_python("import fastlstm", FASTLSTM_ISA=name)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError"), result.stderr
    for word in ("FASTLSTM_ISA", name, "generic"):
        assert word in last


def test_isa_that_this_machine_lacks():
    lacking = set(_core.compiled_isas()) - set(_core.supported_isas())
    if not lacking:
        pytest.skip("this machine runs every compiled ISA")
    for name in lacking:
        result = run_python("import fastlstm", FASTLSTM_ISA=name)
        assert result.returncode != 0
        assert name in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("op", "x"),
    [
        ("log", zeros(3)),
        ("exp", zeros(3, dtype=np.int32)),
        ("exp", zeros(3, dtype=np.float16)),
        ("exp", [1.0]),
        ("exp", None),
    ],
    ids=["op", "int32", "float16", "list", "None"],
)
def test_map(op, x):
    with pytest.raises((TypeError, ValueError)):
        _core.map(op, x)


def test_errors_do_not_leak_memory():
    """A refused call drops what it had taken."""
    import sys

    p = make_problem(T, N, D, H, F32)
    before = sys.getrefcount(p.x)
    for _ in range(100):
        with pytest.raises(ValueError, match="h0"):
            fastlstm.lstm_forward(*p.forward_args, (zeros(1, 1), p.c0))
    assert sys.getrefcount(p.x) <= before + 1
