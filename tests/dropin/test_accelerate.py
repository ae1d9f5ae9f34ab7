"""`convdit.accelerate`: the same results and the same model, computed by the operators."""

import copy
import importlib
import io
import pickle

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXtBlock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import convdit
from convdit.dropin import dit, products
from convdit.dropin.swap import Swapped
from tests.ops.harness import assert_rows_close

from . import families, official
from .running import Operators


@pytest.fixture(autouse=True)
def small_models_count(monkeypatch):
    """The operators gain in training on more tokens than the models here have."""
    monkeypatch.setattr(dit, "FEWEST", 0)


def run(name, model, seed=1):
    """Values and gradients, and which operators ran."""
    with Operators() as operators:
        outs = families.call(name, model, seed=seed)
        generator = torch.Generator().manual_seed(3)
        loss = sum((o * torch.randn(o.shape, generator=generator).to(o.dtype)).sum() for o in outs)
        wanted = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [o.detach() for o in outs], [g for g in grads if g is not None], operators.names


@pytest.fixture(scope="module")
def results():
    """name -> (model, accelerated model, its report); made once."""
    made = {}

    def get(name):
        if name not in made:
            model = families.make(name)
            fast = copy.deepcopy(model)
            made[name] = model, fast, convdit.accelerate(fast)
        return made[name]

    return get


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_values_and_gradients_keep_to_the_error_rule(results, name, training):
    model, fast, report = results(name)
    model.train(training)
    fast.train(training)
    double = copy.deepcopy(model).double()
    # Through a whole model, whose error is the larger in one gradient of one input is luck: several inputs together.
    draws = [[run(name, m, seed) for m in (fast, model, double)] for seed in (1, 2, 3)]
    assert report.swapped
    for ours, plain, right in draws:
        assert not plain[2] and ours[2], "the operators must run where, and only where, they were put"
        assert max(o.abs().max() for o in right[0]) > 0.01
        assert all(len(ours[kind]) == len(plain[kind]) == len(right[kind]) for kind in (0, 1))
    for kind in (0, 1):
        for i in range(len(draws[0][0][kind])):
            for ours, plain, _ in draws:
                assert ours[kind][i].dtype == plain[kind][i].dtype and ours[kind][i].shape == plain[kind][i].shape
            o, p, r = (torch.cat([draw[who][kind][i].flatten() for draw in draws]) for who in (0, 1, 2))
            assert_rows_close(o, p, r, torch.float32, f"{name}, {('value', 'gradient')[kind]} {i}")


@pytest.mark.parametrize("pack", [False, True], ids=["default", "packed"])
@pytest.mark.parametrize("name", families.DITS)
def test_inference_of_transformers_keeps_to_the_error_rule_and_to_hooks(results, name, pack, monkeypatch):
    if pack:  # which happens where products are PyTorch's
        monkeypatch.setattr(products, "HERE", False)
        monkeypatch.setattr("convdit.ops.linear.HERE", False)
    model, fast, _ = results(name)
    model, fast = model.eval(), copy.deepcopy(fast).eval()
    convdit.accelerate(fast, pack_weights=pack)
    with torch.no_grad():
        right, plain = (families.call(name, m)[0] for m in (copy.deepcopy(model).double(), model))
        for packed in (False, pack, pack):  # at the second call weights are packed
            with Operators() as operators:
                ours = families.call(name, fast)[0]
            assert "gelu_tanh_" in operators.names and ("packed_linear" in operators.names) == pack
            # Of diffusers q, k and v are Linears of their own, and each packs its weight.
            assert ("packed_attention_fwd" in operators.names) == (not pack or "official" in name)
            kept = [products._packed[p].blocks for p in fast.parameters() if p in products._packed]
            assert len(kept) >= 4 if pack else not kept
            assert all((blocks is not None) == packed for blocks in kept)
            assert_rows_close(*(t.flatten() for t in (ours, plain, right)), torch.float32, f"{name}, packed: {packed}")
        calls, inner = [], [m for n, m in fast.named_modules() if n.endswith(("mlp.fc2", "ff.net.2", "to_q", "q_norm"))]
        for part in inner:
            part.register_forward_hook(lambda *_: calls.append(1))
        families.call(name, fast)
        assert len(calls) == len(inner) >= 2


