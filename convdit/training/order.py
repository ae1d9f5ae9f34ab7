"""Which pictures make up which batch: a function of the seed, so that a run resumes anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import ImageDataset


class BatchOrder:
    """Shuffled passes over ``size`` pictures, in batches ``start`` to ``stop``.

    Batch k covers places k*batch to (k+1)*batch of the endless sequence; each process takes its
    share of every batch.
    """

    def __init__(self, size: int, batch: int, seed: int, start: int, stop: int, rank=0, world=1):
        if batch % world:
            raise ValueError(f"batch: {batch} does not divide among {world} processes")
        self.size, self.batch, self.seed = size, batch, seed
        self.start, self.stop, self.rank, self.world = start, stop, rank, world
        self._passes: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for k in range(self.start, self.stop):
            yield self.share(k)[0]

    def share(self, k: int) -> tuple[list[int], int]:
        """This process's pictures of batch k, and a seed that no other share of any batch has."""
        share = self.batch // self.world
        first = k * self.batch + self.rank * share
        seed = np.random.SeedSequence([self.seed, first]).generate_state(1, np.uint64)[0]
        return [self._at(place) for place in range(first, first + share)], int(seed >> np.uint64(1))

    def _at(self, place: int) -> int:
        number, offset = divmod(place, self.size)
        if number not in self._passes:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            self._passes = {n: p for n, p in self._passes.items() if n >= number - 1}
            self._passes[number] = torch.randperm(self.size, generator=generator)
        return int(self._passes[number][offset])


class _WholeBatches(torch.utils.data.Dataset):
    """Lets a DataLoader fetch a batch with one indexing operation, in a worker process or not."""

    def __init__(self, dataset: ImageDataset, order: BatchOrder):
        self.dataset, self.order = dataset, order

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        return self.dataset.draw(*self.order.share(k))


def batches(dataset: ImageDataset, order: BatchOrder, workers: int = 0) -> DataLoader:
    """A DataLoader of (images, labels) in this order. It draws no global random numbers."""
    return DataLoader(
        _WholeBatches(dataset, order),
        sampler=range(order.start, order.stop),
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
    )
