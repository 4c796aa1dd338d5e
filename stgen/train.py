"""Trains the transformer: `accelerate launch stgen/train.py --config FILE [key.sub=value ...]`.

The same command resumes. The run folder gets config.yaml, metrics.jsonl, checkpoints/ and export/, a diffusers folder
that `STGenPipeline.from_pretrained` opens: averaged (EMA) weights by default, the last ones as `variant="raw"`.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from stgen.accelerator import make_accelerator, stop_on_value_error
from stgen.config import parse_command_line, require, require_arguments
from stgen.data.reading import ClipDataset, clip_shape, fold_seed, to_pixels
from stgen.loop import LoopConfig, begin_run, fit
from stgen.masks import MaskSpec, draw_mixture, fold_mask, hide
from stgen.models.latents import VideoVAE, compression_ratios, encode, latent_channels, load_vae
from stgen.models.transformer import STGenTransformer3DModel
from stgen.objective import FlowConfig, denoising_losses, make_scheduler
from stgen.pipelines import STGenPipeline
from stgen.text import TextCache, load_text_encoder


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
    flow: FlowConfig = field(default_factory=FlowConfig)
    gradient_checkpointing: bool = False
    """Trades compute for memory: activations are computed again in the backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_text_length >= 1, "max_text_length", self.max_text_length, "1 or more")
        require(0 <= self.text_dropout <= 1, "text_dropout", self.text_dropout, "0 to 1")
        require(len(self.masks) > 0, "masks", self.masks, "at least one entry")
        # Rectified flow is an ODE without a variance to learn, and its schedulers take none; a regression has no steps.
        objective = self.flow.objective
        require(
            not (self.learn_sigma and objective in ("flow", "regression")),
            "model.learn_sigma",
            self.learn_sigma,
            f"false with flow.objective={objective}; epsilon and v_prediction have a variance to learn",
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

    The masked video is encoded by itself, so nothing that the model sees depends on a hidden pixel. A batch without any
    given pixel needs no such encoding.

    Returns:
        latents, noise, condition_latents `b c t h w`; condition_mask `b p t h w`; time `b`; text `b n d`, text_mask and
        drop_text `b`; fps, num_frames, height, width `b`.
    """
    video = to_pixels(batch["video"])
    sizes = dict(zip(("num_frames", "height", "width"), video.shape[2:], strict=True))
    own_null = config.model.get("null_text", "prompt") != "prompt"  # the transformer has a null text of its own
    masks, captions, dropped, times, seeds = [], [], [], [], []
    for position, caption in zip(batch["position"], batch["caption"], strict=True):
        generator = torch.Generator().manual_seed(fold_seed(config.seed, position))
        masks.append(draw_mixture(config.masks, tuple(video.shape[2:]), generator))
        drop = bool(torch.rand((), generator=generator) < config.text_dropout)
        captions.append("" if drop and not own_null else caption)
        dropped.append(drop and own_null)
        times.append(config.flow.draw_time(generator))
        seeds.append(generator)
    mask = torch.stack(masks)
    states, text_mask = text(captions)

    video, mask = video.to(device), mask.to(device)
    some_given = (mask == 0).flatten(1).any(1)
    encoded = encode(vae, torch.cat([video, hide(video, mask)[some_given]]))
    latents, condition = encoded[: len(video)], torch.zeros_like(encoded[: len(video)])
    condition[some_given] = encoded[len(video) :]
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in seeds])
    return {
        "latents": latents,
        "noise": noise.to(device),
        "time": config.flow.shifted(torch.cat(times), sizes["height"], sizes["width"], latents.shape[2]).to(device),
        "condition_latents": condition,
        "condition_mask": fold_mask(mask, *compression_ratios(vae)),
        "text": states.to(device),
        "text_mask": text_mask.to(device),
        "drop_text": torch.tensor(dropped, device=device),
        "fps": batch["fps"].to(device),
        **{name: torch.full((len(video),), float(n), device=device) for name, n in sizes.items()},
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
    dataset = ClipDataset(config.data, config.seed)
    vae = load_vae(config.vae).requires_grad_(False).to(accelerator.device)
    cache = run / "cache" / "text.safetensors"
    if accelerator.is_main_process:
        begin_run(config)
        TextCache.build(cache, config.text_encoder, ["", *dataset.captions()], config.max_text_length)
    accelerator.wait_for_everyone()
    text = TextCache(cache)

    largest = (config.data.num_frames, config.data.height, config.data.width)
    fps = statistics.median(float(row["fps"]) for row in dataset.rows if clip_shape(row) == largest)
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
