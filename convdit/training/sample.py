"""Class-conditional pictures from a trained diffusion transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion import GaussianDiffusion, RectifiedFlow
from ..models import DiT
from ..models.modulation_cache import table_bytes
from . import build
from .autoencoder import Autoencoder
from .codecs import DiffusersVAE, decoder
from .common import device_of
from .options import CHANNELS
from .pictures import grid, save_png
from .runs import RunError, read_weights, write_whole
from .unet import UNet

STEPS = 1000  # of the diffusion process, in training
SAMPLERS = {"noise": ("ddim", "ddpm"), "flow": ("euler", "heun")}  # the first is the default
_CACHE_LIMIT = 2**30  # bytes that a table of modulations may take


def process(config: dict[str, Any], steps: int | None = None) -> GaussianDiffusion | RectifiedFlow:
    """The process that a run of ``train-dit`` with this configuration trains, or samples from in so many steps."""
    if objective_of(config) == "flow":
        return RectifiedFlow(steps or STEPS)
    respacing = None if steps is None else str(steps)
    gamma = config.get("min_snr_gamma")  # older runs have none
    return GaussianDiffusion(STEPS, config["schedule"], respacing, config["model"]["learn_sigma"], gamma)


def objective_of(config: dict[str, Any]) -> str:
    return config.get("objective", "noise")  # the only one of older runs


class PictureMaker:
    """A DiT (or its rival, a U-Net) with the autoencoder, if any, that turns its latents into pictures."""

    def __init__(self, dit: DiT | UNet, autoencoder: Autoencoder | DiffusersVAE | None, config: dict[str, Any]):
        self.dit = dit.eval()
        self.autoencoder = None if autoencoder is None else autoencoder.eval()
        self.config = config

    @classmethod
    def load(cls, source: str | Path, cpu: bool = False) -> PictureMaker:
        """From the run folder of ``train-dit``, or from its model.safetensors."""
        state, config = read_weights(source)
        if config is None or config.get("task") != "train-dit":
            raise RunError(f"{source}: not the weights of a train-dit run of convdit")
        device = device_of(cpu)
        dit = build.dit(config["model"])
        dit.load_state_dict(state)
        autoencoder = decoder(config, Path(source) if Path(source).is_dir() else Path(source).parent)
        if autoencoder is not None:
            autoencoder.to(device)
        return cls(dit.to(device), autoencoder, config)

    @property
    def classes(self) -> list[str]:
        return self.config["classes"]

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        guidance: float = 1.0,
        steps: int = 50,
        sampler: str | None = None,
        seed: int = 0,
        progress: bool = False,
        interval: Sequence[float] | None = None,
        channels: str = "all",
        batch: int = 250,
    ) -> Tensor:
        """Pictures (N, C, H, W) in [0, 1] of the classes ``labels`` (N,), on the CPU.

        ``guidance``, ``sampler``, ``interval`` and ``channels`` are those of ``pictures``.
        """
        device = next(self.dit.parameters()).device
        start = torch.Generator().manual_seed(seed)  # the same noise on every device
        later = torch.Generator(device).manual_seed(seed + 1)
        parts = []
        for part in labels.split(batch):
            noise = torch.randn(len(part), *self.latent_shape, generator=start)
            parts.append(self.pictures(noise, part, guidance, steps, sampler, later, progress, interval, channels))
        return torch.cat(parts)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the model denoises."""
        side = self.config["model"]["input_size"]
        return self.config["model"]["in_channels"], side, side

    @torch.no_grad()
    def pictures(
        self,
        noise: Tensor,
        y: Tensor,
        guidance: float = 1.0,
        steps: int = 50,
        sampler: str | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        interval: Sequence[float] | None = None,
        channels: str = "all",
    ) -> Tensor:
        """Pictures (N, C, H, W) in [0, 1], on the CPU, from noise (N, ...) and labels or embeddings y.

        ``guidance`` is the scale of classifier-free guidance; 1 is none; ``interval`` the lowest and highest timestep
        (of a flow: time) at which there is any; ``channels`` those that it acts on, "all", or "first3" as in the
        public DiT. ``sampler`` is "ddim" (the default) or "ddpm"; of a flow "euler" (the default) or "heun".
        """
        device = next(self.dit.parameters()).device
        diffusion = process(self.config, steps)
        sampler = self.check(sampler, interval, channels)
        y = y.to(device)
        arguments: dict[str, Any] = {"y": y}
        forward: Callable[..., Tensor] = self.dit
        if guidance != 1.0:
            forward = self.dit.forward_with_cfg
            arguments |= {"cfg_scale": guidance, "channels": channels}
            arguments |= {} if interval is None else {"interval": tuple(interval)}
        if isinstance(diffusion, GaussianDiffusion):
            arguments["clip_denoised"] = self.autoencoder is None
        x = diffusion.sample(
            forward,
            tuple(noise.shape),
            sampler=sampler,
            noise=noise.to(device),
            generator=generator,
            progress=progress,
            cache_modulation=self._caches(len(diffusion.timesteps), y),
            **arguments,
        )
        if self.autoencoder is not None:
            x = self.autoencoder.decode(x)
        return ((x + 1) / 2).clamp(0, 1).cpu()

    def check(self, sampler: str | None, interval: Sequence[float] | None, channels: str = "all") -> str:
        """The sampler, or that of this run for None. Raises ValueError for a setting that is not this run's."""
        objective = objective_of(self.config)
        last = 1 if objective == "flow" else STEPS - 1
        if sampler is not None and sampler not in SAMPLERS[objective]:
            known = " or ".join(SAMPLERS[objective])
            raise ValueError(f"sampler: expected {known} for weights of objective {objective}, got {sampler!r}")
        if interval is not None and not 0 <= interval[0] <= interval[1] <= last:
            raise ValueError(
                f"guidance_interval: expected 0 <= low <= high <= {last} for weights of objective {objective}, "
                f"got {interval[0]:g} and {interval[1]:g}"
            )
        known_channels = CHANNELS[:1] if isinstance(self.dit, UNet) else CHANNELS
        if channels not in known_channels:
            raise ValueError(f"guidance_channels: expected {' or '.join(known_channels)}, got {channels!r}")
        return sampler or SAMPLERS[objective][0]

    def _caches(self, steps: int, y: Tensor) -> bool:
        """Whether to make the modulation of all steps beforehand: where there is such, and it takes no great memory."""
        if not isinstance(self.dit, DiT):
            return False
        conditions = len(y) if y.is_floating_point() else len(y.unique())
        return 0 < table_bytes(self.dit, steps, conditions + 1) <= _CACHE_LIMIT


