"""The figures of convdit evaluate and the stages of convdit scaling."""

import json

import numpy as np
import pytest
import torch

from convdit import data
from convdit.training import quality, scaling
from convdit.training.finetune import finetune
from convdit.training.options import DiTOptions, FinetuneOptions
from convdit.training.quality import Features, evaluate, measure, write_npz
from convdit.training.train_dit import train_dit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A judge, a tiny DiT and an .npz of held-out digits, four times as large as the features."""
    out = tmp_path_factory.mktemp("quality")
    finetune(
        FinetuneOptions(data="digits", depths=[1, 1], dims=[8, 16], stem_stride=2, steps=5, cpu=True), out / "judge"
    )
    train_dit(DiTOptions(data="digits", hidden_size=16, depth=1, num_heads=2, steps=2, cpu=True), out / "dit")
    images, _ = data.load("digits").test.batch(range(300))
    write_npz(out / "held-out.npz", quality.to_uint8(images))
    write_npz(
        out / "noise.npz", torch.randint(256, (300, 16, 16, 1), generator=torch.Generator().manual_seed(0)).byte()
    )
    return out


def random_features(seed: int, count: int, shift: float = 0.0, scale: float = 1.0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(*(torch.randn(count, 4, generator=generator) * scale + shift for _ in range(3)))


def test_figures_of_gaussians_are_the_closed_form():
    got = measure(random_features(0, 3000, 3.0, 2.0), random_features(1, 3000))
    assert got["fid"] == pytest.approx(4 * (9 + 1), rel=0.06) and got["sfid"] == pytest.approx(40, rel=0.06)
    assert got["precision"] < 0.2 < 0.8 < got["recall"]  # wide and far off: they cover the real ones, and miss them


def test_a_set_against_itself_is_perfect():
    one = random_features(0, 200)
    got = measure(one, one)
    assert abs(got["fid"]) < 1e-6 and got["precision"] == got["recall"] == 1


def test_inception_score_of_sure_and_even_classes_is_their_number():
    sure = 100 * torch.nn.functional.one_hot(torch.arange(400) % 5, 5).float()
    got = measure(random_features(0, 400)._replace(logits=sure), random_features(1, 400))
    assert got["inception_score"] == pytest.approx(5, rel=0.05)


def test_held_out_digits_are_better_than_noise_and_the_classifier_is_named(folder):
    good, bad = (
        evaluate(folder / f"{x}.npz", "digits", judge=str(folder / "judge"), cpu=True) for x in ("held-out", "noise")
    )
    assert good["fid"] < bad["fid"] / 5 and good["sfid"] < bad["sfid"] / 5
    assert good["precision"] > 0.7 > 0.1 > bad["precision"]
    assert str(folder / "judge") in good["features"] and "not comparable" in good["features"]
    assert (good["samples"], good["real"]) == (300, 1438)


def test_samples_of_a_run_are_written_as_the_evaluator_of_adm_reads_them(folder, tmp_path):
    got = evaluate(
        folder / "dit", "digits", tmp_path / "s.npz", judge=str(folder / "judge"), count=25, steps=2, cpu=True
    )
    with np.load(tmp_path / "s.npz") as file:
        assert file.files[0] == "arr_0" and file["arr_0"].dtype == np.uint8
        assert file["arr_0"].shape == (25, 16, 16, 3) and file["arr_1"].tolist() == [i % 10 for i in range(25)]
    again = evaluate(tmp_path / "s.npz", "digits", judge=str(folder / "judge"), cpu=True)
    assert {k: v for k, v in got.items()} == again


def test_inception_takes_the_user_s_weights_and_looks_at_17x17_sites(tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as library

    monkeypatch.setattr(library, "load_state_dict_from_url", lambda *a, **k: pytest.fail("a download"))
    empty = type("Empty", (library.FeatureExtractorInceptionV3,), {"load_state_dict": lambda *a: None})
    with monkeypatch.context() as patch:
        patch.setattr(library.torch, "load", lambda *a, **k: {})
        torch.manual_seed(0)
        model = empty("inception", ["2048"], feature_extractor_weights_path="none")
    torch.save(model.state_dict(), tmp_path / "inception.pth")
    images = torch.randint(256, (2, 3, 20, 20)).float() / 255
    got = quality.inception(tmp_path / "inception.pth", torch.device("cpu"))(images)
    assert [tuple(x.shape) for x in got] == [(2, 2048), (2, 7 * 17 * 17), (2, 1008)]
    torch.testing.assert_close(got.pooled, model((images * 255).round().byte())[0])
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="weights: .*not torch-fidelity's Inception"):
        quality.inception(tmp_path / "other.pth", torch.device("cpu"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "weights, judge: expected one"),
        ({"judge": "x", "count": 3}, "count: expected at least 4, got 3"),
        ({"judge": "x", "steps": 0}, "steps: expected 1 to 1000"),
        ({"judge": "x", "out": "x.png"}, "out: expected a name ending in .npz"),
        ({"weights": "no.pth"}, "weights: no.pth: no such file"),
    ],
)
def test_an_evaluation_that_cannot_work_is_named(folder, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(folder / "dit", "digits", cpu=True, **change)


def test_scaling_draws_every_network_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    settings = scaling.ScalingSettings(
        sizes={"XS": (32, 1)},
        patches=(8,),
        designs=("XS", 8),
        unets=(8,),
        train={"steps": 1, "batch_size": 4},
        judge={"steps": 1, "depths": [1], "dims": [8]},
        samples=10,
        sampling_steps=(1, 2),
    )
    original, names = scaling.train_dit, []

    def counted(options, run, resume):
        names.append(run.name)
        if len(names) == 3:
            raise KeyboardInterrupt
        return original(options, run, resume)

    monkeypatch.setattr(scaling, "train_dit", counted)
    monkeypatch.setattr(scaling, "CONDITIONINGS", ("adaln",))  # the others cost time
    with pytest.raises(KeyboardInterrupt):
        scaling.scaling(tmp_path / "s", settings=settings)
    scaling.scaling(tmp_path / "s", settings=settings)
    assert len(names) == 5 and len(set(names)) == 4  # one DiT, one U-Net, a design twice; one was begun again
    results = json.loads((tmp_path / "s" / "scaling.json").read_text())
    assert list(results["grid"]["XS/8"]["fid"]) == ["1", "2"] and len(results["designs"]) == 2
    assert results["unets"]["U-Net 8"]["gflops"] > results["grid"]["XS/8"]["gflops"] > 0
    assert "one seed" in results["caption"] and (tmp_path / "s" / "scaling.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="other settings"):
        scaling.scaling(tmp_path / "s", settings=settings, seed=1)
