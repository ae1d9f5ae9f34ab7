"""AdamW, the learning-rate schedule and the moving average: PyTorch's own, as usually set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

LAYER_DECAYS = ("single", "group")
_GROUP_LAYERS = 12  # of the numbering "group"


def parameter_groups(model: nn.Module, weight_decay: float, rate: Callable[[str], float] | None = None) -> list[dict]:
    """No decay for biases, norms, GRN and other vectors, mask tokens and embedding tables.

    ``rate`` gives the factor of the learning rate of a parameter by its name; each group has one, under "rate".
    """
    groups: dict[tuple[float, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.ndim <= 1 or name.endswith(("bias", "mask_token"))
            table = "embedding_table" in name or "pos_embed" in name
            kept = vector or table or ".grn." in name
            groups.setdefault((rate(name) if rate else 1.0, kept), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if kept else weight_decay, "rate": factor}
        for (factor, kept), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def adamw(
    model: nn.Module, lr: float, weight_decay: float, beta2: float, rate: Callable[[str], float] | None = None
) -> torch.optim.AdamW:
    groups = parameter_groups(model, weight_decay, rate)
    return torch.optim.AdamW([group | {"lr": lr * group["rate"]} for group in groups], lr=lr, betas=(0.9, beta2))


def layer_rates(depths: Sequence[int], decay: float, kind: str) -> Callable[[str], float]:
    """Factors of the learning rate by parameter name, for a ConvNeXt: 1 for the head, times ``decay`` a layer down.

    Layers are numbered as in facebookresearch/ConvNeXt-V2. "single": each block is a layer, a downsampling layer
    shares that of the block after it. "group": twelve groups, for models of 3, 3, 27, 3 blocks: the stem is 0,
    the first two stages are one group each, the third is cut into threes, the last and its downsampling are 12.

    Raises ValueError for another kind, and for "group" with a model that it does not describe.
    """
    if kind not in LAYER_DECAYS:
        raise ValueError(f"layer_decay_type: expected one of {', '.join(LAYER_DECAYS)}, got {kind!r}")
    if kind == "group" and (len(depths) != 4 or depths[2] > 27):
        raise ValueError(
            "layer_decay_type: group is for models of 4 stages with at most 27 blocks in the third, "
            f"got {tuple(depths)}: use single"
        )
    layers = sum(depths) if kind == "single" else _GROUP_LAYERS

    def layer(name: str) -> int:
        part, *rest = name.split(".")
        if part not in ("downsample_layers", "stages"):
            return layers + 1
        stage, block = int(rest[0]), int(rest[1]) if part == "stages" else 0
        if kind == "single":
            return sum(depths[:stage]) + block + 1
        if stage == 3:
            return _GROUP_LAYERS
        if part == "downsample_layers":
            return stage + 1 if stage else 0
        return 3 + block // 3 if stage == 2 else stage + 1

    return lambda name: decay ** (layers + 1 - layer(name))


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup: int, steps: int, last: float = 0.01) -> LambdaLR:
    """Linear warm-up over ``warmup`` steps, then half a cosine down to ``last`` times the peak at ``steps``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights; the decay grows from 0.1, for short runs."""

    def update(averaged, current, count) -> None:
        count = float(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + count) / (10 + count)))

    return AveragedModel(model, multi_avg_fn=torch.no_grad()(update), use_buffers=False)
