"""Depthwise convolution over channels-last maps, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise "same" convolution, stride 1.

    Args:
        x: (N, H, W, C) map; sites outside it count as zero.
        weight: (C, 1, K, K), K odd.
        bias: (C,), or None.

    Returns:
        (N, H, W, C), contiguous, in x's dtype.
    """
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if x.numel() == 0:
        # F.conv2d refuses empty maps; this has the right shape and keeps every input in the graph.
        y = x * weight.flatten(1).sum(1)
        return y if bias is None else y + bias
    kernel = weight.shape[-1]
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=kernel // 2, groups=x.shape[-1])
    return y.permute(0, 2, 3, 1).contiguous()


def depthwise_conv2d_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """`depthwise_conv2d` followed by LayerNorm over the channels.

    Args:
        x: (N, H, W, C).
        weight: (C, 1, K, K), K odd.
        bias: (C,), or None.
        ln_weight: (C,) scale of the norm.
        ln_bias: (C,) shift of the norm.
        eps: added to the variance.

    Returns:
        (N, H, W, C), in x's dtype.
    """
    y = depthwise_conv2d(x, weight, bias)
    return F.layer_norm(y, y.shape[-1:], ln_weight.to(y.dtype), ln_bias.to(y.dtype), eps)
