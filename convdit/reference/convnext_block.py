"""The ConvNeXt V2 block (arXiv:2301.00808, figure 5) in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .depthwise_conv import depthwise_conv2d_layer_norm
from .grn import gelu_grn


def convnext_block(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pwconv1_weight: Tensor,
    pwconv1_bias: Tensor | None,
    grn_weight: Tensor,
    grn_bias: Tensor,
    pwconv2_weight: Tensor,
    pwconv2_bias: Tensor | None,
    eps: float = 1e-6,
) -> Tensor:
    """x + pwconv2(grn(gelu(pwconv1(layer_norm(dwconv(x)))))).

    Args:
        x: (N, H, W, C).
        dwconv_weight: (C, 1, K, K), K odd.
        dwconv_bias: (C,), or None.
        norm_weight: (C,).
        norm_bias: (C,).
        pwconv1_weight: (D, C); D is 4 C in the published models.
        pwconv1_bias: (D,), or None.
        grn_weight: (D,).
        grn_bias: (D,).
        pwconv2_weight: (C, D).
        pwconv2_bias: (C,), or None.
        eps: of the LayerNorm and of the GRN.

    Returns:
        (N, H, W, C), in x's dtype.
    """

    def cast(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter.to(x.dtype)

    y = depthwise_conv2d_layer_norm(x, dwconv_weight, dwconv_bias, norm_weight, norm_bias, eps)
    y = F.linear(y, pwconv1_weight.to(x.dtype), cast(pwconv1_bias))
    y = gelu_grn(y, grn_weight, grn_bias, eps)
    return x + F.linear(y, pwconv2_weight.to(x.dtype), cast(pwconv2_bias))
