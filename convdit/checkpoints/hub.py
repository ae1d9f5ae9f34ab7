"""Checkpoints by their names on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

__all__ = ["download", "is_hub_name"]

_PREFIX = "hf-hub:"
_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")
# The last two are open_clip's, whole models.
_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Whether this names a repository on the hub: "hf-hub:OWNER/NAME", or "timm/NAME" that is no file here."""
    if not isinstance(name, str):
        return False
    return name.startswith(_PREFIX) or (name.startswith("timm/") and not Path(name).exists())


def download(name: str) -> Path:
    """The weights of a repository on the hub, from the cache of huggingface_hub or from the network.

    name: "hf-hub:OWNER/NAME" or "timm/NAME", and "@REVISION" after it for another one than the last.
    The file is `model.safetensors`, else `pytorch_model.bin`, else open_clip's: `open_clip_model.safetensors`
    or `open_clip_pytorch_model.bin`.

    Raises ValueError for a name that is none, FileNotFoundError where the hub has no such
    repository, revision or file, ConnectionError where it cannot be reached and the cache has no
    copy, and ImportError without the package huggingface_hub.
    """
    match = _NAME.fullmatch(name.removeprefix(_PREFIX))
    if match is None:
        raise ValueError(f"{name}: expected hf-hub:OWNER/NAME or timm/NAME, with @REVISION after it for another one")
    hub = _huggingface_hub()
    unreachable = None
    for file in _FILES:
        try:
            # Once out of reach, always: the network is not waited for again.
            cached = unreachable is not None
            where = {"revision": match["revision"], "local_files_only": cached}
            return Path(hub.hf_hub_download(match["repository"], file, **where))
        except hub.errors.LocalEntryNotFoundError as error:
            unreachable = error
        except hub.errors.EntryNotFoundError:
            continue
        except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
            raise FileNotFoundError(
                f"{name}: no such repository or revision on the hub, or a login is needed"
            ) from error
        except hub.errors.HFValidationError as error:
            raise ValueError(f"{name}: no name of a repository: {error}") from error
        except (hub.errors.HfHubHTTPError, hub.errors.OfflineModeIsEnabled) as error:
            unreachable = error
    if unreachable is None:
        raise FileNotFoundError(f"{name}: the repository has no file {' or '.join(_FILES)}")
    raise ConnectionError(
        f"{name}: the Hugging Face hub cannot be reached (no network, or HF_HUB_OFFLINE is set), and its cache in "
        f"{hub.constants.HF_HUB_CACHE} has no copy. Download the file where there is a network and give its path"
    ) from unreachable


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError("names on the hub need the package huggingface_hub: pip install 'convdit[hub]'") from error
    return huggingface_hub