def class_numbers(names: Sequence[str] | None, classes: Sequence[str]) -> list[int]:
    """Classes by name or number; all of them for None."""
    if names is None:
        return list(range(len(classes)))
    numbers = []
    for name in names:
        if name in classes:
            numbers.append(list(classes).index(name))
        elif name.isdigit() and int(name) < len(classes):
            numbers.append(int(name))
        else:
            known = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise ValueError(f"classes: expected names among {known}, or their numbers, got {name!r}")
    return numbers


def sample_to_file(
    source: str | Path,
    out: Path,
    classes: Sequence[str] | None = None,
    count: int = 8,
    cpu: bool = False,
    guidance: Sequence[float] = (2.0,),
    **settings: Any,
) -> None:
    """Writes ``count`` samples a class: a PNG grid, a row a class, or an .npz of the arrays.

    Several scales of ``guidance`` stand side by side in the PNG, in their order, from the same noise.
    """
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"out: expected a name ending in .png or .npz, got {out}")
    if len(guidance) > 1 and out.suffix != ".png":
        raise ValueError(f"guidance: expected one scale for {out.suffix}, got {len(guidance)}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if not 1 <= settings["steps"] <= STEPS:
        raise ValueError(f"steps: expected 1 to {STEPS}, got {settings['steps']}")
    maker = PictureMaker.load(source, cpu)
    maker.check(settings.get("sampler"), settings.get("interval"), settings.get("channels", "all"))
    numbers = class_numbers(classes, maker.classes)
    labels = torch.tensor(numbers).repeat_interleave(count)
    sweep = [maker.sample(labels, scale, progress=True, **settings) for scale in guidance]
    if out.suffix == ".png":
        side_by_side = torch.stack([pictures.unflatten(0, (-1, count)) for pictures in sweep], dim=1).flatten(0, 2)
        zoom = max(1, 64 // side_by_side.shape[-1])
        save_png(out, grid(side_by_side, columns=count * len(sweep), zoom=zoom))
        return
    (pictures,) = sweep
    images = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # a file object: np.savez would add a suffix to a name
            np.savez_compressed(file, images=images, labels=labels.numpy())

    write_whole(out, write)
