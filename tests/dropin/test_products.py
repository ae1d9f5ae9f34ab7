"""The Linears of accelerated transformers: packed weights follow the weights."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convdit
from convdit.dropin import products

from . import families
from .running import Operators

packed_linear = torch.ops.convdit.packed_linear


@pytest.fixture(autouse=True)
def take_pytorchs_products(monkeypatch):
    """Where products are ours nothing is packed."""
    monkeypatch.setattr(products, "HERE", False)
    monkeypatch.setattr("convdit.ops.linear.HERE", False)


def tokens(rows=8, width=24):
    return torch.randn(2, rows, width, generator=torch.Generator().manual_seed(rows))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    made = nn.Linear(24, 40)
    yield made
    products.forget(made)


def blocks(layer):
    return products._packed[layer.weight].blocks


def call(layer, x):
    with torch.no_grad():
        return packed_linear(x, layer.weight, layer.bias)


def step(optimizer, **options):
    def change(weight):
        weight.grad = torch.ones_like(weight)
        optimizer([weight], lr=1.0, **options).step()

    return change


CHANGES = {
    "by SGD": step(torch.optim.SGD, foreach=False),
    "by SGD, foreach": step(torch.optim.SGD, foreach=True),
    "by fused AdamW": step(torch.optim.AdamW, fused=True),
    "in place": lambda weight: weight.mul_(2),
    "one value in place": lambda weight: weight[3, 5].add_(100),
    "through .data": lambda weight: weight.data.mul_(2),
    "one row through .data": lambda weight: weight.data[-1].zero_(),
    "other memory": lambda weight: setattr(weight, "data", weight.detach() * 2),
    "other memory twice": lambda weight: [setattr(weight, "data", weight.detach() * 2) for _ in range(2)],
    "through NumPy": lambda weight: weight.detach().numpy().__imul__(2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_packed_weights_follow_the_weights(layer, change):
    x = tokens()
    for _ in range(2):
        before = call(layer, x)
    assert blocks(layer) is not None
    with torch.no_grad():
        change(layer.weight)
        expected = layer(x)
    assert not torch.allclose(before, expected, atol=1e-3)
    for packed in (False, True):
        torch.testing.assert_close(call(layer, x), expected, rtol=1e-5, atol=1e-5)
        assert (blocks(layer) is not None) == packed


def test_numbers_of_rows_that_change_at_each_call_pack_nothing(layer):
    for rows in (8, 9) * 3:
        torch.testing.assert_close(call(layer, tokens(rows)), layer(tokens(rows)).detach(), rtol=1e-5, atol=1e-5)
        assert blocks(layer) is None


def test_copies_go_with_their_weights_and_by_restore(layer):
    for _ in range(2):
        call(layer, tokens())
    assert layer.weight in products._packed
    convdit.restore(layer)
    assert layer.weight not in products._packed
    gc.collect()
    kept = len(products._packed)
    other = nn.Linear(24, 40)
    call(other, tokens())
    assert len(products._packed) == kept + 1
    del other
    gc.collect()
    assert len(products._packed) == kept


@pytest.mark.parametrize("weights", ["wide", "strided", "inference"])
def test_weights_that_are_not_packed_are_right_too(weights):
    width = products.WIDEST + 1 if weights == "wide" else 24
    with torch.inference_mode(weights == "inference"):
        made = nn.Linear(width, width)
        if weights == "strided":
            made.weight = nn.Parameter(made.weight.detach().t())
    x = tokens(width=width)
    for _ in range(3):
        with torch.inference_mode():
            torch.testing.assert_close(call(made, x), made(x), rtol=1e-5, atol=1e-5)
    assert made.weight not in products._packed or blocks(made) is None


def test_compiled_products_are_packed_as_well(layer):
    second = nn.Linear(40, 24)
    compiled = torch.compile(lambda x: products.mlp(x, layer, second, True) + 1, fullgraph=True)
    x = tokens()
    with torch.no_grad():
        for _ in range(3):
            right = second(F.gelu(layer(x), approximate="tanh")) + 1
            torch.testing.assert_close(compiled(x), right, rtol=1e-5, atol=1e-5)
    assert blocks(layer) is not None and blocks(second) is not None


def test_registration(layer):
    arguments = tokens(), layer.weight.detach(), layer.bias.detach()
    for bias in (arguments[-1], None):
        torch.library.opcheck(packed_linear.default, (*arguments[:-1], bias))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as flops:
        call(layer, tokens())
    assert flops.get_total_flops() == 2 * 2 * 8 * 24 * 40


# ---- models ----------------------------------------------------------------------------------------


def copies(model):
    return [products._packed[p].blocks for p in model.parameters() if p in products._packed]


def unseen(model):
    """Changes a value of each matrix behind PyTorch's back: neither version nor memory nor the sample shows it."""
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.shape[1] > 2:
            parameter.data[0, 1] += 3.0


