"""A pytest plugin for runs over the operators' CUDA kernels: every launch in each thread order, and how many there were.

Loaded by `python -m tests.simt operators`, which sets CONVDIT_LIBRARY_DIR. A finding fails the launch, and so its test.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .executor import Library

ORDERS = os.environ.get("SIMT_ORDERS", "forward,reversed,1").split(",")
# Each asks something of the CPU kernels that the CUDA kernels do not have.
NOT_FOR_CUDA = ("test_every_cpu_level",)


def library() -> Library:
    return Library(Path(os.environ["CONVDIT_LIBRARY_DIR"]) / "libconvdit_ops.so")


def pytest_configure(config: pytest.Config) -> None:
    import convdit  # noqa: F401  (loads the library)

    library().set_orders(*ORDERS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [i for i in items if i.name.split("[")[0] in NOT_FOR_CUDA]
    items[:] = [i for i in items if i not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter) -> None:
    lib = library()
    findings = lib.findings()
    terminalreporter.write_line(f"executor: {lib.launches} launches, each in {len(ORDERS)} thread orders; {len(findings)} findings")
    for finding in findings[:20]:
        terminalreporter.write_line(f"  {finding.text}")
