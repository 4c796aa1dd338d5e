import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stgen.flow import interpolant, masked_mse, sample_time, velocity


def test_the_scheduler_walks_our_interpolant() -> None:
    """With the true velocity, diffusers' Euler steps go from the noise to the data along x_t."""
    x, noise = torch.randn(2, 1, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    sample = noise
    for t in scheduler.timesteps:
        torch.testing.assert_close(sample, interpolant(x, noise, t[None] / 1000), atol=1e-5, rtol=1e-5)
        sample = scheduler.step(velocity(x, noise), t, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, x, atol=1e-5, rtol=1e-5)


def test_times_follow_their_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    time = sample_time(20000, 0.0, 1.0, 1.0, generator)
    assert time.mean() == pytest.approx(0.5, abs=0.01)
    assert torch.logit(time).std() == pytest.approx(1.0, abs=0.02)
    uniform = sample_time(20000, 0.0, 0.0, 1.0, generator)
    assert uniform.var() == pytest.approx(1 / 12, abs=0.002)
    shifted = sample_time(20000, 0.0, 0.0, 3.0, generator)
    assert shifted.median() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=0.01)


def test_the_loss_counts_generated_cells_and_clips_alike() -> None:
    prediction, target = torch.zeros(2, 4, 2, 2, 2), torch.ones(2, 4, 2, 2, 2)
    generated = torch.zeros(2, 1, 2, 2, 2, dtype=torch.bool)
    generated[0, 0, 0, 0, 0] = True
    generated[1] = True
    target[0, :, 0, 0, 0] = 3.0  # the only generated cell of the first clip
    assert masked_mse(prediction, target, generated) == pytest.approx((9 + 1) / 2)
    target[0, :, 1] = 100.0  # given cells don't count
    assert masked_mse(prediction, target, generated) == pytest.approx(5)
