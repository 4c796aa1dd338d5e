"""The batch job on real Ray processes that are really killed, and what it refuses before Ray starts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from stgen.generation import generate, parse_requests
from stgen.video import write_video

pytest.importorskip("ray")
from stgen.batch import Result, run_batch

WORKER = "ray::_Worker"


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_results(out: Path) -> list[Result]:
    return [Result(**json.loads(line)) for line in (out / "results.jsonl").read_text().splitlines()]


def ray_processes(name: str = "ray") -> list[psutil.Process]:
    """Those that came from this one, or from a driver that it started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            # Ray's own programs lie in its package, and workers call themselves ray::CLASS.METHOD. Behind -c stands code, such
            # as that of multiprocessing's servers, whose search path names Ray too.
            words = process.cmdline()[:3]
            if "-c" not in words and any(name in word for word in words):
                found.append(process)
        except psutil.NoSuchProcess:
            continue  # it ended while we looked
    return found


def kill(processes: list[psutil.Process]) -> list[psutil.Process]:
    for process in processes:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=10)
    return processes


def wait_for(condition: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def videos(out: Path) -> dict[Path, int]:
    """The finished videos and when they were written."""
    return {path.relative_to(out): path.stat().st_mtime_ns for path in sorted(out.glob("*.mp4"))}


# --- What is refused before Ray starts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"pipeline": "nowhere"}, "pipeline is .*nowhere', allowed: a folder saved by STGenPipeline"),
        ({"pipeline": "."}, "allowed: a folder saved by STGenPipeline"),
        ({"requests": "nowhere.jsonl"}, "nowhere.jsonl', allowed: a file that exists"),
        ({"requests": "wrong.jsonl"}, "wrong.jsonl: line 2: task of request 'b'"),
        ({"out": "requests.jsonl"}, "out is .*allowed: a folder"),
        ({"requests": "out/results.jsonl"}, "requests is 'out/results.jsonl', allowed: any but the job's own"),
        ({"actors": 0}, "actors is 0"),
        ({"gpus_per_actor": 2}, "gpus_per_actor is 2"),
        ({"gpus_per_actor": 0.001, "actors": 10**6}, "actors is 1000000, allowed: .* fit on this machine's GPUs"),
        ({"cpus_per_actor": 0}, "cpus_per_actor is 0"),
    ],
)
def test_refuses(tiny_pipeline_folder, tmp_path, monkeypatch, changed, named):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "requests.jsonl", [{"id": "a", "task": "text"}])
    write_rows(tmp_path / "wrong.jsonl", [{"id": "a", "task": "text"}, {"id": "b", "task": "dance"}])
    Path("out").mkdir()
    write_rows(tmp_path / "out/results.jsonl", [{"id": "a", "task": "text"}])
    arguments = {"pipeline": tiny_pipeline_folder, "requests": "requests.jsonl", "out": "out"}
    with pytest.raises(ValueError, match=named):
        run_batch(**(arguments | changed))
    assert [path.name for path in Path("out").iterdir()] == ["results.jsonl"]
    assert not ray_processes()


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ({"_class_name": "WanPipeline"}, "_class_name in .*model_index.json is 'WanPipeline', allowed: STGenPipeline"),
        ({"_class_name": "STGenPipeline", "vae": ["stgen", "AutoencoderKLSTGen"]}, "vae of pipeline .* is 'missing'"),
    ],
)
def test_refuses_a_folder_of_something_else(tmp_path, index, named):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    requests = write_rows(tmp_path / "requests.jsonl", [{"id": "a", "task": "text"}])
    with pytest.raises(ValueError, match=named):
        run_batch(tmp_path, requests, tmp_path / "out")


@pytest.mark.parametrize("name", ["a.mp4", "results.jsonl"])
def test_leaves_the_files_of_others(tiny_pipeline_folder, tmp_path, name):
    requests = write_rows(tmp_path / "requests.jsonl", [{"id": "a", "task": "text"}])
    (tmp_path / name).write_bytes(b"mine")
    before = requests.read_bytes()
    with pytest.raises(ValueError, match=f"{name} in out is .*allowed: none that no job"):
        run_batch(tiny_pipeline_folder, requests, tmp_path)
    assert (tmp_path / name).read_bytes() == b"mine"
    assert requests.read_bytes() == before


