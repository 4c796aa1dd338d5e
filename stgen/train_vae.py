"""Trains the 3D causal VAE: `accelerate launch stgen/train_vae.py --config FILE [key.sub=value ...]`.

The same command resumes. The run folder gets config.yaml, metrics.jsonl, checkpoints/, samples/ (reconstruction sheets)
and export/, a diffusers folder of the averaged (EMA) weights with the latents' mean and standard deviation in its config.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from stgen.accelerator import alone_in, end_training, full_weights, make_accelerator, share_out, stop_on_value_error
from stgen.averaging import AveragedWeights
from stgen.config import parse_command_line, require, require_arguments
from stgen.data.color import to_pixels
from stgen.data.reading import ClipDataset, fold_seed
from stgen.finetuning import names_to_train
from stgen.loop import ARCHITECTURE, LoopConfig, Stage, begin_run, check_stages, fit
from stgen.masks import MaskSpec, draw_mixture, hide
from stgen.models.autoencoder import AutoencoderKLSTGen
from stgen.models.inflation import inflate
from stgen.models.latents import latent_shape, load_vae
from stgen.models.loading import load_every_tensor
from stgen.models.perceptual import NETWORKS, PerceptualDistance
from stgen.reconstruction import measure, reconstruction_sheet
from stgen.tracking import log_picture
from stgen.vae_objective import (
    RECONSTRUCTION,
    Adversary,
    DiscriminatorConfig,
    PerceptualConfig,
    VAEObjective,
    palindrome,
)


@dataclass
class ValidationConfig:
    """Reconstruction of clips that the run never trains on, by the averaged weights."""

    path: str = "???"
    """Folder of held-out shards and their index, with clips of the shape, or of every shape, that `data` asks for."""
    clips: int = 16
    """Its first so many clips."""
    every: int = 1000
    """Optimizer steps between validations; the last step has one too."""
    network: str = "efficientnet_lite0"
    """Network of the perceptual distance; see `perceptual.network`."""

    def __post_init__(self) -> None:
        for name in ("clips", "every"):
            require(getattr(self, name) >= 1, f"validation.{name}", getattr(self, name), "1 or more")
        require(self.network in NETWORKS, "validation.network", self.network, ", ".join(NETWORKS))


@dataclass
class TrainVAEConfig(LoopConfig):
    """A VAE training run."""

    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of AutoencoderKLSTGen."""
    init: str | None = None
    """Folder of the weights that the run begins with; null draws them from `seed`. An AutoencoderKLSTGen as `model` has
    it; or an image VAE (AutoencoderKL, such as Stable Diffusion's), which is inflated to a causal video VAE: `model` then
    says `temporal_downsample` alone."""
    frozen: list[str] = field(default_factory=list)
    """Parameters that do not train, by patterns of their names as a shell has them. With `["encoder.*"]` what was trained on
    the latents of `init`, or stores them, goes on with the new decoder: they and their mean and deviation stay as they were."""
    gradient_checkpointing: bool = False
    """Trades compute for memory: activations are computed again in the backward pass."""
    window: Any = None
    """Consecutive frames of a clip that one step sees, at a place drawn at random: a number, a range [low, high] from
    which each forward draws its own (no more than the clip has), or null for all. The VAE is causal and convolutional,
    so a few latent frames teach it as much for a fraction of the compute."""
    image_fraction: float = 0.0
    """Share of forwards that see single frames: joint training on images. Single frames are never masked."""
    reconstruction: str = "l1"
    """Reconstruction loss: l1; charbonnier, its smooth form; mse, which leaves the all-background solution faster on
    sparse images; or clipped_mse, for clips with much pure black or white, which mse leaves a haze on."""
    kl_weight: float = 1e-6
    """Weight of the KL term, the latents' divergence from N(0, 1) averaged over cells and summed over channels."""
    perceptual: PerceptualConfig | None = None
    """Perceptual loss; null for none."""
    discriminator: DiscriminatorConfig | None = None
    """Adversarial loss; null for none."""
    ping_pong_weight: float = 0.0
    """Weight of temporal consistency: clips are seen forward and then backward, and both reconstructions of a frame
    must agree. Twice the compute; 0 switches it off."""
    masks: list[MaskSpec] = field(default_factory=lambda: [MaskSpec()])
    """Mixture of masks; its clips are shown with the masked pixels hidden, as the transformer's condition is."""
    masked_fraction: float = 0.0
    """Share of clips that are shown masked."""
    mask_target: str = "shown"
    """What a masked clip is reconstructed to. shown: itself, hidden pixels and all, since the transformer's condition is
    encoded so. original: the whole clip, from what is left of it (MotionAura, arXiv:2410.07659, whose masks are
    `{kind: random_frames}`)."""
    validation: ValidationConfig | None = None
    """Measures on held-out clips; null for none."""
    statistics_clips: int = 256
    """Clips over which the latents' mean and standard deviation are measured at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.statistics_clips >= 1, "statistics_clips", self.statistics_clips, "1 or more")
        require(
            self.reconstruction in RECONSTRUCTION, "reconstruction", self.reconstruction, " or ".join(RECONSTRUCTION)
        )
        ends = self.window if isinstance(self.window, list) else [self.window] * 2
        numbers = len(ends) == 2 and all(type(end) is int for end in ends)
        fits = self.window is None or (numbers and 1 <= ends[0] <= ends[1])
        require(fits, "window", self.window, "a number of frames, a range [low, high] of such, or null")
        measured = ("latents_mean", "latents_std")
        require_arguments(AutoencoderKLSTGen, self.model, "model", excluded=measured)
        for name in ("masked_fraction", "image_fraction"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        require(
            self.masks or self.masked_fraction == 0, "masks", self.masks, "at least one with masked_fraction above 0"
        )
        for name in ("kl_weight", "ping_pong_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.mask_target in ("shown", "original"), "mask_target", self.mask_target, "shown or original")

    def window_of(self, frames: int) -> tuple[int, int]:
        """Fewest and most consecutive frames that a step sees of a clip of `frames`: an image is seen as it is.

        Raises:
            ValueError: the clip is shorter than the window.
        """
        if self.window is None or frames == 1:
            return frames, frames
        low, high = self.window if isinstance(self.window, list) else (self.window, self.window)
        require(low <= frames, "window", self.window, f"at most {frames}, the frames of some clips, or null")
        return low, min(high, frames)

    def draw_window(self, frames: int, position: int) -> int:
        """How many frames a forward sees of clips of `frames`, drawn by the position of its first clip."""
        generator = torch.Generator().manual_seed(fold_seed(self.seed, position, 1))
        if torch.rand((), generator=generator) < self.image_fraction:
            return 1
        low, high = self.window_of(frames)
        return int(torch.randint(low, high + 1, (), generator=generator))


def prepare_batch(
    batch: dict[str, Any], config: TrainVAEConfig, vae: AutoencoderKLSTGen
) -> tuple[Tensor, Tensor, Tensor]:
    """What is shown, part of it masked, what it shall become, and posterior noise.

    Every draw is a function of (seed, position) alone: those of a clip of its own position, those of the forward of its
    first clip's.
    """
    video = to_pixels(batch["video"], vae.device)
    window = config.draw_window(video.shape[2], batch["position"][0])
    shape = (window, *video.shape[3:])
    shown, targets, noises = [], [], []
    for clip, position in zip(video, batch["position"], strict=True):
        generator = torch.Generator().manual_seed(fold_seed(config.seed, position))
        start = int(torch.randint(clip.shape[1] - window + 1, (), generator=generator))
        clip = clip[:, start : start + window]
        masked = clip
        if torch.rand((), generator=generator) < config.masked_fraction and window > 1:
            masked = hide(clip, draw_mixture(config.masks, shape, generator).to(clip.device))
        shown.append(masked)
        targets.append(masked if config.mask_target == "shown" else clip)
        length = 2 * window - 1 if config.ping_pong_weight else window
        noises.append(torch.randn(latent_shape(vae, length, *shape[1:]), generator=generator))
    pair = torch.stack(shown), torch.stack(targets)
    if config.ping_pong_weight:
        pair = palindrome(pair[0]), palindrome(pair[1])
    return *pair, torch.stack(noises)


def freeze(vae: AutoencoderKLSTGen, config: TrainVAEConfig) -> AutoencoderKLSTGen:
    """Leaves open to training what trains.

    Raises:
        ValueError: a pattern of `frozen` matches nothing, or nothing is left, or not what a discriminator needs.
    """
    trained = names_to_train(vae, config.frozen)
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name in trained)
    weighed = config.discriminator is None or vae.decoder.conv_out.weight.requires_grad
    require(
        weighed, "frozen", config.frozen, "all but decoder.conv_out, whose gradients weigh the discriminator's loss"
    )
    return vae


def make_vae(config: TrainVAEConfig) -> AutoencoderKLSTGen:
    """The VAE that a run begins with: `config.model`, with weights from torch's global generator or from `config.init`.

    Raises:
        ValueError: `init` holds neither an AutoencoderKLSTGen, of the same names and shapes, nor an image VAE; see `freeze`.
    """
    if config.init is None:
        return freeze(AutoencoderKLSTGen(**config.model), config)
    allowed = "a folder of a saved AutoencoderKLSTGen or AutoencoderKL"
    try:
        given = load_vae(config.init)
    except (OSError, ValueError) as error:
        raise ValueError(f"init is {config.init!r}, allowed: {allowed}: {error}") from error
    if isinstance(given, AutoencoderKL):
        require_arguments(inflate, config.model, "model", excluded=("image_vae",))
        vae = inflate(given, **config.model)
    else:
        require(isinstance(given, AutoencoderKLSTGen), "init", config.init, allowed)
        vae = AutoencoderKLSTGen(**config.model)
        load_every_tensor(vae, given.state_dict(), f"init: {config.init}")
        vae.register_to_config(latents_mean=given.config.latents_mean, latents_std=given.config.latents_std)
    freeze(vae, config)
    if any(parameter.requires_grad for parameter in vae.encoder.parameters()):  # its latents will be others
        vae.register_to_config(latents_mean=None, latents_std=None)
    return vae


@torch.no_grad()
def measure_latents(
    vae: AutoencoderKLSTGen, dataset: ClipDataset, clips: int, accelerator: Accelerator
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over the first `clips` positions, which the ranks share out.

    Every cell counts once, so of clips of several shapes the longer and larger ones count for more.
    """

    def sums(position: int) -> Tensor:
        """`3 z`: of values, of squares, and how many."""
        video = to_pixels(dataset[position]["video"])[None].to(accelerator.device, vae.dtype)
        latents = vae.encode(video).latent_dist.mode().double().cpu().transpose(0, 1).flatten(1)
        return torch.stack([latents.sum(1), latents.square().sum(1), torch.ones_like(latents).sum(1)])

    total, squares, count = torch.stack(share_out(accelerator, range(clips), sums, "latent statistics")).sum(0)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    # A channel that never changes has nothing to scale; dividing by 0 would make it NaN.
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()


