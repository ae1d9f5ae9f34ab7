"""From the executor's counters to a time that no GPU can beat with these kernels: a bound, not a measurement.

Each operator runs on the executor at two small batches, forward and backward. What its launches do is a line in the
batch, and is taken at the listed batch (where it is no line, as of a sum in parts, that batch itself runs). A launch
takes at least as long as the slowest of: bytes that must move once, at the rate of the GPU's memory; sectors, at that
of L2; wavefronts of shared memory; instructions, by kind. Launches add up. Beside it the floor,
which no kernel can beat: the operator's tensors moved once, or its arithmetic at the GPU's peak.

PTX stands in for the machine's instructions: those that ptxas drops (moves, conversions of pointers, reads of
parameters) are left out, others it may fold or add. B200's is PTX for compute_100, whose instructions on two floats
(`.f32x2`) take one slot of issue and, as is assumed, the time of two in the pipe. Latency, launches, clocks below the
peak and an L2 that keeps a tensor from one launch to the next are not in it.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .budget import short


@dataclass(frozen=True)
class Gpu:
    """From NVIDIA's data sheets and programming guide; rates a clock and multiprocessor are those of whole warps."""

    name: str
    processors: int
    clock: float  # Hz, boost
    memory: float  # bytes a second
    l2: float  # bytes a clock
    fma: float  # float32 warps
    tensor: float  # multiply-adds of halves by mma.sync, single ones, not warps
    tensor_peak: float  # by the newest instruction of the GPU
    issue: float = 4
    special: float = 0.5
    code: str = "compute_80"  # the PTX that it runs


GPUS = [
    Gpu("A100", 108, 1.41e9, 2.039e12, 5120, 2, 1024, 1024),
    Gpu("H100", 132, 1.83e9, 3.35e12, 5120, 4, 1300, 2048),
    Gpu("L4", 58, 2.04e9, 0.3e12, 2048, 4, 512, 512),
    Gpu("B200", 148, 1.85e9, 8.0e12, 10240, 4, 1300, 4096, code="compute_100"),
]
FREE = ("mov.", "cvta", "ld.param", "ret")  # of PTX, not of the machine
FMA = ("fma.rn.f32", "add.f32", "add.rn.f32", "mul.f32", "mul.rn.f32", "sub.f32")  # and those on two
PAIRS = ("fma.rn.f32x2", "add.rn.f32x2", "mul.rn.f32x2")
SPECIAL = ("ex2.", "rcp.", "rsqrt.", "sqrt.", "lg2.")


@dataclass
class Cost:
    """What launches do, all together; a line in the batch."""

    once: float = 0  # bytes
    l2: float = 0  # bytes
    wavefronts: float = 0
    instructions: float = 0  # warps
    fma: float = 0
    special: float = 0
    tensor: float = 0  # multiply-adds


def line(batch: int, n: int, a: Cost, m: int, b: Cost) -> Cost:
    """The cost at `batch`, from a at n and b at m."""
    return Cost(**{k: v + (getattr(b, k) - v) / (m - n) * (batch - n) for k, v in vars(a).items()})


def seconds(cost: Cost, gpu: Gpu) -> tuple[float, str]:
    a_clock = gpu.processors * gpu.clock
    parts = {
        "memory": cost.once / gpu.memory,
        "L2": cost.l2 / (gpu.l2 * gpu.clock),
        "shared": cost.wavefronts / a_clock,
        "issue": cost.instructions / (gpu.issue * a_clock),
        "fma": cost.fma / (gpu.fma * a_clock),
        "special": cost.special / (gpu.special * a_clock),
        "tensor": cost.tensor / (gpu.tensor * a_clock),
    }
    what = max(parts, key=parts.__getitem__)
    return parts[what], what


def cost_of(launch: dict, code: dict) -> Cost:
    """Of one launch, from the executor's counters."""
    sectors, wavefronts = (sum(s[2] for s in launch["sites"] if s[4] == shared) for shared in (0, 1))
    opcodes: Counter[str] = Counter()
    for times, block in zip(launch["blocks"], code["blocks"], strict=True):
        for opcode, n in block.items():
            opcodes[opcode] += times * n

    def warps(*prefixes: str) -> float:
        return sum(n for opcode, n in opcodes.items() if opcode.startswith(prefixes)) / 32

    multiply = warps("mma.sync") * 16 * 8 * 16  # m16n8k16; k8 counts half
    multiply -= warps("mma.sync.aligned.m16n8k8") * 16 * 8 * 8
    return Cost(
        once=launch["read"] + launch["written"],
        l2=32 * sectors,
        wavefronts=wavefronts,
        instructions=sum(opcodes.values()) / 32 - warps(*FREE),
        fma=warps(*FMA) + warps(*PAIRS),
        special=warps(*SPECIAL),
        tensor=multiply,
    )


