"""Transformer blocks with adaLN-Zero: facebookresearch/DiT, SiT, diffusers' DiT; diffusers' AdaLayerNormZero alone.

Attention and the MLP are called as they are, hooks and all: only norms, modulation and gates are computed by us. Where
nothing could see the difference, the Linears of both run as `products` says, and between them `ops.packed_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convdit import ops

from . import products
from .swap import Foreign, Rule, defined_by, touched, watched

_OFFICIAL = {"norm1", "attn", "norm2", "mlp", "adaLN_modulation"}
_FINAL = {"norm_final", "linear", "adaLN_modulation"}
_DIFFUSERS = ("diffusers.models.attention", "BasicTransformerBlock")
_ADALN = ("diffusers.models.normalization", "AdaLayerNormZero")
_ATTENTION = ("diffusers.models.attention_processor", "Attention")
_FEED_FORWARD = ("diffusers.models.attention", "FeedForward")
_TIMM_ATTENTION = (("timm.layers.attention", "Attention"), ("timm.models.vision_transformer", "Attention"))
_GELU = ("diffusers.models.activations", "GELU")


def plain_norm(norm: Foreign) -> str | None:
    """Why a module is not a LayerNorm without parameters over the last axis."""
    if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1:
        return f"its norm is {type(norm).__name__}"
    if norm.weight is not None or norm.bias is not None:
        return "its norm has weights of its own"
    return None


FEWEST = 1 << 16  # values of tokens that gain in training


def _many(x: Tensor) -> bool:
    """Not few values where there are gradients: starting the operators' autograd costs more than PyTorch's own.

    The rows `accelerated layer` of `convdit bench dropin` time both sides of the bound: on a Zen 5, one thread, against
    eager, a block gains 1.06 to 1.94 without gradients, and 1.93 with them at 196,608 values; left alone it has 0.97.
    """
    return not torch.is_grad_enabled() or torch.compiler.is_compiling() or x.numel() >= FEWEST


def _tokens(x: Tensor, like: nn.Linear) -> bool:
    return x.dim() == 3 and x.dtype == like.weight.dtype


# ---- facebookresearch/DiT and SiT ----------------------------------------------------------------


def _is_official(module: Foreign) -> bool:
    return defined_by(module)[1] in ("DiTBlock", "SiTBlock") and set(module._modules) == _OFFICIAL


def _refuses_official(block: Foreign) -> str | None:
    return plain_norm(block.norm1) or plain_norm(block.norm2) or touched(block, "norm1", "norm2")


def _official(block: Foreign, x: Tensor, c: Tensor) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
    y = _attention(block.attn, ops.layer_norm_modulate(x, shift1, scale1, block.norm1.eps), _packs(block))
    x, y = ops.gated_residual_layer_norm_modulate(x, y, gate1, shift2, scale2, block.norm2.eps)
    return ops.gated_residual(x, _mlp(block.mlp, y, _packs(block)), gate2)


def _packs(block: Foreign) -> bool:
    return getattr(block, "convdit_packs", False)


def _attention(attn: Foreign, x: Tensor, pack: bool) -> Tensor:
    """attn(x), of timm's Attention."""
    if defined_by(attn) not in _TIMM_ATTENTION or not products.usable(x) or getattr(attn, "gate", None) is not None:
        return attn(x)
    norms = (getattr(attn, name, None) for name in ("q_norm", "k_norm", "norm"))
    idle = all(n is None or type(n) is nn.Identity for n in norms) and not (attn.attn_drop.p or attn.proj_drop.p)
    if not idle or not (products.plain(attn.qkv) and products.plain(attn.proj)) or watched(attn):
        return attn(x)
    y = ops.packed_attention(products.linear(x, attn.qkv, pack), attn.num_heads, attn.scale)
    return products.linear(y, attn.proj, pack)


def _mlp(mlp: Foreign, x: Tensor, pack: bool) -> Tensor:
    """mlp(x), of timm's Mlp."""
    known = defined_by(mlp) == ("timm.layers.mlp", "Mlp") and products.usable(x) and _gelu_tanh(mlp.act)
    idle = known and not (mlp.drop1.p or mlp.drop2.p) and type(mlp.norm) is nn.Identity
    if not idle or not (products.plain(mlp.fc1) and products.plain(mlp.fc2)) or watched(mlp):
        return mlp(x)
    return products.mlp(x, mlp.fc1, mlp.fc2, pack)


def _gelu_tanh(act: Foreign) -> bool:
    return type(act) is nn.GELU and act.approximate == "tanh"


def _official_example(block: Foreign) -> tuple[tuple, dict]:
    return _random((2, 5, block.norm1.normalized_shape[0]), (2, block.norm1.normalized_shape[0])), {}


def _is_final(module: Foreign) -> bool:
    return defined_by(module)[1] == "FinalLayer" and set(module._modules) == _FINAL


def _refuses_final(layer: Foreign) -> str | None:
    return plain_norm(layer.norm_final) or touched(layer, "norm_final")


def _final(layer: Foreign, x: Tensor, c: Tensor) -> Tensor:
    shift, scale = layer.adaLN_modulation(c).chunk(2, dim=1)
    return layer.linear(ops.layer_norm_modulate(x, shift, scale, layer.norm_final.eps))


def _final_example(layer: Foreign) -> tuple[tuple, dict]:
    return _random((2, 5, layer.norm_final.normalized_shape[0]), (2, layer.norm_final.normalized_shape[0])), {}


