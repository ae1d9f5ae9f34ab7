"""FCMAE in training: half precision, first weights, compiled steps, recomputation, several processes."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

import convdit
from convdit import models
from convdit.nn import ConvNeXtBlock, DepthwiseConv2d
from convdit.sparse import random_patch_mask

from .recomputation import check_gradient_checkpointing

SMALL = {"image_size": 16, "patch_size": 8, "depths": (1, 2), "dims": (6, 8), "decoder_dim": 12, "mask_ratio": 0.5}


def build(**options):
    torch.manual_seed(0)
    model = models.FCMAE("convnextv2_atto", **SMALL | options)
    for name, p in model.named_parameters():
        if "gamma" in name or "beta" in name:
            torch.nn.init.normal_(p)
    return model


def batch(n=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 16, 16, generator=generator), random_patch_mask(n, (2, 2), 0.5, generator)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", ["fixed", "official"])
@pytest.mark.parametrize("sparse", [True, False])
def test_no_nan_and_no_overflow_under_autocast(dtype, init, sparse):
    # Wide enough that official weights leave float16's range, and its squares far behind.
    options = {"depths": (1, 1), "dims": (64, 768), "decoder_dim": 512, "in_chans": 1}
    torch.manual_seed(0)
    model = models.FCMAE("convnextv2_atto", 32, 8, init=init, sparse=sparse, **options)
    images = 5 * torch.randn(3, 1, 32, 32)
    if init == "fixed":  # official weights: see the next test
        images[1] = 0
    mask = random_patch_mask(3, (4, 4), 0.6, torch.Generator().manual_seed(0))
    expected = model(images, mask)
    if init == "official":
        assert expected.pred.abs().max() > torch.finfo(torch.float16).max
    with torch.autocast("cpu", dtype):
        out = model(images, mask)
        pictures = model.reconstruct(images, mask)
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and pictures.isfinite().all()
    spread = 4 * torch.finfo(dtype).eps * expected.pred.abs().max().item()
    torch.testing.assert_close(out.pred.float(), expected.pred, rtol=0, atol=spread)
    torch.testing.assert_close(out.loss, expected.loss, rtol=0.02, atol=0)
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name


def plain_block(block, x):
    """A `ConvNeXtBlock` in PyTorch's own functions."""
    weights = dict(block.named_parameters())
    y = F.conv2d(x.permute(0, 3, 1, 2), weights["dwconv.weight"], weights["dwconv.bias"], padding=3, groups=x.shape[3])
    y = F.layer_norm(y.permute(0, 2, 3, 1), x.shape[3:], weights["norm.weight"], weights["norm.bias"], 1e-6)
    y = F.gelu(F.linear(y, weights["pwconv1.weight"], weights["pwconv1.bias"]))
    norm = y.norm(dim=(1, 2), keepdim=True)
    y = y + weights["grn.gamma"] * (y * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + weights["grn.beta"]
    return x + F.linear(y, weights["pwconv2.weight"], weights["pwconv2.bias"])


def test_gradients_of_an_image_of_zeros_leave_float16_in_plain_pytorch_too():
    """Where all features are zero each block multiplies gradients by its weights over sqrt(eps), a thousand."""

    def gradients_of(forward, dtype):
        torch.manual_seed(0)
        blocks = [ConvNeXtBlock(64) for _ in range(2)]
        for layer in (each for block in blocks for each in (block.dwconv, block.pwconv1, block.pwconv2)):
            torch.nn.init.trunc_normal_(layer.weight)  # as the official code draws them
            torch.nn.init.zeros_(layer.bias)
        x, weight = torch.randn(2, 3, 8, 8, 64)
        x[1] = 0
        if dtype == torch.float64:
            x, weight, blocks = x.double(), weight.double(), [block.double() for block in blocks]
        y = x.requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            for block in blocks:
                y = forward(block, y)
        (y * weight).sum().backward()
        assert y.isfinite().all()
        parameters = [(i, name, p) for i, block in enumerate(blocks) for name, p in block.named_parameters()]
        return x.grad, {(i, name) for i, name, p in parameters if not p.grad.isfinite().all()}

    exact, infinite = gradients_of(plain_block, torch.float64)
    assert not infinite and exact[1].abs().max() > 1e11 and exact[[0, 2]].abs().max() < 1e3
    ours, infinite = gradients_of(lambda block, x: block(x), torch.float16)
    theirs, theirs_infinite = gradients_of(plain_block, torch.float16)
    assert len(theirs_infinite) > 10 and not theirs[1].isfinite().any()
    if "float16" in convdit.build_info()["cpu_halves"]:
        assert infinite == theirs_infinite and not ours[1].isfinite().any()
    else:  # such a CPU computes the branch in float32, which holds them
        assert not infinite
        torch.testing.assert_close(ours[1].double(), exact[1], rtol=0.05, atol=0.01 * exact[1].abs().max().item())
    for gradient in (ours, theirs):
        torch.testing.assert_close(gradient[[0, 2]].double(), exact[[0, 2]], rtol=0, atol=5)


def test_official_first_weights_are_those_of_the_public_code():
    torch.manual_seed(0)
    model = models.FCMAE(depths=(1, 1, 1, 1), decoder_dim=256, init="official")
    std_1 = 0.8796  # of a standard normal cut off at 2
    for name, layer in model.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d, DepthwiseConv2d)):
            inside_decoder = name.startswith("decoder") and isinstance(layer, torch.nn.Linear)
            if inside_decoder:
                expected = 1 / (3 * layer.in_features) ** 0.5
            else:
                expected = 0.02 if name.startswith("encoder.downsample_layers") and ".0.0" not in name else std_1
            assert abs(layer.weight.std().item() / expected - 1) < 0.1, name
            assert layer.bias.any() == inside_decoder, name
            if expected == std_1:
                assert layer.weight.abs().max() <= 2, name
    assert abs(model.mask_token.std().item() / 0.02 - 1) < 0.2
    for name, p in model.named_parameters():
        assert "gamma" not in name and "beta" not in name or p.eq(0).all(), name


