"""Threads: the same bits for any number of them, from any caller, and after a fork."""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import fastlstm
import numpy as np
import pytest
from fastlstm import _core
from helpers import assert_all_same_bits, make_problem, run_kernels, run_python, stdout_of

needs_openmp = pytest.mark.skipif(
    _core.openmp.startswith("none"), reason="built without OpenMP, so there is one thread"
)
THREADS = (1, 2, 3, 4, 7)
# (T, N, D, H); test_the_sizes_reach_every_plan says why these.
SIZES = [
    (1, 1, 64, 64),
    (1, 1, 300, 300),
    (1, 30, 64, 100),
    (1, 150, 300, 180),
    (3, 1, 64, 256),
    (2, 1, 437, 453),
    (20, 1, 128, 512),
    (5, 2, 97, 300),
    (10, 32, 1, 50),
    (4, 97, 33, 31),
    (7, 64, 128, 128),
    (3, 16, 256, 520),
    (33, 7, 13, 37),
    (2, 300, 17, 33),
    (5, 28, 32, 80),  # forward on tiles
    (2, 70, 5, 560),  # backward on tiles: rows that fit at once on two threads, not on one
]
SIZE_IDS = ["x".join(map(str, sizes)) for sizes in SIZES]


def test_the_sizes_reach_every_plan():
    for backward in (False, True):
        cases = [
            (sizes, _core.plan(*sizes, threads, itemsize, backward))
            for sizes in SIZES
            for threads in THREADS
            for itemsize in (4, 8)
        ]
        splits = {(plan["row_groups"] > 1, plan["panel_groups"] > 1) for _, plan in cases}
        assert splits >= {(False, False), (True, False), (False, True)}
        assert {plan["direct"] for _, plan in cases} == {False, True}
        assert {plan["block"] < T for (T, *_), plan in cases} == {False, True}
        whole = [plan["block"] if backward else T for (T, *_), plan in cases]
        tasks = {plan["task"] < steps for steps, (_, plan) in zip(whole, cases, strict=True)}
        assert tasks == {False, True}
        if not backward:
            assert {plan["input_in_step"] for _, plan in cases} == {False, True}
            assert {plan["pack_at_use"] for _, plan in cases} == {False, True}
            assert {plan["across"] > 0 for _, plan in cases} == {False, True}
            assert {plan["row_by_row"] for _, plan in cases} == {False, True}


