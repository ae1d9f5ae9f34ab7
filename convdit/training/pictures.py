"""Grids of pictures, and PNG files of them."""

from __future__ import annotations

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.errors import require
from .runs import write_whole


def grid(images: Tensor, columns: int, zoom: int = 1, gap: int = 2) -> Tensor:
    """Pictures (N, C, H, W) in [0, 1], row by row, to one uint8 picture (H', W', 3) on white."""
    images = images.detach().float().cpu().clamp(0, 1)
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    missing = -len(images) % columns
    images = torch.cat([images, images.new_ones(missing, *images.shape[1:])])
    images = F.pad(images, (0, gap, 0, gap), value=1.0)
    count, channels, height, width = images.shape
    table = images.view(count // columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    whole = table.reshape(count // columns * height, columns * width, channels)
    return (whole * 255).round().to(torch.uint8)


def png_bytes(picture: Tensor) -> bytes:
    """(H, W, 3) uint8 as PNG."""
    image_module = require("PIL.Image", "writing pictures", "pillow")
    buffer = io.BytesIO()
    image_module.fromarray(picture.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def save_png(path: Path, picture: Tensor) -> None:
    data = png_bytes(picture)
    write_whole(path, lambda temporary: temporary.write_bytes(data))
