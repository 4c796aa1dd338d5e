"""Optimizers, the learning rate counted in samples, and the steps that are not taken because a number is not finite."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor
from torch.distributed.tensor import DTensor

from stgen.averaging import PROFILES
from stgen.config import require

# --- Configuration ------------------------------------------------------------------------------------------------


@dataclass
class OptimizerConfig:
    """Optimizer, schedule and averaged weights."""

    name: str = "adamw"
    """adamw (Loshchilov & Hutter 2017, arXiv:1711.05101). adamw_8bit: with both moments in 8 bits (Dettmers et al. 2021,
    arXiv:2110.02861; bitsandbytes). muon: orthogonalised momentum for the matrices of blocks and text projection, adamw for
    all else (Jordan et al. 2024; steps scaled to AdamW's as in Moonlight, arXiv:2502.16982, so `lr` and `weight_decay` are
    those of adamw). prodigy: finds its own step size, so `lr` is a factor, best 1 (Mishchenko & Defazio 2023,
    arXiv:2306.06101)."""
    lr: float = 1e-4
    """Highest learning rate."""
    beta2: float = 0.99
    """Decay of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay; 1D parameters (norms, biases) are not decayed."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm once an optimizer step."""
    schedule: str = "cosine"
    """After the warm-up. cosine: down to the run's end. constant. wsd: constant, then down over the last `decay` of the run
    (warm-up, stable, decay; MiniCPM, Hu et al. 2024, arXiv:2404.06395): a run that has not begun to decay may be given more
    `samples` and is then the longer run to the bit."""
    warmup: int = 1000
    """Samples over which the learning rate rises linearly from 0."""
    decay: float = 0.0
    """With wsd: share of the run's samples over which the rate falls, above 0 up to 1."""
    decay_shape: str = "linear"
    """With wsd: linear; or 1-sqrt, that is 1 - sqrt(share of the decay that is over) (Haegele et al. 2024, arXiv:2405.18392)."""
    final_lr: float = 0.0
    """Learning rate that the schedule ends at, relative to `lr`."""
    max_nonfinite: int = 20
    """Optimizer steps in a row whose loss or gradient is not finite, at which the run stops; fewer are skipped. fp16 finds
    its loss scale by such steps."""
    average: str = "exponential"
    """How weights are averaged. exponential: see `ema_decay`. power: averages as wide as a share of the run, from whose
    snapshots `stgen average` makes that of any width afterwards (EDM2, Karras et al. 2024, arXiv:2312.02696)."""
    ema_decay: float = 0.9999
    """Highest decay of the exponential average; it is warmed up as 1 - step^(-3/4)."""
    snapshot_every: int = 0
    """With power: samples between snapshots of the averages, each twice the size of the weights in float32."""

    def __post_init__(self) -> None:
        for name, table in (("name", OPTIMIZERS), ("schedule", SCHEDULES), ("decay_shape", DECAY_SHAPES)):
            require(getattr(self, name) in table, f"optimizer.{name}", getattr(self, name), ", ".join(table))
        require(self.average in PROFILES, "optimizer.average", self.average, ", ".join(PROFILES))
        require(self.lr > 0, "optimizer.lr", self.lr, "above 0")
        require(0 < self.beta2 < 1, "optimizer.beta2", self.beta2, "between 0 and 1")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(self.max_grad_norm > 0, "optimizer.max_grad_norm", self.max_grad_norm, "above 0")
        require(self.warmup >= 0, "optimizer.warmup", self.warmup, "0 or more")
        if self.schedule == "wsd":
            require(0 < self.decay <= 1, "optimizer.decay", self.decay, "above 0, up to 1, with schedule wsd")
        else:
            require(self.decay == 0, "optimizer.decay", self.decay, f"0 with schedule {self.schedule}")
            require(self.decay_shape == "linear", "optimizer.decay_shape", self.decay_shape, "linear without wsd")
        require(0 <= self.final_lr <= 1, "optimizer.final_lr", self.final_lr, "0 to 1")
        require(self.max_nonfinite >= 1, "optimizer.max_nonfinite", self.max_nonfinite, "1 or more")
        require(0 <= self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "0 up to, not including, 1")
        if self.average == "power":
            require(self.snapshot_every >= 1, "optimizer.snapshot_every", self.snapshot_every, "1 or more with power")
        else:
            require(self.snapshot_every == 0, "optimizer.snapshot_every", self.snapshot_every, f"0 with {self.average}")


