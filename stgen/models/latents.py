"""The latents of any video VAE that the pipeline takes: their shape and scale, encoding and decoding.

Every VAE has rules of its own for frames and sizes, and its own way to bring latents to unit variance. Here they become
one: any clip is padded inside, after its end and at its bottom and right, by repeating its border, and cropped back.
The first frame has a latent of its own and every p frames after it one more; an image VAE runs on each frame (p = 1).

Shapes: b batch, c channels, t frames, h height, w width; video `b c t h w` in [-1, 1]; latents `b z t' h' w'` with
t' = 1 + ceil((t - 1) / p), h' = ceil(h / s), w' = ceil(w / s) for compression p in time and s in space.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
)
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor

from stgen.config import require
from stgen.models.autoencoder import AutoencoderKLSTGen
from stgen.pretrained import find_pretrained

# A union of the very classes, which is what diffusers' `from_pipe` compares with.
VideoVAE: TypeAlias = (
    AutoencoderKLSTGen
    | AutoencoderKLCogVideoX
    | AutoencoderKLWan
    | AutoencoderKLLTXVideo
    | AutoencoderKLHunyuanVideo
    | AutoencoderKL
)
"""The VAEs that the pipeline takes. `AutoencoderKL` is an image VAE, such as Stable Diffusion's in VDT and Latte."""

VAE_CLASSES = {kind.__name__: kind for kind in get_args(VideoVAE)}

_IMAGES_AT_ONCE = 14
"""Frames that an image VAE works on together, which bounds memory; Latte's number in diffusers."""


def load_vae(folder: str | Path) -> VideoVAE:
    """Opens a saved VAE, whatever its class, or one that comes with stgen by its name, in evaluation mode.

    Raises:
        ValueError: the folder has no config.json, or one that names none of `VAE_CLASSES`.
        OSError: the folder holds no safetensors; nothing is unpickled.
    """
    folder = find_pretrained(folder)
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"vae is {str(folder)!r}, allowed: a folder with a VAE's config.json: {error}") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    require(name in VAE_CLASSES, f"_class_name in {folder}/config.json", name, ", ".join(VAE_CLASSES))
    return VAE_CLASSES[name].from_pretrained(str(folder), use_safetensors=True).eval()


def require_vae(vae: object) -> None:
    """Raises `ValueError` if `vae` is none of `VAE_CLASSES`; a compiled one counts as what it was."""
    kind = type(unwrap_module(vae))
    require(issubclass(kind, tuple(VAE_CLASSES.values())), "vae", kind.__name__, ", ".join(VAE_CLASSES))


def _is(vae: VideoVAE, kind: type) -> bool:
    return isinstance(unwrap_module(vae), kind)


# --- Shapes -------------------------------------------------------------------------------------------------------


def compression_ratios(vae: VideoVAE) -> tuple[int, int]:
    """(p, s): the frames, and the rows and columns, that one latent stands for.

    Raises:
        ValueError: a VAE of another class.
    """
    require_vae(vae)
    if _is(vae, AutoencoderKLWan):
        return vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    if _is(vae, AutoencoderKL | AutoencoderKLCogVideoX):
        # Neither says it: each stage but the last halves the size, as diffusers' pipelines count too.
        return int(vae.config.get("temporal_compression_ratio", 1)), 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.temporal_compression_ratio, vae.spatial_compression_ratio


def latent_channels(vae: VideoVAE) -> int:
    """Channels z of the latents."""
    return vae.config.z_dim if _is(vae, AutoencoderKLWan) else vae.config.latent_channels


