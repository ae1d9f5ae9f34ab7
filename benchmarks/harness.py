"""Interleaved timing of one operator against its rivals, beside what the machine can do.

A and B run in turns in one process, so that a busy or throttled machine slows both; the ratio is the median over the
turns. With one thread the clock is the process's CPU time, which other processes do not disturb; with more it is wall
time. The ceiling of a row is the larger of its arithmetic at the measured multiply-add rate and its compulsory bytes at
the measured copy rate, so `fraction` is the share of what this machine could do.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch._functorch.config

torch._functorch.config.donated_buffer = False  # a compiled graph's backward is called more than once here
MALLOC_TUNED = "MALLOC_MMAP_THRESHOLD_" in os.environ  # fresh tensors then keep their pages


@dataclass
class Comparison:
    """What to time: `ours` and each of `rivals` do the same work, which cannot avoid `flops` and `bytes`."""

    operator: str
    what: str  # forward | input_grad | weight_grad | backward
    shape: str
    dtype: torch.dtype
    ours: Callable[[], object]
    rivals: dict[str, Callable[[], object]]
    flops: float
    bytes: float


@dataclass
class Row:
    operator: str
    what: str
    shape: str
    dtype: str
    threads: int
    malloc: str
    ours_ms: float
    rival: str
    rival_ms: float
    ratio: float
    ceiling: str
    fraction: float


@dataclass(frozen=True)
class Machine:
    """Measured rates: multiply-adds (two operations each) by a matrix product, bytes by a copy beyond the cache."""

    flops: float
    bytes: float


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def once(function: Callable[[], object], repeats: int) -> float:
    start = clock()
    for _ in range(repeats):
        function()
    return (clock() - start) / repeats


def interleave(functions: list[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Times of each function, in turns, for about `seconds` in all; at least five turns."""
    for function in functions:
        function()
    repeats = [max(1, int(0.004 / max(once(f, 1), 1e-6))) for f in functions]
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    turn = 0
    while turn < 5 or time.perf_counter() < end:
        order = range(len(functions)) if turn % 2 == 0 else reversed(range(len(functions)))
        for i in order:
            times[i].append(once(functions[i], repeats[i]))
        turn += 1
    return times


def measure_machine(seconds: float = 0.5) -> Machine:
    a, b = torch.randn(768, 768), torch.randn(768, 768)
    source, target = torch.randn(32 << 20), torch.empty(32 << 20)
    product, copy = interleave([lambda: torch.mm(a, b), lambda: target.copy_(source)], seconds)
    return Machine(2 * 768**3 / min(product), 2 * source.nbytes / min(copy))


def measure(c: Comparison, machine: Machine, seconds: float) -> Row:
    times = interleave([c.ours, *c.rivals.values()], seconds)
    medians = [statistics.median(t) for t in times]
    best = min(range(1, len(times)), key=lambda i: medians[i])
    ratio = statistics.median(r / o for o, r in zip(times[0], times[best], strict=True))
    arithmetic, memory = c.flops / machine.flops, c.bytes / machine.bytes
    return Row(
        c.operator,
        c.what,
        c.shape,
        str(c.dtype).removeprefix("torch."),
        torch.get_num_threads(),
        "tuned" if MALLOC_TUNED else "default",
        medians[0] * 1e3,
        list(c.rivals)[best - 1],
        medians[best] * 1e3,
        ratio,
        "sgemm" if arithmetic > memory else "copy",
        max(arithmetic, memory) / medians[0],
    )


def backward(outputs, inputs, cotangents) -> Callable[[], object]:
    """The backward pass alone, of a graph built once."""
    return lambda: torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)


def as_json(row: Row) -> dict:
    data = asdict(row)
    data["pass"] = data.pop("what")
    return data
