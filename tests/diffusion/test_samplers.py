"""DDPM, DDIM, its inverse, and schedulers of diffusers, on toy models whose answer is known."""

import diffusers
import pytest
import torch

from convdit.diffusion import GaussianDiffusion
from tests.diffusion.common import PICTURE, seeded
from tests.models.test_dit import small, text, text_model


class Toy:
    """The exact noise predictor of data drawn from N(mean, std^2), pixel by pixel.

    With x = sqrt(a) x0 + sqrt(1 - a) noise the expectation of the noise, given x, is linear in x.
    std 0 makes the data a single picture, which every sampler must find.
    """

    def __init__(self, d, mean=0.0, std=0.0, sigma=0.0):
        self.levels = torch.tensor((1 - d.base_betas).cumprod())
        self.mean, self.std, self.sigma = mean, std, sigma
        self.learn_sigma = d.learn_sigma

    def __call__(self, x, t):
        level = self.levels[t.long()].view(-1, 1, 1, 1)
        noise = (1 - level).sqrt() * (x - level.sqrt() * self.mean)
        noise = (noise / (level * self.std**2 + 1 - level)).to(x.dtype)
        return torch.cat([noise, torch.full_like(noise, self.sigma)], 1) if self.learn_sigma else noise


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "scaled_linear"])
def test_perfect_model_leads_every_sampler_to_the_picture(learn_sigma, sampler, eta, schedule):
    d = GaussianDiffusion(schedule=schedule, respacing="20", learn_sigma=learn_sigma)
    x = d.sample(Toy(d, PICTURE), (2, 3, 4, 4), sampler, eta=eta, generator=seeded())
    torch.testing.assert_close(x, PICTURE.expand(2, 3, 4, 4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_samples_have_the_mean_and_spread_of_the_data(eta):
    d = GaussianDiffusion(respacing="250")
    toy = Toy(d, mean=0.4, std=0.25)
    x = d.sample(toy, (1, 1, 100, 100), "ddim", eta=eta, generator=seeded())
    assert x.mean().item() == pytest.approx(0.4, abs=0.01)
    assert x.std().item() == pytest.approx(0.25, rel=0.03)


def test_ddpm_with_the_exact_variance_has_the_spread_of_the_data_in_ten_steps():
    # For normal data the backward step is exactly normal, however long it is.
    d = GaussianDiffusion(respacing="10")
    s, toy = d.schedule, Toy(d, mean=0.4, std=0.25)
    level = torch.tensor(s.alphas_cumprod)
    unknown = 0.25**2 * (1 - level) / (0.25**2 * level + 1 - level)  # variance of x0, given x
    variance = torch.tensor(s.posterior_variance) + torch.tensor(s.posterior_x0) ** 2 * unknown
    low, high = torch.tensor(s.posterior_log_variance), torch.tensor(s.betas).log()
    share = (variance.log() - low) / (high - low)

    def model(x, t):
        noise = toy(x, t)[:, :1]
        at = d.timesteps.index(t[0].item())
        return torch.cat([noise, torch.full_like(noise, 2 * share[at] - 1)], 1)

    x = d.sample(model, (1, 1, 200, 200), generator=seeded())
    assert x.mean().item() == pytest.approx(0.4, abs=0.01)
    # The last step adds no noise: what it leaves unknown is missing from the spread.
    assert x.var().item() == pytest.approx(0.25**2 - unknown[0].item(), rel=0.02)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)])
def test_same_generator_state_gives_the_same_bits(sampler, eta):
    d = GaussianDiffusion(respacing="10")
    model = small(input_size=4, in_channels=3)
    y = torch.tensor([1, 2])
    run = lambda seed: d.sample(model, (2, 3, 4, 4), sampler, eta, generator=seeded(seed), y=y)  # noqa: E731
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_ddim_without_eta_depends_on_the_starting_noise_alone():
    d = GaussianDiffusion(respacing="10")
    toy, noise = Toy(d, std=0.5), torch.randn(2, 3, 4, 4)
    a = d.sample(toy, noise.shape, "ddim", noise=noise, generator=seeded(1))
    b = d.sample(toy, noise.shape, "ddim", noise=noise, generator=seeded(2))
    assert torch.equal(a, b)


