"""Adaptive LayerNorm of DiT (Peebles and Xie 2023, section 3.2) in plain PyTorch.

The definition of right. Each function works in any floating dtype and can be differentiated any
number of times. Modulation tensors may be wider than `x` (float32 beside a half-precision stream);
the result always has the dtype of `x`.
"""

import torch.nn.functional as F
from torch import Tensor


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without parameters over the last dimension, then `* (1 + scale) + shift`.

    x is (B, T, D); shift and scale are (B, D), one row for all tokens of a sequence.
    Returns (B, T, D) in the dtype of x.
    """
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return (normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + gate * y`: x and y are (B, T, D), gate is (B, D).

    The stream keeps the dtype of x, whatever dtype the branch y has.
    """
    return (x + gate.unsqueeze(1) * y).to(x.dtype)


def gated_residual_layer_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The end of one branch and the start of the next, with `r = x + gate * y`.

    Returns `(r, LN(r) * (1 + scale) + shift)`, both (B, T, D) in the dtype of x.
    """
    residual = gated_residual(x, y, gate)
    return residual, layer_norm_modulate(residual, shift, scale, eps)
