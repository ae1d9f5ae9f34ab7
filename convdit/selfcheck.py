"""``convdit info``: every operator on a small random input, forward and backward, against the reference."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import build_info, ops, reference
from .sparse import ActiveSites, random_patch_mask

Arguments = dict[str, Any]

_N, _SIDE, _C, _T, _HEADS = 2, 9, 24, 11, 3


def _sites() -> ActiveSites:
    generator = torch.Generator().manual_seed(0)
    return ActiveSites.from_patch_mask(random_patch_mask(_N, (3, 3), 0.5, generator), block=2)


def _map() -> Tensor:
    return torch.randn(_N, _SIDE, _SIDE, _C)


def _features() -> Tensor:
    return torch.randn(len(_sites()), _C)


def _depthwise() -> Arguments:
    return {"weight": torch.randn(_C, 1, 7, 7) / 7, "bias": torch.randn(_C)}


def _grn() -> Arguments:
    return {"weight": torch.randn(_C), "bias": torch.randn(_C)}


def _modulation(*names: str) -> Arguments:
    return {name: torch.randn(_N, _C) for name in names}


def _block() -> Arguments:
    depthwise, hidden = _depthwise(), 4 * _C
    return {
        "dwconv_weight": depthwise["weight"],
        "dwconv_bias": depthwise["bias"],
        "norm_weight": torch.randn(_C),
        "norm_bias": torch.randn(_C),
        "pwconv1_weight": torch.randn(hidden, _C) / _C**0.5,
        "pwconv1_bias": torch.randn(hidden),
        "grn_weight": torch.randn(hidden),
        "grn_bias": torch.randn(hidden),
        "pwconv2_weight": torch.randn(_C, hidden) / hidden**0.5,
        "pwconv2_bias": torch.randn(_C),
    }


def _attention() -> Arguments:
    return {
        "x": torch.randn(_N, _T, _C),
        "modulation": torch.randn(_N, 3, _C),
        "qkv_weight": torch.randn(3 * _C, _C) / _C**0.5,
        "qkv_bias": torch.randn(3 * _C),
        "proj_weight": torch.randn(_C, _C) / _C**0.5,
        "proj_bias": torch.randn(_C),
        "num_heads": _HEADS,
    }


def _tokens(*names: str) -> Arguments:
    return {name: torch.randn(_N, _T, _C) for name in names}


# Operator: its arguments by name.
CHECKS: dict[str, Callable[[], Arguments]] = {
    "depthwise_conv2d": lambda: {"x": _map(), **_depthwise()},
    "sparse_depthwise_conv2d": lambda: {"features": _features(), **_depthwise(), "sites": _sites()},
    "convnext_block": lambda: {"x": _map(), **_block()},
    "depthwise_conv2d_layer_norm": lambda: {
        "x": _map(),
        **_depthwise(),
        "ln_weight": torch.randn(_C),
        "ln_bias": torch.randn(_C),
    },
    "grn": lambda: {"x": _map(), **_grn()},
    "gelu_grn": lambda: {"x": _map(), **_grn()},
    "gelu_tanh": lambda: {"x": _map(), "bias": torch.randn(_C)},
    "sparse_grn": lambda: {"features": _features(), **_grn(), "sites": _sites()},
    "sparse_gelu_grn": lambda: {"features": _features(), **_grn(), "sites": _sites()},
    "layer_norm_modulate": lambda: {**_tokens("x"), **_modulation("shift", "scale")},
    "gated_residual": lambda: {**_tokens("x", "y"), **_modulation("gate")},
    "gated_residual_layer_norm_modulate": lambda: {
        **_tokens("x", "y"),
        **_modulation("gate", "shift", "scale"),
    },
    "packed_attention": lambda: {"qkv": torch.randn(_N, _T, 3 * _C), "num_heads": _HEADS},
    "adaln_zero_attention": _attention,
}

TOLERANCE = 1e-4  # of the largest value of each result; float32 keeps all of these well below


def check(name: str, device: str = "cpu") -> float:
    """The largest error of an operator in float32, outputs and gradients, relative to their size.

    The reference is computed in float64 on the CPU.
    """
    torch.manual_seed(0)
    arguments = CHECKS[name]()
    expected = _run(getattr(reference, name), arguments, torch.float64, "cpu")
    found = _run(getattr(ops, name), arguments, torch.float32, device)
    return max(
        float((f.double().cpu() - e).abs().max() / e.abs().max().clamp_min(1e-30))
        for f, e in zip(found, expected, strict=True)
    )


def _run(operator: Callable, arguments: Arguments, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Outputs, then the gradients of a fixed weighted sum of them, in the order of the arguments."""
    values: Arguments = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value = value.to(device, dtype).requires_grad_()
        elif isinstance(value, ActiveSites):
            value = value.to(device)
        values[name] = value
    result = operator(**values)
    outputs = list(result) if isinstance(result, tuple) else [result]
    generator = torch.Generator().manual_seed(1)
    loss = sum((out * torch.randn(out.shape, generator=generator).to(device, dtype)).sum() for out in outputs)
    inputs = [value for value in values.values() if isinstance(value, Tensor)]
    return [out.detach() for out in outputs] + list(torch.autograd.grad(loss, inputs))


def describe() -> tuple[dict[str, Any], bool]:
    """Prints what was built and the result of every check; returns it, and whether all is well."""
    info = build_info()
    report: dict[str, Any] = {"build": info, "torch": torch.__version__, "checks": {}}
    for key, value in info.items():
        print(f"{key:14} {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    print(f"{'torch':14} {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'machine':14} {platform.platform()}")
    devices = ["cpu"] + (["cuda"] if info["cuda"] and torch.cuda.is_available() else [])
    if info["cuda"] and len(devices) == 1:
        print("PyTorch sees no GPU: the CUDA operators are loaded, and not checked")
    print(f"\nforward and backward in float32 against the reference in float64, at most {TOLERANCE:g}")
    good = True
    for device in devices:
        for name in CHECKS:
            try:
                error = check(name, device)
                fine, text = error <= TOLERANCE, f"{error:.1e}"
            except Exception as failure:  # a broken operator must not hide the others
                error, fine, text = float("inf"), False, f"{type(failure).__name__}: {failure}"
            good &= fine
            report["checks"][f"{device}/{name}"] = {"error": text, "ok": fine}
            print(f"{device:5}{name:36} {text:>9}  {'ok' if fine else 'FAILED'}")
    return report, good
