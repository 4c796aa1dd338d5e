"""The training loop of both trainers: resume, step, average, log, save."""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from stgen.accelerator import PREEMPTED, StopRequests, end_training, set_batch
from stgen.averaging import AveragedWeights, rewind_snapshots
from stgen.checkpoint import best_score, check_global_batch, checkpoints, resume, save_checkpoint, share_weights
from stgen.config import flatten_config, require, save_config, under
from stgen.data.reading import ClipDataset, DamageLog, DataConfig, clip_loader
from stgen.data.shards import Damage, count_reasons
from stgen.durable import write_durably
from stgen.optimization import (
    FiniteSteps,
    OptimizerConfig,
    all_or_nothing,
    describe_optimizer,
    learning_rate,
    make_optimizer,
)
from stgen.tracking import TRACKERS, LossLog, Throughput, progress_bar, show_row


@dataclass
class LoopConfig:
    """What any training run says."""

    run: str = "???"
    """Run folder; an unfinished run in it is resumed."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    samples: int = 100_000
    """Clips to see in all."""
    batch_size: int = 8
    """Clips of one process in one forward."""
    accumulate: int = 1
    """Forwards of one optimizer step."""
    seed: int = 0
    """Seeds the weights, the order of the data and all draws."""
    checkpoint_every: int = 1000
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept: the last so many, and the one that validated best."""
    log_every: int = 20
    """Optimizer steps between rows of metrics.jsonl."""
    trackers: list[str] = field(default_factory=list)
    """Who gets these rows too, and the pictures: tensorboard, wandb."""
    peak_flops: float | None = None
    """FLOP/s of one device, for MFU; null looks it up by the GPU's name (bf16)."""

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "accumulate", "checkpoint_every", "keep_checkpoints", "log_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for tracker in self.trackers:
            require(tracker in TRACKERS, "trackers", tracker, ", ".join(TRACKERS))
        require(self.peak_flops is None or self.peak_flops > 0, "peak_flops", self.peak_flops, "above 0, or null")


MAY_CHANGE = (
    *("run", "samples", "batch_size", "accumulate", "checkpoint_every", "keep_checkpoints", "log_every"),
    *("data.path", "data.index", "data.cache", "data.cache_gib", "data.max_damaged", "data.workers"),
    *("gradient_checkpointing", "statistics_clips", "use_encoded", "trackers", "peak_flops"),
    *("optimizer.max_nonfinite", "optimizer.snapshot_every", "validation"),
)
"""What a resumed run may be told anew. All else makes another run of it, whose checkpoints would not say so."""

NOT_MEASURED = tuple(f"validation.{name}" for name in ("every", "sheet_clips", "sampling_steps", "guidance_scale"))
"""Of `validation`, what its score doesn't follow from."""

ARCHITECTURE = "architecture"
"""Folder in the run folder with the config.json of the model in training, from which `stgen export` makes it again."""


def check_run(config: LoopConfig) -> None:
    """Raises `ValueError` if the run folder has checkpoints of a run that was configured otherwise."""
    run = Path(config.run)
    if checkpoints(run):
        before, now = flatten_config(run / "config.yaml"), flatten_config(config)
        for key in sorted(before.keys() | now.keys()):
            # A stage may change what the run may, but for its length: where the later ones begin follows from it.
            plain = re.sub(r"^stages\[\d+\]\.(?!samples$)", "", key)
            if not under(plain, MAY_CHANGE):
                changed = f"{before.get(key)!r}, with which {run} was begun; another run folder takes another value"
                require(before.get(key) == now.get(key), key, now.get(key), changed)


def measure_of(config: LoopConfig) -> str:
    """`Progress.measured` of the validations of a run: of other settings, another one."""
    settings = {key: value for key, value in flatten_config(config).items() if under(key, ("validation",))}
    kept = {key: value for key, value in settings.items() if not under(key, NOT_MEASURED)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def begin_run(config: LoopConfig) -> None:
    """Makes the run folder and writes its config.yaml, after `check_run`."""
    check_run(config)
    run = Path(config.run)
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / "config.yaml")


