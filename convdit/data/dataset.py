"""The one dataset interface that the commands use, and the two ways to keep pictures behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DataError, require
from .pixels import Fit


class ImageDataset(torch.utils.data.Dataset):
    """Labelled pictures of one size.

    ``dataset[i]`` is ``(image, label)``: a float32 tensor (C, H, W) in [0, 1] and an int.
    ``dataset.batch(indices)`` reads many at once: ``(images (B, C, H, W), labels (B,) int64)``.
    Normalisation is left to the training code.
    """

    def __init__(self, labels: Tensor, classes: Sequence[str], image_shape: tuple[int, int, int]):
        self.labels = labels.to(torch.int64)
        self.classes = list(classes)
        self.image_shape = image_shape
        if self.labels.ndim != 1:
            raise DataError(f"labels: expected shape (N,), got {tuple(self.labels.shape)}")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise DataError(
                f"labels: expected values in 0..{len(self.classes) - 1}, got "
                f"{int(self.labels.min())}..{int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def draw(self, indices: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        """A batch to train on. ``seed`` is for data sets that change their pictures at random; this one does not."""
        return self.batch(indices)

    def picture(self, index: int):
        """A PIL picture, of its own size where it came from a file, else as ``batch`` gives it, in 8 bits."""
        image_module = require("PIL.Image", "pictures", "pillow")
        array = (self.batch([index])[0][0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        return image_module.fromarray(array[..., 0] if array.shape[2] == 1 else array)

    def subset(self, indices: Sequence[int] | Tensor) -> ImageDataset:
        raise NotImplementedError


class MemoryDataset(ImageDataset):
    """Pictures held as one array: uint8 (N, C, H, W) or float32 in [0, 1]; ``files``: where they came from, if so."""

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str], files: LazyDataset | None = None):
        if images.ndim != 4:
            raise DataError(f"images: expected shape (N, C, H, W), got {tuple(images.shape)}")
        if len(images) != len(labels):
            raise DataError(f"{len(images)} images but {len(labels)} labels")
        _, channels, height, width = images.shape
        super().__init__(labels, classes, (channels, height, width))
        self.images, self.files = images, files

    def picture(self, index: int):
        return super().picture(index) if self.files is None else self.files.picture(index)

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images[indices]
        if images.dtype == torch.uint8:
            images = images.to(torch.float32).div_(255)
        return images, self.labels[indices]

    def subset(self, indices: Sequence[int] | Tensor) -> MemoryDataset:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        files = self.files.subset(indices) if self.files is not None else None
        return MemoryDataset(self.images[indices], self.labels[indices], self.classes, files)


class LazyDataset(ImageDataset):
    """Pictures read when asked for: ``read(i)`` gives a PIL picture, ``fit`` makes it uint8 (C, size, size)."""

    def __init__(
        self,
        read: Callable[[int], Any],
        indices: Sequence[int] | Tensor,
        labels: Tensor,
        classes: Sequence[str],
        fit: Fit,
    ):
        super().__init__(labels, classes, (fit.channels, fit.size, fit.size))
        self.read, self.fit = read, fit
        self.indices = torch.as_tensor(indices, dtype=torch.int64)

    def picture(self, index: int):
        return self.read(int(self.indices[index]))

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        pictures = [self.fit(self.picture(int(i))) for i in indices]
        images = torch.from_numpy(np.stack(pictures)).to(torch.float32).div_(255)
        return images, self.labels[indices]

    def fitted(self, fit: Fit) -> LazyDataset:
        """The same pictures, cut and resized otherwise."""
        return LazyDataset(self.read, self.indices, self.labels, self.classes, fit)

    def subset(self, indices: Sequence[int] | Tensor) -> LazyDataset:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return LazyDataset(self.read, self.indices[indices], self.labels[indices], self.classes, self.fit)

    def in_memory(self) -> MemoryDataset:
        """Reads every picture now, and so finds a damaged one before any training starts."""
        images = torch.stack([torch.from_numpy(self.fit(self.picture(i))) for i in range(len(self))])
        return MemoryDataset(images, self.labels, self.classes, files=self)


def stratified_split(labels: Tensor, test_fraction: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Splits (N,) labels into train and test indices, class by class; the seed decides which."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = max(1, round(len(members) * test_fraction))
        if count >= len(members):
            raise DataError(f"class {label} has {len(members)} image(s): too few to hold one out for testing")
        test.append(members[:count])
        train.append(members[count:])
    if not train:
        raise DataError("no images")
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def few_labels(labels: Tensor, count: int, seed: int) -> Tensor:
    """Picks ``count`` indices with the classes as equal in number as possible."""
    generator = torch.Generator().manual_seed(seed)
    classes = labels.unique().tolist()
    if not len(classes) <= count <= len(labels):
        raise ValueError(f"labels: expected a number from {len(classes)} to {len(labels)}, got {count}")
    queues = []
    for label in classes:
        members = (labels == label).nonzero().flatten()
        queues.append(members[torch.randperm(len(members), generator=generator)].tolist())
    picked: list[int] = []
    while len(picked) < count:
        for queue in queues:
            if queue and len(picked) < count:
                picked.append(queue.pop())
    return torch.tensor(sorted(picked))
