"""``.npz`` files, never unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from .errors import DataError

# Names in use for (images, labels), by split; "all" is a file that is not split.
_NAMES = {
    "train": (("train_images", "train_labels"), ("x_train", "y_train")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test"), ("val_images", "val_labels")),
    "all": (("images", "labels"), ("x", "y"), ("arr_0", "arr_1")),
}


def read_npz(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(images, labels) by split: "train" and perhaps "test", or "all"."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {
                split: (file[pair[0]], file[pair[1]])
                for split, pairs in _NAMES.items()
                for pair in pairs[::-1]
                if pair[0] in file.files and pair[1] in file.files
            }
            names = file.files
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as .npz without pickle: {error}") from error
    if "train" in found:
        found.pop("all", None)
    elif "all" in found:
        found = {"all": found["all"]}
    else:
        raise DataError(f"{path}: expected arrays 'images' and 'labels' (or 'train_images', ...), got {names}")
    return {split: (images, check_labels(labels, path)) for split, (images, labels) in found.items()}


def check_labels(labels: np.ndarray, path: Path) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:  # as MedMNIST has them
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels: expected integers (N,), got {labels.dtype} {labels.shape}")
    return labels.astype(np.int64)
