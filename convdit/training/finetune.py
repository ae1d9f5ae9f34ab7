"""Fine-tuning a classifier, and a linear probe of frozen features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data
from . import build
from .common import convnext_of, device_of, finish, initial_encoder, normalisation, open_data
from .engine import start, train
from .evaluate import LinearProbe, accuracy, in_batches, pooled_features
from .options import FinetuneOptions, ProbeOptions, saved
from .runs import Run
from .transforms import augment


def finetune(options: FinetuneOptions, out: str | Path, resume: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Trains a classifier in the run folder ``out``; returns it and its held-out accuracy."""
    accelerator = start(options)
    splits = open_data(options)
    training = chosen(splits.train, options.labels, options.label_seed)
    state, source = initial_encoder(options.init) if options.init else (None, None)
    convnext = convnext_of(source, options, training.image_shape)
    torch.manual_seed(options.seed)
    model = build.classifier(convnext, len(training.classes), options.drop_path)
    if state is not None:
        model.load_encoder(state)
    normalise = normalisation(source, splits.train)
    config = {
        "task": "finetune",
        "options": saved(options),
        "model": convnext,
        "classes": training.classes,
        "normalise": vars(normalise),
    }
    run = Run(out, config, resume, accelerator.is_main_process)
    kind = options.augmentation(training.image_shape[1])

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = model(normalise(augment(images, kind)))
        loss = F.cross_entropy(scores, labels, label_smoothing=options.label_smoothing)
        return {"loss": loss, "train_accuracy": (scores.argmax(1) == labels).float().mean()}

    model = train(accelerator, model, objective, training, options, run)
    scores, labels = in_batches(lambda x: model(normalise(x)), splits.test, accelerator.device)
    result = {"accuracy": accuracy(scores, labels), "labels": len(training)}
    finish(accelerator, run, model, result)
    return model, result


def chosen(dataset: data.ImageDataset, labels: int | None, seed: int) -> data.ImageDataset:
    """All pictures, or ``labels`` of them, balanced."""
    return dataset if labels is None else dataset.subset(data.few_labels(dataset.labels, labels, seed))


def probe(options: ProbeOptions) -> dict[str, Any]:
    """Held-out accuracy of logistic regression on the pooled last map of a frozen encoder."""
    splits = open_data(options)
    training = chosen(splits.train, options.labels, options.label_seed)
    state, source = initial_encoder(options.init) if options.init else (None, None)
    convnext = convnext_of(source, options, training.image_shape)
    torch.manual_seed(options.seed)
    model = build.encoder(convnext)
    if state is not None:
        model.load_state_dict(state)
    device = device_of(options.cpu)
    model.to(device).eval()
    normalise = normalisation(source, splits.train)

    def features(images: Tensor) -> Tensor:
        return pooled_features(model, normalise(images))

    linear = LinearProbe(*in_batches(features, training, device), len(training.classes), options.penalty)
    known, seen = in_batches(features, training, device)
    held_out, labels = in_batches(features, splits.test, device)
    return {
        "accuracy": accuracy(linear(held_out), labels),
        "train_accuracy": accuracy(linear(known), seen),
        "labels": len(training),
        "init": options.init or "random weights",
    }


def load_classifier(source: str | Path) -> tuple[nn.Module, Any, list[str]]:
    """The model of a fine-tuning run in evaluation mode, its normalisation and its classes."""
    from .runs import RunError, read_weights
    from .transforms import Normalise

    state, config = read_weights(source)
    if config is None or config.get("task") != "finetune":
        raise RunError(f"{source}: not the weights of a fine-tuning run of convdit")
    model = build.classifier(config["model"], len(config["classes"]))
    model.load_state_dict(state)
    return model.eval(), Normalise(**config["normalise"]), config["classes"]
