"""Writing clip shards, and the index that makes them addressable.

A data folder holds plain WebDataset shards, which any WebDataset reader opens, and one `index.jsonl`. A sample is its clip,
`KEY.mp4` or another of `CLIP_FILES` (npy: uint8 `t h w c`; an image is a clip of one frame), and `KEY.json` `{caption, fps,
num_frames, height, width, source}`. An index row repeats the json and says where each file lies, `{key, shard, files:
{ext: [offset, size]}, ...}`, so that counts and captions need no scan, and any sample is one `seek` away.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import webdataset as wds

from stgen.config import require

INDEX = "index.jsonl"
IMAGE_FILES = ("png", "jpg", "jpeg", "webp")
CLIP_FILES = ("npy", "mp4", "mkv", *IMAGE_FILES)
CLIP_FIELDS = ("caption", "fps", "num_frames", "height", "width", "source")


class ShardWriter:
    """Writes `shard-000000.tar`, ... of `clips_per_shard` clips and, on a clean exit, `index.jsonl`.

    The same samples in the same order give the same bytes. The index is written last and renamed into place, so a
    folder with an index is a whole data set and a folder without one is an interrupted attempt.

    Raises:
        ValueError: the folder already holds an index; nothing is ever overwritten.
    """

    def __init__(self, folder: str | Path, clips_per_shard: int = 1000) -> None:
        require(clips_per_shard >= 1, "clips_per_shard", clips_per_shard, "1 or more")
        self.folder = Path(folder)
        require(not (self.folder / INDEX).exists(), "out", str(folder), f"a folder without {INDEX}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clips_per_shard = clips_per_shard
        self.count = 0
        self._shards: list[Path] = []
        self._tar: wds.TarWriter | None = None

    def write(self, key: str, clip: dict[str, Any], **files: bytes) -> None:
        """Adds one sample: `clip` holds `CLIP_FIELDS`, `files` the bytes by extension, such as `mp4=...`."""
        missing = [name for name in CLIP_FIELDS if name not in clip]
        require(not missing, "clip", sorted(clip), f"a dict with {', '.join(CLIP_FIELDS)}")
        # WebDataset takes everything behind the first dot for the extension.
        require("." not in key and "/" not in key, "key", key, "a name without dots and slashes")
        if self.count % self.clips_per_shard == 0:
            self._close_shard()
            self._shards.append(self.folder / f"shard-{len(self._shards):06d}.tar")
            self._tar = wds.TarWriter(str(self._shards[-1]), encoder=False, mtime=0)
        assert self._tar is not None
        self._tar.write({"__key__": key, "json": json.dumps(clip).encode(), **files})
        self.count += 1

    def _close_shard(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close_shard()
        if kind is None:
            write_index(self.folder, self._shards)


def index_shard(shard: str | Path) -> Iterator[dict[str, Any]]:
    """The index rows of one shard, from its tar headers and json files.

    Raises:
        ValueError: the shard is missing, empty, no whole tar file, or a sample lacks its json or its clip.
    """
    shard = Path(shard)
    require(shard.is_file(), "shard", str(shard), "a file that exists")
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                row = samples.setdefault(key, {"key": key, "shard": shard.name, "files": {}})
                row["files"][extension] = [member.offset_data, member.size]
                if extension == "json":
                    file = tar.extractfile(member)
                    assert file is not None
                    row |= json.load(file)
    except (tarfile.TarError, json.JSONDecodeError, EOFError) as error:
        raise ValueError(f"shard {shard} is corrupt: {error}") from error
    if not samples:
        raise ValueError(f"shard {shard} is empty")
    for row in samples.values():
        missing = [name for name in CLIP_FIELDS if name not in row]
        if missing or not row["files"].keys() & set(CLIP_FILES):
            lacks = ", ".join(missing) if missing else f"a clip ({', '.join(CLIP_FILES)})"
            raise ValueError(f"shard {shard}: sample {row['key']} lacks {lacks}")
        yield row


def write_index(folder: str | Path, shards: list[Path] | None = None) -> None:
    """Indexes `shards`, by default every tar below the folder, into `folder/index.jsonl`, written aside and renamed.

    Shards may lie in subfolders, as those of several shapes do.
    """
    shards = sorted(Path(folder).rglob("*.tar")) if shards is None else shards
    require(len(shards) > 0, "shards", str(folder), "at least one shard in the folder")
    target = Path(folder) / INDEX
    temporary = target.with_suffix(".tmp")
    with temporary.open("w") as file:
        for shard in shards:
            for row in index_shard(shard):
                file.write(json.dumps(row | {"shard": shard.relative_to(folder).as_posix()}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)


def read_index(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of `folder/index.jsonl`, checked against the shards that lie there.

    Raises:
        ValueError: no folder, no index, an empty index, or a shard that is missing or shorter than its index says.
    """
    folder = Path(folder)
    require(folder.is_dir(), "data", str(folder), "a folder of shards (write one with `stgen data`)")
    path = folder / INDEX
    if not path.is_file():
        hint = "stgen data index" if list(folder.glob("*.tar")) else "stgen data"
        raise ValueError(f"data {folder} has no {INDEX}: write it with `{hint}`")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise ValueError(f"data {path} is corrupt: {error}; write it again with `stgen data index`") from error
    require(len(rows) > 0, "data", str(path), "an index with at least one clip")
    ends: dict[str, int] = {}
    for row in rows:
        ends[row["shard"]] = max(
            [ends.get(row["shard"], 0), *(offset + size for offset, size in row["files"].values())]
        )
    for name, end in ends.items():
        shard = folder / name
        if not shard.is_file():
            raise ValueError(f"data {folder}: shard {name} is in the index but not in the folder")
        if shard.stat().st_size < end:
            raise ValueError(
                f"data {folder}: shard {name} has {shard.stat().st_size} bytes, its index says {end}: torn"
            )
    return rows
