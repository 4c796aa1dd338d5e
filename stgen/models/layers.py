"""Primitives of the causal video VAE: convolution, norm, resampling.

Shapes: b batch, c channels, t frames, h height, w width; video and latents are `b c t h w`.

Everything here is causal: output frame i depends on input frames <= i (counted in groups where time is resampled).
Padding in time is zeros at the front, and norms see one position at a time, so a clip's beginning never depends on how
long the clip is.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn


class CausalConv3d(nn.Conv3d):
    """3D convolution that pads time at the front only (van den Oord et al. 2016; MAGVIT-v2, arXiv:2310.05737)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int, int]) -> None:
        kt, kh, kw = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        super().__init__(in_channels, out_channels, (kt, kh, kw), padding=(0, kh // 2, kw // 2))
        self.front = kt - 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, self.front, 0)) if self.front else x)


class ChannelRMSNorm(nn.Module):
    """Root-mean-square norm over the channels of each position (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + self.eps) * self.weight


class ResBlock3d(nn.Module):
    """norm, SiLU, convolution, twice, around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelRMSNorm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = ChannelRMSNorm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        nn.init.zeros_(self.conv2.weight)  # the block begins as its shortcut
        self.shortcut = nn.Identity() if in_channels == out_channels else CausalConv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.shortcut(x) + y


# Resampling by p in time and s in space moves pixels into channels and back (DC-AE, arXiv:2410.10733), with a shortcut
# that averages or repeats channels. A clip of 1 + n p frames becomes 1 + n latent frames: the first frame is repeated
# to fill its group, and dropped again on the way up.


def space_to_channels(x: Tensor, p: int, s: int) -> Tensor:
    """`b c (1 + n p) (h s) (w s) -> b (c p s s) (1 + n) h w`."""
    if p > 1:
        x = torch.cat([x[:, :, :1].expand(-1, -1, p - 1, -1, -1), x], dim=2)
    return rearrange(x, "b c (t p) (h s1) (w s2) -> b (c p s1 s2) t h w", p=p, s1=s, s2=s)


def channels_to_space(x: Tensor, p: int, s: int) -> Tensor:
    """`b (c p s s) (1 + n) h w -> b c (1 + n p) (h s) (w s)`."""
    x = rearrange(x, "b (c p s1 s2) t h w -> b c (t p) (h s1) (w s2)", p=p, s1=s, s2=s)
    return x[:, :, p - 1 :]


class Downsample3d(nn.Module):
    """Compression by `p` in time and `s` in space."""

    def __init__(self, in_channels: int, out_channels: int, p: int, s: int) -> None:
        super().__init__()
        self.p, self.s, self.out_channels = p, s, out_channels
        self.conv = CausalConv3d(in_channels * p * s * s, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = space_to_channels(x, self.p, self.s)
        return self.conv(x) + reduce(x, "b (c g) t h w -> b c t h w", "mean", c=self.out_channels)


class Upsample3d(nn.Module):
    """Expansion by `p` in time and `s` in space."""

    def __init__(self, in_channels: int, out_channels: int, p: int, s: int) -> None:
        super().__init__()
        self.p, self.s = p, s
        self.repeats = out_channels * p * s * s // in_channels
        self.conv = CausalConv3d(in_channels, out_channels * p * s * s, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) + repeat(x, "b c t h w -> b (c g) t h w", g=self.repeats)
        return channels_to_space(x, self.p, self.s)
