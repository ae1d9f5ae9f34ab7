"""Terms of the variational bound, in nats, element by element."""

import math

import torch
from torch import Tensor


def normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_var1)) || N(mean2, exp(log_var2)))."""
    ratio = torch.exp(log_var1 - log_var2)
    distance = (mean1 - mean2) ** 2 * torch.exp(-log_var2)
    return 0.5 * (ratio + distance - 1 + log_var2 - log_var1)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log of a normal's mass in the bin of an 8-bit value x, scaled to -1..1.

    The outermost bins reach to infinity (Ho et al. 2020, equation 13). The normal's distribution
    function is approximated with a tanh and masses are kept above 1e-12, both as in the public ADM
    and DiT code.
    """
    inverse_std = torch.exp(-log_std)
    upper = _normal_cdf(inverse_std * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse_std * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
