"""Videos, as people have them, become clip shards: in parallel, exactly resumable, with nothing left out in silence.

Workers turn one file each into a part: its encoded clips and a record of what became of every frame. One process takes
the records in the order of the files, drops what an earlier file had, and fills shards. That second step is a function of
the records alone, so after a kill it is done over, passing by shards that are whole. The out folder:

    shard-000000.tar ...   or SHAPE/shard-000000.tar ... where several shapes were asked for
    index.jsonl            written last: a folder that has it is whole
    dropped.jsonl          a row `{source, reason, span, frames, detail}` for each run of frames that is in no clip
    clips.png summary.txt  some clips of each shape to look at; counts and distributions
    settings.json inputs.jsonl     what was asked for, of which files: another run is refused here
    .parts/                what files became that are not yet in whole shards; removed at the end

`span` is the first of the file's frames and the one after the last; the spans of a file's clips and drops are disjoint
and together all of its frames. Where nobody can count frames, behind damage, it ends with null.
"""

import json
import math
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from stgen.config import require
from stgen.data.clips import Drop, Shape, ShardSettings
from stgen.data.filters import Duplicates
from stgen.data.listing import VideoFile, list_videos
from stgen.data.parts import data_path, record_path, write_parts
from stgen.data.reading import decode_clip
from stgen.data.shards import INDEX, PARTS, open_tar, write_index
from stgen.durable import only_job, replacing
from stgen.video import Frames, Row, contact_sheet

DROPPED, SHEET, SUMMARY = "dropped.jsonl", "clips.png", "summary.txt"
SETTINGS, INPUTS = "settings.json", "inputs.jsonl"


def shard_videos(
    videos: str | Path, out: str | Path, settings: ShardSettings, workers: int = 1, caption_column: str = "caption"
) -> None:
    """Cuts the files of a folder or a table into clips and writes those that `settings` let pass as shards.

    The same files and settings give the same bytes, whatever the workers and however often the run was killed. A folder
    that is whole is left as it is. A caption is the table's, or the text of `NAME.txt` beside `NAME.mp4`, or the
    "caption" of `NAME.json`, or empty. See `stgen.data.listing.list_videos` for tables.

    Args:
        workers: processes that decode and encode, each one file at a time; 1 works in this process.

    Raises:
        ValueError: `videos` has no files or a wrong row, `out` was begun with other settings or files, another run is
            writing to it, or no clip came out.
    """
    require(workers >= 1, "workers", workers, "1 or more")
    out = Path(out)
    files = list_videos(videos, any(t == 1 for t, _, _ in settings.shapes), caption_column)
    if out.resolve().is_relative_to(Path(videos).resolve()):  # then it has pictures of its own below `videos`
        files = [file for file in files if not file.path.resolve().is_relative_to(out.resolve())]
    require(not out.exists() or out.is_dir(), "out", str(out), "a folder, or nothing yet")
    out.mkdir(parents=True, exist_ok=True)
    with only_job(out):
        sizes = _claim(out, files, settings)
        for torn in out.rglob(".*.tmp"):
            torn.unlink()
        if (out / INDEX).exists():
            shutil.rmtree(out / PARTS, ignore_errors=True)
            print(f"{out}: these clips are already there")
            print((out / SUMMARY).read_text(), end="")
            return
        merge = _Merge(out, files, settings)
        parts = out / PARTS
        parts.mkdir(exist_ok=True)
        todo = [i for i in range(len(files)) if not record_path(parts, i).exists()]
        done = sum(sizes) - sum(sizes[i] for i in todo)
        merge.take_ready()
        # In bytes, since files differ in length by far more than bytes differ in the time that they take.
        with tqdm(total=sum(sizes), initial=done, desc="shard", unit="B", unit_scale=True) as bar:
            for i in write_parts(parts, files, settings, todo, workers):
                merge.take_ready()
                bar.set_postfix(files=f"{merge.files}/{len(files)}", clips=merge.clips, dropped=len(merge.dropped))
                bar.update(sizes[i])
        assert merge.files == len(files)
        if merge.clips == 0:
            merge.write_dropped()
            counted = merge.reasons()
            shutil.rmtree(parts)
            for name in (SETTINGS, INPUTS):  # so that other settings may be tried here
                (out / name).unlink()
            raise ValueError(
                f"videos {videos}: no clip in {len(files)} files; dropped: {counted} (see {out / DROPPED})"
            )
        summary = merge.finish()
        print(summary, end="")


