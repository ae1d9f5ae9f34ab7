"""The parts of the training code that can be wrong without anything failing."""

import math

import pytest
import torch

from convdit import data, models
from convdit.training.evaluate import LinearProbe, accuracy, frechet_distance, nearest_neighbours
from convdit.training.optim import adamw, layer_rates, moving_average, parameter_groups, warmup_cosine
from convdit.training.options import LoopOptions
from convdit.training.order import BatchOrder, batches
from convdit.training.pictures import grid
from convdit.training.transforms import Normalise, augment


def test_every_pass_shows_each_picture_once_and_each_pass_is_another():
    order = [i for batch in BatchOrder(10, 4, 0, 0, 5) for i in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_order_started_late_is_the_tail_of_the_whole_order():
    whole = list(BatchOrder(10, 4, 1, 0, 9))
    assert list(BatchOrder(10, 4, 1, 6, 9)) == whole[6:]


def test_processes_share_every_batch_between_them():
    whole = list(BatchOrder(20, 6, 0, 0, 4))
    parts = [list(BatchOrder(20, 6, 0, 0, 4, rank, 3)) for rank in range(3)]
    assert [sum(shares, []) for shares in zip(*parts, strict=True)] == whole


def test_worker_processes_give_the_same_batches_and_leave_the_random_state_alone():
    dataset = data.load("digits").train
    state = torch.get_rng_state()
    here = list(batches(dataset, BatchOrder(len(dataset), 8, 0, 2, 5)))
    there = list(batches(dataset, BatchOrder(len(dataset), 8, 0, 2, 5), workers=2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(here, there, strict=True))


def test_vectors_grn_and_tokens_do_not_decay():
    model = models.FCMAE(
        models.create("convnextv2_atto", depths=[1], dims=[8], stem_stride=4, features_only=True),
        image_size=8,
        patch_size=4,
        decoder_dim=8,
    )
    decayed, kept = parameter_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0
    assert "encoder.stages.0.0.pwconv1.weight" in decayed_names
    assert "encoder.stages.0.0.dwconv.weight" in decayed_names
    assert not any(".grn." in n or n.endswith("bias") or n == "mask_token" for n in decayed_names)
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_schedule_warms_up_to_the_peak_and_ends_at_a_hundredth():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = warmup_cosine(optimizer, 4, 20)
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and max(rates) == 2.0
    assert schedule.get_last_lr()[0] == pytest.approx(0.02)


def test_schedule_ends_at_the_rate_asked_for():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = warmup_cosine(optimizer, 0, 10, last=0.0)
    for step in range(10):
        assert schedule.get_last_lr()[0] == pytest.approx(1 + math.cos(math.pi * step / 10))
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr()[0] == 0


# Written out by hand from the numbering of facebookresearch/ConvNeXt-V2: (name, layer of "single", layer of "group")
# in a model of 3, 3, 27, 3 blocks, whose head is layer 37 or 13.
LAYERS = [
    ("downsample_layers.0.0.weight", 1, 0),
    ("downsample_layers.0.1.bias", 1, 0),
    ("stages.0.0.dwconv.weight", 1, 1),
    ("stages.0.2.pwconv1.bias", 3, 1),
    ("downsample_layers.1.1.weight", 4, 2),
    ("stages.1.0.grn.gamma", 4, 2),
    ("downsample_layers.2.0.weight", 7, 3),
    ("stages.2.0.norm.weight", 7, 3),
    ("stages.2.2.norm.weight", 9, 3),
    ("stages.2.3.norm.weight", 10, 4),
    ("stages.2.26.norm.weight", 33, 11),
    ("downsample_layers.3.1.weight", 34, 12),
    ("stages.3.2.pwconv2.weight", 36, 12),
    ("norm.weight", 37, 13),
    ("head.weight", 37, 13),
]


@pytest.mark.parametrize("kind, column, head", [("single", 1, 37), ("group", 2, 13)])
def test_layer_wise_decay_numbers_layers_as_the_official_code(kind, column, head):
    rate = layer_rates((3, 3, 27, 3), 0.5, kind)
    for row in LAYERS:
        assert rate(row[0]) == 0.5 ** (head - row[column]), row[0]


def test_layer_wise_decay_reaches_the_optimiser_and_survives_the_schedule():
    model = models.create("convnextv2_atto", depths=[1, 1, 1, 1], dims=[4, 8, 8, 8], num_classes=2)
    optimizer = adamw(model, 1.0, 0.1, 0.999, layer_rates(model.depths, 0.5, "single"))
    schedule = warmup_cosine(optimizer, 0, 10)
    optimizer.step()
    schedule.step()
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    named = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert named["stages.3.0.norm.weight"] == named["head.weight"] / 2
    assert named["downsample_layers.0.0.weight"] == named["head.weight"] / 16
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {name for name, p in model.named_parameters() if not decays[id(p)]} == {
        name for name, p in model.named_parameters() if p.ndim == 1
    }


def test_layer_wise_decay_refuses_models_that_groups_do_not_describe():
    with pytest.raises(ValueError, match="layer_decay_type: group is for"):
        layer_rates((1, 1), 0.9, "group")


def test_epochs_and_base_rate_become_steps_and_rate():
    options = LoopOptions(epochs=3, batch_size=512, base_lr=1e-4, warmup_epochs=0.5, min_lr=1e-6).resolved(5120)
    assert (options.steps, options.warmup, options.lr, options.min_lr) == (30, 5, 2e-4, 1e-6)
    plain = LoopOptions(steps=40).resolved(7)
    assert (plain.steps, plain.warmup, plain.lr, plain.min_lr) == (40, 2, 1e-3, 1e-5)
    with pytest.raises(ValueError, match="warmup_epochs: 30 steps"):
        LoopOptions(epochs=1, batch_size=10, warmup_epochs=3).resolved(100)
    with pytest.raises(ValueError, match="min_lr"):
        LoopOptions(min_lr=1.0).resolved(100)


def test_moving_average_follows_its_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = moving_average(model, 0.999)
    expected = None
    for step, value in enumerate([1.0, 3.0, -2.0, 5.0]):
        torch.nn.init.constant_(model.weight, value)
        ema.update_parameters(model)
        decay = min(0.999, (1 + step) / (10 + step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    assert ema.module.weight.item() == pytest.approx(expected)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    torch.manual_seed(0)
    one = torch.randn(20000, 3, dtype=torch.float64)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    scale, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 0.0, 0.0])
    # Commuting covariances: |shift|^2 + sum (sqrt(a) - sqrt(b))^2 = 9 + 0 + 1 + 4
    assert frechet_distance(one, one * scale + shift) == pytest.approx(14, rel=0.02)


def test_linear_probe_reaches_the_optimum_on_separable_features():
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.nn.functional.one_hot(labels, 3) * 4 + torch.randn(300, 3)
    probe = LinearProbe(features[:200], labels[:200], 3)
    assert accuracy(probe(features[200:]), labels[200:]) > 0.95


def test_few_labels_are_balanced_and_depend_on_their_seed():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)
    picked = data.few_labels(labels, 20, seed=1)
    assert labels[picked].bincount().tolist() in ([9, 8, 3], [8, 9, 3]) and len(picked.unique()) == 20
    assert torch.equal(picked, data.few_labels(labels, 20, seed=1))
    assert not torch.equal(picked, data.few_labels(labels, 20, seed=2))
    with pytest.raises(ValueError, match="labels: expected a number from 3 to 83, got 2"):
        data.few_labels(labels, 2, 0)


def test_nearest_neighbours_vote_by_cosine():
    torch.manual_seed(0)
    known, labels = torch.randn(30, 4), torch.arange(30) % 3
    features = torch.randn(5, 4)
    votes = nearest_neighbours(features, known, labels, 3, neighbours=7)
    for feature, row in zip(features, votes, strict=True):
        likeness = torch.nn.functional.cosine_similarity(feature[None], known)
        expected = torch.zeros(3)
        for i in likeness.argsort(descending=True)[:7].tolist():
            expected[labels[i]] += math.exp(likeness[i] / 0.07)
        torch.testing.assert_close(row, expected)
    assert nearest_neighbours(features, known[:2], labels[:2], 3).shape == (5, 3)


def test_accuracy_among_the_best_counts_labels_that_are_near_the_top():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert accuracy(scores, torch.tensor([1, 2])) == 0.0
    assert accuracy(scores, torch.tensor([1, 2]), 2) == 0.5
    assert accuracy(scores, torch.tensor([1, 2]), 5) == 1.0


def test_normalisation_standardises_and_inverts():
    dataset = data.load("digits").train
    normalise = Normalise.of(dataset)
    images, _ = dataset.batch(range(len(dataset)))
    assert abs(float(normalise(images).mean())) < 0.05 and abs(float(normalise(images).std()) - 1) < 0.05
    torch.testing.assert_close(normalise.invert(normalise(images)), images, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["shift", "crop"])
def test_augmentation_changes_each_picture_on_its_own_and_keeps_the_range(kind):
    images = torch.rand(1, 3, 16, 16).expand(4, -1, -1, -1)
    out = augment(images, kind)
    assert out.shape == images.shape and 0 <= out.min() and out.max() <= 1
    assert not torch.equal(out[0], out[1]) and not torch.equal(out[0], images[0])
    assert torch.equal(augment(images, "none"), images)


def test_grid_places_pictures_row_by_row():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(-1, 1, 4, 4) / 255
    picture = grid(images, columns=3, gap=1)
    assert picture.shape == (10, 15, 3)
    assert picture[0, 0, 0] == 0 and picture[0, 5, 0] == 1 and picture[5, 0, 0] == 3
    assert picture[0, 4, 0] == 255


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"lr": math.nan},
        {"ema": 1.0},
        {"accumulate": 3},
        {"warmup": 2000},
        {"epochs": 0.0},
        {"base_lr": -1.0},
        {"min_lr": -1.0},
        {"warmup_epochs": -1.0},
        {"evaluate_every": 0},
        {"augment": "x"},
    ],
)
def test_options_that_cannot_work_are_named(change):
    with pytest.raises(ValueError, match="batch_size" if "accumulate" in change else next(iter(change))):
        LoopOptions(**change).check()
