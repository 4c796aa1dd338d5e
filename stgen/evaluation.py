"""How good a pipeline is on clips it never saw: protocols, naive baselines, measures, pictures, a report.

A protocol is a mask; the pipeline, the baselines and the VAE's own reconstruction all see the same given pixels of the
same clips, and the given pixels are exact in all of them. Prompts are empty except for text-to-video, so a clip's
caption never helps. Text-to-video has no truth to compare with: there, where the clips are Moving MNIST, what the caption
names is looked for in what was generated (`stgen.digits`), and in the true clips and the VAE's reconstruction of them, which
say how far the reader itself can be trusted.

Shapes: n clips, k samples a clip; clips uint8 or float in [0, 1] `n t h w c`, masks bool `n t h w`, true = generate.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from tqdm import tqdm

from stgen.config import require
from stgen.data.color import to_rgb
from stgen.data.moving_mnist import SIZES, SOURCE, parse_caption
from stgen.data.reading import ClipDataset, DataConfig, fold_seed
from stgen.data.shards import read_index
from stgen.digits import CaptionScore, DigitNet, Track, read_clip, score_captions
from stgen.generation import saved_pipeline
from stgen.masks import Shape, interpolate, keep_given, moving_box, predict
from stgen.models.latents import decode, encode
from stgen.pipelines import STGenPipeline
from stgen.pipelines.scheduling import RegressionScheduler
from stgen.video import Row, contact_sheet, difference, write_gif, write_video

Clips = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

PROTOCOLS: dict[str, tuple[str, Callable[[Shape, torch.Generator], torch.Tensor]]] = {
    "prediction": ("the first half given", lambda shape, generator: predict(shape, given=shape[0] // 2)),
    "interpolation": ("a quarter given at each end", lambda shape, generator: interpolate(shape, given=shape[0] // 4)),
    "inpainting": ("a moving box hidden", lambda shape, generator: moving_box(shape, generator)),
}
"""What each protocol gives, and its mask."""

CEILING = "VAE reconstruction (ceiling)"


# --- Naive baselines: every pixel for itself, from its given values in time ---------------------------------------


def _neighbours(hidden: Mask) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each pixel and frame, the nearest given frame at or before it (-1: none) and at or after it (t: none)."""
    t = hidden.shape[1]
    frames = np.arange(t)[None, :, None, None]
    before = np.maximum.accumulate(np.where(hidden, -1, frames), axis=1)
    after = np.minimum.accumulate(np.where(hidden, t, frames)[:, ::-1], axis=1)[:, ::-1]
    return before, after


def _pick(clips: Clips, frames: NDArray[np.int64]) -> Clips:
    """The value of each pixel at the given frame `n t h w`; black where there is none."""
    t = clips.shape[1]
    values = np.take_along_axis(clips, frames.clip(0, t - 1)[..., None], axis=1)
    return np.where(((frames >= 0) & (frames < t))[..., None], values, 0)


def black(clips: Clips, hidden: Mask) -> Clips:
    """All black."""
    return np.zeros_like(clips)


def copy_last(clips: Clips, hidden: Mask) -> Clips:
    """The last given value before; where there is none, the first one after."""
    before, after = _neighbours(hidden)
    return _pick(clips, np.where(before >= 0, before, after))


def mean_given(clips: Clips, hidden: Mask) -> Clips:
    """The mean of the given values of all frames."""
    given = ~hidden[..., None]
    return np.broadcast_to((clips * given).sum(1, keepdims=True) / given.sum(1, keepdims=True).clip(1), clips.shape)


def nearest_given(clips: Clips, hidden: Mask) -> Clips:
    """The given value nearest in time, the earlier one of two."""
    before, after = _neighbours(hidden)
    frames, t = np.arange(clips.shape[1])[None, :, None, None], clips.shape[1]
    use_before = (before >= 0) & ((after >= t) | (frames - before <= after - frames))
    return _pick(clips, np.where(use_before, before, after))


def linear_blend(clips: Clips, hidden: Mask) -> Clips:
    """Linear in time between the given values before and after; constant where one of them is missing."""
    before, after = _neighbours(hidden)
    t = clips.shape[1]
    earlier, later = np.where(before >= 0, before, after), np.where(after < t, after, before)
    frames = np.arange(t)[None, :, None, None]
    weight = np.where(later > earlier, (frames - earlier) / np.maximum(later - earlier, 1), 0)[..., None]
    return (1 - weight) * _pick(clips, earlier) + weight * _pick(clips, later)


