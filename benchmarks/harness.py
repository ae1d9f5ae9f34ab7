"""Interleaved timing of ours against rivals, beside what the machine can do.

A row is the work of one `Comparison`: ours and its rivals run in turns in one process, so that a busy or throttled
machine slows all of them. A run is a few turns, its ratio the median over them; the row's ratio is the median of three
runs. Rows of less effort take as much as they need to be told from their bar: a single turn where that meets it by far,
three short runs where each of them meets it, else three of full length, which alone count, each on tensors of its own:
where they happen to lie in memory makes a few percent of difference. With one thread the clock is the process's CPU
time, which other processes disturb least; with more it is wall time. On CUDA it is the device's own, between two
events, with the L2 cache emptied before each call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch._functorch.config

from .bars import Bar, find_bar
from .clock import Function, enough_repeats, seconds_a_call, with_threads
from .machine import Machine

torch._functorch.config.donated_buffer = False  # a compiled graph's backward is called more than once here

RUNS = 3
BY_FAR = 1.3  # of its bar: a single turn is not that wrong
SHORT = 0.1  # seconds: calls that long meet their own state soon enough
COMPILED = ("compile", "max-autotune")  # in the names of rivals


@dataclass
class Work:
    """What to time: `ours` and each of `rivals` compute the same from the same values.

    None can avoid `matrix` and `vector` operations (a multiply-add is two, taps that fall outside the map are none),
    those inside and outside matrix products, and `bytes` of traffic.
    """

    ours: Function
    rivals: dict[str, Function]
    matrix: float = 0
    vector: float = 0
    bytes: float = 0
    wall: bool = False  # time by the wall clock, whatever the number of threads


@dataclass(frozen=True)
class Comparison:
    """One row: its name, and how to make what is timed. Listing comparisons allocates nothing."""

    operator: str
    what: (
        str  # forward | input_grad | weight_grad | backward | step: forward and backward, of a model with its optimiser
    )
    shape: str
    dtype: torch.dtype
    build: Callable[[], Work]
    against: str = "PyTorch"  # PyTorch | own dense | spconv | one thread | eager, of the grid
    quick: bool = False  # a row of --quick too
    heavy: bool = False  # --quick leaves out its compiled rivals, which take long to compile, and its bar with them
    threads: int | None = None  # when not those of the run
    malloc: tuple[str, ...] = ("default", "tuned")  # the settings to measure under
    effort: float = 1  # share of the usual time; below 1, a row too near its bar is measured again with all of it
    limit: float | None = None  # seconds; where one call of ours takes longer the row is left out
    unit: str = "ms"  # or MB, us: ours and the rivals then return their figure, of peak memory or of a call

    @property
    def bar(self) -> Bar | None:
        return find_bar(self.operator, self.what, self.against, self.shape, self.dtype, self.unit)


class TooLong(Exception):
    """A row that takes longer than its limit."""


@dataclass
class Row:
    """`ratio` is the rival's figure over ours; ours over the rival's where the bar is an upper one (`bar.at_most`)."""

    operator: str
    what: str
    shape: str
    dtype: str
    threads: int
    malloc: str
    ours: float
    rival: str
    rivals: dict[str, float]
    ratio: float
    against: str
    unit: str = "ms"
    ceiling: str = ""
    fraction: float | None = None
    operations: float = 0
    traffic: float = 0  # bytes
    bar: Bar | None = None

    @property
    def met(self) -> bool | None:
        return None if self.bar is None else self.bar.met(self.ratio)

    def as_json(self) -> dict:
        """With the unit in the names: ours_ms, rival_ms, rivals_ms; or ours_MB and so on."""
        data = asdict(self) | {"met": self.met}
        data["pass"] = data.pop("what")
        data[f"ours_{self.unit}"] = data.pop("ours")
        data[f"rival_{self.unit}"] = self.rivals[self.rival]
        data[f"rivals_{self.unit}"] = data.pop("rivals")
        return data

    @classmethod
    def from_json(cls, data: dict) -> Row:
        data, unit = dict(data), data["unit"]
        data["bar"] = data["bar"] and Bar(**data["bar"])
        del data["met"], data[f"rival_{unit}"]
        return cls(what=data.pop("pass"), ours=data.pop(f"ours_{unit}"), rivals=data.pop(f"rivals_{unit}"), **data)


Times = list[list[list[float]]]  # [run][turn][function]


def interleave(
    functions: list[Function],
    stages: Sequence[tuple[int, float]],
    wall: bool,
    enough: Callable[[Times], bool],
    limit: float | None = None,
) -> Times:
    """The times of the first of `stages` that are enough, or of the last.

    A stage is a number of runs and the seconds that all of them take, about; a run has one turn at least. Odd turns go
    backwards. Short calls follow one that is not timed: else a function would pay for what the one before it did to the
    heap and to the caches. Where that one gave its memory back to the system, our result would fault its pages in for
    it.
    """
    once = []
    for function in functions:
        for slower in (2, 1):  # the first call may take that many times as long
            taken = seconds_a_call(function, 1, wall)
            if limit is not None and not once and taken > slower * limit:
                raise TooLong(f"left out: one call takes {taken:.1f} s")
        once.append(taken)
    repeats = [enough_repeats(t) for t in once]
    turn = 0

    def measure_run(run: list[list[float]], seconds: float) -> None:
        nonlocal turn
        end = time.perf_counter() + seconds
        while not run or (min(once) < 1 and time.perf_counter() < end):
            row = [0.0] * len(functions)
            for i in sorted(range(len(functions)), reverse=turn % 2 == 1):
                if once[i] < SHORT:
                    functions[i]()
                row[i] = seconds_a_call(functions[i], repeats[i], wall)
            run.append(row)
            turn += 1

    # Calls that need no repetition: these have been a turn already.
    times: Times = [[once]] if max(repeats) == 1 else []
    for runs, seconds in stages:
        if len(times) != 1:  # a run that is alone is the first of the next stage's
            times = []
        times += [[] for _ in range(runs - len(times))]
        for run in times:
            measure_run(run, seconds / runs)
        if enough(times):
            break
    return times


def run_ratios(times: Times) -> tuple[list[float], int, list[float]]:
    """(median time of each function, index of the best rival, its time over ours in each run: the median of turns)."""
    turns = [turn for run in times for turn in run]
    medians = [statistics.median(column) for column in zip(*turns, strict=True)]
    best = min(range(1, len(medians)), key=medians.__getitem__)
    return medians, best, [statistics.median(turn[best] / turn[0] for turn in run) for run in times]


def summarise(times: Times) -> tuple[list[float], int, float]:
    """(median time of each function, index of the best rival, its time over ours: the median of the runs' medians)."""
    medians, best, ratios = run_ratios(times)
    return medians, best, statistics.median(ratios)


def clears(bar: Bar | None, times: Times) -> bool:
    """Every run meets the bar; one that is alone, by far."""
    if bar is None:
        return len(times) > 1
    _, _, ratios = run_ratios(times)
    return all(bar.met(1 / r if bar.at_most else r, BY_FAR if len(times) == 1 else 1) for r in ratios)


def ceiling(work: Work, machine: Machine, dtype: torch.dtype) -> tuple[str, float]:
    """(what binds, the shortest time in seconds): arithmetic at the machine's peaks, or traffic at its copy rate."""
    parts = {"sgemm": work.matrix / machine.matrix_rate(dtype), "fma": work.vector / machine.fma}
    arithmetic, memory = sum(parts.values()), work.bytes / machine.copy_rate(work.bytes)
    return ("copy", memory) if memory >= arithmetic else (max(parts, key=parts.__getitem__), arithmetic)


def measure(comparison: Comparison, machine: Machine, malloc: str, seconds: float, quick: bool = False) -> Row:
    threads = comparison.threads or torch.get_num_threads()
    return with_threads(threads, _measure)(comparison, machine, malloc, seconds, quick)


def _measure(comparison: Comparison, machine: Machine, malloc: str, seconds: float, quick: bool) -> Row:
    work, bar, threads = comparison.build(), comparison.bar, torch.get_num_threads()
    if quick and comparison.heavy:
        work.rivals, bar = {k: f for k, f in work.rivals.items() if not k.endswith(COMPILED)}, None
    functions = [work.ours, *work.rivals.values()]
    binds, shortest = "", 0.0
    if comparison.unit != "ms":
        figures = [float(f()) for f in functions]
        ratio = min(figures[1:]) / figures[0]
    else:
        wall, enough = work.wall or threads > 1, partial(clears, bar)
        stages = [(RUNS, seconds * comparison.effort)]
        if comparison.effort < 1:
            stages = [(1, 0.0), (RUNS, seconds * comparison.effort)]
        times = interleave(functions, stages, wall, enough, comparison.limit)
        if comparison.effort < 1 and not enough(times):
            works, times = [work], []  # all are kept, so that each lies elsewhere
            for _ in range(RUNS):
                works.append(comparison.build())
                again = [works[-1].ours, *works[-1].rivals.values()]
                times += interleave(again, [(1, seconds / RUNS)], wall, enough)
        medians, _, ratio = summarise(times)
        figures = [1e3 * median for median in medians]
        binds, shortest = ceiling(work, machine, comparison.dtype)
    rivals = dict(zip(work.rivals, figures[1:], strict=True))
    if comparison.against == "one thread" and min(rivals.values()) < 1:
        bar = None  # starting threads costs a share of a call as short
    return Row(
        comparison.operator,
        comparison.what,
        comparison.shape,
        str(comparison.dtype).removeprefix("torch."),
        threads,
        malloc,
        figures[0],
        min(rivals, key=rivals.__getitem__),
        rivals,
        1 / ratio if bar and bar.at_most else ratio,
        comparison.against,
        comparison.unit,
        binds if shortest else "",
        1e3 * shortest / figures[0] if shortest else None,
        work.matrix + work.vector,
        work.bytes,
        bar,
    )


def worse(a: Row, b: Row) -> Row:
    """Of one row under two settings, the one that counts: where we look worse."""
    return (max if a.bar and a.bar.at_most else min)(a, b, key=lambda row: row.ratio)


def backward(function: Callable, arguments: Sequence, inputs, cotangents) -> Function:
    """The backward pass alone, of a graph built at the first call."""
    outputs: list = []

    def call():
        if not outputs:
            outputs.append(function(*arguments))
        return torch.autograd.grad(outputs[0], inputs, cotangents, retain_graph=True)

    return call


def without_grad(function: Callable, *arguments) -> Function:
    def call():
        with torch.no_grad():
            return function(*arguments)

    return call
