"""Which tensors, of which shapes, a ConvNeXt or an FCMAE has under our names.

Our names are those of the official ConvNeXt-V2 repository: `downsample_layers.i.k`, `stages.i.j.*`,
`norm` (in a detection backbone `norm0`, `norm1`, ..., one a stage), `head`, and for FCMAE `encoder.*`,
`mask_token`, `proj`, `decoder.j.*`, `pred`. GRN parameters have the shape (4C,). Every format is checked
here after reading and before writing, so "strict" means the same for all of them.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from convdit.checkpoints.names import describe, rename

__all__ = [
    "check_convnext",
    "encoder_of",
    "flat_grn",
    "is_convnext",
    "is_decoder_key",
    "join",
    "mismatches",
    "raise_mismatch",
    "rename_all",
    "rows",
    "split",
]

Shape = tuple[int | None, ...]

_PREFIX = "encoder."
_DECODER = re.compile(r"mask_token|(?:proj|pred|decoder)\..+")
_HEAD = re.compile(r"(?:norm\d*|head)\..+")
_ATTENTION = r"stages\.{}\.\d+\.(?:norm1|attn|norm2|mlp)\."


def is_decoder_key(key: str) -> bool:
    """Whether a tensor of this name belongs to FCMAE's decoder or is its mask token."""
    return _DECODER.fullmatch(key) is not None


def split(
    state: Mapping[str, Tensor],
) -> tuple[OrderedDict[str, Tensor], OrderedDict[str, Tensor], bool]:
    """Takes an FCMAE apart: (ConvNeXt, decoder, whether the names had the prefix `encoder.`).

    A bare ConvNeXt comes back whole. A final norm and a head may stand beside a prefixed encoder,
    as in a fine-tuned state; any other name without the prefix raises ValueError.
    """
    prefixed = any(key.startswith(_PREFIX) for key in state)
    body: OrderedDict[str, Tensor] = OrderedDict()
    decoder: OrderedDict[str, Tensor] = OrderedDict()
    for key, tensor in state.items():
        if is_decoder_key(key):
            decoder[key] = tensor
        elif not prefixed or _HEAD.fullmatch(key):
            body[key] = tensor
        elif key.startswith(_PREFIX):
            body[key.removeprefix(_PREFIX)] = tensor
        else:
            raise ValueError(f"unexpected keys: {key!r} has no prefix 'encoder.', other keys have it")
    return body, decoder, prefixed


def join(body: Mapping[str, Tensor], decoder: Mapping[str, Tensor], prefixed: bool) -> OrderedDict[str, Tensor]:
    """Puts together what `split` took apart; a ConvNeXt gets the prefix only if asked for."""
    prefix = _PREFIX if decoder or prefixed else ""
    named = ((key if _HEAD.fullmatch(key) else prefix + key, value) for key, value in body.items())
    return OrderedDict([*named, *decoder.items()])


