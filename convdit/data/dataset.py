"""The one dataset interface that the commands use, and the two ways to keep pictures behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import DataError


class ImageDataset(torch.utils.data.Dataset):
    """Labelled pictures of one size.

    ``dataset[i]`` is ``(image, label)``: a float32 tensor (C, H, W) in [0, 1] and an int.
    ``dataset.batch(indices)`` reads many at once: ``(images (B, C, H, W), labels (B,) int64)``.
    Normalisation is left to the training code.
    """

    def __init__(self, labels: Tensor, classes: Sequence[str], image_shape: tuple[int, int, int]):
        self.labels = labels.to(torch.int64)
        self.classes = list(classes)
        self.image_shape = tuple(image_shape)
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

    def subset(self, indices: Sequence[int] | Tensor) -> ImageDataset:
        raise NotImplementedError


class MemoryDataset(ImageDataset):
    """Pictures held as one array: uint8 (N, C, H, W) or float32 in [0, 1]."""

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str]):
        if images.ndim != 4:
            raise DataError(f"images: expected shape (N, C, H, W), got {tuple(images.shape)}")
        if len(images) != len(labels):
            raise DataError(f"{len(images)} images but {len(labels)} labels")
        super().__init__(labels, classes, tuple(images.shape[1:]))
        self.images = images

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images[indices]
        if images.dtype == torch.uint8:
            images = images.to(torch.float32).div_(255)
        return images, self.labels[indices]

    def subset(self, indices: Sequence[int] | Tensor) -> MemoryDataset:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return MemoryDataset(self.images[indices], self.labels[indices], self.classes)


class LazyDataset(ImageDataset):
    """Pictures read when asked for: ``read(i)`` gives uint8 (C, H, W) of ``image_shape``."""

    def __init__(
        self,
        read: Callable[[int], np.ndarray],
        indices: Sequence[int] | Tensor,
        labels: Tensor,
        classes: Sequence[str],
        image_shape: tuple[int, int, int],
    ):
        super().__init__(labels, classes, image_shape)
        self.read = read
        self.indices = torch.as_tensor(indices, dtype=torch.int64)

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        pictures = [self.read(int(i)) for i in self.indices[indices]]
        images = torch.from_numpy(np.stack(pictures)).to(torch.float32).div_(255)
        return images, self.labels[indices]

    def subset(self, indices: Sequence[int] | Tensor) -> LazyDataset:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return LazyDataset(self.read, self.indices[indices], self.labels[indices], self.classes, self.image_shape)

    def in_memory(self) -> MemoryDataset:
        """Reads every picture now, and so finds a damaged one before any training starts."""
        images = torch.stack([torch.from_numpy(self.read(int(i))) for i in self.indices])
        return MemoryDataset(images, self.labels, self.classes)


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