BASELINES = {
    "all black": black,
    "copy last given": copy_last,
    "mean of given": mean_given,
    "nearest given": nearest_given,
    "linear blend": linear_blend,
}


# --- Measures -----------------------------------------------------------------------------------------------------

MEASURES = ("mse", "mae", "ssim", "temporal_difference_error")


@dataclass(frozen=True)
class Score:
    """Means over clips, counted over the frames with anything to generate."""

    mse: float
    """Squared error summed over a frame's pixels (mean over colours), as OpenSTL reports it."""
    mse_error: float
    """Standard error of `mse` over clips."""
    mae: float
    """Absolute error, summed likewise."""
    ssim: float
    """Structural similarity of the frames' luminance (mean over colours), data_range 1 (Wang et al. 2004)."""
    psnr: float
    """Of the mean squared error per pixel over all clips, in dB."""
    temporal_difference_error: float
    """Flicker and lost motion: the mean of |(r[i] - r[i-1]) - (x[i] - x[i-1])| in levels of 0..255; a given frame before a
    generated one counts, so that a jump at the seam is seen. NaN if there is one frame only."""


def frame_errors(prediction: Clips, clips: Clips, hidden: Mask) -> dict[str, NDArray[np.float64]]:
    """Each of `MEASURES` for every clip and frame, `n t`; NaN for frames that are given whole."""
    frames = hidden.any(axis=(2, 3))
    rows = {name: np.full(frames.shape, np.nan) for name in MEASURES}
    error = (prediction - clips).astype(np.float64)
    rows["mse"][frames] = np.square(error[frames]).mean(-1).sum((1, 2))
    rows["mae"][frames] = np.abs(error[frames]).mean(-1).sum((1, 2))
    pairs = zip(prediction[frames].mean(-1), clips[frames].mean(-1), strict=True)
    rows["ssim"][frames] = [structural_similarity(a, b, data_range=1.0) for a, b in pairs]
    rows["temporal_difference_error"][:, 1:] = 255 * np.abs(np.diff(error, axis=1)).mean((2, 3, 4))
    rows["temporal_difference_error"][~frames] = np.nan
    return rows


def summarize(errors: Mapping[str, NDArray[np.float64]], pixels: int) -> Score:
    """Means over the frames of each clip, then over clips.

    Args:
        errors: of `frame_errors`.
        pixels: of a frame.
    """
    # A clip of one frame has no temporal difference.
    means = {
        name: np.nanmean(rows, axis=1) if not np.isnan(rows).all() else rows[:, 0] for name, rows in errors.items()
    }
    mse, n = float(means["mse"].mean()), len(means["mse"])
    return Score(
        mse=mse,
        mse_error=float(np.std(means["mse"], ddof=1) / np.sqrt(n)) if n > 1 else float("nan"),
        mae=float(means["mae"].mean()),
        ssim=float(means["ssim"].mean()),
        psnr=float(10 * np.log10(pixels / mse)) if mse > 0 else float("inf"),
        temporal_difference_error=float(means["temporal_difference_error"].mean()),
    )


def measure(prediction: Clips, clips: Clips, hidden: Mask) -> Score:
    """Compares `prediction` with the truth `clips`."""
    return summarize(frame_errors(prediction, clips, hidden), clips.shape[2] * clips.shape[3])


def best_sample(samples: Clips, clips: Clips, hidden: Mask) -> Clips:
    """Of the samples `n k t h w c` of each clip the one with the least squared error in the hidden pixels: `n t h w c`."""
    squares = (np.square(samples - clips[:, None]) * hidden[:, None, ..., None]).sum((2, 3, 4, 5))
    return samples[np.arange(len(samples)), squares.argmin(1)]


# --- The pipeline on a protocol -----------------------------------------------------------------------------------