def is_convnext(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are ours or the official ones: a dense ConvNeXt, or an FCMAE."""
    return any(re.match(r"(?:encoder\.)?(?:downsample_layers|stages)\.\d+\.\d+\.", key) for key in state)


def flat_grn(old: str, new: str, tensor: Tensor) -> Tensor:
    """GRN parameters such as (1, 4C) or (1, 1, 1, 4C) as (4C,); other tensors unchanged."""
    if ".grn." not in new or tensor.ndim == 1:
        return tensor
    if tensor.ndim == 0 or tensor.numel() != tensor.shape[-1]:
        raise ValueError(f"{old!r} has shape {tuple(tensor.shape)}, expected one axis of length 4C")
    return tensor.reshape(-1)


def rename_all(
    state: Mapping[str, Tensor],
    translate: Callable[[str], str | None],
    change: Callable[[str, str, Tensor], Tensor],
    what: str,
) -> OrderedDict[str, Tensor]:
    """As `names.rename`; raises ValueError for names that `translate` has no answer for."""
    out, unknown = rename(state, translate, change)
    raise_mismatch(what, [], unknown)
    return out


def encoder_of(state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The stem, downsampling layers and stages alone: no prefix, decoder, norm of the output or head."""
    body, _, _ = split(state)
    return OrderedDict((key, value) for key, value in body.items() if not _HEAD.fullmatch(key))


def check_convnext(
    state: Mapping[str, Tensor],
    what: str,
    their_name: Callable[[str], str | None] = lambda key: key,
    unknown: Iterable[str] = (),
    version: int | None = None,
) -> None:
    """Raises ValueError unless `state`, in our names, is exactly a ConvNeXt V1 or V2 or an FCMAE.

    `what` opens the message. `their_name` gives the name to print for a tensor (the source's own).
    `unknown` are keys of the source that had no translation; they count as unexpected. `version=2`
    asks for GRN in every block and allows no LayerScale; None takes whichever of the two the blocks
    have, in all blocks or in none.
    """
    body, decoder, _ = split(state)
    prefix = _PREFIX if decoder else ""
    expected = {prefix + key: shape for key, shape in _convnext_shapes(body, version).items()}
    if decoder:
        # An FCMAE has no final norm and no head; where they are there they are unexpected.
        expected = {key: shape for key, shape in expected.items() if not _HEAD.fullmatch(key.removeprefix(_PREFIX))}
        expected.update(_decoder_shapes(decoder, _width(body, _stages(body) - 1), version))
    actual = join(body, decoder, False)

    raise_mismatch(what, *mismatches(actual, expected, their_name, unknown))


def mismatches(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Shape],
    their_name: Callable[[str], str | None],
    unknown: Iterable[str],
) -> tuple[list[str], list[str], list[str]]:
    """(missing, unexpected, wrong shapes) of a state against what is expected, ready to print."""

    def shown(key: str) -> str:
        return their_name(key) or key

    missing = [shown(key) for key in expected if key not in state]
    unexpected = [*unknown, *(shown(key) for key in state if key not in expected)]
    wrong = [
        f"{shown(key)!r} has shape {tuple(state[key].shape)}, expected {_show(shape)}"
        for key, shape in expected.items()
        if key in state and not _fits(state[key], shape)
    ]
    return missing, unexpected, wrong


def raise_mismatch(what: str, missing: list[str], unexpected: list[str], wrong: Iterable[str] = ()) -> None:
    """Raises the ValueError of a strict conversion, or returns where there is nothing to say."""
    problems = []
    if missing:
        problems.append(f"missing keys: {describe(missing)}")
    if unexpected:
        problems.append(f"unexpected keys: {describe(unexpected)}")
    if wrong:
        problems.append("wrong shapes: " + "; ".join(list(wrong)[:5]))
    if problems:
        raise ValueError(f"{what}: " + "; ".join(problems))


def _fits(tensor: Tensor, shape: Shape) -> bool:
    return tensor.ndim == len(shape) and all(
        want in (None, have) for have, want in zip(tensor.shape, shape, strict=True)
    )


def _show(shape: Shape) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"


