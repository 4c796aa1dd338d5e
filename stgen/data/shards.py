"""Writing clip shards, and the index that makes them addressable.

A data folder holds plain WebDataset shards, which any WebDataset reader opens, and one `index.jsonl`. A sample is its clip,
`KEY.mp4` or another of `CLIP_FILES` (npy: uint8 `t h w c`; an image is a clip of one frame), and `KEY.json` `{caption, fps,
num_frames, height, width, source}`; `stgen data encode` adds `ENCODED_FILES`, or puts them in the clip's place. An index row
repeats the json and says where each file lies, `{key, shard, files: {ext: [offset, size]}, ...}`, so that counts and
captions need no scan, and any sample is one `seek` away. Its numbers stand once more as columns in
`index.columns.safetensors`, which is read in no time and can be left out; `skipped.jsonl` names what of the shards is
damaged and therefore not in the index.
"""

import hashlib
import io
import json
import math
import mmap
import os
import re
import tarfile
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from stgen.config import require
from stgen.data.sources import LocalFolder, Pipe, Source, check_name, open_source

INDEX = "index.jsonl"
COLUMNS = "index.columns.safetensors"
SKIPPED = "skipped.jsonl"
IMAGE_FILES = ("png", "jpg", "jpeg", "webp")
VIDEO_FILES = ("mp4", "mkv")
CLIP_FILES = ("npy", *VIDEO_FILES, *IMAGE_FILES)
LATENT, TEXT = ENCODED_FILES = ("latent.safetensors", "text.safetensors")
ENCODING = "encode.json"
"""What `stgen data encode` stored in a folder, and with which models; without an index it is still at work, or was."""
CLIP_FIELDS = ("caption", "fps", "num_frames", "height", "width", "source")
PARTS = ".parts"
"""What `stgen data shard` keeps in a folder while it is at work, or was killed."""
WRITING = ".writing"
"""Stands in a folder while a `ShardWriter` is at work, or was killed."""
PICKLES = ("pkl", "pickle", "pyd", "pth", "pt")
"""Extensions that WebDataset unpickles, which runs whatever code the file holds."""


def open_tar(file: str | BinaryIO) -> Any:
    """WebDataset's writer of a tar, whose bytes follow from those of its samples.

    Raises:
        ValueError: the package webdataset is missing.
    """
    try:
        import webdataset as wds  # reading and training do without
    except ModuleNotFoundError as error:
        raise ValueError("writing shards needs the package webdataset: pip install 'stgen[data]'") from error
    return wds.TarWriter(file, encoder=False, mtime=0)


class ShardWriter:
    """Writes `shard-000000.tar`, ... of `clips_per_shard` clips and, on a clean exit, `index.jsonl`.

    The same samples in the same order give the same bytes. The index is written last and renamed into place, so a
    folder with an index is a whole data set. What an interrupted attempt left is written anew.

    Raises:
        ValueError: the folder already holds an index, or shards that no writer left; nothing else is ever overwritten.
    """

    def __init__(self, folder: str | Path, clips_per_shard: int = 1000) -> None:
        require(clips_per_shard >= 1, "clips_per_shard", clips_per_shard, "1 or more")
        self.folder = Path(folder)
        require(not (self.folder / INDEX).exists(), "out", str(folder), f"a folder without {INDEX}")
        left = list(self.folder.glob("shard-*.tar"))
        interrupted = not left or (self.folder / WRITING).exists()
        require(interrupted, "out", str(folder), f"a folder without shards; {left[0].name if left else ''} is there")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / WRITING).touch()
        for path in left:
            path.unlink()
        self.clips_per_shard = clips_per_shard
        self.count = 0
        self._shards: list[Path] = []
        self._tar: Any = None

    def write(self, key: str, clip: dict[str, Any], **files: bytes) -> None:
        """Adds one sample: `clip` holds `CLIP_FIELDS`, `files` the bytes by extension, such as `mp4=...`."""
        missing = [name for name in CLIP_FIELDS if name not in clip]
        require(not missing, "clip", sorted(clip), f"a dict with {', '.join(CLIP_FIELDS)}")
        # WebDataset takes everything behind the first dot for the extension.
        require("." not in key and "/" not in key, "key", key, "a name without dots and slashes")
        if self.count % self.clips_per_shard == 0:
            self._close_shard()
            self._shards.append(self.folder / f"shard-{len(self._shards):06d}.tar")
            self._tar = open_tar(str(self._shards[-1]))
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
            skipped = write_index(self.folder, self._shards)
            assert not skipped, skipped  # they were written just now
            (self.folder / WRITING).unlink()


# --- Indexing -----------------------------------------------------------------------------------------------------


