"""An image VAE as the beginning of a causal video VAE.

A 3D convolution whose last tap in time is the 2D one's kernel, with zeros before it, is that 2D convolution of each frame.
So the video VAE begins as the image VAE run on every frame (without compression in time) or on the last frame of every
group, and training finds what the taps before are for (MAGVIT-v2, arXiv:2310.05737, "inflation").
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from stgen.config import require
from stgen.models.autoencoder import AutoencoderKLSTGen
from stgen.models.latents import latent_statistics
from stgen.models.layers import CausalConv3d, ConvUpsample3d, ResBlock3d, SpatialAttention


@torch.no_grad()
def inflate(image_vae: AutoencoderKL, temporal_downsample: Sequence[bool] | None = None) -> AutoencoderKLSTGen:
    """A video VAE that is `image_vae` for clips of one frame, in encoding and decoding; in float32, on the CPU.

    Args:
        image_vae: Stable Diffusion's, SDXL's, SD3's, Flux's or another of their form.
        temporal_downsample: for each of its downsamplings, whether it halves time too; None halves it nowhere.

    Raises:
        ValueError: an image VAE of another form, or not one value for each downsampling.
    """
    config = image_vae.config
    steps = len(config.block_out_channels) - 1
    flags = (False,) * steps if temporal_downsample is None else tuple(temporal_downsample)
    require(len(flags) == steps, "temporal_downsample", flags, f"{steps} values, one for each downsampling")
    for name, allowed in (("act_fn", "silu"), ("norm_num_groups", 32), ("mid_block_add_attention", True)):
        require(config[name] == allowed, f"{name} of the image VAE", config[name], repr(allowed))
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        require(set(config[name]) == {kind}, f"{name} of the image VAE", tuple(config[name]), f"{kind} alone")
    mean, std = latent_statistics(image_vae, torch.zeros(()))
    vae = AutoencoderKLSTGen(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        latent_channels=config.latent_channels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        decoder_layers_per_block=config.layers_per_block + 1,
        temporal_downsample=flags,
        spatial_downsample=(True,) * steps,
        resample="conv",
        norm="group",
        mid_attention=True,
        conv_norm_out=True,
        use_post_quant_conv=config.use_post_quant_conv,
        latents_mean=mean.flatten().tolist(),
        latents_std=std.flatten().tolist(),
    )
    for ours, theirs in ((vae.encoder, image_vae.encoder), (vae.decoder, image_vae.decoder)):
        _inflate(ours.conv_in, theirs.conv_in)
        for block, image_block in zip(ours.blocks, _image_blocks(theirs), strict=True):
            _copy_block(block, image_block)
        _copy(ours.conv_norm_out, theirs.conv_norm_out)
        _inflate(ours.conv_out, theirs.conv_out)
    if config.use_quant_conv:  # a 1x1 convolution behind a convolution is one convolution
        conv = vae.encoder.conv_out
        quant, bias = (x.to(conv.weight) for x in (image_vae.quant_conv.weight[:, :, 0, 0], image_vae.quant_conv.bias))
        conv.weight.copy_(torch.einsum("mo,octhw->mcthw", quant, conv.weight))
        conv.bias.copy_(quant @ conv.bias + bias)
    if vae.post_quant_conv is not None:  # not so before one, since the bias would have to end at the border
        _inflate(vae.post_quant_conv, image_vae.post_quant_conv)
    return vae


def _image_blocks(stack: Any) -> Iterator[nn.Module]:
    """The blocks of an image encoder or decoder, in the order of `Encoder3d` and `Decoder3d`."""
    middle = (stack.mid_block.resnets[0], stack.mid_block.attentions[0], stack.mid_block.resnets[1])
    if hasattr(stack, "down_blocks"):
        for block in stack.down_blocks:
            yield from (*block.resnets, *(block.downsamplers or ()))
        yield from middle
    else:
        yield from middle
        for block in stack.up_blocks:
            yield from (*block.resnets, *(block.upsamplers or ()))


def _copy_block(block: Any, image_block: Any) -> None:
    if isinstance(block, ResBlock3d):
        _copy(block.norm1, image_block.norm1)
        _copy(block.norm2, image_block.norm2)
        _inflate(block.conv1, image_block.conv1)
        _inflate(block.conv2, image_block.conv2)
        if isinstance(block.shortcut, CausalConv3d):
            _inflate(block.shortcut, image_block.conv_shortcut)
    elif isinstance(block, SpatialAttention):
        require(image_block.heads == 1, "attention heads of the image VAE", image_block.heads, "1")
        _copy(block.norm, image_block.group_norm)
        projections = (image_block.to_q, image_block.to_k, image_block.to_v)
        block.to_qkv.weight.copy_(torch.cat([projection.weight for projection in projections]))
        block.to_qkv.bias.copy_(torch.cat([projection.bias for projection in projections]))
        _copy(block.to_out, image_block.to_out[0])
    else:
        _inflate(block.conv if isinstance(block, ConvUpsample3d) else block, image_block.conv)


def _copy(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())


def _inflate(ours: CausalConv3d, theirs: nn.Conv2d) -> None:
    ours.weight.zero_()
    ours.weight[:, :, -1].copy_(theirs.weight)
    ours.bias.copy_(theirs.bias)
