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

In the place of a damaged clip stands the next one of its bucket's epoch that is whole, which is a function of (seed,
position) and the shards, so nothing of the above changes: not with the ranks, the workers, or where a run was resumed.
"""

import atexit
import io
import itertools
import json
import math
import multiprocessing
import signal
import warnings
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
from stgen.data.color import YUV420, from_planes, stack_clips
from stgen.data.shards import (
    CLIP_FILES,
    IMAGE_FILES,
    LATENT,
    TEXT,
    VIDEO_FILES,
    Damage,
    Index,
    clip_fields,
    count_reasons,
    missing_parts,
    open_index,
)
from stgen.data.sources import GIB, Cached, LocalFolder, Source, open_source


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
    """Folder of shards with an index.jsonl: local, http(s)://, s3://, gs://, hf://datasets/..., or `pipe:COMMAND`, a shell
    command that writes a file to its output, with `{}` for the file's name, such as `pipe:rclone cat store:clips/{}`."""
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
    index: str | None = None
    """Folder of the index, of any of these kinds, if it does not lie with the shards."""
    cache: str | None = None
    """Local folder into which shards from elsewhere are fetched whole, for all processes and runs of a machine; null reads
    just the parts of each clip, which a pipe and a web server without Range do not allow. Every clip comes from another
    shard, so the cache should hold all of them."""
    cache_gib: float = 100.0
    """GiB that the cache may hold; the shards longest not read go first."""
    max_damaged: float = 0.01
    """Share of the index's clips that may turn out damaged, 0 to 1. They are counted, and others stand in for them; past
    this share the run stops and names them."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "1 or more")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(self.cache_gib > 0, "data.cache_gib", self.cache_gib, "above 0")
        require(0 <= self.max_damaged <= 1, "data.max_damaged", self.max_damaged, "0 to 1")
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
        return next(self.candidates(position))

    def candidates(self, position: int) -> Iterator[tuple[int, int]]:
        """The clip at a position, and behind it those that stand in for it in turn: all others of its bucket, as they
        follow in the epoch and then from its beginning."""
        block, offset = divmod(position, self.block)
        bucket, before = bucket_of_block(block, self.weights)
        size = self.sizes[bucket]
        epoch, first = divmod(before * self.block + offset, size)
        for i in itertools.chain(range(first, size), range(first)):
            yield bucket, int(self._permutation(bucket, epoch)[i]) if self.shuffle else i

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
    frames = decode_npy(files["npy"])
    return np.broadcast_to(frames, (*frames.shape[:3], 3)) if frames.shape[-1] == 1 else frames


def decode_npy(data: bytes) -> NDArray[np.uint8]:
    """The array of an npy file, where it lies in its bytes: a header that lies asks for no memory, and none is unpickled."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = header(file)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape:
        raise ValueError(f"npy holds {dtype} {shape}, allowed: uint8 t h w c with c of 1 or 3")
    return np.frombuffer(data, np.uint8, offset=file.tell()).reshape(shape, order="F" if fortran_order else "C")


def clip_shape(row: dict[str, Any]) -> tuple[int, int, int]:
    """(num_frames, height, width) of the clip of an index row."""
    return row["num_frames"], row["height"], row["width"]


class DamagedSample(Exception):
    """A sample that cannot be used; the message is the reason, its kind before the first colon."""


def read_files(source: Source, row: dict[str, Any], wanted: Collection[str]) -> dict[str, bytes]:
    """Those of the wanted files that the sample of an index row has, by extension.

    Raises:
        DamagedSample: the shard is missing or torn, or the json that travels with the clip says that index and shard do not
            belong together.
        SourceError: the source fails.
    """
    if "json" not in row["files"]:
        raise DamagedSample("incomplete: lacks json")
    parts = {name: (part[0], part[1]) for name, part in row["files"].items() if name in wanted or name == "json"}
    try:
        files = dict(zip(parts, source.read_parts(row["shard"], list(parts.values())), strict=True))
    except FileNotFoundError as error:
        raise DamagedSample("missing shard") from error
    if any(len(files[name]) < size for name, (_, size) in parts.items()):
        raise DamagedSample("truncated")
    try:
        fields = clip_fields(json.loads(files["json"]))
        # As texts again if they differ, since NaN is not equal to itself.
        matches = row | fields == row or json.dumps(row | fields) == json.dumps(row)
    except (ValueError, TypeError) as error:
        raise DamagedSample(f"index mismatch: {error}") from error
    if not matches:
        raise DamagedSample("index mismatch: index and shard do not match")
    return files