# ---- diffusers -----------------------------------------------------------------------------------


def _is_diffusers(module: Foreign) -> bool:
    return defined_by(module) == _DIFFUSERS and module.norm_type == "ada_norm_zero"


def _refuses_diffusers(block: Foreign) -> str | None:
    parts = block._modules
    if block.attn2 is not None or block.pos_embed is not None or "fuser" in parts:
        return "it has cross-attention, a position embedding or a fuser"
    if block._chunk_size is not None:
        return "its feed-forward runs in chunks"
    norm1 = parts["norm1"]
    if defined_by(norm1) != _ADALN:
        return f"its norm is {type(norm1).__name__}"
    why = plain_norm(norm1._modules["norm"]) or plain_norm(parts["norm3"])
    return why or touched(block, "norm1", "norm1.norm", "norm3")


def _diffusers(
    block: Foreign,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict | None = None,
) -> Tensor:
    x, norm1 = hidden_states, block.norm1
    emb = norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
    shift1, scale1, gate1, shift2, scale2, gate2 = norm1.linear(norm1.silu(emb)).chunk(6, dim=1)
    y = ops.layer_norm_modulate(x, shift1, scale1, norm1.norm.eps)
    encoder = encoder_hidden_states if block.only_cross_attention else None
    options = cross_attention_kwargs or {}
    if attention_mask is None and encoder is None and not options and _attends_plainly(block.attn1, y):
        y = _attend(block.attn1, y, _packs(block))
    else:
        y = block.attn1(y, encoder_hidden_states=encoder, attention_mask=attention_mask, **options)
    x, y = ops.gated_residual_layer_norm_modulate(x, y, gate1, shift2, scale2, block.norm3.eps)
    return ops.gated_residual(x, _feed_forward(block.ff, y, _packs(block)), gate2)


def _attends_plainly(attn: Foreign, x: Tensor) -> bool:
    if not products.usable(x) or defined_by(attn) != _ATTENTION or attn.to_out is None:
        return False
    if type(attn.processor).__name__ != "AttnProcessor2_0":
        return False
    others = (attn.group_norm, attn.spatial_norm, attn.norm_q, attn.norm_k)
    if any(other is not None for other in others) or attn.residual_connection or attn.rescale_output_factor != 1:
        return False
    *linears, dropout = _of_attention(attn)
    return all(map(products.plain, linears)) and not dropout.p and not watched(attn)


def _of_attention(attn: Foreign) -> tuple:
    parts = attn._modules
    return parts["to_q"], parts["to_k"], parts["to_v"], *parts["to_out"]._modules.values()


def _attend(attn: Foreign, x: Tensor, pack: bool) -> Tensor:
    q, k, v, last, _ = _of_attention(attn)
    return products.linear(products.attention(x, (q, k, v), attn.heads, pack), last, pack)


def _feed_forward(ff: Foreign, x: Tensor, pack: bool) -> Tensor:
    """ff(x), of diffusers' FeedForward."""
    if not products.usable(x) or defined_by(ff) != _FEED_FORWARD or len(ff.net) != 3:
        return ff(x)
    first, dropout, second = ff.net._modules.values()
    known = defined_by(first) == _GELU and first.approximate == "tanh" and not dropout.p
    if not known or not (products.plain(first.proj) and products.plain(second)) or watched(ff):
        return ff(x)
    return products.mlp(x, first.proj, second, pack)


def _diffusers_example(block: Foreign) -> tuple[tuple, dict]:
    conditions = {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([0, 0])}
    return _random((2, 5, block.dim)), conditions


def _refuses_adaln(layer: Foreign) -> str | None:
    return plain_norm(layer.norm) or touched(layer, "norm")


def _adaln(layer, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
    if layer.emb is not None:
        emb = layer.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *rest = layer.linear(layer.silu(emb)).chunk(6, dim=1)
    return ops.layer_norm_modulate(x, shift, scale, layer.norm.eps), *rest


def _adaln_example(layer: Foreign) -> tuple[tuple, dict]:
    x, emb = _random((2, 5, layer.linear.in_features), (2, layer.linear.in_features))
    if layer.emb is None:
        return (x,), {"emb": emb}
    conditions = {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([0, 0])}
    return (x,), {**conditions, "hidden_dtype": torch.float64}


def _random(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


_FUSED = "convdit.ops.layer_norm_modulate, gated_residual_layer_norm_modulate and gated_residual"
_WHEN = f"on tokens (B, T, D) in the dtype of the weights, with gradients from {FEWEST} values on"
RULES = (
    Rule("dit_block", _FUSED, _WHEN, _is_official, _refuses_official,
         lambda block, x: _many(x) and _tokens(x, block.adaLN_modulation[-1]),
         _official, _official_example, packs=True),
    Rule("dit_final", "convdit.ops.layer_norm_modulate", _WHEN, _is_final, _refuses_final,
         lambda layer, x: _many(x) and _tokens(x, layer.linear), _final, _final_example),
    Rule("diffusers_block", _FUSED, _WHEN, _is_diffusers, _refuses_diffusers,
         lambda block, x: _many(x) and _tokens(x, block.norm1.linear), _diffusers, _diffusers_example, packs=True),
    Rule("diffusers_adaln", "convdit.ops.layer_norm_modulate", _WHEN,
         lambda m: defined_by(m) == _ADALN, _refuses_adaln,
         lambda layer, x: _many(x) and _tokens(x, layer.linear), _adaln, _adaln_example),
)  # fmt: skip
