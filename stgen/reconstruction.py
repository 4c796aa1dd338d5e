"""How well a VAE gives back clips that it never saw: measures, what to compare it with, pictures, a report.

Every measure is a number for each clip, and a score is the mean over clips, so scores of batches add up to the score of
all. Reconstructions are cut to [-1, 1] first, as a video file would cut them.

Beside the VAE stand two others that say what its numbers mean: bicubic resampling that keeps at least as many values,
and H.264 at no more bytes than the VAE's latents take.

Shapes: b batch, c channels, t frames, h height, w width; video float `b c t h w` in [-1, 1].
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from stgen.config import require
from stgen.data.color import to_pixels, to_rgb
from stgen.data.reading import ClipDataset, DataConfig
from stgen.data.shards import read_index
from stgen.models.latents import VideoVAE, decode, encode, latent_shape, load_vae
from stgen.video import Row, contact_sheet, difference, encode_h264, write_gif

Distance = Callable[[Tensor, Tensor], Tensor]
"""A perceptual distance: two videos `b c t h w` in [-1, 1] -> `b`, one number for each clip."""


# --- Measures -----------------------------------------------------------------------------------------------------

EXACT_MSE = 4 / 255**2 / 12
"""Mean squared error, in [-1, 1], of rounding to 8 bits: two levels of 255 apart, uniform between them."""


def psnr(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip in dB, `b`: 10 log10(2^2 / MSE), MSE over all the clip's values.

    The truth is 8-bit video, so nothing counts as closer to it than rounding to 8 bits would come: 58.9 dB is the most.
    Without that one exact clip, such as a black one, would make the mean over clips infinite.
    """
    mse = (reconstruction.double() - truth.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp(min=EXACT_MSE))


