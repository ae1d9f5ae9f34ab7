"""python -m tests.simt COMMAND

operators [--arch compute_90] [pytest's arguments ...]: the tests of the operators, over their CUDA kernels; in as
    many processes as MAX_JOBS says
mutants [room ...]: the same over kernels broken on purpose
budget [--update]: what the kernels move and need, against budget.json
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from . import build, mutants

QUICK_TESTS = "equals_reference or error_rule or any_strides or every_width or halves"


def start(folder: Path, *arguments: str, output: IO | None = None, **environment: str) -> subprocess.Popen:
    """Start a module in a process that loads the operators from `folder`."""
    environment = dict(os.environ, CONVDIT_LIBRARY_DIR=str(folder), PYTHONPATH=str(build.ROOT), **environment)
    return subprocess.Popen([sys.executable, "-m", *arguments], env=environment, stdout=output, stderr=output)


def operators(arguments: list[str]) -> int:
    architecture = "compute_80"
    if arguments[:1] == ["--arch"]:
        architecture, arguments = arguments[1], arguments[2:]
    folder, shares = build.operators(architecture), int(os.environ.get("MAX_JOBS") or 1)
    command = ["pytest", "-p", "tests.simt.plugin", *arguments]
    outputs = [None, *(tempfile.TemporaryFile("w+") for _ in range(1, shares))]  # the first share's is seen at once
    processes = [start(folder, *command, output=o, SIMT_SHARE=f"{k}/{shares}") for k, o in enumerate(outputs)]
    failed = any([p.wait() for p in processes])
    for output in outputs[1:]:
        output.seek(0)
        print(output.read())
    return failed


def sweep(rooms: list[str]) -> int:
    rooms = rooms or sorted(p.parent.name for p in (build.ROOT / "csrc").glob("*/cuda.cu"))
    failed = 0
    for room in rooms:
        csrc, _ = mutants.mutated_tree(room)
        tests = ["pytest", "-p", "tests.simt.sweep", "-q", "-s", f"tests/ops/test_{room}.py", "-k", QUICK_TESTS]
        failed += start(build.operators(csrc=csrc, only=room), *tests, SIMT_ROOM=room).wait() != 0
    return failed


def budget(arguments: list[str]) -> int:
    return start(build.operators(), "tests.simt.budget", *arguments).wait()


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
