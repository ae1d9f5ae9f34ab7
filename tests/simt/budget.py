"""What each kernel moves and needs, held against tests/simt/budget.json.

Of each kernel at each shape, counted on the executor: 32-byte sectors of global memory and wavefronts of shared memory
against the fewest for the bytes asked for; bytes moved against bytes that must move once, and those; instructions. From
ptxas: registers, spills, and the share of an A100's threads that they and shared memory leave room for. Where a figure
is worse than it should be, "why" says what stands in the way.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from . import build, summary
from .code import ptxas

BUDGET = Path(__file__).parent / "budget.json"
LARGER_IS_WORSE = ("sectors", "wavefronts", "moved", "memory", "instructions", "registers", "spills")
SMALLER_IS_WORSE = ("occupancy", "multiply-adds")
TOLERANCE = 1.005


def calls() -> Iterator[tuple[str, str, Callable, list]]:
    """Room, operator and shape, function, inputs. Small, as the executor is slow; whole vectors and tiles."""
    import torch

    from convdit import ops
    from convdit.sparse import ActiveSites, random_patch_mask

    def randn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    mask = random_patch_mask(4, (4, 4), 0.6, torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        rows, columns = (2, 32, 768), (2, 768)
        vectors = [torch.randn(*columns) for _ in range(3)]
        modulate = [randn(dtype, *rows), *vectors[:2]]
        yield "adaln", f"layer_norm_modulate 2x32x768 {kind}", ops.layer_norm_modulate, modulate
        yield (
            "adaln",
            f"gated_residual_layer_norm_modulate 2x32x768 {kind}",
            ops.gated_residual_layer_norm_modulate,
            [randn(dtype, *rows), randn(dtype, *rows), *vectors],
        )
        conv = [randn(dtype, 1, 28, 28, 96), torch.randn(96, 1, 7, 7), *(torch.randn(96) for _ in range(3))]
        name = f"depthwise_conv2d_layer_norm 1x28x28x96 {kind}"
        yield "depthwise_conv", name, ops.depthwise_conv2d_layer_norm, conv
        yield "depthwise_conv", f"{name} without gradients", torch.no_grad()(ops.depthwise_conv2d_layer_norm), conv
        map_ = [randn(dtype, 1, 56, 56, 96), torch.randn(96, 1, 7, 7), torch.randn(96)]
        yield "depthwise_conv", f"depthwise_conv2d 1x56x56x96 {kind}", ops.depthwise_conv2d, map_
        for block in (8, 4, 2, 1):
            sites = ActiveSites.from_patch_mask(mask, block)
            yield (
                "sparse_depthwise_conv",
                f"sparse_depthwise_conv2d block {block} {len(sites)}x96 {kind}",
                partial(ops.sparse_depthwise_conv2d, sites=sites),
                [randn(dtype, len(sites), 96), torch.randn(96, 1, 7, 7), torch.randn(96)],
            )
        grn = [randn(dtype, 2, 14, 14, 384), torch.randn(384), torch.randn(384)]
        yield "grn", f"gelu_grn 2x14x14x384 {kind}", ops.gelu_grn, grn
        yield (
            "attention",
            f"packed_attention 1x128x2x64 {kind}",
            lambda qkv: ops.packed_attention(qkv, 2),
            [randn(dtype, 1, 128, 3 * 128)],
        )


def short(kernel: str) -> str:
    """A demangled name without namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|convdit::(cuda::)?|^void ", "", kernel)
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


def occupancy(registers: int, shared: int, threads: int) -> float:
    """Share of the 2048 threads of an A100's multiprocessor (64 K registers, 164 KB of shared memory, 32 blocks)."""
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = 164 * 1024 // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