class Validator:
    """Reconstructs held-out clips with the averaged weights: a row of metrics.jsonl and a sheet in `run/samples/`.

    Raises:
        ValueError: the folder holds too few clips, or what measures them is not installed.
    """

    MEASURES = ("psnr", "ssim", "temporal_difference_error", "perceptual_distance")
    SHEET_CLIPS = 4

    def __init__(self, config: TrainVAEConfig, settings: ValidationConfig, accelerator: Accelerator) -> None:
        self.clips, self.accelerator, self.folder = settings.clips, accelerator, Path(config.run) / "samples"
        self.dataset = ClipDataset(replace(config.data, path=settings.path, index=None), shuffle=False)
        held_out = len(self.dataset)
        require(self.clips <= held_out, "validation.clips", self.clips, f"at most {held_out}, those of {settings.path}")
        # SSIM is scikit-image's; to miss it after the first thousand steps would be late.
        require(find_spec("skimage") is not None, "validation", settings.path, "null without stgen's extra `eval`")
        self.distance = PerceptualDistance(settings.network, accelerator.device)

    @torch.no_grad()
    def __call__(self, vae: AutoencoderKLSTGen, step: int, samples: int) -> float:
        """Every rank calls it and does its share; the scores depend on the weights alone. Returns the perceptual distance."""

        def score(i: int) -> dict[str, float | None]:
            truth = self._truth(i)
            return vars(measure(self._reconstruct(vae, truth), truth, self.distance))

        found = share_out(self.accelerator, range(self.clips), score, "validation")
        # Among videos there may be images, which have no temporal difference.
        values = {name: [score[name] for score in found if score[name] is not None] for name in self.MEASURES}
        means = {f"validation/{name}": sum(some) / len(some) for name, some in values.items() if some}
        self.accelerator.log({**means, "samples": samples}, step)
        self._draw(vae, step)
        self.accelerator.wait_for_everyone()
        return means["validation/perceptual_distance"]

    def _truth(self, i: int) -> Tensor:
        return to_pixels(self.dataset[i]["video"])[None].to(self.accelerator.device)

    def _reconstruct(self, vae: AutoencoderKLSTGen, truth: Tensor) -> Tensor:
        return vae(truth.to(vae.dtype)).sample.float()

    def _draw(self, vae: AutoencoderKLSTGen, step: int) -> None:
        """The sheet: of the first clips, those of the first one's shape. Under ZeRO-3 a forward takes all processes."""
        truths = [self._truth(i) for i in range(min(self.clips, self.SHEET_CLIPS))]
        labels = [self.dataset.row(i)["caption"] for i, truth in enumerate(truths) if truth.shape == truths[0].shape]
        truth = torch.cat([truth for truth in truths if truth.shape == truths[0].shape])
        reconstruction = torch.cat([self._reconstruct(vae, clip) for clip in truth.split(1)])
        scale = max(1, 64 // truth.shape[3])
        path, title = self.folder / f"step-{step}.png", f"held-out clips, step {step}"
        if self.accelerator.is_main_process:
            reconstruction_sheet(path, truth, {"reconstruction": reconstruction}, labels, title, scale=scale)
            log_picture(self.accelerator, "reconstructions", path, step)


def export(
    config: TrainVAEConfig,
    vae: AutoencoderKLSTGen,
    averaged: AveragedWeights,
    dataset: ClipDataset,
    accelerator: Accelerator,
    folder: Path,
) -> None:
    """Writes a diffusers folder of the averaged weights, with the statistics of their latents (those of `init` if the encoder
    is frozen), and of the last weights as variant `raw`, which shares these. All processes call it."""
    vae.eval()
    with averaged.applied():
        if vae.config.latents_mean is None:
            mean, std = measure_latents(vae, dataset, config.statistics_clips, accelerator)
            vae.register_to_config(latents_mean=mean, latents_std=std)
        with full_weights(vae):
            if accelerator.is_main_process:
                vae.save_pretrained(folder)
    with full_weights(vae):
        if accelerator.is_main_process:
            vae.save_pretrained(folder, variant="raw")
            print(f"the VAE is in {folder}")
    accelerator.wait_for_everyone()


def train_vae(config: TrainVAEConfig) -> None:
    """Trains to `config.samples` clips, from the newest checkpoint of the run if there is one."""
    accelerator = make_accelerator(
        Path(config.run), config.batch_size, config.accumulate, config.optimizer.max_grad_norm, config.trackers
    )
    with alone_in(config.run, accelerator):
        _train_vae(config, accelerator)
    end_training(accelerator)


def _train_vae(config: TrainVAEConfig, accelerator: Accelerator) -> None:
    run = Path(config.run)
    dataset = ClipDataset(config.data, config.seed)
    torch.manual_seed(config.seed)  # for the initial weights; all later draws have generators of their own
    for frames in sorted(set(dataset.rows.shapes[:, 0].tolist())):
        config.window_of(frames)
    vae = make_vae(config)
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    adversary = Adversary(config.discriminator, accelerator, config.samples) if config.discriminator else None
    if adversary is not None:  # it would find out when it begins
        side, least = int(dataset.rows.shapes[:, 1:].min()), adversary.net.smallest
        layers = f"{least} pixels or more with discriminator.layers={adversary.config.layers}"
        require(side >= least, "smallest side of a clip", side, layers)
    validator = Validator(config, config.validation, accelerator) if config.validation else None
    if accelerator.is_main_process:
        begin_run(config)
        vae.save_config(run / ARCHITECTURE)
    accelerator.wait_for_everyone()
    objective = VAEObjective(
        vae,
        config.reconstruction,
        config.kl_weight,
        config.ping_pong_weight,
        config.perceptual,
        adversary,
        accelerator.device,
    )

    def compute_losses(model: torch.nn.Module, batch: dict[str, Any], samples: int) -> dict[str, Tensor]:
        return model(*(x.to(accelerator.device) for x in prepare_batch(batch, config, vae)), samples)

    def discriminate(samples: int) -> dict[str, Tensor]:
        return adversary.step(samples) if adversary else {}

    def after_step(averaged: AveragedWeights, step: int, samples: int) -> float | None:
        due = config.validation and (step % config.validation.every == 0 or samples >= config.samples)
        if validator is None or not due:
            return None
        with averaged.applied():
            score = validator(vae.eval(), step, samples)
        vae.train()
        return score

    stages = [Stage(config, dataset)]
    check_stages(stages, accelerator)
    averaged = fit(accelerator, config, stages, objective, compute_losses, discriminate, after_step)
    export(config, vae, averaged, dataset, accelerator, run / "export")


def main(argv: Sequence[str] | None = None) -> None:
    with stop_on_value_error():
        train_vae(parse_command_line(TrainVAEConfig, __doc__, argv))


if __name__ == "__main__":
    main()
