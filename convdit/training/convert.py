"""``convdit convert``: a checkpoint file from one project's format to another's."""

from __future__ import annotations

from pathlib import Path

from .. import checkpoints
from .runs import read_weights


def convert_file(
    source: str | Path,
    target: Path,
    to: str,
    source_format: str | None = None,
    encoder_only: bool = False,
) -> tuple[str, int]:
    """Writes ``target`` whole or not at all; returns the format found and the number of tensors."""
    state, _ = read_weights(source)
    found = source_format or checkpoints.detect(state)
    out = checkpoints.convert(state, to, source_format, encoder_only=encoder_only)
    checkpoints.save(out, target)
    return found, len(out)
