"""Validation in training and the export of checkpoints: what is measured and drawn, that it is fixed, that training does not
notice it, and that others get from the export what the trainer had."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import losses_of, run_training, train_here, training_arguments
from PIL import Image
from processes import Run, in_a_fresh_process
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from stgen import AutoencoderKLSTGen, STGenPipeline
from stgen.checkpoint import checkpoints, read_progress
from stgen.cli import app
from stgen.config import load_config
from stgen.data.reading import ClipDataset, DataConfig, collate
from stgen.export import export_checkpoint
from stgen.masks import MaskSpec
from stgen.objective import denoising_losses
from stgen.text import TextCache
from stgen.train import TrainConfig, model_inputs
from stgen.train_vae import TrainVAEConfig, train_vae
from stgen.validation import ValidationConfig, Validator, draw_task, sample_latents

TASKS = ("text", "prediction", "interpolation", "inpainting")
Rows = list[dict]


def validation(world: Path, **settings: object) -> str:
    settings = {"clips": 3, "every": 3, "times": [0.2, 0.5], "sampling_steps": 2} | settings
    return f"validation={json.dumps({'path': f'{world}/heldout', **settings})}"


def validations(rows: Rows) -> Rows:
    return [{k: v for k, v in row.items() if k != "time"} for row in rows if "validation/loss" in row]


def read(run: Path) -> Rows:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def validated(training_world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    run = tmp_path_factory.mktemp("validated") / "run"
    return run, run_training(training_world, run, validation(training_world))


def sampled(pipeline: STGenPipeline, run: Path) -> dict[str, torch.Tensor]:
    """What the trainer's last validation sampled, by this pipeline with its own text encoder."""
    pipeline.set_progress_bar_config(disable=True)
    config = load_config(TrainConfig, run / "config.yaml")
    settings, latents = config.validation, {}
    dataset = settings.open(config.data)
    for task in settings.tasks:
        for i in range(settings.sheet_clips):
            clip = dataset[i]
            prompt = {"prompt": clip["caption"] if task == "text" else ""}
            latents[f"{task}/{i}"] = sample_latents(pipeline, settings, task, clip, **prompt)
    return latents


