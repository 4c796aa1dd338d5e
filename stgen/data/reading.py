"""Reading clips in an order that is a pure function of (seed, position).

A position counts the samples that all ranks together have taken since the run began. The clips of one shape are a bucket,
and a bucket is an endless stream: one seeded permutation of its clips after the other, its epochs. Where there are
several, the positions are cut into blocks of `data.block`, each of one bucket, so that a batch never mixes shapes, and the
blocks of a bucket are spread evenly by its share of the clips. It follows that

- no clip is seen twice before all others of its bucket were seen once, whatever does not fill the last batch included;
- every clip of every bucket is seen equally often: each bucket is at any time within ceil(log2 buckets) / 2 blocks of its
  share, and, where all is kept, exact after every `data.block` epochs of the folder: after each, if it divides all buckets.

Ranks take turns batch by batch, so the sequence of samples does not depend on how many there are, every rank has the same
number of steps, and to resume is to start at another position: no scan, no replay. Shards stay plain WebDataset tars;
the index says where in them a sample lies.
"""

import io
import json
import math
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from stgen import video
from stgen.config import require
from stgen.data.shards import CLIP_FILES, IMAGE_FILES, LATENT, TEXT, read_index


@dataclass
class Bucket:
    """Clips of one shape. A clip belongs to the bucket of exactly its shape: clips are cut and shrunk when they are
    written (`stgen data shard`), not whenever they are read."""

    num_frames: int
    """Frames of a clip; 1 for images."""
    height: int
    """Height of a frame in pixels."""
    width: int
    """Width of a frame in pixels."""
    keep: float = 1.0
    """Share of the bucket's clips that an epoch sees, above 0 up to 1. Nothing is drawn anew for an epoch, as Open-Sora
    does: at 0.5 one epoch sees one half of the clips, and the next the other."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            require(getattr(self, name) >= 1, f"data.buckets.{name}", getattr(self, name), "1 or more")
        require(0 < self.keep <= 1, "data.buckets.keep", self.keep, "above 0, up to 1")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(num_frames, height, width)."""
        return self.num_frames, self.height, self.width