def load_pipeline(folder: str, device: str) -> STGenPipeline:
    pipeline = STGenPipeline.from_pretrained(saved_pipeline(folder)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def steps_of(pipeline: STGenPipeline, steps: int) -> int:
    """A regression has one answer, which takes one step."""
    return 1 if isinstance(pipeline.scheduler, RegressionScheduler) else steps


def generate_samples(
    pipeline: STGenPipeline, clips: Clips, hidden: Mask, samples: int, steps: int, seed: int, first: int
) -> Clips:
    """`samples` results for each clip, `n k t h w c`; each has its own generator from (seed, clip, sample).

    Args:
        first: the number of the first of these clips.
    """
    generators = [
        torch.Generator().manual_seed(fold_seed(seed, first + i, j)) for i in range(len(clips)) for j in range(samples)
    ]
    frames = pipeline(
        [""] * len(clips),
        video=torch.from_numpy(clips).permute(0, 1, 4, 2, 3),
        mask=torch.from_numpy(hidden)[:, None].float(),
        num_inference_steps=steps_of(pipeline, steps),
        guidance_scale=1.0,
        num_videos_per_prompt=samples,
        generator=generators,
        output_type="np",
    ).frames
    return frames.reshape(len(clips), samples, *frames.shape[1:])


def generate_captions(
    pipeline: STGenPipeline,
    captions: Sequence[str],
    shape: Shape,
    samples: int,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch: int,
) -> Iterator[tuple[str, Clips]]:
    """`samples` clips `t h w c` for each caption, from text alone, each with its caption; seeds as above."""
    for first in tqdm(range(0, len(captions), batch), desc="text-to-video", unit="batch"):
        some = captions[first : first + batch]
        generators = [
            torch.Generator().manual_seed(fold_seed(seed, first + i, j))
            for i in range(len(some))
            for j in range(samples)
        ]
        frames = pipeline(
            list(some),
            num_frames=shape[0],
            height=shape[1],
            width=shape[2],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            num_videos_per_prompt=samples,
            generator=generators,
            output_type="np",
        ).frames
        yield from zip(np.repeat(np.array(some, object), samples), frames, strict=True)


@torch.no_grad()
def reconstruct(pipeline: STGenPipeline, clips: Clips, hidden: Mask) -> Clips:
    """What the VAE makes of the whole truth, in the hidden pixels: the ceiling of any latent model over it."""
    rows = []
    for clip, mask in zip(clips, hidden, strict=True):
        video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] * 2 - 1
        latents = encode(pipeline.vae, video.to(pipeline.vae.device))
        decoded = decode(pipeline.vae, latents, tuple(video.shape[2:])).cpu().clamp(-1, 1)
        rows.append(keep_given(decoded, video, torch.from_numpy(mask)[None, None])[0].permute(1, 2, 3, 0) / 2 + 0.5)
    return torch.stack(rows).numpy()


def to_uint8(clips: Clips) -> NDArray[np.uint8]:
    """[0, 1] -> 0 .. 255."""
    return (clips.clip(0, 1) * 255).round().astype(np.uint8)


# --- The evaluation -----------------------------------------------------------------------------------------------


@dataclass
class Protocol:
    """What a protocol came to."""

    errors: dict[str, dict[str, NDArray[np.float64]]]
    """`frame_errors` by method."""
    scores: dict[str, Score]
    """By method."""
    given_error: float
    """Largest difference of a given pixel of a sample from the truth, in levels of 0..255; under a half it is exact in
    8 bits."""
    tracks: list[list[Track]]
    """What is read in the first sample of each clip, given frames included; empty if the clips are not Moving MNIST."""
    shown: tuple[Clips, Mask]
    """The first sample of the first clips, and what was hidden of them."""


@dataclass
class Evaluation:
    """All that the report says."""

    settings: dict[str, object]
    protocols: dict[str, Protocol]
    captions: list[str]
    reading: dict[str, CaptionScore]
    """What was read in clips, by where they come from; empty if the clips are not Moving MNIST."""

    @property
    def scores(self) -> dict[str, dict[str, Score]]:
        """By protocol and method."""
        return {name: protocol.scores for name, protocol in self.protocols.items()}


SHOWN = 4
"""Clips in the pictures of a task."""


