"""From the word after ``--data`` to a training and a test set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from . import arrays, embedded, folder, huggingface, idx
from .dataset import ImageDataset, LazyDataset, MemoryDataset, stratified_split
from .errors import DataError
from .pixels import Fit, fit_array, published_crop_ratio, to_channels_first

EMBEDDED = {"mnist5k": embedded.mnist5k, "digits": embedded.digits}
_EMBEDDED_SIZE = {"mnist5k": 32, "digits": 16}
_PICTURE_SIZE = 224
_Kept = TypeVar("_Kept", MemoryDataset, LazyDataset)
_MEMORY_LIMIT = 2**30  # pictures of up to this many bytes are read, and so checked, before training starts


class Splits(NamedTuple):
    train: ImageDataset
    test: ImageDataset


def load(
    data: str | Path = "mnist5k",
    image_size: int | None = None,
    channels: int | None = None,
    crop_ratio: float | None = 1.0,
) -> Splits:
    """Opens a data set by name or path.

    Args:
        data: ``mnist5k``, ``digits``, or a path: an ``.npz`` file, a folder of IDX files, a folder
            saved by Hugging Face ``datasets``, or a folder of pictures with one sub-folder a class.
        image_size: side of the square pictures. Default: arrays are padded to a multiple of 8
            (28 -> 32), pictures become 224.
        channels: 1 or 3. Default: what the arrays have; 3 for pictures.
        crop_ratio: of held-out pictures in files: the shorter side becomes ``image_size / crop_ratio`` before
            the centre is cut out. None: the rule of the ConvNeXt papers, see `pixels.published_crop_ratio`.

    Where there is no test split, a fifth of each class is held out, always the same pictures.

    Raises:
        DataError: nothing there, or damaged; the message names the file.
        ImportError: a package of the extra ``train`` is missing.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size: expected a positive number, got {image_size}")
    if channels not in (None, 1, 3):
        raise DataError(f"channels: expected 1 or 3, got {channels}")
    if crop_ratio is not None and not 0 < crop_ratio <= 1:
        raise DataError(f"crop_ratio: expected 0 < crop_ratio <= 1, got {crop_ratio}")
    if str(data) in EMBEDDED:
        images, labels, names = EMBEDDED[str(data)]()
        size = image_size or _EMBEDDED_SIZE[str(data)]
        whole = _memory(images, labels, list(names), size, channels, str(data))
        return Splits(*_split({"all": whole}, str(data)))
    path = Path(data)
    if not path.exists():
        raise DataError(f"{data}: no such file or folder, and not one of {', '.join(EMBEDDED)}")
    if path.is_file():
        if path.suffix != ".npz":
            raise DataError(f"{path}: expected a folder or an .npz file")
        return Splits(*_split(_arrays(arrays.read_npz(path), image_size, channels, path), str(path)))
    pairs = idx.find_idx(path)
    if pairs:
        read = {split: idx.read_pair(*pair) for split, pair in pairs.items()}
        if "train" not in read:
            raise DataError(f"{path}: no training images (train-images-idx3-ubyte[.gz])")
        return Splits(*_split(_arrays(read, image_size, channels, path), str(path)))
    fit = Fit(image_size or _PICTURE_SIZE, channels or 3)
    if huggingface.is_saved_dataset(path):
        found = huggingface.open_saved(path, fit)
    else:
        found, classes = {}, None
        for split, place in folder.find_splits(path).items():
            found[split] = folder.open_folder(place, fit, classes)
            classes = found[split].classes
    train, test = _split(found, str(path))
    ratio = published_crop_ratio(fit.size) if crop_ratio is None else crop_ratio
    test = test.fitted(replace(fit, crop_ratio=ratio))
    return Splits(_small_in_memory(train), _small_in_memory(test))


def _small_in_memory(dataset: LazyDataset) -> ImageDataset:
    channels, height, width = dataset.image_shape
    small = len(dataset) * channels * height * width <= _MEMORY_LIMIT
    return dataset.in_memory() if small else dataset


def _memory(images, labels, classes, image_size, channels, source) -> MemoryDataset:
    tensor = fit_array(to_channels_first(images, source), image_size, channels)
    if len(tensor) != len(labels):
        raise DataError(f"{source}: {len(tensor)} images but {len(labels)} labels")
    return MemoryDataset(tensor, torch.from_numpy(labels.astype(np.int64)), classes)


def _arrays(read: dict, image_size: int | None, channels: int | None, path: Path) -> dict[str, MemoryDataset]:
    count = max((int(labels.max()) + 1 for _, labels in read.values() if len(labels)), default=0)
    classes = [str(i) for i in range(count)]
    return {
        split: _memory(images, labels, classes, image_size, channels, str(path))
        for split, (images, labels) in read.items()
    }


def _split(found: Mapping[str, _Kept], source: str) -> tuple[_Kept, _Kept]:
    whole = found["all"] if "all" in found else found["train"]
    if len(whole) == 0:
        raise DataError(f"{source}: no images")
    if "test" in found:
        if found["test"].image_shape != whole.image_shape:
            raise DataError(
                f"{source}: test images have shape {found['test'].image_shape}, training images {whole.image_shape}"
            )
        return whole, found["test"]
    try:
        train, test = stratified_split(whole.labels)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    return whole.subset(train), whole.subset(test)
