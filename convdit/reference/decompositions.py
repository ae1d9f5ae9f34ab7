"""The operators' forward passes as plain PyTorch, for exporters that know no operator of ours.

program = torch.export.export(model.eval(), (images,)).run_decompositions(convdit.reference.decompositions())
torch.onnx.export(program, f="model.onnx")
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .adaln import gated_residual, layer_norm_modulate
from .attention import packed_attention
from .convnext_block import convnext_block
from .depthwise_conv import depthwise_conv2d
from .gelu_tanh import gelu_tanh
from .grn import gelu_grn, grn


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """From each forward operator of dense maps and tokens to a function of PyTorch's operators, for
    `torch.export.ExportedProgram.run_decompositions`. Sparse operators have none."""
    return {getattr(torch.ops.convdit, f.__name__.lstrip("_")).default: f for f in _FORWARDS}


def _depthwise_conv2d_fwd(x, weight, bias):
    return depthwise_conv2d(x, weight, bias)


def _depthwise_conv2d_layer_norm_fwd(x, weight, bias, ln_weight, ln_bias, eps):
    conv = depthwise_conv2d(x, weight, bias)
    return F.layer_norm(conv, conv.shape[-1:], ln_weight.to(x.dtype), ln_bias.to(x.dtype), eps)


def _grn_fwd(x, weight, bias, eps, gelu):
    return (gelu_grn if gelu else grn)(x, weight, bias, eps)


def _gelu_tanh_fwd(x, bias):
    return gelu_tanh(x, bias)


def _convnext_block_fwd(*args):
    return convnext_block(*args)


def _convnext_mlp_fwd(x, u, weight1, bias1, grn_weight, grn_bias, weight2, bias2, eps):
    hidden = F.linear(u, weight1, bias1)
    out = x + F.linear(gelu_grn(hidden, grn_weight, grn_bias, eps), weight2, bias2)
    return out, hidden.flatten(0, 2), F.gelu(hidden).square().sum((1, 2)).sqrt()


def _layer_norm_modulate_fwd(x, shift, scale, eps):
    return layer_norm_modulate(x, shift, scale, eps)


def _gated_residual_fwd(x, y, gate):
    return gated_residual(x, y, gate)


def _gated_residual_layer_norm_modulate_fwd(x, y, gate, shift, scale, eps):
    residual = gated_residual(x, y, gate)
    return residual, layer_norm_modulate(residual, shift, scale, eps)


def _packed_attention_fwd(qkv, num_heads, scale):
    return packed_attention(qkv, num_heads, scale)


_FORWARDS = (
    _depthwise_conv2d_fwd,
    _depthwise_conv2d_layer_norm_fwd,
    _grn_fwd,
    _gelu_tanh_fwd,
    _convnext_block_fwd,
    _convnext_mlp_fwd,
    _layer_norm_modulate_fwd,
    _gated_residual_fwd,
    _gated_residual_layer_norm_modulate_fwd,
    _packed_attention_fwd,
)