@dataclass
class DataConfig:
    """Which clips, in what shape or shapes."""

    path: str = "???"
    """Folder of shards with an index.jsonl."""
    num_frames: int = 20
    """Frames of a clip; every clip of the folder must have exactly as many. With `buckets`, those of the largest."""
    height: int = 64
    """Height of a frame in pixels; likewise."""
    width: int = 64
    """Width of a frame in pixels; likewise."""
    workers: int = 0
    """Loader processes of each rank; 0 loads in the training process."""
    buckets: list[Bucket] | None = None
    """The shapes of clips, if there are several; every clip must have one of them. `num_frames`, `height` and `width`
    follow from them: they become those of the bucket with the most pixels, and so the defaults of the trained pipeline.
    All share one `batch_size`, since positions, steps and the learning rate count clips."""
    block: int | None = None
    """With `buckets`: how many clips in a row are of one bucket, 8 if null. `batch_size` must divide it. The order of clips
    follows from it, not from `batch_size`; with `batch_size` times the processes, all of them have one shape at a time."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "1 or more")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        if self.buckets is None:
            require(self.block is None, "data.block", self.block, "null without data.buckets")
            return
        require(len(self.buckets) > 0, "data.buckets", self.buckets, "at least one bucket, or null")
        for shape, count in Counter(bucket.shape for bucket in self.buckets).items():
            require(count == 1, "data.buckets", shape, "every (num_frames, height, width) once")
        self.block = 8 if self.block is None else self.block
        require(self.block >= 1, "data.block", self.block, "1 or more")
        self.num_frames, self.height, self.width = max(self.shapes, key=math.prod)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """The (num_frames, height, width) of all clips."""
        if self.buckets is None:
            return [(self.num_frames, self.height, self.width)]
        return [bucket.shape for bucket in self.buckets]


# --- The order ----------------------------------------------------------------------------------------------------


def fold_seed(*parts: int) -> int:
    """One 63-bit seed from several integers, without the collisions of adding them."""
    return int(np.random.SeedSequence([p % 2**64 for p in parts]).generate_state(1, np.uint64)[0] >> 1)


def bucket_of_block(block: int, weights: Sequence[int]) -> tuple[int, int]:
    """Which bucket a block is of, and how many blocks before it were of the same.

    The buckets are halved, and halved again, down to one. Of the first j blocks of two halves the left one has had
    round(j * left / (left + right)), which adds 0 or 1 with each block, as a line of that slope does on a grid of pixels.
    Each halving is at most half a block off, so K buckets are within ceil(log2 K) / 2 blocks of their shares at any time,
    and exact whenever j is a multiple of the sum of the weights.

    Args:
        weights: of the buckets, each 1 or more.
    """
    first, last = 0, len(weights)
    while last - first > 1:
        middle = (first + last) // 2
        left, both = sum(weights[first:middle]), sum(weights[first:last])
        before, after = ((2 * j * left + both) // (2 * both) for j in (block, block + 1))
        if after > before:
            last, block = middle, before
        else:
            first, block = middle, block - before
    return first, block


class ClipOrder:
    """`order[position]` is the clip at a position, as (bucket, number of the clip in its bucket).

    Computed from the position alone; what is kept is each bucket's permutation of the moment.

    Args:
        sizes: clips of each bucket, each 1 or more.
        keep: share of each bucket that an epoch sees; None is all of all.
        block: consecutive positions of one bucket.
        shuffle: False takes each bucket's clips in their own order.
    """

    def __init__(
        self, sizes: Sequence[int], seed: int, keep: Sequence[float] | None = None, block: int = 1, shuffle: bool = True
    ) -> None:
        self.sizes, self.seed, self.block, self.shuffle = sizes, seed, block, shuffle
        self.keep = keep or [1.0] * len(sizes)
        # Fractions of the decimals that were written: 0.1 is a tenth, and shares are exact.
        shares = [Fraction(str(k)) * n for k, n in zip(self.keep, sizes, strict=True)]
        whole = math.lcm(*(share.denominator for share in shares))
        weights = [int(share * whole) for share in shares]
        self.weights = [weight // math.gcd(*weights) for weight in weights]
        self._permutations: dict[tuple[int, int], Tensor] = {}

    def __getitem__(self, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.block)
        bucket, before = bucket_of_block(block, self.weights)
        epoch, i = divmod(before * self.block + offset, self.sizes[bucket])
        return bucket, int(self._permutation(bucket, epoch)[i]) if self.shuffle else i

    def _permutation(self, bucket: int, epoch: int) -> Tensor:
        if (bucket, epoch) not in self._permutations:
            # Bucket 0 has the order of a folder of one shape: SeedSequence pads with zeros.
            generator = torch.Generator().manual_seed(fold_seed(self.seed, epoch, bucket))
            # Two of a bucket are kept, because a batch may span the end of an epoch.
            kept = {(b, e): p for (b, e), p in self._permutations.items() if b != bucket or e == epoch - 1}
            self._permutations = kept | {(bucket, epoch): torch.randperm(self.sizes[bucket], generator=generator)}
        return self._permutations[bucket, epoch]


# --- The clips ----------------------------------------------------------------------------------------------------


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """The frame of an image file, uint8 `1 h w 3`: upright and with transparency on black, as those of a video are.

    Raises:
        ValueError: the bytes are no whole PNG, JPEG or WebP, an animation, or of more than 8 bits a colour.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            # A phone's photo (MPO) carries further pictures, but is no animation.
            animated = getattr(image, "is_animated", False) and image.format != "MPO"
            require(not animated, "image", f"{image.format} of {getattr(image, 'n_frames', 1)} frames", "a single one")
            require(image.mode[0] not in "IF", "image mode", image.mode, "8 bits a colour")
            rgba = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"), np.uint16)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be read as an image: {error}") from error
    return ((rgba[None, ..., :3] * rgba[None, ..., 3:] + 127) // 255).astype(np.uint8)


def decode_clip(files: dict[str, bytes]) -> NDArray[np.uint8]:
    """A sample's frames, uint8 `t h w 3`; grey clips are repeated to RGB.

    Raises:
        ValueError: the clip cannot be decoded.
    """
    extension = next(name for name in CLIP_FILES if name in files)
    if extension in IMAGE_FILES:
        return decode_image(files[extension])
    if extension != "npy":
        return video.read_video(files[extension])[0]
    frames = np.lib.format.read_array(io.BytesIO(files["npy"]), allow_pickle=False)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] not in (1, 3):
        raise ValueError(f"npy holds {frames.dtype} {frames.shape}, allowed: uint8 t h w c with c of 1 or 3")
    return np.broadcast_to(frames, (*frames.shape[:3], 3)) if frames.shape[-1] == 1 else frames


def clip_shape(row: dict[str, Any]) -> tuple[int, int, int]:
    """(num_frames, height, width) of the clip of an index row."""
    return row["num_frames"], row["height"], row["width"]


