"""ConvNeXt models: published sizes, parity with timm, intermediate maps, weights in and out."""

import re

import pytest
import torch

from convdit import models
from convdit.nn import DepthwiseConv2d

# Those of timm where nobody published weights or a table: convnextv2_small, convnext_huge, convnext_xxlarge.
PUBLISHED = {
    "convnextv2_atto": 3_708_400,
    "convnextv2_femto": 5_233_240,
    "convnextv2_pico": 9_066_280,
    "convnextv2_nano": 15_623_800,
    "convnextv2_tiny": 28_635_496,
    "convnextv2_small": 50_318_440,
    "convnextv2_base": 88_717_800,
    "convnextv2_large": 197_956_840,
    "convnextv2_huge": 660_289_640,
    "convnext_atto": 3_695_520,
    "convnext_femto": 5_217_784,
    "convnext_pico": 9_045_672,
    "convnext_nano": 15_593_560,
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
    "convnext_xlarge": 350_196_968,
    "convnext_huge": 659_942_216,
    "convnext_xxlarge": 846_471_016,
}


def small(version=2, **options):
    options = {"depths": (1, 2), "dims": (8, 12), "num_classes": 5} | options
    torch.manual_seed(0)
    model = models.create("convnext_tiny" if version == 1 else "convnextv2_atto", **options)
    for name, p in model.named_parameters():
        if "gamma" in name or "beta" in name:
            torch.nn.init.normal_(p)
    return model


def test_every_size_has_a_name_in_both_versions():
    assert sorted(models.list()) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = models.create(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def from_timm(state_dict):
    rules = [
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^(stages\.\d+)\.blocks\.", r"\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
        (r"\.mlp\.grn\.weight$", ".grn.gamma"),
        (r"\.mlp\.grn\.bias$", ".grn.beta"),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    ]
    renamed = {}
    for name, value in state_dict.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        # The smallest sizes have 1x1 convolutions for Linears there.
        renamed[name] = value.flatten(1) if "pwconv" in name and value.dim() == 4 else value
    return renamed


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_atto", "convnext_tiny"])
def test_logits_features_and_gradients_equal_those_of_timm(name):
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=10)
    for key, p in theirs.named_parameters():
        if "grn" in key or "gamma" in key:
            torch.nn.init.normal_(p, std=0.3)
    ours = models.create(name, num_classes=10)
    ours.load_state_dict(from_timm(theirs.state_dict()))
    images = torch.randn(2, 3, 64, 96)
    logits = theirs(images)
    torch.testing.assert_close(ours(images), logits, rtol=1e-4, atol=1e-4)
    maps = theirs.forward_intermediates(images, intermediates_only=True)
    for mine, map_ in zip(ours.forward_intermediates(images), maps, strict=True):
        torch.testing.assert_close(mine, map_, rtol=1e-4, atol=1e-4)
    logits.square().sum().backward()
    ours(images).square().sum().backward()
    expected = from_timm({key: p.grad for key, p in theirs.named_parameters()})
    for key, p in ours.named_parameters():
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(p.grad, expected[key], rtol=1e-3, atol=1e-4 * scale, msg=key)


def test_initial_weights_are_the_official_ones():
    torch.manual_seed(0)
    model = models.create("convnext_tiny", depths=(1, 1), dims=(32, 64), num_classes=50, head_init_scale=0.5)
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, DepthwiseConv2d)):
            expected = 0.01 if name == "head" else 0.02
            assert abs(module.weight.std().item() / expected - 1) < 0.1, name
            assert module.bias.eq(0).all(), name
    assert model.stages[0][0].gamma.eq(1e-6).all()
    second = models.create("convnextv2_atto").stages[0][0].grn
    assert second.gamma.eq(0).all() and second.beta.eq(0).all()


