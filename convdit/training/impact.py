"""``convdit impact``: what FCMAE pre-training is worth to ConvNeXt V1 and V2, at equal compute too."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..flops import flops
from . import build
from .collapse import PRETRAIN
from .common import open_data
from .finetune import finetune
from .options import DataOptions, FinetuneOptions, ImpactOptions, PretrainOptions
from .plots import bars
from .pretrain import pretrain
from .report import machine, mean, note, table, times_table, write_page
from .runs import read_json
from .stages import Stages, open_folder, small_size

VERSIONS = {"V1": "convnext_atto", "V2": "convnextv2_atto"}
WAYS = {
    "supervised": "supervised",
    "equal": "supervised, equal total compute",
    "fcmae": "FCMAE, then fine-tuned",
}
# Small enough for minutes on a CPU; patches of 8 pixels.
ENCODER: dict[str, Any] = {"depths": [1, 1, 4], "dims": [32, 64, 128], "stem_stride": 2}
_BATCH = {"pretrain": 64, "finetune": 50}


def equal_steps(pretrain_macs: int, classify_macs: int, options: ImpactOptions) -> int:
    """Steps of a supervised run that cost what pre-training and fine-tuning cost together.

    Multiply-adds of the forward pass of a picture stand for those of a step: backward is twice forward in both.
    """
    pretraining = options.pretrain_steps * _BATCH["pretrain"] * pretrain_macs
    return options.finetune_steps + round(pretraining / (_BATCH["finetune"] * classify_macs))


def impact(options: ImpactOptions, out: str | Path) -> dict[str, Any]:
    """Runs everything, writes ``out/report.html``, goes on where an earlier call was stopped.

    Returns accuracies by version and way, one a seed, and under "verdict" what they say.
    """
    options.check()
    size = small_size(options.data)
    splits = open_data(DataOptions(options.data, size))
    labels = min(options.labels, len(splits.train))
    if labels < len(splits.train.classes):
        raise ValueError(f"labels: expected at least one a class, {len(splits.train.classes)}, got {labels}")
    out = open_folder(Path(out), asdict(options), "impact")
    stages = Stages(out)
    results: dict[str, Any] = {}
    common: dict[str, Any] = {"data": options.data, "image_size": size, "cpu": options.cpu}
    for version, model in VERSIONS.items():
        trained = out / "runs" / f"{version}-pretrain"

        def stage_pretrain(model: str = model, trained: Path = trained) -> dict[str, Any]:
            settings = PretrainOptions(
                **common,
                **ENCODER,
                **PRETRAIN,
                model=model,
                seed=options.seed,
                steps=options.pretrain_steps,
                batch_size=_BATCH["pretrain"],
            )
            trained.mkdir(parents=True, exist_ok=True)
            pretrain(settings, trained, True)
            config = read_json(trained / "config.json")["model"]
            images = torch.zeros(1, *splits.train.image_shape)
            classifier = build.classifier(config["encoder"], len(splits.train.classes))
            return {"pretrain": flops(build.fcmae(config), images).macs, "classify": flops(classifier, images).macs}

        macs = stages(f"{version}-pretrain", f"FCMAE of ConvNeXt {version}", stage_pretrain)
        steps = dict.fromkeys(WAYS, options.finetune_steps)
        steps["equal"] = equal_steps(macs["pretrain"], macs["classify"], options)
        results[version] = {"steps": steps, "macs": macs}
        for way, title in WAYS.items():

            def stage_train(way: str = way, model: str = model, steps=steps, trained=trained) -> list[float]:
                found = []
                for seed in range(options.seed, options.seed + options.repeats):
                    settings = FinetuneOptions(
                        **common,
                        **ENCODER,
                        model=model,
                        batch_size=_BATCH["finetune"],
                        steps=steps[way],
                        init=str(trained) if way == "fcmae" else None,
                        labels=labels,
                        label_seed=seed,
                        seed=seed,
                        log_every=5,
                    )
                    place = trained.with_name(f"{model}-{way}-{seed}")
                    place.mkdir(parents=True, exist_ok=True)
                    found.append(finetune(settings, place, True)[1]["accuracy"])
                return found

            results[version][way] = stages(f"{version}-{way}", f"ConvNeXt {version}, {title}", stage_train)
    results["verdict"] = verdict(results)
    for line in _lines(results):
        print("  ".join(line))
    print("\n".join(results["verdict"]))
    print(f"report: {_write(out, options, labels, len(splits.train), len(splits.test), results, stages)}")
    return results


def verdict(results: dict[str, Any]) -> list[str]:
    """Plain sentences: whether the talk's findings show, clearly only where every seed agrees."""
    sentences, gains, sure = [], {}, ""
    for version in VERSIONS:
        found = results[version]
        for way, text in (("supervised", "the same supervised run"), ("equal", "supervised at equal total compute")):
            gain = mean(found["fcmae"]) - mean(found[way])
            clear = min(found["fcmae"]) > max(found[way]) or max(found["fcmae"]) < min(found[way])
            says = "better than" if gain > 0 else "NOT better than"
            sure = "" if clear and len(found[way]) > 1 else " (not clear: the seeds overlap, or there is one)"
            sentences.append(f"{version}: FCMAE is {says} {text}, by {100 * gain:+.1f} points{sure}.")
            gains[version] = gain  # of the last, equal compute
    shows = "DOES NOT SHOW at this scale"
    if gains["V2"] > max(gains["V1"], 0):
        shows = "IS NOT CLEAR: it shows in the means, but the seeds overlap, or there is one" if sure else "shows"
    sentences.append(
        f"The talk's finding, that pre-training pays for V2 and more than for V1, {shows}: "
        f"gain over equal compute {100 * gains['V2']:+.1f} points for V2, {100 * gains['V1']:+.1f} for V1."
    )
    return sentences


