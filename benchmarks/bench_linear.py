"""A float32 Linear layer, forward and gradients, against PyTorch's: by MKL, eager and compiled, and by oneDNN."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from convdit.nn import Linear

from . import rivals
from .harness import Comparison, Work, backward, without_grad

# rows, width in and out: ConvNeXt's pointwise layers on one or a few images, DiT's on 8 or 2 sequences of 256
SIZES = [(3136, 96, 384), (784, 384, 1536), (784, 1536, 384), (49, 768, 3072), (2048, 384, 1152), (512, 1152, 4608)]


def comparisons() -> Iterator[Comparison]:
    for size in SIZES:
        for what in ("forward", "backward"):
            shape = "{}x{} to {}".format(*size)
            yield Comparison("linear", what, shape, torch.float32, partial(linear, what, *size), quick=size == SIZES[0])


def linear(what: str, rows: int, inputs: int, outputs: int) -> Work:
    x, ours = torch.randn(rows, inputs), Linear(inputs, outputs)
    theirs = nn.Linear(inputs, outputs)
    theirs.load_state_dict(ours.state_dict())
    modules = rivals.eager_and_compiled("PyTorch", theirs)
    products = 2.0 * rows * inputs * outputs
    traffic = 4.0 * (rows * (inputs + outputs) + inputs * outputs)
    if what == "forward":
        calls = {k: without_grad(m, x) for k, m in modules.items()}
        if torch.backends.mkldnn.is_available():
            pointwise, no = torch.ops.mkldnn._linear_pointwise, ("none", [], "")
            calls["PyTorch, oneDNN"] = without_grad(pointwise, x, theirs.weight.detach(), theirs.bias.detach(), *no)
        return Work(without_grad(ours, x), calls, matrix=products, bytes=traffic)
    x.requires_grad_()
    grad = torch.randn(rows, outputs)
    calls = {k: backward(m, [x], [x, *m.parameters()], grad) for k, m in modules.items()}
    return Work(backward(ours, [x], [x, *ours.parameters()], grad), calls, matrix=2 * products, bytes=2 * traffic)
