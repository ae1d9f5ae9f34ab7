"""What the machine can do, measured: multiply-adds, matrix products, copies; and what it is."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .clock import Function, enough_repeats, seconds_a_call

KIB = 1024
FOOTPRINTS = (128 * KIB, 512 * KIB, 2048 * KIB, 8192 * KIB, 256 * 1024 * KIB)  # source and target of a copy together


@dataclass(frozen=True)
class Machine:
    """Rates a second, by all threads together: operations (a multiply-add is two) and bytes."""

    fma: float
    matrix: dict[str, float]  # by dtype
    copy: dict[int, float] = field(default_factory=dict)  # by footprint in bytes

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """The better of the dtype's own rate and float32's, which a kernel may convert to."""
        own = self.matrix.get(str(dtype).removeprefix("torch."), 0)
        return max(own, self.matrix["float32"])

    def copy_rate(self, footprint: float) -> float:
        """Of the smallest measured copy that touches as much memory: what fits a cache is held to the cache's rate."""
        return self.copy[min((f for f in self.copy if f >= footprint), default=max(self.copy))]


def measure_machine() -> Machine:
    cuda = torch.get_default_device().type == "cuda"
    matrix, side = {}, 4096 if cuda else 768
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, dtype=dtype) for _ in range(2))
        kinds = [lambda a=a, b=b: torch.mm(a, b)]
        if dtype == torch.float32 and probe_exists():  # ours, where it is the quicker one
            kinds.append(lambda a=a, b=b: torch.ops.convdit.linear_fwd(a, b, None))
        matrix[str(dtype).removeprefix("torch.")] = max(2 * side**3 / best(kind) for kind in kinds)
    copy = {}
    for footprint in FOOTPRINTS[-1:] if cuda else FOOTPRINTS:  # on CUDA every call finds a cold cache
        source, target = torch.ones(footprint // 8), torch.empty(footprint // 8)
        copy[footprint] = footprint / best(lambda s=source, t=target: t.copy_(s))
    return Machine(multiply_adds(), matrix, copy)


def multiply_adds(count: int = 4_000_000) -> float:
    """Operations a second of multiply-adds in registers; a matrix product reaches less, and stands in on CUDA."""
    cuda = torch.get_default_device().type == "cuda"
    if cuda or not probe_exists():
        side = 4096 if cuda else 768
        a = torch.randn(side, side)
        return 2 * side**3 / best(lambda: torch.mm(a, a))
    tasks = torch.zeros(torch.get_num_threads())
    return 2 * count * len(tasks) / best(lambda: torch.ops.convdit.fma_probe(tasks, count))


def probe_exists() -> bool:
    """Not in the library of tests/simt, which has CUDA kernels alone."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("convdit::fma_probe", "CPU")


def best(function: Function, seconds: float = 0.3) -> float:
    """The shortest time of one call; short calls are timed in groups."""
    wall = torch.get_num_threads() > 1
    function()
    repeats = enough_repeats(seconds_a_call(function, 1, wall))
    shortest, end = seconds_a_call(function, repeats, wall), time.perf_counter() + seconds
    while time.perf_counter() < end:
        shortest = min(shortest, seconds_a_call(function, repeats, wall))
    return shortest


def describe() -> dict[str, object]:
    """The CPU's name, cores and caches as Linux tells them; the GPU's name where there is one."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        caches[f"L{level} {kind.lower()}"] = size
    return {
        "cpu": found.group(1).strip() if found else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "caches": caches,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
