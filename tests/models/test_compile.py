"""Compiled whole models: one graph, and a batch of another size is no trouble."""

import pytest
import torch

from convdit import models

ENCODER = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))


def classify(model, n):
    return model(torch.randn(n, 3, 64, 64)).sum()


def reconstruct(model, n):
    return model(torch.randn(n, 3, 64, 64)).loss


def denoise(model, n):
    return model(torch.randn(n, 4, 8, 8), torch.randint(9, (n,)), torch.randint(4, (n,))).sum()


CASES = {
    "convnextv2": (lambda: models.create("convnextv2_atto", num_classes=3, **ENCODER), classify),
    "convnext": (lambda: models.create("convnext_tiny", num_classes=3, **ENCODER), classify),
    "fcmae": (lambda: models.FCMAE("convnextv2_atto", decoder_dim=16, **ENCODER), reconstruct),
    "dit": (lambda: models.DiT(8, 2, 4, hidden_size=32, depth=2, num_heads=2, num_classes=4), denoise),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_model_trains_on_batches_of_several_sizes(name):
    make, step = CASES[name]
    torch._dynamo.reset()
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (2, 3, 5):
        torch.manual_seed(n)
        step(compiled, n).backward()
        got = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        torch.manual_seed(n)
        step(model, n).backward()
        assert got.keys() == {k for k, p in model.named_parameters() if p.grad is not None}
        for k, p in model.named_parameters():
            if k in got:
                torch.testing.assert_close(got[k], p.grad, rtol=1e-4, atol=1e-4 * (1 + p.grad.abs().max().item()))
        model.zero_grad(set_to_none=True)
