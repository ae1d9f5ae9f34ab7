"""The depthwise 7x7 convolution against PyTorch's own (channels_last, eager; torch.compile calls the same one)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from convdit import ops

from .harness import Comparison, Work, backward, without_grad

MAPS = [(56, 96), (28, 192), (14, 384), (7, 768), (56, 40)]  # side, channels; ConvNeXt Tiny's stages, atto's first
N = 8


def comparisons() -> Iterator[Comparison]:
    for side, channels in MAPS:
        for what in ("forward", "input_grad", "weight_grad"):
            build, shape = partial(depthwise_conv, what, side, channels), f"C={channels}, {side}x{side}"
            quick = channels in (96, 384)
            yield Comparison("depthwise_conv2d", what, shape, torch.float32, build, quick=quick)


def real_taps(side: int, kernel: int = 7) -> int:
    """Products of one channel of one image, not counting the zeros around it."""
    line = sum(min(side, i + kernel // 2 + 1) - max(0, i - kernel // 2) for i in range(side))
    return line * line


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's convolution of (N, H, W, C), seen as (N, C, H, W) in channels_last."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return y.permute(0, 2, 3, 1)


def depthwise_conv(what: str, side: int, channels: int, n: int = N) -> Work:
    x, weight, bias = torch.randn(n, side, side, channels), torch.randn(channels, 1, 7, 7), torch.randn(channels)
    cost = {"vector": 2.0 * n * channels * real_taps(side), "bytes": 2 * x.nbytes}
    functions = {"ours": ops.depthwise_conv2d, "eager": eager}
    if what == "forward":
        calls = {k: without_grad(f, x, weight, bias) for k, f in functions.items()}
    else:
        wanted = [x] if what == "input_grad" else [weight, bias]
        for leaf in wanted:
            leaf.requires_grad_()
        grad = torch.randn_like(x)
        calls = {k: backward(f, (x, weight, bias), wanted, grad) for k, f in functions.items()}
    return Work(calls.pop("ours"), calls, **cost)
