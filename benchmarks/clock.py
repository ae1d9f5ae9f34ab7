"""The clock of every measurement: process CPU time, wall time, or the CUDA device's own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Function = Callable[[], object]


def seconds_a_call(function: Function, repeats: int, wall: bool) -> float:
    """Mean time of `repeats` calls on the default device."""
    if torch.get_default_device().type == "cuda":
        return device_seconds(function, repeats)
    clock = time.perf_counter if wall else time.process_time
    start = clock()
    for _ in range(repeats):
        function()
    return (clock() - start) / repeats


def device_seconds(function: Function, repeats: int) -> float:
    """Median time between two events on the CUDA device, with a cold L2 cache. No GPU has run this yet."""
    flush = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def with_threads(threads: int, function: Callable) -> Callable:
    """The function, called with that many of PyTorch's threads."""

    def call(*arguments):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return function(*arguments)
        finally:
            torch.set_num_threads(before)

    return call


def enough_repeats(seconds: float) -> int:
    """Calls to time together, so that the clock's own resolution does not matter."""
    return max(1, int(0.004 / max(seconds, 1e-6)))
