"""Half precision in the core: arrays in it, gates in float16, and products of bfloat16.

What half precision is for a user is tested in test_nn.py.
"""

from __future__ import annotations

import copy
import itertools

import pytest

torch = pytest.importorskip("torch", reason="tests of the torch side")
import fastlstm.nn  # noqa: E402

_core = fastlstm._core
# The ISAs with products of bfloat16: h and dz go in as two terms, or rounded to one.
TILES, DOTS = "amx", "avx512_bf16"
TINY = torch.finfo(torch.float32).tiny
HALF = [torch.float16, torch.bfloat16]
every_half = pytest.mark.parametrize("half", HALF, ids=str)


class Problem:
    """A layer in one direction whose weights, input and h0 are exact in bfloat16.

    Given as float32 or, with `in_bf16`, as bfloat16. Results are float32 in either case.
    """

    def __init__(self, T, N, D, H, P=0, batch_sizes=(), reverse=False, seed=0):
        torch.manual_seed(seed)
        self.H, self.batch_sizes, self.reverse = H, batch_sizes, reverse
        time = (sum(batch_sizes),) if batch_sizes else (T, N)

        def bf16(*shape, scale=1.0):
            return (scale * torch.randn(shape)).bfloat16().float()

        scale = (D + H) ** -0.5
        shapes = [(4 * H, D), (4 * H, P or H), (4 * H,), (4 * H,), *([(P, H)] if P else [])]
        self.weights = [bf16(*shape, scale=scale) for shape in shapes]
        self.x, self.h0, self.c0 = bf16(*time, D), bf16(N, P or H), torch.randn(N, H)
        self.time, self.P = time, P
        self.grads = torch.randn(*time, P or H), torch.randn(N, P or H), torch.randn(N, H)

    def forward(self, *, in_bf16=False, gates=torch.float32, threads=1):
        """Return y, h_n, c_n, gates, cells, raw."""
        N, H, P = len(self.c0), self.H, self.P
        results = [torch.empty(*self.time, P or H), torch.empty(N, P or H), torch.empty(N, H)]
        kept = [torch.empty(1, *self.time, 4 * H, dtype=gates), torch.empty(1, *self.time, H)]
        kept.append(torch.empty(1, *self.time, H) if P else None)
        as_given = torch.Tensor.bfloat16 if in_bf16 else torch.Tensor.float
        x, *weights = map(as_given, (self.x, *self.weights))
        h0 = None if self.h0 is None else as_given(self.h0)
        last = self.batch_sizes, self.reverse, threads
        _core.forward(x, h0, self.c0, weights, *results, *kept, *last)
        return [*results, *kept]

    def backward(self, kept, *, in_bf16=False, threads=1):
        """Return the gradients of x, h0, c0 and the weights."""
        given = [self.x, self.h0, self.c0, *self.weights]
        dx, dh0, dc0, *dweights = (None if t is None else torch.empty_like(t) for t in given)
        # As half precision keeps them.
        y, raw = (None if t is None else t.bfloat16().float() for t in (kept[0], kept[5]))

        def as_given(tensor):
            return tensor.bfloat16() if in_bf16 and tensor is not None else tensor

        x, h0, y, raw, *weights = map(as_given, (self.x, self.h0, y, raw, *self.weights))
        _core.backward(
            x, h0, self.c0, weights, y, kept[3], kept[4], raw, *self.grads, dx, dweights, dh0, dc0,
            None, self.batch_sizes, self.reverse, threads,
        )  # fmt: skip
        return [dx, dh0, dc0, *dweights]


SIZES = {
    "one of everything": {"T": 5, "N": 1, "D": 1, "H": 1},
    "weights as they are": {"T": 1, "N": 3, "D": 20, "H": 30},
    "the batch across the lanes": {"T": 1, "N": 28, "D": 20, "H": 30},
    "ragged across the lanes": {"T": 2, "N": 15, "D": 9, "H": 17, "batch_sizes": (15, 4)},
    "projected across the lanes": {"T": 1, "N": 27, "D": 9, "H": 20, "P": 7},
    "input product over time": {"T": 7, "N": 2, "D": 1100, "H": 20},
    "weights packed panel by panel": {"T": 9, "N": 3, "D": 300, "H": 250, "P": 40},
    "odd": {"T": 6, "N": 33, "D": 17, "H": 19},
    "whole tiles": {"T": 3, "N": 64, "D": 64, "H": 64},
    "three row tiles": {"T": 3, "N": 40, "D": 33, "H": 70},
    "one row tile": {"T": 20, "N": 9, "D": 31, "H": 130},
    "several blocks": {"T": 60, "N": 35, "D": 12, "H": 20},
    "rows in parts, long sums": {"T": 3, "N": 200, "D": 70, "H": 300},
    "projected": {"T": 8, "N": 40, "D": 65, "H": 100, "P": 37},
    "projected to more than a panel": {"T": 3, "N": 20, "D": 5, "H": 40, "P": 39, "reverse": True},
    "ragged": {"T": 5, "N": 37, "D": 30, "H": 50, "batch_sizes": (37, 36, 20, 3, 1)},
    "ragged backwards": {
        "T": 4, "N": 21, "D": 40, "H": 33, "batch_sizes": (21, 21, 5, 4), "reverse": True
    },
}  # fmt: skip
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


