"""``convdit scaling``: the talk's "compute is all that matters", small, on real handwritten digits, on a CPU."""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.errors import require
from ..flops import flops
from . import build, quality
from .demo import Stages
from .finetune import finetune
from .options import CONDITIONINGS, DiTOptions, FinetuneOptions
from .runs import RunError, read_json, write_json, write_whole
from .sample import PictureMaker
from .train_dit import train_dit

SIDE = 8  # of the pictures, as scikit-learn has them
CAPTION = (
    "Digits of scikit-learn, 8x8 pixels, no autoencoder. Every network: the same steps, batch, learning rate, one "
    "seed. That setting was chosen after trial runs; no network was tuned on its own. Quality is the Fréchet distance "
    "of {samples} DDIM samples, without guidance, to {real} training pictures, in features of a ConvNeXt V2 trained "
    "on the same digits (right about {accuracy:.1%} of held-out ones): it compares points of this plot with each "
    "other, not with published FIDs, and {samples} samples bias it upwards. Gflops are multiply-adds of one forward "
    "of one picture, as in the paper. So small a grid with one seed suggests a trend, or none; it proves nothing."
)


def _settings(**values: Any) -> Any:
    return field(default_factory=lambda: dict(values))


@dataclass
class ScalingSettings:
    """What is trained, and how long."""

    seed: int = 0
    sizes: dict[str, Any] = _settings(XS=(32, 2), S=(64, 3), M=(96, 3))  # width and blocks
    patches: tuple[int, ...] = (4, 2, 1)
    designs: tuple[str, int] = ("S", 2)  # size and patch of the comparison of block designs
    unets: tuple[int, ...] = (8, 16)  # channels at full resolution
    # The cosine schedule keeps some of so small a picture at most of its steps (Nichol and Dhariwal 2021).
    train: dict[str, Any] = _settings(
        steps=400, batch_size=64, lr=2e-3, min_lr=2e-5, ema=0.99, label_init_std=0.3, warmup=20, schedule="cosine"
    )
    judge: dict[str, Any] = _settings(steps=150, lr=2e-3)
    samples: int = 300
    sampling_steps: tuple[int, ...] = (2, 4, 8, 16, 32)  # of the grid; the others take the last

    @classmethod
    def quick(cls) -> ScalingSettings:
        return cls(
            sizes={"XS": (16, 1), "S": (32, 1)},
            patches=(4, 2),
            designs=("XS", 4),
            unets=(8,),
            train={"steps": 3, "batch_size": 16, "lr": 2e-3},
            judge={"steps": 3},
            samples=20,
            sampling_steps=(1, 2),
        )


