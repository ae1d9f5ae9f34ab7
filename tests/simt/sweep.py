"""A pytest plugin that runs the tests once for each mutant of a room (see mutants.py), until one fails.

First all tests run over the unbroken kernels; those that are quick are the ones that the mutants have to pass.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from . import summary
from .executor import Library
from .mutants import equivalent, mutated_tree

QUICK = 1.0  # seconds that a test may take
MOST_LOOPS = 50_000  # backward branches of a thread; more count as an endless loop


def passes(item: pytest.Item) -> bool:
    return not any(r.failed for r in runtestprotocol(item, log=False))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    if session.testsfailed:
        raise session.Interrupted("the tests do not load")
    room = os.environ["SIMT_ROOM"]
    library = Library(Path(os.environ["CONVDIT_LIBRARY_DIR"]) / "libconvdit_ops.so")
    library.c.simt_set_fuel(MOST_LOOPS)
    chosen = ctypes.c_int.in_dll(library.c, "memory_simt_mutant")
    _, mutants = mutated_tree(room)
    share, shares = map(int, os.environ.get("SIMT_SHARE", "0/1").split("/"))
    known, listed = equivalent(room), bool(os.environ.get("SIMT_EQUIVALENT"))
    mutants = [m for m in mutants if m.key() in known or not listed]
    mutants = [m for m in mutants if re.search(os.environ.get("SIMT_MUTANTS", ""), str(m))][share::shares]
    print()
    items, failing = quick_tests(session)
    unbroken = dict(launches=library.launches, findings=len(library.findings()))
    caught, explained, unexplained = [], [], []
    for mutant in mutants:
        if mutant.key() in known and not listed:  # all tests pass: that takes longest
            print(f"equivalent {mutant}")
            explained.append(mutant)
            continue
        chosen.value = mutant.number
        begin = time.perf_counter()
        killer = None
        for orders in (("forward",), ("reversed", 1)):
            library.set_orders(*orders)
            killer = killer or next((item for item in items if not passes(item)), None)
        seconds = time.perf_counter() - begin
        reason = mutant.key() in known
        result = ("NOT EQUIVALENT" if reason else "caught  ") if killer else ("equivalent" if reason else "SURVIVES")
        print(f"{result} {mutant} ({seconds:.1f} s{', ' + killer.name if killer else ''})", flush=True)
        if killer:
            items.remove(killer)
            items.insert(0, killer)  # it may well catch the next one, which is often in the same kernel
        (unexplained if bool(killer) == reason else caught if killer else explained).append(mutant)
    chosen.value = 0
    summary.add(
        os.environ["SIMT_STEP"], mutants=len(mutants), caught=len(caught), equivalent=len(explained), **unbroken
    )
    session.testsfailed = len(unexplained) + failing + unbroken["findings"]
    return True


def quick_tests(session: pytest.Session) -> tuple[list[pytest.Item], int]:
    """The tests for the mutants, quickest first, and how many fail without a mutant."""
    times, failing = {}, 0
    for item in session.items:
        begin = time.process_time()
        if passes(item):
            times[item] = time.process_time() - begin
        else:
            failing += 1
            print(f"FAILS    {item.name}, over the unbroken kernels")
    quick = sorted((i for i in times if times[i] <= QUICK), key=times.__getitem__)
    print(f"{len(quick)} of {len(session.items)} tests, {sum(times[i] for i in quick):.1f} s a mutant that survives")
    return quick, failing
