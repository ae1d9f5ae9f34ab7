"""python -m tests.simt COMMAND

operators [--arch compute_90] [pytest's arguments ...]: the tests of the operators, over their CUDA kernels
mutants [room ...]: the same over kernels broken on purpose
budget [--update]: what the kernels move and need, against budget.json
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from . import build, mutants

QUICK_TESTS = "equals_reference or error_rule or any_strides or every_width or halves"


def python(folder: Path, *arguments: str, **environment: str) -> int:
    """Run a module in a process that loads the operators from `folder`."""
    environment = dict(os.environ, CONVDIT_LIBRARY_DIR=str(folder), PYTHONPATH=str(build.ROOT), **environment)
    return subprocess.run([sys.executable, "-m", *arguments], env=environment).returncode


def operators(arguments: list[str]) -> int:
    architecture = "compute_80"
    if arguments[:1] == ["--arch"]:
        architecture, arguments = arguments[1], arguments[2:]
    return python(build.operators(architecture), "pytest", "-p", "tests.simt.plugin", *arguments)


def sweep(rooms: list[str]) -> int:
    rooms = rooms or sorted(p.parent.name for p in (build.ROOT / "csrc").glob("*/cuda.cu"))
    failed = 0
    for room in rooms:
        csrc, _ = mutants.mutated_tree(room)
        tests = ["-q", "-s", f"tests/ops/test_{room}.py", "-k", QUICK_TESTS]
        failed += (
            python(build.operators(csrc=csrc, only=room), "pytest", "-p", "tests.simt.sweep", *tests, SIMT_ROOM=room)
            != 0
        )
    return failed


def budget(arguments: list[str]) -> int:
    return python(build.operators(), "tests.simt.budget", *arguments)


def main(arguments: list[str]) -> int:
    commands = {"operators": operators, "mutants": sweep, "budget": budget}
    if not arguments or arguments[0] not in commands:
        print(__doc__)
        return 2
    try:
        return commands[arguments[0]](arguments[1:])
    except build.BuildError as error:
        print(f"tests.simt: {error}", file=sys.stderr)
        return 1


sys.exit(main(sys.argv[1:]))
