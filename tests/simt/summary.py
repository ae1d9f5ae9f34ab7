"""What all steps of `make simt` did, in one table: each adds its counts to a file, the last step prints their sums."""

from __future__ import annotations

import json
from collections import Counter

from . import build

FILE = build.BUILD / "summary.jsonl"
GPU_CHECK = "gpu-check, dry"
# The steps of `make simt` that launch kernels. The executor's own tests do so too, but not ours, and wrong ones.
STEPS = (
    "operators, compute_90, few blocks",
    "budget",
    "mutants of sites",
    "operators, compute_80",
    GPU_CHECK,
)


def begin(step: str | None = None) -> None:
    """Forget the counts of a step, or of all, from an earlier run."""
    lines = FILE.read_text().splitlines(keepends=True) if step and FILE.exists() else []
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text("".join(line for line in lines if json.loads(line)["step"] != step))


def add(step: str, **counts: int) -> None:
    """Add to a step's counts. In one write: the processes of a step may do so at the same time."""
    with FILE.open("a") as file:
        file.write(json.dumps({"step": step, **counts}) + "\n")


def steps() -> dict[str, Counter]:
    """The counts of each step so far."""
    found: dict[str, Counter] = {}
    for line in FILE.read_text().splitlines() if FILE.exists() else []:
        counts = json.loads(line)
        found.setdefault(counts.pop("step"), Counter()).update(counts)
    return found


def of_mutants(counts: Counter) -> str:
    total, caught, equivalent = (counts[c] for c in ("mutants", "caught", "equivalent"))
    return f"{caught} of {total} mutants caught, {equivalent} equivalent, {total - caught - equivalent} survive"


def main(arguments: list[str]) -> int:
    """Prints the table. Fails for a finding, a mutant that survives, or a step that launched nothing."""
    if arguments == ["--begin"]:
        begin()
        return 0
    found = steps()
    total = sum(found.values(), Counter())
    missing = [step for step in STEPS if not found.get(step, Counter())["launches"]]
    for step, counts in found.items():
        mutants = f", {of_mutants(counts)}" if counts["mutants"] else ""
        print(f"{step:34} {counts['launches']:6} launches, {counts['findings']} findings{mutants}")
    for step in missing:
        print(f"{step:34} launched nothing")
    print(f"in all: {total['launches']} launches, {total['findings']} findings, {of_mutants(total)}")
    survive = total["mutants"] - total["caught"] - total["equivalent"]
    return bool(total["findings"] or survive or missing)
