"""Builds what the executor runs: a library of one CUDA file, or convdit's operators with their CUDA kernels.

Everything lies in build/simt, named by a hash of what it was made from, so that only what changed is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from .translate import translate

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = Path(__file__).resolve().parent / "runtime"
BUILD = ROOT / "build" / "simt"
FEW_BLOCKS = 3  # a limit of grids, so that kernels which loop over their tasks do so on small inputs
ENOUGH_TILES = 4  # maps from which a convolution and its LayerNorm are one launch: small, as our inputs are
ENOUGH_BLOCKS = 4  # up to which float32 attention's backward deals a head's keys out to blocks: likewise
CXX = os.environ.get("CXX", "g++")
# -O1: kernels are large and run on small inputs. Integers wrap and nothing is contracted, as on the GPU.
KERNEL_FLAGS = [
    "-O1",
    "-march=native",
    "-std=c++20",
    "-fPIC",
    "-fwrapv",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-w",
]
RUNTIME_FLAGS = ["-O2", "-march=native", "-std=c++20", "-fPIC", "-fwrapv", "-fvisibility=hidden", "-Wall"]


class BuildError(Exception):
    pass


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    )
    if found is None:
        raise BuildError(
            "nvcc was not found: the executor runs what nvcc makes of the kernels. "
            "Cure: install the CUDA toolkit (13.0 or later) and put nvcc on the PATH"
        )
    return found


def run(command: list[str], cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-6000:]}")


@cache
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 2))


@cache
def machine() -> str:
    """What -march=native and the compilers' versions depend on."""
    versions = [subprocess.run([c, "--version"], capture_output=True, text=True).stdout for c in (CXX, nvcc())]
    native = subprocess.run([CXX, "-march=native", "-Q", "--help=target"], capture_output=True, text=True).stdout
    return "\n".join([*versions, native])


def digest(*parts: str | bytes) -> str:
    h = hashlib.sha256()
    for p in parts:
        h.update(p.encode() if isinstance(p, str) else p)
        h.update(b"\0")
    return h.hexdigest()[:16]