def run_protocol(
    name: str,
    pipeline: STGenPipeline,
    beside: Mapping[str, STGenPipeline],
    truth: Clips,
    samples: int,
    steps: int,
    seed: int,
    batch: int,
    net: DigitNet | None,
    digits: Sequence[int],
) -> Protocol:
    """Measures samples, their mean and the best, other pipelines, the naive baselines and the VAE, batch by batch.

    Args:
        beside: other pipelines by name, one sample each.
        net: reads the digits of the first sample, as many as `digits` says of each clip.
    """
    draw, errors, given_error = PROTOCOLS[name][1], defaultdict(list), 0.0
    tracks: list[list[Track]] = []
    shown: list[tuple[Clips, Mask]] = []
    for first in tqdm(range(0, len(truth), batch), desc=name, unit="batch"):
        clips = truth[first : first + batch]
        generators = [torch.Generator().manual_seed(fold_seed(seed, first + i)) for i in range(len(clips))]
        hidden = np.stack([draw(clips.shape[1:4], generator)[0].bool().numpy() for generator in generators])
        generated = generate_samples(pipeline, clips, hidden, samples, steps, seed, first)
        given = ~np.broadcast_to(hidden[:, None, ..., None], generated.shape)
        off = np.abs(generated - clips[:, None])[given].max(initial=0) * 255
        assert off < 0.5, f"{name}: given pixels came back {off:.3g} levels of 255 off"
        given_error = max(given_error, float(off))
        methods = {"stgen, one sample": generated[:, 0]}
        if samples > 1:
            methods[f"stgen, best of {samples} samples"] = best_sample(generated, clips, hidden)
            methods[f"stgen, mean of {samples} samples"] = generated.mean(1)
        for label, other in beside.items():
            methods[label] = generate_samples(other, clips, hidden, 1, steps, seed, first)[:, 0]
        for label, baseline in BASELINES.items():
            methods[label] = np.where(hidden[..., None], baseline(clips, hidden), clips)
        methods[CEILING] = reconstruct(pipeline, clips, hidden)
        for label, prediction in methods.items():
            errors[label].append(frame_errors(prediction, clips, hidden))
        if net is not None:
            tracks += [read_clip(net, clip, n) for clip, n in zip(generated[:, 0], digits[first:], strict=False)]
        if first < SHOWN:
            shown.append((generated[: SHOWN - first, 0], hidden[: SHOWN - first]))
    whole = {label: {m: np.concatenate([row[m] for row in rows]) for m in MEASURES} for label, rows in errors.items()}
    scores = {label: summarize(rows, truth.shape[2] * truth.shape[3]) for label, rows in whole.items()}
    return Protocol(whole, scores, given_error, tracks, tuple(np.concatenate(x) for x in zip(*shown, strict=True)))


def parse_beside(beside: Sequence[str]) -> list[tuple[str, list[str], str]]:
    """`NAME=PIPELINE` or `NAME:PROTOCOL,PROTOCOL=PIPELINE` as (name, protocols, folder); all protocols by default.

    Raises:
        ValueError: no such form, an unknown protocol, or a name twice.
    """
    parsed: list[tuple[str, list[str], str]] = []
    for text in beside:
        label, _, folder = text.partition("=")
        name, _, protocols = label.partition(":")
        require(bool(name and folder), "beside", text, "NAME=PIPELINE or NAME:PROTOCOL,...=PIPELINE")
        chosen = protocols.split(",") if protocols else list(PROTOCOLS)
        for protocol in chosen:
            require(protocol in PROTOCOLS, f"protocol of beside {name}", protocol, ", ".join(PROTOCOLS))
        taken = [*BASELINES, CEILING, *(other for other, *_ in parsed)]
        fresh = name not in taken and not name.startswith("stgen")
        require(fresh, "name of beside", name, "a name that no other row has")
        parsed.append((name, chosen, folder))
    return parsed


