"""The reference forms of DiT's operators against other ways to say the same."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from convdit import reference


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape, requires_grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


def test_layer_norm_modulate_is_a_layer_norm_with_the_weights_of_each_sample():
    x, shift, scale = randn(3, 5, 8), randn(3, 8), randn(3, 8)
    for i in range(3):
        expected = F.layer_norm(x[i], (8,), 1 + scale[i], shift[i], eps=1e-3)
        output = reference.layer_norm_modulate(x, shift, scale, eps=1e-3)[i]
        torch.testing.assert_close(output, expected)


def test_fused_form_is_the_two_in_turn():
    x, y, gate, shift, scale = randn(2, 5, 8), randn(2, 5, 8), randn(2, 8), randn(2, 8), randn(2, 8)
    total, normed = reference.gated_residual_layer_norm_modulate(x, y, gate, shift, scale)
    for i in range(2):
        for j in range(5):
            torch.testing.assert_close(total[i, j], x[i, j] + gate[i] * y[i, j])
    torch.testing.assert_close(normed, reference.layer_norm_modulate(total, shift, scale))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_packed_attention_equals_that_of_pytorch(scale):
    qkv = randn(2, 7, 3 * 12)
    q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in qkv.chunk(3, -1))
    expected = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    torch.testing.assert_close(reference.packed_attention(qkv, 3, scale), expected)


def test_attention_half_is_made_of_its_parts():
    x, modulation = randn(2, 5, 8), randn(2, 3, 8)
    qkv_weight, qkv_bias, proj_weight, proj_bias = randn(24, 8), randn(24), randn(8, 8), randn(8)
    normed = F.layer_norm(x, (8,), eps=1e-6) * (1 + modulation[:, 1:2]) + modulation[:, :1]
    attended = reference.packed_attention(normed @ qkv_weight.T + qkv_bias, 2)
    expected = x + modulation[:, 2:] * (attended @ proj_weight.T + proj_bias)
    output = reference.adaln_zero_attention(x, modulation, qkv_weight, qkv_bias, proj_weight, proj_bias, 2)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16, torch.float16])
def test_stream_keeps_its_dtype_beside_others(stream):
    x, y = randn(2, 3, 8).to(stream), randn(2, 3, 8).bfloat16()
    gate, shift, scale = randn(3, 2, 8).float()
    outputs = reference.gated_residual_layer_norm_modulate(x, y, gate, shift, scale)
    assert {output.dtype for output in outputs} == {stream}


def test_derivatives_of_first_and_second_order_are_right():
    x, y, qkv = (randn(2, 3, w, requires_grad=True) for w in (4, 4, 12))
    gate, shift, scale = (randn(2, 4, requires_grad=True) for _ in range(3))
    for function, arguments in [
        (reference.gated_residual_layer_norm_modulate, (x, y, gate, shift, scale)),
        (lambda qkv: reference.packed_attention(qkv, 2), (qkv,)),
    ]:
        assert gradcheck(function, arguments)
        assert gradgradcheck(function, arguments)
