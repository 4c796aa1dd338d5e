"""Where shards lie: a local folder, a web server, a store of objects (s3, gs, hf, ... through fsspec), or a command's output.

A source gives the bytes [offset, offset + size) of a file below its folder, since the order of clips jumps from anywhere to
anywhere. What can only be read from its beginning (`pipe:`, a web server without Range) is fetched whole, once, into a
local cache of bounded size, and read there.

Two kinds of failure are kept apart. A file that is not there, or ends early, is damaged data: `FileNotFoundError` and fewer
bytes than asked for, which whoever trains counts and passes over. Everything else says nothing about the data (network,
rights, disk): it is tried again after growing pauses, and then a `SourceError` stops the run.
"""

import fcntl
import hashlib
import http.client
import os
import shlex
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

import fsspec

from stgen.config import require

RETRY_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between the attempts at something that fails for no fault of the data."""
TIMEOUT = 60.0
"""Seconds of silence after which a web server counts as failing."""
GIB = 2**30
_GAP = 2**16  # bytes

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
ResultT = TypeVar("ResultT")


class SourceError(ValueError):
    """A source cannot be reached, or does not do what is asked of it; the data may well be whole."""


class _Refused(Exception):
    """A failure that another attempt would not change."""


def check_name(name: str) -> str:
    """The name of a file below a folder, as an index has it.

    Raises:
        ValueError: it leads out of the folder, or is no relative path at all. An index may come from anywhere, so its names
            are never taken for commands, URLs or other places of the disk.
    """
    inside = isinstance(name, str) and name != "" and not name.startswith(("/", "pipe:"))
    inside = inside and not any(part in name for part in ("\\", "://", "\0", "\n"))
    inside = inside and ".." not in PurePosixPath(name).parts
    require(inside, "shard", name, "a path relative to the folder of the index, without '..'; no URL and no command")
    return name


class Source(ABC):
    """Files below one folder, by their names relative to it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def read(self, name: str, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size) of a file, or those of them that it has. Raises as `read_parts`."""
        return self.read_parts(name, [(offset, size)])[0]

    def read_parts(self, name: str, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes [offset, offset + size) of a file for each of several (offset, size), or those of them that it has.

        Raises:
            FileNotFoundError: there is no such file.
            SourceError: it could not be read, for a reason that is not the data's.
        """
        for part in parts:
            require(min(part) >= 0, f"part of shard {name}", part, "an offset and a size, 0 or more")
        return self._insist(name, lambda: self._read_parts(check_name(name), parts))

    def _read_parts(self, name: str, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        """In as few requests as it takes: what lies between two parts is read too, if it is less than a request costs."""
        runs: list[tuple[int, int]] = []
        for offset, size in sorted(parts):
            if runs and offset <= runs[-1][1] + _GAP:
                runs[-1] = runs[-1][0], max(runs[-1][1], offset + size)
            else:
                runs.append((offset, offset + size))
        found = {begin: self._read(name, begin, end - begin) for begin, end in runs}
        begins = [max(begin for begin in found if begin <= offset) for offset, _ in parts]
        return [found[b][offset - b : offset - b + size] for b, (offset, size) in zip(begins, parts, strict=True)]

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where only reading it would tell. Raises as `read`."""
        return self._insist(name, lambda: self._size(check_name(name)))

    def fetch(self, name: str, target: Path) -> None:
        """Copies a file to `target`, which is torn if this raises. Raises as `read`."""
        self._insist(name, lambda: self._fetch(check_name(name), target))

    def check_random_access(self, name: str) -> None:
        """Raises `SourceError` if parts of files cannot be read; `name` is one to try it with, which may be missing."""
        with suppress(FileNotFoundError):
            self.read(name, 0, 1)

    def shards(self) -> list[str]:
        """The names of all tars, at any depth.

        Raises:
            SourceError: this source cannot list its files.
        """
        listed = "a local folder, s3://, gs:// or hf://; index a local copy, and name its folder with data.index"
        raise SourceError(f"shards is {self.url!r}, allowed: a folder whose files can be listed: {listed}")

    @abstractmethod
    def _read(self, name: str, offset: int, size: int) -> bytes: ...

    @abstractmethod
    def _size(self, name: str) -> int | None: ...

    @abstractmethod
    def _fetch(self, name: str, target: Path) -> None: ...

    def _insist(self, name: str, attempt: Callable[[], ResultT]) -> ResultT:
        for pause in (*RETRY_PAUSES, None):
            try:
                return attempt()
            except (FileNotFoundError, ValueError):
                raise
            except (_Refused, PermissionError) as error:
                raise SourceError(f"{self.url}: {name}: {error}") from error
            # Each store's library has exceptions of its own, most of them below Exception alone.
            except Exception as error:
                if pause is None:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    times = f"{len(RETRY_PAUSES) + 1} attempts"
                    raise SourceError(f"{self.url}: {name} cannot be read after {times}: {reason}") from error
                time.sleep(pause)
        raise AssertionError


def files_below(folder: Path) -> Iterator[Path]:
    """All files at any depth, also behind links to folders, of which each folder is entered once."""
    entered = {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        targets = {os.path.realpath(os.path.join(root, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for target, name in targets.items() if target not in entered)
        entered |= targets.keys()
        yield from (Path(root) / name for name in names)


class LocalFolder(Source):
    """A folder of this machine, or of a network file system."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.folder = Path(url)

    def _read_parts(self, name: str, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        with (self.folder / name).open("rb", buffering=0) as file:
            return [os.pread(file.fileno(), size, offset) for offset, size in parts]

    def _read(self, name: str, offset: int, size: int) -> bytes:
        return self._read_parts(name, [(offset, size)])[0]

    def _size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def _fetch(self, name: str, target: Path) -> None:
        shutil.copyfile(self.folder / name, target)

    def shards(self) -> list[str]:
        tars = (path for path in files_below(self.folder) if path.suffix == ".tar")
        return sorted(path.relative_to(self.folder).as_posix() for path in tars)


class WebFolder(Source):
    """A folder of an http(s) server. Parts are read by Range requests, where the server knows them."""

    def _url(self, name: str) -> str:
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))

    @contextmanager
    def _open(self, name: str, method: str = "GET", **headers: str) -> Iterator[http.client.HTTPResponse]:
        try:
            with urlopen(Request(self._url(name), method=method, headers=headers), timeout=TIMEOUT) as response:
                yield response
        except HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(name) from error
            if error.code < 500 and error.code not in (408, 416, 429):
                raise _Refused(f"HTTP status {error.code}, {error.reason}") from error
            raise

    def _read(self, name: str, offset: int, size: int) -> bytes:
        if size == 0:
            return b""
        try:
            with self._open(name, Range=f"bytes={offset}-{offset + size - 1}") as response:
                if response.status != 206:
                    raise _Refused("the server ignores Range; set data.cache to a folder, to fetch shards whole")
                return response.read()
        except HTTPError as error:
            if error.code == 416:  # the file ends before the offset
                return b""
            raise

    def _size(self, name: str) -> int | None:
        with self._open(name, "HEAD") as response:
            return int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None

    def _fetch(self, name: str, target: Path) -> None:
        with self._open(name) as response, target.open("wb") as file:
            shutil.copyfileobj(response, file, 2**20)
            length = response.headers["Content-Length"]
            if length is not None and file.tell() != int(length):
                raise ConnectionError(f"{file.tell()} of {length} bytes came")


