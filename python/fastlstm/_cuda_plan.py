"""How a pass runs on a CUDA device: a pure function of sizes, arithmetic and device properties.

There are four paths. In the first three one launch walks over all of time, and groups of blocks,
each block with some hidden units, compute slices of the batch. A group holds all of W_hh in shared
memory and, on tensor cores, in registers:

- ``block``: a group is one block;
- ``cluster``: up to sixteen blocks, which exchange h through each other's shared memory (compute
  capability 9 and up);
- ``grid``: any number of blocks, which exchange h through the second-level cache;
- ``steps``: with projections, and where it is estimated to be faster: for each step a matrix
  product of torch and one pointwise kernel; where `replay_pays`, all steps as one CUDA graph.

The least estimated time decides. The estimates were fitted to measurements on one kind of device,
but those of ``steps`` are from data sheets.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

# The sizes of one element in memory and of one sum; recurrence.h has the same.
STORAGE = {"bf16": 2, "f16": 2, "tf32": 4, "f32": 4, "f64": 8}
SUM = {"bf16": 4, "f16": 4, "tf32": 4, "f32": 4, "f64": 8}
_TENSOR_CORES = ("bf16", "f16", "tf32")

THREADS = 256  # of a block
HELD = 24  # most k-steps of weights that a warp holds in registers
GROUP = 8  # of which so many are used together
CLUSTERS = (2, 4, 8, 16)  # blocks of a cluster

# What a step costs a group in nanoseconds, by `_parts`: fitted to measurements of 1000 plans on an
# H100 at 1.98 GHz, of which benchmarks/NOTES.md tells.
_COSTS: dict[tuple[bool, str], tuple[float, ...]] = {
    (False, "block"): (1050.0, 0.0, 22.1, 0.0, 11.6, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (False, "cluster"): (1220.0, 67.3, 3.95, 0.0, 0.0, 4.22, 51.0, 0.0, 0.0, 0.0, 49.6),
    (False, "grid"): (1690.0, 60.9, 7.17, 0.0, 5.95, 0.0, 0.0, 30.6, 14.5, 780.0, 68.2),
    (True, "block"): (819.0, 8.56, 10.4, 187.0, 8.66, 0.0, 0.0, 0.0, 0.0, 0.0, 21.0),
    (True, "cluster"): (848.0, 5.31, 4.95, 259.0, 0.0, 7.19, 39.8, 0.0, 0.0, 0.0, 16.5),
    (True, "grid"): (1220.0, 13.1, 3.32, 300.0, 0.0, 0.0, 0.0, 0.0, 32.8, 1300.0, 43.3),
}
# Of the step by step path, estimated.
_HOST, _REPLAYED = 20000, 7000  # a step queued by the host, and by a CUDA graph
_PRODUCTS = {"bf16": 1100, "f16": 1100, "tf32": 600, "f32": 90, "f64": 45}  # per ns and processor
_L2 = 35  # bytes of weights likewise
_MEMORY = 20  # bytes from and to the device's memory likewise
_CHUNKS = (1, 2, 4, 8)


class Device(NamedTuple):
    """What a plan knows of a device: `_cuda.properties`."""

    major: int
    minor: int
    multiprocessors: int
    shared_bytes: int  # that one block may take
    cooperative: bool  # whether blocks of one launch may wait for one another
    clusters: tuple[int, ...] = (0, 0, 0, 0)  # of `CLUSTERS` blocks that run at the same time


class Plan(NamedTuple):
    """One way to run a pass, and why; the names are those of recurrence.h."""

    path: str
    blocks: int
    units: int
    rows: int
    groups: int
    chunks: int
    wide: bool
    shared_bytes: int
    operand_bytes: int  # of an operand in the exchange
    nanoseconds: float  # estimated, for one step
    reason: str

    @property
    def local(self) -> bool:
        """Whether a group exchanges through shared memory."""
        return self.path in ("block", "cluster")


STEPS = Plan("steps", 0, 0, 0, 0, 1, False, 0, 0, 0.0, "")


class Cut(NamedTuple):
    """How the work of a step is cut; the names are those of recurrence.h."""

    path: str
    blocks: int
    units: int
    rows: int
    chunks: int
    wide: bool


def memory(
    math: str, backward: bool, H: int, cut: Cut, threads: int = THREADS
) -> tuple[int, int, int]:
    """Return bytes of a block's shared memory, of an operand, of weights there: `layout()`."""
    path, blocks, units, rows, chunks, wide = cut
    size, tensor_cores, warps = STORAGE[math], math in _TENSOR_CORES, threads // 32
    columns = blocks * _round_up(units, 16 // size) if path == "cluster" else H
    M, K = (units, 4 * columns) if backward else (4 * units, columns)
    m_padded, r_padded = _round_up(M, 16), _round_up(rows, 8)
    m_tiles = m_padded // 16
    k_steps = _round_up(K * size, 64) // 32
    chunk_steps = _round_up(-(-k_steps // chunks), 2)
    pairs = chunk_steps // 2
    splits = min(max(warps // m_tiles, 1), pairs)
    held = pairs // splits * 2 if tensor_cores and not wide and m_tiles <= warps else 0
    held = min(held, HELD) // GROUP * GROUP
    kept_steps = k_steps - held * splits
    weights = m_padded * kept_steps * 32 if tensor_cores else M * (k_steps * 32 + 16)
    chunk = (r_padded if tensor_cores else rows) * (chunk_steps * 32 + 16)
    partial = splits * r_padded * (m_padded + 4) * SUM[math]
    operands = chunk if path == "grid" else 2 * chunk
    return weights + operands + partial + 16, chunks * chunk, weights


def most_elements(math: str, wide: bool) -> int:
    """Return how many elements of the pointwise step a thread can own."""
    return 4 if math == "f64" else 8 if wide or math not in _TENSOR_CORES else 2


def _round_up(a: int, b: int) -> int:
    return -(-a // b) * b


@lru_cache(maxsize=1024)
def plan(
    N: int,
    H: int,
    directions: int,
    math: str,
    backward: bool,
    device: Device,
    P: int,
    replays: bool = True,
) -> Plan:
    """Return the way to run a pass over N batch rows and H hidden units.

    Parameters
    ----------
    N, H, directions, P : int
        Batch rows, hidden units, 1 or 2 directions, which run side by side, and columns of h.
    math : {"bf16", "f16", "tf32", "f32", "f64"}
        dtype, with the arithmetic of float32 told apart.
    backward : bool
    device : Device
    replays : bool
        Whether the call may record CUDA graphs, which operators do not.
    """
    replays = replays and replay_pays(N, H, math, device)
    steps_cost = _steps_cost(N, H, math, device, replays) * directions
    replayed = ", as one CUDA graph from the second call of a kind on" if replays else ""

    def step_by_step(why: str) -> Plan:
        return STEPS._replace(nanoseconds=steps_cost, reason=f"steps: {why}{replayed}")

    if P != H:
        return step_by_step("a projection is a second product in each step")
    if device.major < 8:
        return step_by_step("compute capability 8.0 is the least for the others")
    candidates = _candidates(N, H, directions, math, backward, device)
    best = min(candidates, key=lambda p: (p.nanoseconds, p.blocks * p.groups), default=None)
    if best is None:
        return step_by_step("no other path has room for its exchange")
    if steps_cost < best.nanoseconds:
        return step_by_step(
            f"estimated {_us(steps_cost)} a step against {_us(best.nanoseconds)} with {best.path}"
        )
    among = {"block": "one block", "cluster": f"clusters of {best.blocks} blocks"}.get(
        best.path, f"groups of {best.blocks} blocks"
    )
    where = "in registers and shared memory" if math in _TENSOR_CORES else "in shared memory"
    reason = (
        f"{best.path}: {best.groups} x {among}, each with {best.units} units of W_hh {where}, "
        f"{best.rows} batch rows at a time and {_kib(best.shared_bytes)} of shared memory (of "
        f"{_kib(device.shared_bytes)}); estimated {_us(best.nanoseconds)} a step against "
        f"{_us(steps_cost)} step by step"
    )
    return best._replace(reason=reason)


def _kib(count: int) -> str:
    return f"{-(-count // 1024)} KiB"


def _us(nanoseconds: float) -> str:
    return f"{nanoseconds / 1000:.1f} us"


def replay_pays(N: int, H: int, math: str, device: Device) -> bool:
    """Return whether the step by step path gains by a CUDA graph of all its steps.

    It does where the host takes longer to queue a step than the device to compute it and to copy
    what it reads and writes into and out of the graph's own memory, some ten rows of H units.
    """
    return _steps_cost(N, H, math, device, True) < _steps_cost(N, H, math, device, False)


def _computes(N: int, H: int, math: str, device: Device) -> float:
    product = 4 * N * H * H / (_PRODUCTS[math] * device.multiprocessors)
    weights = 4 * H * H * STORAGE[math] / (_L2 * device.multiprocessors)
    return max(product, weights)


def _steps_cost(N: int, H: int, math: str, device: Device, replayed: bool) -> float:
    if not replayed:
        return max(_computes(N, H, math, device), _HOST)
    copies = 2 * 10 * N * H * STORAGE[math] / (_MEMORY * device.multiprocessors)
    return _REPLAYED + _computes(N, H, math, device) + copies


def _candidates(
    N: int, H: int, directions: int, math: str, backward: bool, device: Device
) -> Iterator[Plan]:
    # Tensor cores compute eight rows at the price of one.
    tensor_cores = math in _TENSOR_CORES
    tiles = (8, 16, 32, 64, 128) if tensor_cores else (1, 2, 4, 8, 16, 32, 64, 128)
    for units in sorted({-(-H // b) for b in range(1, min(H, device.multiprocessors) + 1)}):
        blocks = -(-H // units)
        if units > THREADS:
            continue
        for path in ("block",) if blocks == 1 else ("cluster", "grid"):
            most = device.multiprocessors // (blocks * directions)
            if path == "cluster":
                if blocks not in CLUSTERS or not device.clusters[CLUSTERS.index(blocks)]:
                    continue
                most = device.clusters[CLUSTERS.index(blocks)] // directions
            elif path == "grid" and (not device.cooperative or most < 1):
                continue
            for tall in tiles:
                slices = -(-N // tall)
                rows = -(-N // slices)
                elements = -(-rows // (THREADS // units))
                m_tiles = -(-(1 if backward else 4) * units // 16)
                wide = tensor_cores and (elements > 2 or m_tiles > THREADS // 32)
                if elements > most_elements(math, wide):
                    break
                for chunks in _CHUNKS if path == "grid" else (1,):
                    cut = Cut(path, blocks, units, rows, chunks, wide)
                    taken, operand, _ = memory(math, backward, H, cut)
                    if taken <= device.shared_bytes:
                        break
                else:
                    break
                groups = min(slices, max(most, 1)) * directions
                parts = _parts(cut, groups, H, math, backward, device)
                costs = _COSTS[tensor_cores, path]
                cost = sum(part * cost for part, cost in zip(parts, costs, strict=True))
                cost *= -(-slices * directions // groups)  # slices that a group computes in turn
                yield Plan(
                    path, blocks, units, rows, groups, chunks, wide, taken, operand, cost, ""
                )
                if slices == 1:
                    break


def _parts(
    cut: Cut, groups: int, H: int, math: str, backward: bool, device: Device
) -> tuple[float, ...]:
    """Return what a step of a slice is made of; `_COSTS` has a price for each part."""
    path, blocks, units, rows, chunks, wide = cut
    size, warps = STORAGE[math], THREADS // 32
    m_tiles, n_tiles = -(-(1 if backward else 4) * units // 16), -(-rows // 8)
    splits = max(warps // m_tiles, 1)
    k_steps = -(-(4 if backward else 1) * H * size // 32)
    _, operand, weights = memory(math, backward, H, cut)
    peers = blocks - 1 if path == "cluster" else 0
    return (
        1,
        -(-m_tiles // warps) * n_tiles * -(-k_steps // splits),  # mma of a warp
        weights * -(-n_tiles // (4 if wide else 2)) / 1024,  # bytes from shared memory
        -(-rows // (THREADS // units)) * (1 + backward),  # elements of a thread
        splits,
        peers,
        rows * units * (4 if backward else 1) * size * peers / 1024,  # bytes that a block sends
        operand / 1024 if path == "grid" else 0,  # bytes that it fetches
        operand / 1024 * blocks * groups / device.multiprocessors if path == "grid" else 0,
        chunks - 1,
        # bytes from and to the device's memory, of all blocks
        rows * units * 11 * size * blocks * groups / device.multiprocessors / 1024,
    )
