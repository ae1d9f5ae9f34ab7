"""Official, timm and transformers names of ConvNeXt, against states written out by hand."""

import re

import pytest
import torch

from convdit import checkpoints, models

DIMS = (4, 6, 8, 10)


def timm_state(ours, conv_mlp):
    """timm's names and shapes for a state in ours, layer by layer."""
    out = {}
    for key, value in ours.items():
        parts = key.split(".")
        if parts[0] == "norm":
            name = ["head", "norm", parts[1]]
        elif parts[0] == "head":
            name = ["head", "fc", parts[1]]
        elif parts[:2] == ["downsample_layers", "0"]:
            name = ["stem", parts[2], parts[3]]
        elif parts[0] == "downsample_layers":
            name = ["stages", parts[1], "downsample", parts[2], parts[3]]
        else:
            layer = {
                "dwconv": ["conv_dw"],
                "norm": ["norm"],
                "pwconv1": ["mlp", "fc1"],
                "pwconv2": ["mlp", "fc2"],
                "grn": ["mlp", "grn"],
                "gamma": ["gamma"],
            }[parts[3]]
            leaf = [{"gamma": "weight", "beta": "bias"}.get(leaf, leaf) for leaf in parts[4:]]
            name = ["stages", parts[1], "blocks", parts[2], *layer, *leaf]
            if conv_mlp and "mlp" in name and value.ndim == 2:
                value = value[:, :, None, None]
        out[".".join(name)] = value.clone()
    return out


def transformers_state(ours, prefix):
    """The names of transformers for a state in ours, layer by layer."""
    out = {}
    for key, value in ours.items():
        parts = key.split(".")
        if parts[0] == "head":
            out[f"classifier.{parts[1]}"] = value.clone()
            continue
        if parts[0] == "norm":
            name = ["layernorm", parts[1]]
        elif parts[:3] == ["downsample_layers", "0", "0"]:
            name = ["embeddings", "patch_embeddings", parts[3]]
        elif parts[:3] == ["downsample_layers", "0", "1"]:
            name = ["embeddings", "layernorm", parts[3]]
        elif parts[0] == "downsample_layers":
            name = ["encoder", "stages", parts[1], "downsampling_layer", parts[2], parts[3]]
        else:
            layer = {"norm": "layernorm", "gamma": "layer_scale_parameter"}.get(parts[3], parts[3])
            leaf = [{"gamma": "weight", "beta": "bias"}.get(leaf, leaf) for leaf in parts[4:]]
            name = ["encoder", "stages", parts[1], "layers", parts[2], layer, *leaf]
            if parts[3] == "grn":
                value = value.view(1, 1, 1, -1)
        out[prefix + ".".join(name)] = value.clone()
    return out


def official_state(ours):
    return {k: v.clone().view(1, 1, 1, -1) if ".grn." in k else v.clone() for k, v in ours.items()}


def check_two_way(ours, theirs, name, assert_same):
    assert checkpoints.detect(theirs) == name
    assert checkpoints.detect(ours) == "convdit"
    converted = checkpoints.convert(theirs, "convdit")
    assert_same(converted, ours)
    assert_same(checkpoints.convert(converted, name), theirs)
    assert_same(checkpoints.convert(converted, name, source="convdit"), theirs)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("conv_mlp", [False, True])
def test_timm_both_ways(classifier, assert_same, version, conv_mlp):
    ours = classifier(version)
    check_two_way(ours, timm_state(ours, conv_mlp), "timm", assert_same)


@pytest.mark.parametrize(("width", "axes"), [(40, 4), (80, 4), (96, 2)])
def test_pointwise_weights_get_the_axes_of_timms_model_of_that_width(classifier, assert_same, width, axes):
    ours = classifier(dims=(width, 8, 8, 8))
    theirs = checkpoints.convert(ours, "timm")
    assert_same(theirs, timm_state(ours, conv_mlp=axes == 4))


@pytest.mark.parametrize(("version", "prefix"), [(1, "convnext."), (2, "convnextv2.")])
def test_transformers_classifier_both_ways(classifier, assert_same, version, prefix):
    ours = classifier(version)
    check_two_way(ours, transformers_state(ours, prefix), "transformers", assert_same)


@pytest.mark.parametrize("prefix", ["", "convnextv2."])
def test_transformers_without_a_head_both_ways(classifier, assert_same, prefix):
    ours = {key: value for key, value in classifier().items() if not key.startswith("head.")}
    check_two_way(ours, transformers_state(ours, prefix), "transformers", assert_same)


def test_official_both_ways(classifier, encoder, assert_same):
    for ours in (classifier(), encoder()):
        check_two_way(ours, official_state(ours), "convnextv2_official", assert_same)