def evaluate(
    pipeline_folder: str,
    data: str,
    out: str,
    clips: int = 64,
    samples: int = 8,
    steps: int = 20,
    guidance_scale: float = 4.0,
    text_samples: int = 1,
    text_steps: int | None = None,
    seed: int = 0,
    batch: int = 16,
    device: str = "cpu",
    beside: Sequence[str] = (),
) -> Evaluation:
    """Runs all protocols on the first `clips` clips of a held-out data folder and writes a report with pictures.

    `out` gets report.md, report.json, contact_sheet.png, per_frame.png (errors over the frame's number, where drift shows),
    and for each task a sheet, an mp4 and a GIF.

    Args:
        samples: results of each clip in each protocol: one counts alone, and the best and the mean of all.
        guidance_scale: of text-to-video.
        text_samples: clips generated from each caption, if the clips are Moving MNIST.
        text_steps: sampling steps of text-to-video; None: `steps`. Few steps end near the mean of all that may come: next to
            what is given that is a good guess, of text alone it is nothing.
        beside: other pipelines in the same tables, as `parse_beside` takes them.

    Raises:
        ValueError: the folder holds fewer clips, or clips of several shapes, or an argument is out of range.
    """
    rows = read_index(data)
    require(1 <= clips <= len(rows), "clips", clips, f"1 to {len(rows)}, the clips of {data}")
    text_steps = steps if text_steps is None else text_steps
    counts = {
        "samples": samples,
        "steps": steps,
        "text_samples": text_samples,
        "text_steps": text_steps,
        "batch": batch,
    }
    for label, value in counts.items():
        require(value >= 1, label, value, "1 or more")
    require(0 <= guidance_scale < math.inf, "guidance_scale", guidance_scale, "0 or more")
    shape: Shape = rows.only_shape(data)
    others = parse_beside(beside)
    dataset = ClipDataset(DataConfig(data, *shape), shuffle=False)
    items = [dataset[i] for i in range(clips)]
    truth = np.stack([to_rgb(item["video"]).permute(1, 2, 3, 0).numpy() for item in items]).astype(np.float32) / 255
    captions = [str(item["caption"]) for item in items]
    readable = shape[0] > 1 and shape[1:] in [(size, size) for size in SIZES]
    readable = readable and all(str(row["source"]).startswith(SOURCE) for row in rows[:clips])
    digits = [len(parse_caption(caption)) for caption in captions]
    # A file of anybody's may bear the name; its captions do not name digits that move.
    net = DigitNet.pretrained() if readable and all(digits) else None

    pipeline = load_pipeline(pipeline_folder, device)
    loaded = {name: load_pipeline(path, device) for name, _, path in others}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "pipeline": pipeline_folder,
        "data": data,
        "clips": clips,
        "samples": samples,
        "steps": steps,
        "text_steps": text_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        **({"beside": ", ".join(beside)} if beside else {}),
    }
    result = Evaluation(settings, {}, captions, {})
    sheet: list[Row] = []
    for name in PROTOCOLS:
        there = {label: loaded[label] for label, protocols, _ in others if name in protocols}
        result.protocols[name] = run_protocol(name, pipeline, there, truth, samples, steps, seed, batch, net, digits)
        shown, hidden = result.protocols[name].shown
        task_rows = [_task_rows(name, *clip) for clip in zip(shown, truth, hidden, strict=False)]
        sheet += task_rows[0]
        contact_sheet(
            [row for clip in task_rows for row in clip],
            folder / f"{name}.png",
            title=f"stgen, {name}: {PROTOCOLS[name][0]}",
        )
        columns = np.concatenate([to_uint8(truth[: len(shown)]), to_uint8(shown)], axis=2)  # truth above generated
        _write_media(folder / name, np.concatenate(list(columns), axis=2), rows[0]["fps"])

    # Text alone. Without a reader a few clips to look at are enough.
    asked = captions if net is not None else captions[:SHOWN]
    generated: list[NDArray[np.uint8]] = []
    tracks, texts = [], []
    for caption, clip in generate_captions(
        pipeline, asked, shape, text_samples, steps_of(pipeline, text_steps), guidance_scale, seed, batch
    ):
        texts.append(caption)
        tracks.append([] if net is None else read_clip(net, clip, len(parse_caption(caption))))
        if len(generated) < 2 * SHOWN:
            generated.append(to_uint8(clip))
    labels = [
        f'"{text}"' + f"\nread: {_say(read)}" * (net is not None) for text, read in zip(texts, tracks, strict=True)
    ]
    text_rows: list[Row] = list(zip(labels, generated, strict=False))
    contact_sheet(text_rows, folder / "text-to-video.png", title="stgen, text-to-video")
    contact_sheet(sheet + text_rows[:SHOWN], folder / "contact_sheet.png", title="stgen on clips that it never saw")
    _write_media(folder / "text-to-video", np.concatenate(generated[:SHOWN], axis=2), rows[0]["fps"])
    if net is not None:
        everything = np.ones((1, *shape), bool)
        result.reading[f"stgen, {text_samples} of each caption"] = score_captions(tracks, texts)
        seen: dict[str, list[list[Track]]] = {"true clips (ceiling)": [], CEILING: []}
        for clip, n in zip(tqdm(truth, desc="reading true clips", unit="clip"), digits, strict=True):
            seen["true clips (ceiling)"].append(read_clip(net, clip, n))
            seen[CEILING].append(read_clip(net, reconstruct(pipeline, clip[None], everything)[0], n))
        seen |= {f"{name}, given frames included": protocol.tracks for name, protocol in result.protocols.items()}
        result.reading |= {label: score_captions(read, captions) for label, read in seen.items()}

    plot_frames(result.protocols, folder / "per_frame.png")
    (folder / "report.json").write_text(json.dumps(to_json(result), indent=2))
    (folder / "report.md").write_text(write_report(result))
    return result


