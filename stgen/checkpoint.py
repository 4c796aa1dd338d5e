"""Checkpoints of a run: `run/checkpoints/step-N/`, everything needed to go on, newest last.

A checkpoint is written under a temporary name and renamed, so whatever bears the final name is whole.
"""

import json
import shutil
from pathlib import Path

from accelerate import Accelerator

from stgen.config import require

PROGRESS = "progress.json"


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step-*/" + PROGRESS)
    return sorted((path.parent for path in found), key=lambda folder: int(folder.name.removeprefix("step-")))


def save_checkpoint(accelerator: Accelerator, run: Path, step: int, samples: int, keep: int) -> None:
    """Saves weights, optimizer, registered objects (EMA) and progress; keeps the last `keep`. Every rank calls it.

    Args:
        step: optimizer steps done.
        samples: samples that all ranks together have taken: the position in the data.
    """
    final = run / "checkpoints" / f"step-{step}"
    temporary = final.with_name(final.name + ".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)  # of the same run and step, so it held the same
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / PROGRESS).write_text(json.dumps({"step": step, "samples": samples}))
        temporary.rename(final)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, run: Path) -> tuple[int, int]:
    """Loads the newest checkpoint of the run, if there is one: (step, samples), or (0, 0)."""
    found = checkpoints(run)
    if not found:
        return 0, 0
    accelerator.print(f"resuming from {found[-1]}")
    accelerator.load_state(str(found[-1]))
    progress = json.loads((found[-1] / PROGRESS).read_text())
    return progress["step"], progress["samples"]


def check_global_batch(samples: int, global_batch: int) -> None:
    """Positions stay exact only while the checkpoint lies on a batch boundary of the run that resumes it."""
    require(
        samples % global_batch == 0, "global batch", global_batch, f"a divisor of the {samples} samples already seen"
    )
