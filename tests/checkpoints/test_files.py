"""Checkpoint files: what is read, what is refused, and that nothing in a file is ever run."""

import argparse
import os
import pickle
import zipfile

import pytest
import safetensors.torch
import torch

from convdit import checkpoints

# PyTorch's reader remarks on every pickle protocol but its own.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


class Hostile:
    """Unpickling it makes a file: the proof that code ran."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (os.mkdir, (str(self.witness),))


@pytest.fixture
def state():
    return {"a.weight": torch.randn(2, 3), "a.bias": torch.zeros(2, dtype=torch.bfloat16)}


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "no_suffix"])
def test_safetensors_by_content(tmp_path, state, assert_same, name):
    safetensors.torch.save_file(state, tmp_path / name)
    assert_same(checkpoints.load(tmp_path / name), state)
    assert_same(checkpoints.load(str(tmp_path / name)), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_with_a_namespace(tmp_path, state, assert_same, zipped):
    content = {"model": state, "args": argparse.Namespace(lr=1e-4, layers=[1, 2]), "epoch": 7}
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_same(checkpoints.load(path), state)


def test_weights_are_taken_out_by_stated_rules(tmp_path, state, assert_same):
    path = tmp_path / "x.pt"
    other = {key: value + 1 for key, value in state.items()}
    torch.save({"model": other, "ema": state, "opt": {"lr": 1.0}}, path)
    assert_same(checkpoints.load(path), state)
    assert_same(checkpoints.load(path, key="model"), other)
    with pytest.raises(ValueError, match=r"x\.pt.*'model_ema'.*'model', 'ema', 'opt'"):
        checkpoints.load(path, key="model_ema")
    torch.save({"model": state, "ema": None}, path)
    assert_same(checkpoints.load(path), state)
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    assert_same(checkpoints.load(path), state)
    torch.save({f"_orig_mod.{key}": value for key, value in state.items()}, path)
    assert_same(checkpoints.load(path), state)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path, state, zipped, nested):
    path, witness = tmp_path / "x.pth", tmp_path / "witness"
    content = {"model": state, "args": Hostile(witness)} if nested else Hostile(witness)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="mkdir") as error:
        checkpoints.load(path)
    assert str(path) in str(error.value)
    assert not witness.exists()


def test_a_hostile_state_of_an_allowed_class_runs_nothing(tmp_path):
    path, witness = tmp_path / "x.pth", tmp_path / "witness"
    torch.save({"model": {}, "args": argparse.Namespace(x=Hostile(witness))}, path)
    with pytest.raises(ValueError, match="mkdir"):
        checkpoints.load(path)
    assert not witness.exists()


def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path):
    path, witness = tmp_path / "x.pkl", tmp_path / "witness"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Hostile(witness), protocol))
        with pytest.raises(ValueError, match=r"x\.pkl"):
            checkpoints.load(path)
    path.write_bytes(pickle.dumps(Hostile(witness), 0))
    with pytest.raises(ValueError, match=r"x\.pkl"):
        checkpoints.load(path)
    assert not witness.exists()


def test_loading_leaves_the_allow_list_as_it_was(tmp_path, state):
    before = set(torch.serialization.get_safe_globals())
    torch.save(state, tmp_path / "x.pt")
    checkpoints.load(tmp_path / "x.pt")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("writer", ["torch", "legacy", "safetensors"])
def test_a_file_cut_anywhere_names_the_path(tmp_path, state, writer):
    path = tmp_path / "x.bin"
    if writer == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=writer == "torch")
    whole = path.read_bytes()
    for size in [0, 1, 2, 8, 9, 20, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError) as error:
            checkpoints.load(path)
        assert str(path) in str(error.value)


def test_files_that_are_no_checkpoint(tmp_path):
    for content in (b"", b"hello", b"\x80", b"PK\x03\x04junk", b"\xff" * 8 + b"{" + b"\xff" * 30):
        path = tmp_path / "x.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            checkpoints.load(path)
        assert str(path) in str(error.value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", "not a pickle")
    with pytest.raises(ValueError, match=r"x\.pth"):
        checkpoints.load(path)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pth: no such"):
        checkpoints.load(tmp_path / "nothing.pth")
    with pytest.raises(IsADirectoryError, match="directory"):
        checkpoints.load(tmp_path)


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe"):
        checkpoints.load(tmp_path / "pipe")


def test_content_other_than_tensors_is_named(tmp_path):
    path = tmp_path / "x.pth"
    for content, words in [
        ({"a": torch.zeros(1), "step": 3}, r"step \(int\)"),
        ([1, 2], "mapping"),
        ({}, "no tensors"),
        ({"model": {}}, "no tensors"),
        ({1: torch.zeros(1)}, "names and tensors"),
    ]:
        torch.save(content, path)
        with pytest.raises(ValueError, match=words) as error:
            checkpoints.load(path)
        assert str(path) in str(error.value)


def test_save_writes_what_load_reads(tmp_path, state, assert_same):
    state["tied"] = state["a.weight"]
    state["view"] = state["a.weight"].t()
    state["part"] = state["a.weight"][0]
    state["scalar"] = torch.tensor(3)
    path = checkpoints.save(state, tmp_path / "x.safetensors")
    assert_same(checkpoints.load(path), state)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_failed_save_leaves_the_old_file_and_no_rest(tmp_path, state, monkeypatch):
    path = checkpoints.save(state, tmp_path / "x.safetensors")
    before = path.read_bytes()

    def broken(tensors, name, metadata=None):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save({"b": torch.ones(3)}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_save_refuses_bad_arguments_before_writing(tmp_path, state):
    with pytest.raises(TypeError, match="'step': int"):
        checkpoints.save({**state, "step": 3}, tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="no folder"):
        checkpoints.save(state, tmp_path / "none" / "x.safetensors")
    with pytest.raises(IsADirectoryError, match="directory"):
        checkpoints.save(state, tmp_path)
    assert os.listdir(tmp_path) == []
