"""``convdit flops``: multiply-adds and parameters of a named model."""

from __future__ import annotations

from typing import Any

import torch

from .. import models
from ..flops import flops


def count(name: str, image_size: int | None = None, modules: bool = False) -> dict[str, Any]:
    """Of one forward pass of one picture (ConvNeXt), or of one latent with its class (DiT)."""
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected a positive number, got {image_size}")
    dit = name.replace("-", "_").replace("/", "_")
    with torch.device("meta"):
        if dit.startswith("DiT_") and hasattr(models, dit):
            size = image_size or 32
            model = getattr(models, dit)(input_size=size)
            inputs = (
                torch.zeros(1, 4, size, size),
                torch.zeros(1, dtype=torch.long),
                torch.zeros(1, dtype=torch.long),
            )
        elif name in models.list():
            size = image_size or 224
            model = models.create(name)
            inputs = (torch.zeros(1, 3, size, size),)
        else:
            sizes = [n.replace("_", "-", 1).replace("_", "/") for n in dir(models) if n[:4] == "DiT_"]
            known = ", ".join([*models.list(), *sizes])
            raise ValueError(f"MODEL: expected one of {known}; got {name!r}")
    found = flops(model.eval(), *inputs)
    result = {
        "model": name,
        "size": size,
        "gmacs": found.macs / 1e9,
        "parameters": found.parameters,
    }
    return result | ({"by_module": found.by_module} if modules else {})
