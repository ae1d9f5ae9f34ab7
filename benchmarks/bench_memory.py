"""Peak memory, in MB: a training step against eager's, and a block's inference against one image's hidden tensor.

Each figure comes from a fresh process: the peak of its resident memory during two calls (Linux's VmHWM), less what was
resident before them, models and inputs in place: gradients and the optimiser's state are counted, parameters are not.
A small call goes first, for what libraries set up once.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from . import bench_convnext, bench_dit, bench_fcmae
from .harness import Comparison, Work

# name: (what makes the work, what makes it small)
CASES = {
    "convnext": (bench_convnext.training, {"n": 1, "side": 64}),
    "fcmae": (bench_fcmae.training, {"n": 1, "side": 64}),
    "dit": (bench_dit.step, {"b": 1, "t": 16}),
    "block": (bench_convnext.block_forward, {"n": 1, "side": 7}),
}
BLOCK = {"n": 32, "side": 56, "channels": 96}


def comparisons() -> Iterator[Comparison]:
    def row(operator: str, what: str, shape: str, build: Callable[[], Work], against: str = "PyTorch", quick=False):
        return Comparison(operator, what, shape, torch.float32, build, against, quick, malloc=("default",), unit="MB")

    for size in ("tiny", "atto"):
        options = {"name": f"convnextv2_{size}", "n": 8}
        yield row("ConvNeXt V2 model", "step", f"{size}; 8x224x224", partial(step, "convnext", "timm", options))
        build = partial(step, "fcmae", "dense-masked timm", options)
        yield row("FCMAE model", "step", f"{size}; 8x224x224, 19/49", build)
    for label, (b, t, d, heads) in bench_dit.SIZES.items():
        build = partial(step, "dit", "DiT", {"b": b, "t": t, "d": d, "heads": heads})
        yield row("DiT block", "step", f"{label}; {b}x{t}x{d}", build)
    shape = "C={channels}, {side}x{side}; batch {n}".format(**BLOCK)
    yield row("ConvNeXt V2 block", "forward", shape, block_inference, "one hidden image")


def step(case: str, rival: str, options: dict) -> Work:
    return Work(partial(peak, case, "ours", options), {rival: partial(peak, case, rival, options)})


def block_inference() -> Work:
    """What the block needs beyond its result, beside the hidden tensor of one image."""
    mib = 2**20 / 4  # float32
    sites, channels = BLOCK["side"] ** 2, BLOCK["channels"]
    result, hidden = BLOCK["n"] * sites * channels / mib, 4 * sites * channels / mib
    return Work(lambda: peak("block", "ours", BLOCK) - result, {"hidden tensor of an image": lambda: hidden})


def peak(case: str, who: str, options: dict) -> float:
    """Measured by this file run as a program."""
    if torch.get_default_device().type != "cpu":
        raise NotImplementedError("resident memory is the CPU's")
    command = [sys.executable, "-m", __name__, json.dumps([case, who, options])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    return float(done.stdout)


def resident(field: str) -> float:
    """MB, of this process: VmRSS now, or VmHWM, the most since the last reset."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024


def main() -> None:
    case, who, options = json.loads(sys.argv[1])
    build, small = CASES[case]
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def function(arguments: dict) -> Callable[[], object]:
        work = build(**arguments)
        return work.ours if who == "ours" else work.rivals[who]

    function(options | small)()
    call = function(options)
    # What the small call left free in the heap would be counted as resident before, and its use as none.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    for _ in range(2):
        call()
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main()
