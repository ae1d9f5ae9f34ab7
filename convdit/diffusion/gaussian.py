"""The diffusion process that DiT is trained for: noise prediction, with a learned variance."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from convdit.diffusion import samplers
from convdit.diffusion._checks import check_training, error_by_sample, mean_by_sample
from convdit.diffusion.likelihood import discretized_log_likelihood, normal_kl
from convdit.diffusion.schedules import Schedule, betas, respaced_timesteps


class GaussianDiffusion:
    """Training losses and samplers of a noise-predicting model (Ho et al. 2020).

    `schedule` is "linear", "cosine" or "scaled_linear" over `steps` steps; `respacing` picks those
    that are used: None for all, "250", "10,20,30" or "ddim50", as in the public ADM and DiT code.
    With `learn_sigma` the model returns twice as many channels as it takes, the second half
    placing the variance between its two bounds (Nichol and Dhariwal 2021, equation 15); without,
    the variance is the larger bound, beta. `min_snr_gamma` weights the error of the noise by
    min(SNR, gamma) / SNR (Hang et al. 2023; they use 5); None, as published for DiT, by 1.

    The model is called as `model(x, t, **model_kwargs)` with x (N, C, ...) and the original
    timesteps t (N,), those of `timesteps`. Everywhere else t is an index into `timesteps`.
    Arithmetic is in the dtype of x, in float32 for half precision.
    """

    def __init__(
        self,
        steps: int = 1000,
        schedule: str = "linear",
        respacing: str | int | None = None,
        learn_sigma: bool = True,
        min_snr_gamma: float | None = None,
    ) -> None:
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma: expected None or a number above 0, got {min_snr_gamma!r}")
        self.base_betas = betas(schedule, steps)
        self.schedule = Schedule(self.base_betas, respaced_timesteps(steps, respacing))
        self.learn_sigma = learn_sigma
        self.min_snr_gamma = min_snr_gamma
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def timesteps(self) -> list[int]:
        """The original timesteps that the model is called with, ascending."""
        return self.schedule.timesteps

    @property
    def num_timesteps(self) -> int:
        """How many steps a sampler takes."""
        return len(self.timesteps)

    def draw_timesteps(
        self, n: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Indices (n,) for `training_losses`, each step as likely as another."""
        return torch.randint(self.num_timesteps, (n,), device=device, generator=generator)

    def table(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """Entries t (N,) of the schedule's table of that name, shaped to multiply x (N, ...)."""
        entries = self._stored(name, x.device, x.dtype).index_select(0, t)
        return entries.view(-1, *[1] * (x.ndim - 1))

    def _stored(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A table on a device, copied there once: a copy at every step would wait for the GPU."""
        key = (name, device, dtype)
        if key not in self._tables:
            table = torch.as_tensor(getattr(self.schedule, name)).to(device=device, dtype=dtype)
            if type(table) is not Tensor:  # one without values, of a trace
                return table
            self._tables[key] = table
        return self._tables[key]

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t, that is x0 (N, C, ...) with noise added up to step t (N,)."""
        return self.table("data_scale", t, x0) * x0 + self.table("noise_scale", t, x0) * noise

    def predict_x0(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The x0 that `q_sample` would have turned into x with this noise."""
        return self.table("inverse_data_scale", t, x) * x - self.table("noise_ratio", t, x) * noise

    def posterior_mean(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0)."""
        return self.table("posterior_x0", t, x) * x0 + self.table("posterior_xt", t, x) * x

    def log_variance(self, sigma: Tensor | None, t: Tensor, x: Tensor) -> Tensor:
        """The log variance of a step down from t, placed by the model in -1..1."""
        if sigma is None:
            return self.table("fixed_log_variance", t, x)
        low, high = self.table("posterior_log_variance", t, x), self.table("log_betas", t, x)
        share = (sigma + 1) / 2
        return share * high + (1 - share) * low

    def predict(
        self, model: Callable[..., Tensor], x: Tensor, t: Tensor, **model_kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Calls the model: the noise in x and the place of its variance, or None."""
        original = self._stored("timesteps", x.device, torch.int64).index_select(0, t)
        return self.split(model(x, original, **model_kwargs), x)

    def split(self, out: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The model's output as noise and variance, in the dtype of x."""
        channels = x.shape[1] * (2 if self.learn_sigma else 1)
        expected = (x.shape[0], channels, *x.shape[2:])
        if tuple(out.shape) != expected:
            raise ValueError(
                f"model: expected it to return {expected} for x {tuple(x.shape)} with "
                f"learn_sigma={self.learn_sigma}, got {tuple(out.shape)}"
            )
        out = out.to(x.dtype)
        if not self.learn_sigma:
            return out, None
        noise, sigma = out.chunk(2, dim=1)
        return noise, sigma

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x0: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        **model_kwargs,
    ) -> dict[str, Tensor]:
        """Losses by sample, each (N,): "loss", and the "mse" and "vb" that it is the sum of.

        With `min_snr_gamma` the sum holds the weighted "mse"; the one that is returned is not.

        x0 is (N, C, ...), 8-bit pictures scaled to -1..1 or latents; t (N,) holds indices into
        `timesteps`; noise, drawn unless given, has the shape of x0. "mse" is the error of the
        predicted noise, "vb" the variational bound in bits per dimension, which trains the variance
        alone: its mean is detached. "vb" is 0 where the variance is not learned.
        """
        check_training("x0", x0, t, noise)
        _check_indices(t, self.num_timesteps)
        x0 = samplers.full_precision(x0)
        noise = torch.randn_like(x0) if noise is None else noise.to(x0.dtype)
        x = self.q_sample(x0, t, noise)
        predicted, sigma = self.predict(model, x, t, **model_kwargs)
        mse = error_by_sample(predicted, noise)
        vb = torch.zeros_like(mse)
        if sigma is not None:
            vb = self.variational_bound(x0, x, t, predicted.detach(), sigma)
        weighted = mse
        if self.min_snr_gamma is not None:
            snr = self._stored("snr", x.device, x.dtype).index_select(0, t)
            weighted = mse * snr.clamp(max=self.min_snr_gamma) / snr
        return {"loss": weighted + vb, "mse": mse, "vb": vb}

    def variational_bound(self, x0: Tensor, x: Tensor, t: Tensor, noise: Tensor, sigma: Tensor | None) -> Tensor:
        """The bound's term of step t for each sample, (N,), in bits per dimension.

        For t = 0 the negative log-likelihood of x0, else the divergence of p(x_{t-1} | x_t) from
        q(x_{t-1} | x_t, x_0).
        """
        mean = self.posterior_mean(self.predict_x0(x, t, noise), x, t)
        log_variance = self.log_variance(sigma, t, x)
        true_mean = self.posterior_mean(x0, x, t)
        true_log_variance = self.table("posterior_log_variance", t, x)
        kl = mean_by_sample(normal_kl(true_mean, true_log_variance, mean, log_variance))
        likelihood = mean_by_sample(discretized_log_likelihood(x0, mean, 0.5 * log_variance))
        return torch.where(t == 0, -likelihood, kl) / math.log(2)

    @torch.no_grad()
    def sample(
        self,
        model: Callable[..., Tensor],
        shape: tuple[int, ...],
        sampler: str | Any = "ddpm",
        eta: float = 0.0,
        clip_denoised: bool = False,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        device: torch.device | str | None = None,
        cache_modulation: bool = False,
        **model_kwargs,
    ) -> Tensor:
        """Samples (N, C, ...) of the given shape, from noise (drawn unless given).

        `sampler` is "ddpm" (ancestral), "ddim" (deterministic at eta 0, as noisy as ddpm at 1) or a
        scheduler object of the diffusers library, made for the same schedule. `clip_denoised` keeps
        each step's estimate of x0 in -1..1 (for pixels, not latents). For guidance pass
        `model.forward_with_cfg` and `cfg_scale`. The device is that of the noise, else `device`,
        else that of the model's parameters. The same generator state gives the same bits. Put the
        model in eval mode first, or it may drop labels. `cache_modulation`, for a DiT of the adaLN
        designs, makes the modulation of all steps beforehand (`DiT.cache_modulation`).
        """
        if sampler not in ("ddpm", "ddim") and not hasattr(sampler, "set_timesteps"):
            raise ValueError(f'sampler: expected "ddpm", "ddim" or a diffusers scheduler, got {sampler!r}')
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: expected a number in 0..1, got {eta}")
        if sampler == "ddpm" and eta:
            raise ValueError(f'eta: expected 0 for the sampler "ddpm", got {eta}')
        x = samplers.starting_noise(model, shape, noise, generator, device)

        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.predict(model, x, t, **model_kwargs)

        def cached(timesteps: Sequence[float] | Tensor) -> AbstractContextManager:
            return samplers.caching(cache_modulation, model, timesteps, model_kwargs)

        if isinstance(sampler, str):
            with cached(self.timesteps):
                if sampler == "ddpm":
                    return samplers.ddpm(self, denoise, x, clip_denoised, generator, progress)
                return samplers.ddim(self, denoise, x, eta, clip_denoised, generator, progress)
        if clip_denoised:
            raise ValueError(
                "clip_denoised: expected False for a diffusers scheduler, which is told so when it is made, got True"
            )
        samplers.check_scheduler(self, sampler)
        variance_too = getattr(sampler.config, "variance_type", "") in ("learned", "learned_range")

        def predict(x: Tensor, t: Tensor) -> Tensor:  # t are original timesteps, of the scheduler's choice
            out = model(x, t, **model_kwargs)
            noise, _ = self.split(out, x)
            return out.to(x.dtype) if variance_too else noise

        sampler.set_timesteps(self.num_timesteps, device=x.device)
        with cached(sampler.timesteps):
            return samplers.scheduled(predict, x, sampler, eta, generator, progress)

    @torch.no_grad()
    def invert(
        self,
        model: Callable[..., Tensor],
        x0: Tensor,
        refinements: int = 1,
        progress: bool = False,
        **model_kwargs,
    ) -> Tensor:
        """The noise (N, C, ...) from which `sample(..., "ddim")` at eta 0 comes back to x0.

        Exact in the limit of many steps (Song et al. 2021, section 4.3). Each of the `refinements`
        is another model call a step, and brings every step closer to being undone exactly; with 0
        and few steps the way back may miss by as much as the noise itself.
        """

        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.predict(model, x, t, **model_kwargs)

        x0 = samplers.full_precision(x0)
        return samplers.ddim_inverse(self, denoise, x0, refinements, progress)


def _check_indices(t: Tensor, steps: int) -> None:
    if t.is_floating_point() or t.dtype == torch.bool:
        raise TypeError(f"t: expected whole step indices, got {t.dtype}")
    # On a GPU looking would wait for it; there index_select stops what is out of range.
    if t.numel() and t.device.type == "cpu" and not 0 <= int(t.min()) <= int(t.max()) < steps:
        raise ValueError(f"t: expected steps in 0..{steps - 1}, got {int(t.min())}..{int(t.max())}")
