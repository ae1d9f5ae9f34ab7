"""The command line: every command runs; every mistake gives a clear line, a status, and no half-written file."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from convdit.cli import main
from convdit.data import load

SMALL = "--data digits --depths 1 1 --dims 8 16 --stem-stride 2 --batch-size 16 --steps 2 --cpu".split()
COMMANDS = "demo pretrain finetune probe validate impact collapse reconstruct train-dit sample walk convert".split()
COMMANDS += ["info", "bench", "flops"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "pretrain"
    assert main(["pretrain", *SMALL, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "dit"
    options = "--data digits --hidden-size 16 --depth 1 --num-heads 2 --steps 2 --latent --autoencoder-steps 2 --cpu"
    assert main(["train-dit", *options.split(), "--out", str(out)]) == 0
    return out


def fails(capsys, *arguments):
    """Runs a command that must fail with status 1; returns the one line that it prints."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    line = lines[-1]
    assert line.startswith(f"convdit {arguments[0]}: error: ") and "Traceback" not in "".join(lines)
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--out" in text and f"convdit {command}" in text


def test_bad_usage_has_status_2(capsys):
    for arguments in (["paint"], ["pretrain", "--steps", "many"], [], ["convert", "a"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "convdit", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("convdit ")


def test_probe_and_finetune_start_from_a_pretraining_run(pretrained, tmp_path, capsys):
    arguments = ["--data", "digits", "--init", str(pretrained), "--labels", "50", "--cpu"]
    assert main(["probe", *arguments, "--out", str(tmp_path / "probe.json")]) == 0
    found = json.loads((tmp_path / "probe.json").read_text())
    assert 0 < found["accuracy"] < 1 and 0.15 < found["knn_accuracy"] < 1 and found["labels"] == 50
    assert main(["finetune", *arguments, "--steps", "2", "--out", str(tmp_path / "tuned")]) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    encoder, tuned = load_file(pretrained / "model.safetensors"), load_file(tmp_path / "tuned" / "model.safetensors")
    # Two steps of a small rate: the weights are those of the encoder, moved a little.
    name = "stages.1.0.pwconv1.weight"
    assert 0 < (tuned[name] - encoder[f"encoder.{name}"]).abs().max() < 0.01


def test_validate_repeats_the_figure_of_the_run(pretrained, tmp_path, capsys):
    tuned = tmp_path / "tuned"
    arguments = [
        "--data",
        "digits",
        "--init",
        str(pretrained),
        "--steps",
        "20",
        "--lr",
        "0.01",
        "--ema",
        "0.9",
        "--cpu",
    ]
    assert main(["finetune", *arguments, "--out", str(tuned)]) == 0
    result = json.loads((tuned / "result.json").read_text())
    capsys.readouterr()
    assert main(["validate", str(tuned), "--data", "digits", "--cpu", "--out", str(tmp_path / "v.json")]) == 0
    found = json.loads((tmp_path / "v.json").read_text())
    assert found == {"accuracy": result["accuracy"], "top5_accuracy": result["top5_accuracy"], "pictures": 359}
    assert result["accuracy"] != result["raw_accuracy"], "the average and the last weights cannot be told apart"
    assert "fine-tuning" in fails(capsys, "validate", pretrained, "--data", "digits")
    line = fails(capsys, "validate", tuned, "--data", write_folder(tmp_path / "pictures"), "--image-size", 32)
    assert "data: expected the classes of the weights, 0, 1" in line and "cat, dog" in line


def test_validate_reads_a_classifier_of_another_project(tmp_path, capsys):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("convnextv2_atto", num_classes=2).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else torch.nn.init.normal_(parameter, 0.5, 0.2)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "timm.safetensors")
    folder = write_folder(tmp_path / "pictures")
    assert (
        main(
            ["validate", str(tmp_path / "timm.safetensors"), "--data", str(folder), "--image-size", "64"]
            + ["--model", "convnextv2_atto", "--cpu", "--out", str(tmp_path / "v.json")]
        )
        == 0
    )
    test = load(folder, 64, None, None).test
    mean, std = (torch.tensor(model.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model((test.batch(range(len(test)))[0] - mean) / std).argmax(1) == test.labels
    assert json.loads((tmp_path / "v.json").read_text())["accuracy"] == pytest.approx(expected.double().mean())
    line = fails(capsys, "validate", tmp_path / "timm.safetensors", "--data", folder)
    assert "model: expected the name" in line


def write_folder(root):
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(10):
            noise = np.random.default_rng([i, len(name), ord(name[0])]).integers(0, 256, (70, 80, 3), np.uint8)
            Image.fromarray(noise).save(root / name / f"{i}.png")
    return root


def test_finetune_starts_from_a_checkpoint_of_another_project(pretrained, tmp_path):
    timm = tmp_path / "timm.safetensors"
    assert main(["convert", str(pretrained), str(timm), "--to", "timm", "--encoder-only"]) == 0
    arguments = [*SMALL, "--labels", "50", "--init"]
    assert main(["finetune", *arguments, str(timm), "--out", str(tmp_path / "a")]) == 0
    assert main(["finetune", *arguments, str(pretrained), "--out", str(tmp_path / "b")]) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_stages_of_attention_are_an_option_and_kept_from_run_to_run(pretrained, tmp_path, capsys):
    hybrid, name = tmp_path / "pre", "stages.1.0.attn.qkv.weight"
    assert main(["pretrain", *SMALL, "--attention-stages", "1", "--out", str(hybrid)]) == 0
    assert main(["finetune", *SMALL, "--init", str(hybrid), "--labels", "50", "--out", str(tmp_path / "tuned")]) == 0
    encoder, tuned = load_file(hybrid / "model.safetensors"), load_file(tmp_path / "tuned" / "model.safetensors")
    assert 0 < (tuned[name] - encoder[f"encoder.{name}"]).abs().max() < 0.01
    assert main(["reconstruct", str(hybrid), "--out", str(tmp_path / "r.png"), "--count", "4"]) == 0
    arguments = ["--data", "digits", "--labels", "50", "--cpu", "--out", str(tmp_path / "p.json")]
    assert main(["probe", *arguments, "--init", str(hybrid)]) == 0
    assert main(["probe", *arguments, *SMALL[2:10], "--attention-stages", "2"]) == 0
    out = tmp_path / "f"
    for source, stages in ((pretrained, 1), (hybrid, 2), (hybrid, 0)):
        line = fails(capsys, "finetune", *SMALL, "--init", source, "--attention-stages", stages, "--out", out)
        assert "attention_stages: the weights of init are for (" in line and not out.exists()
    line = fails(capsys, "probe", "--data", "digits", "--init", hybrid, "--depths", 2, 1)
    assert "depths: the weights of init are for (1, 1), asked for (2, 1)" in line


def test_reconstruct_writes_a_picture(pretrained, tmp_path):
    out = tmp_path / "r.png"
    assert main(["reconstruct", str(pretrained), "--out", str(out), "--count", "4"]) == 0
    assert Image.open(out).size[0] > 100


def test_sample_writes_a_grid_or_arrays_and_repeats_itself(diffusion, tmp_path):
    arguments = ["sample", str(diffusion), "--steps", "3", "--count", "2", "--classes", "3", "7", "--cpu"]
    for name in ("a.npz", "b.npz", "c.png"):
        assert main([*arguments, "--out", str(tmp_path / name)]) == 0
    one, two = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert one["images"].shape == (4, 16, 16, 1) and one["labels"].tolist() == [3, 3, 7, 7]
    assert np.array_equal(one["images"], two["images"])


def test_a_sweep_over_scales_is_one_picture_from_the_same_noise(diffusion, tmp_path):
    arguments = ["sample", str(diffusion), "--steps", "3", "--count", "2", "--classes", "3", "7", "--cpu"]
    for name, scales in (("sweep", ["1.5", "4"]), ("low", ["1.5"]), ("high", ["4"])):
        assert main([*arguments, "--guidance", *scales, "--out", str(tmp_path / f"{name}.png")]) == 0
    sweep, low, high = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("sweep", "low", "high"))
    assert np.array_equal(sweep, np.concatenate([low, high], axis=1))


@pytest.mark.parametrize(("kind", "classes"), [("latent", ["3"]), ("class", ["3", "7"])])
def test_a_walk_is_a_strip_of_small_steps_or_a_film(diffusion, tmp_path, kind, classes):
    arguments = ["walk", str(diffusion), "--kind", kind, "--classes", *classes, "--steps", "3", "--cpu"]
    arguments += ["--frames", "4", "--rows", "2"]
    for name in ("a.png", "b.png", "c.gif"):
        assert main([*arguments, "--out", str(tmp_path / name)]) == 0
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (4 * (64 + 2), 2 * (64 + 2))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    film = Image.open(tmp_path / "c.gif")
    assert film.size == (2 * (64 + 2), 64 + 2)
    if kind == "latent":  # equal frames, as between two classes hardly trained, become one
        assert film.n_frames == 6


def test_a_walk_starts_and_ends_at_the_pictures_of_its_classes_and_noises(diffusion):
    from convdit.training.sample import PictureMaker
    from convdit.training.walk import slerp, walk

    maker = PictureMaker.load(diffusion, cpu=True)
    with torch.no_grad():  # two steps of training have not touched the zeros
        for parameter in maker.dit.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    strip = walk(maker, "class", [3, 7], 5, 1, 2.0, 3, 0)[0]
    noise = torch.randn(1, *maker.latent_shape, generator=torch.Generator().manual_seed(0))
    for frame, label in ((0, 3), (-1, 7)):
        alone = maker.pictures(noise, torch.tensor([label]), 2.0, 3)[0]
        torch.testing.assert_close(strip[frame], alone, rtol=0, atol=1e-4)
    assert not torch.allclose(strip[0], strip[-1], atol=1e-3)
    first, last = torch.randn(2, 1, 1, 4, 32, 32)
    half = slerp(first, last, torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1, 1))
    torch.testing.assert_close(half[0, [0, 2]], torch.cat([first[0], last[0]]), rtol=0, atol=1e-4)
    assert half[0, 1].std() == pytest.approx(1, abs=0.05)


def test_bad_walks_are_named(diffusion, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["--kind", "time"], "kind: expected one of latent, class, got 'time'"),
        (["--classes", "3"], "classes: expected 2 for a class walk, got 1"),
        (["--frames", "1"], "frames: expected at least 2, got 1"),
        (["--rows", "0"], "rows: expected at least 1, got 0"),
        (["--steps", "0"], "steps: expected 1 to 1000"),
        (["--out", "walk.npz"], "ending in .png or .gif"),
    ):
        assert message in fails(capsys, "walk", diffusion, *arguments)
    line = fails(capsys, "sample", diffusion, "--guidance", 1.5, 4, "--out", "x.npz")
    assert "guidance: expected one scale for .npz, got 2" in line
    assert list(tmp_path.iterdir()) == []


