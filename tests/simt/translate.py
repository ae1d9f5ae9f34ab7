"""PTX to C++ that runs a CUDA thread as a call of a function. A register becomes a local variable, a label a label.

What each instruction becomes is in `instructions.py` and `actions.py`; what is in neither is Unsupported.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

from .actions import ACTIONS, registers
from .instructions import CPP, VALUES
from .ptx import SIZES, Kernel, Module, Statement, Unsupported, Variable, parse, split

AXES = {"tid": "t.index", "ntid": "t.block->threads", "ctaid": "t.block->index", "nctaid": "t.block->grid"}
SPECIAL_REGISTERS = {f"%{n}.{axis}": f"{e}[{i}]" for n, e in AXES.items() for i, axis in enumerate("xyz")} | {
    "%laneid": "t.lane",
    "%warpid": "(t.flat / 32)",
    "%lanemask_eq": "(1u << t.lane)",
    "%lanemask_lt": "((1u << t.lane) - 1)",
    "%lanemask_le": "((2u << t.lane) - 1)",
    "%lanemask_gt": "~((2u << t.lane) - 1)",
    "%lanemask_ge": "~((1u << t.lane) - 1)",
}


class Writer:
    """Writes one kernel."""

    def __init__(self, kernel: Kernel, module: Module):
        self.kernel = kernel
        self.scopes: list[dict[str, str]] = [{}]  # types of registers
        self.symbols: dict[str, str] = {}  # names of memory: the C++ of their address
        self.sites: list[Statement] = []
        self.blocks: list[Counter] = []  # instructions of each basic block
        self.labels: set[str] = set()
        self.declarations: list[str] = []
        self.parameters: list[tuple[int, int]] = []  # offset and bytes
        self.parameter_bytes = 0
        self.shared_bytes = 0
        for v in kernel.parameters:
            begin = _aligned(self.parameter_bytes, v.align)
            self.parameters.append((begin, v.bytes))
            self.symbols[v.name] = f"(uint64_t(t.block->parameters) + {begin})"
            self.parameter_bytes = begin + v.bytes
        for v in module.shared:
            self._shared(v)
        self.symbols |= {v.name: "kDynamicShared" for v in module.dynamic_shared}
        self.symbols |= {v.name: f"uint64_t({memory_name(v)})" for v in module.memory}

    def _shared(self, v: Variable) -> None:
        begin = _aligned(self.shared_bytes, v.align)
        self.symbols[v.name] = str(begin)
        self.shared_bytes = begin + v.bytes

    # ---- operands ----------------------------------------------------------------------------------------------
    def register_type(self, name: str) -> str | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    @staticmethod
    def mangle(name: str) -> str:
        return "r_" + name.lstrip("%").replace("$", "_").replace(".", "_")

    def source(self, operand: str, type_: str) -> str:
        """The C++ expression of an operand, read as `type_`."""
        cpp = CPP[type_]
        if operand.startswith("!"):
            return f"!{self.source(operand[1:], type_)}"
        if register := self.register_type(operand):
            name = self.mangle(operand)
            return name if CPP[register] == cpp else f"as<{cpp}>({name})"
        if operand in SPECIAL_REGISTERS:
            return f"{cpp}({SPECIAL_REGISTERS[operand]})"
        if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", operand):
            bits = "uint32_t" if operand[1] in "fF" else "uint64_t"
            return f"as<{cpp}>({bits}(0x{match[1]}ull))"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            value = int(operand.rstrip("U"), 0) & (2 ** (8 * SIZES[type_]) - 1)
            return f"as<{cpp}>({CPP[f'u{8 * SIZES[type_]}']}({value}ull))"
        match = re.fullmatch(r"([\w$]+)(?:\+(\d+))?", operand)
        if match and match[1] in self.symbols:
            return f"{cpp}({self.symbols[match[1]]} + {match[2] or 0})"
        raise Unsupported(f"operand {operand}")

    def address(self, operand: str) -> str:
        match = re.fullmatch(r"\[\s*([^\s+\]]+?)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not match:
            raise Unsupported(f"address {operand}")
        wide = SIZES.get(self.register_type(match[1]) or "", 8) == 8
        return f"uint64_t({self.source(match[1], 'u64' if wide else 'u32')}) + ({match[2] or 0})"

    def assign(self, operand: str, type_: str, value: str) -> str:
        if operand == "_":
            return ""
        register = self.register_type(operand)
        if register is None:
            raise Unsupported(f"result {operand}")
        convert = value if CPP[register] == CPP[type_] else f"as<{CPP[register]}>({CPP[type_]}({value}))"
        return f"{self.mangle(operand)} = {convert};"

    def assign_all(self, operand: str, type_: str, array: str = "x") -> str:
        return " ".join(self.assign(r, type_, f"{array}[{i}]") for i, r in enumerate(registers(operand)))

    def site(self, statement: Statement) -> int:
        self.sites.append(statement)
        return len(self.sites) - 1

    # ---- statements --------------------------------------------------------------------------------------------
    def write(self) -> list[str]:
        lines, new_block = [], True
        for s in self.kernel.statements:
            if s.kind == "open":
                self.scopes.append({})
                lines.append("{")
            elif s.kind == "close":
                self.scopes.pop()
                lines.append("}")
            elif s.kind == "label":
                self.labels.add(s.text)
                lines.append(f"{self.mangle(s.text)}:;")
                new_block = True
            elif s.kind == "registers":
                (self.declarations if len(self.scopes) == 1 else lines).append(self._declare(s))
            elif s.kind == "shared":
                self._shared(s.variable)
            elif s.kind == "local":
                name = self.mangle(s.variable.name)
                self.symbols[s.variable.name] = f"uint64_t({name})"
                self.declarations.append(f"alignas(16) uint8_t {name}[{s.variable.bytes}];")
            elif s.kind == "instruction":
                if new_block:
                    lines.append(f"++t.block->counts[{len(self.blocks)}];")
                    self.blocks.append(Counter())
                self.blocks[-1][s.opcode] += 1
                lines.append(self._instruction(s))
                new_block = s.opcode.split(".")[0] in ("bra", "ret", "exit")
            else:
                raise Unsupported(f"{self.kernel.name}, {s.location}: {s.text}")
        return [*self.declarations, *lines]

    def _declare(self, s: Statement) -> str:
        names = []
        for r in s.operands:
            many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", r)
            names += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [r]
        self.scopes[-1].update(dict.fromkeys(names, s.opcode))
        # A jump may pass a declaration in an inner scope, but not one with a value.
        zero = "{}" if len(self.scopes) == 1 else ""
        return f"{CPP[s.opcode]} " + ", ".join(self.mangle(n) + zero for n in names) + ";"

    def _instruction(self, s: Statement) -> str:
        where = f"{self.kernel.name}, {s.location}: {s.text}"
        if s.opcode not in VALUES and s.opcode not in ACTIONS:
            raise Unsupported(where)
        try:
            code = self._value(s) if s.opcode in VALUES else ACTIONS[s.opcode](self, s)
        except Unsupported as error:
            raise Unsupported(f"{where}: {error}") from None
        condition = f"if ({self.source(s.guard, 'pred')}) " if s.guard else ""
        return f"{condition}{{ {code} }}"

    def _value(self, s: Statement) -> str:
        if s.operands[0].startswith("{") or s.operands[-1].startswith("{"):
            return self._pack(s)
        v = VALUES[s.opcode]
        results, *sources = s.operands
        if len(sources) != len(v.sources):
            raise Unsupported(f"{len(sources)} operands")
        names = {x: f"({self.source(o, t)})" for x, o, t in zip("abcd", sources, v.sources, strict=False)}
        code = re.sub(r"\b[abcd]\b", lambda m: names[m[0]], v.code)
        first, _, negated = results.partition("|")
        if negated:  # setp with two results
            return f"const bool x = {code}; {self.assign(first, 'pred', 'x')} {self.assign(negated, 'pred', '!x')}"
        return self.assign(first, v.result, code)

    def _pack(self, s: Statement) -> str:
        """mov between a register and the registers of its parts."""
        result, source = s.operands
        parts = registers(result if result.startswith("{") else source)
        bits = 8 * SIZES[s.opcode.split(".")[1]]
        step = bits // len(parts)
        whole, part = f"b{bits}", f"b{step}"
        if result.startswith("{"):
            values = [f"{CPP[part]}(x >> {i * step})" for i in range(len(parts))]
            assigned = " ".join(self.assign(r, part, v) for r, v in zip(parts, values, strict=True))
            return f"const {CPP[whole]} x = {self.source(source, whole)}; {assigned}"
        shifted = [f"({CPP[whole]}({self.source(r, part)}) << {i * step})" for i, r in enumerate(parts)]
        return self.assign(result, whole, f"{CPP[whole]}({' | '.join(shifted)})")


def _aligned(offset: int, align: int) -> int:
    return (offset + align - 1) // align * align


# ---- a whole module ---------------------------------------------------------------------------------------------
def memory_name(v: Variable) -> str:
    return "memory_" + v.name.replace("$", "_")


def memory_type(v: Variable) -> str:
    return f"{CPP[v.type]} {memory_name(v)}[{max(v.count, 1)}]"


def define_memory(v: Variable) -> list[str]:
    """A __constant__ or __device__ variable, and its entry in the executor's list of memory."""
    values = [
        struct.unpack(">f", bytes.fromhex(n[2:]))[0] if n[:2] == "0f" else n for n in split(v.initial.strip("{} \n"))
    ]
    initial = ", ".join(f"{CPP[v.type]}({n})" for n in values)
    name = memory_name(v)
    return [
        f"alignas({v.align}) {memory_type(v)} = {{{initial}}};",
        f"static const Memory m_{name}({quoted(v.name)}, {name}, sizeof {name});",
    ]


