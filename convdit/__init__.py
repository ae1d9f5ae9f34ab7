"""convdit: fast ConvNeXt V2, FCMAE and DiT layers for PyTorch, on CPUs and GPUs."""

__version__ = "0.1.0"
