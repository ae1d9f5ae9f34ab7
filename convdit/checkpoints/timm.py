"""The format "timm": ConvNeXt V1 and V2 as timm names them (`timm.models.convnext`).

timm holds the pointwise layers of its small models as 1x1 convolutions (`conv_mlp=True`: atto,
femto, pico, nano), so their weights have four axes; from tiny up they are Linear layers with two.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convdit.checkpoints.layout import check_convnext, flat_grn, rename_all, split
from convdit.checkpoints.names import KeyTable, rename

__all__ = ["NAME", "matches", "read", "write"]

NAME = "timm"

_WIDEST_CONV_MLP = 80  # the first width of nano; tiny and small start at 96

_OURS, _THEIRS = "stages.{i}.{j}", "stages.{i}.blocks.{j}"
_TABLE = KeyTable(
    parameters=[
        (f"{_OURS}.gamma", f"{_THEIRS}.gamma"),
        (f"{_OURS}.grn.gamma", f"{_THEIRS}.mlp.grn.weight"),
        (f"{_OURS}.grn.beta", f"{_THEIRS}.mlp.grn.bias"),
    ],
    modules=[
        ("downsample_layers.0.0", "stem.0"),
        ("downsample_layers.0.1", "stem.1"),
        ("downsample_layers.{s}.0", "stages.{s}.downsample.0"),
        ("downsample_layers.{s}.1", "stages.{s}.downsample.1"),
        (f"{_OURS}.dwconv", f"{_THEIRS}.conv_dw"),
        (f"{_OURS}.norm", f"{_THEIRS}.norm"),
        (f"{_OURS}.pwconv1", f"{_THEIRS}.mlp.fc1"),
        (f"{_OURS}.pwconv2", f"{_THEIRS}.mlp.fc2"),
        ("norm", "head.norm"),
        ("head", "head.fc"),
    ],
)


def matches(state: Mapping[str, Tensor]) -> bool:
    """timm's names inside a stage."""
    return any(re.match(r"stages\.\d+\.(?:blocks\.\d+\.(?:conv_dw|mlp)|downsample)\.", key) for key in state)


def read(state: Mapping[str, Tensor]) -> tuple[OrderedDict[str, Tensor], dict[str, Any]]:
    """To our names; pointwise weights of two or four axes are read."""
    ours, unknown = rename(state, _TABLE.ours, _to_ours)
    check_convnext(ours, "this is not a ConvNeXt in timm's names", _TABLE.theirs, unknown)
    conv_mlp = any(key.endswith(".mlp.fc1.weight") and t.ndim == 4 for key, t in state.items())
    return ours, {"timm_conv_mlp": conv_mlp}


def write(ours: Mapping[str, Tensor], facts: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """From our names.

    Pointwise weights get the axes they came with, or those of timm's model of that width.
    """
    body, decoder, _ = split(ours)
    what = "this checkpoint does not fit timm"
    check_convnext(body, what, unknown=decoder)
    width = body["downsample_layers.0.0.weight"].shape[0]
    conv_mlp = facts.get("timm_conv_mlp", width <= _WIDEST_CONV_MLP)

    def change(old: str, new: str, tensor: Tensor) -> Tensor:
        return tensor[:, :, None, None] if conv_mlp and _is_pointwise(old) else tensor

    return rename_all(body, _TABLE.theirs, change, what)


def _is_pointwise(ours: str) -> bool:
    return ours.endswith((".pwconv1.weight", ".pwconv2.weight"))


def _to_ours(old: str, new: str, tensor: Tensor) -> Tensor:
    if _is_pointwise(new) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    return flat_grn(old, new, tensor)
