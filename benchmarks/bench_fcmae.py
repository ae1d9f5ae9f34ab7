"""FCMAE pre-training against the same on zero-filled dense maps in timm's layers, eager channels_last and compiled.

The whole step is stem, encoder, decoder, loss, backward and AdamW at a mask ratio of 0.6: 19 of 49 patches are visible.
The rows of the encoder's blocks alone leave 20, as the sparse operators' rows do. Tables of neighbours are ours to
build in every step, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from convdit import models
from convdit.sparse import ActiveSites, SparseTensor2d, random_patch_mask

from . import rivals
from .bench_convnext import block_cost
from .harness import Comparison, Work

PATCH = 32


def comparisons() -> Iterator[Comparison]:
    for size in ("tiny", "atto"):
        name, quick = f"convnextv2_{size}", size == "atto"
        yield Comparison("FCMAE model", "step", f"{size}; 8x224x224, 19/49", torch.float32, partial(training, name))
        build = partial(encoder_blocks, name)
        yield Comparison(
            "FCMAE encoder blocks", "step", f"{size}; 8x224x224, 20/49", torch.float32, build, quick=quick, heavy=True
        )


def training(name: str, n: int = 8, side: int = 224, lr: float = 1e-4, decoder_dim: int = 512, **options) -> Work:
    ours = rivals.randomise_grn(models.FCMAE(name, image_size=side, decoder_dim=decoder_dim, **options))
    theirs = rivals.eager_and_compiled("dense-masked timm", rivals.DenseMaskedFCMAE(name, ours, **options))
    images = torch.randn(n, 3, side, side).contiguous(memory_format=torch.channels_last)
    mask = random_patch_mask(n, (side // PATCH, side // PATCH), ours.mask_ratio)
    functions = {k: rivals.training_step(m, lambda model: model(images, mask), lr) for k, m in theirs.items()}
    step = rivals.training_step(ours, lambda model: model(images, mask).loss, lr)
    visible = float((~mask).sum()) / n
    decoder = block_cost(n, side // PATCH, ours.mask_token.shape[1], torch.float32)["matrix"]
    operations = block_operations(ours.encoder, n, side, visible) + 3 * len(ours.decoder) * decoder
    return Work(step, functions, matrix=operations)


def block_operations(encoder: models.ConvNeXt, n: int, side: int, visible: float) -> float:
    """Matrix products of the blocks on `visible` patches an image, forward and backward: all but a few percent."""
    share, total = visible / (side // PATCH) ** 2, 0.0
    for i, (dim, depth) in enumerate(zip(encoder.dims, encoder.depths, strict=True)):
        total += 3 * depth * share * block_cost(n, side // 2 ** (i + 2), dim, torch.float32)["matrix"]
    return total


def encoder_blocks(name: str, n: int = 8, side: int = 224, visible: int = 20, **options) -> Work:
    """The blocks of all stages, each stage on an input of its own: forward and all gradients."""
    encoder = rivals.randomise_grn(models.create(name, features_only=True, **options))
    grid = side // PATCH
    mask = random_patch_mask(n, (grid, grid), 1 - (visible + 0.5) / grid**2)
    ours, dense = [], []
    for i, stage in enumerate(encoder.stages):
        block = grid_block(i)
        sites = ActiveSites.from_patch_mask(mask, block, visible)
        features, grad = (torch.randn(len(sites), encoder.dims[i]) for _ in range(2))
        ours.append((stage, features.requires_grad_(), grad))
        x, dense_grad = (SparseTensor2d(t, sites).dense().permute(0, 3, 1, 2).detach() for t in (features, grad))
        where = (~mask)[:, None].float().repeat_interleave(block, 2).repeat_interleave(block, 3)
        blocks = nn.ModuleList(rivals.convnext_block(b) for b in stage)
        dense.append((blocks, x.requires_grad_(), where, dense_grad))

    def step() -> list[Tensor]:
        grads: list[Tensor] = []
        for i, (stage, features, grad) in enumerate(ours):
            sites = ActiveSites.from_patch_mask(mask, grid_block(i), visible)
            y = stage(SparseTensor2d(features, sites)).features
            grads += torch.autograd.grad(y, [features, *stage.parameters()], grad)[1:]
        return grads

    def dense_step(function: Callable) -> list[Tensor]:
        grads: list[Tensor] = []
        for blocks, x, where, grad in dense:
            grads += torch.autograd.grad(function(blocks, x, where), [x, *blocks.parameters()], grad)[1:]
        return grads

    functions = {"dense-masked timm": masked_blocks, "dense-masked timm, compile": rivals.compiled(masked_blocks)}
    calls = {k: partial(dense_step, f) for k, f in functions.items()}
    return Work(step, calls, matrix=block_operations(encoder, n, side, visible))


def grid_block(stage: int) -> int:
    """Sites along a patch's side."""
    return PATCH // 2 ** (stage + 2)


def masked_blocks(blocks: nn.ModuleList, x: Tensor, where: Tensor) -> Tensor:
    for block in blocks:
        x = rivals.masked_block(block, x, where)
    return x
