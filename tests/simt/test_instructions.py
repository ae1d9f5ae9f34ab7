"""Every instruction on values that the translator knows does what PTX says, by `semantics.py`."""

import itertools
import math
import random
from collections import defaultdict

import numpy as np
import pytest

from . import semantics
from .executor import load_ptx
from .instructions import VALUES
from .semantics import BITS, FORMATS, decode, encode

THREADS = 192
REGISTERS = {"u8": "b16", "s8": "b16", "f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32", "f32x2": "b64"}
HALF = {"f16x2": 16, "bf16x2": 16, "f32x2": 32}  # bits of one of two
# A GPU's approximations may differ from the exact value in their last places, and Python's functions from C's.
APPROXIMATE = ("sin", "cos", "lg2", "ex2", "tanh", "rsqrt")

GROUPS = defaultdict(list)  # opcodes by the types of their operands
for opcode, value in VALUES.items():
    if not opcode.startswith("cvta"):
        GROUPS[value.sources].append(opcode)


def move(type_: str, register: str, address: str, store: bool = False) -> str:
    """Load or store a register by its address."""
    if type_ == "pred":
        if store:
            return f"selp.b32 %v, 1, 0, {register};\nst.global.b32 [{address}], %v;"
        return f"ld.global.b32 %v, [{address}];\nsetp.ne.b32 {register}, %v, 0;"
    memory = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32", "f32x2": "b64"}.get(type_, type_)
    return f"st.global.{memory} [{address}], {register};" if store else f"ld.global.{memory} {register}, [{address}];"


def kernel_of(name: str, sources: tuple[str, ...], opcodes: list[str]) -> str:
    declared = [f".reg .{REGISTERS.get(t, t)} %x{i};" for i, t in enumerate(sources)]
    results = sorted({VALUES[o].result for o in opcodes})
    declared += [f".reg .{REGISTERS.get(t, t)} %y_{t};" for t in results]
    loads = [move(t, f"%x{i}", f"%in+{8 * i}") for i, t in enumerate(sources)]
    body = []
    for i, opcode in enumerate(opcodes):
        result = VALUES[opcode].result
        operands = ", ".join(f"%x{k}" for k in range(len(sources)))
        body += [
            f"{opcode} %y_{result}, {operands};",
            move(result, f"%y_{result}", f"%out+{8 * THREADS * i}", store=True),
        ]
    return "\n".join(
        [
            f".visible .entry {name}(.param .u64 p_in, .param .u64 p_out) {{",
            ".reg .b32 %v; .reg .u32 %t; .reg .u64 %in, %out, %o;",
            *declared,
            "ld.param.u64 %in, [p_in]; ld.param.u64 %out, [p_out]; mov.u32 %t, %tid.x;",
            "mul.wide.u32 %o, %t, 32; add.u64 %in, %in, %o; mul.wide.u32 %o, %t, 8; add.u64 %out, %out, %o;",
            *loads,
            *body,
            "ret; }",
        ]
    )


@pytest.fixture(scope="module")
def values():
    names = {sources: f"group_{i}" for i, sources in enumerate(GROUPS)}
    library = load_ptx("\n".join(kernel_of(names[s], s, o) for s, o in GROUPS.items()), "values")
    return library, names


def interesting(type_: str, rng: random.Random) -> list[int]:
    """Bits of values that instructions go wrong on, and of random ones."""
    if type_.endswith("x2"):
        return [
            a | b << HALF[type_]
            for a, b in zip(interesting(type_[:-2], rng), reversed(interesting(type_[:-2], rng)), strict=True)
        ]
    if type_ in FORMATS:
        precision, least = FORMATS[type_]
        tiny, largest = 2.0**least, (2 - 2.0 ** (1 - precision)) * 2.0 ** (1 - least)
        some = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -3.5, 255.5, tiny, tiny / 4, -tiny / 2, largest, -largest]
        some += [math.inf, -math.inf, math.nan, 1 + 2.0 ** (1 - precision), 65504.0, 1e-3, 100.0]
        some += [rng.uniform(-4, 4) * 2.0 ** rng.randint(-6, 6) for _ in range(20)]
        return [encode(semantics.rounded(x, type_) if math.isfinite(x) else x, type_) for x in some]
    bits = BITS[type_]
    if bits == 1:
        return [0, 1]
    some = [0, 1, 2, 31, 32, 33, 64, 200, 1 << (bits - 1), (1 << bits) - 1, (1 << (bits - 1)) - 1, 1 << (bits // 2)]
    return [x & ((1 << bits) - 1) for x in some] + [
        rng.getrandbits(bits) >> rng.choice((0, 0, bits // 2)) for _ in range(20)
    ]


def inputs(sources: tuple[str, ...]) -> np.ndarray:
    rng = random.Random(str(sources))
    choices = [interesting(t, rng) for t in sources]
    pairs = list(itertools.islice(itertools.product(*(c[:12] for c in choices[:2])), 144))
    rng.shuffle(pairs)
    rows = np.zeros((THREADS, 4), np.uint64)
    for i in range(THREADS):
        for k, c in enumerate(choices):
            rows[i, k] = pairs[i][k] if i < min(96, len(pairs)) and k < 2 else rng.choice(c)
        if i % 16 == 0 and len(set(sources)) == 1:
            rows[i, : len(sources)] = rows[i, 0]
    return rows


def same(opcode: str, type_: str, got: int, right) -> bool:
    if type_.endswith("x2"):
        return all(
            same(opcode, type_[:-2], got >> HALF[type_] * i & (1 << HALF[type_]) - 1, r) for i, r in enumerate(right)
        )
    if type_ not in FORMATS:
        return got == right & ((1 << BITS[type_]) - 1)
    number = decode(got, type_)
    if math.isnan(right) or math.isnan(number):
        return math.isnan(right) and math.isnan(number)
    if opcode.split(".")[0] in APPROXIMATE or ("approx" in opcode and type_ == "f64"):
        precision = 20 if type_ == "f64" else FORMATS[type_][0]
        return number == right or abs(number - right) <= 2.0 ** (1 - precision) * abs(right) + 2.0 ** (
            FORMATS[type_][1] - precision
        )
    return got == encode(right, type_)


@pytest.mark.parametrize("sources", list(GROUPS), ids=lambda s: "-".join(s))
def test_instructions_on_values(values, sources):
    library, names = values
    opcodes = GROUPS[sources]
    rows = inputs(sources)
    given, out = library.array(rows), library.array(np.zeros((len(opcodes), THREADS), np.uint64))
    assert library.launch(names[sources], 1, THREADS, given, out) == []
    for i, opcode in enumerate(opcodes):
        checked = 0
        for t in range(THREADS):
            operands = tuple(decode(int(rows[t, k]), s) for k, s in enumerate(sources))
            right = semantics.expected(opcode, VALUES[opcode].result, sources, operands)
            if right is not None:
                checked += 1
                got = int(out[i, t])
                assert same(opcode, VALUES[opcode].result, got, right), (
                    f"{opcode} {operands}: got {got:#x}, expected {right}"
                )
        assert checked > THREADS // 2


def test_every_instruction_on_values_is_tested():
    # cvta changes addresses: it is in the tests of memory.
    assert {o for o in VALUES if not o.startswith("cvta")} == {o for group in GROUPS.values() for o in group}
