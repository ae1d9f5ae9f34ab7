"""Errors that name what is wrong with a data set or with the installation."""

from __future__ import annotations

import importlib
from types import ModuleType


class DataError(ValueError):
    """A data set that is missing, damaged or of another form; the message names the file."""


def require(module: str, purpose: str, package: str | None = None) -> ModuleType:
    """Imports an optional dependency, or says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs the package {package or module}, which cannot be imported ({error}); "
            "cure: pip install 'convdit[train]'"
        ) from error
