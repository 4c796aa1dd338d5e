"""Trains the 3D causal VAE: `accelerate launch stgen/train_vae.py --config FILE [key.sub=value ...]`.

The same command resumes. The run folder gets config.yaml, metrics.jsonl, checkpoints/ and export/, a diffusers folder
of the averaged (EMA) weights with the latents' mean and standard deviation in its config.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import Tensor

from stgen.accelerator import make_accelerator
from stgen.checkpoint import check_global_batch, resume, save_checkpoint
from stgen.config import parse_command_line, require, save_config
from stgen.data.reading import ClipDataset, DataConfig, clip_loader, fold_seed, to_pixels
from stgen.masks import MaskSpec, draw_mixture, hide
from stgen.models.autoencoder import AutoencoderKLSTGen
from stgen.optimization import OptimizerConfig, learning_rate, make_optimizer
from stgen.tracking import progress_bar


@dataclass
class TrainVAEConfig:
    """A VAE training run."""

    run: str = "???"
    """Run folder; an unfinished run in it is resumed."""
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of AutoencoderKLSTGen."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    samples: int = 100_000
    """Clips to see in all."""
    batch_size: int = 8
    """Clips of one process in one forward."""
    accumulate: int = 1
    """Forwards of one optimizer step."""
    kl_weight: float = 1e-6
    """Weight of the KL term, the latents' divergence from N(0, 1) averaged over cells and summed over channels."""
    masks: list[MaskSpec] = field(default_factory=lambda: [MaskSpec()])
    """Mixture of masks; its clips are shown with the masked pixels hidden, as the transformer's condition is."""
    masked_fraction: float = 0.5
    """Share of clips that are shown masked."""
    seed: int = 0
    """Seeds the weights, the order of the data and all draws."""
    checkpoint_every: int = 1000
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    log_every: int = 20
    """Optimizer steps between rows of metrics.jsonl."""
    statistics_clips: int = 256
    """Clips over which the latents' mean and standard deviation are measured at the end."""

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "accumulate", "checkpoint_every", "keep_checkpoints", "log_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.statistics_clips >= 1, "statistics_clips", self.statistics_clips, "1 or more")
        require(0 <= self.masked_fraction <= 1, "masked_fraction", self.masked_fraction, "0 to 1")


class ReconstructionObjective(torch.nn.Module):
    """L = |x - D(z)|_1 + kl_weight * KL(q(z|x) || N(0, 1)), z ~ q(z|x)  (Kingma & Welling 2013, arXiv:1312.6114).

    A module around the VAE, since DDP and DeepSpeed synchronise what goes through one `forward`.
    """

    def __init__(self, vae: AutoencoderKLSTGen, kl_weight: float) -> None:
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, video: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses of `video` `b c t h w` in [-1, 1]; `noise` is standard normal, of the latents' shape."""
        posterior = self.vae.encode(video).latent_dist
        sample = self.vae.decode(posterior.mean + posterior.std * noise, sample_size=video.shape[2:]).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        l1 = F.l1_loss(sample.float(), video)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean()
        return {"loss": l1 + self.kl_weight * kl, "l1": l1, "kl": kl}


def prepare_batch(
    batch: dict[str, Any], config: TrainVAEConfig, latent_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Video, part of it masked, and posterior noise; every draw is a function of (seed, position) alone."""
    video = to_pixels(batch["video"])
    noise = torch.empty(len(video), *latent_shape)
    for i, position in enumerate(batch["position"]):
        generator = torch.Generator().manual_seed(fold_seed(config.seed, position))
        if torch.rand((), generator=generator) < config.masked_fraction:
            video[i] = hide(video[i], draw_mixture(config.masks, tuple(video.shape[2:]), generator))
        noise[i].normal_(generator=generator)
    return video, noise


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
        run.mkdir(parents=True, exist_ok=True)
        save_config(config, run / "config.yaml")

    objective, optimizer = accelerator.prepare(
        ReconstructionObjective(vae, config.kl_weight), make_optimizer(vae, config.optimizer)
    )
    ema = EMAModel(vae.parameters(), decay=config.optimizer.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    accelerator.init_trackers("stgen")

    step, samples = resume(accelerator, run)
    global_batch = config.batch_size * accelerator.num_processes * config.accumulate
    check_global_batch(samples, global_batch)
    p, s = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    t, h, w = dataset.shape
    latent_shape = (vae.config.latent_channels, 1 + -(-(t - 1) // p), -(-h // s), -(-w // s))
    batches = clip_loader(
        dataset, samples, config.batch_size, config.data.workers, accelerator.process_index, accelerator.num_processes
    )
    bar = progress_bar(config.samples, samples, accelerator.is_main_process, "train_vae")
    logged: list[dict[str, Tensor]] = []
    while samples < config.samples:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, samples, config.samples)
        for _ in range(config.accumulate):
            with accelerator.accumulate(objective):
                video, noise = prepare_batch(next(batches), config, latent_shape)
                losses = objective(video.to(accelerator.device), noise.to(accelerator.device))
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(objective.parameters(), config.optimizer.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                logged.append({name: value.detach() for name, value in losses.items()})
        ema.step(vae.parameters())
        step, samples = step + 1, samples + global_batch
        bar.update(global_batch)
        if step % config.log_every == 0 or samples >= config.samples:
            values = {name: torch.stack([row[name] for row in logged]).mean() for name in logged[0]}
            values = {name: value.item() for name, value in accelerator.reduce(values, "mean").items()}
            accelerator.log({**values, "samples": samples, "lr": optimizer.param_groups[0]["lr"]}, step)
            bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
            logged = []
        if step % config.checkpoint_every == 0 or samples >= config.samples:
            save_checkpoint(accelerator, run, step, samples, config.keep_checkpoints)
    bar.close()

    if accelerator.is_main_process:
        ema.copy_to(vae.parameters())
        mean, std = measure_latents(vae.eval(), dataset, config.statistics_clips, accelerator.device)
        vae.register_to_config(latents_mean=mean, latents_std=std)
        vae.save_pretrained(run / "export")
        print(f"the VAE is in {run / 'export'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    train_vae(parse_command_line(TrainVAEConfig, __doc__))
