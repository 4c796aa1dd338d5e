"""The training loop of both trainers: resume, step, average, log, save."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from torch import Tensor

from stgen.checkpoint import check_global_batch, checkpoints, resume, save_checkpoint
from stgen.config import flatten_config, require, save_config
from stgen.data.reading import ClipDataset, DamageLog, DataConfig, clip_loader
from stgen.data.shards import count_reasons
from stgen.optimization import OptimizerConfig, learning_rate, make_optimizer
from stgen.tracking import progress_bar


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
    """Checkpoints kept."""
    log_every: int = 20
    """Optimizer steps between rows of metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "accumulate", "checkpoint_every", "keep_checkpoints", "log_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


MAY_CHANGE = (
    *("run", "samples", "batch_size", "accumulate", "checkpoint_every", "keep_checkpoints", "log_every"),
    *("data.path", "data.index", "data.cache", "data.cache_gib", "data.max_damaged", "data.workers"),
    *("gradient_checkpointing", "statistics_clips", "use_encoded"),
    *("validation", "validation.path", "validation.clips", "validation.every", "validation.network"),
)
"""What a resumed run may be told anew. All else makes another run of it, whose checkpoints would not say so."""


def begin_run(config: LoopConfig) -> None:
    """Makes the run folder and writes its config.yaml.

    Raises:
        ValueError: the folder has checkpoints of a run that was configured otherwise.
    """
    run = Path(config.run)
    if checkpoints(run):
        before, now = flatten_config(run / "config.yaml"), flatten_config(config)
        for key in sorted(before.keys() | now.keys()):
            if key.split("[")[0] not in MAY_CHANGE:
                changed = f"{before.get(key)!r}, with which {run} was begun; another run folder takes another value"
                require(before.get(key) == now.get(key), key, now.get(key), changed)
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / "config.yaml")


def fit(
    accelerator: Accelerator,
    config: LoopConfig,
    dataset: ClipDataset,
    model: torch.nn.Module,
    compute_losses: Callable[[torch.nn.Module, dict[str, Any], int], dict[str, Tensor]],
    after_backward: Callable[[int], dict[str, Tensor]] = lambda samples: {},
    after_step: Callable[[EMAModel, int, int], None] = lambda ema, step, samples: None,
) -> EMAModel:
    """Trains `model` to `config.samples` clips, from the newest checkpoint of the run if there is one.

    Args:
        model: the plain module; it ends with the last weights.
        compute_losses: from the model as Accelerate wrapped it, a batch of clips, and the clips seen before this
            optimizer step, to named scalars; `loss` is minimised, the others are logged beside it.
        after_backward: told the same count after each backward pass and step of `model`: the turn of a second player,
            with an optimizer of its own. Returns more scalars to log.
        after_step: told the averaged weights, the optimizer steps done and the clips seen, after every step.

    Returns:
        The averaged weights of the trainable and frozen parameters of `model`.
    """
    run = Path(config.run)
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, config.optimizer))
    ema = EMAModel(model.parameters(), decay=config.optimizer.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    accelerator.init_trackers("stgen")

    step, samples = resume(accelerator, run)
    global_batch = config.batch_size * accelerator.num_processes * config.accumulate
    check_global_batch(samples, global_batch)
    batches = clip_loader(
        dataset, samples, config.batch_size, config.data.workers, accelerator.process_index, accelerator.num_processes
    )
    damage = DamageLog(dataset)
    bar = progress_bar(config.samples, samples, accelerator.is_main_process, run.name)
    logged: list[dict[str, Tensor]] = []
    while samples < config.samples:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, samples, config.samples)
        for _ in range(config.accumulate):
            with accelerator.accumulate(wrapped):
                batch = next(batches)
                damage.add(batch["damaged"])
                losses = compute_losses(wrapped, batch, samples)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), config.optimizer.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                losses |= after_backward(samples)
                logged.append({name: value.detach() for name, value in losses.items()})
        ema.step(model.parameters())
        step, samples = step + 1, samples + global_batch
        bar.update(global_batch)
        if step % config.log_every == 0 or samples >= config.samples:
            # A loss may set in during a run; the newest row has them all.
            means = {name: torch.stack([row[name] for row in logged if name in row]).mean() for name in logged[-1]}
            values = {name: value.item() for name, value in accelerator.reduce(means, "mean").items()}
            if met := damage.share(gather_object, run / "damaged.jsonl" if accelerator.is_main_process else None):
                accelerator.print(f"data: passed over {count_reasons(met)}, {len(damage.found)} in all: {met[0]}")
            accelerator.log(
                {**values, **damage.metrics(), "samples": samples, "lr": optimizer.param_groups[0]["lr"]}, step
            )
            bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
            logged = []
        after_step(ema, step, samples)
        if step % config.checkpoint_every == 0 or samples >= config.samples:
            save_checkpoint(accelerator, run, step, samples, config.keep_checkpoints)
    bar.close()
    return ema
