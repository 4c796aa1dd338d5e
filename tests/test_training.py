"""Training for real: the launch commands of the README as processes, at toy size."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_text_encoder
from diffusers import DDIMScheduler

from stgen import STGenPipeline
from stgen.config import load_config
from stgen.data.moving_mnist import write_moving_mnist
from stgen.evaluation import BASELINES, evaluate
from stgen.generation import Request, generate
from stgen.pipelines.scheduling import RegressionScheduler
from stgen.train import TrainConfig, main, train

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parent.parent


def launch(script: str, strategy: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"} | {"OMP_NUM_THREADS": "1"}
    environment |= variables
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    config = ["--config_file", f"configs/accelerate/{strategy}.yaml", "--main_process_port", "0"]
    return subprocess.run(
        [*accelerate, *config, f"stgen/{script}.py", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def succeed(*arguments: str) -> str:
    done = launch(*arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a tiny text encoder, and a VAE trained for a few steps by its own entry point."""
    folder = tmp_path_factory.mktemp("world")
    for split in ("train", "heldout"):
        write_moving_mnist(folder / split, clips=16, split=split, size=32, digits=1)
    encoder = folder / "text"
    encoder.mkdir()
    tokenizer, model = tiny_text_encoder(folder)
    tokenizer.save_pretrained(encoder)
    model.save_pretrained(encoder)
    vae = ["--config", "configs/moving_mnist_32/vae.yaml", f"run={folder}/vae", f"data.path={folder}/train"]
    model = ["model.block_out_channels=[8,16,16]", "model.latent_channels=4"]
    succeed("train_vae", "cpu", *vae, *model, "samples=16", "batch_size=4", "statistics_clips=8")
    return folder


def arguments(world: Path, run: str, *overrides: str) -> list[str]:
    model = ["model.num_attention_heads=2", "model.attention_head_dim=12", "model.num_layers=2", "model.pattern=st"]
    paths = [f"run={world}/{run}", f"vae={world}/vae/export", f"data.path={world}/train", f"text_encoder={world}/text"]
    fixed = ["samples=24", "batch_size=4", "log_every=1", "checkpoint_every=2", "optimizer.warmup=0"]
    return ["--config", "configs/moving_mnist_32/transformer.yaml", *paths, *model, *fixed, *overrides]