@every_size
def test_products_of_bfloat16(isa, sizes):
    """As good as those of float32, but for what dots round."""
    problem = Problem(**sizes)
    plain, ours = problem.forward(), problem.forward(in_bf16=True)
    pairs = [*zip(plain, ours, strict=True)]
    # Both backward from the same, so that only its own products differ.
    pairs += zip(
        problem.backward(plain), problem.backward(plain, in_bf16=True), strict=True
    )  # fmt: skip
    for expected, found in pairs:
        if expected is None:
            continue
        if isa not in (TILES, DOTS):
            assert torch.equal(found, expected)
        scale = expected.abs().max().item()
        bound = 2**-7 if isa == DOTS else 2**-15
        torch.testing.assert_close(found, expected, rtol=0, atol=scale * bound)


def test_dots_round_h_to_nearest(isa):
    two, first, second = (Problem(T, 20, 30, 50) for T in (2, 1, 1))
    first.x, second.x = two.x[:1], two.x[1:]
    first.weights = second.weights = two.weights
    first.h0, first.c0 = two.h0, two.c0
    y, _, c_n, *_ = first.forward()
    second.h0, second.c0 = y[0].bfloat16().float() if isa == DOTS else y[0], c_n
    expected = torch.cat((y, second.forward()[0]))
    torch.testing.assert_close(two.forward(in_bf16=True)[0], expected, rtol=0, atol=2**-17)


