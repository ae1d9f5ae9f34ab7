"""A folder of pictures, one sub-folder a class, perhaps under ``train`` and ``val`` or ``test``."""

from __future__ import annotations

from pathlib import Path

import torch

from .dataset import LazyDataset
from .errors import DataError, require
from .pixels import Fit

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_TEST_NAMES = ("test", "val", "valid", "validation")


class PictureReader:
    """Reads the i-th file as a PIL picture. A class: worker processes can carry it."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __call__(self, index: int):
        path = self.paths[index]
        image_module = require("PIL.Image", "reading pictures", "pillow")
        try:
            with image_module.open(path) as picture:
                return picture.convert("RGB") if picture.mode != "L" else picture.copy()
        except Exception as error:  # Pillow's plug-ins raise anything on a damaged file
            raise DataError(f"{path}: cannot be read as a picture: {error}") from error


def class_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def find_splits(root: Path) -> dict[str, Path]:
    """{"train": ..., "test": ...} where the folder is split, else {"all": root}."""
    names = class_folders(root)
    if "train" not in names:
        return {"all": root}
    tests = [name for name in _TEST_NAMES if name in names]
    return {"train": root / "train", **({"test": root / tests[0]} if tests else {})}


def open_folder(root: Path, fit: Fit, classes: list[str] | None = None) -> LazyDataset:
    """One split. ``classes``, those of the training split, must then all be there, and no other."""
    found = class_folders(root)
    if not found:
        raise DataError(f"{root}: no class folders: expected one sub-folder of pictures for each class")
    if classes is not None:
        for name in classes:
            if name not in found:
                raise DataError(f"{root / name}: class folder missing: the training split has {name!r}")
        for name in found:
            if name not in classes:
                raise DataError(f"{root / name}: class {name!r} is not in the training split")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(found):
        files = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"{root / name}: no pictures in this class folder")
        paths += files
        labels += [label] * len(files)
    return LazyDataset(PictureReader(paths), range(len(paths)), torch.tensor(labels), found, fit)