# --- Schedules ----------------------------------------------------------------------------------------------------

DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda over: 1 - over,
    "1-sqrt": lambda over: 1 - math.sqrt(over),
}
"""By name: from the share of the decay that is over to the height, from 1 to 0."""


def _cosine(config: OptimizerConfig, over: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * over))


def _constant(config: OptimizerConfig, over: float) -> float:
    return 1.0


def _wsd(config: OptimizerConfig, over: float) -> float:
    return DECAY_SHAPES[config.decay_shape](max(0.0, (over - (1 - config.decay)) / config.decay))


SCHEDULES: dict[str, Callable[[OptimizerConfig, float], float]] = {
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _wsd,
}
"""By name: from the share of the run that is over to the height, from 1 to 0, without the warm-up."""


def learning_rate(config: OptimizerConfig, samples: int, total: int) -> float:
    """The rate after `samples` of `total` samples: a pure function, so there is no scheduler state to resume."""
    warm = min(1.0, samples / config.warmup) if config.warmup else 1.0
    height = SCHEDULES[config.schedule](config, min(1.0, samples / total))
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * height)


# --- Optimizers ---------------------------------------------------------------------------------------------------

Groups = list[dict[str, Any]]


def _adamw(model: torch.nn.Module, groups: Groups, config: OptimizerConfig, half: bool) -> torch.optim.Optimizer:
    # Fused kernels skip a step by themselves, so that a GPU need not be waited for; on a CPU the plain form stays.
    fused = True if torch.cuda.is_available() else None
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=fused)


def _adamw_8bit(model: torch.nn.Module, groups: Groups, config: OptimizerConfig, half: bool) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, lr=config.lr, betas=(0.9, config.beta2))


def _prodigy(model: torch.nn.Module, groups: Groups, config: OptimizerConfig, half: bool) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    # The safeguard keeps the warm-up's small steps out of its estimate of the distance.
    return Prodigy(groups, lr=config.lr, betas=(0.9, config.beta2), safeguard_warmup=True)


