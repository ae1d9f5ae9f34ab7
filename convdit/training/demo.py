"""``convdit demo``: the whole mission on small real pictures, in stages that an interrupted run keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import data
from ..data.errors import require
from .common import open_data
from .options import DataOptions
from .stages import Stages, open_folder, small_size


def _settings(**values: Any) -> Any:
    return field(default_factory=lambda: dict(values))


@dataclass
class DemoSettings:
    """What the demo does, and how long. The defaults take about six minutes on two cores."""

    data: str = "mnist5k"
    seed: int = 0
    cpu: bool = False
    labels: int = 100
    repeats: int = 2
    # Digits have flat patches, whose deviation is no scale to normalise by.
    pretrain: dict[str, Any] = _settings(steps=900, lr=1.5e-3, norm_pix_loss=False, decoder_dim=64)
    # Patches of 8 pixels: smaller ones are filled in from their neighbours, which teaches little.
    convnext: dict[str, Any] = _settings(depths=[1, 1, 6], dims=[32, 64, 128], stem_stride=2)
    finetune: dict[str, Any] = _settings(steps=100, batch_size=50)
    judge: dict[str, Any] = _settings(steps=300, lr=2e-3)
    dit: dict[str, Any] = _settings(
        steps=2400,
        batch_size=32,
        lr=3e-3,
        min_lr=3e-5,
        warmup=120,
        beta2=0.95,
        ema=0.999,
        num_heads=2,
        label_init_std=1.0,  # a short run must be told the class loudly
        learn_sigma=False,
        latent=True,
        autoencoder_steps=400,
    )
    held_out: int = 1000  # at most, so that a large set takes no longer
    samples: int = 50  # a class, for the figures of merit
    sampling_steps: int = 50
    timing_rounds: int = 7

    def common(self, image_size: int) -> dict[str, Any]:
        """The options that every training of the demo shares."""
        return {"data": self.data, "image_size": image_size, "held_out": self.held_out, "cpu": self.cpu}

    @classmethod
    def quick(cls) -> DemoSettings:
        """Under a minute, on digits: shows that everything runs, not how good it gets."""
        return cls(
            data="digits",
            pretrain={"steps": 60, "lr": 1.5e-3, "norm_pix_loss": False, "batch_size": 32},
            convnext={"depths": [1, 1, 2], "dims": [16, 32, 64], "stem_stride": 1},
            finetune={"steps": 20, "batch_size": 50},
            judge={"steps": 60, "lr": 2e-3},
            dit={
                "steps": 100,
                "lr": 3e-3,
                "min_lr": 3e-5,
                "warmup": 5,
                "beta2": 0.95,
                "clip_grad": 1.0,
                "ema": 0.999,
                "label_init_std": 0.3,
                "learn_sigma": False,
                "latent": True,
                "autoencoder_steps": 60,
            },
            held_out=500,
            samples=10,
            sampling_steps=10,
            timing_rounds=3,
        )


def demo(
    out: str | Path,
    data: str | None = None,
    quick: bool = False,
    seed: int = 0,
    cpu: bool = False,
    settings: DemoSettings | None = None,
) -> int:
    """Runs every stage and writes ``out/report.html``; goes on where an earlier call with ``out`` stopped."""
    for module, package in (
        ("matplotlib", None),
        ("PIL", "pillow"),
        ("accelerate", None),
        ("tqdm", None),
    ):
        require(module, "the demo", package)
    settings = settings or (DemoSettings.quick() if quick else DemoSettings())
    settings.seed, settings.cpu = seed, cpu
    settings.data = data or settings.data
    splits = _open(settings)
    out = open_folder(Path(out), asdict(settings), "demo")

    from . import demo_dit, demo_fcmae
    from .report import write_report

    stages = Stages(out)
    results = demo_fcmae.run(stages, settings, splits, out) | demo_dit.run(stages, settings, splits, out)
    report = write_report(out / "report.html", settings, splits, results, stages.times)
    total = sum(seconds["wall"] for seconds in stages.times.values())
    print(f"all stages: {total:.0f} s\nreport: {report}")
    return 0


def _open(settings: DemoSettings) -> data.Splits:
    splits = open_data(DataOptions(settings.data, small_size(settings.data), held_out=settings.held_out))
    classes = len(splits.train.classes)
    settings.labels = max(settings.labels, classes)
    if settings.labels > len(splits.train):
        raise ValueError(f"data: the demo needs at least {settings.labels} training pictures, got {len(splits.train)}")
    return splits
