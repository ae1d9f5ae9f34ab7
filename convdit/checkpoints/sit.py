"""The format "sit": SiT as willisma/SiT saves it.

Its tensors are DiT's, name for name and shape for shape; what differs is the training target (a
velocity at times in [0, 1]), which no tensor shows. A checkpoint is known for a SiT by the
arguments that the training script saves beside the weights; a bare state is taken for a DiT unless
the caller says `source="sit"`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convdit.checkpoints import dit_official

__all__ = ["NAME", "matches", "read", "write"]

NAME = "sit"


def matches(state: Mapping[str, Tensor]) -> bool:
    """Never by the tensors: see above."""
    return False


def read(state: Mapping[str, Tensor]) -> tuple[OrderedDict[str, Tensor], dict[str, Any]]:
    """The state itself, checked."""
    ours, _ = dit_official.read(state)
    return ours, {"kind": NAME}


def write(ours: Mapping[str, Tensor], facts: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """The state itself, with its position table."""
    return dit_official.write(ours, facts)
