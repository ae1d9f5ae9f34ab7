"""Runs the benchmarks: a process for each setting of malloc, a row in each in turn, and the worse ratio counts."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from convdit import build_info

from . import report, suite
from .harness import Row, worse
from .machine import describe

# glibc gives large blocks back to the system when they are freed, and each fresh tensor then faults its pages in again.
# With raised thresholds it keeps them: rivals that allocate much look better, so this is the harder setting.
MALLOC = {
    "default": {},
    "tuned": {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"},
}


class Child:
    """A process that measures rows under one setting of malloc."""

    def __init__(self, given: suite.Selection):
        unset = {name for values in MALLOC.values() for name in values}
        environment = {k: v for k, v in os.environ.items() if k not in unset}
        environment |= MALLOC[given.malloc] | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self.malloc = given.malloc
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.child", json.dumps(asdict(given))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.hello = self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the measuring process ended with status {self.process.wait()}")
        return json.loads(line)

    def measure(self, index: int) -> dict:
        print(index, file=self.process.stdin, flush=True)
        return self.read()


@contextmanager
def children(given: suite.Selection, settings: list[str]) -> Iterator[list[Child]]:
    started: list[Child] = []
    try:
        for malloc in settings:
            started.append(Child(replace(given, malloc=malloc)))
        yield started
    finally:
        for child in started:
            child.process.kill()
            child.process.wait()


def main(given: Namespace) -> int:
    """The command, from its parsed arguments."""
    if given.threads < 1:
        raise ValueError(f"threads: expected at least 1, got {given.threads}")
    selection = suite.Selection(
        tuple(given.names),
        given.match,
        given.quick,
        given.threads,
        seconds=0.3 if given.quick else 1.5,
        device="cuda" if torch.cuda.is_available() and not given.cpu else "cpu",
    )
    if given.list:
        print(*(entry.label for entry in suite.comparisons(selection)), sep="\n")
        return 0
    command = " ".join(["convdit bench", *(shlex.quote(a) for a in sys.argv[1:] if a != "bench")])
    out = Path(given.out) if given.out else None
    if out and out.suffix != ".json":
        out = out / default_name()
    return run(selection, out, command)


def run(given: suite.Selection, out: Path | None, command: str) -> int:
    """Measures and prints every row as it is done; then writes the report. Returns the exit status."""
    entries = suite.comparisons(given)
    if not entries:
        raise ValueError("no row fits: see the names, --match and --quick")
    wanted = {malloc for entry in entries for malloc in entry.comparison.malloc}
    settings = ["tuned"] if given.quick else [malloc for malloc in MALLOC if malloc in wanted]
    start, results = time.monotonic(), []
    with children(given, settings) as measuring:
        hello = measuring[0].hello
        print(report.heading(hello, given, settings))
        table = report.Table(len(entries))
        for index, entry in enumerate(entries):
            table.progress(index, entry.label)
            try:
                answers = [c.measure(index) for c in measuring if c.malloc in entry.comparison.malloc]
            except (RuntimeError, KeyboardInterrupt) as stop:  # the rows measured so far are kept
                answers = [{"error": str(stop) or "interrupted"}]
            results.append(merge(entry, answers))
            table.show(results[-1])
            if any(child.process.poll() is not None for child in measuring):
                break
    document = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "seconds": round(time.monotonic() - start),
        "machine": hello["about"] | hello["machine"],
        "versions": hello["versions"],
        "malloc": settings,
        "rows": results,
    }
    print(report.summary(document))
    if out:
        report.write(document, out)
        print(f"written: {', '.join(str(p) for p in report.files(out))}")
    return 1 if any("error" in r for r in results) else 0


def merge(entry: suite.Entry, answers: list[dict]) -> dict:
    """A row of the report from the answers of the processes: the row that counts, and the ratio under each setting."""
    c = entry.comparison
    group = [c.operator, c.what, str(c.dtype).removeprefix("torch.")]
    label = {"bench": entry.bench, "label": entry.label, "group": group}
    for answer in answers:
        if "row" not in answer:
            return label | answer
    rows = [Row.from_json(answer["row"]) for answer in answers]
    counts = rows[0]
    for row in rows[1:]:
        counts = worse(counts, row)
    return label | counts.as_json() | {"ratios": {row.malloc: row.ratio for row in rows}}


def default_name() -> str:
    """<date>-<cpu>-<level of the kernels>.json: virtual machines give processors of several generations one name."""
    cpu = "-".join(re.findall("[a-z0-9]+", str(describe()["cpu"]).lower()))
    return f"{datetime.now(timezone.utc):%Y-%m-%d}-{cpu}-{build_info()['cpu_level']}.json"
