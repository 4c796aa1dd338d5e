"""The one mask vocabulary of stgen: 1 = generate, 0 = given.

A task is a mask. Training draws from a weighted mixture of `MaskSpec`s, the pipelines and the evaluation call the same
functions with fixed arguments; nothing else in the code knows a task's name.

Shapes: t frames, h height, w width in pixels; one mask is `1 t h w`, a batch `b 1 t h w`, float32 of zeros and ones.
On the latent grid a mask is folded to `b p t' h' w'` (see `fold_mask`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stgen.config import require, require_arguments

Shape = tuple[int, int, int]
"""Frames, height and width in pixels."""


# --- Randomness ---------------------------------------------------------------------------------------------------


def _draw(choice: Sequence[int] | int, high: int, generator: torch.Generator) -> int:
    """One integer: `choice` itself, or uniform over the inclusive range `[a, b]`, both cut to at most `high`.

    Cutting to `high` is what keeps every mask valid for every number of frames: a mixture written for 20 frames still
    leaves a frame to generate in a clip of two.
    """
    low, top = (choice, choice) if isinstance(choice, int) else (choice[0], choice[1])
    low, top = min(low, high), min(top, high)
    return int(torch.randint(low, top + 1, (), generator=generator))


# --- The vocabulary -----------------------------------------------------------------------------------------------


def generate_all(shape: Shape, generator: torch.Generator | None = None) -> Tensor:
    """Text-to-video: nothing is given."""
    return torch.ones(1, *shape)


def predict(shape: Shape, generator: torch.Generator | None = None, given: Sequence[int] | int = 1) -> Tensor:
    """Prediction: the first `given` frames are given, the rest is generated. `given=1` is image-to-video.

    Args:
        given: a number of frames, or an inclusive range `[a, b]` to draw from. At most t - 1 frames are given.
    """
    t, _, _ = shape
    mask = torch.ones(1, *shape)
    mask[:, : _draw(given, max(t - 1, 0), _need(generator, given))] = 0
    return mask


def interpolate(shape: Shape, generator: torch.Generator | None = None, given: Sequence[int] | int = 1) -> Tensor:
    """Interpolation: `given` frames at each end are given, those between are generated.

    Args:
        given: frames at each end, or an inclusive range `[a, b]` to draw from. At least one frame is generated.
    """
    t, _, _ = shape
    k = _draw(given, max((t - 1) // 2, 0), _need(generator, given))
    mask = torch.ones(1, *shape)
    mask[:, :k] = 0
    mask[:, t - k :] = 0
    return mask


def moving_box(
    shape: Shape,
    generator: torch.Generator | None = None,
    size: Sequence[float] = (0.4, 0.6),
    speed: Sequence[float] = (0.0, 0.05),
) -> Tensor:
    """Inpainting: a box that moves in a straight line and bounces off the borders hides part of every frame.

    Args:
        size: inclusive range of the box's height and width, drawn apart, as fractions of the frame's.
        speed: inclusive range of its speed in fractions of its free range a frame.
    """
    if generator is None:
        raise ValueError("generator is None, allowed: a torch.Generator, since the box is drawn at random")
    t, h, w = shape
    r = torch.rand(6, generator=generator, dtype=torch.float64)
    box_h = max(1, round(h * float(size[0] + (size[1] - size[0]) * r[0])))
    box_w = max(1, round(w * float(size[0] + (size[1] - size[0]) * r[1])))
    angle = 2 * torch.pi * r[2]
    step = speed[0] + (speed[1] - speed[0]) * r[3]
    frames = torch.arange(t, dtype=torch.float64)
    # Reflection at both ends of the unit interval is a triangle wave of period 2.
    top = 1 - ((r[4] + frames * step * torch.sin(angle)).remainder(2) - 1).abs()
    left = 1 - ((r[5] + frames * step * torch.cos(angle)).remainder(2) - 1).abs()
    mask = torch.zeros(1, *shape)
    for i, (y, x) in enumerate(zip((top * (h - box_h)).round().int(), (left * (w - box_w)).round().int(), strict=True)):
        mask[:, i, y : y + box_h, x : x + box_w] = 1
    return mask


def random_frames(shape: Shape, generator: torch.Generator | None = None, p: float = 0.5) -> Tensor:
    """Each frame is given with probability 1 - `p` on its own; one frame drawn at random is always generated."""
    if generator is None:
        raise ValueError("generator is None, allowed: a torch.Generator, since the frames are drawn at random")
    t, h, w = shape
    hidden = torch.rand(t, generator=generator) < p
    hidden[int(torch.randint(t, (), generator=generator))] = True
    return hidden.float().view(1, t, 1, 1).repeat(1, 1, h, w)


def _need(generator: torch.Generator | None, given: Sequence[int] | int) -> torch.Generator:
    if generator is None and not isinstance(given, int):
        raise ValueError("generator is None, allowed: a torch.Generator when `given` is a range to draw from")
    return generator if generator is not None else torch.Generator()


MASKS: dict[str, Callable[..., Tensor]] = {
    "generate_all": generate_all,
    "predict": predict,
    "interpolate": interpolate,
    "moving_box": moving_box,
    "random_frames": random_frames,
}


@dataclass
class MaskSpec:
    """One entry of a mixture: which mask, with which arguments, how often."""

    kind: str = "generate_all"
    """A name in `MASKS`."""
    weight: float = 1.0
    """Relative probability of this entry in a mixture; weights need not sum to 1."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the mask function, such as `{given: [1, 10]}`."""

    def __post_init__(self) -> None:
        require(self.kind in MASKS, "masks.kind", self.kind, ", ".join(MASKS))
        require(self.weight > 0, "masks.weight", self.weight, "a number above 0")
        require_arguments(MASKS[self.kind], self.args, f"masks.args of {self.kind}", excluded=("shape", "generator"))

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        """One mask `1 t h w`, a pure function of the generator's state."""
        return MASKS[self.kind](shape, generator, **self.args)


