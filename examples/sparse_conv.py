"""A depthwise convolution over the visible sites of masked pictures, beside the dense one with zeros at the rest.

python examples/sparse_conv.py
"""

import argparse
import time

import torch

from convdit import nn
from convdit.sparse import ActiveSites, SparseTensor2d, random_patch_mask

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--images", type=int, default=16)
parser.add_argument("--channels", type=int, default=96)
parser.add_argument("--mask-ratio", type=float, default=0.6)
given = parser.parse_args()

torch.manual_seed(0)
mask = random_patch_mask(given.images, grid=(7, 7), ratio=given.mask_ratio)  # True: hidden
sites = ActiveSites.from_patch_mask(mask, block=8)  # maps of 56 x 56 sites
print(f"{len(sites)} of {given.images * 56 * 56} sites are visible")

convolution = nn.DepthwiseConv2d(given.channels, kernel_size=7)  # one module for both
features = torch.randn(len(sites), given.channels, requires_grad=True)
sparse = SparseTensor2d(features, sites)
dense = sparse.dense(fill=0).detach()

out = convolution(sparse)
out.features.square().mean().backward()  # gradients go to the visible features and to the weight
assert features.grad is not None and convolution.weight.grad is not None

# At visible sites the two agree.
right = SparseTensor2d.from_dense(convolution(dense), sites).features
torch.testing.assert_close(out.features, right, rtol=1e-4, atol=1e-5)

for name, x in (("sparse", sparse), ("dense", dense)):
    with torch.no_grad():
        convolution(x)
        start = time.perf_counter()
        for _ in range(5):
            convolution(x)
        print(f"{name}: {200 * (time.perf_counter() - start):.2f} ms")

# The next stage of an encoder works on the same patches, with half the sites along a side.
print(f"after a downsampling: {len(sites.downsample(2))} sites, in maps of {sites.downsample(2).spatial_shape}")
