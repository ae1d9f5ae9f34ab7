"""First half of the demo: FCMAE pre-training, conversion to dense, probes, fine-tuning, step times."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import checkpoints, data
from ..models import FCMAE
from ..sparse import ActiveSites, SparseTensor2d
from . import build
from .evaluate import LinearProbe, accuracy, in_batches
from .finetune import finetune, probe
from .options import FinetuneOptions, PretrainOptions, ProbeOptions
from .pictures import grid, save_png
from .pretrain import load_fcmae, pretrain, reconstructions
from .runs import save_weights
from .transforms import Normalise

if TYPE_CHECKING:
    from .demo import DemoSettings, Stages

_LOG: dict[str, Any] = {"log_every": 5}  # short runs, smooth curves


def run(stages: Stages, settings: DemoSettings, splits: data.Splits, out: Path) -> dict[str, Any]:
    """The results of these stages, by name."""
    common = settings.common(splits.train.image_shape[1])
    runs = out / "runs"
    trained = runs / "pretrain"
    results: dict[str, Any] = {}

    def stage_pretrain() -> dict[str, Any]:
        options = PretrainOptions(**common, **settings.convnext, **settings.pretrain, seed=settings.seed, **_LOG)
        pretrain(options, trained, resume=trained.exists())
        model, normalise, _ = load_fcmae(trained)
        images, _ = splits.test.batch(torch.linspace(0, len(splits.test) - 1, 12).long())
        triples = reconstructions(model, normalise, images)
        save_png(
            out / "reconstructions.png",
            grid(triples, columns=9, zoom=max(1, 64 // images.shape[-1])),
        )
        hidden = _hidden_error(model, normalise, splits.test)
        return {
            "parameters": sum(p.numel() for p in model.encoder.parameters()),
            "norm_pix_loss": model.norm_pix_loss,
            **hidden,
        }

    results["pretrain"] = stages("pretrain", "FCMAE pre-training, sparse convolutions", stage_pretrain)
    results["convert"] = stages(
        "convert",
        "conversion to a dense ConvNeXt V2",
        lambda: _convert(trained, out / "convnextv2_dense.safetensors"),
    )
    results["steps"] = stages("steps", "step time, sparse and dense-masked", lambda: _step_times(trained, settings))

    def stage_probe() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, init in (("pre-trained", str(trained)), ("random weights", None)):
            found[name] = [
                probe(
                    ProbeOptions(
                        **common,
                        **settings.convnext,
                        init=init,
                        labels=settings.labels,
                        label_seed=seed,
                        seed=seed,
                    )
                )["accuracy"]
                for seed in range(settings.seed, settings.seed + settings.repeats)
            ]
        found["pixels"] = [_pixel_probe(splits, settings.labels, settings.seed + i) for i in range(settings.repeats)]
        return found

    results["probe"] = stages("probe", "linear probe", stage_probe)

    def stage_finetune() -> dict[str, Any]:
        found: dict[str, Any] = {"pre-trained": [], "random weights": []}
        for repeat in range(settings.repeats):
            for name, init in (("pre-trained", str(trained)), ("random weights", None)):
                seed = settings.seed + repeat
                options = FinetuneOptions(
                    **common,
                    **settings.convnext,
                    **settings.finetune,
                    init=init,
                    labels=settings.labels,
                    label_seed=seed,
                    seed=seed,
                    **_LOG,
                )
                place = runs / f"finetune-{name.split()[0]}-{repeat}"
                _, result = finetune(options, place, resume=place.exists())
                found[name].append(result["accuracy"])
        return found

    results["finetune"] = stages("finetune", "fine-tuning with few labels", stage_finetune)
    return results


def _hidden_error(model: FCMAE, normalise: Normalise, dataset: data.ImageDataset) -> dict[str, float]:
    """Mean squared error on hidden pixels of held-out pictures, and of two guesses that need no model."""
    images, _ = dataset.batch(range(min(500, len(dataset))))
    triples = reconstructions(model, normalise, images, seed=1).unflatten(0, (-1, 3))
    with torch.no_grad():
        mask = model(normalise(images), generator=torch.Generator().manual_seed(1)).mask
    scale = images.shape[2] // mask.shape[1]
    hidden = mask.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, None].expand_as(images)
    error = (triples[:, 2] - images).square()[hidden].mean()
    patches = model.patchify(images)
    flat = model.unpatchify(
        patches.mean(-1, keepdim=True).expand_as(patches).contiguous(), (mask.shape[1], mask.shape[2])
    )
    return {
        "hidden_error": float(error),
        "hidden_error_patch_mean": float((flat - images).square()[hidden].mean()),
    }


def _convert(trained: Path, out: Path) -> dict[str, Any]:
    """Sparse weights to a dense model, strictly; the two must agree where nothing is hidden from either."""
    model, _, config = load_fcmae(trained)
    dense = build.encoder(config["model"]["encoder"])
    state = checkpoints.sparse_to_dense(model.state_dict(), encoder_only=True)
    dense.load_state_dict(state, strict=True)
    dense.eval()
    side, patch = config["model"]["image_size"], config["model"]["patch_size"]
    images = torch.rand(4, config["model"]["encoder"]["in_chans"], side, side)
    nothing_hidden = torch.zeros(4, side // patch, side // patch, dtype=torch.bool)
    with torch.no_grad():
        sites = ActiveSites.from_patch_mask(nothing_hidden, patch // model.encoder.stem_stride)
        stem, *downsamples = model.encoder.downsample_layers
        first, *stages = model.encoder.stages
        x = first(SparseTensor2d.from_dense(stem(images), sites))
        for downsample, stage in zip(downsamples, stages, strict=True):
            x = stage(downsample(x))
        sparse_map = x.dense().permute(0, 3, 1, 2)
        dense_map = dense.forward_intermediates(images)[-1]
    there = checkpoints.convert(dense.state_dict(), "timm")
    back = checkpoints.convert(there, "convdit")
    same = all(torch.equal(back[name], value) for name, value in dense.state_dict().items())
    save_weights(out, dense.state_dict(), {"task": "encoder", "model": config["model"]["encoder"]})
    return {
        "tensors": len(state),
        "largest_difference": float((sparse_map - dense_map).abs().max()),
        "largest_value": float(dense_map.abs().max()),
        "round_trip_exact": same,
    }


def _step_times(trained: Path, settings: DemoSettings) -> dict[str, Any]:
    """Median seconds of a training step, sparse and dense-masked in turns, the same masks and weights."""
    model, _, config = load_fcmae(trained)
    model.train()
    batch, side = 64, config["model"]["image_size"]
    images = torch.randn(batch, config["model"]["encoder"]["in_chans"], side, side)
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(settings.timing_rounds + 1):
        for sparse in (True, False):
            model.sparse = sparse
            model.zero_grad()
            began = time.perf_counter()
            model(images, generator=torch.Generator().manual_seed(turn)).loss.backward()
            if turn:  # the first turn warms up
                times[sparse].append(time.perf_counter() - began)
    return {
        "batch": batch,
        "threads": torch.get_num_threads(),
        "sparse": statistics.median(times[True]),
        "dense": statistics.median(times[False]),
    }


def _pixel_probe(splits: data.Splits, labels: int, seed: int) -> float:
    """The same probe on raw pixels: what a linear classifier can do without any network."""
    device = torch.device("cpu")
    few = splits.train.subset(data.few_labels(splits.train.labels, labels, seed))
    linear = LinearProbe(*in_batches(lambda x: x.flatten(1), few, device), len(few.classes))
    pixels, truth = in_batches(lambda x: x.flatten(1), splits.test, device)
    return accuracy(linear(pixels), truth)
