"""Videos become shards, and nothing is lost in silence."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from test_video import gradient, psnr, turn, write

from stgen import video
from stgen.cli import main
from stgen.config import load_config
from stgen.data import parts as parts_module
from stgen.data.clips import ShardSettings, cover, parse_shape
from stgen.data.reading import ClipDataset, DataConfig, decode_clip
from stgen.data.shards import INDEX, PARTS, read_index, write_index
from stgen.data.videos import DROPPED, INPUTS, SETTINGS, SHEET, SUMMARY, _unique, histogram, shard_videos

ALL = {"scene_threshold": None, "duplicates": None, "max_black": 1.0}
"""Settings that let everything pass."""


def shapes(*texts: str, **settings) -> ShardSettings:
    return ShardSettings(tuple(map(parse_shape, texts)), **(ALL | settings))


def dropped_rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / DROPPED).read_text().splitlines()]


def reasons(out: Path) -> dict[str, list[tuple]]:
    """For each source its drops as (reason, span)."""
    found: dict[str, list[tuple]] = {}
    for row in dropped_rows(out):
        found.setdefault(row["source"], []).append((row["reason"], *row["span"]))
    return found


def clips_of(out: Path) -> list[np.ndarray]:
    """The frames of all clips, uint8 `t h w 3`."""
    clips = []
    for row in read_index(out):
        shard = (out / row["shard"]).read_bytes()
        clips.append(decode_clip({name: shard[at : at + size] for name, (at, size) in row["files"].items()}))
    return clips


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_all_frames_are_accounted_for(out: Path, frames: dict[str, int]) -> None:
    """Spans of clips and of what was dropped are disjoint and cover each file."""
    spans: dict[str, list] = {source: [] for source in frames}
    for row in [*(read_index(out) if (out / INDEX).exists() else []), *dropped_rows(out)]:
        first, end = row["span"]
        if end is not None:
            spans[row["source"]].append(row["span"])
            assert row.get("frames", end - first) == end - first
    for source, total in frames.items():
        ends = [0, *(end for span in sorted(spans[source]) for end in span), total]
        assert ends[::2] == ends[1::2], source


def moving(t: int, h: int = 32, w: int = 48, seed: int = 0, speed: int = 1) -> np.ndarray:
    """A coloured texture `t h w 3` that slides over the picture; seeds look different."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    field = np.asarray(coarse.resize((w + 60 * speed, h), Image.Resampling.BICUBIC))
    return np.stack([field[:, i * speed : i * speed + w] for i in range(t)])