def test_an_fcmae_with_dense_layers_is_read_and_needs_encoder_only_to_be_written(fcmae, assert_same):
    ours = fcmae()
    theirs = official_state(ours)
    assert checkpoints.detect(theirs) == "convnextv2_official"
    assert checkpoints.detect(ours) == "convdit"
    assert_same(checkpoints.convert(theirs, "convdit"), ours)
    with pytest.raises(ValueError, match="mask_token"):
        checkpoints.convert(ours, "convnextv2_official")
    bare = {k.removeprefix("encoder."): v for k, v in ours.items() if k.startswith("encoder.")}
    out = checkpoints.convert(ours, "convnextv2_official", encoder_only=True)
    assert_same(out, official_state(bare))


@pytest.mark.parametrize("shape", [(-1,), (1, -1), (1, 1, 1, -1)])
def test_grn_of_any_shape_is_read_in_every_format(classifier, assert_same, shape):
    ours = classifier()
    for theirs in (
        ours,
        official_state(ours),
        timm_state(ours, True),
        transformers_state(ours, "convnextv2."),
        checkpoints.convert(ours, "fcmae_minkowski"),
    ):
        other = {key: value.view(shape) if ".grn." in key else value for key, value in theirs.items()}
        assert_same(checkpoints.convert(other, "convdit"), ours)


def test_every_pair_of_formats_round_trips(classifier, assert_same):
    ours = classifier()
    names = ["convdit", "convnextv2_official", "timm", "transformers", "fcmae_minkowski"]
    states = {name: checkpoints.convert(ours, name) for name in names}
    for a in names:
        for b in names:
            there = checkpoints.convert(states[a], b)
            assert_same(there, states[b])
            assert_same(checkpoints.convert(there, a), states[a])


def test_bits_survive_in_every_dtype(classifier):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        ours = {key: value.to(dtype) for key, value in classifier().items()}
        ours["head.bias"][0] = float("nan")
        back = ours
        for name in ("fcmae_minkowski", "timm", "transformers", "convdit"):
            back = checkpoints.convert(back, name)
        for key, value in ours.items():
            assert back[key].dtype == dtype
            assert torch.equal(back[key].view(torch.uint8), value.view(torch.uint8)), key


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", ["timm", "transformers", "convnextv2_official", "convdit", "fcmae_minkowski"])
def test_a_missing_and_an_extra_key_raise_and_are_named(classifier, name, told):
    theirs = checkpoints.convert(classifier(), name)
    for key in theirs:
        damaged = {k: v for k, v in theirs.items() if k != key}
        with pytest.raises(ValueError) as error:
            checkpoints.convert(damaged, "convdit", source=name if told else None)
        assert repr(key) in str(error.value), key
    damaged = {**theirs, "stages.9.what.ever": torch.zeros(1)}
    with pytest.raises(ValueError, match="unexpected keys: 'stages.9.what.ever'"):
        checkpoints.convert(damaged, "convdit", source=name)


def test_a_tensor_under_two_names_raises(classifier):
    theirs = checkpoints.convert(classifier(), "fcmae_minkowski")
    theirs["norm.ln.weight"] = theirs["norm.weight"].clone()
    with pytest.raises(ValueError, match="twice: 'norm.weight' and 'norm.ln.weight'"):
        checkpoints.convert(theirs, "convdit")


def test_what_does_not_fit_the_target_raises(classifier):
    with pytest.raises(ValueError, match="grn.gamma"):
        checkpoints.convert(classifier(version=1), "convnextv2_official")
    with pytest.raises(ValueError, match="ConvNeXt checkpoint cannot be written"):
        checkpoints.convert(classifier(), "diffusers")
    with pytest.raises(ValueError, match="to: expected one of .*got 'onnx'"):
        checkpoints.convert(classifier(), "onnx")
    with pytest.raises(ValueError, match="source: expected one of .*got 'keras'"):
        checkpoints.convert(classifier(), "timm", source="keras")
    with pytest.raises(ValueError, match="names of transformers: missing keys"):
        checkpoints.convert(classifier(), "timm", source="transformers")
    with pytest.raises(ValueError, match="none of the formats .*'conv1.weight'"):
        checkpoints.detect({"conv1.weight": torch.zeros(1)})
    with pytest.raises(TypeError, match="mapping"):
        checkpoints.detect([torch.zeros(1)])


def test_a_transposed_linear_weight_raises(classifier):
    ours = classifier()
    ours["stages.0.0.pwconv1.weight"] = ours["stages.0.0.pwconv1.weight"].t()
    with pytest.raises(ValueError, match=r"'stages.0.0.pwconv1.weight' has shape \(4, 16\)"):
        checkpoints.convert(ours, "timm")


