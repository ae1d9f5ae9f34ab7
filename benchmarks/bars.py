"""What a row must reach, and aims at: the best rival's time over ours, or ours over our own dense operator's.

Set on a Zen 4 with AVX-512, in float32 (bfloat16 where the operator's name is followed by it), on one thread and tuned
malloc. On another machine they are a guide: without AVX-512 the vector units are half as wide, and PyTorch's kernels
lose less than ours do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bar:
    must: float
    aim: float | None = None
    at_most: bool = False  # ours over the rival's: lower is better

    def met(self, ratio: float, margin: float = 1) -> bool:
        """`margin` times over."""
        return ratio * margin <= self.must if self.at_most else ratio >= self.must * margin


def _bars(must: str, aim: str, at_most: bool = False) -> list[Bar]:
    return [Bar(float(m), float(a), at_most) for m, a in zip(must.split(), aim.split(), strict=True)]


MAPS = ("C=96, 56x56", "C=192, 28x28", "C=384, 14x14", "C=768, 7x7", "C=40, 56x56")
BLOCKS = ("block 8, C=96", "block 4, C=192", "block 2, C=384", "block 1, C=768")
HIDDEN = ("C=384, 56x56", "C=768, 28x28", "C=1536, 14x14", "C=3072, 7x7", "C=160, 56x56")
DIT = ("S/2", "XL/2")
MODELS = ("tiny", "atto")

# (operator, pass, against): shapes, and a bar each
_TABLE = {
    ("depthwise_conv2d", "forward", "PyTorch"): (MAPS, _bars("1.4 1.8 1.6 1.9 1.1", "1.7 2.0 2.0 2.2 1.5")),
    ("depthwise_conv2d", "input_grad", "PyTorch"): (MAPS, _bars("1.6 2.4 2.8 3.5 1.5", "2.0 2.8 3.2 4.0 2.0")),
    ("depthwise_conv2d", "weight_grad", "PyTorch"): (MAPS, _bars("10 12 20 50 10", "13 16 25 70 14")),
    ("sparse_depthwise_conv2d", "forward", "own dense"): (
        BLOCKS, _bars("0.30 0.28 0.36 0.70", "0.26 0.24 0.28 0.45", at_most=True)),
    ("sparse_depthwise_conv2d", "forward", "PyTorch"): (BLOCKS, _bars("5 6 5 2.7", "6 8 6 4")),
    ("sparse_depthwise_conv2d", "input_grad", "own dense"): (
        BLOCKS, _bars("0.40 0.40 0.40 0.70", "0.32 0.32 0.32 0.50", at_most=True)),
    ("sparse_depthwise_conv2d", "weight_grad", "own dense"): (
        BLOCKS, _bars("0.40 0.40 0.40 0.70", "0.32 0.32 0.32 0.50", at_most=True)),
    ("gelu_grn", "forward", "PyTorch"): (HIDDEN, _bars("2.5 " * 5, "4 " * 5)),
    ("gelu_grn", "backward", "PyTorch"): (HIDDEN, _bars("3 " * 5, "4 " * 5)),
    ("layer_norm_modulate", "forward", "PyTorch"): (DIT, _bars("2.4 5", "3 6")),
    ("layer_norm_modulate", "backward", "PyTorch"): (DIT, _bars("1.8 2", "2.3 2.5")),
    ("gated_residual", "forward", "PyTorch"): (DIT, _bars("1.15 1.15", "1.5 1.5")),
    ("gated_residual", "backward", "PyTorch"): (DIT, _bars("1 1", "1.3 1.3")),
    ("gated_residual_layer_norm_modulate", "forward", "PyTorch"): (DIT, _bars("2.5 2.5", "3.5 3.5")),
    ("gated_residual_layer_norm_modulate", "backward", "PyTorch"): (DIT, _bars("2 2", "2.5 2.5")),
    ("ConvNeXt V2 block", "forward", "PyTorch"): (MAPS, _bars("1.35 1.22 1.10 1.04 1.5", "1.5 1.3 1.13 1.08 1.8")),
    ("ConvNeXt V2 block", "step", "PyTorch"): (MAPS, _bars("1.5 1.35 1.2 1.1 1.7", "1.8 1.45 1.25 1.13 2.1")),
    ("ConvNeXt V2 block bfloat16", "forward", "PyTorch"): ((MAPS[0], MAPS[2]), _bars("1.5 1.15", "1.8 1.25")),
    ("ConvNeXt V2 model", "forward", "PyTorch"): (MODELS, _bars("1.13 1.3", "1.25 1.6")),
    ("ConvNeXt V2 model", "step", "PyTorch"): (MODELS, _bars("1.25 1.4", "1.4 1.7")),
    ("FCMAE model", "step", "PyTorch"): (MODELS, _bars("2.2 2.2", "3 3")),
    ("FCMAE encoder blocks", "step", "PyTorch"): (MODELS, _bars("3.0 3.5", "3.5 4.2")),
    ("DiT block", "forward", "PyTorch"): (DIT, _bars("1.04 1.02", "1.08 1.05")),
    ("DiT block", "step", "PyTorch"): (DIT, _bars("1.03 1.00", "1.07 1.03")),
    ("accelerated timm", "forward", "PyTorch"): (MODELS, _bars("1.1 1.25", "1.25 1.6")),
    ("accelerated timm", "step", "PyTorch"): (MODELS, _bars("1.2 1.35", "1.4 1.7")),
    ("accelerated timm, compiled", "forward", "PyTorch"): (MODELS, _bars("1 1", "1.05 1.05")),
    ("accelerated diffusers", "forward", "PyTorch"): (DIT[:1], _bars("1.03", "1.06")),
    ("accelerated diffusers, compiled", "forward", "PyTorch"): (DIT[:1], _bars("1", "1.05")),
    ("packed diffusers", "forward", "PyTorch"): (DIT[:1], _bars("1.03", "1.06")),
    ("packed diffusers, compiled", "forward", "PyTorch"): (DIT[:1], _bars("1", "1.05")),
    ("packed_attention", "forward", "PyTorch"): (DIT, _bars("1 1", "1.1 1.1")),
    ("packed_attention", "backward", "PyTorch"): (DIT, _bars("1 1", "1.05 1.05")),
}  # fmt: skip
BARS = {(*key, shape): bar for key, (shapes, bars) in _TABLE.items() for shape, bar in zip(shapes, bars, strict=True)}
SCALING = Bar(1.7)  # two threads against one, every row above a millisecond
COVERAGE = Bar(0.95)  # every cell of the grid against eager
OVERHEAD = Bar(1)  # what a call may cost over what it costs
# Peak memory: a step's over eager's; what a block's inference needs beside its result over one image's hidden tensor.
MEMORY = {"PyTorch": Bar(1, at_most=True), "one hidden image": Bar(2, at_most=True)}


def find_bar(operator: str, what: str, against: str, shape: str, dtype: torch.dtype, unit: str = "ms") -> Bar | None:
    """The bar of a row, if it has one. A row's shape may say more than the table's, after a semicolon."""
    if unit == "MB":
        return MEMORY[against]
    if unit == "us":
        return OVERHEAD
    if against == "one thread":
        return SCALING
    if against == "eager":
        return COVERAGE
    name = operator if dtype == torch.float32 else f"{operator} {str(dtype).removeprefix('torch.')}"
    return BARS.get((name, what, against, shape.split(";")[0]))
