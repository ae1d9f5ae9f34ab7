"""Times convdit's operators against PyTorch: python -m benchmarks [operator ...] [--quick] [--out FILE.json]."""
