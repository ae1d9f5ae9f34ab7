"""ConvNeXt blocks, V1 and V2, of timm (and of open_clip's timm trunks), transformers and facebookresearch.

All take and return (N, C, H, W). A map that is channels-last in memory, as the result is, is read where it lies: after
the first block of a model there is no copy at the border of a layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convdit import ops
from convdit.ops.linear import linear

from .layers import depthwise, wants_gradient
from .swap import Foreign, Rule, defined_by, touched


class Names(NamedTuple):
    """Where a block keeps its layers; "" for what it has not."""

    conv: str
    norm: str
    fc1: str
    act: str
    grn: str
    fc2: str
    drop_path: str
    around: tuple[str, ...]  # other layers that the fast forward passes over
    idle: tuple[str, ...]  # dropouts, which must do nothing


_TIMM = Names("conv_dw", "norm", "mlp.fc1", "mlp.act", "mlp.grn", "mlp.fc2", "drop_path", ("mlp", "shortcut"), ())
_TIMM = _TIMM._replace(idle=("mlp.drop1", "mlp.drop2"))
_TRANSFORMERS = Names("dwconv", "layernorm", "pwconv1", "act", "grn", "pwconv2", "drop_path", (), ())
_OFFICIAL = _TRANSFORMERS._replace(norm="norm")
_TRANSFORMERS_FILE = "transformers.models.convnext{0}.modeling_convnext{0}"
BLOCKS = {
    ("timm.models.convnext", "ConvNeXtBlock"): _TIMM,
    (_TRANSFORMERS_FILE.format("v2"), "ConvNextV2Layer"): _TRANSFORMERS,
    (_TRANSFORMERS_FILE.format(""), "ConvNextLayer"): _TRANSFORMERS._replace(grn=""),
}
_NORMS = ("LayerNorm", "LayerNorm2d", "ConvNextLayerNorm", "ConvNextV2LayerNorm")
_GELUS = ("GELU", "GELUActivation")
_PATHS = ("DropPath", "ConvNextDropPath", "ConvNextV2DropPath", "Identity", "StochasticDepth")


def _known(block: Foreign) -> Names | None:
    known = BLOCKS.get(defined_by(block))
    if known is None and defined_by(block)[1] == "Block":  # of facebookresearch/ConvNeXt(-V2), wherever that was put
        version_2 = isinstance(block._modules.get("grn"), nn.Module)
        known = _OFFICIAL if version_2 else _OFFICIAL._replace(grn="")
        if not {n for n in known[:7] if n} <= set(block._modules):
            return None
    if known is _TIMM and "grn" not in block.mlp._modules:
        known = _TIMM._replace(grn="", around=(*_TIMM.around, "mlp.norm"))
    return known


def _names(block: Foreign) -> Names:
    names = _known(block)
    assert names is not None  # for the rule knows it
    return names


def _get(block: Foreign, path: str) -> Foreign:
    part = block
    for name in path.split(".") if path else ():
        part = part._modules[name]
    return part if path else None


def _scale(block: Foreign) -> Tensor | None:
    """Layer scale, of version 1."""
    scale = block._parameters.get("gamma")
    return block._parameters.get("layer_scale_parameter") if scale is None else scale


def _grn_parameters(grn: Foreign) -> tuple[Tensor, Tensor]:
    weight = grn._parameters.get("weight")
    if weight is None:
        return grn.gamma, grn.beta
    return weight, grn.bias


def _refuses(block: Foreign) -> str | None:
    names = _names(block)
    conv, norm, act, grn = (_get(block, n) for n in (names.conv, names.norm, names.act, names.grn))
    linears = [_get(block, n) for n in (names.fc1, names.fc2)]
    why = depthwise(conv)
    if why:
        return why
    if type(norm).__name__ not in _NORMS or norm.weight is None or norm.bias is None:
        return f"its norm is {type(norm).__name__}, not a LayerNorm with weight and bias"
    if type(act).__name__ not in _GELUS or getattr(act, "approximate", "none") != "none":
        return f"its activation is {type(act).__name__}, not the exact GELU"
    for layer in linears:
        if not (type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.kernel_size == (1, 1))):
            return f"its pointwise layer is {type(layer).__name__}"
    if type(_get(block, names.drop_path)).__name__ not in _PATHS:
        return f"its drop path is {type(_get(block, names.drop_path)).__name__}"
    for name in ("shortcut", "mlp.norm"):
        if name in names.around and type(_get(block, name)) is not nn.Identity:
            return f"its {name} is not the identity"
    if any(_get(block, n).p > 0 for n in names.idle):
        return "it has dropout"
    if names.grn and len(grn._parameters) != 2:
        return f"its response normalisation is {type(grn).__name__}"
    passed = (names.conv, names.norm, names.fc1, names.act, names.grn, names.fc2, *names.around, *names.idle)
    return touched(block, *(n for n in passed if n))


def _gains(block: Foreign, x: Tensor) -> bool:
    """As measured on a Zen 4, one thread, against eager timm on channels-last maps (8 to 768 channels, 2x2 to 56x56, 1
    and 8 images): version 2 gains 1.14 to 3.6 everywhere; version 1, nearly all matrix products, 1.02 to 1.9
    with gradients and 1.01 to 1.23 without in float32, but 0.96 to 1.16 without in bfloat16.
    """
    names = _names(block)
    weight = getattr(_get(block, names.conv), "weight", None)
    if weight is None or x.dim() != 4 or x.dtype != weight.dtype:
        return False
    return bool(names.grn) or x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and wants_gradient(x, weight))


def _compute(block: Foreign, x: Tensor) -> Tensor:
    names = _names(block)
    conv, norm, grn = (_get(block, n) for n in (names.conv, names.norm, names.grn))
    (weight1, bias1), (weight2, bias2) = (
        (layer.weight.flatten(1), layer.bias) for layer in (_get(block, n) for n in (names.fc1, names.fc2))
    )
    drop_path, scale = _get(block, names.drop_path), _scale(block)
    x = x.permute(0, 2, 3, 1)
    idle = not block.training or type(drop_path) is nn.Identity
    if grn is not None:
        gamma, beta = (p.flatten() for p in _grn_parameters(grn))
        eps = getattr(grn, "eps", 1e-6)
        if eps == norm.eps and idle and scale is None and not drop_path._forward_hooks:
            weights = (conv.weight, conv.bias, norm.weight, norm.bias, weight1, bias1, gamma, beta, weight2, bias2)
            return ops.convnext_block(x, *weights, eps).permute(0, 3, 1, 2)
    y = ops.depthwise_conv2d_layer_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)
    if grn is None and idle and _in_pieces(x, y, weight1):
        return _mlp_in_pieces(x, y, weight1, bias1, weight2, bias2, scale).permute(0, 3, 1, 2)
    y = linear(y, weight1, bias1)
    y = F.gelu(y) if grn is None else ops.gelu_grn(y, gamma, beta, eps)
    y = linear(y, weight2, bias2)
    if scale is not None:
        y = y * scale
    return (x + drop_path(y)).permute(0, 3, 1, 2)


_PIECE = 1 << 22  # bytes of the hidden tensor that are made and used up at a time
_SMALL = 1 << 18  # elements of a weight: PyTorch repacks it for each piece, and larger ones cost more than they gain


def _in_pieces(x: Tensor, y: Tensor, weight1: Tensor) -> bool:
    """Whether the hidden tensor, which is large, may stay in cache: neither gradients nor a compiler want it whole."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch.is_grad_enabled() or y.dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
        return False
    return weight1.numel() <= _SMALL and 4 * y.numel() * y.element_size() > 2 * _PIECE


