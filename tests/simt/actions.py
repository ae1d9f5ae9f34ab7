"""The instructions that are more than a value of values: memory, control flow, and what threads do together.

Each becomes a call into the runtime (runtime/simt.h). A call that can go wrong names its site, an index into the
kernel's table of instructions and source lines, by which findings and counters are reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .instructions import CPP, expand
from .ptx import Statement, split

if TYPE_CHECKING:
    from .translate import Writer

Emit = Callable[["Writer", Statement], str]
ACTIONS: dict[str, Emit] = {}
MEMORY_TYPES = ",".join([*(f"{kind}{bits}" for kind in "usb" for bits in (8, 16, 32, 64)), "f32", "f64"])
SPACES = {"global": "kGlobal", "const": "kGlobal", "shared": "kShared", "local": "kLocal"}


def action(pattern: str) -> Callable[[Emit], Emit]:
    def register(function: Emit) -> Emit:
        ACTIONS.update(dict.fromkeys(expand(pattern), function))
        return function

    return register


def registers(operand: str) -> list[str]:
    return split(operand.strip("{} "))


def space_of(opcode: str) -> str:
    return next((SPACES[m] for m in opcode.split(".") if m in SPACES), "kGeneric")


# ---- memory -------------------------------------------------------------------------------------------------------
@action(f"ld{{.global,.shared,.local,.const,}}{{.v2,.v4,}}.{{{MEMORY_TYPES}}}")
@action(f"ld.global{{.nc,.ca,.cg,.cs}}{{.v2,.v4,}}.{{{MEMORY_TYPES}}}")
@action(f"ld.volatile{{.global,.shared,}}{{.v2,.v4,}}.{{{MEMORY_TYPES}}}")
def _(w: Writer, s: Statement) -> str:
    type_ = s.opcode.split(".")[-1]
    load = f"load(t, {w.site(s)}, {space_of(s.opcode)}, {w.address(s.operands[1])}, x);"
    return f"{CPP[type_]} x[{len(registers(s.operands[0]))}]; {load} {w.assign_all(s.operands[0], type_)}"


@action(f"ld.param{{.v2,.v4,}}.{{{MEMORY_TYPES}}}")
def _(w: Writer, s: Statement) -> str:
    type_ = s.opcode.split(".")[-1]
    copy = f"memcpy(x, (const void*)({w.address(s.operands[1])}), sizeof x);"
    return f"{CPP[type_]} x[{len(registers(s.operands[0]))}]; {copy} {w.assign_all(s.operands[0], type_)}"


@action(f"st{{.global,.shared,.local,}}{{.v2,.v4,}}.{{{MEMORY_TYPES}}}")
@action(f"st.global{{.cg,.cs,.wb,.wt}}{{.v2,.v4,}}.{{{MEMORY_TYPES}}}")
@action(f"st.volatile{{.global,.shared,}}{{.v2,.v4,}}.{{{MEMORY_TYPES}}}")
def _(w: Writer, s: Statement) -> str:
    type_ = s.opcode.split(".")[-1]
    values = ", ".join(w.source(r, type_) for r in registers(s.operands[1]))
    store = f"store(t, {w.site(s)}, {space_of(s.opcode)}, {w.address(s.operands[0])}, x);"
    return f"const {CPP[type_]} x[] = {{{values}}}; {store}"


# Integers alone: the kernels add floating-point numbers in a fixed order, so an atomic on those is Unsupported.
OPERATIONS = {
    "add": "old + v", "min": "v < old ? v : old", "max": "v > old ? v : old", "and": "old & v", "or": "old | v",
    "xor": "old ^ v", "exch": "v", "cas": "old == v ? w : old",
}  # fmt: skip


@action("{atom,red}{.global,.shared,}{.add,.min,.max}.{u32,s32,u64,s64}")
@action("{atom,red}{.global,.shared,}{.and,.or,.xor}.{b32,b64}")
@action("atom{.global,.shared,}{.exch,.cas}.{b32,b64}")
def _(w: Writer, s: Statement) -> str:
    operation, type_ = s.opcode.split(".")[-2:]
    returns = s.opcode.startswith("atom")
    address, *values = s.operands[1:] if returns else s.operands
    captured = ", ".join(f"{name} = {w.source(v, type_)}" for name, v in zip("vw", values, strict=False))
    change = f"[{captured}]({CPP[type_]} old) {{ return {CPP[type_]}({OPERATIONS[operation]}); }}"
    code = f"atomic<{CPP[type_]}>(t, {w.site(s)}, {space_of(s.opcode)}, {w.address(address)}, {change})"
    return w.assign(s.operands[0], type_, code) if returns else code + ";"


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
@action("fence{.acq_rel,.sc}.{cta,gpu,sys}")
def _(w: Writer, s: Statement) -> str:
    return "fence(t);"


@action("activemask.b32")
def _(w: Writer, s: Statement) -> str:
    return w.assign(s.operands[0], "b32", f"active_mask(t, {w.site(s)})")


@action("shfl.sync.{idx,up,down,bfly}.b32")
def _(w: Writer, s: Statement) -> str:
    result, _, valid = s.operands[0].partition("|")
    mode = s.opcode.split(".")[2]
    arguments = ", ".join(w.source(o, "b32") for o in s.operands[1:5])
    code = f"bool valid; const uint32_t x = shuffle<Shuffle::{mode}>(t, {w.site(s)}, {arguments}, valid);"
    return f"{code} {w.assign(result, 'b32', 'x')} {w.assign(valid, 'pred', 'valid') if valid else ''}"


@action("vote.sync.{ballot.b32,any.pred,all.pred}")
def _(w: Writer, s: Statement) -> str:
    mode, type_ = s.opcode.split(".")[2:]
    ballot = f"ballot(t, {w.site(s)}, {w.source(s.operands[1], 'pred')}, mask)"
    result = {"ballot": ballot, "any": f"{ballot} != 0", "all": f"{ballot} == mask"}[mode]
    return f"const uint32_t mask = {w.source(s.operands[2], 'b32')}; {w.assign(s.operands[0], type_, result)}"


@action("redux.sync.{add,min,max}.{u32,s32}")
@action("redux.sync.{and,or,xor}.b32")
def _(w: Writer, s: Statement) -> str:
    operation, type_ = s.opcode.split(".")[2:]
    combine = f"[]({CPP[type_]} old, {CPP[type_]} v) {{ return {CPP[type_]}({OPERATIONS[operation]}); }}"
    value, mask = w.source(s.operands[1], type_), w.source(s.operands[2], "b32")
    return w.assign(s.operands[0], type_, f"reduce<{CPP[type_]}>(t, {w.site(s)}, {value}, {mask}, {combine})")


@action("ldmatrix.sync.aligned.m8n8.{x1,x2,x4}{.trans,}.shared{::cta,}.b16")
def _(w: Writer, s: Statement) -> str:
    n, transposed = len(registers(s.operands[0])), "true" if ".trans" in s.opcode else "false"
    load = f"load_matrix<{n}, {transposed}>(t, {w.site(s)}, {w.address(s.operands[1])}, x);"
    return f"uint32_t x[{n}]; {load} {w.assign_all(s.operands[0], 'b32')}"


@action("movmatrix.sync.aligned.m8n8.trans.b16")
def _(w: Writer, s: Statement) -> str:
    return w.assign(s.operands[0], "b32", f"transpose_matrix(t, {w.site(s)}, {w.source(s.operands[1], 'b32')})")


@action("mma.sync.aligned.{m16n8k16,m16n8k8}.row.col.f32.{bf16.bf16,f16.f16}.f32")
def _(w: Writer, s: Statement) -> str:
    half, depth = s.opcode.split(".")[7], 16 if "k16" in s.opcode else 8
    a, b, c = (
        ", ".join(w.source(r, type_) for r in registers(operand))
        for operand, type_ in zip(s.operands[1:], ("b32", "b32", "f32"), strict=True)
    )
    arrays = f"const uint32_t a[] = {{{a}}}, b[] = {{{b}}}; float c[] = {{{c}}};"
    multiply = f"multiply_matrices<{half}, {depth}>(t, {w.site(s)}, a, b, c);"
    return f"{arrays} {multiply} {w.assign_all(s.operands[0], 'f32', 'c')}"
