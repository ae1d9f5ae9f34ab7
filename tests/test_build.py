"""The build's options: what they accept, and what they say where they cannot do as asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CMAKE = str(Path(sys.executable).parent / "cmake")
if not Path(CMAKE).exists():
    CMAKE = "cmake"


def architectures(text: str) -> subprocess.CompletedProcess:
    script = ROOT / "csrc/cmake/cuda_architectures.cmake"
    return subprocess.run([CMAKE, f"-DLIST={text}", "-P", str(script)], capture_output=True, text=True)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("8.0", "80-real"),
        ("8.0;9.0+PTX", "80-real;90"),
        ("9.0a,10.0f", "90a-real;100f-real"),
        ("8.0 8.6 12.0+PTX", "80-real;86-real;120"),
        ("Ampere;Hopper+PTX", "80-real;86-real;90"),
        ("Blackwell+PTX", "100-real;120"),
        ("8.0;8.0", "80-real"),
    ],
)
def test_architecture_list_is_read_as_pytorch_writes_it(text, expected):
    done = architectures(text)
    assert done.returncode == 0 and done.stderr.strip() == expected


@pytest.mark.parametrize("text", ["", "sm_80", "8", "Kepler", "8.0;nonsense"])
def test_bad_architecture_list_names_the_variable(text):
    done = architectures(text)
    assert done.returncode != 0 and "TORCH_CUDA_ARCH_LIST" in done.stderr


def configure(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [CMAKE, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, **environment))


def test_cuda_on_without_a_compiler_fails_with_the_cure(tmp_path):
    done = configure(tmp_path, CONVDIT_CUDA="on", CUDACXX=str(tmp_path / "no-nvcc"))
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "CONVDIT_CUDA=on, but no working nvcc was found" in message and "CONVDIT_CUDA=off" in message


def test_cuda_auto_without_a_compiler_says_so_and_goes_on(tmp_path):
    done = configure(tmp_path, CONVDIT_CUDA="auto", CUDACXX=str(tmp_path / "no-nvcc"))
    assert done.returncode == 0, done.stderr
    assert "CUDA: OFF, no nvcc was found when this was built (CONVDIT_CUDA=auto)" in done.stdout


def test_unknown_cuda_option_is_refused(tmp_path):
    done = configure(tmp_path, CONVDIT_CUDA="maybe")
    assert done.returncode != 0 and "expected auto, on or off, got 'maybe'" in " ".join(done.stderr.split())