def ssim(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each clip, `b` (Wang et al. 2004, doi:10.1109/TIP.2003.819861).

    scikit-image's with its defaults (7x7 windows): the mean over colours, then over frames.

    Raises:
        ValueError: frames smaller than 7x7 pixels.
    """
    from skimage.metrics import structural_similarity  # in the `eval` extra; the other measures need torch alone

    h, w = truth.shape[3:]
    require(min(h, w) >= 7, "frames", f"{h}x{w}", "7x7 pixels or more, the window of SSIM")
    # In [0, 1], since SSIM compares means by their ratio.
    clips = (rearrange(x.float().cpu().numpy() / 2 + 0.5, "b c t h w -> b t h w c") for x in (reconstruction, truth))
    means = [
        np.mean([structural_similarity(a, b, channel_axis=-1, data_range=1.0) for a, b in zip(*pair, strict=True)])
        for pair in zip(*clips, strict=True)
    ]
    return torch.tensor(means, dtype=torch.float64)


def temporal_difference_error(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Flicker and lost motion of each clip, `b`: the mean of |(r[i+1] - r[i]) - (x[i+1] - x[i])|, in levels of 0..255.

    Raises:
        ValueError: clips of one frame, which have no differences.
    """
    require(truth.shape[2] >= 2, "frames of a clip", truth.shape[2], "2 or more for a temporal difference")
    error = reconstruction.double().diff(dim=2) - truth.double().diff(dim=2)
    return error.abs().flatten(1).mean(1) * 127.5


@dataclass(frozen=True)
class Score:
    """Means over clips, every clip counting alike."""

    clips: int
    """How many."""
    psnr: float
    """Mean of the clips' PSNR in dB, at most 58.9."""
    ssim: float
    """Mean structural similarity, 1 for equal clips."""
    temporal_difference_error: float | None
    """In levels of 0..255; None for clips of one frame."""
    perceptual_distance: float | None = None
    """In the units of the given distance; None without one."""


@torch.no_grad()
def measure(reconstruction: Tensor, truth: Tensor, distance: Distance | None = None) -> Score:
    """Compares videos `b c t h w` in [-1, 1] clip by clip.

    Args:
        reconstruction: of the shape of `truth`; cut to [-1, 1].
        distance: a perceptual distance, if there is one to measure.

    Raises:
        ValueError: the shapes differ or are no videos, the truth leaves [-1, 1], or the distance is not one a clip.
    """
    fits = truth.ndim == 5 and min(truth.shape) >= 1
    require(fits, "truth.shape", tuple(truth.shape), "(b, c, t, h, w), none of them 0")
    same = reconstruction.shape == truth.shape
    require(same, "reconstruction.shape", tuple(reconstruction.shape), f"the truth's, {tuple(truth.shape)}")
    # A comparison with NaN is false, so NaN is refused as well.
    lowest, highest = truth.min().item(), truth.max().item()
    require(lowest >= -1 and highest <= 1, "truth", f"{lowest:.4g} to {highest:.4g}", "values in [-1, 1]")
    require(bool(reconstruction.isfinite().all()), "reconstruction", "NaN or infinite", "finite values")
    reconstruction = reconstruction.clamp(-1, 1)
    perceptual = None
    if distance is not None:
        values = distance(reconstruction, truth)
        require(values.shape == truth.shape[:1], "shape of distance", tuple(values.shape), f"({len(truth)},)")
        perceptual = values.double().mean().item()
    return Score(
        clips=len(truth),
        psnr=psnr(reconstruction, truth).mean().item(),
        ssim=ssim(reconstruction, truth).mean().item(),
        temporal_difference_error=(
            temporal_difference_error(reconstruction, truth).mean().item() if truth.shape[2] > 1 else None
        ),
        perceptual_distance=perceptual,
    )


def mean_score(scores: Sequence[Score]) -> Score:
    """The score of all clips together.

    Raises:
        ValueError: no scores, or a measure that only some of them have.
    """
    require(len(scores) > 0, "scores", scores, "at least one")
    clips = sum(score.clips for score in scores)

    def mean(name: str) -> float:
        values = [getattr(score, name) for score in scores]
        require(None not in values, name, "missing in some scores", "all or none")
        return sum(value * score.clips for value, score in zip(values, scores, strict=True)) / clips

    def mean_if_any(name: str) -> float | None:
        return None if all(getattr(score, name) is None for score in scores) else mean(name)

    return Score(
        clips=clips,
        psnr=mean("psnr"),
        ssim=mean("ssim"),
        temporal_difference_error=mean_if_any("temporal_difference_error"),
        perceptual_distance=mean_if_any("perceptual_distance"),
    )


# --- Pictures -----------------------------------------------------------------------------------------------------

GAIN = 4
"""How much differences are brightened in pictures."""


def to_frames(video: Tensor) -> NDArray[np.uint8]:
    """Video in [-1, 1], cut to it, as frames: `... c t h w` -> uint8 `... t h w c`."""
    levels = ((video.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return rearrange(levels.to(torch.uint8).cpu().numpy(), "... c t h w -> ... t h w c")


def brightened_difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """|a - b| times `GAIN`, cut at white."""
    return (difference(a, b).astype(np.uint16) * GAIN).clip(max=255).astype(np.uint8)


def reconstruction_sheet(
    path: str | Path,
    truth: Tensor,
    reconstructions: Mapping[str, Tensor],
    labels: Sequence[str],
    title: str = "",
    columns: int | None = 9,
    scale: int = 1,
) -> None:
    """Writes one PNG: for each clip the truth, then each reconstruction and, brightened, its difference to the truth.

    Args:
        truth: `b c t h w` in [-1, 1].
        reconstructions: by name, each of the shape of `truth`.
        labels: one for each clip.
        columns, scale: as `stgen.video.contact_sheet` takes them.

    Raises:
        ValueError: shapes or lengths that do not fit each other, or what `contact_sheet` refuses.
    """
    require(len(labels) == len(truth), "labels", list(labels), f"{len(truth)}, one for each clip")
    for name, video in reconstructions.items():
        require(
            video.shape == truth.shape, f"shape of {name}", tuple(video.shape), f"the truth's, {tuple(truth.shape)}"
        )
    rows: list[Row] = []
    for i, label in enumerate(labels):
        frames = to_frames(truth[i])
        rows.append((f"{label}\ntruth", frames))
        for name, video in reconstructions.items():
            other = to_frames(video[i])
            rows += [(name, other), (f"difference x{GAIN}", brightened_difference(other, frames))]
    contact_sheet(rows, path, title=title, columns=columns, scale=scale)


# --- The VAE and what it is compared with -------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(vae: VideoVAE, video: Tensor) -> Tensor:
    """Encodes and decodes `b c t h w` in [-1, 1] through latents in half precision, as they are counted and stored."""
    latents = encode(vae, video.to(vae.device)).half().float()
    return decode(vae, latents, (video.shape[2], video.shape[3], video.shape[4])).cpu()


def latent_bits(vae: VideoVAE, num_frames: int, height: int, width: int) -> float:
    """Bits that the latents of a clip take: 16 a value, or with a codebook (FSQ) the logarithm of its size a cell.

    Neither is compressed any further, which an entropy coder could do.
    """
    z, *cells = latent_shape(vae, num_frames, height, width)
    levels = vae.config.get("fsq_levels")
    return math.prod(cells) * (16 * z if levels is None else math.log2(math.prod(levels)))


def bicubic_shapes(values: int, num_frames: int, height: int, width: int) -> list[tuple[int, int, int]]:
    """Shapes (t, h, w) of small RGB clips that keep at least `values` values, one for each halving of the frames.

    Frames are kept all, or 1 + ceil((t - 1) / 2), 1 + ceil((t - 1) / 4), ..., or one; h and w shrink alike, as far as
    the values allow: h is rounded to the nearest row, w is the fewest columns that make up the number. A shape that
    would need more than the clip's own rows or columns is left out.
    """
    shapes = []
    counts = [1 + -(-(num_frames - 1) // 2**i) for i in range(num_frames.bit_length())]
    for t in sorted({1, *counts}, reverse=True):
        cells = -(-values // (3 * t))
        h = min(height, max(1, round(math.sqrt(cells * height / width))))
        w = -(-cells // h)
        if w <= width:
            shapes.append((t, h, w))
    return shapes


def resample(video: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Bicubic in time, height and width, antialiased where it shrinks: `b c t h w` -> `b c t' h' w'` of `shape`."""
    b = len(video)
    options: dict[str, Any] = {"mode": "bicubic", "antialias": True, "align_corners": False}
    video = F.interpolate(rearrange(video, "b c t h w -> (b t) c h w"), shape[1:], **options)
    video = rearrange(video, "(b t) c h w -> b c t (h w)", b=b)
    video = F.interpolate(video, (shape[0], video.shape[3]), **options)  # its second axis keeps its size and values
    return rearrange(video, "b c t (h w) -> b c t h w", h=shape[1])


def best_h264(frames: NDArray[np.uint8], fps: float, budget: int) -> tuple[NDArray[np.uint8], int]:
    """H.264 at the best quality whose stream has at most `budget` bytes, to 1/8 of crf: its frames and its bytes.

    If the worst quality, crf 51, is still larger, it is what comes back, and its bytes say so.
    """
    low, high = 0, 51 * 8  # bytes fall with crf; `high` fits or is the end
    best = encode_h264(frames, fps, high / 8)
    while low < high:
        middle = (low + high) // 2
        candidate = encode_h264(frames, fps, middle / 8)
        if candidate[1] <= budget:
            high, best = middle, candidate
        else:
            low = middle + 1
    return best


# --- The report ---------------------------------------------------------------------------------------------------

VAE, H264 = "VAE", "H.264"


def report_reconstruction(
    vae_folder: str,
    data: str,
    out: str,
    clips: int = 64,
    seed: int = 0,
    device: str = "cpu",
    distance: Distance | None = None,
) -> dict[str, dict[str, Score]]:
    """Reconstructs clips of a held-out data folder and writes a report with pictures.

    Args:
        clips: how many, drawn from all of the folder in a seeded order, or 0 for every one.
        distance: a perceptual distance, if there is one to measure.

    `out` gets report.md, report.json, a sheet of each source (sheet-NUMBER-SOURCE.png) and side_by_side.gif. Returns the scores,
    by source, and by method; the source "all" is every clip.

    Raises:
        ValueError: the folder holds fewer clips or clips of several shapes, or `vae_folder` is no VAE.
    """
    rows = read_index(data)
    require(0 <= clips <= len(rows), "clips", clips, f"0 (all) to {len(rows)}, the clips of {data}")
    clips = clips or len(rows)
    shape = rows.only_shape(data)
    dataset = ClipDataset(DataConfig(data, *shape), seed)
    vae = load_vae(vae_folder).to(device)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)

    latent = latent_shape(vae, *shape)
    budget = int(latent_bits(vae, *shape) / 8)
    small = {_bicubic_name(s): s for s in bicubic_shapes(math.prod(latent), *shape)}
    scores: dict[str, dict[str, list[Score]]] = {}
    sizes: list[int] = []
    examples: dict[str, list[dict[str, Tensor]]] = {}
    for position in tqdm(range(clips), desc="reconstruct", unit="clip"):
        row = dataset.row(position)
        sample = dataset[position]
        require(not sample["damaged"], f"clip {row['key']} of {data}", sample["damaged"], "one that can be decoded")
        frames = to_rgb(sample["video"])
        truth = to_pixels(frames)[None]
        coded, size = best_h264(rearrange(frames.numpy(), "c t h w -> t h w c"), row["fps"], budget)
        sizes.append(size)
        methods = {VAE: reconstruct(vae, truth)}
        methods |= {name: resample(resample(truth, s), shape) for name, s in small.items()}
        methods[H264] = to_pixels(torch.from_numpy(rearrange(coded, "t h w c -> 1 c t h w")))
        for name, video in methods.items():
            score = measure(video, truth, distance)
            for source in ("all", row["source"]):
                scores.setdefault(source, {}).setdefault(name, []).append(score)
        kept = examples.setdefault(row["source"], [])
        if len(kept) < EXAMPLES:
            kept.append({"truth": truth[0], **{name: video[0] for name, video in methods.items()}})

    means = {source: {name: mean_score(s) for name, s in methods.items()} for source, methods in sorted(scores.items())}
    # Of the bicubic shapes the one that does best over all stands in the report, so the comparison is with the strongest.
    best = max(small, key=lambda name: means["all"][name].psnr, default=None)
    shown = [VAE, *([best] if best else []), H264]
    for i, (source, some) in enumerate(sorted(examples.items())):
        stacked = {name: torch.stack([example[name] for example in some]) for name in ("truth", *shown)}
        truths = stacked.pop("truth")
        path = folder / f"sheet-{i:02d}-{''.join(c if c.isalnum() else '_' for c in source)}.png"
        reconstruction_sheet(path, truths, stacked, [f"clip {j + 1}" for j in range(len(some))], title=source)
    frequent = sorted(examples, key=lambda source: (-means[source][VAE].clips, source))
    _write_side_by_side(folder / "side_by_side.gif", [examples[source][0] for source in frequent], shown, rows[0])

    settings = {"vae": vae_folder, "data": data, "clips": clips, "seed": seed}
    facts = {
        "latent_shape": latent,
        "latent_values": math.prod(latent),
        "latent_bytes": budget,
        "h264_bytes_mean": sum(sizes) / clips,
        "h264_over_budget": sum(size > budget for size in sizes),
        "bicubic_shapes": small,
        "bicubic_best": best,
    }
    tables = {source: {name: asdict(score) for name, score in methods.items()} for source, methods in means.items()}
    report = {"settings": settings, "facts": facts, "scores": tables}
    (folder / "report.json").write_text(json.dumps(report, indent=2))
    (folder / "report.md").write_text(write_report(means, settings, facts, shape, vae))
    return means


EXAMPLES = 2
"""Clips of each source on its sheet."""


def _bicubic_name(shape: tuple[int, int, int]) -> str:
    return "bicubic {}x{}x{}".format(*shape)


def _write_side_by_side(
    path: Path, examples: Sequence[Mapping[str, Tensor]], methods: Sequence[str], row: Mapping[str, Any]
) -> None:
    """A GIF with a clip a row: truth, then each method; the first six examples at the rate of one clip."""
    clips = [
        np.concatenate([to_frames(example[name]) for name in ("truth", *methods)], axis=2) for example in examples[:6]
    ]
    write_gif(path, np.concatenate(clips, axis=1), min(50, row["fps"]), scale=max(1, 128 // row["height"]))


def write_report(
    scores: Mapping[str, Mapping[str, Score]],
    settings: Mapping[str, object],
    facts: Mapping[str, Any],
    shape: tuple[int, int, int],
    vae: VideoVAE,
) -> str:
    """The report as markdown: what is compared, a table for all clips, and one row a source."""
    t, h, w = shape
    levels = vae.config.get("fsq_levels")
    count = "16 bits a value" if levels is None else f"log2({math.prod(levels)}) bits a cell"
    lines = [
        "# Reconstruction of held-out clips",
        "",
        ", ".join(f"{k}: {v}" for k, v in settings.items()),
        "",
        f"- Clips: {t}x{h}x{w}. Each number is a mean over clips.",
        f"- VAE: latents {'x'.join(map(str, facts['latent_shape']))}, {facts['latent_values']} values, rounded to half "
        f"precision; {count}, {facts['latent_bytes']} bytes a clip.",
        "- bicubic: shrunk to an RGB clip of at least as many values, never fewer, and back. Of the ways to divide them "
        "between time and space the best in PSNR over all clips is the one to compare with.",
        f"- H.264: libx264 with at most the VAE's bytes, {facts['h264_bytes_mean']:.0f} on average"
        + (f"; {facts['h264_over_budget']} clips need more at the lowest quality" if facts["h264_over_budget"] else "")
        + ".",
        "- temporal: mean |difference of frame-to-frame differences| in levels of 0..255. PSNR counts as at most 58.9 dB.",
        "",
    ]
    perceptual = scores["all"][VAE].perceptual_distance is not None
    header = ["", "values", "PSNR", "SSIM", "temporal", *(["perceptual"] if perceptual else [])]

    def cells(score: Score) -> list[str]:
        values = [f"{score.psnr:.2f}", f"{score.ssim:.3f}"]
        values.append("-" if score.temporal_difference_error is None else f"{score.temporal_difference_error:.2f}")
        return [*values, *([f"{score.perceptual_distance:.4f}"] if perceptual else [])]

    def kept(name: str) -> str:
        shapes = facts["bicubic_shapes"]
        return (
            str(3 * math.prod(shapes[name])) if name in shapes else str(facts["latent_values"]) if name == VAE else "-"
        )

    lines += _table(header, [[name, kept(name), *cells(score)] for name, score in scores["all"].items()])
    best = facts["bicubic_best"]
    alike = [name for name, small in facts["bicubic_shapes"].items() if small[0] == facts["latent_shape"][1]]
    for rival, what in [(best, "the best bicubic"), *((name, "the bicubic of as many frames") for name in alike)]:
        if rival is not None:
            gain = scores["all"][VAE].psnr - scores["all"][rival].psnr
            lines += ["", f"The VAE is {'ahead of' if gain > 0 else 'BEHIND'} {what}, {rival}, by {abs(gain):.2f} dB."]
    shown = [VAE, *([best] if best else []), H264]
    lines += ["", f"side_by_side.gif: the truth, then {', '.join(shown)}.", "", "## PSNR / SSIM by source", ""]
    by_source = [
        [source, str(methods[VAE].clips), *(f"{methods[name].psnr:.2f} / {methods[name].ssim:.3f}" for name in shown)]
        for source, methods in scores.items()
        if source != "all"
    ]
    return "\n".join([*lines, *_table(["", "clips", *shown], by_source), ""])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