class Damage(NamedTuple):
    """What cannot be used, and why; the key is empty where it is of no one sample."""

    shard: str
    key: str
    reason: str


def count_reasons(damaged: Iterable[Damage]) -> str:
    """Such as "3 truncated, 1 undecodable"; details behind a colon are left out."""
    counts = Counter(damage.reason.partition(":")[0] for damage in damaged)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


class _ShardReader(io.RawIOBase):
    """A shard as a file that can seek, whatever its source."""

    def __init__(self, source: Source, name: str, size: int) -> None:
        self.source, self.name, self.length, self.position = source, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self.length - self.position))
        data = self.source.read(self.name, self.position, size) if size else b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def clip_fields(values: Any) -> dict[str, Any]:
    """What the json of a sample says, without the names that the index uses for itself.

    Raises:
        ValueError: it is no JSON object, or one of `CLIP_FIELDS` says what cannot be.
    """
    require(isinstance(values, dict), "json", str(values)[:80], "a JSON object")
    for name in ("num_frames", "height", "width"):
        value = values.get(name, 1)
        require(type(value) is int and 1 <= value < 2**31, name, value, "a whole number, 1 or more")
    fps = values.get("fps", 1)
    require(type(fps) in (int, float) and 0 < fps < math.inf, "fps", fps, "frames/s, above 0")
    for name in ("caption", "source"):
        require(isinstance(values.get(name, ""), str), name, values.get(name), "a text")
    return {name: value for name, value in values.items() if name not in ("key", "shard", "files")}


def index_shard(source: Source, name: str) -> tuple[list[dict[str, Any]], list[Damage]]:
    """The index rows of the whole samples of one shard, from its tar headers and json files; and what is not whole.

    Raises:
        ValueError: a sample holds a pickle.
        SourceError: the source fails.
    """
    samples: dict[str, dict[str, Any]] = {}
    damaged: list[Damage] = []
    try:
        size = source.size(name)
        assert size is not None
        # Headers and json files are small and far apart in local shards; every request to a store takes its time.
        file = io.BufferedReader(_ShardReader(source, name, size), 2**13 if isinstance(source, LocalFolder) else 2**20)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                # As WebDataset splits names: everything behind the first dot of the last part is the extension.
                match = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name)
                if not member.isfile() or match is None:
                    continue
                key, extension = match[1], match[2].lower()
                pickled = extension.rpartition(".")[2] in PICKLES
                require(not pickled, f"shard {name}: sample {key}", extension, "files that are no pickles")
                row = samples.setdefault(key, {"key": key, "shard": name, "files": {}})
                if member.offset_data + member.size > size:
                    row["files"].pop(extension, None)
                    continue
                row["files"][extension] = [member.offset_data, member.size]
                if extension == "json":
                    content = tar.extractfile(member)
                    assert content is not None
                    try:
                        row |= clip_fields(json.load(content))
                    except (ValueError, TypeError) as error:
                        row["unreadable"] = f"json unreadable: {error}"
            # A header that makes no sense ends the archive for tarfile, without a word.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                damaged.append(Damage(name, "", f"corrupt: no end of the tar at byte {tar.offset}"))
    except FileNotFoundError:
        return [], [Damage(name, "", "missing")]
    except (tarfile.TarError, EOFError) as error:
        damaged.append(Damage(name, "", f"corrupt: {error}"))
    rows = []
    for row in samples.values():
        missing = [field for field in CLIP_FIELDS if field not in row]
        if "unreadable" in row:
            damaged.append(Damage(name, row["key"], row["unreadable"]))
        elif missing or not row["files"].keys() & {*CLIP_FILES, LATENT}:
            lacks = ", ".join(missing) if missing else f"a clip ({', '.join(CLIP_FILES)})"
            damaged.append(Damage(name, row["key"], f"incomplete: lacks {lacks}"))
        else:
            rows.append(row)
    return rows, damaged


