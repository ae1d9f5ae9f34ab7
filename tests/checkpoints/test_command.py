"""`convdit convert`: files of all formats both ways, one part of a larger model, and nothing left out unsaid."""

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from convdit import checkpoints, models
from convdit.cli import main

from .test_convnext_formats import official_state, timm_state, transformers_state
from .test_minkowski import minkowski_encoder, minkowski_fcmae


def write(state, path, kind):
    if kind == "torch":
        torch.save({"model": state, "epoch": 3}, path)
    else:
        save_file({name: value.contiguous() for name, value in state.items()}, path)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize(
    ("source", "to", "foreign"),
    [
        ("classifier", "convnextv2_official", official_state),
        ("classifier", "timm", lambda ours: timm_state(ours, conv_mlp=True)),
        ("classifier", "transformers", lambda ours: transformers_state(ours, "convnextv2.")),
        ("encoder", "fcmae_minkowski", minkowski_encoder),
        ("fcmae", "fcmae_minkowski", minkowski_fcmae),
    ],
    ids=["official", "timm", "transformers", "encoder of FCMAE", "whole FCMAE"],
)
def test_every_format_goes_both_ways_from_file_to_file(
    request, tmp_path, capsys, assert_same, source, to, foreign, kind
):
    ours = request.getfixturevalue(source)()
    theirs = foreign(ours)
    write(theirs, tmp_path / "theirs", kind)
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--to", "convdit"]) == 0
    assert_same(load_file(tmp_path / "ours"), ours)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", to, "--from", "convdit"]) == 0
    assert_same(load_file(tmp_path / "back"), theirs)
    assert capsys.readouterr().out.count("eps 1e-12") == (2 if to == "transformers" else 0)


def test_the_command_names_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in checkpoints.formats())


def test_what_encoder_only_leaves_out_is_named(tmp_path, capsys, fcmae, classifier):
    for state, names in (
        (fcmae(), ["mask_token", "proj.weight", "pred.bias", "decoder.*.grn.gamma (2)"]),
        (classifier(), ["norm.weight", "norm.bias", "head.weight", "head.bias"]),
    ):
        save_file(state, tmp_path / "in")
        assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "timm", "--encoder-only"]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        count = len(state) - len(load_file(tmp_path / "out"))
        assert line.startswith(f"left out: {count} tensors: ") and all(name in line for name in names)


def clip(custom_text):
    """A small CLIP of open_clip over a ConvNeXt of timm, all of it random."""
    torch.manual_seed(0)
    build = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    vision = {"timm_model_name": "convnext_atto", "timm_proj": "mlp", "timm_pool": "", "image_size": 64}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2}
    model = build(embed_dim=8, vision_cfg=vision, text_cfg=text).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("custom_text", [False, True])
def test_the_image_tower_of_open_clip_is_taken_when_asked_for_and_the_rest_is_named(
    tmp_path, capsys, assert_same, custom_text
):
    model = clip(custom_text)
    state = model.state_dict()
    assert main_on(state, tmp_path) == 1
    message = capsys.readouterr().err
    assert (
        "A whole open_clip model" in message
        and "convdit convert --part visual.trunk" in message
        and not (tmp_path / "out").exists()
    )
    assert main_on(state, tmp_path, "--part", "visual.trunk") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    left = [name for name in state if not name.startswith("visual.trunk.")]
    assert line.startswith(f"left out: {len(left)} tensors: ")
    blocks = "text.transformer.resblocks" if custom_text else "transformer.resblocks"
    for name in ("logit_scale", "visual.head.mlp.fc1.weight", f"{blocks}.*.attn.in_proj_weight (2)"):
        assert name in line
    ours = models.create("convnext_atto", num_classes=0).eval()
    ours.load_state_dict(load_file(tmp_path / "out"))
    images = torch.randn(2, 3, 64, 64)
    expected = model.visual.trunk(images)
    assert (ours(images) - expected).abs().max() <= 1e-5 * expected.abs().max()

    trunk, rest = checkpoints.part({"state_dict": state}, "visual.trunk.")
    assert rest == left
    back = checkpoints.convert(checkpoints.convert(trunk, "convdit"), "timm")
    assert_same({f"visual.trunk.{name}": value for name, value in back.items()} | {k: state[k] for k in left}, state)


def main_on(state, folder, *arguments):
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "clip")
    return main(["convert", str(folder / "clip"), str(folder / "out"), "--to", "convdit", *arguments])


def test_a_part_that_is_not_there_is_refused(classifier):
    for prefix in ("visual.trunk", "stage", ""):
        with pytest.raises(ValueError, match=f"part: expected the first words of some names, got '{prefix}'"):
            checkpoints.part(classifier(), prefix)