def draw_mixture(specs: Sequence[MaskSpec], shape: Shape, generator: torch.Generator) -> Tensor:
    """Draws one entry by weight, then one mask `1 t h w` from it."""
    weights = torch.tensor([spec.weight for spec in specs], dtype=torch.float64)
    chosen = int(torch.multinomial(weights, 1, generator=generator))
    return specs[chosen].draw(shape, generator)


# --- Masks and video ----------------------------------------------------------------------------------------------


def hide(video: Tensor, mask: Tensor) -> Tensor:
    """What conditions the model: the given pixels, and 0 (mid-grey in [-1, 1]) where the mask says generate.

    `torch.where` and not a product, so that a NaN or infinity in a hidden pixel cannot leak either.
    """
    return torch.where(mask.bool(), torch.zeros((), dtype=video.dtype, device=video.device), video)


def keep_given(generated: Tensor, video: Tensor, mask: Tensor) -> Tensor:
    """Puts the given pixels back, exactly, into a generated video of the same shape."""
    return torch.where(mask.bool(), generated, video)


def fold_mask(mask: Tensor, temporal_factor: int, spatial_factor: int) -> Tensor:
    """Folds a pixel mask to the latent grid of a causal video VAE.

    A causal VAE with temporal compression p gives the first frame a latent of its own and every p frames after it one
    more. The p frames of a latent become p channels (the first frame fills all p of its latent, as in Wan 2.1); in
    space a cell holds the fraction of its pixels that are generated, so that 0 means "wholly given", exactly.

    Args:
        mask: `b 1 t h w` in pixels.
    Returns:
        `b p t' h' w'` with t' = 1 + ceil((t - 1) / p), h' = ceil(h / s), w' = ceil(w / s). Padding repeats the border,
        as the VAE pads the video.
    """
    _, _, t, h, w = mask.shape
    p, s = temporal_factor, spatial_factor
    mask = F.pad(mask, (0, -w % s, 0, -h % s, 0, -(t - 1) % p), mode="replicate")
    mask = F.avg_pool3d(mask, (1, s, s))
    mask = torch.cat([mask[:, :, :1].expand(-1, -1, p, -1, -1), mask[:, :, 1:]], dim=2)
    b, _, padded, rows, columns = mask.shape
    return mask.view(b, padded // p, p, rows, columns).transpose(1, 2)


def generated_cells(folded: Tensor) -> Tensor:
    """Which latent cells hold anything to generate: `b p t h w` -> bool `b 1 t h w`."""
    return folded.amax(dim=1, keepdim=True) > 0
