"""What several test files share: sample problems, comparisons, numeric gradients, subprocesses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import fastlstm
import numpy as np
from fastlstm import reference

# Sizes on both sides of every vector width and tile: no kernel gets by without its tails.
AWKWARD = (1, 2, 3, 5, 7, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97)

# Largest error allowed, relative to the largest value of the expected array.
TOLERANCE = {np.dtype(np.float32): 3e-6, np.dtype(np.float64): 2e-14}

Arrays = dict[str, np.ndarray]


@dataclass
class Problem:
    """The inputs of one layer in one direction, and the gradients that reach its outputs."""

    x: np.ndarray
    weight_ih: np.ndarray
    weight_hh: np.ndarray
    bias_ih: np.ndarray | None
    bias_hh: np.ndarray | None
    h0: np.ndarray
    c0: np.ndarray
    grad_y: np.ndarray
    grad_h: np.ndarray
    grad_c: np.ndarray

    @property
    def forward_args(self) -> tuple:
        return self.x, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    @property
    def state(self) -> tuple[np.ndarray, np.ndarray]:
        return self.h0, self.c0

    @property
    def grad_state(self) -> tuple[np.ndarray, np.ndarray]:
        return self.grad_h, self.grad_c

    def arrays(self) -> Arrays:
        return {name: a for name, a in vars(self).items() if a is not None}

    def copy(self) -> Problem:
        return replace(self, **{name: a.copy() for name, a in self.arrays().items()})


def make_problem(T, N, D, H, dtype=np.float64, *, bias=True, seed=0) -> Problem:
    """Random values that keep the gates alive: neither saturated nor close to linear."""
    rng = np.random.default_rng((seed, T, N, D, H))

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(dtype)

    return Problem(
        x=normal(T, N, D),
        weight_ih=normal(4 * H, D, scale=D**-0.5),
        weight_hh=normal(4 * H, H, scale=H**-0.5),
        bias_ih=normal(4 * H, scale=0.5) if bias else None,
        bias_hh=normal(4 * H, scale=0.5) if bias else None,
        h0=normal(N, H, scale=0.5),
        c0=normal(N, H),
        grad_y=normal(T, N, H),
        grad_h=normal(N, H),
        grad_c=normal(N, H),
    )


def run_kernels(p: Problem, *, reverse=False) -> Arrays:
    """Everything that the compiled functions say about a problem, by name."""
    y, (h_n, c_n) = fastlstm.lstm_forward(*p.forward_args, p.state, reverse=reverse)
    y_train, (h_train, c_train), tape = fastlstm.lstm_forward(
        *p.forward_args, p.state, reverse=reverse, need_tape=True
    )
    grads = fastlstm.lstm_backward(tape, p.grad_y, p.grad_state)
    return {
        "y": y,
        "h_n": h_n,
        "c_n": c_n,
        "y, training": y_train,
        "h_n, training": h_train,
        "c_n, training": c_train,
        **named_gradients(grads),
    }


def run_reference(p: Problem, *, reverse=False) -> Arrays:
    """What `run_kernels` should have said."""
    y, h_n, c_n, _, _ = reference.lstm_forward(*p.forward_args, *p.state, reverse=reverse)
    grads = reference.lstm_backward(
        *p.forward_args, *p.state, p.grad_y, *p.grad_state, reverse=reverse
    )
    return {
        "y": y,
        "h_n": h_n,
        "c_n": c_n,
        "y, training": y,
        "h_n, training": h_n,
        "c_n, training": c_n,
        **named_gradients(grads),
    }


def named_gradients(grads) -> Arrays:
    """A gradient tuple as a dict; a bias gradient that is None is left out."""
    return {f"grad {name}": g for name, g in grads._asdict().items() if g is not None}


def assert_close(actual, expected, *, tolerance=None, name="result"):
    """Same shape, and every error within `tolerance` times the largest expected value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    if actual.size == 0:
        return
    if tolerance is None:
        tolerance = TOLERANCE[actual.dtype]
    assert np.isfinite(actual).all(), f"{name}: not finite"
    error = np.abs(actual.astype(np.float64) - expected).max()
    scale = np.abs(expected).max()
    assert error <= tolerance * scale, f"{name}: error {error:.3g} at scale {scale:.3g}"


def assert_all_close(actual: Arrays, expected: Arrays, *, dtype=None, tolerance=None):
    """`assert_close` for each name; both must have the same names."""
    assert actual.keys() == expected.keys()
    for name, a in actual.items():
        if dtype is not None:
            assert a.dtype == dtype, f"{name}: {a.dtype}, not {np.dtype(dtype)}"
        assert_close(a, expected[name], tolerance=tolerance, name=name)


def assert_same_bits(actual, expected, name="result"):
    """Equal shape, dtype and bytes: NaN equals itself, -0 is not 0."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), name
    assert actual.tobytes() == expected.tobytes(), f"{name}: other bits"


def assert_all_same_bits(actual: Arrays, expected: Arrays):
    assert actual.keys() == expected.keys()
    for name, a in actual.items():
        assert_same_bits(a, expected[name], name)


def numeric_gradient(f: Callable[[], float], array: np.ndarray, step=1e-3) -> np.ndarray:
    """df/d(array) by the five-point stencil, whose error is of order step**4; f reads `array`."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        value = {}
        for k in (-2, -1, 1, 2):
            array[index] = kept + k * step
            value[k] = f()
        array[index] = kept
        gradient[index] = (8 * (value[1] - value[-1]) - (value[2] - value[-2])) / (12 * step)
    return gradient


def run_python(code: str, *args: str, timeout=60, **env: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter; environment variables are given by name."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def stdout_of(result: subprocess.CompletedProcess) -> str:
    """The output of a subprocess that must have succeeded."""
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()
