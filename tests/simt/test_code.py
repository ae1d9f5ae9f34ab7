"""The checks of ptxas's code find spills, local memory and missing instructions, in a kernel that has them."""

import pytest

from . import build, code

SOURCE = """
#include <cuda_runtime.h>
namespace convdit::cuda {
// An array indexed at run time has to be in local memory.
__global__ void apply_forward(const float* x, int* index, float* y) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = x[i * 32 + threadIdx.x];
  for (int i = 0; i < 64; ++i) kept[index[i]] += kept[i];
  for (int i = 0; i < 64; ++i) y[i * 32 + threadIdx.x] = kept[i];
}
__global__ void wide(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }
}
"""


def test_spills_and_missing_instructions_are_found(tmp_path, monkeypatch):
    (tmp_path / "cuda.cu").write_text(SOURCE)
    ptx = build.nvcc_output(tmp_path / "cuda.cu", "compute_80", tmp_path) / "kernels.ptx"
    wanted = [("a room", "apply", (code.LOAD,)), ("a room", "wide", (code.LOAD, code.STORE)), ("a room", "absent", ())]
    monkeypatch.setattr(code, "FAST", wanted)
    monkeypatch.setattr(code, "PAIRED", [("a room", "wide", ("FFMA2",))])
    found = code.problems("a room", dict.fromkeys(code.ARCHITECTURES, ptx))
    local = [f"a room: apply_forward, {a}: 0 bytes spilled, 256 local" for a in code.ARCHITECTURES]
    missing = ["a room: apply_forward, sm_80: no LDG.E.128 in its code", "a room: no kernel is called absent"]
    missing += ["a room: wide, sm_100: no FFMA2 in its code"]
    assert found == [*local, *missing]


def test_a_file_that_needs_pytorch_or_an_architecture_it_has_not_does_not_compile_alone(tmp_path):
    source = tmp_path / "cuda.cu"
    source.write_text("__global__ void f(float* x) { *x = 1; }\n")
    code.compile_alone(source)
    source.write_text("#include <torch/csrc/stable/tensor.h>\n")
    with pytest.raises(build.BuildError, match="torch/csrc/stable/tensor.h"):
        code.compile_alone(source)
    source.write_text("#if __CUDA_ARCH__ == 1200\n#error not for this one\n#endif\n")
    with pytest.raises(build.BuildError, match="not for this one"):
        code.compile_alone(source)
