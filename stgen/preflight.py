"""What of a run can be said without running it: its configuration, launch and clips, and all for which they are refused.

The rules are the trainers': most are asked of the very code that refuses. Here they are all looked at, and one refusal does not
hide the next.
"""

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.utils import DistributedType
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer
from transformers.utils import cached_file

from stgen.checkpoint import check_global_batch, checkpoints, fault, read_progress
from stgen.config import load_config, require
from stgen.data.reading import Bucket, ClipDataset, bucket_of_block
from stgen.data.shards import Damage, missing_parts, open_index
from stgen.data.sources import LocalFolder, open_source
from stgen.finetuning import names_to_train
from stgen.loop import LoopConfig
from stgen.models.discriminator import PatchDiscriminator3d
from stgen.models.latents import VideoVAE
from stgen.text import text_encoder_folder
from stgen.tracking import make_trackers
from stgen.train import TrainConfig, open_stage
from stgen.train_vae import TrainVAEConfig

TRAINERS: dict[str, type[LoopConfig]] = {"train": TrainConfig, "train_vae": TrainVAEConfig}


def refused(problems: list[str], work: Callable[[], Any]) -> Any:
    """What the work gives; None if it is refused, which goes to the problems."""
    try:
        return work()
    except (ValueError, OSError) as error:
        problems.append(" ".join(str(error).split()))
        return None


# --- Configuration ------------------------------------------------------------------------------------------------


def read_settings(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What the file and the overrides say, not yet held against any schema.

    Raises:
        ValueError: no such file, or it is no YAML mapping.
    """
    require(Path(path).is_file(), "config", path, "a YAML file")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"config: {path}: {' '.join(str(error).split())}") from error
    return OmegaConf.to_container(merged)  # type: ignore[return-value]


def find_trainer(settings: dict[str, Any]) -> str:
    """Whose configuration it is: that of the trainer which knows more of its keys."""
    unknown = {
        name: len(settings.keys() - {f.name for f in dataclasses.fields(schema)}) for name, schema in TRAINERS.items()
    }
    if unknown["train"] == unknown["train_vae"]:
        return "train" if "vae" in settings else "train_vae"
    return min(unknown, key=unknown.__getitem__)


def read_config(trainer: str, path: str, overrides: Sequence[str]) -> tuple[LoopConfig | None, list[str]]:
    """The configuration, or all that is wrong with it: what the trainer's loader would refuse, key by key."""
    schema = TRAINERS[trainer]
    try:
        return load_config(schema, path, overrides), []
    except ValueError as error:
        first = str(error)
    settings = read_settings(path, overrides)
    # Each key by itself, upon those that were fine; what needs another key comes to its turn again after it.
    needed = {f.name: "." for f in dataclasses.fields(schema) if f.default == "???"}
    accepted: dict[str, Any] = {**needed, "data": {"path": "."}}
    given = OmegaConf.create(settings)
    keys = (*needed, "data.path")
    missing = [f"config: {key} is missing" for key in keys if OmegaConf.select(given, key) is None]
    waiting = _single_settings(settings)
    while True:
        refused = {}
        for key, value in waiting.items():
            try:
                trial = OmegaConf.merge(accepted, OmegaConf.create(value))
                OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), trial))
                accepted = OmegaConf.to_container(trial)  # type: ignore[assignment]
            except (ValueError, TypeError, OmegaConfBaseException) as error:
                refused[key] = f"config: {str(error).splitlines()[0]} (key {key})"
        if not refused or len(refused) == len(waiting):
            return None, missing + list(refused.values()) or [first]
        waiting = {key: waiting[key] for key in refused}