# --- The out folder -----------------------------------------------------------------------------------------------


def _claim(out: Path, files: list[VideoFile], settings: ShardSettings) -> list[int]:
    """Notes settings and files, or refuses the first that differs from what is noted; the sizes of the files in bytes."""
    wanted = json.loads(json.dumps(asdict(settings)))
    rows = [_input_row(file) for file in files]
    if not (out / SETTINGS).exists():
        others = [path for name in (INDEX, PARTS, "*.tar") for path in out.rglob(name)]
        require(not others, "out", str(out), f"a folder without {others[0].name if others else ''}, or of this command")
        _write_rows(out / INPUTS, rows)
        with replacing(out / SETTINGS) as temporary:
            temporary.write_text(json.dumps(wanted, indent=2) + "\n")
        return [row["bytes"] for row in rows]
    use_another = f"with which {out} was begun; use another out folder, or remove this one"
    known = json.loads((out / SETTINGS).read_text())
    for name, value in wanted.items():
        require(known.get(name) == value, name, value, f"{known.get(name)!r}, {use_another}")
    before = {row["source"]: row for row in map(json.loads, (out / INPUTS).read_text().splitlines())}
    now = {row["source"]: row for row in rows}
    for source in sorted(before.keys() | now.keys()):
        what = "gone" if source not in now else "new" if source not in before else "changed"
        require(before.get(source) == now.get(source), f"{source} of videos", what, f"the same file, {use_another}")
    return [row["bytes"] for row in rows]


def _input_row(file: VideoFile) -> dict[str, Any]:
    """What tells whether a file, its caption beside it, or its row of a table is another one."""

    def stamp(path: Path) -> list[int] | None:
        try:
            stat = path.stat()
        except OSError:
            return None
        return [stat.st_size, stat.st_mtime_ns]

    segments = [[s.start, None if math.isinf(s.end) else s.end, s.caption] for s in file.segments]
    size, *modified = stamp(file.path) or [0]
    beside = [stamp(file.path.with_suffix(suffix)) for suffix in (".txt", ".json")]
    return {"source": file.source, "bytes": size, "modified": modified, "beside": beside, "segments": segments}


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


# --- Shards -------------------------------------------------------------------------------------------------------


@dataclass
class _Sample:
    """A clip on its way into a shard: where its bytes are, and what is written beside them."""

    part: int
    offset: int
    size: int
    extension: str
    key: str
    clip: dict[str, Any]