def write_index(
    folder: str | Path, shards: Sequence[Path] | None = None, out: str | Path | None = None
) -> list[Damage]:
    """Indexes `shards`, by default every tar below the folder, into `out/index.jsonl`, written aside and renamed.

    Shards may lie in subfolders, as those of several shapes do. Whole samples of damaged shards are indexed; what is left
    out stands in `out/skipped.jsonl` and is returned.

    Args:
        folder: local, or of a source that lists its files (`stgen.data.sources`).
        out: a local folder, by default `folder` itself.

    Raises:
        ValueError: no shard, not one whole sample, a pickle among the samples, no `out` for a folder elsewhere, or a job
            that writes the folder has not come to its end.
        SourceError: the source fails.
    """
    source = open_source(str(folder))
    if out is None:
        require(isinstance(source, LocalFolder), "out", out, f"a local folder for the index of {folder}")
        out = folder
    if shards is None and isinstance(source, LocalFolder):
        _require_finished(source.folder)
    names = source.shards() if shards is None else [shard.relative_to(folder).as_posix() for shard in shards]
    require(len(names) > 0, "shards", str(folder), "at least one shard in the folder")
    target, skipped, count = Path(out) / INDEX, [], 0
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    with temporary.open("w") as file:
        for name in tqdm(names, desc="index", unit="shard", disable=len(names) < 10, leave=False):
            rows, damaged = index_shard(source, name)
            skipped += damaged
            count += len(rows)
            file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    if count == 0:
        temporary.unlink()
        first = " ".join(part for part in skipped[0] if part) if skipped else "they are empty"
        raise ValueError(f"shards {folder}: no whole sample in {len(names)} shards: {first}")
    (Path(out) / SKIPPED).unlink(missing_ok=True)
    if skipped:
        (Path(out) / SKIPPED).write_text("".join(json.dumps(damage._asdict()) + "\n" for damage in skipped))
    # The index comes last: a folder that has one is a whole data set.
    Index.parse(_mapped(temporary), str(temporary)).save_columns(Path(out) / COLUMNS)
    temporary.replace(target)
    return skipped


# --- The index ----------------------------------------------------------------------------------------------------


def _mapped(path: Path) -> mmap.mmap | bytes:
    """A file that is not read before it is looked at, and that all processes of the machine have once."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


class Index(Sequence[dict[str, Any]]):
    """The rows of an index. Only columns of numbers are in memory, 40 bytes a row; a row is parsed whenever it is asked for.

    Attributes:
        shapes: int32 `n 3`: (num_frames, height, width).
        fps: float64 `n`, frames/s.
        shard: int32 `n`, number of the shard in `shards`.
        ends: int64 `n`, the byte of the shard behind a sample's last.
        layout: int32 `n`, number in `layouts`, the sets of extensions that samples have.
    """

    _COLUMNS = ("starts", "shapes", "fps", "shard", "ends", "layout")

    def __init__(
        self, data: mmap.mmap | bytes, columns: dict[str, NDArray], shards: list[str], layouts: list[str]
    ) -> None:
        self._data, self._starts = data, columns["starts"]
        self.shapes, self.fps, self.shard = columns["shapes"], columns["fps"], columns["shard"]
        self.ends, self.layout = columns["ends"], columns["layout"]
        self.shards, self.layouts = shards, [tuple(layout.split(" ")) for layout in layouts]

    @staticmethod
    def parse(data: mmap.mmap | bytes, name: str) -> "Index":
        """Reads the columns out of the lines themselves.

        Raises:
            ValueError: a line is no row of an index.
        """
        starts, shapes, fps, shard, ends, layout = (array(code) for code in "qidiqi")
        shards: dict[str, int] = {}
        layouts: dict[str, int] = {}
        position = 0
        for line in io.BufferedReader(_Bytes(data), 2**20):
            try:
                row = json.loads(line)
                shapes.extend((row["num_frames"], row["height"], row["width"]))
                fps.append(row["fps"])
                ends.append(max(offset + size for offset, size in row["files"].values()))
                if row["shard"] not in shards:
                    shards[check_name(row["shard"])] = len(shards)
                shard.append(shards[row["shard"]])
                layout.append(layouts.setdefault(" ".join(sorted(row["files"])), len(layouts)))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                raise ValueError(
                    f"data {name} is corrupt in line {len(starts) + 1}: {error}; write it again with `stgen data index`"
                ) from error
            starts.append(position)
            position += len(line)
        starts.append(position)
        columns: dict[str, NDArray] = {
            "starts": np.array(starts, np.int64),
            "shapes": np.array(shapes, np.int32).reshape(-1, 3),
            "fps": np.array(fps, np.float64),
            "shard": np.array(shard, np.int32),
            "ends": np.array(ends, np.int64),
            "layout": np.array(layout, np.int32),
        }
        return Index(data, columns, list(shards), list(layouts))

    def save_columns(self, path: Path) -> None:
        """Writes the columns, with a checksum of the lines that they are of."""
        columns = {name: getattr(self, "_starts" if name == "starts" else name) for name in self._COLUMNS}
        about = {
            "crc32": zlib.crc32(self._data),
            "shards": self.shards,
            "layouts": [" ".join(names) for names in self.layouts],
        }
        temporary = path.with_suffix(".tmp")
        # Under one key, since safetensors writes several in any order.
        save_file(columns, temporary, {"about": json.dumps(about)})
        temporary.replace(path)

    @staticmethod
    def load_columns(data: mmap.mmap | bytes, path: Path) -> "Index | None":
        """The index of these lines by the columns in a file; None if they are of other lines, or there are none."""
        try:
            with safe_open(path, framework="np") as file:
                about = json.loads((file.metadata() or {}).get("about", "{}"))
                if about.get("crc32") != zlib.crc32(data):
                    return None
                columns = {name: file.get_tensor(name) for name in Index._COLUMNS}
        except (OSError, SafetensorError):
            return None
        return Index(data, columns, [check_name(name) for name in about["shards"]], about["layouts"])

    def digest(self) -> str:
        """SHA-256 of the lines."""
        return hashlib.sha256(self._data).hexdigest()

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return json.loads(self._data[self._starts[i] : self._starts[i + 1]])

    def only_shape(self, folder: str) -> tuple[int, int, int]:
        """(num_frames, height, width) of all clips, of the folder that the message names.

        Raises:
            ValueError: there are several.
        """
        shapes = [(int(t), int(h), int(w)) for t, h, w in np.unique(self.shapes, axis=0)]
        one = "clips of one shape; index the subfolder of one, as `stgen data shard` writes it, with `stgen data index`"
        require(len(shapes) == 1, f"data {folder}", f"clips of {', '.join(map(str, shapes))}", one)
        return shapes[0]

    def __getstate__(self) -> dict[str, Any]:
        # A process that is not a fork gets a copy.
        return {**self.__dict__, "_data": bytes(self._data)}


class _Bytes(io.RawIOBase):
    """Bytes, or a mapped file, as a file; BytesIO would copy them."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data, self.position = memoryview(data), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self.data[self.position : self.position + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


