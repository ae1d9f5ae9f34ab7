"""What only a device has: graphs that are captured and replayed, streams, more devices than one.

In the dry run of `make gpu-check` the executor stands in: to replay is to call again; it has one stream and device.
"""

import copy
from contextlib import nullcontext

import pytest
import torch

from convdit import models, ops
from convdit.sparse import ActiveSites, random_patch_mask

from .plugin import DEVICE, DRY

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SITES = ActiveSites.from_patch_mask(random_patch_mask(2, (2, 2), 0.5, torch.Generator().manual_seed(0)), 2)


def values(*shape):
    return torch.randn(*shape)


# name: function of tensors and sites, tensors of the dtype, float32 parameters
CALLS = {
    "depthwise_conv2d": (ops.depthwise_conv2d, [(2, 6, 5, 16)], [(16, 1, 7, 7), (16,)]),
    "depthwise_conv2d_layer_norm": (ops.depthwise_conv2d_layer_norm, [(1, 6, 5, 16)], [(16, 1, 7, 7), *[(16,)] * 3]),
    "gelu_grn": (ops.gelu_grn, [(2, 3, 4, 32)], [(32,), (32,)]),
    "layer_norm_modulate": (ops.layer_norm_modulate, [(2, 5, 384)], [(2, 384)] * 2),
    "gated_residual": (ops.gated_residual, [(2, 5, 48)] * 2, [(2, 48)]),
    "gated_residual_layer_norm_modulate": (
        ops.gated_residual_layer_norm_modulate, [(2, 5, 48)] * 2, [(2, 48)] * 3),
    "packed_attention": (lambda qkv: ops.packed_attention(qkv, 2), [(2, 17, 3 * 64)], []),
    "sparse_depthwise_conv2d": (
        lambda x, w, b, sites=None: ops.sparse_depthwise_conv2d(x, w, b, sites),
        [(len(SITES), 16)], [(16, 1, 7, 7), (16,)]),
    "sparse_gelu_grn": (
        lambda x, w, b, sites=None: ops.sparse_gelu_grn(x, w, b, sites), [(len(SITES), 16)], [(16,), (16,)]),
}  # fmt: skip


def made(name: str, dtype: torch.dtype, device: str = DEVICE):
    """A function of tensors, forward and backward in one; and its tensors."""
    function, maps, parameters = CALLS[name]
    sites = {"sites": SITES.to(device)} if name.startswith("sparse") else {}
    tensors = [values(*s).to(dtype) for s in maps] + [values(*s) for s in parameters]
    leaves = [t.to(device).requires_grad_() for t in tensors]

    def step():
        outputs = function(*leaves, **sites)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
        return [*(o.detach() for o in outputs), *gradients]

    return step, leaves


def captured(step):
    """(results, replay): replay() computes the results again in place, from what the inputs then hold."""
    if DRY:
        results = step()
        return results, lambda: [old.copy_(new) for old, new in zip(results, step(), strict=True)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return results, graph.replay


def assert_bits_equal(got, expected):
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g.cpu(), e.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_a_captured_graph_replays_on_new_values(name, dtype):
    step, leaves = made(name, dtype)
    results, replay = captured(step)
    before = [r.clone() for r in results]
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(values(*leaf.shape))
    replay()
    assert_bits_equal(results, step())
    assert any(not torch.equal(b, r) for b, r in zip(before, results, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_another_stream_gives_the_same(name):
    step, _ = made(name, torch.float32)
    expected = step()
    if DRY:
        stream, context = None, nullcontext()
    else:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        context = torch.cuda.stream(stream)
    with context:
        # Work that keeps the stream busy: a kernel launched on another stream would not wait for it.
        slow = values(512, 512).to(DEVICE)
        for _ in range(1 if DRY else 200):
            slow = slow @ slow * 0
        got = step()
    if stream:
        torch.cuda.current_stream().wait_stream(stream)
    assert_bits_equal(got, expected)


@pytest.mark.skipif(DRY or torch.cuda.device_count() < 2, reason="there is no second device")
@pytest.mark.parametrize("name", CALLS)
def test_a_second_device_gives_the_same(name):
    step, leaves = made(name, torch.float32)
    second, others = made(name, torch.float32, "cuda:1")
    with torch.no_grad():
        for other, leaf in zip(others, leaves, strict=True):
            other.copy_(leaf)
    got = second()  # while cuda:0 is the current one
    assert all(g.device.index == 1 for g in got) and torch.cuda.current_device() == 0
    assert_bits_equal(got, step())


def dit():
    return models.DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=3)


# name: the model, its inputs
MODELS = {
    "ConvNeXt": (lambda: models.ConvNeXt((1, 1, 1, 1), (8, 8, 16, 16), num_classes=5), lambda: (values(2, 3, 64, 64),)),
    "DiT": (dit, lambda: (values(2, 4, 8, 8), torch.tensor([3.0, 500.0]), torch.tensor([0, 2]))),
}


@pytest.mark.skipif(DRY, reason="the executor has no fused block; tests/ops runs each of its operators")
@pytest.mark.parametrize("name", MODELS)
def test_models_train_as_on_the_cpu(name):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, given, gradients = make(), inputs(), []
    with torch.no_grad():
        for parameter in model.parameters():  # some are zero at first, and hide what lies behind them
            parameter.normal_(std=0.05)
    for device in ("cpu", DEVICE):
        own = copy.deepcopy(model).eval().to(device)
        own(*(t.to(device) for t in given)).square().sum().backward()
        gradients.append({name: p.grad.cpu() for name, p in own.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
