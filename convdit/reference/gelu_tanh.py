"""The tanh form of GELU (arXiv:1606.08415, section 2), in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """v / 2 * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 v^3))) of v = x + bias: x (..., D), bias (D,)."""
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate="tanh")
