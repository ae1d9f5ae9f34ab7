"""The instruction set: each opcode that the translator knows, with the types of its operands and its meaning in C++.

VALUES holds the instructions that compute a value from values: one expression each, over a, b, c, d (the operands).
Memory, control flow and whatever threads do together are in `actions.py`.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

INTEGERS = "u16,s16,u32,s32,u64,s64"
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
CPP = {
    **{f"{kind}{bits}": f"{'' if kind == 's' else 'u'}int{bits}_t" for kind in "usb" for bits in (8, 16, 32, 64)},
    **{"f32": "float", "f64": "double", "pred": "bool"},
    # Storage; arithmetic is done after conversion.
    **{"f16": "f16", "bf16": "bf16", "f16x2": "f16x2", "bf16x2": "bf16x2", "f32x2": "f32x2"},
}


@dataclass(frozen=True)
class Value:
    result: str
    sources: tuple[str, ...]
    code: str


VALUES: dict[str, Value] = {}


def expand(pattern: str) -> list[str]:
    """The opcodes of a pattern: "a{.x,}.{u,v}" gives a.x.u, a.x.v, a.u, a.v."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [[p] if i % 2 == 0 else p.split(",") for i, p in enumerate(parts)]
    return ["".join(c) for c in itertools.product(*choices)]


def define(pattern: str, code: str, sources: str = "T T", result: str = "T") -> None:
    """Rows for every opcode of `pattern`. T is the opcode's last type ($T in C++), W the one twice as wide.

    `.ftz` flushes subnormal operands and results to zero, `.sat` clamps the result to 0..1, as in PTX.
    """
    for opcode in expand(pattern):
        modifiers = opcode.split(".")
        t = modifiers[-1]
        names = {"T": t, "W": WIDER.get(t, "")}
        types = tuple(names.get(s, s) for s in sources.split())
        expression = code.replace("$T", CPP[t]).replace("$W", CPP.get(names["W"], ""))
        if "ftz" in modifiers:
            flushed = {x: f"flush({x})" for x, s in zip("abc", types, strict=False) if s == "f32"}
            expression = re.sub(r"\b([abc])\b", lambda m, f=flushed: f.get(m[1], m[1]), expression)
            expression = f"flush({expression})" if names.get(result, result) == "f32" else expression
        if "sat" in modifiers:
            expression = f"saturate({expression})"
        VALUES[opcode] = Value(names.get(result, result), types, expression)


def integers() -> None:
    for name, sign in (("add", "+"), ("sub", "-"), ("mul.lo", "*")):
        define(f"{name}.{{{INTEGERS}}}", f"$T(a {sign} b)")
    define(f"mul.hi.{{{INTEGERS}}}", "multiply_high<$T>(a, b)")
    define("mul.wide.{u16,s16,u32,s32}", "$W(a) * $W(b)", result="W")
    define(f"mad.lo.{{{INTEGERS}}}", "$T(a * b + c)", "T T T")
    define("mad.hi.{u32,s32,u64,s64}", "$T(multiply_high<$T>(a, b) + c)", "T T T")
    define("mad.wide.{u16,s16,u32,s32}", "$W($W(a) * $W(b) + c)", "T T W", "W")
    define(f"div.{{{INTEGERS}}}", "divide<$T>(a, b)")
    define(f"rem.{{{INTEGERS}}}", "remainder<$T>(a, b)")
    define(f"min.{{{INTEGERS}}}", "a < b ? a : b")
    define(f"max.{{{INTEGERS}}}", "a > b ? a : b")
    define("neg.{s16,s32,s64}", "$T(-a)", "T")
    define("abs.{s16,s32,s64}", "$T(a < 0 ? -a : a)", "T")
    for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        define(f"{name}.{{b16,b32,b64,pred}}", f"$T(a {sign} b)")
    define("not.{b16,b32,b64}", "$T(~a)", "T")
    define("not.pred", "!a", "T")
    define("shl.{b16,b32,b64}", "shift_left<$T>(a, b)", "T u32")
    define(f"shr.{{b16,b32,b64,{INTEGERS}}}", "shift_right<$T>(a, b)", "T u32")
    for side, mode in itertools.product("lr", ("wrap", "clamp")):
        define(
            f"shf.{side}.{mode}.b32",
            f"funnel_{side}(a, b, {'c & 31' if mode == 'wrap' else 'c < 32 ? c : 32'})",
            "T T u32",
        )
    define("bfe.{u32,s32,u64,s64}", "extract_bits<$T>(a, b, c)", "T u32 u32")
    define("bfi.{b32,b64}", "insert_bits<$T>(a, b, c, d)", "T T u32 u32")
    define("prmt.b32", "permute_bytes(a, b, c)", "T T T")
    define("lop3.b32", "logic(a, b, c, d)", "T T T T")
    define("popc.{b32,b64}", "uint32_t(std::popcount(a))", "T", "u32")
    define("clz.{b32,b64}", "uint32_t(std::countl_zero(a))", "T", "u32")
    define("brev.{b32,b64}", "reverse_bits<$T>(a)", "T")
    define(f"selp.{{b16,b32,b64,f32,f64,{INTEGERS}}}", "c ? a : b", "T T pred")
    define(f"mov.{{b16,b32,b64,pred,f32,f64,{INTEGERS}}}", "a", "T")
    define("cvta{.to,}{.local,.global,.const,.param}.u64", "a", "T")
    define("cvta.shared.u64", "a + shared_window", "T")
    define("cvta.to.shared.u64", "a - shared_window", "T")


