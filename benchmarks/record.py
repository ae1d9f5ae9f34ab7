"""The file of results: rows are kept as they come, and a later run replaces those that it measures again."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime, timezone
from pathlib import Path

from . import report

SECONDS = 10  # between two writings of the file


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def key(row: dict) -> tuple:
    return row["bench"], row["label"], row["threads"]


def setting(document: dict) -> dict:
    """What the rows of one file have in common."""
    machine, versions = document["machine"], document["versions"]
    level, names = versions["convdit"]["cpu_level"], ("cpu", "cores", "gpu")
    return {k: machine[k] for k in names} | {
        "CPU level": level,
        "PyTorch": versions["torch"],
        "malloc": document["malloc"],
    }


class Record:
    """`document` is a run's head, without rows. Rows of earlier runs in the file `out` stay until they are replaced."""

    def __init__(self, document: dict, out: Path | None):
        self.document, self.out = document, out
        self.start = self.written = time.monotonic()
        self.rows: dict[tuple, dict] = {}
        if out and out.exists():
            old = json.loads(out.read_text(encoding="utf-8"))
            if setting(old) != setting(document):
                raise ValueError(f"--out: expected a file with rows of {setting(document)}, got {setting(old)}: {out}")
            self.rows = {key(row): row for row in old["rows"]}

    def add(self, row: dict) -> None:
        self.rows[key(row)] = row | {"date": now()}
        if time.monotonic() - self.written > SECONDS:
            self.save()

    def whole(self, rows: list[dict] | None = None) -> dict:
        rows = list(self.rows.values()) if rows is None else rows
        return self.document | {"date": now(), "seconds": round(time.monotonic() - self.start), "rows": rows}

    def save(self) -> None:
        """The JSON alone, in one step: whoever reads or stops it finds a whole file."""
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            part = self.out.with_suffix(".part")
            part.write_text(report.as_text(self.whole()), encoding="utf-8")
            os.replace(part, self.out)
            self.written = time.monotonic()

    def finish(self) -> None:
        if self.out and self.rows:
            report.write(self.whole(), self.out)
