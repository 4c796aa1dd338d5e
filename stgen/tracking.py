"""What a run tells: `metrics.jsonl` always, TensorBoard and W&B if asked, and a progress bar."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker, on_main_process
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from stgen.config import require
from stgen.durable import write_durably

METRICS = "metrics.jsonl"
MEASURED = ("time", "samples_per_second", "tokens_per_second", "mfu")
"""Columns of its rows that differ from run to run; all others are exact."""

# --- Trackers -----------------------------------------------------------------------------------------------------


class JsonlTracker(GeneralTracker):
    """Appends one JSON object a call to `run/metrics.jsonl`: `{step, time, ...}`, time in seconds since the epoch. A number
    that is not finite, which JSON does not know, is null."""

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
        row = {"step": step, "time": round(time.time(), 3)}
        row |= {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _wandb(run: Path) -> GeneralTracker:
    # An id that follows from the folder: a run that is resumed goes on as the same one.
    identity = f"{run.name}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}"
    return WandBTracker("stgen", name=run.name, id=identity, resume="allow", dir=str(run))


TRACKERS: dict[str, Callable[[Path], GeneralTracker]] = {
    "tensorboard": lambda run: TensorBoardTracker("tensorboard", run),  # a folder of the run
    "wandb": _wandb,
}
"""By name, from the run folder; the names are those of the packages."""


def make_trackers(names: Sequence[str], run: Path) -> list[GeneralTracker]:
    """`metrics.jsonl` and those asked for.

    Raises:
        ValueError: a name is unknown, or its package is missing.
    """
    for name in names:
        require(name in TRACKERS, "trackers", name, ", ".join(TRACKERS))
        allowed = f"none without the package {name} (stgen's extra `trackers`)"
        require(find_spec(name) is not None, "trackers", name, allowed)
    return [JsonlTracker(run), *(TRACKERS[name](run) for name in names)]


def log_picture(accelerator: Accelerator, name: str, path: Path, step: int) -> None:
    """Shows a picture to the trackers that take pictures. The main process calls it, or all."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))[None]  # n h w c
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels}, step, **layout)


# --- Rows ---------------------------------------------------------------------------------------------------------


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
        """The means over forwards and processes, and begins anew. All processes call it.

        Forwards whose value is not finite are left out: their steps are skipped and counted. NaN if none is left.
        """
        stacked = {name: torch.stack(values) for name, values in self.values.items()}
        finite = {name: values[values.isfinite()] for name, values in stacked.items()}
        sums = {name: torch.stack([values.sum(), values.new_tensor(len(values))]) for name, values in finite.items()}
        self.values = {}
        return {name: (total / count).item() for name, (total, count) in self.accelerator.reduce(sums, "sum").items()}

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


# --- Speed --------------------------------------------------------------------------------------------------------

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 FLOP/s with fp32 accumulation by a part of `torch.cuda.get_device_name`, from NVIDIA's data sheets; the first
that occurs counts."""


def peak_flops(device: torch.device) -> float | None:
    """That of the table, or None for a device that is not in it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class Throughput:
    """Samples and tokens a second, and MFU, of the steps since the last row, without what stands between them (validation,
    checkpoints).

    MFU (model FLOPs utilisation, Chowdhery et al. 2022, arXiv:2204.02311) is the FLOPs that the trained model needs over
    those that the devices could do in the time. Those of a forward are counted by torch in the first forward of each shape of
    inputs, and a backward pass is taken for two forwards; what gradient checkpointing does again is not needed, so it doesn't
    count, nor do frozen encoders outside of the model.

    Args:
        model: the plain module that is trained.
        peak: FLOP/s of one device; None looks it up by name, and without one there is no MFU.
        tokens: of one clip of (frames, height, width); None for a model without tokens.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        peak: float | None = None,
        tokens: Callable[[tuple[int, int, int]], int] | None = None,
    ) -> None:
        self.accelerator, self.tokens = accelerator, tokens
        self.peak = peak if peak is not None else peak_flops(accelerator.device)
        self._counts = {"samples": 0.0, "tokens": 0.0, "flops": 0.0, "seconds": 0.0}
        self._began: float | None = None
        self._forwards: dict[tuple[tuple[int, ...], ...], float] = {}
        self._counter: FlopCounterMode | None = None
        if self.peak is not None:
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True)

    def start(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def stop(self) -> None:
        """It ends. A GPU may still be at work on it, which the next ones or the next row wait for."""
        if self._began is not None:
            self._counts["seconds"] += time.perf_counter() - self._began
        self._began = None

    def see(self, batch: dict[str, Any]) -> None:
        """A batch of clips is worked on."""
        clips = len(batch["position"])
        self._counts["samples"] += clips
        if self.tokens is not None:
            self._counts["tokens"] += clips * self.tokens(batch["shape"])

    @staticmethod
    def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, Tensor))

    def _before_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and self._shapes(args, kwargs) not in self._forwards:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def _after_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        shapes = self._shapes(args, kwargs)
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._forwards[shapes], self._counter = float(self._counter.get_total_flops()), None
        if torch.is_grad_enabled():
            self._counts["flops"] += 3 * self._forwards[shapes]

    def take(self) -> dict[str, float]:
        """`samples_per_second`, `tokens_per_second` and `mfu` (0 to 1), the latter two where there are such; begins anew. All
        processes call it, after something that waits for the device."""
        self.stop()
        self.start()
        counts = torch.tensor(list(self._counts.values()), dtype=torch.float64).to(
            self.accelerator.device, torch.float32
        )
        samples, tokens, flops, seconds = self.accelerator.reduce(counts, "sum").tolist()
        self._counts = dict.fromkeys(self._counts, 0.0)
        processes = self.accelerator.num_processes
        found = {"samples_per_second": samples / seconds * processes}
        if self.tokens is not None:
            found["tokens_per_second"] = tokens / seconds * processes
        if self.peak is not None:
            found["mfu"] = flops / seconds / self.peak  # seconds are those of all processes
        return found


def progress_bar(total: int, done: int, show: bool, description: str) -> tqdm:
    """A bar over training samples, with rate and ETA, that starts at `done`."""
    return tqdm(
        total=total, initial=done, desc=description, unit="clip", disable=not show, smoothing=0.05, mininterval=1
    )


def show_row(bar: tqdm, row: dict[str, float]) -> None:
    """The newest row, beside the bar."""
    short = {name.replace("_per_second", "/s"): value for name, value in row.items()}
    bar.set_postfix({name: f"{value:.1%}" if name == "mfu" else f"{value:.4g}" for name, value in short.items()})
