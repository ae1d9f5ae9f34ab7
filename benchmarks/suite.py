"""The list of rows: every `bench_<name>.py` beside this file, and what a selection takes of it."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from dataclasses import dataclass

from .harness import Comparison

PREFIX = "bench_"


@dataclass(frozen=True)
class Selection:
    """Which rows, and how they are measured."""

    names: tuple[str, ...] = ()  # of benches; none: all
    match: str = ""  # a text that the row's label contains
    quick: bool = False
    threads: int = 1
    malloc: str = "default"
    seconds: float = 1.5  # of timing, a row
    device: str = "cpu"


@dataclass(frozen=True)
class Entry:
    bench: str
    comparison: Comparison

    @property
    def label(self) -> str:
        c = self.comparison
        against = "" if c.against == "PyTorch" else f", against {c.against}"
        return f"{c.operator} {c.what} {c.shape} {str(c.dtype).removeprefix('torch.')}{against}"


def names() -> list[str]:
    package = importlib.import_module(__package__)
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name.removeprefix(PREFIX) for name in found if name.startswith(PREFIX))


def comparisons(given: Selection) -> list[Entry]:
    unknown = sorted(set(given.names) - set(names()))
    if unknown:
        raise ValueError(f"names: expected some of {', '.join(names())}, got {', '.join(unknown)}")
    entries = []
    for name in given.names or names():
        try:
            module = importlib.import_module(f".{PREFIX}{name}", __package__)
        except ImportError as error:
            raise ImportError(f"{name}: {error}; cure: pip install 'convdit[bench]'") from error
        entries += [Entry(name, c) for c in module.comparisons() if c.quick or not given.quick]
    return [e for e in entries if given.match.lower() in e.label.lower()]


def versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in ("torch", "timm", "diffusers", "spconv")}
