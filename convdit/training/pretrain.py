"""FCMAE pre-training, and pictures of what the model fills in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import FCMAE
from . import build
from .augment import augmented
from .common import finish, open_data
from .engine import start, train
from .options import DataOptions, PretrainOptions, saved
from .runs import Run, RunError, read_weights
from .transforms import Normalise, augment


def pretrain(options: PretrainOptions, out: str | Path, resume: bool = False) -> FCMAE:
    """Trains an FCMAE in the run folder ``out``; returns it in evaluation mode."""
    accelerator = start(options)
    splits = open_data(options)
    size = splits.train.image_shape[1]
    model_config = build.fcmae_config(options, splits.train.image_shape)
    model = build.fcmae(model_config)
    if not options.grn:
        build.switch_off_grn(model.encoder)
    normalise = Normalise.of(splits.train)
    config = {
        "task": "pretrain",
        "options": saved(options),
        "model": model_config,
        "normalise": vars(normalise),
    }
    run = Run(out, config, resume, accelerator.is_main_process)
    kind = options.augmentation(size)
    training = augmented(splits.train, kind, options.crop_scale)

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": model(normalise(augment(images, kind))).loss}

    model = train(accelerator, model, objective, training, options, run)
    finish(accelerator, run, model, {"test_loss": _test_loss(model, splits.test, normalise)})
    return model


@torch.no_grad()
def _test_loss(model: nn.Module, dataset, normalise: Normalise) -> float:
    """Mean loss over up to 1000 held-out pictures, masks from a seed of their own."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    total, count = 0.0, min(1000, len(dataset))
    for first in range(0, count, 250):
        images, _ = dataset.batch(range(first, min(first + 250, count)))
        loss = model(normalise(images.to(device)), generator=generator).loss
        total += float(loss) * len(images)
    return total / count


def load_fcmae(source: str | Path) -> tuple[FCMAE, Normalise, dict[str, Any]]:
    """The model of a pre-training run in evaluation mode, its normalisation and configuration."""
    state, config = read_weights(source)
    if config is None or config.get("task") != "pretrain":
        raise RunError(f"{source}: not the weights of a pre-training run of convdit")
    model = build.fcmae(config["model"])
    model.load_state_dict(state)
    return model.eval(), Normalise(**config["normalise"]), config


@torch.no_grad()
def reconstructions(model: FCMAE, normalise: Normalise, images: Tensor, seed: int = 0) -> Tensor:
    """(B, C, H, W) in [0, 1] to (3B, C, H, W): original, visible part on grey, filled in."""
    generator = torch.Generator().manual_seed(seed)
    inputs = normalise(images)
    mask = model(inputs, generator=generator).mask
    filled = normalise.invert(model.reconstruct(inputs, mask))
    hidden = mask.repeat_interleave(images.shape[2] // mask.shape[1], 1)
    hidden = hidden.repeat_interleave(images.shape[3] // mask.shape[2], 2)[:, None]
    visible = torch.where(hidden, torch.full_like(images, 0.5), images)
    return torch.stack([images, visible, filled], 1).flatten(0, 1)


def open_pictures(
    source: str | Path,
    count: int,
    data: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
) -> tuple[FCMAE, Normalise, Tensor]:
    """A pre-trained model, its normalisation, and ``count`` held-out pictures (count, C, H, W).

    Without ``data``, those of the run are opened.
    """
    model, normalise, config = load_fcmae(source)
    own = config["model"]
    splits = open_data(
        DataOptions(
            data or config["options"]["data"],
            image_size or own["image_size"],
            channels or own["encoder"]["in_chans"],
        )
    )
    if not 1 <= count <= len(splits.test):
        raise ValueError(f"count: expected 1 to {len(splits.test)}, got {count}")
    chosen = torch.linspace(0, len(splits.test) - 1, count).long()
    return model, normalise, splits.test.batch(chosen)[0]
