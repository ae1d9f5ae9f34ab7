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
from convdit import _library, selfcheck

ROOT = Path(__file__).resolve().parent.parent


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
    assert f"\n## [{literal}]" in (ROOT / "CHANGELOG.md").read_text()
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
        "version": str, "cpu_levels": list, "cpu_level": str, "cpu_products": str, "cuda": bool, "cuda_reason": str,
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


def test_import_beside_operators_of_another_version_says_so_and_the_cure(tmp_path):
    module = "_C" + importlib.machinery.EXTENSION_SUFFIXES[0]
    shutil.copy(compiled(module), tmp_path)
    shutil.copy(compiled(module), tmp_path / "libconvdit_ops.so")  # loads, and has none of the operators
    done = python("import convdit", CONVDIT_LIBRARY_DIR=str(tmp_path))
    error = done.stderr[done.stderr.rindex("ImportError") :]
    assert "libconvdit_ops.so is older than these Python files" in error
    assert "pip install ." in error


def test_an_unknown_cpu_level_is_refused_and_the_levels_are_named():
    done = python("import convdit", CONVDIT_CPU_LEVEL="sse9")
    assert done.returncode != 0
    assert "CONVDIT_CPU_LEVEL: expected one of baseline" in done.stderr
    assert "'sse9'" in done.stderr


def test_an_unknown_kind_of_products_is_refused():
    done = python("import convdit", CONVDIT_PRODUCTS="mkl")
    assert done.returncode != 0
    assert "CONVDIT_PRODUCTS: expected convdit or pytorch, got 'mkl'" in done.stderr


@pytest.mark.parametrize("text", ["32M", "-1", "1e6", "9" * 20])
def test_a_size_of_the_cache_that_is_no_number_of_bytes_is_refused(text):
    done = python("import convdit", CONVDIT_CACHE_BYTES=text)
    assert done.returncode != 0
    assert f"CONVDIT_CACHE_BYTES: expected a number of bytes, such as 33554432, got {text!r}" in done.stderr


def cache_of_level(level):
    """Bytes, as Linux says; 0 where it does not."""
    size = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size")
    return int(size.read_text().strip().removesuffix("K")) << 10 if size.exists() else 0


def test_the_cache_that_kernels_count_on():
    """The last level; on Intel's servers at most eight times the second, since the rest is no quicker than memory."""
    cpu, second, third = Path("/proc/cpuinfo"), cache_of_level(2), cache_of_level(3) or 32 << 20
    text = cpu.read_text() if cpu.exists() else ""
    server = "GenuineIntel" in text and "avx512f" in text and second > 0
    expected = min(third, 8 * second) if server else third
    code = "import convdit; print(convdit.build_info()['cpu_cache_bytes'])"
    assert int(python(code, CONVDIT_CACHE_BYTES="").stdout) == expected
    assert int(python(code, CONVDIT_CACHE_BYTES="12345").stdout) == 12345


def test_the_baseline_level_can_be_asked_for():
    code = "import convdit; print(convdit.build_info()['cpu_level'])"
    done = python(code, CONVDIT_CPU_LEVEL="baseline")
    assert (done.returncode, done.stdout.strip()) == (0, "baseline"), done.stderr


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


def test_beside_a_pytorch_without_cuda_the_cuda_operators_are_left_alone_and_the_reason_is_told(tmp_path, monkeypatch):
    (tmp_path / "libconvdit_ops_cuda.so").touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    info = {"cuda": True, "cuda_reason": "built with nvcc 13.0.88 for 9.0"}
    _library._load_cuda(tmp_path, info)
    assert not info["cuda"]
    assert info["cuda_reason"].endswith(f"; not loaded: PyTorch {torch.__version__} is a build without CUDA")


def test_cuda_operators_without_a_gpu_are_said_to_be_unchecked(monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "build_info", lambda: dict(convdit.build_info(), cuda=True))
    monkeypatch.setattr(selfcheck, "CHECKS", {"grn": selfcheck.CHECKS["grn"]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report, good = selfcheck.describe()
    assert good and list(report["checks"]) == ["cpu/grn"]
    assert "PyTorch sees no GPU: the CUDA operators are loaded, and not checked" in capsys.readouterr().out


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


def test_a_long_file_gives_its_reason_at_its_top():
    written = [p for suffix in ("py", "h", "cpp", "cu", "cuh", "cmake", "md") for p in ROOT.glob(f"*/**/*.{suffix}")]
    folders = {"csrc", "convdit", "tests", "benchmarks", "examples", "docs"}
    texts = {p: p.read_text().splitlines() for p in written if p.relative_to(ROOT).parts[0] in folders}
    assert len(texts) > 200
    long = {str(p.relative_to(ROOT)): lines[:16] for p, lines in texts.items() if len(lines) > 400}
    assert long and [name for name, top in long.items() if "Over 400 lines" not in "\n".join(top)] == []
