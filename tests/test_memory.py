"""Large memory between a forward and a backward pass: the next step gets what one gives back."""

from __future__ import annotations

import copy
import multiprocessing
import threading

import fastlstm
import numpy as np
import pytest
from fastlstm import _core, lstm_backward, lstm_forward
from hypothesis import given
from hypothesis import strategies as st

MIB = 1 << 20


def block(size):
    return np.frombuffer(_core.block(size), np.uint8)


def test_a_block_is_used_again():
    first = block(101 * MIB)  # no other test left one like it
    place = first.ctypes.data
    assert first.size == 101 * MIB and first.flags.writeable and place % 64 == 0
    other = block(101 * MIB)
    assert other.ctypes.data != place
    del first
    again = block(101 * MIB)
    assert again.ctypes.data == place
    del again
    assert block(90 * MIB).ctypes.data == place  # with room to spare
    assert block(60 * MIB).ctypes.data != place  # with too much of it
    short = block(400 << 10)
    place = short.ctypes.data
    del short
    assert block(430 << 10).ctypes.data == place  # a slightly longer sequence


@pytest.mark.parametrize("size", [-1, 0, 1 << 61, (1 << 62) + 1])
def test_sizes_that_cannot_be(size):
    with pytest.raises(MemoryError):
        _core.block(size)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=30))
def test_nobody_shares(actions):
    """Blocks come and go; each keeps what was written into it."""
    held = []
    for number, (release, size) in enumerate(actions):
        if release and held:
            del held[size % len(held)]
        else:
            made = block(size * MIB)
            made[:: MIB // 2] = number  # a few bytes of every part
            held.append((made, number))
        for made, mark in held:
            assert (made[:: MIB // 2] == mark).all()


def test_threads():
    wrong = []

    def work(mark):
        for _ in range(200):
            made = block(4 * MIB)
            made[::4096] = mark
            if not (made[::4096] == mark).all():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(queue):
    made = block(6 * MIB)
    made[:] = 2
    queue.put(int(made[-1]))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own():
    kept = block(6 * MIB)
    kept[:] = 1
    free = block(6 * MIB)
    del free
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and queue.get() == 2
    assert (kept == 1).all()


def test_old_values_reach_no_result():
    """A step on memory full of NaN, and a tape that outlives another."""
    rng = np.random.default_rng(0)
    T, N, D, H = 40, 64, 5, 110  # four gates take 4.3 MiB

    def random(*shape):
        return rng.standard_normal(shape).astype(np.float32) / 4

    args = random(T, N, D), random(4 * H, D), random(4 * H, H)
    grad = random(T, N, H)
    y, _, tape = lstm_forward(*args, need_tape=True)
    assert tape._gates.nbytes >= _core.LARGE
    expected = lstm_backward(tape, grad)
    place = tape._gates.ctypes.data
    tape._gates[:] = np.nan
    del tape
    again, _, tape = lstm_forward(*args, need_tape=True)
    assert tape._gates.ctypes.data == place
    *_, other = lstm_forward(2 * args[0], *args[1:], need_tape=True)
    assert other._gates.ctypes.data != place
    found = lstm_backward(tape, grad)
    assert np.array_equal(y, again)
    for a, b in zip(expected, found, strict=True):
        assert (a is None and b is None) or np.array_equal(a, b)


def test_a_training_step_of_torch():
    torch = pytest.importorskip("torch", reason="tests of the torch side")
    import fastlstm.nn

    torch.manual_seed(0)
    theirs = torch.nn.LSTM(5, 110)
    ours = fastlstm.nn.LSTM(5, 110)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(40, 64, 5)

    def step(rnn):
        y, _ = rnn(x)
        gates = y.grad_fn.saved_tensors[1] if rnn is ours else None
        place = None if gates is None else gates.data_ptr()
        if gates is not None:
            assert gates.nbytes >= _core.LARGE
        del gates
        rnn.zero_grad()
        y.square().sum().backward()
        return place, [p.grad for p in rnn.parameters()]

    first, _ = step(ours)
    second, found = step(ours)
    assert first == second
    _, expected = step(theirs)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_large_gradients_of_weights():
    """A gradient that is dropped gives its memory to the next step; one that is kept is kept."""
    torch = pytest.importorskip("torch", reason="tests of the torch side")
    import fastlstm.nn

    theirs = torch.nn.LSTM(520, 530)
    ours = fastlstm.nn.convert(copy.deepcopy(theirs))

    def step(rnn, seed):
        x = torch.randn(3, 1, 520, generator=torch.Generator().manual_seed(seed))
        rnn.zero_grad()
        rnn(x)[0].square().sum().backward()
        return rnn.weight_ih_l0.grad

    def close(a, b):
        return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())

    first = step(ours, 0)
    assert first.nbytes >= _core.LARGE and not first._is_view() and first.is_contiguous()
    assert close(first, step(theirs, 0))
    kept = first.clone()
    second = step(ours, 1)
    assert second.data_ptr() != first.data_ptr() and torch.equal(first, kept)
    assert close(second, step(theirs, 1))
    places = {p.grad.data_ptr() for p in ours.parameters()} | {first.data_ptr()}
    del first, second
    third = step(ours, 0)
    assert third.data_ptr() in places and torch.equal(third, kept)
    third.share_memory_()  # moves it
    assert third.is_shared() and torch.equal(third, kept)


def test_the_gradient_of_two_directions_has_no_more_memory_than_its_own():
    rnn = fastlstm.LSTM(5, 7, bidirectional=True, rng=0)
    y, _, tape = rnn.forward(np.ones((3, 2, 5)).astype(np.float32))
    assert rnn.backward(tape, y).x.base is None


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_same_of_torch(dtype):
    torch = pytest.importorskip("torch", reason="tests of the torch side")
    import fastlstm.nn

    rnn = fastlstm.nn.LSTM(5, 7, bidirectional=True).to(getattr(torch, dtype))
    x = torch.ones(3, 2, 5, dtype=getattr(torch, dtype), requires_grad=True)
    rnn(x)[0].sum().backward()
    assert x.grad.untyped_storage().nbytes() == x.nbytes


def test_accumulated_gradients():
    torch = pytest.importorskip("torch", reason="tests of the torch side")
    import fastlstm.nn

    rnn = fastlstm.nn.LSTM(520, 530)
    x = torch.randn(3, 1, 520)
    once = torch.autograd.grad(rnn(x)[0].sum(), list(rnn.parameters()))
    for _ in range(3):
        rnn(x)[0].sum().backward()
    for parameter, grad in zip(rnn.parameters(), once, strict=True):
        assert torch.allclose(parameter.grad, 3 * grad, rtol=1e-5)
