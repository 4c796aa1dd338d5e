"""What a run tells: `metrics.jsonl` always, and a progress bar."""

import json
import time
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process
from tqdm import tqdm


class JsonlTracker(GeneralTracker):
    """Appends one JSON object a call to `run/metrics.jsonl`: `{step, time, ...}`, time in seconds since the epoch."""

    name = "jsonl"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.path = run / "metrics.jsonl"

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


def progress_bar(total: int, done: int, show: bool, description: str) -> tqdm:
    """A bar over training samples, with rate and ETA, that starts at `done`."""
    return tqdm(
        total=total, initial=done, desc=description, unit="clip", disable=not show, smoothing=0.05, mininterval=1
    )
