"""The CUDA library, where it is loaded: its operators are registered for CUDA tensors. No GPU is needed to see that."""

import pytest
import torch

from convdit import build_info

ADALN = ["layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate"]
NAMES = [f"{operator}_{part}" for operator in ADALN for part in ("fwd", "bwd")]
NAMES += [f"depthwise_conv2d_{part}" for part in ("fwd", "input_grad", "weight_grad")]
NAMES += [f"depthwise_conv2d_layer_norm_{part}" for part in ("fwd", "bwd")]
NAMES += [f"packed_attention_{part}" for part in ("fwd", "bwd")]


@pytest.mark.skipif(not build_info()["cuda"], reason=f"no CUDA library: {build_info()['cuda_reason']}")
@pytest.mark.parametrize("name", NAMES)
def test_operator_has_a_cuda_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"convdit::{name}", "CUDA")
