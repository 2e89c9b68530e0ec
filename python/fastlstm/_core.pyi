from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Address: TypeAlias = NDArray[Any] | int | None

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
    w_ih: Address,
    w_hh: Address,
    b_ih: Address,
    b_hh: Address,
    x: Address,
    x_t: int,
    x_n: int,
    h0: Address,
    c0: Address,
    y: Address,
    y_t: int,
    y_n: int,
    h_n: Address,
    c_n: Address,
    gates: Address,
    cells: Address,
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
    w_ih: Address,
    w_hh: Address,
    x: Address,
    x_t: int,
    x_n: int,
    h0: Address,
    c0: Address,
    y: Address,
    y_t: int,
    y_n: int,
    gates: Address,
    cells: Address,
    grad_y: Address,
    grad_y_t: int,
    grad_y_n: int,
    grad_h: Address,
    grad_c: Address,
    dx: Address,
    dx_t: int,
    dx_n: int,
    dw_ih: Address,
    dw_hh: Address,
    db: Address,
    dh0: Address,
    dc0: Address,
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
