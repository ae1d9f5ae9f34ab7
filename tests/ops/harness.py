"""What every operator's test runs: the checks of a `Case` (how to make inputs, which two functions to compare).

The error rule: in float32, bfloat16 and float16, row by row,
    max|kernel - reference in float64| <= 2 * max|plain PyTorch in that dtype - reference in float64| + floor,
where floor is a few units in the last place of the row's largest value. It holds for values and for every gradient.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LOW_DTYPES = list(EPS)
FLOOR_ULPS = 4
THREADS = (1, 2, 3, 2)
PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@dataclass
class Case:
    """One operator on one input.

    make(generator) returns the arguments in float64; floating-point tensors among them are cast to the dtype under test
    and differentiated, everything else is passed as it is. `raw`, if given, names registered operators for opcheck:
    (operator, arguments) made from the same inputs.
    """

    name: str
    op: Callable
    reference: Callable
    make: Callable[[torch.Generator], tuple]
    kwargs: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def randn(generator: torch.Generator, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + offset


def inputs(case: Case, dtype: torch.dtype, requires_grad: bool = False, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        a.to(dtype).detach().requires_grad_(requires_grad) if _floating(a) else a for a in case.make(generator)
    )


def _floating(a: object) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


def _tuple(out: Tensor | tuple) -> tuple:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _cotangents(outs: tuple, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16) for o in outs]


def run(
    function: Callable, case: Case, args: tuple, grads: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Values, and gradients of every floating argument for random cotangents (the same for every dtype)."""
    outs = _tuple(function(*args, **case.kwargs))
    cotangents = grads if grads is not None else _cotangents(outs)
    wanted = [a for a in args if _floating(a)]
    gradients = torch.autograd.grad(outs, wanted, [c.to(o.dtype) for c, o in zip(cotangents, outs, strict=True)])
    return [o.detach() for o in outs], list(gradients)


def assert_error_rule(case: Case, dtype: torch.dtype, whole_gradients: bool = False) -> None:
    """The error rule for values and gradients.

    whole_gradients is for a chain of operators. A row of its gradient carries the errors of a few values several
    operators upstream, on which PyTorch may be right by luck: there the rule holds for each gradient as a whole, and
    each operator of the chain keeps it by row in its own tests.
    """
    low = inputs(case, dtype, requires_grad=True)
    exact = tuple(a.detach().double().requires_grad_() if _floating(a) else a for a in low)
    ours, plain, right = (run(f, case, a) for f, a in ((case.op, low), (case.reference, low), (case.reference, exact)))
    values = len(ours[0])
    for i, (o, p, r) in enumerate(zip(*([*v, *g] for v, g in (ours, plain, right)), strict=True)):
        assert o.dtype == p.dtype == dtype and o.shape == p.shape, f"{case}: result {i} is {o.dtype} {tuple(o.shape)}"
        if whole_gradients and i >= values:
            o, p, r = o.flatten(), p.flatten(), r.flatten()
        assert_rows_close(o, p, r, dtype, f"{case}, {dtype}, result {i}")


def assert_rows_close(ours: Tensor, plain: Tensor, right: Tensor, dtype: torch.dtype, what: str) -> None:
    if ours.numel() == 0:
        return
    o, p, r = (_rows(t.detach().double(), right) for t in (ours, plain, right))
    error, plain_error, largest = (o - r).abs().amax(1), (p - r).abs().amax(1), r.abs().amax(1)
    # In a row of one or two values PyTorch may be right by luck: its median row, at this row's size, counts as well.
    some = largest > 0
    typical = (plain_error[some] / largest[some]).median().nan_to_num() * largest
    allowed = 2 * torch.maximum(plain_error, typical) + FLOOR_ULPS * EPS[dtype] * largest
    # A float16 result below its smallest normal number is rounded to multiples of its smallest number.
    allowed = allowed + torch.finfo(dtype).tiny * EPS[dtype] * FLOOR_ULPS
    worst = int((error - allowed).argmax())
    assert bool((error <= allowed).all()), (
        f"{what}: row {worst}: error {error[worst]:.3g}, allowed {allowed[worst]:.3g}, "
        f"largest value {largest[worst]:.3g}"
    )


def _rows(t: Tensor, right: Tensor) -> Tensor:
    """Rows of the error rule: a site's or token's channels, the taps of a depthwise weight's channel, a vector.

    A weight with one tap, or of which one alone gets a gradient (no site has a neighbour), is a vector of channels:
    each value is a sum over sites, like a bias's, and the terms of a single one may cancel.
    """
    if t.dim() == 4 and t.shape[1] == 1 and t.shape[2] == t.shape[3]:  # (C, 1, K, K)
        several = int((right != 0).flatten(1).any(0).sum()) > 1
        return t.flatten(1) if several else t.reshape(1, -1)
    return t.reshape(-1, t.shape[-1] if t.dim() > 1 else t.numel())


def assert_equals_reference(case: Case) -> None:
    """Values and gradients in float64, to rounding."""
    args = inputs(case, torch.float64, requires_grad=True)
    ours, right = run(case.op, case, args), run(case.reference, case, args)
    for i, (o, r) in enumerate(zip([*ours[0], *ours[1]], [*right[0], *right[1]], strict=True)):
        torch.testing.assert_close(o, r, rtol=1e-9, atol=1e-10, msg=lambda m, i=i: f"{case}, result {i}: {m}")


