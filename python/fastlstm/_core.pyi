from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

# A numpy.ndarray or, once fastlstm.nn is imported, a torch.Tensor; None where nothing is wanted.
_Array: TypeAlias = Any

__version__: str
compiler: str
openmp: str

def forward(
    x: _Array,
    h0: _Array,
    c0: _Array,
    weights: Sequence[_Array],
    y: _Array,
    h_n: _Array,
    c_n: _Array,
    gates: _Array,
    cells: _Array,
    raw: _Array,
    batch_sizes: Sequence[int],
    reverse: bool,
    threads: int,
    /,
) -> None: ...
def backward(
    x: _Array,
    h0: _Array,
    c0: _Array,
    weights: Sequence[_Array],
    y: _Array,
    gates: _Array,
    cells: _Array,
    raw: _Array,
    grad_y: _Array,
    grad_h: _Array,
    grad_c: _Array,
    dx: _Array,
    dweights: Sequence[_Array],
    dh0: _Array,
    dc0: _Array,
    dz: _Array,
    batch_sizes: Sequence[int],
    reverse: bool,
    threads: int,
    /,
) -> None: ...
def fits(x: object, state: object, weights: object, /, *sizes: int) -> bool: ...
def infer(
    x: object,
    state: object,
    weights: object,
    D: int,
    H: int,
    P: int,
    layers: int,
    directions: int,
    batch_first: bool,
    dims: int,
    packed: int,
    batch_sizes: Sequence[int],
    threads: int,
    /,
) -> Any: ...
def run_layer(
    x: _Array,
    h0: _Array,
    c0: _Array,
    weights: list[_Array],
    directions: int,
    batch_sizes: Sequence[int],
    keep: bool,
    threads: int,
    /,
) -> tuple[Any, ...]: ...
def run_layer_backward(
    x: _Array,
    h0: _Array,
    c0: _Array,
    weights: list[_Array],
    y: _Array,
    gates: _Array,
    cells: _Array,
    raw: _Array,
    grad_y: _Array,
    grad_h: _Array,
    grad_c: _Array,
    dx: _Array,
    needed: Sequence[bool],
    keep_dz: bool,
    directions: int,
    batch_sizes: Sequence[int],
    threads: int,
    /,
) -> tuple[Any, ...]: ...
def weight_gradients(
    x: _Array,
    h: _Array,
    dz: _Array,
    needed: Sequence[bool],
    threads: int,
    /,
) -> list[Any]: ...
def block(size: int, /) -> memoryview: ...

LARGE: int

def use_torch(
    tensor: type, parameter: type, memory: Callable[..., Any], exchange: object, /
) -> None: ...
def default_threads() -> int: ...
def compiled_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def active_isa() -> str: ...
def use_isa(name: str) -> None: ...
def passes_run_again() -> int: ...
def plan(
    T: int, N: int, D: int, H: int, threads: int, itemsize: int, backward: bool, layers: int = 1
) -> dict[str, Any]: ...
def map(
    function: str, x: NDArray[np.float32] | NDArray[np.float64]
) -> NDArray[np.float32] | NDArray[np.float64]: ...
def fma_peak(threads: int, itemsize: int) -> float: ...
