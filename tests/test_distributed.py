"""One run on one process or two, under DDP and ZeRO-1, 2 and 3; stopped by signals; in half precision."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import REPOSITORY, Run, toy_arguments, toy_training
from safetensors.torch import load_file, save_file

import stgen.loop
from stgen.accelerator import PREEMPTED, full_weights, make_accelerator
from stgen.checkpoint import checkpoints, read_progress
from stgen.data.reading import ClipDataset, DataConfig
from stgen.loop import LoopConfig, Stage, fit
from stgen.optimization import OptimizerConfig

pytestmark = pytest.mark.slow
STRATEGIES = ["ddp_cpu", "zero1_cpu", "zero2_cpu", "zero3_cpu"]
LONG = ["samples=64", "checkpoint_every=100", "optimizer.weight_decay=5"]
"""Nothing but a signal makes a checkpoint, and matrices differ visibly from what isn't decayed."""
LAST = [4 * step for step in range(1, 17)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_training(tmp_path_factory.mktemp("world"))


def start(world: Path, name: str, strategy: str = "cpu", processes: int = 1, *more: str, precision: str = "no") -> Run:
    arguments = toy_arguments(world, name, *LONG, f"batch_size={4 // processes}", *more)
    return Run("train", arguments, world / f"{name}.log", strategy, processes, "--mixed_precision", precision)


def losses(world: Path, name: str) -> dict[int, float]:
    """By clips seen; a row that stands there twice is an error."""
    path = world / name / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len({row["samples"] for row in rows}) == len(rows)
    return {row["samples"]: row["loss"] for row in rows}


def seen(world: Path, name: str) -> int:
    """Clips seen by the newest row, which may be half written."""
    path = world / name / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["samples"] for line in whole if line.endswith("\n")), default=0)


def stop(run: Run, world: Path, name: str, after: int, number: int, rank: int) -> int:
    """Sends one process a signal when so many clips were seen: the clips that the run has saved."""
    while seen(world, name) < after:
        assert run.running(), run.log.read_text()[-6000:]
        time.sleep(0.001)
    os.kill(run.processes[rank].pid, number)
    assert run.wait() == [PREEMPTED] * len(run.processes), run.log.read_text()[-6000:]
    assert "the same command goes on" in run.log.read_text()
    saved = read_progress(checkpoints(world / name)[-1])
    assert saved.samples == seen(world, name)
    return saved.samples


@pytest.fixture(scope="module")
def reference(world: Path) -> dict[int, float]:
    """The losses of one process that nobody stops."""
    start(world, "one").succeed()
    return losses(world, "one")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_goes_on_with_other_processes(world: Path, reference: dict[int, float], strategy: str) -> None:
    """Two processes, one, two: no clip lost or seen twice, and the losses are those of one process throughout."""
    first = stop(start(world, strategy, strategy, 2), world, strategy, 8, signal.SIGTERM, rank=1)
    second = stop(start(world, strategy, strategy, 1), world, strategy, first + 8, signal.SIGUSR1, rank=0)
    assert 8 <= first < second < 64
    start(world, strategy, strategy, 2).succeed()
    assert list(reference) == LAST
    assert losses(world, strategy) == pytest.approx(reference, rel=1e-5)
    # What ZeRO-3 splits is exported whole.
    export, end = world / strategy / "export" / "transformer", checkpoints(world / strategy)[-1]
    exported = load_file(export / "diffusion_pytorch_model.safetensors")
    averages = load_file(end / "averages" / "exponential.safetensors")
    assert averages.keys() <= exported.keys()
    assert all(torch.equal(exported[name], average) for name, average in averages.items())
    raw = load_file(export / "diffusion_pytorch_model.raw.safetensors")
    one = load_file(world / "one" / "export" / "transformer" / "diffusion_pytorch_model.raw.safetensors")
    for name, weight in raw.items():
        torch.testing.assert_close(weight, one[name], atol=2e-3, rtol=0)  # AdamW makes steps of 1e-3 of any noise


def test_another_strategy_is_another_run(world: Path, reference: dict[int, float]) -> None:
    run = start(world, "one", "zero2_cpu", 1)
    assert run.wait() == [2]
    assert "error: strategy is 'zero2', allowed: 'replicated', with which" in run.log.read_text()