def measure(rooms: list[str]) -> dict[str, dict[str, float]]:
    """By "room: operator and shape: kernel". Runs in a process that has the operators of CONVDIT_LIBRARY_DIR."""
    import torch

    import convdit  # noqa: F401  (loads the library)

    from .executor import Library

    torch.manual_seed(0)
    folder = Path(os.environ["CONVDIT_LIBRARY_DIR"])
    library = Library(folder / "libconvdit_ops.so")
    library.set_counting(True)
    static = {}
    for room in {*rooms, "sites"}:  # sparse operators launch those of the sites too
        output = build.nvcc_output(build.ROOT / "csrc" / room / "cuda.cu", "compute_80", build.ROOT / "csrc")
        static |= ptxas(output / "kernels.ptx", "sm_80")
    rows = {}
    for room, name, function, inputs in calls():
        if room not in rooms:
            continue
        library.clear()
        inputs = [t.requires_grad_() for t in inputs]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if outputs[0].requires_grad:
            torch.autograd.grad(outputs, inputs, [torch.randn_like(o) for o in outputs])
        if library.findings():
            raise SystemExit(f"{name}: {library.findings()[0].text}")
        for launch in library.traffic():
            kernel = launch["kernel"]
            row = counted(launch, library.kernels[kernel])
            row |= {k: static[kernel][k] for k in ("registers", "spills")}
            row["occupancy"] = occupancy(static[kernel]["registers"], launch["shared"], launch["threads"])
            key = f"{room}: {name}: {short(library.demangled[kernel])}"
            rows[key if key not in rows else f"{key} (again)"] = row
    summary.add("budget", launches=library.launches)
    return rows


def counted(launch: dict, code: dict) -> dict[str, float]:
    units, ideal = Counter(), Counter()
    for _requests, _lanes, site_units, site_ideal, shared in launch["sites"]:
        units[shared] += site_units
        ideal[shared] += site_ideal
    compulsory = launch["read"] + launch["written"]
    opcodes: Counter[str] = Counter()
    for times, block in zip(launch["blocks"], code["blocks"], strict=True):
        for opcode, n in block.items():
            opcodes[opcode] += times * n
    row = {
        "sectors": units[0] / max(1, ideal[0]),
        "moved": 32 * units[0] / max(1, compulsory),
        "memory": compulsory / 1024,
        "instructions": opcodes.total(),
    }
    if (share := opcodes["fma.rn.f32"] / max(1, opcodes.total())) > 0.3:  # where the kernel is mostly arithmetic
        row["multiply-adds"] = share
    if units[1]:
        row["wavefronts"] = units[1] / ideal[1]
    return {k: round(v, 3) for k, v in row.items()}


def worse(now: dict, before: dict) -> list[str]:
    """What has become worse, or is new or gone, in words."""
    found = [f"{key}: no such launch any more" for key in before.keys() - now.keys()]
    for key, row in now.items():
        if key not in before:
            found.append(f"{key}: not in the budget")
            continue
        for what, limit in before[key].items():
            value = row.get(what, 0)
            if what in LARGER_IS_WORSE and value > limit * TOLERANCE:
                found.append(f"{key}: {what} {value}, was {limit}")
            if what in SMALLER_IS_WORSE and value < limit / TOLERANCE:
                found.append(f"{key}: {what} {value}, was {limit}")
    return sorted(found)


def main(arguments: list[str]) -> int:
    """`--update`: write what is measured. Rooms: these alone; their rows of the budget alone count."""
    update, rooms = "--update" in arguments, [a for a in arguments if a != "--update"]
    share, shares = map(int, os.environ.get("SIMT_SHARE", "0/1").split("/"))
    rooms = rooms[share::shares]
    now = measure(rooms)
    everything = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    before = {key: row for key, row in everything.items() if key.split(":")[0] in rooms}
    if update:
        kept = {key: row for key, row in everything.items() if key not in before}
        for key in now.keys() & before.keys():
            now[key] |= {k: v for k, v in before[key].items() if k == "why"}
        BUDGET.write_text(json.dumps(kept | now, indent=1, sort_keys=True) + "\n")
        print(f"{len(now)} launches written to {BUDGET.relative_to(build.ROOT)}")
        return 0
    found = worse(now, before)
    summed = f"budget of {', '.join(rooms)}: {len(now)} launches, {len(found)} worse than tests/simt/budget.json"
    print("\n".join([*found, summed]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
