"""The depthwise 7x7 convolution of visible sites only, against our dense one and PyTorch's on a zero-filled map.

20 of 49 patches are visible, as with a mask ratio of 0.6.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.bench_depthwise_conv import SHAPES
from benchmarks.harness import Comparison, backward
from convdit import ops
from convdit.sparse import ActiveSites, SparseTensor2d, random_patch_mask


def comparisons() -> Iterator[Comparison]:
    for n, side, channels in SHAPES[:4]:
        mask = random_patch_mask(n, (7, 7), 0.58, torch.Generator().manual_seed(0))
        sites = ActiveSites.from_patch_mask(mask, side // 7, visible_per_image=20)
        features = torch.randn(len(sites), channels)
        dense = SparseTensor2d(features, sites).dense()
        weight, bias = torch.randn(channels, 1, 7, 7), torch.randn(channels)
        present = int((sites.site_neighbors(3) >= 0).sum())
        flops, size = 2.0 * present * channels, 4 * features.numel()
        shape = f"C={channels}, {side}x{side}"

        def eager(x, w, b):
            return F.conv2d(x.permute(0, 3, 1, 2), w, b, padding=3, groups=w.shape[0])

        yield Comparison(
            "sparse_depthwise_conv2d", "forward", shape, features.dtype,
            lambda f=features, w=weight, b=bias, s=sites: ops.sparse_depthwise_conv2d(f, w, b, s),
            {"own dense": lambda x=dense, w=weight, b=bias: ops.depthwise_conv2d(x, w, b)},
            flops, 2 * size,
        )  # fmt: skip
        yield Comparison(
            "sparse_depthwise_conv2d", "forward", shape, features.dtype,
            lambda f=features, w=weight, b=bias, s=sites: ops.sparse_depthwise_conv2d(f, w, b, s),
            {"eager": lambda x=dense, w=weight, b=bias: eager(x, w, b)},
            flops, 2 * size,
        )  # fmt: skip
        leaf, map_leaf = features.clone().requires_grad_(), dense.clone().requires_grad_()
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        ours = ops.sparse_depthwise_conv2d(leaf, w, b, sites)
        for name, function in {"own dense": ops.depthwise_conv2d, "eager": eager}.items():
            theirs = function(map_leaf, w, b)
            yield Comparison(
                "sparse_depthwise_conv2d", "backward", shape, features.dtype,
                backward(ours, [leaf, w, b], torch.randn_like(ours)),
                {name: backward(theirs, [map_leaf, w, b], torch.randn_like(theirs))},
                2 * flops, 4 * size,
            )  # fmt: skip
