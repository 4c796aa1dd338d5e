"""Rectified flow: interpolant, timestep sampling, loss. Pure functions, each under its equation.

Time runs from 0 (data) to 1 (noise), as diffusers' FlowMatchEulerDiscreteScheduler has its sigmas. Shapes: `b c t h w`.
"""

import torch
from torch import Tensor


def interpolant(x: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t = (1 - t) x + t e  (Liu et al. 2022, arXiv:2209.03003, eq. 1, with data at t = 0).

    Args:
        x, noise: `b c t h w`.
        time: `b`, in [0, 1].
    """
    time = time.view(-1, *[1] * (x.ndim - 1))
    return (1 - time) * x + time * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """v = dx_t / dt = e - x: what the model predicts."""
    return noise - x


def sample_time(size: int, mean: float, std: float, shift: float, generator: torch.Generator) -> Tensor:
    """t = shift(sigmoid(n)), n ~ N(mean, std^2): logit-normal times (Esser et al. 2024, arXiv:2403.03206, sec. 3.1).

    `shift` moves the mass towards noise, t' = s t / (1 + (s - 1) t) (ibid., eq. 23), as the scheduler's `shift` does in
    sampling. `std = 0` is taken as the uniform distribution on (0, 1), in which case `mean` has no meaning.

    Returns:
        `size` times in (0, 1), float32.
    """
    if std == 0:
        time = torch.rand(size, generator=generator)
    else:
        time = torch.sigmoid(mean + std * torch.randn(size, generator=generator))
    return shift * time / (1 + (shift - 1) * time)


def masked_mse(prediction: Tensor, target: Tensor, generated: Tensor) -> Tensor:
    """Mean squared error over the generated cells of each clip, then the mean over clips.

    Each clip weighs the same however much of it is given, so the average over ranks equals the single-process loss.

    Args:
        prediction, target: `b c t h w`.
        generated: bool `b 1 t h w`, at least one cell true in each clip.
    """
    error = (prediction.float() - target.float()).square().mean(dim=1, keepdim=True) * generated
    return (error.flatten(1).sum(1) / generated.flatten(1).sum(1)).mean()
