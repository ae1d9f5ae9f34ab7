"""Noise schedules, respacing and the tables of a process."""

import numpy as np
import pytest

from convdit.diffusion import GaussianDiffusion
from convdit.diffusion.schedules import Schedule, betas, respaced_timesteps


def test_ends_of_the_schedules_are_the_published_ones():
    linear = betas("linear", 1000)
    assert (linear[0], linear[-1]) == (1e-4, 0.02)
    assert betas("linear", 100)[[0, -1]] == pytest.approx([1e-3, 0.2])
    latent = betas("scaled_linear", 1000)
    assert latent[[0, -1]] == pytest.approx([0.00085, 0.012])
    cosine = betas("cosine", 1000)
    assert cosine.max() == cosine[-1] == 0.999


def test_cosine_schedule_follows_the_squared_cosine():
    levels = np.cumprod(1 - betas("cosine", 500))
    steps = np.arange(1, 500) / 500
    cosine = np.cos((steps + 0.008) / 1.008 * np.pi / 2) ** 2
    expected = cosine / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert levels[:-1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("linear", "linear"), ("cosine", "squaredcos_cap_v2"), ("scaled_linear", "scaled_linear")],
)
def test_schedules_equal_those_of_diffusers(name, theirs):
    import diffusers

    ends = {"scaled_linear": (0.00085, 0.012)}.get(name, (1e-4, 0.02))
    scheduler = diffusers.DDPMScheduler(1000, *ends, beta_schedule=theirs)
    assert betas(name, 1000) == pytest.approx(scheduler.betas.numpy(), rel=1e-4)


def spread_by_hand(steps, counts):
    """The public rule in slow motion: sections, a running position, rounding to the even."""
    sizes = [steps // len(counts)] * len(counts)
    for i in range(steps % len(counts)):
        sizes[i] += 1
    chosen, first = [], 0
    for size, count in zip(sizes, counts, strict=True):
        position = 0.0
        for _ in range(count):
            chosen.append(first + round(position))
            position += (size - 1) / (count - 1) if count > 1 else 1
        first += size
    return chosen


def test_250_of_1000_are_those_of_the_public_implementation():
    steps = respaced_timesteps(1000, "250")
    assert steps[:8] == [0, 4, 8, 12, 16, 20, 24, 28]
    assert steps[-1] == 999
    assert len(steps) == len(set(steps)) == 250
    assert steps != list(range(0, 1000, 4))  # the stride is 999 / 249: it drifts off multiples of 4


@pytest.mark.parametrize("counts", [[1], [2], [7], [50], [249], [250], [999], [10, 10], [3, 0, 5], [100, 50, 7]])
@pytest.mark.parametrize("steps", [1000, 1001, 999])
def test_respacing_by_sections_follows_the_public_rule(steps, counts):
    kept = respaced_timesteps(steps, ",".join(map(str, counts)))
    assert kept == spread_by_hand(steps, counts)
    assert kept == sorted(set(kept))


def test_other_forms_of_respacing():
    assert respaced_timesteps(1000, "ddim50") == list(range(0, 1000, 20))
    assert respaced_timesteps(1000, "ddim1000") == respaced_timesteps(1000, None) == list(range(1000))
    assert respaced_timesteps(1000, "") == list(range(1000))
    assert respaced_timesteps(1000, 25) == respaced_timesteps(1000, "25")


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        ("1001", "cannot keep 1001 of a section of 1000"),
        ("10,600", "cannot keep 600 of a section of 500"),
        ("-3", "cannot keep -3"),
        ("0", "keeps none"),
        ("ddim300", "no whole stride over 1000 steps gives exactly 300"),
        ("ddim", 'like "250", "10,20,30" or "ddim50", got \'ddim\''),
        ("fast", "got 'fast'"),
        ("10,,20", "got '10,,20'"),
    ],
)
def test_impossible_respacing_is_named(respacing, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(respacing=respacing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "sine"}, "schedule: expected one of .*linear.*cosine.*got 'sine'"),
        ({"steps": 0}, "steps: expected a whole number above 0, got 0"),
        ({"steps": 10.0}, "steps: expected a whole number"),
        ({"steps": 20}, "steps: expected more than 20 for the schedule linear, got 20"),
    ],
)
def test_impossible_schedule_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(**options)


def test_respaced_process_is_as_noisy_as_the_full_one_at_the_kept_steps():
    full, short = GaussianDiffusion().schedule, GaussianDiffusion(respacing="10,3,60").schedule
    assert short.alphas_cumprod == pytest.approx(full.alphas_cumprod[short.timesteps], rel=1e-12)
    assert full.betas == pytest.approx(betas("linear", 1000), rel=1e-9)


def test_posterior_is_the_product_of_the_two_normals_that_make_it():
    # q(x_{t-1} | x_t, x0) is q(x_t | x_{t-1}) q(x_{t-1} | x0) as a function of x_{t-1}: precisions add.
    s = Schedule(betas("linear", 300), list(range(0, 300, 3)))
    alpha, before = 1 - s.betas[1:], s.alphas_cumprod[:-1]
    precision = alpha / s.betas[1:] + 1 / (1 - before)
    assert s.posterior_variance[1:] == pytest.approx(1 / precision, rel=1e-9)
    assert s.posterior_xt[1:] == pytest.approx(alpha**0.5 / s.betas[1:] / precision, rel=1e-9)
    assert s.posterior_x0[1:] == pytest.approx(before**0.5 / (1 - before) / precision, rel=1e-9)


def test_first_step_of_the_posterior_is_certain_and_its_logarithm_borrowed():
    s = GaussianDiffusion().schedule
    assert s.posterior_variance[0] == 0
    assert (s.posterior_x0[0], s.posterior_xt[0]) == pytest.approx((1, 0))
    assert s.posterior_log_variance[0] == s.posterior_log_variance[1]
    assert s.posterior_log_variance[1:] == pytest.approx(np.log(s.posterior_variance[1:]))
    assert s.posterior_variance[-1] == pytest.approx(s.betas[-1], rel=1e-4)
