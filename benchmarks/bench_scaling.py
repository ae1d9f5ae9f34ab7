"""Two threads against one, ours alone, by wall time: every row that has a bar. Rows below a millisecond are not judged.

The machine must be idle: another busy process takes a core from the two-threaded side only. Threads must wait as
they do by default or with OMP_WAIT_POLICY=ACTIVE: to wake one that sleeps takes as long as a step of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from . import bench_adaln, bench_attention, bench_convnext, bench_depthwise_conv, bench_dit, bench_fcmae, bench_grn
from . import bench_sparse_depthwise_conv as bench_sparse
from .clock import with_threads
from .harness import Comparison, Work

BENCHES = (
    bench_depthwise_conv,
    bench_sparse,
    bench_grn,
    bench_adaln,
    bench_attention,
    bench_convnext,
    bench_fcmae,
    bench_dit,
)


def comparisons() -> Iterator[Comparison]:
    for bench in BENCHES:
        for c in bench.comparisons():
            if c.against == "PyTorch" and c.bar is not None:
                yield Comparison(
                    c.operator,
                    c.what,
                    c.shape,
                    c.dtype,
                    partial(two_threads, c.build),
                    against="one thread",
                    threads=2,
                    malloc=("tuned",),
                    effort=0.3,
                )


def two_threads(build: Callable[[], Work]) -> Work:
    if torch.get_default_device().type != "cpu":
        raise NotImplementedError("threads are the CPU's")
    ours = build().ours
    return Work(with_threads(2, ours), {"one thread": with_threads(1, ours)}, wall=True)
