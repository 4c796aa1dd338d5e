"""`stgen plan`: what a training run will take and whether it would start, before it is begun.

Everything that both trainers refuse is looked for and all of it listed (`stgen.preflight`), clips are counted by shape, a step
of each stage is run on fake tensors for its memory and FLOPs, and one real step, as large as the time allowed, for its speed
(`stgen.rehearsal`). Nothing is written.
"""

import dataclasses
import inspect
import math
import shutil
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.attention import SDPBackend

from stgen.config import require
from stgen.finetuning import begin_with
from stgen.footprint import STRATEGIES, StepFootprint, rank_memory
from stgen.loop import LoopConfig, check_run
from stgen.models.attention import probe_backend
from stgen.models.latents import VideoVAE, latent_shape, load_vae
from stgen.models.perceptual import PerceptualDistance
from stgen.models.transformer import STGenTransformer3DModel
from stgen.optimization import make_optimizer
from stgen.plan_report import PACKAGES, Plan, in_bytes
from stgen.preflight import (
    TRAINERS,
    OpenedStage,
    ShapeRow,
    StagePlan,
    check_frozen,
    check_vae_clips,
    find_trainer,
    held_out_captions,
    launch_problems,
    open_data,
    plan_stage,
    read_config,
    read_settings,
    refused,
    samples_done,
    text_encoder,
    version,
)
from stgen.rehearsal import (
    Probe,
    Work,
    available_memory,
    build_transformer,
    count,
    encoding_of,
    fake_step,
    matrix_rate,
    probe_candidates,
    real_step,
    seconds,
    states_of,
    transformer_work,
    vae_work,
    weight_bytes,
)
from stgen.train import TrainConfig, make_model, resolve_stages
from stgen.train_vae import TrainVAEConfig, make_vae
from stgen.vae_objective import Adversary, VAEObjective

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
    plan.problems += launch_problems(strategy, precision, config, device)
    if config is None:
        return plan
    plan.run, plan.samples = config.run, config.samples
    configs: Sequence[LoopConfig] | None = [config]
    if isinstance(config, TrainConfig):
        config = refused(plan.problems, config.with_architecture) or config
        configs = refused(plan.problems, partial(resolve_stages, config))
    refused(plan.problems, partial(check_run, config))
    plan.samples_done = samples_done(config, strategy, precision, plan.problems)
    if configs is not None:
        accelerator = Accelerator(cpu=device.type == "cpu")
        vae = None
        if isinstance(config, TrainConfig):
            vae = refused(plan.problems, lambda: load_vae(config.vae).requires_grad_(False).to(device))
        data = plan_data(plan, config, configs, vae)
        models = open_models(plan, config, configs, data, vae, accelerator)
        if models is not None:
            plan_step(plan, models, configs, accelerator, probe_seconds)
    plan_disk(plan, config)
    plan.problems = list(dict.fromkeys(plan.problems))  # stages may share a reason
    return plan


def describe(device: torch.device) -> str:
    """The device, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


# --- Clips --------------------------------------------------------------------------------------------------------


@dataclass
class OpenedData:
    """What the models have to do with the clips."""

    stages: list[OpenedStage]
    captions: list[str]
    """Those that are encoded before training, validation's among them."""


def plan_data(plan: Plan, config: LoopConfig, configs: Sequence[LoopConfig], vae: VideoVAE | None) -> OpenedData:
    """Stages, shapes, steps, and whether the clips can be read; `vae` is that of a transformer's training."""
    opened = []
    for i, stage in enumerate(configs):
        begin = plan.stages[-1].samples if plan.stages else 0
        last, name = stage is configs[-1], f"stages[{i}]"
        plan.stages.append(plan_stage(stage, begin, plan.samples_done, plan.processes, last, name, plan.problems))
        opened.append(open_data(plan.stages[-1], stage, vae, plan.problems))
        if stage.data.buckets and len(stage.data.buckets) > 1:
            block, together = stage.data.block or 1, stage.batch_size * plan.processes
            if block % together:
                plan.notes.append(
                    f"data.block={block} is no multiple of {together}, batch_size times processes: in some steps "
                    "processes have clips of different shapes, and wait for the largest"
                )
    plan.steps = sum(stage.steps for stage in plan.stages)
    if isinstance(config, TrainVAEConfig):
        check_vae_clips(config, plan.stages[0].shapes, plan.problems)
    held_out = held_out_captions(config, configs[-1], plan.problems)
    return OpenedData(opened, [*held_out, *(caption for stage in opened for caption in stage.captions)])


# --- Models -------------------------------------------------------------------------------------------------------


