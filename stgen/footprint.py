"""What a training step takes, found without doing it: its operations run on fake tensors, which have shapes and no values.

Memory is counted storage by storage as PyTorch makes and frees them, so that activations, checkpointing, autocast's copies
and what a backward pass holds for a moment are those of the very code that will run. How processes share what belongs to
the weights is arithmetic: `rank_memory`.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

# --- One step on fake tensors -------------------------------------------------------------------------------------


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


# PyTorch's registry has the attention of GPUs alone.
FLOPS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class StepLedger(TorchDispatchMode):
    """Counts, while it is active, FLOPs and the bytes of the storages that operations make, until they are freed.

    It also answers what the code asks of values, which fake tensors lack: of `torch.full` it is known. (`FlopCounterMode`
    would keep the tensors of recomputed blocks alive, and with them what checkpointing spares.)

    Args:
        known: tensors that are there already and do not count.
        otherwise: the value that elements have of which nothing is known.
    """

    def __init__(self, known: Sequence[Tensor], otherwise: float = 0.0) -> None:
        super().__init__()
        self.flops = self.live = self.gradients = self.peak = self.peak_beside_gradients = 0
        self._known = WeakIdKeyDictionary({x.untyped_storage(): None for x in known})
        self._values = WeakIdKeyDictionary()
        self._otherwise = otherwise

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            value = self._values.get(args[0].untyped_storage(), self._otherwise)
            return bool(value) if args[0].dtype == torch.bool else value
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.full.default:
            self._values[result.untyped_storage()] = args[1]
        if function.overloadpacket in FLOPS:
            self.flops += FLOPS[function.overloadpacket](*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = None
        self.live += storage.nbytes()
        weakref.finalize(storage, self._free, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.live)
        self.peak_beside_gradients = max(self.peak_beside_gradients, self.live - self.gradients)

    def _free(self, size: int) -> None:
        self.live -= size

    def gradient_came(self, parameter: Tensor) -> None:
        """To be called when a parameter has its gradient: what was counted as any tensor is one of the gradients now."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()


@dataclass(frozen=True)
class StepFootprint:
    """Of one forward and backward pass of one process; bytes, but for `flops`."""

    flops: int
    """Of matrix products, convolutions and attention; a multiplication and an addition are two."""
    activations: int
    """The most that is alive at once beside weights and gradients."""
    with_gradients: int
    """The most that is alive at once beside weights, where each gradient stays from when it comes."""


def step_footprint(
    model: nn.Module,
    step: Callable[[], object],
    beside: Sequence[nn.Module] = (),
    otherwise: float = 0.0,
) -> StepFootprint:
    """Runs a step on fake tensors; under the `FakeTensorMode` in which `model` and `beside` were made.

    Args:
        step: makes its inputs, runs forward and backward.
        beside: other modules that the step runs, whose weights do not count either.
        otherwise: of `StepLedger`.
    """
    known = [x for module in (model, *beside) for x in (*module.parameters(), *module.buffers())]
    trainable = [p for p in model.parameters() if p.requires_grad]
    ledger = StepLedger(known, otherwise)
    hooks = [p.register_post_accumulate_grad_hook(ledger.gradient_came) for p in trainable]
    with ledger:
        step()
    for hook in hooks:
        hook.remove()
    for parameter in trainable:
        parameter.grad = None
    return StepFootprint(ledger.flops, ledger.peak_beside_gradients, ledger.peak)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer keeps, found by a step of it on the fake gradients of its fake parameters."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    with StepLedger([], otherwise=1.0):
        optimizer.step()
    optimizer.zero_grad()
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor) and x.ndim > 0]
    return sum(x.untyped_storage().nbytes() for x in states)


# --- How processes share it ---------------------------------------------------------------------------------------

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
REDUCE_BUCKET = 2**25
"""Elements of the buffer through which DeepSpeed reduces gradients (`reduce_bucket_size`): what training sets where the launch
says nothing. Some stages allocate it for good, at DeepSpeed's own 5e8 elements 2 GB a process, however small the model."""
MAX_LIVE, PREFETCH = 1_000_000_000, 50_000_000
"""Elements, as DeepSpeed has them: of the weights that ZeRO-3 keeps gathered (`stage3_max_live_parameters`), and of those that
it gathers in one run (`stage3_prefetch_bucket_size`)."""


