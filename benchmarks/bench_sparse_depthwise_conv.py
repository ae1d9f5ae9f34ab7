"""The depthwise 7x7 convolution of visible sites only, against our dense one and PyTorch's on a zero-filled map.

20 of 49 patches are visible. spconv, the library for sparse convolutions, stands beside the forward pass as a peer and
has no bar: it has no groups, so that it can compute a depthwise convolution only as a full one whose weights between
different channels are zero, C times the products; it has no backward on a CPU; and its results with two threads are
wrong, so that it runs with one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from convdit import ops
from convdit.sparse import ActiveSites, SparseTensor2d, random_patch_mask

from . import bench_depthwise_conv as dense
from .harness import Comparison, Work, backward, without_grad

GRID, VISIBLE = 7, 20


def comparisons() -> Iterator[Comparison]:
    for side, channels in dense.MAPS[:4]:
        shape, quick = f"block {side // GRID}, C={channels}", channels in (96, 384)
        for against in ("own dense", "PyTorch"):
            for what in ("forward", "input_grad", "weight_grad"):
                build = partial(sparse_conv, what, against, side, channels)
                few = quick and (against == "own dense" or what == "forward")
                yield Comparison("sparse_depthwise_conv2d", what, shape, torch.float32, build, against, few)
        build = partial(sparse_conv, "forward", "spconv", side, channels)
        yield Comparison("sparse_depthwise_conv2d", "forward", shape, torch.float32, build, "spconv", threads=1)


def draw_sites(side: int, n: int) -> ActiveSites:
    mask = random_patch_mask(n, (GRID, GRID), 1 - (VISIBLE + 0.5) / GRID**2)
    return ActiveSites.from_patch_mask(mask, side // GRID, VISIBLE)


def sparse_conv(what: str, against: str, side: int, channels: int, n: int = dense.N) -> Work:
    sites = draw_sites(side, n)
    features, weight, bias = torch.randn(len(sites), channels), torch.randn(channels, 1, 7, 7), torch.randn(channels)
    x = SparseTensor2d(features, sites).dense()
    taps = int((sites.site_neighbors(3) >= 0).sum())
    cost = {"vector": 2.0 * taps * channels, "bytes": 2 * features.nbytes}

    def ours(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.sparse_depthwise_conv2d(features, weight, bias, sites)

    if against == "spconv":
        functions = {"spconv": spconv_call(features, weight, bias, sites)}
        return Work(without_grad(ours, features, weight, bias), functions, **cost)
    theirs = {"own dense": ops.depthwise_conv2d, "PyTorch": dense.eager}[against]
    name = "own dense" if against == "own dense" else "eager"
    if what == "forward":
        call = without_grad(theirs, x, weight, bias)
        return Work(without_grad(ours, features, weight, bias), {name: call}, **cost)
    inputs = {"ours": features, name: x}
    leaves = {k: [v] if what == "input_grad" else [weight, bias] for k, v in inputs.items()}
    for leaf in sum(leaves.values(), []):
        leaf.requires_grad_()
    grad = torch.randn_like(features)
    dense_grad = SparseTensor2d(grad, sites).dense()
    call = backward(theirs, (x, weight, bias), leaves[name], dense_grad)
    return Work(backward(ours, (features, weight, bias), leaves["ours"], grad), {name: call}, **cost)


def spconv_call(features: Tensor, weight: Tensor, bias: Tensor, sites: ActiveSites) -> Callable[[], Tensor]:
    import spconv.pytorch as spconv

    channels, side = features.shape[1], weight.shape[-1]
    layer = spconv.SubMConv2d(
        channels, channels, side, padding=side // 2, indice_key="sites", algo=spconv.ConvAlgo.Native
    )
    with torch.no_grad():
        layer.weight.zero_()  # (out, row, column, in)
        index = torch.arange(channels)
        layer.weight[index, :, :, index] = weight[:, 0]
        layer.bias.copy_(bias)
    tensor = spconv.SparseConvTensor(features, sites.indices, list(sites.spatial_shape), sites.batch_size)
    with torch.no_grad():
        tensor.indice_dict = layer(tensor).indice_dict  # its tables are built once, as ours are
    return without_grad(lambda: layer(tensor).features)
