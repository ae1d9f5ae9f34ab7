"""``convdit encode``: a cache of latents in shards, and the data set that reads it."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import data
from ..data.errors import DataError, require
from .codecs import AUTOENCODER, Codec, DiffusersVAE, Pixels, SmallAutoencoder, train_autoencoder
from .common import device_of, open_data
from .options import EncodeOptions, LoopOptions, saved
from .runs import CONFIG, RESULT, WEIGHTS, Run, read_json, write_json, write_whole

_TASK = "encode"


@torch.no_grad()
def encode(options: EncodeOptions, out: str | Path, resume: bool = False) -> LatentDataset:
    """Writes the cache ``out``. With ``resume`` an interrupted one goes on after its last whole shard.

    Raises ValueError or RunError, before anything is encoded, for settings, pictures or a vae that do not fit.
    """
    options.check()
    dataset = open_data(options).train
    channels, height, width = dataset.image_shape
    if options.vae == "small" and (height % 4 or width % 4):
        raise ValueError(f"image_size: {height} does not divide by 4, as the small autoencoder needs")
    vae = DiffusersVAE(options.vae, options.scale) if options.vae not in ("small", "pixels") else None
    config = {"task": _TASK, "options": saved(options), "classes": dataset.classes, "pictures": len(dataset)}
    run = Run(out, config, resume)
    codec: Codec
    if vae is not None:
        codec = vae
    elif options.vae == "pixels":
        codec = Pixels(channels)
    else:
        loop = LoopOptions(batch_size=64, seed=options.seed, cpu=options.cpu)
        with torch.enable_grad():
            model = train_autoencoder(loop, options.autoencoder_steps, dataset, run.path / AUTOENCODER)
        codec = SmallAutoencoder(model)
    device = device_of(options.cpu)
    codec.to(device)
    tqdm = require("tqdm", "encoding").tqdm
    firsts = range(0, len(dataset), options.shard_size)
    for number, first in enumerate(tqdm(firsts, desc=run.path.name, unit="shard")):
        if not _shard(run.path, number).exists():
            indices = range(first, min(first + options.shard_size, len(dataset)))
            _write_shard(_shard(run.path, number), codec, dataset, indices, options, device)
    kept = None if vae is None else {"source": options.vae, "scale": 1 / vae.std[0]}
    result = {"mean": codec.mean, "std": codec.std, "shards": len(firsts), "vae": kept}
    write_json(run.path / RESULT, result | {"latent": options.vae == "small", "channels": channels})
    return LatentDataset(run.path)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:05d}.safetensors"


def _write_shard(path: Path, codec: Codec, dataset: data.ImageDataset, indices: range, options, device) -> None:
    parts: dict[str, list[Tensor]] = {}
    for first in range(0, len(indices), options.batch_size):
        images, labels = dataset.batch(indices[first : first + options.batch_size])
        images = 2 * images.to(device) - 1
        parts.setdefault("labels", []).append(labels)
        for suffix, view in (("", images), ("_flipped", images.flip(-1)))[: 1 + options.flip]:
            for name, value in zip(("mean", "std"), codec.encode(view), strict=True):
                if value is not None:
                    value = value.to("cpu", getattr(torch, options.dtype))
                    parts.setdefault(name + suffix, []).append(value)
    tensors = {name: torch.cat(values).contiguous() for name, values in parts.items()}
    library = require("safetensors.torch", "writing latents", "safetensors")
    write_whole(path, lambda temporary: library.save_file(tensors, temporary))


def is_cache(folder: str | Path) -> bool:
    path = Path(folder) / CONFIG
    return path.exists() and read_json(path).get("task") == _TASK


class LatentDataset(data.ImageDataset):
    """Normalised latents (C, H, W) of a cache that ``encode`` wrote.

    ``batch`` gives the means; ``draw`` draws from the distributions, of the picture or of its mirror image.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        config = read_json(self.folder / CONFIG)
        if not (self.folder / RESULT).exists():
            raise DataError(f"{folder}: not finished: go on with convdit encode --out {folder} --resume")
        self.result: dict[str, Any] = read_json(self.folder / RESULT)
        self.flip, self.size = config["options"]["flip"], config["options"]["shard_size"]
        self._files: dict[int, Any] = {}
        found = [self._file(number) for number in range(self.result["shards"])]
        labels = torch.cat([file.get_tensor("labels") for file in found])
        if len(labels) != config["pictures"]:
            raise DataError(f"{folder}: expected latents of {config['pictures']} pictures, got {len(labels)}")
        _, channels, height, width = found[0].get_slice("mean").get_shape()
        super().__init__(labels, config["classes"], (channels, height, width))
        self.mean = torch.tensor(self.result["mean"]).view(-1, 1, 1)
        self.std = torch.tensor(self.result["std"]).view(-1, 1, 1)
        self.uncertain = "std" in found[0].keys()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # open files do not travel to worker processes

    def _file(self, number: int):
        if number not in self._files:
            safe_open = require("safetensors", "reading latents").safe_open
            try:
                self._files[number] = safe_open(_shard(self.folder, number), framework="pt")
            except Exception as error:  # safetensors has its own error type
                raise DataError(f"{_shard(self.folder, number)}: missing or damaged: {error}") from error
        return self._files[number]

    def _read(self, name: str, indices, mirrored) -> Tensor:
        rows = []
        for index, mirror in zip(indices, mirrored, strict=True):
            number, place = divmod(int(index), self.size)
            rows.append(self._file(number).get_slice(name + "_flipped" * bool(mirror))[place])
        return torch.stack(rows).float()

    def batch(self, indices) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        mean = self._read("mean", indices, torch.zeros(len(indices)))
        return (mean - self.mean) / self.std, self.labels[indices]

    def draw(self, indices, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        indices = torch.as_tensor(indices, dtype=torch.int64)
        mirrored = torch.rand(len(indices), generator=generator) < (0.5 if self.flip else 0.0)
        latents = self._read("mean", indices, mirrored)
        if self.uncertain:
            noise = torch.randn(latents.shape, generator=generator)
            latents = latents + self._read("std", indices, mirrored) * noise
        return (latents - self.mean) / self.std, self.labels[indices]

    def copy_autoencoder(self, run: Path) -> None:
        """Puts the small autoencoder, if the latents are its, where a run of ``train-dit`` keeps it."""
        if self.result["latent"]:
            (run / AUTOENCODER).mkdir(exist_ok=True)
            for name in (CONFIG, WEIGHTS):
                write_whole(run / AUTOENCODER / name, partial(shutil.copy, self.folder / AUTOENCODER / name))
