import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
import yaml
from accelerate.state import AcceleratorState
from conftest import tiny_text_encoder, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stgen import AutoencoderKLSTGen, STGenPipeline, train, train_vae
from stgen.cli import main
from stgen.config import load_config, save_config
from stgen.data.color import to_rgb
from stgen.data.moving_mnist import load_digits, make_clip, write_moving_mnist
from stgen.data.reading import (
    Bucket,
    ClipDataset,
    ClipOrder,
    DamageLog,
    DataConfig,
    bucket_of_block,
    clip_loader,
    clip_shape,
    decode_clip,
)
from stgen.data.shards import ShardWriter, write_index
from stgen.video import encode_video, write_video

REPOSITORY = Path(__file__).parent.parent


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


def test_an_error_ends_a_process_with_workers(shards: Path) -> None:
    """Workers ignore SIGTERM, by which multiprocessing would end them at the exit that then waits for them."""
    program = f"""
from stgen.data.reading import ClipDataset, DataConfig, clip_loader
batches = clip_loader(ClipDataset(DataConfig({str(shards)!r}, 20, 32, 32)), 0, 2, workers=2)
next(batches)
raise ValueError("the model stopped")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "ValueError: the model stopped"


# --- Buckets ------------------------------------------------------------------------------------------------------

SHAPES = {(9, 16, 16): 7, (5, 16, 24): 4, (1, 32, 32): 3}
"""Shapes (num_frames, height, width) of the mixed folder, and how many clips it has of each."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three folders of shards: videos of two shapes and rates, and images; npy and mp4."""
    folder = tmp_path_factory.mktemp("mixed")
    for (t, h, w), clips in SHAPES.items():
        with ShardWriter(folder / f"{t}x{h}x{w}") as writer:
            for index in range(clips):
                frames = np.random.default_rng([t, index]).integers(256, size=(t, h, w, 3), dtype=np.uint8)
                clip = {"caption": f"a {index}", "num_frames": t, "height": h, "width": w, "source": "noise"}
                buffer = io.BytesIO()
                np.save(buffer, frames)
                files = {"mp4": encode_video(frames, 2.0 * t)} if t != 5 else {"npy": buffer.getvalue()}
                writer.write(f"{t}-{index}", {**clip, "fps": 2.0 * t}, **files)
    write_index(folder)
    return folder


def mixed_config(folder: Path, block: int = 2, **keep: float) -> DataConfig:
    buckets = [Bucket(*shape, keep=keep.get(f"keep_{shape[0]}", 1.0)) for shape in SHAPES]
    return DataConfig(str(folder), buckets=buckets, block=block)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_blocks_of_buckets_are_spread_by_weight(weights: list[int]) -> None:
    """Random access agrees with counting, and no bucket is ever far from its share."""
    total, far = sum(weights), math.ceil(math.log2(len(weights))) / 2
    counts = [0] * len(weights)
    for block in range(2 * total):
        bucket, before = bucket_of_block(block, weights)
        assert before == counts[bucket]
        counts[bucket] += 1
        assert all(abs(c * total - w * (block + 1)) <= far * total for c, w in zip(counts, weights, strict=True))
        if (block + 1) % total == 0:
            assert counts == [w * (block + 1) // total for w in weights]


orders = st.builds(
    lambda buckets, seed, block: ClipOrder([n for n, _ in buckets], seed, [k for _, k in buckets], block),
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1.0, 1.0, 0.5, 0.3])), min_size=1, max_size=4),
    st.integers(0, 2**40),
    st.integers(1, 4),
)


