"""FCMAE in MinkowskiEngine's names; the foreign side is written out tap by tap from the rule."""

import pytest
import torch

from convdit import checkpoints


def minkowski_encoder(dense):
    """The sparse layers' own layout of a dense encoder in our names."""
    out = {}
    for key, value in dense.items():
        name, leaf = key.rsplit(".", 1)
        if key.startswith("downsample_layers.0."):
            out[key] = value.clone()
        elif key.endswith("dwconv.weight"):
            channels = value.shape[0]
            kernel = torch.empty(49, channels)
            for c in range(channels):
                for i in range(7):
                    for j in range(7):
                        kernel[i + 7 * j, c] = value[c, 0, i, j]
            out[f"{name}.kernel"] = kernel
        elif key.startswith("downsample_layers.") and value.ndim == 4:
            outputs, inputs = value.shape[:2]
            kernel = torch.empty(4, inputs, outputs)
            for i in range(2):
                for j in range(2):
                    for c in range(inputs):
                        for o in range(outputs):
                            kernel[i + 2 * j, c, o] = value[o, c, i, j]
            out[f"{name}.kernel"] = kernel
        elif name.endswith("dwconv") or (name.startswith("downsample") and name.endswith(".1")):
            out[f"{name}.bias"] = value.clone().view(1, -1)
        elif name.endswith((".norm", ".0")):
            out[f"{name}.ln.{leaf}"] = value.clone()
        elif ".pwconv" in name:
            out[f"{name}.linear.{leaf}"] = value.clone()
        else:
            assert ".grn." in key, key
            out[key] = value.clone().view(1, -1)
    return out


def minkowski_fcmae(ours):
    encoder = {k.removeprefix("encoder."): v for k, v in ours.items() if k.startswith("encoder.")}
    out = {f"encoder.{key}": value for key, value in minkowski_encoder(encoder).items()}
    for key, value in ours.items():
        if not key.startswith("encoder."):
            out[key] = value.clone().view(1, 1, 1, -1) if ".grn." in key else value.clone()
    return out


def test_the_whole_fcmae_gets_our_names_and_dense_kernels(fcmae, assert_same):
    ours = fcmae()
    theirs = minkowski_fcmae(ours)
    assert checkpoints.detect(theirs) == "fcmae_minkowski"
    assert_same(checkpoints.convert(theirs, "convdit"), ours)
    assert_same(checkpoints.convert(ours, "fcmae_minkowski"), theirs)


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_an_encoder_alone_converts_with_or_without_its_prefix(encoder, assert_same, prefix):
    ours = encoder()
    theirs = {prefix + key: value for key, value in minkowski_encoder(ours).items()}
    assert checkpoints.detect(theirs) == "fcmae_minkowski"
    dense = checkpoints.convert(theirs, "convdit")
    assert_same(dense, ours)
    assert_same(checkpoints.sparse_to_dense(theirs), ours)
    assert_same(checkpoints.convert(dense, "fcmae_minkowski"), theirs)


@pytest.mark.parametrize("infix", [False, True])
def test_a_fine_tuned_state_keeps_its_norm_and_head(classifier, assert_same, infix):
    ours = classifier()
    top = {key: ours[key] for key in ours if key.startswith(("norm.", "head."))}
    theirs = minkowski_encoder({key: ours[key] for key in ours if key not in top})
    for key, value in top.items():
        name, leaf = key.split(".")
        theirs[f"{name}.{'ln' if name == 'norm' else 'linear'}.{leaf}" if infix else key] = value
    assert_same(checkpoints.convert(theirs, "convdit"), ours)
    with pytest.raises(ValueError, match=r"head\.weight.*encoder_only"):
        checkpoints.sparse_to_dense(theirs)
    dense = checkpoints.sparse_to_dense(theirs, encoder_only=True)
    assert_same(dense, {key: ours[key] for key in ours if key not in top})


def test_the_decoder_is_dropped_only_on_request(fcmae, encoder, assert_same):
    theirs = minkowski_fcmae(fcmae())
    bare = {k.removeprefix("encoder."): v for k, v in fcmae().items() if k.startswith("encoder.")}
    with pytest.raises(ValueError, match=r"mask_token.*encoder_only"):
        checkpoints.sparse_to_dense(theirs)
    assert_same(checkpoints.sparse_to_dense(theirs, encoder_only=True), bare)
    with pytest.raises(ValueError, match="decoder.0.dwconv.weight"):
        checkpoints.convert(theirs, "timm")
    timm = checkpoints.convert(theirs, "timm", encoder_only=True)
    assert_same(checkpoints.convert(timm, "convdit"), bare)


def test_any_shape_of_grn_and_bias_is_read(encoder, assert_same):
    ours = encoder()
    for shape in [(-1,), (1, -1), (1, 1, 1, -1)]:
        theirs = minkowski_encoder(ours)
        for key in theirs:
            if ".grn." in key:
                theirs[key] = theirs[key].view(shape)
            elif theirs[key].shape[0] == 1 and key.endswith("bias"):
                theirs[key] = theirs[key].view(-1)
        assert_same(checkpoints.convert(theirs, "convdit"), ours)


def test_missing_and_unexpected_keys_are_named_as_the_file_names_them(fcmae):
    theirs = minkowski_fcmae(fcmae())
    del theirs["encoder.stages.1.1.norm.ln.weight"], theirs["encoder.stages.3.0.dwconv.kernel"]
    del theirs["proj.bias"]
    theirs["encoder.stages.0.0.extra"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        checkpoints.convert(theirs, "convdit")
    missing, unexpected = str(error.value).split("unexpected keys")
    assert "'encoder.stages.1.1.norm.ln.weight'" in missing
    assert "'encoder.stages.3.0.dwconv.kernel'" in missing
    assert "'proj.bias'" in missing
    assert "'encoder.stages.0.0.extra'" in unexpected


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("encoder.stages.0.0.dwconv.kernel", (48, 4)),
        ("encoder.stages.0.0.dwconv.kernel", (49, 4, 1)),
        ("encoder.downsample_layers.1.1.kernel", (4, 6, 4)),
        ("encoder.downsample_layers.1.1.kernel", (9, 4, 6)),
        ("encoder.stages.0.0.grn.gamma", (4, 4)),
    ],
)
def test_a_wrong_shape_names_the_tensor(fcmae, key, shape):
    theirs = minkowski_fcmae(fcmae())
    theirs[key] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"shape") as error:
        checkpoints.convert(theirs, "convdit")
    assert key in str(error.value)
