"""The ConvNeXt V2 block and whole models against timm's, eager channels_last and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convdit import models
from convdit.nn import ConvNeXtBlock

from . import rivals
from .bench_depthwise_conv import MAPS, real_taps
from .harness import Comparison, Work, without_grad


def comparisons() -> Iterator[Comparison]:
    for side, channels in MAPS:
        shape, quick = f"C={channels}, {side}x{side}", channels == 384
        for what, build in (("forward", block_forward), ("step", block_step)):
            yield Comparison(
                "ConvNeXt V2 block", what, shape, torch.float32, partial(build, side, channels), quick=quick, heavy=True
            )
        if channels in (96, 384):
            build = partial(block_forward, side, channels, dtype=torch.bfloat16)
            yield Comparison("ConvNeXt V2 block", "forward", shape, torch.bfloat16, build)
    for size in ("tiny", "atto"):
        name = f"convnextv2_{size}"
        yield Comparison("ConvNeXt V2 model", "forward", f"{size}; 8x224x224", torch.float32, partial(inference, name))
        yield Comparison("ConvNeXt V2 model", "step", f"{size}; 8x224x224", torch.float32, partial(training, name))


def block_pair(channels: int, dtype: torch.dtype, autotune: bool = False) -> tuple[ConvNeXtBlock, dict[str, nn.Module]]:
    ours = rivals.randomise(ConvNeXtBlock(channels, dtype=dtype))
    return ours, rivals.eager_and_compiled("timm", rivals.convnext_block(ours), autotune)


def block_cost(n: int, side: int, channels: int, dtype: torch.dtype) -> dict[str, float]:
    """Of the forward pass: two matrix products to and from 4 C, the convolution; the map in and out."""
    sites = n * side * side
    return {
        "matrix": 16.0 * sites * channels**2,
        "vector": 2.0 * n * channels * real_taps(side),
        "bytes": 2.0 * sites * channels * dtype.itemsize,
    }


def block_forward(side: int, channels: int, n: int = 8, dtype: torch.dtype = torch.float32) -> Work:
    ours, theirs = block_pair(channels, dtype, autotune=dtype == torch.float32 and side <= 14)
    x = torch.randn(n, side, side, channels, dtype=dtype)
    functions = {k: without_grad(_last(f), x) for k, f in theirs.items()}
    return Work(without_grad(ours, x), functions, **block_cost(n, side, channels, dtype))


def block_step(side: int, channels: int, n: int = 8) -> Work:
    ours, theirs = block_pair(channels, torch.float32)
    x, grad = torch.randn(n, side, side, channels, requires_grad=True), torch.randn(n, side, side, channels)

    def step(function: Callable, module: nn.Module) -> Callable:
        inputs = [x, *module.parameters()]
        return lambda: torch.autograd.grad(function(x), inputs, grad)

    functions = {k: step(_last(m), m) for k, m in theirs.items()}
    cost = {k: 3 * v for k, v in block_cost(n, side, channels, torch.float32).items()}
    return Work(step(ours, ours), functions, **cost)


def _last(block: Callable) -> Callable:
    """timm's block on (N, H, W, C): the same memory, seen as (N, C, H, W) in channels_last."""
    return lambda x: block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def model_pair(name: str, options: dict) -> tuple[models.ConvNeXt, dict[str, nn.Module]]:
    ours = rivals.randomise_grn(models.create(name, **options))
    return ours, rivals.eager_and_compiled("timm", rivals.timm_model(name, ours, **options))


def model_cost(model: models.ConvNeXt, n: int, side: int) -> dict[str, float]:
    """Of the blocks, which are all but a few percent; no traffic, of which a perfect cache would need none."""
    cost = {"matrix": 0.0, "vector": 0.0}
    for i, (dim, depth) in enumerate(zip(model.dims, model.depths, strict=True)):
        block = block_cost(n, side // 2 ** (i + 2), dim, torch.float32)
        cost = {k: v + depth * block[k] for k, v in cost.items()}
    return cost


def inference(name: str, n: int = 8, side: int = 224, **options) -> Work:
    ours, theirs = model_pair(name, options)
    images = torch.randn(n, 3, side, side).contiguous(memory_format=torch.channels_last)
    functions = {k: without_grad(m.eval(), images) for k, m in theirs.items()}
    return Work(without_grad(ours.eval(), images), functions, **model_cost(ours, n, side))


def training(name: str, n: int = 8, side: int = 224, lr: float = 1e-4, **options) -> Work:
    """A whole step: forward, cross-entropy, backward, AdamW."""
    ours, theirs = model_pair(name, options)
    images = torch.randn(n, 3, side, side).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (n,))

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(images), labels)

    functions = {k: rivals.training_step(m, loss, lr) for k, m in theirs.items()}
    cost = {k: 3 * v for k, v in model_cost(ours, n, side).items()}
    return Work(rivals.training_step(ours, loss, lr), functions, **cost)
