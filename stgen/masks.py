"""The one mask vocabulary of stgen: 1 = generate, 0 = given.

A task is a mask. Training draws from a weighted mixture of `MaskSpec`s, the pipelines and the evaluation call the same
functions with fixed arguments; nothing else in the code knows a task's name.

    whole frames    generate_all (text-to-video), predict (given=1: image-to-video), backward, interpolate,
                    random_segment, every_nth, random_frames
    regions         boxes, strokes, moving_box, outpaint
    both            combine
    mixtures        open_sora_1_0, open_sora_1_1, open_sora_1_2, vdt

Every mask is valid for every shape: at least one pixel is left to generate, and a mask of whole frames gives at least
one frame where it is asked to and the clip has two. A clip of one frame is generated whole, or by region.

Shapes: t frames, h height, w width in pixels; one mask is `1 t h w`, a batch `b 1 t h w`, float32 of zeros and ones.
On the latent grid a mask is folded to `b p t' h' w'` (see `fold_mask`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stgen.config import require, require_arguments

Shape = tuple[int, int, int]
"""Frames, height and width in pixels."""
Number = float | Sequence[float]
"""A number, or an inclusive range `[a, b]` to draw it from, uniformly."""
Frames = float | Sequence[float]
"""A number of frames, a fraction of the clip, or an inclusive range of the two: `4`, `0.5`, `[1, 8]`, `[1, 0.25]`.

