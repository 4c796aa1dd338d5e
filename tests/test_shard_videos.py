"""A folder of videos becomes shards, and nothing is lost in silence."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from test_video import gradient, psnr, turn, write

from stgen import video
from stgen.data.shards import INDEX, read_index
from stgen.data.videos import DROPPED, _cover, _unique, shard_videos


def dropped_rows(out: Path) -> dict[str, dict]:
    return {row["source"]: row for row in map(json.loads, (out / DROPPED).read_text().splitlines())}


@pytest.fixture
def videos(tmp_path) -> Path:
    """Usable, half usable and useless files."""
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    video.write_video(folder / "a.mp4", gradient(9, 32, 48), 10)
    (folder / "a.txt").write_text(" a red wall \n")
    write(folder / "sub" / "a.mov", gradient(8, 48, 32), "libx264", "yuv444p", rate=25, sound=True)
    (folder / "sub" / "a.mov").write_bytes(turn((folder / "sub" / "a.mov").read_bytes(), (0, 1, -1, 0)))
    (folder / "sub" / "a.json").write_text('{"caption": "a turned wall", "views": 3}')
    video.write_gif(folder / "odd.v1.GIF", gradient(4, 33, 47), 5)
    video.write_video(folder / "one.mp4", gradient(1, 32, 32), 10)
    video.write_video(folder / "small.mp4", gradient(9, 16, 64), 10)
    video.write_video(folder / "captioned.mp4", gradient(9, 32, 32), 10)
    (folder / "captioned.json").write_text("no json")
    (folder / "garbage.avi").write_text("not a video")
    (folder / "readme.md").write_text("not listed at all")
    data = video.encode_video(np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8), 10)
    (folder / "torn.mp4").write_bytes(data[: len(data) // 2])
    return folder


def test_shards(tmp_path, videos, capsys):
    out = tmp_path / "out"
    shard_videos(videos, out, num_frames=4, height=20, width=24, clips_per_shard=2)
    rows = {row["key"]: row for row in read_index(out)}
    torn = [key for key in rows if key.startswith("torn")]
    whole = ["a_mp4-00000", "a_mp4-00001", "odd_v1_GIF-00000", "sub_a_mov-00000", "sub_a_mov-00001"]
    assert sorted(rows) == sorted(whole + torn)
    assert {key: rows[key]["fps"] for key in whole} == {k: {"a": 10, "o": 5, "s": 25}[k[0]] for k in whole}
    assert [rows[key]["caption"] for key in whole] == ["a red wall"] * 2 + [""] + ["a turned wall"] * 2
    assert rows["sub_a_mov-00001"]["source"] == "sub/a.mov"
    assert len(list(out.glob("*.tar"))) == -(-len(rows) // 2)

    dropped = dropped_rows(out)
    left = "with fewer than 4 frames left"
    assert dropped.pop("torn.mp4")["clips"] == len(torn) > 0, "clips before the damage are kept"
    assert {source: (row["reason"], row["clips"], row["frames"]) for source, row in dropped.items()} == {
        "a.mp4": (left, 2, 1),
        "one.mp4": (left, 0, 1),
        "small.mp4": ("smaller than 20x24", 0, None),
        "captioned.mp4": ("with an unreadable caption", 0, None),
        "garbage.avi": ("undecodable", 0, None),
    }
    assert "garbage.avi" in dropped["garbage.avi"]["detail"]
    printed = capsys.readouterr().out
    assert f"{len(rows)} clips of 4x20x24 from 4 of 8 files" in printed
    assert "2 undecodable" in printed

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
    original, _ = video.read_video(videos / "a.mp4")
    second, _ = video.read_video(read["a_mp4-00001"]["mp4"])
    assert psnr(second, np.stack([_cover(f, 20, 24) for f in original[4:8]])) > 40
    turned, _ = video.read_video(read["sub_a_mov-00000"]["mp4"])
    expected = np.stack([_cover(f, 20, 24) for f in np.rot90(gradient(8, 48, 32), -1, axes=(1, 2))[:4]])
    assert psnr(turned, expected) > 30


def test_the_same_folder_gives_the_same_bytes_and_is_not_overwritten(tmp_path, videos):
    for name in ("one", "two"):
        shard_videos(videos, tmp_path / name, num_frames=3, height=16, width=16)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    with pytest.raises(ValueError, match=INDEX):
        shard_videos(videos, tmp_path / "one", num_frames=4, height=20, width=24)
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == one


def test_no_clip_is_an_error_with_reasons(tmp_path, videos):
    with pytest.raises(ValueError, match="no clip in 8 files; dropped: 6 smaller than 500x500, 1 ") as error:
        shard_videos(videos, tmp_path / "out", num_frames=4, height=500, width=500)
    assert "1 with an unreadable caption" in str(error.value)
    assert len(dropped_rows(tmp_path / "out")) == 8
    assert not (tmp_path / "out" / INDEX).exists()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"height": 0}, "height is 0"),
        ({"width": -1}, "width is -1"),
        ({"clips_per_shard": 0}, "clips_per_shard is 0"),
        ({"videos": "missing"}, "videos is 'missing', allowed: a folder of videos"),
        ({"videos": "empty"}, "a folder with files .mp4"),
    ],
)
def test_refuses(tmp_path, monkeypatch, videos, kwargs, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        shard_videos(**{"videos": videos, "out": "out", "num_frames": 4, "height": 8, "width": 8, **kwargs})
    assert not (tmp_path / "out").exists()


def test_cover_fills_the_size_from_the_centre():
    frame = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    assert np.array_equal(_cover(frame, 37, 50), frame)
    assert np.array_equal(_cover(frame, 37, 20), frame[:, 15:35]), "a crop copies"
    assert np.array_equal(_cover(frame, 20, 50), frame[8:28])
    # Antialiased: a checkerboard becomes grey instead of one of its colours.
    board = np.broadcast_to((np.indices((64, 64)).sum(0) % 2 * 255)[..., None], (64, 64, 3)).astype(np.uint8)
    assert abs(_cover(board, 16, 16).astype(float) - 127.5).max() < 12
    # Many awkward ratios: the box never leaves the frame.
    for h, w in [(1, 1), (3, 1000), (333, 77), (719, 1281)]:
        for height, width in [(1, 1), (h, 1), (1, w), ((h + 1) // 2, (w + 2) // 3)]:
            picture = np.full((h, w, 3), 200, np.uint8)
            assert _cover(picture, height, width).shape == (height, width, 3)
            assert (_cover(picture, height, width) == 200).all()


def test_an_absurd_rate_costs_one_file_and_not_the_run(tmp_path, monkeypatch):
    for name in ("a", "b"):
        video.write_video(tmp_path / "videos" / f"{name}.mp4", gradient(4, 16, 16), 10)
    monkeypatch.setattr(video, "frame_rate", lambda path: 90000.0 if path.name == "a.mp4" else 10.0)
    shard_videos(tmp_path / "videos", tmp_path / "out", num_frames=4, height=16, width=16)
    assert [row["source"] for row in read_index(tmp_path / "out")] == ["b.mp4"]
    dropped = dropped_rows(tmp_path / "out")["a.mp4"]
    assert (dropped["reason"], dropped["clips"]) == ("unencodable", 0)
    assert "fps is 90000.0" in dropped["detail"]


def test_keys_stay_apart():
    taken: set[str] = set()
    assert [_unique(n, taken) for n in ("a_b", "a_b", "a_b_2", "a_b")] == ["a_b", "a_b_2", "a_b_2_2", "a_b_3"]


def test_a_long_video_is_streamed(tmp_path, monkeypatch):
    """No more frames are held than one clip has."""
    video.write_video(tmp_path / "videos" / "a.mp4", gradient(50, 8, 8), 10)
    alive, ahead = [], []

    def stream(path):
        for i in range(50):
            alive.append(i)
            yield np.zeros((8, 8, 3), np.uint8)

    encode = video.encode_video
    monkeypatch.setattr(video, "stream_video", stream)
    monkeypatch.setattr(video, "encode_video", lambda *args: (ahead.append(len(alive)), encode(*args))[1])
    shard_videos(tmp_path / "videos", tmp_path / "out", num_frames=5, height=8, width=8)
    assert ahead == list(range(5, 51, 5))
