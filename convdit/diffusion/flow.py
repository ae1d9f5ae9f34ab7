"""Rectified flow (Liu et al. 2022), trained and sampled as SiT does (Ma et al. 2024).

Time runs from 0, noise, to 1, data, along straight lines x_t = t * data + (1 - t) * noise. The
model learns their velocity, data - noise; a sampler follows it from noise to data.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convdit._checks import check_whole
from convdit.diffusion import samplers
from convdit.diffusion._checks import check_training, error_by_sample


class RectifiedFlow:
    """Training losses and ODE samplers of a velocity-predicting model.

    The model is called as `model(x, t, **model_kwargs)` with x (N, C, ...) and times t (N,) in
    [0, 1], float32; SiT's checkpoints take them so. Its first C channels are the velocity; a model
    with `learn_sigma` returns C more, which SiT leaves unused. Samplers take `steps` even steps.
    Arithmetic is in the dtype of x, in float32 for half precision.
    """

    def __init__(self, steps: int = 50) -> None:
        check_whole("steps", steps, 1)
        self.steps = steps

    @property
    def timesteps(self) -> list[float]:
        """The times that a sampler calls the model at, and 1, where it arrives: for `cache_modulation`."""
        return [i / self.steps for i in range(self.steps + 1)]

    def draw_timesteps(
        self, n: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Times (n,) for `training_losses`, uniform in [0, 1)."""
        return torch.rand(n, device=device, generator=generator, dtype=torch.float32)

    def training_losses(
        self,
        model: Callable[..., Tensor],
        data: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        **model_kwargs,
    ) -> dict[str, Tensor]:
        """Losses by sample, each (N,): "mse", the error of the velocity, and "loss", the same.

        data is (N, C, ...); t (N,) holds times in [0, 1]; noise, drawn unless given, has the shape
        of the data. Raises ValueError or TypeError, naming the argument, for anything else.
        """
        check_training("data", data, t, noise)
        if not t.is_floating_point():
            raise TypeError(f"t: expected times in [0, 1], got {t.dtype}")
        if t.numel() and t.device.type == "cpu" and not 0 <= t.min().item() <= t.max().item() <= 1:
            raise ValueError(f"t: expected times in [0, 1], got {t.min().item():g}..{t.max().item():g}")
        data = samplers.full_precision(data)
        noise = torch.randn_like(data) if noise is None else noise.to(data.dtype)
        share = t.to(data.dtype).view(-1, *[1] * (data.ndim - 1))
        x = share * data + (1 - share) * noise
        mse = error_by_sample(self.velocity(model, x, t.float(), **model_kwargs), data - noise)
        return {"loss": mse, "mse": mse}

    def velocity(self, model: Callable[..., Tensor], x: Tensor, t: Tensor, **model_kwargs) -> Tensor:
        """Calls the model: d x / d t at the times t (N,), in the shape and dtype of x."""
        out = model(x, t, **model_kwargs)
        channels = x.shape[1]
        if out.shape[1] not in (channels, 2 * channels) or out.shape[2:] != x.shape[2:] or len(out) != len(x):
            raise ValueError(
                f"model: expected it to return {tuple(x.shape)}, or twice as many channels, got {tuple(out.shape)}"
            )
        return out[:, :channels].to(x.dtype)

    @torch.no_grad()
    def sample(
        self,
        model: Callable[..., Tensor],
        shape: tuple[int, ...],
        sampler: str | Any = "euler",
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        device: torch.device | str | None = None,
        cache_modulation: bool = False,
        **model_kwargs,
    ) -> Tensor:
        """Samples (N, C, ...) of the given shape, from noise (drawn unless given).

        `sampler` is "euler", one model call a step; "heun", of second order, two calls; or a
        flow-matching scheduler object of the diffusers library. Guidance, device, generator and
        `cache_modulation` are as for `GaussianDiffusion.sample`.
        """
        if sampler not in ("euler", "heun") and not hasattr(sampler, "set_timesteps"):
            raise ValueError(f'sampler: expected "euler", "heun" or a diffusers scheduler, got {sampler!r}')
        follow: Callable[[Tensor, Tensor], Tensor] = partial(self.velocity, model, **model_kwargs)
        cached = partial(samplers.caching, cache_modulation, model, model_kwargs=model_kwargs)
        x = samplers.starting_noise(model, shape, noise, generator, device)
        if not isinstance(sampler, str):
            whole = _check_scheduler(sampler)

            def predict(x: Tensor, t: Tensor) -> Tensor:  # their time runs from data to noise
                return -follow(x, 1 - t.float() / whole)

            sampler.set_timesteps(self.steps, device=x.device)
            with cached(timesteps=1 - sampler.timesteps.float() / whole):
                return samplers.scheduled(predict, x, sampler, 0.0, generator, progress)
        times = self.timesteps
        with cached(timesteps=times):
            for index in samplers.shown(range(self.steps), self.steps, progress):
                span = times[index + 1] - times[index]
                slope = follow(x, _at(x, times[index]))
                if sampler == "heun":
                    slope = (slope + follow(x + span * slope, _at(x, times[index + 1]))) / 2
                x = x + span * slope
        return x


def _check_scheduler(scheduler: Any) -> int:
    """Of a flow-matching scheduler of the diffusers library, the timestep of pure noise; raises for another."""
    name, kind = type(scheduler).__name__, getattr(scheduler.config, "prediction_type", None)
    if kind != "flow_prediction" and not name.startswith("FlowMatch"):
        raise ValueError(f"sampler: expected a flow-matching scheduler, got {name} with prediction_type {kind!r}")
    return scheduler.config.num_train_timesteps


def _at(x: Tensor, time: float) -> Tensor:
    return torch.full((len(x),), time, device=x.device, dtype=torch.float32)
