import pytest
import torch
from conftest import tiny_vae
from hypothesis import given, settings
from hypothesis import strategies as st

from stgen.models.latents import latent_shape


@given(st.integers(1, 14), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=15, deadline=None)
def test_vae_returns_the_exact_shape(t: int, h: int, w: int) -> None:
    vae = tiny_vae()
    video = torch.randn(1, 3, t, h, w)
    with torch.no_grad():
        assert vae.encode(video).latent_dist.mode().shape[1:] == latent_shape(vae, t, h, w)
        assert vae(video).sample.shape == video.shape


@torch.no_grad()
def test_vae_is_causal_bitwise() -> None:
    vae = tiny_vae()
    video = torch.randn(1, 3, 13, 16, 16)
    changed = video.clone()
    changed[:, :, 6:] = torch.randn_like(changed[:, :, 6:])
    before, after = (vae.encode(x).latent_dist.parameters for x in (video, changed))
    # Frames 0 and 1..4 are the groups of the first two latents; frame 6 lies in the third.
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])
    latents = torch.randn(1, 4, 4, 4, 4)
    later = latents.clone()
    later[:, :, 2:] += 1
    assert torch.equal(vae.decode(latents).sample[:, :, :5], vae.decode(later).sample[:, :, :5])


@torch.no_grad()
def test_latents_of_the_beginning_are_those_of_the_whole() -> None:
    vae = tiny_vae()
    video = torch.randn(1, 3, 13, 16, 16)
    whole, image = (vae.encode(x).latent_dist.mode() for x in (video, video[:, :, :1]))
    torch.testing.assert_close(whole[:, :, :1], image, atol=1e-5, rtol=1e-5)


def test_vae_refuses_what_it_cannot_encode() -> None:
    with pytest.raises(ValueError, match=r"x.shape is \(1, 1, 2, 8, 8\), allowed: \(b, 3, t, h, w\)"):
        tiny_vae().encode(torch.zeros(1, 1, 2, 8, 8))
    with pytest.raises(ValueError, match="z.shape"):
        tiny_vae().decode(torch.zeros(1, 5, 2, 4, 4))
    with pytest.raises(ValueError, match="temporal_downsample"):
        tiny_vae(temporal_downsample=(True,))