@dataclass
class Models:
    """The models of a run, opened or described, and how to make its work anew."""

    make: Callable[[int, int, Callable[[Any], Any] | None], Work]
    """From the number of a stage, how many blocks the model has (0: its own), and what makes the models fake, or None."""
    frozen: int
    """Bytes of what a process holds beside the model; a discriminator with its gradients and optimizer states."""
    exported: int
    """Bytes that the export has besides the trained model."""
    layers: int
    """Blocks that a smaller model may have less of; 0 for none."""


def open_models(
    plan: Plan,
    config: LoopConfig,
    configs: Sequence[LoopConfig],
    data: OpenedData,
    vae: VideoVAE | None,
    accelerator: Accelerator,
) -> Models | None:
    """None if one cannot be opened; the reasons go to the problems."""
    if isinstance(config, TrainVAEConfig):
        return open_objective(plan, config, accelerator)
    assert isinstance(config, TrainConfig)
    stages = [stage for stage in configs if isinstance(stage, TrainConfig)]
    text, device = refused(plan.problems, partial(text_encoder, config, data.captions)), accelerator.device
    if text is None or vae is None:
        return None
    encoded = any("text states" not in stage.stored for stage in plan.stages) or bool(data.captions)
    plan.parameters["VAE, frozen"] = count(vae)
    if encoded:
        plan.parameters["text encoder, before training"] = text.parameters
        plan.notes.append(
            "captions are encoded before training, by the first process on its CPU: the text encoder takes "
            f"{in_bytes(4 * text.parameters)} then, the states of all captions {in_bytes(text.states)} of each process's "
            "host memory ever after"
        )
    elif config.lora is None:
        plan.parameters["text encoder, exported"] = text.parameters
    if config.init is not None:
        folder = config.init
        refused(plan.problems, lambda: begin_with(make_model(stages[-1], vae, text.dim, 10.0), folder))
    encodings = []
    for i, (stage, opened) in enumerate(zip(stages, data.stages, strict=True)):
        encoding = encoding_of(stage, vae, opened.dataset.stored if opened.dataset else None)
        encodings.append(encoding)
        if not encoding.clip:
            name = f"stages[{i}]: " if len(stages) > 1 else ""
            what = "some masked clips are" if encoding.masked else "nothing is"
            plan.notes.append(
                f"{name}{' and '.join(plan.stages[i].stored)} lie with the clips: in a step {what} encoded by the VAE"
            )
    longest = max(text.longest, *(opened.longest for opened in data.stages))

    def make(i: int, layers: int, faked: Callable[[Any], Any] | None) -> Work:
        stage = stages[i]
        if layers:
            stage = dataclasses.replace(stage, model={**stage.model, "num_layers": layers})
        if faked is None:
            net = build_transformer(config, stage, vae, text.dim, device)
        else:
            with unset_fake_temporarily():
                net = build_transformer(config, stage, vae, text.dim, torch.device("meta"))
            net = faked(net)
        beside = vae if faked is None else faked(vae)
        return transformer_work(net, stage, beside, (longest, text.dim), encodings[i], device)

    if plan.strategy.startswith("zero") and config.lora is None and len(stages) > 1:
        with torch.device("meta"):
            net = refused(plan.problems, lambda: make_model(stages[-1], vae, text.dim, 10.0))
        if net is not None:
            refused(plan.problems, lambda: check_frozen(stages, net, plan.problems))
    default = inspect.signature(STGenTransformer3DModel).parameters["num_layers"].default
    # Patterns of parameters may name blocks that a smaller model has not.
    patterns = any(stage.frozen or stage.trainable for stage in stages)
    layers = 0 if patterns else config.model.get("num_layers", default)
    # On a CPU the states of the captions lie in the very memory that is counted.
    frozen = weight_bytes(vae) + (text.states if device.type == "cpu" else 0)
    exported = 0 if config.lora is not None else weight_bytes(vae) + 4 * text.parameters
    return Models(make, frozen, exported, layers)


def open_objective(plan: Plan, config: TrainVAEConfig, accelerator: Accelerator) -> Models | None:
    """Those of a VAE's training."""
    device, distance = accelerator.device, None
    if config.perceptual is not None:
        distance = refused(plan.problems, partial(PerceptualDistance, config.perceptual.network, device))
    if config.validation is not None:
        refused(plan.problems, partial(PerceptualDistance, config.validation.network, device))
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

    def make(i: int, layers: int, faked: Callable[[Any], Any] | None) -> Work:
        faked = faked or (lambda module: module)
        adversary = copy(rival)
        if adversary is not None and config.discriminator is not None:
            adversary.net = faked(adversary.net)
            adversary.optimizer = make_optimizer(adversary.net, config.discriminator.optimizer)
        return vae_work(config, faked(vae), faked(distance), adversary, device)

    return Models(make, frozen, 0, 0)


