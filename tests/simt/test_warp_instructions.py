"""The instructions on memory, those that threads carry out together, and those on matrices do what PTX says."""

import ctypes
import itertools

import numpy as np
import pytest

from .actions import ACTIONS
from .executor import PTX_HEAD, load_ptx
from .ptx import SIZES, Unsupported
from .semantics import encode
from .translate import translate

# ---- atomics, copies, and what threads do together: the code of a warp, and what its lanes get -----------------------
LANES = np.arange(32, dtype=np.uint32)
CASES: dict[str, tuple[str, callable]] = {}  # opcode: lines of PTX from %a, %b to %y (32 bits a lane), and numpy's same


def lanes_case(opcode: str, body: str, right) -> None:
    CASES[opcode] = (body, right)


def bits_of_sum(values) -> int:
    return int(np.uint32(sum(int(v) for v in values) & 0xFFFFFFFF))


for t in ("u32", "s32", "u64", "s64", "b32", "b64"):
    wide = t.endswith("64")
    numpy_type = np.dtype({"u": "uint", "s": "int", "b": "uint"}[t[0]] + t[1:])
    step, convert = (8, "cvt.u64.u32 %wa, %a; cvt.u64.u32 %wb, %b;") if wide else (4, "")
    old = "cvt.u32.u64 %y, %wy;" if wide else ""
    x, y, z = ("%wa", "%wb", "%wy") if wide else ("%a", "%b", "%y")
    operations = {"add": lambda a, b: a + b, "min": np.minimum, "max": np.maximum} if t[0] in "us" else {
        "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "exch": lambda a, b: b,
        "cas": lambda a, b: np.where(a == b, b + 1, a).astype(a.dtype),
    }  # fmt: skip
    for (operation, function), space in itertools.product(operations.items(), (".global", ".shared", "")):
        place = {".global": "%mine", ".shared": "%shared", "": "%generic"}[space]
        # Each lane has a place of its own that holds a; the operation with b gives a and leaves the result there.
        where = place if space else "%shared"
        setup = f"{convert} shl.b32 %shared, %lane, 3; st{space or '.shared'}.b{step * 8} [{where}], {x};"
        setup += "cvt.u64.u32 %generic, %shared; cvta.shared.u64 %generic, %generic;"
        operands = f"{y}, %wc" if operation == "cas" and wide else f"{y}, %c" if operation == "cas" else y
        more = "add.u64 %wc, %wb, 1;" if wide else "add.u32 %c, %b, 1;"
        after = f"ld{space}.b{step * 8} {z}, [{place}]; {old} mov.u32 %z, %y;"
        right = lambda a, b, f=function, n=numpy_type: f(a.astype(n), b.astype(n)).astype(np.uint32)  # noqa: E731
        opcode = f"atom{space}.{operation}.{t}"
        lanes_case(opcode, f"{setup} {more} {opcode} {z}, [{place}], {operands}; {old} mov.u32 %d, %y; {after}"
                   "xor.b32 %d, %d, %a; add.u32 %y, %z, %d;", right)  # fmt: skip
        if operation not in ("exch", "cas"):
            opcode = f"red{space}.{operation}.{t}"
            lanes_case(opcode, f"{setup} {opcode} [{place}], {y}; {after} mov.u32 %y, %z;", right)

for mode, place in {
    "bfly": lambda n: LANES ^ n, "up": lambda n: np.where(LANES >= n, LANES - n, LANES),
    "down": lambda n: np.where(LANES + n < 32, LANES + n, LANES), "idx": lambda n: np.full(32, n),
}.items():  # fmt: skip
    clamp = 0 if mode == "up" else 31
    lanes_case(
        f"shfl.sync.{mode}.b32",
        f"shfl.sync.{mode}.b32 %y|%p, %a, 5, {clamp}, -1; selp.b32 %c, 1, 0, %p; xor.b32 %y, %y, %c;",
        lambda a, b, m=mode, f=place: (
            a[f(5)] ^ ((f(5) != LANES) if m in ("up", "down") else np.ones(32)).astype(np.uint32)
        ),
    )
VOTES = "and.b32 %c, %a, 1; setp.ne.u32 %p, %c, 0;"
lanes_case("vote.sync.ballot.b32", f"{VOTES} vote.sync.ballot.b32 %y, %p, -1;",
           lambda a, b: np.full(32, bits_of_sum((a & 1) << LANES), np.uint32))  # fmt: skip