@dataclass(frozen=True)
class Stage:
    """A part of a run that is configured by itself."""

    config: LoopConfig
    """Its settings; `samples` is where it ends, counted from the beginning of the run."""
    dataset: ClipDataset
    """Its clips, from its own position 0 on."""
    begin: int = 0
    """Clips that the run saw before it."""
    frozen: Sequence[torch.nn.Parameter] = ()
    """Parameters that train in other stages but not in this one: neither they nor their optimizer states change."""


def stage_at(stages: Sequence[Stage], samples: int) -> int:
    """The number of the stage that the clip at this position of the run belongs to; the last one has no end."""
    return next((i for i, stage in enumerate(stages) if samples < stage.config.samples), len(stages) - 1)


def check_stages(stages: Sequence[Stage], accelerator: Accelerator) -> None:
    """Raises `ValueError` for what would stop the run in the middle of it."""
    for i, stage in enumerate(stages):
        global_batch = stage.config.batch_size * accelerator.num_processes * stage.config.accumulate
        length, last = stage.config.samples - stage.begin, i == len(stages) - 1
        allowed = f"a multiple of the {global_batch} clips of its optimizer steps"
        require(last or length % global_batch == 0, f"stages[{i}].samples", length, allowed)
        split = accelerator.distributed_type == DistributedType.DEEPSPEED
        allowed = "the same in all stages under DeepSpeed, whose flat gradients leave none out"
        require(not (split and stage.frozen), f"stages[{i}].frozen", f"{len(stage.frozen)} more parameters", allowed)
        clip_loader(stage.dataset, 0, stage.config.batch_size, workers=0)  # reads nothing, but refuses mixed batches