An int counts frames. A float in (0, 1) is that fraction of the clip, rounded down, but at least one frame. Whatever is
asked for is cut to what leaves a frame to generate, so that a mixture written for 20 frames holds for a clip of two.
"""


# --- Randomness: every draw is from the caller's generator --------------------------------------------------------


def _require_generator(generator: torch.Generator | None) -> torch.Generator:
    if generator is None:  # torch would take its global one
        raise ValueError("generator is None, allowed: a torch.Generator, since this mask is drawn at random")
    return generator


def _ends(name: str, choice: Number, low: float, high: float, kinds: type | tuple[type, ...]) -> tuple[Any, Any]:
    """Both ends of `choice`, which must lie in [low, high]."""
    ends = tuple(choice) if isinstance(choice, Sequence) else (choice, choice)
    numbers = len(ends) == 2 and all(isinstance(end, kinds) for end in ends)
    what = "an integer" if kinds is int else "a number"
    allowed = f"{what} from {low:g} to {high:g}, or a range [a, b] of such"
    require(numbers and low <= ends[0] <= ends[1] <= high, name, choice, allowed)
    return ends[0], ends[1]


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _draw_real(name: str, choice: Number, low: float, high: float, generator: torch.Generator) -> float:
    return _uniform(*_ends(name, choice, low, high, (int, float)), generator)


def _draw_integer(name: str, choice: Number, low: int, generator: torch.Generator | None) -> int:
    a, b = _ends(name, choice, low, math.inf, int)
    return a if a == b else int(torch.randint(a, b + 1, (), generator=_require_generator(generator)))


def _draw_frames(given: Frames, t: int, most: int, generator: torch.Generator | None) -> int:
    """How many of t frames are given: see `Frames`. At most `most`."""
    ends = tuple(given) if isinstance(given, Sequence) else (given, given)
    known = len(ends) == 2 and all(
        (isinstance(end, int) and end >= 0) or (isinstance(end, float) and 0 < end < 1) for end in ends
    )
    # Which of a count and a fraction is more depends on the clip: below, the upper end wins.
    ordered = known and (type(ends[0]) is not type(ends[1]) or ends[0] <= ends[1])
    require(ordered, "given", given, "a number of frames, a fraction of the clip in (0, 1), or a range [a, b] of these")
    # The tiny addition keeps 0.29 of 100 frames at 29 although their product is 28.999999999999996.
    low, top = (end if isinstance(end, int) else max(1, int(end * t + 1e-6)) for end in ends)
    top = min(top, most)
    return _draw_integer("given", (min(low, top), top), 0, generator)


# --- Whole frames -------------------------------------------------------------------------------------------------


def _whole_frames(generated: Tensor, shape: Shape) -> Tensor:
    """Which frames to generate, `t`, as a mask."""
    return generated.float().view(1, -1, 1, 1).repeat(1, 1, *shape[1:])


def generate_all(shape: Shape, generator: torch.Generator | None = None) -> Tensor:
    """Text-to-video: nothing is given."""
    return torch.ones(1, *shape)


def predict(shape: Shape, generator: torch.Generator | None = None, given: Frames = 1) -> Tensor:
    """Prediction: the first `given` frames are given, the rest is generated. `given=1` is image-to-video.

    Raises:
        ValueError: `given` is no number of frames, or a range while there is no generator to draw from.
    """
    t, _, _ = shape
    frames = torch.ones(t)
    frames[: _draw_frames(given, t, t - 1, generator)] = 0
    return _whole_frames(frames, shape)


def backward(shape: Shape, generator: torch.Generator | None = None, given: Frames = 1) -> Tensor:
    """Backward prediction: the last `given` frames are given, what came before is generated. Raises as `predict`."""
    t, _, _ = shape
    frames = torch.ones(t)
    frames[t - _draw_frames(given, t, t - 1, generator) :] = 0
    return _whole_frames(frames, shape)


def interpolate(shape: Shape, generator: torch.Generator | None = None, given: Frames = 1) -> Tensor:
    """Interpolation: `given` frames at each end are given, those between are generated. Raises as `predict`.

    Where the clip is too short for both ends and a frame between, the last end gives way.
    """
    t, _, _ = shape
    k = _draw_frames(given, t, t // 2, generator)
    frames = torch.ones(t)
    frames[:k] = 0
    frames[t - min(k, t - 1 - k) :] = 0
    return _whole_frames(frames, shape)


def random_segment(shape: Shape, generator: torch.Generator | None = None, given: Frames = 1) -> Tensor:
    """`given` consecutive frames are given, anywhere in the clip. Raises as `predict`."""
    generator = _require_generator(generator)
    t, _, _ = shape
    k = _draw_frames(given, t, t - 1, generator)
    start = int(torch.randint(t - k + 1, (), generator=generator))
    frames = torch.ones(t)
    frames[start : start + k] = 0
    return _whole_frames(frames, shape)


def every_nth(shape: Shape, generator: torch.Generator | None = None, n: Number = 4, start: Number = 0) -> Tensor:
    """Frame-rate increase: frames `start`, `start + n`, `start + 2 n`, ... are given.

    Args:
        n: an integer of at least 2, or a range.
        start: the first given frame, or a range; cut to the last frame of the clip.
    """
    t, _, _ = shape
    step, first = _draw_integer("n", n, 2, generator), _draw_integer("start", start, 0, generator)
    frames = torch.ones(t)
    if t > 1:
        frames[min(first, t - 1) :: step] = 0
    return _whole_frames(frames, shape)


def random_frames(shape: Shape, generator: torch.Generator | None = None, p: Number = 0.5) -> Tensor:
    """Each frame is hidden with probability `p` on its own; if all or none are, one frame drawn at random changes side.

    Args:
        p: in [0, 1], or a range from which each mask draws its own.
    """
    generator = _require_generator(generator)
    t, _, _ = shape
    frames = torch.rand(t, generator=generator) < _draw_real("p", p, 0, 1, generator)
    if t == 1 or frames.all() or not frames.any():
        chosen = int(torch.randint(t, (), generator=generator))
        frames[chosen] = t == 1 or not frames[chosen]
    return _whole_frames(frames, shape)


# --- Regions ------------------------------------------------------------------------------------------------------


def _every_frame(hidden: Tensor, shape: Shape) -> Tensor:
    """Which pixels of a frame to generate, `h w`, as a mask that is the same in all frames."""
    return hidden.float().repeat(1, shape[0], 1, 1)


def boxes(
    shape: Shape,
    generator: torch.Generator | None = None,
    ratio: Number = 0.5,
    aspect: Number = (0.3, 3.3),
    count: Number = 8,
) -> Tensor:
    """Inpainting: boxes at fixed places, which may overlap, hide up to `ratio` of every frame.

    Args:
        ratio: share of the frame's area in [0, 1], or a range. At least one pixel is hidden.
        aspect: range of height over width, drawn log-uniformly; boxes are cut to the frame.
        count: at most so many boxes, or a range; each takes a quarter to all of the area still to be hidden.
    """
    generator = _require_generator(generator)
    _, h, w = shape
    a, b = _ends("aspect", aspect, 1e-3, 1e3, (int, float))
    target = max(1, int(h * w * _draw_real("ratio", ratio, 0, 1, generator)))
    hidden = torch.zeros(h, w)
    for _ in range(_draw_integer("count", count, 1, generator)):
        left = target - int(hidden.sum())
        if left == 0:
            break
        area = left * _uniform(0.25, 1, generator)
        height = math.sqrt(area * math.exp(_uniform(math.log(a), math.log(b), generator)))
        # Neither side may be so long that the box passes the target.
        box_h = min(max(1, round(height)), h, left)
        box_w = min(max(1, round(area / box_h)), w, left // box_h)
        y = int(torch.randint(h - box_h + 1, (), generator=generator))
        x = int(torch.randint(w - box_w + 1, (), generator=generator))
        hidden[y : y + box_h, x : x + box_w] = 1
    return _every_frame(hidden, shape)


def strokes(
    shape: Shape, generator: torch.Generator | None = None, count: Number = (1, 4), width: Number = (0.05, 0.15)
) -> Tensor:
    """Free-form inpainting: brush strokes at fixed places hide part of every frame (idea: Yu et al., arXiv:1806.03589).

    A stroke is a chain of 3 to 8 straight pieces, each a tenth to a third of the frame's shorter side long, that turns
    by up to 60 degrees from one to the next and stays in the frame.

    Args:
        count: number of strokes, or a range.
        width: of each stroke, as a fraction of the frame's shorter side, or a range.
    """
    generator = _require_generator(generator)
    _, h, w = shape
    side, corner = min(h, w), torch.tensor([h - 1.0, w - 1.0])
    pixels = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).float()
    hidden = torch.zeros(h, w, dtype=torch.bool)
    for _ in range(_draw_integer("count", count, 1, generator)):
        radius = side * _draw_real("width", width, 0, 1, generator) / 2
        # From the centre of a pixel, so that even the finest stroke hides one.
        start = (torch.rand(2, generator=generator) * corner).round()
        turns, lengths = torch.rand(2, _draw_integer("pieces", (3, 8), 1, generator), generator=generator)
        angles = _uniform(0, 2 * math.pi, generator) + ((turns - 0.5) * 2 * math.pi / 3).cumsum(0)
        steps = torch.stack([angles.sin(), angles.cos()], -1) * (side * (0.1 + 0.23 * lengths))[:, None]
        points = torch.cat([start[None], (start + steps.cumsum(0)).clamp(min=0).minimum(corner)])
        # Distance of each pixel to the nearest point of each piece, whose position along the piece is in [0, 1].
        begin, line = points[:-1, None, None], points.diff(dim=0)[:, None, None]
        along = ((pixels - begin) * line).sum(-1, keepdim=True) / line.square().sum(-1, keepdim=True).clamp(min=1e-6)
        distance = (pixels - begin - along.clamp(0, 1) * line).norm(dim=-1)
        hidden |= distance.amin(0) <= radius
    return _every_frame(hidden, shape)


def moving_box(
    shape: Shape,
    generator: torch.Generator | None = None,
    size: Number = (0.4, 0.6),
    speed: Number = (0.0, 0.05),
) -> Tensor:
    """Inpainting: a box that moves in a straight line and bounces off the borders (a tube) hides part of every frame.

    Args:
        size: of the box's height and width, drawn apart, as fractions of the frame's, or a range.
        speed: in fractions of the box's free range a frame, or a range.
    """
    generator = _require_generator(generator)
    size, speed = _ends("size", size, 0, 1, (int, float)), _ends("speed", speed, 0, math.inf, (int, float))
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


def outpaint(shape: Shape, generator: torch.Generator | None = None, size: Number = (0.4, 0.8)) -> Tensor:
    """Outpainting: a rectangle at a fixed place is given in every frame, all around it is generated.

    Args:
        size: of the given rectangle's height and width, drawn apart, as fractions of the frame's, or a range.
    """
    generator = _require_generator(generator)
    _, h, w = shape
    sides = [side * _draw_real("size", size, 0, 1, generator) for side in (h, w)]
    # At least a row and a column are generated.
    given_h, given_w = (min(max(1, round(given)), side - 1) for given, side in zip(sides, (h, w), strict=True))
    y = int(torch.randint(h - given_h + 1, (), generator=generator))
    x = int(torch.randint(w - given_w + 1, (), generator=generator))
    hidden = torch.ones(h, w)
    hidden[y : y + given_h, x : x + given_w] = 0
    return _every_frame(hidden, shape)


# --- Both, by name ------------------------------------------------------------------------------------------------


def combine(shape: Shape, generator: torch.Generator | None = None, masks: Sequence[Mapping[str, Any]] = ()) -> Tensor:
    """Several masks at once: generated is what all of them generate, given what any of them gives.

    A mask that would leave nothing to generate after those before it is passed over.

    Args:
        masks: at least one, each `{kind: ..., args: ...}`, such as boxes that move together with `{kind: predict}`.
    """
    require(len(masks) > 0, "masks", masks, "one or more of {kind: ..., args: ...}")
    mask = torch.ones(1, *shape)
    for entry in masks:
        require(set(entry) <= {"kind", "args"}, "masks", entry, "{kind: ..., args: ...}")
        kind, args = entry.get("kind", ""), entry.get("args", {})
        _check_kind(kind, args)
        both = mask * MASKS[kind](shape, generator, **args)
        mask = both if both.any() else mask
    return mask


MASKS: dict[str, Callable[..., Tensor]] = {
    "generate_all": generate_all,
    "predict": predict,
    "backward": backward,
    "interpolate": interpolate,
    "random_segment": random_segment,
    "every_nth": every_nth,
    "random_frames": random_frames,
    "boxes": boxes,
    "strokes": strokes,
    "moving_box": moving_box,
    "outpaint": outpaint,
    "combine": combine,
}
"""All kinds of masks by name; the mixtures of `PRESETS` join them below."""


def _check_kind(kind: str, args: Iterable[str]) -> None:
    require(kind in MASKS, "masks.kind", kind, ", ".join(MASKS))
    require_arguments(MASKS[kind], args, f"masks.args of {kind}", excluded=("shape", "generator"))


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
        _check_kind(self.kind, self.args)
        require(self.weight > 0, "masks.weight", self.weight, "a number above 0")
        # The functions check the values themselves: one small draw refuses a bad one now, not in the first batch.
        try:
            self.draw((2, 2, 2), torch.Generator().manual_seed(0))
        except ValueError as error:
            raise ValueError(f"masks.args of {self.kind}: {error}") from error

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        """One mask `1 t h w`, a pure function of the generator's state."""
        return MASKS[self.kind](shape, generator, **self.args)


