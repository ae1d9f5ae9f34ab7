"""DiT under official, SiT and diffusers names; the diffusers side is written out row by row."""

import argparse

import pytest
import torch

from convdit import checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:diffusers' DiT computes")


def diffusers_state(ours, depth=2):
    """diffusers' names and layout of a DiT in ours, without the position table."""
    d = ours["x_embedder.proj.bias"].shape[0]
    renamed = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    out = {}
    for i in range(depth):
        block, embedders = f"transformer_blocks.{i}", f"transformer_blocks.{i}.norm1.emb"
        renamed[f"{embedders}.timestep_embedder.linear_1"] = "t_embedder.mlp.0"
        renamed[f"{embedders}.timestep_embedder.linear_2"] = "t_embedder.mlp.2"
        renamed[f"{block}.norm1.linear"] = f"blocks.{i}.adaLN_modulation.1"
        renamed[f"{block}.attn1.to_out.0"] = f"blocks.{i}.attn.proj"
        renamed[f"{block}.ff.net.0.proj"] = f"blocks.{i}.mlp.fc1"
        renamed[f"{block}.ff.net.2"] = f"blocks.{i}.mlp.fc2"
        table = ours["y_embedder.embedding_table.weight"]
        out[f"{embedders}.class_embedder.embedding_table.weight"] = table.clone()
        for leaf in ("weight", "bias"):
            qkv = ours[f"blocks.{i}.attn.qkv.{leaf}"]
            for part, name in enumerate(("to_q", "to_k", "to_v")):
                rows = [qkv[part * d + row] for row in range(d)]
                out[f"{block}.attn1.{name}.{leaf}"] = torch.stack(rows)
    for theirs, name in renamed.items():
        for leaf in ("weight", "bias"):
            out[f"{theirs}.{leaf}"] = ours[f"{name}.{leaf}"].clone()
    return out


def without_table(state):
    return {key: value for key, value in state.items() if key != "pos_embed"}


def test_official_names_are_ours(dit, assert_same):
    ours = dit()
    assert checkpoints.detect(ours) == "dit_official"
    for wrapped in (ours, {"model": ours}, {"model": {"x": torch.ones(1)}, "ema": ours, "opt": {}}):
        assert checkpoints.detect(wrapped) == "dit_official"
        assert_same(checkpoints.convert(wrapped, "convdit"), ours)
        assert_same(checkpoints.convert(wrapped, "dit_official"), ours)


def test_sit_is_known_by_its_training_arguments(dit, assert_same, tmp_path):
    ours = dit()
    args = argparse.Namespace(model="SiT-XL/2", path_type="Linear", prediction="velocity")
    torch.save({"model": ours, "ema": ours, "opt": {}, "args": args}, tmp_path / "sit.pt")
    loaded = checkpoints.load(tmp_path / "sit.pt")
    assert checkpoints.detect(loaded) == "sit"
    assert_same(checkpoints.convert(loaded, "convdit"), ours)
    assert_same(checkpoints.convert(ours, "sit"), ours)
    assert_same(checkpoints.convert(ours, "convdit", source="sit"), ours)
    assert checkpoints.detect(checkpoints.convert(loaded, "dit_official")) == "dit_official"
    args = argparse.Namespace(model="DiT-XL/2")
    torch.save({"model": ours, "ema": ours, "args": args}, tmp_path / "dit.pt")
    assert checkpoints.detect(checkpoints.load(tmp_path / "dit.pt")) == "dit_official"


def test_diffusers_both_ways(dit, assert_same):
    ours = dit()
    theirs = diffusers_state(ours)
    assert checkpoints.detect(theirs) == "diffusers"
    assert_same(checkpoints.convert(ours, "diffusers"), theirs)
    converted = checkpoints.convert(theirs, "convdit")
    assert_same(converted, without_table(ours))
    assert_same(checkpoints.convert(converted, "diffusers"), theirs)
    assert_same(checkpoints.convert(checkpoints.convert(ours, "diffusers"), "dit_official"), ours)


def test_the_position_table_is_rebuilt_from_the_input_size(dit, assert_same):
    ours = dit()
    theirs = diffusers_state(ours)
    for size in (8, (8, 8)):
        assert_same(checkpoints.convert(theirs, "dit_official", input_size=size), ours)
        assert_same(checkpoints.convert(theirs, "convdit", input_size=size), ours)
    stored = dict(checkpoints.convert(theirs, "convdit"))  # as a file would have it
    with pytest.raises(ValueError, match="missing keys: 'pos_embed'"):
        checkpoints.convert(stored, "convdit")
    assert_same(checkpoints.convert(stored, "convdit", input_size=8), ours)
    assert_same(checkpoints.convert(stored, "diffusers", input_size=8), theirs)
    wide = checkpoints.convert(theirs, "convdit", input_size=(4, 6))["pos_embed"]
    assert wide.shape == (1, 6, 8)
    # Row 1, column 2 of the 2x3 grid is row 1, column 2 of the 4x4 grid.
    assert torch.equal(wide[0, 1 * 3 + 2], ours["pos_embed"][0, 1 * 4 + 2])
    with pytest.raises(ValueError, match=r"missing keys: 'pos_embed'.*input_size"):
        checkpoints.convert(theirs, "dit_official")
    with pytest.raises(ValueError, match="input_size: expected multiples of patch 2, got 9"):
        checkpoints.convert(theirs, "convdit", input_size=9)
    with pytest.raises(ValueError, match="input_size: 16 does not have 16 patches"):
        checkpoints.convert(ours, "convdit", input_size=16)


