"""Counts the multiply-adds of a model's convolutions and matrix products."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class FlopCount:
    """What `flops` found: totals of multiply-adds (two FLOPs each) and of parameters.

    `by_module` gives the multiply-adds inside each submodule that was called, by its name in
    `model.named_modules()`; an outer module includes its inner ones.
    """

    macs: int
    parameters: int
    by_module: dict[str, int]

    def __str__(self) -> str:
        return f"{self.macs / 1e9:.2f} GMAC, {self.parameters / 1e6:.1f} M parameters"


@torch.no_grad()
def flops(model: nn.Module, *inputs: Any) -> FlopCount:
    """Multiply-adds of `model(*inputs)` in convolutions and matrix products, and its parameters.

    The papers of this field call multiply-adds "FLOPs". Norms, activations and other element-wise
    work do not count. The model runs once on fake tensors, which have shapes but no values: no
    memory, and little time at any size, also for a model built on the "meta" device. A model that
    looks at values runs on the inputs as they are. Operators of this package count by formulas that
    they register with PyTorch.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        with FakeTensorMode():
            fakes = tree_map_only(torch.Tensor, _valueless, (state, inputs))
            counts = _count(lambda: torch.func.functional_call(model, *fakes))
    except Exception:  # whatever it is, the real run either has no such trouble or says it better
        counts = _count(lambda: model(*inputs))
    root = type(model).__name__ + "."
    by_module = {
        name.removeprefix(root): sum(ops.values()) // 2 for name, ops in counts.items() if name.startswith(root)
    }
    macs = sum(counts.get("Global", {}).values()) // 2
    return FlopCount(macs, sum(p.numel() for p in model.parameters()), by_module)


def _valueless(tensor: torch.Tensor) -> torch.Tensor:
    """Like the tensor, on the CPU whatever its device: the count is the same everywhere."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _count(run: Callable[[], Any]) -> dict[str, dict[Any, int]]:
    counter = FlopCounterMode(display=False, custom_mapping=_MISSING_IN_PYTORCH)
    with counter:
        run()
    return counter.get_flop_counts()


def _attention_on_cpu(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
    """Two matrix products: query by key, and the weights by value."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_MISSING_IN_PYTORCH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu,
}
