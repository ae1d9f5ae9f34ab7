"""``convdit collapse``: does FCMAE make the channels of a ConvNeXt alike, and does GRN keep them apart?

The figures are those of section 4 of the ConvNeXt V2 paper (arXiv:2301.00808), where the effect was reported:
of the activations between the two pointwise layers, which is where GRN acts.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import ConvNeXt
from ..nn import ConvNeXtBlock, Stage
from .common import open_data
from .options import CollapseOptions, DataOptions, PretrainOptions
from .pictures import grid, save_png
from .plots import curves, picture
from .pretrain import load_fcmae, pretrain
from .report import machine, note, table, times_table, write_page
from .stages import Stages, open_folder, small_size

_DEAD, _SATURATED = 0.05, 0.2
# Small enough for minutes on a CPU; patches of 8 pixels.
ENCODER: dict[str, Any] = {"depths": [2, 2, 6], "dims": [32, 64, 128], "stem_stride": 2}
# Digits have flat patches, whose deviation is no scale to normalise by.
PRETRAIN: dict[str, Any] = {"lr": 1.5e-3, "norm_pix_loss": False, "decoder_dim": 64, "log_every": 10}
MODELS: dict[str, dict[str, Any]] = {
    "ConvNeXt V1": {"model": "convnext_atto"},
    "ConvNeXt V2": {"model": "convnextv2_atto"},
    "V2, GRN off": {"model": "convnextv2_atto", "grn": False},
}


@torch.no_grad()
def expanded_activations(encoder: ConvNeXt, images: Tensor) -> list[Tensor]:
    """What each block's second pointwise layer gets, (N, H, W, 4C): after GELU, in version 2 after GRN."""
    found: list[Tensor] = []
    stages = [cast(Stage, stage) for stage in encoder.stages]
    blocks = [cast(ConvNeXtBlock, block) for stage in stages for block in stage]
    hooks = [b.pwconv2.register_forward_pre_hook(lambda module, args: found.append(args[0])) for b in blocks]
    try:
        x: Any = None
        for downsample, stage in zip(encoder.downsample_layers, stages, strict=True):
            x = downsample(images if x is None else x)
            visible = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device)
            for block in stage:
                x = block(x, visible)  # with a mask the block goes layer by layer, and its layers can be watched
    finally:
        for hook in hooks:
            hook.remove()
    return found


def cosine_distance(x: Tensor) -> float:
    """Mean over pictures and over pairs of channels of (1 - cosine) / 2, for (N, H, W, C); pairs as in the paper.

    0: all channels show the same map. A channel that is zero in a picture is orthogonal to the others.
    """
    maps = F.normalize(x.flatten(1, 2).double(), dim=1)
    # The sum over pairs of the products of unit vectors is the squared norm of their sum.
    cosine = maps.sum(2).square().sum(1) / maps.shape[2] ** 2
    return float((1 - cosine).mean() / 2)


def channel_states(x: Tensor) -> dict[str, float]:
    """Shares of dead and saturated channels of (N, H, W, C).

    Dead: root mean square below 5 % of the layer's mean over channels. Saturated: not dead, and the deviation over
    sites and pictures below 20 % of its root mean square, so that the channel says the same of everything.
    """
    values = x.flatten(0, 2).double()
    size, spread = values.square().mean(0).sqrt(), values.std(0, correction=0)
    dead = size < _DEAD * size.mean()
    saturated = ~dead & (spread < _SATURATED * size)
    return {"dead": float(dead.double().mean()), "saturated": float(saturated.double().mean())}


def layer_figures(encoder: ConvNeXt, images: Tensor) -> dict[str, list[float]]:
    """Lists by block: "distance", "dead", "saturated"."""
    layers = expanded_activations(encoder, images)
    states = [channel_states(x) for x in layers]
    return {
        "distance": [cosine_distance(x) for x in layers],
        "dead": [s["dead"] for s in states],
        "saturated": [s["saturated"] for s in states],
    }


