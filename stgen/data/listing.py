"""What is to be cut into clips: a folder of videos and images, or a table that names them."""

import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stgen.config import require
from stgen.data.sources import files_below
from stgen.tables import read_table

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Segment:
    """A part of a file, from `start` up to but without `end`, in seconds since its first frame."""

    start: float = 0.0
    end: float = math.inf
    caption: str | None = None
    """None leaves it to the file beside the video."""


@dataclass(frozen=True)
class VideoFile:
    """A video or image, and the parts of it that are asked for, in order and without overlap."""

    path: Path
    source: str
    """Its name in shards and reports: the path below the folder, or as the table has it."""
    segments: tuple[Segment, ...] = (Segment(),)

    @property
    def is_image(self) -> bool:
        """By its name, as a still picture and not as a video of one frame."""
        return self.path.suffix.lower() in IMAGE_SUFFIXES


def list_videos(videos: str | Path, images: bool = False, caption_column: str = "caption") -> list[VideoFile]:
    """The files of a folder, at any depth, or of a table `.csv`, `.jsonl` or `.parquet`, sorted by `source`.

    A table has a column `path`, relative to its own folder, and may have `caption`, `start` and `end` (seconds, empty
    for the file's own): a row then is a part of a file, which may have several. Other columns are not read.

    Args:
        images: list the images of a folder too. A table's images always are.
    Raises:
        ValueError: no such folder or table, nothing in it, or a row is wrong; the message names file, line and column.
    """
    videos = Path(videos)
    if videos.is_file():
        return _list_table(videos, caption_column)
    suffixes = VIDEO_SUFFIXES + IMAGE_SUFFIXES * images
    return [VideoFile(path, path.relative_to(videos).as_posix()) for path in find_videos(videos, suffixes)]


def find_videos(folder: str | Path, suffixes: tuple[str, ...] = VIDEO_SUFFIXES) -> list[Path]:
    """The files below `folder` with one of `suffixes`, at any depth, in sorted order.

    Raises:
        ValueError: no such folder, or none in it.
    """
    folder = Path(folder)
    require(folder.is_dir(), "videos", str(folder), "a folder of videos, or a table .csv, .jsonl or .parquet of them")
    paths = sorted(path for path in files_below(folder) if path.suffix.lower() in suffixes and path.is_file())
    require(len(paths) > 0, "videos", str(folder), f"a folder with files {', '.join(suffixes)} at any depth")
    return paths


def _list_table(table: Path, caption_column: str) -> list[VideoFile]:
    rows: dict[str, list[tuple[Segment, str]]] = {}
    for where, row in read_table(table, "videos"):
        try:
            require("path" in row, "columns", list(row), "path among them")
            require(caption_column in row or caption_column == "caption", "columns", list(row), caption_column)
            path, caption = row["path"], row.get(caption_column)
            require(isinstance(path, str), "path", path, "a text")
            require(caption is None or isinstance(caption, str), caption_column, caption, "a text")
            segment = Segment(_seconds(row, "start", 0.0), _seconds(row, "end", math.inf), caption)
            require(segment.start < segment.end, "end", segment.end, f"more than start, {segment.start}")
            suffixes = VIDEO_SUFFIXES + IMAGE_SUFFIXES
            require(Path(path).suffix.lower() in suffixes, "path", path, f"a file name ending in {', '.join(suffixes)}")
        except ValueError as error:
            raise ValueError(f"{table}: {where}: {error}") from error
        rows.setdefault(os.path.normpath(path), []).append((segment, where))
    require(len(rows) > 0, "videos", str(table), "a table with at least one row")
    files = []
    for source, parts in sorted(rows.items()):
        parts.sort(key=lambda part: part[0].start)
        for (before, first), (after, second) in itertools.pairwise(parts):
            if after.start < before.end:
                raise ValueError(
                    f"{table}: {second}: start of {source} is {after.start}, allowed: {before.end} or more, the end in {first}"
                )
        files.append(VideoFile(table.parent / source, source, tuple(segment for segment, _ in parts)))
    return files


def _seconds(row: dict[str, Any], column: str, default: float) -> float:
    value = row.get(column)
    try:
        seconds = default if value is None else float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    require(seconds >= 0, column, value, "seconds, 0 or more")
    return seconds


def read_caption(path: Path) -> str:
    """The text of `NAME.txt` beside the video, or the "caption" of `NAME.json`, or "".

    Raises:
        ValueError: the file is not UTF-8, no JSON object, or its caption no text; the message names it.
    """
    text, data = path.with_suffix(".txt"), path.with_suffix(".json")
    try:
        if text.is_file():
            return text.read_text(encoding="utf-8").strip()
        values = json.loads(data.read_text(encoding="utf-8")) if data.is_file() else {}
        require(isinstance(values, dict), "what it holds", values, "a JSON object")
        caption = values.get("caption", "")
        require(isinstance(caption, str), "caption", caption, "a text")
    except ValueError as error:
        raise ValueError(f"{text if text.is_file() else data}: {error}") from error
    return caption
