"""The format "diffusers": DiT as Hugging Face diffusers names it (`DiTTransformer2DModel`).

- q, k and v are three Linear layers where DiT has one with three times the rows.
- Every block holds its own copy of the timestep embedder and of the label table. They must be
  equal, else no DiT says the same.
- The position table is computed and not stored. Going to diffusers it is dropped, after a check
  that it is the fixed sine-cosine table of a square grid; coming back, the model fills in its own.

What no tensor shows: diffusers divides the timestep's frequencies by 127 instead of 128 and gives
the LayerNorm before the MLP eps 1e-5 instead of 1e-6. Weights that were trained in one of the two
give other outputs in the other; a conversion says so in a warning. `models.DiT(constants="diffusers")`
computes as diffusers does.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from convdit.checkpoints.dit_official import check_dit
from convdit.checkpoints.files import with_facts
from convdit.checkpoints.layout import raise_mismatch
from convdit.checkpoints.names import KeyTable, rename
from convdit.nn.dit_embed import sincos_position_table

__all__ = ["NAME", "matches", "read", "write"]

NAME = "diffusers"

_OURS, _THEIRS = "blocks.{i}", "transformer_blocks.{i}"
_TABLE = KeyTable(
    modules=[
        ("x_embedder.proj", "pos_embed.proj"),
        (f"{_OURS}.adaLN_modulation.1", f"{_THEIRS}.norm1.linear"),
        (f"{_OURS}.attn.proj", f"{_THEIRS}.attn1.to_out.0"),
        (f"{_OURS}.mlp.fc1", f"{_THEIRS}.ff.net.0.proj"),
        (f"{_OURS}.mlp.fc2", f"{_THEIRS}.ff.net.2"),
        ("final_layer.adaLN_modulation.1", "proj_out_1"),
        ("final_layer.linear", "proj_out_2"),
    ],
)
# Ours, once; theirs in every block, after "transformer_blocks.{i}.norm1.emb.".
_EMBEDDERS = KeyTable(
    modules=[
        ("t_embedder.mlp.0", "timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "timestep_embedder.linear_2"),
    ],
    parameters=[("y_embedder.embedding_table.weight", "class_embedder.embedding_table.weight")],
)
_COPY = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.+)")
_PART = re.compile(r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])\.(weight|bias)")
_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_STORED_TABLE = "pos_embed.pos_embed"  # some versions of diffusers stored it


def matches(state: Mapping[str, Tensor]) -> bool:
    """diffusers' names for the blocks of a DiT: adaLN with an embedder in each."""
    return any(_COPY.fullmatch(key) for key in state)


