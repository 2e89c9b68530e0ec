"""How a pass runs on a CUDA device: a pure function of sizes, arithmetic and device properties.

There are five paths. In the first four one launch walks over all of time, and groups of blocks,
each block with some hidden units, compute slices of the batch. On tensor cores a part of W_hh is
held in registers; for the rest:

- ``block``: one block holds all of W_hh in its shared memory;
- ``cluster``: up to sixteen blocks hold it, which exchange h through each other's shared memory
  (compute capability 9 and up);
- ``grid``: any number of blocks hold it, which exchange h through the second-level cache;
- ``stream``: the same with W_hh read from the second-level cache in every step;
- ``steps``: with projections, and where it is estimated to be faster: for each step a matrix
  product of torch and one pointwise kernel; where `replay_pays`, all steps as one CUDA graph.

The least estimated time decides. The estimates come from data sheets, not from measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

# The sizes of one element in memory and of one sum; recurrence.h has the same.
STORAGE = {"bf16": 2, "f16": 2, "tf32": 4, "f32": 4, "f64": 8}
SUM = {"bf16": 4, "f16": 4, "tf32": 4, "f32": 4, "f64": 8}
_TENSOR_CORES = ("bf16", "f16", "tf32")

THREADS = (256, 384)
HELD = 16  # most k-steps of weights that a warp holds in registers
GROUP = 8  # of which so many are used together
CLUSTERS = (2, 4, 8, 16)  # blocks of a cluster

# Nanoseconds and rates measured on an H200 at 1.98 GHz; benchmarks/NOTES.md has the measurements.
_BASE = {"block": 450, "cluster": 450, "grid": 550, "stream": 550, "steps": 20000}
_MEET = {2: 430, 4: 440, 8: 450, 16: 550}  # an exchange within a cluster
_MEET_GRID, _MEET_BLOCK = 1100, 8.5  # an exchange through flags, and for each block of the group
_SHARED, _TO_PEERS, _L2, _L2_SHARED = 200, 33, 80, 35  # bytes per nanosecond of a multiprocessor
_TILE = 0.82  # nanoseconds of a multiprocessor for an mma, of 16 x 8 outputs over 32 bytes of K
_PRODUCTS = {"bf16": 900, "f16": 900, "tf32": 450, "f32": 80, "f64": 40}  # multiply-adds, likewise
_ELEMENTS = 60  # nanoseconds of the pointwise part for one more element of each thread
_REPLAYED = 5000  # nanoseconds of the host's step in a CUDA graph
_MEMORY = 14  # bytes per nanosecond of a multiprocessor, from the device's memory with all others
_CHUNKS = (1, 2, 4, 8)
_CHUNK = 800  # nanoseconds of one more chunk


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
    threads: int
    chunks: int
    wide: bool
    shared_bytes: int
    operand_bytes: int  # of an operand in the exchange
    scratch_bytes: int  # of the weights of a block where shared memory does not hold them
    nanoseconds: float  # estimated, for one step
    reason: str

    @property
    def local(self) -> bool:
        """Whether a group exchanges through shared memory."""
        return self.path in ("block", "cluster")


STEPS = Plan("steps", 0, 0, 0, 0, 0, 1, False, 0, 0, 0, 0.0, "")


class Cut(NamedTuple):
    """How the work of a step is cut; the names are those of recurrence.h."""

    path: str
    blocks: int
    units: int
    rows: int
    threads: int
    chunks: int
    wide: bool


def memory(math: str, backward: bool, H: int, cut: Cut) -> tuple[int, int, int]:
    """Return bytes of a block's shared memory, of an operand, of weights not held: `layout()`."""
    path, blocks, units, rows, threads, chunks, wide = cut
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
    operands = chunk if path in ("grid", "stream") else 2 * chunk
    shared = 0 if path == "stream" else weights
    return shared + operands + partial + 16, chunks * chunk, weights


def most_elements(math: str, wide: bool) -> int:
    """Return how many elements of the pointwise step a thread can own."""
    return 4 if math == "f64" else 8 if wide or math not in _TENSOR_CORES else 2


