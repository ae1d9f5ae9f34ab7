"""Augmentations as published: repeatable, applied where they should be, and nowhere else."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from convdit import data
from convdit.data.pixels import Fit, published_crop_ratio
from convdit.training.augment import AugmentedDataset, BatchMixing, augmented
from convdit.training.order import BatchOrder, batches

RANDAUG = "rand-m9-mstd0.5-inc1"


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").train


def global_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_a_draw_depends_on_its_seed_alone_and_leaves_the_random_states(digits):
    dataset = AugmentedDataset(digits, 0.3, RANDAUG)
    before = global_states()
    one = dataset.draw([3, 3, 5], 7)
    assert global_states() == before
    random.random(), np.random.rand(), torch.rand(1)
    two, other = dataset.draw([3, 3, 5], 7), dataset.draw([3, 3, 5], 8)
    assert torch.equal(one[0], two[0]) and not torch.equal(one[0], other[0])
    assert not torch.equal(one[0][0], one[0][1]), "the same picture twice in a batch is changed twice"
    assert one[0].shape == (3, 1, 16, 16) and 0 <= one[0].min() and one[0].max() <= 1
    assert one[1].tolist() == digits.labels[[3, 3, 5]].tolist()


def test_judging_sees_the_pictures_as_they_are(digits):
    dataset = augmented(digits, "resized_crop", 0.3, RANDAUG)
    assert torch.equal(dataset.batch([1, 2])[0], digits.batch([1, 2])[0])
    assert torch.equal(dataset.subset([4]).batch([0])[0], digits.batch([4])[0])
    assert augmented(digits, "shift") is digits


def test_worker_processes_draw_the_same_pictures(digits):
    dataset = AugmentedDataset(digits, 0.3, RANDAUG)
    here = list(batches(dataset, BatchOrder(len(dataset), 4, 0, 2, 4)))
    there = list(batches(dataset, BatchOrder(len(dataset), 4, 0, 2, 4), workers=2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(here, there, strict=True))


def test_every_randaugment_operation_runs_at_every_strength(digits):
    for name in (RANDAUG, "rand-m10-inc1", "rand-m0"):
        images, _ = AugmentedDataset(digits, None, name).draw(range(60), 0)
        assert images.shape == (60, 1, 16, 16)
    with pytest.raises(ValueError, match="randaug: expected a name such as"):
        AugmentedDataset(digits, None, "strong")


def write_wide_pictures(root):
    """Black, but for the left third, which is white and lies outside the square in the middle."""
    array = np.zeros((40, 180, 3), np.uint8)
    array[:, :60] = 255
    array[18:, 88:] = 128
    for name in "ab":
        (root / name).mkdir()
        for i in range(2):
            Image.fromarray(array).save(root / name / f"{i}.png")


@pytest.mark.parametrize("limit", [0, 2**30], ids=["read when needed", "in memory"])
def test_crops_are_cut_from_the_files_at_their_own_size(tmp_path, monkeypatch, limit):
    monkeypatch.setattr("convdit.data.loading._MEMORY_LIMIT", limit)
    write_wide_pictures(tmp_path)
    train = data.load(tmp_path, image_size=8).train
    assert train.picture(0).size == (180, 40) and train.subset([1]).picture(0).size == (180, 40)
    assert train.batch([0])[0].max() < 0.6
    images, _ = AugmentedDataset(train, 0.05, None).draw([0] * 40, 0)
    means = images.mean((1, 2, 3))
    assert means.min() < 0.3 and means.max() > 0.95


@pytest.mark.parametrize("size", [(80, 61), (61, 80), (64, 64), (300, 45)])
def test_held_out_pictures_are_cut_as_torchvision_does(size):
    array = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    picture, bicubic = Image.fromarray(array), transforms.InterpolationMode.BICUBIC
    for side in (32, 37):
        published = transforms.Compose(
            [transforms.Resize(int(side / (224 / 256)), interpolation=bicubic), transforms.CenterCrop(side)]
        )
        expected = np.asarray(published(picture)).transpose(2, 0, 1)
        assert np.array_equal(Fit(side, 3, published_crop_ratio(side))(picture), expected)
    whole = np.asarray(transforms.Resize((384, 384), interpolation=bicubic)(picture)).transpose(2, 0, 1)
    assert published_crop_ratio(384) is None
    assert np.array_equal(Fit(384, 3, published_crop_ratio(384))(picture), whole)


def test_only_held_out_pictures_are_cut_to_the_ratio(tmp_path):
    write_wide_pictures(tmp_path)
    (full, full_test), (train, test) = (data.load(tmp_path, 24, None, ratio) for ratio in (1.0, None))
    assert torch.equal(full.images, train.images) and not torch.equal(full_test.images, test.images)
    expected = Fit(24, 3, 224 / 256)(test.picture(0))
    assert torch.equal(test.images[0], torch.from_numpy(expected))
    with pytest.raises(data.DataError, match="crop_ratio: expected 0 < crop_ratio <= 1, got 1.5"):
        data.load(tmp_path, 24, crop_ratio=1.5)


def test_mixed_labels_say_how_much_of_each_class_is_in_the_picture():
    labels = torch.arange(8)
    images = labels.float().view(8, 1, 1, 1).expand(8, 1, 4, 4).clone()
    np.random.seed(0)
    mixed, soft = BatchMixing(8, 0.0, 0.8, 0.0, 0.0, "cpu")(images.clone(), labels)
    torch.testing.assert_close(mixed[:, 0, 0, 0], soft @ labels.float())
    assert ((soft > 0).sum(1) == 2).all()


def test_loss_of_mixed_labels_is_smoothed_once_and_of_plain_labels_too():
    scores, labels = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    plain = BatchMixing(5, 0.0, 0.0, 0.0, 0.1, "cpu")
    images, same = plain(torch.zeros(4, 1, 2, 2), labels)
    assert same is labels
    expected = torch.nn.functional.cross_entropy(scores, labels, label_smoothing=0.1)
    torch.testing.assert_close(plain.loss(scores, labels), expected)
    mixed = BatchMixing(5, 0.0, 0.5, 0.5, 0.1, "cpu")
    _, soft = mixed(torch.zeros(4, 1, 2, 2), labels)
    torch.testing.assert_close(soft.sum(1), torch.ones(4))
    assert soft.min() == pytest.approx(0.1 / 5)
    expected = -(soft * scores.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(mixed.loss(scores, soft), expected)


def test_erasing_hits_the_share_of_pictures_asked_for():
    random.seed(0)
    images, _ = BatchMixing(2, 0.25, 0.0, 0.0, 0.0, "cpu")(torch.zeros(400, 1, 8, 8), torch.zeros(400))
    assert 70 < int(images.flatten(1).any(1).sum()) < 130