def test_a_trained_dit_converts_to_diffusers_and_back(diffusion, tmp_path):
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert main(["convert", str(diffusion), str(there), "--to", "diffusers"]) == 0
    assert main(["convert", str(there), str(back), "--to", "convdit"]) == 0
    one, two = load_file(diffusion / "model.safetensors"), load_file(back)
    assert all(torch.equal(two[name], one[name]) for name in two) and set(one) - set(two) <= {"pos_embed"}
    assert main(["convert", str(there), str(back), "--to", "dit_official", "--input-size", "4"]) == 0
    two = load_file(back)
    assert set(one) == set(two) and all(torch.equal(two[name], one[name]) for name in two)


def test_resume_takes_the_options_of_the_run(pretrained, capsys):
    assert main(["pretrain", "--out", str(pretrained), "--resume", "--cpu"]) == 0
    assert "lr: the run has" in fails(capsys, "pretrain", "--out", pretrained, "--resume", "--lr", 0.5, "--cpu")
    assert "add --resume" in fails(capsys, "pretrain", *SMALL, "--out", pretrained)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--steps", "0"], "steps: expected at least 1"),
        (["--lr", "-1"], "lr: expected a positive number"),
        (["--batch-size", "15", "--accumulate", "2"], "batch_size: 15 does not divide"),
        (["--model", "resnet50"], "model: expected auto, small or one of convnext"),
        (["--mask-ratio", "1.5"], "ratio"),
        (["--image-size", "18"], "18x18"),
    ],
)
def test_bad_training_options_are_named_and_leave_nothing_behind(tmp_path, capsys, arguments, message):
    out = tmp_path / "run"
    assert message in fails(capsys, "pretrain", *SMALL, *arguments, "--out", out)
    assert not out.exists()