def _round_up(a: int, b: int) -> int:
    return -(-a // b) * b


@lru_cache(maxsize=1024)
def plan(
    N: int, H: int, directions: int, math: str, backward: bool, device: Device, P: int
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
    """
    steps_cost = _steps_cost(N, H, math, device) * directions
    graph = ", as one CUDA graph from the second call of a kind on"
    replayed = graph if replay_pays(N, H, math, device) else ""

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
    where = "in the second-level cache" if best.path == "stream" else "in shared memory"
    if math in _TENSOR_CORES:
        where = f"in registers and {where}"
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
    host = _BASE["steps"]
    computes = _steps_cost(N, H, math, device) - host
    copies = 2 * 10 * N * H * STORAGE[math] / (_MEMORY * device.multiprocessors)
    return max(computes, _REPLAYED) + copies < max(computes, host)


def _steps_cost(N: int, H: int, math: str, device: Device) -> float:
    product = 4 * N * H * H / (_PRODUCTS[math] * device.multiprocessors)
    weights = 4 * H * H * STORAGE[math] / (_L2_SHARED * device.multiprocessors)
    return _BASE["steps"] + max(product, weights)


def _candidates(
    N: int, H: int, directions: int, math: str, backward: bool, device: Device
) -> Iterator[Plan]:
    # Tensor cores compute eight rows at the price of one.
    tensor_cores = math in _TENSOR_CORES
    tiles = (8, 16, 32, 64, 128) if tensor_cores else (1, 2, 4, 8, 16, 32, 64, 128)
    for units in sorted({-(-H // b) for b in range(1, min(H, device.multiprocessors) + 1)}):
        blocks = -(-H // units)
        for path in ("block",) if blocks == 1 else ("cluster", "grid", "stream"):
            most = device.multiprocessors // (blocks * directions)
            if path == "cluster":
                if blocks not in CLUSTERS or not device.clusters[CLUSTERS.index(blocks)]:
                    continue
                most = device.clusters[CLUSTERS.index(blocks)] // directions
            elif path != "block" and (not device.cooperative or most < 1):
                continue
            if path == "stream":
                most = 1  # more groups would read more weights
            for threads in THREADS:
                if units > threads:
                    continue
                for tall in tiles:
                    slices = -(-N // tall)
                    rows = -(-N // slices)
                    elements = -(-rows // (threads // units))
                    m_tiles = -(-(1 if backward else 4) * units // 16)
                    wide = tensor_cores and (elements > 2 or m_tiles > threads // 32)
                    if elements > most_elements(math, wide):
                        break
                    for chunks in (1,) if path in ("block", "cluster") else _CHUNKS:
                        cut = Cut(path, blocks, units, rows, threads, chunks, wide)
                        taken, operand, weights = memory(math, backward, H, cut)
                        if taken <= device.shared_bytes:
                            break
                    else:
                        break
                    groups = min(slices, max(most, 1))
                    busy = blocks * groups * directions / device.multiprocessors
                    cost = _cost(cut, H, math, backward, operand, weights, busy)
                    cost *= -(-slices // groups)  # slices that a group computes in turn
                    yield Plan(
                        path,
                        blocks,
                        units,
                        rows,
                        groups * directions,
                        threads,
                        chunks,
                        wide,
                        taken,
                        operand,
                        weights if path == "stream" else 0,
                        cost,
                        "",
                    )
                    if slices == 1:
                        break


def _cost(
    cut: Cut, H: int, math: str, backward: bool, operand: int, weights: int, busy: float
) -> float:
    path, blocks, units, rows, threads, chunks, wide = cut
    M, K = (units, 4 * H) if backward else (4 * units, H)
    m_padded, r_padded = _round_up(M, 16), _round_up(rows, 8)
    if math in _TENSOR_CORES:
        product = m_padded * r_padded * K * STORAGE[math] / (16 * 8 * 32) * _TILE
    else:
        product = m_padded * r_padded * K / _PRODUCTS[math]
    weights *= -(-r_padded // (32 if wide else 16))  # times that they are read
    per_byte = max(1 / _L2, busy / _L2_SHARED)  # from the second-level cache
    reads = weights * per_byte if path == "stream" else weights / _SHARED
    if path in ("grid", "stream"):
        exchange = _MEET_GRID + _MEET_BLOCK * blocks + operand * per_byte + _CHUNK * (chunks - 1)
    elif path == "cluster":
        exchange = _MEET[blocks] + operand / _TO_PEERS
    else:
        exchange = 0
    elements = -(-rows // (threads // units))
    return _BASE[path] + max(product, reads) + exchange + _ELEMENTS * (elements - 1)