def same_latents(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, latents in expected.items():
        torch.testing.assert_close(found[name], latents, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("again", [{"clips": 2}, {"sheet_clips": 1}])
def test_a_best_score_lasts_as_long_as_what_it_was_measured_by(
    training_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: dict
) -> None:
    scores = iter([0.1, math.nan, 0.3, 0.2])
    monkeypatch.setattr(Validator, "__call__", lambda self, step, samples: next(scores))
    for samples, settings in ((16, {}), (32, again)):
        fixed = (f"samples={samples}", "keep_checkpoints=1", "optimizer.schedule=constant")
        run_training(training_world, tmp_path / "run", validation(training_world, every=2, **settings), *fixed)
    kept = {int(folder.name[5:]): read_progress(folder).score for folder in checkpoints(tmp_path / "run")}
    assert kept == ({8: 0.2} if "clips" in again else {2: 0.1, 8: 0.2})


# --- What it measures and draws -----------------------------------------------------------------------------------


def test_losses_by_time_and_task(validated: tuple[Path, Rows]) -> None:
    found = validations(validated[1])
    assert [row["step"] for row in found] == [3, 6]
    for row in found:
        times = ("t=0.2", "t=0.5")
        assert set(row) == {"step", "samples", "validation/loss", "validation/caption_gain"} | {
            f"validation/{part}"
            for part in (*(f"loss/{x}" for x in (*TASKS, *times)), *(f"caption_gain/{x}" for x in times))
        }
        for parts in (TASKS, ("t=0.2", "t=0.5")):
            mean = sum(row[f"validation/loss/{part}"] for part in parts) / len(parts)
            assert mean == pytest.approx(row["validation/loss"])
        mean = sum(row[f"validation/caption_gain/{time}"] for time in times) / len(times)
        assert mean == pytest.approx(row["validation/caption_gain"])
    assert found[0] != found[1]


def test_caption_gain_is_what_the_caption_of_another_clip_costs(validated: tuple[Path, Rows]) -> None:
    run, rows = validated
    config = load_config(TrainConfig, run / "config.yaml")
    settings, pipeline = config.validation, STGenPipeline.from_pretrained(run / "export")
    told = replace(config, masks=[MaskSpec("generate_all")], text_dropout=0.0, seed=settings.seed)
    dataset, text = settings.open(config.data), TextCache(run / "cache" / "text.safetensors")
    clips = [dataset[i] for i in range(settings.clips)]
    assert len({clip["caption"] for clip in clips}) == len(clips)

    def loss(clip: dict, caption: str, time: float) -> float:
        inputs = model_inputs(collate([{**clip, "caption": caption}]), told, pipeline.vae, text, torch.device("cpu"))
        at = inputs | {"time": torch.tensor([time])}
        return denoising_losses(pipeline.transformer.eval(), at, config.flow)["loss"].item()

    for time in settings.times:
        gains = [
            loss(clip, other["caption"], time) - loss(clip, clip["caption"], time)
            for clip, other in zip(clips, clips[1:] + clips[:1], strict=True)
        ]
        assert any(gains)
        expected = pytest.approx(sum(gains) / len(gains), abs=1e-7)
        assert validations(rows)[-1][f"validation/caption_gain/t={time:g}"] == expected


def test_the_score_decides_which_checkpoint_is_best(validated: tuple[Path, Rows]) -> None:
    run, rows = validated
    scores = {row["step"]: row["validation/loss"] for row in validations(rows)}
    saved = {int(folder.name[5:]): read_progress(folder).score for folder in checkpoints(run)}
    assert saved[6] == scores[6]
    assert min(scores, key=scores.get) in saved


def test_sheets_and_their_latents(validated: tuple[Path, Rows]) -> None:
    run, _ = validated
    for step in (3, 6):
        with Image.open(run / "samples" / f"step-{step}.png") as sheet:
            # Of each of two clips its truth, what was given in three tasks, and what was generated in four.
            assert sheet.height > 2 * 8 * 64
        latents = load_file(run / "samples" / f"step-{step}.safetensors")
        assert set(latents) == {f"{task}/{i}" for task in TASKS for i in range(2)}
        assert all(x.isfinite().all() and x.shape == (1, 4, 3, 4, 4) for x in latents.values())


def test_an_image_has_no_tasks_of_frames() -> None:
    config = ValidationConfig(path="heldout")
    assert [task for task in config.tasks if draw_task(config, task, 0, (1, 16, 16))] == ["text", "inpainting"]
    assert [task for task in config.tasks if draw_task(config, task, 0, (9, 16, 16))] == list(TASKS)
    first, again = (draw_task(config, "inpainting", 7, (9, 16, 16))[0] for _ in range(2))
    assert torch.equal(first, again)


def test_training_does_not_notice(validated: tuple[Path, Rows], training_world: Path, tmp_path: Path) -> None:
    plain = run_training(training_world, tmp_path / "plain")
    assert losses_of(plain) == losses_of(validated[1])  # bit for bit
    with_it = STGenPipeline.from_pretrained(validated[0] / "export").transformer.state_dict()
    for name, weight in STGenPipeline.from_pretrained(tmp_path / "plain" / "export").transformer.state_dict().items():
        assert torch.equal(weight, with_it[name]), name


def test_held_out_clips_are_those_of_their_own_index(training_world: Path) -> None:
    """Where the shards for training have theirs in another folder."""
    data = DataConfig(f"{training_world}/train", 9, 16, 16, index=f"{training_world}/train")
    found = ValidationConfig(path=f"{training_world}/heldout", clips=4).open(data)
    alone = ClipDataset(replace(data, path=f"{training_world}/heldout", index=None), shuffle=False)
    assert len(found) == len(alone) == 4
    assert all(torch.equal(found[i]["video"], alone[i]["video"]) for i in range(4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clips": 99}, "validation.clips is 99, allowed: at most 4"),
        ({"times": [0.5, 1.5]}, "validation.times is .* 0 to 1"),
        ({"sheet_clips": 4}, "validation.sheet_clips is 4, allowed: 0 to 3"),
        ({"tasks": {"text": {"kind": "magic"}}}, "masks.kind is 'magic'"),
        ({"path": "/nowhere"}, "data is '/nowhere'"),
    ],
)
def test_bad_settings_are_named(training_world: Path, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_training(training_world, tmp_path / "bad", validation(training_world, **settings))
    assert not (tmp_path / "bad" / "checkpoints").exists()


# --- Exports ------------------------------------------------------------------------------------------------------


def save_sampled(export: Path, run: Path, out: Path, lora: Path | None = None) -> None:
    torch.set_num_threads(1)
    pipeline = STGenPipeline.from_pretrained(export)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    save_file(sampled(pipeline, run), out)


@pytest.mark.slow
def test_a_fresh_process_reproduces_the_trainers_latents(validated: tuple[Path, Rows], tmp_path: Path) -> None:
    run, _ = validated
    done = CliRunner().invoke(app, ["export", "--run", str(run), "--out", str(tmp_path / "out"), "--step", "6"])
    assert done.exit_code == 0, done.output
    in_a_fresh_process(save_sampled, tmp_path / "out", run, tmp_path / "latents.safetensors")
    same_latents(load_file(tmp_path / "latents.safetensors"), load_file(run / "samples" / "step-6.safetensors"))
    files = {path.name for path in (tmp_path / "out" / "transformer").iterdir()}
    assert {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.raw.safetensors"} < files
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_the_export_of_the_last_checkpoint_is_the_runs_own(validated: tuple[Path, Rows], tmp_path: Path) -> None:
    run, _ = validated
    export_checkpoint(run, tmp_path / "out")
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.raw.safetensors"):
        own, exported = (load_file(folder / "transformer" / name) for folder in (run / "export", tmp_path / "out"))
        assert own.keys() == exported.keys()
        assert all(torch.equal(own[key], exported[key]) for key in own)


def test_which_checkpoint(validated: tuple[Path, Rows], tmp_path: Path) -> None:
    run, rows = validated
    scores = {row["step"]: row["validation/loss"] for row in validations(rows)}
    assert export_checkpoint(run, tmp_path / "best", "best").name == f"step-{min(scores, key=scores.get)}"
    for step, message in (("5", "step is '5', allowed: "), ("x", "step is 'x', allowed: ")):
        with pytest.raises(ValueError, match=message):
            export_checkpoint(run, tmp_path / "other", step)
    with pytest.raises(ValueError, match="out is .*, allowed: a new or empty folder"):
        export_checkpoint(run, tmp_path / "best")
    with pytest.raises(ValueError, match="merge is True, allowed: false"):
        export_checkpoint(run, tmp_path / "other", merge=True)
    with pytest.raises(ValueError, match="a run folder with checkpoints"):
        export_checkpoint(tmp_path, tmp_path / "other")


# --- Several processes --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_cpu", "zero2_cpu", "zero3_cpu"])
def test_several_processes(training_world: Path, tmp_path: Path, strategy: str) -> None:
    """They share the work out; and a DeepSpeed checkpoint's export has the averaged weights that validated."""
    settings = validation(training_world, every=2)
    run = tmp_path / "two"
    arguments = training_arguments(training_world, run, settings, "batch_size=2", "samples=8")
    Run("train", arguments, tmp_path / "log", strategy, 2).succeed()
    one = run_training(training_world, tmp_path / "one", settings, "samples=8")
    for ours, theirs in zip(validations(read(run)), validations(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    export_checkpoint(run, tmp_path / "out")
    pipeline = STGenPipeline.from_pretrained(tmp_path / "out")
    same_latents(sampled(pipeline, run), load_file(run / "samples" / "step-2.safetensors"))


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_processes(training_world: Path, tmp_path: Path) -> None:
    """With weights that stay as they are to the bit, two processes and one measure the same to the bit."""
    settings = (validation(training_world, every=1), "samples=4", "optimizer.lr=1e-30")
    Run(
        "train",
        training_arguments(training_world, tmp_path / "two", *settings, "batch_size=2"),
        tmp_path / "log",
        "ddp_cpu",
        2,
    ).succeed()
    one = run_training(training_world, tmp_path / "one", *settings)
    assert validations(read(tmp_path / "two")) == validations(one)


@pytest.mark.slow
def test_a_vae_run_is_exported(training_world: Path, tmp_path: Path) -> None:
    model = {"latent_channels": 4, "block_out_channels": [8, 16, 16], "patch_size": 2}
    model |= {"temporal_downsample": [True, True], "spatial_downsample": [True, False]}
    data = f"data={{path: {training_world}/train, num_frames: 9, height: 16, width: 16}}"
    settings = [
        f"run={tmp_path}/vae",
        data,
        f"model={json.dumps(model)}",
        "samples=8",
        "batch_size=4",
        "statistics_clips=4",
    ]
    train_here(train_vae, load_config(TrainVAEConfig, None, settings))
    export_checkpoint(tmp_path / "vae", tmp_path / "out")
    for variant in (None, "raw"):
        own, exported = (
            AutoencoderKLSTGen.from_pretrained(folder, variant=variant)
            for folder in (tmp_path / "vae" / "export", tmp_path / "out")
        )
        assert own.config.latents_mean == pytest.approx(exported.config.latents_mean)
        for name, weight in own.state_dict().items():
            assert torch.equal(weight, exported.state_dict()[name]), name
