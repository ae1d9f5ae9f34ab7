"""``convdit accelerate``: what `accelerate` does to a model named on the command line. No weights are loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from . import Report, accelerate

KINDS = "timm/NAME, transformers/TYPE, diffusers/CLASS or FILE.py:FUNCTION"


def report(name: str) -> Report:
    """The report on the model of this name, made without memory for its parameters.

    Raises:
        ValueError: a name that is none of `KINDS`, or that its library does not know.
        ImportError: a library that is not installed.
    """
    with torch.device("meta"):
        model = _make(name)
    if not isinstance(model, nn.Module):
        raise ValueError(f"MODEL: expected {name} to make a torch.nn.Module, got {type(model).__name__}")
    return accelerate(model)


def _make(name: str) -> object:
    kind, _, rest = name.partition("/")
    if kind == "timm" and rest:
        import timm

        if not timm.is_model(rest):
            raise ValueError(f"MODEL: expected the name of a model of timm, got {rest!r}")
        return timm.create_model(rest)
    if kind == "transformers" and rest:
        from transformers import AutoConfig, AutoModel

        return AutoModel.from_config(AutoConfig.for_model(rest))
    if kind == "diffusers" and rest:
        import diffusers

        if not hasattr(diffusers, rest):
            raise ValueError(f"MODEL: expected the name of a class of diffusers, got {rest!r}")
        return getattr(diffusers, rest)()
    path, _, function = name.rpartition(":")
    if path.endswith(".py") and Path(path).is_file():
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None and spec.loader is not None  # of a file that is there, ending in .py
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise ValueError(f"MODEL: expected a function or class of {path}, got {function!r}")
        return getattr(module, function)()
    raise ValueError(f"MODEL: expected {KINDS}, got {name!r}")
