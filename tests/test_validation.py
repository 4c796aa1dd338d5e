"""Validation in training: what it measures and draws, that it is fixed, and that training does not notice it."""

from pathlib import Path

import pytest
from conftest import run_training


@pytest.fixture(scope="module")
def validated(training_world: Path, tmp_path_factory) -> tuple[Path, list[dict]]:
    run = tmp_path_factory.mktemp("validated") / "run"
    settings = (
        f"validation={{path: {training_world}/heldout, clips: 3, every: 3, times: [0.2, 0.5], sampling_steps: 2}}"
    )
    return run, run_training(training_world, run, settings)


def test_x(validated):
    print(validated[1])