def _mlp_in_pieces(
    x: Tensor, y: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, scale: Tensor | None
) -> Tensor:
    """x + scale * linear(gelu(linear(y))), some sites at a time."""
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    rows = _PIECE // (weight1.shape[0] * y.element_size())
    pieces = (t.flatten(0, 2).split(rows) for t in (x, y, out))
    for x_piece, y_piece, out_piece in zip(*pieces, strict=True):
        hidden = torch.ops.aten.gelu_(linear(y_piece, weight1, bias1))
        branch = linear(hidden, weight2, bias2)
        if scale is None:
            torch.add(x_piece, branch, out=out_piece)
        else:
            torch.addcmul(x_piece, branch, scale, out=out_piece)
    return out


def _example(block: Foreign) -> tuple[tuple, dict]:
    conv = _get(block, _names(block).conv)
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, conv.in_channels, 5, 6, generator=generator, dtype=torch.float64),), {}


RULES = (
    Rule(
        "convnext_block",
        "convdit.ops.convnext_block (V2), or depthwise_conv2d_layer_norm and linear layers (V1)",
        "on all maps in float32, in bfloat16 (V1: with gradients) and in float16 (V2)",
        lambda module: _known(module) is not None,
        _refuses,
        _gains,
        _compute,
        _example,
    ),
)
