"""Checkpoints: whole or torn, which are kept, what resuming refuses, and the metrics that go with them."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import run_training
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import ACCELERATE, launch_arguments

from stgen import checkpoint
from stgen.accelerator import StopRequests
from stgen.checkpoint import (
    MANIFEST,
    PROGRESS,
    Progress,
    best_score,
    checkpoints,
    fault,
    read_progress,
    resume,
    save_checkpoint,
    sha256,
)
from stgen.durable import only_job
from stgen.export import find_checkpoint
from stgen.tracking import LossLog, rewind_metrics


class Trainer:
    """One process with a model of one layer, whose weight is the step."""

    def __init__(self, run: Path) -> None:
        self.run, self.accelerator = run, Accelerator(cpu=True)
        self.model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(self.model.parameters())
        self.model, _ = self.accelerator.prepare(self.model, optimizer)

    def save(self, step: int, keep: int = 2, score: float | None = None, measured: str = "") -> Path:
        with torch.no_grad():
            self.model.weight.fill_(step)
        save_checkpoint(self.accelerator, self.run, step, 4 * step, keep, score, measured)
        return self.run / "checkpoints" / f"step-{step}"

    def resume(self) -> Progress:
        return resume(self.accelerator, self.run)


@pytest.fixture(autouse=True)
def no_accelerator_left() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path / "run")


def names(run: Path) -> list[str]:
    return [folder.name for folder in checkpoints(run)]


# --- Whole or torn ------------------------------------------------------------------------------------------------


def cut(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def flip(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)


TORN = {
    "model.safetensors is missing": lambda f: (f / "model.safetensors").unlink(),
    "optimizer.bin has": lambda f: cut(f, "optimizer.bin"),
    "model.safetensors has other bytes": lambda f: flip(f, "model.safetensors"),
    "manifest.json or progress.json cannot be read": lambda f: cut(f, MANIFEST),
    "No such file": lambda f: (f / MANIFEST).unlink(),
    "cannot be read: AttributeError": lambda f: (f / MANIFEST).write_text("[]"),
    "cannot be read: KeyError": lambda f: (f / MANIFEST).write_text('{"model.safetensors": {}}'),
}


@pytest.mark.parametrize("reason", TORN)
def test_a_torn_checkpoint_is_named_and_passed_over(
    trainer: Trainer, reason: str, capsys: pytest.CaptureFixture
) -> None:
    trainer.save(1)
    newest = trainer.save(2)
    assert fault(newest) is None
    TORN[reason](newest)
    assert trainer.resume().step == 1
    assert trainer.model.weight.item() == 1
    output = capsys.readouterr().out
    assert f"{newest} is passed over: " in output
    assert reason in output
    assert newest.exists(), "it is left for whoever wants to look at it"


def test_a_checkpoint_that_the_disk_cannot_read_is_passed_over(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trainer.save(1)
    newest = trainer.save(2)

    def broken(path: Path) -> str:
        if newest in path.parents:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256(path)

    monkeypatch.setattr(checkpoint, "sha256", broken)
    assert trainer.resume().step == 1
    assert f"{newest} is passed over: a file cannot be read: [Errno 5]" in capsys.readouterr().out


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew_by_itself(trainer: Trainer) -> None:
    flip(trainer.save(1), "model.safetensors")
    with pytest.raises(ValueError, match=r"run is '.*', allowed: one with a whole checkpoint, or with none"):
        trainer.resume()


def test_what_a_kill_left_is_reported_and_removed(trainer: Trainer, capsys: pytest.CaptureFixture) -> None:
    trainer.save(1)
    shutil.copytree(trainer.run / "checkpoints" / "step-1", trainer.run / "checkpoints" / "step-2.tmp")
    assert names(trainer.run) == ["step-1"]
    assert trainer.resume() == read_progress(trainer.run / "checkpoints" / "step-1")
    assert "step-2.tmp is removed: its writing or removal was interrupted" in capsys.readouterr().out
    assert [path.name for path in (trainer.run / "checkpoints").iterdir()] == ["step-1"]


def test_progress_says_on_what_the_run_ran(trainer: Trainer) -> None:
    folder = trainer.save(3, score=0.5)
    expected = {"step": 3, "samples": 12, "score": 0.5, "processes": 1, "strategy": "replicated", "precision": "no"}
    assert asdict(read_progress(folder)) == expected | {"measured": ""}
    manifest = json.loads((folder / MANIFEST).read_text())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert manifest.keys() == files - {MANIFEST}


@pytest.mark.parametrize(("name", "value"), [("strategy", "zero2"), ("precision", "bf16")])
def test_another_strategy_or_precision_is_refused(trainer: Trainer, name: str, value: str) -> None:
    folder = trainer.save(1)
    progress = json.dumps(asdict(read_progress(folder)) | {name: value})
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / PROGRESS).write_text(progress)
    del manifest[PROGRESS]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"^{name} is .*, allowed: '{value}', with which .*step-1 was written"):
        trainer.resume()


# --- Which are kept -----------------------------------------------------------------------------------------------


def test_the_last_and_the_best_are_kept(trainer: Trainer) -> None:
    for step, score in enumerate([3.0, None, 1.0, 2.0, None, 4.0], 1):
        trainer.save(step, keep=2, score=score)
    assert names(trainer.run) == ["step-3", "step-5", "step-6"]
    assert best_score(trainer.run) == 1.0
    trainer.save(7, keep=2, score=0.5)
    assert names(trainer.run) == ["step-6", "step-7"]


def test_torn_ones_count_for_nothing(trainer: Trainer) -> None:
    for step in (1, 2, 3):
        folder = trainer.save(step, keep=3, score=-step)
    cut(folder, "model.safetensors")
    assert best_score(trainer.run) == -2
    trainer.save(4, keep=1)
    assert names(trainer.run) == ["step-2", "step-3", "step-4"], "the best whole one, the torn one, the last"
    trainer.save(3)
    assert fault(folder) is None, "the run that comes by it again writes it again"


def test_spoilt_ones_that_were_passed_over_push_none_out(trainer: Trainer) -> None:
    trainer.save(2, keep=9, score=2.0)
    flip(trainer.save(4, keep=9, score=1.0), "model.safetensors")  # of the size that it should have
    assert trainer.resume().step == 2
    assert best_score(trainer.run, step=2) == 2.0, "the spoilt one's score is to be reached again"
    trainer.save(3, keep=1)
    assert names(trainer.run) == ["step-2", "step-3", "step-4"]
    assert trainer.resume().step == 3
    trainer.save(4, keep=1, score=1.0)
    assert names(trainer.run) == ["step-4"]
    assert trainer.resume().step == 4


def test_scores_compare_with_those_that_were_measured_alike(trainer: Trainer) -> None:
    trainer.save(1, keep=1, score=1.0, measured="easy")
    trainer.save(2, keep=1, measured="hard")
    assert names(trainer.run) == ["step-1", "step-2"], "the best as long as none is measured anew"
    assert best_score(trainer.run, measured="hard") == float("inf")
    trainer.save(3, keep=1, score=3.0, measured="hard")
    trainer.save(4, keep=1, score=4.0, measured="hard")
    assert names(trainer.run) == ["step-3", "step-4"]
    assert find_checkpoint(trainer.run, "best").name == "step-3"


# --- The metrics --------------------------------------------------------------------------------------------------


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.integers(1, 9), max_size=8), at=st.integers(0, 9), torn=st.integers(0, 30))
def test_metrics_are_taken_back_to_the_checkpoint(tmp_path: Path, steps: list[int], at: int, torn: int) -> None:
    lines = [json.dumps({"step": step, "loss": 0.1 * i}) + "\n" for i, step in enumerate(sorted(steps))]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines) + json.dumps({"step": 10, "loss": 1.0})[:torn])
    rewind_metrics(tmp_path, at)
    assert path.read_text() == "".join(line for line in lines if json.loads(line)["step"] <= at)


def test_metrics_that_no_kill_explains_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 cannot be read"):
        rewind_metrics(tmp_path, 3)


def test_losses_between_two_rows_are_saved_with_the_checkpoint() -> None:
    accelerator = Accelerator(cpu=True)
    whole, first, second = LossLog(accelerator), LossLog(accelerator), LossLog(accelerator)
    rows = [
        {"loss": torch.tensor(0.1)},
        {"loss": torch.tensor(0.7)},
        {"loss": torch.tensor(0.4), "kl": torch.tensor(3.0)},
    ]
    for row in rows:
        whole.add(row)
    for row in rows[:2]:
        first.add(row)
    second.load_state_dict(first.state_dict())
    second.add(rows[2])
    assert second.take() == whole.take()
    assert second.values == {}
    of_two = {"loss": torch.tensor([[1.0, 2.0], [3.0, 6.0]])}  # of two processes, taken up by one
    second.load_state_dict(of_two)
    assert second.take() == {"loss": 3.0}


# --- One process a run --------------------------------------------------------------------------------------------


def test_a_second_command_in_the_run_folder_is_refused(training_world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    hold = "import os, time; print(1, flush=True); [time.sleep(60) if os.fork() == 0 else time.sleep(60)]"
    script = f"import pathlib; from stgen.durable import only_job\nwith only_job(pathlib.Path({str(run)!r})): {hold}"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True) as other:
        try:
            other.stdout.readline()
            with pytest.raises(
                ValueError, match=r"^run is '.*run', allowed: a folder that no other job is writing to$"
            ):
                run_training(training_world, run)
            assert not (run / "config.yaml").exists()
            other.kill()
            other.wait()
            # What a killed process leaves running, such as workers of its data, doesn't keep the same command from going on.
            with only_job(run):
                pass
        finally:
            os.killpg(other.pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (
        pytest.warns(UserWarning, match="cannot be locked .*not implemented.*: see that no other job"),
        only_job(tmp_path),
    ):
        pass


# --- Signals and launches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_becomes_a_question_and_is_given_back(number: int) -> None:
    before = signal.getsignal(number)
    stop = StopRequests(Accelerator(cpu=True))
    assert not stop.any()
    os.kill(os.getpid(), number)
    assert stop.any()
    stop.close()
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launch_configuration_is_what_its_name_says(path: Path) -> None:
    name = path.stem
    found = launch_arguments(name)
    on_cpu = name.endswith("cpu")
    stage = int(name[4]) if name.startswith("zero") else None
    assert found.num_processes == (1 if name in ("cpu", "gpu") else 2 if on_cpu else 8)
    assert found.mixed_precision == ("no" if on_cpu else "bf16")
    assert bool(found.use_deepspeed) == (stage is not None)
    assert bool(found.use_fsdp) == name.startswith("fsdp")
    assert bool(found.multi_gpu) == name.startswith("ddp")
    # ACCELERATE_USE_CPU, which use_cpu sets, turns DeepSpeed off.
    assert bool(found.use_cpu) == (on_cpu and stage is None)
    if stage is not None:
        assert found.zero_stage == stage
        device = "cpu" if name.endswith("offload") else "none"
        assert (found.offload_optimizer_device, found.offload_param_device) == (device, device)
    if name.startswith("fsdp"):
        assert found.fsdp_version == 2
    assert launch_arguments(name, "--mixed_precision", "fp16").mixed_precision == "fp16"


def test_there_is_a_launch_configuration_for_each_strategy() -> None:
    found = {path.stem for path in ACCELERATE.glob("*.yaml")}
    on_gpus = {"gpu", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"}
    assert found == on_gpus | {"cpu", "ddp_cpu", "zero1_cpu", "zero2_cpu", "zero3_cpu"}
