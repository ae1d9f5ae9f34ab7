"""The format "fcmae_minkowski": FCMAE as facebookresearch/ConvNeXt-V2 trains it.

Its sparse layers are MinkowskiEngine's; the stem and the whole decoder are dense. What differs in
the sparse layers from the dense names:

- convolutions are called `kernel` and hold their taps in one axis, the *row* running fastest.
  Depthwise, (K^2, C): weight[c, 0, i, j] = kernel[i + K*j, c];
  downsampling, (4, in, out): weight[o, c, i, j] = kernel[i + 2*j, c, o];
- their biases are (1, C); Linear layers carry the infix `.linear.` and LayerNorms `.ln.`;
- GRN parameters are (1, 4C), and (1, 1, 1, 4C) in the decoder.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convdit.checkpoints.layout import check_convnext, flat_grn, is_convnext, join, rename_all, split
from convdit.checkpoints.names import KeyTable, rename
from convdit.checkpoints.official import official_grn

__all__ = ["NAME", "matches", "read", "write"]

NAME = "fcmae_minkowski"

_BLOCK = "stages.{i}.{j}"
_TABLE = KeyTable(
    parameters=[
        ("downsample_layers.{s}.1.weight", "downsample_layers.{s}.1.kernel"),
        ("downsample_layers.{s}.1.bias", "downsample_layers.{s}.1.bias"),
        (f"{_BLOCK}.dwconv.weight", f"{_BLOCK}.dwconv.kernel"),
        (f"{_BLOCK}.dwconv.bias", f"{_BLOCK}.dwconv.bias"),
        (f"{_BLOCK}.grn.gamma", f"{_BLOCK}.grn.gamma"),
        (f"{_BLOCK}.grn.beta", f"{_BLOCK}.grn.beta"),
    ],
    modules=[
        ("downsample_layers.0.0", "downsample_layers.0.0"),
        ("downsample_layers.0.1", "downsample_layers.0.1"),
        ("downsample_layers.{s}.0", "downsample_layers.{s}.0.ln"),
        (f"{_BLOCK}.norm", f"{_BLOCK}.norm.ln"),
        (f"{_BLOCK}.pwconv1", f"{_BLOCK}.pwconv1.linear"),
        (f"{_BLOCK}.pwconv2", f"{_BLOCK}.pwconv2.linear"),
        ("norm", "norm"),
        ("head", "head"),
        # A classifier fine-tuned on sparse layers may carry the infixes here too: read, never
        # written.
        ("norm", "norm.ln"),
        ("head", "head.linear"),
    ],
)
_MARK = re.compile(r"\.kernel$|\.(?:ln|linear)\.(?:weight|bias)$")


def matches(state: Mapping[str, Tensor]) -> bool:
    """Names that only MinkowskiEngine's wrappers give: `.kernel`, `.ln.`, `.linear.`."""
    return is_convnext(state) and any(map(_MARK.search, state))


def read(state: Mapping[str, Tensor]) -> tuple[OrderedDict[str, Tensor], dict[str, Any]]:
    """To our names: a whole FCMAE, an encoder with or without `encoder.`, a fine-tuned state."""
    _, decoder, prefixed = split(state)
    body, unknown = rename(
        {key: tensor for key, tensor in state.items() if key not in decoder},
        lambda key: _TABLE.ours(key.removeprefix("encoder.")),
        _to_dense,
    )
    ours = join(body, rename(decoder, lambda key: key, flat_grn)[0], False)
    prefix = "encoder." if prefixed else ""
    what = "this is not an FCMAE checkpoint in MinkowskiEngine's names"
    check_convnext(ours, what, lambda key: _their_name(key, prefix), unknown, version=2)
    return ours, {"encoder_prefix": True} if prefixed and not decoder else {}


def write(ours: Mapping[str, Tensor], facts: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """From our names: an FCMAE whole, a ConvNeXt V2 with the names its sparse twin has."""
    what = "this checkpoint does not fit fcmae_minkowski"
    check_convnext(ours, what, version=2)
    body, decoder, _ = split(ours)
    body = rename_all(body, _TABLE.theirs, _to_minkowski, what)
    decoder, _ = rename(decoder, lambda key: key, official_grn)
    return join(body, decoder, facts.get("encoder_prefix", False))


def _their_name(key: str, prefix: str) -> str:
    bare = key.removeprefix("encoder.")
    theirs = _TABLE.theirs(bare)
    return key if theirs is None else prefix + theirs


def _to_dense(old: str, new: str, tensor: Tensor) -> Tensor:
    if not old.endswith(".kernel"):
        if old.endswith(".bias") and tensor.ndim == 2 and tensor.shape[0] == 1:
            return tensor.reshape(-1)
        return flat_grn(old, new, tensor)
    taps = tensor.shape[0] if tensor.ndim else 0
    k = math.isqrt(taps)
    depthwise = ".dwconv." in old
    if tensor.ndim != (2 if depthwise else 3) or k * k != taps or taps == 0:
        wanted = "(K*K, C)" if depthwise else "(K*K, in, out)"
        raise ValueError(f"{old!r} has shape {tuple(tensor.shape)}, expected {wanted}")
    # Taps are numbered i + K*j, so the axis splits into (j, i); the kernel wants (i, j).
    if depthwise:
        return tensor.reshape(k, k, *tensor.shape[1:]).permute(2, 1, 0).unsqueeze(1).contiguous()
    return tensor.reshape(k, k, *tensor.shape[1:]).permute(3, 2, 1, 0).contiguous()


def _to_minkowski(old: str, new: str, tensor: Tensor) -> Tensor:
    if new.endswith(".kernel"):
        taps = tensor.shape[2] * tensor.shape[3]
        if ".dwconv." in new:
            return tensor.squeeze(1).permute(2, 1, 0).reshape(taps, -1).contiguous()
        return tensor.permute(3, 2, 1, 0).reshape(taps, *tensor.shape[1::-1]).contiguous()
    if ".grn." in new:
        return tensor.reshape(1, -1)
    conv_bias = re.fullmatch(r"downsample_layers\.[1-9]\d*\.1\.bias|.*\.dwconv\.bias", new)
    return tensor.reshape(1, -1) if conv_bias else tensor