def test_inverse_leads_back_to_the_picture():
    d = GaussianDiffusion(respacing="50")
    model = small(input_size=4, in_channels=3).double()
    x0, y = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([1, 2])
    misses = []
    for refinements in (0, 1, 2, 60):
        noise = d.invert(model, x0, refinements=refinements, y=y)
        back = d.sample(model, x0.shape, "ddim", noise=noise, y=y)
        misses.append((back - x0).abs().mean().item())
    assert misses[0] > misses[1] > misses[2] > misses[3]
    assert misses[3] < 1e-9
    assert torch.equal(d.invert(model, x0, y=y), d.invert(model, x0, refinements=1, y=y))


def test_inverse_asks_for_the_noise_at_the_end_it_stands_at_then_at_the_end_it_came_to():
    d = GaussianDiffusion(respacing="ddim4")
    asked = []

    def model(x, t):
        asked.append(t[0].item())
        return torch.cat([x, x], 1)

    d.invert(model, torch.zeros(1, 1, 2, 2), refinements=0)
    assert asked == [0, 0, 250, 500]
    asked.clear()
    d.invert(model, torch.zeros(1, 1, 2, 2), refinements=1)
    assert asked == [0, 0, 0, 250, 250, 500, 500, 750]


def test_inverse_of_samples_is_the_noise_they_came_from():
    d = GaussianDiffusion(respacing="250")
    toy, noise = Toy(d, mean=0.2, std=0.5), torch.randn(2, 3, 4, 4, generator=seeded())
    x0 = d.sample(toy, noise.shape, "ddim", noise=noise)
    torch.testing.assert_close(d.invert(toy, x0), noise, rtol=0, atol=0.01)


def linear_scheduler(name, **options):
    import diffusers

    ends = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    return getattr(diffusers, name)(**ends | options)


def test_ddim_equals_the_ddim_of_diffusers():
    d = GaussianDiffusion(respacing="ddim20")  # 0, 50, 100 ...: what diffusers calls leading
    toy, noise = Toy(d, mean=0.2, std=0.5), torch.randn(2, 3, 4, 4)
    theirs = linear_scheduler("DDIMScheduler", clip_sample=False)
    for eta in (0.0, 0.8):
        a = d.sample(toy, noise.shape, "ddim", eta, noise=noise, generator=seeded())
        b = d.sample(toy, noise.shape, theirs, eta, noise=noise, generator=seeded())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_ddpm_equals_the_ddpm_of_diffusers():
    d = GaussianDiffusion(respacing="ddim20")
    toy, noise = Toy(d, mean=0.2, std=0.5, sigma=0.3), torch.randn(2, 3, 4, 4)
    theirs = linear_scheduler("DDPMScheduler", clip_sample=False, variance_type="learned_range")
    a = d.sample(toy, noise.shape, "ddpm", noise=noise, generator=seeded())
    b = d.sample(toy, noise.shape, theirs, noise=noise, generator=seeded())
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",  # DPM-Solver++, by default
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_scheduler_of_diffusers_leads_to_the_picture(name):
    d = GaussianDiffusion(respacing="20")
    toy = Toy(d, PICTURE)

    def model(x, t):  # some schedulers ask for fractional timesteps
        return toy(x, t.round().clamp(0, 999))

    scheduler = linear_scheduler(name)
    x = d.sample(model, (2, 3, 4, 4), scheduler, generator=seeded())
    torch.testing.assert_close(x, PICTURE.expand(2, 3, 4, 4), rtol=0, atol=0.05)
    assert torch.equal(d.sample(model, (2, 3, 4, 4), scheduler, generator=seeded()), x)


def test_clipping_keeps_the_estimate_between_the_darkest_and_the_brightest():
    d = GaussianDiffusion(respacing="20")
    toy = Toy(d, 3 * PICTURE)
    for sampler in ("ddpm", "ddim"):
        x = d.sample(toy, (1, 3, 4, 4), sampler, clip_denoised=True, generator=seeded())
        assert x.abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_guided_samples_run_through_the_cache_and_equal_those_without(sampler, monkeypatch):
    d = GaussianDiffusion(respacing="5")
    model = small(input_size=4, in_channels=3)
    for parameter in model.parameters():  # tame: what a step gets wrong would grow with every further one
        parameter.data.mul_(0.5)
    noise, y = torch.randn(2, 3, 4, 4), torch.tensor([1, 2])
    options = {"noise": noise, "y": y, "cfg_scale": 1.5, "channels": "all"}

    def sample(cache):
        kind = sampler
        if sampler[0].isupper():
            kind = linear_scheduler(sampler)
        forward, generator = model.forward_with_cfg, seeded()
        return d.sample(forward, noise.shape, kind, generator=generator, cache_modulation=cache, **options)

    plain = sample(False)
    with monkeypatch.context() as patch:  # the blocks' own products must not run
        patch.setattr(type(model.blocks[0]), "modulation", lambda *_: pytest.fail("not from the cache"))
        cached = sample(True)
        with pytest.raises(pytest.fail.Exception, match="not from the cache"):
            sample(False)
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
    assert model._cache is None