lanes_case("vote.sync.any.pred", f"{VOTES} vote.sync.any.pred %q, %p, -1; selp.b32 %y, 1, 0, %q;",
           lambda a, b: np.full(32, (a & 1).any(), np.uint32))  # fmt: skip
lanes_case("vote.sync.all.pred", f"{VOTES} vote.sync.all.pred %q, %p, -1; selp.b32 %y, 1, 0, %q;",
           lambda a, b: np.full(32, (a & 1).all(), np.uint32))  # fmt: skip
for operation, function in {"add": lambda v: bits_of_sum(v), "min": min, "max": max}.items():
    for t in ("u32", "s32"):
        lanes_case(f"redux.sync.{operation}.{t}", f"redux.sync.{operation}.{t} %y, %a, -1;",
                   lambda a, b, f=function, n="int32" if t[0] == "s" else "uint32":
                   np.full(32, int(f(a.view(n))) & 0xFFFFFFFF, np.uint32))  # fmt: skip
for operation, function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
    lanes_case(f"redux.sync.{operation}.b32", f"redux.sync.{operation}.b32 %y, %a, -1;",
               lambda a, b, f=function: np.full(32, f.reduce(a), np.uint32))  # fmt: skip
lanes_case("activemask.b32", "setp.lt.u32 %p, %lane, 9; mov.u32 %y, 0; @%p activemask.b32 %y;",
           lambda a, b: np.where(LANES < 9, 0x1FF, 0).astype(np.uint32))  # fmt: skip
PASS_ON = (
    "shl.b32 %shared, %lane, 2; st.shared.u32 [%shared], %a; {sync} xor.b32 %shared, %shared, 4;"
    "ld.shared.u32 %y, [%shared];"
)
for opcode, operands in {
    "bar.sync": "0",
    "barrier.sync": "0",
    "barrier.sync.aligned": "0",
    "bar.warp.sync": "-1",
}.items():
    lanes_case(opcode, PASS_ON.format(sync=f"{opcode} {operands};"), lambda a, b: a[LANES ^ 1])
for opcode in [o for o in ACTIONS if o.startswith(("fence", "membar"))]:
    lanes_case(opcode, f"{opcode}; mov.u32 %y, %a;", lambda a, b: a)
for opcode in ("ret", "exit"):
    lanes_case(opcode, f"setp.lt.u32 %p, %lane, 9; st.global.u32 [%to], %a; @%p {opcode}; mov.u32 %y, %b;",
               lambda a, b: np.where(LANES < 9, a, b))  # fmt: skip
for opcode in ("bra", "bra.uni"):
    lanes_case(opcode, f"mov.u32 %y, %a; {opcode} SKIP; mov.u32 %y, %b; SKIP:", lambda a, b: a)
for opcode in [o for o in ACTIONS if o.startswith("cp.async.c") and "commit" not in o]:
    bytes_ = "16" if ".cg." in opcode else "8"
    copy = f"shl.b32 %shared, %lane, 4; {opcode} [%shared], [%mine], {bytes_}, 6; cp.async.wait_all;"
    lanes_case(opcode, f"st.global.u32 [%mine], %a; st.global.u32 [%mine+4], %b; {copy} "
               "ld.shared.v2.u32 {%y, %z}, [%shared]; add.u32 %y, %y, %z;", lambda a, b: a + (b & 0xFFFF))  # fmt: skip
for opcode in ("cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all"):
    wait = "cp.async.wait_all;" if opcode.endswith("all") else "cp.async.commit_group; cp.async.wait_group 0;"
    copy = f"shl.b32 %shared, %lane, 4; cp.async.ca.shared.global [%shared], [%mine], 4; {wait}"
    lanes_case(opcode, f"st.global.u32 [%mine], %a; {copy} ld.shared.u32 %y, [%shared];", lambda a, b: a)


def kernel_of_lanes(name: str, body: str) -> str:
    return "\n".join(
        [
            f".visible .entry {name}(.param .u64 p_in, .param .u64 p_out, .param .u64 p_scratch) {{",
            ".reg .b32 %a, %b, %c, %d, %y, %z, %lane, %shared; .reg .pred %p, %q;",
            ".reg .b64 %in, %to, %mine, %o, %generic, %wa, %wb, %wc, %wy; .shared .align 16 .b8 area[1024];",
            "ld.param.u64 %in, [p_in]; ld.param.u64 %to, [p_out]; ld.param.u64 %mine, [p_scratch];",
            "mov.u32 %lane, %tid.x;",
            "mul.wide.u32 %o, %lane, 4; add.u64 %in, %in, %o; add.u64 %to, %to, %o;",
            "mul.wide.u32 %o, %lane, 16; add.u64 %mine, %mine, %o;",
            "ld.global.u32 %a, [%in]; ld.global.u32 %b, [%in+128];",
            body,
            "st.global.u32 [%to], %y; ret; }",
        ]
    )


