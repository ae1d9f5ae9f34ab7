"""The figures of convdit evaluate and the stages of convdit scaling."""

import json

import numpy as np
import pytest
import torch

from convdit import data
from convdit.cli import main
from convdit.training import quality, scaling
from convdit.training.finetune import finetune
from convdit.training.options import DiTOptions, FinetuneOptions
from convdit.training.quality import Features, evaluate, measure, write_npz
from convdit.training.sample import PictureMaker
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


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file of torch-fidelity's Inception v3 with random weights: the real one is a download."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    empty = type("Empty", (library.FeatureExtractorInceptionV3,), {"load_state_dict": lambda *a: None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *a, **k: pytest.fail("a download"))
        patch.setattr(library.torch, "load", lambda *a, **k: {})
        torch.manual_seed(0)
        model = empty("inception", ["2048"], feature_extractor_weights_path="none")
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(model.state_dict(), path)
    return path, model


def test_inception_takes_the_user_s_weights_and_looks_at_17x17_sites(inception_file, tmp_path):
    path, model = inception_file
    images = torch.randint(256, (2, 3, 20, 20)).float() / 255
    got = quality.inception(path, torch.device("cpu"))(images)
    assert [tuple(x.shape) for x in got] == [(2, 2048), (2, 7 * 17 * 17), (2, 1008)]
    torch.testing.assert_close(got.pooled, model((images * 255).round().byte())[0])
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="weights: .*not torch-fidelity's Inception"):
        quality.inception(tmp_path / "other.pth", torch.device("cpu"))


FIGURES = {"fid", "sfid", "inception_score", "precision", "recall"}


def test_the_command_judges_a_run_and_the_file_that_it_wrote(folder, tmp_path, capsys):
    written, npz, judge = tmp_path / "f.json", tmp_path / "s.npz", ["--judge", str(folder / "judge"), "--cpu"]
    options = ["--count", "12", "--steps", "2", "--seed", "3", "--guidance", "2", "--guidance-interval", "0", "500"]
    command = ["evaluate", str(folder / "dit"), "--real", "digits", *judge, *options]
    assert main([*command, "--npz", str(npz), "--out", str(written)]) == 0
    figures = json.loads(written.read_text())
    assert figures == json.loads(capsys.readouterr().out) and FIGURES < figures.keys()
    with np.load(npz) as file:
        assert (file["arr_0"].dtype, file["arr_0"].shape) == (np.uint8, (12, 16, 16, 3))
        maker = PictureMaker.load(folder / "dit", cpu=True)
        labels = torch.arange(12) % 10
        pictures = maker.sample(labels, 2.0, 2, seed=3, interval=(0, 500))
        assert np.array_equal(file["arr_0"][..., :1], quality.to_uint8(pictures).numpy())
        assert np.array_equal(file["arr_1"], labels.numpy())
    assert main(["evaluate", str(npz), "--real", "digits", *judge]) == 0
    assert json.loads(capsys.readouterr().out) == figures
    assert main(["evaluate", str(npz), "--real", str(npz), *judge]) == 0
    same = json.loads(capsys.readouterr().out)
    assert abs(same["fid"]) < 1e-6 and same["precision"] == same["recall"] == 1


def test_the_command_takes_inception_s_weights_from_a_file(folder, inception_file, tmp_path, capsys):
    path, _ = inception_file
    images = data.load("digits").test.batch(range(8))[0]
    for name, part in (("a", images[:4]), ("b", images[4:])):
        write_npz(tmp_path / f"{name}.npz", quality.to_uint8(part))
    command = ["evaluate", str(tmp_path / "a.npz"), "--real", str(tmp_path / "b.npz"), "--weights", str(path), "--cpu"]
    assert main(command) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["features"] == f"Inception v3, {path}" and (figures["samples"], figures["real"]) == (4, 4)
    assert FIGURES < figures.keys() and figures["fid"] > 0 and figures["sfid"] > 0


