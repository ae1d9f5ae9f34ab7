"""Other people's models under `convdit.accelerate`, against the same models untouched: eager and compiled.

Under tuned malloc alone, the harder setting: nearly all of the time goes into compiling whole models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convdit

from . import rivals
from .harness import Comparison, Work, without_grad

Row = partial(Comparison, dtype=torch.float32, malloc=("tuned",))


def comparisons() -> Iterator[Comparison]:
    for size in ("tiny", "atto"):
        name, shape = f"convnextv2_{size}", f"{size}; 8x224x224"
        build, quick = partial(inference, name), size == "atto"
        yield Row("accelerated timm", "forward", shape, build=build, quick=quick, heavy=True)
        yield Row("accelerated timm", "step", shape, build=partial(training, name))
        yield Row("accelerated timm, compiled", "forward", shape, build=partial(build, True))
    for n, (operator, pack) in product((2, 8), {"accelerated diffusers": False, "packed diffusers": True}.items()):
        shape, build = f"S/2; {n}x4x32x32", partial(diffusers_inference, n=n, pack=pack)
        yield Row(operator, "forward", shape, build=build)
        yield Row(f"{operator}, compiled", "forward", shape, build=partial(build, True))


def pair(name: str, model: nn.Module, compiled: bool, pack: bool = False) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The accelerated model and what it is to beat; compiled, it is to beat itself in eager mode as well."""
    ours = copy.deepcopy(model)
    convdit.accelerate(ours, pack_weights=pack)
    theirs = rivals.eager_and_compiled(name, model)
    if compiled:
        theirs = {"accelerated": ours, f"{name}, compile": theirs[f"{name}, compile"]}
        ours = rivals.compiled(copy.deepcopy(ours))
    return ours, theirs


def images(n: int, side: int) -> Tensor:
    return torch.randn(n, 3, side, side).contiguous(memory_format=torch.channels_last)


def inference(name: str, compiled: bool = False, n: int = 8, side: int = 224, **options) -> Work:
    model = rivals.randomise_grn(timm.create_model(name, **options)).eval()
    ours, theirs = pair("timm", model, compiled)
    x = images(n, side)
    return Work(without_grad(ours, x), {k: without_grad(m, x) for k, m in theirs.items()})


def training(name: str, n: int = 8, side: int = 224, lr: float = 1e-4, **options) -> Work:
    """A whole step: forward, cross-entropy, backward, AdamW."""
    ours, theirs = pair("timm", rivals.randomise_grn(timm.create_model(name, **options)), False)
    x, labels = images(n, side), torch.randint(5, (n,))

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x), labels)

    functions = {k: rivals.training_step(m, loss, lr) for k, m in theirs.items()}
    return Work(rivals.training_step(ours, loss, lr), functions)


def diffusers_inference(
    compiled: bool = False, n: int = 8, side: int = 32, heads: int = 6, layers: int = 12, pack: bool = False
) -> Work:
    """A DiT of size S/2, as DiTPipeline calls it with guidance for n / 2 images."""
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": heads, "attention_head_dim": 64, "num_layers": layers, "sample_size": side}
    model = DiTTransformer2DModel(**sizes, norm_eps=1e-6).eval()
    for block in model.transformer_blocks:
        rivals.randomise(block.norm1.linear)
    ours, theirs = pair("diffusers", model, compiled, pack)
    x, steps, labels = torch.randn(n, 4, side, side), torch.randint(1000, (n,)), torch.randint(1000, (n,))

    def call(model: nn.Module) -> Callable:
        return without_grad(lambda: model(x, timestep=steps, class_labels=labels).sample)

    return Work(call(ours), {k: call(m) for k, m in theirs.items()})
