"""Normalisation and augmentation of whole batches, on whatever device they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import ImageDataset
from .augment import RESIZED_CROP


class Normalise:
    """(images - mean) / std for images (B, C, H, W) in [0, 1]; ``invert`` goes back and clamps."""

    def __init__(self, mean: list[float], std: list[float]):
        self.mean, self.std = list(mean), list(std)

    @classmethod
    def of(cls, dataset: ImageDataset, count: int = 1000) -> Normalise:
        """Mean and deviation of each channel over ``count`` pictures spread over the set."""
        chosen = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long()
        images, _ = dataset.batch(chosen)
        std, mean = torch.std_mean(images.double(), dim=(0, 2, 3))
        return cls([round(v, 6) for v in mean.tolist()], [round(max(v, 1e-3), 6) for v in std.tolist()])

    def _shaped(self, values: list[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self._shaped(self.mean, images)) / self._shaped(self.std, images)

    def invert(self, images: Tensor) -> Tensor:
        return (images * self._shaped(self.std, images) + self._shaped(self.mean, images)).clamp(0, 1)


def augment(images: Tensor, kind: str) -> Tensor:
    """Random geometry, another draw for each picture of (B, C, H, W).

    ``none``; ``shift``: a tenth of the width and of the scale, zeros come in, no mirror image (for
    digits); ``crop``: 40 to 100 % of the area, mirrored half the time (for photographs). ``resized_crop`` is done
    where pictures are read, see `augment.AugmentedDataset`.
    """
    if kind in ("none", RESIZED_CROP):
        return images
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, device=images.device).uniform_(low, high)

    if kind == "shift":
        scale, flip = uniform(0.9, 1.1), torch.ones(count, device=images.device)
        dx, dy = uniform(-0.2, 0.2), uniform(-0.2, 0.2)
    elif kind == "crop":
        scale, flip = uniform(0.4, 1.0).sqrt(), uniform(-1, 1).sign()
        dx, dy = uniform(-1, 1) * (1 - scale), uniform(-1, 1) * (1 - scale)
    else:
        raise ValueError(f"augment: expected none, shift or crop, got {kind!r}")
    zero = torch.zeros_like(scale)
    matrix = torch.stack([scale * flip, zero, dx, zero, scale, dy], 1).view(count, 2, 3)
    grid = F.affine_grid(matrix.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
