"""How good a pipeline is on clips it never saw: protocols, naive baselines, measures, pictures, a report.

A protocol is a mask; the pipeline, the baselines and the VAE's own reconstruction all see the same given pixels of the
same clips, and the given pixels are exact in all of them. Prompts are empty except for text-to-video, so a clip's
caption never helps.

Shapes: n clips, k samples a clip; clips uint8 or float in [0, 1] `n t h w c`, masks bool `n t h w`, true = generate.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from tqdm import tqdm

from stgen.config import require
from stgen.data.color import to_rgb
from stgen.data.reading import ClipDataset, DataConfig, fold_seed
from stgen.data.shards import read_index
from stgen.generation import saved_pipeline
from stgen.masks import Shape, interpolate, keep_given, moving_box, predict
from stgen.models.latents import decode, encode
from stgen.pipelines import STGenPipeline
from stgen.video import contact_sheet, difference, write_gif, write_video

Clips = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

PROTOCOLS: dict[str, tuple[str, Callable[[Shape, torch.Generator], torch.Tensor]]] = {
    "prediction": ("the first half given", lambda shape, generator: predict(shape, given=shape[0] // 2)),
    "interpolation": ("a quarter given at each end", lambda shape, generator: interpolate(shape, given=shape[0] // 4)),
    "inpainting": ("a moving box hidden", lambda shape, generator: moving_box(shape, generator)),
}
"""What each protocol gives, and its mask."""


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


def measure(prediction: Clips, clips: Clips, hidden: Mask) -> Score:
    """Compares `prediction` with the truth `clips`."""
    mses, maes, ssims = [], [], []
    for one, truth, frames in zip(prediction, clips, hidden.any(axis=(2, 3)), strict=True):
        error = one[frames] - truth[frames]
        mses.append(np.square(error).mean(-1).sum((1, 2)).mean())
        maes.append(np.abs(error).mean(-1).sum((1, 2)).mean())
        pairs = zip(one[frames].mean(-1), truth[frames].mean(-1), strict=True)
        ssims.append(np.mean([structural_similarity(a, b, data_range=1.0) for a, b in pairs]))
    mse, pixels = float(np.mean(mses)), clips.shape[2] * clips.shape[3]
    return Score(
        mse=mse,
        mse_error=float(np.std(mses, ddof=1) / np.sqrt(len(mses))) if len(mses) > 1 else float("nan"),
        mae=float(np.mean(maes)),
        ssim=float(np.mean(ssims)),
        psnr=float(10 * np.log10(pixels / mse)) if mse > 0 else float("inf"),
    )


# --- The pipeline on a protocol -----------------------------------------------------------------------------------


def generate_samples(
    pipeline: STGenPipeline, clips: Clips, hidden: Mask, samples: int, steps: int, seed: int, batch: int, label: str
) -> Clips:
    """`samples` results for each clip, `n k t h w c`; each has its own generator from (seed, clip, sample)."""
    results = []
    for first in tqdm(range(0, len(clips), batch), desc=label, unit="batch"):
        some = clips[first : first + batch]
        generators = [
            torch.Generator().manual_seed(fold_seed(seed, first + i, j))
            for i in range(len(some))
            for j in range(samples)
        ]
        frames = pipeline(
            [""] * len(some),
            video=torch.from_numpy(some).permute(0, 1, 4, 2, 3),
            mask=torch.from_numpy(hidden[first : first + batch])[:, None].float(),
            num_inference_steps=steps,
            guidance_scale=1.0,
            num_videos_per_prompt=samples,
            generator=generators,
            output_type="np",
        ).frames
        results.append(frames.reshape(len(some), samples, *frames.shape[1:]))
    return np.concatenate(results)


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


def evaluate(
    pipeline_folder: str,
    data: str,
    out: str,
    clips: int = 64,
    samples: int = 8,
    steps: int = 20,
    guidance_scale: float = 4.0,
    seed: int = 0,
    batch: int = 16,
    device: str = "cpu",
) -> dict[str, dict[str, Score]]:
    """Runs all protocols on the first `clips` clips of a held-out data folder and writes a report with pictures.

    `out` gets report.md, report.json, contact_sheet.png, and an mp4 and a GIF of each task. Returns the scores, by
    protocol and method.

    Raises:
        ValueError: the folder holds fewer clips, or an argument is out of range.
    """
    rows = read_index(data)
    require(1 <= clips <= len(rows), "clips", clips, f"1 to {len(rows)}, the clips of {data}")
    for name, value in (("samples", samples), ("steps", steps), ("batch", batch)):
        require(value >= 1, name, value, "1 or more")
    shape = (rows[0]["num_frames"], rows[0]["height"], rows[0]["width"])
    dataset = ClipDataset(DataConfig(data, *shape), shuffle=False)
    items = [dataset[i] for i in range(clips)]
    truth = np.stack([to_rgb(item["video"]).permute(1, 2, 3, 0).numpy() for item in items]).astype(np.float32) / 255
    fps = rows[0]["fps"]

    pipeline = STGenPipeline.from_pretrained(saved_pipeline(pipeline_folder)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)

    scores: dict[str, dict[str, Score]] = {}
    sheet: list[tuple] = []
    for name, (_, draw) in PROTOCOLS.items():
        generators = [torch.Generator().manual_seed(fold_seed(seed, i)) for i in range(clips)]
        hidden = np.stack([draw(shape, generator)[0].bool().numpy() for generator in generators])
        generated = generate_samples(pipeline, truth, hidden, samples, steps, seed, batch, name)
        methods = {"stgen, one sample": generated[:, 0]}
        if samples > 1:
            methods[f"stgen, mean of {samples} samples"] = generated.mean(1)
        for label, baseline in BASELINES.items():
            methods[label] = np.where(hidden[..., None], baseline(truth, hidden), truth)
        methods["VAE reconstruction (ceiling)"] = reconstruct(pipeline, truth, hidden)
        scores[name] = {label: measure(prediction, truth, hidden) for label, prediction in methods.items()}

        shown = to_uint8(generated[0, 0])
        given = ~hidden[0].any(axis=(1, 2))
        sheet += [
            (f"{name}: given", to_uint8(np.where(hidden[0][..., None], 0.5, truth[0])), given),
            ("generated", shown, given),
            ("truth", to_uint8(truth[0]), given),
            ("difference", difference(shown, to_uint8(truth[0])), given),
        ]
        columns = np.concatenate([to_uint8(truth[:4]), to_uint8(generated[:4, 0])], axis=2)  # truth above generated
        _write_media(folder / name, np.concatenate(list(columns), axis=2), fps)

    prompts = [item["caption"] for item in items[:4]]
    frames = pipeline(
        prompts,
        num_frames=shape[0],
        height=shape[1],
        width=shape[2],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(fold_seed(seed, i)) for i in range(len(prompts))],
        output_type="np",
    ).frames
    _write_media(folder / "text-to-video", np.concatenate(list(to_uint8(frames)), axis=2), fps)
    sheet += [(f'"{prompt}"', to_uint8(clip)) for prompt, clip in zip(prompts, frames, strict=True)]
    contact_sheet(sheet, folder / "contact_sheet.png", title="stgen on clips that it never saw")

    settings = {
        "pipeline": pipeline_folder,
        "data": data,
        "clips": clips,
        "samples": samples,
        "steps": steps,
        "seed": seed,
    }
    report = {"settings": settings, "scores": {p: {m: vars(s) for m, s in rows.items()} for p, rows in scores.items()}}
    (folder / "report.json").write_text(json.dumps(report, indent=2))
    (folder / "report.md").write_text(write_report(scores, settings, prompts))
    return scores


def _write_media(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    write_video(path.with_suffix(".mp4"), frames, fps)
    write_gif(path.with_suffix(".gif"), frames, fps, scale=max(1, 128 // frames.shape[1]))


def write_report(scores: dict[str, dict[str, Score]], settings: dict[str, object], prompts: Sequence[str]) -> str:
    """The report as markdown: a table a protocol, and a line that says whether every baseline is beaten."""
    lines = ["# Evaluation on held-out clips", "", ", ".join(f"{k}: {v}" for k, v in settings.items()), ""]
    lines += ["MSE and MAE are summed over a frame's pixels; all count the frames with anything to generate.", ""]
    for name, rows in scores.items():
        lines += [f"## {name}: {PROTOCOLS[name][0]}", "", "| | MSE | MAE | SSIM | PSNR |", "|---|---|---|---|---|"]
        lines += [
            f"| {label} | {s.mse:.2f} ± {s.mse_error:.2f} | {s.mae:.1f} | {s.ssim:.3f} | {s.psnr:.2f} |"
            for label, s in rows.items()
        ]
        best = min((rows[label].mse, label) for label in BASELINES)
        for label in [label for label in rows if label.startswith("stgen")]:
            ahead = rows[label].mse < best[0]
            lines += [
                "",
                f"{label}: {'ahead of every' if ahead else 'BEHIND a'} baseline in MSE (best: {best[1]}, {best[0]:.2f})",
            ]
        lines.append("")
    lines += [
        "## text-to-video",
        "",
        "The last rows of contact_sheet.png:",
        "",
        *(f"- {prompt}" for prompt in prompts),
        "",
    ]
    return "\n".join(lines)