def test_stochastic_depth_rises_linearly_over_all_blocks():
    model = small(depths=(2, 3), drop_path_rate=0.4)
    rates = [block.drop_path for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("version", [1, 2])
def test_intermediates_are_one_nchw_map_a_stage(version):
    model = small(version)
    images = torch.randn(2, 3, 32, 48)
    maps = model.forward_intermediates(images)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 12), (2, 12, 4, 6)]
    normed = model.forward_intermediates(images, norm=True)
    assert normed[0].equal(maps[0])
    torch.testing.assert_close(normed[1], model.norm(maps[1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    features = model.forward_features(images)
    torch.testing.assert_close(features, model.norm(maps[1].mean((2, 3))))
    torch.testing.assert_close(model(images), model.head(features))
    info = model.feature_info
    assert [(i["num_chs"], i["reduction"]) for i in info] == [(8, 4), (12, 8)]


def test_a_model_of_features_has_no_norm_and_no_head_and_returns_its_maps():
    whole = small()
    model = small(features_only=True)
    missing = set(whole.state_dict()) - set(model.state_dict())
    assert missing == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    images = torch.randn(1, 3, 16, 16)
    model.load_state_dict(whole.encoder().state_dict())
    for mine, map_ in zip(model(images), whole.forward_intermediates(images), strict=True):
        assert mine.equal(map_)
    with pytest.raises(ValueError, match="norm: .*features_only"):
        model.forward_intermediates(images, norm=True)
    with pytest.raises(ValueError, match="features_only"):
        model.reset_classifier(3)


def test_every_layout_of_the_images_gives_the_same_logits():
    model = small().double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(images)
    for other in (
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        images.expand(2, 3, 32, 32)[:, [0, 1, 2]],
    ):
        torch.testing.assert_close(model(other), expected)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_stem_stride_sets_the_stride_of_the_whole(stride):
    model = small(stem_stride=stride, in_chans=1, depths=(1, 1, 1), dims=(4, 6, 8))
    maps = model.forward_intermediates(torch.randn(1, 1, 32, 32))
    assert model.stride == 4 * stride and maps[-1].shape[2:] == (8 // stride, 8 // stride)


def test_a_reset_classifier_has_new_classes_or_none():
    model = small()
    model.reset_classifier(7)
    images = torch.randn(1, 3, 16, 16)
    assert model(images).shape == (1, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert model(images).equal(model.forward_features(images))


def test_load_encoder_loads_all_but_norm_and_head_and_says_so():
    source, target = small(num_classes=3), small(num_classes=5)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(1)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    left = target.load_encoder(source.encoder().state_dict())
    assert left == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    for name, value in target.state_dict().items():
        assert value.equal(before[name] if name in left else source.state_dict()[name]), name


def test_load_encoder_refuses_what_does_not_fit_and_changes_nothing():
    target, state = small(), small().encoder().state_dict()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    first = "downsample_layers.0.0.weight"
    shifted = {k: v + 1 for k, v in state.items()}
    for bad, message in (
        ({k: v for k, v in shifted.items() if k != first}, f"missing {first}"),
        (shifted | {"decoder.weight": torch.zeros(1)}, "unknown decoder.weight"),
        (shifted | {first: torch.zeros(8, 3, 2, 2)}, r"expected shape \(8, 3, 4, 4\), got"),
    ):
        with pytest.raises(ValueError, match=message):
            target.load_encoder(bad)
        assert all(v.equal(before[k]) for k, v in target.state_dict().items())


def test_bad_input_is_refused_by_name():
    model = small()
    with pytest.raises(ValueError, match="name: expected one of .* got 'convnext_giant'"):
        models.create("convnext_giant")
    with pytest.raises(ValueError, match="depths, dims"):
        models.create("convnext_tiny", depths=(1, 2))
    with pytest.raises(ValueError, match=r"x: expected .* \(N, 3, H, W\), got \(2, 1, 32, 32\)"):
        model(torch.randn(2, 1, 32, 32))
    with pytest.raises(ValueError, match="x: expected images of at least 8x8 pixels"):
        model(torch.randn(2, 3, 32, 7))
    with pytest.raises(TypeError, match="x: expected a floating dtype, got torch.uint8"):
        model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="num_classes: .* got -1"):
        model.reset_classifier(-1)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"depths": (1, -1, 2, 1)}, ValueError, r"depths: expected whole .* at least 1 each, got \(1, -1, 2, 1\)"),
        ({"depths": (1, 1.5)}, TypeError, r"depths: expected whole numbers, got \(1, 1.5\)"),
        ({"depths": 3}, TypeError, "depths: expected whole numbers, got 3"),
        ({"dims": (8, 0)}, ValueError, r"dims: .* got \(8, 0\)"),
        ({"depths": (), "dims": ()}, ValueError, "depths, dims: expected one of each a stage"),
        ({"in_chans": 0}, ValueError, "in_chans: .* got 0"),
        ({"num_classes": 2.5}, TypeError, "num_classes: expected a whole number, got 2.5"),
        ({"num_classes": -1}, ValueError, "num_classes: .* got -1"),
        ({"stem_stride": 0}, ValueError, "stem_stride: .* got 0"),
        ({"drop_path_rate": 1.5}, ValueError, r"drop_path_rate: expected a rate in \[0, 1\), got 1.5"),
        ({"drop_path_rate": "0.1"}, TypeError, "drop_path_rate: .* got '0.1'"),
        ({"name": 3}, TypeError, "name: expected one of .*, got 3"),
    ],
)
def test_bad_settings_are_refused_by_name(options, kind, message):
    with pytest.raises(kind, match=message):
        models.create(**{"name": "convnextv2_atto", "depths": (1, 1), "dims": (6, 8)} | options)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda x: x.double(), TypeError, "x: expected the dtype of the parameters, torch.float32, got torch.float64"),
        (lambda x: x.bfloat16(), TypeError, "x: expected the dtype of the parameters, torch.float32, got torch.bf"),
        (lambda x: x.to("meta"), ValueError, "x: expected the device of the parameters, cpu, got meta"),
        (lambda x: x.numpy(), TypeError, "x: expected a tensor, got ndarray"),
    ],
)
def test_images_that_do_not_fit_the_parameters_are_refused_by_name(change, kind, message):
    with pytest.raises(kind, match=message.replace("torch.bf", "torch.bfloat16")):
        small()(change(torch.randn(1, 3, 16, 16)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_takes_images_of_any_dtype_but_float64(dtype):
    model, images = small(), torch.randn(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images.to(dtype))
        with pytest.raises(TypeError, match="x: expected the dtype of the parameters, .* got torch.float64"):
            model(images.double())
    torch.testing.assert_close(logits.float(), model(images), rtol=0.1, atol=0.1)


def test_load_encoder_refuses_what_is_no_state_dict_by_name():
    model = small()
    for bad, message in (
        (None, "state_dict: expected a mapping of names to tensors, got NoneType"),
        ({"stages.0": 3}, "state_dict: stages.0: expected a tensor, got int"),
        ({3: torch.zeros(1)}, "state_dict: expected names of parameters, got 3"),
    ):
        with pytest.raises(TypeError, match=message):
            model.load_encoder(bad)


def test_a_long_list_of_problems_is_cut_short():
    with pytest.raises(ValueError, match=r"unknown extra.17; unknown extra.18; unknown extra.19; and 30 more$"):
        state = {f"extra.{i}": torch.zeros(1) for i in range(50)}
        model = small()
        model.load_encoder(model.encoder().state_dict() | state)