def put(path: Path, frames: np.ndarray, fps: float = 10, caption: str | None = None) -> None:
    if path.suffix == ".gif":
        video.write_gif(path, frames, fps)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(video.encode_video(frames, fps))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def videos(tmp_path) -> Path:
    """Usable, half usable and useless files."""
    folder = tmp_path / "videos"
    put(folder / "a.mp4", gradient(9, 32, 48), caption=" a red wall \n")
    (folder / "sub").mkdir()
    write(folder / "sub" / "a.mov", gradient(8, 48, 32), "libx264", "yuv444p", rate=25, sound=True)
    (folder / "sub" / "a.mov").write_bytes(turn((folder / "sub" / "a.mov").read_bytes(), (0, 1, -1, 0)))
    (folder / "sub" / "a.json").write_text('{"caption": "a turned wall", "views": 3}')
    video.write_gif(folder / "odd.v1.GIF", gradient(4, 33, 47), 5)
    put(folder / "one.mp4", gradient(1, 32, 32))
    put(folder / "small.mp4", gradient(9, 16, 64))
    put(folder / "captioned.mp4", gradient(9, 32, 32))
    (folder / "captioned.json").write_text("no json")
    (folder / "garbage.avi").write_text("not a video")
    (folder / "readme.md").write_text("not listed at all")
    data = video.encode_video(np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8), 10)
    (folder / "torn.mp4").write_bytes(data[: len(data) // 2])
    return folder


def test_shards(tmp_path, videos, capsys):
    out = tmp_path / "out"
    shard_videos(videos, out, shapes("4x20x24", clips_per_shard=2))
    rows = {row["key"]: row for row in read_index(out)}
    torn = [key for key in rows if key.startswith("torn")]
    whole = ["a_mp4-00000", "a_mp4-00001", "odd_v1_GIF-00000", "sub_a_mov-00000", "sub_a_mov-00001"]
    assert sorted(rows) == sorted(whole + torn)
    assert {key: rows[key]["fps"] for key in whole} == {k: {"a": 10, "o": 5, "s": 25}[k[0]] for k in whole}
    assert [rows[key]["caption"] for key in whole] == ["a red wall"] * 2 + [""] + ["a turned wall"] * 2
    assert rows["sub_a_mov-00001"]["source"] == "sub/a.mov"
    assert (rows["a_mp4-00001"]["span"], rows["a_mp4-00001"]["start"]) == ([4, 8], 0.4)
    assert len(list(out.glob("*.tar"))) == -(-len(rows) // 2)

    dropped = reasons(out)
    left = "with fewer than 4 frames left"
    *rest, (reason, damage, end) = dropped.pop("torn.mp4")
    assert (reason, end) == ("undecodable", 30), "the header still says how many there were"
    assert 4 * len(torn) + (rest[0][2] - rest[0][1] if rest else 0) == damage > 4, "clips before the damage are kept"
    assert dropped == {
        "a.mp4": [(left, 8, 9)],
        "one.mp4": [("a single frame", 0, 1)],
        "small.mp4": [("smaller than 20x24", 0, 9)],
        "captioned.mp4": [("with an unreadable caption", 0, 9)],
        "garbage.avi": [("undecodable", 0, None)],
    }
    details = {row["source"]: row["detail"] for row in dropped_rows(out)}
    assert "garbage.avi" in details["garbage.avi"]
    assert "captioned.json" in details["captioned.mp4"]
    printed = capsys.readouterr().out
    assert f"{len(rows)} clips from 4 of 8 files" in printed
    assert printed == (out / SUMMARY).read_text()
    clips, lost = 4 * len(rows), sum(row["frames"] or 0 for row in dropped_rows(out))
    assert f"frames: {clips + lost} = {clips} in clips + {lost} dropped, and 1 unreadable parts" in printed
    with Image.open(out / SHEET) as sheet:
        assert min(sheet.size) > 100

    # Plain WebDataset reads them, and so does the index with one seek.
    samples = wds.WebDataset([str(p) for p in sorted(out.glob("*.tar"))], shardshuffle=False)
    read = {sample["__key__"]: sample for sample in samples}
    assert read.keys() == rows.keys()
    for key, row in rows.items():
        frames, fps = video.read_video(read[key]["mp4"])
        assert frames.shape == (4, 20, 24, 3)
        assert fps == pytest.approx(row["fps"])
        assert json.loads(read[key]["json"]).items() <= row.items()
        offset, size = row["files"]["mp4"]
        assert (out / row["shard"]).read_bytes()[offset : offset + size] == read[key]["mp4"]

    # The second clip goes on where the first ended, upright and cropped about the centre.
    second, _ = video.read_video(read["a_mp4-00001"]["mp4"])
    expected = [cover(f, 20, 24) for f in video.stream_frames(videos / "a.mp4")][4:8]
    assert psnr(second, np.stack(expected)) > 40
    turned, _ = video.read_video(read["sub_a_mov-00000"]["mp4"])
    upright = np.rot90(gradient(8, 48, 32), -1, axes=(1, 2))[:4]
    pictures = [Image.fromarray(f).resize((30, 20), Image.Resampling.BICUBIC).crop((3, 0, 27, 20)) for f in upright]
    assert psnr(turned, np.stack([np.asarray(p) for p in pictures])) > 30


def test_the_same_command_is_done_and_another_is_refused(tmp_path, videos, capsys):
    out, settings = tmp_path / "one", shapes("3x16x16")
    for name in ("one", "two"):
        shard_videos(videos, tmp_path / name, settings)
    before = content(out)
    assert before == content(tmp_path / "two")
    assert not any(name.startswith(PARTS) for name in before)
    capsys.readouterr()
    shard_videos(videos, out, settings)
    assert "already there" in capsys.readouterr().out
    for other, message in (
        (shapes("4x16x16"), r"shapes is \[\[4, 16, 16\]\], allowed: \[\[3, 16, 16\]\], with which .*one was begun"),
        (shapes("3x16x16", max_motion=9.0), "max_motion is 9.0, allowed: None"),
        (shapes("3x16x16", clips_per_shard=8), "clips_per_shard is 8, allowed: 256"),
    ):
        with pytest.raises(ValueError, match=message):
            shard_videos(videos, out, other)
    (videos / "a.txt").write_text("another caption")
    with pytest.raises(ValueError, match=r"a\.mp4 of videos is 'changed', allowed: the same file"):
        shard_videos(videos, out, settings)
    (videos / "small.mp4").unlink()
    (videos / "a.txt").unlink()
    put(videos / "Z.mp4", gradient(3, 16, 16))
    with pytest.raises(ValueError, match=r"Z\.mp4 of videos is 'new'"):
        shard_videos(videos, out, settings)
    assert content(out) == before
    # What another command left is not taken for ours.
    (out / SETTINGS).unlink()
    for name in (INDEX, "shard-000000.tar"):
        with pytest.raises(ValueError, match=f"out is .*, allowed: a folder without {name}"):
            shard_videos(videos, out, settings)
        (out / name).unlink()
    shard_videos(videos, out, settings)


def test_no_clip_is_an_error_with_reasons_and_leaves_room_for_other_settings(tmp_path, videos):
    with pytest.raises(ValueError, match="no clip in 8 files; dropped: 5 smaller than 500x500, 1 ") as error:
        shard_videos(videos, tmp_path / "out", shapes("4x500x500"))
    assert "1 with an unreadable caption" in str(error.value)
    assert len(dropped_rows(tmp_path / "out")) == 8
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".lock", DROPPED]
    shard_videos(videos, tmp_path / "out", shapes("4x16x16"))
    assert read_index(tmp_path / "out")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shapes": ((0, 8, 8),)}, "shape is .*1 or more"),
        ({"shapes": ((4, 8, 8), (4, 8, 8))}, "each shape once"),
        ({"shapes": ()}, "at least one"),
        ({"clips_per_shard": 0}, "clips_per_shard is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"stride": 2, "fps": 5.0}, "stride is 2, allowed: 1 with fps"),
        ({"fps": 0.0}, "fps is 0"),
        ({"scene_threshold": 1.0}, "scene_threshold is 1"),
        ({"min_fps": 5.0, "max_fps": 4.0}, "max_fps is 4.0, allowed: min_fps=5 or more"),
        ({"min_motion": -1.0}, "min_motion is -1"),
        ({"max_black": 1.5}, "max_black is 1.5"),
        ({"duplicates": 49}, "duplicates is 49, allowed: 0 to 48"),
    ],
)
def test_refuses_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ShardSettings(**{"shapes": ((4, 8, 8),), **kwargs})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--videos", "missing", "--shape", "4x8x8"], "videos is 'missing', allowed: a folder of videos, or a table"),
        (["--videos", "empty", "--shape", "4x8x8"], "a folder with files .mp4"),
        (["--videos", "videos", "--shape", "4x8"], "shape is '4x8', allowed: FRAMESxHEIGHTxWIDTH"),
        (["--videos", "videos"], "options is None, allowed: --shape, or num_frames"),
        (["--videos", "videos", "--num-frames", "4", "--height", "8"], "options is .*, allowed: --shape, or"),
        (["--videos", "videos", "--shape", "4x8x8", "--width", "8"], "options is .*, allowed: --shape, or"),
        (["--videos", "videos", "--shape", "4x8x8", "--workers", "0"], "workers is 0"),
    ],
)
def test_command_line_refuses_in_one_line(tmp_path, monkeypatch, capsys, videos, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["stgen", "data", "shard", "--out", "out", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()


def test_cover_fills_the_size_from_the_centre(tmp_path):
    def first(frames: np.ndarray) -> video.DecodedFrame:
        return next(video.stream_frames(video.encode_video(frames[None], 10, lossless=True)))

    picture = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    frame = first(picture)
    assert np.array_equal(cover(frame, 37, 50), picture)
    assert np.array_equal(cover(frame, 37, 20), picture[:, 15:35]), "a crop copies"
    assert np.array_equal(cover(frame, 20, 50), picture[8:28])
    # Antialiased: a checkerboard becomes grey instead of one of its colours.
    board = np.broadcast_to((np.indices((64, 64)).sum(0) % 2 * 255)[..., None], (64, 64, 3)).astype(np.uint8)
    assert abs(cover(first(board), 16, 16).astype(float) - 127.5).max() < 12
    for h, w in [(1, 1), (3, 1000), (333, 77), (719, 1281)]:
        for height, width in [(1, 1), (h, 1), (1, w), ((h + 1) // 2, (w + 2) // 3)]:
            flat = cover(first(np.full((h, w, 3), 200, np.uint8)), height, width)
            assert flat.shape == (height, width, 3)
            assert abs(flat.astype(int) - 200).max() <= 1


def test_pixels_that_are_not_square_are_shown_as_meant(tmp_path):
    put(tmp_path / "videos" / "a.mp4", gradient(4, 32, 32))
    with av.open(str(tmp_path / "videos" / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv444p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)  # to be shown at 32x64
        for frame in gradient(4, 32, 32):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "videos" / "a.mp4").unlink()
    shard_videos(tmp_path / "videos", tmp_path / "out", shapes("4x16x32"))
    (clip,) = clips_of(tmp_path / "out")
    squeezed = [np.asarray(Image.fromarray(f).resize((32, 16), Image.Resampling.BICUBIC)) for f in gradient(4, 32, 32)]
    assert psnr(clip, np.stack(squeezed)) > 30, "the whole picture, not its middle"


def test_an_absurd_rate_costs_one_file_and_not_the_run(tmp_path, monkeypatch):
    for name in ("a", "b"):
        put(tmp_path / "videos" / f"{name}.mp4", gradient(4, 16, 16))
    header = video.read_header
    absurd = video.VideoHeader(90000.0, 0.4, 4)
    monkeypatch.setattr(video, "read_header", lambda path: absurd if path.name == "a.mp4" else header(path))
    shard_videos(tmp_path / "videos", tmp_path / "out", shapes("4x16x16"))
    assert [row["source"] for row in read_index(tmp_path / "out")] == ["b.mp4"]
    (row,) = dropped_rows(tmp_path / "out")
    assert (row["source"], row["reason"], row["span"]) == ("a.mp4", "unencodable", [0, 4])
    assert "fps is 90000.0" in row["detail"]


def test_pictures_that_cannot_be_converted_are_accounted_for(tmp_path, monkeypatch):
    put(tmp_path / "videos" / "a.mp4", moving(9))
    rgb = video.DecodedFrame.rgb

    def fails(self, *size):
        if self.index == 5:
            raise ValueError("strange colours")
        return rgb(self, *size)

    monkeypatch.setattr(video.DecodedFrame, "rgb", fails)
    shard_videos(tmp_path / "videos", tmp_path / "out", shapes("2x16x16"))
    assert [row["span"] for row in read_index(tmp_path / "out")] == [[0, 2], [2, 4]]
    (row,) = dropped_rows(tmp_path / "out")
    assert (row["reason"], row["span"], row["detail"]) == ("undecodable", [4, 9], "strange colours")


def test_interlaced_files_are_told(tmp_path):
    (tmp_path / "videos").mkdir()
    with av.open(str(tmp_path / "videos" / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": "tff=1"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for frame in moving(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    shard_videos(tmp_path / "videos", tmp_path / "out", shapes("4x16x16"))
    assert "interlaced: 1 files" in (tmp_path / "out" / SUMMARY).read_text()


def test_the_out_folder_may_lie_among_the_videos(tmp_path):
    put(tmp_path / "a.mp4", moving(4))
    Image.fromarray(moving(1, seed=1)[0]).save(tmp_path / "b.png")
    for _ in range(2):
        shard_videos(tmp_path, tmp_path / "out", shapes("4x16x16", "1x16x16"))
    assert [row["source"] for row in read_index(tmp_path / "out")] == ["a.mp4", "b.png"]


def test_keys_stay_apart():
    taken: set[str] = set()
    assert [_unique(n, taken) for n in ("a_b", "a_b", "a_b_2", "a_b")] == ["a_b", "a_b_2", "a_b_2_2", "a_b_3"]


def test_a_long_video_is_streamed(tmp_path, monkeypatch):
    """No more frames are held than one clip has, and those that wait to be told scene from scene."""
    put(tmp_path / "videos" / "a.mp4", moving(50, 8, 8))
    read, ahead = [], []
    stream, encode = video.stream_frames, video.encode_video

    def counted(path):
        for frame in stream(path):
            read.append(frame.index)
            yield frame

    monkeypatch.setattr(video, "stream_frames", counted)
    monkeypatch.setattr(video, "encode_video", lambda *args: (ahead.append(len(read)), encode(*args))[1])
    shard_videos(tmp_path / "videos", tmp_path / "out", shapes("5x8x8"))
    assert ahead == [5 * i + 1 for i in range(1, 10)] + [50]
    read.clear(), ahead.clear()
    shard_videos(tmp_path / "videos", tmp_path / "two", shapes("5x8x8", scene_threshold=3.0))
    assert max(np.subtract(ahead, 5 * np.arange(1, 11))) <= 3
    assert read == list(range(50)), "decoded once"


# --- Shapes, rates, images ----------------------------------------------------------------------------------------


def test_each_file_goes_to_the_shape_that_fits(tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    put(folder / "wide.mp4", moving(19, 36, 64))
    put(folder / "square.mp4", moving(12, 40, 40))
    put(folder / "short.mp4", moving(5, 40, 40))
    put(folder / "tall.mp4", moving(3, 48, 32))
    Image.fromarray(moving(1, 50, 80)[0]).save(folder / "photo.png")
    Image.fromarray(moving(1, 20, 20)[0]).save(folder / "icon.webp")
    put(folder / "still.gif", moving(1, 32, 48))
    names = ("8x18x32", "3x18x32", "10x20x20", "1x30x48", "1x20x20")
    shard_videos(folder, out, shapes(*names))
    rows = read_index(out)
    found = Counter((row["source"], f"{row['num_frames']}x{row['height']}x{row['width']}") for row in rows)
    assert found == {
        ("wide.mp4", "8x18x32"): 2,
        ("wide.mp4", "3x18x32"): 1,  # the 3 frames left behind two clips of 8
        ("square.mp4", "10x20x20"): 1,
        ("short.mp4", "3x18x32"): 1,  # too short for the square shape
        ("tall.mp4", "3x18x32"): 1,
        ("photo.png", "1x30x48"): 1,
        ("icon.webp", "1x20x20"): 1,
        ("still.gif", "1x30x48"): 1,
    }
    assert {row["shard"].split("/")[0] for row in rows} == set(names)
    frames = {"wide.mp4": 19, "square.mp4": 12, "short.mp4": 5, "tall.mp4": 3, "photo.png": 1, "icon.webp": 1}
    assert_all_frames_are_accounted_for(out, frames | {"still.gif": 1})
    config = {"buckets": [{"num_frames": t, "height": h, "width": w} for t, h, w in map(parse_shape, names)]}
    (tmp_path / "c.yaml").write_text(json.dumps({"path": str(out), **config}))
    dataset = ClipDataset(load_config(DataConfig, tmp_path / "c.yaml"), shuffle=False)
    assert len(dataset) == 9
    photo = next(row for row in rows if row["source"] == "photo.png")
    assert set(photo["files"]) == {"jpg", "json"}


def test_images_need_a_shape_of_one_frame(tmp_path):
    folder = tmp_path / "videos"
    put(folder / "a.mp4", moving(4))
    Image.fromarray(moving(1)[0]).save(folder / "poster.jpg")
    shard_videos(folder, tmp_path / "out", shapes("4x32x48"))
    assert [json.loads(line)["source"] for line in (tmp_path / "out" / INPUTS).read_text().splitlines()] == ["a.mp4"]
    (tmp_path / "t.csv").write_text("path\nvideos/a.mp4\nvideos/poster.jpg\n")
    shard_videos(tmp_path / "t.csv", tmp_path / "table", shapes("4x32x48"))
    assert reasons(tmp_path / "table") == {"videos/poster.jpg": [("a single frame", 0, 1)]}
    # Shapes of one frame alone take every frame.
    shard_videos(folder, tmp_path / "frames", shapes("1x32x48", stride=2))
    assert [(row["source"], row["span"]) for row in read_index(tmp_path / "frames")] == [
        ("a.mp4", [0, 2]),
        ("a.mp4", [2, 4]),
        ("poster.jpg", [0, 1]),
    ]


def uneven(path: Path, times_ms: list[int], levels: list[int]) -> None:
    """A video of grey frames at any times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"crf": "0", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv444p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for at, level in zip(times_ms, levels, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def levels_of(out: Path) -> np.ndarray:
    """The green of the middle of each frame of each clip."""
    return np.stack([clip[:, 8, 8, 1].astype(int) for clip in clips_of(out)])


def test_a_constant_rate_is_taken_by_time(tmp_path):
    # 40 frames/s, then a frame that stands for 400 ms, then 20 frames/s, with some jitter.
    times = [0, 25, 51, 75, 99, 125, 150, 175, 200, 600, 650, 701, 749, 800, 850, 900]
    levels = [i * 15 for i in range(16)]
    uneven(tmp_path / "videos" / "a.mkv", times, levels)
    shard_videos(tmp_path / "videos", tmp_path / "out", shapes("9x16x16", fps=10.0))
    (clip,) = levels_of(tmp_path / "out")
    # At 0, 100, 200 the nearest; until 500 the one that stands; then 600, 700, 800.
    assert np.abs(np.subtract(clip, [levels[i] for i in (0, 4, 8, 8, 8, 8, 9, 11, 13)])).max() <= 3
    (row,) = read_index(tmp_path / "out")
    assert row["fps"] == 10
    assert_all_frames_are_accounted_for(tmp_path / "out", {"a.mkv": 16})
    # A hole of more than 10 s is no video: a scene ends there.
    uneven(tmp_path / "hole" / "a.mkv", [*range(0, 400, 100), *range(60000, 60400, 100)], [100] * 8)
    shard_videos(tmp_path / "hole", tmp_path / "two", shapes("4x16x16"))
    assert [row["span"] for row in read_index(tmp_path / "two")] == [[0, 4], [4, 8]]


def test_stride_and_rate_of_a_steady_file(tmp_path):
    levels = np.arange(20) * 12
    put(
        tmp_path / "videos" / "a.mp4",
        np.broadcast_to(levels[:, None, None, None], (20, 16, 16, 3)).astype(np.uint8),
        30,
    )
    for name, settings in (("stride", {"stride": 3}), ("rate", {"fps": 10.0})):
        out = tmp_path / name
        shard_videos(tmp_path / "videos", out, shapes("3x16x16", **settings))
        assert {row["fps"] for row in read_index(out)} == {10.0}
        assert_all_frames_are_accounted_for(out, {"a.mp4": 20})
        assert np.abs(levels_of(out) - levels[:18:3].reshape(2, 3)).max() <= 3
    with pytest.raises(ValueError, match="no clip in 1 files; dropped: 1 slower than 40 frames/s"):
        shard_videos(tmp_path / "videos", tmp_path / "fast", shapes("3x16x16", fps=40.0))


# --- Scenes and filters -------------------------------------------------------------------------------------------


def test_no_clip_spans_a_cut(tmp_path):
    lengths = (7, 12, 2, 9)
    scenes = [moving(n, seed=i) for i, n in enumerate(lengths)]
    put(tmp_path / "videos" / "a.mp4", np.concatenate(scenes))
    shard_videos(tmp_path / "videos", tmp_path / "out", shapes("4x32x48", scene_threshold=3.0))
    spans = [row["span"] for row in read_index(tmp_path / "out")]
    assert spans == [[0, 4], [7, 11], [11, 15], [15, 19], [21, 25], [25, 29]]
    assert_all_frames_are_accounted_for(tmp_path / "out", {"a.mp4": 30})


def test_filters_say_what_they_measured(tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    put(folder / "quiet.mp4", moving(1, seed=1).repeat(4, axis=0))
    put(folder / "wild.mp4", np.concatenate([moving(1, seed=i) for i in range(2, 6)]))
    put(folder / "good.mp4", moving(4, seed=5))
    put(folder / "night.mp4", np.full((4, 32, 48, 3), 6, np.uint8))
    put(folder / "dusk.mp4", np.concatenate([np.full((2, 32, 48, 3), 6, np.uint8), moving(2, seed=6)]), 10)
    put(folder / "slow.mp4", moving(4, seed=7), 2)
    put(folder / "fast.mp4", moving(4, seed=8), 60)
    put(folder / "long.mp4", moving(40, seed=9))
    put(folder / "little.mp4", moving(4, 31, 64, seed=10))
    settings = shapes(
        "4x16x16",
        min_motion=0.5,
        max_motion=20.0,
        max_black=0.5,
        min_fps=5.0,
        max_fps=50.0,
        max_duration=3.0,
        min_size=32,
    )
    shard_videos(folder, out, settings)
    assert [row["source"] for row in read_index(out)] == ["good.mp4"]
    assert reasons(out) == {
        "quiet.mp4": [("with less motion than 0.5", 0, 4)],
        "wild.mp4": [("with more motion than 20", 0, 4)],
        "night.mp4": [("black", 0, 4)],
        "dusk.mp4": [("with more motion than 20", 0, 4)],
        "slow.mp4": [("slower than 5 frames/s", 0, 4)],
        "fast.mp4": [("faster than 50 frames/s", 0, 4)],
        "long.mp4": [("longer than 3 s", 0, 40)],
        "little.mp4": [("smaller than 32", 0, 4)],
    }
    details = {row["source"]: row["detail"] for row in dropped_rows(out)}
    assert float(details["quiet.mp4"]) < 0.5
    assert float(details["wild.mp4"]) > 20
    assert details["night.mp4"] == "100% of its frames"
    assert details["long.mp4"] == "4.000 s"


def test_a_file_that_does_not_say_how_long_it_is_is_measured(tmp_path):
    (tmp_path / "videos").mkdir()
    for name, frames in (("a.mkv", 8), ("b.mkv", 30)):
        buffer = io.BytesIO()
        buffer.seekable = lambda: False  # as a pipe: what was written cannot be completed
        with av.open(buffer, "w", format="matroska") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
            for frame in moving(frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        (tmp_path / "videos" / name).write_bytes(buffer.getvalue())
        assert video.read_header(tmp_path / "videos" / name).duration is None
    shard_videos(tmp_path / "videos", tmp_path / "out", shapes("4x16x16", min_duration=1.0))
    assert reasons(tmp_path / "out")["a.mkv"] == [("shorter than 1 s", 0, 8)]
    assert {row["source"] for row in read_index(tmp_path / "out")} == {"b.mkv"}


def test_duplicates_are_found_across_files_and_the_first_is_kept(tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    original = moving(16, 64, 96, seed=1)
    half = np.stack([np.asarray(Image.fromarray(f).resize((48, 32), Image.Resampling.BICUBIC)) for f in original])
    put(folder / "b.mp4", original)
    write(folder / "c.avi", half, "mpeg4", "yuv420p", rate=25)
    put(folder / "a.mp4", moving(8, 64, 96, seed=2))
    quiet = moving(1, 64, 96, seed=3).repeat(24, axis=0)
    put(folder / "d.mp4", quiet)
    put(folder / "e.mp4", np.concatenate([quiet[:8], moving(8, 64, 96, seed=4)]))
    shard_videos(folder, out, shapes("8x24x36", duplicates=10, scene_threshold=3.0))
    kept = Counter(row["source"] for row in read_index(out))
    assert kept == {"a.mp4": 1, "b.mp4": 2, "d.mp4": 3, "e.mp4": 1}, "a quiet scene is not its own duplicate"
    rows = [row for row in dropped_rows(out) if row["reason"] == "a duplicate"]
    assert [(row["source"], row["detail"].split(",")[0]) for row in rows] == [
        ("c.avi", "of b_mp4-00000"),
        ("c.avi", "of b_mp4-00001"),
        ("e.mp4", "of d_mp4-00000"),
    ]
    assert_all_frames_are_accounted_for(out, {"a.mp4": 8, "b.mp4": 16, "c.avi": 16, "d.mp4": 24, "e.mp4": 16})


# --- Tables -------------------------------------------------------------------------------------------------------


def test_a_table_names_files_parts_and_captions(tmp_path):
    put(tmp_path / "v" / "a.mp4", moving(30), caption="beside")
    put(tmp_path / "v" / "b.mp4", moving(8))
    header = "caption,path,start,end,score\n"
    table = (
        header
        + "from 1 s,v/a.mp4,1,2,3\nthe begin,./v/a.mp4,,0.95,\n,v/a.mp4,2.5,,\nb,v/b.mp4,,0.8,\nlate,v/b.mp4,5,6,\nno,v/c.mp4,,,\n"
    )
    (tmp_path / "t.csv").write_text(table)
    shard_videos(tmp_path / "t.csv", tmp_path / "csv", shapes("4x32x48"))
    rows = [(row["source"], row["span"], row["caption"]) for row in read_index(tmp_path / "csv")]
    assert rows == [
        ("v/a.mp4", [0, 4], "the begin"),
        ("v/a.mp4", [4, 8], "the begin"),
        ("v/a.mp4", [10, 14], "from 1 s"),
        ("v/a.mp4", [14, 18], "from 1 s"),
        ("v/a.mp4", [25, 29], "beside"),
        ("v/b.mp4", [0, 4], "b"),
        ("v/b.mp4", [4, 8], "b"),
    ]
    assert reasons(tmp_path / "csv")["v/c.mp4"] == [("missing", 0, None)]
    (late,) = (row for row in dropped_rows(tmp_path / "csv") if row["reason"] == "without frames")
    assert (late["source"], late["frames"], late["detail"]) == ("v/b.mp4", 0, "5 s to 6 s of 0.700 s")
    assert ("outside of start and end", 20, 25) in reasons(tmp_path / "csv")["v/a.mp4"]
    assert_all_frames_are_accounted_for(tmp_path / "csv", {"v/a.mp4": 30, "v/b.mp4": 8})

    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(tmp_path / "t.csv").rename(columns={"caption": "text"})
    frame.to_parquet(tmp_path / "t.parquet")
    shard_videos(tmp_path / "t.parquet", tmp_path / "parquet", shapes("4x32x48"), caption_column="text")
    assert content(tmp_path / "csv")["shard-000000.tar"] == content(tmp_path / "parquet")["shard-000000.tar"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file\na.mp4\n", r"t.csv: line 2: columns is \['file'\], allowed: path among them"),
        ("path,start\na.mp4,soon\n", "t.csv: line 2: start is 'soon', allowed: seconds, 0 or more"),
        ("path,end\na.mp4,1\na.mp4,nan\n", "t.csv: line 3: end is 'nan'"),
        ("path,start,end\na.mp4,3,2\n", "t.csv: line 2: end is 2.0, allowed: more than start, 3.0"),
        ("path,start,end\na.mp4,0,3\na.mp4,2,4\n", "t.csv: line 3: start of a.mp4 is 2.0, allowed: 3.0 or more"),
        ("path\na.mp4\na.mp4\n", "t.csv: line 3: start of a.mp4 is 0.0, allowed: inf or more, the end in line 2"),
        ("path\na.doc\n", "t.csv: line 2: path is 'a.doc', allowed: a file name ending in .mp4"),
        ("path,caption\n,x\n", "t.csv: line 2: path is None"),
        ("path,caption\na.mp4\n", "t.csv: line 2 has 1 cells, allowed: 2"),
        ("path\n", "t.csv', allowed: a table with at least one row"),
    ],
)
def test_a_wrong_table_is_refused_with_its_line(tmp_path, table, message):
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        shard_videos(tmp_path / "t.csv", tmp_path / "out", shapes("4x8x8"))
    assert not (tmp_path / "out").exists()


def test_a_table_without_the_asked_caption_column_is_refused(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"path": "a.mp4", "caption": "x"}\n')
    with pytest.raises(ValueError, match=r"t.jsonl: line 1: columns is .*, allowed: text"):
        shard_videos(tmp_path / "t.jsonl", tmp_path / "out", shapes("4x8x8"), caption_column="text")


# --- Workers and kills --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for i in range(12):
        put(folder / f"{i:02d}.mp4", moving(9 + i, 32, 48, seed=i % 9))
    (folder / "garbage.mp4").write_text("no video")
    Image.fromarray(moving(1, 32, 48, seed=20)[0]).save(folder / "photo.png")
    return folder


MANY = shapes("4x16x24", "2x16x24", "1x16x24", clips_per_shard=3, duplicates=10, scene_threshold=3.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, many) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    shard_videos(many, out, MANY)
    assert "a duplicate" in (out / SUMMARY).read_text()
    return content(out)


def test_workers_and_interruptions_do_not_show(tmp_path, many, undisturbed, monkeypatch):
    """Stopped behind each step that leaves something on the disk, and gone on."""
    steps = 0

    def dying(path):
        nonlocal steps
        steps -= 1
        if steps < 0:
            raise KeyboardInterrupt
        return replacing(path)

    replacing = video.replacing
    for module in (parts_module, sys.modules["stgen.data.videos"]):
        monkeypatch.setattr(module, "replacing", dying)
    out, runs = tmp_path / "out", 0
    while True:
        steps = 3
        runs += 1
        try:
            shard_videos(many, out, MANY)
            break
        except KeyboardInterrupt:
            assert not (out / INDEX).exists()
    assert runs > 10
    assert content(out) == undisturbed


def test_two_workers_give_the_same_bytes_and_a_run_is_alone(tmp_path, many, undisturbed):
    out = tmp_path / "out"
    shard_videos(many, out, MANY, workers=2)
    assert content(out) == undisturbed
    lock = f"import fcntl, time; lock = open({str(out / '.lock')!r}, 'w'); fcntl.lockf(lock, fcntl.LOCK_EX)"
    script = f"{lock}; print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="a folder that no other job is writing to"):
            shard_videos(many, out, MANY)
        other.kill()


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_in_the_same_bytes(tmp_path, many, undisturbed):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "stgen.cli", "data", "shard", "--videos", str(many), "--out", str(out)]
    for shape in ("4x16x24", "2x16x24", "1x16x24"):
        command += ["--shape", shape]
    command += ["--clips-per-shard", "3", "--max-black", "1", "--workers", "2"]
    rng, kills = np.random.default_rng(0), 0
    for _ in range(2):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        before = len(list(out.glob(f"{PARTS}/*.json")))
        # From the first new part on, at a random moment.
        while process.poll() is None and len(list(out.glob(f"{PARTS}/*.json"))) <= before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert kills > 0
    assert content(out) == undisturbed


@pytest.mark.slow
def test_a_killed_run_is_not_indexed_as_it_is(tmp_path, many, undisturbed, monkeypatch):
    """An index would make it a whole folder, of which the same command says that all is there."""

    class Killed(Exception):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("stgen.data.videos.write_index", die)
        with pytest.raises(Killed):
            shard_videos(many, tmp_path / "out", MANY)
    for call in (write_index, read_index):
        with pytest.raises(ValueError, match="out is half written: the same `stgen data shard` again goes on with it"):
            call(tmp_path / "out")
    shard_videos(many, tmp_path / "out", MANY)
    assert content(tmp_path / "out") == undisturbed


def test_a_file_that_kills_its_worker_is_dropped_and_no_other(tmp_path, monkeypatch):
    for name in "abcd":
        put(tmp_path / "videos" / f"{name}.mp4", moving(4))
    (tmp_path / "sitecustomize.py").write_text(
        "import os, stgen.data.parts as parts\n"
        "cut = parts.cut_file\n"
        "parts.cut_file = lambda file, s: os._exit(9) if file.source == 'b.mp4' else cut(file, s)\n"
    )
    # Workers are fresh interpreters, which read this.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out"
    shard_videos(tmp_path / "videos", out, shapes("4x16x24"), workers=2)
    assert reasons(out) == {"b.mp4": [("killed its worker", 0, None)]}
    assert [row["source"] for row in read_index(out)] == ["a.mp4", "c.mp4", "d.mp4"]


def test_histogram():
    assert histogram("x", []) == []
    lines = histogram("x", [0.0, 0.01, 0.3, 1.5, 1.9, 2.0], width=4)
    assert lines == [
        "",
        "x",
        "       0 to 0.125          2  ████",
        "   0.125 to 0.25           0",
        "    0.25 to 0.5            1  ██",
        "     0.5 to 1              0",
        "       1 to 2              2  ████",
        "       2 to 4              1  ██",
    ]
