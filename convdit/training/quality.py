"""``convdit evaluate``: FID, sFID, inception score, precision and recall of samples against real pictures.

The figures are torch-fidelity's, from features of one of two networks: Inception v3, whose weights the user brings, or
a classifier that ``convdit finetune`` trained. Only the first gives figures that compare with published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import EMBEDDED
from ..data.errors import DataError, require
from .common import device_of, open_data
from .finetune import load_classifier
from .options import DataOptions
from .runs import RunError, write_whole
from .sample import STEPS, PictureMaker

NEIGHBOURS = 3  # of precision and recall, as published
_SPATIAL = 7  # channels of the map that sFID looks at, as in the ADM evaluator


class Features(NamedTuple):
    """Of N pictures: pooled (N, C), spatial (N, S) and logits (N, K), on the CPU."""

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


Extractor = Callable[[Tensor], Features]


def inception(weights: str | Path, device: torch.device) -> Extractor:
    """Inception v3 of the TensorFlow graph of 2015, as torch-fidelity rebuilds it, with weights from a file.

    The file is torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``. Spatial features are the first 7
    channels of the 1x1 branch of the block named mixed_6 in that graph, 17x17, as in the ADM evaluator.
    """
    if not Path(weights).is_file():
        raise RunError(f"weights: {weights}: no such file; expected torch-fidelity's weights of Inception v3")
    kind = require("torch_fidelity.feature_extractor_inceptionv3", "Inception features", "torch-fidelity")
    from .. import checkpoints

    checkpoints.load(Path(weights))  # the class reads the file with pickle: see first that it holds tensors alone
    try:
        model = kind.FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
        )
    except RuntimeError as error:
        raise RunError(f"weights: {weights}: not torch-fidelity's Inception v3: {error}") from None
    model.to(device).eval()
    seen: list[Tensor] = []
    model.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, out: seen.append(out))

    def extract(images: Tensor) -> Features:
        seen.clear()
        pooled, logits = model((images.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8))
        return Features(pooled, seen[0][:, :_SPATIAL].flatten(1), logits)

    return extract


def classifier(source: str | Path, device: torch.device) -> Extractor:
    """A classifier of ours: its pooled features and logits, and the first 7 channels of its last map."""
    model, normalise, _ = load_classifier(source)
    model.to(device)

    def extract(images: Tensor) -> Features:
        if model.in_chans == 1 and images.shape[1] == 3:
            if not torch.equal(images[:, :1].expand_as(images), images):
                raise ValueError("judge: expected a classifier of colour pictures, as the samples are, got one of grey")
            images = images[:, :1]
        images = normalise(images.expand(-1, model.in_chans, -1, -1))
        spatial = model.forward_intermediates(images)[-1][:, :_SPATIAL].flatten(1)
        pooled = model.forward_features(images)
        return Features(pooled, spatial, model.head(pooled))

    return extract


def features_of(extract: Extractor, images: Tensor, device: torch.device, batch: int = 100) -> Features:
    """Features of uint8 pictures (N, H, W, C)."""
    parts: list[Features] = []
    with torch.inference_mode():
        for part in images.split(batch):
            pictures = part.permute(0, 3, 1, 2).to(device, torch.float32) / 255
            parts.append(Features(*(value.float().cpu() for value in extract(pictures))))
    return Features(*(torch.cat(values) for values in zip(*parts, strict=True)))


def measure(samples: Features, real: Features) -> dict[str, float]:
    """The figures of merit of N >= 4 samples against M >= 4 real pictures."""
    least = min(len(samples.pooled), len(real.pooled))
    if least <= NEIGHBOURS:
        raise ValueError(f"count: expected at least {NEIGHBOURS + 1} pictures on both sides, got {least}")
    fid, isc, prc = (
        require(f"torch_fidelity.metric_{name}", "the figures of merit", "torch-fidelity")
        for name in ("fid", "isc", "prc")
    )

    def frechet(one: Tensor, two: Tensor) -> float:
        first, second = (fid.fid_features_to_statistics(x.double()) for x in (one, two))
        return fid.fid_statistics_to_metric(first, second, False)[fid.KEY_METRIC_FID]

    near = prc.prc_features_to_metric(
        samples.pooled, real.pooled, prc_neighborhood=NEIGHBOURS, prc_batch_size=10000, save_cpu_ram=True, verbose=False
    )
    score = isc.isc_features_to_metric(samples.logits, splits=min(10, len(samples.logits)))
    return {
        "fid": frechet(samples.pooled, real.pooled),
        "sfid": frechet(samples.spatial, real.spatial),
        "inception_score": score[isc.KEY_METRIC_ISC_MEAN],
        "precision": near[prc.KEY_METRIC_PRECISION],
        "recall": near[prc.KEY_METRIC_RECALL],
    }


def to_uint8(pictures: Tensor) -> Tensor:
    """(N, C, H, W) in [0, 1] to (N, H, W, C) uint8."""
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def write_npz(path: Path, images: Tensor, labels: Tensor | None = None) -> None:
    """The file that the evaluator of ADM reads: ``arr_0`` uint8 (N, H, W, 3), and labels, if any, as ``arr_1``."""
    images = images.expand(-1, -1, -1, 3) if images.shape[-1] == 1 else images
    arrays = [images.numpy()] + ([] if labels is None else [labels.numpy()])

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # a file object: np.savez would add a suffix to a name
            np.savez_compressed(file, *arrays)

    write_whole(path, write)


def read_npz(path: Path) -> Tensor:
    """``arr_0`` of such a file: uint8 (N, H, W, C)."""
    try:
        with np.load(path) as file:
            array = file["arr_0"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path}: expected an .npz with arr_0: {error}") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise DataError(f"{path}: arr_0: expected uint8 (N, H, W, 1 or 3), got {array.dtype} {array.shape}")
    return torch.from_numpy(array)


def evaluate(
    source: str | Path,
    real: str,
    out: str | Path | None = None,
    weights: str | None = None,
    judge: str | None = None,
    count: int = 1000,
    guidance: float = 1.0,
    steps: int = 50,
    sampler: str | None = None,
    seed: int = 0,
    cpu: bool = False,
    progress: bool = True,
    interval: Sequence[float] | None = None,
    channels: str = "all",
) -> dict[str, Any]:
    """Judges ``source``, a run of ``train-dit`` to sample ``count`` pictures from or an .npz of samples.

    ``real`` is an .npz of real pictures or a data set (its training pictures are taken). Features come from
    ``weights``, a file of Inception v3, or from ``judge``, a run of ``finetune``: one of them is needed. ``out`` takes
    the samples as the evaluator of ADM reads them.
    """
    network: Callable[[torch.device], Extractor]
    if weights is not None and judge is None:
        network = partial(inception, weights)
    elif judge is not None and weights is None:
        network = partial(classifier, judge)
    else:
        raise ValueError("weights, judge: expected one of the two, a file of Inception v3 or a run of finetune")
    if count <= NEIGHBOURS:
        raise ValueError(f"count: expected at least {NEIGHBOURS + 1}, got {count}")
    if not 1 <= steps <= STEPS:
        raise ValueError(f"steps: expected 1 to {STEPS}, got {steps}")
    if out is not None and Path(out).suffix != ".npz":
        raise ValueError(f"out: expected a name ending in .npz, got {out}")
    device = device_of(cpu)
    extract = network(device)
    if real not in EMBEDDED and not Path(real).exists():
        raise DataError(f"real: {real}: no such file or folder, and not one of {', '.join(EMBEDDED)}")
    labels = None
    if Path(source).suffix == ".npz":
        samples = read_npz(Path(source))[:count]
    else:
        maker = PictureMaker.load(source, cpu)
        labels = torch.arange(count) % len(maker.classes)  # as many of each class
        samples = to_uint8(maker.sample(labels, guidance, steps, sampler, seed, progress, interval, channels))
    reference = read_npz(Path(real)) if Path(real).suffix == ".npz" else real_pictures(real, samples.shape[1])
    if samples.shape[1:3] != reference.shape[1:3]:
        raise ValueError(
            f"real: expected pictures of the samples' {tuple(samples.shape[1:3])}, got {tuple(reference.shape[1:3])}"
        )
    if out is not None:
        write_npz(Path(out), samples, labels)
    figures = measure(*(features_of(extract, x, device) for x in (samples, reference)))
    name = f"Inception v3, {weights}" if weights else f"classifier {judge}: not comparable with published figures"
    return {"features": name, "samples": len(samples), "real": len(reference), **figures}


def real_pictures(real: str, size: int) -> Tensor:
    """The training pictures of a data set, uint8 (N, size, size, C)."""
    dataset = open_data(DataOptions(real, size)).train
    parts = [dataset.batch(range(i, min(i + 500, len(dataset))))[0] for i in range(0, len(dataset), 500)]
    return to_uint8(torch.cat(parts))