def _single_settings(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of one key each; those of a section have its other keys left out."""
    single = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            for name, inner in value.items():
                single[f"{key}.{name}"] = {key: {name: inner}}
        else:
            single[key] = {key: value}
    return single


# --- Launch -------------------------------------------------------------------------------------------------------


def distributed_type(strategy: str) -> DistributedType:
    """What Accelerate calls one of `stgen.footprint.STRATEGIES`."""
    if strategy.startswith("zero"):
        return DistributedType.DEEPSPEED
    return DistributedType.FSDP if strategy == "fsdp" else DistributedType.NO


def version(package: str) -> str | None:
    """Of an installed package; None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def launch_problems(strategy: str, precision: str, config: LoopConfig | None, device: torch.device) -> list[str]:
    """What `make_accelerator`, Accelerate under it, and `make_optimizer` would refuse of it."""
    problems = []
    split = strategy.startswith("zero")
    if split and importlib.util.find_spec("deepspeed") is None:
        problems.append(f"strategy {strategy} needs DeepSpeed: pip install 'stgen[deepspeed]'")
    if strategy == "fsdp" and device.type == "cpu":
        problems.append("strategy fsdp: on a CPU Accelerate trains unsynchronised without an error; use ddp or zero1-3")
    if precision == "fp16" and split:
        problems.append("mixed_precision is 'fp16', allowed: bf16 or no under DeepSpeed")
    elif precision == "fp16" and device.type == "cpu":
        problems.append("precision fp16 needs a GPU; use bf16 or no")
    if config is None:
        return problems
    refused(problems, partial(make_trackers, config.trackers, Path(config.run)))
    name = config.optimizer.name
    if (split or strategy == "fsdp") and name != "adamw":
        problems.append(f"optimizer.name is {name!r}, allowed: adamw under {distributed_type(strategy).value}")
    if isinstance(config, TrainVAEConfig):
        if config.discriminator and precision == "fp16":
            problems.append("precision fp16: the discriminator's loss is not scaled; use bf16 or no")
        if config.validation and importlib.util.find_spec("skimage") is None:
            problems.append("validation needs scikit-image: pip install 'stgen[eval]'")
    return problems


def samples_done(config: LoopConfig, strategy: str, precision: str, problems: list[str]) -> int:
    """Clips that the run in the folder has seen, by its newest whole checkpoint; 0 without one."""
    found = checkpoints(Path(config.run))
    whole = [folder for folder in found if fault(folder, None) is None]
    if not whole:
        if found:
            problems.append(f"run is {config.run!r}, allowed: one with a whole checkpoint, or with none")
        return 0
    progress = read_progress(whole[-1])
    now = {"strategy": "replicated" if strategy == "ddp" else strategy, "precision": precision}
    for name, value in now.items():
        allowed = f"{getattr(progress, name)!r}, with which {whole[-1]} was written"
        refused(problems, partial(require, value == getattr(progress, name), name, value, allowed))
    return progress.samples


# --- Clips --------------------------------------------------------------------------------------------------------


@dataclass
class ShapeRow:
    """Clips of one shape in one stage."""

    num_frames: int
    height: int
    width: int
    clips: int
    keep: float
    """Share of them that an epoch sees; 0 where no bucket takes them."""
    share: float
    """Of the clips of an epoch."""
    batches: float
    """Forwards of one process in an epoch, all processes together."""
    tokens: int = 0
    """Of one clip, in the transformer."""
    read_seconds: float = 0.0
    """Time in which one was read."""
    step_seconds: float | None = None
    """Estimated time of an optimizer step of this shape."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_frames, self.height, self.width


def count_shapes(config: LoopConfig) -> tuple[list[ShapeRow], list[str]]:
    """How many clips there are of each shape, and every shape that is a reason not to start.

    The reasons are those of `ClipDataset`, which names the first alone.
    """
    data = config.data
    rows = open_index(open_source(data.index or data.path))
    shapes, first, counts = np.unique(rows.shapes, axis=0, return_index=True, return_counts=True)
    found = {tuple(map(int, s)): (int(n), int(i)) for s, i, n in zip(shapes, first, counts, strict=True)}
    buckets = data.buckets or [Bucket(data.num_frames, data.height, data.width)]
    seen = sum(found[b.shape][0] * b.keep for b in buckets if b.shape in found)
    table, problems = [], []
    for bucket in sorted(buckets, key=lambda b: math.prod(b.shape)):
        clips, _ = found.pop(bucket.shape, (0, 0))
        kept = clips * bucket.keep
        table.append(
            ShapeRow(*bucket.shape, clips, bucket.keep, kept / seen if seen else 0.0, kept / config.batch_size)
        )
        if clips == 0:
            problems.append(f"data.buckets: no clip of {data.path} is {bucket.shape} (num_frames, height, width)")
    for shape, (clips, i) in sorted(found.items()):
        frames, height, width = shape
        table.append(ShapeRow(frames, height, width, clips, 0.0, 0.0, 0.0))
        problems.append(
            f"data {data.path}: {clips} clips of {shape} (num_frames, height, width) fit no bucket, the first is "
            f"{rows[i]['key']}; add a bucket of this shape, or cut them anew with `stgen data shard`"
        )
    return table, problems


@dataclass
class StagePlan:
    """A stage of a run; a run without stages is one."""

    begin: int
    """Clips that the run sees before it."""
    samples: int
    """Where it ends."""
    global_batch: int
    """Clips of an optimizer step."""
    steps: int
    """Optimizer steps still to do."""
    shapes: list[ShapeRow] = field(default_factory=list)
    steps_per_epoch: float = 0.0
    damaged: dict[str, int] = field(default_factory=dict)
    """Clips that are known to be damaged and passed over, by reason."""
    stored: list[str] = field(default_factory=list)
    """Of `latents` and `text states`, those that lie with the clips and are not encoded."""
    step_seconds: float | None = None
    """Of the average optimizer step."""


@dataclass
class OpenedStage:
    """What was found in a stage's data."""

    dataset: ClipDataset | None = None
    """None if it is refused."""
    captions: list[str] = field(default_factory=list)
    """Those whose text states are not stored."""
    longest: int = 0
    """Tokens of the longest stored text states that were looked at."""


def plan_stage(
    config: LoopConfig, begin: int, done: int, processes: int, last: bool, name: str, problems: list[str]
) -> StagePlan:
    """Lengths, batches and shapes of a stage of which the run has `done` clips behind it; its refusals go to the problems."""
    together = config.batch_size * processes
    global_batch = together * config.accumulate
    left = config.samples - max(begin, done)
    stage = StagePlan(begin, config.samples, global_batch, max(0, -(-left // global_batch)))
    if not last:
        length, allowed = config.samples - begin, f"a multiple of the {global_batch} clips of its optimizer steps"
        refused(problems, partial(require, length % global_batch == 0, f"{name}.samples", length, allowed))
    if begin <= done and (last or done < config.samples):
        refused(problems, partial(check_global_batch, done - begin, global_batch))
    if config.data.buckets and len(config.data.buckets) > 1:
        block = config.data.block or 1
        allowed = f"a divisor of data.block={block}"
        refused(problems, partial(require, block % config.batch_size == 0, "batch_size", config.batch_size, allowed))
    counted = refused(problems, partial(count_shapes, config))
    if counted is not None:
        stage.shapes, found = counted
        problems += found
        stage.steps_per_epoch = sum(row.clips * row.keep for row in stage.shapes) / global_batch
    return stage


def open_data(stage: StagePlan, config: LoopConfig, vae: VideoVAE | None, problems: list[str]) -> OpenedStage:
    """Opens the clips of a stage as its trainer does, and reads one of each shape in its place of the order.

    Args:
        vae: of the transformer's training; without one, stored latents are not looked at.
    """
    fits = stage.shapes and all(row.clips and row.keep for row in stage.shapes)
    if not fits or (isinstance(config, TrainConfig) and config.use_encoded and vae is None):
        return OpenedStage()
    if isinstance(config, TrainConfig) and vae is not None:
        pair = refused(problems, partial(open_stage, config, vae, True))
    else:
        dataset = refused(problems, partial(ClipDataset, config.data, config.seed))
        pair = None if dataset is None else (dataset, dataset.captions())
    if pair is None:
        return OpenedStage()
    opened = OpenedStage(*pair)
    dataset = pair[0]
    if dataset.stored is not None:
        stage.stored = ["latents"] if dataset.stored.text_dim is None else ["latents", "text states"]
    damaged: dict[tuple[str, str], Damage] = {}
    if isinstance(dataset.source, LocalFolder):
        for i, reason in missing_parts(dataset.source, dataset.rows).items():
            row = dataset.rows[i]
            damaged[row["shard"], row["key"]] = Damage(row["shard"], row["key"], reason)
    unread = {row.shape: row for row in stage.shapes}
    weights, shapes = dataset.order.weights, dataset.config.shapes
    for block in itertools.count():
        row = unread.pop(shapes[bucket_of_block(block, weights)[0]], None)
        if row is not None:
            begin = time.perf_counter()
            sample = refused(problems, partial(dataset.__getitem__, block * dataset.order.block))
            row.read_seconds = time.perf_counter() - begin
            if sample is not None:
                damaged |= {damage[:2]: damage for damage in sample["damaged"]}
                opened.longest = max(opened.longest, len(sample.get("text", ())))
        if not unread:
            break
    refused(problems, partial(dataset.check_damage, damaged.values()))
    stage.damaged = {}
    for damage in damaged.values():
        kind = damage.reason.partition(":")[0]
        stage.damaged[kind] = stage.damaged.get(kind, 0) + 1
    return opened


def held_out_captions(config: LoopConfig, last: LoopConfig, problems: list[str]) -> list[str]:
    """The captions of the validation's clips, of a training of the transformer."""
    if isinstance(config, TrainConfig) and config.validation:
        held_out = refused(problems, partial(config.validation.open, last.data))
        return held_out.captions() if held_out is not None else []
    if isinstance(config, TrainVAEConfig) and config.validation:
        data = dataclasses.replace(config.data, path=config.validation.path)
        held_out = refused(problems, partial(ClipDataset, data, shuffle=False))
        if held_out is not None:
            clips, allowed = config.validation.clips, f"at most {len(held_out)}, those of {config.validation.path}"
            refused(problems, partial(require, clips <= len(held_out), "validation.clips", clips, allowed))
    return []


def check_vae_clips(config: TrainVAEConfig, shapes: Sequence[ShapeRow], problems: list[str]) -> None:
    """Whether the clips are long enough for the window and wide enough for the discriminator."""
    for frames in sorted({row.num_frames for row in shapes if row.keep}):
        refused(problems, partial(config.window_of, frames))
    if config.discriminator and shapes:
        least = PatchDiscriminator3d(channels=8, layers=config.discriminator.layers).smallest
        side = min(min(row.height, row.width) for row in shapes)
        allowed = f"{least} pixels or more with discriminator.layers={config.discriminator.layers}"
        refused(problems, partial(require, side >= least, "smallest side of a clip", side, allowed))


def check_frozen(configs: Sequence[TrainConfig], model: torch.nn.Module, problems: list[str]) -> None:
    """Whether all stages train the same parameters, which DeepSpeed asks for (`stgen.loop.check_stages`)."""
    trained = [names_to_train(model, config.frozen, config.trainable) for config in configs]
    for i, names in enumerate(trained):
        left_out = set().union(*trained) - names
        allowed = "the same in all stages under DeepSpeed, whose flat gradients leave none out"
        refused(
            problems, partial(require, not left_out, f"stages[{i}].frozen", f"{len(left_out)} more parameters", allowed)
        )


# --- Captions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """What is known of the text encoder without loading it."""

    dim: int
    """Width of its states."""
    parameters: int
    longest: int
    """Tokens of the longest caption looked at."""
    states: int
    """Bytes of the states of all captions that are encoded before training."""


def text_encoder(config: TrainConfig, captions: Sequence[str], looked_at: int = 2000) -> Text:
    """Width and size from the encoder's configuration, lengths from its tokenizer on some of the captions.

    Raises:
        ValueError: there is no such encoder, or it has no safetensors.
    """
    try:
        folder = text_encoder_folder(config.text_encoder)
        settings = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            encoder = AutoModelForTextEncoding.from_config(settings)
        names = ("model.safetensors", "model.safetensors.index.json")
        found = [cached_file(folder, name, _raise_exceptions_for_missing_entries=False) for name in names]
        require(any(found), "its files", [], "model.safetensors")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        name, reason = config.text_encoder, str(error).splitlines()[0]
        raise ValueError(f"text_encoder is {name!r}, allowed: a text encoder in safetensors: {reason}") from error
    distinct = sorted({"", *captions})
    some = distinct[:: max(1, len(distinct) // looked_at)]
    lengths = [min(len(ids), config.max_text_length) for ids in tokenizer(some).input_ids]
    dim = settings.hidden_size if hasattr(settings, "hidden_size") else settings.d_model
    parameters = sum(p.numel() for p in encoder.parameters())
    return Text(dim, parameters, max(lengths), round(4 * dim * statistics.mean(lengths) * len(distinct)))
