from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Address: TypeAlias = NDArray[Any] | int | None

__version__: str
compiler: str
openmp: str

def forward(
    itemsize: int,
    threads: int,
    T: int,
    N: int,
    D: int,
    H: int,
    reverse: bool,
    w_ih: _Address,
    w_hh: _Address,
    b_ih: _Address,
    b_hh: _Address,
    x: _Address,
    x_t: int,
    x_n: int,
    h0: _Address,
    c0: _Address,
    y: _Address,
    y_t: int,
    y_n: int,
    h_n: _Address,
    c_n: _Address,
    gates: _Address,
    cells: _Address,
    /,
) -> None: ...
def backward(
    itemsize: int,
    threads: int,
    T: int,
    N: int,
    D: int,
    H: int,
    reverse: bool,
    w_ih: _Address,
    w_hh: _Address,
    x: _Address,
    x_t: int,
    x_n: int,
    h0: _Address,
    c0: _Address,
    y: _Address,
    y_t: int,
    y_n: int,
    gates: _Address,
    cells: _Address,
    grad_y: _Address,
    grad_y_t: int,
    grad_y_n: int,
    grad_h: _Address,
    grad_c: _Address,
    dx: _Address,
    dx_t: int,
    dx_n: int,
    dw_ih: _Address,
    dw_hh: _Address,
    db: _Address,
    dh0: _Address,
    dc0: _Address,
    /,
) -> None: ...
def default_threads() -> int: ...
def compiled_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def active_isa() -> str: ...
def use_isa(name: str) -> None: ...
def plan(
    T: int, N: int, D: int, H: int, threads: int, itemsize: int, backward: bool
) -> dict[str, Any]: ...
def map(
    function: str, x: NDArray[np.float32] | NDArray[np.float64]
) -> NDArray[np.float32] | NDArray[np.float64]: ...
def fma_peak(threads: int, itemsize: int) -> float: ...
