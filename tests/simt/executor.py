"""Loads a library of translated kernels and launches them from Python."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import build


@dataclass(frozen=True)
class Finding:
    """One thing that a kernel did wrong."""

    what: str
    file: str
    line: int
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    kernel: str
    text: str

    @classmethod
    def parse(cls, text: str) -> Finding:
        pattern = (
            r"(?P<what>.*?): (?P<file>[^:]*):(?P<line>\d+).*?, block (?P<block>\S+), thread (?P<thread>\S+), "
            r"kernel (?P<kernel>.*?) \["
        )
        match = re.match(pattern, text)
        if not match:
            return cls(text.split(":")[0], "", 0, (0, 0, 0), (0, 0, 0), "", text)
        block, thread = (tuple(int(i) for i in match[g].strip("()").split(",")) for g in ("block", "thread"))
        return cls(match["what"], match["file"], int(match["line"]), block, thread, match["kernel"], text)


class Library:
    """The executor inside a shared library that `build` made."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.c = ctypes.CDLL(str(path))
        for name in ("findings", "last_findings", "traffic"):
            getattr(self.c, f"simt_{name}").restype = ctypes.c_char_p
        for name in ("launches", "allowed"):
            getattr(self.c, f"simt_{name}").restype = ctypes.c_uint64
        self.c.simt_allocate.restype = ctypes.c_void_p
        self.c.simt_allocate.argtypes = [ctypes.c_uint64]
        self.c.simt_release.argtypes = [ctypes.c_void_p]
        self.c.simt_set_fuel.argtypes = [ctypes.c_int64]
        table = self.path.parent / "kernels.json"
        self.kernels: dict = json.loads(table.read_text()) if table.exists() else {}
        names = subprocess.run(
            ["c++filt"], input="\n".join(self.kernels), capture_output=True, text=True
        ).stdout.splitlines()
        self.demangled = dict(zip(self.kernels, names, strict=True))

    # ---- settings and reports ----------------------------------------------------------------------------------
    def set_orders(self, *orders: str | int) -> None:
        """Run every launch once in each order of threads: "forward", "reversed", or the seed of a shuffle."""
        self.c.simt_set_orders(",".join(map(str, orders)).encode())

    def set_counting(self, on: bool) -> None:
        self.c.simt_set_counting(int(on))

    def allow(self, what: str, file: str, code: str) -> None:
        """Findings that begin with `what`, on the lines of `file` that contain `code`, are intended."""
        lines = [i for i, line in enumerate((build.ROOT / file).read_text().splitlines(), 1) if code in line]
        if not lines:
            raise LookupError(f"{file} has no line with {code!r}")
        for line in lines:
            self.c.simt_allow(what.encode(), file.encode(), line)

    def findings(self) -> list[Finding]:
        """Since `clear`, over all launches."""
        return [Finding.parse(line) for line in self.c.simt_findings().decode().splitlines()]

    def traffic(self) -> list[dict]:
        return [json.loads(line) for line in self.c.simt_traffic().decode().splitlines()]

    def clear(self) -> None:
        self.c.simt_clear()

    @property
    def launches(self) -> int:
        return self.c.simt_launches()

    @property
    def allowed(self) -> int:
        """How many findings were intended."""
        return self.c.simt_allowed()

    # ---- launching ---------------------------------------------------------------------------------------------
    def array(self, source: np.ndarray | tuple[tuple[int, ...], type]) -> np.ndarray:
        """A numpy array in device memory: a copy of one, or (shape, dtype) for one that nobody has written yet."""
        values = source if isinstance(source, np.ndarray) else None
        shape, dtype = (source.shape, source.dtype) if values is not None else (source[0], np.dtype(source[1]))
        count = int(np.prod(shape))
        memory = (ctypes.c_char * max(1, count * dtype.itemsize)).from_address(
            self.c.simt_allocate(max(1, count * dtype.itemsize))
        )
        result = np.frombuffer(memory, dtype, count).reshape(shape)
        if values is not None:
            result[...] = values
        return result

    def kernel(self, name: str) -> str:
        """The symbol of the kernel whose demangled name contains `name`."""
        found = [
            symbol for symbol, text in self.demangled.items() if name in (symbol, text.split("(")[0]) or name in text
        ]
        exact = [s for s in found if name == s]
        if len(exact or found) != 1:
            raise KeyError(
                f"kernel {name!r}: found {[self.demangled[s] for s in found] or list(self.demangled.values())}"
            )
        return (exact or found)[0]

    def launch(self, kernel: str, grid, block, *arguments, shared: int = 0) -> list[Finding]:
        """Launch by name; arguments are arrays from `array`, or numbers (Python's, numpy's or ctypes's)."""
        values = [
            ctypes.c_uint64(a.ctypes.data) if isinstance(a, np.ndarray) and a.ndim else _scalar(a) for a in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        self.c.simt_launch(self.kernel(kernel).encode(), _three(grid), _three(block), shared, pointers)
        return [Finding.parse(line) for line in self.c.simt_last_findings().decode().splitlines()]


def _scalar(value):
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, int):
        return ctypes.c_int(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return ctypes.create_string_buffer(value.tobytes(), value.nbytes)
    return value


def _three(size) -> ctypes.Array:
    size = [size] if isinstance(size, int) else list(size)
    return (ctypes.c_uint32 * 3)(*size, *[1] * (3 - len(size)))


def load(path: str | Path, architecture: str = "compute_80") -> Library:
    """The kernels and launchers of a CUDA or PTX file, built if needed."""
    return Library(build.library_of(Path(path), architecture))


PTX_HEAD = ".version 9.0\n.target sm_90\n.address_size 64\n"


def load_ptx(text: str, name: str) -> Library:
    """Kernels written in PTX, without its head."""
    path = build.BUILD / "ptx" / f"{name}.ptx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PTX_HEAD + text)
    return Library(build.library_of(path))
