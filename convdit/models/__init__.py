"""Whole models: ConvNeXt V1 and V2, their masked autoencoder FCMAE, and DiT."""

import builtins

from .convnext import VARIANTS, ConvNeXt, create
from .dit import (
    DiT,
    DiT_B_2,
    DiT_B_4,
    DiT_B_8,
    DiT_L_2,
    DiT_L_4,
    DiT_L_8,
    DiT_S_2,
    DiT_S_4,
    DiT_S_8,
    DiT_XL_2,
    DiT_XL_4,
    DiT_XL_8,
)
from .fcmae import FCMAE, FCMAEOutput

__all__ = [
    "FCMAE",
    "ConvNeXt",
    "DiT",
    "DiT_B_2",
    "DiT_B_4",
    "DiT_B_8",
    "DiT_L_2",
    "DiT_L_4",
    "DiT_L_8",
    "DiT_S_2",
    "DiT_S_4",
    "DiT_S_8",
    "DiT_XL_2",
    "DiT_XL_4",
    "DiT_XL_8",
    "FCMAEOutput",
    "create",
    "list",
]


def list() -> builtins.list[str]:
    """The names that `create` knows."""
    return [*VARIANTS]
