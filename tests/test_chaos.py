"""Runs that are killed at random moments, writing of checkpoints included, and rerun until they finish.

They must end where the run that nobody disturbed ends: every row of metrics.jsonl once and equal to the last digit, every
file of the last checkpoint (weights, averages, optimizer states) and of the export the same to the byte.

`pytest tests/test_chaos.py --chaos MINUTES` goes on for so long; a failure names the seed, and CHAOS_SEED repeats it.
"""

import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from processes import Run, toy_arguments, toy_training

from stgen.checkpoint import MANIFEST, checkpoints, sha256

pytestmark = pytest.mark.slow

PROCESSES = {"cpu": 1, "ddp_cpu": 2, "zero1_cpu": 2, "zero2_cpu": 2, "zero3_cpu": 2}
TIMING = ("time", "samples_per_second", "tokens_per_second", "mfu")
SETTINGS = ["samples=32", "checkpoint_every=1", "log_every=3", "keep_checkpoints=1", "accumulate=2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_training(tmp_path_factory.mktemp("world"))


def start(world: Path, name: str, strategy: str) -> Run:
    batch = f"batch_size={2 // PROCESSES[strategy]}"
    arguments = toy_arguments(world, name, *SETTINGS, batch)
    return Run("train", arguments, world / f"{name}.log", strategy, PROCESSES[strategy])


def kill_at_random(run: Run, checkpoint_folder: Path, dice: random.Random) -> str:
    """Kills the run, unless it ends before, in one of three ways: which."""
    way = dice.choice(["anywhere", "in the loop", "while saving"])
    before = set(checkpoint_folder.glob("*"))
    if way == "anywhere":
        time.sleep(dice.uniform(0, 4))
    else:
        while run.running() and not set(checkpoint_folder.glob("*")) - before:  # a checkpoint is begun: `step-N.tmp`
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.02) if way == "while saving" else dice.uniform(0, 1))
    if not run.running():
        return "not"
    run.kill()
    return way


def outcome(folder: Path) -> tuple[list[dict], dict[str, str], dict[str, str]]:
    """The rows of metrics.jsonl without times; name and digest of all files of the last checkpoint, and the export."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    saved = json.loads((checkpoints(folder)[-1] / MANIFEST).read_text())
    export = {path.relative_to(folder).as_posix(): sha256(path) for path in (folder / "export").rglob("*.safetensors")}
    # Random states hold global generators, which no draw of a run is taken from.
    files = {name: entry["sha256"] for name, entry in saved.items() if not name.startswith("random_states")}
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows], files, export


def disturb(world: Path, name: str, strategy: str, kills: int, seed: int) -> list[str]:
    """Kills and reruns, and lets the run finish after so many kills: the ways it was killed."""
    dice, ways = random.Random(seed), []
    while len(ways) < kills and "not" not in ways:
        run = start(world, name, strategy)
        ways.append(kill_at_random(run, world / name / "checkpoints", dice))
        if ways == ["not"]:  # ended before the first: once more, or nothing was disturbed
            shutil.rmtree(world / name)
            ways.clear()
    start(world, name, strategy).succeed()
    return ways


def undisturbed(world: Path, strategy: str) -> tuple:
    """What the run comes to if it is left alone; once for each strategy."""
    if not (world / strategy / "export").exists():
        start(world, strategy, strategy).succeed()
    return outcome(world / strategy)


def assert_same(found: tuple, expected: tuple) -> None:
    for of_found, of_expected in zip(found, expected, strict=True):
        assert of_found == of_expected


@pytest.mark.parametrize(("strategy", "kills"), [("cpu", 5), ("ddp_cpu", 4)])
def test_killed_at_random_a_run_comes_to_the_same(world: Path, strategy: str, kills: int) -> None:
    expected = undisturbed(world, strategy)
    assert [row["step"] for row in expected[0]] == [3, 6, 8]
    seed = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"CHAOS_SEED={seed}")  # pytest shows it when the test fails
    name = f"{strategy}-killed"
    disturb(world, name, strategy, kills, seed)
    assert_same(outcome(world / name), expected)


@pytest.mark.parametrize("strategy", ["zero1_cpu", "zero2_cpu", "zero3_cpu"])
def test_killed_while_it_saves_a_run_comes_to_the_same(world: Path, strategy: str) -> None:
    expected = undisturbed(world, strategy)
    name, interrupted = f"{strategy}-killed", False
    saved = world / name / "checkpoints"
    for _ in range(10):
        run = start(world, name, strategy)
        while not ((saved / "step-3").exists() and any(saved.glob("*.tmp"))):
            assert run.running(), run.log.read_text()[-6000:]
            time.sleep(0.001)
        run.kill()
        interrupted = any(saved.glob("*.tmp"))
        if interrupted:
            break
    assert interrupted
    output = start(world, name, strategy).succeed()
    assert "its writing or removal was interrupted" in output
    assert_same(outcome(world / name), expected)


@pytest.mark.parametrize("strategy", list(PROCESSES))
def test_chaos_for_minutes(world: Path, strategy: str, pytestconfig: pytest.Config) -> None:
    minutes = pytestconfig.getoption("--chaos")
    if not minutes:
        pytest.skip("the long form: --chaos MINUTES, shared by the strategies")
    expected, end, ways = undisturbed(world, strategy), time.monotonic() + 60 * minutes / len(PROCESSES), []
    while time.monotonic() < end:
        seed = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(10**6)))
        print(f"CHAOS_SEED={seed}")
        name = f"{strategy}-{seed}"
        ways += disturb(world, name, strategy, kills=6, seed=seed)
        assert_same(outcome(world / name), expected)
        shutil.rmtree(world / name)
    print(f"{strategy}: {len(ways)} starts killed or ended: {dict(Counter(ways))}")
