"""AutoencoderKLSTGen: a 3D causal video VAE that works on clips whole, in chunks or in tiles.

Shapes: b batch, c channels, t frames, h height, w width; video `b c t h w` in [-1, 1], latents `b z t' h' w'` with
t' = 1 + ceil((t - 1) / p), h' = ceil(h / s), w' = ceil(w / s) for compression p in time and s in space. Inside, encoder and
decoder work on `t b c h w` (see layers.py).
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from stgen.config import require
from stgen.models.bottleneck import FiniteScalarCodes, FiniteScalarQuantizer
from stgen.models.layers import (
    NORMS,
    CausalConv3d,
    CausalState,
    ConvDownsample3d,
    ConvUpsample3d,
    ResBlock3d,
    ShuffleDownsample3d,
    ShuffleUpsample3d,
    SpatialAttention,
    patchify,
    unpatchify,
)
from stgen.models.loading import SafetensorsOnly

# --- Encoder and decoder ------------------------------------------------------------------------------------------


class _Stack(nn.Module):
    """A convolution, blocks and a convolution: what encoder and decoder have in common."""

    def __init__(
        self,
        conv_in: CausalConv3d,
        blocks: Sequence[nn.Module],
        norm_out: nn.Module | None,
        conv_out: CausalConv3d,
    ):
        super().__init__()
        self.conv_in, self.blocks, self.conv_out = conv_in, nn.ModuleList(blocks), conv_out
        self.conv_norm_out = norm_out
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, state: CausalState | None = None) -> Tensor:
        # Channels last from here on: convolutions and sums keep the layout of what they are given.
        x = self.conv_in(x.movedim(2, -1).contiguous().movedim(-1, 2), state)
        for block in self.blocks:
            # Computed again, a block would remember its frames twice: a chunk with its state is not checkpointed.
            if torch.is_grad_enabled() and self.gradient_checkpointing and state is None:
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x, state)
        if self.conv_norm_out is not None:
            x = F.silu(self.conv_norm_out(x))
        return self.conv_out(x, state)


def _middle(channels: int, norm: str) -> list[nn.Module]:
    return [
        ResBlock3d(channels, channels, norm),
        SpatialAttention(channels, norm),
        ResBlock3d(channels, channels, norm),
    ]


class Encoder3d(_Stack):
    """Pixels to moments or codes: per stage residual blocks and a downsampling.

    Args:
        factors: (p, s) of the step from each stage to the next.
        resample: `shuffle` changes the width in the downsampling, `conv` in the first residual block after it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        depth: int,
        factors: Sequence[tuple[int, int]],
        kernel: int,
        resample: str,
        norm: str,
        mid_attention: bool,
        norm_out: bool,
    ) -> None:
        blocks: list[nn.Module] = []
        width = channels[0]
        for i, channel in enumerate(channels):
            for _ in range(depth):
                blocks.append(ResBlock3d(width, channel, norm))
                width = channel
            if i < len(factors) and resample == "shuffle":
                width = channels[i + 1]
                blocks.append(ShuffleDownsample3d(channel, width, *factors[i]))
            elif i < len(factors):
                blocks.append(ConvDownsample3d(channel, channel, *factors[i]))
        blocks += _middle(width, norm) if mid_attention else []
        super().__init__(
            CausalConv3d(in_channels, channels[0], kernel),
            blocks,
            NORMS[norm](width) if norm_out else None,
            CausalConv3d(width, out_channels, 3),
        )


class Decoder3d(_Stack):
    """Latents to pixels: the encoder's mirror image. Its arguments are the encoder's, read from pixels to latents."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        depth: int,
        factors: Sequence[tuple[int, int]],
        kernel: int,
        resample: str,
        norm: str,
        mid_attention: bool,
        norm_out: bool,
    ) -> None:
        width = channels[-1]
        blocks = _middle(width, norm) if mid_attention else []
        for i in reversed(range(len(channels))):
            for _ in range(depth):
                blocks.append(ResBlock3d(width, channels[i], norm))
                width = channels[i]
            if i > 0 and resample == "shuffle":
                width = channels[i - 1]
                blocks.append(ShuffleUpsample3d(channels[i], width, *factors[i - 1]))
            elif i > 0:
                blocks.append(ConvUpsample3d(width, width, *factors[i - 1]))
        super().__init__(
            CausalConv3d(in_channels, channels[-1], 3),
            blocks,
            NORMS[norm](width) if norm_out else None,
            CausalConv3d(width, out_channels, kernel),
        )


# --- Model --------------------------------------------------------------------------------------------------------

_CHUNK_PIXELS = {"cpu": 2**15, "cuda": 2**21}
"""Pixels that are worked on together where nothing else is asked: what stays in a CPU's cache, what fills a GPU."""


