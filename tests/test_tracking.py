"""What a run tells: rows, trackers, speed."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import run_training, tiny_transformer

from stgen.tracking import (
    MEASURED,
    JsonlTracker,
    LossLog,
    Throughput,
    make_trackers,
    peak_flops,
    progress_bar,
    show_row,
)


@pytest.fixture
def accelerator() -> Accelerator:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_rows_are_json_whatever_the_numbers(accelerator: Accelerator, tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    tracker.log({"loss": math.nan, "kl": math.inf, "lr": 0.5, "samples": 8}, 2)
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row.pop("time") > 0
    assert row == {"step": 2, "loss": None, "kl": None, "lr": 0.5, "samples": 8}


def test_means_leave_out_what_is_not_finite(accelerator: Accelerator) -> None:
    log = LossLog(accelerator)
    for value in (1.0, math.nan, 3.0, math.inf):
        log.add({"loss": torch.tensor(value), "other": torch.tensor(math.nan)})
    means = log.take()
    assert means["loss"] == 2
    assert math.isnan(means["other"])


def test_trackers_that_cannot_be_had_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="trackers is 'mlflow', allowed: tensorboard, wandb"):
        make_trackers(["mlflow"], tmp_path)
    monkeypatch.setattr("stgen.tracking.find_spec", lambda package: None)
    with pytest.raises(ValueError, match="trackers is 'wandb', allowed: none without the package wandb"):
        make_trackers(["wandb"], tmp_path)


# --- Speed --------------------------------------------------------------------------------------------------------


def test_peaks_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_mfu_counts_what_the_model_needs_in_the_time_of_its_steps(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("stgen.tracking.time", SimpleNamespace(perf_counter=lambda: now[0]))
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(32, 16, bias=False))
    speed = Throughput(accelerator, model, peak=1e6, tokens=lambda shape: math.prod(shape))
    for batch in (4, 4, 6):  # two shapes
        speed.start()
        speed.see({"position": [0] * batch, "shape": (2, 5, 1)})
        model(torch.randn(batch, 64)).sum().backward()
        with torch.no_grad():
            model(torch.randn(batch, 64))  # no step of it, so it does not count
        now[0] += 0.5
        speed.stop()
        now[0] += 100  # a validation
    speed.start()
    row = speed.take()
    flops = 3 * 2 * (64 * 32 + 32 * 16) * 14
    assert row == pytest.approx({"samples_per_second": 14 / 1.5, "tokens_per_second": 140 / 1.5, "mfu": flops / 1.5e6})
    assert set(row) < set(MEASURED)


def test_flops_of_the_transformer_are_those_of_its_matrices(accelerator: Accelerator) -> None:
    """By hand, of the blocks' linear layers: 2 times weights times tokens, text for the keys and values of the text."""
    model = tiny_transformer()
    speed = Throughput(accelerator, model, peak=1.0)
    speed.start()
    latents = torch.randn(1, 4, 3, 8, 8)
    kwargs = {"encoder_hidden_states": torch.randn(1, 5, 16), "timestep": torch.tensor([500.0])}
    condition = {"condition_latents": torch.zeros_like(latents), "condition_mask": torch.ones(1, 4, 3, 8, 8)}
    model(hidden_states=latents, **kwargs, **condition)
    tokens, text = 3 * 4 * 4, 5
    linear = 0
    for name, parameter in model.named_parameters():
        if "transformer_blocks" in name and name.endswith(".weight") and parameter.ndim == 2:
            linear += 2 * parameter.numel() * (text if "to_kv" in name else tokens)
    counted = speed._counts["flops"] / 3
    assert linear < counted < 1.6 * linear, "attention and the layers around the blocks are the rest"


def test_the_bar_shows_the_row() -> None:
    bar = progress_bar(10, 0, True, "run")
    show_row(bar, {"loss": 0.12345678, "samples_per_second": 12.3456, "tokens_per_second": 98765.4, "mfu": 0.4123})
    assert bar.postfix == "loss=0.1235, samples/s=12.35, tokens/s=9.877e+04, mfu=41.2%"
    bar.close()


# --- Runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked(training_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with both trackers, W&B offline, and a validation."""
    run = tmp_path_factory.mktemp("tracked") / "run"
    validation = f"validation={{path: {training_world}/heldout, clips: 2, every: 6, times: [0.5], sampling_steps: 1}}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        run_training(training_world, run, "trackers=[tensorboard, wandb]", "peak_flops=1e9", validation)
    return run


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_rows_have_speed_and_only_that_is_measured(tracked: Path, training_world: Path, tmp_path: Path) -> None:
    rows = [row for row in rows_of(tracked) if "loss" in row]
    assert all(set(row) == {"step", "loss", "nonfinite", "data/skipped", "samples", "lr", *MEASURED} for row in rows)
    for row in rows:
        # A clip is 3 x 4 x 4 latent cells, in patches of 1 x 2 x 2.
        assert row["tokens_per_second"] == pytest.approx(12 * row["samples_per_second"], rel=1e-3)
        assert 0 < row["mfu"] < 100
    plain = run_training(training_world, tmp_path / "plain")  # nothing counted, nobody told
    assert [row["loss"] for row in plain] == [row["loss"] for row in rows], "to the bit"
    assert "mfu" not in plain[0]


@pytest.mark.slow
def test_tensorboard_has_the_rows_and_the_sheet(tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "tensorboard"))
    events.Reload()
    rows = [row for row in rows_of(tracked) if "loss" in row]
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == [row["step"] for row in rows]
    assert [event.value for event in scalars] == pytest.approx([row["loss"] for row in rows])
    image = events.Images("samples")[0]
    assert image.step == 6
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert min(image.width, image.height) > 64


@pytest.mark.slow
def test_wandb_has_the_run_offline(tracked: Path) -> None:
    (folder,) = (tracked / "wandb").glob("offline-run-*")
    (log,) = folder.glob("run-*.wandb")
    data = log.read_bytes()
    assert log.stem.startswith("run-run-"), "the id follows from the folder"
    for part in (b"samples_per_second", b"nonfinite", b"optimizer.ema_decay"):
        assert part in data, part
    assert list(folder.glob("files/media/images/samples_*.png"))