@dataclass
class Operator:
    """`make(n)` gives a function and its inputs for a batch of n, for n of `small`; the report is of `batch`.

    `small`: two batches, or `batch` alone.
    Floors of forward and backward, at a batch of one: `bytes`; `products`, float32 multiply-adds or, where `matrix`,
    those of matrix products of halves; `exponentials`.
    """

    name: str
    batch: int
    small: tuple[int, ...]
    make: Callable[[int], tuple[Callable, list]]
    bytes: tuple[float, float]
    products: tuple[float, float] = (0, 0)
    matrix: bool = False
    exponentials: float = 0  # in either pass

    def floor(self, which: int, gpu: Gpu, tensor: float = 0) -> float:
        """`tensor`: the rate of matrix products, if not the peak."""
        a_clock = gpu.processors * gpu.clock
        products = self.products[which] / (a_clock * ((tensor or gpu.tensor_peak) if self.matrix else 32 * gpu.fma))
        exponentials = self.exponentials / (a_clock * 32 * gpu.special)
        return self.batch * max(self.bytes[which] / gpu.memory, products, exponentials)


def operators() -> Iterator[Operator]:
    import torch

    from convdit import ops
    from convdit.sparse import ActiveSites, random_patch_mask

    # The same masks again and again, so that work is a line in the batch, and the floor's own.
    masks = random_patch_mask(4, (7, 7), 0.6, torch.Generator().manual_seed(0))

    def taps(side: int) -> int:  # products of a channel of a map, without the zeros around it
        return sum(min(side, i + 4) - max(0, i - 3) for i in range(side)) ** 2

    for dtype, size, half in ((torch.float32, 4, False), (torch.bfloat16, 2, True)):
        kind = str(dtype).removeprefix("torch.")

        def randn(*shape: int, dtype=dtype) -> torch.Tensor:
            return torch.randn(*shape).to(dtype)

        for side, c in ((56, 96), (14, 384)):
            x = side * side * c * size
            yield Operator(
                f"depthwise_conv2d 64x{side}x{side}x{c} {kind}",
                64,
                (64,) if side == 56 else (8, 12),
                lambda n, side=side, c=c: (
                    ops.depthwise_conv2d,
                    [randn(n, side, side, c), torch.randn(c, 1, 7, 7), torch.randn(c)],
                ),
                (2 * x, 4 * x),
                (taps(side) * c, 2 * taps(side) * c),
            )
            block, hidden = side // 7, 4 * c

            def sparse(n: int, side=side, c=c, block=block):
                sites = ActiveSites.from_patch_mask(masks.repeat(n // len(masks), 1, 1), block)
                return (
                    lambda features, w, b: ops.sparse_depthwise_conv2d(features, w, b, sites),
                    [randn(len(sites), c), torch.randn(c, 1, 7, 7), torch.randn(c)],
                )

            drawn = ActiveSites.from_patch_mask(masks, block)
            visible, pairs = 19 / 49, int((drawn.site_neighbors(3) >= 0).sum()) / len(masks) * c
            yield Operator(
                f"sparse_depthwise_conv2d 64x{side}x{side}x{c}, 19 of 49 {kind}",
                64,
                (8, 12),
                sparse,
                (2 * x * visible, 4 * x * visible),
                (pairs, 2 * pairs),
            )
            yield Operator(
                f"gelu_grn 64x{side}x{side}x{hidden} {kind}",
                64,
                (2, 3) if side == 56 else (8, 12),
                lambda n, side=side, hidden=hidden: (
                    ops.gelu_grn,
                    [randn(n, side, side, hidden), torch.randn(hidden), torch.randn(hidden)],
                ),
                (3 * 4 * x, 5 * 4 * x),
            )
        for d, heads in ((384, 6), (1152, 16)):
            t = 256
            row = t * d * size
            yield Operator(
                f"layer_norm_modulate 64x{t}x{d} {kind}",
                64,
                (2, 4),
                lambda n, t=t, d=d: (ops.layer_norm_modulate, [randn(n, t, d), torch.randn(n, d), torch.randn(n, d)]),
                (2 * row, 3 * row),
            )
            yield Operator(
                f"gated_residual_layer_norm_modulate 64x{t}x{d} {kind}",
                64,
                (2, 4),
                lambda n, t=t, d=d: (
                    ops.gated_residual_layer_norm_modulate,
                    [randn(n, t, d), randn(n, t, d), *(torch.randn(n, d) for _ in range(3))],
                ),
                (4 * row, 6 * row),
            )
            yield Operator(
                f"packed_attention 64x{t}x{d} {heads} heads {kind}",
                64 * heads,
                (4, 6),  # so many that a head's keys are one part, as at the listed batch
                lambda n, t=t, w=d // heads: (lambda qkv, n=n: ops.packed_attention(qkv, n), [randn(1, t, 3 * n * w)]),
                (4 * row / heads, 8 * row / heads),
                (2 * t * t * d / heads, 5 * t * t * d / heads),
                half,
                t * t,
            )


def measure(library, operator: Operator) -> list[list[tuple[str, Cost]]]:
    """Launches of forward and backward at the listed batch."""
    import torch

    runs = []
    for n in operator.small:
        function, inputs = operator.make(n)
        inputs = [t.requires_grad_() for t in inputs]
        halves = []
        library.clear()
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        halves.append(library.traffic())
        library.clear()
        torch.autograd.grad(outputs, inputs, [torch.randn_like(o) for o in outputs])
        halves.append(library.traffic())
        runs.append([[(k["kernel"], cost_of(k, library.kernels[k["kernel"]])) for k in half] for half in halves])
    if len(runs) == 1:
        return runs[0]
    n, m = operator.small
    result = []
    for few, more in zip(*runs, strict=True):
        assert [k for k, _ in few] == [k for k, _ in more], f"{operator.name}: other kernels at another batch"
        result.append([(k, line(operator.batch, n, a, m, b)) for (k, a), (_, b) in zip(few, more, strict=True)])
    return result


def measure_all(text: str, file: Path) -> int:
    """Write what the operators' launches cost, by the library of CONVDIT_LIBRARY_DIR, to `file`."""
    import torch

    import convdit  # noqa: F401  (loads the library)

    from .executor import Library

    torch.manual_seed(0)
    library = Library(Path(os.environ["CONVDIT_LIBRARY_DIR"]) / "libconvdit_ops.so")
    library.set_orders("forward")
    library.set_counting(True)
    costs = {}
    for operator in operators():
        if text in operator.name:
            halves = measure(library, operator)
            costs[operator.name] = [[(short(library.demangled[k]), vars(c)) for k, c in half] for half in halves]
    file.write_text(json.dumps(costs))
    return 0


def report(text: str, files: dict[str, Path]) -> int:
    """`files`: of measure_all, by the PTX that ran."""
    by_code = {code: json.loads(file.read_text()) for code, file in files.items()}
    print(
        "Lower bounds of the time, from what the kernels do on the executor: no measurements, no GPU was timed.\n"
        "Microseconds: the bound, what binds its slowest launch, its ratio to the floor (bytes or arithmetic)."
    )
    print(f"{'operator':62} {'pass':9}" + "".join(f" {gpu.name:>24}" for gpu in GPUS))
    above, count, slowest = [], 0, Counter()
    for operator in operators():
        if text not in operator.name:
            continue
        for which, what in enumerate(("forward", "backward")):
            cells = []
            for gpu in GPUS:
                launches = by_code[gpu.code][operator.name][which]
                times = [(*seconds(Cost(**cost), gpu), kernel) for kernel, cost in launches]
                total, (_, binds, kernel) = sum(t[0] for t in times), max(times)
                ratio = total / operator.floor(which, gpu)
                cells.append(f"{total * 1e6:10.1f} {binds:>7} {ratio:5.2f}")
                count += 1
                if ratio > 1.5:
                    least = operator.floor(which, gpu, gpu.tensor) / operator.floor(which, gpu)
                    why = f" (mma.sync, the instruction of sm_80, alone needs {least:.2f})" if least > 1 else ""
                    above.append(f"{operator.name} {what}, {gpu.name}: {ratio:.2f}{why}")
                    slowest[kernel] += 1
            print(f"{operator.name:62} {what:9}" + "".join(f" {cell}" for cell in cells), flush=True)
    print("\n".join(f"above 1.5: {row}" for row in above))
    print("most often the slowest there:", ", ".join(f"{k} ({n})" for k, n in slowest.most_common(8)))
    print(f"gpu-bound: {count - len(above)} of {count} bounds are at most 1.5 times the floor")
    return 0


def main(arguments: list[str]) -> int:
    """`measure TEXT FILE`, or `report TEXT CODE=FILE ...`; TEXT: in the names of the operators."""
    command, text, *files = arguments
    if command == "measure":
        return measure_all(text, Path(files[0]))
    return report(text, {code: Path(file) for code, _, file in (f.partition("=") for f in files)})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
