"""The format "dit_official": DiT (adaLN-Zero) as facebookresearch/DiT saves it.

Our names are the same.
Here too is the list of tensors that a DiT has, against which every DiT format is checked.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from convdit.checkpoints.layout import Shape, mismatches, raise_mismatch

__all__ = ["NAME", "check_dit", "matches", "read", "write"]

NAME = "dit_official"


def matches(state: Mapping[str, Tensor]) -> bool:
    """The patch embedding's and the final layer's names."""
    return "x_embedder.proj.weight" in state or any(key.startswith("final_layer.") for key in state)


def read(state: Mapping[str, Tensor]) -> tuple[OrderedDict[str, Tensor], dict[str, Any]]:
    """The state itself, checked."""
    check_dit(state, "this is not a DiT in the official names")
    return OrderedDict(state), {}


def write(ours: Mapping[str, Tensor], facts: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """The state itself."""
    check_dit(ours, f"this checkpoint does not fit {NAME}")
    return OrderedDict(ours)


def check_dit(
    state: Mapping[str, Tensor],
    what: str,
    their_name: Callable[[str], str | None] = lambda key: key,
    unknown: Iterable[str] = (),
) -> None:
    """Raises ValueError unless `state`, in the official names, is exactly an adaLN-Zero DiT.

    The label table may be absent (an unconditional model). The other arguments are those of
    `check_convnext`.
    """
    raise_mismatch(what, *mismatches(state, _shapes(state), their_name, unknown))


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    patch = state.get("x_embedder.proj.weight")
    d = patch.shape[0] if patch is not None and patch.ndim else None

    def times(n: int) -> int | None:
        return None if d is None else n * d

    shapes: dict[str, Shape] = {
        "x_embedder.proj.weight": (d, None, None, None),
        "x_embedder.proj.bias": (d,),
        "pos_embed": (1, None, d),
        **_linear("t_embedder.mlp.0", d, None),
        **_linear("t_embedder.mlp.2", d, d),
        **_linear("final_layer.adaLN_modulation.1", times(2), d),
        **_linear("final_layer.linear", None, d),
    }
    if any(key.startswith("y_embedder.") for key in state):
        shapes["y_embedder.embedding_table.weight"] = (None, d)
    depth = max((int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))), default=0)
    for i in range(depth + 1):
        first = state.get(f"blocks.{i}.mlp.fc1.weight")
        hidden = first.shape[0] if first is not None and first.ndim else None
        shapes.update(
            {
                **_linear(f"blocks.{i}.attn.qkv", times(3), d),
                **_linear(f"blocks.{i}.attn.proj", d, d),
                **_linear(f"blocks.{i}.mlp.fc1", hidden, d),
                **_linear(f"blocks.{i}.mlp.fc2", d, hidden),
                **_linear(f"blocks.{i}.adaLN_modulation.1", times(6), d),
            }
        )
    return shapes


def _linear(name: str, out: int | None, inputs: int | None) -> dict[str, Shape]:
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}
