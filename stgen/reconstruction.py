"""How well a VAE gives back clips that it never saw: measures and pictures.

Every measure is a number for each clip, and a score is the mean over clips, so scores of batches add up to the score of
all. Reconstructions are cut to [-1, 1] first, as a video file would cut them.

Shapes: b batch, c channels, t frames, h height, w width; video float `b c t h w` in [-1, 1].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from stgen.config import require
from stgen.video import Row, contact_sheet, difference

Distance = Callable[[Tensor, Tensor], Tensor]
"""A perceptual distance: two videos `b c t h w` in [-1, 1] -> `b`, one number for each clip."""


# --- Measures -----------------------------------------------------------------------------------------------------

EXACT_MSE = 4 / 255**2 / 12
"""Mean squared error, in [-1, 1], of rounding to 8 bits: two levels of 255 apart, uniform between them."""


def psnr(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip in dB, `b`: 10 log10(2^2 / MSE), MSE over all the clip's values.

    The truth is 8-bit video, so nothing counts as closer to it than rounding to 8 bits would come: 58.9 dB is the most.
    Without that one exact clip, such as a black one, would make the mean over clips infinite.
    """
    mse = (reconstruction.double() - truth.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp(min=EXACT_MSE))


def ssim(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each clip, `b` (Wang et al. 2004, doi:10.1109/TIP.2003.819861).

    scikit-image's with its defaults (7x7 windows): the mean over colours, then over frames.

    Raises:
        ValueError: frames smaller than 7x7 pixels.
    """
    from skimage.metrics import structural_similarity  # in the `eval` extra; the other measures need torch alone

    h, w = truth.shape[3:]
    require(min(h, w) >= 7, "frames", f"{h}x{w}", "7x7 pixels or more, the window of SSIM")
    # In [0, 1], since SSIM compares means by their ratio.
    clips = (rearrange(x.float().cpu().numpy() / 2 + 0.5, "b c t h w -> b t h w c") for x in (reconstruction, truth))
    means = [
        np.mean([structural_similarity(a, b, channel_axis=-1, data_range=1.0) for a, b in zip(*pair, strict=True)])
        for pair in zip(*clips, strict=True)
    ]
    return torch.tensor(means, dtype=torch.float64)


def temporal_difference_error(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Flicker and lost motion of each clip, `b`: the mean of |(r[i+1] - r[i]) - (x[i+1] - x[i])|, in levels of 0..255.

    Raises:
        ValueError: clips of one frame, which have no differences.
    """
    require(truth.shape[2] >= 2, "frames of a clip", truth.shape[2], "2 or more for a temporal difference")
    error = reconstruction.double().diff(dim=2) - truth.double().diff(dim=2)
    return error.abs().flatten(1).mean(1) * 127.5


@dataclass(frozen=True)
class Score:
    """Means over clips, every clip counting alike."""

    clips: int
    """How many."""
    psnr: float
    """Mean of the clips' PSNR in dB, at most 58.9."""
    ssim: float
    """Mean structural similarity, 1 for equal clips."""
    temporal_difference_error: float | None
    """In levels of 0..255; None for clips of one frame."""
    perceptual_distance: float | None = None
    """In the units of the given distance; None without one."""


@torch.no_grad()
def measure(reconstruction: Tensor, truth: Tensor, distance: Distance | None = None) -> Score:
    """Compares videos `b c t h w` in [-1, 1] clip by clip.

    Args:
        reconstruction: of the shape of `truth`; cut to [-1, 1].
        distance: a perceptual distance, if there is one to measure.

    Raises:
        ValueError: the shapes differ or are no videos, the truth leaves [-1, 1], or the distance is not one a clip.
    """
    fits = truth.ndim == 5 and min(truth.shape) >= 1
    require(fits, "truth.shape", tuple(truth.shape), "(b, c, t, h, w), none of them 0")
    same = reconstruction.shape == truth.shape
    require(same, "reconstruction.shape", tuple(reconstruction.shape), f"the truth's, {tuple(truth.shape)}")
    # A comparison with NaN is false, so NaN is refused as well.
    lowest, highest = truth.min().item(), truth.max().item()
    require(lowest >= -1 and highest <= 1, "truth", f"{lowest:.4g} to {highest:.4g}", "values in [-1, 1]")
    require(bool(reconstruction.isfinite().all()), "reconstruction", "NaN or infinite", "finite values")
    reconstruction = reconstruction.clamp(-1, 1)
    perceptual = None
    if distance is not None:
        values = distance(reconstruction, truth)
        require(values.shape == truth.shape[:1], "shape of distance", tuple(values.shape), f"({len(truth)},)")
        perceptual = values.double().mean().item()
    return Score(
        clips=len(truth),
        psnr=psnr(reconstruction, truth).mean().item(),
        ssim=ssim(reconstruction, truth).mean().item(),
        temporal_difference_error=(
            temporal_difference_error(reconstruction, truth).mean().item() if truth.shape[2] > 1 else None
        ),
        perceptual_distance=perceptual,
    )


def mean_score(scores: Sequence[Score]) -> Score:
    """The score of all clips together.

    Raises:
        ValueError: no scores, or a measure that only some of them have.
    """
    require(len(scores) > 0, "scores", scores, "at least one")
    clips = sum(score.clips for score in scores)

    def mean(name: str) -> float | None:
        values = [getattr(score, name) for score in scores]
        if all(value is None for value in values):
            return None
        require(None not in values, name, "missing in some scores", "all or none")
        return sum(value * score.clips for value, score in zip(values, scores, strict=True)) / clips

    names = ("psnr", "ssim", "temporal_difference_error", "perceptual_distance")
    return Score(clips, **{name: mean(name) for name in names})  # type: ignore[arg-type]


# --- Pictures -----------------------------------------------------------------------------------------------------

GAIN = 4
"""How much differences are brightened in pictures."""


def to_frames(video: Tensor) -> NDArray[np.uint8]:
    """Video in [-1, 1], cut to it, as frames: `... c t h w` -> uint8 `... t h w c`."""
    levels = ((video.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return rearrange(levels.to(torch.uint8).cpu().numpy(), "... c t h w -> ... t h w c")


def brightened_difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """|a - b| times `GAIN`, cut at white."""
    return (difference(a, b).astype(np.uint16) * GAIN).clip(max=255).astype(np.uint8)


def reconstruction_sheet(
    path: str | Path,
    truth: Tensor,
    reconstructions: Mapping[str, Tensor],
    labels: Sequence[str],
    title: str = "",
    columns: int | None = 9,
    scale: int = 1,
) -> None:
    """Writes one PNG: for each clip the truth, then each reconstruction and, brightened, its difference to the truth.

    Args:
        truth: `b c t h w` in [-1, 1].
        reconstructions: by name, each of the shape of `truth`.
        labels: one for each clip.
        columns, scale: as `stgen.video.contact_sheet` takes them.

    Raises:
        ValueError: shapes or lengths that do not fit each other, or what `contact_sheet` refuses.
    """
    require(len(labels) == len(truth), "labels", list(labels), f"{len(truth)}, one for each clip")
    for name, video in reconstructions.items():
        require(
            video.shape == truth.shape, f"shape of {name}", tuple(video.shape), f"the truth's, {tuple(truth.shape)}"
        )
    rows: list[Row] = []
    for i, label in enumerate(labels):
        frames = to_frames(truth[i])
        rows.append((f"{label}\ntruth", frames))
        for name, video in reconstructions.items():
            other = to_frames(video[i])
            rows += [(name, other), (f"difference x{GAIN}", brightened_difference(other, frames))]
    contact_sheet(rows, path, title=title, columns=columns, scale=scale)
