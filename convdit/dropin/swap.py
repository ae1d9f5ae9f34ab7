"""How a fast forward is put under somebody else's module, and taken away again.

The module gets a class of its own: a subclass of its class, with the same name, whose `forward` is ours. So its
parameters, buffers, hooks, training flag and state_dict are what they were, `isinstance` still holds, a deep copy is
accelerated too, and a pickle names the original class and the rule.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from convdit._hooks import hooked

Foreign: TypeAlias = Any  # a module of another library: nn.Module declares none of the attributes that ours go by
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the operators' float64 is for checks, and not fast


@dataclass(frozen=True)
class Rule:
    """How one kind of layer is recognised and computed.

    Attributes:
        name: of the rule, in pickles.
        becomes: what computes the layer, for the report.
        when: on which inputs, as `gains` decides at each call, for the report.
        knows: whether a module is of this kind.
        refuses: why a module of this kind is left alone, or None. Asked again at each call, so that a hook or another
            layer put inside later is not passed over.
        gains: (module, x): whether an input is of a shape and layout that the operators compute faster. Asked first, so
            of a module that may be refused.
        compute: (module, *arguments of its forward): the same result, by the operators.
        example: arguments of its forward, in float64, to hold `compute` against the original with.
        packs: whether `compute` packs weights where that is asked for, as `products` says.
    """

    name: str
    becomes: str
    when: str
    knows: Callable[[Foreign], bool]
    refuses: Callable[[Foreign], str | None]
    gains: Callable[[Foreign, Tensor], bool]
    compute: Callable[..., object]
    example: Callable[[Foreign], tuple[tuple, dict]]
    packs: bool = False


_RULES: dict[str, Rule] = {}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Swapped:
    """Beside a module's own class, the base of the class that it gets."""

    convdit_original: type
    convdit_rule: str
    convdit_devices: tuple[str, ...]
    convdit_packs: bool

    def __reduce_ex__(self, protocol: Any) -> tuple:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        _, _, *state = reduced
        made_of = self.convdit_original, self.convdit_rule, self.convdit_devices, self.convdit_packs
        return _empty, made_of, *state


def register(*rules: Rule) -> tuple[Rule, ...]:
    _RULES.update({rule.name: rule for rule in rules})
    return rules


@functools.cache
def subclass(original: type[Any], rule_name: str, devices: tuple[str, ...], packs: bool) -> type:
    """The class that modules of class `original` get."""
    rule, slow = _RULES[rule_name], original.forward

    @functools.wraps(slow)
    def forward(self, x, *args, **kwargs):
        if (
            isinstance(x, Tensor)
            and rule.gains(self, x)  # first: where it says no, the call may be a short one
            and x.device.type in devices
            and x.dtype in FAST_DTYPES
            and (torch.compiler.is_compiling() or forward_ad._current_level < 0)  # the operators have no forward mode
            and rule.refuses(self) is None
        ):
            return rule.compute(self, x, *args, **kwargs)
        return slow(self, x, *args, **kwargs)

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    parts = {"convdit_original": original, "convdit_rule": rule_name}
    parts |= {"convdit_devices": devices, "convdit_packs": packs}
    return type(original.__name__, (Swapped, original), {**names, **parts, "forward": forward})


def _empty(original: type, rule_name: str, devices: tuple[str, ...], packs: bool) -> nn.Module:
    cls: Any = subclass(original, rule_name, devices, packs)
    return cls.__new__(cls)


def difference(rule: Rule, module: nn.Module) -> str | None:
    """What is different between a layer and its replacement, computed in float64 on random weights; None if nothing.

    Classes are recognised by their names and attributes, and another version of a class may compute something else.
    """
    try:  # it runs somebody else's code
        twin = _twin(module)
        args, kwargs = rule.example(twin)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            right, ours = type(twin).forward(twin, *args, **kwargs), rule.compute(twin, *args, **kwargs)
        torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-6)
    except Exception as error:
        return f"it is not what its name says: {str(error).strip().splitlines()[0]}"
    return None


def _twin(module: nn.Module) -> nn.Module:
    """A copy on the CPU in float64, without hooks, with random weights: zeros, as in a fresh model, would hide much."""
    twin = copy.deepcopy(module).to_empty(device="cpu").double().eval()
    generator = torch.Generator().manual_seed(0)
    for part in twin.modules():
        for hooks in _HOOKS:
            getattr(part, hooks).clear()
    for values in (*twin.parameters(), *twin.buffers()):
        if values.is_floating_point():
            values.data = torch.randn(values.shape, generator=generator, dtype=values.dtype) * 0.3
    return twin


def touched(module: nn.Module, *inner: str) -> str | None:
    """Why layers inside a module may not be passed over: a hook, or a forward of their own."""
    for path in inner:
        part: Foreign = module
        for name in path.split("."):
            part = part._modules[name]
        if hooked(part):
            return f"a hook on {path} would not be called"
        if "forward" in part.__dict__:
            return f"{path} has a forward of its own"
    return None


def watched(module: Foreign) -> bool:
    """Whether a hook, or a forward of its own, is on a module or inside it; quick, since each call asks."""
    if hooked(module) or "forward" in module.__dict__:
        return True
    return any(watched(part) for part in module._modules.values() if part is not None)


def own_class(module: nn.Module) -> type:
    """A module's class, before it was swapped."""
    return getattr(type(module), "convdit_original", type(module))


def defined_by(module: nn.Module) -> tuple[str, str]:
    """(module, name) of the class that defines a module's forward."""
    return _definer(own_class(module))


@torch.compiler.assume_constant_result  # which torch.compile could not find out by itself
def _definer(own: type) -> tuple[str, str]:
    cls = next(c for c in own.__mro__ if "forward" in c.__dict__)
    return cls.__module__, cls.__name__