def read_clip(files: dict[str, bytes], row: dict[str, Any]) -> Tensor | YUV420:
    """The pixels of a sample: RGB uint8 `c t h w`, or the planes of a YUV 4:2:0 video.

    Raises:
        DamagedSample: there is no clip, it cannot be decoded, or it is of another shape than the index says.
    """
    if not files.keys() & set(CLIP_FILES):
        raise DamagedSample(f"incomplete: lacks a clip ({', '.join(CLIP_FILES)})")
    extension = next(name for name in CLIP_FILES if name in files)
    try:
        coded = video.read_yuv420(files[extension]) if extension in VIDEO_FILES else None
        frames = decode_clip(files) if coded is None else coded[0]
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what they like on garbage
        raise DamagedSample(f"undecodable: {' '.join(str(error).split())}") from error
    t, h, w = frames.shape[:3]
    shape = (t, h, w) if coded is None else (t, 2 * h // 3, w)
    if shape != clip_shape(row):
        raise DamagedSample(f"wrong shape: holds {shape}, its index says {clip_shape(row)}")
    return from_planes(*coded) if coded else torch.from_numpy(frames.transpose(3, 0, 1, 2).copy())


# --- What `stgen data encode` stored ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """What of a sample is read beside its pixels, or instead of them."""

    latent_shapes: dict[tuple[int, int, int], tuple[int, int, int, int]]
    """(z, t', h', w') of the latents of clips of each shape (t, h, w)."""
    moments: tuple[str, ...]
    """Of the distribution of latents: `mean`, or `mean` and `logvar`."""
    text_dim: int | None
    """Width of the text states; None if they are not read."""
    needs_pixels: Callable[[int, tuple[int, int, int]], bool]
    """Whether the clip at a position, of a shape (t, h, w), is decoded all the same."""

    @property
    def files(self) -> tuple[str, ...]:
        """What each sample must have, by extension."""
        return (LATENT,) if self.text_dim is None else (LATENT, TEXT)


def _read_tensors(files: dict[str, bytes], extension: str, names: Sequence[str]) -> list[Tensor]:
    if extension not in files:
        raise DamagedSample(f"incomplete: lacks {extension}")
    try:
        tensors = load_tensors(files[extension])
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:  # a torn header may say anything
        raise DamagedSample(f"undecodable: {extension}: {error}") from error
    missing = [name for name in names if name not in tensors]
    if missing:
        raise DamagedSample(f"incomplete: {extension} holds {sorted(tensors)}, not {', '.join(missing)}")
    return [tensors[name] for name in names]


def read_latents(
    files: dict[str, bytes], moments: Sequence[str], shape: tuple[int, int, int, int]
) -> dict[str, Tensor]:
    """The moments `z t' h' w'` of a sample's latents, as they were stored. Raises `DamagedSample`."""
    tensors = dict(zip(moments, _read_tensors(files, LATENT, moments), strict=True))
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shape:
            raise DamagedSample(f"wrong shape: {name} of {LATENT} is {tuple(tensor.shape)}, of this VAE {shape}")
    return tensors


def read_text(files: dict[str, bytes], dim: int) -> Tensor:
    """The text states `n d` of a sample's caption, as they were stored. Raises `DamagedSample`."""
    (states,) = _read_tensors(files, TEXT, ["states"])
    if states.ndim != 2 or states.shape[1] != dim:
        raise DamagedSample(f"wrong shape: {TEXT} is {tuple(states.shape)}, of this encoder (n, {dim})")
    return states


# --- The data set -------------------------------------------------------------------------------------------------


class ClipDataset(Dataset):
    """Clips by position: `dataset[p]` is `{"video": RGB uint8 c t h w or YUV420, "caption": str, "fps": frames/s, "position": p,
    "shape": (t, h, w), "damaged": what it stands in for}`; `stgen.data.color` makes RGB and pixels in [-1, 1] of either.

    With something stored it has `latents` and `text` too, and `video` only where that needs it.

    Args:
        shuffle: True is the order of training. False is for looking at the clips one by one: the first `len(dataset)`
            positions are each clip once, as the index has them, with the shapes taking turns, and nothing stands in for
            what is damaged.
        find_stored: told the source and its index, says what to read of what `stgen data encode` stored; None reads pixels.

    Raises:
        ValueError: the folder is unusable, clips lack what is to be read, a clip fits no bucket, a bucket has no clips, or
            more clips than `data.max_damaged` are known to be damaged (of a local folder: missing or truncated). Of
            `dataset[p]`: a clip is damaged without `shuffle`, or all that could stand in for it are; the source fails.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int = 0,
        shuffle: bool = True,
        find_stored: Callable[[Source, Index], Stored | None] | None = None,
    ) -> None:
        self.config, self.shuffle = config, shuffle
        self.source = open_source(config.path, config.cache, config.cache_gib)
        # The index is not cached: it is small, and may change.
        self.rows = open_index(open_source(config.index or config.path))
        self.stored = None if find_stored is None else find_stored(self.source, self.rows)
        self._require_files()
        buckets = config.buckets or [Bucket(config.num_frames, config.height, config.width)]
        shapes = [bucket.shape for bucket in buckets]
        self.buckets = [np.flatnonzero((self.rows.shapes == shape).all(1)) for shape in shapes]
        self._require_all_fit(shapes)
        sizes = [len(rows) for rows in self.buckets]
        if shuffle:
            self.order = ClipOrder(sizes, seed, [bucket.keep for bucket in buckets], config.block or 1)
        else:
            self.order = ClipOrder(sizes, seed, shuffle=False)
        missing = {}
        if isinstance(self.source, LocalFolder):
            missing = missing_parts(self.source, self.rows)
        else:
            self._check_source()
        # Apart for whether pixels are read, since latents may be whole beside a torn clip.
        self._damaged = {False: missing, True: dict(missing)}
        self.check_damage([self._damage(i, reason) for i, reason in missing.items()])

    def _require_files(self) -> None:
        """Raises `ValueError` if there are clips without what is to be read of each."""
        layouts = [set(files) for files in self.rows.layouts]
        if self.stored is None:
            lacking = {"pixels": [LATENT in files and not files & set(CLIP_FILES) for files in layouts]}
            hint = "`stgen data encode --drop-pixels` left them out"
        else:
            lacking = {name: [name not in files for files in layouts] for name in self.stored.files}
            hint = "encode all clips with `stgen data encode`, or set use_encoded=false"
        for name, layout_lacks in lacking.items():
            bare = np.flatnonzero(np.array(layout_lacks)[self.rows.layout])
            if len(bare):
                key = self.rows[int(bare[0])]["key"]
                raise ValueError(
                    f"data {self.config.path}: {len(bare)} of {len(self.rows)} clips have no {name}, such as {key}; {hint}"
                )

    def _check_source(self) -> None:
        self.source.check_random_access(self.rows.shards[0])
        if isinstance(self.source, Cached):
            sizes = np.zeros(len(self.rows.shards), np.int64)
            np.maximum.at(sizes, self.rows.shard, self.rows.ends)
            if sizes.sum() > self.source.limit:
                warnings.warn(
                    f"data.cache_gib={self.config.cache_gib:g} holds not all of the {sizes.sum() / GIB:.3g} GiB of "
                    f"{self.config.path}, and each clip is of another shard: shards will be fetched again and again",
                    stacklevel=3,
                )

    def _require_all_fit(self, shapes: list[tuple[int, int, int]]) -> None:
        path, fits = self.config.path, np.zeros(len(self.rows), bool)
        for rows in self.buckets:
            fits[rows] = True
        other = np.flatnonzero(~fits)
        if len(other):
            first = self.rows[int(other[0])]
            raise ValueError(
                f"data {path}: {len(other)} of {len(self.rows)} clips are not of the configured shape "
                f"(num_frames, height, width) = {' or '.join(map(str, shapes))}; "
                f"the first, {first['key']}, is {clip_shape(first)}"
            )
        pairs = list(zip(shapes, map(len, self.buckets), strict=True))
        found = ", ".join(f"{count} of {shape}" for shape, count in pairs if count)
        for shape, count in pairs:
            require(count > 0, "data.buckets", shape, f"shapes that clips of {path} have: {found}")

    def row(self, position: int) -> dict[str, Any]:
        """The index row of the sample at `position`; where it is damaged another stands in for it."""
        bucket, i = self.order[position]
        return self.rows[int(self.buckets[bucket][i])]

    def read(self, row: dict[str, Any], position: int, pixels: bool = True) -> dict[str, Any]:
        """The sample of an index row, as it stands at a position, with its pixels or without.

        Raises:
            DamagedSample: it cannot be used.
            SourceError: the source fails.
        """
        stored, shape = self.stored, clip_shape(row)
        wanted = (*(CLIP_FILES if pixels else ()), *(stored.files if stored is not None else ()))
        files = read_files(self.source, row, wanted)
        sample = {"caption": row["caption"], "fps": float(row["fps"]), "position": position, "shape": shape}
        if pixels:
            sample["video"] = read_clip(files, row)
        if stored is not None:
            sample["latents"] = read_latents(files, stored.moments, stored.latent_shapes[shape])
        if stored is not None and stored.text_dim is not None:
            sample["text"] = read_text(files, stored.text_dim)
        return sample

    def __getitem__(self, position: int) -> dict[str, Any]:
        damaged: list[Damage] = []
        for bucket, i in self.order.candidates(position):
            number = int(self.buckets[bucket][i])
            row = self.rows[number]
            pixels = self.stored is None or self.stored.needs_pixels(position, clip_shape(row))
            known = self._damaged[pixels]
            if number not in known:
                try:
                    return {**self.read(row, position, pixels), "damaged": damaged}
                except DamagedSample as error:
                    # Kept so that it is not read again; whoever has not read it finds the same.
                    known[number] = str(error)
            damaged.append(self._damage(number, known[number]))
            if not self.shuffle:
                raise ValueError(
                    f"data {self.config.path}: sample {' of '.join(damaged[0][1::-1])}: {damaged[0].reason}"
                )
        raise ValueError(f"data {self.config.path}: all clips of a bucket are damaged: {count_reasons(damaged)}")

    def _damage(self, number: int, reason: str) -> Damage:
        row = self.rows[number]
        return Damage(row["shard"], row["key"], reason)

    def check_damage(self, damaged: Collection[Damage]) -> None:
        """Raises `ValueError`, naming the clips, if these are more than `data.max_damaged` of all."""
        if len(damaged) > self.config.max_damaged * len(self):
            named = "; ".join(f"{d.key} of {d.shard}: {d.reason}" for d in itertools.islice(damaged, 20))
            more = f"; and {len(damaged) - 20} more" if len(damaged) > 20 else ""
            raise ValueError(
                f"data {self.config.path}: {len(damaged)} of {len(self)} clips are damaged ({count_reasons(damaged)}), "
                f"allowed: a share of data.max_damaged={self.config.max_damaged}: {named}{more}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self) -> list[str]:
        """The captions of all clips, from the index."""
        return [row["caption"] for row in self.rows]


class DamageLog:
    """What of the data was passed over, by all ranks together since the process began."""

    def __init__(self, dataset: ClipDataset) -> None:
        self.dataset = dataset
        self.found: dict[tuple[str, str], Damage] = {}
        self._new: list[Damage] = []

    def add(self, damaged: Collection[Damage]) -> None:
        """What stands under `damaged` in a batch of this rank."""
        self._new += damaged

    def share(self, gather: Callable[[list[Damage]], list[Damage]], path: Path | None = None) -> list[Damage]:
        """What no rank had met before, after all ranks have told each other by `gather`; each must call this.

        Args:
            path: a file that gets a row for each, of one rank alone.

        Raises:
            ValueError: more than `data.max_damaged` of all clips are damaged; on all ranks at once.
        """
        new = {damage[:2]: damage for damage in sorted(gather(self._new)) if damage[:2] not in self.found}
        self.found |= new
        self._new = []
        if path is not None and new:
            with path.open("a") as file:
                file.writelines(json.dumps(damage._asdict()) + "\n" for damage in new.values())
        self.dataset.check_damage(self.found.values())
        return list(new.values())

    def metrics(self) -> dict[str, float]:
        """`data/skipped`, the number of different clips, and `data/skipped/REASON`."""
        reasons = Counter(damage.reason.partition(":")[0] for damage in self.found.values())
        by_reason = {f"data/skipped/{reason.replace(' ', '_')}": float(n) for reason, n in sorted(reasons.items())}
        return {"data/skipped": float(len(self.found)), **by_reason}


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
    """Batch of samples of one shape: `video` RGB uint8 `b c t h w` or YUV420, `fps` `b` in frames/s, lists of captions and
    positions, their one `shape` (t, h, w), and one list of all that is `damaged`.

    With what was stored: `latents` of `b z t' h' w'`, a list `text` of `n d`; then `video` is of the k clips that
    `has_video`, bool `b`, says.
    """
    videos = [s["video"] for s in samples if "video" in s]
    batch: dict[str, Any] = {
        "video": stack_clips(videos) if videos else torch.empty(0, 3, *samples[0]["shape"], dtype=torch.uint8),
        "fps": torch.tensor([s["fps"] for s in samples]),
        "caption": [s["caption"] for s in samples],
        "position": [s["position"] for s in samples],
        "shape": samples[0]["shape"],
        "damaged": [damage for s in samples for damage in s["damaged"]],
    }
    if "latents" in samples[0]:
        batch["latents"] = {name: torch.stack([s["latents"][name] for s in samples]) for name in samples[0]["latents"]}
        batch["has_video"] = torch.tensor(["video" in s for s in samples])
    if "text" in samples[0]:
        batch["text"] = [s["text"] for s in samples]
    return batch


class _ErrorsAsSamples(Dataset):
    """A worker would hand on an exception as a traceback of many lines; a user's mistake, or his network's, is one line."""

    def __init__(self, dataset: ClipDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, position: int) -> dict[str, Any] | ValueError:
        try:
            return self.dataset[position]
        except ValueError as error:
            return error


def _collate_or_hand_on(samples: list[dict[str, Any] | ValueError]) -> dict[str, Any] | ValueError:
    return next((s for s in samples if isinstance(s, ValueError)), None) or collate(samples)  # type: ignore[arg-type]


def _raise_errors(batches: Iterator[dict[str, Any] | ValueError]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        if isinstance(batch, ValueError):
            raise batch
        yield batch


def clip_loader(
    dataset: ClipDataset, start: int, batch_size: int, workers: int, rank: int = 0, world_size: int = 1
) -> Iterator[dict[str, Any]]:
    """Endless batches of one rank, from global position `start` on, each of one bucket. Ranks and workers may be more than
    there are shards: each reads just the clips that it is asked for.

    Raises:
        ValueError: there are several buckets, and batches of this size would mix them. While it runs, as `dataset[p]`.
    """
    block = dataset.order.block
    if len(dataset.order.sizes) > 1:
        require(block % batch_size == 0, "batch_size", batch_size, f"a divisor of data.block={block}")
        require(start % batch_size == 0, "start", start, f"a multiple of batch_size={batch_size}")
    sampler = BatchPositions(start, batch_size, rank, world_size)
    samples = _ErrorsAsSamples(dataset)
    loader = DataLoader(
        samples,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate_or_hand_on,
        worker_init_fn=_leave_signals,
    )
    return _raise_errors(iter(loader))


def _leave_signals(worker: int) -> None:
    """Who preempts a run signals all of its processes; loader workers serve on until the training process has saved."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """At its exit multiprocessing sends daemons SIGTERM and waits for them; workers, who leave that signal alone, would
    keep a process that an error ends with its loader open waiting for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's own makes an error of the end of a worker
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
