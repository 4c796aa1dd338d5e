"""The objective: times, shift, noise levels, weights and losses, each against its formula or diffusers."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from hypothesis import given
from hypothesis import strategies as st

from stgen.ddpm import add_noise, ddpm_snr, predicted_clean, step_variances, v_target, variational_bound
from stgen.flow import (
    dynamic_shift,
    flow_snr,
    interpolant,
    logit_normal_time,
    masked_mse,
    min_snr_weight,
    mode_time,
    shift_time,
    uniform_time,
    velocity,
)
from stgen.objective import FlowConfig, denoising_losses, make_scheduler


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, noise = torch.randn(2, *shape, generator=seeded(seed))
    return x, noise


def test_the_scheduler_walks_our_interpolant() -> None:
    """With the true velocity, diffusers' Euler steps go from the noise to the data along x_t."""
    x, noise = pair(1, 4, 3, 5, 5)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    sample = noise
    for t in scheduler.timesteps:
        torch.testing.assert_close(sample, interpolant(x, noise, t[None] / 1000), atol=1e-5, rtol=1e-5)
        sample = scheduler.step(velocity(x, noise), t, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, x, atol=1e-5, rtol=1e-5)


# --- Times --------------------------------------------------------------------------------------------------------


def test_times_follow_their_distribution() -> None:
    n = 20000
    time = logit_normal_time(n, 0.3, 0.7, seeded())
    assert torch.logit(time).mean() == pytest.approx(0.3, abs=0.02)
    assert torch.logit(time).std() == pytest.approx(0.7, abs=0.02)
    uniform = uniform_time(n, seeded())
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert uniform.var() == pytest.approx(1 / 12, abs=0.002)
    shifted = shift_time(uniform, 3.0)
    assert shifted.median() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=0.01)
    # The mode distribution puts more and more in the middle half as its scale grows, and half of all at 0.
    middle = [((t := mode_time(n, s, seeded())) - 0.5).abs().lt(0.25).float().mean() for s in (-1, 0, 0.8, 1.75)]
    assert middle == sorted(middle)
    assert middle[1] == pytest.approx(0.5, abs=0.01)
    assert 0 <= t.min() <= t.max() <= 1


def test_times_are_those_of_diffusers() -> None:
    for i in range(20):
        ours = logit_normal_time(1, 0.8, 1.2, seeded(i)), mode_time(1, 1.29, seeded(i)), uniform_time(1, seeded(i))
        theirs = [
            compute_density_for_timestep_sampling(name, 1, 0.8, 1.2, 1.29, generator=seeded(i))
            for name in ("logit_normal", "mode", "uniform")
        ]
        torch.testing.assert_close(list(ours), theirs)


def test_the_configuration_draws_from_its_distribution() -> None:
    def draw(**arguments: Any) -> torch.Tensor:
        config = FlowConfig(**arguments)
        time = torch.cat([config.draw_time(seeded(i)) for i in range(50)])
        return config.shifted(time, 256, 256, 4)

    each = [torch.cat([f(1, seeded(i)) for i in range(50)]) for f in (uniform_time, lambda n, g: mode_time(n, 0.5, g))]
    assert torch.equal(draw(distribution="uniform"), each[0])
    assert torch.equal(draw(distribution="mode", mode_scale=0.5), each[1])
    # At 256 x 256 and 4 latent frames, r = (1 / 2) 2 = 1; at four times the frames it is 2.
    torch.testing.assert_close(draw(dynamic_shift=True), draw())
    longer = FlowConfig(dynamic_shift=True).shifted(draw(), 256, 256, 16)
    torch.testing.assert_close(longer, draw(shift=2.0))


sizes = st.integers(1, 2048)
frames = st.integers(1, 200)


@given(height=sizes, width=sizes, latent_frames=frames, time=st.floats(1e-3, 0.999))
def test_the_shift_never_collapses_and_grows_with_the_clip(
    height: int, width: int, latent_frames: int, time: float
) -> None:
    r = dynamic_shift(height, width, latent_frames)
    assert r == pytest.approx(math.sqrt(height * width * latent_frames) / 512)
    shifted = shift_time(torch.tensor(time, dtype=torch.float64), r)
    assert 0 < shifted < 1
    assert (shifted > time) == (r > 1) or r == pytest.approx(1)
    clip = (height, width, latent_frames)
    for i in range(3):
        assert dynamic_shift(*(size + (i == j) for j, size in enumerate(clip))) > r
    # It is diffusers' linear time shift with mu = r.
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    assert shifted == pytest.approx(scheduler.time_shift(r, 1.0, time))


