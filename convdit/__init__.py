"""convdit: fast ConvNeXt V2, FCMAE and DiT layers for PyTorch, on CPUs and GPUs."""

from . import checkpoints, diffusion, models, nn, ops, reference, sparse
from ._library import build_info
from ._version import __version__
from .dropin import accelerate, restore
from .flops import flops

__all__ = [
    "__version__",
    "accelerate",
    "build_info",
    "checkpoints",
    "diffusion",
    "flops",
    "models",
    "nn",
    "ops",
    "reference",
    "restore",
    "sparse",
]