@pytest.fixture(scope="module")
def lanes():
    names = {opcode: f"lanes_{i}" for i, opcode in enumerate(CASES)}
    return load_ptx("\n".join(kernel_of_lanes(names[o], body) for o, (body, _) in CASES.items()), "lanes"), names


@pytest.mark.parametrize("order", ["forward", "reversed", 5])
def test_instructions_of_a_warp(lanes, order):
    library, names = lanes
    library.set_orders(order)
    rng = np.random.default_rng(0)
    ab = rng.integers(0, 1 << 32, (2, 32), dtype=np.uint32)
    ab[1, ::3] = ab[0, ::3]
    for opcode, (_, right) in CASES.items():
        out, scratch = library.array(np.zeros(32, np.uint32)), library.array(np.zeros(128, np.uint32))
        assert library.launch(names[opcode], 1, 32, library.array(ab), out, scratch) == [], opcode
        assert np.array_equal(out, np.asarray(right(ab[0], ab[1])).astype(np.uint32)), opcode


# ---- loads and stores: every space, width and type -------------------------------------------------------------------
def memory_opcodes(name: str) -> list[str]:
    return [o for o in ACTIONS if o.startswith(name + ".")]


@pytest.fixture(scope="module")
def memory():
    loads = memory_opcodes("ld")
    text = [f".const .align 16 .b8 table[64] = {{{', '.join(str(7 * i + 130 & 255) for i in range(64))}}};"]
    text += [kernel_of_load(f"load_{i}", opcode) for i, opcode in enumerate(loads)]
    text += [kernel_of_store(f"store_{i}", opcode) for i, opcode in enumerate(memory_opcodes("st"))]
    return load_ptx("\n".join(text), "memory")


def vector_of(opcode: str) -> tuple[int, str]:
    modifiers = opcode.split(".")
    return next((int(m[1]) for m in modifiers if m in ("v2", "v4")), 1), modifiers[-1]


MEMORY_HEAD = (
    "(.param .u64 p_in, .param .u64 p_out, .param .align 16 .b8 bytes[64]) {{ .reg .b64 %in, %out, %place;"
    " .reg .b32 %w;"
    " .shared .align 16 .b8 area[64]; .local .align 16 .b8 depot[64]; .reg .{type} %x<4>;"
    " ld.param.u64 %in, [p_in]; ld.param.u64 %out, [p_out];"
)
PLACES = {"global": "%in", "shared": "%place", "local": "%place", "const": "%place", "param": "bytes"}


def space(opcode: str) -> str:
    return next((m for m in opcode.split(".") if m in PLACES), "generic")


def copied(to: str, source: str, to_space: str, source_space: str) -> str:
    """Sixteen words from one place to another."""
    return " ".join(
        f"ld{source_space}.b32 %w, [{source}+{4 * i}]; st{to_space}.b32 [{to}+{4 * i}], %w;" for i in range(16)
    )


def register_of(type_: str) -> str:
    return {"b8": "b16", "u8": "b16", "s8": "b16"}.get(type_, type_)


def kernel_of_load(name: str, opcode: str) -> str:
    n, type_ = vector_of(opcode)
    where = space(opcode)
    setup = {
        "shared": "mov.u64 %place, area;" + copied("%place", "%in", ".shared", ".global"),
        "local": "mov.u64 %place, depot;" + copied("%place", "%in", ".local", ".global"),
        "const": "mov.u64 %place, table;", "generic": "mov.u64 %place, %in;",
    }.get(where, "")  # fmt: skip
    names = ", ".join(f"%x{i}" for i in range(n))
    load = f"{opcode} {'{' + names + '}' if n > 1 else names}, [{PLACES.get(where, '%place')}+{16}];"
    size = SIZES[type_]
    stores = " ".join(f"st.global.{type_} [%out+{i * size}], %x{i};" for i in range(n))
    return f".visible .entry {name}{MEMORY_HEAD.format(type=register_of(type_))} {setup} {load} {stores} ret; }}"


