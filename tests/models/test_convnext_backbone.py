"""ConvNeXt as a backbone: chosen maps and their norms, recomputation, attention at the end."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import convdit
from convdit import models, nn
from convdit.sparse import ActiveSites, SparseTensor2d

from .recomputation import check_gradient_checkpointing


def small(name="convnextv2_atto", **options):
    options = {"depths": (1, 2, 1), "dims": (8, 12, 16), "num_classes": 5} | options
    torch.manual_seed(0)
    model = models.create(name, **options).double()
    for parameter_name, p in model.named_parameters():
        if "gamma" in parameter_name or "beta" in parameter_name or "norm" in parameter_name:
            torch.nn.init.normal_(p)
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_maps_for_detection_have_channels_first_norms_of_their_own(images):
    model = small(features_only=True, out_norms=True, out_indices=(0, -1))
    assert {name for name in model.state_dict() if name.startswith("norm")} == {
        "norm0.weight", "norm0.bias", "norm2.weight", "norm2.bias",
    }  # fmt: skip
    raw = small(features_only=True)
    raw.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("norm")})
    maps, plain = model(images), raw(images)
    assert [i["num_chs"] for i in model.feature_info] == [8, 16]
    assert len(maps) == 2 and len(plain) == 3
    for map_, i in zip(maps, (0, 2), strict=True):
        # Over channels at every site, as a channels-first LayerNorm.
        mean = plain[i].mean(1, keepdim=True)
        deviation = (plain[i].var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        weight, bias = (model.get_submodule(f"norm{i}").get_parameter(n)[:, None, None] for n in ("weight", "bias"))
        torch.testing.assert_close(map_, (plain[i] - mean) / deviation * weight + bias)
    sum(map_.sum() for map_ in maps).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_encoder_of_a_detector_loads_and_is_shared_without_its_norms(images):
    detector, classifier = small(features_only=True, out_norms=True), small()
    left = detector.load_encoder(classifier.state_dict())
    assert left == [f"norm{i}.{leaf}" for i in range(3) for leaf in ("weight", "bias")]
    assert detector.forward_intermediates(images)[2].equal(classifier.forward_intermediates(images)[2])
    fcmae = models.FCMAE(detector, image_size=32, patch_size=16)
    assert not any("norm2" in name for name in fcmae.encoder.state_dict())


def test_stages_after_the_last_map_wanted_are_not_computed(images):
    model = small()
    maps = model.forward_intermediates(images)
    first, second = model.forward_intermediates(images, indices=[0, -2])
    assert first.equal(maps[0]) and second.equal(maps[1])

    def work(**options):
        with FlopCounterMode(display=False) as counter:
            model.forward_intermediates(images, **options)
        return counter.get_total_flops()

    assert work(indices=[0]) < work(indices=[1]) < work()
    # A map of stride 8 needs no more than 8 pixels.
    assert model.forward_intermediates(images[..., :8, :8], indices=[1])[0].shape == (2, 12, 1, 1)


@pytest.mark.parametrize("size", [(37, 50), (32, 32), (65, 63)])
@pytest.mark.parametrize("in_chans", [1, 5])
def test_any_size_and_any_channels_are_those_of_timm(size, in_chans):
    import timm

    options = {"depths": (1,) * 4, "dims": (8, 12, 16, 20), "num_classes": 5, "in_chans": in_chans}
    torch.manual_seed(0)
    theirs = timm.create_model("convnext_tiny", **options).eval()
    ours = models.create("convnext_tiny", **options)
    ours.load_state_dict(convdit.checkpoints.convert(theirs.state_dict(), "convdit"))
    images = torch.randn(2, in_chans, *size)
    with torch.no_grad():
        expected = theirs(images)
        assert (ours(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_epsilon_of_every_norm_is_that_of_the_variant():
    with torch.device("meta"):
        for name, eps in (("convnext_xxlarge", 1e-5), ("convnext_xlarge", 1e-6), ("convnextv2_atto", 1e-6)):
            norms = [m for m in models.create(name).modules() if isinstance(m, torch.nn.LayerNorm)]
            assert {norm.eps for norm in norms} == {eps}
        assert models.create("convnext_xxlarge", depths=(1,), dims=(8,), norm_eps=1e-3).norm.eps == 1e-3


@pytest.mark.parametrize("options", [{}, {"name": "convnext_tiny"}, {"attention_stages": 1}])
def test_gradient_checkpointing_changes_no_bit_and_keeps_less(images, options):
    model = small(drop_path_rate=0.5, **options)
    check_gradient_checkpointing(model, lambda: model(images).square().sum(), share=0.5)


def attention_by_hand(block, x):
    """One image (T, C), written out from the equations."""
    dim, heads = x.shape[1], block.attn.num_heads
    q, k, v = block.attn.qkv(block.norm1(x)).view(-1, 3, heads, dim // heads).permute(1, 2, 0, 3)
    weights = (q @ k.transpose(1, 2) / (dim // heads) ** 0.5).softmax(-1)
    x = x + block.attn.proj((weights @ v).transpose(0, 1).reshape(-1, dim))
    hidden = block.mlp.fc1(block.norm2(x))
    return x + block.mlp.fc2(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))


def test_attention_blocks_take_the_place_of_the_last_stage(images):
    plain, model = small(), small(attention_stages=1)
    assert [type(block).__name__ for stage in model.stages for block in stage] == [
        "ConvNeXtBlock", "ConvNeXtBlock", "ConvNeXtBlock", "AttentionBlock",
    ]  # fmt: skip
    assert list(model.state_dict())[:40] == list(plain.state_dict())[:40]
    assert small(attention_stages=(-1,)).attention_stages == small(attention_stages=[2]).attention_stages == (2,)
    assert small(attention_stages=2).attention_stages == (1, 2) and small(attention_stages=0).attention_stages == ()
    maps = model.forward_intermediates(images)
    block = model.stages[2][0]
    before = model.downsample_layers[2](maps[1].permute(0, 2, 3, 1))
    for image, map_ in zip(before, maps[2], strict=True):
        torch.testing.assert_close(map_.flatten(1).t(), attention_by_hand(block, image.flatten(0, 1)))
    with torch.device("meta"):
        big = models.create("convnextv2_tiny", attention_stages=(3,))
    assert [b.attn.num_heads for b in big.stages[3]] == [12, 12, 12]
    assert [p for p in big.parameters() if not p.is_meta] == []
    assert convdit.flops(model, images).macs != convdit.flops(plain, images).macs


def test_sparse_attention_is_over_the_visible_sites_of_each_image():
    block = nn.AttentionBlock(16, 4).double()
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, 16, dtype=torch.float64)
    removed = torch.ones(3, 2, 3, dtype=torch.bool)
    removed[0, 0, 1] = removed[1, 1, 2] = removed[1, 0, 0] = removed[2, 1, 0] = False
    sites = ActiveSites.from_patch_mask(removed, 2)
    visible = SparseTensor2d(x.new_ones(len(sites), 1), sites).dense()[..., 0].bool()
    packed = block(SparseTensor2d.from_dense(x, sites)).dense()
    for n in range(3):
        torch.testing.assert_close(packed[n][visible[n]], attention_by_hand(block, x[n][visible[n]]))
    torch.testing.assert_close(block(x * visible[..., None], visible), packed)
    same = removed.clone()
    same[1, 0, 0] = True
    counted, ragged = ActiveSites.from_patch_mask(same, 2, visible_per_image=1), ActiveSites.from_patch_mask(same, 2)
    assert counted.per_image == 4 and ragged.per_image is None and counted.downsample(2).per_image == 1
    one, other = (block(SparseTensor2d.from_dense(x, each)).features for each in (counted, ragged))
    torch.testing.assert_close(one, other)


def test_stochastic_depth_of_attention_drops_whole_images():
    torch.manual_seed(0)
    block = nn.AttentionBlock(8, 2, drop_path=0.5)
    torch.nn.init.normal_(block.attn.proj.bias)
    x = torch.randn(64, 2, 3, 8)
    changed = (block(x) != x).flatten(1)
    assert 0 < changed.any(1).sum() < 64 and changed.all(1).eq(changed.any(1)).all()
    block.eval()
    assert block(x).ne(x).flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"attention_stages": 3.5}, TypeError, "attention_stages: expected whole numbers, got 3.5"),
        ({"attention_stages": -1}, ValueError, "attention_stages: .* at least 0, got -1"),
        ({"attention_stages": (3,)}, ValueError, r"attention_stages: expected stages of 0 to 2, got \(3,\)"),
        ({"out_norms": True}, ValueError, "out_indices, out_norms: only .* features_only=True"),
        ({"out_indices": (0,)}, ValueError, "out_indices, out_norms: only .* features_only=True"),
        ({"features_only": True, "out_indices": (-4,)}, ValueError, r"out_indices: .* at least -3 each, got \(-4,\)"),
    ],
)
def test_bad_settings_are_refused_by_name(options, kind, message):
    with pytest.raises(kind, match=message):
        small(**options)


def test_bad_arguments_are_refused_by_name(images):
    with pytest.raises(ValueError, match=r"indices: expected stages of 0 to 2, got \(3,\)"):
        small().forward_intermediates(images, indices=(3,))
    model = small(features_only=True, out_norms=True, out_indices=(1,))
    with pytest.raises(ValueError, match="norm: .* out_norms=True"):
        model.forward_intermediates(images, norm=True)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of the 10 channels, got 4"):
        nn.AttentionBlock(10, 4)
