"""Whole models: ConvNeXt V1 and V2, and the masked autoencoder FCMAE."""

from .convnext import VARIANTS, ConvNeXt, create
from .fcmae import FCMAE

__all__ = ["FCMAE", "ConvNeXt", "create", "list"]


def list() -> list[str]:
    """The names that `create` knows."""
    return [*VARIANTS]
