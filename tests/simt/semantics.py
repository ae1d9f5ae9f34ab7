"""What PTX's instructions on values mean, in Python's exact numbers: from the PTX manual, apart from the translator.

`expected(opcode, types, operands)` takes and gives numbers: int for integers, predicates and bits, float for every
floating-point type (a pair of them for f16x2, bf16x2 and f32x2). None: PTX leaves the result open.
"""

from __future__ import annotations

import math
import operator
import struct
from decimal import Decimal, localcontext
from fractions import Fraction

BITS = {f"{kind}{bits}": bits for kind in "usb" for bits in (8, 16, 32, 64)} | {"pred": 1}
# Bits of the significand (the hidden one counted), least exponent of a normal number.
FORMATS = {"f16": (11, -14), "bf16": (8, -126), "f32": (24, -126), "f64": (53, -1022)}
NAN = math.nan


def wrapped(x: int, type_: str) -> int:
    x &= (1 << BITS[type_]) - 1
    return x - (1 << BITS[type_]) if type_[0] == "s" and x >> (BITS[type_] - 1) else x


def rounded(x: Fraction | float, type_: str, way: str = "rn") -> float:
    """x to the nearest number of a format (ties to even), or the one towards a side."""
    if isinstance(x, float) and not math.isfinite(x):
        return x
    negative, x = (math.copysign(1, x) < 0 if isinstance(x, float) else x < 0), Fraction(x)
    if x == 0:
        return -0.0 if negative else 0.0
    precision, least = FORMATS[type_]
    exponent = max(math.frexp(_float(abs(x)))[1] - 1, least)
    exponent += abs(x) >= Fraction(2) ** (exponent + 1)
    exponent -= abs(x) < Fraction(2) ** exponent and exponent > least
    step = Fraction(2) ** (exponent - precision + 1)
    units = abs(x) / step
    whole, rest = units.numerator // units.denominator, units - units.numerator // units.denominator
    up = {"rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1), "rz": False,
          "rm": negative and rest > 0, "rp": not negative and rest > 0}[way]  # fmt: skip
    value = (whole + up) * step
    largest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** (1 - least)
    if value > largest:
        to_largest = way == "rz" or (way == "rm" and not negative) or (way == "rp" and negative)
        value = largest if to_largest else math.inf
    return -float(value) if negative else float(value)


def _float(x: Fraction) -> float:
    try:
        return float(x) or math.ulp(0.0)
    except OverflowError:
        return 1.7e308


def encode(x: float, type_: str) -> int:
    """The bits of a number that the format holds exactly."""
    if type_ == "bf16":
        return struct.unpack("<I", struct.pack("<f", x))[0] >> 16
    letter, integer = {"f16": ("e", "H"), "f32": ("f", "I"), "f64": ("d", "Q")}[type_]
    return struct.unpack("<" + integer, struct.pack("<" + letter, x))[0]


def decode(bits: int, type_: str) -> int | float | tuple[float, float]:
    if type_.endswith("x2"):
        half = 32 if type_ == "f32x2" else 16
        return decode(bits & (1 << half) - 1, type_[:-2]), decode(bits >> half, type_[:-2])
    if type_ == "bf16":
        return struct.unpack("<f", struct.pack("<I", (bits & 0xFFFF) << 16))[0]
    if type_ in ("f16", "f32", "f64"):
        letter, size = {"f16": ("e", 2), "f32": ("f", 4), "f64": ("d", 8)}[type_]
        return struct.unpack("<" + letter, (bits & (1 << 8 * size) - 1).to_bytes(size, "little"))[0]
    return wrapped(bits, type_)


