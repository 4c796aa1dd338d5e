"""Shards from everywhere, and damaged ones: the clips at the positions stay the same, and nothing is lost in silence."""

import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stgen.cli import main
from stgen.data import sources
from stgen.data.color import to_rgb
from stgen.data.reading import ClipDataset, ClipOrder, DamageLog, DataConfig, clip_loader
from stgen.data.shards import COLUMNS, INDEX, SKIPPED, Damage, Index, ShardWriter, open_index, write_index
from stgen.data.sources import Cached, LocalFolder, SourceError, check_name, files_below, open_source
from stgen.video import encode_video

CLIPS, PER_SHARD, SHAPE = 12, 4, (2, 8, 8)


def npy(frames: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, frames)
    return buffer.getvalue()


def write_clips(folder: Path) -> Path:
    with ShardWriter(folder, PER_SHARD) as writer:
        for i in range(CLIPS):
            frames = np.random.default_rng(i).integers(256, size=(*SHAPE, 3), dtype=np.uint8)
            clip = dict(zip(("num_frames", "height", "width"), SHAPE, strict=True))
            files = {"npy": npy(frames)} if i % 2 else {"mp4": encode_video(frames, 8)}
            writer.write(f"clip{i}", {**clip, "caption": f"number {i}", "fps": 8.0, "source": "noise"}, **files)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of four clips. Read only."""
    return write_clips(tmp_path_factory.mktemp("sources") / "clips")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "RETRY_PAUSES", (0.01, 0.01, 0.01))


def config(path: Path | str, **settings) -> DataConfig:
    return DataConfig(str(path), *SHAPE, **settings)


Clips = list[tuple[int, str, torch.Tensor]]


def take(
    data: DataConfig | ClipDataset, first: int = 0, last: int = 36, batch: int = 2, world: int = 1, workers: int = 0
):
    """(position, caption, pixels) of the positions [first, last), as all ranks get them; and what was passed over."""
    dataset = data if isinstance(data, ClipDataset) else ClipDataset(data, seed=5)
    loaders = [clip_loader(dataset, first, batch, workers, rank, world) for rank in range(world)]
    clips: Clips = []
    damaged: list[Damage] = []
    while len(clips) < last - first:
        for loader in loaders:
            taken = next(loader)
            clips += zip(taken["position"], taken["caption"], to_rgb(taken["video"]), strict=True)
            damaged += taken["damaged"]
    return clips, damaged


def assert_same(a: Clips, b: Clips) -> None:
    assert [clip[:2] for clip in a] == [clip[:2] for clip in b]
    assert all(torch.equal(x, y) for (_, _, x), (_, _, y) in zip(a, b, strict=True))


def stgen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["stgen", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), capsys.readouterr().err


# --- Sources ------------------------------------------------------------------------------------------------------


class Server:
    """A web server of a folder, with or without Range; `status(path, number of the request)` makes it fail at times."""

    def __init__(self, folder: Path, ranges: bool) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.status: Callable[[str, int], int] = lambda path, number: 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.partition("?")[0].removeprefix("/data/")
                outer.requests[self.command, name] += 1
                status = outer.status(name, outer.requests[self.command, name])
                path = folder / name
                if status != 200 or not path.is_file():
                    self.send_error(status if status != 200 else 404)
                    return
                data, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if ranges and asked:
                    first, last = int(asked[1]), int(asked[2])
                    if first >= len(data):
                        self.send_error(416)
                        return
                    data = data[first : last + 1]
                self.send_response(206 if ranges and asked else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/data"


@contextmanager
def serving(folder: Path, ranges: bool = True) -> Iterator[Server]:
    server = Server(folder, ranges)
    thread = threading.Thread(target=server.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()
        thread.join()


def into_memory(folder: Path, name: str) -> str:
    """The files of a folder in fsspec's store of objects in memory."""
    for path in folder.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/{name}/{path.name}", path.read_bytes())
    return f"memory://{name}"


