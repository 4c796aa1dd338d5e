"""What the VAE learns: its losses, each under its source, and the discriminator that it plays against.

Shapes: b batch, c channels, t frames, h height, w width; video `b c t h w` in [-1, 1]; latents `b z t' h' w'`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from stgen.config import require
from stgen.models.autoencoder import AutoencoderKLSTGen
from stgen.models.discriminator import PatchDiscriminator3d
from stgen.models.perceptual import NETWORKS, PerceptualDistance
from stgen.optimization import OptimizerConfig, learning_rate, make_optimizer, step_if_finite

# --- Losses -------------------------------------------------------------------------------------------------------


def charbonnier(x: Tensor, y: Tensor) -> Tensor:
    """mean sqrt((x - y)^2 + eps^2), eps = 1e-3: L1 that is smooth at 0 (Lai et al. 2017, arXiv:1704.03915)."""
    return ((x - y).square() + 1e-6).sqrt().mean()


def clipped_mse(x: Tensor, y: Tensor) -> Tensor:
    """mean (x - y)^2, but 0 where the reconstruction x lies beyond the end of [-1, 1] at which the target y is: what is
    shown is clipped there. So black needn't be hit, only passed, and stays black without haze; as in the hinge loss."""
    passed = (y.abs() >= 1) & (x * y.sign() > 1)
    return F.mse_loss(torch.where(passed, y, x), y)


RECONSTRUCTION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "clipped_mse": clipped_mse,
    "charbonnier": charbonnier,
}
"""d(reconstruction, target) by name: mean absolute error, mean squared error, that of what is shown, Charbonnier."""


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), averaged over cells and summed over channels (Kingma & Welling 2013,
    arXiv:1312.6114)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean()


def palindrome(video: Tensor) -> Tensor:
    """The clip forward and then backward, x_1 ... x_n ... x_1: `b c t h w -> b c (2 t - 1) h w`."""
    return torch.cat([video, video[:, :, :-1].flip(2)], dim=2)


def ping_pong(reconstruction: Tensor) -> Tensor:
    """How much the two reconstructions of one frame differ, mean (g_i - g'_i)^2 over i < n: what drifts or trails in
    time differs (TecoGAN, arXiv:1811.09393, equation 2). Of a `palindrome`; 0 if that is a single frame."""
    n = reconstruction.shape[2] // 2
    there, back = reconstruction[:, :, :n], reconstruction.flip(2)[:, :, :n]
    return F.mse_loss(there, back) if n else reconstruction.new_zeros(())


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """1/2 E[max(0, 1 - D(x))] + 1/2 E[max(0, 1 + D(g))] (Lim & Ye 2017, arXiv:1705.02894; halved as VQGAN has it)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|| d reconstruction / d L || / (|| d adversarial / d L || + 1e-6), at most 1e4, L the decoder's last layer: both
    losses then pull equally hard (VQGAN, arXiv:2012.09841, equation 7; the bound is its code's).

    The gradients are those of one process's clips in one forward, so the weight does not depend on how many processes
    there are: two of them are one that accumulates two forwards.
    """
    wanted, given = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, adversarial)
    )
    return (wanted / (given + 1e-6)).clamp(max=1e4)


# --- The objective ------------------------------------------------------------------------------------------------


@dataclass
class PerceptualConfig:
    """Distance of features; see `stgen.models.perceptual`."""

    network: str = "efficientnet_lite0"
    """efficientnet_lite0, which a wheel brings, or vgg16, which needs torchvision and a download."""
    weight: float = 1.0
    """Weight in the loss."""

    def __post_init__(self) -> None:
        require(self.network in NETWORKS, "perceptual.network", self.network, ", ".join(NETWORKS))
        require(self.weight > 0, "perceptual.weight", self.weight, "above 0; perceptual=null leaves it out")


@dataclass
class DiscriminatorConfig:
    """Adversarial training against a 3D PatchGAN; see `stgen.models.discriminator`."""

    weight: float = 0.8
    """Weight of the adversarial loss, times the adaptive weight."""
    start: int = 0
    """Clips seen before it begins: a decoder that still draws blurs teaches a discriminator nothing."""
    channels: int = 64
    """Width of the discriminator's first layer."""
    layers: int = 3
    """How often it halves height and width."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Its own; what it says of averages and `max_nonfinite` counts for nothing here. Warm-up is counted from `start`."""

    def __post_init__(self) -> None:
        require(self.weight > 0, "discriminator.weight", self.weight, "above 0; discriminator=null leaves it out")
        require(self.start >= 0, "discriminator.start", self.start, "0 or more")
        groups = self.channels >= 8 and self.channels % 8 == 0
        require(
            groups, "discriminator.channels", self.channels, "a multiple of 8, the channels that are normed together"
        )
        require(self.layers >= 1, "discriminator.layers", self.layers, "1 or more")


