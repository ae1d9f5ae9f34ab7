"""The build's options and tools: what they accept, and what is said where a build cannot do as asked.

PyTorch and nvcc are stood in for by two small files, so that a test takes a second and sees any version of them.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The cmake of this environment, whose folder need not be on the PATH, before the machine's.
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def architectures(text: str) -> subprocess.CompletedProcess:
    script = ROOT / "csrc/cmake/cuda_architectures.cmake"
    return subprocess.run([CMAKE, f"-DLIST={text}", "-P", str(script)], capture_output=True, text=True)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("8.0", "80-real"),
        ("8.0;9.0+PTX", "80-real;90"),
        ("8.0;9.0;10.0;12.0+PTX", "80-real;90-real;100-real;120"),
        ("9.0a,10.0f", "90a-real;100f-real"),
        ("9.0a;10.0f;10.0a+PTX", "90a-real;100f-real;100a"),
        ("8.0 8.6 12.0+PTX", "80-real;86-real;120"),
        ("Ampere;Hopper+PTX", "80-real;86-real;90"),
        ("Blackwell+PTX", "100-real;120"),
        ("8.0;8.0", "80-real"),
    ],
)
def test_architecture_list_is_read_as_pytorch_writes_it(text, expected):
    done = architectures(text)
    assert done.returncode == 0 and done.stderr.strip() == expected


@pytest.mark.parametrize("text", ["", ";", "sm_80", "8", "80", "8.0+ptx", "8.0x", "Kepler", "8.0;nonsense"])
def test_bad_architecture_list_names_the_variable_and_the_value(text):
    done = architectures(text)
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST" in done.stderr and f"'{text.split(';')[-1] or text}'" in done.stderr


@pytest.fixture
def tools(tmp_path):
    """Folders with a PyTorch and an nvcc, and how to make them: tools.torch(cuda=...), tools.nvcc(release=...)."""
    return Tools(tmp_path)


class Tools:
    def __init__(self, folder: Path):
        self.folder = folder
        self.environment: dict[str, str] = {}

    def torch(self, version: str = "2.14.1", cuda: str | None = None) -> None:
        package = self.folder / "python" / "torch"
        package.mkdir(parents=True)
        (package / "version.py").write_text(f"cuda = {cuda!r}\n")
        (package / "__init__.py").write_text(f"from . import version\n__version__ = '{version}+fake'\n")
        self.environment["PYTHONPATH"] = str(package.parent)

    def nvcc(self, release: str, architectures: tuple[int, ...] = (80, 90)) -> None:
        """An nvcc that says these things of itself and compiles nothing."""
        names = " ".join(f"compute_{number}" for number in architectures)
        path = self.folder / "cuda" / "bin" / "nvcc"
        path.parent.mkdir(parents=True)
        path.write_text(
            '#!/bin/sh\ncase "$1" in\n'
            f"  --version) echo 'Cuda compilation tools, release {release}, V{release}.99' ;;\n"
            f"  --list-gpu-arch) printf '%s\\n' {names} ;;\n"
            "  *) echo 'this nvcc compiles nothing' >&2; exit 1 ;;\nesac\n"
        )
        path.chmod(0o755)
        self.environment["CUDA_HOME"] = str(path.parent.parent)

    def configure(self, **environment: str) -> tuple[int, str]:
        """CMake's status, and what it said in one line."""
        command = [CMAKE, "-S", ROOT, "-B", self.folder / "build", f"-DPython_EXECUTABLE={sys.executable}"]
        env = {name: value for name, value in os.environ.items() if name not in ("CUDACXX", "TORCH_CUDA_ARCH_LIST")}
        env |= self.environment | environment
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_cuda_on_without_a_compiler_fails_with_the_cure(tools):
    tools.torch()
    status, said = tools.configure(CONVDIT_CUDA="on", CUDACXX=str(tools.folder / "no-nvcc"))
    assert status != 0
    assert "CONVDIT_CUDA=on, but no working nvcc was found. Cure:" in said and "CONVDIT_CUDA=off" in said


def test_cuda_auto_without_a_compiler_says_so_and_goes_on(tools):
    tools.torch(cuda="13.0")
    status, said = tools.configure(CONVDIT_CUDA="auto", CUDACXX=str(tools.folder / "no-nvcc"))
    assert status == 0, said
    assert "CUDA: OFF, no nvcc was found when this was built (CONVDIT_CUDA=auto)" in said


def test_unknown_cuda_option_is_refused(tools):
    tools.torch()
    status, said = tools.configure(CONVDIT_CUDA="maybe")
    assert status != 0 and "expected auto, on or off, got 'maybe'" in said