def latent_shape(vae: VideoVAE, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(z, t', h', w') of the latents of a clip."""
    p, s = compression_ratios(vae)
    return latent_channels(vae), 1 + -(-(num_frames - 1) // p), -(-height // s), -(-width // s)


def temporal_reach(vae: VideoVAE) -> str:
    """Which frames a latent depends on: its `frame` alone, the `past` up to its own last frame, or the whole `clip`.

    Ours, Wan and LTX are causal to the bit; the group norms of CogVideoX and Hunyuan average over later frames too.
    """
    if _is(vae, AutoencoderKL):
        return "frame"
    causal = _is(vae, AutoencoderKLSTGen | AutoencoderKLWan)
    causal |= _is(vae, AutoencoderKLLTXVideo) and vae.config.encoder_causal
    return "past" if causal else "clip"


# --- Scale --------------------------------------------------------------------------------------------------------


def latent_statistics(vae: VideoVAE, like: Tensor) -> tuple[Tensor, Tensor]:
    """The `(1, z, 1, 1, 1)` by which latents are normalised: (latents - mean) / std.

    Each VAE's own names for it: `latents_mean` and `latents_std` per channel (Wan and ours in the config, LTX in
    buffers), `shift_factor` and `scaling_factor` for all, multiplied (CogVideoX, Hunyuan, image VAEs, LTX on top).
    """
    z, config = latent_channels(vae), vae.config
    statistics = vae if _is(vae, AutoencoderKLLTXVideo) else config
    mean, std = getattr(statistics, "latents_mean", None), getattr(statistics, "latents_std", None)
    mean = torch.as_tensor([0.0] * z if mean is None else mean, dtype=like.dtype, device=like.device)
    std = torch.as_tensor([1.0] * z if std is None else std, dtype=like.dtype, device=like.device)
    mean = mean + (config.get("shift_factor") or 0.0)
    std = std / config.get("scaling_factor", 1.0)
    return mean.view(1, z, 1, 1, 1), std.view(1, z, 1, 1, 1)


# --- Encoding and decoding ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """The distribution of a clip's latents on the VAE's own scale, float32 `b z t' h' w'`."""

    mean: Tensor
    """Which is the mode too."""
    logvar: Tensor | None = None
    """Logarithm of the variance; None of a VAE whose latents are certain (finite scalar quantisation)."""


def encode_moments(vae: VideoVAE, video: Tensor) -> Moments:
    """Video -> the distribution of its latents. Arguments and errors are those of `encode`."""
    b, _, t, h, w = video.shape
    p, s = compression_ratios(vae)
    video = F.pad(video.to(vae.dtype), (0, -w % s, 0, -h % s, 0, -(t - 1) % p), mode="replicate")
    if _is(vae, AutoencoderKL):
        images = video.transpose(1, 2).flatten(0, 1).split(_IMAGES_AT_ONCE)
        flat = _joined([vae.encode(some).latent_dist for some in images], dim=0)
        frames = (None if x is None else x.unflatten(0, (b, t)).transpose(1, 2) for x in (flat.mean, flat.logvar))
        moments = Moments(*frames)
    else:
        moments = _joined([vae.encode(video).latent_dist])
    _require_shape(vae, "latents", moments.mean, latent_shape(vae, t, h, w))
    return moments


@torch.no_grad()
def encode_moments_stream(vae: VideoVAE, pieces: Iterable[Tensor]) -> Moments:
    """As `encode_moments`, of a clip that comes in pieces `b c n h w` of any length, without gradients.

    Ours works on a few frames at a time and holds its causal state only. Diffusers' VAEs get the clip whole.
    """
    if not _is(vae, AutoencoderKLSTGen):
        return encode_moments(vae, torch.cat(list(pieces), dim=2))
    return _joined(list(vae.posterior_stream(piece.to(vae.dtype) for piece in pieces)))


def _joined(posteriors: list[Any], dim: int = 2) -> Moments:
    """The distributions of consecutive parts as one."""
    mean = torch.cat([posterior.mode().float() for posterior in posteriors], dim)
    if not hasattr(posteriors[0], "logvar"):
        return Moments(mean, None)
    return Moments(mean, torch.cat([posterior.logvar.float() for posterior in posteriors], dim))


def normalise(vae: VideoVAE, latents: Tensor) -> Tensor:
    """Latents on the VAE's own scale -> as the transformer sees them, float32."""
    mean, std = latent_statistics(vae, latents.float())
    return (latents.float() - mean) / std


def encode(vae: VideoVAE, video: Tensor) -> Tensor:
    """Video -> the modes of its latents' distributions, normalised as the transformer sees them.

    What is padded after the clip's end cannot reach the latents before it in a causal VAE. CogVideoX and Hunyuan are
    causal up to their group norms, which average over time too.

    Args:
        video: `b c t h w` in [-1, 1], any number of frames and any size.

    Returns:
        float32 `b z t' h' w'`, of zero mean and unit variance for clips like those the VAE was trained on.
    Raises:
        ValueError: a VAE of another class, or one whose config says another shape than it makes.
    """
    return normalise(vae, encode_moments(vae, video).mean)


def decode(vae: VideoVAE, latents: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Normalised latents -> video.

    Args:
        latents: `b z t' h' w'`, as `encode` gives them.
        size: (t, h, w) of the video; what was padded beyond it is cropped.

    Returns:
        float32 `b c t h w`, about [-1, 1] but not cut to it.
    Raises:
        ValueError: a VAE of another class, or latents that are not those of a video of this size.
    """
    t, h, w = size
    z = _denormalise(vae, latents, size)
    if _is(vae, AutoencoderKL):
        images = z.transpose(1, 2).flatten(0, 1).split(_IMAGES_AT_ONCE)
        video = torch.cat([vae.decode(some).sample for some in images]).unflatten(0, (len(z), t)).transpose(1, 2)
    elif _is(vae, AutoencoderKLCogVideoX) and z.shape[2] > 1 and z.shape[2] % 2 == 0:
        # It decodes latents in pairs and knows the first latent, one frame, by their number being odd: of an even
        # number it makes 4 frames of each, the first frame four times (zai-org/CogVideo#786).
        video = vae.decode(torch.cat([z, z[:, :, -1:]], dim=2)).sample
    elif _is(vae, AutoencoderKLLTXVideo):
        video = _decode_ltx(vae, z)
    else:
        video = vae.decode(z).sample
    video = video[:, :, :t, :h, :w].float()
    _require_shape(vae, "video", video, (video.shape[1], t, h, w))
    return video


def decode_stream(vae: VideoVAE, latents: Tensor, size: tuple[int, int, int]) -> Iterator[Tensor]:
    """Normalised latents -> video as it is decoded, without gradients; all chunks together are what `decode` gives.

    Ours is decoded a few latents at a time, and between them holds its causal state only. Diffusers' VAEs have no way to
    stop and go on, and give the video whole, in one chunk.

    Args:
        latents, size: as for `decode`.

    Yields:
        float32 `b c n h w`, about [-1, 1] but not cut to it; the n sum to t.
    Raises:
        ValueError: as `decode`, instead of the first chunk.
    """
    if not _is(vae, AutoencoderKLSTGen):
        with torch.no_grad():
            video = decode(vae, latents, size)
        yield video
        return
    z = _denormalise(vae, latents, size)
    streams = [vae.decode_stream(some, size) for some in z.split(1 if vae.use_slicing else len(z))]
    for chunks in zip(*streams, strict=True):
        yield torch.cat(chunks).float()


def _denormalise(vae: VideoVAE, latents: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Latents as the VAE has them, after a check of their shape against (t, h, w) of the video."""
    _require_shape(vae, "latents", latents, latent_shape(vae, *size))
    mean, std = latent_statistics(vae, latents.float())
    return (latents.float() * std + mean).to(vae.dtype)


def _decode_ltx(vae: AutoencoderKLLTXVideo, z: Tensor) -> Tensor:
    """Since LTX-Video 0.9.1 the decoder is itself a denoiser: told the time 0 it takes the latents for clean ones,
    diffusers' default. It may also add noise, one picture for the whole batch, from the global generator."""
    decoded = []
    # Sliced here: diffusers 0.42 takes the second video for the time of the first one, and fails.
    for some in z.split(1 if vae.use_slicing else len(z)):
        time = some.new_zeros(len(some)) if vae.config.timestep_conditioning else None
        with torch.random.fork_rng([z.device] if z.is_cuda else []):
            torch.manual_seed(0)
            decoded.append(vae.decode(some, time).sample)
    return torch.cat(decoded)


def _require_shape(vae: VideoVAE, name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    kind = type(unwrap_module(vae)).__name__
    require(tuple(x.shape[1:]) == expected, f"shape of {name} of {kind}", tuple(x.shape[1:]), f"{expected}")