# --- One job that dies in every way ------------------------------------------------------------------------------

FAST = {"num_inference_steps": 3}
ROWS = [
    # Takes minutes, so it is what runs when workers are killed.
    {"id": "deadly", "task": "text", "num_inference_steps": 20_000},
    {"id": "late", "task": "prediction", "video": "late.mp4", **FAST},
    {"id": "text", "task": "text", "prompt": "one digit", "num_frames": 6, "height": 15, "width": 18, **FAST},
    {"id": "predict", "task": "prediction", "video": "clip.mp4", "prompt": "moving up", "fps": 5, "seed": 1, **FAST},
    {"id": "connect", "task": "interpolation", "video": "first.mkv", "last_video": "first.mkv", **FAST},
    {"id": "fill", "task": "inpainting", "video": "clip.mp4", "mask": "mask.mkv", "guidance_scale": 2, **FAST},
    {"id": "too-big", "task": "text", "height": 10**6, "width": 10**6, **FAST},
    *({"id": f"r{i}", "task": "text", "seed": i, "num_inference_steps": 100} for i in range(4)),
]
FAILING = ["deadly", "too-big"]
IDS = [row["id"] for row in ROWS]


@dataclass
class Job:
    """What was seen of a job that was killed, and of the same command run again while its workers were killed."""

    folder: Path
    home: Path
    log: str
    first: list[Result]
    first_videos: dict[Path, int]
    refused: str
    orphans: list[psutil.Process]
    results: list[Result]
    left: list[psutil.Process]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def requests(self) -> Path:
        return self.folder / "requests.jsonl"


@pytest.fixture(scope="module")
def job(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder, home = tmp_path_factory.mktemp("job"), tmp_path_factory.mktemp("home")
    requests, out = write_rows(folder / "requests.jsonl", ROWS), folder / "out"
    clip = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    mask = np.zeros((1, 16, 16, 3), np.uint8)
    mask[:, :8] = 255
    write_video(folder / "clip.mp4", clip, 10)
    write_video(folder / "first.mkv", clip[:1], 10, lossless=True)
    write_video(folder / "mask.mkv", mask, 10, lossless=True)

    # The whole job is killed when some requests are done and one has failed.
    arguments = [str(tiny_pipeline_folder), str(requests), str(out)]
    program = f"from stgen.batch import run_batch; run_batch(*{arguments}, actors=2)"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_TOKEN"} | {"HOME": str(home)}
    with (folder / "log").open("w") as log:
        driver = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=log)
        try:
            wait_for(lambda: (out / "fill.mp4").exists() and "fill" in {r.id for r in read_results(out)})
            with pytest.raises(ValueError, match="out is") as refusal:
                run_batch(*arguments)
            orphans = ray_processes(WORKER)
        finally:
            driver.kill()
            driver.wait()
    _, orphans_left = psutil.wait_procs(orphans, timeout=30)
    first, first_videos = read_results(out), videos(out)

    # What a writer leaves that is killed between two bytes.
    (out / ".r3.mp4.1.tmp").write_bytes(b"torn")
    with (out / "results.jsonl").open("a") as file:
        file.write('{"id": "r3", "sta')
    write_video(folder / "late.mp4", clip[:2], 10)

    def kill_workers() -> None:
        wait_for((out / "r0.mp4").exists)
        kill(ray_processes(f"{WORKER}.run"))  # that of `deadly`, and one in the middle of another request
        (out / ".r2.mp4.1.tmp").write_bytes(b"torn")  # as one that is killed while it writes leaves it
        wait_for(lambda: len(videos(out)) == len(ROWS) - len(FAILING))
        for _ in range(2):
            wait_for(lambda: ray_processes(f"{WORKER}.run"))
            kill(ray_processes(f"{WORKER}.run"))

    with ThreadPoolExecutor() as pool:
        killer = pool.submit(kill_workers)
        results = run_batch(*arguments, actors=2)
        killer.result()
    refused = str(refusal.value)
    return Job(
        folder, home, (folder / "log").read_text(), first, first_videos, refused, orphans_left, results, ray_processes()
    )