@pytest.mark.parametrize("change", ["norm", "dropout", "no bias"])
def test_attention_with_more_in_it_than_attention_is_called_as_it_is(change):
    block = official.DiTBlock(32, 2).eval()
    if change == "norm":
        block.attn.q_norm = nn.LayerNorm(16)
    elif change == "dropout":
        block.train().attn.attn_drop.p = 0.9
    else:
        block.attn.qkv = nn.Linear(32, 96, bias=False)
    nn.init.normal_(block.adaLN_modulation[1].weight)
    args = torch.randn(2, 7, 32), torch.randn(2, 32)
    fast = copy.deepcopy(block)
    assert convdit.accelerate(fast).swapped
    with torch.no_grad(), Operators() as operators:
        torch.manual_seed(0)
        ours = fast(*args)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, block(*args).detach(), rtol=1e-4, atol=1e-4)
    assert "layer_norm_modulate_fwd" in operators.names and "packed_attention_fwd" not in operators.names


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_model_stays_what_it_was_and_comes_back(name):
    model = families.make(name)
    calls = []
    frozen = next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda *_: calls.append("model"))
    parameters, buffers, modules = (
        dict(f()) for f in (model.named_parameters, model.named_buffers, model.named_modules)
    )
    state, text = model.state_dict(), repr(model)
    classes = {n: type(m) for n, m in modules.items()}
    before = run(name, model)
    report = convdit.accelerate(model)

    for now, then in ((model.named_parameters(), parameters), (model.named_modules(), modules)):
        now = dict(now)
        assert now.keys() == then.keys() and all(now[k] is then[k] for k in then)
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert list(model.state_dict()) == list(state)
    assert all(v.data_ptr() == state[k].data_ptr() for k, v in model.state_dict().items())
    assert all(isinstance(m, classes[n]) for n, m in modules.items()) and repr(model) == text
    assert not frozen.requires_grad and sum(p.requires_grad for p in parameters.values()) == len(parameters) - 1
    calls.clear()
    families.call(name, model)
    assert calls == ["model"]

    again = convdit.accelerate(model)
    assert [e.name for e in again.swapped] == [e.name for e in report.swapped]
    assert {e.note for e in again.swapped} == {"was swapped before"}
    assert again.kept == report.kept
    convdit.restore(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    after = run(name, model)
    assert not after[2] and all(torch.equal(a, b) for k in (0, 1) for a, b in zip(after[k], before[k], strict=True))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_copies_and_pickles_are_accelerated_too(results, name):
    _, fast, report = results(name)
    fast.eval()
    expected, stream = run(name, fast), io.BytesIO()
    torch.save(fast, stream)
    stream.seek(0)
    copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(stream, weights_only=False)]
    for other in copies:
        assert sum(isinstance(m, Swapped) for m in other.modules()) == len(report.swapped)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.5)
        assert not torch.equal(run(name, other)[0][0], expected[0][0])  # parameters of its own
        convdit.restore(other)
        assert not any(isinstance(m, Swapped) for m in other.modules())
    assert all(torch.equal(a, b) for a, b in zip(run(name, fast)[0], expected[0], strict=True))