def draw_spec(specs: Sequence[MaskSpec], generator: torch.Generator) -> MaskSpec:
    """Draws one entry by weight."""
    weights = torch.tensor([spec.weight for spec in specs], dtype=torch.float64)
    return specs[int(torch.multinomial(weights, 1, generator=generator))]


def draw_mixture(specs: Sequence[MaskSpec], shape: Shape, generator: torch.Generator) -> Tensor:
    """Draws one entry by weight, then one mask `1 t h w` from it. A batch calls this for each of its samples."""
    return draw_spec(specs, generator).draw(shape, generator)


# --- Published mixtures -------------------------------------------------------------------------------------------

_QUARTER = {"given": [1, 0.25]}

PRESETS: dict[str, list[MaskSpec]] = {
    "open_sora_1_0": [
        MaskSpec("generate_all", 0.7),
        MaskSpec("random_segment", 0.15, _QUARTER),
        MaskSpec("predict", 0.05, _QUARTER),
        MaskSpec("backward", 0.05, _QUARTER),
        MaskSpec("interpolate", 0.05, _QUARTER),
    ],
    "open_sora_1_1": [
        MaskSpec("generate_all", 0.75),
        MaskSpec("random_segment", 0.025, _QUARTER),
        MaskSpec("predict", 0.025, _QUARTER),
        MaskSpec("backward", 0.025, _QUARTER),
        MaskSpec("interpolate", 0.05, _QUARTER),
        MaskSpec("random_segment", 0.025),
        MaskSpec("predict", 0.025),
        MaskSpec("backward", 0.025),
        MaskSpec("interpolate", 0.05),
    ],
    "open_sora_1_2": [
        MaskSpec("generate_all", 0.8),
        MaskSpec("random_frames", 0.05, {"p": [0.1, 0.9]}),
        MaskSpec("every_nth", 0.005, {"n": 2, "start": [0, 1]}),
        MaskSpec("random_segment", 0.005, _QUARTER),
        MaskSpec("predict", 0.005, _QUARTER),
        MaskSpec("backward", 0.005, _QUARTER),
        MaskSpec("interpolate", 0.005, _QUARTER),
        MaskSpec("random_segment", 0.025),
        MaskSpec("predict", 0.05),
        MaskSpec("backward", 0.025),
        MaskSpec("interpolate", 0.025),
    ],
    "vdt": [
        MaskSpec(
            "combine",
            0.2,
            {
                "masks": [
                    {"kind": "boxes", "args": {"ratio": 0.5}},
                    {"kind": "predict", "args": {"given": [0, 3]}},
                    {"kind": "backward", "args": {"given": [0, 3]}},
                ]
            },
        ),
        MaskSpec("predict", 0.8 / 6, {"given": 8}),
        MaskSpec("backward", 0.8 / 6, {"given": 8}),
        MaskSpec("every_nth", 0.8 / 6, {"n": 4}),
        MaskSpec("generate_all", 0.8 / 6),
        MaskSpec("random_segment", 0.8 / 6),
        MaskSpec("random_frames", 0.8 / 6, {"p": 0.8}),
    ],
}
"""Mixtures as published, each a kind of its own: `masks: [{kind: open_sora_1_2}]`.

`open_sora_*` are Open-Sora's (github.com/hpcaitech/Open-Sora; 1.2 is that of its stages 1 and 2), `vdt` is VDT's (Lu et
al. 2023, arXiv:2305.13311). Ours differ on purpose in three things. The originals count latent frames, these count
pixel frames: the same for the per-frame VAEs of Open-Sora 1.0, 1.1 and VDT, not for Open-Sora 1.2, whose VAE compresses
time by four. A short clip is no special case: Open-Sora's quarter of a clip needs four latent frames, and VDT's blocks
hide nothing in one of four draws. And each sample draws its own mask, where VDT draws one for a batch. The 1 to 4 frames
of Open-Sora 1.0 are written as the quarter of its 16 that they are.
"""

