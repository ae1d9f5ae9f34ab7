"""The depthwise 7x7 convolution against PyTorch's own (channels_last, eager; torch.compile calls the same one)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.harness import Comparison, backward
from convdit import ops

SHAPES = [(8, 56, 96), (8, 28, 192), (8, 14, 384), (8, 7, 768), (8, 56, 40)]  # images, side, channels


def real_taps(side: int, kernel: int = 7) -> int:
    """Products of one channel of one image, not counting the zeros around it."""
    line = sum(min(side, i + kernel // 2 + 1) - max(0, i - kernel // 2) for i in range(side))
    return line * line


def comparisons() -> Iterator[Comparison]:
    for n, side, channels in SHAPES:
        x = torch.randn(n, side, side, channels)
        weight, bias = torch.randn(channels, 1, 7, 7), torch.randn(channels)
        flops, size = 2.0 * n * channels * real_taps(side), 4 * x.numel()
        shape = f"C={channels}, {side}x{side}"
        nchw = x.permute(0, 3, 1, 2)  # channels_last

        def eager(x, weight, bias):
            return F.conv2d(x, weight, bias, padding=3, groups=weight.shape[0])

        yield Comparison(
            "depthwise_conv2d", "forward", shape, x.dtype,
            lambda x=x, w=weight, b=bias: ops.depthwise_conv2d(x, w, b),
            {"eager": lambda x=nchw, w=weight, b=bias: eager(x, w, b)},
            flops, 2 * size,
        )  # fmt: skip
        wanted = {"input_grad": (True, False), "weight_grad": (False, True)}
        for what, (of_input, of_weight) in wanted.items():
            leaf, channels_last = x.clone().requires_grad_(of_input), nchw.detach().requires_grad_(of_input)
            w, b = weight.clone().requires_grad_(of_weight), bias.clone().requires_grad_(of_weight)
            y, z = ops.depthwise_conv2d(leaf, w, b), eager(channels_last, w, b)
            grad = torch.randn_like(y)
            yield Comparison(
                "depthwise_conv2d", what, shape, x.dtype,
                backward(y, [leaf] if of_input else [w, b], grad),
                {"eager": backward(z, [channels_last] if of_input else [w, b], grad.permute(0, 3, 1, 2))},
                flops, 2 * size,
            )  # fmt: skip
