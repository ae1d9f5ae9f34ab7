"""Attention's gradients where one key has nearly all of a row's weight."""

import pytest
import torch

from convdit import ops, reference
from tests.ops import harness


@pytest.mark.parametrize("dtype", harness.LOW_DTYPES, ids=str)
@pytest.mark.parametrize("seed", [0, 2])
def test_error_rule_of_gradients_that_nearly_cancel(seed, dtype):
    # Values near 30, a weight within 1e-4 of 1: its g, a difference of numbers near 100 in float32, would be noise.
    generator = torch.Generator().manual_seed(seed)
    qkv = (torch.randn(2, 80, 3 * 2 * 16, generator=generator) + 30).to(dtype)
    keys = qkv.unflatten(2, (3, 2, 16))[1, :, 1, 1]
    keys[0] = keys[keys.sum(1).argmax()].roll(8)
    keys[0, :5] += 0.125  # of one head the first key has it in most rows
    qkv.requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    cotangent = torch.randn(2, 80, 2 * 16, generator=generator).to(dtype)
    (grad,) = torch.autograd.grad(ops.packed_attention(qkv, 2, scale=0.5), qkv, cotangent)
    (right,) = torch.autograd.grad(reference.packed_attention(exact, 2, scale=0.5), exact, cotangent.double())
    q, k, _ = exact.detach().unflatten(2, (3, 2, 16)).unbind(2)
    nearly_all = (torch.einsum("bihd,bjhd->bhij", q, k) / 2).softmax(3).amax(3).transpose(1, 2) > 1 - 1e-4
    of_queries, right = (t.double().unflatten(2, (3, 2, 16))[:, :, 0][nearly_all] for t in (grad, right))
    error, largest = (of_queries - right).abs().amax(1), right.abs().amax(1)
    allowed = largest / 16 + 2e-6  # noise would be 1e-4
    assert len(largest) > 100 and bool((error <= allowed).all()), (error / allowed).max()
