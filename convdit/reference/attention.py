"""Self-attention on packed q, k, v in plain PyTorch: the definition of right.

Written with matrix products and a softmax, not with PyTorch's fused attention, so that it can be
differentiated twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from convdit.reference.adaln import gated_residual, layer_norm_modulate


def packed_attention(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Multi-head softmax attention of each sequence over itself.

    qkv is (B, T, 3*D) as one Linear writes it: q, k, v in turn, each with its heads side by side.
    `scale` multiplies the scores, (D / num_heads) ** -0.5 unless given. Returns (B, T, D), heads
    side by side.
    """
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    if scale is None:
        scale = head_dim**-0.5
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
    weights = torch.softmax((q * scale) @ k.transpose(-2, -1), dim=-1)
    return (weights @ v).transpose(1, 2).reshape(batch, tokens, num_heads * head_dim)


def adaln_zero_attention(
    x: Tensor,
    modulation: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """The attention half of an adaLN-Zero block, residual included.

    `x + gate * proj(attention(qkv(LN(x) * (1 + scale) + shift)))`: x is (B, T, D); modulation is
    (B, 3, D) with rows shift, scale, gate; qkv_weight is (3*D, D) and proj_weight (D, D) as
    nn.Linear keeps them. Returns (B, T, D).
    """
    shift, scale, gate = modulation.unbind(1)
    normed = layer_norm_modulate(x, shift, scale, eps)
    attended = packed_attention(F.linear(normed, qkv_weight, qkv_bias), num_heads, scale=None)
    return gated_residual(x, F.linear(attended, proj_weight, proj_bias), gate)
