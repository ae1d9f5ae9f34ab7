"""``convdit convert``: a checkpoint file from one project's format to another's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import checkpoints
from ..checkpoints import transformers
from ..checkpoints.names import fold
from .runs import read_weights


def convert_file(
    source: str | Path,
    target: Path,
    to: str,
    source_format: str | None = None,
    encoder_only: bool = False,
    input_size: Sequence[int] | None = None,
    part: str | None = None,
) -> list[str]:
    """Writes ``target`` whole or not at all; returns what there is to tell, in lines.

    ``input_size`` is the side, or the height and width, of a DiT's latent. ``part`` takes the tensors under this name
    alone. What is left out is named: the others, in the names of the source, and what ``encoder_only`` drops, in
    ours.
    """
    size = None
    if input_size is not None:
        if len(input_size) not in (1, 2):
            raise ValueError(f"input_size: expected one or two whole numbers, got {list(input_size)}")
        size = (input_size[0], input_size[-1])
    state, _ = read_weights(source)
    left: list[str] = []
    if part is not None:
        state, left = checkpoints.part(state, part)
    found = source_format or checkpoints.detect(state)
    out = checkpoints.convert(state, to, source_format, encoder_only=encoder_only, input_size=size)
    if encoder_only:
        kept = checkpoints.convert(state, "convdit", source_format, encoder_only=True)
        whole = checkpoints.convert(state, "convdit", source_format)
        left += [name for name in whole if name.removeprefix("encoder.") not in kept]
    checkpoints.save(out, target)
    lines = [f"{source} ({found}) -> {target} ({to}): {len(out)} tensors"]
    if transformers.NAME in (found, to):
        lines.append(f"note: {transformers.NOTE}")
    if left:
        lines.append(f"left out: {len(left)} tensors: {', '.join(fold(left))}")
    return lines
