"""Validation of the transformer in training: the loss and samples on clips that it never sees, by the averaged weights.

Clips, masks, noise and times are fixed, so two validations differ by the weights alone, and the result is the same on any
number of processes, which share the work. Nothing of it reaches the training: no draw is from a global generator.

Shapes: video `b c t h w` in [-1, 1]; mask `b 1 t h w`, 1 = generate, 0 = given; latents `b z t' h' w'`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from stgen.accelerator import share_out
from stgen.config import require
from stgen.data.color import to_pixels
from stgen.data.reading import ClipDataset, DataConfig, clip_shape, collate
from stgen.encoding import draw_mask
from stgen.masks import MaskSpec, Shape, keep_given
from stgen.models.latents import decode
from stgen.objective import FlowConfig, denoising_losses
from stgen.pipelines import STGenPipeline
from stgen.text import TextCache
from stgen.tracking import log_picture
from stgen.video import contact_sheet

PROMPTED = "text"
"""The task that is told the clip's caption; all others get the empty prompt and no guidance, so that no caption helps them."""


def _tasks() -> dict[str, MaskSpec]:
    return {
        PROMPTED: MaskSpec("generate_all"),
        "prediction": MaskSpec("predict", args={"given": 0.5}),
        "interpolation": MaskSpec("interpolate", args={"given": 0.25}),
        "inpainting": MaskSpec("moving_box"),
    }


@dataclass
class ValidationConfig:
    """What is measured, on what, how often."""

    path: str = "???"
    """Folder of held-out shards and their index, with pixels, of the shape or every shape that `data` (of the last stage)
    asks for."""
    clips: int = 16
    """Its first so many clips."""
    every: int = 1000
    """Optimizer steps between validations; the last step has one too."""
    times: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    """Times in [0, 1] at which the loss is measured, whatever the shift; 1 is pure noise."""
    tasks: dict[str, MaskSpec] = field(default_factory=_tasks)
    """A mask for each task; `text` alone is told the captions. A configuration adds tasks or changes them by name."""
    sheet_clips: int = 2
    """Of the first so many clips, a sample of each task is drawn; 0 draws none."""
    sampling_steps: int = 20
    """Steps of a sample."""
    guidance_scale: float = 4.0
    """Of the samples of `text`."""
    seed: int = 0
    """Seeds masks and noise."""

    def __post_init__(self) -> None:
        for name in ("clips", "every", "sampling_steps"):
            require(getattr(self, name) >= 1, f"validation.{name}", getattr(self, name), "1 or more")
        fits = 0 <= self.sheet_clips <= self.clips
        require(fits, "validation.sheet_clips", self.sheet_clips, f"0 to {self.clips}, the clips")
        fits = len(self.times) == len(set(self.times)) > 0 and all(0 <= time <= 1 for time in self.times)
        require(fits, "validation.times", self.times, "one or more different times, 0 to 1")
        require(len(self.tasks) > 0, "validation.tasks", self.tasks, "at least one")
        require(self.guidance_scale >= 0, "validation.guidance_scale", self.guidance_scale, "0 or more")

    def open(self, data: DataConfig) -> ClipDataset:
        """The held-out clips, in the shapes of `data`.

        Raises:
            ValueError: the folder is unusable or holds too few clips.
        """
        dataset = ClipDataset(replace(data, path=self.path, index=None), shuffle=False)
        allowed = f"at most {len(dataset)}, those of {self.path}"
        require(self.clips <= len(dataset), "validation.clips", self.clips, allowed)
        return dataset


def draw_task(
    config: ValidationConfig, task: str, position: int, shape: Shape
) -> tuple[Tensor, torch.Generator] | None:
    """The mask `1 t h w` that a task lays on the clip at a position, of shape (t, h, w), and the generator of its noise.

    None for a mask that gives nothing though the task's kind gives something: of images, frames cannot be predicted.
    """
    spec = config.tasks[task]
    mask, generator = draw_mask([spec], config.seed, position, shape)
    return None if spec.kind != "generate_all" and bool(mask.all()) else (mask, generator)


