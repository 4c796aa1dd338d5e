"""A toy world to train in, and runs of the training entry points that begin at once.

Their processes are forked from one that has done the imports. The environment is that of `accelerate launch`, by its own
functions; torchrun's share is five variables. So a test can afford to kill and rerun, where the launcher itself, at some
ten seconds a start, is not what is tested.
"""

import argparse
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from accelerate.commands import launch
from conftest import tiny_text_encoder, tiny_vae

from stgen.accelerator import PREEMPTED
from stgen.data.moving_mnist import write_moving_mnist

REPOSITORY = Path(__file__).parent.parent
ACCELERATE = REPOSITORY / "configs" / "accelerate"

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["deepspeed", "stgen.train", "stgen.train_vae"])


def launch_arguments(strategy: str, *options: str) -> argparse.Namespace:
    """What `accelerate launch --config_file configs/accelerate/STRATEGY.yaml` understands."""
    given = ["--config_file", str(ACCELERATE / f"{strategy}.yaml"), *options, "script.py"]
    arguments, config, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(given))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(
        config.deepspeed_config or {}
    )  # `launch_command` does it
    return arguments


def launch_environment(strategy: str, *options: str) -> dict[str, str]:
    """The variables that `accelerate launch` sets."""
    arguments = launch_arguments(strategy, *options)
    if arguments.use_deepspeed:
        variables = launch.prepare_deepspeed_cmd_env(arguments)[1]
    elif arguments.multi_gpu or arguments.use_fsdp:
        variables = launch.prepare_multi_gpu_env(arguments)
    else:
        variables = launch.prepare_simple_launcher_cmd_env(arguments)[1]
    return {name: value for name, value in variables.items() if os.environ.get(name) != value}


def _work(script: str | Callable[[list[str]], None], arguments: list[str], variables: dict[str, str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.register(signal.SIGUSR2)
    os.environ.update(variables)
    os.chdir(REPOSITORY)
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[int(variables.get("RANK", 0)) % len(cpus)]})  # one thread a process
    main = sys.modules[f"stgen.{script}"].main if isinstance(script, str) else script
    main(arguments)


def toy_training(folder: Path) -> Path:
    """What `stgen/train.py` trains on: shards, a text encoder and a VAE, all tiny."""
    for split in ("train", "heldout"):
        write_moving_mnist(folder / split, clips=16, split=split, size=32, digits=1)
    (folder / "text").mkdir()
    for part in tiny_text_encoder(folder):
        part.save_pretrained(folder / "text")
    tiny_vae(spatial_downsample=(True, True)).save_pretrained(folder / "vae" / "export")
    return folder


def toy_arguments(world: Path, run: str, *overrides: str) -> list[str]:
    """The arguments of `stgen/train.py` for a run of 6 steps in that world."""
    model = ["model.num_attention_heads=2", "model.attention_head_dim=12", "model.num_layers=2", "model.pattern=st"]
    paths = [f"run={world}/{run}", f"vae={world}/vae/export", f"data.path={world}/train", f"text_encoder={world}/text"]
    fixed = ["samples=24", "batch_size=4", "log_every=1", "checkpoint_every=2", "optimizer.warmup=0"]
    return ["--config", "configs/moving_mnist_32/transformer.yaml", *paths, *model, *fixed, *overrides]


class Run:
    """`processes` processes of `stgen/SCRIPT.py`.

    Args:
        script: train or train_vae; or a function that is called in their place.
        log: file that their output is appended to.
        strategy: a name in configs/accelerate.
    """

    def __init__(
        self,
        script: str | Callable[[list[str]], None],
        arguments: list[str],
        log: Path,
        strategy: str = "cpu",
        processes: int = 1,
        *options: str,
    ) -> None:
        variables = launch_environment(strategy, *options)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        if strategy != "cpu":
            variables |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.log, self.processes = log, []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if strategy != "cpu" else {}
            process = _FORKSERVER.Process(
                target=_work, args=(script, arguments, variables | own, str(log)), daemon=True
            )
            process.start()
            self.processes.append(process)

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, timeout: float = 90) -> list[int]:
        """The exit statuses, when all have ended; when one fails the others are killed, as torchrun does."""
        deadline = time.monotonic() + timeout
        while self.running():
            late = time.monotonic() > deadline
            # One that was asked to stop is no failure, and the others take their time to end as well.
            if late or any(process.exitcode not in (None, 0, PREEMPTED) for process in self.processes):
                if late:
                    self.kill(signal.SIGUSR2)  # they say where they are
                time.sleep(1)  # of several, others may be about to end the same way
                self.kill()
            time.sleep(0.02)
        return [process.exitcode for process in self.processes]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to all processes."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)
        if number == signal.SIGKILL:
            for process in self.processes:
                process.join()

    def succeed(self) -> str:
        """Waits for success: what the processes printed."""
        statuses = self.wait()
        output = self.log.read_text()
        assert not any(statuses), f"{statuses}\n{output[-6000:]}"
        return output


def in_a_fresh_process(function: Callable[..., None], *arguments: object) -> None:
    """Calls a function of a module in a process that shares no object with this one."""
    process = _FORKSERVER.Process(target=function, args=arguments, daemon=True)
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0
