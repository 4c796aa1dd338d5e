import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds

from stgen.cli import main
from stgen.data.moving_mnist import load_digits, make_clip, write_moving_mnist
from stgen.data.reading import ClipDataset, DataConfig, clip_loader
from stgen.data.shards import write_index


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "train"
    write_moving_mnist(folder, clips=10, size=32, digits=2)
    return folder


def config(folder: Path, **overrides) -> DataConfig:
    return DataConfig(**({"path": str(folder), "num_frames": 20, "height": 32, "width": 32} | overrides))


def test_digits_are_split_for_good() -> None:
    (train, train_labels), (held_out, labels) = load_digits("train"), load_digits("heldout")
    assert len(train) == 4000
    assert len(held_out) == 1000
    assert np.bincount(labels).tolist() == [100] * 10
    assert np.bincount(train_labels).tolist() == [400] * 10
    # 5,000 different scans: nothing of one split is in the other.
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in held_out}


def test_a_clip_is_a_function_of_its_arguments() -> None:
    clip, caption = make_clip("train", 0, 5)
    again, same = make_clip("train", 0, 5)
    np.testing.assert_array_equal(clip, again)
    assert caption == same
    assert clip.shape == (20, 64, 64, 1)
    assert not np.array_equal(clip, make_clip("train", 1, 5)[0])
    half = make_clip("train", 0, 5, size=32)[0]
    np.testing.assert_allclose(half[..., 0], clip[..., 0].reshape(20, 32, 2, 32, 2).mean((2, 4)), atol=0.5)


def test_the_caption_tells_the_first_direction() -> None:
    for index in range(20):
        clip, caption = make_clip("train", 0, index, digits=1)
        mass = clip[:2, ..., 0].astype(float)
        y, x = ((mass * grid).sum((1, 2)) / mass.sum((1, 2)) for grid in np.mgrid[:64, :64])
        dy, dx = y[1] - y[0], x[1] - x[0]
        for word, moved in (("up", dy < 0), ("down", dy > 0), ("left", dx < 0), ("right", dx > 0)):
            assert word not in caption or moved, caption


def test_shards_are_plain_webdataset(shards: Path) -> None:
    samples = list(wds.WebDataset(str(shards / "shard-000000.tar"), shardshuffle=False).decode())
    assert len(samples) == 10
    assert samples[3]["npy"].shape == (20, 32, 32, 1)
    dataset = ClipDataset(config(shards), shuffle=False)
    assert dataset[3]["caption"] == samples[3]["json"]["caption"]
    np.testing.assert_array_equal(dataset[3]["video"][0], samples[3]["npy"][..., 0])


def test_golden_order(shards: Path) -> None:
    """Runs go on in the order that they began in: (seed, position) means the same clip in every version."""
    dataset = ClipDataset(config(shards), seed=7)
    first = [1, 7, 4, 8, 5, 0, 2, 3, 9, 6, 7, 1, 2, 8, 4, 0, 5, 6, 9, 3, 7, 5, 1, 4, 9, 8, 0, 6, 2, 3]
    far = [4, 9, 5, 1, 0, 4, 3, 5, 1, 0, 8, 2, 7, 6, 9, 1, 5, 0, 2, 6]
    for start, expected in ((0, first), (10**7 + 5, far)):
        assert [int(dataset.row(start + i)["key"]) for i in range(len(expected))] == expected


def test_order_does_not_depend_on_ranks_and_resumes_anywhere(shards: Path) -> None:
    dataset = ClipDataset(config(shards), seed=7)

    def keys(start: int, batch: int, rank: int, world: int, steps: int) -> list[list[int]]:
        loader = clip_loader(dataset, start, batch, 0, rank, world)
        return [next(loader)["position"] for _ in range(steps)]

    one = [p for batch in keys(0, 4, 0, 1, 6) for p in batch]
    ranks = [keys(0, 2, rank, 2, 6) for rank in range(2)]
    assert one == [p for step in zip(*ranks, strict=True) for batch in step for p in batch]
    assert [p for batch in keys(8, 4, 0, 1, 4) for p in batch] == one[8:]
    epochs = [{dataset.row(p)["key"] for p in range(start, start + 10)} for start in (0, 10)]
    assert epochs[0] == epochs[1] == {f"{i:08d}" for i in range(10)}
    assert [dataset.row(p)["key"] for p in range(10)] != [dataset.row(p)["key"] for p in range(10, 20)]


def test_workers_give_the_same_batches(shards: Path) -> None:
    dataset = ClipDataset(config(shards), seed=7)
    alone, helped = (clip_loader(dataset, 4, 4, workers) for workers in (0, 2))
    for _ in range(3):
        a, b = next(alone), next(helped)
        assert a["position"] == b["position"]
        assert torch.equal(a["video"], b["video"])


def run(*arguments: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["stgen", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), capsys.readouterr().err


def test_bad_data_is_one_line(shards: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    with pytest.raises(ValueError, match="a folder of shards"):
        ClipDataset(config(tmp_path / "nowhere"))
    (tmp_path / "index.jsonl").write_text("")
    with pytest.raises(ValueError, match="at least one clip"):
        ClipDataset(config(tmp_path))
    with pytest.raises(ValueError, match=r"10 of 10 clips are not of the configured shape .* = \(8, 32, 32\)"):
        ClipDataset(config(shards, num_frames=8))

    torn = tmp_path / "torn"
    torn.mkdir()
    whole = (shards / "shard-000000.tar").read_bytes()
    (torn / "shard-000000.tar").write_bytes(whole[: len(whole) // 2])
    (torn / "index.jsonl").write_bytes((shards / "index.jsonl").read_bytes())
    with pytest.raises(ValueError, match="torn"):
        ClipDataset(config(torn))

    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "shard-000000.tar").write_bytes(b"no tar at all" * 100)
    code, error = run("data", "index", "--shards", str(garbage), capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    assert "corrupt" in error
    assert error.count("\n") == 1

    other = tmp_path / "other"
    write_moving_mnist(other, clips=2, size=32)
    with pytest.raises(ValueError, match=r"a folder without index.jsonl"):
        write_moving_mnist(other, clips=3, size=32)


def test_foreign_shards_can_be_indexed(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes((shards / "shard-000000.tar").read_bytes())
    write_index(tmp_path, [tmp_path / "a.tar"])
    rows = [json.loads(line) for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert [row["shard"] for row in rows] == ["a.tar"] * 10
    assert torch.equal(ClipDataset(config(tmp_path))[0]["video"], ClipDataset(config(shards))[0]["video"])
