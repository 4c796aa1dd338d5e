"""Files that outlive a kill and a power cut: written aside, synced, renamed."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Returns when what `path`, a file or the list of a folder, holds is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replaces the file in one step: whoever reads it, whenever, finds the old text or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)
