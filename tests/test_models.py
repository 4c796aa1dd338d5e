import pytest
import torch
from conftest import tiny_transformer, tiny_vae
from hypothesis import given, settings
from hypothesis import strategies as st

from stgen.masks import fold_mask
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


def inputs(b: int = 2, grid: tuple[int, int, int] = (3, 5, 3)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(b, 1, 1 + 4 * (grid[0] - 1), 8 * grid[1], 8 * grid[2], generator=generator) > 0.5).float()
    mask[:, :, :5] = 0
    return {
        "hidden_states": torch.randn(b, 4, *grid, generator=generator),
        "timestep": torch.tensor([300.0, 800.0][:b]),
        "encoder_hidden_states": torch.randn(b, 6, 16, generator=generator),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]][:b]).bool(),
        "condition_latents": torch.randn(b, 4, *grid, generator=generator),
        "condition_mask": fold_mask(mask, 4, 8),
    }


@torch.no_grad()
def test_transformer_does_not_see_what_it_must_not() -> None:
    model, batch = tiny_transformer(), inputs()
    expected = model(**batch).sample
    assert expected.shape == batch["hidden_states"].shape
    # Noise in given cells, padding text, and condition latents of wholly hidden cells change nothing.
    given = (batch["condition_mask"].amax(1, keepdim=True) == 0).expand_as(batch["hidden_states"])
    hidden = (batch["condition_mask"].amin(1, keepdim=True) == 1).expand_as(batch["hidden_states"])
    batch["hidden_states"] = torch.where(given, torch.full_like(batch["hidden_states"], 9.0), batch["hidden_states"])
    batch["condition_latents"] = torch.where(hidden, batch["condition_latents"] + 5, batch["condition_latents"])
    batch["encoder_hidden_states"][1, 2:] = 7.0
    assert torch.equal(model(**batch).sample, expected)


@torch.no_grad()
def test_transformer_sees_what_it_should() -> None:
    model, batch = tiny_transformer(), inputs()
    expected = model(**batch).sample
    for name in ("hidden_states", "timestep", "encoder_hidden_states", "condition_latents"):
        changed = dict(batch)
        changed[name] = batch[name] * 0.5
        assert not torch.allclose(model(**changed).sample, expected, atol=1e-4), name


@torch.no_grad()
def test_batch_of_one_equals_batch_of_many() -> None:
    model, batch = tiny_transformer(), inputs()
    both = model(**batch).sample
    for i in range(2):
        one = model(**{name: value[i : i + 1] for name, value in batch.items()}).sample
        torch.testing.assert_close(one, both[i : i + 1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_no_condition_equals_everything_hidden() -> None:
    model, batch = tiny_transformer(), inputs()
    batch["condition_mask"] = torch.ones_like(batch["condition_mask"])
    expected = model(**batch).sample
    del batch["condition_mask"], batch["condition_latents"]
    assert torch.equal(model(**batch).sample, expected)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny_transformer().train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        model(**inputs()).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_transformer_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="pattern is 'sx', allowed: letters of s, t, f"):
        tiny_transformer(pattern="sx")
    batch = inputs()
    del batch["condition_mask"]
    with pytest.raises(ValueError, match="condition_mask"):
        tiny_transformer()(**batch)