def read(state: Mapping[str, Tensor]) -> tuple[OrderedDict[str, Tensor], dict[str, Any]]:
    """To our names, without `pos_embed`."""
    _warn()
    parts: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, dict[int, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in state.items():
        part, copy = _PART.fullmatch(key), _COPY.fullmatch(key)
        if part:
            parts.setdefault(f"blocks.{part[1]}.attn.qkv.{part[3]}", {})[part[2]] = tensor
        elif copy and (embedder := _EMBEDDERS.ours(copy[2])):
            copies.setdefault(embedder, {})[int(copy[1])] = tensor
        else:
            rest[key] = tensor
    facts = _take_table(rest)
    ours, unknown = rename(rest, _TABLE.ours, lambda old, new, tensor: tensor)
    missing = [_part_name(key, letter) for key, qkv in parts.items() for letter in "qkv" if letter not in qkv]
    blocks = {int(key.split(".")[1]) for key in [*ours, *parts] if key.startswith("blocks.")}
    for key, by_block in copies.items():
        missing += [_copy_name(key, i) for i in sorted(blocks - by_block.keys())]
        unknown += [_copy_name(key, i) for i in sorted(by_block.keys() - blocks)]
    what = "this is not a DiT in the names of diffusers"
    raise_mismatch(what, missing, unknown)
    ours.update((key, _join(key, qkv)) for key, qkv in parts.items())
    ours.update((key, _one(key, by_block)) for key, by_block in copies.items())
    check_dit(with_facts(ours, facts), what, _their_name, design="adaln_zero")
    return ours, facts


def _join(key: str, qkv: Mapping[str, Tensor]) -> Tensor:
    shapes = [tuple(qkv[letter].shape) for letter in "qkv"]
    if len(set(shapes)) > 1 or not shapes[0]:
        names = ", ".join(repr(_part_name(key, letter)) for letter in "qkv")
        raise ValueError(f"{names} have shapes {shapes}, expected three times the same")
    return torch.cat([qkv[letter] for letter in "qkv"])


def _one(key: str, by_block: Mapping[int, Tensor]) -> Tensor:
    first = min(by_block)
    for i, tensor in by_block.items():
        if not torch.equal(tensor, by_block[first]):
            raise ValueError(
                f"{_copy_name(key, i)!r} differs from {_copy_name(key, first)!r}: a DiT has one embedder for all blocks"
            )
    return by_block[first]


def write(ours: Mapping[str, Tensor], facts: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """From our names. Every tensor has memory of its own, the copies too."""
    what = f"this checkpoint does not fit {NAME}"
    check_dit(with_facts(OrderedDict(ours), facts), what, design="adaln_zero")
    if "y_embedder.embedding_table.weight" not in ours:
        raise ValueError(f"{what}: missing keys: 'y_embedder.embedding_table.weight'")
    _check_positions(ours)
    _warn()
    blocks = sorted({int(key.split(".")[1]) for key in ours if key.startswith("blocks.")})
    out: OrderedDict[str, Tensor] = OrderedDict()
    for key, tensor in ours.items():
        if _QKV.fullmatch(key):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                out[_part_name(key, letter)] = part.clone()
        elif _EMBEDDERS.theirs(key):
            for i in blocks:
                out[_copy_name(key, i)] = tensor.clone()
        elif key != "pos_embed":
            theirs = _TABLE.theirs(key)
            assert theirs is not None, key  # check_dit let no other name through
            out[theirs] = tensor
    return out


def _part_name(ours: str, letter: str) -> str:
    found = _QKV.fullmatch(ours)
    assert found is not None, ours
    return f"transformer_blocks.{found[1]}.attn1.to_{letter}.{found[2]}"


def _copy_name(ours: str, block: int) -> str:
    return f"transformer_blocks.{block}.norm1.emb.{_EMBEDDERS.theirs(ours)}"


def _their_name(ours: str) -> str | None:
    if _QKV.fullmatch(ours):
        return _part_name(ours, "q")
    return _copy_name(ours, 0) if _EMBEDDERS.theirs(ours) else _TABLE.theirs(ours)


def _is_fixed(table: Tensor) -> bool:
    """Whether `table` (1, T, D) is the sine-cosine table of a square grid, to rounding."""
    side = math.isqrt(table.shape[1])
    if side * side != table.shape[1] or table.shape[2] % 4:
        return False
    fixed = sincos_position_table(table.shape[2], (side, side)).to(table.device)
    rounding = 2 * torch.finfo(table.dtype).eps + 1e-6  # values lie in -1..1
    return bool((table[0].double() - fixed).abs().max() <= rounding)


def _check_positions(ours: Mapping[str, Tensor]) -> None:
    if "pos_embed" in ours and not _is_fixed(ours["pos_embed"]):
        raise ValueError(
            "'pos_embed' is not the fixed sine-cosine table of a square grid, and diffusers, which "
            "computes that one, has no place for another"
        )


def _take_table(rest: dict[str, Tensor]) -> dict[str, Any]:
    """Removes a stored position table; what is known of the positions after that."""
    table = rest.pop(_STORED_TABLE, None)
    if table is None:
        return {"computes_positions": True}
    if table.ndim != 3 or not _is_fixed(table):
        raise ValueError(f"{_STORED_TABLE!r} is not the fixed sine-cosine table of a square grid")
    side = math.isqrt(table.shape[1])
    return {"computes_positions": True, "grid": (side, side)}


def _warn() -> None:
    warnings.warn(
        "diffusers' DiT computes timestep frequencies (divisor 127, not 128) and one LayerNorm "
        "(eps 1e-5, not 1e-6) otherwise than facebookresearch/DiT and convdit: weights trained in "
        "one of them give other outputs in the other. For weights trained in diffusers build "
        'models.DiT(..., constants="diffusers"), which computes as it does; weights trained here need '
        "downscale_freq_shift=0 and norm_eps=1e-6 there",
        stacklevel=4,
    )
