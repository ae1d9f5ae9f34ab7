"""Reads PTX, as nvcc writes it, into modules, kernels and statements. It knows the layout, not the instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Bytes of each PTX type.
SIZES = {
    **{f"{kind}{bits}": bits // 8 for kind in "usb" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32x2": 8, "f32": 4, "f64": 8, "pred": 1},
}


class Unsupported(Exception):
    """PTX that the executor does not translate; the message names the instruction and where it comes from."""


@dataclass(frozen=True)
class Location:
    """A line of the CUDA source; for an inlined function also the line that calls it."""

    file: str = "?"
    line: int = 0
    caller_file: str = ""
    caller_line: int = 0

    def __str__(self) -> str:
        inlined = f" (inlined at {self.caller_file}:{self.caller_line})" if self.caller_file else ""
        return f"{self.file}:{self.line}{inlined}"


@dataclass(frozen=True)
class Variable:
    """A declared array: a parameter, or shared, local, global or constant memory."""

    name: str
    type: str
    align: int
    count: int = 1
    initial: str = ""

    @property
    def bytes(self) -> int:
        return SIZES[self.type] * self.count


@dataclass(frozen=True)
class Statement:
    """kind: open, close, label, registers, shared, local or instruction."""

    kind: str
    location: Location
    text: str = ""
    opcode: str = ""
    operands: tuple[str, ...] = ()
    guard: str = ""  # a predicate register, with ! before it if negated
    variable: Variable | None = None


@dataclass
class Kernel:
    name: str
    parameters: list[Variable]
    statements: list[Statement]


@dataclass
class Module:
    kernels: list[Kernel] = field(default_factory=list)
    memory: list[Variable] = field(default_factory=list)  # global and constant
    shared: list[Variable] = field(default_factory=list)
    dynamic_shared: list[Variable] = field(default_factory=list)


def split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    return [*parts, current.strip()] if current.strip() else parts


VARIABLE = re.compile(
    r"\.(?P<space>param|shared|local|global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\s+(?:\.(?!align)\w+\s+)?(?:\.align\s+\d+\s+)?)?(?P<name>[\w$]+)(?P<array>\[(?P<count>\d*)\])?"
    r"(?:\s*=\s*(?P<initial>\{[^}]*\}|[^;{]+))?"
)


def variable(match: re.Match) -> Variable:
    type_ = match["type"]
    align, count = int(match["align"] or SIZES[type_]), int(match["count"] or 1) if match["count"] != "" else 0
    return Variable(match["name"], type_, align, count, (match["initial"] or "").strip())


def parse(text: str, relative=lambda path: path) -> Module:
    """`relative` shortens the paths of our own source files."""
    files = {int(n): relative(path) for n, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
    text = re.sub(r"^\s*\.(file|section)\b.*", "", text[: _end_of_code(text)], flags=re.M)
    text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.S))
    module, outside, position = Module(), "", 0
    for head in re.finditer(r"\.(entry|func)\b[^{;]*?([\w$]+)\s*\(([^)]*)\)[^{;]*([{;])", text):
        if head.start() < position or head[4] == ";":
            continue
        if head[1] == "func":
            raise Unsupported(f"the function {head[2]} is not inlined")
        end = _closing_brace(text, head.end())
        outside += text[position : head.start()]
        position = end
        parameters = [variable(VARIABLE.match(p)) for p in split(head[3].replace("\n", " "))]
        module.kernels.append(Kernel(head[2], parameters, statements(text[head.end() : end - 1], files)))
    outside += text[position:]
    for match in VARIABLE.finditer(outside):
        v = variable(match)
        if match["space"] == "shared":
            (module.dynamic_shared if v.count == 0 else module.shared).append(v)
        elif match["space"] in ("global", "const"):
            module.memory.append(v)
    return module


def _end_of_code(text: str) -> int:
    debug = re.search(r"^\s*\.section\s", text, re.M)
    return debug.start() if debug else len(text)


def _closing_brace(text: str, position: int) -> int:
    depth = 1
    while depth:
        depth += (text[position] == "{") - (text[position] == "}")
        position += 1
    return position


def statements(body: str, files: dict[int, str]) -> list[Statement]:
    result: list[Statement] = []
    places = _Places(files)
    location, i = Location(), 0
    while i < len(body):
        c = body[i]
        if c.isspace():
            i += 1
        elif c in "{}":
            result.append(Statement("open" if c == "{" else "close", location))
            i += 1
        elif re.compile(r"\.loc\s").match(body, i):
            end = body.index("\n", i)
            location = places.read(body[i:end])
            i = end
        elif label := re.compile(r"([$\w]+):").match(body, i):
            result.append(Statement("label", location, label[1]))
            i = label.end()
        else:
            end = body.index(";", i)
            if statement := _statement(" ".join(body[i:end].split()), location):
                result.append(statement)
            i = end + 1
    return result


class _Places:
    """Resolves .loc lines. A line that an inlined function is called from has had a .loc of its own, and so on up."""

    def __init__(self, files: dict[int, str]):
        self.files = files
        self.callers: dict[tuple, tuple | None] = {}

    def read(self, text: str) -> Location:
        here = tuple(int(n) for n in text.split(",")[0].split()[1:4])
        inlined = re.search(r"inlined_at\s+(\d+)\s+(\d+)\s+(\d+)", text)
        self.callers[here] = tuple(int(n) for n in inlined.groups()) if inlined else None
        places: list[tuple] = []
        at: tuple | None = here
        while at and at not in places:
            places.append(at)
            at = self.callers.get(at)
        lines = [(self.files.get(file, "?"), line) for file, line, _ in places]
        # A line of the toolkit's headers, which keep absolute paths, says less than the line that calls it.
        ours = [line for line in lines if not line[0].startswith("/")] or lines
        return Location(*ours[0], *(ours[1] if len(ours) > 1 else ()))


def _statement(text: str, location: Location) -> Statement | None:
    if match := VARIABLE.fullmatch(text):
        return Statement(match["space"], location, text, variable=variable(match))
    if match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text):
        return Statement("registers", location, text, match[1], tuple(split(match[2])))
    if text.startswith(".pragma"):
        return None
    guard, opcode, operands = re.fullmatch(r"(?:@(!?%?\w+)\s+)?(\S+)\s*(.*)", text).groups()
    return Statement("instruction", location, text, opcode, tuple(split(operands)), guard or "")
