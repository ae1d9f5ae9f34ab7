"""The version of the package, read by the build as well: keep it a plain literal."""

__version__ = "0.1.0"
