"""Names on the Hugging Face hub, without a network: its cache, its answers, and errors that say so."""

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from convdit import checkpoints
from convdit.cli import main


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """`cache(repository, file, write)`: puts a file into an offline cache of huggingface_hub, as it lays it out."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repository, file, write, revision="main", commit="0" * 40):
        folder = tmp_path / "hub" / ("models--" + repository.replace("/", "--"))
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        write(snapshot / file)

    return put


@pytest.mark.parametrize("name", ["timm/some_model.fcmae", "hf-hub:timm/some_model.fcmae"])
def test_a_name_on_the_hub_is_read_from_the_cache(cache, classifier, assert_same, name):
    state = classifier()
    cache("timm/some_model.fcmae", "model.safetensors", lambda path: save_file(state, path))
    assert_same(checkpoints.load(name), state)


def test_a_torch_file_is_taken_where_there_is_no_safetensors_file(cache, classifier, assert_same):
    state = classifier()
    cache("facebook/some-model", "pytorch_model.bin", lambda path: torch.save(state, path))
    assert_same(checkpoints.load("hf-hub:facebook/some-model"), state)


def test_a_revision_follows_an_at_sign(cache, classifier, assert_same):
    old, new = classifier(seed=1), classifier(seed=2)
    cache("a/b", "model.safetensors", lambda path: save_file(old, path), "v1", "1" * 40)
    cache("a/b", "model.safetensors", lambda path: save_file(new, path), "main", "2" * 40)
    assert_same(checkpoints.load("hf-hub:a/b"), new)
    assert_same(checkpoints.load("hf-hub:a/b@v1"), old)


def test_a_file_of_that_name_comes_before_the_hub(tmp_path, classifier, assert_same, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm").mkdir()
    save_file(classifier(), tmp_path / "timm" / "model")
    assert_same(checkpoints.load("timm/model"), classifier())


def test_the_command_converts_by_name(cache, classifier, assert_same, tmp_path):
    cache("timm/x", "model.safetensors", lambda path: save_file(checkpoints.convert(classifier(), "timm"), path))
    assert main(["convert", "timm/x", str(tmp_path / "ours.safetensors"), "--to", "convdit"]) == 0
    assert_same(checkpoints.load(tmp_path / "ours.safetensors"), classifier())


def test_offline_the_error_says_so_and_where_the_cache_is(cache, tmp_path, capsys):
    with pytest.raises(ConnectionError, match=r"timm/none: .*cannot be reached .*HF_HUB_OFFLINE.*hub has no copy"):
        checkpoints.load("timm/none")
    assert main(["convert", "hf-hub:a/none", str(tmp_path / "out.safetensors"), "--to", "convdit"]) == 1
    assert "hf-hub:a/none: the Hugging Face hub cannot be reached" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def answer(kind):
    return kind.__new__(kind)  # without the response of the network's library, which changes with versions


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (lambda: answer(errors.RepositoryNotFoundError), FileNotFoundError, "no such repository or revision"),
        (lambda: answer(errors.RevisionNotFoundError), FileNotFoundError, "no such repository or revision"),
        (lambda: answer(errors.RemoteEntryNotFoundError), FileNotFoundError, "no file model.safetensors or pytorch_m"),
        (lambda: answer(errors.HfHubHTTPError), ConnectionError, "cannot be reached"),
        (lambda: errors.OfflineModeIsEnabled("off"), ConnectionError, "cannot be reached"),
    ],
)
def test_what_the_hub_answers_is_said_with_the_name(monkeypatch, raised, kind, message):
    asked = []

    def download(repository, file, revision, local_files_only):
        asked.append((repository, file, revision, local_files_only))
        raise raised()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(kind, match=f"hf-hub:a/b@v2: .*{message}"):
        checkpoints.load("hf-hub:a/b@v2")
    assert asked[0] == ("a/b", "model.safetensors", "v2", False)
    assert all(local for *_, local in asked[1:]) == (kind is ConnectionError or len(asked) == 1)


@pytest.mark.parametrize("name", ["hf-hub:", "hf-hub:one", "timm/a/b", "hf-hub:a/b@", "hf-hub:../..", "hf-hub:/etc/x"])
def test_names_that_are_none_are_refused_before_any_request(monkeypatch, name):
    def download(*_arguments, **_options):
        pytest.fail("asked the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match="expected hf-hub:OWNER/NAME"):
        checkpoints.load(name)
