"""The format "sit": SiT as willisma/SiT saves it.

Its tensors are DiT's, name for name and shape for shape; what differs is the training target (a
velocity at times in [0, 1]), which no tensor shows. `load` recognises SiT by the arguments that its
training script saves beside the weights; a bare file is taken for a DiT unless the caller says
`source="sit"`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convdit.checkpoints.dit_official import check_dit

__all__ = ["NAME", "matches", "read", "write"]

NAME = "sit"


def matches(state: Mapping[str, Tensor]) -> bool:
    """Never by the tensors: see above."""
    return False


def read(state: Mapping[str, Tensor]) -> tuple[OrderedDict[str, Tensor], dict[str, Any]]:
    """The state itself, checked."""
    check_dit(state, "this is not a SiT checkpoint")
    return OrderedDict(state), {"kind": NAME}


def write(ours: Mapping[str, Tensor], facts: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """The state itself."""
    check_dit(ours, f"this checkpoint does not fit {NAME}")
    return OrderedDict(ours)
