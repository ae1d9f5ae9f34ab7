"""The models that `accelerate` knows, small, each with weights that hide nothing, and one input."""

from __future__ import annotations

import torch
from torch import nn

from . import official

DEPTHS, DIMS = (1, 1, 2, 1), (16, 24, 32, 40)
SMALL = {"depths": DEPTHS, "dims": DIMS}


def timm_model(name, **options):
    import timm

    return timm.create_model(name, **({"num_classes": 5} | options))


def open_clip_trunk():
    from open_clip.timm_model import TimmModel

    return TimmModel("convnext_atto", embed_dim=8, image_size=64, pool="", proj="linear")


def transformers_model(kind):
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.for_model(kind, depths=DEPTHS, hidden_sizes=DIMS, num_stages=4, num_labels=5)
    return AutoModelForImageClassification.from_config(config)


def diffusers_dit():
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
    return DiTTransformer2DModel(**sizes, num_embeds_ada_norm=10, norm_eps=1e-6)


def diffusers_norm():
    from diffusers.models.normalization import AdaLayerNormZero

    return AdaLayerNormZero(32)


CONVNEXTS = {
    "timm V2, 1x1 convolutions": lambda: timm_model("convnextv2_atto", **SMALL),
    "timm V2, linear": lambda: timm_model("convnextv2_tiny", **SMALL),
    "timm V1, 1x1 convolutions": lambda: timm_model("convnext_atto", **SMALL),
    "timm V1, linear": lambda: timm_model("convnext_tiny", **SMALL, drop_path_rate=0.3),
    "timm, features only": lambda: timm_model("convnextv2_tiny", features_only=True, num_classes=0, **SMALL),
    "timm, drop path": lambda: timm_model("convnextv2_atto", drop_path_rate=0.3, **SMALL),
    "timm, dilated": lambda: timm_model("convnextv2_tiny", output_stride=8, **SMALL),
    "open_clip": open_clip_trunk,
    "transformers V2": lambda: transformers_model("convnextv2"),
    "transformers V1": lambda: transformers_model("convnext"),
    "official V2": lambda: official.ConvNeXtV2(DEPTHS, DIMS, num_classes=5),
    "official V1": lambda: official.ConvNeXtV2(DEPTHS, DIMS, version=1, num_classes=5, drop_path=0.2),
}
DITS = {
    "official DiT": lambda: official.DiT(32, 2, 2),
    "official SiT": lambda: official.SiT(32, 2, 2),
    "diffusers DiT": diffusers_dit,
}
FAMILIES = CONVNEXTS | DITS | {"diffusers AdaLayerNormZero": diffusers_norm}


def make(name: str) -> nn.Module:
    """The model in training mode; fresh GRN, layer scale and adaLN are zero or tiny, so all values are drawn."""
    model, generator = FAMILIES[name](), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.numel() == parameter.shape[-1] else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.train()


def call(name: str, model: nn.Module, n: int = 2, seed: int = 1) -> list[torch.Tensor]:
    """What the model gives for an input of the same values in each dtype."""
    generator, dtype = torch.Generator().manual_seed(seed), next(model.parameters()).dtype

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    torch.manual_seed(2)  # of drop path
    if name in CONVNEXTS:
        out = model(randn(n, 3, 64, 96))
        out = getattr(out, "logits", out)
    elif name == "diffusers AdaLayerNormZero":
        out = model(randn(n, 7, 32), emb=randn(n, 32))
    elif name == "diffusers DiT":
        labels = torch.zeros(n, dtype=torch.long)
        out = model(randn(n, 4, 8, 8), timestep=torch.arange(n), class_labels=labels).sample
    else:
        out = model(randn(n, 4, 8, 8), 100 * torch.arange(n).to(dtype), torch.arange(n))
    return list(out) if isinstance(out, (tuple, list)) else [out]
