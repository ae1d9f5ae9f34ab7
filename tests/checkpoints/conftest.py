"""Random checkpoints in our own names, written out by hand: no model, no converter."""

import math

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


def _attention_block(state, name, dim, rand):
    layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for layer, (outputs, inputs) in layers.items():
        state[f"{name}.{layer}.weight"] = rand(outputs * dim, inputs * dim)
        state[f"{name}.{layer}.bias"] = rand(outputs * dim)
    for norm in ("norm1", "norm2"):
        state[f"{name}.{norm}.weight"], state[f"{name}.{norm}.bias"] = rand(dim), rand(dim)


def _encoder(version, rand, depths=DEPTHS, dims=DIMS, in_chans=3, stem=4, attention=()):
    state = {
        "downsample_layers.0.0.weight": rand(dims[0], in_chans, stem, stem),
        "downsample_layers.0.0.bias": rand(dims[0]),
        "downsample_layers.0.1.weight": rand(dims[0]),
        "downsample_layers.0.1.bias": rand(dims[0]),
    }
    for i in range(1, len(dims)):
        state[f"downsample_layers.{i}.0.weight"] = rand(dims[i - 1])
        state[f"downsample_layers.{i}.0.bias"] = rand(dims[i - 1])
        state[f"downsample_layers.{i}.1.weight"] = rand(dims[i], dims[i - 1], 2, 2)
        state[f"downsample_layers.{i}.1.bias"] = rand(dims[i])
    for i in range(len(dims)):
        for j in range(depths[i]):
            if i in attention:
                _attention_block(state, f"stages.{i}.{j}", dims[i], rand)
            else:
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


@pytest.fixture
def dit():
    """`dit()`: an adaLN-Zero DiT of width 8, two blocks, patches of 2x2x4, a 4x4 grid."""

    def build(seed=0, d=8, depth=2, rows=6):
        rand = _random(seed)
        state = {"x_embedder.proj.weight": rand(d, 4, 2, 2), "x_embedder.proj.bias": rand(d)}
        state["pos_embed"] = torch.empty(1, 16, d)
        for token in range(16):
            for half, place in ((0, token % 4), (1, token // 4)):  # the column first
                for i in range(d // 4):
                    angle = place / 10000 ** (i / (d / 4))
                    state["pos_embed"][0, token, half * d // 2 + i] = math.sin(angle)
                    state["pos_embed"][0, token, half * d // 2 + d // 4 + i] = math.cos(angle)
        layers = {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d)}
        for i in range(depth):
            layers[f"blocks.{i}.attn.qkv"] = (3 * d, d)
            layers[f"blocks.{i}.attn.proj"] = (d, d)
            layers[f"blocks.{i}.mlp.fc1"] = (4 * d, d)
            layers[f"blocks.{i}.mlp.fc2"] = (d, 4 * d)
            layers[f"blocks.{i}.adaLN_modulation.1"] = (rows * d, d)
        layers["final_layer.linear"] = (32, d)
        layers["final_layer.adaLN_modulation.1"] = (2 * d, d)
        for name, (out, inputs) in layers.items():
            state[f"{name}.weight"], state[f"{name}.bias"] = rand(out, inputs), rand(out)
        state["y_embedder.embedding_table.weight"] = rand(6, d)
        return state

    return build
