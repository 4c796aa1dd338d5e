"""Files become parts: what workers do, each one file at a time, in any order.

The part of file i is its encoded clips, one behind the other, and a record `{clips, dropped, summary}` of what became of
its frames. The record is written last, so a part with one is whole, and what a killed run left is begun again.
"""

import json
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from stgen.data.clips import Clip, Drop, ShardSettings, cut_file
from stgen.data.listing import VideoFile
from stgen.durable import replacing


def record_path(parts: Path, i: int) -> Path:
    """The record of file i, JSON."""
    return parts / f"{i:08d}.json"


def data_path(parts: Path, i: int) -> Path:
    """The clips of file i."""
    return parts / f"{i:08d}.bin"


def write_parts(
    parts: Path, files: list[VideoFile], settings: ShardSettings, todo: list[int], workers: int
) -> Iterator[int]:
    """Writes the parts of the files `todo`, and yields each as it becomes ready."""
    if workers == 1:
        for i in todo:
            yield _write_part(parts, i, files[i], settings)
        return
    waiting, running = deque(todo), dict[Future[int], int]()
    while True:
        with _pool(workers) as pool:
            try:
                while True:
                    # More than there are workers, so that none waits for this process.
                    while waiting and len(running) < 2 * workers:
                        i = waiting[0]
                        running[pool.submit(_write_part, parts, i, files[i], settings)] = i
                        waiting.popleft()
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield future.result()
                        del running[future]
            except BrokenProcessPool:
                suspects, running = sorted(running.values()), {}
        # A worker died, and one of these files may be why. Each alone: the one that kills its worker again is dropped.
        for i in suspects:
            if not record_path(parts, i).exists():
                _write_part_alone(parts, i, files[i], settings)
            yield i


def _write_part(parts: Path, i: int, file: VideoFile, settings: ShardSettings) -> int:
    record: dict[str, Any] = {"clips": [], "dropped": [], "summary": None}
    with replacing(data_path(parts, i)) as temporary, temporary.open("wb") as data:
        for part in cut_file(file, settings):
            if isinstance(part, Clip):
                row = {name: value for name, value in vars(part).items() if name != "data"}
                record["clips"].append(row | {"offset": data.tell(), "size": len(part.data)})
                data.write(part.data)
            elif isinstance(part, Drop):
                record["dropped"].append(vars(part))
            else:
                record["summary"] = vars(part)
    _write_record(parts, i, record)
    return i


def _write_record(parts: Path, i: int, record: dict[str, Any]) -> None:
    with replacing(record_path(parts, i)) as temporary:
        temporary.write_text(json.dumps(record))


def _write_part_alone(parts: Path, i: int, file: VideoFile, settings: ShardSettings) -> None:
    with _pool(1) as pool:
        try:
            pool.submit(_write_part, parts, i, file, settings).result()
        except BrokenProcessPool:
            drop = Drop("killed its worker", (0, None), "the process that decoded it died twice")
            data_path(parts, i).touch()
            _write_record(parts, i, {"clips": [], "dropped": [vars(drop)], "summary": None})


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not fork: decoders and torch have threads.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_die_with_parent)


def _die_with_parent() -> None:
    """A worker whose parent is killed would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
