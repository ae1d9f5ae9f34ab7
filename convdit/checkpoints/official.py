"""The format "convnextv2_official": dense ConvNeXt V2 as facebookresearch/ConvNeXt-V2 saves it.

Names are ours; GRN parameters have the shape (1, 1, 1, 4C). V1's official format is "convdit":
nothing differs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convdit.checkpoints.layout import check_convnext, flat_grn, is_convnext, join, split
from convdit.checkpoints.names import rename

__all__ = ["NAME", "matches", "official_grn", "read", "write"]

NAME = "convnextv2_official"


def matches(state: Mapping[str, Tensor]) -> bool:
    """Official names with GRN parameters of more than one axis."""
    return is_convnext(state) and any(".grn." in key and tensor.ndim > 1 for key, tensor in state.items())


def read(state: Mapping[str, Tensor]) -> tuple[OrderedDict[str, Tensor], dict[str, Any]]:
    """To our names. Reads classifiers, encoders alone, and a dense FCMAE with its decoder."""
    state, _ = rename(state, lambda key: key, flat_grn)
    body, decoder, prefixed = split(state)
    ours = join(body, decoder, False)
    bare = prefixed and not decoder
    name = (lambda key: f"encoder.{key}") if bare else (lambda key: key)
    check_convnext(ours, "this is not an official ConvNeXt V2 checkpoint", name, version=2)
    return ours, {"encoder_prefix": True} if bare else {}


def write(ours: Mapping[str, Tensor], facts: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """From our names. The format is V2's and has no place for FCMAE's decoder."""
    body, decoder, _ = split(ours)
    check_convnext(body, "this checkpoint does not fit convnextv2_official", unknown=decoder, version=2)
    out, _ = rename(body, lambda key: key, official_grn)
    return join(out, {}, facts.get("encoder_prefix", False))


def official_grn(old: str, new: str, tensor: Tensor) -> Tensor:
    """GRN parameters as the dense official layer holds them, (1, 1, 1, 4C); others unchanged."""
    return tensor.reshape(1, 1, 1, -1) if ".grn." in old else tensor