@dataclass(frozen=True)
class States:
    """What belongs to the weights of a model, before it is shared out; bytes."""

    weights: int
    """In the precision that the model computes with outside of autocast."""
    trainable: int
    """Those of `weights` that are trained; their gradients are as large."""
    elements: int
    """How many numbers are trained."""
    optimizer: int
    """States of the optimizer."""
    averages: int
    """Averaged weights."""
    largest_unit: int
    """Weights of the largest part that FSDP gathers at once."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one process. `total` is the most at any moment, so it may be less than the sum of the others."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    communication: int
    """Buffers that gradients are reduced through, and weights gathered from other processes."""
    activations: int
    frozen: int
    """Models that are run and not trained."""
    total: int


def rank_memory(
    strategy: str, processes: int, states: States, step: StepFootprint, frozen: int, touched_only: bool
) -> RankMemory:
    """Memory of each process: what the strategy divides, and what it adds.

    ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 5) divides the optimizer's states (1), the gradients too (2) and
    the weights too (3); FSDP (Zhao et al. 2023, arXiv:2304.11277) divides as ZeRO-3 does and gathers part by part. The
    buffers are those of PyTorch's DDP and of DeepSpeed 0.19 as Accelerate configures it, read in their code and
    checked against measurements (`tests/bench/plan_accuracy.py`); those of FSDP are not measured.

    Args:
        strategy: one of `STRATEGIES`; ddp on one process is plain training.
        touched_only: counts DeepSpeed's buffer as far as it is written to, which is what a CPU's memory has of it;
            a GPU has all of it.
    """
    share = lambda size: -(-size // processes)  # noqa: E731
    gradients, averages, optimizer = states.trainable, states.averages, states.optimizer
    if strategy == "ddp":
        # DDP copies gradients into buckets of its own, which stay.
        buckets = gradients if processes > 1 else 0
        resident = states.weights + optimizer + averages + buckets
        # The averages' update holds their difference from the weights, when the gradients are gone.
        busiest = max(step.with_gradients, gradients, averages)
        return RankMemory(
            states.weights,
            gradients,
            optimizer,
            averages,
            buckets,
            step.activations,
            frozen,
            resident + busiest + frozen,
        )
    if strategy == "fsdp":
        gathered = 2 * states.largest_unit  # one that is computed, and the next
        weights, gradients, optimizer, averages = map(share, (states.weights, gradients, optimizer, averages))
        total = weights + gradients + optimizer + averages + gathered + step.activations + frozen
        return RankMemory(weights, gradients, optimizer, averages, gathered, step.activations, frozen, total)

    # DeepSpeed trains float32 copies of its own, which stand with the optimizer's states.
    optimizer = share(optimizer + 4 * states.elements)
    width = gradients // max(states.elements, 1)
    # ZeRO-1 accumulates in float32 before it reduces.
    bucket = (4 if strategy == "zero1" else width) * (
        min(REDUCE_BUCKET, states.elements) if touched_only else REDUCE_BUCKET
    )
    if strategy == "zero3":
        # Weights are gathered in runs, each of which is there twice while it is put together.
        buffers = bucket + min(states.weights, MAX_LIVE * width) + min(states.weights, PREFETCH * width)
        weights, gradients, averages = map(share, (states.weights, gradients, averages))
        total = weights + gradients + optimizer + averages + buffers + step.activations + frozen
        return RankMemory(weights, gradients, optimizer, averages, buffers, step.activations, frozen, total)
    resident = states.weights + optimizer + averages
    upfront = 0 if touched_only else bucket
    if strategy == "zero1":
        # All gradients wait for the end of the backward pass; then they move through the buffer into this process's share,
        # and once more as the optimizer wants them.
        busiest = max(step.with_gradients + upfront, bucket + 2 * share(4 * states.elements))
    else:
        gradients = share(gradients)
        backward = step.with_gradients if touched_only else step.activations + bucket + gradients
        busiest = max(backward, bucket + 2 * gradients)
    busiest = max(busiest, averages)
    return RankMemory(
        states.weights, gradients, optimizer, averages, bucket, step.activations, frozen, resident + busiest + frozen
    )