def kernel_of_store(name: str, opcode: str) -> str:
    n, type_ = vector_of(opcode)
    where, size = space(opcode), SIZES[type_]
    loads = " ".join(f"ld.global.{type_} %x{i}, [%in+{16 + i * size}];" for i in range(n))
    names = ", ".join(f"%x{i}" for i in range(n))
    value = "{" + names + "}" if n > 1 else names
    head = f".visible .entry {name}{MEMORY_HEAD.format(type=register_of(type_))}"
    if where in ("global", "generic"):
        return f"{head} {loads} {opcode} [%out], {value}; ret; }}"
    place = "area" if where == "shared" else "depot"
    body = f"mov.u64 %place, {place}; {loads} {opcode} [%place+16], {value};"
    back = " ".join(
        f"ld.{where}.{type_} %x{i}, [%place+{16 + i * size}]; st.global.{type_} [%out+{i * size}], %x{i};"
        for i in range(n)
    )
    return f"{head} {body} {back} ret; }}"


class Bytes64(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * 64)]


def test_loads_and_stores(memory):
    given = np.array([7 * i + 130 & 255 for i in range(64)], np.uint8)
    parameter = Bytes64((ctypes.c_uint8 * 64)(*given.tolist()))
    for name, prefix in (("ld", "load"), ("st", "store")):
        for i, opcode in enumerate(memory_opcodes(name)):
            n, type_ = vector_of(opcode)
            bytes_ = n * SIZES[type_]
            if bytes_ > 16:
                continue  # no such vector
            out = memory.array(np.zeros(64, np.uint8))
            assert memory.launch(f"{prefix}_{i}", 1, 1, memory.array(given), out, parameter) == [], opcode
            assert np.array_equal(out[:bytes_], given[16 : 16 + bytes_]) and not out[bytes_:].any(), opcode


def test_loads_extend_to_wider_registers():
    text = """.visible .entry extend(.param .u64 p_in, .param .u64 p_out) { .reg .b64 %in, %out, %x; .reg .b32 %y;
    ld.param.u64 %in, [p_in]; ld.param.u64 %out, [p_out];
    ld.global.s8 %x, [%in]; st.global.b64 [%out], %x; ld.global.u8 %x, [%in]; st.global.b64 [%out+8], %x;
    ld.global.s16 %y, [%in]; st.global.b32 [%out+16], %y; ld.global.u16 %y, [%in]; st.global.b32 [%out+20], %y;
    ret; }"""
    library = load_ptx(text, "extend")
    out = library.array(np.zeros(24, np.uint8))
    assert library.launch("extend", 1, 1, library.array(np.full(8, 0x85, np.uint8)), out) == []
    assert out[:16].view(np.int64).tolist() == [-123, 133] and out[16:].view(np.int32).tolist() == [-31355, 34181]


# ---- matrices --------------------------------------------------------------------------------------------------------
def matrix_kernel(name: str, opcode: str) -> str:
    if opcode.startswith("ldmatrix"):
        n = int(next(m for m in opcode.split(".") if m in ("x1", "x2", "x4"))[1])
        names = ", ".join(f"%x{i}" for i in range(n))
        row = "{%x0, %x1, %x2, %x3}"
        copy = f"shl.b32 %s, %t, 4; ld.global.v4.b32 {row}, [%in]; st.shared.v4.b32 [%s], {row};"
        body = f"{copy} bar.warp.sync -1; {opcode} {{{names}}}, [%s];"
        body += " ".join(f"st.global.b32 [%out+{4 * i}], %x{i};" for i in range(n))
    elif opcode.startswith("movmatrix"):
        body = f"ld.global.b32 %x0, [%in]; {opcode} %x1, %x0; st.global.b32 [%out], %x1;"
    else:
        a, b = (4, 2) if "k16" in opcode else (2, 1)
        loads = " ".join(f"ld.global.b32 %x{i}, [%in+{4 * i}];" for i in range(6))
        loads += " ".join(f"ld.global.f32 %f{i}, [%out+{4 * i}];" for i in range(4))
        f = "{%f0, %f1, %f2, %f3}"
        registers_a, registers_b = (", ".join(f"%x{i}" for i in r) for r in (range(a), range(4, 4 + b)))
        body = f"{loads} {opcode} {f}, {{{registers_a}}}, {{{registers_b}}}, {f};"
        body += " ".join(f"st.global.f32 [%out+{4 * i}], %f{i};" for i in range(4))
    return "\n".join(
        [
            f".visible .entry {name}(.param .u64 p_in, .param .u64 p_out) {{ .reg .b64 %in, %out, %o;",
            ".reg .b32 %t, %s, %x<6>;",
            ".reg .f32 %f<4>; .shared .align 16 .b8 area[512]; ld.param.u64 %in, [p_in]; ld.param.u64 %out, [p_out];",
            f"mov.u32 %t, %tid.x; mul.wide.u32 %o, %t, {24 if opcode.startswith('mma') else 16}; add.u64 %in, %in, %o;",
            "mul.wide.u32 %o, %t, 16; add.u64 %out, %out, %o;",
            body,
            "ret; }",
        ]
    )


