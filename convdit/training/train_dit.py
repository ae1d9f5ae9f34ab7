"""Training of a diffusion transformer, on pixels or on the latents of a small autoencoder."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import data
from ..diffusion import GaussianDiffusion
from . import build
from .augment import augmented
from .autoencoder import Autoencoder
from .common import finish, open_data
from .engine import start, train
from .options import DiTOptions, LoopOptions, saved
from .runs import Run
from .sample import AUTOENCODER, STEPS, PictureMaker
from .transforms import augment


def train_dit(options: DiTOptions, out: str | Path, resume: bool = False) -> PictureMaker:
    """Trains a DiT in the run folder ``out`` (its autoencoder, with ``latent``, in a folder inside)."""
    accelerator = start(options)
    splits = open_data(options)
    channels, height, width = shape = splits.train.image_shape
    if options.latent:
        if height % 4 or width % 4:
            raise ValueError(f"image_size: {height} does not divide by 4, as --latent needs")
        shape = (Autoencoder().latent_channels, height // 4, width // 4)
    model_config = build.dit_config(options, shape, len(splits.train.classes))
    model = build.dit(model_config)
    config = {
        "task": "train-dit",
        "options": saved(options),
        "model": model_config,
        "classes": splits.train.classes,
        "latent": options.latent,
        "schedule": options.schedule,
        "channels": channels,
    }
    run = Run(out, config, resume, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    autoencoder = None
    if options.latent:
        autoencoder = _train_autoencoder(options, splits.train, run.path / AUTOENCODER)
    diffusion = GaussianDiffusion(STEPS, options.schedule, learn_sigma=options.learn_sigma)
    kind = options.augmentation(height)

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = 2 * augment(images, kind) - 1
        if autoencoder is not None:
            with torch.no_grad():
                x = autoencoder.encode(x)
        t = torch.randint(0, STEPS, (len(x),), device=x.device)
        losses = diffusion.training_losses(model, x, t, y=labels)
        return {name: value.mean() for name, value in losses.items()}

    training = augmented(splits.train, kind, options.crop_scale)
    model = train(accelerator, model, objective, training, options, run)
    finish(accelerator, run, model, {})
    return PictureMaker(model, autoencoder, run.config)


def _train_autoencoder(options: DiTOptions, dataset: data.ImageDataset, out: Path) -> Autoencoder:
    loop = LoopOptions(**{f.name: getattr(options, f.name) for f in fields(LoopOptions)})
    given = dict.fromkeys(("epochs", "base_lr", "min_lr", "warmup", "warmup_epochs"))
    loop = replace(loop, steps=options.autoencoder_steps, lr=2e-3, ema=0.0, weight_decay=0.0, **given)
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