MASKS.update({name: partial(draw_mixture, specs) for name, specs in PRESETS.items()})


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


def given_latents_are_exact(mask: Tensor, temporal_factor: int, reach: str) -> Tensor:
    """Of which clips the latents of the given cells are the same, whether the hidden pixels are hidden or not.

    Then those of the whole clip condition the model without a leak: where whole latent frames from the beginning are
    given and all others wholly hidden, a causal VAE has not yet seen a hidden pixel when it makes the last given latent.
    With a VAE of frames, any choice of whole frames will do.

    Args:
        mask: `b 1 t h w` in pixels.
        reach: which frames a latent depends on: `frame`, `past` or `clip`, see `stgen.models.latents.temporal_reach`.
    Returns:
        bool `b`. A clip of which nothing is given is among them.
    """
    frames = mask.flatten(3)
    given, hidden = frames.amax((1, 3)) == 0, frames.amin((1, 3)) == 1
    if reach == "frame":
        return (given | hidden).all(1)
    count = given.sum(1)
    latent_ends = (count == 0) | ((count - 1) % temporal_factor == 0)
    prefix = torch.arange(given.shape[1], device=mask.device) < count[:, None]
    exact = (given == prefix).all(1) & (given | hidden).all(1) & latent_ends
    return exact if reach == "past" else exact & (count == 0)
