"""Every format gives its pictures and labels back; a damaged one names the file at fault."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from convdit import data
from convdit.data import DataError


def noise(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    raw = header + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_idx_folder(folder, suffix=""):
    images, labels = noise(30, 28, 28), np.arange(30, dtype=np.uint8) % 3
    write_idx(folder / f"train-images-idx3-ubyte{suffix}", images)
    write_idx(folder / f"train-labels-idx1-ubyte{suffix}", labels)
    write_idx(folder / f"t10k-images-idx3-ubyte{suffix}", images[:6])
    write_idx(folder / f"t10k-labels-idx1-ubyte{suffix}", labels[:6])
    return images, labels


def write_pictures(root, classes=("cat", "dog"), count=5, size=(20, 12)):
    for seed, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i, array in enumerate(noise(count, size[1], size[0], 3, seed=seed)):
            Image.fromarray(array).save(root / name / f"{i}.png")


def test_mnist5k_is_balanced_padded_and_split_the_same_way_each_time():
    first, second = data.load("mnist5k"), data.load("mnist5k")
    assert first.train.image_shape == (1, 32, 32)
    assert first.train.labels.bincount().tolist() == [400] * 10
    assert first.test.labels.bincount().tolist() == [100] * 10
    assert torch.equal(first.test.images, second.test.images)
    assert first.train.images[:, :, :2].max() == 0 and first.train.images.max() == 255


def test_item_is_a_float_image_in_unit_range_and_an_int_label():
    image, label = data.load("digits").train[7]
    assert image.dtype == torch.float32 and image.shape == (1, 16, 16)
    assert 0 <= image.min() and 0.8 < image.max() <= 1 and isinstance(label, int)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder_gives_its_own_splits(tmp_path, suffix):
    images, labels = write_idx_folder(tmp_path, suffix)
    train, test = data.load(tmp_path)
    assert (len(train), len(test)) == (30, 6)
    assert np.array_equal(train.images[:, 0, 2:30, 2:30].numpy(), images)
    assert train.labels.tolist() == labels.tolist()


def test_damaged_idx_names_the_file(tmp_path):
    write_idx_folder(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="train-images-idx3-ubyte.*expected 23520 values"):
        data.load(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="train-images-idx"):
        data.load(tmp_path)


def test_truncated_gzip_names_the_file(tmp_path):
    write_idx_folder(tmp_path, ".gz")
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte.gz: damaged"):
        data.load(tmp_path)


def test_picture_folder_sorts_classes_and_crops_to_size(tmp_path):
    write_pictures(tmp_path)
    train, test = data.load(tmp_path, image_size=8)
    assert train.classes == ["cat", "dog"] and train.image_shape == (3, 8, 8)
    assert (len(train), len(test)) == (8, 2)


def test_split_picture_folder_with_a_class_missing_names_it(tmp_path):
    write_pictures(tmp_path / "train")
    write_pictures(tmp_path / "val", classes=("cat",))
    with pytest.raises(DataError, match="val/dog: class folder missing"):
        data.load(tmp_path, image_size=8)


def test_truncated_picture_names_the_file_before_training(tmp_path):
    write_pictures(tmp_path, size=(64, 64))
    path = tmp_path / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(DataError, match="dog/3.png: cannot be read"):
        data.load(tmp_path, image_size=8)


def test_folder_without_classes_and_empty_class_are_refused(tmp_path):
    with pytest.raises(DataError, match="no class folders"):
        data.load(tmp_path)
    write_pictures(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no pictures"):
        data.load(tmp_path)


def test_large_folder_is_read_lazily_with_the_same_result(tmp_path, monkeypatch):
    write_pictures(tmp_path)
    eager = data.load(tmp_path, image_size=8).train
    monkeypatch.setattr("convdit.data.loading._MEMORY_LIMIT", 0)
    lazy = data.load(tmp_path, image_size=8).train
    assert isinstance(lazy, data.LazyDataset)
    assert torch.equal(lazy.batch([0, 5])[0], eager.batch([0, 5])[0])


def test_npz_channels_last_and_float_read_alike(tmp_path):
    images, labels = noise(20, 32, 32, 3), np.arange(20) % 2
    np.savez(tmp_path / "bytes.npz", images=images, labels=labels)
    np.savez(tmp_path / "float.npz", x=(images / 255).astype(np.float32), y=labels[:, None])
    one, two = data.load(tmp_path / "bytes.npz").train, data.load(tmp_path / "float.npz").train
    assert one.image_shape == (3, 32, 32)
    torch.testing.assert_close(one.batch(range(4))[0], two.batch(range(4))[0])


@pytest.mark.parametrize(
    "content, message",
    [
        (dict(images=noise(4, 8, 8)), "expected arrays 'images' and 'labels'"),
        (dict(images=noise(4, 8, 8), labels=np.zeros(3, int)), "4 images but 3 labels"),
        (dict(images=noise(4, 8, 8), labels=np.zeros(4)), "expected integers"),
        (dict(images=noise(4, 8, 8).astype(np.float32), labels=np.zeros(4, int)), r"\[0, 1\]"),
        (dict(images=np.array([print, 1, 2, 3]), labels=np.zeros(4, int)), "without pickle"),
        (dict(images=noise(4, 8), labels=np.zeros(4, int)), "expected shape"),
    ],
)
def test_bad_npz_says_what_is_wrong(tmp_path, content, message):
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(DataError, match=message) as caught:
        data.load(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value)


def test_damaged_npz_names_the_file(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 nothing more")
    with pytest.raises(DataError, match="bad.npz"):
        data.load(tmp_path / "bad.npz")


def test_hugging_face_folder(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    pictures = [Image.fromarray(a) for a in noise(10, 9, 9, 3)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 5}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows.select([0, 1, 2])}).save_to_disk(tmp_path / "d")
    train, test = data.load(tmp_path / "d", image_size=9)
    assert train.classes == ["no", "yes"] and (len(train), len(test)) == (10, 3)
    assert np.array_equal(train.images[4].permute(1, 2, 0).numpy(), np.asarray(pictures[4]))
    (tmp_path / "d" / "train" / "state.json").write_text("{")
    with pytest.raises(DataError, match="load_from_disk"):
        data.load(tmp_path / "d")


def test_missing_path_lists_the_names_there_are(tmp_path):
    with pytest.raises(DataError, match="no such file or folder.*mnist5k, digits"):
        data.load(tmp_path / "nothing")


def test_few_labels_are_balanced_and_repeatable():
    labels = data.load("mnist5k").train.labels
    picked = data.few_labels(labels, 100, seed=3)
    assert labels[picked].bincount().tolist() == [10] * 10
    assert torch.equal(picked, data.few_labels(labels, 100, seed=3))
    assert not torch.equal(picked, data.few_labels(labels, 100, seed=4))
    with pytest.raises(ValueError, match="from 10 to 4000, got 5"):
        data.few_labels(labels, 5, seed=0)