class Adversary:
    """The other player: a discriminator with an optimizer of its own, saved and resumed with the run.

    It stands beside what Accelerate wraps. It is small, and DeepSpeed through one Accelerator takes one model alone; so
    its gradients are averaged over the processes here, whatever the strategy.

    Args:
        total: clips of the whole run, at which the learning rate ends.
    Raises:
        ValueError: mixed precision is fp16.
    """

    def __init__(self, config: DiscriminatorConfig, accelerator: Accelerator, total: int) -> None:
        half = accelerator.mixed_precision == "fp16"
        require(not half, "discriminator", "set under fp16", "bf16 or full precision, since its loss is not scaled")
        self.config, self.accelerator, self.total = config, accelerator, total
        self.net = PatchDiscriminator3d(channels=config.channels, layers=config.layers).to(accelerator.device)
        self.optimizer = make_optimizer(self.net, config.optimizer)
        accelerator.register_for_checkpointing(self.net, self.optimizer)
        self._pair: tuple[Tensor, Tensor] | None = None

    def plays(self, samples: int) -> bool:
        """Whether the game has begun after `samples` clips."""
        return samples >= self.config.start

    def judge(self, video: Tensor, sample: Tensor) -> Tensor:
        """The adversarial loss -E[D(sample)] of the VAE; the pair is kept for the discriminator's own step."""
        self._pair = video, sample.detach()
        self.net.requires_grad_(False)  # the VAE's backward pass leaves no gradients here
        with self.accelerator.autocast():
            return -self.net(sample).float().mean()

    def step(self, samples: int) -> dict[str, Tensor]:
        """One forward and backward on the pair last judged and, when gradients are due, a step: the loss, to log."""
        if self._pair is None:
            return {}
        (video, sample), self._pair = self._pair, None
        self.net.requires_grad_(True)
        with self.accelerator.autocast():
            real, fake = self.net(video).float(), self.net(sample).float()
        loss = discriminator_hinge(real, fake)
        (loss / self.accelerator.gradient_accumulation_steps).backward()
        if self.accelerator.sync_gradients:
            for parameter in self.net.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.optimizer.max_grad_norm)
            begun = self.config.start
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config.optimizer, samples - begun, self.total - begun)
            step_if_finite(self.optimizer, norm)  # a sample that is not finite spoils the VAE's step, which is counted
            self.optimizer.zero_grad()
        return {"discriminator": loss.detach(), "real": real.detach().mean(), "fake": fake.detach().mean()}


class VAEObjective(torch.nn.Module):
    """L = d(x, g) + w_p LPIPS(x, g) + w_kl KL + w_pp ping-pong + w_d lambda (-E[D(g)]), each term where it is asked for;
    g = D(z), z ~ q(z | x).

    lambda is `adaptive_weight` of the first two terms, VQGAN's reconstruction loss, against the adversarial one.

    A module around the VAE, since DDP and DeepSpeed synchronise what goes through one `forward`; and all in it, since
    DeepSpeed takes any gradient that passes its outputs for the step's own. The VAE alone is trained and saved with it.

    Args:
        reconstruction: a name in `RECONSTRUCTION`.
        perceptual: network and weight, or None for none.
        adversary: None for none.
    """

    def __init__(
        self,
        vae: AutoencoderKLSTGen,
        reconstruction: str,
        kl_weight: float,
        ping_pong_weight: float = 0.0,
        perceptual: PerceptualConfig | None = None,
        adversary: Adversary | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.vae, self.adversary = vae, adversary
        self.reconstruction, self.kl_weight, self.ping_pong_weight = reconstruction, kl_weight, ping_pong_weight
        self.perceptual_weight = perceptual.weight if perceptual else 0.0
        self.perceptual = PerceptualDistance(perceptual.network, device) if perceptual else None

    def forward(self, shown: Tensor, target: Tensor, noise: Tensor, samples: int) -> dict[str, Tensor]:
        """All losses by name; `loss` is their weighted sum, which is minimised.

        Args:
            shown: what the VAE encodes; with a ping-pong weight, `palindrome`s, as `target` is.
            target: what it shall decode, of the same shape.
            noise: standard normal, of the latents' shape.
            samples: clips seen before this optimizer step, which decide whether the adversary plays.
        """
        posterior = self.vae.encode(shown).latent_dist
        sample = self.vae.decode(posterior.mean + posterior.std * noise, sample_size=shown.shape[2:]).sample
        sample, target = sample.float(), target.float()
        losses = {self.reconstruction: RECONSTRUCTION[self.reconstruction](sample, target)}
        total = losses[self.reconstruction]
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(sample, target).mean()
            total = total + self.perceptual_weight * losses["perceptual"]
        likeness = total
        if self.vae.config.get("bottleneck", "kl") == "kl":  # FSQ's code book is finite: nothing to regularise
            losses["kl"] = kl_divergence(posterior.mean.float(), posterior.logvar.float())
            total = total + self.kl_weight * losses["kl"]
        if self.ping_pong_weight:
            losses["ping_pong"] = ping_pong(sample)
            total = total + self.ping_pong_weight * losses["ping_pong"]
        if self.adversary is not None and self.adversary.plays(samples):
            losses["adversarial"] = self.adversary.judge(target, sample)
            last_layer = self.vae.decoder.conv_out.weight
            losses["adaptive_weight"] = adaptive_weight(likeness, losses["adversarial"], last_layer)
            total = total + self.adversary.config.weight * losses["adaptive_weight"] * losses["adversarial"]
        return {"loss": total, **losses}
