"""Files that outlive a kill and a power cut: written aside, synced, renamed, by the one process that may."""

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Returns when what `path`, a file or the list of a folder, holds is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written: synced and renamed to it at the end of the block, removed if the block
    fails. Whoever reads `path`, whenever, finds the old file or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_durably(path: Path, text: str) -> None:
    """`replacing`, for a text."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@contextmanager
def only_job(folder: Path, argument: str = "out") -> Iterator[None]:
    """Refuses a second process that works in the same folder; the lock ends with this process, however it ends, and its
    children have no part in it. A file system without locks is warned about.

    Args:
        argument: what the user calls the folder.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            allowed = "a folder that no other job is writing to"
            raise ValueError(f"{argument} is {str(folder)!r}, allowed: {allowed}") from error
        except OSError as error:
            warnings.warn(f"{folder} cannot be locked ({error}): see that no other job writes to it", stacklevel=3)
        yield