class _Merge:
    """Takes the records in the order of the files, and writes each shard as soon as it is full."""

    def __init__(self, out: Path, files: list[VideoFile], settings: ShardSettings) -> None:
        self.out, self.parts, self.inputs, self.settings = out, out / PARTS, files, settings
        self.files = self.clips = 0
        self.dropped: list[dict[str, Any]] = []
        self.shards: dict[Shape, list[Path]] = {shape: [] for shape in settings.shapes}
        self._open: dict[Shape, list[_Sample]] = {shape: [] for shape in settings.shapes}
        self._left: dict[int, int] = {}
        self._duplicates = None if settings.duplicates is None else Duplicates(settings.duplicates)
        self._names: set[str] = set()
        self._counts = _Counts()

    def take_ready(self) -> None:
        """Takes all records that are there and whose turn it is."""
        while self.files < len(self.inputs) and record_path(self.parts, self.files).exists():
            self._take(self.files, json.loads(record_path(self.parts, self.files).read_text()))
            self.files += 1

    def _take(self, i: int, record: dict[str, Any]) -> None:
        source = self.inputs[i].source
        name = _unique(source.replace("/", "_").replace(".", "_"), self._names)
        dropped = [Drop(**row) for row in record["dropped"]]
        samples: list[tuple[Shape, _Sample]] = []
        for number, row in enumerate(record["clips"]):
            key, span = f"{name}-{number:05d}", row["span"]
            if self._duplicates is not None:
                found = self._duplicates.find_or_add(row["hash"], key, (i, row["scene"]))
                if found is not None:
                    dropped.append(Drop("a duplicate", span, f"of {found[0]}, {found[1]} bits apart"))
                    continue
            t, height, width = shape = tuple(row["shape"])
            clip = {"caption": row["caption"], "fps": row["fps"], "num_frames": t, "height": height, "width": width}
            clip |= {"source": source, "span": span, "start": row["start"], "motion": row["motion"]}
            samples.append((shape, _Sample(i, row["offset"], row["size"], row["extension"], key, clip)))
        for drop in sorted(dropped, key=lambda drop: drop.span[0]):
            first, end = drop.span
            row = {"source": source, "reason": drop.reason, "span": drop.span}
            self.dropped.append(row | {"frames": None if end is None else end - first, "detail": drop.detail})
        self._counts.file(record["summary"], [sample.clip for _, sample in samples])
        self.clips += len(samples)
        self._left[i] = len(samples)
        if not samples:
            data_path(self.parts, i).unlink(missing_ok=True)
        for shape, sample in samples:
            self._open[shape].append(sample)
            if len(self._open[shape]) == self.settings.clips_per_shard:
                self._write_shard(shape)

    def _write_shard(self, shape: Shape) -> None:
        folder = self.out if len(self.settings.shapes) == 1 else self.out / shape_name(shape)
        path = folder / f"shard-{len(self.shards[shape]):06d}.tar"
        samples, self._open[shape] = self._open[shape], []
        if not path.exists():  # one that exists is whole
            with replacing(path) as temporary, open_tar(str(temporary)) as tar:
                for sample in samples:
                    data = {sample.extension: self._load(sample)}
                    tar.write({"__key__": sample.key, "json": json.dumps(sample.clip).encode(), **data})
        self.shards[shape].append(path)
        for sample in samples:
            self._left[sample.part] -= 1
            if self._left[sample.part] == 0:
                data_path(self.parts, sample.part).unlink(missing_ok=True)

    def _load(self, sample: _Sample) -> bytes:
        with data_path(self.parts, sample.part).open("rb") as file:
            file.seek(sample.offset)
            return file.read(sample.size)

    def reasons(self) -> str:
        """How many parts of files were dropped why, in one line."""
        counts = Counter(row["reason"] for row in self.dropped)
        return ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "nothing"

    def write_dropped(self) -> None:
        _write_rows(self.out / DROPPED, self.dropped)

    def finish(self) -> str:
        """Writes the last shards, the reports, and as the last thing the index; returns the summary."""
        for shape, samples in self._open.items():
            if samples:
                self._write_shard(shape)
        self.write_dropped()
        summary = self._counts.summary(len(self.inputs), self.shards, self.dropped)
        with replacing(self.out / SUMMARY) as temporary:
            temporary.write_text(summary)
        _write_sheet(self.out / SHEET, self.shards, self.settings.clips_per_shard, self._counts.clips)
        write_index(self.out, [path for paths in self.shards.values() for path in paths])
        shutil.rmtree(self.parts)
        return summary


def shape_name(shape: Shape) -> str:
    """As the command line has it: 20x64x96."""
    return "x".join(map(str, shape))