# --- A step -------------------------------------------------------------------------------------------------------


def plan_step(
    plan: Plan, models: Models, configs: Sequence[LoopConfig], accelerator: Accelerator, probe_seconds: float
) -> None:
    """Parameters, memory, FLOPs, attention, disk, speed."""
    device, dtype, config = accelerator.device, PRECISIONS[plan.precision], configs[-1]
    footprints: list[StepFootprint] = []
    work: Work | None = None
    optimizer = 0
    for i, stage in enumerate(configs):
        make = lambda faked, i=i: models.make(i, 0, faked)  # noqa: E731
        asked = config.optimizer if stage is config else None  # its states are the same in all stages
        shape = usable(plan.stages[i], stage)[-1].shape
        made = refused(plan.problems, partial(fake_step, make, stage.batch_size, shape, dtype, device, asked))
        if made is None:
            return
        work, footprint, optimizer = made
        footprints.append(footprint)
    assert work is not None
    states = states_of(work.model, optimizer, config.optimizer.average)
    trained: Any = work.model.vae if isinstance(work.model, VAEObjective) else work.model
    plan.parameters = parameters_of(trained) | plan.parameters
    plan.flops_per_step = max(f.flops * c.accumulate for f, c in zip(footprints, configs, strict=True))
    for strategy in STRATEGIES:
        if strategy != "ddp" and config.optimizer.name != "adamw":
            continue
        if strategy.startswith("zero") and plan.precision == "fp16":
            continue
        found = [
            rank_memory(strategy, plan.processes, states, footprint, models.frozen, touched_only=device.type == "cpu")
            for footprint in footprints
        ]
        plan.memory[strategy] = max(found, key=lambda memory: memory.total)
    plan.memory_available = available_memory(device)
    if device.type == "cuda":
        plan.notes.append("not counted: the CUDA context, NCCL's buffers and what the allocator cannot use")
    chosen = plan.memory.get(plan.strategy)
    if chosen is not None and chosen.total > plan.memory_available:
        plan.problems.append(
            f"memory: a process takes {in_bytes(chosen.total)} under {plan.strategy}, the device has "
            f"{in_bytes(plan.memory_available)}"
        )
    elif chosen is not None and device.type == "cpu" and chosen.total * plan.processes > plan.memory_available:
        plan.notes.append(
            f"{plan.processes} processes of {in_bytes(chosen.total)} need more than one machine like this"
        )
    if isinstance(work.model, STGenTransformer3DModel):
        plan.attention = describe_attention(plan, work.model, device)
        pt, ph, pw = work.model.config.patch_size
        for row in (row for stage in plan.stages for row in stage.shapes if row.keep):
            _, t, h, w = latent_shape(work.beside[0], *row.shape)
            row.tokens = -(-t // pt) * -(-h // ph) * -(-w // pw)
    else:
        plan.attention = "PyTorch's, in the middle of the VAE" if trained.config.mid_attention else "none in this VAE"

    # Checkpoints hold what belongs to the weights, whole; DeepSpeed's float32 copies too.
    copies = 4 * states.elements if plan.strategy.startswith("zero") else 0
    plan.checkpoint_bytes = states.weights + states.optimizer + states.averages + copies
    if config.optimizer.snapshot_every:
        left = (plan.samples - plan.samples_done) // config.optimizer.snapshot_every + 1
        plan.snapshot_bytes = left * states.averages
    if isinstance(config, TrainVAEConfig):
        plan.checkpoint_bytes += 12 * plan.parameters.get("discriminator", 0)
    exported = 4 * states.elements if isinstance(config, TrainConfig) and config.lora else 4 * count(trained)
    # Averaged and last weights.
    plan.export_bytes = 2 * exported + models.exported

    if probe_seconds and not plan.problems:
        plan_speed(plan, models, configs, footprints, accelerator, probe_seconds, states.weights)


def usable(stage: StagePlan, config: LoopConfig) -> list[ShapeRow]:
    """Shapes that a stage trains on, the largest last; where no clips were found, the largest that it asks for."""
    rows = [row for row in stage.shapes if row.keep]
    asked = ShapeRow(config.data.num_frames, config.data.height, config.data.width, 0, 1.0, 1.0, 0.0)
    return sorted(rows or [asked], key=lambda row: math.prod(row.shape))


def parameters_of(model: nn.Module) -> dict[str, int]:
    """By part, apart for what is trained and what is not."""
    alone = list(model.parameters(recurse=False))
    parts = [("single tensors", nn.ParameterList(alone)), *model.named_children()]
    found = {}
    for name, part in parts:
        all_of_it, trained = count(part), count(part, trained=True)
        if trained:
            found[f"{name}, trained"] = trained
        if all_of_it > trained:
            found[f"{name}, frozen"] = all_of_it - trained
    return found


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


def plan_disk(plan: Plan, config: LoopConfig) -> None:
    """Whether the checkpoints fit on the disk."""
    folder = Path(config.run).absolute()
    while not folder.exists():
        folder = folder.parent
    plan.disk_free = shutil.disk_usage(folder).free
    # The one that validated best is kept beside the last, and one more stands there while the next is written.
    standing = config.keep_checkpoints + (getattr(config, "validation", None) is not None) + 1
    needed = standing * plan.checkpoint_bytes + plan.export_bytes + plan.snapshot_bytes
    if not plan.samples_done and needed > plan.disk_free:
        plan.problems.append(
            f"run: {folder} has {in_bytes(plan.disk_free)} free, checkpoints, averages and export take {in_bytes(needed)}"
        )


# --- Speed --------------------------------------------------------------------------------------------------------


def plan_speed(
    plan: Plan,
    models: Models,
    configs: Sequence[LoopConfig],
    footprints: Sequence[StepFootprint],
    accelerator: Accelerator,
    limit: float,
    weights: int,
) -> None:
    """Time of a step of each shape of each stage, and of the run. Processes are taken not to wait for each other."""
    largest = max(range(len(configs)), key=lambda i: footprints[i].flops)
    rate, plan.step_source = probe_rate(plan, models, configs, footprints, largest, accelerator, limit, weights)
    device, dtype = accelerator.device, PRECISIONS[plan.precision]
    for i, (stage, config) in enumerate(zip(plan.stages, configs, strict=True)):
        rows = usable(stage, config)
        # Of the smaller shapes, at most five are counted, and those between are between.
        some = rows[:-1][:: max(1, len(rows) // 4)]
        make = lambda faked, i=i: models.make(i, 0, faked)  # noqa: E731
        flops = [config.batch_size * fake_step(make, 1, row.shape, dtype, device)[1].flops for row in some]
        cells = [math.prod(row.shape) for row in (*some, rows[-1])]
        by_cells = partial(np.interp, xp=cells, fp=[*flops, footprints[i].flops])
        workers = config.data.workers
        for row in rows:
            compute, reading = float(by_cells(math.prod(row.shape))) / rate, row.read_seconds * config.batch_size
            row.step_seconds = config.accumulate * (max(compute, reading / workers) if workers else compute + reading)
        stage.step_seconds = sum(row.share * row.step_seconds for row in rows if row.step_seconds)
    plan.total_seconds = sum(stage.steps * stage.step_seconds for stage in plan.stages if stage.step_seconds)
    plan.step_seconds = plan.total_seconds / plan.steps if plan.steps else plan.stages[-1].step_seconds


def probe_rate(
    plan: Plan,
    models: Models,
    configs: Sequence[LoopConfig],
    footprints: Sequence[StepFootprint],
    number: int,
    accelerator: Accelerator,
    limit: float,
    weights: int,
) -> tuple[float, str]:
    """FLOP/s of a training step on this device, and how it was found: by the largest step of a stage that fits the time."""
    device, dtype, config, whole = accelerator.device, PRECISIONS[plan.precision], configs[number], footprints[number]
    shape = usable(plan.stages[number], config)[-1].shape
    peak = matrix_rate(device, dtype)
    chosen = None
    for probe in probe_candidates(config, models.layers):
        share = probe.layers / models.layers if probe.layers else 1.0
        part = probe.batch / config.batch_size * share
        # A step runs at about half of the rate of a matrix product, and twice: the first one warms up.
        fits = 4 * part * whole.flops / peak <= limit
        if fits and share * 4 * (weights + models.frozen) + part * whole.activations < plan.memory_available / 2:
            chosen = probe
            break
    if chosen is None:
        return (
            peak / 2,
            f"not probed, since no step takes less than {limit:g} s here; by FLOPs at half the rate of a matrix product",
        )
    flops = whole.flops
    if chosen != Probe(config.batch_size, 0):
        made = fake_step(lambda faked: models.make(number, chosen.layers, faked), chosen.batch, shape, dtype, device)
        flops = made[1].flops
    step = real_step(models.make(number, chosen.layers, None), config, chosen.batch, shape, dtype)
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