@pytest.mark.parametrize("name", families.CONVNEXTS)
def test_maps_stay_channels_last_between_blocks(results, name):
    """No layer copies a map: each block gets one that lies channels-last, though the image is (N, C, H, W)."""
    _, fast, _ = results(name)
    fast, seen = copy.deepcopy(fast).eval(), []
    for part in fast.modules():
        if "convnext_block" == getattr(part, "convdit_rule", ""):
            part.register_forward_hook(lambda _m, args, out: seen.append([args[0], out]))
    with torch.no_grad():
        families.call(name, fast)
    assert len(seen) == sum(getattr(m, "convdit_rule", "") == "convnext_block" for m in fast.modules()) > 1
    for x, out in seen:
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "name", ["timm V2, 1x1 convolutions", "official V1", "transformers V2", "official DiT", "diffusers DiT"]
)
def test_compiles_without_a_graph_break(results, name):
    _, fast, _ = results(name)
    torch._dynamo.reset()
    fast = copy.deepcopy(fast).eval()
    compiled = torch.compile(fast, fullgraph="transformers" not in name, backend="aot_eager")
    for n in (2, 3):
        for a, b in zip(families.call(name, compiled, n), families.call(name, fast, n), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_autocast_gives_the_dtype_that_the_original_gives(results):
    model, fast, _ = results("timm V2, linear")
    model.eval(), fast.eval()
    with torch.autocast("cpu", torch.bfloat16):
        (plain,), (ours,) = (families.call("timm V2, linear", m) for m in (model, fast))
    assert ours.dtype == plain.dtype
    torch.testing.assert_close(ours, plain, rtol=0.05, atol=0.05)


# ---- one layer, and what is done to it -----------------------------------------------------------


def block(**options):
    torch.manual_seed(0)
    made = ConvNeXtBlock(16, **({"use_grn": True, "ls_init_value": None} | options))
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.2)
    return made.eval()


