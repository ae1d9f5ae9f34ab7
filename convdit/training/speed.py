"""Throughput of a training step in FLOPs, and the share of the device's peak that it is."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from ..flops import flops

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a square matrix product of ``size``, the best of a few: what the device does at its best."""
    size = size or (8192 if device.type == "cuda" else 768)
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def utilisation(
    model: nn.Module, inputs: tuple, device: torch.device, precision: str | None, world: int, peak: float | None = None
) -> Callable[[float], dict[str, float]]:
    """From pictures a second to "tflops", those of the model's convolutions and matrix products, and "mfu".

    A step counts three forwards (the backward is two), as the field does; ``inputs`` are those of one picture.
    "mfu", the model FLOP utilisation (PaLM, Chowdhery et al. 2022, appendix B), is the share of ``peak`` FLOP/s of
    each of ``world`` devices, or else of a large matrix product in the precision of the training, measured here.
    """
    per_picture = 6 * flops(model, *inputs).macs
    peak = peak or matmul_rate(device, _DTYPES.get(precision or "no", torch.float32))

    def figures(images_per_s: float) -> dict[str, float]:
        rate = per_picture * images_per_s
        return {"tflops": round(rate / 1e12, 5), "mfu": round(rate / (peak * world), 4)}

    return figures
