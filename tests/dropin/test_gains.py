"""Where an accelerated layer gains nothing it computes itself: the rule, decided by shape, layout, dtype and gradients.

`convdit bench dropin --match "accelerated layer"` measures what gains.
"""

import copy

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXtBlock
from torch import nn

import convdit
from convdit.dropin import dit, layers

from .running import Operators


def test_the_report_says_on_which_inputs_a_layer_gains():
    (entry,) = convdit.accelerate(nn.Conv2d(32, 32, 7, padding=3, groups=32)).swapped
    assert "with gradients, and in float32 without from 7x7 on" in entry.note
    (entry,) = convdit.accelerate(adaln(torch.float32)).swapped
    assert f"with gradients from {dit.FEWEST} values on" in entry.note


def maps(layout=torch.channels_last, dtype=torch.float32, n=2, c=32, side=9):
    x = torch.randn(n, c, side, side, generator=torch.Generator().manual_seed(0))
    return x.to(dtype).contiguous(memory_format=layout)


def conv(k, c=32):
    return lambda dtype: nn.Conv2d(c, c, k, padding=k // 2, groups=c, dtype=dtype)


def norm(dtype):
    return GlobalResponseNorm(32, channels_last=False).to(dtype)


def version_1(dtype):
    return ConvNeXtBlock(32).to(dtype)


def adaln(dtype):
    from diffusers.models.normalization import AdaLayerNormZero

    return AdaLayerNormZero(64).to(dtype)


FLAT, HALF, BRAIN = torch.contiguous_format, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("make", "x", "grad", "gains"),
    [
        (conv(3), maps(), True, False),
        (conv(5), maps(), True, True),
        (conv(5), maps(), False, False),
        (conv(7), maps(), False, True),
        (conv(7), maps(FLAT), False, False),
        (conv(7), maps(FLAT), True, False),
        (conv(7), maps(dtype=BRAIN), False, False),
        (conv(7), maps(dtype=BRAIN), True, True),
        (conv(7), maps(dtype=HALF), True, False),
        (conv(9), maps(), False, False),
        (conv(9), maps(), True, True),
        (conv(9, 64), maps(c=64), False, True),
        (norm, maps(), False, True),
        (norm, maps(n=1), False, False),
        (norm, maps(FLAT), False, False),
        (version_1, maps(), False, True),
        (version_1, maps(dtype=BRAIN), False, False),
        (version_1, maps(dtype=BRAIN), True, True),
        (version_1, maps(dtype=HALF), False, False),
        (adaln, torch.randn(2, dit.FEWEST // 128, 64), True, True),
        (adaln, torch.randn(2, dit.FEWEST // 128 - 1, 64), True, False),
        (adaln, torch.randn(2, 3, 64), False, True),
    ],
)
def test_a_layer_of_a_shape_that_gains_nothing_is_computed_by_itself(make, x, grad, gains):
    model = make(x.dtype).eval()
    options = {"emb": torch.randn(x.shape[0], 64)} if make is adaln else {}
    fast = copy.deepcopy(model)
    convdit.accelerate(fast)
    with torch.set_grad_enabled(grad), Operators() as ran, Operators("aten") as others:
        ours = fast(x, **options)
    with torch.set_grad_enabled(grad), Operators("aten") as theirs:
        right = model(x, **options)
    assert bool(ran.names) == gains
    if not gains:  # the very same calls and bits
        assert others.names == theirs.names
        pairs = zip(ours, right, strict=True) if isinstance(ours, tuple) else [(ours, right)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_call_that_gains_nothing_is_asked_nothing_else(monkeypatch):
    """It may be a short one: asking whether the layer is still what it was would take a few percent of it."""

    def refuse(_conv):
        raise AssertionError("the layer was looked at")

    model, x = conv(5)(torch.float32), maps()
    right = model(x)
    convdit.accelerate(model)
    monkeypatch.setattr(layers, "depthwise", refuse)
    with torch.no_grad():
        assert torch.equal(model(x), right)
    with pytest.raises(AssertionError, match="was looked at"):
        model(x)
