"""Tables of tensor names: our name for a tensor beside the name that another project gives it.

A template is a name in which `{i}` and `{j}` stand for any index and `{s}` for an index of at least
1 (stage 0 has no downsampling layer, and in some formats its name would collide with the stem's).
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

__all__ = ["KeyTable", "describe", "fold", "rename"]

_INDEX = r"(?:0|[1-9][0-9]*)"
_PATTERNS = {"i": _INDEX, "j": _INDEX, "s": r"[1-9][0-9]*"}
_SHOWN = 20


class KeyTable:
    """A two-way table of names, read from pairs (ours, theirs).

    `modules` are pairs of layers and stand for their `.weight` and `.bias`; `parameters` are pairs
    of whole tensor names. Where several pairs fit a name the first one wins, so that a later pair
    can be a spelling that is read but never written.
    """

    def __init__(
        self,
        modules: Iterable[tuple[str, str]] = (),
        parameters: Iterable[tuple[str, str]] = (),
    ) -> None:
        pairs = list(parameters)
        for ours, theirs in modules:
            pairs += [(f"{ours}.{leaf}", f"{theirs}.{leaf}") for leaf in ("weight", "bias")]
        self._from_theirs = [(_compile(theirs), ours) for ours, theirs in pairs]
        self._from_ours = [(_compile(ours), theirs) for ours, theirs in pairs]

    def ours(self, key: str) -> str | None:
        """Our name for the tensor that they call `key`; None where the table has none."""
        return _translate(self._from_theirs, key)

    def theirs(self, key: str) -> str | None:
        """Their name for the tensor that we call `key`; None where the table has none."""
        return _translate(self._from_ours, key)


def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for name, index in _PATTERNS.items():
        pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>{index})")
    return re.compile(pattern)


def _translate(rules: list[tuple[re.Pattern[str], str]], key: str) -> str | None:
    for pattern, template in rules:
        match = pattern.fullmatch(key)
        if match:
            return template.format(**match.groupdict())
    return None


def rename(
    state: Mapping[str, Tensor],
    translate: Callable[[str], str | None],
    change: Callable[[str, str, Tensor], Tensor],
) -> tuple[OrderedDict[str, Tensor], list[str]]:
    """Renames every tensor and passes it through `change(old name, new name, tensor)`.

    Returns the new state and the names for which `translate` had no answer. Two tensors that would
    get the same name raise ValueError.
    """
    out: OrderedDict[str, Tensor] = OrderedDict()
    origin: dict[str, str] = {}
    unknown = []
    for key, tensor in state.items():
        new = translate(key)
        if new is None:
            unknown.append(key)
        elif new in out:
            raise ValueError(f"the checkpoint holds one tensor twice: {origin[new]!r} and {key!r}")
        else:
            out[new] = change(key, new, tensor)
            origin[new] = key
    return out, unknown


def describe(keys: Iterable[str]) -> str:
    """The names in a form for an error message: all of them up to twenty, then a count."""
    names = [repr(key) for key in keys]
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def fold(keys: Iterable[str]) -> list[str]:
    """All the names, those that differ in indices alone as one: "layers.*.weight (12)"."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", key) for key in keys)
    return [name if count == 1 and "*" not in name else f"{name} ({count})" for name, count in counts.items()]