def test_truncated_picture_stops_training_before_it_starts(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((64, 64, 3), 40 * i, np.uint8)).save(tmp_path / "data" / name / f"{i}.jpg")
    bad = tmp_path / "data" / "dog" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    out = tmp_path / "run"
    line = fails(capsys, "finetune", "--data", tmp_path / "data", "--image-size", 32, "--out", out)
    assert "dog/1.jpg" in line and not out.exists()


class Hostile:
    def __reduce__(self):
        return print, ("code in a checkpoint ran",)


def test_hostile_and_damaged_checkpoints_are_refused(pretrained, tmp_path, capsys):
    hostile = tmp_path / "hostile.pth"
    torch.save({"model": Hostile()}, hostile)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Hostile()))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((pretrained / "model.safetensors").read_bytes()[:-100])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for path in (hostile, tmp_path / "plain.pkl", damaged, tmp_path / "empty.safetensors"):
        out = tmp_path / "out"
        assert path.name in fails(capsys, "convert", path, out, "--to", "timm")
        assert path.name in fails(capsys, "finetune", *SMALL, "--init", path, "--out", out)
        assert not out.exists()
        assert "ran" not in capsys.readouterr().out


def test_weights_for_another_command_are_refused(pretrained, diffusion, tmp_path, capsys):
    assert "train-dit" in fails(capsys, "sample", pretrained, "--out", tmp_path / "s.png")
    assert "pre-training" in fails(capsys, "reconstruct", diffusion, "--out", tmp_path / "r.png")
    assert "encoder" in fails(capsys, "finetune", *SMALL, "--init", diffusion, "--out", tmp_path / "f")
    assert "not found" in fails(capsys, "sample", tmp_path, "--out", tmp_path / "s.png")
    assert list(tmp_path.iterdir()) == []


