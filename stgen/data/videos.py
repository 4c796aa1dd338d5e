"""A folder of videos, as people have them, cut into clip shards.

Every video file below the folder is decoded frame by frame, brought to one size and cut into consecutive clips of
equal length. Nothing is left out in silence: `dropped.jsonl` beside the shards has a row `{source, reason, clips,
frames, detail}` for each file, or end of a file, that did not become clips: the clips that came before it, the frames
left over (null where nobody counted them) and the error message, if there was one.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from stgen import video
from stgen.config import require
from stgen.data.shards import ShardWriter

SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif", ".m4v")
DROPPED = "dropped.jsonl"


class _Dropped(Exception):
    """Why a file gives no further clips."""

    def __init__(self, reason: str, frames: int | None = None, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.frames, self.detail = reason, frames, detail


def shard_videos(
    videos: str | Path, out: str | Path, num_frames: int, height: int, width: int, clips_per_shard: int = 256
) -> None:
    """Cuts every video below `videos` into clips of `num_frames` frames, `height` x `width`, and writes them as shards.

    Frames are shrunk (antialiased) until they just cover the size, then cropped about their centre. A clip's caption
    is the text of `NAME.txt` beside `NAME.mp4`, or the "caption" of `NAME.json`, or empty. Files are taken in sorted
    order, so the same folder gives the same shards.

    Raises:
        ValueError: an argument is out of range, `videos` has no video, `out` holds an index, or no clip came out.
    """
    for name, value in (("num_frames", num_frames), ("height", height), ("width", width)):
        require(value >= 1, name, value, "1 or more")
    videos, out = Path(videos), Path(out)
    paths = find_videos(videos)
    names: set[str] = set()
    dropped: Counter[str] = Counter()
    used = 0
    with ShardWriter(out, clips_per_shard) as writer, (out / DROPPED).open("w") as log:
        for path in tqdm(paths, desc="shard", unit="file"):
            source = path.relative_to(videos).as_posix()
            name = _unique(source.replace("/", "_").replace(".", "_"), names)
            clips = 0
            try:
                try:
                    caption, fps = read_caption(path), 0.0
                except ValueError as error:
                    raise _Dropped("with an unreadable caption", detail=str(error)) from error
                for frames in _cut(path, num_frames, height, width):
                    fps = fps or video.frame_rate(path)
                    clip = {"caption": caption, "fps": fps, "num_frames": num_frames, "height": height, "width": width}
                    try:
                        data = video.encode_video(frames, fps)
                    except ValueError as error:  # the rate that a broken header claims
                        raise _Dropped("unencodable", detail=str(error)) from error
                    writer.write(f"{name}-{clips:05d}", {**clip, "source": source}, mp4=data)
                    clips += 1
            except _Dropped as drop:
                dropped[drop.reason] += 1
                row = {"source": source, "reason": drop.reason, "clips": clips, "frames": drop.frames}
                log.write(json.dumps({**row, "detail": drop.detail}) + "\n")
            used += clips > 0
        counted = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "nothing"
        if writer.count == 0:
            raise ValueError(
                f"videos {videos}: no clip in {len(paths)} files; dropped: {counted} (see {out / DROPPED})"
            )
    print(f"{out}: {writer.count} clips of {num_frames}x{height}x{width} from {used} of {len(paths)} files")
    print(f"dropped: {counted}" + (f" (see {out / DROPPED})" if dropped else ""))


def _unique(name: str, taken: set[str]) -> str:
    """`name`, or `name_2`, ... if another file's path came out the same."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def find_videos(folder: str | Path) -> list[Path]:
    """The video files below `folder`, at any depth, in sorted order.

    Raises:
        ValueError: no such folder, or none in it.
    """
    folder = Path(folder)
    require(folder.is_dir(), "videos", str(folder), "a folder of videos")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    require(len(paths) > 0, "videos", str(folder), f"a folder with files {', '.join(SUFFIXES)} at any depth")
    return paths


def read_caption(path: Path) -> str:
    """The text of `NAME.txt` beside the video, or the "caption" of `NAME.json`, or "".

    Raises:
        ValueError: the file is not UTF-8, no JSON object, or its caption no text.
    """
    text, data = path.with_suffix(".txt"), path.with_suffix(".json")
    if text.is_file():
        return text.read_text(encoding="utf-8").strip()
    values = json.loads(data.read_text(encoding="utf-8")) if data.is_file() else {}
    require(isinstance(values, dict), str(data), values, "a JSON object")
    caption = values.get("caption", "")
    require(isinstance(caption, str), "caption", caption, "a text")
    return caption


def _cut(path: Path, num_frames: int, height: int, width: int) -> Iterator[NDArray[np.uint8]]:
    """Consecutive clips `t h w 3` of a file of any length, of which no more than one clip is in memory."""
    clip: list[NDArray[np.uint8]] = []
    try:
        for frame in video.stream_video(path):
            if frame.shape[0] < height or frame.shape[1] < width:
                raise _Dropped(f"smaller than {height}x{width}", detail=f"{frame.shape[0]}x{frame.shape[1]}")
            clip.append(_cover(frame, height, width))
            if len(clip) == num_frames:
                yield np.stack(clip)
                clip.clear()
    except ValueError as error:
        raise _Dropped("undecodable", detail=str(error)) from error
    if clip:
        raise _Dropped(f"with fewer than {num_frames} frames left", len(clip))


def covering_size(h: int, w: int, height: int, width: int) -> tuple[float, float]:
    """The largest part of `h` x `w`, (rows, columns), that has the shape of `height` x `width`."""
    return (w * height / width, w) if h * width > w * height else (h, h * width / height)


def crop_and_resize(
    frame: NDArray[np.uint8], top: int, left: int, rows: float, columns: float, height: int, width: int
) -> NDArray[np.uint8]:
    """A part of `h w 3`, brought to `height width 3` by bicubic interpolation, antialiased where it shrinks."""
    # The corner is a whole pixel, so that a crop without shrinking copies.
    box = (left, top, left + columns, top + rows)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box))


def _cover(frame: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Shrinks the largest centred part of `h w 3` that has the shape of `height` x `width` to that size."""
    h, w, _ = frame.shape
    rows, columns = covering_size(h, w, height, width)
    return crop_and_resize(frame, int((h - rows) // 2), int((w - columns) // 2), rows, columns, height, width)
