"""Training of a diffusion transformer, on pixels, on latents made on the way, or on a cache of latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from . import build
from .augment import augmented
from .autoencoder import Autoencoder
from .codecs import AUTOENCODER, decoder, train_autoencoder
from .common import finish, open_data
from .engine import start, train
from .latents import LatentDataset, is_cache
from .options import DiTOptions, saved
from .pictures import grid, save_png
from .runs import Run
from .sample import STEPS, PictureMaker, process
from .speed import utilisation
from .transforms import augment

_BUCKETS = 4  # of timesteps, for the log
_SAMPLES = 4  # a class, on the way


def train_dit(options: DiTOptions, out: str | Path, resume: bool = False) -> PictureMaker:
    """Trains a DiT in the run folder ``out`` (its autoencoder, with ``latent``, in a folder inside).

    The log has the loss by quarter of the timesteps ("loss_t0_249", ...; of a flow, times in thousandths, 0 noise and
    1000 data), throughput and model FLOP utilisation. With ``evaluate_every``, samples of the moving average lie in
    ``out/samples``, from the same noise every time.
    """
    accelerator = start(options)
    dataset = _open(options)
    channels, height, width = shape = dataset.image_shape
    if height != width:
        raise ValueError(f"image_size: expected square pictures or latents, got {height}x{width}")
    cache = dataset if isinstance(dataset, LatentDataset) else None
    if options.latent:
        if height % 4:
            raise ValueError(f"image_size: {height} does not divide by 4, as --latent needs")
        shape = (Autoencoder().latent_channels, height // 4, width // 4)
    model_config = build.dit_config(options, shape, len(dataset.classes))
    model = build.dit(model_config)
    config = {
        "task": "train-dit",
        "options": saved(options),
        "model": model_config,
        "classes": dataset.classes,
        "latent": options.latent or bool(cache and cache.result["latent"]),
        "vae": cache.result["vae"] if cache else None,
        "objective": options.objective,
        "schedule": options.schedule,
        "min_snr_gamma": options.min_snr_gamma,
        "channels": cache.result["channels"] if cache else channels,
    }
    run = Run(out, config, resume, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    autoencoder = None
    if options.latent:
        autoencoder = train_autoencoder(options, options.autoencoder_steps, dataset, run.path / AUTOENCODER)
    if cache and accelerator.is_main_process:
        cache.copy_autoencoder(run.path)
    accelerator.wait_for_everyone()
    decode = autoencoder if cache is None else decoder(config, run.path)
    if decode is not None:
        decode.to(accelerator.device)
    diffusion = process(config)
    kind = options.augmentation(height)

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = images if cache else 2 * augment(images, kind) - 1
        if autoencoder is not None:
            with torch.no_grad():
                x = autoencoder.encode(x)
        t = diffusion.draw_timesteps(len(x), x.device)
        losses = diffusion.training_losses(model, x, t, y=labels)
        values = {name: value.mean() for name, value in losses.items()}
        return values | by_timestep(losses["loss"].detach(), (STEPS * t).long() if t.is_floating_point() else t)

    def show(step: int, model: Any) -> None:
        labels = torch.arange(min(10, len(dataset.classes))).repeat_interleave(_SAMPLES)
        maker = PictureMaker(model, decode, run.config)
        guidance, channels = options.sample_guidance, options.sample_channels
        pictures = maker.sample(labels, guidance, options.sample_steps, seed=options.seed, channels=channels)
        (run.path / "samples").mkdir(exist_ok=True)
        zoom = max(1, 64 // pictures.shape[-1])
        save_png(run.path / "samples" / f"step-{step:08d}.png", grid(pictures, columns=_SAMPLES, zoom=zoom))

    one = (torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    peak = options.peak_tflops and options.peak_tflops * 1e12
    precision, world = accelerator.mixed_precision, accelerator.num_processes
    speed = utilisation(model, one, accelerator.device, precision, world, peak)
    training = dataset if cache else augmented(dataset, kind, options.crop_scale)
    shown = show if options.evaluate_every else None
    model = train(accelerator, model, objective, training, options, run, show=shown, speed=speed)
    finish(accelerator, run, model, {})
    return PictureMaker(model, decode, run.config)


def by_timestep(loss: Tensor, t: Tensor) -> dict[str, Tensor]:
    """For each quarter of the timesteps, the sum of the losses (N,) whose t (N,) lies in it, and their number."""
    width = STEPS // _BUCKETS
    member = torch.nn.functional.one_hot(t // width, _BUCKETS).to(loss.dtype)
    pairs = torch.stack([loss @ member, member.sum(0)], 1)
    return {f"loss_t{i * width}_{(i + 1) * width - 1}": pair for i, pair in enumerate(pairs)}


def _open(options: DiTOptions) -> data.ImageDataset:
    if not is_cache(options.data):
        return open_data(options).train
    for name, plain in (("latent", False), ("augment", "none"), ("image_size", None), ("channels", None)):
        if getattr(options, name) != plain:
            raise ValueError(f"{name}: {options.data} holds latents, which take none, got {getattr(options, name)!r}")
    return LatentDataset(options.data)
