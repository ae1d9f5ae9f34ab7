"""convdit: fast ConvNeXt V2, FCMAE and DiT layers for PyTorch, on CPUs and GPUs."""

from ._library import build_info
from ._version import __version__

__all__ = ["__version__", "build_info"]
