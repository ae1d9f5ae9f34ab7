"""Random checkpoints in our own names, written out by hand: no model, no converter."""

import pytest
import torch

DEPTHS, DIMS = (1, 2, 1, 1), (4, 6, 8, 10)


def _block(state, name, dim, version, rand):
    state[f"{name}.dwconv.weight"] = rand(dim, 1, 7, 7)
    state[f"{name}.dwconv.bias"] = rand(dim)
    state[f"{name}.norm.weight"] = rand(dim)
    state[f"{name}.norm.bias"] = rand(dim)
    state[f"{name}.pwconv1.weight"] = rand(4 * dim, dim)
    state[f"{name}.pwconv1.bias"] = rand(4 * dim)
    if version == 2:
        state[f"{name}.grn.gamma"] = rand(4 * dim)
        state[f"{name}.grn.beta"] = rand(4 * dim)
    state[f"{name}.pwconv2.weight"] = rand(dim, 4 * dim)
    state[f"{name}.pwconv2.bias"] = rand(dim)
    if version == 1:
        state[f"{name}.gamma"] = rand(dim)


def _encoder(version, rand, depths=DEPTHS, dims=DIMS):
    state = {
        "downsample_layers.0.0.weight": rand(dims[0], 3, 4, 4),
        "downsample_layers.0.0.bias": rand(dims[0]),
        "downsample_layers.0.1.weight": rand(dims[0]),
        "downsample_layers.0.1.bias": rand(dims[0]),
    }
    for i in (1, 2, 3):
        state[f"downsample_layers.{i}.0.weight"] = rand(dims[i - 1])
        state[f"downsample_layers.{i}.0.bias"] = rand(dims[i - 1])
        state[f"downsample_layers.{i}.1.weight"] = rand(dims[i], dims[i - 1], 2, 2)
        state[f"downsample_layers.{i}.1.bias"] = rand(dims[i])
    for i in range(4):
        for j in range(depths[i]):
            _block(state, f"stages.{i}.{j}", dims[i], version, rand)
    return state


def _random(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def encoder():
    """`encoder(version=2)`: a ConvNeXt without final norm and head."""
    return lambda version=2, seed=0, **size: _encoder(version, _random(seed), **size)


@pytest.fixture
def classifier():
    """`classifier(version=2)`: a ConvNeXt with final norm and a head of five classes."""

    def build(version=2, seed=0, dims=DIMS, **size):
        rand = _random(seed)
        state = _encoder(version, rand, dims=dims, **size)
        state["norm.weight"], state["norm.bias"] = rand(dims[-1]), rand(dims[-1])
        state["head.weight"], state["head.bias"] = rand(5, dims[-1]), rand(5)
        return state

    return build


@pytest.fixture
def fcmae():
    """`fcmae()`: an FCMAE V2 with a decoder of width 12 and two blocks, patches of 32x32x3."""

    def build(seed=0):
        rand = _random(seed)
        state = {f"encoder.{key}": value for key, value in _encoder(2, rand).items()}
        state["mask_token"] = rand(1, 12, 1, 1)
        state["proj.weight"], state["proj.bias"] = rand(12, DIMS[-1], 1, 1), rand(12)
        for j in range(2):
            _block(state, f"decoder.{j}", 12, 2, rand)
        state["pred.weight"], state["pred.bias"] = rand(3072, 12, 1, 1), rand(3072)
        return state

    return build


@pytest.fixture
def assert_same():
    """`assert_same(a, b)`: the same names, shapes, dtypes and bits."""

    def check(actual, expected):
        assert set(actual) == set(expected)
        for key, value in expected.items():
            assert actual[key].shape == value.shape, key
            assert actual[key].dtype == value.dtype, key
            assert torch.equal(actual[key], value), key

    return check