def losses(world: Path, run: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (world / run / "metrics.jsonl").read_text().splitlines()]
    return {row["samples"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def reference(world: Path) -> dict[int, float]:
    """The losses of one process."""
    succeed("train", "cpu", *arguments(world, "one"))
    return losses(world, "one")


def test_one_process_learns_exports_and_is_deterministic(world: Path, reference: dict[int, float]) -> None:
    assert list(reference) == [4, 8, 12, 16, 20, 24]
    pipeline = STGenPipeline.from_pretrained(world / "one" / "export")
    raw = STGenPipeline.from_pretrained(world / "one" / "export", variant="raw")
    weights = [p.transformer.state_dict() for p in (pipeline, raw)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_older_objective_exports_the_scheduler_that_fits(world: Path) -> None:
    objective = ["flow.objective=v_prediction", "flow.zero_terminal_snr=true", "flow.min_snr_gamma=5", "flow.mean=0"]
    succeed("train", "cpu", *arguments(world, "v", *objective, "flow.distribution=uniform"))
    assert all(math.isfinite(loss) for loss in losses(world, "v").values())
    pipeline = STGenPipeline.from_pretrained(world / "v" / "export")
    assert type(pipeline.scheduler) is DDIMScheduler
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
    assert np.isfinite(pipeline("a 3", num_inference_steps=2, output_type="np").frames).all()


def test_a_regression_is_trained_and_has_one_answer(world: Path) -> None:
    chosen = ["flow.objective=regression", "masks=[{kind: predict, args: {given: 10}}]", "text_dropout=1", "samples=8"]
    command = arguments(world, "regression", *chosen)
    train(load_config(TrainConfig, command[1], command[2:]))
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    pipeline = STGenPipeline.from_pretrained(world / "regression" / "export")
    assert type(pipeline.scheduler) is RegressionScheduler
    one, two = (pipeline("", num_inference_steps=1, output_type="np").frames for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_patterns_and_latte_are_compared_at_toy_size(world: Path, tmp_path: Path) -> None:
    paths = ["--data", world / "train", "--heldout", world / "heldout", "--vae", world / "vae" / "export"]
    small = [x for x in arguments(world, "unused")[2:] if x.startswith(("model.", "text_encoder", "batch_size"))]
    command = [sys.executable, "tests/bench/patterns.py", *paths, "--out", tmp_path, "--seeds", "2", "--clips", "4"]
    command += ["--only", "st,Latte", "samples=8", *(x for x in small if "pattern" not in x)]
    done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| st", "| Latte (diffusers)"]
    assert all(row.count("±") == 2 and "nan" not in row for row in rows)
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/result.json"))]
    assert len(results) == 4
    assert len({result["validation_loss"] for result in results}) == 4


def test_accumulation_equals_a_larger_batch(world: Path, reference: dict[int, float]) -> None:
    succeed("train", "cpu", *arguments(world, "accumulated", "batch_size=2", "accumulate=2"))
    assert losses(world, "accumulated") == pytest.approx(reference, rel=2e-4)


def test_deepspeed_that_would_be_turned_off_is_an_error(world: Path) -> None:
    done = launch("train", "zero2_cpu", *arguments(world, "wrong", "batch_size=2"), ACCELERATE_USE_CPU="true")
    assert done.returncode != 0
    assert "error: ACCELERATE_USE_CPU is set" in done.stderr
    assert not (world / "wrong" / "metrics.jsonl").exists()


def test_another_configuration_is_another_run(world: Path, reference: dict[int, float], capsys) -> None:
    kept = (world / "one" / "config.yaml").read_text()
    for override, key in (
        ("seed=1", "seed"),
        ("model.num_layers=3", "model.num_layers"),
        ("masks=[{kind: generate_all}]", "masks"),
    ):
        with pytest.raises(SystemExit):
            main(arguments(world, "one", override))
        AcceleratorState._reset_state(reset_partial_state=True)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"error: {key}"), error
        assert "with which" in error
    assert (world / "one" / "config.yaml").read_text() == kept


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1", "learning_rate"),
        ("model.depth=3", "model is 'depth', allowed"),
        ("data.path=/nowhere", "a folder of shards"),
        ("samples=0", "samples is 0, allowed: 1 or more"),
        ("vae=/nowhere", "vae"),
        ("text_encoder=/nowhere", "text_encoder is '/nowhere'"),
    ],
)
def test_bad_configuration_is_one_line(world: Path, override: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments(world, "bad", override))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_the_trained_folder_is_evaluated_and_used(world: Path, reference: dict[int, float], tmp_path: Path) -> None:
    """The demo's last step at toy size: all protocols, all pictures."""
    export = str(world / "one" / "export")
    result = evaluate(export, str(world / "heldout"), str(tmp_path), clips=2, samples=2, steps=2, batch=2)
    scores = result.scores
    assert set(scores) == {"prediction", "interpolation", "inpainting"}
    for rows in scores.values():
        assert set(BASELINES) < set(rows)
        assert all(score.mse >= 0 for score in rows.values())
    assert result.reading["true clips (ceiling)"].digits == 1
    for name in (
        "report.md",
        "report.json",
        "contact_sheet.png",
        "per_frame.png",
        "interpolation.png",
        "prediction.mp4",
        "inpainting.gif",
        "text-to-video.mp4",
    ):
        assert (tmp_path / name).stat().st_size > 0
    request = Request(id="a", task="text", prompt="a 3 moving up", num_inference_steps=2)
    chunks = list(generate(STGenPipeline.from_pretrained(export), request))
    assert np.concatenate(chunks).shape == (20, 32, 32, 3)


@pytest.mark.parametrize(("config", "rounds"), [("moving_mnist_32", 2), ("moving_mnist_64", 1)])
def test_the_demo_at_toy_size(config: str, rounds: int, tmp_path: Path) -> None:
    """launch/demo.sh itself, from another directory; a second run finds everything done."""
    environment = dict(os.environ) | {
        "STGEN_VENV": sys.prefix,
        "RUN": str(tmp_path / "run"),
        "CONFIG": config,
        "CLIPS": "16",
        "VAE": "samples=16 statistics_clips=8 model.block_out_channels=[8,16,16]",
        "TRANSFORMER": "samples=24 batch_size=4 model.num_layers=1",
        "STAGES": "8 4 4 4 32 16",
        "FURTHER": "samples=56",
        "EVALUATE": "--clips 2 --samples 2 --steps 2",
        "SHIPPED": "--clips 2 --samples 1 --steps 1 --text-steps 1",
    }
    command = ["bash", str(REPOSITORY / "launch" / "demo.sh")]
    for _ in range(rounds):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert ("16 clips are already there" in done.stdout) == (rounds > 1)
    assert ("resuming from" in done.stdout) == (rounds > 1)
    assert "| | scratch | shipped |" in done.stdout
    assert "| prediction, MSE of the best naive baseline | " in done.stdout
    report = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "mean of 2 samples" in report
    assert (tmp_path / "run" / "report" / "contact_sheet.png").stat().st_size > 0