def assert_gradcheck(case: Case) -> None:
    args = inputs(case, torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: case.op(*a, **case.kwargs), args, fast_mode=True)


def assert_compiles(case: Case, dynamic: bool | None = None) -> None:
    """torch.compile(fullgraph=True) gives the values and gradients of the eager operator."""
    torch._dynamo.reset()
    args = inputs(case, torch.float32, requires_grad=True)
    compiled = torch.compile(case.op, fullgraph=True, dynamic=dynamic)
    ours, right = run(compiled, case, args), run(case.op, case, args)
    for o, r in zip([*ours[0], *ours[1]], [*right[0], *right[1]], strict=True):
        torch.testing.assert_close(o, r, rtol=1e-5, atol=1e-5)


def assert_exports(case: Case) -> None:
    args = inputs(case, torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *a):
            return case.op(*a, **case.kwargs)

    tensors = tuple(a for a in args)
    exported = torch.export.export(Module(), tensors).module()(*tensors)
    for o, r in zip(_tuple(exported), _tuple(case.op(*args, **case.kwargs)), strict=True):
        torch.testing.assert_close(o, r)


def strided(t: Tensor) -> Tensor:
    """The same values in a tensor with gaps between its elements and a misaligned start."""
    storage = torch.zeros(t.numel() * 2 + 1, dtype=t.dtype)
    view = storage[1:].view(*t.shape, 2)[..., 0] if t.numel() else t.clone()
    return view.copy_(t)


def permuted(t: Tensor) -> Tensor:
    """The same values with the memory order of the axes reversed."""
    axes = tuple(reversed(range(t.dim())))
    return t.permute(axes).contiguous().permute(axes)


def assert_any_strides(case: Case) -> None:
    args = inputs(case, torch.float32, requires_grad=True)
    expected = run(case.op, case, args)
    for change in (strided, permuted):
        moved = tuple(change(a.detach()).requires_grad_() if _floating(a) else a for a in args)
        before = [a.detach().clone() for a in moved if _floating(a)]
        got = run(case.op, case, moved)
        for g, e in zip([*got[0], *got[1]], [*expected[0], *expected[1]], strict=True):
            assert torch.equal(g, e), f"{case}: {change.__name__} inputs give other values"
        assert all(torch.equal(a, b) for a, b in zip((a for a in moved if _floating(a)), before, strict=True))


def assert_repeats_for_any_threads(case: Case, dtype: torch.dtype = torch.float32) -> None:
    assert not depends_on_threads(case, dtype), f"{case}: depends on the threads"


def depends_on_threads(case: Case, dtype: torch.dtype = torch.float32) -> bool:
    """Whether values or gradients have other bits with another number of threads. With the same number never."""
    args = inputs(case, dtype, requires_grad=True)
    before = torch.get_num_threads()
    results: dict[int, list[Tensor]] = {}
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            values, gradients = run(case.op, case, args)
            again = results.setdefault(threads, [*values, *gradients])
            assert _same_bits(again, [*values, *gradients]), f"{case}: another result at the second call"
    finally:
        torch.set_num_threads(before)
    first, *others = results.values()
    return not all(_same_bits(first, other) for other in others)


def _same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_vmap_equals_loop(case: Case) -> None:
    """vmap over a new first axis of every floating argument, value and gradient, equals a Python loop."""
    rows = [inputs(case, torch.float64, seed=s) for s in (0, 1, 2)]
    where = [i for i, a in enumerate(rows[0]) if _floating(a)]
    stacked = tuple(torch.stack([r[i] for r in rows]) if i in where else a for i, a in enumerate(rows[0]))
    axes = tuple(0 if i in where else None for i in range(len(stacked)))

    def value(*a):
        return _tuple(case.op(*a, **case.kwargs))

    def loss(*a):
        return sum((o * o).sum() for o in _tuple(case.op(*a, **case.kwargs)))

    got = torch.func.vmap(value, in_dims=axes)(*stacked)
    gradients = torch.func.vmap(torch.func.grad(loss, argnums=tuple(where)), in_dims=axes)(*stacked)
    for k, row in enumerate(rows):
        for g, e in zip(got, value(*row), strict=True):
            torch.testing.assert_close(g[k], e, rtol=1e-9, atol=1e-10)
        for g, e in zip(gradients, torch.func.grad(loss, argnums=tuple(where))(*row), strict=True):
            torch.testing.assert_close(g[k], e, rtol=1e-9, atol=1e-10)


def assert_in_own_process(test_file: str, expression: str, **variables: str) -> None:
    """Run the tests of `test_file` that match `expression` in a process with these environment variables."""
    environment = dict(os.environ, PYTHONPATH=PACKAGE_ROOT, **variables)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test_file, "-k", expression]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{variables}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"


def assert_every_cpu_level(test_file: str, expression: str, **variables: str) -> None:
    """Run the tests of `test_file` that match `expression` once at each lower CPU level, each in its own process."""
    from convdit import build_info

    info = build_info()
    for level in info["cpu_levels"]:
        if level == info["cpu_level"]:
            break
        assert_in_own_process(test_file, expression, CONVDIT_CPU_LEVEL=level, **variables)