def scaling(out: str | Path, quick: bool = False, seed: int = 0, settings: ScalingSettings | None = None) -> Path:
    """Trains and judges everything in ``out``, and goes on where it was stopped; gives the PNG's path.

    ``out/scaling.json`` holds the figures and the caption.
    """
    require("matplotlib", "plots")
    settings = settings or (ScalingSettings.quick() if quick else ScalingSettings())
    settings.seed = seed
    out = Path(out)
    _open(out, settings)
    common: dict[str, Any] = {"data": "digits", "image_size": SIDE, "cpu": True, "seed": seed}
    stages = Stages(out)

    def judge() -> dict[str, Any]:
        options = FinetuneOptions(**common, **settings.judge)
        return finetune(options, out / "runs" / "judge", (out / "runs" / "judge").exists())[1]

    accuracy = stages("judge", "the classifier that judges", judge)
    device = torch.device("cpu")
    extract = quality.classifier(out / "runs" / "judge", device)
    reference = quality.real_pictures("digits", SIDE)
    real = quality.features_of(extract, reference, device)

    def fids(maker: PictureMaker, counts: tuple[int, ...]) -> dict[str, float]:
        labels = torch.arange(settings.samples) % len(maker.classes)
        found = {}
        for steps in counts:
            pictures = quality.to_uint8(maker.sample(labels, steps=steps, seed=seed))
            found[str(steps)] = quality.measure(quality.features_of(extract, pictures, device), real)["fid"]
        return found

    def network(name: str, counts: tuple[int, ...], **changes: Any) -> dict[str, Any]:
        options = DiTOptions(**common, **{"learn_sigma": False, **settings.train, **changes})

        def stage() -> dict[str, Any]:
            run = out / "runs" / name
            maker = train_dit(options, run, run.exists())
            one = (torch.zeros(1, 1, SIDE, SIDE), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
            count = flops(build.dit(maker.config["model"]), *one)
            return {"gflops": count.macs / 1e9, "parameters": count.parameters, "fid": fids(maker, counts)}

        return stages(name, name, stage)

    def dit(size: str, patch: int) -> dict[str, Any]:
        width, depth = settings.sizes[size]
        return {"hidden_size": width, "depth": depth, "num_heads": max(1, width // 32), "patch_size": patch}

    last = settings.sampling_steps[-1:]
    grid = {
        f"{size}/{patch}": network(f"DiT-{size}-{patch}", settings.sampling_steps, **dit(size, patch))
        for size in settings.sizes
        for patch in settings.patches
    }
    unets = {
        f"U-Net {channels}": network(f"unet-{channels}", last, model="unet", hidden_size=channels, depth=3)
        for channels in settings.unets
    }
    designs: dict[str, Any] = {}
    for conditioning in CONDITIONINGS:
        for zero in (True, False):
            name = conditioning + ("" if zero else ", no zeros")
            changes = {"conditioning": conditioning, "zero_init": zero, **dit(*settings.designs)}
            stage = f"design-{conditioning}-{'zero' if zero else 'plain'}"
            designs[name] = network(stage, last, **changes)
    caption = CAPTION.format(samples=settings.samples, real=len(reference), accuracy=accuracy["accuracy"])
    results: dict[str, Any] = {"grid": grid, "unets": unets, "designs": designs}
    results["findings"] = findings(results, str(last[0]))
    results["caption"] = " ".join([caption, *results["findings"]])
    results["seconds"] = sum(times["wall"] for times in stages.times.values())
    write_json(out / "scaling.json", results)
    write_whole(out / "scaling.png", lambda temporary: _plot(results, settings, temporary))
    return out / "scaling.png"


def findings(results: dict[str, Any], last: str) -> list[str]:
    """What the figures say of the talk's claims, in sentences; compared are samples of ``last`` steps."""
    rows = sorted(results["grid"].values(), key=lambda row: row["gflops"])
    order = rank_correlation([row["gflops"] for row in rows], [row["fid"][last] for row in rows])
    verdict = "as in the talk" if order < -0.6 else "unlike in the talk" if order > 0 else "weaker than in the talk"
    found = [f"Rank correlation of Gflops and distance over {len(rows)} DiT: {order:+.2f}, {verdict}."]
    found += [_pairs(results["grid"], last, larger=larger) for larger in (True, False)]
    pairs = [_same_sampling_compute(one, two) for i, one in enumerate(rows) for two in rows[i + 1 :]]
    won = [pair for pair in pairs if pair is not None]
    found.append(
        f"With at least as much sampling compute, the smaller of two DiT is better in {sum(won)} of {len(won)} pairs."
    )
    designs = {name: row["fid"][last] for name, row in results["designs"].items()}
    zero = [name for name in designs if f"{name}, no zeros" in designs]
    better = sum(designs[name] < designs[f"{name}, no zeros"] for name in zero)
    best = min(designs, key=designs.__getitem__)
    found.append(f"Best design: {best}; zero initialisation is better in {better} of {len(zero)}.")
    for name, row in results["unets"].items():
        near = min(results["grid"], key=lambda dit: abs(math.log(results["grid"][dit]["gflops"] / row["gflops"])))
        rival = results["grid"][near]
        found.append(
            f"{name}: {row['fid'][last]:.1f} at {row['gflops']:.2g} Gflops; "
            f"DiT-{near}: {rival['fid'][last]:.1f} at {rival['gflops']:.2g}."
        )
    return found


def _pairs(grid: dict[str, Any], last: str, larger: bool) -> str:
    """How often compute spent on a larger network, or else on smaller patches, made samples better."""
    better = total = 0
    for one, two in itertools.combinations(grid, 2):
        (size, patch), (other_size, other_patch) = one.split("/"), two.split("/")
        if (patch == other_patch) if larger else (size == other_size):
            less, more = sorted((grid[one], grid[two]), key=lambda row: row["gflops"])
            better += more["fid"][last] < less["fid"][last]
            total += 1
    what = "A larger network of the same patch" if larger else "A smaller patch in a network of the same size"
    return f"{what} is better in {better} of {total} pairs."


def rank_correlation(one: Sequence[float], two: Sequence[float]) -> float:
    """Spearman's, of numbers that are all different."""
    ranks = [torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (one, two)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _same_sampling_compute(small: dict[str, Any], large: dict[str, Any]) -> bool | None:
    """Whether the network of fewer Gflops, at its most steps, is better than the other at no more compute in all.

    None where the larger one takes more even at its fewest steps.
    """
    steps = max(map(int, small["fid"]))
    budget = steps * small["gflops"]
    affordable = [int(count) for count in large["fid"] if int(count) * large["gflops"] <= budget]
    if not affordable:
        return None
    return small["fid"][str(steps)] < large["fid"][str(max(affordable))]


def _open(out: Path, settings: ScalingSettings) -> None:
    path, wanted = out / "settings.json", json.loads(json.dumps(asdict(settings)))
    if path.exists():
        if read_json(path) != wanted:
            raise RunError(f"{out}: holds other settings: remove it, or choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: exists and is not the folder of a scaling run: choose another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)


def _plot(results: dict[str, Any], settings: ScalingSettings, path: Path) -> None:
    figure = require("matplotlib.figure", "plots", "matplotlib").Figure(
        figsize=(13, 5.2), dpi=110, layout="constrained"
    )
    compute, sampling, designs = figure.subplots(1, 3)
    last = str(settings.sampling_steps[-1])
    for size in settings.sizes:
        rows = {patch: results["grid"][f"{size}/{patch}"] for patch in settings.patches}
        compute.plot(
            [r["gflops"] for r in rows.values()], [r["fid"][last] for r in rows.values()], "o-", label=f"DiT-{size}"
        )
        for patch, row in rows.items():
            compute.annotate(f"/{patch}", (row["gflops"], row["fid"][last]), fontsize=7)
        for (patch, row), style in zip(rows.items(), itertools.cycle(("o:", "o--", "o-"))):
            cost = [int(count) * row["gflops"] for count in row["fid"]]
            colour = compute.lines[-1].get_color()
            sampling.plot(
                cost, list(row["fid"].values()), style, color=colour, markersize=3, label=f"DiT-{size}/{patch}"
            )
    rows = results["unets"].values()
    compute.plot([r["gflops"] for r in rows], [r["fid"][last] for r in rows], "s--", color="black", label="U-Net")
    compute.set(xscale="log", yscale="log", xlabel="Gflops (multiply-adds, one forward)", ylabel="Fréchet distance")
    compute.set_title("quality against model compute")
    sampling.set(xscale="log", yscale="log", xlabel="Gflops of sampling one picture", ylabel="Fréchet distance")
    sampling.set_title(f"against sampling compute: {', '.join(map(str, settings.sampling_steps))} steps", fontsize=10)
    names = list(results["designs"])
    designs.barh(names[::-1], [results["designs"][name]["fid"][last] for name in names[::-1]])
    designs.set(xlabel="Fréchet distance")  # from 0: a bar's length is its figure
    designs.set_title("block designs, DiT-{}/{}".format(*settings.designs))
    for axes in (compute, sampling):
        axes.legend(frameon=False, fontsize=7)
    figure.supxlabel("\n".join(textwrap.wrap(results["caption"], 200)), fontsize=7.5)
    figure.savefig(path, format="png")
