"""From pictures in [-1, 1] to what a DiT diffuses, and back: pixels, the small autoencoder, or an AutoencoderKL.

A codec has ``encode(images)``, mean and deviation (or None) of the latents, not normalised; ``decode(latents)``,
from normalised ones; ``mean`` and ``std``, lists by channel, such that (latents - mean) / std is normalised.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from ..data.errors import require
from .autoencoder import Autoencoder
from .common import finish
from .engine import start, train
from .options import LoopOptions, saved
from .runs import Run, RunError, read_weights

AUTOENCODER = "autoencoder"  # folder of its run, inside that of the DiT or of the latents
NAMES = ("small", "pixels")


class Pixels(nn.Module):
    """No autoencoder: the latents are the pictures."""

    def __init__(self, channels: int):
        super().__init__()
        self.mean, self.std = [0.0] * channels, [1.0] * channels

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        return images, None

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class SmallAutoencoder(nn.Module):
    """The autoencoder that ``train_autoencoder`` trained."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        self.model = model.eval()
        self.mean, self.std = model.latent_mean.flatten().tolist(), model.latent_std.flatten().tolist()

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        return self.model.encoder(images), None

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents)


class DiffusersVAE(nn.Module):
    """An AutoencoderKL of diffusers, from a local folder (its own, or of a pipeline) or by its name on the hub.

    ``scale``: its latents times this are about standard normal; None takes what its configuration says, which is
    0.18215 for that of Stable Diffusion, the one of DiT.
    """

    def __init__(self, source: str, scale: float | None = None):
        super().__init__()
        library = require("diffusers", "an AutoencoderKL")
        inner = {"subfolder": "vae"} if (Path(source) / "vae" / "config.json").exists() else {}
        try:
            self.model = library.AutoencoderKL.from_pretrained(source, **inner).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise RunError(
                f"vae: expected {', '.join(NAMES)}, or the folder or hub name of an AutoencoderKL; {source!r}: {error}"
            ) from None
        config = self.model.config
        scale = config.scaling_factor if scale is None else scale
        channels = config.latent_channels
        self.mean, self.std = [config.get("shift_factor") or 0.0] * channels, [1 / scale] * channels

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        wanted = self.model.config.in_channels
        if images.shape[1] != wanted:
            raise ValueError(f"channels: the vae takes {wanted}, got pictures of {images.shape[1]}: add --channels")
        posterior = self.model.encode(images).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents * self.std[0] + self.mean[0]).sample


Codec = Pixels | SmallAutoencoder | DiffusersVAE


def train_autoencoder(options: LoopOptions, steps: int, dataset: data.ImageDataset, out: Path) -> Autoencoder:
    """The small autoencoder, trained in the run folder ``out`` with the seed, batch and device of ``options``."""
    loop = LoopOptions(**{f.name: getattr(options, f.name) for f in fields(LoopOptions)})
    given: dict[str, Any] = dict.fromkeys(("epochs", "base_lr", "min_lr", "warmup", "warmup_epochs", "evaluate_every"))
    loop = replace(loop, steps=steps, lr=2e-3, beta2=0.95, ema=0.0, weight_decay=0.0, **given)
    accelerator = start(loop)
    model = Autoencoder(dataset.image_shape[0])
    config = {
        "task": "autoencoder",
        "options": saved(loop),
        "model": {"channels": dataset.image_shape[0]},
    }
    run = Run(out, config, resume=out.exists(), main=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    model = train(accelerator, model, lambda model, images, labels: model(2 * images - 1), dataset, loop, run)
    images, _ = dataset.batch(torch.linspace(0, len(dataset) - 1, min(1000, len(dataset))).long())
    model.measure(2 * images.to(accelerator.device) - 1)
    finish(accelerator, run, model, {})
    return model


def load_autoencoder(folder: Path) -> Autoencoder:
    """From the run folder of ``train_autoencoder``."""
    state, config = read_weights(folder)
    if config is None or config.get("task") != "autoencoder":
        raise RunError(f"{folder}: not the weights of an autoencoder")
    model = Autoencoder(**config["model"])
    model.load_state_dict(state)
    return model.eval()


def decoder(config: dict[str, Any], folder: Path) -> DiffusersVAE | Autoencoder | None:
    """What turns the latents of a DiT run into pictures: from its configuration and folder. None for pixels."""
    if config.get("vae"):
        return DiffusersVAE(**config["vae"])
    return load_autoencoder(folder / AUTOENCODER) if config["latent"] else None
