"""Finds and loads the compiled libraries, or says what is missing and how to get it.

Three files lie beside this one: ``libconvdit_ops.so`` (operators, CPU), ``libconvdit_ops_cuda.so`` (operators, CUDA;
loaded only beside a PyTorch built with CUDA) and ``_C`` (build information). ``CONVDIT_LIBRARY_DIR`` names another
folder to take them from, such as the output of a plain CMake build.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

CURE = "Build it: pip install . (or, in a checkout, python setup.py build_ext --inplace)"


def _folder() -> Path:
    return Path(os.environ.get("CONVDIT_LIBRARY_DIR") or Path(__file__).parent)


def missing(what: str, why: str) -> ImportError:
    return ImportError(f"convdit: {what} {why}. {CURE}")


def _load_information(folder: Path) -> ModuleType:
    path = folder / ("_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))
    if not path.exists():
        raise missing(str(path.name), f"is missing from {folder}: convdit was not built for this Python")
    spec = importlib.util.spec_from_file_location("convdit._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_operators(folder: Path) -> None:
    path = folder / "libconvdit_ops.so"
    if not path.exists():
        raise missing(path.name, f"is missing from {folder}: convdit was not built")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise missing(path.name, f"does not load beside PyTorch {torch.__version__} ({error})") from error


def _load_cuda(folder: Path, info: dict[str, Any]) -> None:
    """Load the CUDA operators where they can work; otherwise set ``info['cuda']`` to False and say why."""
    if not info["cuda"]:
        return
    info["cuda"] = False
    path = folder / "libconvdit_ops_cuda.so"
    if torch.version.cuda is None:
        info["cuda_reason"] += f"; not loaded: PyTorch {torch.__version__} is a build without CUDA"
    elif not path.exists():
        info["cuda_reason"] = f"{path.name} is missing from {folder}"
    else:
        info["cuda_reason"] += _other_major(info["cuda_reason"], torch.version.cuda)
        try:
            torch.ops.load_library(str(path))
            info["cuda"] = True
        except OSError as error:
            info["cuda_reason"] += f"; {path.name} does not load beside PyTorch {torch.__version__}: {error}"


def _other_major(reason: str, torch_cuda: str) -> str:
    """What to add to the build's reason where PyTorch is built for another major version of CUDA than the library.

    The library has a CUDA runtime of its own inside, so both may work in one process; each needs its driver.
    """
    nvcc = re.search(r"nvcc (\d+)", reason)
    wanted = torch_cuda.split(".")[0]
    if nvcc is None or nvcc[1] == wanted:
        return ""
    return (
        f"; PyTorch {torch.__version__} is built for CUDA {wanted}, convdit for CUDA {nvcc[1]}: the driver must"
        f" serve both. Cure: build convdit with nvcc {wanted}, or install a PyTorch for CUDA {nvcc[1]}"
    )


def _check_environment(info: dict[str, Any]) -> None:
    wanted = os.environ.get("CONVDIT_CPU_LEVEL")
    if wanted and wanted not in info["cpu_levels"]:
        levels = ", ".join(info["cpu_levels"])
        raise ImportError(f"CONVDIT_CPU_LEVEL: expected one of {levels}, got {wanted!r}")
    products = os.environ.get("CONVDIT_PRODUCTS")
    if products and products not in ("convdit", "pytorch"):
        raise ImportError(f"CONVDIT_PRODUCTS: expected convdit or pytorch, got {products!r}")
    cache = os.environ.get("CONVDIT_CACHE_BYTES")
    if cache and not re.fullmatch(r"[0-9]{1,18}", cache):
        raise ImportError(f"CONVDIT_CACHE_BYTES: expected a number of bytes, such as 33554432, got {cache!r}")


def _load() -> dict[str, Any]:
    folder = _folder()
    info: dict[str, Any] = _load_information(folder).build_info()
    _check_environment(info)
    _load_operators(folder)
    _load_cuda(folder, info)
    return info


_INFO = _load()


def build_info() -> dict[str, Any]:
    """What was built and what is in use.

    Returns:
        ``version``; ``cpu_levels``, the levels compiled, and ``cpu_level``, the one in use; ``cpu_halves``, the
        halves that the CPU multiplies; ``cpu_products``, whose product of large float32 matrices is taken, "convdit" or
        "pytorch"; ``cpu_cache_bytes``, the cache that kernels count on; ``cuda``, whether CUDA
        operators are loaded, and ``cuda_reason``, why or why not; ``cuda_archs``; ``compiler``; ``torch_target``, the
        oldest PyTorch that the binary runs beside, and ``torch_built``, the one it was built beside.
    """
    return dict(_INFO)