def test_training_checkpoints_and_wrapped_models_are_unwrapped(classifier, assert_same):
    ours = classifier()
    assert_same(checkpoints.convert({"model": ours, "epoch": 3}, "convdit"), ours)
    ddp = {"state_dict": {f"module.{key}": value for key, value in ours.items()}}
    assert_same(checkpoints.convert(ddp, "convdit"), ours)


@pytest.mark.parametrize("name", ["timm", "transformers", "convnextv2_official", "convdit", "fcmae_minkowski"])
def test_a_tensor_of_another_shape_raises_and_is_named(classifier, name):
    theirs = checkpoints.convert(classifier(), name)
    for key, value in theirs.items():
        for wrong in (
            value.sum(),
            value[:0],
            value[None, None, None].expand(2, 1, 1, *value.shape),
        ):
            if key == "head.bias" and wrong.ndim == 1:
                continue  # the number of classes is free
            with pytest.raises(ValueError) as error:
                checkpoints.convert({**theirs, key: wrong}, "convdit")
            assert str(error.value).startswith(("this is not", repr(key))), error.value


@pytest.mark.parametrize("size", [{"depths": (1,), "dims": (4,)}, {"depths": (1, 2, 1), "dims": (4, 6, 8), "stem": 2}])
def test_fewer_stages_other_stems_and_channels_go_both_ways(classifier, assert_same, size):
    ours = classifier(in_chans=1, **size)
    check_two_way(ours, timm_state(ours, True), "timm", assert_same)
    check_two_way(ours, transformers_state(ours, "convnextv2."), "transformers", assert_same)
    check_two_way(ours, official_state(ours), "convnextv2_official", assert_same)
    sparse = checkpoints.convert(ours, "fcmae_minkowski")
    assert checkpoints.detect(sparse) == "fcmae_minkowski"
    assert_same(checkpoints.convert(sparse, "convdit"), ours)


@pytest.mark.parametrize("version", [1, 2])
def test_stages_of_attention_are_strict_and_have_a_place_in_our_names_only(classifier, assert_same, version):
    ours = classifier(version, attention=(2, 3))
    assert_same(checkpoints.convert(ours, "convdit"), ours)
    for key, value in ours.items():
        with pytest.raises(ValueError) as error:
            checkpoints.convert({k: v for k, v in ours.items() if k != key}, "convdit")
        assert repr(key) in str(error.value), key
        if key != "head.bias":
            with pytest.raises(ValueError, match=re.escape(repr(key))):
                checkpoints.convert({**ours, key: value.expand(2, *value.shape)}, "convdit")
    for name in ("timm", "transformers", "fcmae_minkowski")[: 3 if version == 2 else 2]:
        with pytest.raises(ValueError, match="unexpected keys: 'stages.2.0.attn.qkv.weight'"):
            checkpoints.convert(ours, name)
    model = models.create(
        "convnextv2_tiny" if version == 2 else "convnext_tiny",
        depths=(1, 2, 1, 1),
        dims=(4, 6, 8, 10),
        num_classes=5,
        attention_stages=2,
    )
    model.load_state_dict(ours)
    assert_same(checkpoints.convert(model.state_dict(), "convdit"), ours)


def test_norms_of_a_detection_backbone_are_kept_or_named_and_never_dropped(encoder, assert_same):
    ours = encoder()
    detector = ours | {f"norm{i}.{leaf}": torch.randn(d) for i, d in enumerate(DIMS) for leaf in ("weight", "bias")}
    assert_same(checkpoints.convert(detector, "convdit"), detector)
    assert_same(checkpoints.convert(official_state(detector), "convdit"), detector)
    assert_same(checkpoints.convert(detector, "timm", encoder_only=True), timm_state(ours, True))
    for name in ("timm", "fcmae_minkowski"):
        with pytest.raises(ValueError, match="unexpected keys: 'norm0.weight', 'norm0.bias'"):
            checkpoints.convert(detector, name)
    theirs = transformers_state(ours, "")
    for i in range(4):
        for leaf in ("weight", "bias"):
            theirs[f"hidden_states_norms.stage{i + 1}.{leaf}"] = detector[f"norm{i}.{leaf}"].clone()
    check_two_way(detector, theirs, "transformers", assert_same)
    with pytest.raises(ValueError, match="missing keys: 'norm2.bias'"):
        checkpoints.convert({k: v for k, v in detector.items() if k != "norm2.bias"}, "convdit")
    with pytest.raises(ValueError, match="unexpected keys: 'norm4.weight'"):
        checkpoints.convert({**detector, "norm4.weight": torch.zeros(10)}, "convdit")
    options = {"depths": (1, 2, 1, 1), "dims": DIMS}
    models.create("convnextv2_atto", features_only=True, out_norms=True, **options).load_state_dict(detector)