def comparisons() -> None:
    signs = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    unsigned = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
    floats = "{.ftz.f32,.f32,.f64,.f16,.bf16}"
    for name, sign in signs.items():
        define(f"setp.{name}.{{{INTEGERS}}}", f"a {sign} b", result="pred")
        define(
            f"setp.{name}{floats}", f"compare(a, b, [](auto x, auto y) {{ return x {sign} y; }}, false)", result="pred"
        )
        define(
            f"setp.{name}u{floats}", f"compare(a, b, [](auto x, auto y) {{ return x {sign} y; }}, true)", result="pred"
        )
    for name in ("eq", "ne"):
        define(f"setp.{name}.{{b16,b32,b64}}", f"a {signs[name]} b", result="pred")
    for name, sign in unsigned.items():
        define(f"setp.{name}.{{u16,u32,u64}}", f"a {sign} b", result="pred")
    define(f"setp.num{floats}", "compare(a, b, [](auto, auto) { return true; }, false)", result="pred")
    define(f"setp.nan{floats}", "compare(a, b, [](auto, auto) { return false; }, true)", result="pred")
    # With a third operand: the comparison combined with a predicate.
    for opcode in [o for o in VALUES if o.startswith("setp.")]:
        _, name, *rest = opcode.split(".")
        v = VALUES[opcode]
        for logic, sign in (("and", "&&"), ("or", "||"), ("xor", "!=")):
            combined = ".".join(("setp", name, logic, *rest))
            VALUES[combined] = Value("pred", (*v.sources, "pred"), f"({v.code}) {sign} c")


def floating_point() -> None:
    for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
        define(f"{name}{{.rn,}}{{.ftz,}}{{.sat,}}.f32", f"a {sign} b")
        define(f"{name}{{.rn,}}.f64", f"a {sign} b")
    halves = {"add": "fused(x, 1, y)", "sub": "fused(x, 1, -y)", "mul": "x * y"}
    for name, code in halves.items():
        function = f"[](double x, double y) {{ return {code}; }}"
        define(f"{name}{{.rn,}}{{.f16,.bf16,.f16x2,.bf16x2}}", f"lanes(a, b, {function})")
    define("fma.rn{.ftz,}{.sat,}.f32", "__builtin_fmaf(a, b, c)", "T T T")
    define("fma.rn.f64", "__builtin_fma(a, b, c)", "T T T")
    for name, sign in (("add", "+"), ("mul", "*")):
        define(f"{name}.rn.f32x2", f"$T{{a.low {sign} b.low, a.high {sign} b.high}}")
    define("fma.rn.f32x2", "$T{__builtin_fmaf(a.low, b.low, c.low), __builtin_fmaf(a.high, b.high, c.high)}", "T T T")
    for way, name in {"rm": "FE_DOWNWARD", "rp": "FE_UPWARD", "rz": "FE_TOWARDZERO"}.items():
        define(f"fma.{way}{{.ftz,}}.f32", f"fused_rounded(a, b, c, {name})", "T T T")
    define("fma.rn{.f16,.bf16,.f16x2,.bf16x2}", "lanes(a, b, c, fused)", "T T T")
    define("div{.rn,.full,.approx}{.ftz,}.f32", "a / b")
    define("div.rn.f64", "a / b")
    for name, what in {"min": "smaller", "max": "larger"}.items():
        define(f"{name}{{.ftz,}}.f32", f"{what}(a, b)")
        define(f"{name}.f64", f"{what}(a, b)")
        define(f"{name}{{.ftz,}}.NaN.f32", f"a != a || b != b ? std::bit_cast<float>(0x7fffffffu) : {what}(a, b)")
        define(
            f"{name}{{.f16,.bf16,.f16x2,.bf16x2}}", f"lanes(a, b, [](double x, double y) {{ return {what}(x, y); }})"
        )
    define("neg{.ftz,}.f32", "-a", "T")
    define("abs{.ftz,}.f32", "std::fabs(a)", "T")
    define("neg.f64", "-a", "T")
    define("abs.f64", "std::fabs(a)", "T")
    define("neg{.f16,.bf16,.f16x2,.bf16x2}", "lanes(a, [](double x) { return -x; })", "T")
    define("abs{.f16,.bf16,.f16x2,.bf16x2}", "lanes(a, [](double x) { return std::fabs(x); })", "T")
    define("copysign.{f32,f64}", "std::copysign(b, a)")
    # The approximations are given exactly: what a GPU may return lies within a few units in the last place.
    functions = {
        "rcp": "1.0 / x", "sqrt": "std::sqrt(x)", "rsqrt": "1.0 / std::sqrt(x)", "sin": "std::sin(x)",
        "cos": "std::cos(x)", "lg2": "std::log2(x)", "ex2": "std::exp2(x)", "tanh": "std::tanh(x)",
    }  # fmt: skip
    for name, code in functions.items():
        define(f"{name}.approx{{.ftz,}}.f32", f"function(a, [](double x) {{ return {code}; }})", "T")
    for name in ("rcp", "sqrt"):
        define(f"{name}.rn{{.ftz,}}.f32", f"function(a, [](double x) {{ return {functions[name]}; }})", "T")
        define(f"{name}.rn.f64", f"function(a, [](double x) {{ return {functions[name]}; }})", "T")
    for name in ("rcp", "rsqrt"):  # a first guess, for the code around it to improve
        define(
            f"{name}.approx.ftz.f64", f"leading_bits(function(a, [](double x) {{ return {functions[name]}; }}))", "T"
        )
    for name in ("ex2", "tanh"):
        define(
            f"{name}.approx{{.f16,.bf16,.f16x2,.bf16x2}}",
            f"lanes(a, [](double x) {{ return {functions[name]}; }})",
            "T",
        )
    define("ex2.approx.ftz{.bf16,.bf16x2}", "lanes(a, [](double x) { return std::exp2(x); })", "T")


