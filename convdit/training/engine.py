"""The one training loop. Devices, processes, precision and accumulation are accelerate's."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..data import ImageDataset
from ..data.errors import require
from .interrupts import Interrupted, StopSignals
from .optim import adamw, moving_average, warmup_cosine
from .options import LoopOptions
from .order import BatchOrder, batches
from .runs import Run, read_json, write_json

# The model of the run, perhaps in a wrapper of accelerate's:
Objective = Callable[[Any, Tensor, Tensor], dict[str, Tensor]]
Evaluation = Callable[[Any], dict[str, float]]
Model = TypeVar("Model", bound=nn.Module)


_LEAST_SCALE = 1e-4  # of the loss in float16: 30 steps skipped one after another, from the scale it starts with


class TrainingError(RuntimeError):
    """Training went wrong in a way that going on would not mend."""


def start(options: LoopOptions):
    """The accelerator of these options. Call it before anything else of a run; it names bad settings."""
    accelerate = require("accelerate", "training")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    options.check(world)
    # What an earlier run in this process chose would else be kept, its precision in silence.
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(
        cpu=options.cpu or not torch.accelerator.is_available(),  # else torchrun's processes would each train alone
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.accumulate,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # There accelerate leaves float16 out, and says nothing.
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    accelerate.utils.set_seed(options.seed)  # the same initial weights in every process
    return accelerator


def train(
    accelerator,
    model: Model,
    objective: Objective,
    dataset: ImageDataset,
    options: LoopOptions,
    run: Run,
    evaluate: Evaluation | None = None,
    rate: Callable[[str], float] | None = None,
    show: Callable[[int, Any], None] | None = None,
    speed: Callable[[float], dict[str, float]] | None = None,
) -> Model:
    """Trains ``model`` to the end of ``options.steps``, from the run's last checkpoint if there is one.

    ``objective(model, images, labels)`` gives scalars to log, the one named "loss" to minimise; a pair (2,) is a
    weighted sum and its weight, logged as the mean over all that the line stands for, or not where there is none.
    ``evaluate(model)`` gives figures of the model in evaluation mode; it is called every ``options.evaluate_every``
    steps and after the last. They are logged, those of the moving average with ``ema_`` before their names, and the
    last ones stay in ``run.evaluation``. It must leave the global random state alone.
    ``rate(name)`` is the factor of the learning rate of a parameter.
    ``show(step, model)`` is called in the main process every ``options.evaluate_every`` steps and after the last, with
    the moving average if there is one, and must leave the global random state alone, too.
    ``speed(images_per_s)`` gives further figures of throughput for the log.
    Returns the moving average where ``options.ema`` is above 0, else the model, in evaluation mode.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the checkpoint of the last step is written.
        TrainingError: the loss stopped being finite, or under float16 the gradients did at any scale of the loss.
    """
    options = options.resolved(len(dataset))
    if options.grad_checkpointing:
        cast(Any, model).set_grad_checkpointing()
    trainer = _Trainer(accelerator, model, objective, options, run, evaluate, rate, show, speed)
    done = trainer.resume()
    if done < options.steps:
        model.train()
        trainer.loop(dataset, done)
    return cast(Model, trainer.result())  # the same object, or its average


class _Trainer:
    def __init__(self, accelerator, model, objective, options, run, evaluate, rate, show, speed):
        self.accelerator, self.objective, self.evaluate = accelerator, objective, evaluate
        self.show, self.speed = show, speed
        self.options, self.run = options, run
        # Copied before accelerate wraps the forward of the model for mixed precision.
        self.ema = moving_average(model, options.ema).to(accelerator.device) if options.ema else None
        optimizer = adamw(model, options.lr, options.weight_decay, options.beta2, rate)
        self.schedule = warmup_cosine(optimizer, options.warmup, options.steps, options.min_lr / options.lr)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.seconds = 0.0

    def resume(self) -> int:
        """Loads the last checkpoint, if any; the number of steps done."""
        found = self.run.checkpoints()
        if not found:
            require("accelerate", "training").utils.set_seed(self.options.seed, device_specific=True)
            self.run.trim_log(0)
            return 0
        step, folder = found[-1]
        state = read_json(folder / "trainer.json")
        self.accelerator.load_state(str(folder))
        self.schedule.load_state_dict(state["schedule"])
        self.seconds, self.run.evaluation = state["seconds"], state.get("evaluation", {})
        if self.ema:
            load_file = require("safetensors.torch", "loading weights").load_file
            self.ema.load_state_dict(load_file(folder / "ema.safetensors"))
        self.run.trim_log(step)
        return step

    def save(self, step: int) -> None:
        def write(folder: Path) -> None:
            self.accelerator.save_state(str(folder))
            if self.accelerator.is_main_process:
                state = {"schedule": self.schedule.state_dict(), "seconds": self.seconds}
                state["evaluation"] = self.run.evaluation
                write_json(folder / "trainer.json", state)
                if self.ema:
                    save_file = require("safetensors.torch", "saving weights").save_file
                    save_file(self.ema.state_dict(), folder / "ema.safetensors")

        self.run.save_checkpoint(step, write, self.accelerator.wait_for_everyone)

    def loop(self, dataset: ImageDataset, done: int) -> None:
        options, accelerator = self.options, self.accelerator
        share, world = options.accumulate, accelerator.num_processes
        order = BatchOrder(
            len(dataset),
            options.batch_size // share,
            options.seed,
            done * share,
            options.steps * share,
            accelerator.process_index,
            world,
        )
        stream = iter(batches(dataset, order, options.workers))
        totals: dict[str, Tensor] = {}
        since, began = done, time.perf_counter()
        bar = self._bar(done)
        with StopSignals() as signals, bar:
            for step in range(done + 1, options.steps + 1):
                for _ in range(share):
                    images, labels = next(stream)
                    self._micro_step(images, labels, totals)
                bar.update(options.batch_size)
                saving = step % options.save_every == 0 or step == options.steps
                every = options.evaluate_every
                evaluating = step == options.steps or (every and step % every == 0)
                evaluating = evaluating and (self.evaluate or self.show)
                logging = step % options.log_every == 0 or evaluating
                stopping = self._stop(signals, world, step % options.log_every == 0)
                if saving or logging or stopping:
                    now = time.perf_counter()
                    self.seconds += now - began
                    rate = (step - since) * options.batch_size / (now - began)
                    values = self._log(step, totals, (step - since) * share, rate)
                    shown = {k: f"{v:.4g}" for k, v in values.items() if totals[k].ndim == 0}
                    bar.set_postfix(shown, refresh=False)
                    totals, since, began = {}, step, time.perf_counter()
                if evaluating:
                    self._evaluate(step)
                if saving or stopping:
                    self.save(step)
                if evaluating or saving or stopping:
                    self.seconds += time.perf_counter() - began
                    began = time.perf_counter()
                if stopping and step < options.steps:
                    raise Interrupted(
                        f"stopped after step {step} of {options.steps}; continue with --resume",
                        128 + stopping,
                    )

    def _micro_step(self, images: Tensor, labels: Tensor, totals: dict[str, Tensor]) -> None:
        accelerator, device = self.accelerator, self.accelerator.device
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with accelerator.accumulate(self.model):
            losses = self.objective(self.model, images, labels)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients and self.options.clip_grad:
                accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients and not self.optimizer.step_was_skipped:  # float16 overflowed
            self.schedule.step()
            if self.ema:
                self.ema.update_parameters(accelerator.unwrap_model(self.model))
        for name, value in losses.items():
            value = value.detach()
            totals[name] = totals[name] + value if name in totals else value

    def _evaluate(self, step: int) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if self.show and self.accelerator.is_main_process:
            self.show(step, (self.ema.module if self.ema else model).eval())
            model.train()
        if not self.evaluate:
            return
        figures = dict(self.evaluate(model.eval()))
        model.train()
        if self.ema:
            figures |= {f"ema_{name}": value for name, value in self.evaluate(self.ema.module.eval()).items()}
        self.run.evaluation = figures
        self.run.log({"step": step, **figures})

    def _stop(self, signals: StopSignals, world: int, meeting: bool) -> int:
        """The signal received, or 0. Several processes agree on it where they meet to log."""
        if world == 1:
            return signals.received
        if not meeting:
            return 0
        received = torch.tensor(signals.received, device=self.accelerator.device)
        return int(self.accelerator.gather(received).max())

    def _log(self, step: int, totals: dict, count: int, rate: float) -> dict[str, float]:
        means = {name: self.accelerator.reduce(total / count, "mean").tolist() for name, total in totals.items()}
        pairs = {name: mean for name, mean in means.items() if isinstance(mean, list)}
        values = {name: mean for name, mean in means.items() if name not in pairs}
        values |= {name: sum_ / weight for name, (sum_, weight) in pairs.items() if weight > 0}
        if not all(math.isfinite(value) for value in values.values()):
            raise TrainingError(
                f"step {step}: the loss is not finite ({values}); try a lower --lr. "
                f"The last checkpoint in {self.run.path} is from before that"
            )
        entry = {"step": step, **values, "lr": max(self.schedule.get_last_lr())}
        if self.accelerator.scaler is not None:
            entry["scale"] = self.accelerator.scaler.get_scale()
            if entry["scale"] < _LEAST_SCALE:
                raise TrainingError(
                    f"step {step}: at a loss scaled by {entry['scale']:g}, gradients still leave float16's range; try "
                    f"--mixed-precision bf16 or a lower --lr. The last checkpoint is in {self.run.path}"
                )
        entry |= {"seconds": round(self.seconds, 3), "images_per_s": round(rate, 1)}
        if self.speed:
            entry |= self.speed(rate)
        self.run.log(entry)
        return values

    def _bar(self, done: int):
        tqdm = require("tqdm", "training").tqdm
        return tqdm(
            desc=self.run.path.name,
            total=self.options.steps * self.options.batch_size,
            initial=done * self.options.batch_size,
            unit="img",
            unit_scale=True,
            disable=not self.accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )

    def result(self) -> nn.Module:
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.ema:
            model.load_state_dict(self.ema.module.state_dict())
        self.accelerator.free_memory()
        return model.eval()