# --- Signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "number", "whole_group", "samples"),  # one process takes milliseconds a step, so that it gets more
    [
        ("cpu", signal.SIGTERM, False, 1024),
        ("ddp_cpu", signal.SIGUSR1, False, 64),
        ("zero2_cpu", signal.SIGTERM, True, 64),
    ],
)
def test_a_signal_to_the_launcher_saves_the_run(
    world: Path, reference: dict[int, float], strategy: str, number: int, whole_group: bool, samples: int
) -> None:
    """`accelerate launch` dies of the signal or passes it on, or all get it, loader workers too: the run saves and goes on."""
    processes = 1 if strategy == "cpu" else 2
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    command += [
        "--config_file",
        f"configs/accelerate/{strategy}.yaml",
        "--num_cpu_threads_per_process",
        "1",
        "stgen/train.py",
    ]
    more = [*LONG, f"samples={samples}", f"batch_size={4 // processes}", f"data.workers={int(whole_group)}"]
    if samples != 64:
        start(world, "longer", strategy, processes, f"samples={samples}").succeed()
        reference = losses(world, "longer")
    for attempt in range(5):  # on a busy machine the run may have ended when the signal comes
        name = f"{strategy}-launched-{attempt}"
        with (world / f"{name}.log").open("w") as log:
            launcher = subprocess.Popen(
                [*command, *toy_arguments(world, name, *more)],
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # As `Run` has it: with another number of threads sums end in other last bits.
                preexec_fn=lambda: os.sched_setaffinity(0, {0}) if processes == 1 else None,
            )
            while seen(world, name) < 8:
                assert launcher.poll() is None
                time.sleep(0.001)
            (os.killpg if whole_group else os.kill)(launcher.pid, number)
            assert launcher.wait(60) != 0
        deadline = time.monotonic() + 60
        while not checkpoints(world / name):  # the launcher may have died before its processes
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.5)
        saved = read_progress(checkpoints(world / name)[-1]).samples
        if saved < samples:
            break
    assert 8 <= saved < samples
    start(world, name, strategy, processes, f"samples={samples}").succeed()
    found = losses(world, name)
    assert found == (reference if strategy == "cpu" else pytest.approx(reference, rel=1e-5))
    assert list(found) == list(range(4, samples + 1, 4))


# --- Clipping -----------------------------------------------------------------------------------------------------


class Dot(torch.nn.Module):
    """x -> w x, whose gradient is x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


def direction(position: int) -> torch.Tensor:
    return torch.randn(8, generator=torch.Generator().manual_seed(position)) * (1 + position)


def one_step(arguments: list[str]) -> None:
    """A step of gradient descent by the loop, of 8 clips, whose gradients are told apart."""
    folder, world, batch_size, accumulate = arguments
    data, optimizer = DataConfig(f"{world}/train", 20, 32, 32), OptimizerConfig(lr=0.5, warmup=0, max_grad_norm=3.0)
    config = LoopConfig(folder, data, optimizer, 8, int(batch_size), int(accumulate))
    accelerator = make_accelerator(Path(folder), config.batch_size, config.accumulate, optimizer.max_grad_norm)
    dataset, model = ClipDataset(data), Dot()
    stgen.loop.make_optimizer = lambda model, config, *_: torch.optim.SGD(model.parameters(), lr=config.lr)
    Path(folder).mkdir(exist_ok=True)

    def compute_losses(wrapped: torch.nn.Module, batch: dict, samples: int) -> dict[str, torch.Tensor]:
        return {"loss": wrapped(torch.stack([direction(position) for position in batch["position"]])).mean()}

    fit(accelerator, config, [Stage(config, dataset)], model, compute_losses)
    with full_weights(model):
        if accelerator.is_main_process:
            save_file({"weight": model.weight.detach().clone()}, Path(folder) / "end.safetensors")
    accelerator.wait_for_everyone()
    accelerator.end_training()


@pytest.mark.parametrize("strategy", ["cpu", *STRATEGIES])
def test_what_is_clipped_is_the_whole_accumulated_gradient_once(world: Path, strategy: str) -> None:
    processes, folder = (1 if strategy == "cpu" else 2), world / f"step-{strategy}"
    arguments = [str(folder), str(world), "1", str(8 // processes)]
    Run(one_step, arguments, world / f"{strategy}-step.log", strategy, processes).succeed()
    gradient = torch.stack([direction(position) for position in range(8)]).mean(0)
    assert gradient.norm() > 3
    expected = -0.5 * 3.0 * gradient / gradient.norm()
    found = load_file(folder / "end.safetensors")["weight"][0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --- Precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["cpu", "zero3_cpu"])
def test_bf16_trains_and_resumes_exactly(world: Path, reference: dict[int, float], strategy: str) -> None:
    processes, name = (1 if strategy == "cpu" else 2), f"{strategy}-bf16"
    stop(start(world, name, strategy, processes, precision="bf16"), world, name, 8, signal.SIGTERM, rank=0)
    start(world, name, strategy, processes, precision="bf16").succeed()
    start(world, f"{name}-whole", strategy, processes, precision="bf16").succeed()
    found = losses(world, name)
    assert found == losses(world, f"{name}-whole")
    assert found != reference
    assert found == pytest.approx(reference, rel=2e-2)
    path = "export/transformer/diffusion_pytorch_model.safetensors"
    ends = [load_file(world / run / path) for run in (name, f"{name}-whole")]
    assert all(torch.equal(ends[1][key], weight) for key, weight in ends[0].items())
    assert all(weight.dtype == torch.float32 for weight in ends[0].values()), "bf16 is of operations, not of weights"


@pytest.mark.parametrize(
    ("strategy", "precision", "message"),
    [
        ("zero2_cpu", "fp16", "error: mixed_precision is 'fp16', allowed: bf16 or no under DeepSpeed"),
        ("fsdp2", "no", "error: FSDP on CPU trains unsynchronised"),
    ],
)
def test_what_would_train_wrongly_is_refused_in_one_line(
    world: Path, strategy: str, precision: str, message: str
) -> None:
    run = start(world, f"refused-{strategy}", strategy, precision=precision)
    assert run.wait() == [2]
    assert run.log.read_text().strip().splitlines()[-1].startswith(message)
