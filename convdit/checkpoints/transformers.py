"""The format "transformers": ConvNeXt V1 and V2 as Hugging Face transformers names them.

The classifiers put `convnext.` or `convnextv2.` before the names of the model; the bare models do
not. A backbone (`ConvNextV2Backbone`) calls our `norm0`, `norm1`, ... `hidden_states_norms.stage1`,
`hidden_states_norms.stage2`, ...: the norms of `features_only=True, out_norms=True`.

Their final LayerNorm uses eps 1e-12 (`config.layer_norm_eps`) where ours, the official one and
timm's use 1e-6; no tensor holds it, so a converted model differs by that eps alone.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convdit.checkpoints.layout import check_convnext, flat_grn, rename_all, split
from convdit.checkpoints.names import KeyTable, rename

__all__ = ["NAME", "NOTE", "matches", "read", "write"]

NAME = "transformers"
NOTE = "the final LayerNorm of transformers has eps 1e-12, ours, the official and timm's 1e-6: no file holds it"

_OURS, _THEIRS = "stages.{i}.{j}", "encoder.stages.{i}.layers.{j}"
_MOST_STAGES = 8  # of a backbone; theirs count from 1
_TABLE = KeyTable(
    parameters=[
        (f"{_OURS}.gamma", f"{_THEIRS}.layer_scale_parameter"),
        (f"{_OURS}.grn.gamma", f"{_THEIRS}.grn.weight"),
        (f"{_OURS}.grn.beta", f"{_THEIRS}.grn.bias"),
    ],
    modules=[
        ("downsample_layers.0.0", "embeddings.patch_embeddings"),
        ("downsample_layers.0.1", "embeddings.layernorm"),
        ("downsample_layers.{s}.0", "encoder.stages.{s}.downsampling_layer.0"),
        ("downsample_layers.{s}.1", "encoder.stages.{s}.downsampling_layer.1"),
        (f"{_OURS}.dwconv", f"{_THEIRS}.dwconv"),
        (f"{_OURS}.norm", f"{_THEIRS}.layernorm"),
        (f"{_OURS}.pwconv1", f"{_THEIRS}.pwconv1"),
        (f"{_OURS}.pwconv2", f"{_THEIRS}.pwconv2"),
        ("norm", "layernorm"),
        ("head", "classifier"),
        *((f"norm{i}", f"hidden_states_norms.stage{i + 1}") for i in range(_MOST_STAGES)),
    ],
)
_PREFIXES = ("convnextv2.", "convnext.")
_CLASSIFIER = "classifier."


def matches(state: Mapping[str, Tensor]) -> bool:
    """Their names inside a stage, with or without the classifier's prefix."""
    stage = re.compile(r"(?:convnext(?:v2)?\.)?encoder\.stages\.\d+\.(?:layers|downsampling_layer)\.")
    return any(stage.match(key) for key in state)


def read(state: Mapping[str, Tensor]) -> tuple[OrderedDict[str, Tensor], dict[str, Any]]:
    """To our names, from a bare model or from a classifier."""
    prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in state)), "")

    def translate(key: str) -> str | None:
        if key.startswith(_CLASSIFIER) or not prefix:
            return _TABLE.ours(key)
        return _TABLE.ours(key.removeprefix(prefix)) if key.startswith(prefix) else None

    ours, unknown = rename(state, translate, flat_grn)
    what = "this is not a ConvNeXt in the names of transformers"
    check_convnext(ours, what, lambda key: _their_name(key, prefix), unknown)
    return ours, {"transformers_prefix": bool(prefix)}


def write(ours: Mapping[str, Tensor], facts: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """From our names: a classifier's where there is a head, else the bare model's."""
    body, decoder, _ = split(ours)
    what = "this checkpoint does not fit transformers"
    check_convnext(body, what, unknown=decoder)
    version_2 = any(".grn." in key for key in body)
    with_prefix = "head.weight" in body or facts.get("transformers_prefix", False)
    prefix = _PREFIXES[0 if version_2 else 1] if with_prefix else ""

    def change(old: str, new: str, tensor: Tensor) -> Tensor:
        return tensor.reshape(1, 1, 1, -1) if ".grn." in old else tensor

    return rename_all(body, lambda key: _their_name(key, prefix), change, what)


def _their_name(key: str, prefix: str) -> str | None:
    theirs = _TABLE.theirs(key)
    if theirs is None or theirs.startswith(_CLASSIFIER):
        return theirs
    return prefix + theirs
