"""Primitives of the causal video VAE: state, convolution, norms, attention, resampling, patches.

Shapes: t frames, b batch, c channels, h height, w width. Everything here works on `t b c h w`, time first and in memory
channels last: then any run of frames is one contiguous piece, and a convolution over time is a few convolutions of
pictures, which on a CPU run at the speed of a matrix product at every size.

Everything is causal: output frame i depends on input frames <= i (counted in groups where time is resampled). What lies
before the clip is zero, and norms see one position or one frame at a time, so a clip's beginning never depends on how
long the clip is, and a clip can be worked on in chunks: a `CausalState` carries what the next one needs.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


def _pictures(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _join(*pieces: Tensor) -> Tensor:
    """Concatenates frames, channels last in memory, a layout that `torch.cat` loses in five dimensions."""
    return torch.cat([piece.movedim(2, -1) for piece in pieces]).movedim(-1, 2)


# --- State --------------------------------------------------------------------------------------------------------


class CausalState:
    """What causal layers remember between the chunks of one clip: the last frames that each has seen.

    One object holds it all; a layer finds its own frames by being itself. Layers are given None for a whole clip.
    """

    def __init__(self) -> None:
        self.first = True
        """Whether the chunk at hand begins the clip."""
        self.frames: dict[nn.Module, Tensor] = {}
        """By layer, `t b c h w`: as many frames as its kernel reaches back."""

    @torch.compiler.disable  # the number of layers that remember would be compiled into every one of them
    def extend(self, layer: nn.Module, x: Tensor, count: int) -> Tensor:
        """`x` behind the frames that `layer` remembers, of which it now remembers the last `count`."""
        if layer in self.frames:
            x = _join(self.frames[layer], x)
        self.frames[layer] = x[-count:].clone()  # a view would keep the whole chunk alive
        return x


def begins(state: CausalState | None) -> bool:
    """Whether the frames at hand are the first ones of their clip."""
    return state is None or state.first


# --- Convolution --------------------------------------------------------------------------------------------------


class CausalConv3d(nn.Conv3d):
    """3D convolution that reaches back in time only (van den Oord et al. 2016; MAGVIT-v2, arXiv:2310.05737).

    It runs as the sum over its taps in time of 2D convolutions of the frames: y_i = sum_l W_l * x_(i p - l). Frames before
    the clip are zero, so their taps are left out, and an image costs one 2D convolution.

    Args:
        stride: `(p, s)` in time and space. Of a clip of 1 + n p frames come 1 + n. With s > 1 the bottom and right are
            padded, as in Stable Diffusion's VAE and Wan.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: tuple[int, int] = (1, 1),
    ) -> None:
        kt, kh, kw = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        p, s = stride
        super().__init__(in_channels, out_channels, (kt, kh, kw), (p, s, s), padding=(0, kh // 2, kw // 2))

    def forward(self, x: Tensor, state: CausalState | None = None) -> Tensor:
        (kt, kh, kw), (p, s, _) = self.kernel_size, self.stride
        t, first = len(x), 0 if begins(state) else p - 1  # the frame at which the first output is taken
        if max(kt, kh, kw, p, s) == 1:
            return F.linear(x.movedim(2, -1), self.weight.flatten(1), self.bias).movedim(-1, 2)
        padding = (kh // 2, kw // 2)
        if s > 1:
            x, padding = F.pad(x, (0, kw - 2, 0, kh - 2)), (0, 0)
        if state is not None and kt > 1:
            x = state.extend(self, x, kt - 1)
        before = len(x) - t
        y = None
        for lag in range(kt):
            missing = max(0, -(-(lag - before - first) // p))  # outputs whose frame of this tap lies before the clip
            frames = x[before + first - lag + missing * p : before + t - lag : p]
            if len(frames) == 0:
                break
            bias = self.bias if lag == 0 else None
            part = F.conv2d(_pictures(frames), self.weight[:, :, kt - 1 - lag], bias, s, padding)
            part = part.unflatten(0, frames.shape[:2])
            if y is None:
                y = part
            else:
                y[missing:] += part
        assert y is not None
        return y


# --- Norms --------------------------------------------------------------------------------------------------------


class ChannelRMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the channels of each position (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(2, -1)).movedim(-1, 2)


class FrameGroupNorm(nn.GroupNorm):
    """Group norm of each frame by itself (Wu & He 2018, arXiv:1803.08494), which is that of image VAEs for one frame."""

    def forward(self, x: Tensor) -> Tensor:
        # Not `F.group_norm`, which refuses a frame of one place where each channel is a group.
        y = torch.group_norm(_pictures(x), self.num_groups, self.weight, self.bias, self.eps)
        return y.unflatten(0, x.shape[:2])


NORMS = {
    "rms": lambda channels: ChannelRMSNorm(channels, eps=1e-6),
    "group": lambda channels: FrameGroupNorm(min(32, channels), channels, eps=1e-6),
}


# --- Blocks -------------------------------------------------------------------------------------------------------


class ResBlock3d(nn.Module):
    """norm, SiLU, convolution, twice, around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, norm: str = "rms") -> None:
        super().__init__()
        self.norm1 = NORMS[norm](in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = NORMS[norm](out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        nn.init.zeros_(self.conv2.weight)  # the block begins as its shortcut
        self.shortcut = nn.Identity() if in_channels == out_channels else CausalConv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, state: CausalState | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)), state)
        y = self.conv2(F.silu(self.norm2(y)), state)
        return self.shortcut(x) + y


class SpatialAttention(nn.Module):
    """Single-head self-attention within each frame, as in the middle of Stable Diffusion's VAE and Wan's."""

    def __init__(self, channels: int, norm: str = "rms") -> None:
        super().__init__()
        self.norm = NORMS[norm](channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)

    def forward(self, x: Tensor, state: CausalState | None = None) -> Tensor:
        t, _, _, h, w = x.shape
        tokens = rearrange(self.norm(x), "t b c h w -> (t b) 1 (h w) c")
        q, k, v = self.to_qkv(tokens).chunk(3, dim=-1)
        y = self.to_out(F.scaled_dot_product_attention(q, k, v))
        return x + rearrange(y, "(t b) 1 (h w) c -> t b c h w", t=t, h=h, w=w)


# --- Resampling ---------------------------------------------------------------------------------------------------
# By p in time and s in space, as functions. A clip of 1 + n p frames becomes 1 + n latent frames: where it begins, the
# first frame fills a group by itself, repeated, and the copies are dropped again on the way up. Channels are innermost in
# memory and stay together: the other order, (c p s1 s2), takes six times as long.


def space_to_channels(x: Tensor, p: int, s: int, begins: bool = True) -> Tensor:
    """`(1 + n p) b c (h s) (w s) -> (1 + n) b (p s s c) h w`; `n p` frames to n if they do not begin the clip."""
    if p > 1 and begins:
        x = _join(x[:1].expand(p - 1, -1, -1, -1, -1), x)
    return rearrange(x, "(t p) b c (h s1) (w s2) -> t b h w (p s1 s2 c)", p=p, s1=s, s2=s).movedim(-1, 2)


def channels_to_space(x: Tensor, p: int, s: int, begins: bool = True) -> Tensor:
    """`(1 + n) b (p s s c) h w -> (1 + n p) b c (h s) (w s)`; n frames to `n p` if they do not begin the clip."""
    x = rearrange(x, "t b (p s1 s2 c) h w -> (t p) b (h s1) (w s2) c", p=p, s1=s, s2=s).movedim(-1, 2)
    return x[p - 1 :] if begins else x


class ShortcutLinear(nn.Linear):
    """A projection around a shortcut without parameters, in one product: y = W x + S x = (W + S) x (DC-AE, arXiv:2410.10733).

    S averages channels where there are fewer after it (output o is the mean of inputs o, o + out_features, ...) and
    repeats them where there are more. A `Linear` itself, so that what wraps or hooks one (LoRA, offloading, casting)
    finds it.
    """

    def forward(self, x: Tensor) -> Tensor:
        out, wide = self.weight.shape
        narrow = min(out, wide)
        eye = torch.eye(narrow, dtype=self.weight.dtype, device=self.weight.device)
        shortcut = eye.repeat(out // narrow, wide // narrow) * (narrow / wide)
        return F.linear(x, self.weight + shortcut, self.bias)


class ShuffleDownsample3d(nn.Module):
    """Pixels into channels and a projection, with a shortcut that averages channels (DC-AE)."""

    def __init__(self, in_channels: int, out_channels: int, p: int, s: int) -> None:
        super().__init__()
        self.p, self.s = p, s
        self.proj = ShortcutLinear(in_channels * p * s * s, out_channels)

    def forward(self, x: Tensor, state: CausalState | None = None) -> Tensor:
        x = space_to_channels(x, self.p, self.s, begins(state)).movedim(2, -1)
        return self.proj(x).movedim(-1, 2)


class ShuffleUpsample3d(nn.Module):
    """A projection and channels into pixels, with a shortcut that repeats channels (DC-AE)."""

    def __init__(self, in_channels: int, out_channels: int, p: int, s: int) -> None:
        super().__init__()
        self.p, self.s = p, s
        self.proj = ShortcutLinear(in_channels, out_channels * p * s * s)

    def forward(self, x: Tensor, state: CausalState | None = None) -> Tensor:
        y = self.proj(x.movedim(2, -1)).movedim(-1, 2)
        return channels_to_space(y, self.p, self.s, begins(state))


class ConvDownsample3d(CausalConv3d):
    """A strided convolution (Stable Diffusion, Wan)."""

    def __init__(self, in_channels: int, out_channels: int, p: int, s: int) -> None:
        super().__init__(in_channels, out_channels, 3, (p, s))


class ConvUpsample3d(nn.Module):
    """Nearest neighbours and a convolution (Stable Diffusion, Wan)."""

    def __init__(self, in_channels: int, out_channels: int, p: int, s: int) -> None:
        super().__init__()
        self.p, self.s = p, s
        self.conv = CausalConv3d(in_channels, out_channels, 3)

    def forward(self, x: Tensor, state: CausalState | None = None) -> Tensor:
        y = repeat(x, "t b c h w -> (t p) b (h s1) (w s2) c", p=self.p, s1=self.s, s2=self.s).movedim(-1, 2)
        return self.conv(y[self.p - 1 :] if begins(state) else y, state)


# --- Patches ------------------------------------------------------------------------------------------------------


def _haar(x: Tensor) -> Tensor:
    """The four values of each 2x2 square, channels `4 c`, as their mean and three differences: H x / 2.

    H is a Hadamard matrix, so that this is orthonormal and its own inverse.
    """
    a, b, c, d = x.chunk(4, dim=2)
    return torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], dim=2) / 2


def patchify(x: Tensor, size: int, wavelet: bool) -> Tensor:
    """`t b c (h size) (w size) -> t b (size size c) h w`: squares of pixels as channels, or their Haar coefficients.

    The wavelet is that of Cosmos' tokenizer (arXiv:2501.03575) in space alone: a wavelet packet of log2(size) levels.
    """
    if not wavelet:
        return space_to_channels(x, 1, size)
    while size > 1:
        x, size = _haar(space_to_channels(x, 1, 2)), size // 2
    return x


def unpatchify(x: Tensor, size: int, wavelet: bool) -> Tensor:
    """The inverse of `patchify`."""
    if not wavelet:
        return channels_to_space(x, 1, size)
    while size > 1:
        x, size = channels_to_space(_haar(x), 1, 2), size // 2
    return x