@pytest.mark.parametrize("workers", [0, 2])
def test_every_source_gives_the_same_clips(folder: Path, tmp_path: Path, workers: int) -> None:
    expected, _ = take(config(folder))
    cache = str(tmp_path / "cache")
    with serving(folder) as ranges, serving(folder, ranges=False) as plain:
        for data in (
            config(ranges.url),
            config(ranges.url + "/?token=1"),
            config(plain.url, cache=cache),
            config(plain.url, cache=cache, index=str(folder)),
            config(f"file://{folder}"),
            config(into_memory(folder, "clips")),
            config(into_memory(folder, "clips"), cache=cache),
            config(f"pipe:cat {folder}/{{}}", cache=cache),
            config(f"pipe:gzip -c {folder}/{{}} | gunzip", cache=cache, index=str(folder)),
        ):
            found, damaged = take(data, workers=workers)
            assert_same(found, expected)
            assert not damaged
        # A clip of two files is one request; whole shards are fetched once, whoever asks.
        assert sum(n for (command, name), n in ranges.requests.items() if name.endswith(".tar")) <= 2 * (
            36 + 8 * workers + 1
        )
        assert {n for (command, name), n in plain.requests.items() if (command, name[-4:]) == ("GET", ".tar")} == {1}


def test_sources_that_cannot_seek_are_refused_without_a_cache(folder: Path) -> None:
    with serving(folder, ranges=False) as server, pytest.raises(SourceError, match="ignores Range; set data.cache"):
        ClipDataset(config(server.url))
    with pytest.raises(SourceError, match="a pipe cannot seek; set data.cache"):
        ClipDataset(config(f"pipe:cat {folder}/{{}}"))
    with pytest.raises(ValueError, match=r"data.path is 'pipe:cat a.tar', allowed: pipe:COMMAND with \{\}"):
        ClipDataset(config("pipe:cat a.tar"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/clips", "pip install s3fs"),
        ("gs://bucket/clips", "pip install gcsfs"),
        ("nonsense://a", "is no folder, http"),
        ("/nowhere", "a folder of shards"),
    ],
)
def test_sources_that_cannot_be_opened_are_one_line(url: str, message: str) -> None:
    package = re.search(r"pip install (\w+)", message)
    if package:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(__import__("sys").modules, package[1], None)  # as where it is not installed
            with pytest.raises(SourceError, match=message) as error:
                ClipDataset(config(url))
    else:
        with pytest.raises(ValueError, match=message) as error:
            ClipDataset(config(url))
    assert "\n" not in str(error.value)


def test_what_an_interrupted_writer_left_is_written_anew(tmp_path: Path) -> None:
    clip = {"caption": "", "fps": 8.0, "num_frames": 1, "height": 8, "width": 8, "source": "noise"}

    def write(clips: int) -> None:
        with ShardWriter(tmp_path, clips_per_shard=1) as writer:
            for i in range(clips):
                writer.write(str(i), clip, npy=npy(np.zeros((1, 8, 8, 3), np.uint8)))
            if clips == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(3)
    with pytest.raises(ValueError, match="half written: the same `stgen data` command again writes it anew"):
        write_index(tmp_path)
    write(1)
    assert [path.name for path in tmp_path.glob("*.tar")] == ["shard-000000.tar"]
    assert write_index(tmp_path) == []
    (tmp_path / INDEX).unlink()
    with pytest.raises(ValueError, match=r"out is .*, allowed: a folder without shards; shard-000000.tar is there"):
        write(1)


def test_files_behind_links_are_found_once(tmp_path: Path) -> None:
    for name in ("data/deep/a.tar", "data/b.tar", "disk/c.tar", "disk/deep/d.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "data" / "mounted").symlink_to(tmp_path / "disk")
    (tmp_path / "data" / "mounted twice").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "round").symlink_to(tmp_path / "data")
    found = sorted(path.relative_to(tmp_path / "data").as_posix() for path in files_below(tmp_path / "data"))
    assert found == ["b.tar", "deep/a.tar", "mounted/c.tar", "mounted/deep/d.tar"]


