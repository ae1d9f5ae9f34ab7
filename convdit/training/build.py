"""Models from the small dictionaries that run folders and weights files keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import models
from ..nn import GlobalResponseNorm
from .options import DiTOptions, ModelOptions, PretrainOptions

if TYPE_CHECKING:
    from .unet import UNet

# Three stages from full resolution: patches of 4 pixels, which pictures of 16 to 64 pixels need.
_SMALL_CONVNEXT = {
    "name": "convnextv2_atto",
    "depths": [2, 2, 2],
    "dims": [32, 64, 128],
    "stem_stride": 1,
}
_SMALL_DIT = {"hidden_size": 128, "depth": 4, "num_heads": 4, "patch_size": 4}
_SMALL_PICTURE = 64
SIZE = ("depths", "dims", "stem_stride", "attention_stages")  # options that go over those of the named ConvNeXt


def convnext_config(options: ModelOptions, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Keyword arguments of ``models.create``, but for the classes."""
    name = options.model
    if name == "auto":
        name = "small" if image_shape[1] <= _SMALL_PICTURE else "convnextv2_atto"
    if name != "small" and name not in models.list():
        raise ValueError(f"model: expected auto, small or one of {', '.join(models.list())}; got {name!r}")
    config: dict[str, Any] = dict(_SMALL_CONVNEXT) if name == "small" else {"name": name}
    for key in SIZE:
        if getattr(options, key) is not None:
            config[key] = getattr(options, key)
    return {**config, "in_chans": image_shape[0]}


def classifier(
    config: dict[str, Any], classes: int, drop_path: float = 0.0, head_scale: float = 1.0
) -> models.ConvNeXt:
    return models.create(**config, num_classes=classes, drop_path_rate=drop_path, head_init_scale=head_scale)


def encoder(config: dict[str, Any]) -> models.ConvNeXt:
    return models.create(**config, features_only=True)


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    """What `SIZE` names, of the ConvNeXt that these arguments make."""
    with torch.device("meta"):
        model = encoder(config)
    return {key: getattr(model, key) for key in SIZE}


def fcmae_config(options: PretrainOptions, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    convnext = convnext_config(options, image_shape)
    stem, first = encoder(convnext).stride, encoder(convnext).dims[0]
    return {
        "encoder": convnext,
        "image_size": image_shape[1],
        "patch_size": stem,
        "mask_ratio": options.mask_ratio,
        "decoder_dim": options.decoder_dim or min(512, 4 * first),
        "decoder_depth": options.decoder_depth,
        "norm_pix_loss": options.norm_pix_loss,
        "grn_scope": options.grn_scope,
        "sparse": options.sparse,
    }


def fcmae(config: dict[str, Any]) -> models.FCMAE:
    return models.FCMAE(**{**config, "encoder": encoder(config["encoder"])})


def switch_off_grn(encoder: nn.Module) -> None:
    """Keeps every GRN of an untrained model the identity: its parameters are zero, and stay so.

    Raises ValueError for a model without GRN.
    """
    layers = [module for module in encoder.modules() if isinstance(module, GlobalResponseNorm)]
    if not layers:
        raise ValueError("grn: a ConvNeXt V1 has none to switch off")
    for layer in layers:
        layer.requires_grad_(False)


def dit_config(options: DiTOptions, shape: tuple[int, int, int], classes: int) -> dict[str, Any]:
    """Keyword arguments of ``models.DiT``, of the named size, or of ``unet.UNet``, for pictures or latents."""
    common = {
        "input_size": shape[1],
        "in_channels": shape[0],
        "num_classes": classes,
        "class_dropout_prob": options.class_dropout,
        "learn_sigma": options.learn_sigma and options.objective == "noise",
    }
    if options.model == "unet":
        given = {"channels": options.hidden_size, "levels": options.depth}
        return {"name": "unet", **{key: value for key, value in given.items() if value is not None}, **common}
    config: dict[str, Any] = dict(_SMALL_DIT) if options.model == "small" else {}
    if options.model != "small":
        config["name"] = options.model.replace("-", "_").replace("/", "_")
        if not hasattr(models, config["name"]) or not config["name"].startswith("DiT_"):
            raise ValueError(
                f"model: expected small, unet or a size of the paper such as DiT-S/2, got {options.model!r}"
            )
    for key in ("hidden_size", "depth", "num_heads", "patch_size"):
        if getattr(options, key) is not None:
            config[key] = getattr(options, key)
    if options.latent and options.model == "small" and options.patch_size is None:
        config["patch_size"] = 2
    config |= common | {"label_init_std": options.label_init_std, "conditioning": options.conditioning}
    return config | ({} if options.zero_init else {"zero_init": False})


def dit(config: dict[str, Any]) -> models.DiT | UNet:
    config = dict(config)
    name, zero_init = config.pop("name", "DiT"), config.pop("zero_init", True)
    if name == "unet":
        from .unet import UNet

        return UNet(**config)
    model = getattr(models, name)(**config)
    if not zero_init:
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():
                nn.init.xavier_uniform_(module.weight)
    return model


def encoder_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of an FCMAE, of a classifier or of itself, in the names of ``models.create``."""
    if any(name.startswith("encoder.") for name in state):
        prefix = "encoder."
        return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    return {n: v for n, v in state.items() if not n.startswith(("norm.", "head."))}