class FilesystemFolder(Source):
    """A folder of any filesystem that fsspec knows: s3://, gs://, hf://, ..."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._opened: tuple[int, Any, str] | None = None
        self._filesystem()

    def _filesystem(self) -> tuple[Any, str]:
        # One of each process: fsspec's asynchronous filesystems do not outlive a fork.
        if self._opened is None or self._opened[0] != os.getpid():
            protocol = self.url.partition("://")[0]
            try:
                self._opened = (os.getpid(), *fsspec.core.url_to_fs(self.url))
            except ImportError as error:
                package = _PACKAGES.get(protocol)
                hint = f"pip install {package}" if package else str(error)
                raise SourceError(f"{self.url}: {protocol}:// needs a package: {hint}") from error
            except ValueError as error:
                raise SourceError(
                    f"{self.url} is no folder, http(s)://, s3://, gs://, hf:// or pipe: {error}"
                ) from error
        return self._opened[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _path(self, name: str) -> tuple[Any, str]:
        filesystem, root = self._filesystem()
        return filesystem, f"{root.rstrip('/')}/{name}"

    def _read(self, name: str, offset: int, size: int) -> bytes:
        filesystem, path = self._path(name)
        try:
            return filesystem.cat_file(path, start=offset, end=offset + size)
        except FileNotFoundError:
            raise
        except Exception:
            if filesystem.size(path) <= offset:  # which some filesystems answer with nothing, and others with an error
                return b""
            raise

    def _size(self, name: str) -> int | None:
        filesystem, path = self._path(name)
        return filesystem.size(path)

    def _fetch(self, name: str, target: Path) -> None:
        filesystem, path = self._path(name)
        filesystem.get_file(path, str(target))

    def shards(self) -> list[str]:
        filesystem, root = self._filesystem()
        found = self._insist("its list of files", lambda: filesystem.find(root))
        return sorted(path.removeprefix(root).lstrip("/") for path in found if path.endswith(".tar"))


class Pipe(Source):
    """`pipe:COMMAND`: a shell command that writes a file to its output, `{}` in it standing for the file's name.

    The command is the user's own, from a configuration or a command line. What stands for `{}` is checked and quoted. An
    exit status does not tell a file that is missing from a network that is down, so neither counts as damaged data.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.command = url.removeprefix("pipe:")
        require("{}" in self.command, "data.path", url, "pipe:COMMAND with {} for the name of a file")

    def _fetch(self, name: str, target: Path) -> None:
        command = self.command.replace("{}", shlex.quote(name))
        with target.open("wb") as file:
            done = subprocess.run(["bash", "-o", "pipefail", "-c", command], stdout=file, stderr=subprocess.PIPE)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise ConnectionError(f"exit status {done.returncode}" + (f": {said[-1]}" if said else ""))

    def _read(self, name: str, offset: int, size: int) -> bytes:
        raise _Refused("a pipe cannot seek; set data.cache to a folder, to fetch shards whole")

    def _size(self, name: str) -> None:
        return None


