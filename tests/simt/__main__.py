"""The tests of the operators, over their CUDA kernels:

python -m tests.simt operators [--arch compute_90] [pytest's arguments ...]
"""

from __future__ import annotations

import os
import subprocess
import sys

from . import build


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] != "operators":
        print(__doc__)
        return 2
    arguments = arguments[1:]
    architecture = "compute_80"
    if arguments[:1] == ["--arch"]:
        architecture, arguments = arguments[1], arguments[2:]
    try:
        folder = build.operators(architecture)
    except build.BuildError as error:
        print(f"tests.simt: {error}", file=sys.stderr)
        return 1
    environment = dict(os.environ, CONVDIT_LIBRARY_DIR=str(folder), PYTHONPATH=str(build.ROOT))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.simt.plugin", *arguments], env=environment
    ).returncode


sys.exit(main(sys.argv[1:]))