def conversions() -> None:
    def row(opcode: str, to: str, sources: tuple[str, ...], code: str) -> None:
        ftz, sat = ".ftz" in opcode, ".sat" in opcode
        if ftz and sources[0] == "f32":
            code = re.sub(r"\b([ab])\b", r"flush(\1)", code)
        code = f"saturate({code})" if sat else code
        VALUES[opcode] = Value(to, sources, f"flush({code})" if ftz and to == "f32" else code)

    integers = [f"{kind}{bits}" for bits in (8, 16, 32, 64) for kind in "us"]
    for to, source in itertools.product(integers, integers):
        row(f"cvt.{to}.{source}", to, (source,), f"{CPP[to]}(a)")
    rounding = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
    floats = ["f16", "bf16", "f32", "f64"]
    for (way, function), source in itertools.product(rounding.items(), floats):
        for ftz in ("", ".ftz") if source == "f32" else ("",):
            for to in integers:
                row(f"cvt.{way}{ftz}.{to}.{source}", to, (source,), f"to_integer<{CPP[to]}>({function}(widen(a)))")
            row(f"cvt.{way}{ftz}.{source}.{source}", source, (source,), f"narrow<{CPP[source]}>({function}(widen(a)))")
    for to, source in itertools.product(floats, integers):
        if to in ("f32", "f64") or "64" not in source:
            row(f"cvt.rn.{to}.{source}", to, (source,), f"from_integer<{CPP[to]}>(a)")
    row("cvt.f64.f32", "f64", ("f32",), "double(a)")
    row("cvt.ftz.f64.f32", "f64", ("f32",), "double(a)")
    for ftz in ("", ".ftz"):
        row(f"cvt.rn{ftz}.f32.f64", "f32", ("f64",), "float(a)")
        row(f"cvt{ftz}.sat.f32.f32", "f32", ("f32",), "a")
        row(f"cvt{ftz}.f32.f16", "f32", ("f16",), "float(widen(a))")
    row("cvt.f32.bf16", "f32", ("bf16",), "float(widen(a))")
    for to in ("f16", "bf16"):
        row(f"cvt.rn.{to}.f32", to, ("f32",), f"narrow<{to}>(a)")
        row(f"cvt.rn.{to}.f64", to, ("f64",), f"narrow<{to}>(a)")
        row(f"cvt.rn.{to}x2.f32", f"{to}x2", ("f32", "f32"), f"{to}x2{{narrow<{to}>(b), narrow<{to}>(a)}}")
        row(f"cvt.f64.{to}", "f64", (to,), "widen(a)")


integers()
comparisons()
floating_point()
conversions()