def test_hugging_face_folders_are_known() -> None:
    assert type(open_source("hf://datasets/someone/clips")._filesystem()[0]).__name__ == "HfFileSystem"


def test_a_network_that_is_down_is_no_damage(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures pass, or they stop the run in one line; they never make other clips stand in."""
    expected, _ = take(config(folder))
    with serving(folder) as server:
        server.status = lambda name, number: 503 if number % 3 else 200
        found, damaged = take(config(server.url))
        assert_same(found, expected)
        assert not damaged
        server.status = lambda name, number: 403 if name.endswith("1.tar") else 200
        with pytest.raises(SourceError, match=r"shard-000001.tar: HTTP status 403"):
            take(config(server.url))
        for workers in (0, 2):
            server.status = lambda name, number: 200
            dataset = ClipDataset(config(server.url), seed=5)
            server.status = lambda name, number: 503
            with pytest.raises(
                SourceError, match=r"shard-00000\d.tar cannot be read after 4 attempts: .* 503"
            ) as error:
                take(dataset, workers=workers)
            assert "\n" not in str(error.value)
    monkeypatch.setattr(sources, "TIMEOUT", 0.2)
    with pytest.raises(SourceError, match=r"index.jsonl cannot be read after 4 attempts: .*(refused|timed out)"):
        take(config(server.url))  # nobody is there any more
    with pytest.raises(SourceError, match=r"exit status 1: cat: /nowhere/index.jsonl"):
        ClipDataset(config("pipe:cat /nowhere/{}", cache=str(tmp_path)))


def test_names_in_an_index_stay_in_its_folder(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / INDEX).read_text().splitlines()]
    for name in (
        "../a.tar",
        "/a.tar",
        "a/../../b.tar",
        "pipe:touch x",
        "http://a/b.tar",
        "s3://a/b.tar",
        "..\\a",
        "",
        3,
    ):
        with pytest.raises(ValueError, match="shard is .*, allowed: a path relative"):
            check_name(name)  # type: ignore[arg-type]
        (tmp_path / INDEX).write_text(json.dumps(rows[0]) + "\n" + json.dumps({**rows[1], "shard": name}) + "\n")
        with pytest.raises(ValueError, match="line 2.* allowed: a path relative"):
            ClipDataset(config(folder, index=str(tmp_path)))
        with pytest.raises(ValueError, match="allowed: a path relative"):
            LocalFolder(str(folder)).read(name, 0, 1)  # type: ignore[arg-type]
    assert check_name("a folder/b:1..2.tar") == "a folder/b:1..2.tar"


def test_a_name_is_quoted_for_the_shell(tmp_path: Path) -> None:
    (tmp_path / "a; touch b.tar").write_bytes(b"content")
    source = open_source(f"pipe:cat {tmp_path}/{{}}", str(tmp_path / "cache"), 1)
    assert source.read("a; touch b.tar", 0, 100) == b"content"
    assert not list(tmp_path.glob("**/b.tar"))


# --- The cache ----------------------------------------------------------------------------------------------------


class Counting(LocalFolder):
    """Notes what is fetched, in a file, since several processes do it."""

    def _fetch(self, name: str, target: Path) -> None:
        with (self.folder.parent / "fetched").open("a") as log:
            log.write(name + "\n")
        super()._fetch(name, target)
        time.sleep(0.02)

    @property
    def fetched(self) -> list[str]:
        return (self.folder.parent / "fetched").read_text().split()


@pytest.fixture
def numbers(tmp_path: Path) -> Counting:
    """Eight files of 1,000 bytes."""
    (tmp_path / "files").mkdir()
    for i in range(8):
        (tmp_path / "files" / f"{i}.tar").write_bytes(bytes([i]) * 1000)
    return Counting(str(tmp_path / "files"))


def cached_files(cache: Cached) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir())


def test_the_least_recently_used_files_leave_the_cache(numbers: Counting, tmp_path: Path) -> None:
    cache = Cached(numbers, tmp_path / "cache", 3000)
    for i in (0, 1, 2, 0, 3, 0, 4):
        assert cache.read(f"{i}.tar", 990, 100) == bytes([i]) * 10
        time.sleep(0.002)
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 3000
    assert cached_files(cache) == ["0.tar", "3.tar", "4.tar"]
    assert numbers.fetched == [f"{i}.tar" for i in (0, 1, 2, 3, 4)]
    # Another source shares the limit, and never takes the first one's files for its own.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0.tar").write_bytes(b"x" * 1000)
    assert Cached(LocalFolder(str(tmp_path / "other")), tmp_path / "cache", 3000).read("0.tar", 0, 1) == b"x"
    assert len(cached_files(cache)) == 2
    with pytest.raises(ValueError, match="data.cache_gib is .*, the size of 0.tar"):
        Cached(numbers, tmp_path / "small", 999).read("0.tar", 0, 1)
    with pytest.raises(FileNotFoundError):
        cache.read("none.tar", 0, 1)


def test_a_cache_leaves_alone_what_others_keep_in_its_folder(numbers: Counting, tmp_path: Path) -> None:
    mine = tmp_path / "cache" / "videos" / "mine.mp4"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"x" * 5000)
    os.utime(mine, (0, 0))
    cache = Cached(numbers, tmp_path / "cache", 3000)
    for i in range(5):
        cache.read(f"{i}.tar", 0, 1)
    assert mine.stat().st_size == 5000
    assert cached_files(cache) == ["2.tar", "3.tar", "4.tar"]


def test_a_cache_that_holds_too_little_is_warned_of(folder: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    data = config(f"pipe:cat {folder}/{{}}", cache=str(tmp_path), cache_gib=size / 2 / 2**30)
    with pytest.warns(UserWarning, match="holds not all of the .* GiB of pipe:cat"):
        dataset = ClipDataset(data, seed=5)
    assert_same(take(dataset)[0], take(config(folder))[0])


def _read_all(cache: Cached, seed: int, failed: "multiprocessing.Queue[str]") -> None:
    try:
        for i in np.random.default_rng(seed).integers(8, size=60):
            assert cache.read(f"{i}.tar", 500, 1000) == bytes([i]) * 500
    except BaseException as error:
        failed.put(repr(error))


@pytest.mark.parametrize("limit", [8000, 2500])
def test_processes_share_a_cache(numbers: Counting, tmp_path: Path, limit: int) -> None:
    """Each file is fetched by one of them; where not all fit, none loses a file between finding and reading it."""
    cache = Cached(numbers, tmp_path / "cache", limit)
    context = multiprocessing.get_context("fork")
    failed = context.Queue()
    processes = [context.Process(target=_read_all, args=(cache, seed, failed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert failed.empty(), failed.get()
    assert [process.exitcode for process in processes] == [0] * 4
    if limit == 8000:
        assert sorted(numbers.fetched) == [f"{i}.tar" for i in range(8)]
    assert all(path.stat().st_size == 1000 for path in cache.folder.glob("[0-9].tar"))
    assert not list(cache.folder.glob("*.partial"))


def test_a_torn_download_is_fetched_again_and_never_found(numbers: Counting, tmp_path: Path) -> None:
    torn = [True, True]

    class Torn(Counting):
        def _fetch(self, name: str, target: Path) -> None:
            super()._fetch(name, target)
            if torn.pop():
                os.truncate(target, 400)

    cache = Cached(Torn(numbers.url), tmp_path / "cache", 3000)
    (cache.folder).mkdir(parents=True)
    (cache.folder / ".5.tar.partial").write_bytes(b"of a process that was killed")
    torn.insert(0, False)
    assert cache.read("5.tar", 990, 100) == bytes([5]) * 10
    assert not torn
    assert cached_files(cache) == ["5.tar"]
    torn += [True] * 9
    with pytest.raises(SourceError, match=r"6.tar cannot be read after 4 attempts: 400 of 1000 bytes came"):
        cache.read("6.tar", 0, 1)
    assert cached_files(cache) == ["5.tar"]


# --- Damage -------------------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Writes a tar anew, its members changed or, at None, left out."""
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            if (new := change(name, data)) is not None:
                info = tarfile.TarInfo(name)
                info.size = len(new)
                tar.addfile(info, io.BytesIO(new))


def truncate(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    rows = [json.loads(line) for line in (folder / INDEX).read_text().splitlines()]
    os.truncate(path, rows[6]["files"]["mp4"][0] + 100)  # in the third clip of this shard


def overwrite(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def spoil(folder: Path) -> None:
    """Random bytes in the place of one clip."""
    row = json.loads((folder / INDEX).read_text().splitlines()[4])
    with (folder / "shard-000001.tar").open("rb+") as file:
        file.seek(row["files"]["mp4"][0])
        file.write(np.random.default_rng(0).bytes(row["files"]["mp4"][1]))


def drop_key(folder: Path) -> None:
    lines = (folder / INDEX).read_text().splitlines()
    row = json.loads(lines[5])
    del row["files"]["npy"]
    (folder / INDEX).write_text("\n".join([*lines[:5], json.dumps(row), *lines[6:]]) + "\n")


def swap(folder: Path) -> None:
    """Another shard under the name that the index has."""
    shutil.copy(folder / "shard-000002.tar", folder / "shard-000001.tar")


def remove(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()


DAMAGE = {
    truncate: ({6, 7}, "truncated"),
    overwrite: ({4, 5, 6, 7}, "index mismatch"),
    spoil: ({4}, "undecodable"),
    drop_key: ({5}, "incomplete"),
    swap: ({4, 5, 6, 7}, "index mismatch"),
    remove: ({4, 5, 6, 7}, "missing shard"),
}


@pytest.mark.parametrize("damage", list(DAMAGE), ids=lambda damage: damage.__name__)
def test_damaged_clips_are_passed_over_alike_by_everyone(copy: Path, damage: Callable[[Path], None]) -> None:
    whole, _ = take(config(copy))
    damage(copy)
    lost, reason = DAMAGE[damage]
    found, damaged = take(config(copy, max_damaged=0.5))
    captions = {f"number {i}" for i in lost}
    for (_, was, _), (_, now, _) in zip(whole, found, strict=True):
        assert now == was if was not in captions else now not in captions
    assert {(d.shard, d.key, d.reason.partition(":")[0]) for d in damaged} == {
        ("shard-000001.tar", f"clip{i}", reason) for i in lost
    }
    # Whoever reads, from wherever, and on however many ranks and workers, gets the same.
    for options in ({"workers": 2}, {"world": 3}, {"batch": 3, "world": 2, "workers": 1}):
        again, _ = take(config(copy, max_damaged=0.5), **options)
        assert_same(again, found)
    for first in (1, 17):
        resumed, _ = take(config(copy, max_damaged=0.5), first=first, last=first + 12)
        assert_same(resumed, found[first : first + 12])
    with serving(copy) as server:
        assert_same(take(config(server.url, max_damaged=0.5))[0], found)
    assert_same(take(config(into_memory(copy, damage.__name__), max_damaged=0.5))[0], found)


@pytest.mark.parametrize("seed", range(16))
def test_bytes_that_changed_anywhere_are_no_other_error(copy: Path, seed: int) -> None:
    """Headers, json, clips and padding alike; whoever reads, sees the same."""
    random = np.random.default_rng(seed)
    for path in copy.glob("*.tar"):
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        data[random.integers(len(data), size=5)] = random.integers(256, size=5)
        path.write_bytes(data.tobytes())
    data = config(copy, max_damaged=1.0)
    found, damaged = take(data, last=CLIPS)
    assert_same(take(data, last=CLIPS, batch=1, world=3)[0], found)
    lost = {f"number {d.key.removeprefix('clip')}" for d in damaged}
    assert not lost & {caption for _, caption, _ in found}
    write_index(copy)  # what it leaves out, it names
    assert len(indexed(copy)) == CLIPS or skipped(copy)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 10**9))
def test_all_others_of_the_bucket_stand_in_in_turn(sizes: list[int], position: int) -> None:
    order = ClipOrder(sizes, 3, block=2)
    candidates = list(order.candidates(position))
    assert candidates[0] == order[position]
    assert sorted(candidates) == [(order[position][0], i) for i in range(sizes[order[position][0]])]


def test_too_much_damage_stops_with_the_list(copy: Path) -> None:
    """What of a local folder is missing or torn is known before training; the rest is found, by all ranks at once."""
    spoil(copy)
    dataset = ClipDataset(config(copy, max_damaged=0.05), seed=5)
    logs = [DamageLog(dataset) for _ in range(2)]
    _, damaged = take(dataset)
    logs[1].add(damaged)
    message = (
        r"1 of 12 clips are damaged \(1 undecodable\), allowed: .*=0.05: clip4 of shard-000001.tar: undecodable: .*"
    )
    for log in logs:
        with pytest.raises(ValueError, match=message) as error:
            log.share(lambda new: damaged)
        assert "\n" not in str(error.value)
    dataset.config.max_damaged = 0.1
    assert len(logs[0].share(lambda new: damaged)) == 0  # they had been told
    log = DamageLog(dataset)
    assert log.metrics() == {"data/skipped": 0}
    assert [d.key for d in log.share(lambda new: [*damaged, *damaged])] == ["clip4"]
    assert log.metrics() == {"data/skipped": 1, "data/skipped/undecodable": 1}
    with pytest.raises(ValueError, match=r"sample clip4 of shard-000001.tar: undecodable"):
        [ClipDataset(config(copy), shuffle=False)[i] for i in range(CLIPS)]
    truncate(copy)
    with pytest.raises(
        ValueError, match=r"2 of 12 clips are damaged \(2 truncated\), allowed: .*=0.01: clip6 of shard"
    ):
        ClipDataset(config(copy))
    for i in range(3):
        (copy / f"shard-{i:06d}.tar").unlink()
    with pytest.raises(ValueError, match=r"all clips of a bucket are damaged: 12 missing shard"):
        ClipDataset(config(copy, max_damaged=1.0))[0]


def test_more_ranks_and_workers_than_shards(tmp_path: Path, folder: Path) -> None:
    shutil.copy(folder / "shard-000000.tar", tmp_path / "one.tar")
    write_index(tmp_path)
    expected, _ = take(config(tmp_path))
    assert_same(take(config(tmp_path), batch=1, world=6, workers=1)[0], expected)


# --- Indexing -----------------------------------------------------------------------------------------------------


def indexed(folder: Path) -> list[str]:
    return [row["key"] for row in open_index(LocalFolder(str(folder)))]


def skipped(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / SKIPPED).read_text().splitlines()]
    return {f"{row['shard']}/{row['key']}": row["reason"] for row in rows}


def test_whole_samples_of_damaged_shards_are_indexed(copy: Path, monkeypatch, capsys) -> None:
    truncate(copy)
    (copy / "shard-000000.tar").write_bytes(b"no tar at all" * 100)
    rewrite(copy / "shard-000002.tar", lambda name, data: None if name == "clip8.mp4" else data)
    with (copy / "shard-000002.tar").open("rb+") as file:  # the header of clip10 is gone
        file.seek(file.read().index(b"clip10.json"))
        file.write(b"\xff" * 512)
    assert main_without_error(monkeypatch, "data", "index", "--shards", str(copy)) is None
    assert "not in the index: 3 corrupt, 2 incomplete" in capsys.readouterr().err
    assert indexed(copy) == ["clip4", "clip5", "clip9"]
    reasons = skipped(copy)
    assert reasons["shard-000001.tar/clip6"] == "incomplete: lacks a clip (npy, mp4, mkv, png, jpg, jpeg, webp)"
    assert reasons["shard-000002.tar/clip8"].startswith("incomplete")
    assert [reasons[f"shard-00000{i}.tar/"].partition(":")[0] for i in range(3)] == ["corrupt"] * 3
    take(config(copy), last=6)


def main_without_error(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["stgen", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code


def test_json_that_says_too_little_is_named(copy: Path) -> None:
    def change(name: str, data: bytes) -> bytes:
        return {"clip0.json": b"{", "clip1.json": b"[1]", "clip2.json": b'{"caption": "a"}'}.get(name, data)

    rewrite(copy / "shard-000000.tar", change)
    write_index(copy)
    assert indexed(copy) == [f"clip{i}" for i in range(3, 12)]
    kinds = [skipped(copy)[f"shard-000000.tar/clip{i}"] for i in range(3)]
    assert kinds[0].startswith("json unreadable")
    assert kinds[1].startswith("json unreadable")
    assert kinds[2] == "incomplete: lacks fps, num_frames, height, width, source"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("fps", None, "fps is None, allowed: frames/s, above 0"),
        ("fps", float("nan"), "fps is nan, allowed: frames/s, above 0"),
        ("num_frames", "4", "num_frames is '4', allowed: a whole number, 1 or more"),
        ("height", 2**31, "height is 2147483648, allowed: a whole number, 1 or more"),
        ("caption", None, "caption is None, allowed: a text"),
        ("source", ["a"], r"source is ['a'], allowed: a text"),
    ],
)
def test_json_that_says_what_cannot_be_is_left_out(copy: Path, field: str, value: object, reason: str) -> None:
    def change(name: str, data: bytes) -> bytes:
        return json.dumps(json.loads(data) | {field: value}).encode() if name == "clip0.json" else data

    rewrite(copy / "shard-000000.tar", change)
    write_index(copy)
    assert skipped(copy) == {"shard-000000.tar/clip0": f"json unreadable: {reason}"}
    assert indexed(copy) == [f"clip{i}" for i in range(1, 12)]


def test_json_may_hold_names_of_the_index_and_nan(folder: Path, copy: Path) -> None:
    """As foreign data sets have them: their own keys, and what pandas writes where nothing is."""

    def change(name: str, data: bytes) -> bytes:
        more = {"key": "theirs", "shard": "/etc/passwd", "files": 3, "score": float("nan")}
        return json.dumps(json.loads(data) | more).encode() if name.endswith(".json") else data

    for shard in copy.glob("*.tar"):
        rewrite(shard, change)
    assert write_index(copy) == []
    assert indexed(copy) == indexed(folder)
    found, damaged = take(config(copy))
    assert damaged == []
    assert_same(found, take(config(folder))[0])


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pickle", "pth", "pt", "cls.PKL"])
def test_pickles_are_refused(tmp_path: Path, extension: str, monkeypatch, capsys) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in ((f"k.{extension}", pickle.dumps(1)), ("k.json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    code, error = stgen(monkeypatch, capsys, "data", "index", "--shards", str(tmp_path))
    assert code == 2
    expected = f"error: shard a.tar: sample k is '{extension.lower()}', allowed: files that are no pickles"
    assert error.strip().splitlines() == [expected]


def test_folders_elsewhere_are_indexed(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    url = into_memory(folder, "unindexed")
    for name in (INDEX, COLUMNS):
        fsspec.filesystem("memory").rm_file(f"/unindexed/{name}")
    main_without_error(monkeypatch, "data", "index", "--shards", url, "--out", str(tmp_path / "index"))
    assert (tmp_path / "index" / INDEX).read_bytes() == (folder / INDEX).read_bytes()
    assert (tmp_path / "index" / COLUMNS).read_bytes() == (folder / COLUMNS).read_bytes()
    assert_same(take(config(url, index=str(tmp_path / "index")))[0], take(config(folder))[0])
    with pytest.raises(
        ValueError, match=r"there is no memory://unindexed/index.jsonl: write it with `stgen data index`"
    ):
        ClipDataset(config(url))
    code, error = stgen(monkeypatch, capsys, "data", "index", "--shards", url)
    assert (code, error.count("\n")) == (2, 1)
    assert "out is None, allowed: a local folder for the index of memory://" in error
    with serving(folder) as server:
        code, error = stgen(monkeypatch, capsys, "data", "index", "--shards", server.url, "--out", str(tmp_path))
    assert (code, error.count("\n")) == (2, 1)
    assert "a folder whose files can be listed" in error


def test_columns_are_those_of_the_lines(copy: Path) -> None:
    """With them, without them, and with those of other lines the index is the same; a copy of it too."""

    def write(lines: str) -> None:  # as a new file, since an index is mapped and never changes under its readers
        (copy / "new").write_text(lines)
        (copy / "new").replace(copy / INDEX)

    with_columns = open_index(LocalFolder(str(copy)))
    (copy / COLUMNS).rename(copy / "kept")
    parsed = open_index(LocalFolder(str(copy)))
    text = (copy / INDEX).read_text()
    write(text.replace("number 3", "number three"))
    (copy / "kept").rename(copy / COLUMNS)
    changed = open_index(LocalFolder(str(copy)))
    assert changed[3]["caption"] == "number three"
    for index in (parsed, changed, pickle.loads(pickle.dumps(with_columns))):
        assert index[4:] == with_columns[4:]
        assert index.shards == with_columns.shards
        assert index.layouts == with_columns.layouts == [("json", "mp4"), ("json", "npy")]
        for name in ("shapes", "fps", "shard", "ends", "layout"):
            np.testing.assert_array_equal(getattr(index, name), getattr(with_columns, name))
    (copy / COLUMNS).write_bytes(b"garbage")
    assert open_index(LocalFolder(str(copy)))[4:] == with_columns[4:]
    for line, message in (("{", "line 13"), ('{"key": 1}', "line 13"), ("null", "line 13")):
        write(text + line + "\n")
        with pytest.raises(ValueError, match=f"corrupt in {message}") as error:
            open_index(LocalFolder(str(copy)))
        assert "\n" not in str(error.value)


def test_resuming_far_into_a_large_folder_takes_no_time(folder: Path, tmp_path: Path) -> None:
    """A folder of 200,000 clips, entered at its 10^9th sample: nothing is scanned, and no row parsed but those of the
    batch. `tests/bench/data_speed.py --resume` has it with a million clips."""
    row = json.loads((folder / INDEX).read_text().splitlines()[0])
    shutil.copy(folder / row["shard"], tmp_path)
    with (tmp_path / INDEX).open("w") as file:
        file.writelines(json.dumps({**row, "key": f"{i}"}) + "\n" for i in range(200_000))
    open_index(LocalFolder(str(tmp_path))).save_columns(tmp_path / COLUMNS)
    parsed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        original = Index.__getitem__
        patch.setattr(Index, "__getitem__", lambda self, i: parsed.append(i) or original(self, i))
        begin = time.perf_counter()
        batch = next(clip_loader(ClipDataset(config(tmp_path)), 10**9, 4, 0))
        assert time.perf_counter() - begin < 1
    assert batch["position"] == [10**9 + i for i in range(4)]
    assert len(parsed) == 4
