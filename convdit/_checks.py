"""Checks of arguments that models, layers and sparse maps share.

Each raises TypeError for a wrong kind of value and ValueError for a wrong value, and says which argument it was, what
was expected and what came. All of them can be traced by torch.compile.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

NAMES_SHOWN = 20


def kind(value: object) -> str:
    """The name of the value's type."""
    return type(value).__name__


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {kind(value)}")


def check_floating(name: str, value: Any) -> None:
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")


def check_whole(name: str, value: object, least: int, what: str = "a whole number") -> None:
    """A whole number that is not smaller than `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        raise TypeError(f"{name}: expected {what}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected {what}, at least {least}, got {value}")


def check_rate(name: str, value: Any, what: str = "a rate in [0, 1)", with_one: bool = False) -> None:
    """A number from 0 to 1, 1 itself only `with_one`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name}: expected {what}, got {value!r}")
    if not 0 <= float(value) <= 1 or (value == 1 and not with_one):
        raise ValueError(f"{name}: expected {what}, got {value}")


def whole_numbers(name: str, values: object, least: int, count: int | None = None) -> tuple[int, ...]:
    """The values as a tuple of whole numbers, `count` of them where that is given, none below `least`."""
    what = "whole numbers" if count is None else f"{count} whole numbers"
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name}: expected {what}, got {values!r}")
    values = tuple(values)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
            raise TypeError(f"{name}: expected {what}, got {values}")
    if min(values, default=least) < least or len(values) != (len(values) if count is None else count):
        raise ValueError(f"{name}: expected {what}, at least {least} each, got {values}")
    return values


def check_device(name: str, value: Tensor, device: torch.device, whose: str) -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected the device of {whose}, {device}, got {value.device}")


def check_fits(name: str, x: Tensor, parameter: Tensor) -> None:
    """x on the device and of the dtype of a parameter that it will meet; autocast mixes all dtypes but float64.

    An offloaded parameter (on the meta device) says nothing about where x belongs.
    """
    if parameter.is_meta and not x.is_meta:
        return
    check_device(name, x, parameter.device, "the parameters")
    if x.dtype == parameter.dtype:
        return
    mixed = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    if not mixed or torch.float64 in (x.dtype, parameter.dtype):
        raise TypeError(f"{name}: expected the dtype of the parameters, {parameter.dtype}, got {x.dtype}")


def listed(items: Iterable[str], separator: str = ", ") -> str:
    """The items in one line, the first twenty where there are more."""
    items = list(items)
    more = len(items) - NAMES_SHOWN
    return separator.join(items[:NAMES_SHOWN]) + (f"{separator}and {more} more" if more > 0 else "")
