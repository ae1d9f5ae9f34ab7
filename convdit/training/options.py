"""Options of the training commands, written once for command line, Python and config.json."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .augment import RESIZED_CROP
from .optim import LAYER_DECAYS

# These may change when a run resumes: the weights do not depend on them.
FREE: tuple[str, ...] = ("save_every", "log_every", "evaluate_every", "workers", "cpu", "grad_checkpointing")
FREE += ("sample_guidance", "sample_channels", "sample_steps", "peak_tflops")
AUGMENTATIONS = ("auto", "none", "shift", "crop", RESIZED_CROP)
CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")
SCHEDULES = ("linear", "cosine", "scaled_linear")
CHANNELS = ("all", "first3")  # that guidance acts on; the first is the default, and all that a U-Net has
_PRECISIONS = ("no", "bf16", "fp16")
_CROP_RATIO = "share of held-out pictures, along a side, to judge on (default: 224/256; from 384 pixels on, all)"


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


def _check_counts(options: Any, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(options, name)}")


@dataclass
class DataOptions:
    data: str = option("mnist5k", "mnist5k, digits, or a path: pictures by class, IDX, .npz, ...")
    image_size: int | None = option(None, "side of the square pictures (default: as the data)")
    channels: int | None = option(None, "1 or 3 (default: as the data)")
    held_out: int | None = option(None, "judge on so many of the held-out pictures (default: all)")


@dataclass
class ModelOptions:
    model: str = option("auto", "a ConvNeXt by name, small, or auto: small up to 64 pixels, else convnextv2_atto")
    depths: list[int] | None = option(None, "blocks a stage, for another size of the model")
    dims: list[int] | None = option(None, "channels a stage, for another size of the model")
    stem_stride: int | None = option(None, "pixels along a site of the first stage")
    attention_stages: int | None = option(None, "so many stages, the last ones, of self-attention blocks")


@dataclass
class LoopOptions:
    steps: int = option(1000, "optimiser steps")
    epochs: float | None = option(None, "passes over the training pictures, in place of steps")
    batch_size: int = option(64, "pictures a step, over all processes")
    lr: float = option(1e-3, "peak learning rate")
    base_lr: float | None = option(None, "in place of lr: lr = base_lr x batch_size / 256")
    min_lr: float | None = option(None, "learning rate at the end (default: a hundredth of lr)")
    weight_decay: float = option(0.05, "AdamW decay of matrices and kernels")
    beta2: float = option(0.95, "AdamW decay of the squared gradient")
    warmup: int | None = option(None, "steps of linear warm-up (default: a twentieth of all)")
    warmup_epochs: float | None = option(None, "passes of linear warm-up, in place of warmup")
    clip_grad: float = option(1.0, "largest norm of the gradient; 0: no limit")
    ema: float = option(0.0, "decay of the moving average of the weights; 0: none")
    augment: str = option(
        "auto", "random geometry (auto: crop for large pictures; resized_crop: timm's, as published)", AUGMENTATIONS
    )
    crop_scale: float = option(0.08, "smallest share of the area of a resized crop")
    accumulate: int = option(1, "parts in which a batch is computed, to save memory")
    mixed_precision: str | None = option(None, "of the forward pass (default: as accelerate launch says)", _PRECISIONS)
    grad_checkpointing: bool = option(False, "keep only the inputs of blocks for the backward pass, to save memory")
    seed: int = option(0, "seed of weights, order, masks and noise")
    save_every: int = option(250, "steps between checkpoints")
    log_every: int = option(25, "steps between lines of log.jsonl")
    evaluate_every: int | None = option(None, "steps between evaluations, where there are any (default: at the end)")
    workers: int = option(0, "processes that read pictures")
    cpu: bool = option(False, "stay on the CPU even where there is a GPU")

    def check(self, world: int = 1) -> None:
        """Raises ValueError for a setting that cannot work, by the name that the user typed."""
        _check_counts(self, "steps", "batch_size", "accumulate", "save_every", "log_every")
        if self.evaluate_every is not None:
            _check_counts(self, "evaluate_every")
        for name in ("clip_grad", "weight_decay", "workers", "seed", "min_lr", "warmup_epochs"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("epochs", "base_lr"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.epochs is None and self.warmup is not None and not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup: expected 0 to {self.steps} (steps), got {self.warmup}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected a positive number, got {self.lr}")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"crop_scale: expected 0 < crop_scale <= 1, got {self.crop_scale}")
        for name in ("ema", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        for name, allowed in (
            ("mixed_precision", (None, *_PRECISIONS)),
            ("augment", AUGMENTATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(filter(None, allowed))}, got {getattr(self, name)!r}"
                )
        if self.batch_size % (self.accumulate * world):
            raise ValueError(
                f"batch_size: {self.batch_size} does not divide into {self.accumulate} part(s) on {world} process(es)"
            )

    def resolved(self, pictures: int) -> LoopOptions:
        """The same for so many training pictures, with ``steps``, ``warmup``, ``lr`` and ``min_lr`` as numbers.

        Raises ValueError where the warm-up is longer than the run or the last learning rate above the peak.
        """
        per_epoch = pictures / self.batch_size
        steps = self.steps if self.epochs is None else max(1, round(self.epochs * per_epoch))
        warmup = steps // 20 if self.warmup is None else self.warmup
        if self.warmup_epochs is not None:
            warmup = round(self.warmup_epochs * per_epoch)
        lr = self.lr if self.base_lr is None else self.base_lr * self.batch_size / 256
        min_lr = lr / 100 if self.min_lr is None else self.min_lr
        if warmup > steps:
            name = "warmup" if self.warmup_epochs is None else "warmup_epochs"
            raise ValueError(f"{name}: {warmup} steps of warm-up do not fit into a run of {steps}")
        if min_lr > lr:
            raise ValueError(f"min_lr: expected at most the peak of {lr:g}, got {min_lr:g}")
        given: dict[str, Any] = {"epochs": None, "base_lr": None, "warmup_epochs": None}
        return replace(self, steps=steps, warmup=warmup, lr=lr, min_lr=min_lr, **given)

    def augmentation(self, image_size: int) -> str:
        if self.augment != "auto":
            return self.augment
        return "shift" if image_size <= 64 else "crop"


@dataclass
class PretrainOptions(LoopOptions, ModelOptions, DataOptions):
    """FCMAE: hide most patches, run sparse convolutions on the rest, predict the hidden ones."""

    mask_ratio: float = option(0.6, "share of patches hidden")
    decoder_dim: int | None = option(None, "width of the decoder (default: 4 x first stage, <= 512)")
    decoder_depth: int = option(1, "blocks of the decoder")
    norm_pix_loss: bool = option(True, "predict pixels normalised by the patch's mean and deviation")
    grn_scope: str = option("sample", "sites that GRN pools over", ("sample", "batch"))
    grn: bool = option(True, "train the encoder's GRN; without: it stays the identity, as if it were not there")
    sparse: bool = option(True, "sparse convolutions; without: dense ones on masked maps, as a check")

    def augmentation(self, image_size: int) -> str:
        """Small pictures stay as they are: the random mask is change enough, and shifts made the features worse."""
        kind = super().augmentation(image_size)
        return "none" if self.augment == "auto" and kind == "shift" else kind


@dataclass
class FinetuneOptions(LoopOptions, ModelOptions, DataOptions):
    """Train a ConvNeXt classifier, from a pre-trained encoder or from random weights."""

    init: str | None = option(None, "run folder or checkpoint to start from (default: random weights)")
    labels: int | None = option(None, "use only so many labelled pictures, balanced (default: all)")
    label_seed: int = option(0, "which pictures those are")
    drop_path: float = option(0.0, "rate of stochastic depth")
    head_init_scale: float = option(1.0, "multiplies the first weights of the head")
    layer_decay: float = option(1.0, "factor of the learning rate from a layer to the one below it")
    layer_decay_type: str = option("single", "what a layer is, as the official code numbers them", LAYER_DECAYS)
    label_smoothing: float = option(0.1, "label smoothing")
    mixup: float = option(0.0, "mixup, parameter of its beta distribution; 0: none")
    cutmix: float = option(0.0, "CutMix, parameter of its beta distribution; 0: none")
    random_erasing: float = option(0.0, "share of pictures of which a rectangle becomes noise")
    randaug: str | None = option(None, "timm's name of a RandAugment, such as rand-m9-mstd0.5-inc1")
    crop_ratio: float | None = option(None, _CROP_RATIO)
    steps: int = option(500, "optimiser steps")

    def check(self, world: int = 1) -> None:
        super().check(world)
        for name in ("mixup", "cutmix", "head_init_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("label_smoothing", "random_erasing", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: expected 0 < layer_decay <= 1, got {self.layer_decay}")
        part = self.batch_size // (self.accumulate * world)
        if (self.mixup or self.cutmix) and part % 2:
            raise ValueError(f"batch_size: mixup and CutMix need an even number of pictures in a part, got {part}")


@dataclass
class ProbeOptions(ModelOptions, DataOptions):
    """Judge the frozen features of an encoder: by a linear classifier, and by nearest neighbours."""

    init: str | None = option(None, "run folder or checkpoint (default: random weights)")
    labels: int | None = option(None, "use only so many labelled pictures, balanced (default: all)")
    label_seed: int = option(0, "which pictures those are")
    neighbours: int = option(20, "of the k-nearest-neighbour classifier")
    crop_ratio: float | None = option(None, _CROP_RATIO)
    penalty: float = option(1e-3, "weight of the squared norm of the classifier")
    seed: int = option(0, "seed of random weights")
    cpu: bool = option(False, "stay on the CPU even where there is a GPU")


@dataclass
class ValidateOptions(DataOptions):
    """Accuracy of a classifier on held-out pictures, cut as the papers do: a run of ours, or a foreign checkpoint."""

    model: str | None = option(None, "name of the ConvNeXt, for a checkpoint that does not say")
    crop_ratio: float | None = option(None, _CROP_RATIO)
    cpu: bool = option(False, "stay on the CPU even where there is a GPU")


@dataclass
class DiTOptions(LoopOptions, DataOptions):
    """Train a class-conditional diffusion transformer, on pictures or on latents that convdit encode wrote (--data)."""

    model: str = option("small", "small, a size of the paper such as DiT-S/2, or unet: diffusers' UNet2DModel")
    conditioning: str = option("adaln_zero", "design of the blocks", CONDITIONINGS)
    zero_init: bool = option(True, "zeros where the design starts from them; without: Xavier there, too")
    hidden_size: int | None = option(None, "width, for another size of the model (unet: channels at the top)")
    depth: int | None = option(None, "blocks, for another size of the model (unet: levels)")
    num_heads: int | None = option(None, "attention heads, for another size of the model")
    patch_size: int | None = option(None, "pixels (or latent sites) along a token")
    label_init_std: float = option(0.02, "spread of the untrained label table; 0.3 for short runs")
    class_dropout: float = option(0.1, "share of labels dropped, for guidance")
    objective: str = option(
        "noise", "to predict noise, as DiT, or the velocity of a rectified flow, as SiT", ("noise", "flow")
    )
    learn_sigma: bool = option(True, "learn the variance as well (a flow has none)")
    schedule: str = option("linear", "growth of the noise (a flow has none)", SCHEDULES)
    min_snr_gamma: float | None = option(None, "weight the noise's error by min(SNR, this) / SNR, as 5 (default: by 1)")
    latent: bool = option(False, "diffuse in the latent space of an autoencoder trained first")
    autoencoder_steps: int = option(600, "steps of the autoencoder, with --latent")
    sample_guidance: float = option(1.0, "guidance of the samples on the way (--evaluate-every)")
    sample_channels: str = option("all", "channels that it acts on; first3: as the public DiT", CHANNELS)
    sample_steps: int = option(50, "sampling steps of the samples on the way")
    peak_tflops: float | None = option(None, "of the device, for the log's mfu (default: a large matmul, measured)")
    # As published: a constant 1e-4 without decay, warm-up or clipping, and a moving average of 0.9999.
    lr: float = option(1e-4, "peak learning rate")
    min_lr: float | None = option(None, "learning rate at the end (default: lr, a constant rate)")
    warmup: int | None = option(0, "steps of linear warm-up")
    beta2: float = option(0.999, "AdamW decay of the squared gradient")
    clip_grad: float = option(0.0, "largest norm of the gradient; 0: no limit")
    ema: float = option(0.9999, "decay of the moving average of the weights; 0: none")
    weight_decay: float = option(0.0, "AdamW decay of matrices and kernels")
    augment: str = option("none", "random geometry of the pictures", AUGMENTATIONS)

    def check(self, world: int = 1) -> None:
        super().check(world)
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning: expected one of {', '.join(CONDITIONINGS)}, got {self.conditioning!r}")
        if self.grad_checkpointing and self.model == "unet":
            raise ValueError("grad_checkpointing: expected off for unet, diffusers' UNet2DModel, got on")
        if self.objective not in ("noise", "flow"):
            raise ValueError(f"objective: expected noise or flow, got {self.objective!r}")
        if self.objective == "flow" and self.schedule != "linear":
            raise ValueError(f"schedule: expected none with objective flow, got {self.schedule!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.min_snr_gamma is not None and self.objective == "flow":
            raise ValueError(f"min_snr_gamma: expected none with objective flow, got {self.min_snr_gamma}")
        if self.min_snr_gamma is not None and not 0 < self.min_snr_gamma < math.inf:
            raise ValueError(f"min_snr_gamma: expected a positive number, got {self.min_snr_gamma}")
        if not 0 <= self.class_dropout < 1:
            raise ValueError(f"class_dropout: expected 0 <= class_dropout < 1, got {self.class_dropout}")
        channels = CHANNELS[:1] if self.model == "unet" else CHANNELS
        if self.sample_channels not in channels:
            raise ValueError(f"sample_channels: expected {' or '.join(channels)}, got {self.sample_channels!r}")
        if not 1 <= self.sample_steps <= 1000:
            raise ValueError(f"sample_steps: expected 1 to 1000, got {self.sample_steps}")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"peak_tflops: expected a positive number, got {self.peak_tflops}")

    def resolved(self, pictures: int) -> LoopOptions:
        resolved = super().resolved(pictures)
        return resolved if self.min_lr is not None else replace(resolved, min_lr=resolved.lr)


@dataclass
class EncodeOptions(DataOptions):
    """Encode the training pictures once, for train-dit --data OUT: mean and deviation of the latents, in shards."""

    vae: str = option(
        "small", "small: an autoencoder trained first; pixels: none; or an AutoencoderKL of diffusers: folder, hub name"
    )
    scale: float | None = option(None, "of an AutoencoderKL's latents (default: as its configuration; DiT: 0.18215)")
    flip: bool = option(True, "keep the latents of the mirrored pictures, too, for training to draw from")
    dtype: str = option("float32", "of the numbers kept", ("float32", "float16"))
    shard_size: int = option(4096, "pictures a file")
    batch_size: int = option(64, "pictures encoded at once")
    autoencoder_steps: int = option(600, "steps of the small autoencoder")
    seed: int = option(0, "seed of the small autoencoder")
    cpu: bool = option(False, "stay on the CPU even where there is a GPU")

    def check(self) -> None:
        """Raises ValueError for a setting that cannot work, by the name that the user typed."""
        _check_counts(self, "shard_size", "batch_size", "autoencoder_steps")
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype: expected float32 or float16, got {self.dtype!r}")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale: expected a positive number, got {self.scale}")
        if self.scale is not None and self.vae in ("small", "pixels"):
            raise ValueError(f"scale: expected none with vae {self.vae}, got {self.scale}")


@dataclass
class ImpactOptions:
    """The talk's table, small: supervised, supervised at equal compute, FCMAE then fine-tuned; ConvNeXt V1 and V2."""

    data: str = option("mnist5k", "mnist5k, digits, or a path")
    labels: int = option(200, "labelled pictures, balanced; pre-training sees all pictures, without labels")
    repeats: int = option(2, "seeds of each figure: other labels and, from scratch, other weights")
    pretrain_steps: int = option(400, "steps of each FCMAE pre-training")
    finetune_steps: int = option(100, "steps of each fine-tuning, and of the shorter supervised runs")
    seed: int = option(0, "first seed")
    cpu: bool = option(False, "stay on the CPU even where there is a GPU")

    def check(self) -> None:
        _check_counts(self, "labels", "repeats", "pretrain_steps", "finetune_steps")


@dataclass
class CollapseOptions:
    """Feature collapse: distance, dead and saturated channels by layer, after FCMAE of V1, V2, and V2 without GRN."""

    data: str = option("mnist5k", "mnist5k, digits, or a path")
    pretrain_steps: int = option(600, "steps of each FCMAE pre-training")
    pictures: int = option(200, "held-out pictures that the figures are taken from")
    seed: int = option(0, "seed of weights, order and masks")
    cpu: bool = option(False, "stay on the CPU even where there is a GPU")

    def check(self) -> None:
        _check_counts(self, "pictures", "pretrain_steps")


def saved(options: Any) -> dict[str, Any]:
    """What config.json keeps: everything that the weights depend on."""
    return {name: value for name, value in asdict(options).items() if name not in FREE}
