"""``convdit flops``: multiply-adds and parameters of a named model."""

from __future__ import annotations

from typing import Any

import torch

from .. import models
from ..flops import flops
from ..models.dit import DiT_models


def count(
    name: str, image_size: int | None = None, modules: bool = False, conditioning: str | None = None
) -> dict[str, Any]:
    """Of one forward pass of one picture (ConvNeXt), or of one latent with its class (DiT).

    "DiT" gives the table of its twelve sizes. ``conditioning`` is one of its four designs.
    """
    if name == "DiT":
        counts = [count(size, image_size, False, conditioning) for size in reversed(DiT_models)]
        return {"model": name, "size": counts[0]["size"], "table": [_row(found) for found in counts]}
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected a positive number, got {image_size}")
    dit = name.replace("-", "_").replace("/", "_")
    inputs: tuple[torch.Tensor, ...]
    with torch.device("meta"):
        if dit.startswith("DiT_") and hasattr(models, dit):
            size = image_size or 32
            model = getattr(models, dit)(input_size=size, conditioning=conditioning or "adaln_zero")
            inputs = (
                torch.zeros(1, 4, size, size),
                torch.zeros(1, dtype=torch.long),
                torch.zeros(1, dtype=torch.long),
            )
        elif name in models.list():
            if conditioning is not None:
                raise ValueError(f"conditioning: expected none for {name}, got {conditioning!r}")
            size = image_size or 224
            model = models.create(name)
            inputs = (torch.zeros(1, 3, size, size),)
        else:
            sizes = [n.replace("_", "-", 1).replace("_", "/") for n in dir(models) if n[:4] == "DiT_"]
            known = ", ".join([*models.list(), "DiT", *sizes])
            raise ValueError(f"MODEL: expected one of {known}; got {name!r}")
    found = flops(model.eval(), *inputs)
    result = {
        "model": name,
        "size": size,
        "gmacs": found.macs / 1e9,
        "parameters": found.parameters,
    }
    return result | ({"by_module": found.by_module} if modules else {})


def _row(found: dict[str, Any]) -> str:
    return f"{found['model']:9} {found['gmacs']:7.2f} GMAC {found['parameters'] / 1e6:6.1f} M"
