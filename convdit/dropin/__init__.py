"""`accelerate` puts the operators under layers of other people's models, and `restore` takes them away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from convdit._checks import kind

from . import convnext, dit, layers, products
from .swap import Swapped, difference, register, subclass

RULES = register(*convnext.RULES, *dit.RULES, *layers.RULES)  # outer layers first


@dataclass(frozen=True)
class Entry:
    """A layer of the report.

    Attributes:
        name: in the model, as `named_modules` gives it.
        layer: its class.
        note: what computes it now and on which inputs (on others its own forward does), or why it was left.
    """

    name: str
    layer: str
    note: str


@dataclass
class Report:
    """What `accelerate` did. Printing it groups layers of a kind.

    Attributes:
        model: the model's class.
        swapped: the layers that the operators compute now.
        kept: the other layers with parameters. Layers inside a swapped one are not listed.
    """

    model: str
    swapped: list[Entry] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.swapped)} layers swapped, {len(self.kept)} left"]
        for title, entries in (("swapped", self.swapped), ("left", self.kept)):
            groups: dict[tuple[str, str], list[str]] = {}
            for entry in entries:
                groups.setdefault((entry.layer, entry.note), []).append(entry.name or "the model")
            for (layer, note), names in groups.items():
                shown = names if len(names) < 4 else [*names[:2], "...", names[-1]]
                lines.append(f"  {title:7} {len(names):3} {layer} ({', '.join(shown)}): {note}")
        return "\n".join(lines)


def accelerate(model: nn.Module, devices: Sequence[str] = ("cpu",), pack_weights: bool = False) -> Report:
    """Let the operators compute the layers of a model that they know, in place.

    Known are: ConvNeXt blocks, V1 and V2, of timm (so those of open_clip too), transformers and
    facebookresearch/ConvNeXt(-V2); the blocks and final layers of facebookresearch/DiT and SiT; diffusers' blocks with
    AdaLayerNormZero, and that norm alone; any timm GlobalResponseNorm; any depthwise convolution of stride 1 with an
    odd kernel. Each class is recognised by name and attributes, and must give the operators' result on random weights,
    else it is left. A layer that is changed later, or called in a way that gains nothing, computes what it always did:
    where a hook or a new layer is inside it, in float64, in forward-mode differentiation, or by the rules of shape
    and layout that `convdit.dropin` states beside its layers.

    Args:
        model: any module. Its parameters, buffers, hooks and state_dict stay as they are; results are equal to
            rounding, in training and evaluation. It can be copied, pickled, compiled and accelerated again.
        devices: types of device on which the operators run; on another the model computes what it always did. The
            CUDA operators have not been timed on a GPU: ("cpu", "cuda") uses them nevertheless.
        pack_weights: for weights that are frozen. In float32 inference on a CPU, transformer blocks of up to 768
            channels then keep the weights of attention and MLP a second time, packed for the matrix products. Changes
            that PyTorch sees, such as an optimiser's or `load_state_dict`'s, are followed; after one that it cannot see
            (through ``.data``, NumPy or another process) call `accelerate` again, or results may be those of the old
            weights.

    Returns:
        What was swapped, and what was left and why.

    Raises:
        TypeError: a model that is not a module, devices that are not names, or a pack_weights that is not a bool.

    One thing is lost: differentiating a gradient again raises, since the operators have no double backward. Of a model
    that was accelerated before, `devices` and `pack_weights` become those of the last call.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {kind(model)}")
    if isinstance(devices, str) or not all(isinstance(device, str) for device in devices):
        raise TypeError(f'devices: expected names of device types such as ("cpu",), got {devices!r}')
    if not isinstance(pack_weights, bool):
        raise TypeError(f"pack_weights: expected True or False, got {pack_weights!r}")
    products.forget(model)
    report = Report(type(model).__name__)
    _visit(model, "", report, (tuple(devices), pack_weights), {})
    return report


def _visit(module: Any, name: str, report: Report, asked: tuple[tuple[str, ...], bool], judged: dict) -> None:
    if isinstance(module, Swapped):
        if "convdit_original" in type(module).__dict__:  # else fully_shard or the like made another class of it
            module.__class__ = subclass(module.convdit_original, module.convdit_rule, *asked)
        report.swapped.append(Entry(name, type(module).__name__, "was swapped before"))
        return
    rule = next((rule for rule in RULES if rule.knows(module)), None)
    original: type = type(module)
    layer = original.__name__
    if rule is not None:
        why = rule.refuses(module) or ("it has a forward of its own" if "forward" in module.__dict__ else None)
        if why is None:
            key = (original, rule.name)
            if key not in judged:
                judged[key] = difference(rule, module)
            why = judged[key]
        if why is None:
            module.__class__ = subclass(original, rule.name, *asked)
            packed = "; weights packed for inference in float32 on a CPU" if rule.packs and asked[1] else ""
            report.swapped.append(Entry(name, layer, f"{rule.becomes}, {rule.when}{packed}"))
            return
        report.kept.append(Entry(name, layer, why))
    elif next(module.parameters(recurse=False), None) is not None:
        report.kept.append(Entry(name, layer, "no operator for it"))
    for child_name, child in module.named_children():
        _visit(child, f"{name}.{child_name}" if name else child_name, report, asked, judged)


def restore(model: nn.Module) -> None:
    """Undo `accelerate`, in place. A model that was not accelerated is left as it is.

    Raises:
        TypeError: a model that is not a module.
        RuntimeError: a layer whose class was changed again since, as fully_shard does; nothing is restored then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {kind(model)}")
    swapped: dict[str, Any] = {name: part for name, part in model.named_modules() if isinstance(part, Swapped)}
    for name, part in swapped.items():
        if "convdit_original" not in type(part).__dict__:
            raise RuntimeError(
                f"model: {name or 'it'} has become a {type(part).__name__} since it was accelerated; restore it before"
            )
    for part in swapped.values():
        part.__class__ = type(part).convdit_original
    products.forget(model)