def made(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made now unless it exists. It appears whole or not at all, whoever else builds."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        make(partial)
        try:
            partial.rename(path)
        except OSError:
            if not path.exists():
                raise
            shutil.rmtree(partial, ignore_errors=True)
    return path


def copy_whole(file: Path, folder: Path) -> None:
    """Copy a library into a folder. Written in place it would crash a process that has the one before it loaded."""
    partial = folder / f"{file.name}.{os.getpid()}.partial"
    shutil.copy2(file, partial)
    partial.replace(folder / file.name)


def source_text(path: Path, include: Path, seen: set[Path] | None = None) -> str:
    """The file and every header of ours that it includes."""
    seen = set() if seen is None else seen
    if path in seen or not path.exists():
        return ""
    seen.add(path)
    text = path.read_text()
    headers = [h for name in re.findall(r'#include "([^"]+)"', text) for h in (include / name, path.parent / name)]
    return text + "".join(source_text(h, include, seen) for h in headers)


def relative(path: str) -> str:
    """A path in the repository from its root; one outside as it is."""
    p = Path(path).resolve()
    return str(p.relative_to(ROOT)) if p.is_relative_to(ROOT) else str(p)


def compile_cpp(text: str, name: str, compiler: list[str], depends: str = "", include: tuple[str, ...] = ()) -> Path:
    """An object of C++ text. `compiler`: command and flags; `depends`: what the text includes, by way of `include`."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / f"{name}.cpp").write_text(text)
        run([*compiler, *include, "-c", f"-I{RUNTIME}", f"{name}.cpp", "-o", f"{name}.o"], cwd=folder)

    return made(BUILD / "objects" / f"{name}-{digest(text, depends, *compiler, machine())}", make) / f"{name}.o"


def headers() -> str:
    return "".join(h.read_text() for h in sorted(RUNTIME.glob("*.h")))


def runtime_objects(*more: tuple[str, list[str]]) -> list[Path]:
    """The executor's objects; `more`: further files of runtime/ and the compiler of each."""
    files = [*((name, [CXX, *RUNTIME_FLAGS]) for name in ("executor", "memory", "warp", "traffic")), *more]
    tasks = [pool().submit(compile_cpp, (RUNTIME / f"{n}.cpp").read_text(), n, c, headers()) for n, c in files]
    return [t.result() for t in tasks]


def cuda_runtime() -> tuple[str, list[str]]:
    return "cudart", [nvcc(), "-std=c++17", "-O1", "-Xcompiler", "-fPIC,-fvisibility=hidden"]  # nvcc knows its headers


def nvcc_output(cuda: Path, architecture: str, include: Path, most_blocks: int = 0) -> Path:
    """A folder with the PTX (kernels.ptx) and the object of the host code (host.o) of a CUDA file.

    `most_blocks`, if any, is the limit of a grid, so that kernels which loop over their tasks do so on small inputs.
    """
    flags = ["-std=c++17", "-O3", "-lineinfo", f"-I{include}", "-Xcompiler", "-fPIC"]
    flags += ["-gencode", f"arch={architecture},code={architecture}"]
    flags += [f"-DCONVDIT_ENOUGH_TILES={ENOUGH_TILES}", f"-DCONVDIT_ENOUGH_BLOCKS={ENOUGH_BLOCKS}"]
    flags += [f"-DCONVDIT_MOST_BLOCKS={most_blocks}"] if most_blocks else []

    def make(folder: Path) -> None:
        folder.mkdir()
        run([nvcc(), "-c", *flags, "--keep", "--keep-dir", str(folder), "-o", str(folder / "host.o"), str(cuda)])
        (ptx,) = folder.glob("*.ptx")
        ptx.rename(folder / "kernels.ptx")
        for left in folder.iterdir():
            if left.name not in ("kernels.ptx", "host.o"):
                left.unlink()

    contents = digest(source_text(cuda, include), str(cuda), *flags, machine())
    return made(BUILD / "nvcc" / f"{cuda.parent.name}-{cuda.stem}-{architecture}-{contents}", make)


def kernel_objects(ptx: str, name: str) -> tuple[list[Path], dict]:
    """Objects of the translated kernels, and the table of their code (see translate)."""
    sources, table = translate(ptx, relative, parts=1 + ptx.count("\n") // 4000)
    depends = (RUNTIME / "simt.h").read_text() + (RUNTIME / "arithmetic.h").read_text()
    tasks = [pool().submit(compile_cpp, s, f"{name}-{i}", [CXX, *KERNEL_FLAGS], depends) for i, s in enumerate(sources)]
    return [t.result() for t in tasks], table


def link(objects: list[Path], name: str, flags: list[str], table: dict) -> Path:
    """A shared library beside the table of its kernels, kernels.json."""

    def make(folder: Path) -> None:
        folder.mkdir()
        # Symbolic: PyTorch may have loaded NVIDIA's runtime, whose names the stand-in has.
        run(
            [CXX, "-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined", "-o", name, *map(str, objects), *flags], cwd=folder
        )
        (folder / "kernels.json").write_text(json.dumps(table))

    return (
        made(BUILD / "libraries" / f"{Path(name).stem}-{digest(*map(str, objects), *flags, json.dumps(table))}", make)
        / name
    )


def library_of(path: Path, architecture: str = "compute_80") -> Path:
    """A library of one CUDA file with its launchers, or of one PTX file."""
    path = path.resolve()
    if path.suffix == ".ptx":
        objects, table = kernel_objects(path.read_text(), path.stem)
        return link([*objects, *runtime_objects()], f"{path.stem}.so", [], table)
    folder = nvcc_output(path, architecture, ROOT / "csrc")
    objects, table = kernel_objects((folder / "kernels.ptx").read_text(), f"{path.parent.name}-{path.stem}")
    objects += [folder / "host.o", *runtime_objects(cuda_runtime())]
    return link(objects, f"{path.parent.name}-{path.stem}.so", [], table)


def operators(
    architecture: str = "compute_80", csrc: Path = ROOT / "csrc", only: str | None = None, most_blocks: int = 0
) -> Path:
    """convdit's operators for CPU tensors, their CUDA kernels on the executor: a folder for CONVDIT_LIBRARY_DIR.

    `most_blocks`: see nvcc_output. `only`: the one room whose kernels are wanted; those of the sites come along, as
    sparse operators need their tables.
    """
    import torch

    torch_folder = Path(torch.__file__).parent
    rooms = sorted(p.parent for p in csrc.glob("*/torch.cpp"))
    cuda_rooms = [r for r in rooms if (r / "cuda.cu").exists() and (only in (None, r.name) or r.name == "sites")]
    include = ("-Xcompiler", f"-isystem,{torch_folder / 'include'}", f"-I{csrc}")
    compiler = [
        nvcc(),
        "-std=c++20",
        "-O1",
        "-Xcompiler",
        "-fPIC,-w",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    device = ["-include", "torch_device.h"]
    cuda = ["-DCONVDIT_DEVICE_CUDA", "-DUSE_CUDA", f'-DCONVDIT_CUDA_ARCHS="{architecture}"']
    memory = ("torch_memory", [CXX, *RUNTIME_FLAGS, f"-I{torch_folder / 'include'}"])

    bindings = [
        pool().submit(
            compile_cpp,
            (room / "torch.cpp").read_text(),
            f"{room.name}-torch",
            [*compiler, *device, *(cuda if room in cuda_rooms else [])],
            source_text(room / "torch.cpp", csrc) + (RUNTIME / "torch_device.h").read_text() + torch.__version__,
            include,
        )
        for room in rooms
    ]
    outputs = [pool().submit(nvcc_output, room / "cuda.cu", architecture, csrc, most_blocks) for room in cuda_rooms]
    objects, table = [], {}
    for room, output in zip(cuda_rooms, outputs, strict=True):
        kernels, kernel_table = kernel_objects((output.result() / "kernels.ptx").read_text(), f"{room.name}-cuda")
        objects += [output.result() / "host.o", *kernels]
        table |= kernel_table
    objects += [b.result() for b in bindings]
    objects += runtime_objects(cuda_runtime(), memory)
    flags = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    library = link(objects, "libconvdit_ops.so", flags, table)
    information = list((ROOT / "convdit").glob("_C.*.so"))
    if not information:
        raise BuildError("convdit is not built. Cure: make test, or python setup.py build_ext --inplace")
    for file in information:
        copy_whole(file, library.parent)
    return library.parent