@pytest.mark.parametrize("mode", ["on", "auto"])
@pytest.mark.parametrize("variable", ["CUDA_HOME", "PATH", "CUDACXX"])
def test_an_nvcc_of_another_major_version_than_pytorch_ends_the_build(mode, variable, tools):
    tools.torch(cuda="13.0")
    tools.nvcc("12.4")
    home = Path(tools.environment.pop("CUDA_HOME"))
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    where = {"CUDA_HOME": str(home), "PATH": path, "CUDACXX": str(home / "bin/nvcc")}
    status, said = tools.configure(**{"CONVDIT_CUDA": mode, variable: where[variable]})
    assert status != 0
    assert f"{home}/bin/nvcc is CUDA 12.4, and PyTorch 2.14.1 is built for CUDA 13.0" in said
    assert "Cure: set CUDA_HOME to a CUDA 13 toolkit" in said and "CONVDIT_CUDA=off" in said


@pytest.mark.parametrize("torch_cuda", ["12.8", None])
def test_an_nvcc_of_the_same_major_version_or_beside_a_pytorch_without_cuda_is_tried(torch_cuda, tools):
    tools.torch(cuda=torch_cuda)
    tools.nvcc("12.4")
    _, said = tools.configure(CONVDIT_CUDA="auto", TORCH_CUDA_ARCH_LIST="8.0;9.0a+PTX")
    assert "is not able to compile a simple test program" in said  # CMake went on to the trial that this one fails


@pytest.mark.parametrize("text, named", [(None, "10.0"), ("7.5", "7.5"), ("9.0;12.0f+PTX", "12.0")])
def test_an_architecture_that_nvcc_does_not_know_is_named(text, named, tools):
    tools.torch(cuda="12.8")
    tools.nvcc("12.4")
    status, said = tools.configure(CONVDIT_CUDA="on", **({"TORCH_CUDA_ARCH_LIST": text} if text else {}))
    assert status != 0
    assert "TORCH_CUDA_ARCH_LIST: " in said and f"CUDA 12.4, does not compile for {named}; it knows 80 90." in said
    assert "the default list needs CUDA 12.8 or later" in said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs a real nvcc on the PATH: it compiles CMake's own test")
def test_a_toolkit_without_a_gpu_is_enough(tools):
    tools.torch()
    status, said = tools.configure(CONVDIT_CUDA="on", TORCH_CUDA_ARCH_LIST="9.0+PTX", CUDA_VISIBLE_DEVICES="")
    assert status == 0, said
    assert "CUDA: ON, built with nvcc" in said


def test_an_old_pytorch_is_refused(tools):
    tools.torch("2.10.0")
    status, said = tools.configure(CONVDIT_CUDA="off")
    assert status != 0 and "convdit needs PyTorch 2.11 or later to build against" in said and "has 2.10.0" in said


def test_a_pytorch_that_does_not_import_is_named_with_the_cure(tools):
    tools.torch()
    (tools.folder / "python/torch/__init__.py").write_text("raise ImportError('libcudart is not there')")
    status, said = tools.configure(CONVDIT_CUDA="off")
    assert status != 0
    assert "convdit needs PyTorch 2.11 or later (pip install torch)" in said and "libcudart is not there" in said


def build(tmp_path: Path, cmake: str = CMAKE, **environment: str) -> subprocess.CompletedProcess:
    """setup.py's build with a PATH that has this cmake and no compiler."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cmake").symlink_to(cmake)
    env = {name: value for name, value in os.environ.items() if name != "CXX"}
    env |= {"PATH": str(tmp_path / "bin"), **environment}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib"]
    return subprocess.run(
        [*command, "--build-temp", tmp_path / "temp"], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_a_build_without_a_compiler_names_the_cure(tmp_path):
    done = build(tmp_path)
    assert done.returncode != 0
    assert "convdit: no C++ compiler was found on the PATH" in done.stderr
    assert "apt-get install g++" in done.stderr
    assert not (tmp_path / "temp").exists()


def test_a_compiler_that_is_not_there_is_named(tmp_path):
    done = build(tmp_path, CXX="ccache-is-not g++")
    assert done.returncode != 0
    assert "convdit: CXX names 'ccache-is-not'" in done.stderr


def test_a_build_without_cmake_names_the_cure(tmp_path):
    done = build(tmp_path, PATH=str(tmp_path))
    assert done.returncode != 0
    assert "convdit: cmake is missing. Cure: pip install cmake ninja" in done.stderr


def test_a_build_ends_with_its_time_and_memory(tmp_path):
    nothing = shutil.which("true")  # configures and builds nothing, well
    done = build(tmp_path, nothing, CXX=nothing, MAX_JOBS="1")
    assert done.returncode == 0, done.stderr
    line = r"^convdit: built in \d+ s, 1 jobs, each at most 0\.\d\d GiB$"
    assert re.search(line, done.stdout, re.MULTILINE), done.stdout
