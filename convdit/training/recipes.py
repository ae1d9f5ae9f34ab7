"""Published settings of training runs, by name: of ConvNeXt (arXiv:2201.03545) and ConvNeXt V2 (arXiv:2301.00808).

The numbers are those of tables 8 to 13 of the V2 paper and of the command lines in the two official repositories.
Where the two differ the command line is followed: the paper's table 11 prints a base rate of 6.25e-3 for Base and
Large, the command line 6.25e-4; the 1.25e-3 of Huge is taken to be ten times too large likewise.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .options import FinetuneOptions, LoopOptions, PretrainOptions

_RANDAUG = "rand-m9-mstd0.5-inc1"
_ALL = {"image_size": 224, "channels": 3, "clip_grad": 0.0, "augment": "resized_crop"}
_PRETRAIN = _ALL | {
    "batch_size": 4096,
    "base_lr": 1.5e-4,
    "min_lr": 0.0,
    "weight_decay": 0.05,
    "beta2": 0.95,
    "epochs": 1600.0,
    "warmup_epochs": 40.0,
    "crop_scale": 0.2,
    "mask_ratio": 0.6,
    "decoder_dim": 512,
    "decoder_depth": 1,
    "norm_pix_loss": True,
}
_CLASSIFY = _ALL | {
    "min_lr": 1e-6,
    "beta2": 0.999,
    "crop_scale": 0.08,
    "randaug": _RANDAUG,
    "random_erasing": 0.25,
    "label_smoothing": 0.1,
    "ema": 0.9999,
}
_MIXED = {"mixup": 0.8, "cutmix": 1.0}
_FINETUNE = _CLASSIFY | {"batch_size": 1024, "head_init_scale": 0.001}


def _small(mixing: float, drop_path: float, weight_decay: float = 0.3) -> dict[str, Any]:
    return _FINETUNE | {
        "base_lr": 2e-4,
        "weight_decay": weight_decay,
        "epochs": 600.0,
        "warmup_epochs": 0.0,
        "layer_decay": 0.9,
        "layer_decay_type": "single",
        "label_smoothing": 0.2,
        "mixup": mixing,
        "cutmix": mixing,
        "drop_path": drop_path,
    }


def _large(base_lr: float, epochs: float, warmup: float, layer_decay: float, drop_path: float) -> dict[str, Any]:
    return _FINETUNE | {
        **_MIXED,
        "base_lr": base_lr,
        "weight_decay": 0.05,
        "epochs": epochs,
        "warmup_epochs": warmup,
        "layer_decay": layer_decay,
        "layer_decay_type": "group",
        "drop_path": drop_path,
    }


# The paper says "group" of Base and Large and nothing of Huge, whose 36 blocks are those of Base.
_V2_FINETUNE = {
    "atto": _small(0.0, 0.1),
    "femto": _small(0.3, 0.0, weight_decay=0.05),
    "pico": _small(0.3, 0.0),
    "nano": _small(0.5, 0.1),
    "tiny": _large(8e-4, 300.0, 40.0, 0.9, 0.2) | {"layer_decay_type": "single"},
    "base": _large(6.25e-4, 100.0, 20.0, 0.6, 0.1),
    "large": _large(6.25e-4, 100.0, 20.0, 0.6, 0.2),
    "huge": _large(1.25e-4, 50.0, 10.0, 0.75, 0.3),
}
# Of the sizes that were fine-tuned on ImageNet-22K in between: layer decay there and on ImageNet-1K, drop path
# there and on ImageNet-1K, epochs on ImageNet-1K.
_V2_22K = {
    "nano": (0.9, 0.9, 0.0, 0.1, 90.0),
    "tiny": (0.9, 0.9, 0.0, 0.1, 90.0),
    "base": (0.8, 0.8, 0.1, 0.2, 30.0),
    "large": (0.8, 0.8, 0.1, 0.3, 30.0),
    "huge": (0.8, 0.85, 0.3, 0.5, 30.0),
}
_V1_DROP_PATH = {"tiny": 0.1, "small": 0.4, "base": 0.5, "large": 0.5}


def _recipes() -> dict[str, tuple[type[LoopOptions], dict[str, Any]]]:
    found: dict[str, tuple[type[LoopOptions], dict[str, Any]]] = {}
    for size, values in _V2_FINETUNE.items():
        model = f"convnextv2_{size}"
        found[f"{model}_pretrain"] = PretrainOptions, _PRETRAIN | {"model": model}
        found[f"{model}_finetune"] = FinetuneOptions, values | {"model": model}
    for size, (between, after, drop_between, drop_after, epochs) in _V2_22K.items():
        model = f"convnextv2_{size}"
        own = {"model": model, "layer_decay_type": _V2_FINETUNE[size]["layer_decay_type"]}
        found[f"{model}_22k"] = (
            FinetuneOptions,
            _FINETUNE
            | _MIXED
            | own
            | {
                "batch_size": 4096,
                "base_lr": 2.5e-4,
                "weight_decay": 0.05,
                "epochs": 90.0,
                "warmup_epochs": 5.0,
                "layer_decay": between,
                "drop_path": drop_between,
                "ema": 0.0,
            },
        )
        found[f"{model}_22k_1k"] = (
            FinetuneOptions,
            _FINETUNE
            | own
            | {
                "batch_size": 512,
                "base_lr": 2.5e-5,
                "weight_decay": 1e-8,
                "epochs": epochs,
                "warmup_epochs": 0.0,
                "layer_decay": after,
                "drop_path": drop_after,
                "ema": 0.0 if size == "huge" else 0.9999,
            },
        )
    for size, drop_path in _V1_DROP_PATH.items():
        found[f"convnext_{size}_supervised"] = (
            FinetuneOptions,
            _CLASSIFY
            | _MIXED
            | {
                "model": f"convnext_{size}",
                "batch_size": 4096,
                "base_lr": 2.5e-4,
                "weight_decay": 0.05,
                "epochs": 300.0,
                "warmup_epochs": 20.0,
                "drop_path": drop_path,
            },
        )
    return found


RECIPES = _recipes()
# Two ways to say the same: what is typed takes the place of the other in a recipe.
_PAIRS = (("steps", "epochs"), ("lr", "base_lr"), ("warmup", "warmup_epochs"))


def names(kind: type) -> list[str]:
    """The recipes for this class of options."""
    return [name for name, (made_for, _) in RECIPES.items() if made_for is kind]


def filled(kind: type, given: dict[str, Any], recipe: str | None = None, kept: dict[str, Any] | None = None) -> Any:
    """Options of class ``kind``: those ``given``, over the recipe's, over ``kept`` (of a run to resume), over defaults.

    Raises ValueError for an unknown recipe, one of another command, and for both of two options that say the same.
    """
    for one, other in _PAIRS:
        if given.get(one) is not None and given.get(other) is not None:
            raise ValueError(f"{one}, {other}: give one of the two, got {given[one]} and {given[other]}")
    if recipe is not None and recipe not in names(kind):
        raise ValueError(f"recipe: expected one of {', '.join(names(kind))}; got {recipe!r}")
    known = {f.name for f in fields(kind)}
    below = {name: value for name, value in (kept or {}).items() if name in known}
    below |= RECIPES[recipe][1] if recipe is not None else {}
    for pair in _PAIRS:
        for one, other in (pair, pair[::-1]):
            if given.get(one) is not None:
                below.pop(other, None)
    return kind(**below | given)
