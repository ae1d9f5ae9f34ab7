"""What train-dit and encode promise: the cache, the log, samples on the way, a resumed run like the unbroken one."""

import functools
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from convdit import data
from convdit.cli import main
from convdit.diffusion import GaussianDiffusion
from convdit.models import DiT
from convdit.training import build, latents, runs
from convdit.training.codecs import DiffusersVAE
from convdit.training.finetune import finetune
from convdit.training.latents import LatentDataset, encode
from convdit.training.optim import moving_average
from convdit.training.options import DiTOptions, EncodeOptions, FinetuneOptions
from convdit.training.runs import RunError, read_log
from convdit.training.sample import PictureMaker, process
from convdit.training.speed import utilisation
from convdit.training.train_dit import by_timestep, train_dit

TINY = dict(hidden_size=16, depth=1, num_heads=2, batch_size=16, cpu=True, log_every=1, save_every=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Latents of the small autoencoder, in shards of 400, mirrored too."""
    out = tmp_path_factory.mktemp("latents") / "small"
    encode(EncodeOptions(data="digits", autoencoder_steps=5, shard_size=400, cpu=True), out)
    return out


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of a tiny AutoencoderKL of diffusers."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4, sample_size=16).save_pretrained(folder)
    return folder


def test_pixels_without_a_vae_are_the_pictures(tmp_path):
    got = encode(EncodeOptions(data="digits", vae="pixels", flip=False, shard_size=1000, cpu=True), tmp_path / "c")
    images, labels = data.load("digits").train.batch([0, 999, 1000, 1437])
    values, kept = got.batch([0, 999, 1000, 1437])
    assert torch.equal(values, 2 * images - 1) and torch.equal(kept, labels)
    assert torch.equal(got.draw([3], 1)[0], got.batch([3])[0])  # nothing to draw


def test_latents_are_those_of_the_autoencoder_and_of_mirrored_pictures(cache):
    dataset, maker = LatentDataset(cache), latents.SmallAutoencoder(_autoencoder(cache))
    images = 2 * data.load("digits").train.batch([5, 405])[0] - 1
    torch.testing.assert_close(dataset.batch([5, 405])[0], maker.model.encode(images))
    mirrored = maker.model.encode(images.flip(-1))
    drawn = [dataset.draw([5, 405], seed)[0] for seed in range(20)]
    for row in range(2):
        flipped = [torch.allclose(x[row], mirrored[row], atol=1e-5) for x in drawn]
        assert 3 < sum(flipped) < 17
        assert all(
            f or torch.equal(x[row], dataset.batch([5, 405])[0][row]) for f, x in zip(flipped, drawn, strict=True)
        )
    everything = dataset.batch(range(len(dataset)))[0]
    assert everything.mean((0, 2, 3)).abs().max() < 0.1 and (everything.std((0, 2, 3)) - 1).abs().max() < 0.1


def _autoencoder(cache):
    from convdit.training.codecs import load_autoencoder

    return load_autoencoder(cache / "autoencoder").requires_grad_(False)


def test_interrupted_encoding_goes_on_after_its_last_shard_to_the_same_bits(tmp_path, cache, monkeypatch):
    options = EncodeOptions(data="digits", autoencoder_steps=5, shard_size=400, cpu=True)
    original, calls = latents._write_shard, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("disk full")
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(latents, "_write_shard", failing)
        encode(options, tmp_path / "c")
    with pytest.raises(data.DataError, match="not finished"):
        LatentDataset(tmp_path / "c")
    with pytest.raises(RunError, match="shard_size"):
        encode(EncodeOptions(**vars(options) | {"shard_size": 300}), tmp_path / "c", resume=True)
    first = tmp_path / "c" / "latents-00000.safetensors"
    before = first.stat().st_mtime_ns
    encode(options, tmp_path / "c", resume=True)
    assert first.stat().st_mtime_ns == before
    for path in cache.glob("latents-*"):
        one, two = load_file(path), load_file(tmp_path / "c" / path.name)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_vae_of_diffusers_keeps_mean_and_deviation_and_draws_from_them(tmp_path, vae):
    options = EncodeOptions(data="digits", channels=3, vae=str(vae), flip=False, batch_size=500, cpu=True)
    dataset = encode(options, tmp_path / "c")
    stored = load_file(tmp_path / "c" / "latents-00000.safetensors")
    images = 2 * data.load("digits", channels=3).train.batch([7])[0] - 1
    posterior = DiffusersVAE(str(vae)).model.encode(images).latent_dist
    torch.testing.assert_close(stored["mean"][7], posterior.mean[0])
    torch.testing.assert_close(stored["std"][7], posterior.std[0])
    torch.testing.assert_close(dataset.batch([7])[0], posterior.mean * 0.18215)
    drawn = torch.cat([dataset.draw([7], seed)[0] for seed in range(300)])
    ratio = (drawn.std(0) / (posterior.std[0] * 0.18215)).mean()
    assert abs(ratio - 1) < 0.05 and not torch.equal(drawn[0], drawn[1])
    maker = train_dit(DiTOptions(data=str(tmp_path / "c"), patch_size=8, steps=1, **TINY), tmp_path / "run")
    again = PictureMaker.load(tmp_path / "run", cpu=True)
    one, two = (m.sample(torch.tensor([1]), steps=2) for m in (maker, again))
    assert one.shape == (1, 3, 16, 16) and torch.equal(one, two)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vae": "no/such/place"}, "vae: expected small, pixels"),
        ({"scale": 0.5}, "scale: expected none with vae small"),
        ({"scale": -1.0, "vae": "x"}, "scale: expected a positive"),
        ({"shard_size": 0}, "shard_size: expected at least 1, got 0"),
        ({"image_size": 18}, "image_size: 18"),
    ],
)
def test_encoding_that_cannot_work_is_named_and_writes_nothing(tmp_path, monkeypatch, change, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message):
        encode(EncodeOptions(**{"data": "digits", "cpu": True} | change), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_published_recipe_is_the_default():
    options = DiTOptions().resolved(1000)
    assert (options.lr, options.min_lr, options.ema, options.class_dropout) == (1e-4, 1e-4, 0.9999, 0.1)
    assert (options.weight_decay, options.warmup, options.beta2, options.clip_grad) == (0, 0, 0.999, 0)


def test_moving_average_leaves_what_is_not_trained():
    model = build.dit(
        dict(hidden_size=16, depth=1, num_heads=2, input_size=4, in_channels=1, num_classes=2, patch_size=2)
    )
    model.t_embedder.requires_grad_(False)
    average = moving_average(model, 0.9999)
    for _ in range(5):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter))
        average.update_parameters(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, value in average.module.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]) == (name not in trained), name


def test_log_has_loss_by_timestep_and_throughput(tmp_path, cache):
    options = DiTOptions(
        data=str(cache), patch_size=2, steps=3, peak_tflops=2.0, evaluate_every=2, sample_steps=2, **TINY
    )
    train_dit(options, tmp_path / "run")
    entries = read_log(tmp_path / "run")
    names = {"loss_t0_249", "loss_t250_499", "loss_t500_749", "loss_t750_999"}
    assert all(names & entry.keys() and entry["images_per_s"] > 0 for entry in entries)
    assert all(entry["mfu"] == pytest.approx(entry["tflops"] / 2, abs=1e-4) for entry in entries)
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == [
        "step-00000002.png",
        "step-00000003.png",
    ]


def test_samples_on_the_way_change_no_bit_of_the_training(tmp_path, cache):
    options = dict(data=str(cache), patch_size=2, steps=4, sample_steps=2, **TINY)
    for name, every in (("with", 1), ("without", None)):
        train_dit(DiTOptions(**options, evaluate_every=every), tmp_path / name)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_loss_by_timestep_sums_to_the_whole():
    loss, t = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([249, 250, 999])
    pairs = {name: pair.tolist() for name, pair in by_timestep(loss, t).items()}
    assert pairs == {"loss_t0_249": [1, 1], "loss_t250_499": [2, 1], "loss_t500_749": [0, 0], "loss_t750_999": [4, 1]}


def test_utilisation_counts_three_forwards_of_two_flops():
    figures = utilisation(torch.nn.Linear(10, 100), (torch.zeros(1, 10),), torch.device("cpu"), None, 2, peak=6e6)(
        500.0
    )
    assert figures == {"tflops": round(6 * 1000 * 500 / 1e12, 5), "mfu": 0.25}


def test_without_zero_initialisation_nothing_is_left_at_zero():
    config = dict(hidden_size=16, depth=1, num_heads=2, input_size=4, in_channels=1, num_classes=2, patch_size=2)
    x = torch.randn(1, 1, 4, 4), torch.tensor([5]), torch.tensor([1])
    for conditioning in ("adaln_zero", "adaln", "cross_attention", "in_context"):
        with_, without = (build.dit(config | {"conditioning": conditioning, "zero_init": z}) for z in (True, False))
        assert not with_(*x).any() and without(*x).all()


def test_the_u_net_trains_and_samples_with_guidance_as_a_dit(tmp_path):
    options = DiTOptions(data="digits", model="unet", hidden_size=8, depth=2, steps=2, batch_size=4, cpu=True)
    train_dit(options, tmp_path / "run")
    maker = PictureMaker.load(tmp_path / "run", cpu=True)
    plain, guided, same = (maker.sample(torch.tensor([1, 2]), g, steps=2) for g in (1.0, 3.0, 1.000001))
    assert plain.shape == (2, 1, 16, 16) and not torch.equal(plain, guided)
    torch.testing.assert_close(plain, same, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="guidance_channels: expected all, got 'first3'"):
        maker.sample(torch.tensor([1, 2]), 3.0, steps=2, channels="first3")


def test_min_snr_weighting_and_every_schedule_are_those_of_the_process(tmp_path, cache):
    for schedule, gamma in (("linear", None), ("cosine", None), ("scaled_linear", 0.01)):
        out = tmp_path / schedule
        command = ["train-dit", "--data", str(cache), "--schedule", schedule, "--out", str(out), "--cpu"]
        command += [] if gamma is None else ["--min-snr-gamma", str(gamma)]
        model = "--hidden-size 16 --depth 1 --num-heads 2 --patch-size 2 --steps 1 --log-every 1 --batch-size 64"
        assert main([*command, *model.split()]) == 0
        made = process(PictureMaker.load(out, cpu=True).config)
        expected = GaussianDiffusion(1000, schedule, min_snr_gamma=gamma)
        assert made.min_snr_gamma == gamma and (made.base_betas == expected.base_betas).all()
        (entry,) = read_log(out)
        weighted = entry["loss"] - entry["vb"]
        assert weighted < 0.5 * entry["mse"] if gamma else weighted == pytest.approx(entry["mse"])


def test_every_command_that_guides_takes_the_channels(tmp_path, cache, monkeypatch):
    run, judge, seen = tmp_path / "run", tmp_path / "judge", []
    finetune(FinetuneOptions(data="digits", depths=[1], dims=[8], stem_stride=2, steps=1, cpu=True), judge)
    original = DiT.forward_with_cfg

    @functools.wraps(original)  # samplers know the method by its name
    def watched(self, *arguments, **settings):
        seen.append(settings["channels"])
        return original(self, *arguments, **settings)

    monkeypatch.setattr(DiT, "forward_with_cfg", watched)
    few = ["--steps", "1", "--guidance", "2", "--cpu"]
    commands = {
        "sample": [str(run), "--classes", "3", "--count", "1", *few],
        "walk": [str(run), "--frames", "2", "--rows", "1", *few],
        "evaluate": [str(run), "--real", "digits", "--judge", str(judge), "--count", "4", *few],
    }
    model = "--hidden-size 16 --depth 1 --num-heads 2 --patch-size 2 --steps 1 --batch-size 4 --cpu".split()
    on_the_way = ["--evaluate-every", "1", "--sample-guidance", "2", "--sample-steps", "1"]
    for given, expected in ([], "all"), (["first3"], "first3"):
        out = run if not given else tmp_path / given[0]
        flag = ["--sample-channels", *given] if given else []
        assert main(["train-dit", "--data", str(cache), *model, *on_the_way, *flag, "--out", str(out)]) == 0
        assert seen and set(seen) == {expected}, "train-dit"
        for command, arguments in commands.items():
            seen.clear()
            flag = ["--guidance-channels", *given] if given else []
            name = tmp_path / ("x.json" if command == "evaluate" else "x.png")
            assert main([command, *arguments, *flag, "--out", str(name)]) == 0
            assert seen and set(seen) == {expected}, command
        seen.clear()


def test_guidance_of_three_channels_is_that_of_the_model(tmp_path, cache):
    train_dit(DiTOptions(data=str(cache), patch_size=2, steps=1, **TINY), tmp_path / "run")
    maker, labels = PictureMaker.load(tmp_path / "run", cpu=True), torch.tensor([3, 7])
    with torch.no_grad():
        for parameter in maker.dit.parameters():  # one step of training has hardly moved the zeros
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    made = {}
    for channels in ("first3", "all"):
        x = process(maker.config, 3).sample(
            maker.dit.forward_with_cfg, noise.shape, "ddim", noise=noise, y=labels, cfg_scale=4.0, channels=channels
        )
        made[channels] = maker.sample(labels, 4.0, 3, seed=5, channels=channels)
        expected = ((maker.autoencoder.decode(x) + 1) / 2).clamp(0, 1).detach()
        torch.testing.assert_close(made[channels], expected, rtol=0, atol=1e-4)
    assert (made["first3"] - made["all"]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="guidance_channels: expected all or first3, got 'first4'"):
        maker.sample(labels, 4.0, 3, channels="first4")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latent": True}, "latent: .* holds latents"),
        ({"schedule": "sigmoid"}, "schedule: expected one of linear, cosine, scaled_linear, got 'sigmoid'"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma: expected a positive number, got 0"),
        ({"min_snr_gamma": 5.0, "objective": "flow"}, "min_snr_gamma: expected none with objective flow, got 5"),
        ({"sample_channels": "three"}, "sample_channels: expected all or first3, got 'three'"),
        ({"sample_channels": "first3", "model": "unet"}, "sample_channels: expected all, got 'first3'"),
        ({"image_size": 8}, "image_size: .* holds latents"),
        ({"conditioning": "none"}, "conditioning: expected one of adaln_zero"),
        ({"class_dropout": 1.0}, "class_dropout: expected"),
        ({"peak_tflops": 0.0}, "peak_tflops: expected a positive"),
        ({"sample_steps": 0}, "sample_steps: expected 1 to 1000"),
        ({"model": "unett"}, "model: expected small, unet"),
    ],
)
def test_training_that_cannot_work_is_named_and_writes_nothing(tmp_path, cache, change, message):
    with pytest.raises(ValueError, match=message):
        train_dit(DiTOptions(**{"data": str(cache), "cpu": True} | change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_on_latents_killed_with_sigkill_resumes_to_the_bits_of_an_unbroken_one(tmp_path, vae):
    """Latents drawn from a distribution, mirrored or not, labels dropped: all of it must come back."""
    folder, cut = tmp_path / "c", tmp_path / "cut"
    encode(EncodeOptions(data="digits", channels=3, vae=str(vae), batch_size=500, cpu=True), folder)
    options = TINY | dict(data=str(folder), patch_size=8, steps=40)
    train_dit(DiTOptions(**options), tmp_path / "whole")
    command = [sys.executable, "-m", "convdit", "train-dit", "--out", str(cut)]
    for name, value in options.items():
        command += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (cut / "log.jsonl").exists() and any(entry["step"] >= 10 for entry in read_log(cut)):
                break
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    assert 4 <= runs.Run(cut, {}, main=False).checkpoints()[-1][0] < 40
    train_dit(DiTOptions(**options), cut, resume=True)
    one, two = (load_file(run / "model.safetensors") for run in (tmp_path / "whole", cut))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
