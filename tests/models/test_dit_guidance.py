"""Classifier-free guidance and the modulation cache of DiT."""

import pytest
import torch

from .test_dit import inputs, small


def test_guidance_moves_from_null_through_conditional_on_the_chosen_channels():
    model = small()
    x, t, y = inputs(model)
    conditional, null = model(x, t, y), model(x, t, torch.full_like(y, 7))
    expected = conditional.clone()
    expected[:, :3] = null[:, :3] + 4 * (conditional - null)[:, :3]
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, 4.0), expected, **close)
    expected[:, :5] = null[:, :5] + 4 * (conditional - null)[:, :5]
    guided = model.forward_with_cfg(x, t, y, 4.0, channels="all")
    torch.testing.assert_close(guided, expected, **close)
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, 1.0), conditional, **close)


@pytest.mark.parametrize("channels", ["first3", "all"])
def test_public_form_of_guidance_holds_the_batch_twice(channels):
    model = small()
    x, t, y = inputs(model)
    plain = model.forward_with_cfg(x, t, y, 3.0, channels)
    twice_y = torch.cat([y, torch.full_like(y, 7)])
    twice_x = torch.cat([x, torch.full_like(x, float("nan"))])  # the second half is not read
    twice = model.forward_with_cfg(twice_x, torch.cat([t, t]), twice_y, 3.0, channels)
    guided = 5 if channels == "all" else 3
    assert torch.equal(twice[:3], plain)
    assert torch.equal(twice[3:, :guided], plain[:, :guided])
    null = model(x, t, twice_y[3:])
    torch.testing.assert_close(twice[3:, guided:], null[:, guided:], rtol=1e-4, atol=1e-5)


def test_first3_of_fewer_channels_leaves_the_variance_alone():
    model = small(in_channels=1)
    x, t, y = inputs(model)
    guided = model.forward_with_cfg(x, t, y, 3.0)
    torch.testing.assert_close(guided[:, 1:], model(x, t, y)[:, 1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(guided[:, :1], model(x, t, y)[:, :1])


def test_unknown_channels_are_named():
    model = small()
    with pytest.raises(ValueError, match='"first3" or "all", got \'first4\''):
        model.forward_with_cfg(*inputs(model), 2.0, channels="first4")


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln"])
def test_cached_modulation_gives_the_same_output_to_rounding(conditioning):
    model = small(conditioning=conditioning)
    x, t, y = inputs(model)
    expected, guided = model(x, t, y), model.forward_with_cfg(x, t, y, 2.0)
    calls = []
    model.blocks[1].adaLN_modulation.register_forward_hook(lambda *_: calls.append(1))
    with model.cache_modulation([0, 3, 500, 999], y, guidance=True):
        torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-5)
        again = model.forward_with_cfg(x, t, y, 2.0)
        torch.testing.assert_close(again, guided, rtol=1e-4, atol=1e-5)
        assert len(calls) == 1, "the adaLN ran once, for the whole table"
    assert torch.equal(model(x, t, y), expected)
    assert len(calls) == 2


def test_cache_states_its_memory():
    model = small(depth=2)
    with model.cache_modulation(range(10), torch.tensor([1, 4, 1]), guidance=True) as cache:
        assert cache.nbytes == 10 * 3 * (6 * 2 + 2) * 24 * 4


def test_uncached_timestep_or_label_raises_and_is_named():
    model = small()
    x, t, y = inputs(model)
    with model.cache_modulation(t, y):
        with pytest.raises(ValueError, match="timestep 501 is not in the modulation cache"):
            model(x, torch.tensor([3, 501, 0]), y)
        with pytest.raises(ValueError, match="label 5 is not in the modulation cache"):
            model(x, t, torch.tensor([1, 5, 7]))
        with pytest.raises(TypeError, match="labels"):
            model(x, t, torch.zeros(3, 24))
    with model.cache_modulation(t, y[:1]):
        with pytest.raises(ValueError, match="label 7 is not"):
            model.forward_with_cfg(x[:1], t[:1], y[:1], 2.0)
    model(x, torch.tensor([3, 501, 0]), y)


def test_cache_is_left_behind_when_the_body_fails():
    model = small()
    x, t, y = inputs(model)
    with pytest.raises(RuntimeError, match="stop"), model.cache_modulation([5], y):
        raise RuntimeError("stop")
    model(x, t, y)


def test_cache_drops_no_label_in_training_mode():
    model = small(class_dropout_prob=1.0)
    x, t, y = inputs(model)
    expected = model(x, t, y)
    with model.train().cache_modulation(t, y):
        torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-5)


def test_cache_serves_an_unconditional_model():
    model = small(num_classes=0)
    x, t, _ = inputs(model)
    expected = model(x, t)
    with model.cache_modulation(t):
        torch.testing.assert_close(model(x, t), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({"conditioning": "in_context"}, ([1], torch.tensor([1])), ValueError, "in_context"),
        ({}, ([], torch.tensor([1])), ValueError, "timesteps"),
        ({}, ([1], torch.zeros(2, 23)), ValueError, r"embeddings of shape \(2, 24\)"),
        ({}, ([1], torch.tensor([9])), ValueError, "y: expected labels in 0..7"),
        ({}, ([1], None), ValueError, "y: expected labels .* got None"),
        ({}, ([1], None, True), ValueError, "guidance=True"),
        ({"class_dropout_prob": 0.0}, ([1], torch.tensor([1]), True), ValueError, "null class"),
    ],
)
def test_wrong_cache_request_is_named(options, arguments, error, message):
    with pytest.raises(error, match=message), small(**options).cache_modulation(*arguments):
        raise AssertionError("must not be entered")