def inference(name, model):
    with torch.no_grad():
        return families.call(name, model)[0]


@pytest.mark.parametrize("name", families.DITS)
def test_by_default_no_change_of_the_weights_goes_unseen_and_packed_it_takes_accelerate_again(name):
    plain = families.make(name).eval()
    fast = copy.deepcopy(plain)
    convdit.accelerate(fast)
    packed = copy.deepcopy(fast)
    convdit.accelerate(packed, pack_weights=True)
    for model in (fast, packed):
        for _ in range(2):
            before = inference(name, model)
    for model in (plain, fast, packed):
        unseen(model)
    right = inference(name, plain)
    assert not torch.allclose(before, right, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(inference(name, fast), right, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(inference(name, packed), right, rtol=1e-3, atol=1e-3)  # as its docstring warns
    convdit.accelerate(packed, pack_weights=True)
    for _ in range(2):
        torch.testing.assert_close(inference(name, packed), right, rtol=1e-4, atol=1e-4)
    assert copies(packed)
    convdit.accelerate(packed)
    assert not copies(packed)
    torch.testing.assert_close(inference(name, packed), right, rtol=1e-4, atol=1e-4)
    assert not copies(packed)


@pytest.mark.parametrize("name", families.DITS)
def test_packed_models_train_on_the_weights_themselves_and_follow_the_optimiser(name):
    plain = families.make(name).eval()
    fast = copy.deepcopy(plain)
    convdit.accelerate(fast)
    assert "weights packed" not in str(convdit.accelerate(copy.deepcopy(plain)))
    convdit.restore(fast)
    assert "weights packed" in str(convdit.accelerate(fast, pack_weights=True))
    fast = pickle.loads(pickle.dumps(fast))  # it stays so
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, fast)]
    for _ in range(2):
        for _ in range(2):
            torch.testing.assert_close(inference(name, fast), inference(name, plain), rtol=1e-4, atol=1e-4)
        kept = copies(fast)
        assert kept and all(blocks is not None for blocks in kept)
        for model, optimizer in zip((plain, fast), optimizers, strict=True):
            optimizer.zero_grad()
            with Operators() as operators:
                families.call(name, model)[0].square().mean().backward()
            assert not operators.names & {"packed_linear", "gelu_tanh_"}
            optimizer.step()
    grads = [[p.grad for p in m.parameters()] for m in (plain, fast)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_where_products_are_ours_nothing_is_packed_and_training_takes_them_too(layer, monkeypatch):
    monkeypatch.setattr(products, "HERE", True)
    monkeypatch.setattr("convdit.ops.linear.HERE", True)
    monkeypatch.setattr("convdit.ops.linear.FEWEST", 1)
    x = tokens()
    for grad in (False, True):
        with torch.set_grad_enabled(grad), Operators() as operators:
            assert products.usable(x)
            y = products.linear(x, layer, pack=True)
        assert operators.names == {"linear_fwd"} and layer.weight not in products._packed
        torch.testing.assert_close(y, layer(x))
    assert y.requires_grad
