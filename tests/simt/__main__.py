"""python -m tests.simt COMMAND

operators [--arch compute_90] [--only room] [--few-blocks] [pytest's arguments ...]: the tests of the operators, over
    their CUDA kernels (--only: of one room); in as many processes as MAX_JOBS says; grids limited to a few blocks,
    which then loop over the tasks
mutants [room ...]: the same over kernels broken on purpose
budget [--update] [room ...]: what the kernels move and need, against budget.json
code [room ...]: what ptxas makes of them for each GPU: spills, local memory, instructions of the fast paths
summary [--begin]: the launches, findings and mutants of the steps before, since --begin
bound [text]: lower bounds of the time on four GPUs, of operators whose name has the text
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import IO

from . import build, code, mutants, summary

ROOMS = sorted(p.parent.name for p in (build.ROOT / "csrc").glob("*/cuda.cu"))
QUICK_TESTS = "equals_reference or error_rule or any_strides or every_width or halves or changes_nothing"

# For mutants of attention: a width of each kind of kernel, tokens for a tile and a bit more, or several parts.
FEW_TESTS = {
    "attention": "scores_far or nearly_cancel"
    " or (equals_reference or error_rule) and (3x7 or 2x9 or 2x33 or 2x66 or 2x63 or 2x64 or 2x48 or 1x70)"
}


def start(folder: Path, *arguments: str, output: IO | None = None, **environment: str) -> subprocess.Popen:
    """Start a module in a process that loads the operators from `folder`."""
    environment = dict(os.environ, CONVDIT_LIBRARY_DIR=str(folder), PYTHONPATH=str(build.ROOT), **environment)
    return subprocess.Popen([sys.executable, "-m", *arguments], env=environment, stdout=output, stderr=output)


def in_shares(folder: Path, *arguments: str, **environment: str) -> int:
    """Start a module in as many processes as MAX_JOBS says, each with its share of the tests; 0 if none fails."""
    shares = int(os.environ.get("MAX_JOBS") or 1)
    outputs = [None, *(tempfile.TemporaryFile("w+") for _ in range(1, shares))]  # the first share's is seen at once
    processes = [
        start(folder, *arguments, output=o, SIMT_SHARE=f"{k}/{shares}", **environment) for k, o in enumerate(outputs)
    ]
    failed = any([p.wait() for p in processes])
    for output in outputs[1:]:
        output.seek(0)
        print(output.read(), flush=True)
    return failed


def operators(arguments: list[str]) -> int:
    architecture = "compute_80"
    if arguments[:1] == ["--arch"]:
        architecture, arguments = arguments[1], arguments[2:]
    only = None
    if arguments[:1] == ["--only"]:
        only, arguments = arguments[1], arguments[2:]
    most_blocks = 0
    if arguments[:1] == ["--few-blocks"]:
        most_blocks, arguments = build.FEW_BLOCKS, arguments[1:]
    folder = build.operators(architecture, only=only, most_blocks=most_blocks)
    step = f"operators, {architecture}{', few blocks' if most_blocks else ''}"
    summary.begin(step)
    return in_shares(folder, "pytest", "-p", "tests.simt.plugin", *arguments, SIMT_STEP=step)


def sweep(rooms: list[str]) -> int:
    rooms, failed, total = rooms or ROOMS, 0, Counter()
    for room in rooms:
        step = f"{'equivalent ' if os.environ.get('SIMT_EQUIVALENT') else ''}mutants of {room}"
        summary.begin(step)
        csrc, _ = mutants.mutated_tree(room)
        files = [f"{folder}/test_{room}.py" for folder in ("tests/ops", "tests/simt/operators")]
        files = [f for f in files if (build.ROOT / f).exists()]
        tests = ["pytest", "-p", "tests.simt.sweep", "-q", "-s", *files, "-k", FEW_TESTS.get(room, QUICK_TESTS)]
        library = build.operators(csrc=csrc, only=room, most_blocks=build.FEW_BLOCKS)
        failed += in_shares(library, *tests, SIMT_ROOM=room, SIMT_STEP=step)
        counts = summary.steps().get(step, Counter())
        print(f"{room}: {summary.of_mutants(counts)}", flush=True)
        total += counts
    print(f"{len(rooms)} rooms: {summary.of_mutants(total)}")
    return failed


def budget(arguments: list[str]) -> int:
    summary.begin("budget")
    rooms = [a for a in arguments if a != "--update"]
    update = [a for a in arguments if a == "--update"]
    if not rooms and not update:
        return in_shares(build.operators(), "tests.simt.budget", *ROOMS)
    if not rooms:  # one process: it writes the file
        return start(build.operators(), "tests.simt.budget", *update, *ROOMS).wait()
    return any([start(build.operators(only=r), "tests.simt.budget", *update, r).wait() for r in rooms])


def code_of(rooms: list[str]) -> int:
    return code.main(rooms or ROOMS)


def bound(arguments: list[str]) -> int:
    text = arguments[0] if arguments else ""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {code: build.operators(code) for code in ("compute_80", "compute_100")}
        files = {code: f"{scratch}/{code}.json" for code in folders}
        runs = [start(folders[c], "tests.simt.bound", "measure", text, files[c]) for c in folders]
        if any([run.wait() for run in runs]):
            return 1
        named = [f"{code}={file}" for code, file in files.items()]
        return start(folders["compute_80"], "tests.simt.bound", "report", text, *named).wait()


def main(arguments: list[str]) -> int:
    commands = {
        "operators": operators,
        "mutants": sweep,
        "budget": budget,
        "code": code_of,
        "summary": summary.main,
        "bound": bound,
    }
    if not arguments or arguments[0] not in commands:
        print(__doc__)
        return 2
    try:
        return commands[arguments[0]](arguments[1:])
    except build.BuildError as error:
        print(f"tests.simt: {error}", file=sys.stderr)
        return 1


sys.exit(main(sys.argv[1:]))
