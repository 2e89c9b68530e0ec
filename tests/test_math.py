"""The vector exp, sigmoid and tanh of the kernels, measured in units in the last place (ULP).

One ULP is the gap between neighbouring numbers of the type at the exact result: 2**-23 in [1, 2),
2**-149 for every denormal float32. Overflow counts as 2**128 (2**1024), the next number after the
largest finite one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from fastlstm import _core, reference

OPS = ("exp", "sigmoid", "tanh")
MAX_ULP = {np.float32: 2.0, np.float64: 3.0}
WIDER = {np.float32: np.float64, np.float64: np.longdouble}
# Every pattern within this distance of a hard point is tried.
NEIGHBOURS = 1 << 12
CHUNK = 1 << 16  # so that the temporaries stay in cache

pytestmark = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant <= np.finfo(np.float64).nmant,
    reason="long double is no wider than double here, so there is nothing to measure against",
)


def exact(op, x: np.ndarray) -> np.ndarray:
    """op(x), computed in the type of x, without overflow on the way."""
    with np.errstate(all="ignore"):
        if op == "exp":
            return np.exp(x)
        if op == "tanh":
            return np.tanh(x)
        e = np.exp(-np.abs(x))
        return np.where(x < 0, e, x.dtype.type(1)) / (1 + e)


def widened(x: np.ndarray) -> np.ndarray:
    """The same numbers in the next wider type."""
    with np.errstate(invalid="ignore"):  # raised by signalling NaN, which are among the patterns
        return x.astype(WIDER[x.dtype.type])


def ulp_error(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|actual - expected| in ULP of actual's type; expected is of a wider type. NaN equals NaN."""
    info = np.finfo(actual.dtype)
    overflow = np.ldexp(expected.dtype.type(1), info.maxexp)
    clamped = np.clip(expected, -overflow, overflow)
    mantissa, exponent = np.frexp(clamped)  # clamped = mantissa * 2**exponent, in [1/2, 1)
    exponent = np.where(mantissa == 0, info.minexp, exponent - 1)
    exponent = np.clip(exponent, info.minexp, info.maxexp - 1) - info.nmant
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(np.clip(widened(actual), -overflow, overflow) - clamped)
        error = np.ldexp(difference, -exponent)
    same_nan = np.isnan(actual) & np.isnan(expected)
    return np.where(same_nan, 0, np.where(np.isnan(error), np.inf, error))


def float32_patterns(start: int, stop: int, step: int) -> Iterator[np.ndarray]:
    """The float32 numbers whose bits are range(start, stop, step), in chunks."""
    for low in range(start, stop, step * CHUNK):
        bits = np.arange(low, min(low + step * CHUNK, stop), step, dtype=np.uint64)
        yield bits.astype(np.uint32).view(np.float32)


def float64_samples(rng, count: int) -> Iterator[np.ndarray]:
    """Random numbers: where something happens, where most happens, and of any bits."""
    yield rng.uniform(-750, 750, count)
    yield rng.uniform(-40, 40, count)
    yield rng.uniform(-1, 1, count)
    yield rng.integers(0, 1 << 64, count, dtype=np.uint64).view(np.float64)


def near(points, dtype) -> np.ndarray:
    """All numbers at most NEIGHBOURS patterns away from the points, and from their negatives."""
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}").type
    offsets = np.arange(-NEIGHBOURS, NEIGHBOURS, dtype=np.int64)
    with np.errstate(over="ignore"):
        magnitudes = [
            np.array(p, dtype).view(unsigned).astype(np.int64) + offsets for p in map(abs, points)
        ]
    bits = np.unique(np.clip(np.concatenate(magnitudes), 0, None)).astype(unsigned)
    positive = bits.view(dtype)
    return np.concatenate((positive, -positive))


def hard_points(dtype) -> list[float]:
    """Where results overflow, turn denormal, saturate, or where a range reduction changes over."""
    info = np.finfo(dtype)
    ln2 = np.log(2)
    tiniest = float(info.smallest_subnormal)
    return [
        0.0,
        float(info.tiny),  # denormal arguments
        float(np.sqrt(info.tiny)),  # x**2 turns denormal
        float(info.eps),
        float(np.sqrt(info.eps)),
        1.0,
        *(k * ln2 / 2 for k in range(1, 24)),  # seams of the reduction by powers of two
        *(k * ln2 for k in (32, 64, 100, 126, 127, 128)),
        *(2.0**k for k in range(-12, 9)),
        0.549306144334,  # log(3)/2, where tanh is 1/2
        0.625,  # the usual seam between the two formulas of tanh
        float(-np.log(info.eps)),  # sigmoid(x) becomes 1
        float(-np.log(info.eps) / 2),  # tanh(x) becomes 1
        float(np.log(info.max)),  # exp(x) overflows
        float(-np.log(info.tiny)),  # exp(-x) turns denormal
        float(-np.log(tiniest)),  # exp(-x) becomes 0
        float(info.max),
        np.inf,  # and, above it, NaN
    ]


