"""The operators' tests over a CPU library built with AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`).

    python -m tests.sanitize build/sanitize/lib -q tests/ops -k equals_reference

At this machine's CPU level and at each lower one (CONVDIT_CPU_LEVEL: from that one down). First, at each, a table of
neighbours that points one row behind the features: the run is worth something only if that is seen.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

WRONG = """
import torch, convdit
features, weight = torch.randn(4, 24), torch.randn(24, 1, 3, 3)
neighbors = torch.full((4, 9), -1, dtype=torch.int32)
neighbors[:, 4] = torch.tensor([0, 1, 2, 4])  # there is no row 4
torch.ops.convdit.sparse_depthwise_conv2d_fwd(features, weight, None, neighbors, 1)
"""


def environment(folder: Path) -> dict[str, str]:
    """The sanitizers' libraries come first into the process, since python is built without them. Leaks are not looked
    for: Python and PyTorch keep much memory until the end."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")

    def library(name: str) -> str:
        return subprocess.run(
            [*compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()

    return {
        **os.environ,
        "CONVDIT_LIBRARY_DIR": str(folder.resolve()),
        "CONVDIT_PRODUCTS": "convdit",  # PyTorch's are not looked at
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def levels(env: dict[str, str]) -> list[str]:
    """The CPU levels to run, the highest first."""
    code = "import convdit; i = convdit.build_info(); print(*i['cpu_levels'], i['cpu_level'])"
    said = subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    *names, highest = said.split()
    return names[names.index(highest) :: -1]


def main(folder: str, *tests: str) -> int:
    env = environment(Path(folder))
    for level in levels(env):
        env["CONVDIT_CPU_LEVEL"] = level
        wrong = subprocess.run([sys.executable, "-c", WRONG], env=env, capture_output=True, text=True)
        if wrong.returncode == 0 or "AddressSanitizer: heap-buffer-overflow" not in wrong.stderr:
            print(f"{level}: a read behind a tensor passed unseen, or something else broke:\n{wrong.stderr[-3000:]}")
            return 1
        print(f"{level}: AddressSanitizer sees a read behind a tensor, made on purpose", flush=True)
        status = subprocess.run([sys.executable, "-m", "pytest", *tests], env=env).returncode
        if status != 0:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
