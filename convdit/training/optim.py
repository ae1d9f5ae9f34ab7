"""AdamW, the learning-rate schedule and the moving average: PyTorch's own, as usually set."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """No decay for biases, norms, GRN and other vectors, mask tokens and embedding tables."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.ndim <= 1 or name.endswith(("bias", "mask_token"))
            table = "embedding_table" in name or "pos_embed" in name
            (kept if vector or table or ".grn." in name else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, lr: float, weight_decay: float, beta2: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=(0.9, beta2))


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> LambdaLR:
    """Linear warm-up over ``warmup`` steps, then half a cosine down to a hundredth at ``steps``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights; the decay grows from 0.1, for short runs."""

    def update(averaged, current, count) -> None:
        count = float(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + count) / (10 + count)))

    return AveragedModel(model, multi_avg_fn=torch.no_grad()(update), use_buffers=False)
