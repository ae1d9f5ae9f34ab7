"""The MLP of a DiT block: one pass for bias and GELU, and no pass by what others hang on its layers."""

import pytest
import torch
import torch.nn.functional as F

from convdit.nn.dit_block import Mlp


def expected(mlp, hidden):
    return mlp.fc2(F.gelu(hidden, approximate="tanh")).detach()


@pytest.mark.parametrize("grad", [True, False])
def test_hooks_run_and_what_they_keep_is_not_overwritten(grad):
    torch.manual_seed(0)
    mlp, x, kept = Mlp(8, 24), torch.randn(2, 5, 8), []
    hidden = mlp.fc1(x).detach()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(mlp(x).detach(), expected(mlp, hidden))
        hook = mlp.fc1.register_forward_hook(lambda _, __, out: kept.append(out))
        torch.testing.assert_close(mlp(x).detach(), expected(mlp, hidden))
        hook.remove()
        torch.testing.assert_close(mlp(x).detach(), expected(mlp, hidden))
        assert len(kept) == 1 and torch.equal(kept[0], hidden)
        everywhere = torch.nn.modules.module.register_module_forward_hook(lambda layer, *_: kept.append(layer))
        mlp(x)
        everywhere.remove()
    assert kept[1] is mlp.fc1


@pytest.mark.parametrize("grad", [True, False])
def test_another_forward_is_called(grad):
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    torch.manual_seed(0)
    mlp, x = Mlp(8, 24), torch.randn(2, 5, 8)
    hidden, plain = mlp.fc1(x).detach() + 1, mlp.fc1
    mlp.fc1 = Adapted(8, 24)
    mlp.fc1.load_state_dict(plain.state_dict())
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(mlp(x).detach(), expected(mlp, hidden))
        mlp.fc1, forward = plain, plain.forward
        plain.forward = lambda x: forward(x) + 1
        torch.testing.assert_close(mlp(x).detach(), expected(mlp, hidden))


def test_gradients():
    torch.manual_seed(0)
    mlp, x = Mlp(8, 24).double(), torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    leaves = [x, *mlp.parameters()]
    ours = torch.autograd.grad(mlp(x).square().sum(), leaves)
    right = torch.autograd.grad(mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh")).square().sum(), leaves)
    torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    torch.manual_seed(0)
    mlp, x = Mlp(8, 24), torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype):
        y = mlp(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected(mlp, mlp.fc1(x)), rtol=0.05, atol=0.02)