def test_samples_of_a_text_are_guided_and_look_at_no_masked_token():
    d = GaussianDiffusion(respacing="5")
    model = text_model(input_size=4, in_channels=3)
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    y, mask = text(model, n=2)
    other = torch.where(mask[..., None], y, torch.randn_like(y))
    noise = torch.randn(2, 3, 4, 4)

    def sample(y, scale):
        guided = {"cfg_scale": scale, "channels": "all"}
        return d.sample(model.forward_with_cfg, noise.shape, "ddim", noise=noise, y=y, y_mask=mask, **guided)

    plain = d.sample(model, noise.shape, "ddim", noise=noise, y=y, y_mask=mask)
    close = {"rtol": 1e-4, "atol": 1e-4 * plain.abs().max().item()}
    torch.testing.assert_close(sample(y, 1.0), plain, **close)
    assert torch.equal(sample(y, 3.0), sample(other, 3.0))
    assert not torch.allclose(sample(y, 3.0), plain, rtol=1e-2, atol=1e-2)


def test_a_cache_is_refused_where_the_model_has_none():
    d = GaussianDiffusion(respacing="2")
    with pytest.raises(TypeError, match="cache_modulation: expected a model that has it, .* got Toy"):
        d.sample(Toy(d, PICTURE), (1, 3, 4, 4), "ddim", cache_modulation=True)


def test_samples_carry_no_graph_and_take_the_dtype_of_the_noise():
    d = GaussianDiffusion(respacing="3")
    model = small(input_size=4, in_channels=3)
    for dtype, expected in [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]:
        noise = torch.randn(1, 3, 4, 4).to(dtype)
        x = d.sample(model, noise.shape, noise=noise, y=torch.tensor([1]))
        assert x.dtype == expected
        assert not x.requires_grad


def test_progress_bar_can_be_asked_for(capsys):
    d = GaussianDiffusion(respacing="3")
    d.sample(Toy(d), (1, 1, 2, 2), progress=True)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, 'sampler: expected "ddpm", "ddim" or a diffusers scheduler, got .euler.'),
        ({"sampler": None}, "sampler: expected"),
        ({"sampler": "ddpm", "eta": 0.5}, 'eta: expected 0 for the sampler "ddpm", got 0.5'),
        ({"sampler": "ddim", "eta": -0.1}, "eta: expected a number in 0..1, got -0.1"),
        ({"noise": torch.zeros(1, 3, 4, 5)}, r"noise: expected shape \(1, 3, 4, 4\)"),
    ],
)
def test_wrong_request_is_named(options, message):
    d = GaussianDiffusion(respacing="3")
    with pytest.raises(ValueError, match=message):
        d.sample(Toy(d), (1, 3, 4, 4), **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DDIMScheduler", {"beta_schedule": "scaled_linear"}, "another noise schedule"),
        ("DDIMScheduler", {"num_train_timesteps": 500}, "another noise schedule"),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}, "prediction_type 'epsilon', got 'v_pred"),
        ("DDIMInverseScheduler", {}, "from noise to data"),
        ("EDMEulerScheduler", None, "with alphas_cumprod"),
        ("FlowMatchEulerDiscreteScheduler", None, "prediction_type 'epsilon', got None"),
    ],
)
def test_scheduler_that_does_not_fit_is_named(name, options, message):
    d = GaussianDiffusion(respacing="3")
    if options is None:  # one that knows no betas
        scheduler = getattr(diffusers, name)()
    else:
        scheduler = linear_scheduler(name, **options)
    with pytest.raises(ValueError, match=message):
        d.sample(Toy(d), (1, 3, 4, 4), scheduler)