def assert_within_bound(op, chunks: Iterable[np.ndarray]):
    """The bound holds for every number of every chunk; the message names the worst of all."""
    worst = 0.0, ""
    for x in chunks:
        actual = _core.map(op, x)
        assert (actual.dtype, actual.shape) == (x.dtype, x.shape)
        error = ulp_error(actual, exact(op, widened(x)))
        k = error.argmax()
        worst = max(worst, (error[k], f"{op}({x[k]!r}) = {actual[k]!r}"))
    assert worst[0] <= MAX_ULP[x.dtype.type], f"{worst[1]} is {worst[0]:.3g} ULP off"


@pytest.mark.parametrize("op", OPS)
def test_float32_whole_line_sampled(isa, op):
    assert_within_bound(op, float32_patterns(0, 1 << 32, 97))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_float32_whole_line(isa, op):
    assert_within_bound(op, float32_patterns(0, 1 << 32, 1))


@pytest.mark.parametrize("op", OPS)
def test_near_hard_points(isa, op, dtype):
    assert_within_bound(op, [near(hard_points(dtype), dtype)])


@pytest.mark.parametrize("op", OPS)
def test_float64_random_numbers_and_bits(isa, op, rng):
    assert_within_bound(op, float64_samples(rng, 1 << 18))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_float64_random_numbers_and_bits_long(isa, op, rng):
    for _ in range(300):
        assert_within_bound(op, float64_samples(rng, 1 << 18))


def test_special_values(isa, dtype):
    x = np.array([-np.inf, -0.0, 0.0, np.inf, np.nan, -np.nan], dtype)
    np.testing.assert_array_equal(_core.map("exp", x), [0, 1, 1, np.inf, np.nan, np.nan])
    np.testing.assert_array_equal(_core.map("sigmoid", x), [0, 0.5, 0.5, 1, np.nan, np.nan])
    np.testing.assert_array_equal(_core.map("tanh", x), [-1, 0, 0, 1, np.nan, np.nan])


def test_tanh_is_odd_and_keeps_the_sign_of_zero(isa, dtype, rng):
    info = np.finfo(dtype)
    x = np.concatenate(
        ([0.0, info.smallest_subnormal, info.tiny, np.inf], rng.uniform(0, 20, 1000))
    ).astype(dtype)
    positive, negative = _core.map("tanh", x), _core.map("tanh", -x)
    np.testing.assert_array_equal(np.signbit(positive), False)
    np.testing.assert_array_equal(np.signbit(negative), True)
    np.testing.assert_array_equal(negative, -positive)


def test_results_stay_in_range(isa, dtype):
    """One ULP above 1 would still be accurate, but then o * (1 - o) changes its sign."""
    x = np.concatenate(
        (near(hard_points(dtype), dtype), np.linspace(-50, 50, 100_001, dtype=dtype))
    )
    x = x[~np.isnan(x)]
    assert (_core.map("exp", x) >= 0).all()
    assert (np.abs(_core.map("tanh", x)) <= 1).all()
    sigmoid = _core.map("sigmoid", x)
    assert (sigmoid >= 0).all()
    assert (sigmoid <= 1).all()


@pytest.mark.parametrize("op", OPS)
def test_tails(isa, op, dtype, rng):
    """A number gives the same bits wherever it stands, at the end of a short vector too."""
    x = rng.uniform(-5, 5, 71).astype(dtype)
    alone = np.concatenate([_core.map(op, x[k : k + 1]) for k in range(x.size)])
    for n in range(71):
        np.testing.assert_array_equal(_core.map(op, x[:n].copy()), alone[:n])


def test_reference_sigmoid_is_accurate(rng):
    x = rng.uniform(-750, 750, 1 << 16)
    assert ulp_error(reference.sigmoid(x), exact("sigmoid", widened(x))).max() <= 3


def test_the_measure_itself():
    """The ruler: neighbours are one ULP apart, denormals and overflow included."""
    f = np.float32
    x = np.array([1, 1.5, 2.0**-126, 2.0**-140, 0, 3e38, -7], f)
    np.testing.assert_array_equal(ulp_error(x, widened(x)), 0)
    np.testing.assert_array_equal(ulp_error(np.nextafter(x, f(np.inf)), widened(x)), 1)
    largest = np.finfo(f).max
    actual = np.array([np.inf, largest, np.inf, np.nan, 1, np.nan], f)
    expected = np.array([largest, 1e300, 1e300, 1, np.nan, np.nan])
    np.testing.assert_array_equal(ulp_error(actual, expected), [1, 1, 0, np.inf, np.inf, 0])
