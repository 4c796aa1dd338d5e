"""Batch generation: a file of requests in, one mp4 a request and a table of results out, each request exactly once.

The out folder is the whole state of a job, so that whatever dies, the same command goes on where it was:

    ID.mp4          the request is finished: it is written under another name and renamed
    results.jsonl   one row a request: {id, status, path, seconds, error}, appended as results come in, at the end
                    rewritten in the order of the requests
    .asked.jsonl    the requests, with the pipeline's digest, written before anything runs
    .lock           held while a job runs

Work runs on the actors of `stgen.jobs`.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stgen.config import require
from stgen.durable import only_job
from stgen.generation import Request, component_names, generate, parse_requests, saved_pipeline
from stgen.jobs import Pool
from stgen.pipelines import STGenPipeline
from stgen.tracking import progress_bar
from stgen.video import write_video


@dataclasses.dataclass(frozen=True)
class Result:
    """A row of results.jsonl."""

    id: str
    status: str
    """`done` or `failed`."""
    path: str | None = None
    """Of the video, relative to the out folder."""
    seconds: float | None = None
    """Reading the inputs, generating and writing; None if what generated it was killed before it could say so."""
    error: str | None = None
    """Why it failed, in one line."""


def run_batch(
    pipeline: str | Path,
    requests: str | Path,
    out: str | Path,
    address: str | None = None,
    actors: int = 1,
    gpus_per_actor: float = 0,
    cpus_per_actor: float = 1,
) -> list[Result]:
    """Generates a video for each request that has none yet in the out folder.

    The result of a request depends only on the request, the pipeline and the kind of hardware, not on what else runs or
    dies. A request that fails is noted with its error, and tried again when the command is rerun.

    Args:
        pipeline: a folder saved by `STGenPipeline.save_pretrained`.
        requests: a file of requests, see `stgen.generation.parse_requests`.
        out: the folder of the results, made if missing. Videos are H.264, so given pixels are near there, not exact.
        address: of a Ray cluster to join; None starts Ray on this machine for as long as the job runs. The cluster's
            machines need stgen installed, and this machine's paths of the pipeline, of inputs and of `out`.
        actors: worker processes, each with a pipeline of its own.
        gpus_per_actor: 0 generates on the CPU; a fraction of one lets workers share a GPU.
        cpus_per_actor: CPU cores of each worker, which computes with as many threads.

    Returns:
        One result a request, in the order of the file.
    Raises:
        ValueError: an argument is out of range, a request is wrong, the folder is no saved pipeline, or `out` has
            videos of other requests or another pipeline. Nothing has run then.
        RuntimeError: a worker can't load the pipeline. What was finished before is kept.
    """
    pool = Pool(address, actors, gpus_per_actor, cpus_per_actor)
    folder, out = saved_pipeline(pipeline), Path(out).absolute()
    wanted = parse_requests(requests)
    require(not out.exists() or out.is_dir(), "out", str(out), "a folder, or nothing yet")
    own = out / "results.jsonl"
    require(Path(requests).resolve() != own.resolve(), "requests", str(requests), f"any but the job's own {own}")
    out.mkdir(parents=True, exist_ok=True)
    with only_job(out):
        _claim(out, wanted, _digest(folder))
        _remove_torn(out)
        earlier = {row["id"]: Result(**row) for row in _read_rows(out / "results.jsonl") if row["status"] == "done"}
        results = {r.id: earlier.get(r.id, _done(r)) for r in wanted if _video(out, r).exists()}
        asked = {request.id for request in wanted}
        others = [row for id, row in earlier.items() if id not in asked and (out / f"{id}.mp4").exists()]
        _write_rows(out / "results.jsonl", map(dataclasses.asdict, [*results.values(), *others]))
        todo = [request for request in wanted if request.id not in results]
        if todo:
            failed = 0
            with (
                progress_bar(len(wanted), len(results), True, "batch") as bar,
                (out / "results.jsonl").open("a") as file,
                pool.start(),
            ):
                for request, done, failure in pool.map(_Worker, (folder, out, pool.device), todo, str(folder)):
                    result = done or Result(request.id, "failed", error=failure)
                    results[result.id] = result
                    file.write(json.dumps(dataclasses.asdict(result)) + "\n")
                    file.flush()
                    failed += result.status == "failed"
                    bar.set_postfix(failed=failed, refresh=False)
                    bar.update()
        _remove_torn(out)
        ordered = [results[request.id] for request in wanted]
        _write_rows(out / "results.jsonl", map(dataclasses.asdict, [*ordered, *others]))
    return ordered


# --- The out folder -----------------------------------------------------------------------------------------------


def _video(out: Path, request: Request) -> Path:
    return out / f"{request.id}.mp4"


def _remove_torn(out: Path) -> None:
    """Removes what killed workers left of videos that they were writing."""
    for torn in out.glob(".*.mp4.*.tmp"):  # as write_video calls its unfinished files
        torn.unlink()


def _done(request: Request, seconds: float | None = None) -> Result:
    return Result(request.id, "done", path=f"{request.id}.mp4", seconds=seconds)


def _claim(out: Path, wanted: list[Request], digest: str) -> None:
    """Notes what is asked for; refuses it if a finished video answers something else.

    Requests that are not finished may be changed, and others added or left out.
    """
    asked_before = out / ".asked.jsonl"
    known = {row["id"]: row for row in _read_rows(asked_before)}
    asked = {request.id: dataclasses.asdict(request) | {"pipeline": digest} for request in wanted}
    foreign = [f"{id}.mp4" for id in asked if id not in known] + ["results.jsonl"] * (not asked_before.exists())
    for name in foreign:
        require(not (out / name).exists(), f"{name} in out", str(out / name), "none that no job of this folder made")
    for request in wanted:
        if _video(out, request).exists():
            before, now = known[request.id], asked[request.id]
            for name in now:
                if now[name] != before.get(name):
                    raise ValueError(
                        f"{name} of request {request.id!r} is {now[name]!r}, allowed: {before.get(name)!r}, with which "
                        f"{_video(out, request)} was made; remove that file, or use another id or out folder"
                    )
    others = [row for id, row in known.items() if id not in asked and (out / f"{id}.mp4").exists()]
    _write_rows(asked_before, [*asked.values(), *others])


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    # What follows the last newline is nothing, or a row that a killed job left unfinished.
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# --- The pipeline's folder ----------------------------------------------------------------------------------------


def _digest(folder: Path) -> str:
    """SHA-256 of all that makes the pipeline: a training run exports to the same place again, with other weights."""
    digest = hashlib.sha256()
    files = [f for name in component_names(folder) for f in (folder / name).rglob("*") if f.is_file()]
    for path in [folder / "model_index.json", *sorted(files)]:
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


# --- Work ---------------------------------------------------------------------------------------------------------


class _Worker:
    """What an actor is: a process with the pipeline in it."""

    def __init__(self, pipeline: Path, out: Path, device: str) -> None:
        self.pipeline = STGenPipeline.from_pretrained(pipeline).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.out = out

    def ready(self) -> None:
        """Returns as soon as the worker has started."""

    def run(self, request: Request) -> Result:
        path = _video(self.out, request)
        if path.exists():  # a worker before this one died between finishing it and saying so
            return _done(request)
        start = time.perf_counter()
        write_video(path, generate(self.pipeline, request), request.fps)
        return _done(request, seconds=round(time.perf_counter() - start, 3))
