"""A pytest plugin for runs over the operators' CUDA kernels: runs every launch in each thread order, and counts them.

Loaded by `python -m tests.simt operators`, which sets CONVDIT_LIBRARY_DIR. A finding fails the launch, and so its test.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import pytest

from tests.ops import harness

from . import summary
from .build import ROOT
from .executor import Library

ORDERS = os.environ.get("SIMT_ORDERS", "forward,reversed,1").split(",")
# Findings that are intended: what, file, the code of the line, why.
INTENDED: list[tuple[str, str, str, str]] = []
# Tests left out: a pattern in "file::test", and why.
NOT_FOR_CUDA = {
    r"::test_every_cpu_level$": "of the CPU kernels",
    r"^test_cuda_registration": "of the CUDA library",
    # Looking at values on CUDA would cost a wait. sites.h: there such a row has no neighbours, and is nobody's.
    r"^test_sites.py::test_bad_arguments_are_named\[indices[012]-": "of values that CUDA does not look at",
    r"^test_grn.py::test_offsets_that_do_not_fit_the_rows_are_refused": "of values that CUDA does not look at",
    r"^test_call_cost.py::test_large_results_ask_for_huge_pages$": "of the CPU's memory",
    # The fused block and GELU are the CPU's; on CUDA they are other operators, ours or PyTorch's.
    r"^test_integration.py::.*(convnext_block|gelu_tanh)": "of the CPU kernels",
    r"^test_(gelu_tanh|attention_cpu).py": "of the CPU kernels",
    r"^test_integration.py::test_(the_table_reaches_every|exported_programs|gradients_of_two_processes)": (
        "of all operators at once, the fused block among them"
    ),
}


def library() -> Library:
    return Library(Path(os.environ["CONVDIT_LIBRARY_DIR"]) / "libconvdit_ops.so")


def take_cpu_tensors_for_cuda() -> None:
    """Where an operator's result depends on the device, its fake too must take a CPU tensor for one on CUDA."""
    from convdit.ops import attention, linear

    attention.KEEP_REST.append("cpu")
    linear.HERE = False  # its product is of the CPU's kernels, and so is the operator of the attention half-block
    half_block = importlib.import_module("convdit.ops.adaln_zero_attention")
    half_block.is_plain, half_block.at_once = lambda *_: False, lambda *_: None


def pytest_configure(config: pytest.Config) -> None:
    import convdit  # noqa: F401  (loads the library)

    take_cpu_tensors_for_cuda()
    library().set_orders(*ORDERS)
    harness.THREADS = (1, 2)  # a repetition: CUDA kernels take no threads of the CPU's, and the cases are large
    for what, file, code, _why in INTENDED:
        library().allow(what, file, code)


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not for CUDA kernels, and what is not in SIMT_SHARE=k/n: every n-th test from the k-th."""
    without_kernels = {
        f"test_{room.name}.py"
        for room in (ROOT / "csrc").iterdir()
        if (room / "torch.cpp").exists() and not (room / "cuda.cu").exists()
    }
    wanted = [
        i
        for i in items
        if i.path.name not in without_kernels
        and not any(re.search(pattern, f"{i.path.name}::{i.name}") for pattern in NOT_FOR_CUDA)
    ]
    share, shares = map(int, os.environ.get("SIMT_SHARE", "0/1").split("/"))
    mine = set(wanted[share::shares])
    left_out = [i for i in items if i not in mine]
    items[:] = [i for i in items if i in mine]
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    choose(config, items)


def pytest_terminal_summary(terminalreporter) -> None:
    lib = library()
    findings = lib.findings()
    terminalreporter.write_line(
        f"executor: {lib.launches} launches, each in {len(ORDERS)} thread orders; {len(findings)} findings"
    )
    for finding in findings[:20]:
        terminalreporter.write_line(f"  {finding.text}")
    if step := os.environ.get("SIMT_STEP"):
        summary.add(step, launches=lib.launches, findings=len(findings))