def _count(keys: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest index that `pattern` finds, 0 where it finds none."""
    found = [int(match[1]) for key in keys if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


def _stages(body: Mapping[str, Tensor]) -> int:
    return max(_count(body, r"stages\.(\d+)\."), _count(body, r"downsample_layers\.(\d+)\."), 1)


def rows(state: Mapping[str, Tensor], key: str) -> int | None:
    """The first size of a tensor; None where there is none."""
    return state[key].shape[0] if key in state and state[key].ndim else None


def _width(body: Mapping[str, Tensor], stage: int) -> int | None:
    return rows(body, f"downsample_layers.{stage}.{min(stage, 1)}.weight")


def _extras(keys: Iterable[str], version: int | None) -> tuple[bool, bool]:
    """Whether every block has GRN, and whether every block has LayerScale (`gamma`)."""
    if version == 2:
        return True, False
    keys = list(keys)
    gamma = re.compile(r"(?:stages\.\d+|decoder)\.\d+\.gamma")
    return any(".grn." in key for key in keys), any(gamma.fullmatch(key) for key in keys)


def _convnext_shapes(body: Mapping[str, Tensor], version: int | None) -> dict[str, Shape]:
    stages = _stages(body)
    dims = [_width(body, stage) for stage in range(stages)]
    shapes: dict[str, Shape] = {
        "downsample_layers.0.0.weight": (dims[0], None, None, None),
        "downsample_layers.0.0.bias": (dims[0],),
        **_norm("downsample_layers.0.1", dims[0]),
    }
    for i in range(1, stages):
        shapes.update(_norm(f"downsample_layers.{i}.0", dims[i - 1]))
        shapes[f"downsample_layers.{i}.1.weight"] = (dims[i], dims[i - 1], 2, 2)
        shapes[f"downsample_layers.{i}.1.bias"] = (dims[i],)
    grn, gamma = _extras(body, version)
    for i in range(stages):
        # A stage without blocks does not exist, so an absent one shows up as its first block's
        # missing keys.
        attention = any(re.match(_ATTENTION.format(i), key) for key in body)
        for j in range(max(_count(body, rf"stages\.{i}\.(\d+)\."), 1)):
            name = f"stages.{i}.{j}"
            shapes.update(_attention(name, dims[i]) if attention else _block(name, dims[i], grn, gamma))
        if any(key.startswith(f"norm{i}.") for key in body):
            shapes.update(_norm(f"norm{i}", dims[i]))
    if any(key.startswith(("norm.", "head.")) for key in body):
        shapes.update(_norm("norm", dims[-1]))
    if any(key.startswith("head.") for key in body):
        classes = rows(body, "head.weight")
        shapes.update({"head.weight": (classes, dims[-1]), "head.bias": (classes,)})
    return shapes


def _decoder_shapes(decoder: Mapping[str, Tensor], encoder_width: int | None, version: int | None) -> dict[str, Shape]:
    token = decoder.get("mask_token")
    width = token.shape[1] if token is not None and token.ndim == 4 else None
    pixels = rows(decoder, "pred.weight")
    shapes: dict[str, Shape] = {
        "mask_token": (1, width, 1, 1),
        "proj.weight": (width, encoder_width, 1, 1),
        "proj.bias": (width,),
        "pred.weight": (pixels, width, 1, 1),
        "pred.bias": (pixels,),
    }
    grn, gamma = _extras(decoder, version)
    for j in range(_count(decoder, r"decoder\.(\d+)\.")):
        shapes.update(_block(f"decoder.{j}", width, grn, gamma))
    return shapes


def _norm(name: str, dim: int | None) -> dict[str, Shape]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _block(name: str, dim: int | None, grn: bool, gamma: bool) -> dict[str, Shape]:
    wide = None if dim is None else 4 * dim
    shapes: dict[str, Shape] = {
        f"{name}.dwconv.weight": (dim, 1, None, None),
        f"{name}.dwconv.bias": (dim,),
        **_norm(f"{name}.norm", dim),
        f"{name}.pwconv1.weight": (wide, dim),
        f"{name}.pwconv1.bias": (wide,),
        f"{name}.pwconv2.weight": (dim, wide),
        f"{name}.pwconv2.bias": (dim,),
    }
    if grn:
        shapes.update({f"{name}.grn.gamma": (wide,), f"{name}.grn.beta": (wide,)})
    if gamma:
        shapes[f"{name}.gamma"] = (dim,)
    return shapes


def _attention(name: str, dim: int | None) -> dict[str, Shape]:
    shapes = _norm(f"{name}.norm1", dim) | _norm(f"{name}.norm2", dim)
    for layer, outputs, inputs in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
        rows, columns = (None if dim is None else times * dim for times in (outputs, inputs))
        shapes |= {f"{name}.{layer}.weight": (rows, columns), f"{name}.{layer}.bias": (rows,)}
    return shapes