def test_a_stored_table_of_diffusers_is_read(dit, assert_same):
    ours = dit()
    theirs = diffusers_state(ours)
    theirs["pos_embed.pos_embed"] = ours["pos_embed"].clone()
    assert_same(checkpoints.convert(theirs, "dit_official"), ours)


def test_another_position_table_has_no_place_in_diffusers(dit):
    for change in ("learned", "transposed", "oblong"):
        ours = dit()
        table = ours["pos_embed"]
        if change == "learned":
            table[0, 3, 2] += 0.01
        elif change == "transposed":
            ours["pos_embed"] = table.view(1, 4, 4, 8).transpose(1, 2).reshape(1, 16, 8)
        else:
            ours["pos_embed"] = table[:, :12]
        with pytest.raises(ValueError, match="'pos_embed' is not the fixed sine-cosine table"):
            checkpoints.convert(ours, "diffusers")
    half = {key: value.half() for key, value in dit().items()}
    assert "pos_embed" not in checkpoints.convert(half, "diffusers")


@pytest.mark.parametrize("part", ["timestep_embedder.linear_2.bias", "class_embedder"])
def test_unequal_copies_of_an_embedder_raise(dit, part):
    theirs = diffusers_state(dit())
    key = next(key for key in theirs if key.startswith("transformer_blocks.1") and part in key)
    theirs[key][0] += 1
    with pytest.raises(ValueError, match="differs from 'transformer_blocks.0.norm1.emb") as error:
        checkpoints.convert(theirs, "convdit")
    assert key in str(error.value)


@pytest.mark.parametrize("name", ["dit_official", "diffusers", "sit"])
def test_a_missing_and_an_extra_key_raise_and_are_named(dit, name):
    theirs = checkpoints.convert(dit(), name)
    for key in list(theirs):
        if name != "diffusers" and key.startswith("y_embedder."):
            continue  # an unconditional model has none
        damaged = {k: v for k, v in theirs.items() if k != key}
        with pytest.raises(ValueError) as error:
            checkpoints.convert(damaged, "dit_official", source=name)
        assert repr(key) in str(error.value), key
    if name == "diffusers":  # an embedder of a block that is not there
        key = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.bias"
        extra = key.replace("blocks.0", "blocks.7")
        with pytest.raises(ValueError, match=f"unexpected keys: '{extra}'"):
            checkpoints.convert({**theirs, extra: theirs[key]}, "convdit")
    damaged = {**theirs, "blocks.0.what.ever": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"unexpected keys: 'blocks\.0\.what\.ever'"):
        checkpoints.convert(damaged, "convdit", source=name)


@pytest.mark.parametrize("name", ["dit_official", "diffusers"])
def test_a_tensor_of_another_shape_raises(dit, name):
    theirs = checkpoints.convert(dit(), name)
    for key, value in theirs.items():
        for wrong in (value.sum(), value[None, None].expand(2, 1, *value.shape)):
            with pytest.raises(ValueError):
                checkpoints.convert({**theirs, key: wrong}, "convdit")


def test_what_does_not_fit_raises(dit):
    adaln = dit(rows=4)
    assert checkpoints.detect(adaln) == "convdit"
    assert set(checkpoints.convert(adaln, "convdit")) == set(adaln)
    for name in ("dit_official", "diffusers", "sit"):
        with pytest.raises(ValueError, match="wrong shapes: .*adaLN_modulation"):
            checkpoints.convert(adaln, name)
    unconditional = {k: v for k, v in dit().items() if not k.startswith("y_embedder.")}
    assert set(checkpoints.convert(unconditional, "dit_official")) == set(unconditional)
    with pytest.raises(ValueError, match="missing keys: 'y_embedder"):
        checkpoints.convert(unconditional, "diffusers")
    with pytest.raises(ValueError, match="DiT checkpoint cannot be written in the format 'timm'"):
        checkpoints.convert(dit(), "timm")
    with pytest.raises(ValueError, match="encoder_only"):
        checkpoints.convert(dit(), "convdit", encoder_only=True)
    with pytest.raises(ValueError, match="got a DiT"):
        checkpoints.sparse_to_dense(dit())


def test_conversion_to_and_from_diffusers_warns_of_its_constants(dit):
    ours = dit()
    with pytest.warns(UserWarning, match="divisor 127"):
        theirs = checkpoints.convert(ours, "diffusers")
    with pytest.warns(UserWarning, match=r'divisor 127.*models.DiT\(..., constants="diffusers"\)'):
        checkpoints.convert(theirs, "convdit")
