"""Trains the transformer: `accelerate launch stgen/train.py --config FILE [key.sub=value ...]`.

The same command resumes. The run folder gets config.yaml, metrics.jsonl, checkpoints/ and export/, a diffusers folder
that `STGenPipeline.from_pretrained` opens: averaged (EMA) weights by default, the last ones as `variant="raw"`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from stgen.accelerator import make_accelerator, stop_on_value_error
from stgen.config import parse_command_line, require, require_arguments
from stgen.data.color import to_pixels
from stgen.data.reading import ClipDataset
from stgen.encoding import EMPTY_PROMPT, draw_mask, find_stored, read_encoding
from stgen.loop import LoopConfig, begin_run, fit
from stgen.masks import MaskSpec, fold_mask, given_latents_are_exact, hide
from stgen.models.latents import (
    Moments,
    VideoVAE,
    compression_ratios,
    encode_moments,
    latent_channels,
    load_vae,
    normalise,
    temporal_reach,
)
from stgen.models.transformer import STGenTransformer3DModel
from stgen.objective import FlowConfig, denoising_losses, make_scheduler
from stgen.pipelines import STGenPipeline
from stgen.text import TextCache, load_text_encoder, pad_states


@dataclass
class TrainConfig(LoopConfig):
    """A transformer training run."""

    vae: str = "???"
    """Folder of a trained VAE: an AutoencoderKLSTGen or another of `stgen.models.latents.VideoVAE`."""
    text_encoder: str = "all-MiniLM-L6-v2"
    """A transformers text encoder, by folder or name; its per-token states condition the model. At scale: a T5."""
    max_text_length: int = 128
    """Tokens of a caption; longer ones are cut with a warning."""
    text_dropout: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of STGenTransformer3DModel; those that follow from VAE, text encoder and data are filled in."""
    masks: list[MaskSpec] = field(default_factory=lambda: [MaskSpec()])
    """Mixture of masks; each clip draws its own."""
    use_encoded: bool = True
    """Takes latents and text states that `stgen data encode` stored with the clips in place of encoding; false ignores them."""
    sample_posterior: bool = False
    """Draws the latents to learn from the VAE's posterior, as latent diffusion does, instead of taking its mode. Given ones
    are modes always, as in the pipelines."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    gradient_checkpointing: bool = False
    """Trades compute for memory: activations are computed again in the backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_text_length >= 1, "max_text_length", self.max_text_length, "1 or more")
        require(0 <= self.text_dropout <= 1, "text_dropout", self.text_dropout, "0 to 1")
        require(len(self.masks) > 0, "masks", self.masks, "at least one entry")
        # Rectified flow is an ODE without a variance to learn; its schedulers take none.
        require(
            not (self.learn_sigma and self.flow.objective == "flow"),
            "model.learn_sigma",
            self.learn_sigma,
            "false with flow.objective=flow; epsilon and v_prediction have a variance to learn",
        )
        derived = (
            "in_channels",
            "text_dim",
            "sample_frames",
            "sample_height",
            "sample_width",
            "sample_fps",
        )
        no_labels = ("num_classes",)  # clips have captions
        require_arguments(STGenTransformer3DModel, self.model, "model", excluded=derived + no_labels)

    @property
    def learn_sigma(self) -> bool:
        """Whether the model predicts the variance of its steps too."""
        return bool(self.model.get("learn_sigma", False))


def make_model(config: TrainConfig, vae: VideoVAE, text_dim: int, fps: float) -> STGenTransformer3DModel:
    """The transformer that fits this VAE, text encoder and data, with weights drawn from `config.seed`."""
    p = compression_ratios(vae)[0]
    mask_channels = config.model.get("mask_channels", p)
    require(
        mask_channels in (0, p), "model.mask_channels", mask_channels, f"{p}, the frames of a latent, or 0 for none"
    )
    torch.manual_seed(config.seed)  # for the initial weights; every later draw has a generator of its own
    return STGenTransformer3DModel(
        in_channels=latent_channels(vae),
        text_dim=text_dim,
        sample_frames=config.data.num_frames,
        sample_height=config.data.height,
        sample_width=config.data.width,
        sample_fps=fps,
        **{**config.model, "mask_channels": mask_channels},
    )