class Cached(Source):
    """A source whose files are fetched whole into a local folder, and read there.

    Any number of processes may share the folder: a file is fetched by one of them while the others wait, gets its name when
    it is whole, and when the folder holds more than `limit` bytes the files longest not read go first, those of other
    sources included.

    Args:
        limit: bytes that the folder may hold.
    """

    def __init__(self, source: Source, folder: str | Path, limit: int) -> None:
        super().__init__(source.url)
        self.source, self.root, self.limit = source, Path(folder), limit
        # What lies at another place must not be taken for it.
        self.folder = self.root / f"stgen-{hashlib.sha256(source.url.encode()).hexdigest()[:16]}"

    def _read_parts(self, name: str, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        file: BinaryIO
        try:
            file = (self.folder / name).open("rb")
        except FileNotFoundError:
            file = self._whole(name)
        with file:
            os.utime(file.fileno())  # the least recently used goes first
            return [os.pread(file.fileno(), size, offset) for offset, size in parts]

    def _read(self, name: str, offset: int, size: int) -> bytes:
        return self._read_parts(name, [(offset, size)])[0]

    def _size(self, name: str) -> int | None:
        with suppress(FileNotFoundError):
            return (self.folder / name).stat().st_size
        return self.source.size(name)

    def _fetch(self, name: str, target: Path) -> None:
        with self._whole(name) as file, target.open("wb") as copy:
            shutil.copyfileobj(file, copy)

    def shards(self) -> list[str]:
        return self.source.shards()

    def _whole(self, name: str) -> BinaryIO:
        """The file, open, so that nobody who makes room takes it away before it is read."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(f"{self.folder.name}/{name}"):
            # Another process may have been faster; and yet another may take the file away before it is open.
            with suppress(FileNotFoundError):
                return path.open("rb")
            size = self.source.size(name)
            self._fits(name, size or 0)
            self._make_room(size or 0)
            partial = path.with_name(f".{path.name}.partial")
            try:
                self.source.fetch(name, partial)
                found = partial.stat().st_size
                if size is not None and found != size:
                    raise ConnectionError(f"{found} of {size} bytes came")
                self._fits(name, found)
                file = partial.open("rb")
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)
        self._make_room(0, keep=path)
        return file

    def _fits(self, name: str, size: int) -> None:
        gib = f"{size / GIB:.3g} or more, the size of {name}"
        require(size <= self.limit, "data.cache_gib", round(self.limit / GIB, 3), gib)

    def _make_room(self, size: int, keep: Path | None = None) -> None:
        with self._lock("room"):
            files = []
            # Whatever else somebody keeps in that folder is not ours to delete.
            for path in self.root.glob(f"stgen-{'[0-9a-f]' * 16}/**/*"):
                try:
                    if path.is_file():
                        files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
                except FileNotFoundError:  # renamed meanwhile
                    continue
            held = sum(length for _, length, _ in files) + size
            for _, length, path in sorted(files):
                if held <= self.limit:
                    break
                if path != keep and not path.name.endswith(".partial"):
                    path.unlink(missing_ok=True)
                    held -= length

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        path = self.root / ".locks" / hashlib.sha256(name.encode()).hexdigest()[:16]
        path.parent.mkdir(parents=True, exist_ok=True)
        # The kernel frees it when its process dies.
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def open_source(url: str, cache: str | None = None, cache_gib: float = 0.0) -> Source:
    """The source that a path or URL names; with `cache`, a folder, its files are fetched whole.

    Raises:
        SourceError: the scheme is unknown, or needs a package that is not installed.
        ValueError: a local folder that does not exist.
    """
    if url.startswith("pipe:"):
        source: Source = Pipe(url)
    elif url.startswith(("http://", "https://")):
        source = WebFolder(url)
    elif "://" in url:
        source = FilesystemFolder(url)
    else:
        require(Path(url).is_dir(), "data", url, "a folder of shards (write one with `stgen data`)")
        return LocalFolder(url)
    return source if cache is None else Cached(source, cache, int(cache_gib * GIB))