@given(orders, st.integers(0, 10**12))
def test_no_clip_is_seen_again_before_the_others_of_its_bucket(order: ClipOrder, far: int) -> None:
    counts = [[0] * n for n in order.sizes]
    for position in range(4 * order.block * sum(order.sizes)):
        bucket, clip = order[position]
        counts[bucket][clip] += 1
        assert max(counts[bucket]) - min(counts[bucket]) <= 1
        # One block is one bucket, wherever a run begins.
        assert order[position // order.block * order.block][0] == bucket
    assert {order[far // order.block * order.block + i][0] for i in range(order.block)} == {order[far][0]}


@given(orders, st.data())
def test_every_clip_is_seen_equally_often(order: ClipOrder, data: st.DataObject) -> None:
    """Exactly over whole cycles from the beginning; over as many positions from anywhere, give or take one."""
    epoch = sum(n * round(10 * k) for n, k in zip(order.sizes, order.keep, strict=True))  # in tenths of a clip
    cycle = order.block * epoch
    start = data.draw(st.integers(0, cycle // order.block)) * order.block
    for first, tolerance in ((0, 0), (start, 1)):
        seen = Counter(order[first + i] for i in range(cycle))
        for bucket, (n, keep) in enumerate(zip(order.sizes, order.keep, strict=True)):
            expected = round(10 * keep) * order.block
            assert all(abs(seen[bucket, clip] - expected) <= tolerance for clip in range(n))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 5))
def test_each_epoch_sees_each_clip_once_where_blocks_fit(blocks: list[int], block: int, epoch: int) -> None:
    order = ClipOrder([n * block for n in blocks], 3, block=block)
    clips = sum(order.sizes)
    assert len({order[epoch * clips + i] for i in range(clips)}) == clips


def test_a_far_position_takes_no_scan() -> None:
    order = ClipOrder([50_000, 999, 7], 3, [1.0, 0.3, 0.01], block=8)
    begin = time.perf_counter()
    assert [order[p][0] for p in range(10**15, 10**15 + 8)] == [order[10**15][0]] * 8
    assert time.perf_counter() - begin < 0.1


def test_golden_order_of_buckets() -> None:
    order = ClipOrder([7, 4, 3], 7, [1.0, 1.0, 0.5], block=2)
    assert order.weights == [14, 8, 3]
    buckets, clips = zip(*(order[p] for p in range(26)), strict=True)
    assert "".join(map(str, buckets)) == "00110022001100110000110022"
    assert "".join(map(str, clips)) == "14325610200136314231025020"


def test_one_bucket_is_the_folder_of_one_shape(shards: Path) -> None:
    plain = ClipDataset(config(shards), seed=7)
    bucket = ClipDataset(DataConfig(str(shards), buckets=[Bucket(20, 32, 32)]), seed=7)
    assert [plain.row(p) for p in range(50)] == [bucket.row(p) for p in range(50)]
    for batch_size in (3, 16):  # nothing to mix, so any size
        assert next(clip_loader(bucket, 0, batch_size, 0))["position"] == list(range(batch_size))


def test_batches_do_not_mix_shapes_and_lose_nothing(mixed: Path) -> None:
    dataset = ClipDataset(mixed_config(mixed), seed=7)
    assert len(dataset) == 14
    loader, seen = clip_loader(dataset, 0, 2, 0), Counter()
    for _ in range(14):  # two epochs, since blocks of 2 do not divide 7 and 3
        batch = next(loader)
        rows = [dataset.row(position) for position in batch["position"]]
        frames = to_rgb(batch["video"])
        assert {clip_shape(row) for row in rows} == {tuple(frames.shape[2:])}
        assert batch["fps"].tolist() == [2.0 * frames.shape[2]] * 2
        assert batch["caption"] == [row["caption"] for row in rows]
        seen.update((row["shard"], row["key"]) for row in rows)
    assert len(seen) == 14
    assert set(seen.values()) == {2}


def test_order_of_buckets_does_not_depend_on_ranks_workers_or_batch_size(mixed: Path) -> None:
    dataset = ClipDataset(mixed_config(mixed, block=4), seed=7)

    def take(start: int, batch: int, world: int, workers: int = 0) -> list[tuple[int, torch.Tensor]]:
        loaders = [clip_loader(dataset, start, batch, workers, rank, world) for rank in range(world)]
        batches = [next(loader) for _ in range(24 // batch // world) for loader in loaders]
        return [pair for b in batches for pair in zip(b["position"], to_rgb(b["video"]), strict=True)]

    expected = take(0, 4, 1)
    assert len({clip.shape for _, clip in expected}) == 3
    for other in (take(0, 4, 2), take(0, 2, 2), take(0, 1, 3), take(0, 2, 1, workers=2)):
        for (p, clip), (q, same) in zip(expected, other, strict=True):
            assert p == q
            assert torch.equal(clip, same)
    resumed = take(12, 4, 1)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(expected[12:], resumed, strict=False))


def test_keep_sees_a_share_of_a_bucket(mixed: Path) -> None:
    dataset = ClipDataset(mixed_config(mixed, keep_9=0.1, keep_1=0.5), seed=7)
    # An epoch is 7 * 0.1 + 4 + 3 * 0.5 = 6.2 clips; these are 20.
    counts = Counter(clip_shape(dataset.row(p)) for p in range(124))
    assert counts == {(9, 16, 16): 14, (5, 16, 24): 80, (1, 32, 32): 30}


def test_unshuffled_positions_are_each_clip_once(mixed: Path) -> None:
    dataset = ClipDataset(mixed_config(mixed, block=8, keep_9=0.1), shuffle=False)
    rows = [dataset.row(position) for position in range(len(dataset))]
    assert sorted(map(str, rows)) == sorted(map(str, dataset.rows))
    assert len({clip_shape(row) for row in rows[:4]}) == 3
    for shape in SHAPES:
        assert [r for r in rows if clip_shape(r) == shape] == [r for r in dataset.rows if clip_shape(r) == shape]


def test_bad_buckets_are_refused_before_training(mixed: Path, shards: Path) -> None:
    two = [Bucket(9, 16, 16), Bucket(5, 16, 24)]
    with pytest.raises(
        ValueError, match=r"3 of 14 clips are not of .* = \(9, 16, 16\) or \(5, 16, 24\); .* 1-0, is \(1, 32"
    ):
        ClipDataset(DataConfig(str(mixed), buckets=two))
    with pytest.raises(ValueError, match=r"data.buckets is \(4, 8, 8\), allowed: .* have: 10 of \(20, 32, 32\)"):
        ClipDataset(DataConfig(str(shards), buckets=[Bucket(4, 8, 8), Bucket(20, 32, 32)]))
    dataset = ClipDataset(mixed_config(mixed, block=4))
    with pytest.raises(ValueError, match=r"batch_size is 8, allowed: a divisor of data.block=4"):
        clip_loader(dataset, 0, 8, 0)
    with pytest.raises(ValueError, match=r"start is 6, allowed: a multiple of batch_size=4"):
        clip_loader(dataset, 6, 4, 0)
    for bucket, message in (
        ({"num_frames": 0}, "data.buckets.num_frames is 0, allowed: 1 or more"),
        ({"keep": 0.0}, "data.buckets.keep is 0.0, allowed: above 0, up to 1"),
        ({"keep": 1.5}, "data.buckets.keep is 1.5"),
        ({"keep": math.nan}, "data.buckets.keep is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            Bucket(**({"num_frames": 9, "height": 16, "width": 16} | bucket))
    for changes, message in (
        ({"buckets": []}, "at least one bucket"),
        ({"buckets": [*two, Bucket(9, 16, 16, 0.5)]}, r"data.buckets is \(9, 16, 16\), allowed: every .* once"),
        ({"buckets": two, "block": 0}, "data.block is 0"),
        ({"block": 8}, "data.block is 8, allowed: null without data.buckets"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig("data", **changes)


def run(*arguments: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["stgen", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), capsys.readouterr().err


def test_shapes_are_written_into_folders_of_their_own(tmp_path: Path, capsys, monkeypatch) -> None:
    """The commands of the README: one folder of videos, two shapes of clips, one index over both."""
    (tmp_path / "videos").mkdir()
    frames = np.random.default_rng(0).integers(256, size=(21, 48, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "videos" / "one.mp4", frames, 10)
    for name, shape in (("wide", (9, 16, 32)), ("long", (20, 16, 16))):
        sizes = [f"--{side}={n}" for side, n in zip(("num-frames", "height", "width"), shape, strict=True)]
        folders = ["--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "shards" / name)]
        assert run("data", "shard", *folders, *sizes, capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    assert run("data", "index", "--shards", str(tmp_path / "shards"), capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    buckets = [Bucket(9, 16, 32), Bucket(20, 16, 16)]
    dataset = ClipDataset(DataConfig(str(tmp_path / "shards"), buckets=buckets), shuffle=False)
    shapes = Counter(tuple(to_rgb(dataset[position]["video"]).shape) for position in range(len(dataset)))
    assert shapes == {(3, 9, 16, 32): 2, (3, 20, 16, 16): 1}


def test_the_readme_names_buckets_that_load(tmp_path: Path) -> None:
    text = (REPOSITORY / "README.md").read_text().partition("## Your own videos")[2]
    example = text[text.index("    data:\n") :].partition("\n\n")[0]
    for name, schema in (("vae", train_vae.TrainVAEConfig), ("transformer", train.TrainConfig)):
        shipped = yaml.safe_load((REPOSITORY / "configs" / "moving_mnist_64" / f"{name}.yaml").read_text())
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(shipped | yaml.safe_load(example)))
        loaded = load_config(schema, tmp_path / "config.yaml")
        assert loaded.data.buckets == [Bucket(20, 64, 96), Bucket(40, 48, 48, keep=0.5)]
        assert (loaded.data.num_frames, loaded.data.height, loaded.data.width) == (20, 64, 96)
        assert loaded.data.block % loaded.batch_size == 0
        save_config(loaded, tmp_path / "saved.yaml")
        assert load_config(schema, tmp_path / "saved.yaml") == loaded


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.buckets=[{num_frames: 9, height: 16}]", "width"),
        ("data.buckets=[{num_frames: 9, height: 16, width: 16, batch_size: 4}]", "batch_size"),
        ("data.buckets=[{num_frames: 9, height: 16, width: 16, keep: 0}]", "data.buckets.keep is 0.0"),
    ],
)
def test_mistakes_in_buckets_are_one_line(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_config(train.TrainConfig, REPOSITORY / "configs" / "moving_mnist_32" / "transformer.yaml", [override])
    assert "\n" not in str(error.value)


# --- Clips of one frame -------------------------------------------------------------------------------------------


def image_file(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_images_are_clips_of_one_frame(tmp_path: Path) -> None:
    """Whatever a folder of images holds comes out upright, in RGB, and with transparency on black."""
    pixels = np.random.default_rng(0).integers(256, size=(6, 10, 4), dtype=np.uint8)
    rgb, rgba = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    grey, palette = rgb.convert("L"), rgb.quantize(16)
    turned, exif = rgb.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    smooth = Image.fromarray(np.linspace(0, 255, 60).astype(np.uint8).reshape(6, 10)).convert("RGB")
    images = {
        "rgb": ("png", image_file(rgb, "PNG"), np.asarray(rgb)),
        "webp": ("webp", image_file(rgb, "WEBP", lossless=True), np.asarray(rgb)),
        "grey": ("png", image_file(grey, "PNG"), np.asarray(grey.convert("RGB"))),
        "palette": ("png", image_file(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        "alpha": ("png", image_file(rgba, "PNG"), np.round(pixels[..., :3] * (pixels[..., 3:] / 255))),
        "turned": ("png", image_file(turned, "PNG", exif=exif), np.asarray(rgb)),
        "phone": (
            "jpg",
            image_file(smooth, "MPO", save_all=True, append_images=[smooth], quality=100),
            np.asarray(smooth),
        ),
        "jpeg": ("jpg", image_file(smooth, "JPEG", quality=100, subsampling=0), np.asarray(smooth)),
    }
    with ShardWriter(tmp_path) as writer:
        for name, (extension, data, _) in images.items():
            clip = {"caption": name, "fps": 1, "num_frames": 1, "height": 6, "width": 10, "source": name}
            writer.write(name, clip, **{extension: data})
    dataset = ClipDataset(DataConfig(str(tmp_path), 1, 6, 10), shuffle=False)
    for index, (name, (extension, _, expected)) in enumerate(images.items()):
        frame = dataset[index]["video"][:, 0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(frame, expected, atol=3 if extension == "jpg" else 0, err_msg=name)


def test_clips_that_cannot_be_decoded_are_named() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8))
    png, archive, pickled = image_file(image, "PNG"), io.BytesIO(), io.BytesIO()
    np.savez(archive, frames=np.zeros((1, 4, 4, 3), np.uint8))
    np.save(pickled, np.array([{"a": 1}]), allow_pickle=True)
    deep = image_file(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG")
    np.save(plain := io.BytesIO(), np.zeros((1, 4, 4, 3), np.uint8))
    lying = plain.getvalue().replace(b"(1, 4, 4, 3)", b"(9999,9,9,3)")
    animated = image_file(image, "WEBP", save_all=True, append_images=[image.rotate(90)])
    for files, message in (
        ({"png": png[: len(png) // 2]}, "cannot be read as an image"),
        ({"jpg": b"no image"}, "cannot be read as an image"),
        ({"webp": animated}, "image is 'WEBP of 2 frames', allowed: a single one"),
        ({"png": deep}, "image mode is 'I;16', allowed: 8 bits a colour"),
        ({"npy": archive.getvalue()}, "magic string"),
        ({"npy": pickled.getvalue()}, r"npy holds object \(1,\), allowed: uint8 t h w c"),
        ({"npy": lying}, "cannot reshape"),
        ({"mp4": b"no video"}, "cannot be read as a video"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_clip(files)


def test_an_index_of_other_shards_is_noticed(shards: Path, tmp_path: Path) -> None:
    """The json that travels with a clip must say what the index says."""
    (tmp_path / "shard-000000.tar").write_bytes((shards / "shard-000000.tar").read_bytes())
    rows = [json.loads(line) for line in (shards / "index.jsonl").read_text().splitlines()]
    for change in (
        {"caption": "another"},
        {"fps": 3},
        {"files": {**rows[0]["files"], "json": rows[0]["files"]["npy"]}},
    ):
        (tmp_path / "index.jsonl").write_text("".join(json.dumps(row | change) + "\n" for row in rows))
        with pytest.raises(ValueError, match=r"sample \d+ of shard-000000.tar: "):
            ClipDataset(config(tmp_path), shuffle=False)[0]


# --- Refusals -----------------------------------------------------------------------------------------------------


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


# --- Both trainers, for real --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VAE and text encoder."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer, encoder = tiny_text_encoder(folder)
    for part, name in ((tokenizer, "text"), (encoder, "text"), (tiny_vae(), "vae")):
        part.save_pretrained(folder / name)
    return folder


def buckets_argument(folder: Path) -> list[str]:
    shapes = [f"{{num_frames: {t}, height: {h}, width: {w}}}" for t, h, w in SHAPES]
    return [f"data.path={folder}", f"data.buckets=[{', '.join(shapes)}]", "data.block=4"]


def arguments(world: Path, mixed: Path, run: str, *overrides: str) -> list[str]:
    small = ["num_attention_heads=2", "attention_head_dim=12", "num_layers=1", "pattern=st"]
    paths = [f"run={world}/{run}", f"vae={world}/vae", f"text_encoder={world}/text"]
    fixed = ["samples=32", "batch_size=4", "log_every=1", "checkpoint_every=2", "optimizer.warmup=0"]
    config = ["--config", str(REPOSITORY / "configs" / "moving_mnist_32" / "transformer.yaml")]
    return [*config, *paths, *fixed, *(f"model.{s}" for s in small), *buckets_argument(mixed), *overrides]


def train_here(*arguments: str) -> None:
    """stgen/train.py in this process, on one thread."""
    try:
        train.main(arguments)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(1)


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["samples"]: row["loss"] for row in rows}


@pytest.mark.slow
def test_training_on_buckets_resumes_bit_identically(world: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # whatever was chosen is kept
    train_here(*arguments(world, mixed, "whole"))
    expected = losses(world / "whole")
    assert list(expected) == list(range(4, 33, 4))
    order = ClipOrder(list(SHAPES.values()), 0, block=4)
    assert {order[samples - 1][0] for samples in expected if samples <= 20} == {0, 1, 2}

    class Killed(BaseException):
        pass

    original = ClipDataset.__getitem__

    def read_or_die(self: ClipDataset, position: int) -> dict:
        if position >= 22:  # in the sixth step; the newest checkpoint is the fourth's
            raise Killed
        return original(self, position)

    with monkeypatch.context() as patch:
        patch.setattr(ClipDataset, "__getitem__", read_or_die)
        with pytest.raises(Killed):
            train_here(*arguments(world, mixed, "cut"))
    assert max(losses(world / "cut")) == 20
    train_here(*arguments(world, mixed, "cut"))
    assert losses(world / "cut") == expected

    # With half the batch twice, it is the same run; with another order it is refused.
    train_here(*arguments(world, mixed, "accumulated", "batch_size=2", "accumulate=2"))
    assert losses(world / "accumulated") == pytest.approx(expected, rel=2e-4)
    with pytest.raises(SystemExit):
        train_here(*arguments(world, mixed, "cut", "data.block=8", "samples=64"))

    pipeline = STGenPipeline.from_pretrained(world / "whole" / "export")
    size = pipeline.transformer.config
    assert (size.sample_frames, size.sample_height, size.sample_width, size.sample_fps) == (9, 16, 16, 18.0)


@pytest.mark.slow
def test_training_on_damaged_shards_is_the_same_with_workers_and_resumed(
    world: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One shard is torn, and a clip of another is garbage: what stands in for them does not depend on who reads it."""
    damaged = shutil.copytree(mixed, tmp_path / "damaged")
    rows = {row["key"]: row for row in map(json.loads, (damaged / "index.jsonl").read_text().splitlines())}
    os.truncate(damaged / rows["9-5"]["shard"], rows["9-5"]["files"]["mp4"][0] + 10)
    with (damaged / rows["1-1"]["shard"]).open("rb+") as file:
        file.seek(rows["1-1"]["files"]["mp4"][0])
        file.write(bytes(rows["1-1"]["files"]["mp4"][1]))

    def skipped(run: str) -> dict[int, list[float]]:
        lines = (world / run / "metrics.jsonl").read_text().splitlines()
        names = ("data/skipped", "data/skipped/truncated", "data/skipped/undecodable")
        return {row["samples"]: [row.get(name, 0) for name in names] for row in map(json.loads, lines)}

    train_here(*arguments(world, damaged, "passed_over", "data.max_damaged=0.25"))
    expected = losses(world / "passed_over")
    assert skipped("passed_over")[32] == [3, 2, 1]

    class Killed(BaseException):
        pass

    original, batches = DamageLog.add, []

    def add_or_die(self: DamageLog, found: list) -> None:
        batches.append(found)
        if len(batches) == 6:  # the newest checkpoint is the fourth's
            raise Killed
        original(self, found)

    helped = arguments(world, damaged, "passed_over_cut", "data.max_damaged=0.25", "data.workers=2")
    with monkeypatch.context() as patch:
        patch.setattr(DamageLog, "add", add_or_die)
        with pytest.raises(Killed):
            train_here(*helped)
    train_here(*helped)
    assert losses(world / "passed_over_cut") == expected
    assert skipped("passed_over_cut") == skipped("passed_over")
    whole, cut = ((world / run / "damaged.jsonl").read_text() for run in ("passed_over", "passed_over_cut"))
    assert cut == whole, "each row once"
    listed = [json.loads(line) for line in (world / "passed_over" / "damaged.jsonl").read_text().splitlines()]
    assert sorted((row["key"], row["reason"].partition(":")[0]) for row in listed) == [
        ("1-1", "undecodable"),
        ("9-5", "truncated"),
        ("9-6", "truncated"),
    ]

    # Two torn clips of 14 are known before training; the third is one too many while it runs.
    for limit, message in (("0.1", "2 of 14 clips are damaged"), ("0.2", "3 of 14 clips are damaged")):
        with pytest.raises(SystemExit):
            train_here(*arguments(world, damaged, f"stopped_{limit}", f"data.max_damaged={limit}"))
        (line,) = re.findall("error: .*", capsys.readouterr().err)
        assert message in line
        assert f"9-5 of {rows['9-5']['shard']}: truncated" in line


@pytest.mark.slow
def test_two_processes_train_on_buckets_as_one(world: Path, mixed: Path) -> None:
    """Each process has its own shape at times: blocks of 4, batches of 4, two processes."""
    train_here(*arguments(world, mixed, "one", "batch_size=4", "accumulate=2"))
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    strategy = ["--config_file", str(REPOSITORY / "configs" / "accelerate" / "ddp_cpu.yaml")]
    command = [*launch, *strategy, str(REPOSITORY / "stgen" / "train.py"), *arguments(world, mixed, "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(world / "two") == pytest.approx(losses(world / "one"), rel=2e-4)


@pytest.mark.slow
def test_the_vae_trains_on_buckets(world: Path, mixed: Path) -> None:
    config = ["--config", str(REPOSITORY / "configs" / "moving_mnist_32" / "vae.yaml"), f"run={world}/trained_vae"]
    small = ["model.block_out_channels=[8,16,16]", "model.latent_channels=4", "window=null"]
    steps = ["samples=32", "batch_size=4", "statistics_clips=28", "log_every=1"]
    try:
        train_vae.main([*config, *small, *steps, *buckets_argument(mixed)])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(1)
    assert all(math.isfinite(loss) for loss in losses(world / "trained_vae").values())
    assert min(AutoencoderKLSTGen.from_pretrained(world / "trained_vae" / "export").config.latents_std) > 0


def test_the_first_frames_of_a_clip_are_a_clip(tmp_path: Path) -> None:
    """`--num-frames` shortens clips; a folder of other clips is refused."""
    write_moving_mnist(tmp_path, clips=2, size=32, num_frames=5)
    write_moving_mnist(tmp_path, clips=2, size=32, num_frames=5)
    dataset = ClipDataset(DataConfig(str(tmp_path), 5, 32, 32), shuffle=False)
    whole, caption = make_clip("train", 0, 1, size=32)
    np.testing.assert_array_equal(to_rgb(dataset[1]["video"])[0].numpy(), whole[:5, ..., 0])
    assert dataset[1]["caption"] == caption
    with pytest.raises(ValueError, match="num_frames is 21, allowed: 1 to 20"):
        write_moving_mnist(tmp_path / "other", clips=2, num_frames=21)
