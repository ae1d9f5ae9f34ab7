"""What the training commands share: opening data and weights, and closing a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from .build import SIZE, convnext_config, encoder_part, sizes
from .options import DataOptions, ModelOptions
from .runs import RESULT, WEIGHTS, Run, RunError, read_weights, save_weights, write_json
from .transforms import Normalise


def open_data(options: DataOptions, crop_ratio: float | None = 1.0) -> data.Splits:
    train, test = data.load(options.data, options.image_size, options.channels, crop_ratio)
    if options.held_out is not None:
        if options.held_out < 1:
            raise ValueError(f"held_out: expected at least 1, got {options.held_out}")
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
        test = test.subset(order[: options.held_out].sort().values)
    return data.Splits(train, test)


def initial_encoder(source: str) -> tuple[dict[str, Tensor], dict | None]:
    """The encoder's state_dict in our names, from a run of ours or from a foreign checkpoint.

    The second value is the configuration of a run of ours: the architecture comes from there.
    """
    from .. import checkpoints

    state, config = read_weights(source)
    if config is None:
        state = checkpoints.convert(state, "convdit")
    elif config.get("task") not in ("pretrain", "finetune"):
        raise RunError(f"{source}: holds no ConvNeXt encoder but a model of {config.get('task')!r}")
    return encoder_part(state), config


def convnext_of(source: dict | None, options: ModelOptions, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The ConvNeXt arguments: those of the run that the weights come from, else those of the options."""
    if source is None:
        return convnext_config(options, image_shape)
    config = source["model"]["encoder"] if source["task"] == "pretrain" else source["model"]
    if options.model not in ("auto", "small", config["name"]):
        raise RunError(f"model: the weights of init are for {config['name']}, asked for {options.model}")
    given = {key: getattr(options, key) for key in SIZE if getattr(options, key) is not None}
    own, asked = sizes(config), sizes({**config, **given})
    for key in SIZE:
        if asked[key] != own[key]:
            raise RunError(f"{key}: the weights of init are for {own[key]}, asked for {asked[key]}")
    if config["in_chans"] != image_shape[0]:
        raise RunError(
            f"channels: the weights of init are for {config['in_chans']}, the pictures have {image_shape[0]}"
        )
    return config


def normalisation(config: dict | None, train: data.ImageDataset, foreign: bool = False) -> Normalise:
    """That of the run that the weights come from, else that of the data.

    Other projects' weights, ``foreign``, of three channels get the mean and deviation of ImageNet that they share.
    """
    if config is not None and len(config["normalise"]["mean"]) == train.image_shape[0]:
        return Normalise(**config["normalise"])
    if foreign and train.image_shape[0] == 3:
        return imagenet_normalisation()
    return Normalise.of(train)


def imagenet_normalisation() -> Normalise:
    """What the published checkpoints of every ConvNeXt were trained with."""
    return Normalise([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def finish(accelerator, run: Run, model: nn.Module, result: dict[str, Any]) -> None:
    """Writes the weights and the result of a run that is done."""
    if accelerator.is_main_process:
        write_json(run.path / RESULT, result)
        save_weights(run.path / WEIGHTS, model.state_dict(), run.config)
    accelerator.wait_for_everyone()


def device_of(cpu: bool) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