def test_encoder_for_another_size_or_other_channels_is_refused(pretrained, tmp_path, capsys):
    save_file({"stages.0.0.dwconv.weight": torch.zeros(4, 1, 7, 7)}, tmp_path / "odd.safetensors")
    fails(capsys, "finetune", *SMALL, "--init", tmp_path / "odd.safetensors", "--out", tmp_path / "f")
    line = fails(capsys, "finetune", *SMALL, "--channels", 3, "--init", pretrained, "--out", tmp_path / "f")
    assert "channels" in line and not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--classes", "cat"], "got 'cat'"),
        (["--count", "0"], "count: expected at least 1"),
        (["--steps", "5000"], "steps: expected 1 to 1000"),
        (["--out", "samples.gif"], "ending in .png or .npz"),
    ],
)
def test_bad_sampling_options_are_named(diffusion, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, "sample", diffusion, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_convert_refuses_an_unknown_format_and_a_missing_folder(pretrained, tmp_path, capsys):
    assert "'onnx'" in fails(capsys, "convert", pretrained, tmp_path / "x.safetensors", "--to", "onnx")
    assert "folder" in fails(capsys, "convert", pretrained, tmp_path / "no" / "x", "--to", "timm", "--encoder-only")
    assert "decoder" in fails(capsys, "convert", pretrained, tmp_path / "x.safetensors", "--to", "timm")
    assert list(tmp_path.iterdir()) == []


def test_flops_agree_with_the_published_numbers(capsys):
    assert main(["flops", "convnext_tiny"]) == 0
    assert json.loads(capsys.readouterr().out)["gmacs"] == pytest.approx(4.46, abs=0.02)
    assert main(["flops", "DiT-XL/2"]) == 0
    assert json.loads(capsys.readouterr().out)["gmacs"] == pytest.approx(118.6, abs=0.1)
    assert main(["flops", "DiT"]) == 0
    table = json.loads(capsys.readouterr().out)["table"]
    found = {line.split()[0]: float(line.split()[1]) for line in table}
    paper = {"DiT-S/4": 1.41, "DiT-B/4": 5.56, "DiT-L/4": 19.70, "DiT-XL/4": 29.05}  # a little beside products, too
    assert len(found) == 12 and {name: found[name] for name in paper} == pytest.approx(paper, abs=0.011)
    assert main(["flops", "DiT-XL/2", "--conditioning", "cross_attention"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == pytest.approx(598.0e6, abs=5e4)
    assert "conditioning: expected one of" in fails(capsys, "flops", "DiT-S/2", "--conditioning", "film")
    assert "conditioning: expected none" in fails(capsys, "flops", "convnext_tiny", "--conditioning", "adaln")
    assert "expected one of" in fails(capsys, "flops", "resnet50")


def test_info_checks_every_operator(capsys, monkeypatch):
    from convdit import ops, selfcheck

    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in selfcheck.CHECKS) and "FAILED" not in text
    assert set(selfcheck.CHECKS) == set(ops.__all__) - {"neighbors"}
    right = ops.grn
    monkeypatch.setattr(ops, "grn", lambda x, weight, bias: right(x, weight, bias) * 1.001)
    assert main(["info"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_missing_package_is_named_with_the_cure(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    line = fails(capsys, "pretrain", *SMALL, "--out", tmp_path / "run")
    assert "accelerate" in line and "pip install 'convdit[train]'" in line
    assert not (tmp_path / "run").exists()


def test_quick_demo_writes_one_whole_page_and_keeps_its_stages(tmp_path, capsys, monkeypatch):
    from convdit.training import demo_dit

    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr(demo_dit, "train_dit", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["demo", "--quick", "--cpu", "--out", str(out)]) == 130
    assert not (out / "report.html").exists()
    before = (out / "runs" / "pretrain" / "model.safetensors").stat().st_mtime_ns
    assert main(["demo", "--quick", "--cpu", "--out", str(out)]) == 0
    assert (out / "runs" / "pretrain" / "model.safetensors").stat().st_mtime_ns == before
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8 and "http" not in page.split("</style>")[1]
    for words in ("linear probe", "random weights", "guidance 2", "uniform noise", "bit for bit"):
        assert words in page
    assert "other options" in fails(capsys, "demo", "--cpu", "--out", out)
