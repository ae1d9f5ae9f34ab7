"""Checkpoints: files, and conversion between the names and layouts of several projects.

Strict: a conversion accounts for every tensor or raises ValueError naming what is missing and what
is unexpected. One file a format; each has `matches`, `read` (to our names) and `write` (from our
names).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

from convdit.checkpoints import (
    convdit_format,
    diffusers,
    dit_official,
    minkowski,
    official,
    sit,
    timm,
    transformers,
)
from convdit.checkpoints.files import facts_of, load, save, unwrap, with_facts
from convdit.checkpoints.hub import is_hub_name
from convdit.checkpoints.layout import encoder_of
from convdit.checkpoints.names import describe

__all__ = ["convert", "detect", "formats", "is_hub_name", "load", "part", "save", "sparse_to_dense"]

# In the order of detection: a format whose names another one's pattern would also fit comes first.
_FORMATS = {
    module.NAME: module
    for module in (
        diffusers,
        sit,
        dit_official,
        transformers,
        timm,
        minkowski,
        official,
        convdit_format,
    )
}
_DIT = {"diffusers", "dit_official", "sit"}
_OPEN_CLIP = "visual.trunk"  # where open_clip keeps an image tower of timm


def formats() -> list[str]:
    """The names of the formats, as `detect` returns them and `convert` takes them."""
    return sorted(_FORMATS)


def detect(state_dict: Mapping[str, Tensor]) -> str:
    """The format of a state_dict, or of a training checkpoint that holds one.

    "convdit" (ConvNeXt V1 and V2, FCMAE), "convnextv2_official", "fcmae_minkowski", "timm",
    "transformers", "dit_official" (our own DiT too: its names are the official ones), "diffusers",
    or "sit". SiT's tensors are DiT's: it is recognised only where the checkpoint holds its training
    arguments. Raises ValueError where no format fits.
    """
    state = unwrap(state_dict)
    return _detect(state)


def _detect(state: Mapping[str, Tensor]) -> str:
    for name, module in _FORMATS.items():
        if module.matches(state):
            return facts_of(state).get("kind", name) if name == dit_official.NAME else name
    hint = ""
    if any(key.startswith(f"{_OPEN_CLIP}.") for key in state):
        hint = (
            f". A whole open_clip model: take part(state_dict, {_OPEN_CLIP!r}), or convdit convert --part {_OPEN_CLIP}"
        )
    raise ValueError(f"state_dict: none of the formats {', '.join(formats())} has these names: {describe(state)}{hint}")


def part(state_dict: Mapping[str, Tensor], prefix: str) -> tuple[OrderedDict[str, Tensor], list[str]]:
    """Takes one module of a larger model out of its state_dict: "visual.trunk" of a whole open_clip model.

    Returns the tensors whose names begin with `prefix` and a dot, named without them, and the names
    of all other tensors: what the caller leaves out.

    Raises ValueError where no name begins so.
    """
    state, start = unwrap(state_dict), prefix.removesuffix(".") + "."
    taken = OrderedDict((key.removeprefix(start), value) for key, value in state.items() if key.startswith(start))
    if not taken:
        raise ValueError(
            f"part: expected the first words of some names, got {prefix!r}; the names are {describe(state)}"
        )
    return with_facts(taken, facts_of(state)), [key for key in state if not key.startswith(start)]


def convert(
    state_dict: Mapping[str, Tensor],
    to: str,
    source: str | None = None,
    *,
    encoder_only: bool = False,
    input_size: int | tuple[int, int] | None = None,
) -> OrderedDict[str, Tensor]:
    """Converts a state_dict from the format `source` (detected where None) to the format `to`.

    `to="convdit"` gives a state that loads strictly into `models.create(...)`, `models.FCMAE(...)`
    or `models.DiT(...)`. Values are only moved, never computed with: there and back again is
    bit-exact. Tensors that need no change are passed on, not copied. A training checkpoint with its
    weights under "ema", "model" or "state_dict" is unwrapped.

    A part that the target has no place for raises. `encoder_only=True` keeps a ConvNeXt's stem,
    downsampling layers and stages, and lets FCMAE's decoder, the final norm and the head go.

    diffusers does not store DiT's position table. `input_size`, the height and width of the latent,
    rebuilds it; without it `to="convdit"` leaves the table to `models.DiT`, which knows its size.

    Raises ValueError for an unknown format, for missing or unexpected keys (named), and for wrong
    shapes.
    """
    for name, value in (("to", to), ("source", source)):
        if value is not None and value not in _FORMATS:
            raise ValueError(f"{name}: expected one of {', '.join(formats())}, got {value!r}")
    state = unwrap(state_dict)
    source = source or _detect(state)
    if input_size is not None and dit_official.is_dit(state):
        state = dit_official.with_positions(state, {**facts_of(state), **_grid(state, input_size)})
    ours, facts = _FORMATS[source].read(state)
    facts = {**facts_of(state), **facts}
    is_dit = dit_official.is_dit(ours)
    if to != convdit_format.NAME and is_dit != (to in _DIT):
        kind = "DiT" if is_dit else "ConvNeXt"
        raise ValueError(f"to: a {kind} checkpoint cannot be written in the format {to!r}")
    if encoder_only:
        if is_dit:
            raise ValueError("encoder_only: a DiT checkpoint has no encoder to keep")
        ours = encoder_of(ours)
    if is_dit:
        facts |= _grid(ours, input_size)
    out = _FORMATS[to].write(ours, facts)
    if to in (sit.NAME, dit_official.NAME):
        facts["kind"] = to
    return with_facts(out, facts)


def _grid(ours: Mapping[str, Tensor], input_size: int | tuple[int, int] | None) -> dict[str, tuple[int, int]]:
    """The grid of patches of a DiT, where it is told or its stored position table is square."""
    if input_size is not None:
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        weight = ours.get("x_embedder.proj.weight")
        if weight is None or weight.ndim != 4:
            return {}  # reading the state will say so
        patch = weight.shape[-1]
        if height < 1 or width < 1 or height % patch or width % patch:
            raise ValueError(f"input_size: expected multiples of patch {patch}, got {input_size}")
        grid = (height // patch, width // patch)
        if "pos_embed" in ours and ours["pos_embed"].shape[1] != grid[0] * grid[1]:
            positions = ours["pos_embed"].shape[1]
            raise ValueError(f"input_size: {input_size} does not have {positions} patches")
        return {"grid": grid}
    positions = ours["pos_embed"].shape[1] if "pos_embed" in ours else 0
    side = math.isqrt(positions)
    return {"grid": (side, side)} if side and side * side == positions else {}


def sparse_to_dense(state_dict: Mapping[str, Tensor], *, encoder_only: bool = False) -> OrderedDict[str, Tensor]:
    """The dense encoder of an FCMAE checkpoint, in our names.

    It loads strictly into `models.create(..., features_only=True)`.

    Takes MinkowskiEngine's names (a whole FCMAE, an encoder alone, a fine-tuned state), and any
    other ConvNeXt format. A dense encoder has no place for a decoder, a final norm or a head: where
    the checkpoint has them this raises ValueError naming them, unless `encoder_only=True` says to
    leave them out.
    """
    ours = convert(state_dict, convdit_format.NAME)
    if dit_official.is_dit(ours):
        raise ValueError("state_dict: expected an FCMAE or ConvNeXt checkpoint, got a DiT")
    encoder = encoder_of(ours)
    rest = [key for key in ours if key.removeprefix("encoder.") not in encoder]
    if rest and not encoder_only:
        raise ValueError(
            f"unexpected keys: {describe(rest)}: a dense encoder has no place for them. Pass "
            "encoder_only=True to leave them out, or use convert(state_dict, 'convdit')"
        )
    return with_facts(encoder, {})