MATRIX = [o for o in ACTIONS if o.startswith(("ldmatrix", "movmatrix", "mma"))]


@pytest.fixture(scope="module")
def matrices():
    return load_ptx("\n".join(matrix_kernel(f"matrix_{i}", o) for i, o in enumerate(MATRIX)), "matrices")


ROW, COLUMN = (
    np.arange(32) // 4,
    np.arange(32) % 4 * 2,
)  # of the fragment of a lane: PTX manual, figures of mma.m16n8k16


def fragments(matrix: np.ndarray) -> np.ndarray:
    """(32, registers, 2): the halves that each lane holds of an 8 x 8 block, blocks down first."""
    blocks = [matrix[r : r + 8, c : c + 8] for c in range(0, matrix.shape[1], 8) for r in range(0, matrix.shape[0], 8)]
    return np.stack([np.stack([b[ROW, COLUMN], b[ROW, COLUMN + 1]], -1) for b in blocks], 1)


@pytest.mark.parametrize("opcode", MATRIX)
def test_instructions_on_matrices(matrices, opcode):
    rng = np.random.default_rng(0)
    kernel = f"matrix_{MATRIX.index(opcode)}"
    if opcode.startswith("ldmatrix"):
        n = int(next(m for m in opcode.split(".") if m in ("x1", "x2", "x4"))[1])
        blocks = rng.integers(0, 1 << 16, (4, 8, 8), dtype=np.uint16)
        out = matrices.array(np.zeros((32, 4, 2), np.uint16))
        assert matrices.launch(kernel, 1, 32, matrices.array(blocks), out) == []
        right = [fragments(b.T if ".trans" in opcode else b)[:, 0] for b in blocks[:n]]
        assert np.array_equal(out[:, :n], np.stack(right, 1)) and not out[:, n:].any()
        return
    if opcode.startswith("movmatrix"):
        block = rng.integers(0, 1 << 16, (8, 8), dtype=np.uint16)
        given, out = np.zeros((32, 8), np.uint16), matrices.array(np.zeros((32, 8), np.uint16))
        given[:, :2] = fragments(block)[:, 0]
        assert matrices.launch(kernel, 1, 32, matrices.array(given), out) == []
        assert np.array_equal(out[:, :2], fragments(block.T)[:, 0])
        return
    depth, type_ = 16 if "k16" in opcode else 8, "bf16" if "bf16" in opcode else "f16"
    # Small integers: every product and sum is exact, so the order of the additions is nothing.
    a, b = rng.integers(-8, 9, (16, depth)), rng.integers(-8, 9, (depth, 8))
    c = rng.integers(-99, 99, (16, 8))
    encoded = np.vectorize(lambda v: encode(float(v), type_))
    given = np.zeros((32, 6, 2), np.uint16)
    given[:, : depth // 4] = fragments(encoded(a))
    given[:, 4 : 4 + depth // 8] = fragments(encoded(b).T)[:, : depth // 8]
    out = matrices.array(fragments(c).reshape(32, 4).astype(np.float32))
    assert matrices.launch(kernel, 1, 32, matrices.array(given), out) == []
    assert np.array_equal(out, fragments(a @ b + c).reshape(32, 4))


# ---- all of them, and nothing else -----------------------------------------------------------------------------------
def test_every_instruction_has_its_test():
    tested = {*CASES, *MATRIX, *memory_opcodes("ld"), *memory_opcodes("st")}
    assert set(ACTIONS) - tested == {"trap"}  # in test_checks.py


@pytest.mark.parametrize(
    "statement", ["wgmma.fence.sync.aligned;", "red.global.add.f32 [%p], %x;", "add.cc.u32 %y, %y, %y;"]
)
def test_other_instructions_are_unsupported_and_named(statement):
    kernel = f".visible .entry k(.param .u64 p) {{\n.loc 1 42 7\n.reg .b32 %y; {statement} ret; }}"
    text = f'{PTX_HEAD}{kernel}\n.file 1 "a/b.cu"\n'
    with pytest.raises(Unsupported, match=r"k, a/b.cu:42: " + statement.split()[0].strip(";").replace(".", r"\.")):
        translate(text)
