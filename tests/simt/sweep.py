"""A pytest plugin that runs the tests once for each mutant of a room (see mutants.py), until one fails.

First all tests run over the unbroken kernels; those that are quick are the ones that the mutants have to pass.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from .executor import Library
from .mutants import Mutant, equivalent, mutated_tree

QUICK = 1.0  # seconds that a test may take
MOST_LOOPS = 200_000  # backward branches of a thread; more count as an endless loop


def passes(item: pytest.Item) -> bool:
    return not any(r.failed for r in runtestprotocol(item, log=False))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    if session.testsfailed:
        raise session.Interrupted("the tests do not load")
    library = Library(Path(os.environ["CONVDIT_LIBRARY_DIR"]) / "libconvdit_ops.so")
    library.c.simt_set_fuel(MOST_LOOPS)
    chosen = ctypes.c_int.in_dll(library.c, "memory_simt_mutant")
    _, mutants = mutated_tree(os.environ["SIMT_ROOM"])
    print()
    items, failing = quick_tests(session)
    survivors: list[Mutant] = []
    known = equivalent(os.environ["SIMT_ROOM"])
    listed = [m for m in mutants if m.key() in known]
    for mutant in mutants:
        if mutant in listed and not os.environ.get("SIMT_EQUIVALENT"):  # to run them too takes longest: all tests pass
            print(f"equivalent {mutant}")
            survivors.append(mutant)
            continue
        chosen.value = mutant.number
        begin = time.perf_counter()
        killer = None
        for orders in (("forward",), ("reversed", 1)):
            library.set_orders(*orders)
            killer = killer or next((item for item in items if not passes(item)), None)
        seconds = time.perf_counter() - begin
        print(
            f"{'caught  ' if killer else 'SURVIVES'} {mutant} ({seconds:.1f} s{', ' + killer.name if killer else ''})",
            flush=True,
        )
        if not killer:
            survivors.append(mutant)
    chosen.value = 0
    unexplained = [m for m in survivors if m.key() not in known]
    explained = len(survivors) - len(unexplained)
    caught = len(mutants) - len(survivors)
    counts = f"{caught} of {len(mutants)} caught, {explained} equivalent, {len(unexplained)} survive"
    print(f"mutants of {os.environ['SIMT_ROOM']}: {counts}")
    session.testsfailed = len(unexplained) + failing
    return True


def quick_tests(session: pytest.Session) -> tuple[list[pytest.Item], int]:
    """The tests for the mutants, quickest first, and how many fail without a mutant."""
    times, failing = {}, 0
    for item in session.items:
        begin = time.perf_counter()
        if passes(item):
            times[item] = time.perf_counter() - begin
        else:
            failing += 1
            print(f"FAILS    {item.name}, over the unbroken kernels")
    quick = sorted((i for i in times if times[i] <= QUICK), key=times.__getitem__)
    print(f"{len(quick)} of {len(session.items)} tests, {sum(times[i] for i in quick):.1f} s a mutant that survives")
    return quick, failing
