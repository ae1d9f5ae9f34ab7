"""Training losses of GaussianDiffusion."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from convdit.diffusion import GaussianDiffusion
from convdit.diffusion.likelihood import discretized_log_likelihood, normal_kl


def fixed(out):
    """A model that returns `out` whatever it is given."""
    return lambda x, t, **_: out


def test_q_sample_has_the_mean_and_variance_of_its_step():
    d = GaussianDiffusion()
    torch.manual_seed(0)
    t = torch.tensor([0, 300, 999])
    x0 = torch.tensor([2.0, -1.0, 0.5]).view(3, 1, 1, 1).expand(3, 1, 200, 200)
    x = d.q_sample(x0, t, torch.randn(x0.shape))
    level = torch.tensor(d.schedule.alphas_cumprod)[t].float()
    torch.testing.assert_close(x.mean((1, 2, 3)), level.sqrt() * x0[:, 0, 0, 0], rtol=0, atol=0.02)
    torch.testing.assert_close(x.var((1, 2, 3)), 1 - level, rtol=0.03, atol=0)


def test_x0_comes_back_from_its_noise():
    d = GaussianDiffusion(respacing="25")
    x0, noise = torch.randn(2, 25, 3, 4, 4, dtype=torch.float64)
    t = torch.arange(25)
    torch.testing.assert_close(d.predict_x0(d.q_sample(x0, t, noise), t, noise), x0)


def test_model_sees_the_noisy_sample_and_original_timesteps():
    d = GaussianDiffusion(respacing="ddim20")
    seen = {}

    def model(x, t, y):
        seen.update(x=x, t=t, y=y)
        return torch.zeros(3, 4, 2, 2)

    x0, noise, t = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2), torch.tensor([0, 3, 19])
    y = torch.tensor([1, 2, 3])
    losses = d.training_losses(model, x0, t, noise, y=y)
    assert seen["t"].tolist() == [0, 150, 950]
    assert seen["y"] is y
    assert torch.equal(seen["x"], d.q_sample(x0, t, noise))
    torch.testing.assert_close(losses["mse"], (noise**2).mean((1, 2, 3)))
    assert torch.equal(losses["loss"], losses["mse"] + losses["vb"])


def test_perfect_model_has_no_loss_but_that_of_the_first_step():
    d = GaussianDiffusion()
    noise = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    x0 = torch.rand(3, 2, 4, 4, dtype=torch.float64) * 2 - 1
    least = torch.cat([noise, -torch.ones_like(noise)], 1)  # -1 chooses the posterior's variance
    losses = d.training_losses(fixed(least), x0, torch.tensor([1, 500, 999]), noise)
    assert losses["mse"].abs().max() == 0
    assert losses["vb"].abs().max() < 1e-12


def test_variational_term_equals_the_divergence_computed_directly():
    """Both steps as torch.distributions, each mean by multiplying two normals: precisions add."""
    d = GaussianDiffusion(respacing="50")
    s = d.schedule
    t = torch.tensor([1, 20, 49])
    x0, noise, predicted, sigma = torch.randn(4, 3, 2, 4, 4, dtype=torch.float64)
    losses = d.training_losses(fixed(torch.cat([predicted, sigma], 1)), x0, t, noise)
    for i, step in enumerate(t.tolist()):
        alpha, level, before = 1 - s.betas[step], s.alphas_cumprod[step], s.alphas_cumprod[step - 1]
        x = level**0.5 * x0[i] + (1 - level) ** 0.5 * noise[i]

        variance = 1 / (alpha / (1 - alpha) + 1 / (1 - before))
        from_x = alpha**0.5 * x / (1 - alpha)
        mean = variance * (from_x + before**0.5 * x0[i] / (1 - before))
        guess = (x - (1 - level) ** 0.5 * predicted[i]) / level**0.5
        guessed_mean = variance * (from_x + before**0.5 * guess / (1 - before))
        share = (sigma[i] + 1) / 2
        guessed_variance = (1 - alpha) ** share * variance ** (1 - share)
        true = torch.distributions.Normal(mean, variance**0.5)
        ours = torch.distributions.Normal(guessed_mean, guessed_variance**0.5)
        expected = torch.distributions.kl_divergence(true, ours).mean() / math.log(2)
        assert losses["vb"][i].item() == pytest.approx(expected.item(), rel=1e-9)


def test_first_step_is_scored_by_the_likelihood_of_8_bit_values():
    d = GaussianDiffusion()
    x0 = torch.randint(0, 256, (1, 2, 4, 4)).double() / 127.5 - 1
    noise, predicted, sigma = torch.randn(3, 1, 2, 4, 4, dtype=torch.float64)
    t = torch.zeros(1, dtype=torch.long)
    vb = d.training_losses(fixed(torch.cat([predicted, sigma], 1)), x0, t, noise)["vb"]
    x = d.q_sample(x0, t, noise)
    mean = d.predict_x0(x, t, predicted)  # at the first step the posterior's mean is x0 itself
    std = torch.exp(0.5 * d.log_variance(sigma, t, x))
    nats = discretized_log_likelihood(x0, mean, std.log())
    assert vb.item() == pytest.approx(-nats.mean().item() / math.log(2))


def test_masses_of_all_8_bit_values_sum_to_one_and_follow_the_normal():
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in [(0.1, 0.3), (-0.95, 0.05), (1.3, 0.5)]:
        mean, std = torch.tensor(mean).double(), torch.tensor(std).double()
        masses = discretized_log_likelihood(values, mean, std.log()).exp()
        assert masses.sum().item() == pytest.approx(1, abs=1e-9)
        normal = torch.distributions.Normal(mean, std)
        cumulative = normal.cdf(values + 1 / 255)
        # The public code's tanh is within 3e-4 of the normal's distribution function everywhere.
        assert (masses.cumsum(0)[:-1] - cumulative[:-1]).abs().max() < 4e-4


def test_divergence_equals_that_of_torch_distributions():
    a, b, c, e = torch.randn(4, 100, dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(a, torch.exp(b / 2)), normal(c, torch.exp(e / 2)))
    torch.testing.assert_close(normal_kl(a, b, c, e), expected)


def test_variational_term_trains_the_variance_alone():
    d = GaussianDiffusion()
    out = torch.randn(3, 4, 4, 4, requires_grad=True)
    x0, t = torch.randn(3, 2, 4, 4), torch.tensor([0, 5, 700])
    losses = d.training_losses(fixed(out), x0, t)
    (grad,) = torch.autograd.grad(losses["vb"].sum(), out, retain_graph=True)
    assert grad[:, :2].count_nonzero() == 0
    assert (grad[:, 2:] != 0).any(dim=3).any(dim=2).any(dim=1).all()
    (grad,) = torch.autograd.grad(losses["mse"].sum(), out)
    assert grad[:, 2:].count_nonzero() == 0
    assert grad[:, :2].count_nonzero() > 0


def test_without_learned_variance_there_is_no_variational_term():
    d = GaussianDiffusion(learn_sigma=False)
    noise = torch.randn(2, 3, 4, 4)
    losses = d.training_losses(fixed(torch.zeros_like(noise)), noise, torch.tensor([0, 9]), noise)
    assert losses["vb"].count_nonzero() == 0
    torch.testing.assert_close(losses["loss"], (noise**2).mean((1, 2, 3)))


def test_half_precision_losses_are_computed_in_float32():
    d = GaussianDiffusion()
    x0, noise = torch.randn(2, 2, 2, 4, 4).bfloat16()
    out = torch.randn(2, 4, 4, 4).bfloat16()
    t = torch.tensor([0, 800])
    half = d.training_losses(fixed(out), x0, t, noise)
    full = d.training_losses(fixed(out.float()), x0.float(), t, noise.float())
    for name in ("loss", "mse", "vb"):
        assert half[name].dtype == torch.float32
        assert torch.equal(half[name], full[name])


def test_min_snr_weights_the_error_by_the_clipped_ratio_and_is_off_by_default():
    x0, noise = torch.randn(2, 4, 3, 4, 4)
    out, t = torch.randn(4, 6, 4, 4), torch.tensor([0, 100, 400, 999])
    plain = GaussianDiffusion().training_losses(fixed(out), x0, t, noise)
    weighted = GaussianDiffusion(min_snr_gamma=5).training_losses(fixed(out), x0, t, noise)
    level = torch.tensor((1 - GaussianDiffusion().base_betas).cumprod())[t].float()
    snr = level / (1 - level)
    assert (snr > 5).any() and (snr < 5).any()
    expected = plain["mse"] * torch.minimum(snr, torch.tensor(5.0)) / snr + plain["vb"]
    torch.testing.assert_close(weighted["loss"], expected)
    assert torch.equal(weighted["mse"], plain["mse"]) and torch.equal(weighted["vb"], plain["vb"])
    with pytest.raises(ValueError, match="min_snr_gamma: expected None or a number above 0, got 0"):
        GaussianDiffusion(min_snr_gamma=0)


def test_training_looks_at_no_value_and_copies_the_tables_to_the_device_once():
    """On the meta device a look at a value raises; on a GPU it would wait for all work in flight."""

    class Copies(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, op, types, arguments=(), options=None):
            self.seen += op in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
            return op(*arguments, **(options or {}))

    d = GaussianDiffusion(min_snr_gamma=5)
    x0, t = torch.zeros(2, 3, 4, 4, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    out = torch.zeros(2, 6, 4, 4, device="meta")
    with Copies() as first:
        d.training_losses(fixed(out), x0, t)
    with Copies() as second:
        d.training_losses(fixed(out), x0, t)
    assert first.seen > 0 and second.seen == 0


def test_tables_made_while_tracing_or_sampling_serve_a_training_step():
    d = GaussianDiffusion()
    x0, noise, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([3, 700])
    out = torch.randn(2, 6, 4, 4, requires_grad=True)
    with FakeTensorMode():
        d.q_sample(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long), torch.zeros(2, 3, 4, 4))
    with torch.inference_mode():
        d.training_losses(fixed(out), x0, t, noise)
    losses = d.training_losses(fixed(out), x0, t, noise)
    losses["loss"].sum().backward()
    fresh = GaussianDiffusion().training_losses(fixed(out), x0, t, noise)
    assert torch.equal(losses["loss"], fresh["loss"])


X0 = torch.zeros(2, 3, 4, 4)
T = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X0.long(), T), TypeError, "x0: expected a floating dtype"),
        ((X0, T.float()), TypeError, "t: expected whole step indices"),
        ((X0, torch.tensor([0])), ValueError, r"t: expected shape \(N,\) = \(2,\)"),
        ((X0, torch.tensor([0, 50])), ValueError, r"t: expected steps in 0..49, got 0..50"),
        ((X0, torch.tensor([-1, 3])), ValueError, "t: expected steps in 0..49, got -1..3"),
        ((X0, T, X0[:1]), ValueError, "noise: expected shape"),
    ],
)
def test_wrong_training_input_is_named(arguments, error, message):
    d = GaussianDiffusion(respacing="50")
    with pytest.raises(error, match=message):
        d.training_losses(fixed(torch.zeros(2, 6, 4, 4)), *arguments)


@pytest.mark.parametrize(("learn_sigma", "channels"), [(True, 3), (False, 6)])
def test_model_with_the_wrong_number_of_channels_is_named(learn_sigma, channels):
    d = GaussianDiffusion(learn_sigma=learn_sigma)
    with pytest.raises(ValueError, match=rf"model: expected it to return .*learn_sigma={learn_sigma}"):
        d.training_losses(fixed(torch.zeros(2, channels, 4, 4)), X0, T)
