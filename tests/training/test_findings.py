"""The commands that repeat the talk's findings: their figures are right, their sentences follow from the figures."""

import json

import pytest
import torch

from convdit import models
from convdit.cli import main
from convdit.training import build
from convdit.training.collapse import (
    MODELS,
    activation_maps,
    channel_states,
    cosine_distance,
    expanded_activations,
    verdict,
)
from convdit.training.impact import equal_steps
from convdit.training.impact import verdict as impact_verdict
from convdit.training.options import ImpactOptions, PretrainOptions
from convdit.training.pretrain import pretrain


def tiny(version):
    torch.manual_seed(0)
    model = models.ConvNeXt((1, 2), (4, 6), version, in_chans=1, stem_stride=2, features_only=True)
    for name, parameter in model.named_parameters():  # GRN and LayerScale start where they do nothing
        if "grn" in name or "gamma" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("version", [1, 2])
def test_watched_activations_are_those_that_make_the_model_s_maps(version):
    encoder, images = tiny(version), torch.randn(3, 1, 16, 16)
    layers = expanded_activations(encoder, images)
    assert [tuple(x.shape) for x in layers] == [(3, 8, 8, 16), (3, 4, 4, 24), (3, 4, 4, 24)]
    block = encoder.stages[1][1]
    branch = block.pwconv2(layers[2])
    if version == 1:
        branch = branch * block.gamma
    before = models.ConvNeXt((1, 1), (4, 6), version, in_chans=1, stem_stride=2, features_only=True)
    before.load_state_dict({n: v for n, v in encoder.state_dict().items() if not n.startswith("stages.1.1.")})
    with torch.no_grad():
        expected = before(images)[-1].permute(0, 2, 3, 1) + branch
        torch.testing.assert_close(expected, encoder(images)[-1].permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)
    assert not encoder.stages[0][0].pwconv2._forward_pre_hooks


def test_distance_is_the_mean_over_all_pairs_of_channels():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = 0.0
    for picture in x.flatten(1, 2):
        for i in range(5):
            for j in range(5):
                expected += (1 - torch.cosine_similarity(picture[:, i], picture[:, j], 0)) / 2 / 25 / 2
    assert cosine_distance(x) == pytest.approx(float(expected))
    same = torch.randn(2, 3, 3, 1).expand(-1, -1, -1, 6)
    assert cosine_distance(same) == pytest.approx(0, abs=1e-7)
    assert cosine_distance(torch.cat([same, -same], -1)) == pytest.approx(0.5)


def test_dead_and_saturated_channels_are_counted():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 5, 8)
    x[..., 0] = 0
    x[..., 1] *= 0.01
    x[..., 2] = 3 + 0.1 * x[..., 2]
    x[..., 3] = -2
    assert channel_states(x) == {"dead": 2 / 8, "saturated": 2 / 8}


def test_maps_share_one_scale():
    maps = activation_maps(tiny(2), torch.randn(1, 1, 16, 16), 0, channels=9)
    assert maps.shape == (9, 1, 8, 8) and maps.min() >= 0 and maps.max() <= 1


def test_grn_switched_off_stays_the_identity_through_training(tmp_path):
    options = dict(data="digits", depths=[1, 1], dims=[8, 16], stem_stride=2, batch_size=16, steps=3, cpu=True)
    on = pretrain(PretrainOptions(**options), tmp_path / "on").encoder.stages[0][0].grn
    off = pretrain(PretrainOptions(**options, grn=False), tmp_path / "off").encoder.stages[0][0].grn
    assert on.gamma.abs().max() > 0 and not off.gamma.any() and not off.beta.any()
    with pytest.raises(ValueError, match="grn: a ConvNeXt V1 has none"):
        build.switch_off_grn(tiny(1))


def figures(distance, dead):
    return {"distance": [distance] * 9, "dead": [dead] * 9, "saturated": [0.0] * 9}


def test_collapse_says_plainly_whether_the_effect_shows():
    v1, v2, off = MODELS
    text = verdict({v1: figures(0.1, 0.3), v2: figures(0.4, 0.0), off: figures(0.39, 0.0)})
    assert " shows against ConvNeXt V1" in text[0] and "are fewer" in text[1]
    assert "DOES NOT SHOW at this scale against V2 with GRN off" in text[2] and "are NOT fewer" in text[3]


def impact_of(v1, v2):
    return {
        version: {"supervised": [0.5, 0.6], "equal": equal, "fcmae": fcmae}
        for version, (equal, fcmae) in {"V1": v1, "V2": v2}.items()
    }


def test_impact_says_plainly_whether_the_effect_shows():
    good = impact_verdict(impact_of(([0.6, 0.7], [0.6, 0.72]), ([0.6, 0.7], [0.8, 0.9])))
    assert good[3] == "V2: FCMAE is better than supervised at equal total compute, by +20.0 points."
    assert "not clear" in good[1] and " shows: " in good[4]
    for equal, fcmae in (([0.6, 0.75], [0.7, 0.9]), ([0.6], [0.9])):
        doubtful = impact_verdict(impact_of(([0.6, 0.7], [0.6, 0.62]), (equal, fcmae)))
        assert "IS NOT CLEAR" in doubtful[4] and "DOES NOT" not in doubtful[4] and " shows: " not in doubtful[4]
    bad = impact_verdict(impact_of(([0.6, 0.7], [0.9, 0.9]), ([0.6, 0.7], [0.8, 0.9])))
    assert "DOES NOT SHOW at this scale" in bad[4]
    worse = impact_verdict(impact_of(([0.6, 0.7], [0.1, 0.1]), ([0.6, 0.7], [0.5, 0.5])))
    assert "V2: FCMAE is NOT better" in worse[3] and "DOES NOT SHOW" in worse[4]


def test_equal_compute_is_equal():
    options = ImpactOptions(pretrain_steps=100, finetune_steps=30)
    assert equal_steps(500, 1000, options) == 30 + 100 * 64 * 500 // (50 * 1000)


def test_commands_write_a_page_with_pictures_and_keep_their_stages(tmp_path, capsys):
    small = ["--data", "digits", "--pretrain-steps", "2", "--cpu"]
    for command, more, images in (
        ("collapse", ["--pictures", "8"], 3 + 1 + 6),
        ("impact", ["--finetune-steps", "2", "--repeats", "1", "--labels", "20"], 1),
    ):
        out = tmp_path / command
        assert main([command, *small, *more, "--out", str(out)]) == 0
        page = (out / "report.html").read_text()
        assert page.count("data:image/png;base64,") == images
        assert "SHOW" in page or "shows" in page
        capsys.readouterr()
        assert main([command, *small, *more, "--out", str(out)]) == 0
        assert capsys.readouterr().out.count("done before") == len(list((out / "results").iterdir()))
        assert main([command, "--cpu", "--out", str(out)]) == 1
        assert f"holds results of convdit {command} with other options" in capsys.readouterr().err
    config = json.loads((tmp_path / "impact" / "runs" / "convnext_atto-fcmae-0" / "config.json").read_text())
    assert config["options"]["init"].endswith("V1-pretrain")


@pytest.mark.parametrize(
    "command, option, message",
    [
        ("impact", ["--repeats", "0"], "repeats: expected at least 1"),
        ("impact", ["--labels", "5"], "labels: expected at least one a class, 10, got 5"),
        ("collapse", ["--pictures", "0"], "pictures: expected at least 1"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(tmp_path, capsys, command, option, message):
    assert main([command, "--data", "digits", *option, "--out", str(tmp_path / "x")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()
