"""Multiply-adds against the tables of the DiT paper and against counts done by hand."""

import pytest
import torch
from torch import nn

from convdit import ops
from convdit.flops import flops
from convdit.models import dit


def dit_inputs(size: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(1, 4, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.long)


def count(build, size: int = 32, **options):
    with torch.device("meta"):
        model = build(input_size=size, **options)
    return flops(model, *dit_inputs(size))


PAPER_GFLOPS = {  # Peebles and Xie 2023, table 4
    "DiT-S/8": 0.36, "DiT-S/4": 1.41, "DiT-S/2": 6.06,
    "DiT-B/8": 1.42, "DiT-B/4": 5.56, "DiT-B/2": 23.01,
    "DiT-L/8": 5.01, "DiT-L/4": 19.70, "DiT-L/2": 80.71,
    "DiT-XL/8": 7.39, "DiT-XL/4": 29.05, "DiT-XL/2": 118.64,
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER_GFLOPS)
def test_twelve_sizes_cost_what_the_paper_says(name):
    # The paper rounds to 0.01, and counted a little beside convolutions and matrix products: 0.02 %.
    gmacs, published = count(dit.DiT_models[name]).macs / 1e9, PAPER_GFLOPS[name]
    assert abs(gmacs - published) <= 0.005 + 2e-4 * published


@pytest.mark.parametrize(
    ("conditioning", "gmacs", "millions"),
    [
        ("adaln_zero", 118.62, 674.8),
        ("adaln", 118.55, 600.5),
        ("cross_attention", 137.60, 598.0),
        ("in_context", 119.35, 449.2),
    ],
)
def test_four_designs_of_xl2_cost_what_is_published(conditioning, gmacs, millions):
    found = count(dit.DiT_XL_2, conditioning=conditioning)
    assert round(found.macs / 1e9, 2) == gmacs
    assert round(found.parameters / 1e6, 1) == millions


def test_xl2_at_512_pixels_costs_what_is_published():
    assert round(count(dit.DiT_XL_2, size=64).macs / 1e9, 1) == 524.5


def test_modules_are_named_as_in_the_model_and_sum_to_the_total():
    model = dit.DiT(input_size=8, depth=2, hidden_size=32, num_heads=2, num_classes=5)
    found = flops(model, *dit_inputs(8))
    assert set(found.by_module) <= {name for name, _ in model.named_modules()}
    parts = ("x_embedder", "t_embedder", "blocks.0", "blocks.1", "final_layer")
    assert sum(found.by_module[name] for name in parts) == found.macs
    tokens, width = 16, 32
    attention = tokens * width * 4 * width + 2 * tokens * tokens * width
    assert found.by_module["blocks.1.attn"] == attention


def test_model_that_looks_at_values_is_counted_on_real_tensors():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 5)

        def forward(self, x):
            return self.linear(x) if x.sum() > 0 else x

    assert flops(Picky(), torch.ones(2, 3)).macs == 30
    assert flops(Picky(), -torch.ones(2, 3)).macs == 0


def test_depthwise_convolution_and_fused_attention_count():
    conv = nn.Conv2d(8, 8, 7, padding=3, groups=8, bias=False)
    assert flops(conv, torch.zeros(2, 8, 5, 6)).macs == 2 * 8 * 5 * 6 * 49

    class Attention(nn.Module):
        def forward(self, q, k):
            assert bool((q > 0).all()), "only real tensors have values"
            return nn.functional.scaled_dot_product_attention(q, k, k)

    found = flops(Attention(), torch.ones(2, 3, 10, 8), torch.ones(2, 3, 7, 8))
    assert found.macs == 2 * 2 * 3 * 10 * 7 * 8


def test_operators_of_this_package_count():
    class Layer(nn.Module):
        def __init__(self, op):
            super().__init__()
            self.op = op

        def forward(self, *x):
            return self.op(*x)

    conv = Layer(ops.depthwise_conv2d)
    assert flops(conv, torch.zeros(2, 5, 6, 8), torch.zeros(8, 1, 7, 7)).macs == 2 * 8 * 5 * 6 * 49
    attention = Layer(lambda qkv: ops.packed_attention(qkv, 3))
    assert flops(attention, torch.zeros(2, 10, 3 * 24)).macs == 2 * 2 * 10 * 10 * 24
    norm = Layer(ops.layer_norm_modulate)
    assert flops(norm, torch.zeros(2, 10, 24), torch.zeros(2, 24), torch.zeros(2, 24)).macs == 0


def test_error_of_the_model_comes_through():
    with pytest.raises(ValueError, match="x: expected shape"):
        flops(dit.DiT_S_8(), torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1).long())
