"""An image VAE inflated to a video VAE: exact for one frame, and what it is for several."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from test_autoencoder import noise
from torch import Tensor

from stgen.config import load_config
from stgen.models.inflation import inflate
from stgen.models.latents import decode, encode
from stgen.train_vae import TrainVAEConfig, make_vae


def image_vae(**overrides) -> AutoencoderKL:
    torch.manual_seed(0)
    arguments = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (32, 32, 64),
        "layers_per_block": 1,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "shift_factor": 0.06,
    }
    return AutoencoderKL(**(arguments | overrides)).eval()


def by_frames(function, x: Tensor) -> Tensor:
    """An image function on every frame of `b c t h w`."""
    return function(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


@pytest.mark.parametrize("flags", [None, (False, True), (True, True)])
@pytest.mark.parametrize("quant", [True, False])
@torch.no_grad()
def test_one_frame_is_the_image_vae(flags, quant: bool) -> None:
    image = image_vae(use_quant_conv=quant, use_post_quant_conv=quant)
    video = inflate(image, flags).eval()
    x, z = noise(2, 3, 1, 24, 16), noise(2, 4, 1, 6, 4)
    moments = by_frames(lambda frames: image.encode(frames).latent_dist.parameters, x)
    torch.testing.assert_close(video.encode(x).latent_dist.parameters, moments, atol=1e-5, rtol=1e-5)
    frames = by_frames(lambda latents: image.decode(latents).sample, z)
    torch.testing.assert_close(video.decode(z).sample, frames, atol=1e-5, rtol=1e-5)
    # The pipeline's normalised latents too: scaling and shift come along.
    torch.testing.assert_close(encode(video, x), encode(image, x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decode(video, z, (1, 24, 16)), decode(image, z, (1, 24, 16)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_clip_begins_as_the_image_vae_of_its_frames() -> None:
    image = image_vae()
    x = noise(1, 3, 9, 16, 16)
    moments = by_frames(lambda frames: image.encode(frames).latent_dist.parameters, x)
    z = moments[:, :4]
    frames = by_frames(lambda latents: image.decode(latents).sample, z)
    plain, compressed = inflate(image).eval(), inflate(image, (True, True)).eval()
    torch.testing.assert_close(plain.encode(x).latent_dist.parameters, moments, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain.decode(z).sample, frames, atol=1e-5, rtol=1e-5)
    # Compressed in time, a latent is that of its group's last frame, and is shown for the whole group.
    every_fourth = moments[:, :, ::4]
    torch.testing.assert_close(compressed.encode(x).latent_dist.parameters, every_fourth, atol=1e-5, rtol=1e-5)
    shown = frames[:, :, [0, 4, 4, 4, 4, 8, 8, 8, 8]]
    torch.testing.assert_close(compressed.decode(z[:, :, ::4]).sample, shown, atol=1e-5, rtol=1e-5)


def test_half_precision_weights_are_inflated_in_float32() -> None:
    image = image_vae().to(torch.bfloat16)
    video, expected = inflate(image), inflate(image.float())
    for name, weight in expected.state_dict().items():
        assert torch.equal(video.state_dict()[name], weight), name


def test_every_weight_of_the_image_vae_is_used() -> None:
    image = image_vae()
    parameters = sum(p.numel() for p in image.parameters())
    nonzero = sum(int((p != 0).sum()) for p in inflate(image).parameters())
    quant = sum(p.numel() for p in image.quant_conv.parameters())
    zero = sum(int((p == 0).sum()) for p in image.parameters())
    assert nonzero == parameters - quant - zero


def test_the_trainer_begins_with_an_inflated_vae(tmp_path: Path) -> None:
    image = image_vae()
    image.save_pretrained(tmp_path / "image")
    options = [f"init={tmp_path}/image", "run=r", "data.path=d"]
    vae = make_vae(load_config(TrainVAEConfig, None, [*options, "model.temporal_downsample=[true,false]"])).eval()
    assert vae.temporal_compression_ratio == 2
    x = noise(1, 3, 1, 8, 8)
    with torch.no_grad():
        expected = image.encode(x[:, :, 0]).latent_dist.mode()
        torch.testing.assert_close(vae.encode(x).latent_dist.mode()[:, :, 0], expected, atol=1e-5, rtol=1e-5)
    assert vae.config.latents_mean is None, "measured when the encoder is trained"
    frozen = make_vae(load_config(TrainVAEConfig, None, [*options, "frozen=['encoder.*']"]))
    assert frozen.config.latents_mean == inflate(image).config.latents_mean is not None
    with pytest.raises(ValueError, match="model is 'norm', allowed: temporal_downsample"):
        make_vae(load_config(TrainVAEConfig, None, [*options, "model.norm=group"]))


@pytest.mark.parametrize(
    ("arguments", "flags", "message"),
    [
        ({}, (True,), r"temporal_downsample is \(True,\), allowed: 2 values"),
        ({"norm_num_groups": 16}, None, "norm_num_groups of the image VAE is 16, allowed: 32"),
        ({"mid_block_add_attention": False}, None, "mid_block_add_attention"),
        ({"act_fn": "relu"}, None, "act_fn of the image VAE is 'relu', allowed: 'silu'"),
        ({"down_block_types": ("AttnDownEncoderBlock2D",) * 3}, None, "down_block_types"),
    ],
)
def test_an_image_vae_of_another_form_is_refused(arguments: dict, flags, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inflate(image_vae(**arguments), flags)
