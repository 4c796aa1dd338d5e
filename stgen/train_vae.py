"""Trains the 3D causal VAE: `accelerate launch stgen/train_vae.py --config FILE [key.sub=value ...]`.

The same command resumes. The run folder gets config.yaml, metrics.jsonl, checkpoints/ and export/, a diffusers folder
of the averaged (EMA) weights with the latents' mean and standard deviation in its config.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stgen.accelerator import make_accelerator, stop_on_value_error
from stgen.config import parse_command_line, require, require_arguments
from stgen.data.reading import ClipDataset, fold_seed, to_pixels
from stgen.loop import LoopConfig, begin_run, fit
from stgen.masks import MaskSpec, draw_mixture, hide
from stgen.models.autoencoder import AutoencoderKLSTGen
from stgen.models.latents import latent_shape

RECONSTRUCTION = {"l1": F.l1_loss, "mse": F.mse_loss}


@dataclass
class TrainVAEConfig(LoopConfig):
    """A VAE training run."""

    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of AutoencoderKLSTGen."""
    window: int | None = None
    """Consecutive frames of a clip that one step sees, drawn at random; None sees all. The VAE is causal and
    convolutional, so a few latent frames teach it as much for a fraction of the compute."""
    reconstruction: str = "l1"
    """Reconstruction loss: l1, or mse, which leaves the all-background solution faster on sparse images."""
    kl_weight: float = 1e-6
    """Weight of the KL term, the latents' divergence from N(0, 1) averaged over cells and summed over channels."""
    masks: list[MaskSpec] = field(default_factory=lambda: [MaskSpec()])
    """Mixture of masks; its clips are shown with the masked pixels hidden, as the transformer's condition is."""
    masked_fraction: float = 0.5
    """Share of clips that are shown masked."""
    statistics_clips: int = 256
    """Clips over which the latents' mean and standard deviation are measured at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.statistics_clips >= 1, "statistics_clips", self.statistics_clips, "1 or more")
        require(
            self.reconstruction in RECONSTRUCTION, "reconstruction", self.reconstruction, " or ".join(RECONSTRUCTION)
        )
        fits = self.window is None or 1 <= self.window <= self.data.num_frames
        require(fits, "window", self.window, f"1 to data.num_frames={self.data.num_frames}, or null")
        measured = ("latents_mean", "latents_std")
        require_arguments(AutoencoderKLSTGen, self.model, "model", excluded=measured)
        require(0 <= self.masked_fraction <= 1, "masked_fraction", self.masked_fraction, "0 to 1")


class ReconstructionObjective(torch.nn.Module):
    """L = d(x, D(z)) + kl_weight * KL(q(z|x) || N(0, 1)), z ~ q(z|x)  (Kingma & Welling 2013, arXiv:1312.6114).

    d is the mean absolute or squared error. A module around the VAE, since DDP and DeepSpeed synchronise what goes
    through one `forward`.
    """

    def __init__(self, vae: AutoencoderKLSTGen, reconstruction: str, kl_weight: float) -> None:
        super().__init__()
        self.vae, self.reconstruction, self.kl_weight = vae, reconstruction, kl_weight

    def forward(self, video: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses of `video` `b c t h w` in [-1, 1]; `noise` is standard normal, of the latents' shape."""
        posterior = self.vae.encode(video).latent_dist
        sample = self.vae.decode(posterior.mean + posterior.std * noise, sample_size=video.shape[2:]).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        distance = RECONSTRUCTION[self.reconstruction](sample.float(), video)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean()
        return {"loss": distance + self.kl_weight * kl, self.reconstruction: distance, "kl": kl}


def prepare_batch(batch: dict[str, Any], config: TrainVAEConfig, vae: AutoencoderKLSTGen) -> tuple[Tensor, Tensor]:
    """Video, part of it masked, and posterior noise; every draw is a function of (seed, position) alone."""
    video = to_pixels(batch["video"])
    window = config.window or video.shape[2]
    shape = (window, *video.shape[3:])
    clips, noises = [], []
    for clip, position in zip(video, batch["position"], strict=True):
        generator = torch.Generator().manual_seed(fold_seed(config.seed, position))
        start = int(torch.randint(clip.shape[1] - window + 1, (), generator=generator))
        clip = clip[:, start : start + window]
        if torch.rand((), generator=generator) < config.masked_fraction:
            clip = hide(clip, draw_mixture(config.masks, shape, generator))
        clips.append(clip)
        noises.append(torch.randn(latent_shape(vae, *shape), generator=generator))
    return torch.stack(clips), torch.stack(noises)


@torch.no_grad()
def measure_latents(
    vae: AutoencoderKLSTGen, dataset: ClipDataset, clips: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over the first `clips` positions."""
    total, squares, count = torch.zeros(()), torch.zeros(()), 0
    for position in range(clips):
        z = vae.encode(to_pixels(dataset[position]["video"])[None].to(device)).latent_dist.mode().double().cpu()
        total = total + z.sum((0, 2, 3, 4))
        squares = squares + z.square().sum((0, 2, 3, 4))
        count += z[:, 0].numel()
    mean = total / count
    return mean.tolist(), (squares / count - mean.square()).sqrt().tolist()


def train_vae(config: TrainVAEConfig) -> None:
    """Trains to `config.samples` clips, from the newest checkpoint of the run if there is one."""
    run = Path(config.run)
    accelerator = make_accelerator(run, config.batch_size, config.accumulate, config.optimizer.max_grad_norm)
    dataset = ClipDataset(config.data, config.seed)
    torch.manual_seed(config.seed)  # for the initial weights; all later draws have generators of their own
    vae = AutoencoderKLSTGen(**config.model)
    if accelerator.is_main_process:
        begin_run(config)
    accelerator.wait_for_everyone()

    def compute_losses(model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        video, noise = prepare_batch(batch, config, vae)
        return model(video.to(accelerator.device), noise.to(accelerator.device))

    objective = ReconstructionObjective(vae, config.reconstruction, config.kl_weight)
    ema = fit(accelerator, config, dataset, objective, compute_losses)
    if accelerator.is_main_process:
        ema.copy_to(vae.parameters())
        mean, std = measure_latents(vae.eval(), dataset, config.statistics_clips, accelerator.device)
        vae.register_to_config(latents_mean=mean, latents_std=std)
        vae.save_pretrained(run / "export")
        print(f"the VAE is in {run / 'export'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def main(argv: Sequence[str] | None = None) -> None:
    with stop_on_value_error():
        train_vae(parse_command_line(TrainVAEConfig, __doc__, argv))


if __name__ == "__main__":
    main()
