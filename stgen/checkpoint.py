"""Checkpoints of a run: `run/checkpoints/step-N/`, everything needed to go on, newest last.

A checkpoint is written under a temporary name, synced to the disk and renamed, and its manifest has the size and the
SHA-256 of every file. One whose writing was interrupted never bears the final name, and one that the disk has spoilt is
found out: the newest whole one is resumed, and each that is not is reported with its fault and left as it is.

    step-N/
      progress.json     {step, samples, score, processes, strategy, precision, measured}
      manifest.json     {file: {size, sha256}}, written last
      ...               what Accelerate writes: weights, optimizer, random states, what was registered

Weights are safetensors, but Accelerate and DeepSpeed pickle optimizer and random states, and unpickle them on resuming: resume
runs of your own, as you run programs of your own. What is meant for others is `run/export`, safetensors and JSON alone.
All processes must see the run folder; what a DeepSpeed checkpoint needs on another number of processes is worked out there.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

from stgen.config import require
from stgen.durable import sync, write_durably
from stgen.tracking import METRICS, rewind_metrics

PROGRESS, MANIFEST = "progress.json", "manifest.json"
ENGINE = "pytorch_model"
"""The part of a checkpoint that DeepSpeed writes, by the name that Accelerate gives it."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and on what."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Samples that all processes together have taken: the position in the data."""
    score: float | None = None
    """Of a validation at this very step, lower is better."""
    processes: int = 0
    strategy: str = ""
    """What the form of the files follows from: replicated (one process or DDP), zero1, zero2, zero3, fsdp."""
    precision: str = ""
    """no, bf16 or fp16."""
    measured: str = ""
    """What the score follows from beside the weights: scores of another measure don't compare."""


def strategy(accelerator: Accelerator) -> str:
    """As `Progress.strategy` has it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    return "fsdp" if accelerator.distributed_type == DistributedType.FSDP else "replicated"


# --- Whole or not -------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints whose writing was finished, oldest first. Whether they are whole still is not looked at."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def read_progress(folder: Path) -> Progress:
    """That of a checkpoint."""
    return Progress(**json.loads((folder / PROGRESS).read_text()))


def sha256(path: Path) -> str:
    """Of a file's bytes, hexadecimal."""
    sums = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sums.update(block)
    return sums.hexdigest()


def fault(folder: Path, share: slice | None = slice(None)) -> str | None:
    """Why a checkpoint is not whole; None if it is.

    Args:
        share: of the files, whose bytes are compared with the manifest too; None compares no bytes but all sizes.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())
        sizes, sums = ({name: entry[key] for name, entry in files.items()} for key in ("size", "sha256"))
        read_progress(folder)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:  # JSON of another form too
        return f"{MANIFEST} or {PROGRESS} cannot be read: {error!r}"
    try:
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, {MANIFEST} says {size}"
        names = sorted(files)[share] if share else []
        with ThreadPoolExecutor() as pool:
            for name, found in zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True):
                if found != sums[name]:
                    return f"{name} has other bytes than those that were written"
    except OSError as error:  # the disk's
        return f"a file cannot be read: {error}"
    return None


def whole_until(run: Path, step: int | None = None) -> dict[Path, Progress]:
    """The checkpoints up to a step whose files are all there, in their sizes, oldest first; None is up to the newest."""
    progress = {folder: read_progress(folder) for folder in checkpoints(run) if fault(folder, None) is None}
    return {folder: found for folder, found in progress.items() if step is None or found.step <= step}


def best_of(found: dict[Path, Progress]) -> Path | None:
    """The checkpoint of the lowest score, the earliest of several; None if none has one.

    Scores that were measured otherwise than the newest don't compare with it, and are left out.
    """
    scored = {folder: progress for folder, progress in found.items() if progress.score is not None}
    newest = list(scored.values())[-1].measured if scored else ""
    scores = {folder: p.score for folder, p in scored.items() if p.score is not None and p.measured == newest}
    return min(scores, key=lambda folder: scores[folder]) if scores else None


def best_score(run: Path, step: int | None = None, measured: str = "") -> float:
    """The lowest score of the run's checkpoints up to a step that was measured so; infinity if none was."""
    found = {folder: p for folder, p in whole_until(run, step).items() if p.measured == measured}
    best = best_of(found)
    score = found[best].score if best else None
    return float("inf") if score is None else score


# --- Saving -------------------------------------------------------------------------------------------------------


