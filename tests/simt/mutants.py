"""Kernels broken on purpose, one place at a time, to see whether the tests notice.

In a copy of csrc every barrier, wait, bound and lane mask of the device code gets a switch: `simt_is(n)` is true for
mutant n, which is chosen at run time. A barrier or wait of a mutant is left out, a bound is moved by one, a mask loses
a lane. Loops that the compiler unrolls (`#pragma unroll`) and `constexpr` have no bound to break at run time. A mutant
that no test notices must stand in equivalent_mutants.json, with the reason why it changes nothing.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from . import build

FIRST = 7_000_001  # numbers that are in no kernel by chance
EQUIVALENT = Path(__file__).parent / "equivalent_mutants.json"
SWITCH = """// Which mutant is on; see tests/simt/mutants.py.
#pragma once
extern "C" { __constant__ int simt_mutant; }  // constant: read once, not at every switch
__host__ __device__ __forceinline__ bool simt_is(int n) {
#ifdef __CUDA_ARCH__
  return simt_mutant == n;
#else
  return false;  // the device's side of a function that both have
#endif
}
"""
# What is replaced, by what ({n}: the mutant's number), and what that is.
RULES = [
    (
        re.compile(r"\b(?P<call>__syncthreads\(\)|__syncwarp\([^;]*\));"),
        "if (!simt_is({n})) {call};",
        "barrier left out",
    ),
    (
        re.compile(r"\b(?P<call>wait_copies<\w+>\(\)|finish_copies\(\)|__pipeline_wait_prior\([^;]*\));"),
        "if (!simt_is({n})) {call};",
        "wait left out",
    ),
    (re.compile(r" (?P<call><=?) "), " {call} simt_is({n}) + ", "bound raised by one"),
    (re.compile(r" (?P<call>>=?) "), " {call} -simt_is({n}) + ", "bound lowered by one"),
    (re.compile(r"\b(?P<call>0xffffffffu?)\b"), "({call} >> simt_is({n}))", "last lane left out of the mask"),
]
Key = tuple[str, str, str, str, int]
NO_BOUNDS = re.compile(r"\bconstexpr\b|\bstatic_assert\b|^\s*template\b|^\s*#")


@dataclass(frozen=True)
class Mutant:
    number: int
    file: str
    line: int
    function: str
    code: str
    change: str
    nth: int  # from 0, of those of this change in lines of this code in the function

    def key(self) -> Key:  # without the line's number, which any change above it moves
        return self.file, self.function, self.code, self.change, self.nth

    def __str__(self) -> str:
        nth = f" ({self.nth + 1}.)" if self.nth else ""
        return f"{self.file}:{self.line}: {self.function}: {self.change}{nth}: {self.code}"


def device_lines(text: str) -> dict[int, str]:
    """Numbers (from 0) of the lines inside __global__ and __device__ functions, and the function's name."""
    lines: dict[int, str] = {}
    for match in re.finditer(r"__(?:global|device)__[^;{]*\{", text):
        depth, end = 1, match.end()
        while depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        head = re.sub(r"__launch_bounds__\([^)]*\)", "", match[0])
        name = re.search(r"(\w+)(?:<\w+>)?\(", head)[1]
        lines |= dict.fromkeys(range(text.count("\n", 0, match.start()), text.count("\n", 0, end) + 1), name)
    return lines


def mutate(text: str, file: str, first: int) -> tuple[str, list[Mutant]]:
    """The text with switches, and its mutants, numbered from `first`."""
    inside, mutants, lines = device_lines(text), [], text.split("\n")
    unrolled = False
    for i, line in enumerate(lines):
        code, comment, rest = line.partition("//")
        if i in inside and not NO_BOUNDS.search(code):
            for pattern, replacement, change in RULES:
                if unrolled and "bound" in change and code.lstrip().startswith("for"):
                    continue

                def switch(match: re.Match, replacement=replacement, change=change, line=line, i=i) -> str:
                    place = (inside[i], line.strip(), change)
                    nth = sum((m.function, m.code, m.change) == place for m in mutants)
                    mutants.append(Mutant(first + len(mutants), file, i + 1, *place, nth))
                    return replacement.format(n=mutants[-1].number, call=match["call"])

                code = pattern.sub(switch, code)
        unrolled = code.strip() == "#pragma unroll"
        lines[i] = code + comment + rest
    return "\n".join(lines), mutants


def mutated_tree(room: str) -> tuple[Path, list[Mutant]]:
    """A copy of csrc with switches in the device code that the room's cuda.cu is made of; the mutants that it has.

    What is in a shared header and not in the room's kernels is a mutant of another room.
    """
    csrc = build.ROOT / "csrc"
    files: set[Path] = set()
    build.source_text(csrc / room / "cuda.cu", csrc, files)
    mutants: list[Mutant] = []
    texts = {}
    for path in sorted(p for p in files if p.suffix in (".cu", ".cuh")):
        text, found = mutate(path.read_text(), str(path.relative_to(build.ROOT)), FIRST + len(mutants))
        mutants += found
        texts[path.relative_to(csrc)] = (
            text.replace("#include", '#include "mutant.cuh"\n#include', 1) if found else text
        )

    def make(folder: Path) -> None:
        shutil.copytree(csrc, folder / "csrc")
        (folder / "csrc" / "mutant.cuh").write_text(SWITCH)
        for name, text in texts.items():
            (folder / "csrc" / name).write_text(text)

    contents = build.digest(*(f.read_text() for f in sorted(csrc.rglob("*")) if f.is_file()), *texts.values())
    tree = build.made(build.BUILD / "mutated" / f"{room}-{contents}", make) / "csrc"
    output = build.nvcc_output(tree / room / "cuda.cu", "compute_80", tree, build.FEW_BLOCKS)  # as in the sweep
    ptx = (output / "kernels.ptx").read_text()
    return tree, [m for m in mutants if str(m.number) in ptx]


def every() -> list[Mutant]:
    """The mutants of all kernels, numbered by file."""
    csrc = build.ROOT / "csrc"
    files = sorted(p for suffix in ("cu", "cuh") for p in csrc.rglob(f"*.{suffix}"))
    return [m for p in files for m in mutate(p.read_text(), str(p.relative_to(build.ROOT)), FIRST)[1]]


def equivalents() -> list[dict]:
    return json.loads(EQUIVALENT.read_text())


def key_of(row: dict) -> Key:
    return row["file"], row["function"], row["code"], row["change"], row["nth"]


def equivalent(room: str) -> dict[Key, str]:
    """Reasons by Mutant.key(), of those that change nothing anywhere, or in the kernels of this room ("rooms")."""
    return {key_of(r): r["reason"] for r in equivalents() if room in r.get("rooms", [room])}