@given(low=st.floats(0, 1), high=st.floats(0, 1), shift=st.floats(0.01, 100))
def test_the_shift_is_monotone_in_time_and_keeps_its_ends(low: float, high: float, shift: float) -> None:
    times = shift_time(torch.tensor([0.0, *sorted((low, high)), 1.0], dtype=torch.float64), shift)
    assert times[0] == 0
    assert times[3] == pytest.approx(1)
    assert (times.diff() >= -1e-12).all()


def test_short_clips_keep_their_times() -> None:
    """Open-Sora's T = frames // 17 * 5 is 0 below 17 frames, and sends every time to 0."""
    for latent_frames in range(1, 6):
        assert shift_time(torch.tensor(0.5), dynamic_shift(512, 512, latent_frames)) >= 0.5 - 1e-6
    assert dynamic_shift(512, 512, 1) == 1
    with pytest.raises(ValueError, match="latent_frames is 0, allowed: 1 or more"):
        dynamic_shift(512, 512, 0)


# --- Noise levels of the discrete objectives ----------------------------------------------------------------------

DISCRETE = [
    FlowConfig(objective="epsilon"),
    FlowConfig(objective="v_prediction"),
    FlowConfig(objective="v_prediction", zero_terminal_snr=True),
]


@pytest.mark.parametrize("config", DISCRETE)
def test_noise_and_targets_are_those_of_diffusers(config: FlowConfig) -> None:
    x, noise = pair(5, 4, 3, 5, 5)
    k = torch.tensor([0, 1, 500, 998, 999])
    scheduler = DDPMScheduler.from_config(make_scheduler(config).config)
    alpha_bar = scheduler.alphas_cumprod[k]
    noisy = add_noise(x, noise, alpha_bar)
    torch.testing.assert_close(noisy, scheduler.add_noise(x, noise, k))
    v = v_target(x, noise, alpha_bar)
    torch.testing.assert_close(v, scheduler.get_velocity(x, noise, k))
    torch.testing.assert_close(predicted_clean("v_prediction", noisy, v, alpha_bar), x, atol=1e-5, rtol=1e-5)
    if not config.zero_terminal_snr:
        torch.testing.assert_close(predicted_clean("epsilon", noisy, noise, alpha_bar), x, atol=1e-3, rtol=1e-3)


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    alphas_cumprod = make_scheduler(DISCRETE[2]).alphas_cumprod
    x, noise = pair(1, 4, 1, 2, 2)
    last = alphas_cumprod[-1:]
    assert last == 0
    assert ddpm_snr(last) == 0
    assert torch.equal(add_noise(x, noise, last), noise)
    assert torch.equal(v_target(x, noise, last), -x)
    before = make_scheduler(DISCRETE[1]).alphas_cumprod
    assert before[-1] > 0  # which the usual betas don't
    assert alphas_cumprod[0] == pytest.approx(before[0].item())


def test_schedulers_fit_their_objective() -> None:
    flow = make_scheduler(FlowConfig(shift=2.5))
    assert isinstance(flow, FlowMatchEulerDiscreteScheduler)
    assert (flow.config.shift, flow.config.use_dynamic_shifting) == (2.5, False)
    dynamic = make_scheduler(FlowConfig(dynamic_shift=True))
    assert (dynamic.config.use_dynamic_shifting, dynamic.config.time_shift_type) == (True, "linear")
    for config in DISCRETE:
        scheduler = make_scheduler(config)
        assert isinstance(scheduler, DDIMScheduler)
        assert scheduler.config.prediction_type == config.objective
        assert scheduler.config.rescale_betas_zero_snr == config.zero_terminal_snr
        scheduler.set_timesteps(7)
        assert scheduler.timesteps[0] == 999
        betas = torch.linspace(1e-4, 0.02, 1000)
        assert config.zero_terminal_snr or torch.equal(scheduler.betas, betas)


# --- Weights and losses -------------------------------------------------------------------------------------------


def test_min_snr_weights_by_hand() -> None:
    snr = torch.tensor([0.0, 1.0, 4.0, 9.0, math.inf])
    torch.testing.assert_close(min_snr_weight("epsilon", snr, 5.0), torch.tensor([1, 1, 1, 5 / 9, 0]))
    torch.testing.assert_close(min_snr_weight("v_prediction", snr[:4], 5.0), torch.tensor([0, 1 / 2, 4 / 5, 5 / 10]))
    torch.testing.assert_close(min_snr_weight("flow", snr, 5.0), torch.tensor([0, 1 / 4, 4 / 9, 5 / 16, 0]))


