"""The format "dit_official": DiT (adaLN-Zero) as facebookresearch/DiT saves it.

Our names are the same. Here too is the list of the tensors that a DiT has, in each of our four
designs, against which every DiT format is checked.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from convdit.checkpoints.files import facts_of, with_facts
from convdit.checkpoints.layout import Shape, mismatches, raise_mismatch, rows
from convdit.nn.dit_embed import sincos_position_table

__all__ = ["NAME", "check_dit", "design_of", "is_dit", "matches", "read", "with_positions", "write"]

NAME = "dit_official"

_PUBLISHED = "adaln_zero"


def is_dit(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are a DiT's, ours or the official ones, in any design."""
    return any(key.startswith(("x_embedder.", "final_layer.")) for key in state)


def matches(state: Mapping[str, Tensor]) -> bool:
    """A DiT in the only design that the official names have."""
    return is_dit(state) and design_of(state) == _PUBLISHED


def read(state: Mapping[str, Tensor]) -> tuple[OrderedDict[str, Tensor], dict[str, Any]]:
    """The state itself, checked."""
    check_dit(state, "this is not a DiT in the official names", design=_PUBLISHED)
    return OrderedDict(state), facts_of(state)


def write(ours: Mapping[str, Tensor], facts: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """The state itself, with its position table."""
    out = with_positions(ours, facts)
    if "pos_embed" not in out:
        raise ValueError(
            "missing keys: 'pos_embed': the source computes the position table and does not store "
            "it; pass input_size, the height and width of the latent"
        )
    check_dit(out, f"this checkpoint does not fit {NAME}", design=_PUBLISHED)
    return out


def with_positions(ours: Mapping[str, Tensor], facts: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """The state with `pos_embed` rebuilt where it is absent and the grid of patches is known."""
    out = OrderedDict(ours)
    if "pos_embed" not in out and "grid" in facts:
        weight = out["x_embedder.proj.weight"]
        out["pos_embed"] = sincos_position_table(weight.shape[0], facts["grid"])[None].to(weight)
    return with_facts(out, facts)


def design_of(state: Mapping[str, Tensor]) -> str:
    """Which `conditioning` of `models.DiT` the names belong to; "adaln_zero" where unclear."""
    if any(".cross_attn." in key for key in state):
        return "cross_attention"
    modulation = [key for key in state if re.fullmatch(r"blocks\.\d+\.adaLN_modulation\..+", key)]
    if not modulation and any(re.match(r"blocks\.\d+\.norm\d\.", key) for key in state):
        return "in_context"
    shapes = [state[key].shape for key in modulation if state[key].ndim == 2]
    return "adaln" if shapes and all(out == 4 * d for out, d in shapes) else _PUBLISHED


def check_dit(
    state: Mapping[str, Tensor],
    what: str,
    their_name: Callable[[str], str | None] = lambda key: key,
    unknown: Iterable[str] = (),
    design: str | None = None,
) -> None:
    """Raises ValueError unless `state`, in our names, is exactly a DiT of that design.

    `design` None takes the one that the names belong to. The label table may be absent, as in an
    unconditional model, and `pos_embed` where the state comes from a format that computes it (the
    fact "computes_positions"). The other arguments are those of `check_convnext`.
    """
    expected = _shapes(state, design or design_of(state))
    if "pos_embed" not in state and facts_of(state).get("computes_positions"):
        del expected["pos_embed"]
    raise_mismatch(what, *mismatches(state, expected, their_name, unknown))


def _shapes(state: Mapping[str, Tensor], design: str) -> dict[str, Shape]:
    d = rows(state, "x_embedder.proj.weight")
    modulation_rows = {"adaln_zero": 6, "adaln": 4}.get(design, 0)
    shapes: dict[str, Shape] = {
        "x_embedder.proj.weight": (d, None, None, None),
        "x_embedder.proj.bias": (d,),
        "pos_embed": (1, None, d),
        **_linear("t_embedder.mlp.0", d, None),
        **_linear("t_embedder.mlp.2", d, d),
        **_linear("final_layer.linear", rows(state, "final_layer.linear.weight"), d),
    }
    if modulation_rows:
        shapes.update(_linear("final_layer.adaLN_modulation.1", _times(2, d), d))
    else:
        shapes.update(_norm("final_layer.norm_final", d))
    if any(key.startswith("y_embedder.proj.") for key in state):  # a text in place of the class
        context = state.get("y_embedder.proj.weight")
        shapes.update(_linear("y_embedder.proj", d, None if context is None else context.shape[-1]))
        if "y_embedder.null" in state:
            shapes["y_embedder.null"] = (d,)
    elif any(key.startswith("y_embedder.") for key in state):
        shapes["y_embedder.embedding_table.weight"] = (None, d)
    blocks = [int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))]
    for i in range(max(blocks, default=0) + 1):
        name = f"blocks.{i}"
        hidden = rows(state, f"{name}.mlp.fc1.weight")
        shapes.update(_linear(f"{name}.attn.qkv", _times(3, d), d))
        shapes.update(_linear(f"{name}.attn.proj", d, d))
        shapes.update(_linear(f"{name}.mlp.fc1", hidden, d))
        shapes.update(_linear(f"{name}.mlp.fc2", d, hidden))
        if modulation_rows:
            shapes.update(_linear(f"{name}.adaLN_modulation.1", _times(modulation_rows, d), d))
        else:
            shapes.update({**_norm(f"{name}.norm1", d), **_norm(f"{name}.norm2", d)})
        if design == "cross_attention":
            shapes.update(_norm(f"{name}.norm_cross", d))
            for part in ("q", "k", "v", "proj"):
                shapes.update(_linear(f"{name}.cross_attn.{part}", d, d))
    return shapes


def _times(n: int, d: int | None) -> int | None:
    return None if d is None else n * d


def _linear(name: str, out: int | None, inputs: int | None) -> dict[str, Shape]:
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


def _norm(name: str, d: int | None) -> dict[str, Shape]:
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}
