"""Builds convdit: reads the options, calls CMake, puts the compiled libraries beside the Python files.

Options (environment): CONVDIT_CUDA=auto|on|off, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
Sources and flags are in CMakeLists.txt.
"""

import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "CC", "g++", "icpx", "clang++")  # of those that CMake tries, the ones with GNU extensions
GIB_PER_JOB = 2  # what one nvcc or unrolled kernel needs at its peak


def jobs() -> int:
    """MAX_JOBS, or one job a core, but never more than memory allows."""
    wanted = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    try:
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return max(1, wanted)
    return max(1, min(wanted, int(gib // GIB_PER_JOB)))


def check_compiler() -> None:
    """Ends the build with the cure where there is no C++ compiler; CMake's own message is long and has none."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen and shutil.which(chosen[0]) is None:
        sys.exit(f"convdit: CXX names {chosen[0]!r}, which was not found. Cure: correct CXX, or unset it")
    if not chosen and not any(map(shutil.which, COMPILERS)):
        names = ", ".join(COMPILERS)
        sys.exit(
            f"convdit: no C++ compiler was found on the PATH (looked for {names}). Cure: install one that knows C++20,"
            " e.g. apt-get install g++, or name it in CXX"
        )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            sys.exit("convdit: cmake is missing. Cure: pip install cmake ninja")
        check_compiler()
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        work = Path(self.build_temp).resolve() / "cmake"
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(work),
            "-DCMAKE_BUILD_TYPE=Release",
            "-DCONVDIT_TESTS=OFF",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCONVDIT_OUTPUT={out}",
            f"-DCONVDIT_CUDA={os.environ.get('CONVDIT_CUDA') or 'auto'}",  # also where an earlier build said otherwise
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        start = time.monotonic()
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(work), "-j", str(jobs())], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"convdit: the build failed (exit status {error.returncode}); CMake's message above says why")
        seconds, kib = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        print(f"convdit: built in {seconds:.0f} s, {jobs()} jobs, each at most {kib / 2**20:.2f} GiB", flush=True)

    def copy_extensions_to_source(self) -> None:
        """In place and editable builds: all the libraries go beside the Python files, not only ``_C``."""
        out = Path(self.build_lib) / "convdit"
        for library in out.glob("*.so"):
            # Renamed into place: writing over a library that a running process has mapped would crash it.
            whole = ROOT / "convdit" / f".{library.name}.{os.getpid()}"
            shutil.copy2(library, whole)
            os.replace(whole, ROOT / "convdit" / library.name)


setup(
    packages=[*find_packages(include=["convdit*"]), "convdit.benchmarks"],
    package_dir={"convdit.benchmarks": "benchmarks"},  # for `convdit bench` where it is installed
    ext_modules=[Extension("convdit._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
