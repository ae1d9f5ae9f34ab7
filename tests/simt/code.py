"""What ptxas makes of the kernels: no spills and no local memory on any GPU, and the instructions of the fast paths.

The PTX for compute_80 is assembled for each architecture that we build for; where the source has code of its own for
sm_100 (`__CUDA_ARCH__`), that for compute_100 for it. nvdisasm (package nvidia-cuda-nvdisasm) shows the code.
And each file compiles for each of them by itself, with no header but ours and CUDA's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from . import build

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
COPY, LOAD, STORE = "LDGSTS.E.BYPASS.128", "LDG.E.128", "STG.E.128"
# Room, pattern of a kernel's name without namespaces, instructions that it must have.
FAST = [
    ("adaln", r"norm_runs(_backward)?<(float, float|bf16, bf16|f16, f16)", (LOAD, STORE)),
    ("attention", r"_mma<", (COPY, "HMMA", "LDSM", STORE)),
    ("attention", r"_fma<", (COPY,)),
    ("depthwise_conv", r"(forward_strips|weight_tiles)<", (COPY,)),
    ("depthwise_conv", r"forward_norm_strips<", (COPY, LOAD, STORE)),
    ("grn", r"sum_tiles<(float, 4|bf16, 8|f16, 8)", (LOAD, STORE)),
    ("grn", r"apply_(forward|backward)<(float, 4|bf16, 8|f16, 8)", (LOAD, STORE)),
    ("sparse_depthwise_conv", r"(forward|weight)_strips<", (COPY,)),
]

# The same for sm_100, which works on two floats an instruction.
PAIRED = [("grn", r"(sum_tiles|apply_(forward|backward))<(float, 4|bf16, 8|f16, 8), true", ("FFMA2", "FMUL2"))]


def assembled(ptx: Path, architecture: str) -> Path:
    """A folder with the machine code (kernels.cubin) of a PTX file, and what ptxas says of it (ptxas.txt)."""
    command = ["ptxas", f"-arch={architecture}", "-v", str(ptx)]

    def make(folder: Path) -> None:
        folder.mkdir()
        done = subprocess.run([*command, "-o", str(folder / "kernels.cubin")], capture_output=True, text=True)
        if done.returncode:
            raise build.BuildError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        (folder / "ptxas.txt").write_text(done.stderr)

    contents = build.digest(ptx.read_bytes(), architecture, build.machine())
    return build.made(build.BUILD / "ptxas" / f"{architecture}-{contents}", make)


def ptxas(ptx: Path, architecture: str) -> dict[str, dict[str, int]]:
    """Of each kernel (by symbol): registers, spilled bytes, bytes of local and of static shared memory."""
    said = (assembled(ptx, architecture) / "ptxas.txt").read_text()
    result = {}
    for match in re.finditer(r"Compiling entry function '(\S+)' for.*?(?=Compiling entry function|\Z)", said, re.S):

        def number(pattern: str, text: str = match[0]) -> int:
            return sum(int(n) for n in re.findall(pattern, text))

        result[match[1]] = {
            "registers": number(r"Used (\d+) registers"),
            "spills": number(r"(\d+) bytes spill (?:stores|loads)"),
            "local": number(r"(\d+) bytes stack frame"),
            "shared": number(r"(\d+) bytes smem"),
        }
    return result


def nvdisasm() -> str:
    places = [Path(p) / "nvidia" / "cu13" / "bin" for p in sys.path]
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path=os.pathsep.join(map(str, places)))
    if found is None:
        raise build.BuildError("nvdisasm was not found. Cure: pip install nvidia-cuda-nvdisasm")
    return found


def instructions(cubin: Path) -> dict[str, set[str]]:
    """The opcodes of each kernel (by symbol)."""
    text = subprocess.run([nvdisasm(), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, set[str]] = {}
    for part in re.split(r"^\.text\.", text, flags=re.M)[1:]:
        kernels[part.split(":", 1)[0]] = set(re.findall(r"\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", part))
    return kernels


@cache
def opcodes_of(cubin: Path) -> dict[str, set[str]]:
    """The same by name."""
    return {demangle(symbol): ops for symbol, ops in instructions(cubin).items()}


def demangle(symbol: str) -> str:
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout.strip()
    return re.sub(r"\(anonymous namespace\)::|convdit::(cuda::)?|^void ", "", name)


def ptx_for(source: Path, architecture: str) -> Path:
    include = build.ROOT / "csrc"
    newer = architecture == "sm_100" and "__CUDA_ARCH__" in build.source_text(source, include)
    return build.nvcc_output(source, "compute_100" if newer else "compute_80", include) / "kernels.ptx"


def problems(room: str, ptx: dict[str, Path]) -> list[str]:
    """What is wrong, in words; `ptx` by architecture."""
    found = []
    tasks = [build.pool().submit(ptxas, ptx[a], a) for a in ARCHITECTURES]
    for architecture, task in zip(ARCHITECTURES, tasks, strict=True):
        for symbol, row in task.result().items():
            if row["spills"] or row["local"]:
                name = demangle(symbol).split("(")[0]
                found.append(f"{room}: {name}, {architecture}: {row['spills']} bytes spilled, {row['local']} local")
    rows = [("sm_80", *row) for row in FAST] + [("sm_100", *row) for row in PAIRED]
    for architecture, of, pattern, wanted in rows:
        if of != room:
            continue
        opcodes = opcodes_of(assembled(ptx[architecture], architecture) / "kernels.cubin")
        kernels = {name: ops for name, ops in opcodes.items() if re.match(r"\w*" + pattern, name)}
        if not kernels:
            found.append(f"{room}: no kernel is called {pattern}")
        for name, ops in kernels.items():
            missing = [w for w in wanted if not any(op.startswith(w) for op in ops)]
            found += [f"{room}: {name.split('(')[0]}, {architecture}: no {w} in its code" for w in missing]
    return found


def compile_alone(source: Path) -> None:
    """`nvcc -Icsrc -c` for every architecture, without optimisation: only whether it compiles is asked here."""
    include = build.ROOT / "csrc"
    codes = [f for a in ARCHITECTURES for f in ("-gencode", f"arch={a.replace('sm', 'compute')},code={a}")]
    flags = ["-std=c++17", "-Xcicc", "-O0", "-Xptxas", "-O0", *codes]

    def make(folder: Path) -> None:
        folder.mkdir()
        build.run([build.nvcc(), "-c", f"-I{include}", *flags, "-o", str(folder / "alone.o"), str(source)])
        (folder / "alone.o").unlink()

    contents = build.digest(build.source_text(source, include), *flags, build.machine())
    build.made(build.BUILD / "alone" / f"{source.parent.name}-{contents}", make)


def main(rooms: list[str]) -> int:
    found = []
    sources = {room: build.ROOT / "csrc" / room / "cuda.cu" for room in rooms}
    alone = [build.pool().submit(compile_alone, source) for source in sources.values()]
    for task in alone:
        task.result()  # raises what the compiler says
    for room, source in sources.items():
        found += problems(room, {a: ptx_for(source, a) for a in ARCHITECTURES})
    print("\n".join([*found, f"code: {len(rooms)} rooms for {', '.join(ARCHITECTURES)}, {len(found)} problems"]))
    return bool(found)