def read_files(folder: Path, row: dict[str, Any], wanted: Collection[str]) -> dict[str, bytes]:
    """Those of the wanted files that the sample of an index row has, by extension.

    Raises:
        ValueError: the json that travels with the clip says that index and shard do not belong together.
    """
    files = {}
    with (folder / row["shard"]).open("rb") as shard:
        for extension, (offset, size) in row["files"].items():
            if extension in wanted or extension == "json":
                shard.seek(offset)
                files[extension] = shard.read(size)
    if row | json.loads(files["json"]) != row:
        raise ValueError("index and shard do not match")
    return files


def read_clip(files: dict[str, bytes], row: dict[str, Any]) -> Tensor:
    """The pixels of a sample, uint8 `c t h w`."""
    require(
        bool(files.keys() & set(CLIP_FILES)), "files", sorted(files), f"a clip among them ({', '.join(CLIP_FILES)})"
    )
    frames = decode_clip(files)
    if frames.shape[:3] != clip_shape(row):
        raise ValueError(f"holds {frames.shape[:3]}, its index says {clip_shape(row)}")
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))


# --- What `stgen data encode` stored ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """What of a sample is read beside its pixels, or instead of them."""

    latent_shapes: dict[tuple[int, int, int], tuple[int, int, int, int]]
    """(z, t', h', w') of the latents of clips of each shape (t, h, w)."""
    text_dim: int | None
    """Width of the text states; None if they are not read."""
    needs_pixels: Callable[[int, tuple[int, int, int]], bool]
    """Whether the clip at a position, of a shape (t, h, w), is decoded all the same."""


def _read_tensors(files: dict[str, bytes], extension: str) -> dict[str, Tensor]:
    require(extension in files, "files", sorted(files), f"{extension} among them")
    try:
        return load_tensors(files[extension])
    except SafetensorError as error:
        raise ValueError(f"{extension} is corrupt: {error}") from error


def read_latents(files: dict[str, bytes], shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """`{"mean": z t' h' w'}` of a sample's latents, and `logvar` where they have one, as they were stored."""
    tensors = _read_tensors(files, LATENT)
    require("mean" in tensors, f"tensors of {LATENT}", sorted(tensors), "mean, and logvar of a VAE that has one")
    for name, tensor in tensors.items():
        require(tuple(tensor.shape) == shape, f"shape of {name} of {LATENT}", tuple(tensor.shape), f"{shape}")
    return tensors


def read_text(files: dict[str, bytes], dim: int) -> Tensor:
    """The text states `n d` of a sample's caption, as they were stored."""
    tensors = _read_tensors(files, TEXT)
    require("states" in tensors, f"tensors of {TEXT}", sorted(tensors), "states")
    states = tensors["states"]
    require(states.ndim == 2 and states.shape[1] == dim, f"shape of {TEXT}", tuple(states.shape), f"(n, {dim})")
    return states


# --- The data set -------------------------------------------------------------------------------------------------


class ClipDataset(Dataset):
    """Clips by position: `dataset[p]` is `{"video": uint8 c t h w, "caption": str, "fps": frames/s, "position": p, "shape":
    (t, h, w)}`. With `stored` it has `latents` and `text` too, and `video` only where that says so.

    Args:
        stored: what `stgen data encode` stored of all clips; None reads pixels alone.
        shuffle: True is the order of training. False is for looking at the clips one by one: the first `len(dataset)`
            positions are each clip once, as the index has them, with the shapes taking turns.

    Raises:
        ValueError: the folder is unusable, a clip fits no bucket, or a bucket has no clips.
    """

    def __init__(self, config: DataConfig, seed: int = 0, shuffle: bool = True, stored: Stored | None = None) -> None:
        self.folder = Path(config.path)
        self.rows = read_index(config.path)
        self.stored = stored
        if stored is None:
            bare = [row["key"] for row in self.rows if not row["files"].keys() & set(CLIP_FILES)]
            pixels = "clips with pixels; `stgen data encode --drop-pixels` left these out"
            require(not bare, f"data {config.path}", f"{len(bare)} clips of latents alone, such as {bare[:1]}", pixels)
        for extension in [] if stored is None else [LATENT, TEXT] if stored.text_dim is not None else [LATENT]:
            bare = [row["key"] for row in self.rows if extension not in row["files"]]
            whole = f"a {extension} in all; encode the clips again with `stgen data encode`"
            require(
                not bare, f"data {config.path}", f"{len(bare)} clips without {extension}, such as {bare[:1]}", whole
            )
        buckets = config.buckets or [Bucket(config.num_frames, config.height, config.width)]
        members: dict[tuple[int, int, int], list[dict[str, Any]]] = {bucket.shape: [] for bucket in buckets}
        other: list[dict[str, Any]] = []
        for row in self.rows:
            members.get(clip_shape(row), other).append(row)
        if other:
            raise ValueError(
                f"data {config.path}: {len(other)} of {len(self.rows)} clips are not of the configured shape "
                f"(num_frames, height, width) = {' or '.join(map(str, members))}; "
                f"the first, {other[0]['key']}, is {clip_shape(other[0])}"
            )
        found = ", ".join(f"{len(rows)} of {shape}" for shape, rows in members.items() if rows)
        for shape, rows in members.items():
            require(len(rows) > 0, "data.buckets", shape, f"shapes that clips of {config.path} have: {found}")
        self.buckets = list(members.values())
        sizes = [len(rows) for rows in self.buckets]
        if shuffle:
            self.order = ClipOrder(sizes, seed, [bucket.keep for bucket in buckets], config.block or 1)
        else:
            self.order = ClipOrder(sizes, seed, shuffle=False)

    def row(self, position: int) -> dict[str, Any]:
        """The index row of the sample at `position`."""
        bucket, i = self.order[position]
        return self.buckets[bucket][i]

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = self.row(position)
        stored, shape = self.stored, clip_shape(row)
        pixels = stored is None or stored.needs_pixels(position, shape)
        wanted = {*CLIP_FILES} if pixels else set()
        if stored is not None:
            wanted |= {LATENT, TEXT} if stored.text_dim is not None else {LATENT}
        sample = {"caption": row["caption"], "fps": float(row["fps"]), "position": position, "shape": shape}
        try:
            files = read_files(self.folder, row, wanted)
            if pixels:
                sample["video"] = read_clip(files, row)
            if stored is not None:
                sample["latents"] = read_latents(files, stored.latent_shapes[shape])
            if stored is not None and stored.text_dim is not None:
                sample["text"] = read_text(files, stored.text_dim)
        except (ValueError, TypeError, EOFError) as error:
            raise ValueError(f"data {self.folder}: sample {row['key']} of {row['shard']}: {error}") from error
        return sample

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self) -> list[str]:
        """The captions of all clips, from the index."""
        return [row["caption"] for row in self.rows]


