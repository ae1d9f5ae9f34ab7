"""GELU and global response normalisation in one operator against F.gelu and timm's layer, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from convdit import ops

from . import rivals
from .bench_depthwise_conv import MAPS, N
from .harness import Comparison, Work, backward, without_grad


def comparisons() -> Iterator[Comparison]:
    for side, channels in MAPS:
        for what in ("forward", "backward"):
            shape, build = f"C={4 * channels}, {side}x{side}", partial(gelu_grn, what, side, 4 * channels)
            yield Comparison("gelu_grn", what, shape, torch.float32, build, quick=channels == 384)


class Theirs(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.grn = GlobalResponseNorm(len(weight), dtype=weight.dtype)
        self.grn.weight, self.grn.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.grn(F.gelu(x))


def gelu_grn(what: str, side: int, channels: int, n: int = N) -> Work:
    x, weight, bias = torch.randn(n, side, side, channels), torch.randn(channels), torch.randn(channels)
    theirs = rivals.eager_and_compiled("timm", Theirs(weight, bias))
    if what == "forward":
        calls = {k: without_grad(m, x) for k, m in theirs.items()}
        return Work(without_grad(ops.gelu_grn, x, weight, bias), calls, bytes=3 * x.nbytes)
    x.requires_grad_()
    leaves, grad = [x, weight.clone().requires_grad_(), bias.clone().requires_grad_()], torch.randn_like(x)
    calls = {k: backward(m, [x], [x, *m.parameters()], grad) for k, m in theirs.items()}
    return Work(backward(ops.gelu_grn, leaves, leaves, grad), calls, bytes=5 * x.nbytes)
