"""What a call costs beside its arithmetic: what it asks first, how it reaches autograd, the pages of large results."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

from convdit import ops
from convdit.ops._common import Function
from convdit.sparse import ActiveSites


def without_gradients(dtype=torch.float32, device="cpu"):
    """A call of each operator: a float32 x, parameters of the dtype, those of `device` on it."""
    image, rows, tokens = torch.randn(2, 3, 4, 8), torch.randn(4, 8), torch.randn(2, 5, 8)
    kernel, channel, vector = (torch.randn(size).to(device, dtype) for size in ((8, 1, 3, 3), (8,), (2, 8)))
    sites = ActiveSites.from_mask(torch.ones(1, 2, 2, dtype=torch.bool))
    return {
        "depthwise_conv2d": lambda: ops.depthwise_conv2d(image, kernel, channel),
        "depthwise_conv2d_layer_norm": lambda: ops.depthwise_conv2d_layer_norm(
            image, kernel, channel, channel, channel
        ),
        "sparse_depthwise_conv2d": lambda: ops.sparse_depthwise_conv2d(rows, kernel, channel, sites),
        "grn": lambda: ops.grn(image, channel, channel),
        "sparse_grn": lambda: ops.sparse_grn(rows, channel, channel, sites),
        "layer_norm_modulate": lambda: ops.layer_norm_modulate(tokens, vector, vector),
        "gated_residual": lambda: ops.gated_residual(tokens, tokens, vector),
        "gated_residual_layer_norm_modulate": lambda: torch.cat(
            ops.gated_residual_layer_norm_modulate(tokens, tokens, vector, vector, vector)
        ),
    }


@pytest.mark.parametrize("name", list(without_gradients()))
def test_a_call_without_gradients_leaves_its_arguments_to_the_operator(name, monkeypatch):
    """Whether they fit already or are to be cast; the result is that of a call that autograd sees."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        call = without_gradients(dtype)[name]
        seen = call()  # gradients are on: the long way
        with monkeypatch.context() as patched, torch.no_grad():
            for module in ("adaln", "depthwise_conv", "grn", "sparse_depthwise_conv"):
                patched.delattr(sys.modules[f"convdit.ops.{module}"], "needs_grad")
            assert torch.equal(call(), seen)
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected the device of x"):
        without_gradients(device="meta")[name]()


def test_an_operator_without_gradients_gives_nothing_for_them():
    for name in (*without_gradients(), "packed_attention", "adaln_zero_attention", "convnext_block"):
        operator = getattr(torch.ops.convdit, f"{name}_fwd").default
        assert len(operator._schema.returns) == (2 if name == "gated_residual_layer_norm_modulate" else 1)


def bfs(cls):
    return [cls, *(below for child in cls.__subclasses__() for below in bfs(child))]


def test_every_autograd_function_takes_the_short_way():
    functions = [cls for cls in bfs(torch.autograd.Function) if cls.__module__.startswith("convdit.ops.")]
    assert len(functions) > 8
    assert all(issubclass(cls, Function) for cls in functions)


def test_eager_calls_bind_no_arguments_by_signature_and_wrap_no_backward(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("PyTorch's long way was taken")

    monkeypatch.setattr(inspect, "signature", refuse)
    monkeypatch.setattr(torch, "no_grad", refuse)  # once_differentiable's
    x, shift, scale = (torch.randn(size, requires_grad=True) for size in ((2, 3, 8), (2, 8), (2, 8)))
    y = ops.layer_norm_modulate(x, shift, scale)
    assert type(y.grad_fn).__name__ == "_LayerNormModulateBackward"
    y.sum().backward()
    assert torch.equal(shift.grad, torch.full((2, 8), 3.0))
    monkeypatch.undo()
    torch.func.grad(lambda v: ops.layer_norm_modulate(v, shift, scale).sum())(x)  # by PyTorch's way


def test_eager_autograd_sees_no_output_that_only_the_backward_uses():
    """An output has its metadata noted in the forward, and a gradient of zeros made for it in the backward."""
    x, y, row = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 8, requires_grad=True)
    image, channel = torch.randn(1, 2, 2, 8), torch.randn(8, requires_grad=True)
    kernel, wide, square = torch.randn(8, 1, 3, 3), torch.randn(24, 8), torch.randn(8, 8)
    calls = {
        1: (
            lambda: ops.layer_norm_modulate(x, row, row),
            lambda: ops.gelu_grn(image, channel, channel),
            lambda: ops.depthwise_conv2d_layer_norm(image, kernel, None, channel, channel),
            lambda: ops.packed_attention(torch.randn(2, 3, 24, requires_grad=True), 2),
            lambda: ops.adaln_zero_attention(x, torch.stack([row] * 3, 1), wide, None, square, None, 2),
        ),
        2: (lambda: ops.gated_residual_layer_norm_modulate(x, y, row, row, row)[0],),
    }
    for seen, functions in calls.items():
        for function in functions:
            assert len(function().grad_fn._input_metadata) == seen


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="needs Linux with transparent huge pages"
)
def test_large_results_ask_for_huge_pages():
    y = ops.gated_residual(*(torch.randn(size) for size in ((2, 1024, 1024), (2, 1024, 1024), (2, 1024))))
    middle = y.data_ptr() + y.nbytes // 2
    for area in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M):
        found = re.match("([0-9a-f]+)-([0-9a-f]+) ", area)
        if found and int(found[1], 16) <= middle < int(found[2], 16):
            assert " hg" in re.search("^VmFlags:.*$", area, re.M)[0]
            return
    raise AssertionError("no area of memory holds the result")
