"""What the numbers were measured on, and how a worker is held to its CPUs."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ["fastlstm", "torch", "numpy", "onnxruntime", "onnx", "openvino", "jax", "jaxlib"]
PACKAGES += ["triton", "flashrnn", "haste_pytorch"]
SYS_CPU = Path("/sys/devices/system/cpu")


def available_cpus() -> list[int]:
    """The CPUs this process may use, the first hardware thread of every core before the others."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return list(range(os.cpu_count() or 1))

    def is_sibling(cpu: int) -> bool:
        siblings = read(SYS_CPU / f"cpu{cpu}/topology/thread_siblings_list")
        first = re.match(r"\d+", siblings)
        return first is not None and int(first[0]) != cpu

    return sorted(os.sched_getaffinity(0), key=lambda cpu: (is_sibling(cpu), cpu))


@contextmanager
def bound_to(cpus: list[int]) -> Iterator[None]:
    """A process started in here may use these CPUs and no other, and so many threads.

    Both hold from its first instruction on, as some libraries read them when they are loaded.
    """
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(len(cpus))
    os.environ["NPROC"] = str(len(cpus))  # the size of XLA's thread pool
    os.environ["JAX_PLATFORMS"] = "cpu"
    affinity = None
    if hasattr(os, "sched_setaffinity"):
        affinity = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        if affinity is not None:
            os.sched_setaffinity(0, affinity)


def busy_seconds(cpus: list[int]) -> float:
    """For how long these CPUs have worked so far, for anyone, or were away at the hypervisor."""
    ticks = 0
    for line in read(Path("/proc/stat")).splitlines():
        name, *fields = line.split()
        if name in {f"cpu{cpu}" for cpu in cpus}:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, str]:
    """The machine, without its name."""
    cpuinfo = read(Path("/proc/cpuinfo"))

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
        return found[1].strip() if found else ""

    cpu = field("model name") or platform.processor() or platform.machine()
    if family := field("cpu family"):
        cpu += f" (family {family}, model {field('model')})"
    caches = []
    for index in sorted(SYS_CPU.glob("cpu0/cache/index*")):
        if (kind := read(index / "type")) != "Instruction":
            level = f"L{read(index / 'level')}" + ("d" if kind == "Data" else "")
            caches.append(f"{level} {read(index / 'size')}")
    memory = ""
    if found := re.search(r"MemTotal:\s*(\d+) kB", read(Path("/proc/meminfo"))):
        memory = f"{int(found[1]) / 2**20:.0f} GiB"
    return {
        "cpu": cpu,
        "cpus": str(len(available_cpus())),
        "caches": ", ".join(caches),
        "memory": memory,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