def _lines(results: dict[str, Any]) -> list[list[str]]:
    rows = []
    for version in VERSIONS:
        for way, title in WAYS.items():
            values = results[version][way]
            seeds = ", ".join(f"{value:.3f}" for value in values)
            steps = results[version]["steps"][way]
            rows.append([f"ConvNeXt {version}", title, str(steps), seeds, f"{mean(values):.3f}"])
    return rows


def _write(
    out: Path, options: ImpactOptions, labels: int, train: int, test: int, results: dict[str, Any], stages: Stages
) -> Path:
    chart = {f"{version}\n{way}": results[version][way] for version in VERSIONS for way in WAYS}
    compute = results["V2"]["macs"]
    parts = [
        "<h1>What pre-training is worth</h1>",
        f"<p>ConvNeXt V1 and V2 of the same size on {Path(options.data).name}, {labels} labels, judged on {test} "
        f"held-out pictures. FCMAE saw all {train} training pictures, without labels, for {options.pretrain_steps} "
        "steps.</p>",
        machine(stages.times, options.cpu),
        "<ul>" + "".join(f"<li>{sentence}</li>" for sentence in results["verdict"]) + "</ul>",
        table(["", "training", "supervised steps", "held-out accuracy, by seed", "mean"], _lines(results)),
        bars(chart, "held-out accuracy"),
        note(
            "Equal total compute: the supervised run has as many more steps as pre-training cost, counted in "
            f"multiply-adds (V2: {compute['pretrain'] / 1e6:.1f} M a picture in FCMAE, whose encoder computes the "
            f"visible sites alone, {compute['classify'] / 1e6:.1f} M in classification). A dot is a seed: other "
            "labels and, from scratch, other weights; there is one pre-training a version. The talk's table is of "
            "ImageNet with all labels, models from 3.7 to 660 M parameters and hundreds of epochs. Here labels are "
            "few, pictures small and runs short; all runs share one learning rate. What shows here need not show "
            "there, nor the other way round."
        ),
        times_table(stages.times),
    ]
    return write_page(out / "report.html", "convdit impact", parts)
