"""Training a DiT: fused residual chain, gradient checkpointing, one graph, and two processes under DDP and FSDP2."""

import copy
import os
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from convdit import ops
from convdit.diffusion import GaussianDiffusion
from convdit.nn.dit_block import CONDITIONINGS

from .test_dit import inputs, small


def loss_and_grads(model, x, t, y):
    model.zero_grad(set_to_none=True)
    loss = model(x, t, y).square().mean()
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_checkpointed_gradients_are_the_same_bits_and_every_block_runs_twice(conditioning):
    model = small(conditioning=conditioning)
    runs = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    plain = loss_and_grads(model, *inputs(model))
    assert len(runs) == 3
    model.set_grad_checkpointing()
    again = loss_and_grads(model, *inputs(model))
    assert len(runs) == 9
    assert torch.equal(again[0], plain[0]) and all(map(torch.equal, again[1], plain[1]))
    with torch.no_grad():
        model(*inputs(model))
    assert len(runs) == 12, "nothing to keep without a backward"


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_design_is_one_graph(conditioning):
    model = small(depth=1, conditioning=conditioning)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs(model)), model(*inputs(model)))


@pytest.mark.parametrize(
    ("conditioning", "expected"),
    [
        # The first norm has no residual to add; every later one, the final layer's too, is one pass over the stream.
        ("adaln_zero", {"layer_norm_modulate": 1, "gated_residual_layer_norm_modulate": 6}),
        ("adaln", {"layer_norm_modulate": 7}),
    ],
)
def test_every_half_block_reads_and_writes_the_residual_stream_once(conditioning, expected, monkeypatch):
    calls = Counter()
    for name in ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate"):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, f=original, **k: calls.update([n]) or f(*a, **k))
    model = small(conditioning=conditioning)
    model(*inputs(model))
    assert calls == expected


def _process(rank, folder):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        reference = small(class_dropout_prob=0.1)
        x, t, y = inputs(reference, n=4)
        noise, diffusion = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)), GaussianDiffusion()

        def step(model, part):
            diffusion.training_losses(model, x[part], t[part], noise[part], y=y[part])["loss"].mean().backward()

        mine = slice(2 * rank, 2 * rank + 2)
        ddp = DistributedDataParallel(copy.deepcopy(reference))
        sharded = copy.deepcopy(reference)
        for block in sharded.blocks:
            fully_shard(block)
        fully_shard(sharded)
        step(reference, slice(None))
        step(ddp, mine)
        step(sharded, mine)
        pairs = zip(reference.named_parameters(), ddp.parameters(), sharded.parameters(), strict=True)
        for (name, whole), copied, shard in pairs:
            assert shard.to_local().numel() < whole.numel(), name
            for grad in (copied.grad, shard.grad.full_tensor()):
                torch.testing.assert_close(grad, whole.grad, rtol=1e-3, atol=1e-5, msg=name)
        # A sharded model still samples, and gives back a state that loads into a plain one.
        for optimised in (reference, sharded):
            torch.optim.SGD(optimised.parameters(), 0.1).step()
        x = inputs(reference, n=2)[0]
        torch.testing.assert_close(sharded(x, t[:2], y[:2]), reference(x, t[:2], y[:2]), rtol=1e-3, atol=1e-4)
        state = {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in sharded.state_dict().items()}
        small().load_state_dict(state)
    finally:
        dist.destroy_process_group()


def test_two_processes_reach_the_gradients_of_one_under_ddp_and_fsdp2(tmp_path):
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
