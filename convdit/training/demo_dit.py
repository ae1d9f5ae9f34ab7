"""Second half of the demo: a DiT trained, sampled, and judged by a classifier trained on real pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import data
from .evaluate import accuracy, frechet_distance, in_batches
from .finetune import finetune, load_classifier
from .options import DiTOptions, FinetuneOptions
from .pictures import grid, save_png
from .sample import PictureMaker
from .train_dit import train_dit

if TYPE_CHECKING:
    from .demo import DemoSettings, Stages

GUIDANCE = (1.0, 2.0)


def run(stages: Stages, settings: DemoSettings, splits: data.Splits, out: Path) -> dict[str, Any]:
    """The results of these stages, by name."""
    common = {**settings.common(splits.train.image_shape[1]), "seed": settings.seed}
    runs = out / "runs"
    results: dict[str, Any] = {}

    def stage_judge() -> dict[str, Any]:
        options = FinetuneOptions(**common, **settings.judge, init=str(runs / "pretrain"))
        return finetune(options, runs / "judge", resume=(runs / "judge").exists())[1]

    def stage_dit() -> dict[str, Any]:
        maker = train_dit(DiTOptions(**common, **settings.dit), runs / "dit", resume=(runs / "dit").exists())
        return {"parameters": sum(p.numel() for p in maker.dit.parameters())}

    results["judge"] = stages("judge", "classifier on all real labels, the judge", stage_judge)
    results["dit"] = stages("dit", "DiT training", stage_dit)
    results["samples"] = stages("samples", "sampling and judging", lambda: _judged(settings, splits, out))
    return results


def _judged(settings: DemoSettings, splits: data.Splits, out: Path) -> dict[str, Any]:
    """Class accuracy and Frechet distance of samples, held-out pictures and noise, by one measure."""
    maker = PictureMaker.load(out / "runs" / "dit", settings.cpu)
    classifier, normalise, classes = load_classifier(out / "runs" / "judge")
    assert classes is not None  # a run of ours has them
    labels = torch.arange(len(classes)).repeat_interleave(settings.samples)
    count = len(labels)

    def judge(pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (N, K) and features (N, C)."""
        dataset = data.MemoryDataset(pictures, torch.zeros(len(pictures)), classes)
        features, _ = in_batches(lambda x: classifier.forward_features(normalise(x)), dataset, torch.device("cpu"))
        with torch.no_grad():
            return classifier.head(features), features

    chosen = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))[:4000]
    real, _ = splits.train.batch(chosen)
    reference = judge(real)[1]
    kept = torch.randperm(len(splits.test), generator=torch.Generator().manual_seed(0))[:count]
    held_out, truth = splits.test.batch(kept)
    noise = torch.rand(count, *splits.test.image_shape, generator=torch.Generator().manual_seed(0))
    rows: dict[str, Any] = {}

    def measure(name: str, pictures: Tensor, wanted: Tensor) -> None:
        scores, features = judge(pictures)
        rows[name] = {
            "accuracy": accuracy(scores, wanted),
            "frechet": frechet_distance(features, reference),
            "pictures": len(pictures),
        }

    measure("held-out real pictures", held_out, truth)
    shown = torch.arange(len(classes))[:10]
    for guidance in GUIDANCE:
        pictures = maker.sample(labels, guidance, settings.sampling_steps, seed=settings.seed)
        measure(f"samples, guidance {guidance:g}", pictures, labels)
        by_class = pictures.unflatten(0, (len(classes), settings.samples))[shown, :10].flatten(0, 1)
        columns = min(10, settings.samples)
        save_png(
            out / f"samples-guidance-{guidance:g}.png",
            grid(by_class, columns, zoom=max(1, 48 // real.shape[-1])),
        )
    measure("uniform noise", noise, labels)
    by_class = torch.cat([splits.test.batch((splits.test.labels == c).nonzero().flatten()[:10])[0] for c in shown])
    save_png(out / "real.png", grid(by_class, 10, zoom=max(1, 48 // real.shape[-1])))
    return rows