def _unique(name: str, taken: set[str]) -> str:
    """`name`, or `name_2`, ... if another file's path came out the same."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


# --- What is told -------------------------------------------------------------------------------------------------


class _Counts:
    """Counts for the summary."""

    def __init__(self) -> None:
        self.clips: Counter[Shape] = Counter()
        self.used: Counter[Shape] = Counter()
        self.seconds: Counter[Shape] = Counter()
        self.files = self.interlaced = self.covered = 0
        self.motions: list[float] = []
        self.durations: list[float] = []

    def file(self, summary: dict[str, Any] | None, clips: list[dict[str, Any]]) -> None:
        self.files += bool(clips)
        if summary is not None:
            self.interlaced += summary["interlaced"]
            self.durations += [summary["duration"]] * (summary["num_frames"] > 1)
        for clip in clips:
            shape = clip["num_frames"], clip["height"], clip["width"]
            self.clips[shape] += 1
            self.seconds[shape] += clip["num_frames"] / clip["fps"]
            self.covered += clip["span"][1] - clip["span"][0]
            if clip["motion"] is not None:
                self.motions.append(clip["motion"])
        for shape in {(c["num_frames"], c["height"], c["width"]) for c in clips}:
            self.used[shape] += 1

    def summary(self, inputs: int, shards: dict[Shape, list[Path]], dropped: list[dict[str, Any]]) -> str:
        lines = [f"{sum(self.clips.values())} clips from {self.files} of {inputs} files", ""]
        lines.append(f"{'shape':<34}{'clips':>9}{'files':>9}{'shards':>9}{'hours':>9}")
        for shape, paths in shards.items():
            hours = self.seconds[shape] / 3600
            lines.append(
                f"{shape_name(shape):<34}{self.clips[shape]:>9}{self.used[shape]:>9}{len(paths):>9}{hours:>9.3f}"
            )
        parts, frames = Counter[str](), Counter[str]()
        for row in dropped:
            parts[row["reason"]] += 1
            frames[row["reason"]] += row["frames"] or 0
        lines += ["", f"{'dropped':<34}{'parts':>9}{'frames':>9}"]
        lines += [f"{reason:<34}{count:>9}{frames[reason]:>9}" for reason, count in parts.most_common()] or ["nothing"]
        lost, unknown = sum(frames.values()), sum(row["frames"] is None for row in dropped)
        lines += ["", f"frames: {self.covered + lost} = {self.covered} in clips + {lost} dropped"]
        if unknown:
            lines[-1] += f", and {unknown} unreadable parts that nobody can count"
        if self.interlaced:
            lines.append(f"interlaced: {self.interlaced} files, whose clips show both fields; deinterlace them before")
        lines += histogram("motion of clips, mean difference of 255 a frame", self.motions)
        lines += histogram("duration of files, seconds", self.durations)
        return "\n".join(lines) + "\n"


def histogram(title: str, values: list[float], width: int = 40) -> list[str]:
    """Lines of text with a bar for each doubling."""
    if not values:
        return []
    bins = Counter(math.floor(math.log2(v)) if v > 0 else -math.inf for v in values)
    low = max(-4.0, min(bins))  # all that is smaller is one bar
    counts: Counter[float] = Counter()
    for bin, count in bins.items():
        counts[max(bin, low)] += count
    lines = ["", title]
    for bin in range(int(low), int(max(counts)) + 1):
        bar = "█" * math.ceil(width * counts[bin] / max(counts.values()))
        begin = 0 if bin == low else 2.0**bin
        lines.append(f"{begin:>8g} to {2.0 ** (bin + 1):<8g}{counts[bin]:>8}  {bar}".rstrip())
    return lines


def _write_sheet(path: Path, shards: dict[Shape, list[Path]], clips_per_shard: int, counts: Counter[Shape]) -> None:
    """A picture of some clips of each shape, evenly spaced among all."""
    rows: list[Row] = []
    shapes = [shape for shape in shards if counts[shape]]
    each = max(2, 8 // len(shapes))
    for shape in shapes:
        chosen = sorted({i * counts[shape] // each for i in range(each)})
        for shard, group in _by_shard(chosen, clips_per_shard).items():
            for sample, files in _read_samples(shards[shape][shard], group):
                lines = [shape_name(shape), sample["source"], sample["caption"][:80]]
                if sample["motion"] is not None:
                    lines[0] += f", {sample['fps']:.3g} frames/s"
                    lines.insert(1, f"motion {sample['motion']:.2f}")
                rows.append(("\n".join(lines).rstrip(), _shrink(decode_clip(files), 160)))
    contact_sheet(rows, path, title="clips", columns=8)


def _read_samples(shard: Path, positions: list[int]) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """The json and the files of samples of a shard that this module wrote: two files each, one behind the other."""
    with tarfile.open(shard, "r:") as tar:
        members = tar.getmembers()
        for position in positions:
            files = {}
            for member in members[2 * position : 2 * position + 2]:
                file = tar.extractfile(member)
                assert file is not None
                files[member.name.partition(".")[2]] = file.read()
            yield json.loads(files["json"]), files


def _shrink(clip: Frames, side: int) -> Frames:
    """The clip `t h w 3` with no side longer than this."""
    _, h, w, _ = clip.shape
    scale = min(1.0, side / max(h, w))
    size = max(1, round(w * scale)), max(1, round(h * scale))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in clip])


def _by_shard(positions: list[int], clips_per_shard: int) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for position in positions:
        groups.setdefault(position // clips_per_shard, []).append(position % clips_per_shard)
    return groups
