"""Reads Moving MNIST clips without their captions: which digits there are, and along which paths they move.

`DigitNet` says of every 28x28 window which digit stands in it, and where exactly. `read_clip` looks for the paths that the
motion model of the data can take (`stgen.data.moving_mnist`: constant speed, elastic walls) and that pass through as many
of these digits as possible; label and first direction follow from the path, as the captions' do.

The weights beside this file are trained on the 4,000 training digits, in about a minute of one core:

    python -m stgen.digits --out stgen/digits.safetensors

Shapes: n windows or clips, t frames, h height, w width, k = 10 digits; images float in [0, 1] `n 1 h w`; places are those
of a digit's 28x28 box, (y, x) of its upper left corner in pixels of the 64x64 canvas, 0 to 36.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm import tqdm

from stgen.config import require
from stgen.data.moving_mnist import (
    CANVAS,
    DIGIT,
    DIRECTIONS,
    SIZES,
    STEP,
    Floats,
    bounce,
    first_direction,
    load_digits,
    parse_caption,
)

WEIGHTS = Path(__file__).with_suffix(".safetensors")
DIGITS = 10
STRIDE = 4
"""Pixels between the windows that the network looks at."""
REACH = 3.0
"""A window sees a digit whose box is off by at most so many pixels in y and in x; beyond `REACH + 2` it must not."""


# --- The classifier -----------------------------------------------------------------------------------------------


class DigitNet(nn.Module):
    """A convolutional network without padding that looks at windows of 28x28 pixels, one every `STRIDE` pixels.

    An image of 28x28 is one window, one of 64x64 is 10x10 windows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 96, 4, bias=False), nn.BatchNorm2d(96), nn.ReLU()),
            nn.Conv2d(96, 3 * DIGITS, 1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits `n k h' w'`, each digit's own (a window may see two), and its place in the window `n k 2 h' w'`:
        (y, x) of its box minus that of the window, in pixels."""
        out = self.layers(images)
        return out[:, :DIGITS], rearrange(out[:, DIGITS:], "n (k c) h w -> n k c h w", c=2)

    @classmethod
    def pretrained(cls, path: Path = WEIGHTS) -> "DigitNet":
        """The network with the stored weights, float16 in the file."""
        net = cls()
        net.load_state_dict(load_file(path))
        return net.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(net: DigitNet, split: str = "heldout") -> float:
    """Share of a split's single digits, each in the middle of its window, whose label gets the highest logit."""
    images, labels = load_digits(split)
    logits, _ = net(torch.from_numpy(images)[:, None].float() / 255)
    return float((logits[..., 0, 0].argmax(1).numpy() == labels).mean())


# --- Training it --------------------------------------------------------------------------------------------------


def uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(tuple(shape), generator=generator)


def draw_windows(
    images: Tensor, labels: Tensor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows of clips and of what a generator may make of them: two digits over each other, turned, scaled, blurred.

    Args:
        images: float `n 28 28`; labels: `n`.

    Returns:
        Windows `size 1 28 28`; which digits each must see, float `size k`; which of these count, float `size k`; their
        places `size k 2`.
    """
    chosen = torch.randint(len(images), (size, 2), generator=generator)
    # The first digit mostly near the middle, else anywhere; the second anywhere, and in four of ten windows far outside.
    near = uniform((size, 1), 0, 1, generator) < 0.7
    first = torch.where(near, uniform((size, 2), -3, 3, generator), uniform((size, 2), -20, 20, generator))
    second = uniform((size, 2), -20, 20, generator)
    second[uniform((size,), 0, 1, generator) < 0.4] = 2 * DIGIT
    places = torch.stack([first, second], dim=1)  # size 2 2

    turn = uniform((size, 2), -0.2, 0.2, generator)
    scale = torch.exp(uniform((size, 2), -0.14, 0.14, generator))
    shear = uniform((size, 2), -0.15, 0.15, generator)
    # Rows of the inverse map, from places in the window to places in the digit's image, y after x as grid_sample has it.
    matrix = (
        torch.stack([turn.cos(), shear - turn.sin(), turn.sin(), turn.cos()], dim=-1).unflatten(-1, (2, 2))
        / scale[..., None, None]
    )
    shift = -(matrix @ (places.flip(-1) * 2 / DIGIT)[..., None])
    grid = F.affine_grid(torch.cat([matrix, shift], dim=-1).flatten(0, 1), [2 * size, 1, DIGIT, DIGIT], False)
    moved = F.grid_sample(images[chosen].view(-1, 1, DIGIT, DIGIT), grid, align_corners=False)
    windows = moved.unflatten(0, (size, 2)).amax(1)

    def some(share: float) -> Tensor:
        return (uniform((size, 1, 1, 1), 0, 1, generator) < share).float()

    halved = F.interpolate(F.avg_pool2d(windows, 2), scale_factor=2, mode="bilinear")
    windows = torch.lerp(windows, halved, some(0.3))
    for share, sigma in ((0.5, 1.2), (0.25, 2.2)):
        taps = torch.exp(-0.5 * (torch.arange(-5.0, 6.0) / sigma).square())
        blurred = F.conv2d(windows, (taps[:, None] * taps / taps.sum().square())[None, None], padding=5)
        windows = torch.lerp(windows, blurred, some(share) * uniform((size, 1, 1, 1), 0, 1, generator))
    windows = windows * uniform((size, 1, 1, 1), 0.6, 1, generator)
    noise = torch.randn(windows.shape, generator=generator) * uniform((size, 1, 1, 1), 0, 0.08, generator)
    windows = (windows + some(0.5) * noise).clamp(0, 1)
    # Smudges: faint ones on a part of the windows, and a tenth of them nothing but smudges.
    nothing, grain = some(0.1), torch.rand(size, 1, DIGIT, DIGIT, generator=generator)
    coarse = F.interpolate(torch.rand(size, 1, 7, 7, generator=generator), size=(DIGIT, DIGIT), mode="bicubic")
    smudge = torch.lerp(grain, (2 * coarse - 1).clamp(0, 1), some(0.7)) * uniform((size, 1, 1, 1), 0, 1, generator)
    windows = torch.where(nothing > 0, smudge, torch.maximum(windows, some(0.3) * 0.3 * smudge))

    seen, counts, where = torch.zeros(size, DIGITS), torch.ones(size, DIGITS), torch.zeros(size, DIGITS, 2)
    rows = torch.arange(size)
    for which in (1, 0):  # of two equal digits the first one's place counts
        distance, label = places[:, which].abs().amax(-1), labels[chosen[:, which]]
        inside, beyond = distance <= REACH, distance > REACH + 2
        seen[rows, label] = torch.maximum(seen[rows, label], inside.float())
        counts[rows, label] *= (inside | beyond).float()
        where[rows[inside], label[inside]] = places[inside, which]
    seen, counts = seen * (1 - nothing.view(-1, 1)), torch.maximum(counts, nothing.view(-1, 1))
    return windows, seen, torch.maximum(counts, seen), where * seen[..., None]


def train(steps: int = 1500, batch: int = 192, lr: float = 4e-3, seed: int = 0) -> DigitNet:
    """Trains on the training digits. One thread, and draws of one generator: the same machine gives the same weights."""
    require(steps >= 1, "steps", steps, "1 or more")
    images, labels = (torch.from_numpy(x) for x in load_digits("train"))
    images = images.float() / 255
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for the initial weights
        net = DigitNet().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    for _ in (bar := tqdm(range(steps), desc="digits", unit="step")):
        windows, seen, counts, where = draw_windows(images, labels, batch, generator)
        logits, places = net(windows)
        logits, places = logits[..., 0, 0], places[..., 0, 0]
        classified = F.binary_cross_entropy_with_logits(logits, seen, counts, reduction="sum")
        located = (F.smooth_l1_loss(places, where, reduction="none").mean(-1) * seen).sum()
        loss = (classified + 0.5 * located) / batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return net.eval().requires_grad_(False)


# --- The reader ---------------------------------------------------------------------------------------------------

VOTES = 24
"""Places kept of a frame, the surest ones."""
UNSURE = 0.1
"""Probability below which a window says nothing."""
FOUND = 0.3
"""Least mean vote along a path, 0 to 1, for a digit to count as found."""
FREE = CANVAS - DIGIT
"""Pixels that a digit can move in y and in x."""


@dataclass(frozen=True)
class Votes:
    """What the network saw in a clip, its surest `v` places a frame."""

    place: NDArray[np.float32]
    """`t v 2`."""
    probability: NDArray[np.float32]
    """`t v`."""
    label: NDArray[np.int64]
    """`t v`."""

    def along(self, paths: Floats, sigma: float) -> Floats:
        """How much stands along paths `... t 2`: the largest probability near by in each frame, `... t`."""
        distance = np.square(paths[..., None, :] - self.place).sum(-1)
        return (self.probability * np.exp(-distance / (2 * sigma**2))).max(-1)

    def without(self, track: "Track") -> "Votes":
        """The votes that a digit on this track does not explain: its own label's near it, and all others' on it."""
        distance = np.abs(self.place - track.path[:, None]).max(-1)
        explained = distance <= np.where(self.label == track.label, 6, 3)
        return replace(self, probability=np.where(explained, 0, self.probability))


@dataclass(frozen=True)
class Track:
    """One digit of a clip."""

    label: int
    """The digit that most of the clip shows along the path."""
    direction: str
    """Of the path's first step, one of `stgen.data.moving_mnist.DIRECTIONS`."""
    path: NDArray[np.float64]
    """`t 2`, pixels of the 64x64 canvas."""
    seen: NDArray[np.float32]
    """`t k`: how surely each digit stands on the path in each frame, 0 to 1."""

    @property
    def confidence(self) -> float:
        """Mean over frames of the surest digit on the path."""
        return float(self.seen.max(1).mean())

    def labels_kept(self) -> bool:
        """Whether the first quarter of the clip shows the same digit as the last."""
        quarter = max(len(self.seen) // 4, 1)
        return bool(self.seen[:quarter].sum(0).argmax() == self.seen[-quarter:].sum(0).argmax())


def simulate(start: Floats, step: Floats, frames: int) -> Floats:
    """Coordinates `... t` in [0, 1] from the first one `...` and the first step `...`; y and x move apart from each other."""
    start, step = np.broadcast_arrays(start, step)
    path = [start]
    for _ in range(frames - 1):
        start, step = bounce(start, step)
        path.append(start)
    return np.stack(path, axis=-1)


def to_pixels(path: Floats) -> Floats:
    """Unit square to pixels, as digits are drawn: rounded down, which is half a pixel in the mean except at the walls."""
    return np.where(path >= 1, FREE, (FREE * path - 0.5).clip(0))


@cache
def _all_paths(frames: int) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """The paths of the first search: starts `m 2`, angles `m`, and the pixels they pass through as numbers `m t` of a map."""
    places, angles = np.linspace(0, 1, FREE // 3 * 2 + 1), np.arange(120) * (2 * np.pi / 120)
    y, x, angle = (a.ravel() for a in np.meshgrid(places, places, angles, indexing="ij"))
    paths = (simulate(start, STEP * step, frames) for start, step in ((y, np.sin(angle)), (x, np.cos(angle))))
    rows, columns = (to_pixels(path).round().astype(np.int64) for path in paths)
    return np.stack([y, x], axis=-1), angle, rows * (FREE + 1) + columns


def search_path(votes: Votes) -> tuple[Floats, float]:
    """The path with the most votes along it, on a grid of 1.5 pixels and 3 degrees: its start `2` and its angle."""
    frames = len(votes.place)
    starts, angles, cells = _all_paths(frames)
    pixels = np.stack(np.meshgrid(np.arange(FREE + 1.0), np.arange(FREE + 1.0), indexing="ij"), axis=-1)
    maps = votes.along(pixels.reshape(-1, 1, 2), sigma=2.0)  # (h w) t
    best = sum(maps[cells[:, t], t] for t in range(frames)).argmax()
    return starts[best], float(angles[best])


def fit_path(start: Floats, angle: float, place: Floats, weight: Floats) -> tuple[Floats, float]:
    """The start `2` and angle near by that lie closest to where the digit was seen, by weighted least squares.

    The network places a digit by its ink, up to a pixel off where its box is, and the same in every frame. Off a wall this
    makes no difference; at a wall it would. So a constant shift of half a pixel (its standard deviation, against 0.4 of the
    noise of a frame) is fitted with the path.

    Args:
        place: `t 2` in pixels; weight: `t`, of each frame.
    """
    angles, cost, starts = angle + np.radians(np.linspace(-4, 4, 81)), np.zeros(81), []
    for axis, step in enumerate((np.sin(angles), np.cos(angles))):
        near = (start[axis] + np.linspace(-2, 2, 41) / FREE).clip(0, 1)
        paths = to_pixels(simulate(near[:, None], STEP * step[None], len(place)))
        error = place[:, axis] - paths  # starts, angles, frames
        shift = (weight * error).sum(-1) / (weight.sum() + (0.4 / 0.5) ** 2)
        squares = (weight * np.square(error - shift[..., None])).sum(-1) + (0.4 / 0.5) ** 2 * np.square(shift)
        starts.append(near[squares.argmin(0)])
        cost += squares.min(0)
    best = cost.argmin()
    return np.array([starts[0][best], starts[1][best]]), float(angles[best])


def find_track(votes: Votes) -> Track:
    """The path of the motion model with the most votes along it, and the digit that stands there."""
    start, angle = search_path(votes)
    for _ in range(3):
        step = STEP * np.array([np.sin(angle), np.cos(angle)])
        unit = simulate(start, step, len(votes.place)).T
        path = to_pixels(unit)
        near = votes.probability * np.exp(-np.square(votes.place - path[:, None]).sum(-1) / (2 * 2.0**2))
        place = (near[..., None] * votes.place).sum(1) / near.sum(1)[:, None].clip(1e-9)
        start, angle = fit_path(start, angle, place, near.max(1))
    seen = np.stack([np.where(votes.label == k, near, 0).max(1) for k in range(DIGITS)], axis=1)
    return Track(int(seen.sum(0).argmax()), first_direction(unit), path, seen)


def read_clip(net: DigitNet, clip: NDArray[np.floating[Any]], digits: int) -> list[Track]:
    """Finds the digits of a clip, the surest first.

    Args:
        clip: float in [0, 1] `t h w c`, 64x64 or 32x32 pixels; colours are averaged.
        digits: how many there should be. Fewer tracks come back where no more are seen.

    Raises:
        ValueError: frames of another size, or fewer than two.
    """
    require(clip.shape[1:3] in [(s, s) for s in SIZES], "size of frames", clip.shape[1:3], "64x64 or 32x32")
    require(len(clip) >= 2, "frames", len(clip), "2 or more, since a direction is asked for")
    votes = collect_votes(net, clip)
    tracks = []
    for _ in range(digits):
        track = find_track(votes)
        if track.confidence < FOUND:
            break
        tracks.append(track)
        votes = votes.without(track)
    return tracks


@torch.no_grad()
def collect_votes(net: DigitNet, clip: NDArray[np.floating[Any]]) -> Votes:
    """Shows all windows of all frames to the network."""
    frames = torch.from_numpy(clip).float().mean(-1)[:, None]
    frames = F.interpolate(frames, size=(CANVAS, CANVAS), mode="bilinear") if frames.shape[-1] != CANVAS else frames
    # Windows beyond the border as well: else a digit at a wall is seen from one side only, and placed too far inside.
    logits, places = net(F.pad(frames, [STRIDE] * 4))
    h, w = logits.shape[2:]
    corners = -STRIDE + STRIDE * torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    probability, order = rearrange(logits.sigmoid(), "t k h w -> t (k h w)").topk(VOTES, dim=1)
    places = rearrange(places + corners, "t k c h w -> t (k h w) c").gather(1, order[..., None].expand(-1, -1, 2))
    probability = torch.where(probability < UNSURE, 0.0, probability)
    return Votes(places.numpy(), probability.numpy(), (order // (h * w)).numpy())


# --- Reading against captions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionScore:
    """How far clips show what their captions say, each a share of the digits that the captions name."""

    digits: float
    """Labels found among those of the caption, each once."""
    directions: float
    """First directions found, likewise."""
    directions_within_45: float
    """The same where the neighbours of a direction count too."""
    both: float
    """Label and direction found of the same digit."""
    whole: float
    """Share of the clips with everything right."""
    kept: float
    """Share of the digits found that are the same in the first and the last quarter of the clip."""
    found: float
    """Digits found at all."""


def score_captions(tracks: Sequence[Sequence[Track]], captions: Sequence[str]) -> CaptionScore:
    """Compares what was read in each clip with its caption.

    Raises:
        ValueError: a caption names no digits with directions, or there are no clips.
    """
    require(len(captions) > 0, "captions", captions, "at least one")
    rows, kept = [], []
    for read, caption in zip(tracks, captions, strict=True):
        asked = parse_caption(caption)
        require(len(asked) > 0, "caption", caption, "one of Moving MNIST, such as 'a 3 moving up'")
        labels, directions, both = (
            sum((Counter(found) & Counter(wanted)).values())
            for found, wanted in (
                ([x.label for x in read], [label for label, _ in asked]),
                ([x.direction for x in read], [direction for _, direction in asked]),
                ([(x.label, x.direction) for x in read], asked),
            )
        )
        turns = [[_turn(x.direction, direction) <= 1 for _, direction in asked] for x in read]
        within = np.array(turns).reshape(len(read), len(asked))
        near = within[linear_sum_assignment(within, maximize=True)].sum()
        rows.append((labels, directions, near, both, len(read), len(asked)))
        kept += [track.labels_kept() for track in read]
    *counts, asked_for = np.array(rows, float).T
    digits, directions_right, within_45, both_right, found = (float(n.sum() / asked_for.sum()) for n in counts)
    return CaptionScore(
        digits=digits,
        directions=directions_right,
        directions_within_45=within_45,
        both=both_right,
        whole=float((counts[3] == asked_for).mean()),
        kept=float(np.mean(kept)) if kept else float("nan"),
        found=found,
    )


def _turn(a: str, b: str) -> int:
    """Eighths of a turn between two directions, 0 to 4."""
    turn = abs(DIRECTIONS.index(a) - DIRECTIONS.index(b))
    return min(turn, len(DIRECTIONS) - turn)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Trains the network that reads digits.")
    parser.add_argument("--out", required=True, type=Path, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    net = train(arguments.steps)
    state = {name: x.half() if x.is_floating_point() else x for name, x in net.state_dict().items()}
    save_file(state, arguments.out, metadata={"steps": str(arguments.steps)})
    print(f"{arguments.out}: {accuracy(DigitNet.pretrained(arguments.out)):.1%} of the held-out digits")


if __name__ == "__main__":
    main()
