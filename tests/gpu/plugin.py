"""A pytest plugin that runs the operators' tests, which are written for CPU tensors, over the CUDA kernels of the GPU.

Each operator's CPU kernel is replaced by one that copies the storage of every tensor to the GPU, with its offset, sizes
and strides, runs the CUDA kernel there, and copies the results back. In the dry run of `make gpu-check` the copies stay
in the executor's memory, and the kernel that runs on them is the executor's.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.simt import summary
from tests.simt.plugin import choose, library, take_cpu_tensors_for_cuda

DRY = os.environ.get("CONVDIT_GPU_CHECK") == "dry"
DEVICE = "cpu" if DRY else "cuda"
calls = 0


def moved(value, device: str):
    """A tensor in a copy of its storage on the device; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(v, device) for v in value)
    if not isinstance(value, torch.Tensor):
        return value
    whole = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).to(device, copy=True)
    result = torch.empty(0, dtype=value.dtype, device=device)
    return result.set_(whole.untyped_storage(), value.storage_offset(), value.shape, value.stride())


def redirect(library: torch.library.Library, name: str) -> None:
    kernel = torch.library.get_kernel(name, "CPU" if DRY else "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU if DRY else torch._C.DispatchKey.CUDA)

    def on_the_device(*arguments):
        global calls
        calls += 1
        return moved(kernel.call_boxed(keys, *moved(arguments, DEVICE)), "cpu")

    library.impl(name, on_the_device, "CPU", allow_override=True)


def pytest_configure(config: pytest.Config) -> None:
    import convdit  # noqa: F401  (loads the library)

    key = "CPU" if DRY else "CUDA"
    if not DRY and not convdit.build_info()["cuda"]:
        raise pytest.UsageError(f"the CUDA library is not loaded: {convdit.build_info()['cuda_reason']}")
    take_cpu_tensors_for_cuda()
    config.redirected = torch.library.Library("convdit", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("convdit::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
            redirect(config.redirected, name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    choose(config, items)


def pytest_terminal_summary(terminalreporter) -> None:
    if DRY:
        summary.add(summary.GPU_CHECK, launches=library().launches, findings=len(library().findings()))
    terminalreporter.write_line(
        f"{calls} calls of operators on {'the executor' if DRY else torch.cuda.get_device_name()}"
    )
