"""From arrays and pictures of any size to uint8 (C, H, W) of one size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import DataError, require


def to_channels_first(images: np.ndarray, source: str) -> Tensor:
    """(N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or float in [0, 1], to (N, C, H, W)."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    elif not (images.ndim == 4 and images.shape[1] in (1, 3)):
        raise DataError(
            f"{source}: images: expected shape (N, H, W), (N, H, W, 1|3) or (N, 1|3, H, W), got {images.shape}"
        )
    if 0 in images.shape:
        raise DataError(f"{source}: images: empty, shape {images.shape}")
    if images.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(images))
    if images.dtype.kind != "f":
        raise DataError(f"{source}: images: expected uint8 or floating point, got {images.dtype}")
    tensor = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    low, high = float(tensor.min()), float(tensor.max())
    if not (0 <= low and high <= 1):  # written so that NaN fails too
        raise DataError(f"{source}: images: floating point must lie in [0, 1], got {low:g}..{high:g}")
    return tensor


def pad_to_multiple(images: Tensor, multiple: int = 8) -> Tensor:
    """Pads (N, C, H, W) with zeros, evenly, to a square whose side divides by ``multiple``."""
    height, width = images.shape[-2:]
    side = -(-max(height, width) // multiple) * multiple
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(images, (left, side - width - left, top, side - height - top))


def resize(images: Tensor, size: int) -> Tensor:
    """Bilinear, antialiased resize of (N, C, H, W) to (N, C, size, size); keeps uint8."""
    if tuple(images.shape[-2:]) == (size, size):
        return images
    resized = F.interpolate(
        images.to(torch.float32),
        size=(size, size),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    return resized.round().clamp(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else resized.clamp(0, 1)


def fit_array(images: Tensor, image_size: int | None, channels: int | None) -> Tensor:
    """Pads to a square, resizes if a size is given, turns grey to RGB or back if channels are."""
    images = pad_to_multiple(images)
    if image_size is not None:
        images = resize(images, image_size)
    if channels == 3 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1).contiguous()
    elif channels == 1 and images.shape[1] == 3:
        weight = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        grey = (images.to(torch.float32) * weight).sum(1, keepdim=True)
        images = grey.round().to(torch.uint8) if images.dtype == torch.uint8 else grey
    return images


@dataclass(frozen=True)
class Fit:
    """Makes a PIL picture uint8 (channels, size, size), bicubic and antialiased.

    The shorter side becomes ``size / crop_ratio``, then the centre is cut out. ``crop_ratio`` None: nothing is
    cut, both sides are resized to ``size``.
    """

    size: int
    channels: int
    crop_ratio: float | None = 1.0

    def __call__(self, picture) -> np.ndarray:
        image_module = require("PIL.Image", "reading pictures", "pillow")
        picture, size = picture.convert("RGB" if self.channels == 3 else "L"), self.size
        if self.crop_ratio is None:
            width, height = size, size
        else:  # rounded as torchvision does, whose transforms the published figures come from
            short, side = min(picture.size), int(size / self.crop_ratio)
            width, height = (int(side * length / short) for length in picture.size)
        picture = picture.resize((width, height), image_module.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        array = np.asarray(picture.crop((left, top, left + size, top + size)))
        return np.ascontiguousarray(array[None] if self.channels == 1 else array.transpose(2, 0, 1))


def published_crop_ratio(size: int) -> float | None:
    """How the ConvNeXt papers judge: the centre of 224 of 256 pixels, and from 384 pixels on the whole picture."""
    return None if size >= 384 else 224 / 256