class BatchPositions(Sampler[list[int]]):
    """The positions of each of this rank's batches, from `start` on, without end."""

    def __init__(self, start: int, batch_size: int, rank: int, world_size: int) -> None:
        self.start, self.batch_size, self.rank, self.world_size = start, batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.batch_size * self.world_size


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Batch of samples of one shape: `video` uint8 `b c t h w`, `fps` `b` in frames/s, lists of captions and positions.

    With what was stored: `latents` of `b z t' h' w'`, a list `text` of `n d`; then `video` is `k c t h w`, of the k clips
    that `has_video` `b` says.
    """
    videos = [s["video"] for s in samples if "video" in s]
    batch = {
        "video": torch.stack(videos) if videos else torch.empty(0, 3, *samples[0]["shape"], dtype=torch.uint8),
        "fps": torch.tensor([s["fps"] for s in samples]),
        "caption": [s["caption"] for s in samples],
        "position": [s["position"] for s in samples],
    }
    if "latents" in samples[0]:
        batch["latents"] = {name: torch.stack([s["latents"][name] for s in samples]) for name in samples[0]["latents"]}
        batch["has_video"] = torch.tensor(["video" in s for s in samples])
    if "text" in samples[0]:
        batch["text"] = [s["text"] for s in samples]
    return batch


def clip_loader(
    dataset: ClipDataset, start: int, batch_size: int, workers: int, rank: int = 0, world_size: int = 1
) -> Iterator[dict[str, Any]]:
    """Endless batches of one rank, from global position `start` on, each of one bucket.

    Raises:
        ValueError: there are several buckets, and batches of this size would mix them.
    """
    block = dataset.order.block
    if len(dataset.order.sizes) > 1:
        require(block % batch_size == 0, "batch_size", batch_size, f"a divisor of data.block={block}")
        require(start % batch_size == 0, "start", start, f"a multiple of batch_size={batch_size}")
    sampler = BatchPositions(start, batch_size, rank, world_size)
    return iter(
        DataLoader(
            dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate, worker_init_fn=_leave_signals
        )
    )


def _leave_signals(worker: int) -> None:
    """Who preempts a run signals all of its processes; loader workers serve on until the training process has saved."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def to_pixels(clip: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return clip.float() / 127.5 - 1
