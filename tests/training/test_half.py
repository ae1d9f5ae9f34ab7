"""Training that saves memory: half precision with a scaled loss, also on the CPU, and blocks computed once more."""

import pytest
import torch
from safetensors.torch import load_file

from convdit.cli import main
from convdit.nn import stage
from convdit.training import engine, runs
from convdit.training.finetune import finetune
from convdit.training.options import DiTOptions, FinetuneOptions, PretrainOptions
from convdit.training.pretrain import pretrain
from convdit.training.runs import read_log

TINY = dict(data="digits", depths=[1, 1], dims=[8, 16], stem_stride=2, batch_size=16, cpu=True)
TASKS = {"pretrain": (pretrain, PretrainOptions), "finetune": (finetune, FinetuneOptions)}


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def overflow_at(patch, steps, stop_at=None):
    """Multiplies the loss of these steps by 1e30: too much for float16, whatever its scale above 1e-4."""
    original, calls = engine._Trainer._micro_step, []

    def step(self, images, labels, totals):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        objective, factor = self.objective, 1e30 if len(calls) in steps else 1
        self.objective = lambda *arguments: {k: v * factor for k, v in objective(*arguments).items()}
        original(self, images, labels, totals)
        self.objective = objective

    patch.setattr(engine._Trainer, "_micro_step", step)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("task", TASKS)
def test_half_precision_learns_as_float32_does(tmp_path, task, precision):
    run, options = TASKS[task]
    losses = {}
    for name in ("no", precision):
        run(options(**TINY, steps=40, lr=5e-3, log_every=10, mixed_precision=name), tmp_path / name)
        losses[name] = [entry["loss"] for entry in read_log(tmp_path / name) if "loss" in entry]
    assert losses[precision][-1] < 0.95 * losses[precision][0]
    assert losses[precision] == pytest.approx(losses["no"], rel=0.03)  # float16 may skip its first step
    assert not same(weights(tmp_path / "no"), weights(tmp_path / precision)), "it was computed in float32"
    scales = [entry["scale"] for entry in read_log(tmp_path / precision) if "scale" in entry]
    assert len(scales) == (4 if precision == "fp16" else 0)


def test_a_float16_step_that_overflows_is_skipped_and_the_run_goes_on(tmp_path, monkeypatch):
    options = dict(steps=6, save_every=1, log_every=1, mixed_precision="fp16")
    kept = {}
    save = runs.Run.save_checkpoint

    def keep(self, step, write, wait):
        save(self, step, write, wait)
        kept[step] = weights(self.path / "checkpoints" / f"step-{step:08d}")

    monkeypatch.setattr(runs.Run, "save_checkpoint", keep)
    overflow_at(monkeypatch, {3})
    pretrain(PretrainOptions(**TINY, **options), tmp_path / "run")
    assert [same(kept[step], kept[step + 1]) for step in range(1, 6)] == [False, True, False, False, False]
    scales = [entry["scale"] for entry in read_log(tmp_path / "run")]
    assert scales[2:] == [scales[1] / 2] * 4
    rates = [entry["lr"] for entry in read_log(tmp_path / "run")]
    assert rates[2] == rates[1] > rates[3], "a skipped step is none of the schedule's"
    assert all(value.isfinite().all() for value in kept[6].values())


def test_a_resumed_float16_run_keeps_the_scale_of_the_loss(tmp_path, monkeypatch):
    options = PretrainOptions(**TINY, steps=8, save_every=4, log_every=1, mixed_precision="fp16")
    with monkeypatch.context() as patch:
        overflow_at(patch, {2})
        pretrain(options, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        overflow_at(patch, {2}, stop_at=7)
        pretrain(options, tmp_path / "cut")
    pretrain(options, tmp_path / "cut", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    scales = [[entry["scale"] for entry in read_log(tmp_path / name)] for name in ("whole", "cut")]
    assert scales[0] == scales[1] and scales[0][-1] == 2**15


def test_a_float16_run_that_skips_every_step_ends_and_says_why(tmp_path, monkeypatch):
    overflow_at(monkeypatch, range(1000))
    with pytest.raises(engine.TrainingError, match=r"still leave float16's range; try --mixed-precision bf16"):
        pretrain(PretrainOptions(**TINY, steps=100, log_every=1, mixed_precision="fp16"), tmp_path / "run")
    assert read_log(tmp_path / "run")[-1]["step"] == 29


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_gradient_checkpointing_is_an_option_and_changes_no_bit(tmp_path, monkeypatch, command):
    calls, original = [], stage.checkpoint

    def counting(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(stage, "checkpoint", counting)
    small = [command, *"--data digits --depths 1 1 --dims 8 16 --stem-stride 2 --batch-size 16 --steps 3 --cpu".split()]
    small += ["--drop-path", "0.2"] if command == "finetune" else []
    assert main([*small, "--out", str(tmp_path / "plain")]) == 0 and not calls
    assert main([*small, "--grad-checkpointing", "--out", str(tmp_path / "again")]) == 0
    assert len(calls) == 3 * (3 if command == "pretrain" else 2), "steps times blocks, the decoder's too"
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "again"))
    assert main([command, "--cpu", "--out", str(tmp_path / "again"), "--resume", "--no-grad-checkpointing"]) == 0


def test_a_model_without_blocks_refuses_gradient_checkpointing():
    with pytest.raises(ValueError, match="grad_checkpointing: expected off for unet"):
        DiTOptions(model="unet", grad_checkpointing=True).check()