def muon_matrices(model: torch.nn.Module) -> dict[str, Tensor]:
    """The trainable weights of the linear layers in a transformer's blocks and in its text projection, by name.

    They are hidden matrices, which is what Muon is for; embeddings, the first and last layers, tables of modulations, norms,
    biases and convolutions are none. A fused projection (to_qkv, to_kv) is one matrix. Under AdamW a few directions of the
    text projection outgrow the others, in the end until words are hardly told apart (`stgen.finetuning.separate_words`): after
    32,000 images of `moving_mnist_64` from scratch the largest singular value of its first layer was 9.8 and the second 3.2,
    here 3.1 and 2.8.
    """
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not {"transformer_blocks", "text_embed"}.isdisjoint(name.split("."))
        and module.weight.requires_grad
    }


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Newton-Schulz iteration of Muon: X <- a X + (b A + c A^2) X with A = X X^T, from X = G / |G|.

    Args:
        matrix: G, `r c`.
        coefficients: a, b, c.

    Returns:
        `r c`, whose singular values are near 1 (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T


def orthogonalize_together(
    matrices: list[Tensor], coefficients: tuple[float, float, float], steps: int, half: bool = False
) -> list[Tensor]:
    """`orthogonalize` of each; where processes hold the same matrices, each does a share, and all get the results.

    Five steps of the iteration cost what forward and backward of three to five tokens for each row of the matrix do (of
    its shorter side): with few tokens on each process much of a training step. Bits are those of one process that does all.

    Args:
        half: iterates in bfloat16 on a CPU too.

    Returns:
        The matrices `r c` in the order given, bfloat16 on a GPU or with `half`, else of their own dtype.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if distributed else (1, 0)
    sizes = [matrix.numel() for matrix in matrices]
    work = [matrix.numel() * min(matrix.shape) for matrix in matrices]
    # Who has the middle of a matrix' work has it all: shares are ranges, each sent in one piece.
    owners = [
        int(world * (end - own / 2) / sum(work)) for end, own in zip(itertools.accumulate(work), work, strict=True)
    ]
    first = matrices[0]
    dtype = torch.bfloat16 if first.is_cuda or half else first.dtype
    flat = torch.empty(sum(sizes), dtype=dtype, device=first.device)
    results = [part.view_as(matrix) for part, matrix in zip(flat.split(sizes), matrices, strict=True)]
    for owner, matrix, result in zip(owners, matrices, results, strict=True):
        if owner == rank:
            result.copy_(orthogonalize(matrix.to(flat.dtype), coefficients, steps))
    if world > 1:
        lengths = [sum(size for owner, size in zip(owners, sizes, strict=True) if owner == r) for r in range(world)]
        sent = [torch.distributed.broadcast(p, r, async_op=True) for r, p in enumerate(flat.split(lengths)) if len(p)]
        for work_of_one in sent:
            work_of_one.wait()
    return results


class Muon(torch.optim.Muon):
    """torch's Muon, with the iteration shared among processes, and on a CPU in bfloat16 only where training is in it.

    A CPU without instructions for bfloat16 emulates it: the training step of a small model then takes four times as long.
    """

    def __init__(self, groups: Groups, lr: float, half: bool) -> None:
        # A step of 0.2 sqrt(max(rows, columns)) lr, whose root mean square is that of AdamW's steps.
        super().__init__(groups, lr=lr, adjust_lr_fn="match_rms_adamw")
        self.half = half

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            updates = []
            for weight in weights:
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                updates.append(weight.grad.lerp(momentum, group["momentum"]))  # Nesterov's
            if not updates:  # a stage may freeze them all
                continue
            updates = orthogonalize_together(updates, group["ns_coefficients"], group["ns_steps"], self.half)
            for weight, update in zip(weights, updates, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(weight.shape)))


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some parameter groups and AdamW for the others, as one optimizer with one state."""

    def __init__(self, muon_groups: Groups, adamw_groups: Groups, lr: float, beta2: float, half: bool) -> None:
        self.parts: list[torch.optim.Optimizer] = [Muon(muon_groups, lr, half)]
        if adamw_groups:  # none where only matrices train, as with LoRA
            self.parts.append(torch.optim.AdamW(adamw_groups, lr=lr, betas=(0.9, beta2)))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Each part works on its groups and on the state of this one."""
        first = len(self.parts[0].param_groups)
        for part, groups in zip(self.parts, (self.param_groups[:first], self.param_groups[first:]), strict=False):
            part.param_groups, part.state = groups, self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def _muon(model: torch.nn.Module, groups: Groups, config: OptimizerConfig, half: bool) -> torch.optim.Optimizer:
    matrices = muon_matrices(model)
    require(
        len(matrices) > 0, "optimizer.name", "muon", "adamw for a model without linear layers in transformer_blocks"
    )
    chosen = {id(p) for p in matrices.values()}
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in chosen]} for group in groups]
    hidden = [{"params": list(matrices.values()), "weight_decay": config.weight_decay}]
    return MuonAdamW(hidden, [group for group in rest if group["params"]], config.lr, config.beta2, half)


OPTIMIZERS: dict[str, Callable[[torch.nn.Module, Groups, OptimizerConfig, bool], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "muon": _muon,
    "prodigy": _prodigy,
}
PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}
"""What stgen's extra `optimizers` brings, by optimizer."""


def make_optimizer(
    model: torch.nn.Module,
    config: OptimizerConfig,
    strategy: DistributedType = DistributedType.NO,
    half: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters of `model`.

    Args:
        half: the model trains under bfloat16's autocast, so Muon iterates in bfloat16 on a CPU as well.

    Raises:
        ValueError: its package is missing, the model has nothing for it, or parameters are split in a way that it cannot
            see through: Muon needs whole matrices, Prodigy sums over all parameters, 8-bit states are cut in blocks.
    """
    package = PACKAGES.get(config.name)
    if package:
        allowed = f"adamw without the package {package} (stgen's extra `optimizers`)"
        require(find_spec(package) is not None, "optimizer.name", config.name, allowed)
    if strategy in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        require(config.name == "adamw", "optimizer.name", config.name, f"adamw under {strategy.value}")
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[config.name](model, [group for group in groups if group["params"]], config, half)


def describe_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> str:
    """One line: which parameters the optimizer has."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if config.name != "muon":
        return f"{config.name} on {count:,} parameters"
    matrices = muon_matrices(model)
    share = sum(p.numel() for p in matrices.values()) / count
    kinds = sorted({re.sub(r".*transformer_blocks\.\d+\.", "", name).removesuffix(".weight") for name in matrices})
    listed = ", ".join(kinds)
    return f"muon on {len(matrices)} hidden matrices ({listed}), {share:.0%} of {count:,} parameters; adamw on the rest"


# --- Steps that are not taken -------------------------------------------------------------------------------------


def all_or_nothing(loss: Tensor) -> Tensor:
    """The loss, with a gradient of NaN throughout if it is not finite itself.

    Averaging gradients carries the NaN to all processes, so the norm of the gradient tells each of them the same, without a
    message of its own: a loss that is not finite on one process is no step on any. A finite loss is multiplied by 1.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor | float | None) -> bool | Tensor:
    """Takes the optimizer's step if the gradient's norm is finite; if not, weights and optimizer state stay as they are.

    Where the kernel of the optimizer can skip by itself (fused AdamW, the default on a GPU), it is told so on the device and
    nobody waits. DeepSpeed has stepped, or not, in its backward pass. All other optimizers wait for the norm.

    Returns:
        Whether the step was taken: a bool, or 1.0 or 0.0 on the device.
    """
    if isinstance(optimizer, DeepSpeedOptimizerWrapper):
        return not optimizer.step_was_skipped
    finite = torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm))
    inner: Any = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    scaled = getattr(optimizer, "scaler", None) is not None
    if inner.defaults.get("fused") and not isinstance(norm, DTensor):
        if not scaled:  # with a loss scale, GradScaler says so itself
            inner.found_inf = (~finite).float()
        optimizer.step()
        return finite.float()
    if scaled or finite:  # GradScaler skips, and must see each step to find its scale
        optimizer.step()
    return bool(finite)


class FiniteSteps:
    """Counts the steps that `step_if_finite` skips, and ends the run at too many in a row.

    The verdict of a step is read when the next one has been queued, which costs a GPU no pause. It is registered for
    checkpointing, so that a run that stopped goes on counting.

    Args:
        limit: skipped steps in a row at which `ValueError` is raised, on all processes alike.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, limit: int) -> None:
        self.optimizer, self.limit = optimizer, limit
        self.skipped, self.in_a_row = 0, 0
        self._pending: tuple[bool | Tensor, torch.cuda.Event | None, str] | None = None

    def take(self, norm: Tensor | float | None, step: int, samples: int, batch: int) -> bool | Tensor:
        """Step number `step`, on the samples at positions `samples` to `samples + batch - 1`; see `step_if_finite`.

        Raises:
            ValueError: so many before it were skipped.
        """
        self._settle()
        taken = step_if_finite(self.optimizer, norm)
        where, event, verdict = f"step {step}, samples {samples} to {samples + batch - 1}", None, taken
        if isinstance(taken, Tensor) and taken.is_cuda:
            verdict = torch.empty_like(taken, device="cpu", pin_memory=True).copy_(taken, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = verdict, event, where
        if not isinstance(verdict, Tensor):
            self._settle()
        return taken

    def _settle(self) -> None:
        if self._pending is None:
            return
        (taken, event, where), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        self.in_a_row = 0 if taken else self.in_a_row + 1
        self.skipped += not taken
        if self.in_a_row >= self.limit:
            steps = f"{self.in_a_row} optimizer steps in a row (optimizer.max_nonfinite), last in {where}"
            raise ValueError(f"the loss or its gradient was not finite in {steps}")

    def count(self) -> int:
        """Steps skipped since this was asked last. Waits for the last step."""
        self._settle()
        skipped, self.skipped = self.skipped, 0
        return skipped

    def state_dict(self) -> dict[str, int]:
        self._settle()
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