def quoted(text: str) -> str:
    return json.dumps(text)


def define_kernel(kernel: Kernel, module: Module, i: int) -> tuple[list[str], dict]:
    """Its function, its entry in the executor's list, and its row of the table that `translate` returns."""
    w = Writer(kernel, module)
    lines = w.write()
    shared = _aligned(w.shared_bytes, 16)
    sites = [
        f"{{{quoted(s.text)}, {quoted(s.location.file)}, {s.location.line}, "
        f"{quoted(s.location.caller_file)}, {s.location.caller_line}}}"
        for s in w.sites
    ]
    parameters = ", ".join(f"{{{begin}, {size}}}" for begin, size in w.parameters)
    source = [
        f"static void kernel_{i}(Thread& t) {{",
        f"constexpr uint64_t kDynamicShared = {shared};",
        *lines,
        "}",
        f"static const Site sites_{i}[] = {{{', '.join(sites) or '{}'}}};",
        f"static const Parameter parameters_{i}[] = {{{parameters or '{}'}}};",
        f"static const Kernel k_{i}({quoted(kernel.name)}, kernel_{i}, sites_{i}, {len(sites)}, {len(w.blocks)},",
        f"  {shared}, parameters_{i}, {len(w.parameters)}, {w.parameter_bytes});",
    ]
    row = {
        "sites": [{"text": s.text, **asdict(s.location)} for s in w.sites],
        "blocks": [dict(b) for b in w.blocks],
    }
    return source, row


def translate(
    text: str, relative: Callable[[str], str] = lambda path: path, parts: int = 1
) -> tuple[list[str], dict[str, dict]]:
    """The C++ of a module, its kernels dealt out to `parts` sources; and of each kernel the sites, and the instructions
    of each basic block. `relative` shortens the paths of our own source files."""
    module = parse(text, relative)
    head = ['#include "arithmetic.h"', '#include "simt.h"', "using namespace simt;"]
    sources = [[*head, *(f"extern {memory_type(v)};" for v in module.memory)] for _ in range(parts)]
    sources[0] += [line for v in module.memory for line in define_memory(v)]
    table = {}
    for i, kernel in enumerate(module.kernels):
        lines, table[kernel.name] = define_kernel(kernel, module, i)
        min(sources, key=len).extend(lines)
    return ["\n".join(lines) + "\n" for lines in sources], table
