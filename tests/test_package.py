"""The package as it is installed: metadata, build information, what is said when a part is missing."""

import ast
import importlib.machinery
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import convdit
from convdit import _library

ROOT = Path(__file__).resolve().parent.parent
# The cmake of this environment, whose folder need not be on the PATH, before the machine's.
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def python(code, **environment):
    """Runs code in a fresh interpreter that sees this checkout; returns the finished process."""
    path = os.pathsep.join([str(Path(convdit.__file__).parent.parent), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The metadata that a build of this checkout would get, with what it says when it is read."""
    folder = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return Parser().parsestr((folder / "convdit.egg-info" / "PKG-INFO").read_text())


def test_one_version_in_source_metadata_and_binary(metadata):
    tree = ast.parse((ROOT / "convdit" / "_version.py").read_text())
    literal = next(node.value.value for node in tree.body if isinstance(node, ast.Assign))
    assert convdit.__version__ == literal
    assert metadata["Version"] == literal
    assert convdit.build_info()["version"] == literal
    for found in importlib.metadata.distributions(name="convdit"):
        assert found.version == literal


def test_dependencies_are_torch_and_numpy_and_the_rest_are_extras(metadata):
    extras = {"train", "spconv", "timm", "diffusers", "transformers", "test", "all"}
    assert extras <= set(metadata.get_all("Provides-Extra"))
    plain = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split(">")[0].split(";")[0].strip() for line in plain) == ["numpy", "torch"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"


def test_build_information_has_the_promised_keys_and_types():
    info = convdit.build_info()
    types = {
        "version": str, "cpu_levels": list, "cpu_level": str, "cuda": bool, "cuda_reason": str,
        "cuda_archs": list, "compiler": str, "torch_target": str,
    }  # fmt: skip
    for key, kind in types.items():
        assert isinstance(info[key], kind), key
    assert info["cpu_level"] in info["cpu_levels"]
    assert info["cuda_reason"]
    info["version"] = "changed"
    assert convdit.build_info()["version"] == convdit.__version__


def test_import_needs_no_extra():
    extras = ("safetensors", "timm", "transformers", "diffusers", "accelerate", "datasets", "PIL",
              "matplotlib", "sklearn", "tqdm", "mlxtend", "spconv")  # fmt: skip
    block = f"import sys; sys.modules.update(dict.fromkeys({extras}))"  # their import now raises
    done = python(f"{block}; import convdit; print(convdit.__version__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == convdit.__version__


def test_import_without_the_compiled_library_says_what_is_missing_and_the_cure(tmp_path):
    done = python("import convdit", CONVDIT_LIBRARY_DIR=str(tmp_path))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: convdit: _C")
    assert str(tmp_path) in last
    assert "pip install ." in last


def compiled(name):
    return Path(os.environ.get("CONVDIT_LIBRARY_DIR") or Path(convdit.__file__).parent) / name


@pytest.mark.parametrize("operators", [None, b"\x7fELF damaged"])
def test_import_with_missing_or_damaged_operators_never_falls_back(tmp_path, operators):
    module = "_C" + importlib.machinery.EXTENSION_SUFFIXES[0]
    shutil.copy(compiled(module), tmp_path)
    if operators is not None:
        (tmp_path / "libconvdit_ops.so").write_bytes(operators)
    done = python("import convdit", CONVDIT_LIBRARY_DIR=str(tmp_path))
    assert done.returncode != 0
    error = done.stderr[done.stderr.rindex("ImportError") :]
    assert "libconvdit_ops.so " in error
    assert ("is missing" if operators is None else "does not load beside PyTorch") in error
    assert "pip install ." in error


def test_an_unknown_cpu_level_is_refused_and_the_levels_are_named():
    done = python("import convdit", CONVDIT_CPU_LEVEL="sse9")
    assert done.returncode != 0
    assert "CONVDIT_CPU_LEVEL: expected one of baseline" in done.stderr
    assert "'sse9'" in done.stderr


def test_the_baseline_level_can_be_asked_for():
    code = "import convdit; print(convdit.build_info()['cpu_level'])"
    done = python(code, CONVDIT_CPU_LEVEL="baseline")
    assert (done.returncode, done.stdout.strip()) == (0, "baseline"), done.stderr


def architectures(text):
    command = [CMAKE, f"-DLIST={text}", "-P", "csrc/cmake/cuda_architectures.cmake"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("8.0;9.0;10.0;12.0+PTX", "80-real;90-real;100-real;120"),
        ("8.0 9.0+PTX", "80-real;90"),
        ("8.0,8.6", "80-real;86-real"),
        ("9.0a;10.0f;10.0a+PTX", "90a-real;100f-real;100a"),
        ("Ampere;Hopper+PTX", "80-real;86-real;90"),
        ("Blackwell+PTX", "100-real;120"),
        ("8.0;8.0", "80-real"),
    ],
)
def test_the_list_of_cuda_architectures_is_read_as_pytorch_writes_it(text, result):
    assert architectures(text) == (0, result)


@pytest.mark.parametrize("text", ["banana", "8", "80", "8.0+ptx", "8.0x", "", ";"])
def test_a_wrong_list_of_cuda_architectures_is_named(text):
    status, message = architectures(text)
    assert status != 0
    assert "TORCH_CUDA_ARCH_LIST" in message
    assert f"'{text}'" in message


def test_cuda_on_without_nvcc_fails_at_once_with_reason_and_cure(tmp_path):
    env = {**os.environ, "CONVDIT_CUDA": "on", "CUDACXX": str(tmp_path / "nvcc")}
    command = [CMAKE, "-S", ROOT, "-B", tmp_path, f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "CONVDIT_CUDA=on, but no working nvcc was found. Cure:" in said
    assert "CONVDIT_CUDA=off" in said


def build(tmp_path, **environment):
    """setup.py's build with a PATH that has cmake and no compiler; it must end before it configures."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cmake").symlink_to(CMAKE)
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


@pytest.mark.parametrize("torch_cuda, said", [("12.8", True), ("13.0", False)])
def test_another_major_version_of_cuda_is_named_with_the_cure(torch_cuda, said, tmp_path, monkeypatch):
    (tmp_path / "libconvdit_ops_cuda.so").touch()
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    info = {"cuda": True, "cuda_reason": "built with nvcc 13.0.88 for 9.0"}
    _library._load_cuda(tmp_path, info)
    assert info["cuda"]
    message = "is built for CUDA 12, convdit for CUDA 13: the driver must serve both. Cure: build convdit with nvcc 12"
    assert (message in info["cuda_reason"]) == said


def test_the_source_distribution_has_every_file_of_the_repository(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "-d", tmp_path],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    there = {name for name in listed.stdout.split() if (ROOT / name).exists()}
    assert {name for name in there - packed if not name.startswith(".")} == set()
