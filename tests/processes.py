"""Runs of the training entry points as processes that begin at once: forked where the imports are done already.

The environment is that of `accelerate launch`, by its own functions; torchrun's share is five variables. So a test can afford
to kill and rerun where the launcher itself, at some ten seconds a start, is not what is tested.
"""

import argparse
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

from accelerate.commands import launch

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
    elif arguments.multi_gpu:
        variables = launch.prepare_multi_gpu_env(arguments)
    else:
        variables = launch.prepare_simple_launcher_cmd_env(arguments)[1]
    return {name: value for name, value in variables.items() if os.environ.get(name) != value}


def _work(script: str, arguments: list[str], variables: dict[str, str], rank: int, leader: int, log: str) -> None:
    os.setpgid(0, leader)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    os.chdir(REPOSITORY)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % len(os.sched_getaffinity(0))]})
    entry = sys.modules[f"stgen.{script}"]
    entry.main(arguments)


class Run:
    """`processes` processes of `stgen/SCRIPT.py`, in a process group of their own.

    Args:
        script: train or train_vae.
        log: file that their output is appended to.
        strategy: a name in configs/accelerate.
    """

    def __init__(
        self, script: str, arguments: list[str], log: Path, strategy: str = "cpu", processes: int = 1, *options: str
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
            leader = self.processes[0].pid if self.processes else 0
            process = _FORKSERVER.Process(
                target=_work, args=(script, arguments, variables | own, rank, leader, str(log)), daemon=True
            )
            process.start()
            self.processes.append(process)

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, timeout: float = 300) -> list[int]:
        """The exit statuses, when all have ended; when one fails the others are killed, as torchrun does."""
        deadline = time.monotonic() + timeout
        while self.running():
            if any(process.exitcode for process in self.processes) or time.monotonic() > deadline:
                time.sleep(1)  # they may be about to end the same way
                self.kill()
            time.sleep(0.02)
        return [process.exitcode for process in self.processes]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the whole process group."""
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
