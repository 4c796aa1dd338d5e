"""Reading clips in an order that is a pure function of (seed, position).

A position counts the samples that all ranks together have taken since the run began. The epoch is `position // n`, and
each epoch is its own seeded permutation of the index. Ranks take turns within a batch, so the sequence of samples does
not depend on how many there are, every rank has the same number of steps, and to resume is to start at another position:
no scan, no replay. Shards stay plain WebDataset tars; the index says where in them a sample lies.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from stgen import video
from stgen.config import require
from stgen.data.shards import read_index


@dataclass
class DataConfig:
    """Which clips, in what shape."""

    path: str = "???"
    """Folder of shards with an index.jsonl."""
    num_frames: int = 20
    """Frames of a clip; every clip of the folder must have exactly as many."""
    height: int = 64
    """Height of a frame in pixels; likewise."""
    width: int = 64
    """Width of a frame in pixels; likewise."""
    workers: int = 0
    """Loader processes of each rank; 0 loads in the training process."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "1 or more")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")


def decode_clip(files: dict[str, bytes]) -> NDArray[np.uint8]:
    """A sample's frames, uint8 `t h w 3`; grey clips are repeated to RGB."""
    if "npy" in files:
        frames = np.load(io.BytesIO(files["npy"]), allow_pickle=False)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] not in (1, 3):
            raise ValueError(f"npy holds {frames.dtype} {frames.shape}, allowed: uint8 t h w c with c of 1 or 3")
        return np.broadcast_to(frames, (*frames.shape[:3], 3)) if frames.shape[-1] == 1 else frames
    return video.read_video(files["mp4"] if "mp4" in files else files["mkv"])[0]


class ClipDataset(Dataset):
    """Clips by position: `dataset[p]` is `{"video": uint8 c t h w, "caption": str, "position": p}`.

    Raises:
        ValueError: the folder is unusable, or holds clips of another shape than the configuration's.
    """

    def __init__(self, config: DataConfig, seed: int = 0, shuffle: bool = True) -> None:
        self.folder = Path(config.path)
        self.rows = read_index(config.path)
        self.shape = (config.num_frames, config.height, config.width)
        other = [r for r in self.rows if (r["num_frames"], r["height"], r["width"]) != self.shape]
        if other:
            first = (other[0]["num_frames"], other[0]["height"], other[0]["width"])
            raise ValueError(
                f"data {config.path}: {len(other)} of {len(self.rows)} clips are not of the configured shape "
                f"(num_frames, height, width) = {self.shape}; the first, {other[0]['key']}, is {first}"
            )
        self.seed, self.shuffle = seed, shuffle
        self._permutations: dict[int, Tensor] = {}

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(fold_seed(self.seed, epoch))
            # Two are kept, because a batch may span the end of an epoch.
            kept = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations = kept | {epoch: torch.randperm(len(self.rows), generator=generator)}
        return self._permutations[epoch]

    def row(self, position: int) -> dict[str, Any]:
        """The index row of the sample at `position`."""
        epoch, i = divmod(position, len(self.rows))
        return self.rows[int(self._permutation(epoch)[i]) if self.shuffle else i]

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = self.row(position)
        files = {}
        with (self.folder / row["shard"]).open("rb") as shard:
            for extension, (offset, size) in row["files"].items():
                shard.seek(offset)
                files[extension] = shard.read(size)
        try:
            # The json travels with the clip, so it tells whether index and shard still belong together.
            if json.loads(files["json"])["caption"] != row["caption"]:
                raise ValueError("index and shard do not match")
            frames = decode_clip(files)
            if frames.shape[:3] != self.shape:
                raise ValueError(f"holds {frames.shape[:3]}, its index says {self.shape}")
        except (ValueError, EOFError) as error:
            raise ValueError(f"data {self.folder}: sample {row['key']} of {row['shard']}: {error}") from error
        clip = torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))
        return {"video": clip, "caption": row["caption"], "fps": float(row["fps"]), "position": position}

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self) -> list[str]:
        """The captions of all clips, from the index."""
        return [row["caption"] for row in self.rows]


def fold_seed(*parts: int) -> int:
    """One 63-bit seed from several integers, without the collisions of adding them."""
    return int(np.random.SeedSequence([p % 2**64 for p in parts]).generate_state(1, np.uint64)[0] >> 1)


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
    """Batch of samples: `video` uint8 `b c t h w`, `fps` `b` in frames/s, lists of captions and positions."""
    return {
        "video": torch.stack([s["video"] for s in samples]),
        "fps": torch.tensor([s["fps"] for s in samples]),
        "caption": [s["caption"] for s in samples],
        "position": [s["position"] for s in samples],
    }


def clip_loader(
    dataset: ClipDataset, start: int, batch_size: int, workers: int, rank: int = 0, world_size: int = 1
) -> Iterator[dict[str, Any]]:
    """Endless batches of one rank, from global position `start` on."""
    sampler = BatchPositions(start, batch_size, rank, world_size)
    return iter(DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate))


def to_pixels(clip: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return clip.float() / 127.5 - 1