@pytest.mark.parametrize("sizes", SIZES, ids=SIZE_IDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_same_bits_for_any_number_of_threads(isa, dtype, sizes, reverse):
    p = make_problem(*sizes, dtype)
    fastlstm.set_num_threads(1)
    expected = run_kernels(p, reverse=reverse)
    for threads in THREADS:
        fastlstm.set_num_threads(threads)
        assert_all_same_bits(run_kernels(p, reverse=reverse), expected)


@pytest.mark.parametrize("sizes", SIZES, ids=SIZE_IDS)
def test_same_bits_with_two_directions(dtype, sizes):
    """Which run at the same time on an even number of threads, and else one after the other."""
    T, N, D, H = sizes
    rnn = fastlstm.LSTM(D, H, num_layers=2, bidirectional=True, dtype=dtype, rng=0)
    x = np.random.default_rng(1).standard_normal((T, N, D)).astype(dtype)
    grad_y = np.random.default_rng(2).standard_normal((T, N, 2 * H)).astype(dtype)

    def run():
        y, state, tape = rnn.forward(x)
        grads = rnn.backward(tape, grad_y)
        return [y, *state, grads.x, grads.h0, grads.c0, *grads.weights.values()]

    fastlstm.set_num_threads(1)
    expected = run()
    for threads in THREADS[1:]:
        fastlstm.set_num_threads(threads)
        for actual, array in zip(run(), expected, strict=True):
            assert actual.tobytes() == array.tobytes()


# (T, N, D, H, layers)
STACKS = [
    (300, 1, 8, 24, 2),
    (300, 1, 70, 24, 3),
    (60, 3, 20, 40, 5),
    (1, 1, 9, 33, 2),
    (5, 32, 1, 64, 3),  # but for the first on tiles
]


def test_the_stacks_reach_every_plan():
    plans = {
        _core.plan(T, N, H, H, threads, itemsize, False, layers)["layers_at_once"]
        for T, N, _, H, layers in STACKS
        for threads in THREADS
        for itemsize in (4, 8)
    }
    assert plans >= {1, 2} and max(plans) > 2


@pytest.mark.parametrize("T, N, D, H, layers", STACKS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_same_bits_of_layers_at_once(isa, dtype, T, N, D, H, layers, bidirectional):
    """As of one layer after the other, which is how a tape is kept."""
    rnn = fastlstm.LSTM(D, H, layers, bidirectional=bidirectional, dtype=dtype, rng=0)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((T, N, D)).astype(dtype)
    slots = layers * (1 + bidirectional)
    state = tuple(rng.standard_normal((slots, N, H)).astype(dtype) for _ in "hc")
    fastlstm.set_num_threads(1)
    y, last, _ = rnn.forward(x, state)
    for threads in THREADS:
        fastlstm.set_num_threads(threads)
        for _ in range(3):
            found, state_n = rnn(x, state)
            for actual, array in zip((found, *state_n), (y, *last), strict=True):
                assert actual.tobytes() == array.tobytes()


@pytest.mark.parametrize("sizes", SIZES, ids=SIZE_IDS)
def test_same_bits_from_run_to_run(isa, dtype, sizes):
    p = make_problem(*sizes, dtype)
    fastlstm.set_num_threads(3)
    expected = run_kernels(p)
    for _ in range(5):
        assert_all_same_bits(run_kernels(p.copy()), expected)


def test_set_and_get():
    for n in (1, 2, 5, 64):
        fastlstm.set_num_threads(n)
        assert fastlstm.get_num_threads() == n


@needs_openmp
@pytest.mark.parametrize("n", [1, 3])
def test_default_is_omp_num_threads(n):
    code = "import fastlstm; print(fastlstm.get_num_threads())"
    assert stdout_of(run_python(code, OMP_NUM_THREADS=str(n))) == str(n)


COUNT_THREADS = """
import os
import numpy as np
import fastlstm

def running():
    return len(os.listdir("/proc/self/task"))

x = np.ones((20, 64, 128), np.float32)
rnn = fastlstm.LSTM(128, 256)
before = running()
for _ in range(3):
    y, state, tape = rnn.forward(x)
    rnn.backward(tape, y)
print(running() - before + 1)
"""


@needs_openmp
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_more_threads_run_than_were_asked_for(n):
    planned = max(_core.plan(20, 64, 128, 256, n, 4, backward)["threads"] for backward in (0, 1))
    assert planned == n
    assert stdout_of(run_python(COUNT_THREADS, OMP_NUM_THREADS=str(n))) == str(n)


def test_concurrent_calls_from_python_threads():
    """Each caller brings its own workspaces; none waits for or disturbs another."""
    fastlstm.set_num_threads(2)
    problems = [make_problem(*sizes, np.float32, seed=s) for sizes in SIZES for s in range(2)]
    expected = [run_kernels(p) for p in problems]
    with ThreadPoolExecutor(max_workers=8) as pool:
        for _ in range(3):
            for actual, e in zip(pool.map(run_kernels, problems), expected, strict=True):
                assert_all_same_bits(actual, e)


def test_concurrent_calls_share_one_module():
    """The weights of one LSTM, read by several threads at once."""
    rnn = fastlstm.LSTM(33, 65, num_layers=2, bidirectional=True, rng=0)
    x = np.random.default_rng(0).standard_normal((9, 17, 33), np.float32)

    def run(_=None):
        y, (h, c), tape = rnn.forward(x)
        grads = rnn.backward(tape, y, (h, c))
        return {"y": y, "h": h, "c": c, "x": grads.x, **grads.weights}

    expected = run()
    with ThreadPoolExecutor(max_workers=6) as pool:
        for actual in pool.map(run, range(24)):
            assert_all_same_bits(actual, expected)


def test_changing_the_number_of_threads_while_others_compute():
    p = make_problem(7, 64, 128, 128, np.float32)
    expected = run_kernels(p)
    with ThreadPoolExecutor(max_workers=4) as pool:
        runs = [pool.submit(run_kernels, p) for _ in range(12)]
        for k in range(200):
            fastlstm.set_num_threads(1 + k % 4)
        for run in runs:
            assert_all_same_bits(run.result(), expected)


# Threads that Python does not wait for are in kernels, or come out of them, while it ends.
DAEMONS = """
import threading, time
import numpy as np
import fastlstm

rnn = fastlstm.LSTM(256, 256, rng=0)
x = np.zeros((50, 64, 256), np.float32)

def run():
    while True:
        y, state, tape = rnn.forward(x)
        rnn.backward(tape, y, state)

for _ in range(4):
    threading.Thread(target=run, daemon=True).start()
time.sleep(0.3)
print("done")
"""


@pytest.mark.parametrize("n", [1, 2])
def test_daemon_threads_at_exit(n):
    for _ in range(3):
        assert stdout_of(run_python(DAEMONS, OMP_NUM_THREADS=str(n))) == "done"


# The child must neither hang (libgomp's workers are gone after a fork) nor compute other bits.
# It is killed after a while, so that a hang is a failure and not a test run that never ends.
FORK = """
import os, select, signal, sys
import numpy as np
import fastlstm

fastlstm.set_num_threads(2)
rng = np.random.default_rng(0)
cases = []
for T, N, D, H, layers in [(20, 64, 128, 128, 1), (20, 1, 128, 512, 1), (300, 1, 8, 24, 2)]:
    rnn = fastlstm.LSTM(D, H, layers, rng=0)
    cases.append((rnn, rng.standard_normal((T, N, D), np.float32)))

def compute():
    parts = []
    for rnn, x in cases:
        y, (h, c), tape = rnn.forward(x)
        grads = rnn.backward(tape, y, (h, c))
        parts += [y, h, c, grads.x, *grads.weights.values(), rnn(x)[0]]
    return b"".join(a.tobytes() for a in parts)

def forked(f):
    '''f() in a forked child; None if it does not answer.'''
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(f())
        finally:
            os._exit(0)
    os.close(writer)
    data = b""
    while select.select([reader], [], [], 20)[0]:
        piece = os.read(reader, 1 << 20)
        if not piece:
            break
        data += piece
    else:
        os.kill(pid, signal.SIGKILL)
        data = None
    os.close(reader)
    os.waitpid(pid, 0)
    return data

if sys.argv[1] == "used":
    compute()
grandchild = sys.argv[2] == "grandchild"
answer = forked(lambda: forked(compute) or b"") if grandchild else forked(compute)
if answer is None:
    sys.exit("the child hangs")
if answer != compute():  # the parent still runs, too
    sys.exit("the child computed something else")
print("same bits")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("generation", ["child", "grandchild"])
@pytest.mark.parametrize("parent", ["used", "unused"])
def test_forked_child(parent, generation):
    code = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n" + FORK
    assert stdout_of(run_python(code, parent, generation, timeout=120)) == "same bits"


FORK_POOL = """
import multiprocessing, sys, warnings
import numpy as np
import fastlstm

warnings.simplefilter("ignore", DeprecationWarning)  # CPython >= 3.12 warns of fork with threads
x = np.random.default_rng(0).standard_normal((20, 64, 128), np.float32)
rnn = fastlstm.LSTM(128, 128, rng=0)

def compute(threads):
    fastlstm.set_num_threads(threads)
    y, state, tape = rnn.forward(x)
    grads = rnn.backward(tape, y)
    return y.tobytes() + grads.weights["weight_hh_l0"].tobytes()

if __name__ == "__main__":
    expected = compute(2)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        answers = pool.map_async(compute, [1, 2, 3, 2]).get(timeout=60)
    assert all(answer == expected for answer in answers)
    assert compute(2) == expected
    print("same bits")
"""


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this platform"
)
def test_multiprocessing_pool_of_forked_workers():
    assert stdout_of(run_python(FORK_POOL, timeout=120)) == "same bits"