def sample_latents(
    pipeline: STGenPipeline, config: ValidationConfig, task: str, clip: dict[str, Any], **prompt: Any
) -> Tensor:
    """The latents `1 z t' h' w'` that validation samples of a clip in a task: a function of the pipeline and these alone.

    Args:
        clip: of `ValidationConfig.open`.
        prompt: the pipeline's arguments that say the caption for `text`, or else the empty prompt, in words or embedded.
    """
    drawn = draw_task(config, task, clip["position"], clip["shape"])
    assert drawn is not None
    mask, generator = drawn
    t, h, w = clip["shape"]
    given: dict[str, Any] = {"num_frames": t, "height": h, "width": w}
    if not mask.all():
        given = {"video": pipeline.as_frames(to_pixels(clip["video"])[None]), "mask": mask[None]}
    return pipeline(
        **given,
        **prompt,
        fps=clip["fps"],
        num_inference_steps=config.sampling_steps,
        guidance_scale=config.guidance_scale if task == PROMPTED else 1.0,
        generator=generator,
        output_type="latent",
    ).frames


class Validator:
    """A row of metrics.jsonl, and in `run/samples/` a sheet `step-N.png` with its latents, `step-N.safetensors`.

    Args:
        dataset: of `ValidationConfig.open`.
        pipeline: without a text encoder, around the transformer in training.
        text: the states of the empty prompt and of the captions.
        inputs: of the loss, from a batch of clips, the one mask there is, whether captions are told, and the seed.
    """

    def __init__(
        self,
        config: ValidationConfig,
        run: Path,
        dataset: ClipDataset,
        pipeline: STGenPipeline,
        text: TextCache,
        inputs: Callable[[dict[str, Any], MaskSpec, bool, int], dict[str, Tensor]],
        flow: FlowConfig,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.folder, self.dataset, self.pipeline = config, run / "samples", dataset, pipeline
        self.text, self.inputs, self.flow, self.accelerator = text, inputs, flow, accelerator
        pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, step: int, samples: int) -> float:
        """Logs and draws what the transformer's weights of the moment do; all processes call it.

        Returns:
            The mean loss over clips, tasks and times.
        """
        transformer = self.pipeline.transformer
        transformer.eval()
        losses: dict[tuple[str, int, float], float] = {}
        gains: list[list[float]] = []
        for task in self.config.tasks:
            # Task by task, so that on all processes the same layers run at the same time.
            clips = self._clips(task, self.config.clips)
            label = f"validation: loss of {task}"
            for i, found in zip(
                clips, share_out(self.accelerator, clips, partial(self._losses, task), label), strict=True
            ):
                own, gained = found
                losses |= {(task, i, time): loss for time, loss in zip(self.config.times, own, strict=True)}
                gains += [gained] if gained else []
        row = {"validation/loss": fmean(losses.values())}
        for task in self.config.tasks:
            some = [loss for key, loss in losses.items() if key[0] == task]
            row |= {f"validation/loss/{task}": fmean(some)} if some else {}
        for time in self.config.times:
            row[f"validation/loss/t={time:g}"] = fmean(loss for key, loss in losses.items() if key[2] == time)
        if gains:
            row["validation/caption_gain"] = fmean(itertools.chain(*gains))
            for time, of_clips in zip(self.config.times, zip(*gains, strict=True), strict=True):
                row[f"validation/caption_gain/t={time:g}"] = fmean(of_clips)
        self.accelerator.log({**row, "samples": samples}, step)
        if self.config.sheet_clips:
            self._draw(step)
        transformer.train()
        return row["validation/loss"]

    def _clips(self, task: str, first: int) -> list[int]:
        """Those of the first so many clips that have the task."""
        shapes = [clip_shape(self.dataset.row(i)) for i in range(first)]
        return [i for i, shape in enumerate(shapes) if draw_task(self.config, task, i, shape)]

    def _losses(self, task: str, i: int) -> tuple[list[float], list[float]]:
        """The losses of a clip in a task, at each time; and of a task that is told captions, how much higher they are with
        the caption of another clip, the next that has another: how far the model hears what it is told, and when.

        Of a conditional diffusion model these differences are a classifier's logits (Li et al. 2023, arXiv:2303.16203).
        """
        batch, clips = collate([self.dataset[i]]), self.config.clips
        inputs = self.inputs(batch, self.config.tasks[task], task == PROMPTED, self.config.seed)
        own = self._losses_at_times(inputs)
        captions = [self.dataset.row((i + k) % clips)["caption"] for k in range(1, clips + 1)]
        if task != PROMPTED or len(set(captions)) == 1:  # so of all clips alike, as `share_out` needs it
            return own, []
        other = next(caption for caption in captions if caption != batch["caption"][0])
        states, mask = (x.to(self.accelerator.device) for x in self.text([other]))
        told = self._losses_at_times(inputs | {"text": states, "text_mask": mask})
        return own, [b - a for a, b in zip(own, told, strict=True)]

    def _losses_at_times(self, inputs: dict[str, Tensor]) -> list[float]:
        found = []
        for time in self.config.times:
            at = inputs | {"time": torch.full_like(inputs["time"], time)}
            model = self.pipeline.transformer
            with self.accelerator.autocast():
                losses = denoising_losses(model, at, self.flow, model.config.learn_sigma)
            found.append(losses["loss"].item())
        return found

    # --- Samples --------------------------------------------------------------------------------------------------

    def _sample(self, task: str, i: int) -> Tensor:
        clip = self.dataset[i]
        said, mask = self.text([clip["caption"] if task == PROMPTED else ""])
        prompt: dict[str, Any] = {"prompt_embeds": said, "prompt_attention_mask": mask}
        if task == PROMPTED and self.pipeline.transformer.config.null_text == "prompt":
            nothing, mask = self.text([""])
            prompt |= {"negative_prompt_embeds": nothing, "negative_prompt_attention_mask": mask}
        with self.accelerator.autocast():
            return sample_latents(self.pipeline, self.config, task, clip, **prompt).float().cpu()

    def _draw(self, step: int) -> None:
        samples: dict[tuple[int, str], Tensor] = {}
        for task in self.config.tasks:
            clips = self._clips(task, self.config.sheet_clips)
            found = share_out(self.accelerator, clips, partial(self._sample, task), f"validation: samples of {task}")
            samples |= {(i, task): latents for i, latents in zip(clips, found, strict=True)}
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = {f"{task}/{i}": latents.contiguous() for (i, task), latents in samples.items()}
            save_file(tensors, self.folder / f"step-{step}.safetensors")
            rows: list[tuple] = []
            for i in range(self.config.sheet_clips):
                rows += self._rows(i, {task: latents for (j, task), latents in samples.items() if j == i})
            scale = max(1, 64 // clip_shape(self.dataset.row(0))[2])
            path = self.folder / f"step-{step}.png"
            contact_sheet(rows, path, title=f"held-out clips, step {step}", scale=scale, columns=20)
            log_picture(self.accelerator, "samples", path, step)
        self.accelerator.wait_for_everyone()

    def _rows(self, i: int, samples: dict[str, Tensor]) -> list[tuple]:
        """The rows of a clip: its truth, and for each task what is given and what was generated."""
        clip = self.dataset[i]
        truth = to_pixels(clip["video"])[None]
        rows: list[tuple] = [(f'clip {i}: "{clip["caption"]}"', _frames(truth))]
        for task, latents in samples.items():
            drawn = draw_task(self.config, task, i, clip["shape"])
            assert drawn is not None
            mask = drawn[0][None]
            vae = self.pipeline.vae
            video = decode(vae, latents.to(vae.device), clip["shape"]).float().cpu().clamp(-1, 1)
            given = ~mask[0, 0].bool().flatten(1).any(1).numpy()
            if not mask.all():
                rows.append((f"{task}: given", _frames(torch.where(mask.bool(), 0.0, truth)), given))
            rows.append((f"{task}: generated", _frames(keep_given(video, truth, mask)), given))
        return rows


def _frames(video: Tensor) -> np.ndarray:
    """`1 c t h w` in [-1, 1] -> uint8 `t h w c`."""
    return ((video[0].permute(1, 2, 3, 0) / 2 + 0.5) * 255).round().to(torch.uint8).numpy()
