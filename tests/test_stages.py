"""A curriculum in one run: what stages may say, where they begin and end, and that resuming there is exact."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import losses_of, run_training, training_arguments, training_settings
from processes import Run
from safetensors.torch import load_file
from test_validation import read

from stgen import STGenPipeline
from stgen.config import load_config, save_config
from stgen.data.reading import ClipDataset, fold_seed
from stgen.loop import check_run
from stgen.masks import MASKS, MaskSpec
from stgen.train import TrainConfig, resolve_stages


def stages(*entries: dict) -> str:
    return f"stages={json.dumps(entries)}"


def curriculum(world: Path) -> str:
    """8 small clips alone, then 12 of the usual ones at half the rate in two forwards, then 4 with all trained."""
    small = {"path": f"{world}/small", "num_frames": 5, "height": 8, "width": 8}
    second = {"samples": 12, "batch_size": 2, "accumulate": 2, "optimizer": {"lr": 5e-4}, "flow": {"shift": 3.0}}
    frozen = {"frozen": ["*.ff.*"], "masks": [{"kind": "generate_all"}], "text_dropout": 0.5}
    return stages({"samples": 8, "data": small, **frozen}, second, {})


def resolved(world: Path, *overrides: str) -> list[TrainConfig]:
    return resolve_stages(load_config(TrainConfig, None, training_settings(world, Path("run"), *overrides)))


@pytest.fixture(scope="module")
def whole(training_world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    run = tmp_path_factory.mktemp("stages") / "run"
    return run, run_training(training_world, run, curriculum(training_world))


# --- What stages are ----------------------------------------------------------------------------------------------


def test_stages_are_whole_configurations(training_world: Path) -> None:
    first, second, third = resolved(training_world, curriculum(training_world))
    assert (first.samples, second.samples, third.samples) == (8, 20, 24)
    assert (first.data.height, second.data.height) == (8, 16)
    assert first.masks == [MaskSpec()] and len(second.masks) == 3  # noqa: PT018
    assert (second.optimizer.lr, third.optimizer.lr, second.optimizer.ema_decay) == (5e-4, 1e-3, 0.9)
    assert len({first.seed, second.seed, third.seed}) == 3
    assert first.seed == 0, "the first stage is what the run without stages is"
    assert second.seed == fold_seed(0, 1)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [{"samples": 8, "model": {"num_layers": 3}}, {}],
            r"stages\[0\].model.num_layers is 3, allowed: one of samples, data",
        ),
        (
            [{"samples": 8}, {"flow": {"objective": "epsilon"}}],
            r"stages\[1\].flow.objective is 'epsilon', allowed: one of",
        ),
        ([{"samples": 8}, {"optimizer": {"lr": -1}}], r"stages\[1\]: optimizer.lr is -1"),
        ([{"samples": 8}, {"masks": [{"kind": "magic"}]}], r"stages\[1\]: masks.kind is 'magic'"),
        ([{"samples": 8}, {"data": {"depth": 3}}], r"stages\[1\]: Key 'depth' not in 'DataConfig'"),
        ([{}, {}], r"stages\[0\].samples is None, allowed: 1 to 23"),
        ([{"samples": 24}, {}], r"stages\[0\].samples is 24, allowed: 1 to 23"),
        ([{"samples": 8}, {"samples": 8}], r"stages\[1\].samples is 8, allowed: none in the last stage"),
        ([{"samples": 6}, {}], r"stages\[0\].samples is 6, allowed: a multiple of the 4 clips of its optimizer steps"),
        ([{"samples": 8}, {"data": {"height": 64}}], "are not of the configured shape"),
        ([{"samples": 8}, {"frozen": ["nothing.*"]}], "frozen is 'nothing.*'"),
        ([{"samples": 8}, {"data": {"path": "/nowhere"}}], "data is '/nowhere'"),
    ],
)
def test_all_of_it_is_checked_before_the_run(
    training_world: Path, tmp_path: Path, entries: list[dict], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_training(training_world, tmp_path / "bad", stages(*entries))
    assert not (tmp_path / "bad" / "metrics.jsonl").exists()


# --- A run of several ---------------------------------------------------------------------------------------------


def test_stages_follow_each_other(whole: tuple[Path, list[dict]]) -> None:
    run, rows = whole
    assert [row["samples"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert [row["stage"] for row in rows] == [0, 0, 1, 1, 1, 2]
    # One cosine over the run; its height is the stage's.
    heights = [1e-3, 1e-3, 5e-4, 5e-4, 5e-4, 1e-3]
    for row, height in zip(rows, heights, strict=True):
        before = torch.tensor((row["samples"] - 4) / 24 * torch.pi)
        assert row["lr"] == pytest.approx(height * 0.5 * (1 + float(before.cos())))
    pipeline = STGenPipeline.from_pretrained(run / "export")
    assert pipeline.transformer.config.sample_height == 16, "the last stage's"
    assert pipeline.scheduler.config.shift == 1


def test_the_first_stage_is_the_run_without_stages(
    whole: tuple[Path, list[dict]], training_world: Path, tmp_path: Path
) -> None:
    usual = run_training(training_world, tmp_path / "usual")
    split = run_training(training_world, tmp_path / "split", stages({"samples": 8}, {}))
    ours, theirs = losses_of(split), losses_of(usual)
    assert [ours[n] == theirs[n] for n in (4, 8, 12)] == [True, True, False]


def test_a_stage_may_change_what_a_run_may(training_world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def told(first: dict) -> TrainConfig:
        return load_config(TrainConfig, None, training_settings(training_world, run, stages(first, {})))

    begun = {"samples": 8, "batch_size": 4, "data": {"path": "here"}}
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    save_config(told(begun), run / "config.yaml")
    check_run(told({**begun, "batch_size": 2, "data": {"path": "there"}}))
    for change, name in (({"samples": 12}, "samples"), ({"text_dropout": 0.5}, "text_dropout")):
        with pytest.raises(ValueError, match=rf"stages\[0\]\.{name} is {change[name]}, allowed: .* was begun"):
            check_run(told(begun | change))


def test_each_stage_has_an_order_of_its_own(training_world: Path) -> None:
    _, second, third = (
        ClipDataset(stage.data, stage.seed) for stage in resolved(training_world, curriculum(training_world))
    )
    orders = [[stage.row(i)["key"] for i in range(12)] for stage in (second, third)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]), "and is an epoch from its begin on"


def test_a_stage_leaves_its_frozen_parts_alone(training_world: Path, tmp_path: Path) -> None:
    settings = stages({"samples": 8, "frozen": ["*.ff.*"]}, {})
    run_training(
        training_world, tmp_path / "run", settings, "keep_checkpoints=9", "samples=16", f"init={training_world}/base"
    )
    start = load_file(training_world / "base" / "transformer" / "diffusion_pytorch_model.safetensors")
    middle, end = (load_file(tmp_path / f"run/checkpoints/step-{n}/model.safetensors") for n in (2, 4))
    for name, weight in start.items():
        assert torch.equal(middle[name], weight) == (".ff." in name), name
        assert not torch.equal(end[name], middle[name]), name


@pytest.mark.parametrize("saves", [1, 2, 3])
def test_resuming_is_exact_across_a_boundary(
    whole: tuple[Path, list[dict]], training_world: Path, tmp_path: Path, saves: int
) -> None:
    """Checkpoints of steps 1 (before the first boundary), 2 (at it) and 3 (after it)."""
    settings = (curriculum(training_world), "checkpoint_every=1")
    run_training(training_world, tmp_path / "run", *settings, saves=saves)
    assert losses_of(run_training(training_world, tmp_path / "run", *settings)) == losses_of(whole[1])
    name = "export/transformer/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(tmp_path / "run" / name), load_file(whole[0] / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_damage_of_a_stage_that_ends_between_two_rows_is_told(training_world: Path, tmp_path: Path) -> None:
    small = shutil.copytree(training_world / "small", tmp_path / "small")
    row = json.loads((small / "index.jsonl").read_text().splitlines()[3])
    with (small / row["shard"]).open("r+b") as shard:
        shard.seek(row["files"]["npy"][0])
        shard.write(b"nonsense")
    data = {"path": str(small), "num_frames": 5, "height": 8, "width": 8, "max_damaged": 0.5}
    run_training(
        training_world, tmp_path / "run", stages({"samples": 8, "data": data}, {}), "log_every=4", "checkpoint_every=9"
    )
    (found,) = map(json.loads, (tmp_path / "run" / "damaged.jsonl").read_text().splitlines())
    assert found["key"] == row["key"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_cpu", "zero2_cpu"])
def test_two_processes_equal_one(
    whole: tuple[Path, list[dict]], training_world: Path, tmp_path: Path, strategy: str
) -> None:
    entries = json.loads(curriculum(training_world).removeprefix("stages="))
    entries[1]["batch_size"] = 1
    settings, expected = (stages(*entries), "batch_size=2"), whole[1]
    if strategy == "zero2_cpu":  # what is frozen in one stage alone is refused there
        log = tmp_path / "refused"
        Run("train", training_arguments(training_world, tmp_path / "bad", *settings), log, strategy, 2).wait()
        assert "stages[0].frozen is" in log.read_text()
        entries[0]["frozen"] = []
        expected = run_training(
            training_world, tmp_path / "one", stages(entries[0], {**entries[1], "batch_size": 2}, {})
        )
        settings = (stages(*entries), "batch_size=2")
    arguments = training_arguments(training_world, tmp_path / "run", *settings)
    Run("train", arguments, tmp_path / "log", strategy, 2).succeed()
    assert losses_of(read(tmp_path / "run")) == pytest.approx(losses_of(expected), rel=2e-4)


# --- Images and videos --------------------------------------------------------------------------------------------


def test_images_and_videos_train_together(training_world: Path, tmp_path: Path) -> None:
    """Images are clips of one frame; of 8 an epoch sees 4, beside all 8 videos: every third forward is of images."""
    buckets = "[{num_frames: 9, height: 16, width: 16}, {num_frames: 1, height: 16, width: 16, keep: 0.5}]"
    joint = (f"data.path={training_world}/joint", f"data.buckets={buckets}", "data.block=4")
    held_out = f"validation={{path: {training_world}/joint, clips: 4, every: 6, times: [0.5], sampling_steps: 1}}"
    rows = run_training(training_world, tmp_path / "run", *joint, held_out)
    assert all(torch.tensor(loss).isfinite() for loss in losses_of(rows).values())
    config = load_config(TrainConfig, tmp_path / "run" / "config.yaml")
    dataset = ClipDataset(config.data, config.seed)
    frames = [{dataset[p + i]["video"].shape[1] for i in range(4)} for p in range(0, 24, 4)]
    assert sorted(map(list, frames)) == [[1]] * 2 + [[9]] * 4
    pipeline = STGenPipeline.from_pretrained(tmp_path / "run" / "export")
    assert pipeline.transformer.config.sample_frames == 9
    for t in (1, 9):
        generator = torch.Generator().manual_seed(0)
        video = pipeline("a 3", num_frames=t, num_inference_steps=2, generator=generator, output_type="np").frames
        assert video.shape == (1, t, 16, 16, 3)
    sheet = load_file(tmp_path / "run" / "samples" / "step-6.safetensors")
    assert {name for name in sheet if name.endswith("/1")} == {"text/1", "inpainting/1"}, "the second is an image"


@pytest.mark.parametrize("kind", sorted(set(MASKS) - {"combine"}))
def test_masks_of_one_frame_hide_it_or_a_region(kind: str) -> None:
    for seed in range(20):
        mask = MASKS[kind]((1, 12, 16), torch.Generator().manual_seed(seed))
        assert mask.any(), "there is something to generate"
        if kind not in ("boxes", "strokes", "moving_box", "outpaint", "vdt"):
            assert mask.all(), "no frame predicts another"
