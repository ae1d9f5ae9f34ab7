"""Linear layers of tokens by oneDNN, for inference in float32 on a CPU.

PyTorch's own addmm writes the bias first and then reads it back; oneDNN adds it, and the tanh form of GELU, as it
writes. Measured on a Zen 4, one thread, 512 and 2048 tokens of width 384 and 1152: the first layer of an MLP with its
GELU gains 1.15 to 1.22, the second 1.08 to 1.12, a square one 1.05 to 1.10.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .swap import Foreign

WIDEST = 768  # of tokens: beyond, oneDNN's order of summation leaves more than twice the error


def usable(x: Tensor) -> bool:
    """Whether x is such tokens, here and now: neither gradients, compiler, transform nor autocast see it."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not torch.backends.mkldnn.is_available():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.is_autocast_enabled("cpu"):
        return False
    return x.numel() > 0 and x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[-1] <= WIDEST


def plain(layer: Foreign) -> bool:
    return type(layer) is nn.Linear and layer.bias is not None


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")


def mlp(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """second(gelu(first(x))), GELU in its tanh form."""
    hidden = torch.ops.mkldnn._linear_pointwise(x, first.weight, first.bias, "gelu", [], "tanh")
    return linear(hidden, second)
