"""The format "convdit": our own names for ConvNeXt V1 and V2, FCMAE and DiT.

They are the names of the official repositories, with GRN parameters of shape (4C,). Reading accepts
GRN of any shape and an encoder whose names keep FCMAE's prefix `encoder.`; writing gives the names
that `models` loads strictly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convdit.checkpoints import dit_official
from convdit.checkpoints.layout import check_convnext, flat_grn, is_convnext, join, split
from convdit.checkpoints.names import rename

__all__ = ["NAME", "matches", "read", "write"]

NAME = "convdit"

_WHAT = "this is not a checkpoint in convdit's names"


def matches(state: Mapping[str, Tensor]) -> bool:
    """A ConvNeXt or FCMAE under our names, or a DiT that does not fit the official format."""
    return is_convnext(state) or dit_official.is_dit(state)


def read(state: Mapping[str, Tensor]) -> tuple[OrderedDict[str, Tensor], dict[str, Any]]:
    """Checks the state and brings it to our exact layout."""
    if dit_official.is_dit(state):
        dit_official.check_dit(state, _WHAT)
        return OrderedDict(state), {}
    state, _ = rename(state, lambda key: key, flat_grn)
    body, decoder, prefixed = split(state)
    ours = join(body, decoder, False)
    bare = prefixed and not decoder
    name = (lambda key: f"encoder.{key}") if bare else (lambda key: key)
    check_convnext(ours, _WHAT, name)
    return ours, {"encoder_prefix": True} if bare else {}


def write(ours: Mapping[str, Tensor], facts: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """The state as it is, for it was checked when it was read; a DiT's known position table."""
    return dit_official.with_positions(ours, facts) if dit_official.is_dit(ours) else OrderedDict(ours)
