"""PTX to C++ that runs one CUDA thread as one call of a function: `translate(text)` gives the source and a table of its code.

A register becomes a local variable, a label a label. Instructions on values are in `instructions.py`; this file has memory,
control flow and what threads do together, each a call into the runtime (runtime/simt.h). Such a call names its site: an index
into the kernel's table of instructions and source lines, by which findings and counters are reported.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

from .instructions import CPP, VALUES, expand
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
MEMORY_TYPES = ",".join(t for t in SIZES if t not in ("pred", "f16", "bf16", "f16x2", "bf16x2"))
Emit = Callable[["Writer", Statement], str]
ACTIONS: dict[str, Emit] = {}


def action(pattern: str) -> Callable[[Emit], Emit]:
    def register(function: Emit) -> Emit:
        ACTIONS.update(dict.fromkeys(expand(pattern), function))
        return function

    return register


class Writer:
    """Writes one kernel."""

    def __init__(self, kernel: Kernel, module: Module):
        self.kernel, self.module = kernel, module
        self.scopes: list[dict[str, str]] = [{}]  # types of registers
        self.symbols: dict[str, str] = {}  # names of memory: the C++ of their address
        self.sites: list[Statement] = []
        self.blocks: list[Counter] = []  # instructions of each basic block
        self.labels: set[str] = set()
        self.declarations: list[str] = []
        self.parameters, self.parameter_bytes = self._lay_out_parameters()
        self.shared_bytes = 0
        for v in module.shared:
            self._shared(v)

    def _lay_out_parameters(self) -> tuple[list[tuple[int, int]], int]:
        layout, end = [], 0
        for v in self.kernel.parameters:
            begin = (end + v.align - 1) // v.align * v.align
            end = begin + v.bytes
            layout.append((begin, v.bytes))
            self.symbols[v.name] = f"(uint64_t(t.block->parameters) + {begin})"
        return layout, end

    def _shared(self, v: Variable) -> None:
        begin = (self.shared_bytes + v.align - 1) // v.align * v.align
        self.symbols[v.name] = str(begin)
        self.shared_bytes = begin + v.bytes

    # ---- operands ------------------------------------------------------------------------------------------------
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
            return f"{cpp}({value}ull)" if type_[0] in "usbp" and type_ != "bf16" else f"as<{cpp}>({CPP[f'u{8 * SIZES[type_]}']}({value}ull))"
        if match := re.fullmatch(r"([\w$]+)(?:\+(\d+))?", operand):
            if match[1] in self.symbols:
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

    # ---- statements ----------------------------------------------------------------------------------------------
    def write(self) -> tuple[list[str], list[str]]:
        """(declarations, statements)"""
        for v in self.module.dynamic_shared:
            self.symbols[v.name] = "kDynamicShared"
        for v in self.module.memory.values():
            self.symbols[v.name] = f"uint64_t({memory_name(v)})"
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
        return self.declarations, lines

    def _declare(self, s: Statement) -> str:
        names = []
        for r in s.operands:
            many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", r)
            names += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [r]
        self.scopes[-1].update(dict.fromkeys(names, s.opcode))
        zero = "{}" if len(self.scopes) == 1 else ""
        return f"{CPP[s.opcode]} " + ", ".join(self.mangle(n) + zero for n in names) + ";"

    def _instruction(self, s: Statement) -> str:
        try:
            code = self._value(s) if s.opcode in VALUES else ACTIONS[s.opcode](self, s)
        except KeyError:
            raise Unsupported(f"{self.kernel.name}, {s.location}: {s.text}") from None
        except Unsupported as error:
            raise Unsupported(f"{self.kernel.name}, {s.location}: {s.text}: {error}") from None
        condition = f"if ({self.source(s.guard, 'pred')}) " if s.guard else ""
        return f"{condition}{{ {code} }}"

    def _value(self, s: Statement) -> str:
        v = VALUES[s.opcode]
        if s.operands[0].startswith("{") or s.operands[-1].startswith("{"):
            return self._pack(s)
        results, *sources = s.operands
        if len(sources) != len(v.sources):
            raise Unsupported(f"{len(sources)} operands")
        names = {x: f"({self.source(o, t)})" for x, o, t in zip("abcd", sources, v.sources, strict=False)}
        code = re.sub(r"\b[abcd]\b(?!\()", lambda m: names.get(m[0], m[0]), v.code)
        first, _, negated = results.partition("|")
        if negated:  # setp with two results
            return f"const bool x = {code}; {self.assign(first, v.result, 'x')} {self.assign(negated, v.result, '!x')}"
        return self.assign(first, v.result, code)

    def _pack(self, s: Statement) -> str:
        """mov between a register and the registers of its parts."""
        result, source = s.operands
        bits = 8 * SIZES[s.opcode.split(".")[1]]
        parts = registers(result if result.startswith("{") else source)
        part = f"b{bits // len(parts)}"
        if result.startswith("{"):
            assigned = [self.assign(r, part, f"{CPP[part]}(x >> {i * bits // len(parts)})") for i, r in enumerate(parts)]
            return f"const {CPP[f'b{bits}']} x = {self.source(source, f'b{bits}')}; " + " ".join(assigned)
        wide = CPP[f"b{bits}"]
        value = " | ".join(f"{wide}({wide}({self.source(r, part)}) << {i * bits // len(parts)})" for i, r in enumerate(parts))
        return self.assign(result, f"b{bits}", value)


def registers(operand: str) -> list[str]:
    return split(operand.strip("{} "))


def memory_name(v: Variable) -> str:
    return "memory_" + v.name.replace("$", "_")


def space_of(opcode: str) -> str:
    spaces = {"global": "kGlobal", "shared": "kShared", "local": "kLocal", "const": "kGlobal"}
    return next((spaces[m] for m in opcode.split(".") if m in spaces), "kGeneric")


# ---- memory -------------------------------------------------------------------------------------------------------
@action(f"ld{{.volatile,}}{{.global,.shared,.local,.const,}}{{.nc,.ca,.cg,.cs,}}{{.v2,.v4,}}.{{{MEMORY_TYPES}}}")
def _(w: Writer, s: Statement) -> str:
    type_ = s.opcode.split(".")[-1]
    n = len(registers(s.operands[0]))
    load = f"load(t, {w.site(s)}, {space_of(s.opcode)}, {w.address(s.operands[1])}, x);"
    return f"{CPP[type_]} x[{n}]; {load} {w.assign_all(s.operands[0], type_)}"


@action(f"ld.param{{.v2,.v4,}}.{{{MEMORY_TYPES}}}")
def _(w: Writer, s: Statement) -> str:
    type_ = s.opcode.split(".")[-1]
    n = len(registers(s.operands[0]))
    copy = f"memcpy(x, (const void*)({w.address(s.operands[1])}), sizeof x);"
    return f"{CPP[type_]} x[{n}]; {copy} {w.assign_all(s.operands[0], type_)}"


@action(f"st{{.volatile,}}{{.global,.shared,.local,}}{{.cg,.cs,.wb,.wt,}}{{.v2,.v4,}}.{{{MEMORY_TYPES}}}")
def _(w: Writer, s: Statement) -> str:
    type_ = s.opcode.split(".")[-1]
    values = ", ".join(w.source(r, type_) for r in registers(s.operands[1]))
    return (
        f"const {CPP[type_]} x[] = {{{values}}}; store(t, {w.site(s)}, {space_of(s.opcode)}, {w.address(s.operands[0])}, x);"
    )


# Integers alone: the kernels add floating-point numbers in a fixed order, so an atomic on those is Unsupported.
ATOMICS = {
    "add": "old + v", "min": "v < old ? v : old", "max": "v > old ? v : old", "exch": "v", "and": "old & v", "or": "old | v",
    "xor": "old ^ v", "cas": "old == v ? w : old",
}  # fmt: skip


@action("{atom,red}{.global,.shared,}{.add,.min,.max}.{u32,s32,u64,s64}")
@action("{atom,red}{.global,.shared,}{.and,.or,.xor}.{b32,b64}")
@action("atom{.global,.shared,}{.exch,.cas}.{b32,b64}")
def _(w: Writer, s: Statement) -> str:
    name, operation, type_ = (s.opcode.split(".")[i] for i in (0, -2, -1))
    address, *values = s.operands[1:] if name == "atom" else s.operands
    captured = f"v = {w.source(values[0], type_)}" + (f", w = {w.source(values[1], type_)}" if len(values) > 1 else "")
    change = f"[{captured}]({CPP[type_]} old) {{ return {CPP[type_]}({ATOMICS[operation]}); }}"
    code = f"atomic<{CPP[type_]}>(t, {w.site(s)}, {space_of(s.opcode)}, {w.address(address)}, {change})"
    return w.assign(s.operands[0], type_, code) if name == "atom" else code + ";"


@action("cp.async.{ca,cg}.shared{::cta,}.global{.L2::64B,.L2::128B,.L2::256B,}")
def _(w: Writer, s: Statement) -> str:
    to, source, size, *given = s.operands
    bytes_ = w.source(given[0], "u32") if given else size
    return f"copy_async(t, {w.site(s)}, {w.address(to)}, {w.address(source)}, {size}, {bytes_});"


@action("cp.async.commit_group")
def _(w: Writer, s: Statement) -> str:
    return "copy_commit(t);"


@action("cp.async.{wait_group,wait_all}")
def _(w: Writer, s: Statement) -> str:
    return f"copy_wait(t, {w.source(s.operands[0], 'u32')});" if s.operands else "copy_commit(t); copy_wait(t, 0);"


# ---- control flow -------------------------------------------------------------------------------------------------
@action("bra{.uni,}")
def _(w: Writer, s: Statement) -> str:
    backwards = "spend_fuel(t); " if s.operands[0] in w.labels else ""
    return f"{backwards}goto {w.mangle(s.operands[0])};"


@action("{ret,exit}")
def _(w: Writer, s: Statement) -> str:
    return "return;"


@action("trap")
def _(w: Writer, s: Statement) -> str:
    return f"trap(t, {w.site(s)});"


# ---- threads together ---------------------------------------------------------------------------------------------
@action("{bar.sync,barrier.sync,barrier.sync.aligned}")
def _(w: Writer, s: Statement) -> str:
    count = w.source(s.operands[1], "u32") if len(s.operands) > 1 else "0"
    return f"sync_block(t, {w.site(s)}, {w.source(s.operands[0], 'u32')}, {count});"


@action("bar.warp.sync")
def _(w: Writer, s: Statement) -> str:
    return f"sync_warp(t, {w.site(s)}, {w.source(s.operands[0], 'u32')});"


@action("membar.{cta,gl,sys}")
@action("fence{.acq_rel,.sc}{.cta,.gpu,.sys}")
def _(w: Writer, s: Statement) -> str:
    return "fence(t);"


@action("activemask.b32")
def _(w: Writer, s: Statement) -> str:
    return w.assign(s.operands[0], "b32", f"active_mask(t, {w.site(s)})")


@action("shfl.sync.{idx,up,down,bfly}.b32")
def _(w: Writer, s: Statement) -> str:
    result, _, valid = s.operands[0].partition("|")
    arguments = ", ".join(w.source(o, "b32") for o in s.operands[1:5])
    code = f"bool valid; const uint32_t x = shuffle<Shuffle::{s.opcode.split('.')[2]}>(t, {w.site(s)}, {arguments}, valid);"
    return f"{code} {w.assign(result, 'b32', 'x')} {w.assign(valid, 'pred', 'valid') if valid else ''}"


@action("vote.sync.{ballot.b32,any.pred,all.pred}")
def _(w: Writer, s: Statement) -> str:
    type_ = s.opcode.split(".")[-1]
    ballot = f"ballot(t, {w.site(s)}, {w.source(s.operands[1], 'pred')}, mask)"
    test = {"ballot": ballot, "any": f"{ballot} != 0", "all": f"{ballot} == mask"}[s.opcode.split(".")[2]]
    return f"const uint32_t mask = {w.source(s.operands[2], 'b32')}; {w.assign(s.operands[0], type_, test)}"


@action("redux.sync.{add,min,max}.{u32,s32}")
@action("redux.sync.{and,or,xor}.b32")
def _(w: Writer, s: Statement) -> str:
    operation, type_ = s.opcode.split(".")[2:]
    function = f"[]({CPP[type_]} old, {CPP[type_]} v) {{ return {CPP[type_]}({ATOMICS[operation]}); }}"
    value, mask = w.source(s.operands[1], type_), w.source(s.operands[2], "b32")
    return w.assign(s.operands[0], type_, f"reduce<{CPP[type_]}>(t, {w.site(s)}, {value}, {mask}, {function})")


@action("ldmatrix.sync.aligned.m8n8.{x1,x2,x4}{.trans,}.shared{::cta,}.b16")
def _(w: Writer, s: Statement) -> str:
    n = len(registers(s.operands[0]))
    transposed = "true" if ".trans" in s.opcode else "false"
    load = f"load_matrix<{n}, {transposed}>(t, {w.site(s)}, {w.address(s.operands[1])}, x);"
    return f"uint32_t x[{n}]; {load} {w.assign_all(s.operands[0], 'b32')}"


@action("movmatrix.sync.aligned.m8n8.trans.b16")
def _(w: Writer, s: Statement) -> str:
    return w.assign(s.operands[0], "b32", f"transpose_matrix(t, {w.site(s)}, {w.source(s.operands[1], 'b32')})")


@action("mma.sync.aligned.{m16n8k16,m16n8k8}.row.col.f32.{bf16.bf16,f16.f16}.f32")
def _(w: Writer, s: Statement) -> str:
    half, depth = s.opcode.split(".")[7], 16 if "k16" in s.opcode else 8
    a, b, c = ("{" + ", ".join(w.source(r, t) for r in registers(o)) + "}" for o, t in zip(s.operands[1:], ("b32", "b32", "f32")))
    code = f"const uint32_t a[] = {a}, b[] = {b}; float c[] = {c}; multiply_matrices<{half}, {depth}>(t, {w.site(s)}, a, b, c);"
    return f"{code} {w.assign_all(s.operands[0], 'f32', 'c')}"


# ---- a whole module -----------------------------------------------------------------------------------------------
def constant(v: Variable) -> str:
    values = v.initial.strip("{} \n")
    numbers = [struct.unpack(">f", bytes.fromhex(n[2:]))[0] if n[:2] in ("0f", "0F") else n for n in split(values)] if values else []
    cpp = CPP[v.type]
    return f"alignas({v.align}) {cpp} {memory_name(v)}[{max(v.count, 1)}] = {{{', '.join(f'{cpp}({n})' for n in numbers)}}};"


def quoted(text: str) -> str:
    return json.dumps(text)


def translate(text: str, relative: Callable[[str], str] = lambda path: path, parts: int = 1) -> tuple[list[str], dict]:
    """C++ sources (the kernels dealt out to `parts` files), and for each kernel its sites and the instructions of each block."""
    module = parse(text, relative)
    head = ['#include "arithmetic.h"', '#include "simt.h"', "using namespace simt;"]
    sources = [list(head) for _ in range(parts)]
    table = {}
    for v in module.memory.values():
        for part in sources[1:]:
            part.append(f"extern {CPP[v.type]} {memory_name(v)}[{max(v.count, 1)}];")
        sources[0].append(constant(v))
        sources[0].append(f"static const Memory m_{memory_name(v)}({quoted(v.name)}, {memory_name(v)}, sizeof {memory_name(v)});")
    sizes = [0] * parts
    for i, kernel in enumerate(module.kernels):
        writer = Writer(kernel, module)
        declarations, lines = writer.write()
        part = sizes.index(min(sizes))
        sizes[part] += len(lines)
        shared = (writer.shared_bytes + 15) // 16 * 16
        out = sources[part]
        out += [f"static void kernel_{i}(Thread& t) {{", f"constexpr uint64_t kDynamicShared = {shared};", *declarations, *lines, "}"]
        sites = [
            f"{{{quoted(s.text)}, {quoted(s.location.file)}, {s.location.line}, "
            f"{quoted(s.location.caller_file)}, {s.location.caller_line}}}"
            for s in writer.sites
        ]
        out.append(f"static const Site sites_{i}[] = {{{', '.join(sites) or '{}'}}};")
        parameters = ", ".join(f"{{{begin}, {size}}}" for begin, size in writer.parameters)
        out.append(f"static const Parameter parameters_{i}[] = {{{parameters or '{}'}}};")
        out.append(
            f"static const Kernel k_{i}({quoted(kernel.name)}, kernel_{i}, sites_{i}, {len(sites)}, {len(writer.blocks)}, {shared}, "
            f"parameters_{i}, {len(writer.parameters)}, {writer.parameter_bytes});"
        )
        table[kernel.name] = {
            "sites": [{"text": s.text, **asdict(s.location)} for s in writer.sites],
            "blocks": [dict(b) for b in writer.blocks],
        }
    return ["\n".join(lines) + "\n" for lines in sources], table
