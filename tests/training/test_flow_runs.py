"""train-dit --objective flow; guidance intervals and the modulation cache in sample and walk."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from convdit import data
from convdit.cli import main
from convdit.diffusion import GaussianDiffusion, RectifiedFlow
from convdit.models import DiT
from convdit.training import sample
from convdit.training.runs import read_json, read_log, write_json
from convdit.training.sample import PictureMaker, process
from convdit.training.walk import walk

TINY = "--data digits --hidden-size 16 --depth 2 --num-heads 2 --batch-size 16 --log-every 1 --cpu".split()


@pytest.fixture(scope="module", params=["noise", "flow"])
def run(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / request.param
    options = ["--objective", request.param, "--steps", "3", "--sample-steps", "2", "--evaluate-every", "2"]
    assert main(["train-dit", *TINY, *options, "--out", str(out)]) == 0
    return out


def maker(run):
    """With random weights: three steps of training have hardly moved the zeros."""
    found = PictureMaker.load(run, cpu=True)
    with torch.no_grad():
        for parameter in found.dit.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return found


def fails(capsys, *arguments):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_trains_what_its_objective_says_and_shows_samples_on_the_way(run):
    objective = read_json(run / "config.json")["objective"]
    assert objective == run.name
    diffusion = process(read_json(run / "config.json"), 7)
    assert isinstance(diffusion, RectifiedFlow if objective == "flow" else GaussianDiffusion)
    channels = load_file(run / "model.safetensors")["final_layer.linear.weight"].shape[0]
    assert channels == (16 if objective == "flow" else 32), "a flow has no variance to learn"
    entries = read_log(run)
    buckets = [name for entry in entries for name in entry if name.startswith("loss_t")]
    assert set(buckets) == {"loss_t0_249", "loss_t250_499", "loss_t500_749", "loss_t750_999"}
    assert ("vb" in entries[0]) == (objective == "noise")
    # The untrained model predicts 0: the error is the mean square of noise, or of data - noise.
    images = 2 * data.load("digits").train.batch(range(1438))[0] - 1
    expected = 1 + (objective == "flow") * images.square().mean().item()
    assert entries[0]["mse"] == pytest.approx(expected, abs=0.08) and expected > 1.5 * (objective == "flow")
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step-00000002.png", "step-00000003.png"]


@pytest.fixture
def two_runs(run, tmp_path, monkeypatch):
    """The folders of an unbroken run and of one that a power cut ended after its third step of five."""
    from convdit.training import engine

    original, calls = engine._Trainer._micro_step, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return original(self, *arguments)

    options = [*TINY, "--objective", run.name, "--steps", "5", "--save-every", "2"]
    assert main(["train-dit", *options, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(engine._Trainer, "_micro_step", failing)
        assert main(["train-dit", *options, "--out", str(tmp_path / "cut")]) == 1
    return tmp_path / "whole", tmp_path / "cut"


def goes_on(whole, cut):
    assert main(["train-dit", "--resume", "--out", str(cut)]) == 0  # the options are those of the run
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_flow_resumes_to_the_bits_of_an_unbroken_run(two_runs):
    goes_on(*two_runs)


def test_a_run_from_before_there_were_flows_goes_on_predicting_noise(run, two_runs, capsys):
    whole, cut = two_runs
    config = read_json(cut / "config.json")
    assert config.pop("objective") == config["options"].pop("objective") == run.name
    write_json(cut / "config.json", config)
    line = fails(capsys, "train-dit", "--resume", "--objective", "flow", "--out", cut)
    assert "another objective: the run has 'noise', asked for 'flow'" in line
    if run.name == "noise":  # no older run was a flow
        goes_on(whole, cut)


def test_samples_of_the_commands_come_through_the_cache_and_equal_those_without(run, monkeypatch):
    made, labels = maker(run), torch.tensor([3, 7, 3])
    tables = []
    original = DiT.cache_modulation
    monkeypatch.setattr(DiT, "cache_modulation", lambda *a, **k: tables.append(1) or original(*a, **k))
    draws = {
        "sample": lambda: made.sample(labels, 2.0, 4),
        "no guidance": lambda: made.sample(labels, 1.0, 4),
        "last sampler": lambda: made.sample(labels, 2.0, 4, sampler=sample.SAMPLERS[run.name][1]),
        "interval": lambda: made.sample(labels, 2.0, 4, interval=(0, 0.5 if run.name == "flow" else 500)),
        "latent walk": lambda: walk(made, "latent", [3], 3, 2, 2.0, 4, 0),
        "class walk": lambda: walk(made, "class", [3, 7], 3, 2, 2.0, 4, 0),
    }
    for name, draw in draws.items():
        tables.clear()
        cached = draw()
        assert tables == [1], name
        with monkeypatch.context() as patch:
            patch.setattr(sample, "_CACHE_LIMIT", 0)
            plain = draw()
        assert tables == [1], f"{name}: over the limit of memory there is no table"
        assert plain.std() > 0.05, f"{name}: flat pictures prove nothing"
        torch.testing.assert_close(cached, plain, rtol=0, atol=2e-4, msg=name)


def test_guidance_interval_guides_inside_alone(run):
    made, labels = maker(run), torch.tensor([3, 7])
    last = 1 if run.name == "flow" else 999
    plain, guided = made.sample(labels, 1.0, 4), made.sample(labels, 4.0, 4)
    whole, half = (made.sample(labels, 4.0, 4, interval=(0, high)) for high in (last, last / 2))
    torch.testing.assert_close(whole, guided, rtol=0, atol=1e-6)
    assert not torch.allclose(half, plain, atol=1e-2) and not torch.allclose(half, guided, atol=1e-2)
    between = (0.3, 0.45) if run.name == "flow" else (1, 300)  # the four steps are at 0 .25 .5 .75 and 0 333 666 999
    torch.testing.assert_close(made.sample(labels, 4.0, 4, interval=between), plain, rtol=0, atol=1e-4)


def test_commands_take_samplers_and_intervals_of_the_objective(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flow = run.name == "flow"
    last, other = ("1", "ddim") if flow else ("999", "heun")
    few = ["--steps", "2", "--cpu", "--guidance-interval", "0", last]
    for sampler in sample.SAMPLERS[run.name]:
        options = ["--classes", "3", "--count", "2", "--sampler", sampler, *few]
        for name in ("a", "b"):
            assert main(["sample", str(run), *options, "--out", f"{name}.npz"]) == 0
        assert np.array_equal(np.load("a.npz")["images"], np.load("b.npz")["images"])
    assert main(["sample", str(run), "--count", "1", "--guidance", "1.5", "2", "4", "6", *few, "--out", "s.png"]) == 0
    assert Image.open("s.png").size == (4 * (64 + 2), 10 * (64 + 2))
    for kind in ("latent", "class"):
        options = ["--kind", kind, "--frames", "3", "--rows", "1", *few]
        assert main(["walk", str(run), *options, "--out", f"{kind}.gif"]) == 0
        assert Image.open(f"{kind}.gif").size == (64 + 2, 64 + 2)
    before = sorted(p.name for p in tmp_path.iterdir())
    for command in ("sample", "walk"):
        line = fails(capsys, command, run, "--sampler", other)
        assert f"expected {' or '.join(sample.SAMPLERS[run.name])} for weights of objective {run.name}" in line
        for low, high in ((5, 3), (-1, 1), (0, 1000)):
            line = fails(capsys, command, run, "--guidance-interval", low, high)
            assert f"guidance_interval: expected 0 <= low <= high <= {last}" in line and f"got {low} and {high}" in line
    if not flow:
        assert "sampler: expected one that draws no noise" in fails(capsys, "walk", run, "--sampler", "ddpm")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_weights_from_before_there_were_flows_predict_noise():
    assert isinstance(process({"schedule": "linear", "model": {"learn_sigma": True}}), GaussianDiffusion)


def test_the_u_net_follows_a_flow_with_a_guidance_interval(tmp_path):
    options = "--data digits --model unet --hidden-size 8 --depth 2 --steps 2 --batch-size 4 --objective flow --cpu"
    assert main(["train-dit", *options.split(), "--out", str(tmp_path / "run")]) == 0
    made = PictureMaker.load(tmp_path / "run", cpu=True)
    labels = torch.tensor([1, 2])
    plain, guided = made.sample(labels, 1.0, 2), made.sample(labels, 3.0, 2)
    assert not torch.equal(plain, guided)
    outside = made.sample(labels, 3.0, 2, interval=(0.1, 0.4))  # the steps are at 0 and 0.5
    torch.testing.assert_close(outside, plain, rtol=0, atol=1e-5)


def test_another_objective_cannot_go_on_with_a_run_and_is_named(run, capsys):
    other = "noise" if run.name == "flow" else "flow"
    line = fails(capsys, "train-dit", *TINY, "--resume", "--objective", other, "--out", run)
    assert f"another objective: the run has '{run.name}', asked for '{other}'" in line


def test_a_flow_has_no_schedule(tmp_path, capsys):
    arguments = ["--objective", "flow", "--schedule", "cosine", "--out", tmp_path / "run"]
    assert "schedule: expected none with objective flow" in fails(capsys, "train-dit", *TINY, *arguments)
    assert not (tmp_path / "run").exists()
