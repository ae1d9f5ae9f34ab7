"""A folder written by ``save_to_disk`` of the Hugging Face library ``datasets``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .dataset import LazyDataset
from .errors import DataError, require
from .pixels import Fit

_TEST_NAMES = ("test", "validation", "valid", "val")


class RowReader:
    """Reads the picture of the i-th row as a PIL picture."""

    def __init__(self, rows, column: str, source: str):
        self.rows, self.column, self.source = rows, column, source

    def __call__(self, index: int):
        try:
            picture = self.rows[index][self.column]
            return picture.convert("RGB") if picture.mode != "L" else picture
        except Exception as error:  # Pillow's plug-ins raise anything on a damaged picture
            raise DataError(f"{self.source}: row {index}: cannot be read as a picture: {error}") from error


def is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def open_saved(folder: Path, fit: Fit) -> dict[str, LazyDataset]:
    """The splits "train" and perhaps "test", or "all" where the folder is not split."""
    library = require("datasets", "a Hugging Face data set folder")
    try:
        loaded = library.load_from_disk(str(folder))
    except Exception as error:  # Arrow, JSON and file errors of many types
        raise DataError(f"{folder}: cannot be read by datasets.load_from_disk: {error}") from error
    if isinstance(loaded, library.Dataset):
        return {"all": _open(loaded, folder, fit)}
    if "train" not in loaded:
        raise DataError(f"{folder}: no split 'train' among {list(loaded)}")
    tests = [name for name in _TEST_NAMES if name in loaded]
    found = {"train": loaded["train"], **({"test": loaded[tests[0]]} if tests else {})}
    return {split: _open(rows, folder, fit) for split, rows in found.items()}


def _open(rows, folder: Path, fit: Fit) -> LazyDataset:
    library = require("datasets", "a Hugging Face data set folder")
    images = [n for n, f in rows.features.items() if isinstance(f, library.Image)]
    labels = [n for n, f in rows.features.items() if isinstance(f, library.ClassLabel)]
    if not labels:
        labels = [n for n in ("label", "labels") if n in rows.features]
    if not images or not labels:
        raise DataError(
            f"{folder}: expected an Image column and a ClassLabel column (or 'label'), got {list(rows.features)}"
        )
    values = torch.tensor(np.asarray(rows[labels[0]]))
    if values.is_floating_point():
        raise DataError(f"{folder}: column {labels[0]!r}: expected integers, got {values.dtype}")
    feature = rows.features[labels[0]]
    count = int(values.max()) + 1 if len(values) else 0
    classes = getattr(feature, "names", None) or [str(i) for i in range(count)]
    reader = RowReader(rows, images[0], str(folder))
    return LazyDataset(reader, range(len(values)), values, classes, fit)