def save_checkpoint(
    accelerator: Accelerator,
    run: Path,
    step: int,
    samples: int,
    keep: int,
    score: float | None = None,
    measured: str = "",
) -> None:
    """Saves weights, optimizer, registered objects (averaged weights, losses not logged yet) and progress.

    Keeps the last `keep` checkpoints up to this one, and the one of the lowest score (`best_of`). Later ones, which this run
    passed over when it resumed, count for nothing until it writes them anew. All processes call it.

    Args:
        step: optimizer steps done.
        samples: samples that all processes together have taken: the position in the data.
        score: of a validation at this step, lower is better.
        measured: as `Progress.measured` has it.
    """
    final = run / "checkpoints" / f"step-{step}"
    temporary = _aside(final)
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        on = (accelerator.num_processes, strategy(accelerator), accelerator.mixed_precision)
        (temporary / PROGRESS).write_text(json.dumps(asdict(Progress(step, samples, score, *on, measured))))
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    names = [sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file())]
    broadcast_object_list(names)  # what the first process sees: a file system may show others' files late

    def settle(name: str) -> tuple[str, dict[str, Any]]:
        sync(temporary / name)
        return name, {"size": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)}

    with ThreadPoolExecutor() as pool:
        entries = gather_object(list(pool.map(settle, names[0][_share(accelerator)])))
    if accelerator.is_main_process:
        write_durably(temporary / MANIFEST, json.dumps(dict(sorted(entries)), indent=1))
        for folder in {path.parent for path in temporary.rglob("*")}:
            sync(folder)
        if (run / METRICS).exists():  # its rows up to here will not be written again
            sync(run / METRICS)
        if final.exists():  # torn, or of the same step of the same run
            _remove(final)
        temporary.rename(final)
        sync(final.parent)
        whole = whole_until(run, step)
        kept = {*list(whole)[-keep:], best_of(whole)}
        for folder in whole:
            if folder not in kept:
                _remove(folder)
    accelerator.wait_for_everyone()


def _share(accelerator: Accelerator) -> slice:
    """The files whose bytes this process reads."""
    return slice(accelerator.process_index, None, accelerator.num_processes)


def _aside(folder: Path) -> Path:
    """Where a checkpoint is while it isn't whole."""
    return folder.with_name(folder.name + ".tmp")


def _remove(folder: Path) -> None:
    """Takes the final name away first, so that a kill on the way leaves nothing torn under it."""
    gone = folder.with_name(folder.name + ".old.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


# --- Resuming -----------------------------------------------------------------------------------------------------


def resume(accelerator: Accelerator, run: Path) -> Progress:
    """Loads the newest whole checkpoint, if the run has one, and takes metrics.jsonl back to it. All processes call it.

    Raises:
        ValueError: no checkpoint is whole, or it cannot be resumed with this strategy or precision.
    """
    if accelerator.is_main_process:
        for leftover in (run / "checkpoints").glob("*.tmp"):
            accelerator.print(f"{leftover} is removed: its writing or removal was interrupted")
            shutil.rmtree(leftover)
        for leftover in run.glob(".*.tmp"):  # of `durable.replacing`
            leftover.unlink()
    accelerator.wait_for_everyone()
    newest = _newest_whole(accelerator, run)
    progress = read_progress(newest) if newest else Progress()
    if newest:
        _load(accelerator, newest, progress)
    if accelerator.is_main_process:
        rewind_metrics(run, progress.step)
    accelerator.wait_for_everyone()
    return progress


def _newest_whole(accelerator: Accelerator, run: Path) -> Path | None:
    """The newest checkpoint that is whole, None before the first; those passed over are named. All processes call it."""
    found = [checkpoints(run)]
    broadcast_object_list(found)
    for folder in reversed(found[0]):
        faults = [reason for reason in gather_object([fault(folder, _share(accelerator))]) if reason]
        if not faults:
            return folder
        accelerator.print(f"{folder} is passed over: {faults[0]}")
    require(not found[0], "run", str(run), "one with a whole checkpoint, or with none: without them it begins anew")
    return None


def _load(accelerator: Accelerator, folder: Path, progress: Progress) -> None:
    for name, now in (("strategy", strategy(accelerator)), ("precision", accelerator.mixed_precision)):
        before = getattr(progress, name)
        require(now == before, name, now, f"{before!r}, with which {folder} was written")
    accelerator.print(f"resuming from {folder}")
    if not progress.strategy.startswith("zero") or progress.processes == accelerator.num_processes:
        accelerator.load_state(str(folder))
        return
    # DeepSpeed cuts optimizer states by process; its universal form has them whole.
    universal = _aside(folder)
    if accelerator.is_main_process:
        universal.mkdir()
        for path in folder.iterdir():
            if path.name != ENGINE:
                (universal / path.name).symlink_to(path.resolve())
        tool = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        ends = ["--input_folder", str(folder / ENGINE), "--output_folder", str(universal / ENGINE)]
        done = subprocess.run([*tool, *ends], capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{folder} cannot be brought to {accelerator.num_processes} processes: {last}")
    accelerator.wait_for_everyone()
    engine = accelerator.deepspeed_engine_wrapped.engine
    optimizer = engine.optimizer.optimizer
    own = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    accelerator.load_state(str(universal))
    engine._config.load_universal_checkpoint = False
    # Under ZeRO-3 all groups come back with the settings of the first, and with one counter of steps, which each then raises.
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(universal)


def share_weights(accelerator: Accelerator) -> None:
    """Has one process and several (DDP) write and read the same names of weights. To be called before saving or loading."""

    def unwrap(models: list[torch.nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        weights[:] = [accelerator.unwrap_model(model).state_dict() for model in models[: len(weights)]]

    accelerator.register_save_state_pre_hook(unwrap)
    accelerator.register_load_state_pre_hook(
        lambda models, folder: models.__setitem__(slice(None), [accelerator.unwrap_model(model) for model in models])
    )


def check_global_batch(samples: int, global_batch: int) -> None:
    """Positions stay exact only while the checkpoint lies on a batch boundary of the run that resumes it."""
    require(
        samples % global_batch == 0, "global batch", global_batch, f"a divisor of the {samples} samples already seen"
    )
