"""Fine-tuning a classifier, and a linear probe of frozen features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoints, data
from .._checks import listed
from ..models import ConvNeXt
from . import build
from .augment import BatchMixing, augmented
from .common import convnext_of, device_of, finish, imagenet_normalisation, initial_encoder, normalisation, open_data
from .engine import start, train
from .evaluate import LinearProbe, accuracy, in_batches, nearest_neighbours, pooled_features
from .optim import layer_rates
from .options import FinetuneOptions, ProbeOptions, ValidateOptions, saved
from .runs import Run, RunError, read_weights
from .transforms import Normalise, augment


def finetune(options: FinetuneOptions, out: str | Path, resume: bool = False) -> tuple[ConvNeXt, dict[str, Any]]:
    """Trains a classifier in the run folder ``out``; returns it and its held-out accuracy."""
    accelerator = start(options)
    splits = open_data(options, options.crop_ratio)
    training = chosen(splits.train, options.labels, options.label_seed)
    state, source = initial_encoder(options.init) if options.init else (None, None)
    convnext = convnext_of(source, options, training.image_shape)
    torch.manual_seed(options.seed)
    model = build.classifier(convnext, len(training.classes), options.drop_path, options.head_init_scale)
    if state is not None:
        model.load_encoder(state)
    normalise = normalisation(source, splits.train, state is not None and source is None)
    config = {
        "task": "finetune",
        "options": saved(options),
        "model": convnext,
        "classes": training.classes,
        "normalise": vars(normalise),
    }
    kind, classes = options.augmentation(training.image_shape[1]), len(training.classes)
    training = augmented(training, kind, options.crop_scale, options.randaug)
    mixing = BatchMixing(
        classes,
        options.random_erasing,
        options.mixup,
        options.cutmix,
        options.label_smoothing,
        accelerator.device,
    )
    rate = layer_rates(model.depths, options.layer_decay, options.layer_decay_type)
    run = Run(out, config, resume, accelerator.is_main_process)

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        images, targets = mixing(normalise(augment(images, kind)), labels)
        scores = model(images)
        values = {"loss": mixing.loss(scores, targets)}
        if targets is labels:  # a mixed picture has no one class
            values["train_accuracy"] = (scores.argmax(1) == labels).float().mean()
        return values

    def evaluate(model: nn.Module) -> dict[str, float]:
        return judge(model, normalise, splits.test, accelerator.device)

    model = train(accelerator, model, objective, training, options, run, evaluate, rate)
    result = dict(run.evaluation)
    if options.ema:  # the weights kept are the average's, and so is the figure of the run
        result = {f"raw_{name}": value for name, value in result.items() if not name.startswith("ema_")} | {
            name.removeprefix("ema_"): value for name, value in result.items() if name.startswith("ema_")
        }
    result["labels"] = len(training)
    finish(accelerator, run, model, result)
    return model, result


def chosen(dataset: data.ImageDataset, labels: int | None, seed: int) -> data.ImageDataset:
    """All pictures, or ``labels`` of them, balanced."""
    return dataset if labels is None else dataset.subset(data.few_labels(dataset.labels, labels, seed))


def probe(options: ProbeOptions) -> dict[str, Any]:
    """Held-out accuracy of logistic regression, and of k nearest neighbours, on pooled features of a frozen encoder."""
    if not options.neighbours >= 1:
        raise ValueError(f"neighbours: expected at least 1, got {options.neighbours}")
    splits = open_data(options, options.crop_ratio)
    training = chosen(splits.train, options.labels, options.label_seed)
    state, source = initial_encoder(options.init) if options.init else (None, None)
    convnext = convnext_of(source, options, training.image_shape)
    torch.manual_seed(options.seed)
    model = build.encoder(convnext)
    if state is not None:
        model.load_state_dict(state)
    device = device_of(options.cpu)
    model.to(device).eval()
    normalise = normalisation(source, splits.train, state is not None and source is None)

    def features(images: Tensor) -> Tensor:
        return pooled_features(model, normalise(images))

    known, seen = in_batches(features, training, device)
    held_out, labels = in_batches(features, splits.test, device)
    classes = len(training.classes)
    linear = LinearProbe(known, seen, classes, options.penalty)
    return {
        "accuracy": accuracy(linear(held_out), labels),
        "train_accuracy": accuracy(linear(known), seen),
        "knn_accuracy": accuracy(nearest_neighbours(held_out, known, seen, classes, options.neighbours), labels),
        "labels": len(training),
        "init": options.init or "random weights",
    }


def load_classifier(source: str | Path, model: str | None = None) -> tuple[ConvNeXt, Normalise, list[str] | None]:
    """A classifier in evaluation mode, its normalisation and its classes.

    ``source`` is a run of ``convdit finetune``, or a checkpoint of another project that has a head, of the ConvNeXt
    named ``model``; such a one names no classes and expects pictures normalised as ImageNet's.

    Raises RunError for weights that are neither, or where ``model`` is missing.
    """
    state, config = read_weights(source)
    if config is not None and config.get("task") == "finetune":
        classifier = build.classifier(config["model"], len(config["classes"]))
        classifier.load_state_dict(state)
        return classifier.eval(), Normalise(**config["normalise"]), config["classes"]
    if config is not None:
        raise RunError(f"{source}: not the weights of a fine-tuning run of convdit")
    if model is None:
        raise RunError(f"model: expected the name of the ConvNeXt whose weights {source} holds, got none")
    state = checkpoints.convert(state, "convdit")
    if "head.weight" not in state:
        raise RunError(f"{source}: these weights have no classification head")
    config = {"name": model, "in_chans": state["downsample_layers.0.0.weight"].shape[1]}
    classifier = build.classifier(config, state["head.weight"].shape[0])
    classifier.load_state_dict(state)
    if config["in_chans"] != 3:
        raise RunError(f"{source}: expected weights for pictures of 3 channels, got {config['in_chans']}")
    return classifier.eval(), imagenet_normalisation(), None


def validate(source: str | Path, options: ValidateOptions) -> dict[str, Any]:
    """Top-1 and top-5 accuracy on the held-out pictures of ``options``, see `load_classifier`."""
    model, normalise, classes = load_classifier(source, options.model)
    splits = open_data(options, options.crop_ratio)
    if classes is not None and classes != splits.train.classes:
        raise RunError(
            f"data: expected the classes of the weights, {listed(classes)}; got {listed(splits.train.classes)}"
        )
    if model.num_classes != len(splits.train.classes):
        raise RunError(
            f"data: expected {model.num_classes} classes, those of the head, got {len(splits.train.classes)}"
        )
    device = device_of(options.cpu)
    return judge(model.to(device), normalise, splits.test, device) | {"pictures": len(splits.test)}


def judge(model: nn.Module, normalise: Normalise, dataset: data.ImageDataset, device) -> dict[str, float]:
    scores, labels = in_batches(lambda x: model(normalise(x)), dataset, device)
    return {"accuracy": accuracy(scores, labels), "top5_accuracy": accuracy(scores, labels, 5)}
