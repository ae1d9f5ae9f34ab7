"""Blocks in a row, over dense or sparse maps, with their memory traded for time where asked."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convdit.sparse import SparseTensor2d

from .layers import Map


class Stage(nn.Sequential):
    """Blocks one after another, each `block(x)` or `block(x, visible)`. Names: 0, 1, ...

    Attributes:
        grad_checkpointing: keep only the inputs of the blocks for the backward pass, which then
            computes each block once more. Values and gradients stay the same.
    """

    def __init__(self, *blocks: nn.Module):
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Map, visible: Tensor | None = None) -> Map:
        """`visible` as in `ConvNeXtBlock`."""
        again = self.grad_checkpointing and torch.is_grad_enabled()
        for block in self:
            x = _checkpointed(block, x, visible) if again else block(x, visible)
        return x


def set_grad_checkpointing(module: nn.Module, enable: bool) -> None:
    """Switch it on or off in every `Stage` of a model."""
    for part in module.modules():
        if isinstance(part, Stage):
            part.grad_checkpointing = enable


def _checkpointed(block: nn.Module, x: Map, visible: Tensor | None) -> Map:
    if not isinstance(x, SparseTensor2d):
        return checkpoint(block, x, visible, use_reentrant=False)

    def packed(features: Tensor) -> Tensor:
        return block(x.replace(features)).features

    return x.replace(checkpoint(packed, x.features, use_reentrant=False))
