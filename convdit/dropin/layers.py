"""Single layers: depthwise convolution, response normalisation, LayerNorm over the channels of (N, C, H, W)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convdit import ops

from .swap import Foreign, Rule, defined_by, own_class


def depthwise(conv: Foreign) -> str | None:
    """Why a module is not a convolution that `convdit.ops.depthwise_conv2d` computes."""
    if own_class(conv) is not nn.Conv2d:
        return f"its convolution is {type(conv).__name__}, not torch.nn.Conv2d"
    if not conv.groups == conv.in_channels == conv.out_channels:
        return f"its convolution has {conv.groups} groups for {conv.in_channels} channels in, {conv.out_channels} out"
    k = conv.kernel_size[0]
    if conv.kernel_size != (k, k) or k % 2 == 0 or not 3 <= k <= 31:
        return f"a {conv.kernel_size[0]}x{conv.kernel_size[1]} kernel is not square, odd and 3 to 31"
    if conv.stride != (1, 1) or conv.dilation != (1, 1):
        return f"stride {conv.stride}, dilation {conv.dilation}"
    if conv.padding not in ("same", (k // 2, k // 2)) or conv.padding_mode != "zeros":
        return f"padding {conv.padding}, {conv.padding_mode}"
    return None


def channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def wants_gradient(*tensors: Tensor) -> bool:
    if not torch.is_grad_enabled():  # the quicker question
        return False
    return any(t.requires_grad for t in tensors)


def _conv_gains(conv: Foreign, x: Tensor) -> bool:
    """Where the map lies channels-last, and by kernel, as measured on a Zen 4, one thread, against eager channels-last.

    32 to 960 channels, 112x112 to 7x7, 1 and 8 images, in float32: forward 0.64 to 1.5 for 3x3, 0.7 to 1.6 for 5x5,
    1.1 to 1.9 for 7x7, 0.97 to 1.6 for 9x9 (below 1.1 with 32 channels only), 1.4 to 1.6 for 11x11; with gradients 0.74
    to 1.1 for 3x3, 2.7 to 6 for all others. In bfloat16 the forward gains nothing, and with gradients as much or more.
    """
    k = conv.kernel_size[0]  # 5 or more: see _refuses_conv
    forward = k >= 7 and (k != 9 or conv.in_channels >= 64) and x.dtype == torch.float32
    if not forward and not torch.is_grad_enabled():  # first, for the call may be a short one
        return False
    if not channels_last(x) or x.dtype != conv.weight.dtype or x.dtype == torch.float16:
        return False
    return forward or wants_gradient(x, conv.weight)


def _refuses_conv(conv: Foreign) -> str | None:
    return depthwise(conv) or ("a 3x3 kernel gains on few maps only" if conv.kernel_size == (3, 3) else None)


def _conv(conv: Foreign, x: Tensor) -> Tensor:
    return ops.depthwise_conv2d(x.permute(0, 2, 3, 1), conv.weight, conv.bias).permute(0, 3, 1, 2)


def _is_depthwise(module: Foreign) -> bool:
    return defined_by(module) == ("torch.nn.modules.conv", "Conv2d") and 1 < module.groups == module.in_channels


def _grn(grn: Foreign, x: Tensor) -> Tensor:
    if grn.channel_dim == 1:
        return ops.grn(x.permute(0, 2, 3, 1), grn.weight, grn.bias, grn.eps).permute(0, 3, 1, 2)
    return ops.grn(x, grn.weight, grn.bias, grn.eps)


def _grn_gains(grn: Foreign, x: Tensor) -> bool:
    """1.06 to 13 on maps that lie channels-last, as measured like the convolution; below a few thousand values (0.88 to
    1.7) starting costs as much."""
    if x.numel() < 4096:
        return False
    return channels_last(x) if grn.channel_dim == 1 else x.dim() == 4 and x.is_contiguous()


def _map(channels: int) -> tuple[tuple, dict]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, channels, 5, 6, generator=generator, dtype=torch.float64),), {}


def _grn_example(grn: Foreign) -> tuple[tuple, dict]:
    (x,), _ = _map(grn.weight.numel())
    return (x if grn.channel_dim == 1 else x.permute(0, 2, 3, 1),), {}


def _is_channels_first_norm(module: Foreign) -> bool:
    """The LayerNorm of facebookresearch/ConvNeXt(-V2), a chain of elementwise operations."""
    known = defined_by(module)[1] == "LayerNorm" and not isinstance(module, nn.LayerNorm)
    return (
        known
        and getattr(module, "data_format", None) == "channels_first"
        and {"weight", "bias"} <= set(module._parameters)
    )


def _norm(norm: Foreign, x: Tensor) -> Tensor:
    y = F.layer_norm(x.permute(0, 2, 3, 1), norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return y.permute(0, 3, 1, 2)


RULES = (
    Rule("depthwise_conv2d", "convdit.ops.depthwise_conv2d",
         "on channels-last maps: with gradients, and in float32 without from 7x7 on (9x9: from 64 channels on)",
         _is_depthwise, _refuses_conv, _conv_gains, _conv, lambda conv: _map(conv.in_channels)),
    Rule("grn", "convdit.ops.grn", "on channels-last maps of 4096 values or more",
         lambda m: defined_by(m) == ("timm.layers.grn", "GlobalResponseNorm"),
         lambda grn: None, _grn_gains, _grn, _grn_example),
    Rule("channels_first_norm", "torch.nn.functional.layer_norm of the permuted map", "on all maps",
         _is_channels_first_norm,
         lambda norm: None, lambda norm, x: x.dim() == 4, _norm, lambda norm: _map(norm.weight.numel())),
)  # fmt: skip
