"""FCMAE: packed rows equal zero-filled maps, patches, loss, weights in and out, errors."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convdit import models
from convdit.sparse import random_patch_mask


def build(**options):
    """A small FCMAE in float64 with every parameter random, also those that start at zero."""
    options = {
        "image_size": 24,
        "patch_size": 8,
        "depths": (1, 2),
        "dims": (6, 8),
        "decoder_dim": 12,
    } | options
    model = models.FCMAE("convnextv2_atto", **options).double()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
    return model


def masks():
    """(3, 3, 4) masks, True = removed."""
    base = random_patch_mask(3, (3, 4), 0.6, torch.Generator().manual_seed(0))
    patterns = {"random": base, "as random, image 1 of zeros": base}
    patterns["all visible but one"] = torch.zeros_like(base)
    patterns["all visible but one"][:, 1, 2] = True
    patterns["one visible"] = torch.ones_like(base)
    patterns["one visible"][:, 2, 1] = False
    patterns["last row and column removed"] = torch.zeros_like(base)
    patterns["last row and column removed"][:, -1] = True
    patterns["last row and column removed"][:, :, -1] = True
    patterns["another number in every image"] = torch.ones_like(base)
    for n in range(3):
        patterns["another number in every image"][n, n, : n + 1] = False
    return patterns


def some_images(pattern="random"):
    images = torch.randn(3, 3, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if "zeros" in pattern:
        images[1] = 0
    return images


def step(model, images, mask):
    images = images.clone().requires_grad_()
    out = model(images, mask)
    (out.loss + out.pred.square().sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return out, gradients | {"images": images.grad}


@pytest.mark.parametrize("scope", ["sample", "batch"])
@pytest.mark.parametrize("pattern", masks())
def test_sparse_equals_zero_filled_in_loss_prediction_and_every_gradient(pattern, scope):
    mask, images = masks()[pattern], some_images(pattern)
    model, twin = build(grn_scope=scope), build(grn_scope=scope, sparse=False)
    if "zeros" in pattern:  # where nothing is added to its zeros, its sites are zero when they become sparse
        for bias in (model.encoder.downsample_layers[0][0].bias, model.encoder.downsample_layers[0][1].bias):
            torch.nn.init.zeros_(bias)
        features = model.encoder.downsample_layers[0](images)
        assert not features[1].any() and features[0].all()
    twin.load_state_dict(model.state_dict())
    out, gradients = step(model, images, mask)
    expected, expected_gradients = step(twin, images, mask)
    assert gradients.keys() == {"images", *dict(model.named_parameters())}
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(out.loss, expected.loss, **close)
    torch.testing.assert_close(out.pred, expected.pred, **close)
    assert out.mask.equal(mask)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradient, expected_gradients[name], **close, msg=name)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize(
    ("patch", "options"),
    [
        (32, {"depths": (1, 1, 1, 1), "dims": (6, 8, 10, 12)}),
        (16, {"depths": (1, 1, 1, 1), "dims": (6, 8, 10, 12), "stem_stride": 2}),
        (16, {"depths": (1, 1, 1), "dims": (6, 8, 10), "in_chans": 5}),
        (8, {"depths": (1, 1, 1), "dims": (6, 8, 10), "stem_stride": 2, "in_chans": 1}),
        (8, {"depths": (1,), "dims": (6,), "stem_stride": 8, "decoder_depth": 0}),
        (8, {"depths": (1, 1), "dims": (6, 8), "attention_stages": 1}),
    ],
)
@pytest.mark.parametrize("pattern", ["another number in every image", "last row and column removed"])
def test_every_patch_size_and_its_ways_to_be_reached(patch, options, pattern):
    mask, size = masks()[pattern], (3 * patch, 4 * patch)
    model, twin = (build(image_size=size, patch_size=patch, sparse=sparse, **options) for sparse in (True, False))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, model.encoder.in_chans, *size, dtype=torch.float64, generator=generator)
    (out, gradients), (expected, expected_gradients) = (step(each, images, mask) for each in (model, twin))
    assert out.pred.shape == (3, 12, patch**2 * model.encoder.in_chans)
    torch.testing.assert_close(out.pred, expected.pred, rtol=1e-9, atol=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-8, atol=1e-9, msg=name)
    assert model.reconstruct(images).shape == images.shape


def test_a_version_1_encoder_works_the_same():
    images, mask = some_images(), masks()["random"]
    options = {"depths": (1, 1), "dims": (6, 8), "features_only": True, "drop_path_rate": 0.3}
    results = []
    for sparse in (True, False):
        torch.manual_seed(0)
        encoder = models.create("convnext_tiny", layer_scale_init_value=0.5, **options)
        model = models.FCMAE(encoder, 24, 8, decoder_dim=12, sparse=sparse).double()
        torch.manual_seed(1)
        results.append(step(model, images, mask))
    torch.testing.assert_close(results[0][0].pred, results[1][0].pred)
    torch.testing.assert_close(results[0][1], results[1][1])


def test_the_two_scopes_differ_and_batch_reads_other_images():
    images, mask = some_images(), masks()["random"]
    other = images.clone()
    other[1] *= 2
    for scope, changes in (("sample", False), ("batch", True)):
        model = build(grn_scope=scope, norm_pix_loss=False)
        difference = model(images, mask).pred[0] - model(other, mask).pred[0]
        assert (difference.abs().max() > 1e-6) == changes


@pytest.mark.parametrize("sparse", [True, False])
def test_removed_pixels_reach_the_target_only(sparse):
    mask = masks()["random"]
    images = some_images()
    hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    other = torch.where(hidden, torch.randn_like(images), images)
    model = build(sparse=sparse)
    assert model(images, mask).pred.equal(model(other, mask).pred)
    assert model(images, mask).loss != model(other, mask).loss


def test_patches_are_row_major_with_values_by_row_column_channel():
    model = build()
    images = torch.arange(3 * 24 * 32).view(1, 3, 24, 32)
    patches = model.patchify(images)
    assert patches.shape == (1, 12, 192)
    for y, x, py, px, c in [(0, 0, 0, 0, 1), (2, 3, 7, 5, 2), (1, 0, 3, 6, 0)]:
        expected = images[0, c, 8 * y + py, 8 * x + px]
        assert patches[0, 4 * y + x, (8 * py + px) * 3 + c] == expected
    assert model.unpatchify(patches, (3, 4)).equal(images)


@pytest.mark.parametrize("norm", [True, False])
def test_the_loss_is_over_removed_patches_with_a_target_of_unbiased_variance(norm):
    model, images, mask = build(norm_pix_loss=norm), some_images(), masks()["random"]
    out = model(images, mask)
    total = 0.0
    for n, y, x in mask.nonzero().tolist():
        patch = images[n, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].permute(1, 2, 0).flatten()
        if norm:
            variance = (patch - patch.mean()).square().sum() / (patch.numel() - 1)
            patch = (patch - patch.mean()) / (variance + 1e-6).sqrt()
        total += (out.pred[n, 4 * y + x] - patch).square().mean()
    torch.testing.assert_close(out.loss, total / mask.sum())


def test_backward_of_the_loss_multiplies_no_visible_prediction():
    model, images, mask = build(), some_images(), masks()["random"]

    def work(value):
        with FlopCounterMode(display=False) as counter:
            value(model(images, mask)).backward()
        return counter.get_total_flops()

    extra = work(lambda out: out.loss + out.pred.sum()) - work(lambda out: out.loss)
    visible, (values, dim) = int((~mask).sum()), model.pred.weight.shape[:2]
    assert extra == 2 * 2 * visible * values * dim  # the gradients of the input and of the weight


def test_reconstruction_keeps_visible_patches_and_paints_the_others():
    model, images, mask = build(norm_pix_loss=False), some_images(), masks()["random"]
    pictures = model.reconstruct(images, mask)
    assert pictures.shape == images.shape and not pictures.requires_grad
    hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(images)
    assert pictures[~hidden].equal(images[~hidden])
    torch.testing.assert_close(pictures[hidden], model.unpatchify(model(images, mask).pred, (3, 4))[hidden])


def test_reconstruction_of_a_normalised_target_undoes_the_norm():
    model, images, mask = build(), some_images(), masks()["random"]
    out, pictures = model(images, mask), model.patchify(model.reconstruct(images, mask))
    std, mean = torch.std_mean(model.patchify(images), -1, keepdim=True)
    hidden = mask.flatten(1)
    torch.testing.assert_close(pictures[hidden], (out.pred * std + mean)[hidden], rtol=1e-5, atol=1e-5)


def test_masks_drawn_inside_keep_the_ratio_and_repeat_with_the_generator():
    model, images = build(), some_images()
    draws = [model(images, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert draws[0].mask.equal(draws[1].mask) and draws[0].loss.equal(draws[1].loss)
    assert (~draws[0].mask).flatten(1).sum(1).eq(int(12 * 0.4)).all()
    assert not model(images).mask.equal(model(images).mask)


def test_the_encoder_is_a_dense_convnext_without_norm_and_head():
    model = build()
    options = {"depths": (1, 2), "dims": (6, 8)}
    state = model.encoder.state_dict()
    dense = models.create("convnextv2_atto", features_only=True, **options).double()
    dense.load_state_dict(state)
    left = models.create("convnextv2_atto", num_classes=4, **options).double().load_encoder(state)
    assert left == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    # With nothing removed, which `forward` would refuse, packed rows give the dense map.
    images = some_images()
    nothing = torch.zeros(3, 3, 4, dtype=torch.bool)
    sites = model._mask(images, masks()["random"], None)[1].from_patch_mask(nothing, 2)
    packed = model._encode(images, nothing, sites).dense().permute(0, 3, 1, 2)
    torch.testing.assert_close(packed, dense(images)[-1])


def test_parameter_names_and_shapes_are_the_official_ones():
    with torch.device("meta"):
        model = models.FCMAE()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name.split(".")[0] for name in shapes} == {
        "encoder", "mask_token", "proj", "decoder", "pred",
    }  # fmt: skip
    assert shapes["mask_token"] == (1, 512, 1, 1)
    assert shapes["proj.weight"] == (512, 320, 1, 1)
    assert shapes["decoder.0.grn.gamma"] == (2048,)
    assert shapes["pred.weight"] == (3072, 512, 1, 1)
    assert "encoder.norm.weight" not in shapes and "encoder.head.weight" not in shapes


def test_first_weights_have_std_002():
    torch.manual_seed(0)
    model = models.FCMAE(depths=(1, 1, 1, 1), decoder_dim=128)
    for name, p in model.named_parameters():
        if p.dim() > 1 and name != "mask_token":
            assert abs(p.std().item() / 0.02 - 1) < 0.1, name
        elif name.endswith(("bias", "gamma", "beta")):
            assert p.eq(0).all(), name
    assert 0 < model.mask_token.std() < 0.04


def test_every_parameter_takes_part_in_the_loss():
    model = build(norm_pix_loss=True)
    model(some_images()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_an_encoder_given_as_a_model_is_shared_and_loses_norm_and_head():
    whole = models.create("convnextv2_atto", depths=(1, 1), dims=(6, 8), in_chans=1, stem_stride=2)
    model = models.FCMAE(whole, image_size=8, patch_size=4, decoder_dim=12)
    assert model.encoder.stages is whole.stages
    assert not any(name.startswith(("norm", "head")) for name in model.encoder.state_dict())
    assert "head.weight" in whole.state_dict()
    out = model(torch.randn(2, 1, 8, 8))
    assert out.pred.shape == (2, 4, 16) and out.mask.shape == (2, 2, 2)


def test_a_loss_under_half_precision_is_float32():
    model = build().float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(some_images().float(), masks()["random"])
    assert out.loss.dtype == torch.float32
    expected = model(some_images().float(), masks()["random"]).loss
    torch.testing.assert_close(out.loss, expected, rtol=0.05, atol=0.05)
    out.loss.backward()


@pytest.mark.parametrize(("given", "backend"), [("mask", "inductor"), ("mask", "aot_eager"), ("seed", "aot_eager")])
def test_a_whole_training_step_compiles_without_a_break(given, backend):
    model, images = build(depths=(1, 1)), some_images()
    if backend == "inductor":
        model, images = model.float(), images.float()
    arguments = (images, masks()["random"]) if given == "mask" else (images,)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    torch.manual_seed(0)
    out = compiled(*arguments)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = model(images, out.mask)
    expected.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.pred, expected.pred, rtol=1e-4, atol=1e-4)
    for name, p in model.named_parameters():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_a_compiled_step_refuses_a_mask_of_another_count():
    model = build()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    with pytest.raises(RuntimeError, match="visible_per_image"):
        compiled(some_images(), masks()["another number in every image"])


def test_bad_settings_are_refused_by_name():
    for options, message in (
        ({"patch_size": 16}, "patch_size: expected 8, .* got 16"),
        ({"image_size": 30}, "image_size: .* patches of 8x8 divide, got 30x30"),
        ({"mask_ratio": 1.0}, r"mask_ratio: .* \[0, 1\), got 1.0"),
        ({"mask_ratio": 0.95}, "mask_ratio: 0.95 of 9 patches leaves no visible patch"),
        ({"mask_ratio": 0.0}, "mask_ratio: 0.0 of 9 patches removes none"),
        ({"decoder_depth": -1}, "decoder_depth: .* at least 0, got -1"),
        ({"decoder_dim": 0}, "decoder_dim: .* at least 1, got 0"),
        ({"dims": (6, 0)}, r"dims: .* got \(6, 0\)"),
        ({"image_size": (24, 24, 24)}, "image_size: expected 2 whole numbers"),
        ({"drop_path_rate": 1.5}, "drop_path_rate: .* got 1.5"),
        ({"grn_scope": "image"}, "grn_scope: .* got 'image'"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**options)
    encoder = models.create("convnextv2_atto", depths=(1, 1), dims=(6, 8))
    with pytest.raises(ValueError, match="only for an encoder given by name"):
        models.FCMAE(encoder, patch_size=8, image_size=24, depths=(1, 1))
    with pytest.raises(ValueError, match="in_chans: expected 3, the channels of the encoder, got 5"):
        models.FCMAE(encoder, patch_size=8, image_size=24, in_chans=5)
    for options, message in (
        ({"decoder_depth": 1.5}, "decoder_depth: .* got 1.5"),
        ({"decoder_dim": "12"}, "decoder_dim: .* got '12'"),
        ({"image_size": 24.0}, "image_size: .* got 24.0"),
        ({"mask_ratio": "most"}, "mask_ratio: .* got 'most'"),
    ):
        with pytest.raises(TypeError, match=message):
            build(**options)
    with pytest.raises(TypeError, match=r"encoder: expected a name .* or a ConvNeXt, got int"):
        models.FCMAE(3)


def test_an_encoder_of_other_channels_needs_no_second_word():
    encoder = models.create("convnextv2_atto", depths=(1, 1), dims=(6, 8), in_chans=1)
    model = models.FCMAE(encoder, patch_size=8, image_size=16)
    assert model(torch.randn(2, 1, 16, 16)).pred.shape == (2, 4, 64)


def test_wrong_patches_are_refused_by_name():
    model = build()
    for patches, grid, kind, message in (
        (torch.zeros(2, 9, 192), (3, 4), ValueError, r"patches: expected shape \(N, 12, 64 \* c\).* got \(2, 9, 192\)"),
        (torch.zeros(2, 12, 100), (3, 4), ValueError, "patches: .* got"),
        (torch.zeros(12, 192), (3, 4), ValueError, "patches: .* got"),
        (torch.zeros(2, 12, 192), (3,), ValueError, "grid: expected 2 whole numbers"),
        (torch.zeros(2, 12, 192), 12, TypeError, "grid: expected 2 whole numbers, got 12"),
        ("patches", (3, 4), TypeError, "patches: expected a tensor, got str"),
    ):
        with pytest.raises(kind, match=message):
            model.unpatchify(patches, grid)
    with pytest.raises(ValueError, match=r"images: expected shape \(N, c, H, W\), got \(3, 24, 32\)"):
        model.patchify(some_images()[0])


def test_bad_images_and_masks_are_refused_by_name():
    model, images, mask = build(), some_images(), masks()["random"]
    none_visible, none_removed = mask.clone(), torch.zeros_like(mask)
    none_visible[1] = True
    for arguments, kind, message in (
        ((images[0],), ValueError, r"images: expected .* got \(3, 24, 32\)"),
        ((images[:, :1],), ValueError, r"images: expected .* \(N, 3, H, W\)"),
        ((images[..., :30],), ValueError, "images: .* got 24x30"),
        ((images.byte(),), TypeError, "images: expected a floating dtype, got torch.uint8"),
        ((images[:0],), ValueError, r"images: expected at least one image, got shape \(0, 3, 24, 32\)"),
        (
            (images.float(),),
            TypeError,
            "images: expected the dtype of the parameters, torch.float64, got torch.float32",
        ),
        ((images.to("meta"),), ValueError, "images: expected the device of the parameters, cpu, got meta"),
        ((images.numpy(),), TypeError, "images: expected a tensor, got ndarray"),
        ((images, mask.tolist()), TypeError, "mask: expected a tensor, got list"),
        ((images, mask.float()), TypeError, "mask: expected dtype torch.bool"),
        ((images, mask[:2]), ValueError, r"mask: expected shape \(3, 3, 4\), got \(2, 3, 4\)"),
        ((images, mask.to("meta")), ValueError, "mask: expected the device of the images, cpu, got meta"),
        ((images, none_visible), ValueError, "mask: expected a visible patch in every image"),
        ((images, none_removed), ValueError, "mask: expected a removed patch"),
    ):
        with pytest.raises(kind, match=message):
            model(*arguments)
