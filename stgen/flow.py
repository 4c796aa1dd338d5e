"""Rectified flow: interpolant, timestep distributions and shift; and the loss that all objectives share.

Pure functions, each under its equation. Time runs from 0 (data) to 1 (noise), as diffusers'
FlowMatchEulerDiscreteScheduler has its sigmas. Shapes: `b c t h w`.
"""

import math

import torch
from torch import Tensor

from stgen.config import require

# --- The flow -----------------------------------------------------------------------------------------------------


def per_clip(values: Tensor, x: Tensor) -> Tensor:
    """One value a clip, `b`, as `b 1 1 ...`, to be broadcast against `x` `b ...`."""
    return values.view(-1, *[1] * (x.ndim - 1))


def interpolant(x: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t = (1 - t) x + t e  (Liu et al. 2022, arXiv:2209.03003, eq. 1, with data at t = 0).

    Args:
        x, noise: `b c t h w`.
        time: `b`, in [0, 1].
    """
    time = per_clip(time, x)
    return (1 - time) * x + time * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """v = dx_t / dt = e - x: what the model predicts."""
    return noise - x


def flow_snr(time: Tensor) -> Tensor:
    """SNR(t) = (1 - t)^2 / t^2, of the interpolant above: from infinity at the data to 0 at the noise."""
    return ((1 - time) / time).square()


# --- Distributions of the training times --------------------------------------------------------------------------

MODE_SCALES = (-1.0, 2 / (math.pi - 2))
"""Range of the mode distribution's scale s, beyond which its map is not monotone (arXiv:2403.03206, sec. 3.1)."""


def uniform_time(size: int, generator: torch.Generator) -> Tensor:
    """t ~ U[0, 1). Returns `size` times, float32."""
    return torch.rand(size, generator=generator)


def logit_normal_time(size: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """t = sigmoid(n), n ~ N(mean, std^2)  (Esser et al. 2024, arXiv:2403.03206, eq. 19). `size` times, float32.

    Not diffusers' `compute_density_for_timestep_sampling`: `torch.normal` rounds `mean + std * n` otherwise in the last
    bit, and a run goes on with the draws it began with.
    """
    return torch.sigmoid(mean + std * torch.randn(size, generator=generator))


def mode_time(size: int, scale: float, generator: torch.Generator) -> Tensor:
    """t = 1 - u - s (cos^2(pi u / 2) - 1 + u), u ~ U[0, 1)  (arXiv:2403.03206, eq. 20). `size` times, float32.

    Args:
        scale: s in `MODE_SCALES`: above 0 favours the middle, below 0 both ends, 0 is uniform.
    """
    u = torch.rand(size, generator=generator)
    return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


# --- Shift --------------------------------------------------------------------------------------------------------


def shift_time(time: Tensor, shift: float) -> Tensor:
    """t' = r t / (1 + (r - 1) t)  (arXiv:2403.03206, eq. 23): r above 1 moves times towards the noise.

    The schedulers' `shift` does the same in sampling. Maps [0, 1] onto itself, monotonically, for every r above 0.
    """
    return shift * time / (1 + (shift - 1) * time)


def dynamic_shift(height: int, width: int, latent_frames: int) -> float:
    """r = sqrt(H W / 512^2) sqrt(T)  (Open-Sora 1.2's `timestep_transform`).

    The more cells, the more noise it takes to hide as much of a video. Open-Sora takes `frames // 17 * 5` for T, its own
    VAE's latent frames, which is 0 below 17 frames, and with it every shifted time. Here T is what the VAE made.

    Args:
        height, width: of a frame in pixels.
        latent_frames: T, of the latents.

    Raises:
        ValueError: a size below 1.
    """
    for name, value in (("height", height), ("width", width), ("latent_frames", latent_frames)):
        require(value >= 1, name, value, "1 or more")
    return math.sqrt(height * width / 512**2) * math.sqrt(latent_frames)


# --- Loss ---------------------------------------------------------------------------------------------------------


def masked_mean(error: Tensor, generated: Tensor) -> Tensor:
    """Mean of `error` `b c t h w` over the generated cells of each clip, `b`.

    Args:
        generated: bool `b 1 t h w`, at least one cell true in each clip.
    """
    error = error.mean(dim=1, keepdim=True) * generated
    return error.flatten(1).sum(1) / generated.flatten(1).sum(1)


def masked_mse(prediction: Tensor, target: Tensor, generated: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error over the generated cells of each clip, then the mean over clips.

    Each clip weighs the same however much of it is given, so the average over ranks equals the single-process loss.

    Args:
        prediction, target: `b c t h w`.
        generated: bool `b 1 t h w`, at least one cell true in each clip.
        weight: `b`, of each clip by its noise level, such as `min_snr_weight`; None means 1.
    """
    per_clip_error = masked_mean((prediction.float() - target.float()).square(), generated)
    return (per_clip_error if weight is None else weight * per_clip_error).mean()


def min_snr_weight(objective: str, snr: Tensor, gamma: float) -> Tensor:
    """w = min(SNR, g) in the error of x, restated for what is predicted (Hang et al. 2023, arXiv:2303.09556, sec. 3.4).

    |x - x'|^2 is |e - e'|^2 / SNR, |v - v'|^2 / (SNR + 1), and for the flow t^2 |u - u'|^2 with t = 1 / (1 + sqrt(SNR)):

        epsilon        min(SNR, g) / SNR
        v_prediction   min(SNR, g) / (SNR + 1)
        flow           min(SNR, g) / (1 + sqrt(SNR))^2

    The last two vanish with the SNR: at the pure noise, where sampling begins, the model learns from the steps near by.

    Args:
        snr: `b`, in [0, infinity].
        gamma: g above 0; the paper's is 5.
    """
    if objective == "epsilon":
        return (gamma / snr).clamp(max=1)  # min(SNR, g) / SNR without 0 / 0 or infinity / infinity
    denominator = {"v_prediction": snr + 1, "flow": (1 + snr.sqrt()).square()}[objective]
    return snr.clamp(max=gamma) / denominator
