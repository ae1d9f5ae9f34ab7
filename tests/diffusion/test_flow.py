"""Rectified flow on models whose answer is known, and on a DiT."""

import diffusers
import pytest
import torch

from convdit.diffusion import RectifiedFlow
from tests.diffusion.common import PICTURE, seeded
from tests.models.test_dit import small


def to_the_picture(x, t):
    """The exact velocity where all data are one picture: straight at it."""
    return (PICTURE - x) / (1 - t.view(-1, 1, 1, 1)).clamp(min=1e-6)


def of_normal_data(mean, std):
    """The expected velocity, given x, of data drawn from N(mean, std^2): linear in x."""

    def model(x, t):
        t = t.view(-1, 1, 1, 1).to(x.dtype)
        slope = (t * std**2 - (1 - t)) / (t**2 * std**2 + (1 - t) ** 2)
        return mean + slope * (x - t * mean)

    return model


def test_the_model_is_trained_on_the_velocity_from_noise_to_data():
    seen = {}

    def model(x, t, y):
        seen.update(x=x, t=t, y=y)
        return torch.cat([x, torch.full_like(x, torch.nan)], 1)  # SiT does not use the variance

    data, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.25, 1.0])
    losses = RectifiedFlow().training_losses(model, data, t, noise, y="label")
    share = t.view(3, 1, 1, 1)
    torch.testing.assert_close(seen["x"], share * data + (1 - share) * noise)
    assert torch.equal(seen["t"], t) and seen["y"] == "label"
    expected = (seen["x"] - (data - noise)).square().mean((1, 2, 3))
    torch.testing.assert_close(losses["loss"], expected)
    assert torch.equal(losses["mse"], losses["loss"])


def test_training_finds_the_velocity_of_normal_data():
    """The best affine model in x at one time is the exact velocity there."""
    flow, time = RectifiedFlow(), 0.6
    data, noise = 0.4 + 0.25 * torch.randn(1, 1, 400, 400), torch.randn(1, 1, 400, 400)
    best = of_normal_data(0.4, 0.25)
    t = torch.full((1,), time)
    least = flow.training_losses(best, data, t, noise)["loss"]
    for change in (lambda v, x: v + 0.05, lambda v, x: v - 0.05, lambda v, x: v + 0.05 * x, lambda v, x: v - 0.05 * x):
        other = flow.training_losses(lambda x, t, change=change: change(best(x, t), x), data, t, noise)["loss"]
        assert other > least


def test_euler_goes_straight_to_the_picture():
    x = RectifiedFlow(steps=1).sample(to_the_picture, (2, 3, 4, 4), generator=seeded())
    torch.testing.assert_close(x, PICTURE.expand(2, 3, 4, 4), rtol=0, atol=1e-5)


def test_samples_have_the_mean_and_spread_of_the_data_and_heun_is_of_second_order():
    model = of_normal_data(0.4, 0.25)
    noise = torch.randn(1, 1, 100, 100, dtype=torch.float64, generator=seeded())
    exact = 0.4 + 0.25 * noise  # the flow of normal data keeps each point's place in the distribution

    def miss(sampler, steps):
        return (RectifiedFlow(steps).sample(model, noise.shape, sampler, noise=noise) - exact).abs().mean().item()

    assert miss("euler", 200) < 0.01
    assert 1.8 < miss("euler", 100) / miss("euler", 200) < 2.2
    assert 3.5 < miss("heun", 100) / miss("heun", 200) < 4.5


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_matching_schedulers_of_diffusers_follow_the_same_flow(name):
    scheduler = getattr(diffusers, name)()
    noise = torch.randn(1, 1, 20, 20, generator=seeded())
    x = RectifiedFlow(100).sample(of_normal_data(0.4, 0.25), noise.shape, scheduler, noise=noise)
    torch.testing.assert_close(x, 0.4 + 0.25 * noise, rtol=0, atol=0.03)


def test_dpm_solver_of_flows_leads_to_the_picture():
    solver = diffusers.DPMSolverMultistepScheduler
    scheduler = solver(prediction_type="flow_prediction", use_flow_sigmas=True)
    x = RectifiedFlow(20).sample(to_the_picture, (2, 3, 4, 4), scheduler, generator=seeded())
    torch.testing.assert_close(x, PICTURE.expand(2, 3, 4, 4), rtol=0, atol=0.02)


@pytest.mark.parametrize("sampler", ["euler", "heun", "FlowMatchEulerDiscreteScheduler"])
def test_guided_samples_of_a_dit_repeat_their_bits_and_run_through_the_cache(sampler, monkeypatch):
    flow, model = RectifiedFlow(steps=5), small(input_size=4, in_channels=3)
    y = torch.tensor([1, 2])

    def run(seed, cache=False):
        kind = getattr(diffusers, sampler)() if sampler[0].isupper() else sampler
        options = {"y": y, "cfg_scale": 1.5, "channels": "all", "generator": seeded(seed)}
        return flow.sample(model.forward_with_cfg, (2, 3, 4, 4), kind, cache_modulation=cache, **options)

    plain = run(0)
    assert torch.equal(run(0), plain) and not torch.equal(run(1), plain)
    monkeypatch.setattr(type(model.blocks[0]), "modulation", lambda *_: pytest.fail("not from the cache"))
    torch.testing.assert_close(run(0, cache=True), plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())


def test_drawn_times_fill_the_unit_interval_and_half_precision_is_computed_in_float32():
    flow = RectifiedFlow()
    t = flow.draw_timesteps(1000, generator=seeded())
    assert 0 <= t.min() < 0.01 and 0.99 < t.max() <= 1 and t.mean() == pytest.approx(0.5, abs=0.03)
    data, noise = torch.randn(2, 4, 2, 4, 4).bfloat16()
    half = flow.training_losses(lambda x, t: x.bfloat16(), data, t[:4], noise)["loss"]
    assert half.dtype == torch.float32


X, T = torch.zeros(2, 3, 4, 4), torch.tensor([0.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.long(), T), TypeError, "data: expected a floating dtype"),
        ((X, T.long()), TypeError, r"t: expected times in \[0, 1\], got torch.int64"),
        ((X, T[:1]), ValueError, r"t: expected shape \(N,\) = \(2,\)"),
        ((X, 2 * T), ValueError, r"t: expected times in \[0, 1\], got 0..2"),
        ((X, T, X[:1]), ValueError, r"noise: expected shape \(2, 3, 4, 4\) like data"),
    ],
)
def test_wrong_training_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        RectifiedFlow().training_losses(lambda x, t: x, *arguments)


def test_wrong_requests_are_named():
    flow = RectifiedFlow(3)
    with pytest.raises(ValueError, match="steps: .*at least 1, got 0"):
        RectifiedFlow(0)
    with pytest.raises(ValueError, match="model: expected it to return .* twice as many channels"):
        flow.training_losses(lambda x, t: x[:, :1], X, T)
    with pytest.raises(ValueError, match='sampler: expected "euler", "heun" or a diffusers scheduler, got .ddim.'):
        flow.sample(to_the_picture, (2, 3, 4, 4), "ddim")
    scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="expected a flow-matching scheduler, got DDIMScheduler"):
        flow.sample(to_the_picture, (2, 3, 4, 4), scheduler)
