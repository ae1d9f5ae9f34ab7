"""Walks through what a diffusion transformer has learned: between two noises, or between two classes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..data.errors import require
from ..models.dit import DiT, LabelEmbedder
from .pictures import grid, save_png
from .runs import write_whole
from .sample import STEPS, PictureMaker, class_numbers

KINDS = ("latent", "class")


def walk_to_file(
    source: str | Path,
    out: Path,
    kind: str = "class",
    classes: list[str] | None = None,
    frames: int = 9,
    rows: int = 4,
    guidance: float = 2.0,
    steps: int = 50,
    seed: int = 0,
    cpu: bool = False,
    sampler: str | None = None,
    interval: Sequence[float] | None = None,
    channels: str = "all",
) -> None:
    """Writes ``rows`` walks of ``frames`` pictures: a PNG with a strip a row, or a GIF that runs there and back.

    "latent" goes from one noise to another at one class; "class" from the embedding of one class to
    that of another at one noise. ``classes`` names the one, or the two (default: the first ones). ``guidance``,
    ``sampler`` (one that draws no noise), ``interval`` and ``channels`` are those of ``PictureMaker.pictures``.
    """
    if out.suffix not in (".png", ".gif"):
        raise ValueError(f"out: expected a name ending in .png or .gif, got {out}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    for name, value, least in (("frames", frames, 2), ("rows", rows, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not 1 <= steps <= STEPS:
        raise ValueError(f"steps: expected 1 to {STEPS}, got {steps}")
    maker = PictureMaker.load(source, cpu)
    if maker.check(sampler, interval, channels) == "ddpm":
        raise ValueError(
            "sampler: expected one that draws no noise on the way, for near starts to give near pictures, got ddpm"
        )
    if not hasattr(getattr(maker.dit, "y_embedder", None), "embedding_table"):
        raise ValueError(f"weights: expected a DiT with classes, got {type(maker.dit).__name__}")
    ends = 1 if kind == "latent" else 2
    numbers = class_numbers(classes, maker.classes)
    numbers = numbers[:ends] if classes is None else numbers
    if len(numbers) != ends:
        raise ValueError(f"classes: expected {ends} for a {kind} walk, got {len(numbers)}")
    pictures = walk(maker, kind, numbers, frames, rows, guidance, steps, seed, sampler, interval, channels)
    zoom = max(1, 64 // pictures.shape[-1])
    if out.suffix == ".png":
        save_png(out, grid(pictures.flatten(0, 1), columns=frames, zoom=zoom))
        return
    there = [grid(pictures[:, i], columns=rows, zoom=zoom) for i in range(frames)]
    data = gif_bytes([*there, *there[-2:0:-1]])
    write_whole(out, lambda temporary: temporary.write_bytes(data))


@torch.no_grad()
def walk(
    maker: PictureMaker,
    kind: str,
    numbers: list[int],
    frames: int,
    rows: int,
    guidance: float,
    steps: int,
    seed: int,
    sampler: str | None = None,
    interval: Sequence[float] | None = None,
    channels: str = "all",
) -> Tensor:
    """Pictures (rows, frames, C, H, W) in [0, 1]; without noise on the way near starts give near pictures."""
    table = cast(LabelEmbedder, cast(DiT, maker.dit).y_embedder).embedding_table.weight
    generator = torch.Generator().manual_seed(seed)
    first, last = (torch.randn(rows, 1, *maker.latent_shape, generator=generator) for _ in range(2))
    at = torch.linspace(0, 1, frames)
    if kind == "latent":
        noise = slerp(first, last, at.view(1, frames, 1, 1, 1))
        embeddings = table[numbers[0]].expand(rows, frames, -1)
    else:
        noise = first.expand(rows, frames, *maker.latent_shape)
        one, two = table[numbers[0]], table[numbers[1]]
        embeddings = torch.lerp(one, two, at.to(table)[:, None]).expand(rows, frames, -1)
    start, y = noise.flatten(0, 1), embeddings.flatten(0, 1)
    pictures = maker.pictures(start, y, guidance, steps, sampler, interval=interval, channels=channels)
    return pictures.unflatten(0, (rows, frames))


def slerp(first: Tensor, last: Tensor, at: Tensor) -> Tensor:
    """Between two noises along the sphere, whose radius normal noise keeps; a straight line would cut it."""
    one, two = first.flatten(2), last.flatten(2)
    cosine = torch.nn.functional.cosine_similarity(one, two, dim=2).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = cosine.acos().view(*cosine.shape, *[1] * (first.ndim - 2))
    return (torch.sin((1 - at) * angle) * first + torch.sin(at * angle) * last) / torch.sin(angle)


def gif_bytes(pictures: list[Tensor], milliseconds: int = 120) -> bytes:
    """Pictures (H, W, 3) uint8 as a GIF that repeats for ever."""
    image = require("PIL.Image", "writing pictures", "pillow")
    first, *rest = (image.fromarray(picture.numpy()) for picture in pictures)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return buffer.getvalue()