@every_size
@pytest.mark.parametrize("gates", [torch.float32, torch.float16], ids=["gates", "half gates"])
def test_bits_do_not_depend_on_threads(isa, sizes, gates):
    problem = Problem(**sizes)
    outcomes = []
    for threads in (1, 2, 3, 4):
        kept = problem.forward(in_bf16=True, gates=gates, threads=threads)
        outcomes.append([*kept, *problem.backward(kept, in_bf16=True, threads=threads)])
    for outcome in outcomes[1:]:
        for a, b in zip(outcomes[0], outcome, strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("N", [1, 5, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(isa, N, bad):
    problem = Problem(8, N, 20, 33)
    problem.x[4, 0, 3] = bad
    problem.grads[0][3, 0, 5] = bad
    plain, ours = problem.forward(), problem.forward(in_bf16=True)
    found = [*ours, *problem.backward(ours, in_bf16=True)]
    expected = [*plain, *problem.backward(plain)]
    for name, a, b in zip(itertools.count(), found, expected, strict=False):
        if a is None or name in (9, 10, 11, 12):  # gradients of weights are sums over all rows
            continue
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.equal(a.isinf(), b.isinf()), name
    y = ours[0]
    assert y[:4].isfinite().all() and y[:, 1:].isfinite().all()


@pytest.mark.parametrize("which", [0, 1], ids=["weight_ih", "weight_hh"])
def test_an_infinite_weight(isa, which):
    problem = Problem(4, 40, 20, 33)
    problem.weights[which][5, 7] = float("inf")
    plain, ours = problem.forward(), problem.forward(in_bf16=True)
    for expected, found in zip(plain[:5], ours[:5], strict=True):  # no projection: no sixth
        bound = 2**-7 if isa == DOTS else 2**-14
        torch.testing.assert_close(found, expected, rtol=0, atol=bound, equal_nan=True)


@pytest.mark.parametrize("weight", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("P", [0, 7], ids=["whole", "projected"])
@pytest.mark.parametrize("T, N", [(1, 1), (1, 3), (1, 28), (1, 70), (5, 3), (2, 40)])
def test_no_state_means_zeros(isa, T, N, P, weight):
    """Nothing is multiplied by such a state, but where 0 * weight_hh is NaN."""
    given, left_out = Problem(T, N, 20, 33, P), Problem(T, N, 20, 33, P)
    given.h0, left_out.h0 = torch.zeros(N, P or 33), None
    if weight is not None:
        given.weights[1][5, 3] = left_out.weights[1][5, 3] = weight
    for threads in (1, 3):
        expected = given.forward(in_bf16=True, threads=threads)
        found = left_out.forward(in_bf16=True, threads=threads)
        assert expected[0].isnan().any() == (weight is not None)
        expected += given.backward(expected, in_bf16=True, threads=threads)
        found += left_out.backward(found, in_bf16=True, threads=threads)
        for k, (a, b) in enumerate(zip(expected, found, strict=True)):
            if k != 7:  # that of h0
                torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)


def test_rows_do_not_depend_on_their_batch(isa):
    whole = Problem(6, 50, 24, 40)
    y = whole.forward(in_bf16=True)[0]
    for first, count in ((3, 17), (20, 30)):
        part = Problem(6, count, 24, 40)
        part.weights = whole.weights
        rows = slice(first, first + count)
        part.x, part.h0, part.c0 = whole.x[:, rows], whole.h0[rows], whole.c0[rows]
        assert torch.equal(part.forward(in_bf16=True)[0], y[:, rows])


SCALE = 2.0**16


def distances(gates):
    """Gates as they are kept in float16: i, f and o by how far they are from 0, negative from 1."""
    i, f, g, o = gates.chunk(4, -1)
    smallest = -(2.0**-24)
    i, f, o = (
        torch.where(s > 0.5, ((1 - s) * -SCALE).clamp(max=smallest), s * SCALE) for s in (i, f, o)
    )
    return torch.cat((i, f, g, o), -1)


def at_distance(distance):
    return torch.where(distance < 0, 1 + distance / SCALE, distance / SCALE)


def at_distances(kept):
    """Undo :func:`distances`."""
    i, f, g, o = kept.chunk(4, -1)
    return torch.cat((at_distance(i), at_distance(f), g, at_distance(o)), -1)


@every_size
def test_gates_in_float16(isa, sizes):
    problem = Problem(**sizes)
    # Gates that would be denormal or 0 in float16, and those near 1.
    problem.weights[2].copy_(torch.linspace(-30, 30, 4 * problem.H))
    expected, found = problem.forward(), problem.forward(gates=torch.float16)
    gates = found.pop(3)
    exact = expected.pop(3)
    as_kept = distances(exact).to(torch.float16)
    assert torch.equal(gates.view(torch.int16), as_kept.view(torch.int16))
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or torch.equal(a, b)
    found.insert(3, gates)
    as_float = [*found[:3], at_distances(gates.float()), *found[4:]]
    for a, b in zip(problem.backward(found), problem.backward(as_float), strict=True):
        assert torch.equal(a, b)


def gradient_of_c(grad_c, forget, out):
    """dL/dc_{t-1} of a step with this dL/dc_t and forget gate, whatever the others."""
    H = len(out)
    gates = torch.ones(1, 4 * H, dtype=forget.dtype)
    gates[0, H : 2 * H] = forget
    # As of a projection, whose H is not its P, so that W_hh is small.
    x, weights = torch.zeros(1, 1), [torch.zeros(4 * H, 1), torch.zeros(4 * H, 1)]
    weights += [torch.zeros(1, H)]
    kept = gates, torch.zeros(1, H), torch.zeros(1, H)
    states, grads = (torch.zeros(1, 1), torch.zeros(1, H)), (None, None, grad_c[None])
    results = None, [None] * 3, None, out[None]
    _core.backward(x, *states, weights, None, *kept, *grads, *results, None, (), False, 1)
    return out


def every_number(half):
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(half)


def test_every_gate_in_float16_is_read(isa):
    halves = every_number(torch.float16)
    found = gradient_of_c(torch.ones(len(halves)), halves, torch.empty(len(halves)))
    expected = at_distance(halves.float())
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bias", [-20.0, -16.0, 8.0, 40.0])
@pytest.mark.parametrize("gate", [0, 1, 3])
def test_gradients_through_gates_almost_closed(bias, gate):
    """Those of a gate are relative to itself, however little it lets through."""
    torch.manual_seed(0)
    H = 32
    rnn = fastlstm.nn.LSTM(16, H)
    rows = slice(gate * H, (gate + 1) * H)
    x, c0 = torch.randn(6, 8, 16), torch.randn(1, 8, H)
    with torch.no_grad():
        rnn.bias_ih_l0[rows] = bias
        for p in rnn.parameters():
            p.copy_(p.bfloat16())
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        module = copy.deepcopy(rnn).to(dtype)
        state = torch.zeros_like(c0, dtype=dtype), c0.to(dtype, copy=True).requires_grad_()
        y, (_, c) = module(x.to(dtype), state)
        (y.sum() + c.sum()).backward()
        found.append((module.weight_ih_l0.grad[rows].float(), state[1].grad.float()))
    for exact, half in zip(*found, strict=True):
        assert (half - exact).abs().max() <= 0.03 * exact.abs().max()


@every_half
def test_every_number_in_half_precision_is_read(isa, half):
    numbers = every_number(half)
    found = gradient_of_c(numbers, torch.ones(len(numbers)), torch.empty(len(numbers)))
    expected = numbers.float()
    expected[expected.abs() < TINY] = 0  # arithmetic of the kernels
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@every_half
def test_numbers_are_rounded_to_half_precision_as_by_torch(isa, half):
    exact = every_number(half).float().sort().values
    between = (exact[:-1] + exact[1:]) / 2  # ties
    around = [torch.nextafter(between, torch.full_like(between, end)) for end in (-1e38, 1e38)]
    ends = torch.tensor([65519.9, 65520.0, 3.4e38, torch.inf, -torch.inf, torch.nan])
    numbers = torch.cat([exact, between, *around, ends, torch.randn(1003)])
    numbers = numbers[(numbers.abs() >= TINY) | (numbers == 0) | numbers.isnan()]
    found = gradient_of_c(numbers, torch.ones(len(numbers)), torch.empty(len(numbers), dtype=half))
    torch.testing.assert_close(found, numbers.to(half), rtol=0, atol=0, equal_nan=True)


@every_size
@every_half
@pytest.mark.parametrize("threads", [1, 3])
def test_arrays_in_half_precision(isa, sizes, half, threads):
    """Any of them: what is read counts as in float32, what is written is rounded."""

    def to(dtype, *tensors):
        return [None if tensor is None else tensor.to(dtype) for tensor in tensors]

    def rounded(*tensors):
        return to(torch.float32, *to(half, *tensors))

    problem = Problem(**sizes)
    time, N, H, P = problem.time, len(problem.h0), problem.H, problem.P
    h0, c0, *weights = rounded(problem.h0, problem.c0, *problem.weights)
    grads = rounded(*problem.grads)
    wide = torch.empty(*time, problem.x.shape[-1] + 3, dtype=half)
    x = wide[..., :-3].copy_(problem.x)  # rows with gaps between
    shapes = [(*time, P or H), (N, P or H), (N, H), (1, *time, 4 * H), (1, *time, H)]
    last = problem.batch_sizes, problem.reverse, threads

    def forward(given, wanted):
        results = [torch.empty(shape, dtype=wanted) for shape in shapes]
        results[3] = results[3].float()  # gates: see above
        results.append(torch.empty_like(results[4]) if P else None)
        inputs = *to(given, x, h0, c0), to(given, *weights)
        _core.forward(*inputs, *results, *last)
        return results

    def backward(kept, given, wanted):
        like = x.float(), h0, c0, *weights
        results = dx, dh0, dc0, *dweights = [torch.empty_like(t, dtype=wanted) for t in like]
        y, _, _, gates, *cells = kept
        kept = *to(given, y), gates, *to(given, *cells)
        inputs = *to(given, x, h0, c0), to(given, *weights)
        _core.backward(*inputs, *kept, *to(given, *grads), dx, dweights, dh0, dc0, None, *last)
        return results

    kept = forward(half, torch.float32)
    kept_half = forward(half, half)
    exact = kept + backward(kept_half, half, torch.float32)
    found = kept_half + backward(kept_half, half, half)
    for place, (a, b) in enumerate(zip(found, exact, strict=True)):
        assert a is b is None or torch.equal(a, b.to(a.dtype)), place
    if half == torch.bfloat16 and isa in (TILES, DOTS):
        return  # products of their own
    plain = forward(torch.float32, torch.float32)
    plain += backward(kept_half, torch.float32, torch.float32)
    for place, (a, b) in enumerate(zip(exact, plain, strict=True)):
        assert a is b is None or torch.equal(a, b), place