@pytest.mark.slow
def test_killed_job_had_come_somewhere(job):
    done = [r for r in job.first if r.status == "done"]
    assert {"text", "predict", "connect", "fill"} <= {r.id for r in done} < set(IDS) - set(FAILING)
    assert all(r.path == f"{r.id}.mp4" and r.seconds > 0 and r.error is None for r in done)
    assert "late.mp4 cannot be read as a video" in next(r.error for r in job.first if r.id == "late")
    assert f"/{len(ROWS)} [" in job.log  # the progress bar
    assert "allowed: a folder that no other job is writing to" in job.refused


@pytest.mark.slow
def test_leaves_nothing_behind(job):
    assert not job.orphans
    assert not job.left
    assert not (job.home / ".ray").exists()
    assert not list(job.out.glob(".*.tmp"))


@pytest.mark.slow
def test_every_request_is_done_or_says_why(job):
    assert [r.id for r in job.results] == IDS
    assert job.results == read_results(job.out)
    failed = {r.id: r.error for r in job.results if r.status == "failed"}
    assert list(failed) == FAILING
    assert failed["deadly"] == "its worker died 3 times"
    assert failed["too-big"].startswith("RuntimeError: ")
    assert {path.stem for path in videos(job.out)} == set(IDS) - set(FAILING)


@pytest.mark.slow
def test_finished_requests_are_not_done_again(job):
    assert job.first_videos.items() <= videos(job.out).items()
    assert {r for r in job.first if r.status == "done"} <= set(job.results)


@pytest.mark.slow
def test_videos_are_those_of_generate(job, tiny_pipeline, tmp_path):
    for request in parse_requests(job.requests):
        if request.id not in FAILING:
            write_video(tmp_path / "direct.mp4", generate(tiny_pipeline, request), request.fps)
            assert (job.out / f"{request.id}.mp4").read_bytes() == (tmp_path / "direct.mp4").read_bytes(), request.id


@pytest.mark.slow
def test_rerun_with_nothing_to_do(job, tiny_pipeline_folder, tmp_path):
    before, start = videos(job.out), time.monotonic()
    out = shutil.copytree(job.out, tmp_path / "moved")
    done = [row for row in ROWS if row["id"] not in FAILING]
    results = run_batch(tiny_pipeline_folder, write_rows(job.folder / "some.jsonl", done[::-1]), out)
    assert results == read_results(out) == [r for r in job.results[::-1] if r.status == "done"]
    assert list(before.values()) == list(videos(out).values())
    assert time.monotonic() - start < 3  # Ray alone takes longer to start


@pytest.mark.slow
def test_refuses_to_pass_a_video_for_another(job, tiny_pipeline_folder, tmp_path):
    out = shutil.copytree(job.out, tmp_path / "out")
    some = job.folder / "some.jsonl"
    # Though the file in between leaves the request out.
    run_batch(tiny_pipeline_folder, write_rows(some, [ROWS[2]]), out)
    with pytest.raises(ValueError, match="seed of request 'predict' is 2, allowed: 1, with which"):
        run_batch(tiny_pipeline_folder, write_rows(some, [ROWS[2], ROWS[3] | {"seed": 2}]), out)
    # A pipeline is known by what it is, not by where it lies.
    pipeline = shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline")
    run_batch(pipeline, write_rows(some, [ROWS[2]]), out)
    config = pipeline / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 3.0}))
    with pytest.raises(ValueError, match="pipeline of request 'text' is"):
        run_batch(pipeline, some, out)


@pytest.mark.slow
def test_a_pipeline_that_cannot_be_loaded_stops_the_job(tiny_pipeline_folder, tmp_path):
    pipeline = shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline")
    (pipeline / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    requests = write_rows(tmp_path / "requests.jsonl", [{"id": "a", "task": "text"}])
    with pytest.raises(RuntimeError, match="a worker can't load "):
        run_batch(pipeline, requests, tmp_path / "out")
    assert not ray_processes()
    assert read_results(tmp_path / "out") == []
