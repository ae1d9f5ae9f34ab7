"""The folder of a run: options, log, checkpoints, weights. Files appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..data.errors import require

CONFIG, LOG, WEIGHTS, CHECKPOINTS = "config.json", "log.jsonl", "model.safetensors", "checkpoints"
RESULT = "result.json"
_METADATA = "convdit"
_BEFORE = {"objective": "noise"}  # keys that older runs lack, and what those runs did


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message says why."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary name beside ``path``, then renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # safetensors writes files that only their owner reads
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)  # the only way to read it is to set it
    os.umask(mask)
    return mask


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=1) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path}: not found") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: damaged: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def save_weights(path: Path, state: dict[str, Tensor], config: dict) -> None:
    """Writes safetensors whose metadata say what the weights are: one file is enough."""
    library = require("safetensors.torch", "saving weights", "safetensors")
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    metadata = {"format": "pt", _METADATA: json.dumps(config)}
    write_whole(path, lambda temporary: library.save_file(tensors, temporary, metadata=metadata))


def read_weights(source: str | Path) -> tuple[dict[str, Tensor], dict | None]:
    """The state_dict of a run folder, a file or a name on the hub, and the configuration it came with (or None).

    Files are read by ``checkpoints.load``: safetensors, or torch files without running pickled code.
    """
    from .. import checkpoints

    if checkpoints.is_hub_name(source):
        return checkpoints.load(source), None
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS
        if not path.exists():
            raise RunError(f"{path}: not found: {source} is not the folder of a finished run")
    elif not path.exists():
        raise RunError(f"{path}: no such file or folder")
    return checkpoints.load(path), read_config(path)


def read_config(path: Path) -> dict | None:
    """The configuration in the metadata of a weights file of ours; None for any other file."""
    if path.suffix != ".safetensors":
        return None
    safe_open = require("safetensors", "reading weights").safe_open
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
        config = json.loads(text) if text else None
    except Exception as error:  # safetensors has its own error type, JSON another
        raise RunError(f"{path}: damaged: {error}") from error
    return config if isinstance(config, dict) else None


class Run:
    """A run folder opened for training.

    ``config`` holds the options of the run. Opening an existing run needs ``resume``, and the same
    options. Nothing is created before all checks have passed.
    """

    def __init__(self, out: str | Path, config: dict, resume: bool = False, main: bool = True) -> None:
        self.path, self.main = Path(out), main
        self.evaluation: dict[str, float] = {}  # the last figures of the model in training
        self.config = json.loads(json.dumps(config))  # as it will be read back: tuples become lists
        if not main:  # the main process checks and writes for all
            return
        for name in (CONFIG, LOG, WEIGHTS, RESULT):  # of a process killed while it wrote
            for leftover in self.path.glob(f".{name}.*.tmp"):
                leftover.unlink()
        exists = (self.path / CONFIG).exists()
        if exists and not resume:
            raise RunError(f"{out}: holds a run already: add --resume, or choose another --out")
        if exists:
            different = _difference(read_json(self.path / CONFIG), self.config)
            if different:
                raise RunError(f"{out}: cannot resume with another {different}")
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(f"{out}: exists and is not the folder of a run: choose another --out")
        elif resume and not self.path.exists():
            raise RunError(f"{out}: not found: there is no run to resume")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / CONFIG, self.config)

    @property
    def finished(self) -> bool:
        return (self.path / WEIGHTS).exists()

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every whole checkpoint, oldest first."""
        found = []
        for path in (self.path / CHECKPOINTS).glob("step-*"):
            number = path.name.removeprefix("step-")
            if path.is_dir() and number.isdigit():
                found.append((int(number), path))
        return sorted(found)

    def save_checkpoint(self, step: int, write: Callable[[Path], None], wait: Callable[[], None]) -> None:
        """All processes ``write`` into a hidden folder, which then takes its name; older go."""
        place = self.path / CHECKPOINTS / f"step-{step:08d}"
        temporary = place.with_name(f".{place.name}.tmp")
        if self.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        wait()
        write(temporary)
        wait()
        if self.main:
            for file in temporary.iterdir():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            shutil.rmtree(place, ignore_errors=True)
            os.rename(temporary, place)
            for _, old in self.checkpoints():
                if old != place:
                    shutil.rmtree(old, ignore_errors=True)
        wait()

    def log(self, entry: dict) -> None:
        if self.main:
            with open(self.path / LOG, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def trim_log(self, step: int) -> None:
        """Drops what was logged after ``step``: a resumed run will log it again."""
        path = self.path / LOG
        if self.main and path.exists():
            kept = [json.dumps(e) + "\n" for e in read_log(self.path) if e.get("step", 0) <= step]
            write_whole(path, lambda temporary: temporary.write_text("".join(kept)))


def read_log(run: str | Path) -> list[dict]:
    """The log of a run; a last line cut short by a crash is left out."""
    entries = []
    for line in (Path(run) / LOG).read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def _difference(saved: dict, asked: dict) -> str | None:
    """The first key that differs, with both values, for a message: an option, from which the rest follows, if any."""
    for key in sorted(saved.keys() | asked.keys(), key=lambda key: (key != "options", key)):
        one, two = saved.get(key, _BEFORE.get(key)), asked.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            inner = _difference(one, two)
            if inner:
                return inner
        elif one != two:
            return f"{key}: the run has {one!r}, asked for {two!r}"
    return None