def test_the_command_names_what_it_cannot_read(folder, tmp_path, capsys):
    np.savez(tmp_path / "wrong.npz", arr_0=np.zeros((4, 16, 16, 3), np.float32))
    write_npz(tmp_path / "small.npz", torch.zeros(4, 8, 8, 1, dtype=torch.uint8))
    judge = ["--judge", str(folder / "judge"), "--cpu"]
    for arguments, message in (
        ([str(tmp_path / "wrong.npz"), *judge], "arr_0: expected uint8 (N, H, W, 1 or 3), got float32 (4, 16, 16, 3)"),
        ([str(tmp_path / "none.npz"), *judge], "expected an .npz with arr_0"),
        ([str(folder / "held-out.npz"), "--real", "nowhere", *judge], "real: nowhere: no such file or folder"),
        (
            [str(folder / "held-out.npz"), "--real", str(tmp_path / "small.npz"), *judge],
            "real: expected pictures of the samples' (16, 16), got (8, 8)",
        ),
        ([str(folder / "judge"), *judge], "not the weights of a train-dit run"),
        ([str(folder / "dit"), "--sampler", "heun", *judge], "sampler: expected ddim or ddpm"),
    ):
        assert main(["evaluate", *arguments]) == 1
        assert message in capsys.readouterr().err


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


def rows(*figures):
    """(Gflops, distances after 1 and 4 steps) as scaling keeps them."""
    names = ("XS/4", "S/4", "S/2")
    found = [{"gflops": gflops, "fid": {"1": one, "4": four}} for gflops, one, four in figures]
    return dict(zip(names, found, strict=True))


def test_findings_say_what_the_figures_say():
    designs = {"adaln_zero": 5.0, "adaln_zero, no zeros": 6.0, "adaln": 7.0, "adaln, no zeros": 4.0}
    results = {
        "grid": rows((1.0, 30.0, 20.0), (2.0, 25.0, 15.0), (8.0, 9.0, 6.0)),
        "unets": {"U-Net 8": {"gflops": 1.9, "fid": {"4": 12.0}}},
        "designs": {name: {"fid": {"4": value}} for name, value in designs.items()},
    }
    order, size, patch, sampling, design, unet = scaling.findings(results, "4")
    assert "over 3 DiT: -1.00, as in the talk" in order
    assert size == "A larger network of the same patch is better in 1 of 1 pairs."
    assert patch == "A smaller patch in a network of the same size is better in 1 of 1 pairs."
    # Four steps of XS/4 cost 4: one of S/4 (25, worse than 20), none of S/2; of S/4 8: one of S/2 (9, better than 15).
    assert "the smaller of two DiT is better in 1 of 2 pairs" in sampling
    assert "Best design: adaln, no zeros; zero initialisation is better in 1 of 2" in design
    assert "U-Net 8: 12.0 at 1.9 Gflops; DiT-S/4: 15.0 at 2" in unet
    results["grid"] = rows((1.0, 9.0, 6.0), (2.0, 25.0, 15.0), (8.0, 30.0, 20.0))
    assert "+1.00, unlike in the talk" in scaling.findings(results, "4")[0]
    results["grid"] = rows((1.0, 1.0, 6.0), (2.0, 1.0, 15.0), (8.0, 1.0, 3.0))
    order, size, patch, *_ = scaling.findings(results, "4")
    assert "-0.50, weaker than in the talk" in order and "0 of 1" in size and "1 of 1" in patch


def test_scaling_draws_every_network_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    settings = scaling.ScalingSettings(
        sizes={"XS": (32, 1)},
        patches=(8, 4),
        designs=("XS", 4),
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
    assert len(names) == 6 and len(set(names)) == 5  # two DiT, one U-Net, a design twice; one was begun again
    results = json.loads((tmp_path / "s" / "scaling.json").read_text())
    assert list(results["grid"]["XS/4"]["fid"]) == ["1", "2"] and len(results["designs"]) == 2
    assert results["unets"]["U-Net 8"]["gflops"] > results["grid"]["XS/4"]["gflops"] > 0
    for text in ("one seed", "chosen after trial runs", *results["findings"]):
        assert text in results["caption"]
    assert (tmp_path / "s" / "scaling.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="other settings"):
        scaling.scaling(tmp_path / "s", settings=settings, seed=1)