def test_official_weights_are_drawn_over_those_of_a_given_encoder_and_fixed_ones_are_not():
    for init, kept in (("fixed", True), ("official", False)):
        encoder = models.create("convnextv2_atto", depths=(1, 1), dims=(6, 8))
        before = encoder.stages[1][0].pwconv1.weight.clone()
        models.FCMAE(encoder, 16, 8, decoder_dim=12, init=init)
        assert encoder.stages[1][0].pwconv1.weight.equal(before) == kept
    with pytest.raises(ValueError, match='init: expected "official" or "fixed", got \'xavier\''):
        build(init="xavier")


@pytest.mark.parametrize("attention_stages", [0, 1])
def test_steps_with_other_masks_and_weights_compile_once(attention_stages):
    model = build(attention_stages=attention_stages)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    losses, masks = [], []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            torch.manual_seed(step)
            out = compiled(torch.randn(4, 3, 16, 16))
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(out.loss.item())
            masks.append(out.mask)
    assert counter.frame_count == 1 and len(set(losses)) == 4
    assert not all(mask.equal(masks[0]) for mask in masks)
    # The number of visible patches is a constant of the graph: nothing in it looks how many there are.
    assert not any(node.target in ("nonzero", "tolist", "item") for node in counter.graphs[0].graph.nodes)


@pytest.mark.parametrize("options", [{"sparse": True}, {"sparse": False}, {"attention_stages": 1}])
def test_gradient_checkpointing_changes_no_bit_and_keeps_less(options):
    model, (images, mask) = build(drop_path_rate=0.5, decoder_depth=2, **options), batch()
    check_gradient_checkpointing(model, lambda: model(images, mask).loss, share=0.8)


def test_a_checkpointed_step_compiles():
    model, (images, mask) = build(), batch()
    model(images, mask).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.set_grad_checkpointing()
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager")(images, mask).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def one_of_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    images, mask = batch()
    model = DistributedDataParallel(build())
    for _ in range(2):  # the second step is the one that fails where a parameter took no part
        model.zero_grad()
        model(images[rank::2], mask[rank::2]).loss.backward()
    torch.save(gradients(model.module), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_average_their_gradients(tmp_path):
    processes.spawn(one_of_two, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    images, mask = batch()
    model = build()
    for rank in (0, 1):
        (model(images[rank::2], mask[rank::2]).loss / 2).backward()
    for name, gradient in gradients(model).items():
        assert first[name].equal(second[name]), name
        torch.testing.assert_close(first[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
