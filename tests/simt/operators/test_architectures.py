"""A GPU that the library has no code for is told what was built and what it is."""

import pytest
import torch

from convdit import ops
from tests.simt.plugin import library

NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice


@pytest.fixture
def no_code():
    library().c.simt_refuse_launches(NO_KERNEL_IMAGE)
    yield
    library().c.simt_refuse_launches(0)


CALLS = {
    "adaln": lambda: ops.layer_norm_modulate(torch.ones(1, 2, 8), torch.ones(1, 8), torch.ones(1, 8)),
    "attention": lambda: ops.packed_attention(torch.ones(1, 2, 24), 1),
    "depthwise_conv": lambda: ops.depthwise_conv2d(torch.ones(1, 2, 2, 8), torch.ones(8, 1, 7, 7), None),
    "grn": lambda: ops.grn(torch.ones(1, 2, 2, 8), torch.ones(8), torch.ones(8)),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_built_code_is_an_error_that_names_both(name, no_code):
    both = r"was built for the CUDA architectures compute_\d+, and this GPU, of compute capability 8\.0, can use none"
    with pytest.raises(RuntimeError, match=both):
        CALLS[name]()
