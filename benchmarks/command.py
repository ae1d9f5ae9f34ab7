"""Runs the benchmarks: a process for each setting of malloc, a row in each in turn, and the worse ratio counts."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from convdit import build_info

from . import record, report, suite
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
    if given.resume and not given.out:
        raise ValueError("resume: expected --out, the file to go on with")
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
    return run(selection, out, command, given.resume)


def run(given: suite.Selection, out: Path | None, command: str, resume: bool = False) -> int:
    """Measures, prints and keeps every row as it is done; then writes the report. Returns the exit status."""
    entries = suite.comparisons(given)
    if not entries:
        raise ValueError("no row fits: see the names, --match and --quick")
    settings = ["tuned"] if given.quick else list(MALLOC)
    results: list[dict] = []
    stopped = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` and the like stop it as Ctrl-C does
    with children(given, settings) as measuring:
        hello = measuring[0].hello
        head = {"command": command, "machine": hello["about"] | hello["machine"], "versions": hello["versions"]}
        kept = record.Record(head | {"malloc": settings}, out)
        print(report.heading(hello, given, settings))
        table = report.Table(len(entries))
        try:
            for index, entry in enumerate(entries):
                label = describe_row(entry, given.threads)
                if resume and "error" not in kept.rows.get(record.key(label), {"error": "not there"}):
                    continue
                table.progress(index, entry.label)
                try:
                    wanted = [c for c in measuring if c.malloc in entry.comparison.malloc]
                    answers = [c.measure(index) for c in wanted or measuring]  # --quick has one setting
                except RuntimeError as stop:
                    answers = [{"error": str(stop)}]
                results.append(merge(label, answers))
                kept.add(results[-1])
                table.show(results[-1])
                if any(child.process.poll() is not None for child in measuring):
                    break
        except KeyboardInterrupt:  # the rows measured so far are kept
            stopped = True
        table.close()
    print(report.summary(kept.whole(results)))
    if out:
        kept.finish()
        print(f"written: {', '.join(str(p) for p in report.files(out))}")
    if stopped:
        print(f"stopped after {len(results)} of {len(entries)} rows; --resume measures the rest")
    return 1 if stopped or any("error" in r for r in results) else 0


def describe_row(entry: suite.Entry, threads: int) -> dict:
    c = entry.comparison
    group = [c.operator, c.what, str(c.dtype).removeprefix("torch.")]
    return {"bench": entry.bench, "label": entry.label, "group": group, "threads": c.threads or threads}


def merge(label: dict, answers: list[dict]) -> dict:
    """A row of the report from the answers of the processes: the row that counts, and the ratio under each setting."""
    for answer in answers:
        if "row" not in answer:
            return label | answer
    rows = [Row.from_json(answer["row"]) for answer in answers]
    counts = rows[0]
    for row in rows[1:]:
        counts = worse(counts, row)
    return label | counts.as_json() | {"ratios": {row.malloc: row.ratio for row in rows}}


def default_name() -> str:
    """<cpu>-<level of the kernels>.json: virtual machines give processors of several generations one name."""
    cpu = "-".join(re.findall("[a-z0-9]+", str(describe()["cpu"]).lower()))
    return f"{cpu}-{build_info()['cpu_level']}.json"
