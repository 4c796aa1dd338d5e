"""Jobs of many tasks on Ray actors: each task done whatever dies.

Another worker takes the place of one that dies, and its task comes again. We count the deaths: Ray's own retries sometimes
take one for two, when the task meets the worker that is being restarted. The work is plain actors and not Ray Data,
since the failure of one task is a result here: Ray Data (2.60), with its retries limited, drops the row of a task that
kills its worker with nothing but a line in the log. Side effects are the worker's to make idempotent.
"""

import logging
import math
import os
import secrets
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from stgen.config import require

_TRIES = 3
"""A task whose worker dies this often has failed: it may be what kills it."""


@dataclass(frozen=True)
class Pool:
    """Worker processes of a job."""

    address: str | None = None
    """Of a Ray cluster to join; None starts Ray on this machine for as long as the job runs."""
    actors: int = 1
    """Worker processes."""
    gpus_per_actor: float = 0
    """0 works on the CPU; a fraction of one lets workers share a GPU."""
    cpus_per_actor: float = 1
    """CPU cores of each worker, which computes with as many threads."""

    def __post_init__(self) -> None:
        require(self.actors >= 1, "actors", self.actors, "1 or more")
        require(0 <= self.gpus_per_actor <= 1, "gpus_per_actor", self.gpus_per_actor, "0 to 1")
        require(0 < self.cpus_per_actor < math.inf, "cpus_per_actor", self.cpus_per_actor, "more than 0")
        if self.address is None and self.gpus_per_actor > 0:
            fitting = torch.cuda.device_count() * int(1 / self.gpus_per_actor)
            require(self.actors <= fitting, "actors", self.actors, f"{fitting} or fewer, as fit on this machine's GPUs")

    @property
    def device(self) -> str:
        """Of each worker: `cuda` or `cpu`."""
        return "cuda" if self.gpus_per_actor > 0 else "cpu"

    @contextmanager
    def start(self) -> Iterator[None]:
        """Ray while the block runs: of this process alone, or the cluster at `address`."""
        try:
            import ray
        except ImportError as error:
            raise ValueError("jobs with actors need Ray: pip install 'stgen[ray]'") from error
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is None:
            # Ray listens on the network and by default demands a token, which it would write to ~/.ray/auth_token,
            # where later clusters of the user find it. A token of this process serves as well and leaves nothing behind.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            # CPUs are what the job asks for, so that no worker waits; the object store carries nothing but table rows.
            ray.init(
                address="local",
                num_cpus=math.ceil(self.actors * self.cpus_per_actor),
                num_gpus=torch.cuda.device_count() if self.gpus_per_actor > 0 else 0,
                object_store_memory=100 * 2**20,
                include_dashboard=False,
                **quiet,
            )
        else:
            ray.init(address=self.address, **quiet)
        try:
            yield
        finally:
            ray.shutdown()

    def map(
        self, worker_class: type, arguments: tuple, tasks: Sequence[Any], loads: str
    ) -> Iterator[tuple[Any, Any, str]]:
        """(task, result, failure) as they come in, inside `start`. The result of a task that failed is None.

        A worker has one task at a time, so that its death concerns no other.

        Args:
            worker_class: an actor, made of `arguments`; `ready()` returns as soon as it has started, and `run(task)` gives
                a result. `ValueError` means that the task is at fault, and the worker goes on with others.
            loads: what it needs to start, for the error.

        Raises:
            RuntimeError: a worker cannot start.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        kind: Any = ray.remote(worker_class).options(num_gpus=self.gpus_per_actor, num_cpus=self.cpus_per_actor)
        deaths: Counter[int | None] = Counter()  # by the task's place; at None those of workers that were starting
        running: dict[Any, tuple[Any, int | None]] = {}  # the worker, and the place of its task; None while it starts

        def start_worker() -> None:
            # One that a busy cluster has no room for yet is given no task, or the job would wait for it at the end.
            worker = kind.remote(*arguments)
            running[worker.ready.remote()] = (worker, None)

        for _ in range(min(self.actors, len(tasks))):
            start_worker()
        queue, left = deque(range(len(tasks))), len(tasks)
        while left:
            (ref,), _ = ray.wait(list(running))
            worker, place = running.pop(ref)
            result, failure, usable, again = None, "", True, False
            try:
                result = ray.get(ref)
                if place is None:
                    deaths[None] = 0  # in a row: over days, machines come and go
            except RayTaskError as error:
                cause = getattr(error, "cause", error)
                failure = " ".join(f"{type(cause).__name__}: {cause}".split())
                # Another error than our refusals may be a fault of the GPU, after which nothing works in that process.
                usable = isinstance(cause, ValueError)
            except RayError as error:  # an actor's death; one for want of memory is no RayActorError
                deaths[place] += 1
                if place is None and (getattr(error, "actor_init_failed", False) or deaths[place] == _TRIES):
                    raise RuntimeError(f"a worker can't load {loads}: {error}") from error
                failure, usable, again = f"its worker died {_TRIES} times", False, deaths[place] < _TRIES
            if place is not None:
                if again:
                    queue.appendleft(place)
                else:
                    left -= 1
                    yield tasks[place], result, failure
            if not usable:
                ray.kill(worker)
                start_worker()
            elif queue:
                place = queue.popleft()
                running[worker.run.remote(tasks[place])] = (worker, place)