def flushed(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def saturated(x: float) -> float:
    """Between 0 and 1; NaN and -0 give 0."""
    return min(x, 1.0) if x > 0 else 0.0


# ---- floating point ------------------------------------------------------------------------------------------------
def exact(operation: str, *x: float) -> Fraction | float:
    """A sum, product, quotient or fused multiply-add without rounding; infinities and NaN as IEEE 754 has them."""
    if operation in ("fma", "mad"):
        product = exact("mul", x[0], x[1])
        if product == 0 and x[2] == 0:
            return math.copysign(0.0, x[0]) * math.copysign(1, x[1]) + x[2]
        if isinstance(product, float) and not math.isfinite(product):
            return product + x[2]
        return x[2] if not math.isfinite(x[2]) else product + Fraction(x[2])
    a, b = x
    if operation == "sub":
        return exact("add", a, -b)
    if not (math.isfinite(a) and math.isfinite(b)) or (operation == "div" and b == 0):
        if operation == "div":
            sign = math.copysign(1, a) * math.copysign(1, b)
            if math.isnan(a) or math.isnan(b) or (a == b == 0) or (math.isinf(a) and math.isinf(b)):
                return NAN
            return sign * (0.0 if math.isinf(b) else math.inf)
        return a + b if operation == "add" else a * b
    if operation == "add":
        return a + b if a == b == 0 or a == -b else Fraction(a) + Fraction(b)
    if operation == "mul":
        return a * b if a == 0 or b == 0 else Fraction(a) * Fraction(b)
    return a / b if a == 0 else Fraction(a) / Fraction(b)


def root(x: float) -> Fraction | float:
    if x < 0 or math.isnan(x):
        return NAN
    if x in (0, math.inf):
        return x
    with localcontext() as context:
        context.prec = 80
        return Fraction(Decimal(x).sqrt())


def transcendental(name: str, x: float) -> float | Fraction:
    if math.isnan(x):
        return NAN
    if name == "rcp":
        return exact("div", 1.0, x)
    if name == "sqrt":
        return root(x)
    if name == "rsqrt":
        if x == 0:
            return math.copysign(math.inf, x)
        r = root(x)
        return r if r != r else (0.0 if r == math.inf else 1 / r)
    if name == "ex2":
        return math.inf if x > 1024 else 0.0 if x < -1100 else math.exp2(x)
    if name == "lg2":
        return NAN if x < 0 else -math.inf if x == 0 else math.inf if math.isinf(x) else math.log2(x)
    if name == "tanh":
        return math.tanh(x)
    return NAN if math.isinf(x) else {"sin": math.sin, "cos": math.cos}[name](x)


def smaller(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return min((a, b), key=lambda x: (x, math.copysign(1, x)))


def floating(opcode: str, type_: str, x: tuple) -> float | None:
    name, *modifiers = opcode.split(".")
    ftz = "ftz" in modifiers and type_ == "f32"
    x = tuple(flushed(v) if ftz and isinstance(v, float) else v for v in x)
    way = next((m for m in modifiers if m in ("rm", "rp", "rz")), "rn")
    if name in ("add", "sub", "mul", "fma", "div"):
        result = rounded(exact(name, *x), type_, way)
        if way == "rm" and result == 0 and math.copysign(1, x[0]) * math.copysign(1, x[1]) != math.copysign(1, x[2]):
            result = -0.0  # zeros of different signs, rounded down
    elif name in ("min", "max"):
        if "NaN" in modifiers and any(math.isnan(v) for v in x):
            return NAN
        result = smaller(*x) if name == "min" else -smaller(-x[0], -x[1])
    elif name == "neg":
        result = -x[0]
    elif name == "abs":
        result = abs(x[0])
    elif name == "copysign":
        result = math.copysign(x[1], x[0])
    else:
        result = rounded(transcendental(name, x[0]), type_)
    if "sat" in modifiers:
        result = saturated(result)
    return flushed(result) if ftz else result


# ---- integers ------------------------------------------------------------------------------------------------------
def integer(opcode: str, type_: str, x: tuple) -> int | None:
    name, *modifiers = opcode.split(".")
    bits = BITS[type_]
    a, b, c, d = (*x, 0, 0, 0)[:4]
    if name in ("mul", "mad"):
        product = a * b >> bits if "hi" in modifiers else a * b
        return product + (c if name == "mad" else 0)
    if name in ("div", "rem"):
        if b == 0:
            return None
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        return quotient if name == "div" else a - quotient * b
    if name in ("shl", "shr"):
        return (a << min(b, 64)) if name == "shl" else a >> min(b, 64)
    if name == "shf":
        n = c % 32 if "wrap" in modifiers else min(c, 32)
        both = b << 32 | a
        return both << n >> 32 if "l" in modifiers else both >> n
    if name == "bfe":
        position, length = b & 255, c & 255
        if length == 0:
            return 0
        field = (a >> position) & ((1 << length) - 1)  # a is as wide as Python likes: beyond the top comes the sign
        top = min(position + length - 1, bits - 1)
        return field - (1 << length) if type_[0] == "s" and a >> top & 1 else field
    if name == "bfi":
        position, length = c & 255, d & 255
        mask = ((1 << length) - 1) << position & ((1 << bits) - 1)
        return b & ~mask | a << position & mask
    if name == "prmt":
        given = (b << 32 | a).to_bytes(8, "little")
        chosen = [given[c >> 4 * i & 7] if not c >> 4 * i & 8 else 255 * (given[c >> 4 * i & 7] >> 7) for i in range(4)]
        return int.from_bytes(bytes(chosen), "little")
    if name == "lop3":
        return sum((d >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))
    unary = {
        "neg": lambda: -a, "abs": lambda: abs(a), "not": lambda: 1 - a if type_ == "pred" else ~a, "mov": lambda: a,
        "popc": lambda: a.bit_count(), "clz": lambda: bits - a.bit_length(),
        "brev": lambda: int(f"{a:0{bits}b}"[::-1], 2),
    }  # fmt: skip
    if name in unary:
        return unary[name]()
    binary = {"add": operator.add, "sub": operator.sub, "min": min, "max": max, "and": operator.and_,
              "or": operator.or_, "xor": operator.xor}  # fmt: skip
    return binary[name](a, b)


def comparison(opcode: str, type_: str, x: tuple) -> int:
    _, name, *rest = opcode.split(".")
    a, b = x[:2]
    if type_ in FORMATS:
        if "ftz" in rest:
            a, b = flushed(a), flushed(b)
        unordered = math.isnan(a) or math.isnan(b)
        if name in ("num", "nan"):
            result = unordered == (name == "nan")
        else:
            result = name.endswith("u") if unordered else getattr(operator, name[:2])(a, b)
    else:
        result = getattr(operator, {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name))(a, b)
    combine = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
    return combine[rest[0]](int(result), x[2]) if rest[0] in combine else int(result)


def conversion(opcode: str, result: str, source: str, x: tuple) -> int | float | tuple:
    _, *modifiers = opcode.split(".")
    a = x[0]
    if "ftz" in modifiers and source == "f32":
        x = tuple(flushed(v) for v in x)
        a = x[0]
    if result.endswith("x2"):
        return rounded(x[1], result[:-2]), rounded(x[0], result[:-2])
    way = next((m for m in modifiers if m in ("rni", "rzi", "rmi", "rpi")), None)
    if way and math.isfinite(a):
        whole = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[way](a)
        a = float(whole) if whole or result not in FORMATS else math.copysign(0.0, a)
        a = whole if result not in FORMATS else a
    if result in FORMATS:
        value = rounded(a if isinstance(a, float) else Fraction(a), result)
        if "sat" in modifiers:
            value = saturated(value)
        return flushed(value) if "ftz" in modifiers and result == "f32" else value
    if source in FORMATS:
        low, high = wrapped(1 << (BITS[result] - 1), result), (1 << (BITS[result] - (result[0] == "s"))) - 1
        low = low if result[0] == "s" else 0
        if math.isnan(a):
            return 0
        return min(max(a, low), high) if math.isfinite(a) else (high if a > 0 else low)
    return a


def expected(opcode: str, result: str, sources: tuple[str, ...], x: tuple):
    name = opcode.split(".")[0]
    if name == "cvta":
        return None  # addresses: tested where memory is
    if name == "setp":
        return comparison(opcode, sources[0], x)
    if name == "selp":
        return x[0] if x[2] else x[1]
    if name == "cvt":
        return conversion(opcode, result, sources[0], x)
    if name == "mov":
        return x[0]
    if sources[0].endswith("x2"):
        return tuple(floating(opcode, sources[0][:-2], tuple(v[i] for v in x)) for i in range(2))
    if sources[0] in FORMATS:
        return floating(opcode, sources[0], x)
    return wrapped(integer(opcode, sources[0], x), result) if integer(opcode, sources[0], x) is not None else None