@torch.no_grad()
def model_inputs(
    batch: dict[str, Any], config: TrainConfig, vae: VideoVAE, text: TextCache, device: torch.device
) -> dict[str, Tensor]:
    """Everything the loss needs, from a batch of clips; every draw is a function of (seed, position) alone.

    The masked video is encoded by itself, so nothing that the model sees depends on a hidden pixel; but where causality
    makes the latents of the given cells those of the whole clip (`given_latents_are_exact`), these are taken. What the
    batch has stored (`stgen data encode`) is not encoded again.

    Returns:
        latents, noise, condition_latents (0 in wholly hidden cells) `b c t h w`; condition_mask `b p t h w`; time `b`; text
        `b n d`, text_mask and drop_text `b`; fps, num_frames, height, width `b`.
    """
    video = to_pixels(batch["video"], device)
    sizes = dict(zip(("num_frames", "height", "width"), video.shape[2:], strict=True))
    own_null = config.model.get("null_text", "prompt") != "prompt"  # the transformer has a null text of its own
    masks, states, dropped, times, seeds = [], [], [], [], []
    for i, (position, caption) in enumerate(zip(batch["position"], batch["caption"], strict=True)):
        mask, generator = draw_mask(config.masks, config.seed, position, tuple(video.shape[2:]))
        masks.append(mask)
        drop = bool(torch.rand((), generator=generator) < config.text_dropout)
        stored_text = "text" in batch and not (drop and not own_null)
        states.append(batch["text"][i].float() if stored_text else text["" if drop and not own_null else caption])
        dropped.append(drop and own_null)
        times.append(config.flow.draw_time(generator))
        seeds.append(generator)
    text_states, text_mask = pad_states(states)

    mask = torch.stack(masks).to(device)
    (p, factor), reach = compression_ratios(vae), temporal_reach(vae)
    folded = fold_mask(mask, p, factor)
    has_video = torch.ones(len(mask), dtype=torch.bool, device=device)
    if "latents" in batch:
        moments = Moments(**{name: x.to(device).float() for name, x in batch["latents"].items()})
        has_video = batch["has_video"].to(device)
    else:
        moments = encode_moments(vae, video)
    mean, logvar = moments.mean, moments.logvar
    # The masked video is encoded by itself where it must be, up to the last latent that has anything given.
    anew = ~given_latents_are_exact(mask, p, reach)
    hidden = folded.amin(1, keepdim=True) >= 1
    condition = mean.clone()
    if anew.any():
        some_given = (~hidden[anew]).amax((0, 1, 3, 4))
        last = mean.shape[2] if reach == "clip" else 1 + int(some_given.nonzero().max())
        masked = hide(video[anew[has_video]], mask[anew])[:, :, : 1 + (last - 1) * p]
        condition[anew, :, :last] = encode_moments(vae, masked).mean
    # What the model sees of wholly hidden cells is nothing, whatever a VAE makes of grey there.
    condition = normalise(vae, condition).masked_fill(hidden, 0)
    noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in seeds])
    if config.sample_posterior:
        require(logvar is not None, "sample_posterior", True, "false with this VAE, whose latents are certain")
        drawn = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in seeds])
        mean = mean + (0.5 * logvar).exp() * drawn.to(device)
    latents = normalise(vae, mean)
    return {
        "latents": latents,
        "noise": noise.to(device),
        "time": config.flow.shifted(torch.cat(times), sizes["height"], sizes["width"], latents.shape[2]).to(device),
        "condition_latents": condition,
        "condition_mask": folded,
        "text": text_states.to(device),
        "text_mask": text_mask.to(device),
        "drop_text": torch.tensor(dropped, device=device),
        "fps": batch["fps"].to(device),
        **{name: torch.full((len(mask),), float(n), device=device) for name, n in sizes.items()},
    }


def export(config: TrainConfig, model: STGenTransformer3DModel, ema: EMAModel, vae: VideoVAE) -> Path:
    """Writes `run/export`, a diffusers folder with the averaged weights, and the last ones as variant `raw`."""
    folder = Path(config.run) / "export"
    model.save_pretrained(folder / "transformer", variant="raw")
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    tokenizer, text_encoder = load_text_encoder(config.text_encoder)
    pipeline = STGenPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=model,
        scheduler=make_scheduler(config.flow),
    )
    pipeline.save_pretrained(folder)
    ema.restore(model.parameters())
    return folder


def train(config: TrainConfig) -> None:
    """Trains to `config.samples` clips, from the newest checkpoint of the run if there is one, and exports."""
    run = Path(config.run)
    accelerator = make_accelerator(run, config.batch_size, config.accumulate, config.optimizer.max_grad_norm)
    vae = load_vae(config.vae).requires_grad_(False).to(accelerator.device)
    moments = ("mean", "logvar") if config.sample_posterior else ("mean",)
    find = partial(find_stored, vae, config.data.shapes, config.masks, config.seed, moments)
    dataset = ClipDataset(config.data, config.seed, find_stored=find if config.use_encoded else None)
    cache = run / "cache" / "text.safetensors"
    if accelerator.is_main_process:
        encoding = read_encoding(dataset.source, dataset.rows) if config.use_encoded else None
        if encoding is not None:
            encoding.check(config.vae, config.text_encoder, config.max_text_length)
        begin_run(config)
        if encoding is not None and encoding.text is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            dataset.source.fetch(EMPTY_PROMPT, cache)  # no other prompt is needed
        else:
            TextCache.build(cache, config.text_encoder, ["", *dataset.captions()], config.max_text_length)
    accelerator.wait_for_everyone()
    text = TextCache(cache)

    largest = (config.data.num_frames, config.data.height, config.data.width)
    fps = float(np.median(dataset.rows.fps[(dataset.rows.shapes == largest).all(1)]))
    net = make_model(config, vae, text.dim, fps)
    if config.gradient_checkpointing:
        net.enable_gradient_checkpointing()

    def compute_losses(model: torch.nn.Module, batch: dict[str, Any], samples: int) -> dict[str, Tensor]:
        inputs = model_inputs(batch, config, vae, text, accelerator.device)
        return denoising_losses(model, inputs, config.flow, config.learn_sigma)

    ema = fit(accelerator, config, dataset, net, compute_losses)
    if accelerator.is_main_process:
        print(f"the pipeline is in {export(config, net, ema, vae)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def main(argv: Sequence[str] | None = None) -> None:
    with stop_on_value_error():
        train(parse_command_line(TrainConfig, __doc__, argv))


if __name__ == "__main__":
    main()