@given(time=st.floats(0.01, 0.99), alpha=st.floats(0.01, 0.99), gamma=st.floats(0.1, 20))
def test_min_snr_weighs_the_error_of_the_data_alike(time: float, alpha: float, gamma: float) -> None:
    """Whatever is predicted, the weighted error is min(SNR, gamma) times the error of the clean latents it stands for."""
    x, noise, wrong = torch.randn(3, 1, 2, 1, 2, 2, generator=seeded(), dtype=torch.float64)
    t, alpha_bar = (torch.tensor([value], dtype=torch.float64) for value in (time, alpha))
    cases = {
        "flow": (flow_snr(t), velocity(x, noise), interpolant(x, noise, t) - time * wrong),
        "epsilon": (ddpm_snr(alpha_bar), noise, None),
        "v_prediction": (ddpm_snr(alpha_bar), v_target(x, noise, alpha_bar), None),
    }
    for objective, (snr, target, clean) in cases.items():
        if clean is None:
            clean = predicted_clean(objective, add_noise(x, noise, alpha_bar), wrong, alpha_bar)
        weighted = min_snr_weight(objective, snr, gamma) * (wrong - target).square().mean()
        torch.testing.assert_close(weighted, snr.clamp(max=gamma) * (clean - x).square().mean())


def test_the_loss_counts_generated_cells_and_clips_alike() -> None:
    prediction, target = torch.zeros(2, 4, 2, 2, 2), torch.ones(2, 4, 2, 2, 2)
    generated = torch.zeros(2, 1, 2, 2, 2, dtype=torch.bool)
    generated[0, 0, 0, 0, 0] = True
    generated[1] = True
    target[0, :, 0, 0, 0] = 3.0  # the only generated cell of the first clip
    assert masked_mse(prediction, target, generated) == pytest.approx((9 + 1) / 2)
    assert masked_mse(prediction, target, generated, torch.tensor([0.5, 2.0])) == pytest.approx((4.5 + 2) / 2)
    target[0, :, 1] = 100.0  # given cells don't count
    assert masked_mse(prediction, target, generated) == pytest.approx(5)


def loss_inputs(time: list[float]) -> dict[str, torch.Tensor]:
    b = len(time)
    x, noise = pair(b, 4, 3, 2, 2)
    mask = torch.ones(b, 4, 3, 2, 2)
    mask[:, :, 0] = 0  # the first latent frame is given
    return {
        "latents": x,
        "noise": noise,
        "time": torch.tensor(time),
        "condition_latents": x * (mask[:, :1] == 0),
        "condition_mask": mask,
        "text": torch.zeros(b, 1, 2),
        "text_mask": torch.ones(b, 1, dtype=torch.bool),
    }


class Stub(torch.nn.Module):
    """Predicts `output`, and remembers what it was asked."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = torch.nn.Parameter(output)

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        self.noisy, self.timestep = noisy, timestep
        return (self.output,)


TIMES = [0.0, 0.25, 0.5004, 0.9999, 1.0]


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("config", [FlowConfig(), *DISCRETE])
def test_the_true_prediction_has_no_loss_and_given_cells_none_at_all(config: FlowConfig, gamma: float | None) -> None:
    config = FlowConfig(objective=config.objective, zero_terminal_snr=config.zero_terminal_snr, min_snr_gamma=gamma)
    inputs = loss_inputs(TIMES)
    x, noise = inputs["latents"], inputs["noise"]
    k = torch.tensor([0, 250, 500, 999, 999])
    if config.objective == "flow":
        truth, timestep, noisy = noise - x, 1000 * inputs["time"], interpolant(x, noise, inputs["time"])
    else:
        scheduler, timestep = make_scheduler(config), k
        truth = noise if config.objective == "epsilon" else scheduler.get_velocity(x, noise, k)
        noisy = scheduler.add_noise(x, noise, k)
    model = Stub(truth.clone())
    assert denoising_losses(model, inputs, config)["loss"].item() == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(model.noisy, noisy)
    assert torch.equal(model.timestep, timestep)

    model = Stub(truth + torch.randn(truth.shape, generator=seeded(1)))
    losses = denoising_losses(model, inputs, config)
    assert losses.keys() == {"loss"}
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert not model.output.grad[:, :, 0].any()
    assert model.output.grad[1:3, :, 1:].all()
    error = (model.output.detach() - truth)[:, :, 1:].square().flatten(1).mean(1)
    if gamma is None:
        assert losses["loss"].item() == pytest.approx(error.mean().item())
    else:
        snr = flow_snr(inputs["time"]) if config.objective == "flow" else ddpm_snr(scheduler.alphas_cumprod[k])
        weight = min_snr_weight(config.objective, snr, gamma)
        assert losses["loss"].item() == pytest.approx((weight * error).mean().item())


# --- Learned sigma ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", DISCRETE)
@pytest.mark.parametrize("k", [0, 1, 500, 999])
def test_the_variational_bound_by_hand(config: FlowConfig, k: int) -> None:
    """Against torch's KL divergence of the two Gaussians, of the variance that diffusers samples with."""
    scheduler = DDPMScheduler.from_config(make_scheduler(config).config, variance_type="learned_range")
    alphas_cumprod, step = scheduler.alphas_cumprod, torch.tensor([k])
    x, noise = pair(1, 4, 3, 2, 2)
    predicted_x, interpolation = torch.randn(2, *x.shape, generator=seeded(1))
    bound = variational_bound(x, predicted_x, interpolation, alphas_cumprod, step)

    alpha_bar = alphas_cumprod[k].double()
    before = alphas_cumprod[k - 1].double() if k else torch.tensor(1.0, dtype=torch.float64)
    alpha, noisy = alpha_bar / before, add_noise(x, noise, alpha_bar[None])

    def mean(clean: torch.Tensor) -> torch.Tensor:
        """Ho et al. 2020, eq. 7."""
        of_clean = before.sqrt() * (1 - alpha) / (1 - alpha_bar) * clean
        return of_clean + alpha.sqrt() * (1 - before) / (1 - alpha_bar) * noisy

    if k == 0:
        log_beta, log_posterior, _ = step_variances(alphas_cumprod)
        fraction = (interpolation.double() + 1) / 2
        std = (fraction * log_beta[0] + (1 - fraction) * log_posterior[1]).mul(0.5).exp()
        expected = -torch.distributions.Normal(mean(predicted_x), std).log_prob(x.double())
    else:
        log_variance = scheduler._get_variance(k, predicted_variance=interpolation).double()
        true_std = ((1 - before) / (1 - alpha_bar) * (1 - alpha)).sqrt()
        expected = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean(x), true_std.expand_as(x)),
            torch.distributions.Normal(mean(predicted_x), (0.5 * log_variance).exp()),
        )
    torch.testing.assert_close(bound.double(), expected / math.log(2), atol=2e-3, rtol=2e-3)


