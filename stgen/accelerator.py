"""One way to get an Accelerator that does what the launch command asked for, or stops."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, gather_object
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from stgen.averaging import is_zero3, local_part, whole
from stgen.config import require
from stgen.durable import only_job
from stgen.footprint import REDUCE_BUCKET
from stgen.tracking import make_trackers

Item = TypeVar("Item")
Result = TypeVar("Result")


def make_accelerator(
    run: Path, batch_size: int, accumulate: int, max_grad_norm: float, trackers: Sequence[str] = ()
) -> Accelerator:
    """The Accelerator of a training run, checked against what `accelerate launch` asked for.

    Mixed precision and the distributed strategy come from the launch command or its config file; what the run's own
    configuration decides (batch size, accumulation, clipping) is told to DeepSpeed here, so that it stands in one place.

    Args:
        batch_size: samples of one process in one forward.
        trackers: names of `stgen.tracking.TRACKERS`, beside metrics.jsonl.

    Raises:
        ValueError: the strategy in force is not the one asked for, or one that is known to train wrongly here.
    """
    asked_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    asked_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if asked_deepspeed and os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes"):
        raise ValueError("ACCELERATE_USE_CPU is set, which turns DeepSpeed off without a word: unset it")
    on_cpu = not torch.cuda.is_available()
    handlers = []
    if on_cpu:
        if asked_fsdp:
            raise ValueError("FSDP on CPU trains unsynchronised without an error in Accelerate: use DDP or DeepSpeed")
        if asked_deepspeed:
            import deepspeed.ops

            # Without a backend named, Accelerate counts one process under DeepSpeed on CPU.
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
            # The shared-memory op compiles at first use, and hangs on the lock that a killed build leaves behind.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Without cpu=True, Accelerate takes several CPU processes for one each, unsynchronised.
    accelerator = Accelerator(
        cpu=on_cpu and not asked_deepspeed,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=handlers,
        log_with=make_trackers(trackers, run),
    )

    in_force = accelerator.distributed_type
    if asked_deepspeed != (in_force == DistributedType.DEEPSPEED) or asked_fsdp != (in_force == DistributedType.FSDP):
        asked = "DEEPSPEED" if asked_deepspeed else "FSDP" if asked_fsdp else "neither DEEPSPEED nor FSDP"
        raise ValueError(f"the launch asked for {asked}, but {in_force} is in force")
    alone = in_force == DistributedType.NO
    if accelerator.num_processes != world_size or (alone and world_size > 1):
        raise ValueError(
            f"the launch started {world_size} processes, but {accelerator.num_processes} ({in_force}) are in force"
        )

    if on_cpu and int(os.environ.get("OMP_NUM_THREADS", "1")) == 1:
        # One thread a process is what `accelerate launch` sets when nobody chose; a CPU run wants all cores.
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))

    if in_force == DistributedType.DEEPSPEED:
        # Its autocast to fp16 clips gradients that are still scaled, and doesn't save the scale.
        half = accelerator.mixed_precision == "fp16"
        require(not half, "mixed_precision", "fp16", "bf16 or no under DeepSpeed")
        # Under ZeRO-3 transformers would split a text encoder over all processes, which one alone loads: it would hang.
        accelerator.state.deepspeed_plugin.dschf = None
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": batch_size,
            "train_batch_size": batch_size * accumulate * world_size,
            "gradient_accumulation_steps": accumulate,
            "gradient_clipping": max_grad_norm,
        }
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero.setdefault("reduce_bucket_size", REDUCE_BUCKET)
        if accelerator.mixed_precision == "bf16":
            # Weights stay float32 and operations choose, as everywhere else; DeepSpeed's own bf16 rounds the weights.
            accelerator.state.deepspeed_plugin.deepspeed_config |= {
                "bf16": {"enabled": False},
                "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
            }
    return accelerator


@contextmanager
def alone_in(run: str, accelerator: Accelerator) -> Iterator[None]:
    """No other command trains in the run folder within: `only_job` of the main process, on behalf of all.

    Raises:
        ValueError: one does, or the run folder is a file.
    """
    if not accelerator.is_main_process:
        yield
        return
    folder = Path(run)
    require(not folder.exists() or folder.is_dir(), "run", run, "a folder, or nothing yet")
    folder.mkdir(parents=True, exist_ok=True)
    with only_job(folder, "run"):
        yield


PREEMPTED = 75
"""Exit status of a process that was asked to stop and has saved (EX_TEMPFAIL of sysexits.h: try again later)."""
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class StopRequests:
    """SIGTERM and SIGUSR1, from when it is made until `close`, become a question: was any process of the run asked to stop?

    All processes put it after every step, and get the same answer: an all-reduce of one number between the CPUs, so it waits
    for no GPU. A launcher that dies, as Accelerate's does of a signal that it doesn't pass on, asks its processes to stop.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.asked = False
        self.group = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
        if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:  # `accelerate launch` sets it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True

    def any(self) -> bool:
        """Whether one was asked. All processes call it."""
        if self.group is None:
            return self.asked
        flag = torch.tensor([self.asked], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
        return bool(flag.item())

    def close(self) -> None:
        """The signals mean again what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def full_weights(model: torch.nn.Module) -> Iterator[None]:
    """Within, `model` has all of its weights on this process, to be read and saved. All processes enter it.

    Under ZeRO-3 and FSDP2, where a process has a part of each, it has copies in their place: what is written to them is lost
    at the end. A forward pass is that of all processes together, and not for within.
    """
    split = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and (is_zero3(parameter) or isinstance(parameter, DTensor))
    ]
    for place, name, parameter in split:
        place[name] = torch.nn.Parameter(whole(local_part(parameter), parameter), parameter.requires_grad)
    try:
        yield
    finally:
        for place, name, parameter in split:
            place[name] = parameter


def set_batch(accelerator: Accelerator, batch_size: int, accumulate: int) -> None:
    """What follows is trained on batches of this size; the next forward is the first of an optimizer step."""
    accelerator.step = 0
    accelerator.gradient_accumulation_steps = accumulate
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = accelerator.deepspeed_engine_wrapped.engine
        engine.set_train_micro_batch_size(batch_size)
        engine.set_train_batch_size(batch_size * accumulate * accelerator.num_processes)


def share_out(
    accelerator: Accelerator, items: Sequence[Item], work: Callable[[Item], Result], label: str
) -> list[Result]:
    """`[work(item) for item in items]` on every process, each item worked on by one of them. All processes call it.

    None waits long, and all make equally many calls, some of them twice: the forwards of a model that is split over the
    processes (ZeRO-3) take all of them.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    found: list[tuple[int, Result]] = []
    for first in tqdm(range(0, len(items), ranks), label, leave=False, disable=rank > 0):
        i = min(first + rank, len(items) - 1)
        found.append((i, work(items[i])))
    results = dict(gather_object(found))
    return [results[i] for i in range(len(items))]


def end_training(accelerator: Accelerator) -> None:
    """Ends the trackers and, where there are several processes, their group. Each process calls it last.

    A thread of gloo may still hold tensors of the last collective, and takes the GIL to let go of them, while the group's
    destructor waits for that thread: with the GIL, if it is not Python that called it, and then for ever
    (https://github.com/pytorch/pytorch/issues/56297). So the thread gets its turn before anything is taken down.
    Read off the stacks of one process that hung after it had saved; not reproduced.
    """
    if accelerator.num_processes > 1:
        time.sleep(0.1)  # without the GIL
    accelerator.end_training()


@contextmanager
def stop_on_value_error() -> Iterator[None]:
    """A user's mistake ends the process with its one line and exit status 2, not with a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:  # OSError: a full disk, a folder that is none or may not be written to
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
