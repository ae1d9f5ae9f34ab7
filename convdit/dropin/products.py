"""Linear layers of tokens in float32 on a CPU: GELU in one pass with the bias; weights packed, if asked.

Where products are ours (convdit/ops/linear.py) nothing is packed. Elsewhere MKL's, which PyTorch uses, first copies the
weight into blocks. `accelerate(model, pack_weights=True)` keeps that copy beside the weight, as large as it, from the
second call on with the same number of rows, and makes it anew where the weight's version or memory is another, which
every change shows but those that PyTorch cannot see: through ``.data``, NumPy or another process. Of these a sample of
a value of each row shows most, not all: hence the copies are for those who ask for them. They go with their weights, by
`restore`, and by `accelerate` again.

`convdit bench dropin --match diffusers` measures a model both ways.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakIdKeyDictionary

from convdit import ops
from convdit.ops._common import in_transform
from convdit.ops.linear import HERE
from convdit.ops.linear import linear as product

from .swap import Foreign

WIDEST = 768  # of tokens: beyond, packing is a small share of the product, and the copies would be gigabytes


def usable(x: Tensor) -> bool:
    """Whether x is such tokens: no export, transform or autocast sees it; nor gradients, unless products are ours."""
    if torch.is_grad_enabled() and not HERE:
        return False
    if torch.compiler.is_exporting() or in_transform() or torch.is_autocast_enabled("cpu"):
        return False
    return x.numel() > 0 and x.device.type == "cpu" and x.dtype == torch.float32


def plain(layer: Foreign) -> bool:
    return type(layer) is nn.Linear and layer.bias is not None and type(layer.weight) is nn.Parameter


def linear(x: Tensor, layer: nn.Linear, pack: bool) -> Tensor:
    return _product(x, layer.weight, layer.bias, pack)


def attention(x: Tensor, layers: tuple[nn.Linear, nn.Linear, nn.Linear], heads: int, pack: bool) -> Tensor:
    """Attention of the heads that q, k and v, three Linears of x, give; before the Linear that follows it."""
    if torch.is_grad_enabled() or (pack and not HERE):
        q, k, v = (linear(x, layer, pack).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in layers)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    return ops.packed_attention(torch.ops.convdit.packed_qkv(x, *parameters), heads)


def mlp(x: Tensor, first: nn.Linear, second: nn.Linear, pack: bool) -> Tensor:
    """second(gelu(first(x))), GELU in its tanh form."""
    hidden = _product(x.contiguous(), first.weight, None, pack)
    return linear(ops.gelu_tanh(hidden, first.bias, overwrite=True), second, pack)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, pack: bool) -> Tensor:
    return torch.ops.convdit.packed_linear(x, weight, bias) if pack and not HERE else product(x, weight, bias)


class _Packed:
    """A weight's blocks for products with so many rows, made at the second call, and what they were made of."""

    def __init__(self, weight: Tensor, rows: int):
        self.key = _key(weight, rows)
        # A view, which keeps the memory: no other weight can get its address while this is here.
        self.values = weight.detach().flatten()[:: max(weight.shape[1] - 1, 1)]
        self.sample = self.values.clone()
        self.blocks: Tensor | None = None

    def fits(self, weight: Tensor, rows: int) -> bool:
        return self.key == _key(weight, rows) and torch.equal(self.values, self.sample)


def _key(weight: Tensor, rows: int) -> tuple[int, ...]:
    return rows, weight._version, weight.data_ptr(), *weight.shape


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> _Packed


def _blocks(weight: Tensor, rows: int) -> Tensor | None:
    if weight.is_inference() or weight.dtype != torch.float32 or not weight.is_contiguous():
        return None
    if min(weight.shape) > WIDEST or not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return None
    entry = _packed.get(weight)
    if entry is None or not entry.fits(weight, rows):
        _packed[weight] = _Packed(weight, rows)  # where rows or weights change at each call nothing is ever packed
        return None
    if entry.blocks is None:
        entry.blocks = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), rows)
    return entry.blocks


def forget(model: nn.Module) -> None:
    """Give back what is kept for a model's weights."""
    for parameter in model.parameters():
        _packed.pop(parameter, None)


# An operator, so that torch.compile calls it as it stands, with the weight itself.
_library = torch.library.Library("convdit", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, rows = x.contiguous(), x.numel() // x.shape[-1]
    blocks = _blocks(weight, rows)
    return product(x, weight, bias) if blocks is None else torch.ops.mkl._mkl_linear(x, blocks, weight, bias, rows)


_library.impl("packed_linear", _packed_linear, "CPU")


@torch.library.register_fake("convdit::packed_linear", lib=_library)
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@register_flop_formula(torch.ops.convdit.packed_linear)
def _(x, weight, *_args, out_shape=None, **_kwargs) -> int:
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * weight[0] * weight[1]
