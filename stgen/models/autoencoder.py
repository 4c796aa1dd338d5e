"""AutoencoderKLSTGen: a 3D causal video VAE.

Shapes: b batch, c channels, t frames, h height, w width; video `b c t h w` in [-1, 1], latents `b z t' h' w'` with
t' = 1 + ceil((t - 1) / p), h' = ceil(h / s), w' = ceil(w / s) for compression p in time and s in space.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from stgen.config import require
from stgen.models.layers import (
    CausalConv3d,
    Downsample3d,
    ResBlock3d,
    Upsample3d,
    channels_to_space,
    space_to_channels,
)
from stgen.models.loading import SafetensorsOnly


class Encoder3d(nn.Module):
    """Pixels to moments: patch, then per stage residual blocks and a downsampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        depth: int,
        factors: Sequence[tuple[int, int]],
        kernel: int,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, channels[0], kernel)
        self.blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            self.blocks.extend(ResBlock3d(width, width) for _ in range(depth))
            if i < len(factors):
                self.blocks.append(Downsample3d(width, channels[i + 1], *factors[i]))
        self.conv_out = CausalConv3d(channels[-1], out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(x)


class Decoder3d(nn.Module):
    """Latents to pixels: the encoder's mirror image."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        depth: int,
        factors: Sequence[tuple[int, int]],
        kernel: int,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, channels[-1], 3)
        self.blocks = nn.ModuleList()
        for i in reversed(range(len(channels))):
            self.blocks.extend(ResBlock3d(channels[i], channels[i]) for _ in range(depth))
            if i > 0:
                self.blocks.append(Upsample3d(channels[i], channels[i - 1], *factors[i - 1]))
        self.conv_out = CausalConv3d(channels[0], out_channels, kernel)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(x)


class AutoencoderKLSTGen(SafetensorsOnly, ModelMixin, AutoencoderMixin, ConfigMixin):
    """3D causal VAE with a KL bottleneck and diffusers' autoencoder interface.

    Frame i's latent depends on the frames of its own group and earlier ones only, so the latents of a clip's beginning
    are those of the whole clip. An image is a clip of one frame. Any number of frames, height and width: the clip is
    padded inside by repeating its border; `forward` and `decode(..., sample_size=)` crop it back.

    Args:
        in_channels, out_channels: of the video.
        latent_channels: of the latents.
        block_out_channels: width of each stage.
        layers_per_block: residual blocks of each stage.
        temporal_downsample, spatial_downsample: for each step from a stage to the next, whether it halves time, and
            height and width. `(False, True), (True, True)` with `patch_size=2` compresses 2x in time, 8x in space.
        patch_size: pixels of a p x p patch become channels before the first convolution.
        latents_mean, latents_std: per channel, measured by the trainer after training; the transformer sees
            `(latents - latents_mean) / latents_std`. None means 0 and 1.

    Raises:
        ValueError: the three per-stage lists do not fit each other.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["ResBlock3d"]
    _repeated_blocks = ["ResBlock3d"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 16,
        block_out_channels: Sequence[int] = (32, 64, 128, 128),
        layers_per_block: int = 1,
        temporal_downsample: Sequence[bool] = (False, True, True),
        spatial_downsample: Sequence[bool] = (True, True, True),
        patch_size: int = 1,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        steps = len(block_out_channels) - 1
        for name, flags in (("temporal_downsample", temporal_downsample), ("spatial_downsample", spatial_downsample)):
            require(len(flags) == steps, name, tuple(flags), f"{steps} values, one less than block_out_channels")
        for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            require(values is None or len(values) == latent_channels, name, values, f"{latent_channels} values or None")
        factors = [(2 if t else 1, 2 if s else 1) for t, s in zip(temporal_downsample, spatial_downsample, strict=True)]
        for (p, s), here, below in zip(factors, block_out_channels, block_out_channels[1:], strict=False):
            # The shortcuts average or repeat whole groups of channels.
            fits = (here * p * s * s) % below == 0
            require(
                fits, "block_out_channels", tuple(block_out_channels), f"{here} * {p * s * s} a multiple of {below}"
            )
        self.temporal_compression_ratio = 2 ** sum(temporal_downsample)
        self.spatial_compression_ratio = patch_size * 2 ** sum(spatial_downsample)
        self.use_slicing = False
        # Patching is itself a strided convolution; at the full resolution, kernel 3 takes its place.
        stages = (block_out_channels, layers_per_block, factors, 3 if patch_size == 1 else 1)
        self.encoder = Encoder3d(in_channels * patch_size**2, 2 * latent_channels, *stages)
        self.decoder = Decoder3d(latent_channels, out_channels * patch_size**2, *stages)
        # Begin with a narrow posterior: at the usual log-variance of 0, its noise drowns the first latents and the
        # decoder spends its first hundreds of steps on learning to ignore them.
        with torch.no_grad():
            self.encoder.conv_out.bias[latent_channels:] = -6.0

    def _encode(self, x: Tensor) -> Tensor:
        s = self.spatial_compression_ratio
        t, h, w = x.shape[2:]
        x = F.pad(x, (0, -w % s, 0, -h % s, 0, -(t - 1) % self.temporal_compression_ratio), mode="replicate")
        return self.encoder(space_to_channels(x, 1, self.config.patch_size))

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Video `b c t h w` in [-1, 1] -> the distribution of its latents.

        Raises:
            ValueError: not a video of `in_channels` channels and at least one frame.
        """
        shape = tuple(x.shape)
        fits = x.ndim == 5 and shape[1] == self.config.in_channels and min(shape[2:]) >= 1
        require(fits, "x.shape", shape, f"(b, {self.config.in_channels}, t, h, w) with t, h, w of 1 or more")
        moments = torch.cat([self._encode(one) for one in x.split(1)]) if self.use_slicing else self._encode(x)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _decode(self, z: Tensor) -> Tensor:
        return channels_to_space(self.decoder(z), 1, self.config.patch_size)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, sample_size: tuple[int, int, int] | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents `b z t' h' w'` -> video `b c t h w`.

        Args:
            sample_size: (t, h, w) of the video that was encoded; what was padded beyond it is cropped.

        Raises:
            ValueError: the latents' channels are not `latent_channels`.
        """
        fits = z.ndim == 5 and z.shape[1] == self.config.latent_channels
        require(fits, "z.shape", tuple(z.shape), f"(b, {self.config.latent_channels}, t, h, w)")
        sample = torch.cat([self._decode(one) for one in z.split(1)]) if self.use_slicing else self._decode(z)
        if sample_size is not None:
            t, h, w = sample_size
            sample = sample[:, :, :t, :h, :w]
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encodes and decodes; the output has the input's exact shape."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict, sample_size=tuple(sample.shape[2:]))
