"""An interrupted run that resumes is the run that was never interrupted, bit for bit."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from convdit.training import engine, runs
from convdit.training.interrupts import Interrupted
from convdit.training.options import DiTOptions, FinetuneOptions, PretrainOptions
from convdit.training.pretrain import pretrain
from convdit.training.runs import RunError, read_log
from convdit.training.train_dit import train_dit

TINY = dict(data="digits", depths=[1, 1], dims=[8, 16], stem_stride=2, batch_size=16, cpu=True)
LOOP = dict(steps=7, save_every=3, log_every=2)


def tiny_pretrain(**changes):
    return PretrainOptions(**{**TINY, **LOOP, "augment": "shift", "ema": 0.9, **changes})


def tiny_dit(**changes):
    return DiTOptions(
        **{
            **LOOP,
            "data": "digits",
            "hidden_size": 16,
            "depth": 1,
            "num_heads": 2,
            "cpu": True,
            **changes,
        }
    )


def stop_after(monkeypatch, steps):
    """Makes the process fail, as if killed, in the middle of the step after ``steps``."""
    original, calls = engine._Trainer._micro_step, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) > steps:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(engine._Trainer, "_micro_step", failing)


def without_times(log):
    return [{k: v for k, v in entry.items() if k not in ("seconds", "images_per_s", "tflops", "mfu")} for entry in log]


@pytest.mark.parametrize(
    "command, options",
    [(pretrain, tiny_pretrain()), (train_dit, tiny_dit())],
    ids=["pretrain", "dit"],
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path, monkeypatch, command, options):
    command(options, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 5)
        command(options, tmp_path / "cut")
    assert [step for step, _ in runs.Run(tmp_path / "cut", {}, main=False).checkpoints()] == [3]
    command(options, tmp_path / "cut", resume=True)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert without_times(read_log(tmp_path / "whole")) == without_times(read_log(tmp_path / "cut"))


def test_run_interrupted_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        pretrain(tiny_pretrain(), tmp_path / "cut")
    pretrain(tiny_pretrain(), tmp_path / "cut", resume=True)
    pretrain(tiny_pretrain(), tmp_path / "whole")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_failing_save_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    original = engine.write_json

    def failing(path, value):
        if "step-00000006" in str(path):
            raise OSError("disk full")
        original(path, value)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(engine, "write_json", failing)
        pretrain(tiny_pretrain(), tmp_path / "run")
    run = runs.Run(tmp_path / "run", {}, main=False)
    assert [step for step, _ in run.checkpoints()] == [3]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    pretrain(tiny_pretrain(), tmp_path / "run", resume=True)
    assert [step for step, _ in run.checkpoints()] == [7]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_write_whole_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError):
        runs.write_whole(path, half)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_resume_needs_the_same_options_and_a_run(tmp_path):
    pretrain(tiny_pretrain(steps=1), tmp_path / "run")
    with pytest.raises(RunError, match="holds a run already: add --resume"):
        pretrain(tiny_pretrain(steps=1), tmp_path / "run")
    with pytest.raises(RunError, match="lr: the run has 0.001, asked for 0.002"):
        pretrain(tiny_pretrain(steps=1, lr=2e-3), tmp_path / "run", resume=True)
    with pytest.raises(RunError, match="no run to resume"):
        pretrain(tiny_pretrain(steps=1), tmp_path / "nothing", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("")
    with pytest.raises(RunError, match="not the folder of a run"):
        pretrain(tiny_pretrain(steps=1), tmp_path / "other")


def test_sigterm_saves_and_ends_with_143_and_the_run_resumes(tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "convdit",
        "pretrain",
        "--data",
        "digits",
        "--cpu",
        "--out",
        str(out),
    ]
    command += "--depths 1 1 --dims 8 16 --stem-stride 2 --batch-size 16 --log-every 1 --steps 2000".split()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (out / "log.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "continue with --resume" in errors and "Traceback" not in errors
    (step, folder), *older = runs.Run(out, {}, main=False).checkpoints()
    assert not older and (folder / "trainer.json").exists()
    assert read_log(out)[-1]["step"] == step < 2000


EVERYTHING = dict(
    data="digits",
    depths=[1, 1],
    dims=[8, 16],
    stem_stride=2,
    batch_size=16,
    steps=40,
    save_every=4,
    cpu=True,
    augment="resized_crop",
    randaug="rand-m9-mstd0.5-inc1",
    random_erasing=0.25,
    mixup=0.8,
    cutmix=1.0,
    drop_path=0.1,
    ema=0.99,
    layer_decay=0.9,
    evaluate_every=7,
)


def killed(out, after):
    """The command as a process of its own, killed with SIGKILL once the log shows step ``after``; its checkpoints."""
    command = [sys.executable, "-m", "convdit", "finetune", "--out", str(out), "--log-every", "1"]
    for name, value in EVERYTHING.items():
        flag = "--" + name.replace("_", "-")
        values = [] if value is True else map(str, value if isinstance(value, list) else [value])
        command += [flag, *values]
    with subprocess.Popen(command + ["--resume"] * out.exists(), stderr=subprocess.DEVNULL) as process:
        deadline, log = time.monotonic() + 120, out / "log.jsonl"
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and any(entry["step"] >= after for entry in read_log(out)):
                break
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    return [step for step, _ in runs.Run(out, {}, main=False).checkpoints()]


def test_run_killed_twice_loses_at_most_the_interval_and_ends_bit_equal(tmp_path):
    from convdit.training.finetune import finetune

    finetune(FinetuneOptions(**EVERYTHING, log_every=1), tmp_path / "whole")
    for after in (6, 19):
        last = killed(tmp_path / "cut", after)[-1]
        assert read_log(tmp_path / "cut")[-1]["step"] - last <= EVERYTHING["save_every"] and last % 4 == 0
    finetune(FinetuneOptions(**EVERYTHING, log_every=1), tmp_path / "cut", resume=True)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert without_times(read_log(tmp_path / "whole")) == without_times(read_log(tmp_path / "cut"))
    assert json.loads((tmp_path / "whole" / "result.json").read_text()).keys() >= {"accuracy", "raw_accuracy"}
    assert not list((tmp_path / "cut").rglob("*.tmp"))


@pytest.mark.parametrize("left", ["nothing", "config"])
def test_run_killed_while_its_folder_is_made_can_be_started_again(tmp_path, left):
    (tmp_path / "run").mkdir()
    if left == "config":
        (tmp_path / "run" / ".config.json.123.tmp").write_text("{")
    pretrain(tiny_pretrain(steps=1), tmp_path / "run", resume=True)
    assert not list((tmp_path / "run").glob("*.tmp")) and runs.Run(tmp_path / "run", {}, main=False).finished


def test_infinite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    original, calls = engine._Trainer._micro_step, []

    def diverging(self, images, labels, totals):
        calls.append(1)
        original(self, images * (float("inf") if len(calls) == 5 else 1), labels, totals)

    monkeypatch.setattr(engine._Trainer, "_micro_step", diverging)
    with pytest.raises(engine.TrainingError, match="not finite"):
        pretrain(tiny_pretrain(), tmp_path / "run")
    assert [s for s, _ in runs.Run(tmp_path / "run", {}, main=False).checkpoints()] == [3]


def test_accumulation_over_parts_is_one_step_on_the_whole_batch(tmp_path):
    from convdit.training.finetune import finetune

    def weights(accumulate):
        options = FinetuneOptions(**TINY, steps=3, augment="none", accumulate=accumulate)
        finetune(options, tmp_path / str(accumulate))
        return load_file(tmp_path / str(accumulate) / "model.safetensors")

    one, four = weights(1), weights(4)
    for name in one:
        torch.testing.assert_close(four[name], one[name], rtol=0, atol=2e-4)


def test_stop_between_checkpoints_raises_interrupted_with_the_signal_s_status(tmp_path, monkeypatch):
    monkeypatch.setattr(engine._Trainer, "_stop", lambda self, *_: signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        pretrain(tiny_pretrain(), tmp_path / "run")
    assert caught.value.status == 130
    assert json.loads((tmp_path / "run" / "config.json").read_text())["task"] == "pretrain"


def test_two_processes_train_together_and_resume(tmp_path):
    options = "--data digits --hidden-size 16 --depth 1 --num-heads 2 --batch-size 16 --save-every 2 --steps 4 --cpu"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "convdit", "train-dit", *options.split(), "--out", str(tmp_path / "run")]
    for extra in ([], ["--resume"]):
        done = subprocess.run(command + extra, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [2, 4]
    (_, folder), *_ = runs.Run(tmp_path / "run", {}, main=False).checkpoints()
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= {p.name for p in folder.iterdir()}