def open_index(source: Source) -> Index:
    """The index of a folder, whatever its shards are like.

    Raises:
        ValueError: no index, an empty one, or a corrupt one.
        SourceError: the source fails.
    """
    if isinstance(source, LocalFolder):
        return _load_index(source.folder, str(source.folder / INDEX))
    with tempfile.TemporaryDirectory() as folder:
        try:
            source.fetch(INDEX, Path(folder) / INDEX)
            if not isinstance(source, Pipe):  # which cannot tell that there are none
                source.fetch(COLUMNS, Path(folder) / COLUMNS)
        except FileNotFoundError:
            (Path(folder) / COLUMNS).unlink(missing_ok=True)
        return _load_index(Path(folder), f"{source.url}/{INDEX}")


def _load_index(folder: Path, name: str) -> Index:
    path = folder / INDEX
    if not path.is_file():
        _require_finished(folder)
    if not path.is_file():
        raise ValueError(
            f"data: there is no {name}: write it with `stgen data index`, or name its folder with data.index"
        )
    data = _mapped(path)
    index = Index.load_columns(data, folder / COLUMNS) or Index.parse(data, name)
    require(len(index) > 0, "data", name, "an index with at least one clip")
    return index


def _require_finished(folder: Path) -> None:
    """Raises `ValueError` if a job that writes this folder has not come to its end."""
    if (folder / PARTS).is_dir():
        raise ValueError(f"data {folder} is half written: the same `stgen data shard` again goes on with it")
    if (folder / ENCODING).is_file() and not (folder / INDEX).is_file():
        raise ValueError(f"data {folder} is half encoded: the same `stgen data encode` again goes on with it")
    if any(not (path.parent / INDEX).is_file() for path in folder.rglob(WRITING)):
        raise ValueError(f"data {folder} is half written: the same `stgen data` command again writes it anew")


def missing_parts(source: LocalFolder, index: Index) -> dict[int, str]:
    """The rows whose sample is not in the folder, and why: its shard is missing, or ends before it."""
    sizes = []
    for name in index.shards:
        path = source.folder / name
        sizes.append(path.stat().st_size if path.is_file() else -1)
    size = np.array(sizes)[index.shard]
    rows = np.flatnonzero(index.ends > size)
    return {int(i): "missing shard" if size[i] < 0 else "truncated" for i in rows}


def read_index(folder: str | Path) -> Index:
    """The index of a folder; if that is local, all samples are there.

    Raises:
        ValueError: no folder, no index, an empty or corrupt index, or a shard that is missing or shorter than its index says.
        SourceError: the source fails.
    """
    source = open_source(str(folder))
    index = open_index(source)
    for i, reason in (missing_parts(source, index) if isinstance(source, LocalFolder) else {}).items():
        raise ValueError(f"data {folder}: sample {index[i]['key']} of {index[i]['shard']}: {reason}")
    return index
