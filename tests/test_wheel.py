"""The compiled libraries and the wheel: what they need, and that they name no folder of the machine that built them."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import convdit
from tests import wheel

LIBRARIES = sorted(Path(convdit.__file__).parent.glob("*.so"))


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_a_compiled_library_needs_only_documented_libraries_and_holds_no_path(library):
    assert wheel.faults_of_library(library) == []


def test_a_faulty_wheel_is_seen(tmp_path):
    """A library with a search path, a path of this machine and a library of its own, in the wrong folder."""
    (tmp_path / "own.cpp").write_text("int own() { return 1; }")
    (tmp_path / "faulty.cpp").write_text("int own(); const char* where() { return __FILE__ + own(); }")
    shared = ["c++", "-shared", "-fPIC", "-L", tmp_path]
    subprocess.run([*shared, tmp_path / "own.cpp", "-o", tmp_path / "libown.so"], check=True)
    library = tmp_path / "libconvdit_ops.so"
    subprocess.run([*shared, f"-Wl,-rpath,{tmp_path}", tmp_path / "faulty.cpp", "-o", library, "-lown"], check=True)
    packed = tmp_path / "convdit-1-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(library, "elsewhere/libconvdit_ops.so")
    said = "\n".join(wheel.faults_of_wheel(packed))
    assert "libconvdit_ops.so needs libown.so" in said
    assert "libconvdit_ops.so has a search path" in said and str(tmp_path) in said
    assert "libconvdit_ops.so names " in said
    assert "elsewhere/libconvdit_ops.so is packed outside convdit/" in said
    assert "expected libconvdit_ops.so and _C, got ['libconvdit_ops.so']" in said


@pytest.mark.slow
def test_the_source_distribution_builds_a_wheel_that_works_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVDIT_CUDA", "off")
    build = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "-d", tmp_path]
    subprocess.run(build, cwd=wheel.ROOT, check=True)
    (source,) = tmp_path.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, source]
    subprocess.run(pip, cwd=tmp_path, check=True)
    (packed,) = tmp_path.glob("*.whl")
    assert wheel.faults_of_wheel(packed) == []
    wheel.beside_this(packed)