def activation_maps(encoder: ConvNeXt, image: Tensor, block: int, channels: int = 64) -> Tensor:
    """Maps of evenly chosen channels of one block for one picture (1, c, H, W): (channels, 1, h, w) in [0, 1].

    One scale for all: black is the smallest value of the layer, white the 99th percentile.
    """
    maps = expanded_activations(encoder, image)[block][0].permute(2, 0, 1).float()
    low, high = maps.min(), torch.quantile(maps.flatten(), 0.99)
    chosen = torch.linspace(0, len(maps) - 1, min(channels, len(maps))).long()
    return ((maps[chosen] - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)[:, None]


def collapse(options: CollapseOptions, out: str | Path) -> dict[str, Any]:
    """Pre-trains the three models, measures them, writes ``out/report.html``; goes on where it was stopped.

    Returns the figures by model, and under "verdict" what they say.
    """
    options.check()
    size = small_size(options.data)
    splits = open_data(DataOptions(options.data, size))
    out = open_folder(Path(out), asdict(options), "collapse")
    images, _ = splits.test.batch(torch.linspace(0, len(splits.test) - 1, options.pictures).long().unique())
    stages = Stages(out)
    results: dict[str, Any] = {}
    for number, (name, own) in enumerate(MODELS.items()):
        run = out / "runs" / str(number)

        def stage(own: dict[str, Any] = own, run: Path = run, number: int = number) -> dict[str, Any]:
            common: dict[str, Any] = {
                "data": options.data,
                "image_size": size,
                "seed": options.seed,
                "cpu": options.cpu,
            }
            pretrain(PretrainOptions(**common, **ENCODER, **PRETRAIN, **own, steps=options.pretrain_steps), run, True)
            model, normalise, _ = load_fcmae(run)
            inputs = normalise(images)
            for place, block in _shown(ENCODER["depths"]).items():
                maps = activation_maps(model.encoder, inputs[:1], block)
                zoom = max(1, 32 // maps.shape[-1])
                save_png(out / f"maps-{number}-{place}.png", grid(maps, columns=8, zoom=zoom, gap=1))
            with torch.no_grad():
                loss = model(inputs, generator=torch.Generator().manual_seed(1)).loss
            return layer_figures(model.encoder, inputs) | {"loss": float(loss)}

        run.parent.mkdir(exist_ok=True)
        run.mkdir(exist_ok=True)
        results[name] = stages(f"model-{number}", f"FCMAE of {name}", stage)
    save_png(out / "picture.png", grid(images[:1], columns=1, zoom=max(1, 128 // images.shape[-1])))
    results["verdict"] = verdict(results)
    print(f"report: {_write(out, options, results, stages)}")
    return results


def _shown(depths: list[int]) -> dict[str, int]:
    """The blocks whose maps are shown: the last of the first stage, whose maps are largest, and of the last."""
    return {"first": depths[0] - 1, "last": sum(depths) - 1}


def verdict(results: dict[str, Any]) -> list[str]:
    """Plain sentences: for each comparison, whether the effect of the talk shows in these figures."""
    v1, v2, off = (results[name] for name in MODELS)
    third = max(1, len(v2["distance"]) // 3)

    def late(model: dict[str, Any], key: str) -> float:
        return sum(model[key][-third:]) / third

    sentences = []
    for name, other in (("ConvNeXt V1", v1), ("V2 with GRN off", off)):
        ours, theirs = late(v2, "distance"), late(other, "distance")
        shows = "shows" if ours > 1.1 * theirs else "DOES NOT SHOW at this scale"
        sentences.append(
            f"The talk's effect, channels more alike without GRN, {shows} against {name}: mean distance over the last "
            f"{third} blocks {ours:.3f} for V2, {theirs:.3f} for {name}."
        )
        ours, theirs = (late(m, "dead") + late(m, "saturated") for m in (v2, other))
        shows = "are fewer" if ours < theirs - 0.01 else "are NOT fewer"
        sentences.append(
            f"Dead and saturated channels {shows} in V2 than in {name}: {100 * ours:.1f} % against "
            f"{100 * theirs:.1f} % in the last {third} blocks."
        )
    return sentences


def _write(out: Path, options: CollapseOptions, results: dict[str, Any], stages: Stages) -> Path:
    blocks = list(range(1, len(results["ConvNeXt V2"]["distance"]) + 1))
    plots = "".join(
        curves({name: (blocks, results[name][key]) for name in MODELS}, "block", label)
        for key, label in (
            ("distance", "mean pairwise cosine distance"),
            ("dead", "share of dead channels"),
            ("saturated", "share of saturated channels"),
        )
    )
    keys = ("distance", "dead", "saturated")
    rows = [[name, *(sum(results[name][k]) / len(blocks) for k in keys), results[name]["loss"]] for name in MODELS]
    maps = "".join(
        f"<h3>{name}</h3><div class='row'>"
        + "".join(picture(out / f"maps-{number}-{place}.png", 360) for place in ("first", "last"))
        + "</div>"
        for number, name in enumerate(MODELS)
    )
    parts = [
        "<h1>Feature collapse</h1>",
        f"<p>Three encoders of the same size, each pre-trained by FCMAE for {options.pretrain_steps} steps on "
        f"{Path(options.data).name}, judged on {options.pictures} whole held-out pictures. Measured is what each "
        "block's second pointwise layer gets: after GELU and, in V2, after GRN.</p>",
        machine(stages.times, options.cpu),
        "<ul>" + "".join(f"<li>{sentence}</li>" for sentence in results["verdict"]) + "</ul>",
        f"<div class='row'>{plots}</div>",
        table(["mean over blocks", "cosine distance", "dead", "saturated", "FCMAE loss, held out"], rows),
        note(
            "Distance: (1 − cosine) / 2 of the maps of two channels, mean over all pairs and pictures; 0 where all "
            "channels show the same. Dead: root mean square below 5 % of the layer's mean. Saturated: the deviation "
            "over sites and pictures is below 20 % of the root mean square. The paper trained for 800 epochs on "
            "ImageNet; this is minutes on small pictures, one seed, so small differences mean nothing."
        ),
        "<h2>Activation maps</h2>",
        f"<div>{picture(out / 'picture.png')}</div>",
        maps,
        note(
            "64 channels, evenly chosen, for the picture above: the last block of the first stage (left) and of the "
            "last stage. One grey scale a layer: black is its smallest value, white its 99th percentile."
        ),
        times_table(stages.times),
    ]
    return write_page(out / "report.html", "convdit collapse", parts)
