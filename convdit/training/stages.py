"""Commands of several stages: each runs once, an interrupted command goes on, and its folder is its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import data
from .runs import RunError, read_json, write_json


class Stages:
    """Runs each stage once: its result is kept as JSON in ``out/results`` and taken from there later."""

    def __init__(self, out: Path):
        self.out = out
        self.times: dict[str, dict[str, float]] = {}

    def __call__(self, name: str, title: str, stage: Callable[[], Any]) -> Any:
        path = self.out / "results" / f"{name}.json"
        if path.exists():
            kept = read_json(path)
            print(f"[{name}] {title}: done before", flush=True)
        else:
            print(f"[{name}] {title}", flush=True)
            wall, process = time.perf_counter(), time.process_time()
            result = stage()
            seconds = {"wall": time.perf_counter() - wall, "process": time.process_time() - process}
            kept = json.loads(json.dumps({"result": result, "seconds": seconds}))
            path.parent.mkdir(exist_ok=True)
            write_json(path, kept)
        self.times[title] = kept["seconds"]
        return kept["result"]


def open_folder(out: Path, settings: dict[str, Any], name: str) -> Path:
    """Makes the folder of a command, with its settings in ``name.json``; one that is there must have the same."""
    path, wanted = out / f"{name}.json", json.loads(json.dumps(settings))
    if path.exists():
        if read_json(path) != wanted:
            raise RunError(
                f"{out}: holds results of convdit {name} with other options: remove it, or choose another --out"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: exists and does not come from convdit {name}: choose another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
    return out


def small_size(name: str) -> int | None:
    """Side of the pictures of commands that are to be quick: as they are in embedded data, else 32 pixels."""
    return None if name in data.EMBEDDED else 32
