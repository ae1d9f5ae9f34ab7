"""python -m tests.gpu [--dry]: all that a GPU can tell about the CUDA kernels, in one command (`make gpu-check`).

Builds for the GPU that is there; runs the operators' tests over its kernels; captures and replays CUDA graphs, changes
streams and devices; repeats a part under compute-sanitizer; times operators beside their rivals. Writes what came of
each step to benchmarks/results/ as JSON and as a table. Without a GPU it says so and ends with 0.

--dry: the same steps, tiny, with the executor of tests/simt in the GPU's place, and build/gpu-check/ in that of the
results. Where nothing can stand in (a compute-sanitizer) the step runs its command bare, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("memcheck", "racecheck", "initcheck")
RESULTS = {0: "passed", 124: "out of time", 127: "missing"}  # by exit status, of `timeout` too
OPERATORS = "equals_reference or error_rule or any_strides"


@dataclass
class Step:
    name: str
    command: list[str]
    limit: int  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    note: str = ""
    shares: int = 1  # processes, each with its share of the tests


@dataclass
class Outcome:
    name: str
    result: str  # passed | failed | out of time | missing
    seconds: float
    last_line: str
    note: str
    command: str


def sanitizer() -> str | None:
    """The toolkit's, or that of the package nvidia-cuda-sanitizer-api."""
    packaged = next((Path(p) / "nvidia/cu13/bin/compute-sanitizer" for p in sys.path if "site-packages" in p), Path())
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or next((str(p) for p in (cuda, packaged) if p.is_file()), None)


def steps(dry: bool, architecture: str, results: Path) -> list[Step]:
    python, tests = (
        sys.executable,
        ["tests/ops"] if dry else ["tests/ops", "tests/nn", "tests/models", "tests/test_sparse.py"],
    )
    every = {"CONVDIT_GPU_CHECK": "dry", "SIMT_ORDERS": "forward"} if dry else {}
    build = [python, "-m", "pip", "install", "--no-build-isolation", "-e", ".[test]"]
    # The lines of the source, for compute-sanitizer's findings.
    cuda = {"CONVDIT_CUDA": "on", "TORCH_CUDA_ARCH_LIST": architecture, "NVCC_APPEND_FLAGS": "-lineinfo"}
    if dry:
        build, cuda = [python, "-c", "from tests.simt import build; print(build.operators())"], {}
    found = [
        Step("build", build, 600, cuda),
        Step("operators", [*pytest(), *tests], 200, {"SIMT_SHARE": "5/97"} if dry else {}, shares=1 if dry else jobs()),
        Step("device", [*pytest(), "tests/gpu/test_device.py"], 90),
    ]
    few = {"SIMT_SHARE": "1/199" if dry else "3/11", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tool = sanitizer() or "compute-sanitizer"
    for name in SANITIZERS[:1] if dry else SANITIZERS:  # without the tools they are all the same
        prefix = [] if dry else [tool, "--tool", name, "--error-exitcode", "9"]
        note = "without compute-sanitizer; the executor checks memory by itself" if dry else ""
        found.append(Step(name, [*prefix, *pytest(), "tests/ops", "-k", OPERATORS], 90, few, note))
    bench = [python, "-m", "benchmarks", "gpu", "--out", str(results)]
    found.append(Step("bench", bench, 240, note="times of the executor: they say nothing of a GPU" if dry else ""))
    return [replace(s, environment=every | s.environment) for s in found]


def pytest() -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "tests.gpu.plugin"]


def jobs() -> int:
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def run(step: Step, environment: dict[str, str]) -> Outcome:
    """The step's processes, the first one's output as it comes, the others' after it."""
    print(f"\n== {step.name}: {' '.join(step.command)}{f'  ({step.note})' if step.note else ''}", flush=True)
    start, last, processes = time.monotonic(), "", []
    for k in range(step.shares):
        share = {"SIMT_SHARE": f"{k}/{step.shares}"} if step.shares > 1 else {}
        output = subprocess.PIPE if k == 0 else tempfile.TemporaryFile("w+")
        command = ["timeout", "--kill-after=10", str(step.limit), *step.command]
        given = os.environ | environment | step.environment | share
        process = subprocess.Popen(command, cwd=ROOT, env=given, stdout=output, stderr=subprocess.STDOUT, text=True)
        processes.append((process, output))
    for process, output in processes:
        process.stdout or (process.wait(), output.seek(0))
        for line in process.stdout or output:
            print(line, end="", flush=True)
            last = line.strip() or last
    statuses = [process.wait() for process, _ in processes]
    result = RESULTS.get(next((s for s in statuses if s), 0), "failed")
    if result == "missing":
        last = f"not found: {step.command[0]}; compute-sanitizer: pip install nvidia-cuda-sanitizer-api"
    return Outcome(step.name, result, round(time.monotonic() - start, 1), last, step.note, " ".join(step.command))


def table(outcomes: list[Outcome]) -> str:
    rows = [("step", "result", "seconds", "last line")]
    rows += [(o.name, o.result, f"{o.seconds:.0f}", o.note or o.last_line[:90]) for o in outcomes]
    return "\n".join(f"{a:12} {b:12} {c:>8}  {d}".rstrip() for a, b, c, d in rows)


def write(folder: Path, device: str, capability: str, outcomes: list[Outcome]) -> None:
    name = "-".join(re.findall("[a-z0-9]+", device.lower()))
    path = folder / f"{datetime.now(timezone.utc):%Y-%m-%d}-{name}-check.json"
    document = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "compute_capability": capability,
        "seconds": round(sum(o.seconds for o in outcomes)),
        "steps": [asdict(o) for o in outcomes],
    }
    folder.mkdir(parents=True, exist_ok=True)
    # No machine's paths in a file that is committed.
    text = json.dumps(document, indent=1).replace(sys.executable, "python").replace(str(ROOT), ".")
    path.write_text(text + "\n")
    path.with_suffix(".txt").write_text(f"{device}\n{table(outcomes)}\n")
    print(f"\n{table(outcomes)}\nwritten: {path}, {path.with_suffix('.txt')}")


def results_folder(dry: bool) -> Path:
    return ROOT / "build/gpu-check" if dry else ROOT / "benchmarks/results"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dry", action="store_true", help="the same on the executor, tiny; needs nvcc, not a GPU")
    dry = parser.parse_args(arguments).dry
    import torch

    environment = {"PYTHONPATH": str(ROOT)}
    if dry:
        from tests.simt import build, summary

        summary.begin(summary.GPU_CHECK)
        device, capability = "the executor", ""
        environment["CONVDIT_LIBRARY_DIR"] = str(build.operators())
    elif not torch.cuda.is_available():
        print("gpu-check: found no CUDA GPU that this PyTorch can use, so nothing was checked. DRY=1: on the executor")
        return 0
    else:
        device, capability = torch.cuda.get_device_name(), "{}.{}".format(*torch.cuda.get_device_capability())
    results = results_folder(dry)
    outcomes: list[Outcome] = []
    for step in steps(dry, capability, results):
        outcomes.append(run(step, environment))
        if step.name == "build" and outcomes[-1].result != "passed":
            break
    write(results, device, capability, outcomes)
    failed = [o.name for o in outcomes if o.result != "passed"]
    print(f"gpu-check{', dry' if dry else ''}: {len(outcomes) - len(failed)} of {len(outcomes)} steps passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