class DamageLogs:
    """The `DamageLog` of each stage, and `run/damaged.jsonl`, a row for all that was passed over.

    They are registered for checkpointing: a run that stopped goes on counting, and has each row once.
    """

    def __init__(self, stages: Sequence[Stage], accelerator: Accelerator, run: Path) -> None:
        self.logs, self.accelerator = [DamageLog(stage.dataset) for stage in stages], accelerator
        self.path = run / "damaged.jsonl" if accelerator.is_main_process else None

    def share(self, number: int) -> None:
        """Of a stage, see `DamageLog.share`; what is new is printed. All processes call it, before they save too."""
        log = self.logs[number]
        if met := log.share(gather_object, self.path):
            self.accelerator.print(f"data: passed over {count_reasons(met)}, {len(log.found)} in all: {met[0]}")

    def rewind(self) -> None:
        """Takes damaged.jsonl back to what is known: the rows after it will be written again."""
        found = [damage for log in self.logs for damage in log.found.values()]
        if self.path is not None and (found or self.path.exists()):
            write_durably(self.path, "".join(json.dumps(damage._asdict()) + "\n" for damage in found))

    def state_dict(self) -> dict[str, Any]:
        return {"found": [[list(damage) for damage in log.found.values()] for log in self.logs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for log, rows in zip(self.logs, state["found"], strict=True):
            log.found = {damage[:2]: damage for damage in (Damage(*row) for row in rows)}


def fit(
    accelerator: Accelerator,
    config: LoopConfig,
    stages: Sequence[Stage],
    model: torch.nn.Module,
    compute_losses: Callable[[torch.nn.Module, dict[str, Any], int], dict[str, Tensor]],
    after_backward: Callable[[int], dict[str, Tensor]] = lambda samples: {},
    after_step: Callable[[AveragedWeights, int, int], float | None] = lambda averaged, step, samples: None,
    tokens: Callable[[tuple[int, int, int]], int] | None = None,
) -> AveragedWeights:
    """Trains `model` to `config.samples` clips, from the newest checkpoint of the run if there is one.

    Args:
        stages: one after the other, the last of which ends with the run. The learning rate's schedule is one over the whole
            run; of a stage it takes the height.
        model: the plain module; it ends with the last weights.
        compute_losses: from the model as Accelerate wrapped it, a batch of clips, and the clips seen before this
            optimizer step, to named scalars; `loss` is minimised, the others are logged beside it.
        after_backward: told the same count after each backward pass and step of `model`: the turn of a second player,
            with an optimizer of its own. Returns more scalars to log.
        after_step: told the averaged weights, the optimizer steps done and the clips seen, after every step. Returns the
            score of a validation, lower is better, or None without one; the best so far is worth a checkpoint.
        tokens: how many a clip of (frames, height, width) is to the model, if it has tokens.

    Returns:
        The averaged weights of the trainable parameters of `model`.
    """
    run = Path(config.run)
    accelerator.print(describe_optimizer(model, config.optimizer))
    half = accelerator.mixed_precision == "bf16"
    made = make_optimizer(model, config.optimizer, accelerator.distributed_type, half)
    wrapped, optimizer = accelerator.prepare(model, made)
    averaged = AveragedWeights(model, config.optimizer.average, config.optimizer.ema_decay)
    averaged.register(accelerator)
    log, finite = LossLog(accelerator), FiniteSteps(optimizer, config.optimizer.max_nonfinite)
    damage = DamageLogs(stages, accelerator, run)
    accelerator.register_for_checkpointing(log, finite, damage)
    share_weights(accelerator)
    accelerator.init_trackers("stgen", {key: str(value) for key, value in flatten_config(config).items()})
    speed = Throughput(accelerator, model, config.peak_flops, tokens)

    progress = resume(accelerator, run)
    damage.rewind()
    if accelerator.is_main_process:
        rewind_snapshots(run, progress.samples)
    measured = measure_of(config)
    step, samples, best = progress.step, progress.samples, best_score(run, progress.step, measured)
    rank, ranks, entered = accelerator.process_index, accelerator.num_processes, None
    bar = progress_bar(config.samples, samples, accelerator.is_main_process, run.name)
    stop = StopRequests(accelerator)
    while samples < config.samples:
        speed.start()
        number = stage_at(stages, samples)
        stage, now = stages[number], stages[number].config
        if number != entered:
            if entered is not None:
                damage.share(entered)
            entered, position, global_batch = number, samples - stage.begin, now.batch_size * ranks * now.accumulate
            check_global_batch(position, global_batch)
            set_batch(accelerator, now.batch_size, now.accumulate)
            batches = clip_loader(stage.dataset, position, now.batch_size, now.data.workers, rank, ranks)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(now.optimizer, samples, config.samples)
        for _ in range(now.accumulate):
            with accelerator.accumulate(wrapped):
                batch = next(batches)
                speed.see(batch)
                damage.logs[number].add(batch["damaged"])
                losses = compute_losses(wrapped, batch, samples)
                accelerator.backward(all_or_nothing(losses["loss"]))
                if accelerator.sync_gradients:
                    for parameter in stage.frozen:
                        parameter.grad = None
                    norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.optimizer.max_grad_norm)
                    taken = finite.take(norm, step + 1, samples, global_batch)
                optimizer.zero_grad()
                log.add(losses | after_backward(samples))
        step, samples = step + 1, samples + global_batch
        averaged.update(step, samples, global_batch, taken)
        if averaged.is_due(samples, global_batch, config.optimizer.snapshot_every, config.samples):
            averaged.snapshot(run, samples)
        bar.update(global_batch)
        if step % config.log_every == 0 or samples >= config.samples:
            damage.share(number)
            values = log.take() | {"nonfinite": finite.count()} | speed.take()
            place = {"samples": samples, "stage": number} if len(stages) > 1 else {"samples": samples}
            accelerator.log(
                {**values, **damage.logs[number].metrics(), **place, "lr": optimizer.param_groups[0]["lr"]}, step
            )
            shown = {**values, "stage": number} if len(stages) > 1 else values
            show_row(bar, shown)
        speed.stop()
        score = after_step(averaged, step, samples)
        if score is not None and not math.isfinite(score):
            score = None  # it compares with none, and is a null in metrics.jsonl already
        better, stopping = score is not None and score < best, stop.any()
        if step % config.checkpoint_every == 0 or samples >= config.samples or better or stopping:
            damage.share(number)
            save_checkpoint(accelerator, run, step, samples, config.keep_checkpoints, score, measured)
            best = min(best, score) if score is not None else best
        if stopping and samples < config.samples:
            accelerator.print(f"\nasked to stop: {run} is saved after {samples} clips, the same command goes on")
            end_training(accelerator)
            sys.exit(PREEMPTED)
    stop.close()
    bar.close()
    return averaged
