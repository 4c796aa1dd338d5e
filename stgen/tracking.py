"""What a run tells: `metrics.jsonl` always, and a progress bar."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from torch import Tensor
from tqdm import tqdm

from stgen.durable import write_durably

METRICS = "metrics.jsonl"


class JsonlTracker(GeneralTracker):
    """Appends one JSON object a call to `run/metrics.jsonl`: `{step, time, ...}`, time in seconds since the epoch."""

    name = "jsonl"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.path = run / METRICS

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The resolved configuration is a file of its own, `run/config.yaml`."""

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")


def rewind_metrics(run: Path, step: int) -> None:
    """Drops the rows of `run/metrics.jsonl` that come after optimizer step `step`, which will be written again.

    Raises:
        ValueError: a row other than the last, which a kill may have torn, cannot be read.
    """
    path = run / METRICS
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} cannot be read: {error}") from error
            continue
        if row["step"] <= step:
            kept.append(line if line.endswith("\n") else line + "\n")
    if kept != lines:
        write_durably(path, "".join(kept))


class LossLog:
    """The losses of the forwards since the last row of metrics.jsonl: their means are the next one.

    It is registered for checkpointing, so that a run that stopped between two rows goes on to the same ones.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.values: dict[str, list[Tensor]] = {}

    def add(self, losses: dict[str, Tensor]) -> None:
        """Those of one forward of this process, scalars by name; a loss may set in during a run."""
        for name, value in losses.items():
            self.values.setdefault(name, []).append(value.detach())

    def take(self) -> dict[str, float]:
        """The means over forwards and processes, and begins anew. All processes call it."""
        means = {name: torch.stack(values).mean() for name, values in self.values.items()}
        self.values = {}
        return {name: value.item() for name, value in self.accelerator.reduce(means, "mean").items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Values `p n` of p processes, by name. All processes call it."""
        return {name: self.accelerator.gather(torch.stack(v)[None]).cpu() for name, v in self.values.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """On as many processes as before each gets its own values back; on another number the mean over them."""
        rank, device = self.accelerator.process_index, self.accelerator.device
        self.values = {
            name: list((v[rank] if len(v) == self.accelerator.num_processes else v.mean(0)).to(device).unbind())
            for name, v in state.items()
        }


def progress_bar(total: int, done: int, show: bool, description: str) -> tqdm:
    """A bar over training samples, with rate and ETA, that starts at `done`."""
    return tqdm(
        total=total, initial=done, desc=description, unit="clip", disable=not show, smoothing=0.05, mininterval=1
    )
