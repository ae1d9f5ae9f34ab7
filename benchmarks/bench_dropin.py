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
        long = partial(Row, shape=shape, effort=8)  # there is little between them, and a turn takes a second
        yield long(operator, "forward", build=build)
        yield long(f"{operator}, compiled", "forward", build=partial(build, True))
    small = partial(Row, "accelerated layer", against="eager", effort=0.3)  # small ones, where there is least to gain
    for name, shape in LAYERS:
        label = f"{name}; {'x'.join(map(str, shape))}"
        for what in ("forward", "step"):
            yield small(what, label, build=partial(layer, name, shape, what))


CONVOLUTIONS = [(f"Conv2d {k}x{k}", (1, c, 14, 14)) for k in (3, 5, 7, 9) for c in (32, 96)]
MAPS = [(name, shape) for name in ("GRN", "V1 block", "V2 block") for shape in ((1, 16, 4, 4), (1, 96, 14, 14))]
TOKENS = [("DiT block", shape) for shape in ((1, 16, 64), (2, 64, 192), (2, 64, 384), (8, 64, 384))]
NORMS = [("adaLN", shape) for shape in ((1, 16, 64), (2, 64, 384))]
LAYERS = [*CONVOLUTIONS, *MAPS, *TOKENS, *NORMS]


def layer(name: str, shape: tuple[int, ...], what: str) -> Work:
    """One layer, called alone. A step is forward and backward."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.normalization import AdaLayerNormZero
    from timm.layers.grn import GlobalResponseNorm
    from timm.models.convnext import ConvNeXtBlock

    x, heads = torch.randn(shape), max(shape[-1] // 64, 1)
    if name == "DiT block":
        options = {"attention_bias": True, "norm_elementwise_affine": False, "norm_eps": 1e-6}
        made: nn.Module = BasicTransformerBlock(
            shape[-1], heads, 64, activation_fn="gelu-approximate", norm_type="ada_norm_zero",
            num_embeds_ada_norm=10, **options,
        )  # fmt: skip
        conditions: dict = {"timestep": torch.arange(shape[0]), "class_labels": torch.arange(shape[0])}
    elif name == "adaLN":
        made, conditions = AdaLayerNormZero(shape[-1]), {"emb": torch.randn(shape[0], shape[-1])}
    else:
        x, c, conditions = x.contiguous(memory_format=torch.channels_last), shape[1], {}
        if name == "GRN":
            made = GlobalResponseNorm(c, channels_last=False)
        elif name.endswith("block"):
            made = ConvNeXtBlock(c, use_grn=name == "V2 block", ls_init_value=None if name == "V2 block" else 1.0)
        else:
            k = int(name.split("x")[-1])
            made = nn.Conv2d(c, c, k, padding=k // 2, groups=c)
    rivals.randomise(made).eval()
    ours = copy.deepcopy(made)
    convdit.accelerate(ours)

    def call(model: nn.Module) -> Callable:
        if what == "forward":
            return without_grad(partial(model, **conditions), x)
        inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_(), *model.parameters()]

        def step():
            out = model(inputs[0], **conditions)
            out = out[0] if isinstance(out, tuple) else out
            return torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)

        return step

    return Work(call(ours), {"eager": call(made)})


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
