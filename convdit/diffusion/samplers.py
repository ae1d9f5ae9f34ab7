"""From noise to samples, and back.

A sampler walks the kept steps of a GaussianDiffusion. `denoise(x, t)` calls the model at step index
t (N,) and returns the noise in x and the place of the variance, or None.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from convdit.diffusion.gaussian import GaussianDiffusion

Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def ddpm(
    d: "GaussianDiffusion",
    denoise: Denoise,
    x: Tensor,
    clip: bool,
    generator: torch.Generator | None,
    progress: bool,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), by the learned variance if there is one."""
    for index in shown(reversed(range(d.num_timesteps)), d.num_timesteps, progress):
        t = _indices(x, index)
        noise, sigma = denoise(x, t)
        x0 = _x0(d, x, t, noise, clip)
        std = torch.exp(0.5 * d.log_variance(sigma, t, x))
        x = d.posterior_mean(x0, x, t)
        if index > 0:
            x = x + std * _draw(x.shape, x.dtype, x.device, generator)
    return x


def ddim(
    d: "GaussianDiffusion",
    denoise: Denoise,
    x: Tensor,
    eta: float,
    clip: bool,
    generator: torch.Generator | None,
    progress: bool,
) -> Tensor:
    """DDIM (Song et al. 2021, equation 12): deterministic at eta 0, as noisy as DDPM at eta 1."""
    levels, before = _levels(d)
    for index in shown(reversed(range(d.num_timesteps)), d.num_timesteps, progress):
        t = _indices(x, index)
        noise, _ = denoise(x, t)
        level, target = levels[index], before[index]
        x0 = _x0(d, x, t, noise, clip)
        if clip:
            noise = (x - level**0.5 * x0) / (1 - level) ** 0.5
        sigma = eta * ((1 - target) / (1 - level) * (1 - level / target)) ** 0.5
        x = target**0.5 * x0 + (1 - target - sigma**2) ** 0.5 * noise
        if sigma > 0:
            x = x + sigma * _draw(x.shape, x.dtype, x.device, generator)
    return x


def ddim_inverse(d: "GaussianDiffusion", denoise: Denoise, x: Tensor, refinements: int, progress: bool) -> Tensor:
    """The DDIM steps at eta 0 backwards.

    A step up wants the noise at its upper end, which is not known yet: it takes the noise at its
    lower end, then, as often as `refinements` says, the noise at the end it came to.
    """
    levels, before = _levels(d)
    for index in shown(range(d.num_timesteps), d.num_timesteps, progress):
        noise, _ = denoise(x, _indices(x, max(index - 1, 0)))
        above = _move(x, noise, before[index], levels[index])
        for _ in range(refinements):
            noise, _ = denoise(above, _indices(x, index))
            above = _move(x, noise, before[index], levels[index])
        x = above
    return x


def scheduled(
    predict: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    scheduler,
    eta: float,
    generator: torch.Generator | None,
    progress: bool,
) -> Tensor:
    """Sampling by a scheduler of the diffusers library, whose timesteps are set.

    `predict(x, t)` gives what the scheduler steps by, at timesteps t (N,) of its own choice.
    """
    accepted = inspect.signature(scheduler.step).parameters
    options = {"generator": generator, "eta": eta}
    options = {name: value for name, value in options.items() if name in accepted}
    if eta and "eta" not in options:
        raise ValueError(f"eta: expected 0 for {type(scheduler).__name__}, which has none, got {eta}")
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in shown(scheduler.timesteps, len(scheduler.timesteps), progress):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(predict(scaled, t.expand(len(x))), t, x, **options).prev_sample
    return x


def check_scheduler(d: "GaussianDiffusion", scheduler) -> None:
    """Raises ValueError for a scheduler of another process than that of `d`."""
    name = type(scheduler).__name__
    kind = getattr(scheduler.config, "prediction_type", None)
    if kind != "epsilon":
        raise ValueError(f"sampler: expected a {name} with prediction_type 'epsilon', got {kind!r}")
    if "Inverse" in name:
        raise ValueError(f"sampler: expected a scheduler from noise to data (invert goes the other way), got {name}")
    theirs = getattr(scheduler, "alphas_cumprod", None)
    if theirs is None:
        raise ValueError(f"sampler: expected a scheduler of a noise schedule (with alphas_cumprod), got {name}")
    ours = np.cumprod(1 - d.base_betas)
    if len(theirs) != len(ours) or not np.allclose(np.asarray(theirs), ours, rtol=1e-3):
        raise ValueError(
            f"sampler: {name} was made for another noise schedule than this diffusion: give it the same "
            "num_train_timesteps, beta_schedule, beta_start and beta_end"
        )


def starting_noise(
    model: Callable,
    shape: tuple[int, ...],
    noise: Tensor | None,
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> Tensor:
    """The noise (N, C, ...) to start from: the one given, or drawn on the model's device."""
    shape = tuple(shape)
    if noise is not None:
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise: expected shape {shape}, got {tuple(noise.shape)}")
        return full_precision(noise)
    if device is None:
        module = _owner(model)
        parameters = module.parameters() if isinstance(module, torch.nn.Module) else iter(())
        device = next((p.device for p in parameters), torch.device("cpu"))
    return _draw(shape, torch.get_default_dtype(), torch.device(device), generator)


def caching(
    wanted: bool, model: Callable, timesteps: Sequence[float] | Tensor, model_kwargs: dict[str, Any]
) -> AbstractContextManager:
    """Where it is wanted, a context in which the model reads its modulation from a table made on entry.

    `model` is a DiT or a method of one, `timesteps` are those it will be called with.
    """
    if not wanted:
        return nullcontext()
    owner = _owner(model)
    if not hasattr(owner, "cache_modulation"):
        raise TypeError(
            f"cache_modulation: expected a model that has it, such as models.DiT, got {type(owner).__name__}"
        )
    guided = getattr(model, "__name__", None) == "forward_with_cfg"
    return owner.cache_modulation(timesteps, model_kwargs.get("y"), guidance=guided)


def _owner(model: Callable) -> Any:
    """The module whose method, such as forward_with_cfg, the model is; else the model itself."""
    return getattr(model, "__self__", model)


def full_precision(x: Tensor) -> Tensor:
    """x in float32 where it is in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def shown(steps: Iterable, total: int, progress: bool) -> Iterable:
    """The steps, with a progress bar where one is wanted."""
    if not progress:
        return steps
    from tqdm import tqdm

    return tqdm(steps, total=total)


def _levels(d: "GaussianDiffusion") -> tuple[list[float], list[float]]:
    """Alpha-bar at each kept step and just below it, as Python floats, which keep x's dtype."""
    return d.schedule.alphas_cumprod.tolist(), d.schedule.alphas_cumprod_prev.tolist()


def _x0(d: "GaussianDiffusion", x: Tensor, t: Tensor, noise: Tensor, clip: bool) -> Tensor:
    x0 = d.predict_x0(x, t, noise)
    return x0.clamp(-1, 1) if clip else x0


def _move(x: Tensor, noise: Tensor, level: float, target: float) -> Tensor:
    """x, at the noise level alpha-bar = `level`, moved along its noise to the level `target`."""
    x0 = (x - (1 - level) ** 0.5 * noise) / level**0.5
    return target**0.5 * x0 + (1 - target) ** 0.5 * noise


def _indices(x: Tensor, index: int) -> Tensor:
    return torch.full((len(x),), index, device=x.device)


def _draw(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """Normal noise, drawn where the generator lives, so that one seed serves every device."""
    source = device if generator is None else generator.device
    return torch.randn(shape, dtype=dtype, device=source, generator=generator).to(device)
