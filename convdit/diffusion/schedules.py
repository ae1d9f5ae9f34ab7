"""Noise schedules and their respacing, in float64.

The numbers are those of the public ADM and DiT code (Nichol and Dhariwal 2021): a forward process
q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) over t = 0 .. steps - 1.
"""

import math
from itertools import accumulate, islice, repeat

import numpy as np

SCHEDULES = ("linear", "cosine", "scaled_linear")


def betas(name: str, steps: int) -> np.ndarray:
    """The variances (steps,) of a named schedule.

    - "linear": 1e-4 to 0.02 at 1000 steps, scaled so that other counts end as noisy (DiT);
    - "cosine": from a cumulative product that follows a squared cosine, at most 0.999 (Nichol and
      Dhariwal 2021, equation 17);
    - "scaled_linear": the square root runs linearly, from 0.00085 to 0.012 (Stable Diffusion).
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected a whole number above 0, got {steps!r}")
    if name == "linear":
        scale = 1000 / steps
        result = np.linspace(scale * 1e-4, scale * 0.02, steps)
        if result[-1] >= 1:
            raise ValueError(f"steps: expected more than 20 for the schedule linear, got {steps}")
        return result
    if name == "cosine":
        level = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return np.array([min(1 - level[i + 1] / level[i], 0.999) for i in range(steps)])
    if name == "scaled_linear":
        return np.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2
    raise ValueError(f"schedule: expected one of {SCHEDULES}, got {name!r}")


def respaced_timesteps(steps: int, respacing: str | int | None) -> list[int]:
    """The timesteps, ascending, that a shorter process keeps.

    None keeps all; "250" (or 250) spreads 250 over the whole, both ends included; "10,20,30" cuts
    the process into equal sections and spreads so many over each; "ddim50" strides evenly from 0
    and needs a stride that gives exactly 50. Raises ValueError where the count cannot be had.
    """
    if respacing is None or respacing == "":
        return list(range(steps))
    text = str(respacing)
    try:
        if text.startswith("ddim"):
            return _even_stride(steps, int(text[len("ddim") :]))
        counts = [int(part) for part in text.split(",")]
    except ValueError as error:
        if isinstance(error, _Impossible):
            raise
        raise ValueError(f'respacing: expected a text like "250", "10,20,30" or "ddim50", got {respacing!r}') from None
    return _by_section(steps, counts)


class _Impossible(ValueError):
    pass


def _even_stride(steps: int, count: int) -> list[int]:
    for stride in range(1, steps):
        if len(range(0, steps, stride)) == count:
            return list(range(0, steps, stride))
    raise _Impossible(f"respacing: no whole stride over {steps} steps gives exactly {count}")


def _by_section(steps: int, counts: list[int]) -> list[int]:
    size, extra = divmod(steps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 0 <= count <= length:
            raise _Impossible(f"respacing: cannot keep {count} of a section of {length} steps")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # Strides are summed up and rounded half to even, as in the public code: a product, or
        # another rounding, would choose other steps here and there.
        sums = accumulate(repeat(stride), initial=0.0)
        kept += [start + round(position) for position in islice(sums, count)]
        start += length
    if not kept:
        raise _Impossible(f"respacing: keeps none of {steps} steps")
    return kept


class Schedule:
    """The tables of a diffusion process over `timesteps`, a choice of the steps of `betas`.

    All are float64 arrays (len(timesteps),), by index of the kept step. `alphas_cumprod` is the
    alpha-bar of Ho et al. 2020; `data_scale` and `noise_scale` are the shares of data and noise in
    x_t, `inverse_data_scale` and `noise_ratio` take x_t and its noise to x_0; `posterior_*` belong
    to q(x_{t-1} | x_t, x_0), their equations 6 and 7: its variance, the variance's logarithm, and
    the weights of x_0 and x_t in its mean. `fixed_log_variance` is that of a model that learns
    none: beta, but at the first step, whose variance is not that of noise. `snr` is the
    signal-to-noise ratio, alpha-bar / (1 - alpha-bar).
    """

    def __init__(self, all_betas: np.ndarray, timesteps: list[int]) -> None:
        cumulative = np.cumprod(1 - all_betas)[timesteps]
        before = np.append(1.0, cumulative[:-1])
        self.betas = 1 - cumulative / before
        self.timesteps = timesteps
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        noise = 1 - self.alphas_cumprod
        self.snr = self.alphas_cumprod / noise
        self.data_scale = np.sqrt(self.alphas_cumprod)
        self.noise_scale = np.sqrt(noise)
        self.inverse_data_scale = np.sqrt(1 / self.alphas_cumprod)
        self.noise_ratio = np.sqrt(1 / self.alphas_cumprod - 1)
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / noise
        # The variance is 0 at the first step, where its logarithm takes the value of the second.
        self.posterior_log_variance = np.log(
            np.append(self.posterior_variance[1:2], self.posterior_variance[1:]) if len(timesteps) > 1 else self.betas
        )
        self.log_betas = np.log(self.betas)
        self.fixed_log_variance = np.append(self.posterior_log_variance[:1], self.log_betas[1:])
        self.posterior_x0 = self.betas * np.sqrt(self.alphas_cumprod_prev) / noise
        self.posterior_xt = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / noise
