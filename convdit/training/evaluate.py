"""Accuracy, pooled features, a linear classifier on them, and the Frechet distance."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import ImageDataset
from ..models import ConvNeXt


def in_batches(
    function: Callable[[Tensor], Tensor],
    dataset: ImageDataset,
    device: torch.device,
    batch: int = 250,
) -> tuple[Tensor, Tensor]:
    """(function(images) of all pictures, labels), on the CPU, without gradients."""

    def results() -> Iterator[Tensor]:
        for first in range(0, len(dataset), batch):
            images, _ = dataset.batch(range(first, min(first + batch, len(dataset))))
            yield function(images.to(device)).float().cpu()

    with torch.inference_mode():
        return torch.cat(list(results())), dataset.labels


def pooled_features(encoder: ConvNeXt, images: Tensor) -> Tensor:
    """The last map of a ConvNeXt encoder for normalised images (B, c, H, W), averaged: (B, C)."""
    return encoder.forward_intermediates(images)[-1].mean((2, 3))


def accuracy(scores: Tensor, labels: Tensor, top: int = 1) -> float:
    """Share of rows of (N, K) that have the label's value among their ``top`` largest."""
    best = scores.topk(min(top, scores.shape[1]), 1).indices
    return float((best == labels[:, None]).any(1).double().mean())


def nearest_neighbours(
    features: Tensor, known: Tensor, labels: Tensor, classes: int, neighbours: int = 20, temperature: float = 0.07
) -> Tensor:
    """Votes (N, classes) for features (N, C), by the ``neighbours`` of (M, C) most alike by cosine.

    A vote weighs exp(cosine / temperature), as in Wu et al. 2018 (arXiv:1805.01978). Fewer than ``neighbours``
    known features: all of them vote.
    """
    features, known = F.normalize(features.float(), dim=1), F.normalize(known.float(), dim=1)
    votes = []
    for part in features.split(1024):
        likeness, nearest = (part @ known.T).topk(min(neighbours, len(known)), 1)
        weights = (likeness / temperature).exp()
        votes.append(weights.new_zeros(len(part), classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes)


class LinearProbe:
    """Logistic regression on standardised features (N, C), fitted by L-BFGS in float64."""

    def __init__(self, features: Tensor, labels: Tensor, classes: int, penalty: float = 1e-3):
        features = features.double()
        self.mean, self.std = features.mean(0), features.std(0).clamp_min(1e-6)
        inputs = (features - self.mean) / self.std
        self.weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, requires_grad=True)
        self.bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        parameters = [self.weight, self.bias]
        solver = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            solver.zero_grad()
            scores = F.linear(inputs, self.weight, self.bias)
            loss = F.cross_entropy(scores, labels) + penalty * self.weight.square().sum()
            loss.backward()
            return loss

        solver.step(objective)

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        return F.linear((features.double() - self.mean) / self.std, self.weight, self.bias)


def frechet_distance(one: Tensor, two: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features (N, C), float64.

    The formula of the Frechet inception distance (Heusel et al. 2017), here on other features.
    """
    one, two = one.double(), two.double()
    s1, s2 = torch.cov(one.T), torch.cov(two.T)
    values, vectors = torch.linalg.eigh(s1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # The eigenvalues of S1 S2 are those of the symmetric root(S1) S2 root(S1).
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()
    return float((one.mean(0) - two.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * cross)
