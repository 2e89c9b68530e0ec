"""Threads of the NumPy side, and what a bug report needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform

import numpy as np

from . import _check, _core

_MOST_THREADS = 4096
_num_threads: int | None = None


def set_num_threads(n: int | None) -> None:
    """Set the most threads that NumPy calls use.

    Parameters
    ----------
    n : int or None
        1 to 4096. None returns to the default: what OMP_NUM_THREADS or the OpenMP runtime says.

    Raises
    ------
    TypeError
        If `n` is neither an integer nor None.
    ValueError
        If `n` is below 1 or above 4096.

    Notes
    -----
    Results have the same bits for any number of threads. `fastlstm.nn` follows
    `torch.set_num_threads` instead.
    """
    global _num_threads
    if n is not None and _check.positive("n", n) > _MOST_THREADS:
        raise ValueError(f"n: expected at most {_MOST_THREADS} threads, got {n}")
    _num_threads = None if n is None else int(n)


def get_num_threads() -> int:
    """Return the most threads that NumPy calls use."""
    return _num_threads or _core.default_threads()


def _cuda_build() -> str:
    try:
        _cuda = importlib.import_module(f"{__package__}._cuda")
    except ModuleNotFoundError:
        return "no CUDA part in this build"
    except ImportError as error:
        return f"the CUDA part does not load: {error}"
    return f"{_cuda.build}; used with FASTLSTM_CUDA_KERNELS=1 in the environment"


def show_config() -> None:
    """Print version, ISA, threads, compilers, what CUDA part there is, NumPy and torch."""
    # torch is looked up, not imported: importing it takes seconds and may itself be what is broken.
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "not installed"
    rows = {
        "fastlstm": _core.__version__,
        "ISA": f"{_core.active_isa()} (compiled: {', '.join(_core.compiled_isas())}; "
        f"this machine runs: {', '.join(_core.supported_isas())})",
        "threads": get_num_threads(),
        "OpenMP": _core.openmp,
        "compiler": _core.compiler,
        "CUDA": _cuda_build(),
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "torch": torch,
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for name, value in rows.items():
        print(f"{name + ':':<10}{value}")
