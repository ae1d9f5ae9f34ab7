"""Reading and writing checkpoint files, without ever running what is in them."""

from __future__ import annotations

import argparse
import os
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convdit.checkpoints import hub
from convdit.checkpoints.names import describe

__all__ = ["facts_of", "load", "save", "unwrap", "with_facts"]

# What training scripts call the weights inside a checkpoint, in the order in which we look for
# them. DiT and SiT keep the weights to sample from under "ema"; ConvNeXt's "model_ema" is an extra,
# read where the caller asks for it.
_WRAPPERS = ("ema", "model", "state_dict", "module")
# Wrappers of PyTorch that put one word before every name: DistributedDataParallel and
# torch.compile.
_PREFIXES = ("module.", "_orig_mod.")
_FACTS = "_convdit_facts"


def load(path: str | os.PathLike[str], key: str | None = None) -> OrderedDict[str, Tensor]:
    """Reads a state_dict: a safetensors file, or a file of `torch.save`, here or on the Hugging Face hub.

    On the hub it is named "hf-hub:OWNER/NAME" or "timm/NAME" ("@REVISION" after it for another one
    than the last), and read from huggingface_hub's cache or fetched into it.

    The kind is seen from the content, not from the name. Files of `torch.save` are read with
    `weights_only=True`, with `argparse.Namespace` allowed besides (the official checkpoints hold
    their arguments in one): a file that asks for anything else is refused, and none of its code
    runs.

    Where the weights stand inside a training checkpoint they are taken out: the entry `key` where
    it is given, else the first of "ema", "model", "state_dict", "module" that is there, again until
    only tensors are left. A prefix "module." or "_orig_mod." that all names share is removed.
    Tensors come to the CPU.

    Raises FileNotFoundError, IsADirectoryError, or ValueError naming the path and the reason;
    ConnectionError where the hub is needed and cannot be reached.
    """
    path = hub.download(str(path)) if hub.is_hub_name(path) else Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a checkpoint file, this is a directory")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    if not path.is_file():
        raise ValueError(f"{path}: expected a checkpoint file, this is a device or a pipe")
    with path.open("rb") as file:
        head = file.read(9)
    # Safetensors first: its leading length can look like either mark of torch.save, theirs never
    # have "{" there.
    if head[8:] == b"{":
        content = _load_safetensors(path)
    elif head[:2] == b"PK" or head[:1] == b"\x80":
        content = _load_torch(path)
    else:
        raise ValueError(f"{path}: not a checkpoint: it is empty, or neither a safetensors file nor one of torch.save")
    try:
        return unwrap(content, key)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _load_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes in the reader
        reason = _first_line(error)
        raise ValueError(
            f"{path}: cannot read this file of torch.save: it is damaged, or holds objects other "
            "than tensors and plain values, which are refused because loading them can run code. "
            f"The reader says: {reason}"
        ) from error


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return _safetensors().load_file(path, device="cpu")
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: damaged safetensors file. The reader says: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    refused = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (refused or lines or [type(error).__name__])[0][:300]


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors files need the package safetensors: pip install safetensors") from error
    return safetensors.torch


def unwrap(content: Any, key: str | None = None) -> OrderedDict[str, Tensor]:
    """Takes the weights out of what a checkpoint file holds, by the rules that `load` states.

    Raises TypeError where it is not a mapping, ValueError where the entry is not there or something
    in the state is not a tensor.
    """
    facts = facts_of(content)
    if not isinstance(content, Mapping):
        raise TypeError(f"expected a state_dict (a mapping of names to tensors), got {_kind(content)}")
    if key is not None:
        if not isinstance(content.get(key), Mapping):
            raise ValueError(f"no weights under {key!r}; the entries are {describe(map(str, content))}")
        facts |= _facts_from_args(content)
        content = content[key]
    while inner := next((w for w in _WRAPPERS if isinstance(content.get(w), Mapping)), None):
        facts |= _facts_from_args(content)
        content = content[inner]
    if not content:
        raise ValueError("the checkpoint holds no tensors")
    strange = [f"{k} ({_kind(v)})" for k, v in content.items() if not isinstance(v, Tensor)]
    if strange or not all(isinstance(k, str) for k in content):
        raise ValueError(f"expected names and tensors only, found {describe(strange or map(str, content))}")
    state = OrderedDict((k, v.detach()) for k, v in content.items())
    for prefix in _PREFIXES:
        if all(k.startswith(prefix) for k in state):
            state = OrderedDict((k.removeprefix(prefix), v) for k, v in state.items())
    return with_facts(state, facts)


def _kind(value: Any) -> str:
    return type(value).__name__


def _facts_from_args(content: Mapping[str, Any]) -> dict[str, Any]:
    """SiT's training script saves its arguments; they alone tell its weights from DiT's."""
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, Mapping):
        return {}
    is_sit = str(args.get("model", "")).startswith("SiT") or "path_type" in args
    return {"kind": "sit"} if is_sit else {}


def facts_of(state: Any) -> dict[str, Any]:
    """What is known of a state's origin that its tensors do not show (see `with_facts`)."""
    return dict(getattr(state, _FACTS, {}))


def with_facts(state: OrderedDict[str, Tensor], facts: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """Notes on the dictionary what its tensors cannot say, as PyTorch does with `_metadata`.

    With it, converting back in the same program gives the very layout that came in. Files do not
    keep it.
    """
    setattr(state, _FACTS, dict(facts))
    return state


def save(
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a safetensors file, whole or not at all: to a temporary name beside it, then renamed.

    Tensors that share memory are written in full, each under its name. Raises TypeError for
    anything but tensors, and FileNotFoundError where the folder does not exist, before anything is
    written. Returns the path.
    """
    path = Path(path)
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict: expected names and tensors, got {name!r}: {_kind(tensor)}")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected the name of a file, this is a directory")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    tensors, seen = {}, set()
    for name, tensor in state_dict.items():
        tensor = tensor.detach().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    writer = _safetensors()
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        writer.save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
