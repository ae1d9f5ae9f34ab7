"""The CUDA library, where it is loaded: its operators are registered for CUDA tensors. No GPU is needed to see that."""

import pytest
import torch

from convdit import build_info

NAMES = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("convdit::"))
# On other devices the blocks are their parts, GELU and matrix products are PyTorch's; fma_probe measures a CPU for the
# benchmarks; weights are packed for accelerated models on a CPU.
BLOCK = ("convnext_block_fwd", "convnext_mlp_fwd", "convnext_mlp_bwd")
HALF = ("adaln_zero_attention_fwd", "adaln_zero_attention_fwd_save")
GELU = ("gelu_tanh_fwd", "gelu_tanh_", "gelu_tanh_bwd")
LINEAR = ("linear_fwd", "linear_bwd", "packed_linear", "packed_qkv")
CPU_ONLY = {f"convdit::{name}" for name in (*BLOCK, *HALF, *GELU, *LINEAR, "fma_probe")}


@pytest.mark.skipif(not build_info()["cuda"], reason=f"no CUDA library: {build_info()['cuda_reason']}")
@pytest.mark.parametrize("name", NAMES)
def test_operator_has_a_cuda_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") == (name not in CPU_ONLY)


def test_every_operator_is_looked_at():
    assert {"convdit::neighbors", "convdit::grn_bwd", "convdit::sparse_depthwise_conv2d_weight_grad"} < set(NAMES)
