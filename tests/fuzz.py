"""Random shapes, strides, dtypes and masks: every operator against its reference, by the rules of tests/ops.

    python -m tests.fuzz --seconds 60 --seed 0
    python -m tests.fuzz --seed 0 --case 17      # that case alone, as a failure says

A case depends on the seed and its number only, not on the time or the machine. In float64 values and gradients equal
the reference to rounding; widths of one to seven channels are drawn there only. In a lower dtype the error rule holds,
for a gradient as a whole. The rule compares two largest errors, of which PyTorch's may be small by luck: a case fails
where one of two more draws of values, of the same shape, strides and dtype, breaks the rule too.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from convdit import ops, reference
from convdit.sparse import ActiveSites
from tests.ops import (
    harness,
    test_adaln,
    test_attention,
    test_convnext_block,
    test_depthwise_conv,
    test_gelu_tanh,
    test_grn,
)
from tests.ops import test_sparse_depthwise_conv as test_sparse
from tests.ops.harness import Case

Draw = random.Random
MAP_SITES = 600  # of a map, so that a case takes milliseconds
SHORT = 8  # channels; a row of fewer has too few errors to compare their largest


def _map(draw: Draw) -> tuple[int, int, int, int]:
    height = draw.randint(1, 40)
    return draw.randint(1, 3), height, draw.randint(1, max(1, MAP_SITES // height)), draw.randint(1, 70)


def _kernel(draw: Draw) -> int:
    return draw.choice((1, 3, 5, 7, 7, 7, 9, 11))


def _sequence(draw: Draw) -> tuple[int, int, int]:
    return draw.randint(1, 4), draw.randint(1, 70), draw.randint(2, 300)


def _sites(draw: Draw) -> ActiveSites:
    """Any mask, from none visible to all, of sites or of patches."""
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    visible = torch.rand(draw.randint(1, 4), draw.randint(1, 9), draw.randint(1, 9), generator=generator)
    visible = visible < draw.choice((0, 0.1, 0.4, 0.9, 1))
    block = draw.choice((1, 1, 2, 4))
    return ActiveSites.from_mask(visible) if block == 1 else ActiveSites.from_patch_mask(~visible, block)


def _heads(draw: Draw) -> tuple[int, int, int, int]:
    return draw.randint(1, 3), draw.randint(1, 70), draw.randint(1, 4), draw.randint(1, 70)


def _block(draw: Draw) -> Case:
    n, h, w, c = _map(draw)
    c = min(c, 40)
    return test_convnext_block.block_case(n, h, w, c, kernel=_kernel(draw), hidden=draw.randint(c, 4 * c))


OPERATORS: dict[str, Callable[[Draw], Case]] = {
    "layer_norm_modulate": lambda draw: test_adaln.modulate_case(*_sequence(draw)),
    "gated_residual": lambda draw: test_adaln.gated_case(*_sequence(draw)),
    "gated_residual_layer_norm_modulate": lambda draw: test_adaln.fused_case(*_sequence(draw)),
    "packed_attention": lambda draw: test_attention.packed_case(*_heads(draw)),
    "adaln_zero_attention": lambda draw: test_attention.block_case(*_heads(draw), bias=draw.random() < 0.7),
    "depthwise_conv2d": lambda draw: test_depthwise_conv.conv_case(*_map(draw), _kernel(draw), draw.random() < 0.7),
    "depthwise_conv2d_layer_norm": lambda draw: test_depthwise_conv.norm_case(*_map(draw), _kernel(draw)),
    "sparse_depthwise_conv2d": lambda draw: test_sparse.case(
        _sites(draw), draw.randint(1, 70), _kernel(draw), draw.random() < 0.7
    ),
    "grn": lambda draw: test_grn.dense_case("grn", *_map(draw)),
    "gelu_grn": lambda draw: test_grn.dense_case("gelu_grn", *_map(draw)),
    "gelu_tanh": lambda draw: test_gelu_tanh.gelu_case(*_map(draw)),
    "sparse_grn": lambda draw: test_grn.packed_case(
        "grn", _sites(draw), draw.randint(1, 70), draw.choice(("sample", "batch"))
    ),
    "sparse_gelu_grn": lambda draw: test_grn.packed_case(
        "gelu_grn", _sites(draw), draw.randint(1, 70), draw.choice(("sample", "batch"))
    ),
    "convnext_block": _block,
}
PLAIN = {"packed_attention": test_attention.plain_attention, "adaln_zero_attention": test_attention.plain_block}


def _gaps(t: Tensor) -> Tensor:
    return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "gaps": _gaps,  # NaN between the elements
    "axes reversed": harness.permuted,
}


def run_case(seed: int, number: int) -> str:
    """Draws and checks one case; returns the operator's name. Raises AssertionError, naming the case."""
    draw = Draw(f"{seed}/{number}")
    names = [*OPERATORS, "neighbors"]
    name = names[number % len(names)]
    if name == "neighbors":
        sites, radius = _sites(draw), draw.randint(0, 4)
        arguments = (sites.indices, sites.batch_size, *sites.spatial_shape, radius)
        assert torch.equal(ops.neighbors(*arguments), reference.neighbors(*arguments)), f"neighbors{arguments[1:]}"
        return name
    case = OPERATORS[name](draw)
    layouts = [draw.choice(list(LAYOUTS)) for _ in range(12)]
    operator, make = case.op, case.make

    def op(*args, **kwargs):
        moved = (LAYOUTS[way](a) if isinstance(a, Tensor) else a for way, a in zip(layouts, args, strict=False))
        return operator(*moved, **kwargs)

    def check(data: int) -> None:
        drawn = replace(case, name=f"{case.name.strip()} {layouts}", op=op, make=lambda g: make(g.manual_seed(data)))
        if dtype == torch.float64:
            harness.assert_equals_reference(drawn)
        else:
            plain = replace(drawn, reference=PLAIN.get(name, case.reference))
            harness.assert_error_rule(plain, dtype, whole_gradients=True)

    width = make(torch.Generator())[0].shape[-1]
    dtype = torch.float64 if width < SHORT else draw.choice((torch.float64, *harness.LOW_DTYPES))
    values = [draw.getrandbits(32) for _ in range(3)]
    try:
        check(values[0])
    except AssertionError:
        if dtype == torch.float64:
            raise
        check(values[1])
        check(values[2])
    return name


def fuzz(seconds: float, seed: int) -> Counter[str]:
    """Cases 0, 1, 2, ... until the time is over; how many of each operator held."""
    held: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number = held.total()
        try:
            held[run_case(seed, number)] += 1
        except Exception as error:
            again = f"python -m tests.fuzz --seed {seed} --case {number}"
            raise AssertionError(f"case {number} fails; once more: {again}\n{error}") from error
    return held


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this case alone")
    options = parser.parse_args()
    if options.case is not None:
        print(f"{run_case(options.seed, options.case)}: holds")
        return 0
    try:
        held = fuzz(options.seconds, options.seed)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{held.total()} cases hold: " + ", ".join(f"{name} {count}" for name, count in sorted(held.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
