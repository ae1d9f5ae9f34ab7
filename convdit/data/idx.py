"""IDX files, the format of MNIST and its many descendants (Fashion-MNIST, EMNIST, ...)."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from .errors import DataError

_SPLITS = {"train": "train", "test": "t10k"}


def read_idx(path: str | Path) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, plain or gzip."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise DataError(f"{path}: not an IDX file")
    if raw[2] != 8:
        raise DataError(f"{path}: expected an IDX file of unsigned bytes (type 8), got type {raw[2]}")
    rank = raw[3]
    if len(raw) < 4 + 4 * rank:
        raise DataError(f"{path}: truncated in the header")
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    expected = 1
    for extent in shape:
        expected *= extent
    if len(raw) - 4 - 4 * rank != expected:
        raise DataError(f"{path}: expected {expected} values of shape {shape}, got {len(raw) - 4 - 4 * rank}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


def find_idx(folder: Path) -> dict[str, tuple[Path, Path]]:
    """The pairs (images, labels) of a folder, by split; {} where it holds none."""
    found = {}
    for split, prefix in _SPLITS.items():
        images, labels = (_one(folder, f"{prefix}-{kind}") for kind in ("images", "labels"))
        if images and labels:
            found[split] = (images, labels)
        elif there := images or labels:
            missing = "labels" if images else "images"
            raise DataError(f"{folder}: no file {prefix}-{missing}-idx*-ubyte[.gz] beside {there.name}")
    return found


def read_pair(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, H, W) and labels (N,) of one split."""
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3:
        raise DataError(f"{images_path}: expected rank 3 (N, H, W), got shape {images.shape}")
    if labels.ndim != 1:
        raise DataError(f"{labels_path}: expected rank 1 (N,), got shape {labels.shape}")
    if len(images) != len(labels):
        raise DataError(f"{images_path}: {len(images)} images, but {labels_path} has {len(labels)} labels")
    return images, labels


def _one(folder: Path, stem: str) -> Path | None:
    """``train-images-idx3-ubyte``, with ``.idx3-ubyte`` and ``.gz`` as they also occur."""
    matches = sorted(p for p in folder.glob(f"{stem}*") if "idx" in p.name and p.is_file())
    return matches[0] if matches else None