# --- The report ---------------------------------------------------------------------------------------------------


def _task_rows(name: str, shown: Clips, truth: Clips, hidden: Mask) -> list[Row]:
    generated, true, given = to_uint8(shown), to_uint8(truth), ~hidden.any(axis=(1, 2))
    return [
        (f"{name}: given", to_uint8(np.where(hidden[..., None], 0.5, truth)), given),
        ("generated", generated, given),
        ("truth", true, given),
        ("difference", difference(generated, true), given),
    ]


def _say(tracks: Sequence[Track]) -> str:
    return ", ".join(f"{track.label} {track.direction}" for track in tracks) or "nothing"


def _write_media(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    write_video(path.with_suffix(".mp4"), frames, fps)
    write_gif(path.with_suffix(".gif"), frames, min(50, fps), scale=max(1, 128 // frames.shape[1]))


def plot_frames(protocols: Mapping[str, Protocol], path: Path) -> None:
    """MSE and SSIM over the number of the frame, mean over clips: a column a protocol, a colour a method."""
    methods = list(dict.fromkeys(label for protocol in protocols.values() for label in protocol.errors))
    figure = Figure(figsize=(6 * len(protocols), 8.5), layout="constrained")
    axes = figure.subplots(2, len(protocols), squeeze=False)
    lines = {}
    for column, (name, protocol) in enumerate(protocols.items()):
        for axis, key, label in zip(axes[:, column], ("mse", "ssim"), ("MSE", "SSIM"), strict=True):
            for method, errors in protocol.errors.items():
                known = ~np.isnan(errors[key]).all(0)
                style, width = (":", 1.2) if method in BASELINES else ("-", 2.2 if method.startswith("stgen") else 1.4)
                (lines[method],) = axis.plot(
                    np.flatnonzero(known),
                    np.nanmean(errors[key][:, known], axis=0),
                    linestyle=style,
                    marker=".",
                    linewidth=width,
                    color=f"C{methods.index(method)}",
                )
            axis.set(xlabel="frame", ylabel=label, title=name)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
    for axis in axes[0]:
        axis.set_ylim(bottom=0)
    figure.legend([lines[m] for m in methods], methods, loc="outside lower center", ncols=5, fontsize=11)
    figure.savefig(path, dpi=80)


def to_json(result: Evaluation) -> dict[str, object]:
    """The report as numbers, those of every frame included (mean over clips; null for frames that are given)."""
    frames = {
        name: {
            label: {
                key: [None if np.isnan(x).all() else float(np.nanmean(x)) for x in errors[key].T] for key in MEASURES
            }
            for label, errors in protocol.errors.items()
        }
        for name, protocol in result.protocols.items()
    }
    return {
        "settings": result.settings,
        "scores": {name: {label: asdict(s) for label, s in rows.items()} for name, rows in result.scores.items()},
        "largest_error_of_given_pixels": {name: p.given_error for name, p in result.protocols.items()},
        "reading": {label: asdict(score) for label, score in result.reading.items()},
        "frames": frames,
    }


def verdict(label: str, rows: Mapping[str, Score]) -> str:
    """Says of a method whether it is ahead of every naive baseline."""
    low = min((rows[name].mse, name) for name in BASELINES)
    high = max((rows[name].ssim, name) for name in BASELINES)
    words = [
        f"{'ahead of every' if ahead else 'BEHIND a'} baseline in {measure} (best: {name}, {value})"
        for ahead, measure, name, value in (
            (rows[label].mse < low[0], "MSE", low[1], f"{low[0]:.2f}"),
            (rows[label].ssim > high[0], "SSIM", high[1], f"{high[0]:.3f}"),
        )
    ]
    return f"{label}: {'; '.join(words)}"


def write_report(result: Evaluation) -> str:
    """The report as markdown: a table a protocol, lines that say whether every baseline is beaten, and what was read."""
    settings = ", ".join(f"{k}: {v}" for k, v in result.settings.items())
    lines = ["# Evaluation on held-out clips", "", settings, ""]
    lines += [
        "MSE and MAE are summed over a frame's pixels; all count the frames with anything to generate. The best sample is the",
        "one with the least MSE. The temporal difference error (TDE) is in levels of 0..255. Errors frame by frame:",
        "per_frame.png.",
        "",
    ]
    for name, protocol in result.protocols.items():
        head = ["| | MSE | MAE | SSIM | PSNR | TDE |", "|---|---|---|---|---|---|"]
        lines += [f"## {name}: {PROTOCOLS[name][0]}", "", *head]
        lines += [
            f"| {label} | {s.mse:.2f} ± {s.mse_error:.2f} | {s.mae:.1f} | {s.ssim:.3f} | {s.psnr:.2f} | "
            f"{s.temporal_difference_error:.2f} |"
            for label, s in protocol.scores.items()
        ]
        for label in protocol.scores:
            if label not in BASELINES and label != CEILING:
                lines += ["", verdict(label, protocol.scores)]
        off = protocol.given_error
        lines += [
            "",
            f"The given pixels come back exactly in 8 bits (at most {off:.1g} of 255 levels off before rounding).",
            "",
        ]
    lines += ["## text-to-video", ""]
    if result.reading:
        lines += [
            "What the captions name, looked for by `stgen.digits`: shares of the digits that captions name. Directions are",
            "those of the first step; `kept` is the share of the digits found that are the same in the first and the last",
            "quarter of the clip, `whole` that of clips with all digits and directions right.",
            "",
            "| | digits | directions | within 45° | both | whole | kept | found |",
            "|---|---|---|---|---|---|---|---|",
            *(
                f"| {label} | {s.digits:.1%} | {s.directions:.1%} | {s.directions_within_45:.1%} | {s.both:.1%} | "
                f"{s.whole:.1%} | {s.kept:.1%} | {s.found:.1%} |"
                for label, s in result.reading.items()
            ),
            "",
        ]
    lines += ["The first captions, in text-to-video.png:", "", *(f"- {text}" for text in result.captions[:SHOWN]), ""]
    return "\n".join(lines)


def _one_sample(report: dict[str, Any]) -> dict[str, str]:
    """A report's column beside others: by row, what one sample and the best naive baseline came to, and what was read."""
    cells = {"clips": f"{report['settings']['clips']} of {report['settings']['data']}"}
    for protocol, scores in report["scores"].items():
        for key, best, form in (("mse", min, ".2f"), ("ssim", max, ".3f")):
            cells[f"{protocol}, {key.upper()}"] = format(scores["stgen, one sample"][key], form)
            cells[f"{protocol}, {key.upper()} of the best naive baseline"] = format(
                best(scores[name][key] for name in BASELINES), form
            )
    read = next((score for name, score in report["reading"].items() if name.startswith("stgen, ")), None)
    for key in ("digits", "directions"):
        cells[f"text-to-video, {key} of the caption"] = f"{read[key]:.1%}" if read else "not read"
    return cells


def compare_reports(reports: Mapping[str, str | Path]) -> str:
    """What several reports say of one sample, side by side: a column a report, below each measure the best naive baseline's.

    Args:
        reports: folders that `evaluate` wrote, by the names of their columns.

    Raises:
        ValueError: a folder has no report.json, or that of another command.
    """
    columns = {}
    for name, folder in reports.items():
        try:
            columns[name] = _one_sample(json.loads((Path(folder) / "report.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"report {name} is {str(folder)!r}, allowed: a folder of stgen evaluate: {error!r}"
            ) from error
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for label in next(iter(columns.values())):
        lines.append(f"| {label} | {' | '.join(cells[label] for cells in columns.values())} |")
    return "\n".join(lines)