def test_the_true_step_has_the_least_bound() -> None:
    alphas_cumprod = make_scheduler(DISCRETE[0]).alphas_cumprod
    x, _ = pair(3, 4, 1, 2, 2)
    step = torch.tensor([1, 5, 30])  # far from the data, beta~ and beta are one

    def bound(f: float) -> torch.Tensor:
        return variational_bound(x, x, torch.full_like(x, f), alphas_cumprod, step).mean((1, 2, 3, 4))

    torch.testing.assert_close(bound(-1.0), torch.zeros(3), atol=1e-6, rtol=0)  # beta~ is the posterior's own variance
    assert (bound(0.0) > 0).all()
    assert (bound(1.0) > bound(0.0)).all()


@pytest.mark.parametrize("config", DISCRETE)
def test_the_hybrid_loss_teaches_the_variance_alone(config: FlowConfig) -> None:
    inputs = loss_inputs([0.0, 0.001, 0.5, 1.0])
    torch.manual_seed(0)
    plain = Stub(torch.randn(4, 4, 3, 2, 2))
    both = Stub(torch.cat([plain.output.detach(), torch.randn(4, 4, 3, 2, 2)], dim=1))
    expected = denoising_losses(plain, inputs, config)["loss"]
    losses = denoising_losses(both, inputs, config, learn_sigma=True)
    assert losses.keys() == {"loss", "mse", "vlb"}
    assert torch.equal(losses["mse"], expected)
    # lambda = 0.001 times the 1000 terms of the bound
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vlb"])
    expected.backward()
    losses["loss"].backward()
    prediction, variance = both.output.grad.chunk(2, dim=1)
    assert torch.equal(prediction, plain.output.grad)
    assert variance[:, :, 1:].all()
    assert not variance[:, :, 0].any()


# --- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "x"}, "flow.objective is 'x', allowed: flow, epsilon, v_prediction"),
        ({"distribution": "cosine"}, "flow.distribution is 'cosine', allowed: logit_normal, uniform, mode"),
        ({"std": 0.0}, "flow.std is 0.0, allowed: above 0"),
        ({"mode_scale": 2.0}, "flow.mode_scale is 2.0, allowed: -1 to 1.752"),
        ({"shift": 0.0}, "flow.shift is 0.0, allowed: above 0"),
        ({"min_snr_gamma": 0.0}, "flow.min_snr_gamma is 0.0, allowed: above 0"),
        ({"shift": 3.0, "dynamic_shift": True}, "flow.shift is 3.0, allowed: 1 with flow.dynamic_shift"),
        ({"objective": "epsilon", "shift": 3.0}, "flow.shift is 3.0, allowed: 1 with flow.objective=epsilon"),
        (
            {"objective": "v_prediction", "dynamic_shift": True},
            "flow.dynamic_shift is True, allowed: false with flow.objective=v_prediction",
        ),
        (
            {"objective": "epsilon", "zero_terminal_snr": True},
            "flow.zero_terminal_snr is True, allowed: false with flow.objective=epsilon, since the noise of pure noise",
        ),
        ({"zero_terminal_snr": True}, "flow.zero_terminal_snr is True, allowed: false with flow.objective=flow"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowConfig(**arguments)