class AutoencoderKLSTGen(SafetensorsOnly, ModelMixin, AutoencoderMixin, ConfigMixin):
    """3D causal VAE with diffusers' autoencoder interface, a KL or an FSQ bottleneck, and exact streaming.

    Frame i's latent depends on the frames of its own group and earlier ones only, so the latents of a clip's beginning
    are those of the whole clip. An image is a clip of one frame. Any number of frames, height and width: the clip is
    padded inside by repeating its border; `forward` and `decode(..., sample_size=)` crop it back.

    Without gradients clips are encoded and decoded in chunks of frames, with the result of the whole clip, so memory
    beyond the input and twice the output does not grow with the clip's length. `encode_stream` and `decode_stream` do not
    hold those either.

    Args:
        in_channels, out_channels: of the video.
        latent_channels: of the latents.
        block_out_channels: width of each stage.
        layers_per_block: residual blocks of each stage.
        decoder_layers_per_block: those of the decoder; None for as many.
        temporal_downsample, spatial_downsample: for each step from a stage to the next, whether it halves time, and
            height and width. `(False, True), (True, True)` with `patch_size=2` compresses 2x in time, 8x in space.
        patch_size: pixels of a p x p patch become channels before the first convolution.
        patch: how: `shuffle` as they are, `haar` as wavelet coefficients (`patch_size` a power of 2).
        resample: `shuffle` moves pixels into channels around a shortcut (DC-AE), `conv` strides (Stable Diffusion, Wan).
        norm: `rms` over the channels of each position, or `group` of each frame.
        mid_attention: attention within each frame, between two residual blocks, at the lowest resolution.
        conv_norm_out: norm and SiLU before the last convolutions.
        use_post_quant_conv: a 1x1 convolution before the decoder, as Stable Diffusion's has.
        bottleneck: `kl`, or `fsq`, whose `latent_dist` is certain and whose numbers `quantizer.codes_to_indices` gives.
        fsq_levels: levels of each latent channel with `fsq`.
        latents_mean, latents_std: per channel, measured by the trainer after training; the transformer sees
            `(latents - latents_mean) / latents_std`. None means 0 and 1.

    Raises:
        ValueError: an argument is not among those named here, or two don't go together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResBlock3d"]
    _repeated_blocks = ["ResBlock3d"]
    _group_offload_block_modules = ["encoder", "post_quant_conv", "decoder"]  # `encode` and `decode` enter there

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 16,
        block_out_channels: Sequence[int] = (32, 64, 128, 128),
        layers_per_block: int = 1,
        decoder_layers_per_block: int | None = None,
        temporal_downsample: Sequence[bool] = (True, True, False),
        spatial_downsample: Sequence[bool] = (True, True, True),
        patch_size: int = 1,
        patch: str = "shuffle",
        resample: str = "shuffle",
        norm: str = "rms",
        mid_attention: bool = False,
        conv_norm_out: bool = False,
        use_post_quant_conv: bool = False,
        bottleneck: str = "kl",
        fsq_levels: Sequence[int] | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        channels, z = tuple(block_out_channels), latent_channels
        for name, number in (("in_channels", in_channels), ("out_channels", out_channels), ("latent_channels", z)):
            require(number >= 1, name, number, "1 or more")
        for name, number in (("layers_per_block", layers_per_block), ("patch_size", patch_size)):
            require(number >= 1, name, number, "1 or more")
        depth = layers_per_block if decoder_layers_per_block is None else decoder_layers_per_block
        require(depth >= 1, "decoder_layers_per_block", depth, "1 or more, or None")
        require(len(channels) > 0 and min(channels) >= 1, "block_out_channels", channels, "one width or more")
        for name, choice, allowed in (
            ("patch", patch, ("shuffle", "haar")),
            ("resample", resample, ("shuffle", "conv")),
            ("norm", norm, tuple(NORMS)),
            ("bottleneck", bottleneck, ("kl", "fsq")),
        ):
            require(choice in allowed, name, choice, " or ".join(allowed))
        for name, flags in (("temporal_downsample", temporal_downsample), ("spatial_downsample", spatial_downsample)):
            steps = len(channels) - 1
            require(len(flags) == steps, name, tuple(flags), f"{steps} values, one less than block_out_channels")
        for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            require(values is None or len(values) == z, name, values, f"{z} values or None")
        require(patch == "shuffle" or patch_size & (patch_size - 1) == 0, "patch_size", patch_size, "a power of 2")
        if bottleneck == "fsq":
            require(fsq_levels is not None and len(fsq_levels) == z, "fsq_levels", fsq_levels, f"{z} numbers of levels")
        else:
            require(fsq_levels is None, "fsq_levels", fsq_levels, "None without bottleneck='fsq'")
        if norm == "group":
            fits = all(channel % min(32, channel) == 0 for channel in channels)
            require(fits, "block_out_channels", channels, "multiples of 32, or less than 32, with norm='group'")
        factors = [(2 if t else 1, 2 if s else 1) for t, s in zip(temporal_downsample, spatial_downsample, strict=True)]
        for (p, s), here, below in zip(factors, channels, channels[1:], strict=False):
            # The shortcuts average or repeat whole groups of channels.
            fits = resample == "conv" or (here * p * s * s) % below == 0
            require(fits, "block_out_channels", channels, f"{here} * {p * s * s} a multiple of {below}")
        self.temporal_compression_ratio = 2 ** sum(temporal_downsample)
        self.spatial_compression_ratio = patch_size * 2 ** sum(spatial_downsample)
        # Patching is itself a strided convolution; at the full resolution, kernel 3 takes its place.
        kernel = 3 if patch_size == 1 else 1
        shared = (factors, kernel, resample, norm, mid_attention, conv_norm_out)
        moments = 2 * z if bottleneck == "kl" else z
        self.encoder = Encoder3d(in_channels * patch_size**2, moments, channels, layers_per_block, *shared)
        self.quantizer = FiniteScalarQuantizer(fsq_levels) if fsq_levels is not None else None
        self.post_quant_conv = CausalConv3d(z, z, 1) if use_post_quant_conv else None
        self.decoder = Decoder3d(z, out_channels * patch_size**2, channels, depth, *shared)
        if bottleneck == "kl":
            # Begin with a narrow posterior: at the usual log-variance of 0, its noise drowns the first latents and the
            # decoder spends its first hundreds of steps on learning to ignore them.
            with torch.no_grad():
                self.encoder.conv_out.bias[z:] = -6.0
        self.use_slicing = False
        self.use_tiling = False
        s = self.spatial_compression_ratio
        tile = -(-256 // s) * s
        self.tile_size, self.tile_stride = (tile, tile), (self._usual_stride(tile),) * 2

    def _usual_stride(self, tile: int) -> int:
        s = self.spatial_compression_ratio
        return max(s, tile * 3 // 4 // s * s)

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Encodes and decodes frames larger than a tile in overlapping tiles, blended linearly where they overlap.

        Attention and norms of a tile see that tile alone, and so do convolutions at its border; the overlap hides
        most of it.

        Args:
            tile_sample_min_height, tile_sample_min_width: of a tile in pixels; None for what it was before, at first
                256 rounded up to a multiple of the spatial compression.
            tile_sample_stride_height, tile_sample_stride_width: from a tile to the next; None for three quarters of a
                tile given here, else for what it was before.

        Raises:
            ValueError: a number is no multiple of the spatial compression, or the stride is above the tile.
        """
        s = self.spatial_compression_ratio
        size, stride = list(self.tile_size), list(self.tile_stride)
        for i, tile in enumerate((tile_sample_min_height, tile_sample_min_width)):
            if tile is not None:
                size[i], stride[i] = tile, self._usual_stride(tile)
        for i, step in enumerate((tile_sample_stride_height, tile_sample_stride_width)):
            if step is not None:
                stride[i] = step
        for name, tile, step in zip(("height", "width"), size, stride, strict=True):
            require(tile % s == 0 and tile >= s, f"tile_sample_min_{name}", tile, f"a multiple of {s}")
            fits = step % s == 0 and s <= step <= tile
            require(fits, f"tile_sample_stride_{name}", step, f"a multiple of {s} up to {tile}")
        self.use_tiling, self.tile_size, self.tile_stride = True, (size[0], size[1]), (stride[0], stride[1])

    # --- Chunks and tiles -----------------------------------------------------------------------------------------

    def _chunk(self, x: Tensor, h: int, w: int) -> int:
        """Latent frames worked on together, for a clip of `h` x `w` pixels."""
        if self.use_tiling:
            h, w = min(h, self.tile_size[0]), min(w, self.tile_size[1])
        pixels = x.shape[0] * h * w * self.temporal_compression_ratio
        return max(1, _CHUNK_PIXELS.get(x.device.type, 2**21) // pixels)

    def _in_one_piece(self, x: Tensor, latents: int, h: int, w: int) -> bool:
        """Whether a clip is worked on without chunks and tiles: with gradients, or if it is a single chunk anyway."""
        tiled = self.use_tiling and (h > self.tile_size[0] or w > self.tile_size[1])
        return not tiled and (torch.is_grad_enabled() or latents <= self._chunk(x, h, w))

    def _tiled(
        self,
        work: Callable[[Tensor, CausalState], Tensor],
        x: Tensor,
        states: dict[tuple[int, int], CausalState],
        cell_in: int,
        cell_out: int,
    ) -> Tensor:
        """One chunk `b c t h w` through `work`, tile by tile, each with its own state.

        Where tiles overlap, each counts with a weight that falls linearly to its border; the weights are normalised.

        Args:
            cell_in, cell_out: pixels of a latent cell's side, before and after `work`: tiles are whole cells.
        """
        s = self.spatial_compression_ratio
        cells, size, stride = (
            [side // unit for side in sides]
            for sides, unit in ((x.shape[3:], cell_in), (self.tile_size, s), (self.tile_stride, s))
        )
        tops, lefts = (
            range(0, max(1, n - tile + step), step) if self.use_tiling else range(1)
            for n, tile, step in zip(cells, size, stride, strict=True)
        )
        tiles = list(itertools.product(tops, lefts))
        out = total = None
        for top, left in tiles:
            rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
            piece = x if len(tiles) == 1 else x[..., _scaled(rows, cell_in), _scaled(columns, cell_in)]
            y = work(piece, states[top, left])
            states[top, left].first = False
            if len(tiles) == 1:
                return y
            if out is None or total is None:
                # At least in float32: in bfloat16 weights and their sums are off by a percent.
                dtype = torch.promote_types(y.dtype, torch.float32)
                out, total = (y.new_zeros(*y.shape[:3], *(n * cell_out for n in cells), dtype=dtype) for _ in range(2))
            vertical, horizontal = (
                _ramp(length, (tile - step) * cell_out, begin > 0, begin + tile < n, out)
                for length, tile, step, begin, n in zip(y.shape[3:], size, stride, (top, left), cells, strict=True)
            )
            weight = vertical[:, None] * horizontal
            out[..., _scaled(rows, cell_out), _scaled(columns, cell_out)] += y * weight
            total[..., _scaled(rows, cell_out), _scaled(columns, cell_out)] += weight
        assert out is not None
        return (out / total).to(y.dtype)

    # --- Encoding -------------------------------------------------------------------------------------------------

    def _encode(self, x: Tensor, state: CausalState | None = None) -> Tensor:
        x = patchify(x.movedim(2, 0), self.config.patch_size, self.config.patch == "haar")
        return self.encoder(x, state).movedim(0, 2)

    def _encode_chunk(self, x: Tensor, states: dict[tuple[int, int], CausalState]) -> Tensor:
        s = self.spatial_compression_ratio
        x = F.pad(x, (0, -x.shape[4] % s, 0, -x.shape[3] % s, 0, 0), mode="replicate")
        return self._tiled(self._encode, x, states, s, 1)

    def _encode_chunks(self, clips: Iterable[Tensor], chunk: int | None = None) -> Iterator[Tensor]:
        """Moments `b 2z n h' w'` of chunks of a clip that comes in pieces of any length."""
        states: dict[tuple[int, int], CausalState] = defaultdict(CausalState)
        p, begun = self.temporal_compression_ratio, False
        waiting: Tensor | None = None
        for clip in clips:
            if waiting is None:
                chunk = chunk or self._chunk(clip, *clip.shape[3:])
            assert chunk is not None
            _require_same_size("x.shape", clip, clip if waiting is None else waiting)
            waiting = clip if waiting is None else torch.cat([waiting, clip], dim=2)
            while waiting.shape[2] >= (wanted := chunk * p if begun else 1 + (chunk - 1) * p):
                yield self._encode_chunk(waiting[:, :, :wanted], states)
                waiting, begun = waiting[:, :, wanted:], True
        require(waiting is not None, "frames", "no clip", "at least one frame")
        assert waiting is not None
        if waiting.shape[2] > 0:
            missing = (-waiting.shape[2] if begun else 1 - waiting.shape[2]) % p
            yield self._encode_chunk(F.pad(waiting, (0, 0, 0, 0, 0, missing), mode="replicate"), states)

    def _check_video(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape)
        fits = x.ndim == 5 and shape[1] == self.config.in_channels and min(shape) >= 1
        require(fits, "x.shape", shape, f"(b, {self.config.in_channels}, t, h, w) with all of 1 or more")
        if not torch.is_grad_enabled():  # in training this would wait for the device at every step
            low, high = (float(bound) for bound in torch.aminmax(x))
            fits = low >= -1.01 and high <= 1.01  # false for NaN
            require(fits, "range of x", (low, high), "finite pixels in [-1, 1]")
        return x

    def _moments(self, x: Tensor) -> Tensor:
        t, h, w = x.shape[2:]
        p, s = self.temporal_compression_ratio, self.spatial_compression_ratio
        if self._in_one_piece(x, 1 + -(-(t - 1) // p), h, w):
            return self._encode(F.pad(x, (0, -w % s, 0, -h % s, 0, -(t - 1) % p), mode="replicate"))
        return torch.cat(list(self._encode_chunks([x])), dim=2)

    def _posterior(self, moments: Tensor) -> DiagonalGaussianDistribution | FiniteScalarCodes:
        if self.quantizer is not None:
            return FiniteScalarCodes(self.quantizer(moments))
        return DiagonalGaussianDistribution(moments)

    @apply_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution | FiniteScalarCodes]:
        """Video `b c t h w` in [-1, 1] -> the distribution of its latents.

        Raises:
            ValueError: not a video of `in_channels` channels and at least one frame; without gradients, also pixels that
                are not finite or outside [-1, 1].
        """
        self._check_video(x)
        slices = x.split(1) if self.use_slicing and len(x) > 1 else [x]
        posterior = self._posterior(torch.cat([self._moments(some) for some in slices]))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    @torch.no_grad()
    def encode_stream(self, frames: Iterable[Tensor] | Tensor, chunk: int | None = None) -> Iterator[Tensor]:
        """The modes of a clip's latents, chunk by chunk, as the frames come; all together they are those of `encode`.

        Args:
            frames: the clip, or pieces of it in order, `b c t h w` with any t.
            chunk: latent frames worked on together; None for what suits the size and the device.

        Yields:
            Latents `b z n h' w'`; n is `chunk`, less at the end.
        Raises:
            ValueError: as `encode`, when the piece is reached; pieces of different sizes; no frames at all.
        """
        for posterior in self._posteriors(frames, chunk):
            yield posterior.mode()

    @apply_forward_hook
    @torch.no_grad()
    def posterior_stream(
        self, frames: Iterable[Tensor] | Tensor, chunk: int | None = None
    ) -> Iterator[DiagonalGaussianDistribution | FiniteScalarCodes]:
        """As `encode_stream`, but yields the distributions of the latents, `latent_dist` of `encode`."""
        yield from self._posteriors(frames, chunk)

    def _posteriors(
        self, frames: Iterable[Tensor] | Tensor, chunk: int | None
    ) -> Iterator[DiagonalGaussianDistribution | FiniteScalarCodes]:
        require(chunk is None or chunk >= 1, "chunk", chunk, "1 or more, or None")
        pieces = map(self._check_video, [frames] if isinstance(frames, Tensor) else frames)
        for moments in self._encode_chunks(pieces, chunk):
            yield self._posterior(moments)

    # --- Decoding -------------------------------------------------------------------------------------------------

    def _decode(self, z: Tensor, state: CausalState | None = None) -> Tensor:
        x = z.movedim(2, 0)
        if self.post_quant_conv is not None:
            x = self.post_quant_conv(x)
        x = unpatchify(self.decoder(x, state), self.config.patch_size, self.config.patch == "haar")
        return x.movedim(0, 2)

    def _decode_chunks(self, pieces: Iterable[Tensor], chunk: int | None = None) -> Iterator[Tensor]:
        states: dict[tuple[int, int], CausalState] = defaultdict(CausalState)
        s = self.spatial_compression_ratio
        first: Tensor | None = None
        for piece in pieces:
            self._check_latents(piece)
            first = piece[:, :, :1] if first is None else first
            _require_same_size("z.shape", piece, first)
            chunk = chunk or self._chunk(piece, piece.shape[3] * s, piece.shape[4] * s)
            for z in piece.split(chunk, dim=2):
                yield self._tiled(self._decode, z, states, 1, s)
        require(first is not None, "latents", "no latents", "at least one")

    def _check_latents(self, z: Tensor) -> None:
        fits = z.ndim == 5 and z.shape[1] == self.config.latent_channels and min(z.shape) >= 1
        require(fits, "z.shape", tuple(z.shape), f"(b, {self.config.latent_channels}, t, h, w) with all of 1 or more")

    def _video(self, z: Tensor) -> Tensor:
        t, h, w = z.shape[2:]
        if self._in_one_piece(z, t, h * self.spatial_compression_ratio, w * self.spatial_compression_ratio):
            return self._decode(z)
        return torch.cat(list(self._decode_chunks([z])), dim=2)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, sample_size: tuple[int, int, int] | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents `b z t' h' w'` -> video `b c t h w`.

        Args:
            sample_size: (t, h, w) of the video that was encoded; what was padded beyond it is cropped.

        Raises:
            ValueError: the latents' channels are not `latent_channels`, or `sample_size` is not that of such latents.
        """
        self._check_latents(z)
        if sample_size is not None:
            self._check_sample_size(z, sample_size)
        slices = z.split(1) if self.use_slicing and len(z) > 1 else [z]
        sample = torch.cat([self._video(some) for some in slices])
        if sample_size is not None:
            t, h, w = sample_size
            sample = sample[:, :, :t, :h, :w]
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _check_sample_size(self, z: Tensor, sample_size: tuple[int, int, int]) -> None:
        p, s = self.temporal_compression_ratio, self.spatial_compression_ratio
        shape = (1 + -(-(sample_size[0] - 1) // p), -(-sample_size[1] // s), -(-sample_size[2] // s))
        fits = tuple(z.shape[2:]) == shape and min(sample_size) >= 1
        require(fits, "sample_size", tuple(sample_size), f"that of a video with latents {tuple(z.shape[2:])}")

    @apply_forward_hook
    @torch.no_grad()
    def decode_stream(
        self,
        latents: Iterable[Tensor] | Tensor,
        sample_size: tuple[int, int, int] | None = None,
        chunk: int | None = None,
    ) -> Iterator[Tensor]:
        """The video, chunk by chunk, as the latents come; all together it is that of `decode`.

        The first latent is one frame, and each later one as many as the temporal compression.

        Args:
            latents: of the clip, or pieces of them in order, `b z t' h' w'` with any t'.
            sample_size: (t, h, w) of the video; what was padded beyond it is cropped.
            chunk: latent frames worked on together; None for what suits the size and the device.

        Yields:
            Video `b c n h w`.
        Raises:
            ValueError: as `decode`, when the piece is reached; pieces of different sizes; no latents at all.
        """
        require(chunk is None or chunk >= 1, "chunk", chunk, "1 or more, or None")
        if sample_size is not None and isinstance(latents, Tensor):
            self._check_sample_size(latents, sample_size)
        videos = self._decode_chunks([latents] if isinstance(latents, Tensor) else latents, chunk)
        if sample_size is None:
            yield from videos
            return
        done, (t, h, w), s = 0, sample_size, self.spatial_compression_ratio
        for video in videos:
            size, end = tuple(video.shape[3:]), done + video.shape[2]
            fits = size == (-(-h // s) * s, -(-w // s) * s) and end - t < self.temporal_compression_ratio
            require(fits, "sample_size", tuple(sample_size), f"that of a video with latents of {end} frames of {size}")
            yield video[:, :, : t - done, :h, :w]
            done = end
        require(done >= t, "sample_size", tuple(sample_size), f"that of a video with latents of {done} frames")

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


def _require_same_size(name: str, piece: Tensor, other: Tensor) -> None:
    same = (piece.shape[0], *piece.shape[3:]) == (other.shape[0], *other.shape[3:])
    allowed = f"(b, c, t, h, w) of other pieces in all but t, such as {tuple(other.shape)}"
    require(same, name, tuple(piece.shape), allowed)


def _scaled(cells: slice, unit: int) -> slice:
    return slice(cells.start * unit, cells.stop * unit)


def _ramp(length: int, overlap: int, rises: bool, falls: bool, like: Tensor) -> Tensor:
    """Weights `length` of a tile along one side: 1, falling linearly over `overlap` to a border with a neighbour."""
    steps = torch.arange(1, length + 1, dtype=like.dtype, device=like.device) / (overlap + 1)
    weights = torch.ones_like(steps)
    if rises:
        weights = torch.minimum(weights, steps)
    if falls:
        weights = torch.minimum(weights, steps.flip(0))
    return weights
