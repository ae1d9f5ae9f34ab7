"""Random changes to training pictures and batches: those of timm and torchvision, made repeatable."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import ImageDataset
from ..data.errors import require

RESIZED_CROP = "resized_crop"
_FILL = (124, 116, 104)  # ImageNet's mean, for what RandAugment moves into sight


class AugmentedDataset(ImageDataset):
    """A data set whose training batches go through timm's picture transforms, another draw for each picture.

    ``draw`` depends on its seed alone: not on the process that reads, nor on what was read before. ``batch`` gives
    the pictures as they are.

    Args:
        dataset: the pictures.
        crop_scale: smallest share of the area of a RandomResizedCrop, bicubic, cut from pictures of their own
            size, and mirrored half the time; None: neither.
        randaug: timm's name of a RandAugment, such as rand-m9-mstd0.5-inc1; None: none.
    """

    def __init__(self, dataset: ImageDataset, crop_scale: float | None, randaug: str | None):
        super().__init__(dataset.labels, dataset.classes, dataset.image_shape)
        self.dataset, self.crop_scale, self.randaug = dataset, crop_scale, randaug
        size = dataset.image_shape[1]
        self._transforms: list[Callable] = []
        if crop_scale is not None:
            crop = require("timm.data.transforms", "random resized crops", "timm").RandomResizedCropAndInterpolation
            flip = require("torchvision.transforms", "mirror images", "torchvision").RandomHorizontalFlip
            self._transforms += [crop(size, scale=(crop_scale, 1.0), interpolation="bicubic"), flip()]
        if randaug is not None:
            self._transforms.append(_randaug(randaug, size))

    def draw(self, indices: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        with seeded(seed):
            images = torch.from_numpy(np.stack([self._drawn(int(i)) for i in indices]))
        return images.to(torch.float32).div_(255), self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def _drawn(self, index: int) -> np.ndarray:
        whole = self.crop_scale is not None
        picture = self.dataset.picture(index) if whole else ImageDataset.picture(self.dataset, index)
        picture = picture.convert("RGB")  # what the transforms are made for
        for transform in self._transforms:
            picture = transform(picture)
        if self.image_shape[0] == 1:
            return np.asarray(picture.convert("L"))[None]
        return np.asarray(picture).transpose(2, 0, 1)

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        return self.dataset.batch(indices)

    def subset(self, indices: Sequence[int] | Tensor) -> AugmentedDataset:
        return AugmentedDataset(self.dataset.subset(indices), self.crop_scale, self.randaug)


def augmented(dataset: ImageDataset, kind: str, crop_scale: float = 0.08, randaug: str | None = None) -> ImageDataset:
    """``dataset`` with the picture transforms asked for; itself where there are none.

    Args:
        kind: the option ``augment``; "resized_crop" is done here, the others by `transforms.augment`.
    """
    crops = kind == RESIZED_CROP
    if not crops and randaug is None:
        return dataset
    return AugmentedDataset(dataset, crop_scale if crops else None, randaug)


def _randaug(name: str, size: int) -> Callable:
    make = require("timm.data.auto_augment", "RandAugment", "timm").rand_augment_transform
    if not name.startswith("rand-"):
        raise ValueError(f"randaug: expected a name such as rand-m9-mstd0.5-inc1, got {name!r}")
    bicubic = require("PIL.Image", "pictures", "pillow").Resampling.BICUBIC
    settings = {"translate_const": int(size * 0.45), "img_mean": _FILL, "interpolation": bicubic}
    try:
        policy = make(name, settings)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"randaug: expected a name such as rand-m9-mstd0.5-inc1, got {name!r}: {error}") from error
    for operation in policy.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _Posterize(operation.aug_fn)
    return policy


class _Posterize:
    """timm's strongest posterising keeps 0 bits, which Pillow from version 13 on refuses: the picture becomes black."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, picture, bits: int, **rest):
        return picture.point([0] * 256 * len(picture.getbands())) if bits < 1 else self.function(picture, bits, **rest)


class BatchMixing:
    """Random erasing of each normalised picture, then mixup or CutMix of a batch, by timm.

    Draws from the global random states of Python, NumPy and PyTorch, which checkpoints keep.

    Args:
        classes: of the labels.
        erasing: probability that a rectangle of a picture is replaced by noise.
        mixup, cutmix: parameters of their beta distributions; 0 for none. With both, one is chosen for each batch.
        smoothing: of labels.
        device: of the pictures.
    """

    def __init__(self, classes: int, erasing: float, mixup: float, cutmix: float, smoothing: float, device):
        self.smoothing, self.erase, self.mix = smoothing, None, None
        if erasing:
            library = require("timm.data.random_erasing", "random erasing", "timm")
            self.erase = library.RandomErasing(erasing, mode="pixel", device=device)
        if mixup or cutmix:
            library = require("timm.data.mixup", "mixup and CutMix", "timm")
            self.mix = library.Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) and (B,) to changed pictures (the argument may be overwritten) and labels, (B,) or (B, K)."""
        if self.erase:
            images = self.erase(images)
        return self.mix(images, labels) if self.mix else (images, labels)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of (B, K) scores with the labels that a call returned."""
        # Mixed labels are smooth already.
        return F.cross_entropy(scores, labels, label_smoothing=0.0 if self.mix else self.smoothing)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global random states of Python, NumPy and PyTorch's CPU set from ``seed``, and as before afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
