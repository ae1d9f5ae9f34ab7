"""What the operator files share: the compiled library's namespace, and the dtype rules of arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import CInterpreter, peek_interpreter_stack
from torch.autograd import forward_ad

library = torch.ops.convdit

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALVES)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 otherwise: the dtype that kernels sum and take parameters in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_floating(name: str, value: Any) -> None:
    """A tensor of one of the four dtypes that the operators take."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        check_tensor(name, value)
        raise TypeError(
            f"{name}: expected float32, float64, bfloat16 or float16, got {str(value.dtype).removeprefix('torch.')}"
        )


def check_device(name: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise RuntimeError(f"{name}: expected the device of x ({x.device}), got {value.device}")


def parameter(name: str, value: Tensor, x: Tensor) -> Tensor:
    """A per-channel parameter, on x's device, in the dtype that kernels take it in; autograd casts its gradient back.

    A float64 x takes float64 parameters only; the other dtypes mix freely, as under autocast.
    """
    if isinstance(value, Tensor) and value.dtype is torch.float32 is x.dtype and value.is_cpu and x.is_cpu:
        return value  # the usual case, in a third of the time
    check_tensor(name, value)
    check_device(name, value, x)
    wanted = accumulate_dtype(x.dtype)
    if value.dtype == wanted:
        return value
    check_floating(name, value)
    if torch.float64 in (value.dtype, wanted):
        raise TypeError(
            f"{name}: expected the dtype of x ({str(x.dtype).removeprefix('torch.')}), "
            f"got {str(value.dtype).removeprefix('torch.')}"
        )
    return value.to(wanted)


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for x's device; meta tensors have none."""
    if not torch._C._is_any_autocast_enabled():  # the quicker question, and the usual answer
        return False
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on for its device, as PyTorch treats a convolution's input."""
    if autocast_enabled(x) and x.dtype in (torch.float32, *HALVES):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether both are float32 and on the CPU, outside autocast and torch.compile: the operators look at the rest."""
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return False
    return x.dtype is torch.float32 is weight.dtype and x.is_cpu and weight.is_cpu


def at_once(operator: Any, x: Tensor, *args: Any) -> Any:
    """The operator's result on a CPU, where no gradient, compiler, transform or autocast is to see the call; else None.

    The operator looks at its arguments itself, and casts parameters: to look at them here first would take as long as
    it does. Where it refuses them this gives None too, and the caller says what is wrong in terms of its own arguments.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return None
    if peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return None
    try:
        return operator._op(x, *args) if x.is_cpu else None  # what operator(x, *args) comes to, by a shorter way
    except (RuntimeError, TypeError, AttributeError):
        return None


def register_fake(name: str) -> Callable:
    """Decorates what gives the results' shapes of the operator ``convdit::name``.

    It is all that PyTorch calls where an argument is on meta and the others are not, so it refuses that, as kernels do.
    """

    def decorator(fake: Callable) -> Callable:
        @functools.wraps(fake)
        def checked(*args):
            if len({t.device for t in args if isinstance(t, Tensor)}) > 1:
                raise RuntimeError(f"{name}: expected all tensors on one device")
            return fake(*args)

        return torch.library.register_fake(f"convdit::{name}")(checked)

    return decorator


def in_transform() -> bool:
    """Whether a transform of torch.func is at work; torch.compile would take the None of its stack for a value."""
    return isinstance(peek_interpreter_stack(), CInterpreter)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd (or torch.func) must see this call; if not, the forward operator is called directly.

    In forward mode it must, to refuse: the operators alone would drop the tangents without a word. An exported program
    has no backward of ours, so it gets the operator that keeps nothing for one.
    """
    if torch.compiler.is_compiling():  # and exporting is compiling
        if torch.compiler.is_exporting():
            return False
        if in_transform():
            # It would drop every gradient without a word (so up to PyTorch 2.14). Unless fullgraph=True forbids it,
            # this makes it leave the transform to eager mode.
            raise NotImplementedError("torch.compile cannot trace torch.func over convdit's operators")
    elif peek_interpreter_stack() is not None:
        return True
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    for t in tensors:  # not any(): making a generator takes longer
        if t is not None and t.requires_grad:
            return True
    return False


class Function(torch.autograd.Function):
    """An autograd.Function with a `setup_context`, as torch.func needs it, that eager calls reach by a shorter way.

    PyTorch binds the arguments of such a function by its signature at every call, which takes several times as long as
    the rest of the call. Outside torch.func and torch.compile, `apply` is therefore that of a twin that has the two
    methods in one, and whose backward is not wrapped by `once_differentiable` where no graph of it is asked for.

    The last outputs of a function, `hidden` of them, may be for its backward alone. A caller that needs the others only
    says `shown` for `apply`: a twin has no more, which saves what autograd notes of an output and a gradient of zeros.
    """

    generate_vmap_rule = True
    hidden = 0
    _twin: type[Function]

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if Function not in cls.__bases__:  # a twin
            return

        def forward(ctx, *args):
            output = cls.forward(*args)
            cls.setup_context(ctx, args, output)
            return output[: -cls.hidden] if cls.hidden else output

        once, unwrapped = cls.backward, inspect.unwrap(cls.backward)

        def backward(ctx, *grads):
            return (once if torch.is_grad_enabled() else unwrapped)(ctx, *grads, *(None,) * cls.hidden)

        plain = torch.autograd.Function.setup_context
        methods = {
            name: staticmethod(f)
            for name, f in (("forward", forward), ("setup_context", plain), ("backward", backward))
        }
        cls._twin = type(cls.__name__, (cls,), methods | {"__module__": cls.__module__})

    @classmethod
    def apply(cls, *args):
        if cls.hidden or torch.compiler.is_compiling() or peek_interpreter_stack() is not None:
            return super().apply(*args)  # all outputs: torch.func calls this, too, when it has done its part
        return super(Function, cls._twin).apply(*args)

    @classmethod
    def shown(cls, *args):
        if torch.compiler.is_compiling() or peek_interpreter_stack() is not None:
            return cls.apply(*args)
        return super(Function, cls._twin).apply(*args)


def register_vmap(name: str, folded: tuple[int, ...]) -> None:
    """Teach vmap the operator ``convdit::name``.

    The arguments numbered in ``folded`` start with the sample axis: where only they are mapped over, the mapped axis is
    folded into it and the operator is called once. Otherwise it is called once for each index.
    """
    operator = getattr(library, name)

    def split(result: Tensor, size: int) -> Tensor:
        return result.unflatten(0, (size, -1)) if result.shape[0] else result.new_empty((size, *result.shape))

    def rule(info, in_dims, *given):
        size = info.batch_size
        mapped = [i for i, axis in enumerate(in_dims) if axis is not None]
        args = [a if axis is None else a.movedim(axis, 0) for a, axis in zip(given, in_dims, strict=True)]
        if all(i in folded for i in mapped):
            folds = [
                a
                if i not in folded or not isinstance(a, Tensor)
                else (a if i in mapped else a.expand(size, *a.shape)).flatten(0, 1)
                for i, a in enumerate(args)
            ]
            out = operator(*folds)
            results = out if isinstance(out, tuple) else (out,)
            if all(r.shape[0] == folds[mapped[0]].shape[0] for r in results):
                results = tuple(split(r, size) for r in results)
                return (results, (0,) * len(results)) if isinstance(out, tuple) else (results[0], 0)
        rows = [operator(*(a[k] if i in mapped else a for i, a in enumerate(args))) for k in range(size)]
        if not isinstance(rows[0], tuple):
            return torch.stack(rows), 0
        return tuple(torch.stack(r) for r in zip(*rows, strict=True)), (0,) * len(rows[0])

    torch.library.register_vmap(f"convdit::{name}", rule)