def x(dtype=torch.float32):
    return torch.randn(2, 16, 9, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def operators(model, *args):
    with Operators() as ran, torch.no_grad():
        model(*args)
    return ran.names


def test_a_hook_inside_a_layer_is_called():
    model, calls = block(), []
    handle = model.mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    report = convdit.accelerate(model)
    assert "a hook on mlp.fc1" in report.kept[0].note
    handle.remove()
    assert [e.name for e in report.swapped] == ["conv_dw", "mlp.grn"]
    convdit.restore(model)
    convdit.accelerate(model)
    assert operators(model, x()) == {"convnext_block_fwd"}
    model.norm.register_forward_pre_hook(lambda *_: calls.append(2))
    expected = ConvNeXtBlock.forward(model, x())
    calls.clear()
    assert torch.equal(model(x()), expected) and calls == [2]


class Adapter(nn.Module):
    """What LoRA puts in the place of a Linear."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x):
        return 2 * self.inner(x)


def test_a_layer_put_inside_later_is_used():
    model = block()
    convdit.accelerate(model)
    model.mlp.fc2 = Adapter(model.mlp.fc2)
    assert torch.equal(model(x()), ConvNeXtBlock.forward(model, x()))
    assert operators(model, x()) == set()


class Dropped(official.Block):
    """Looks like the block and computes something else."""

    def forward(self, x):
        return super().forward(x) * 0.5


Halved = type("Block", (Dropped,), {"forward": Dropped.forward})


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: block(act_layer="relu"), "its activation is ReLU"),
        (lambda: block(kernel_size=(7, 5)), "7x5 kernel"),
        (lambda: block(stride=2), "stride (2, 2)"),
        (lambda: block(dilation=2), "dilation (2, 2)"),
        (lambda: block(out_chs=32), "groups for 16 channels"),
        (lambda: Halved(8), "it is not what its name says"),
        (lambda: nn.Conv2d(8, 8, 4, padding="same", groups=8), "4x4 kernel"),
        (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="circular"), "circular"),
        (lambda: nn.Conv2d(8, 8, 3, padding=1), "no operator for it"),
        (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), "a 3x3 kernel gains on few maps"),
    ],
)
def test_what_is_not_known_is_left_and_the_reason_is_given(model, reason):
    model = model()
    assert reason in convdit.accelerate(model).kept[0].note
    assert not isinstance(model, Swapped)


def test_a_block_of_the_same_layers_and_more_is_not_the_block():
    report = convdit.accelerate(importlib.import_module("timm.models.csatv2").Block(16))  # spatial attention besides
    assert report.kept[0].name == "" and "it is not what its name says" in report.kept[0].note
    assert [e.name for e in report.swapped] == ["dwconv", "grn"]


def test_forward_mode_runs_the_original():
    model, tangent = block(), torch.ones_like(x())
    value, slope = torch.func.jvp(model, (x(),), (tangent,))
    convdit.accelerate(model)
    ours = torch.func.jvp(model, (x(),), (tangent,))
    assert torch.equal(ours[0], value) and torch.equal(ours[1], slope) and slope.abs().max() > 0.1


def test_only_the_devices_asked_for_run_the_operators():
    model = block()
    convdit.accelerate(model, devices=("cuda",))
    assert operators(model, x()) == set()
    convdit.restore(model)
    convdit.accelerate(model)
    assert operators(model, x()) == {"convnext_block_fwd"}
    assert operators(model.double(), x(torch.float64)) == set()  # no faster


def test_a_model_without_memory_can_be_accelerated():
    with torch.device("meta"):
        model = official.ConvNeXtV2()
    assert len(convdit.accelerate(model).swapped) == 12 + 4


@pytest.mark.parametrize("channels_last", [True, False])
def test_grn_and_depthwise_convolution_alone(channels_last):
    conv, norm = nn.Conv2d(32, 32, 7, padding="same", groups=32), GlobalResponseNorm(32, channels_last=False)
    nn.init.normal_(norm.weight)
    model = nn.Sequential(conv, norm).eval()
    right = copy.deepcopy(model).double()
    plain = copy.deepcopy(model)
    convdit.accelerate(model)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(2, 32, 9, 8).contiguous(memory_format=layout)
    assert operators(model, images) == ({"depthwise_conv2d_fwd", "grn_fwd"} if channels_last else set())
    with torch.no_grad():
        ours, plain, right = model(images), plain(images), right(images.double())
    assert_rows_close(*(t.permute(0, 2, 3, 1) for t in (ours, plain, right)), torch.float32, "two layers")


def test_a_large_hidden_tensor_of_version_1_is_made_in_pieces():
    made = ConvNeXtBlock(64).eval().requires_grad_(False)
    nn.init.normal_(made.gamma)
    images = torch.randn(3, 64, 62, 61).contiguous(memory_format=torch.channels_last)
    right, plain = copy.deepcopy(made).double()(images.double()), made(images)
    convdit.accelerate(made)
    with torch.no_grad(), Sizes() as sizes:
        ours = made(images)
    assert sizes.largest == 1 << 20  # values, in a hidden tensor of 2.9 million
    assert_rows_close(*(t.permute(0, 2, 3, 1) for t in (ours, plain, right)), torch.float32, "pieces")


class Sizes(TorchDispatchMode):
    """The largest result of a matrix product."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::addmm", "aten::mm", "aten::linear", "convdit::linear_fwd"):
            self.largest = max(self.largest, out.numel())
        return out


def test_restore_refuses_a_class_that_was_changed_since():
    model = block()
    convdit.accelerate(model)
    model.__class__ = type("Wrapped", (type(model),), {})
    with pytest.raises(RuntimeError, match="has become a Wrapped"):
        convdit.restore(model)


@pytest.mark.parametrize("function", [convdit.accelerate, convdit.restore])
def test_bad_arguments_are_named(function):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        function("convnext")
    with pytest.raises(TypeError, match="devices: expected names"):
        convdit.accelerate(block(), devices="cpu")
    with pytest.raises(TypeError, match="pack_weights: expected True or False, got 1"):
        convdit.accelerate(block(), pack_weights=1)


def test_the_report_names_what_was_swapped_and_what_was_left():
    text = str(convdit.accelerate(families.make("timm V2, linear")))
    assert text.startswith("ConvNeXt: 5 layers swapped")
    assert "stages.0.blocks.0" in text and "convdit.ops.convnext_block" in text
    assert "stem.0" in text and "no operator for it" in text
