"""What a wheel must be, and that one wheel serves several versions of PyTorch.

    python -m tests.wheel dist/convdit-*.whl                        # looks inside; installs it beside this PyTorch
    python -m tests.wheel dist/convdit-*.whl --torch 2.13.0 2.14.1  # and beside each of these, in its own environment

Beside each PyTorch: `convdit info`, and the operators' tests against the reference, run from a folder that has the
tests and not the checkout. `make wheel` calls it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What the libraries may ask the loader for, the C and C++ run-time libraries, and PyTorch's own.
# The CUDA runtime is linked in, and the driver is PyTorch's to load.
SYSTEM = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
PYTORCH = {"libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so"}
LOADER = re.compile(r"ld-linux[\w-]*\.so\.\d+")
OPERATOR_TESTS = ("tests/ops", "-k", "equals_reference and not every_cpu_level")


def faults_of_library(path: Path) -> list[str]:
    """What is wrong with a compiled library: it needs what no one brings, has a search path, or names a folder here."""
    said = subprocess.run(["readelf", "-d", "-W", path], check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", said))
    faults = [f"{path.name} needs {name}" for name in sorted(needed - SYSTEM - PYTORCH) if not LOADER.fullmatch(name)]
    faults += [f"{path.name} has a search path: {line.strip()}" for line in said.splitlines() if "PATH)" in line]
    places = {str(ROOT), str(Path.home()), sys.prefix, tempfile.gettempdir()} - {"/"}
    content = path.read_bytes()
    faults += [f"{path.name} names {place}" for place in sorted(places) if f"{place}/".encode() in content]
    return faults


def faults_of_wheel(wheel: Path) -> list[str]:
    """What is wrong with a wheel, seen from outside."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        libraries = [name for name in archive.namelist() if ".so" in Path(name).name]
        faults = [fault for name in libraries for fault in faults_of_library(Path(archive.extract(name, folder)))]
        names = {Path(name).name for name in libraries}
        faults += [f"{name} is packed outside convdit/" for name in libraries if Path(name).parent != Path("convdit")]
    if "libconvdit_ops.so" not in names or not any(name.startswith("_C.") for name in names):
        faults.append(f"libraries: expected libconvdit_ops.so and _C, got {sorted(names)}")
    return faults


def run(command: list, folder: Path, python_path: Path | None = None) -> None:
    """Runs it in the folder; this checkout is nowhere on its path. Ends the program where it fails."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CONVDIT"))}
    if python_path is not None:
        env["PYTHONPATH"] = str(python_path)
    done = subprocess.run(list(map(str, command)), cwd=folder, env=env)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit status {done.returncode}")


def try_beside(python: Path, folder: Path, site: Path | None) -> None:
    """The self-check and the operators' tests of what is installed in `site`, or in the environment of `python`."""
    shutil.copytree(ROOT / "tests" / "ops", folder / "tests" / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "tests" / "__init__.py", folder / "tests")
    where = "import convdit, torch; print(convdit.__file__, 'beside PyTorch', torch.__version__, flush=True)"
    run([python, "-c", f"{where}; assert convdit.__file__.startswith({str(folder)!r})"], folder, site)
    run([python, "-m", "convdit", "info"], folder, site)
    run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *OPERATOR_TESTS], folder, site)


def beside_this(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        site = folder / "site"
        run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel.resolve()], folder)
        try_beside(Path(sys.executable), folder, site)


def beside(wheel: Path, torch_version: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        python = folder / "venv" / "bin" / "python"
        venv.create(folder / "venv", with_pip=True)
        packages = [f"torch=={torch_version}", "pytest>=8", "expecttest", wheel.resolve()]
        run([python, "-m", "pip", "install", "-q", *packages], folder)
        try_beside(python, folder, None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.wheel", description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="*", default=[], metavar="VERSION", help="install it beside these, by pip")
    given = parser.parse_args()
    faults = faults_of_wheel(given.wheel)
    if faults:
        sys.exit("\n".join([f"{given.wheel.name}:", *faults]))
    print(f"{given.wheel.name}: needs the run-time libraries of C and C++ and PyTorch's, and holds no path", flush=True)
    beside_this(given.wheel)
    for version in given.torch:
        beside(given.wheel, version)


if __name__ == "__main__":
    main()
