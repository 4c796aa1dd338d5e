"""What the trainer feeds the model: leak-free, and a function of (seed, position) alone."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_text_encoder, tiny_transformer, tiny_vae

from stgen.data.reading import DataConfig
from stgen.flow import dynamic_shift, shift_time
from stgen.masks import MaskSpec
from stgen.objective import denoising_losses
from stgen.text import TextCache, encode_text
from stgen.train import TrainConfig, make_model, model_inputs

CAPTIONS = ["a 3 moving up", "the digit 7 moves left and down", "a 1", "a 2 moving right"]
MASKS = [MaskSpec(), MaskSpec("predict", 2, {"given": [1, 8]}), MaskSpec("moving_box", 2), MaskSpec("interpolate")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextCache:
    folder = tmp_path_factory.mktemp("text")
    tokenizer, encoder = tiny_text_encoder(folder)
    tokenizer.save_pretrained(folder)
    encoder.save_pretrained(folder)
    TextCache.build(folder / "cache.safetensors", str(folder), ["", *CAPTIONS], 64)
    cache = TextCache(folder / "cache.safetensors")
    states, mask = encode_text(tokenizer, encoder, CAPTIONS)
    cached, cached_mask = cache(CAPTIONS)
    torch.testing.assert_close(cached, states, atol=1e-6, rtol=1e-5)  # the cache is the encoder, per token
    assert torch.equal(cached_mask, mask)
    return cache


def config() -> TrainConfig:
    return TrainConfig(run="run", vae="vae", data=DataConfig("data", 9, 16, 16), masks=MASKS, text_dropout=0.3)


def batch(positions: list[int]) -> dict:
    videos = [
        torch.randint(256, (3, 9, 16, 16), generator=torch.Generator().manual_seed(p), dtype=torch.uint8)
        for p in positions
    ]
    captions, fps = [CAPTIONS[p % 4] for p in positions], torch.full((len(positions),), 10.0)
    return {"video": torch.stack(videos), "caption": captions, "fps": fps, "position": positions}


def test_hidden_pixels_change_no_condition(text: TextCache) -> None:
    vae, positions = tiny_vae(), list(range(16))
    original = batch(positions)
    inputs = model_inputs(original, config(), vae, text, torch.device("cpu"))
    # Change all that lies in wholly hidden cells of 4 frames and 4x4 pixels. Frame 0 is a cell of its own,
    # frames 1-4 and 5-8 are the next two.
    wholly = inputs["condition_mask"].amin(1) == 1
    frames = torch.tensor([0, 1, 1, 1, 1, 2, 2, 2, 2])
    hidden = wholly[:, frames].repeat_interleave(4, 2).repeat_interleave(4, 3)[:, None]
    assert 0.2 < hidden.float().mean() < 0.9
    changed = original | {"video": torch.where(hidden, 255 - original["video"], original["video"])}
    again = model_inputs(changed, config(), vae, text, torch.device("cpu"))
    for name in ("condition_latents", "condition_mask", "text", "text_mask", "time", "noise"):
        assert torch.equal(inputs[name], again[name]), name
    assert not torch.equal(inputs["latents"], again["latents"])


def test_inputs_do_not_depend_on_the_batch(text: TextCache) -> None:
    vae = tiny_vae()
    whole = model_inputs(batch(list(range(8))), config(), vae, text, torch.device("cpu"))
    half = model_inputs(batch([4, 5, 6, 7]), config(), vae, text, torch.device("cpu"))
    for name in ("latents", "noise", "time", "condition_latents", "condition_mask"):
        torch.testing.assert_close(half[name], whole[name][4:], atol=1e-5, rtol=1e-5)
    other = model_inputs(batch([4, 5, 6, 8]), config(), vae, text, torch.device("cpu"))
    assert not torch.equal(other["noise"][3], whole["noise"][7])


def test_times_are_shifted_by_size_and_length(text: TextCache) -> None:
    """9 frames of 16 x 16 make 3 latent frames; one frame makes one."""
    vae, cpu = tiny_vae(), torch.device("cpu")
    plain, shifted = config(), config()
    shifted.flow.dynamic_shift = True
    whole = batch([1, 2, 3])
    for clips, latent_frames in ((whole, 3), (whole | {"video": whole["video"][:, :, :1]}, 1)):
        if latent_frames == 1:
            plain.masks = shifted.masks = [MaskSpec()]
        expected = shift_time(model_inputs(clips, plain, vae, text, cpu)["time"], dynamic_shift(16, 16, latent_frames))
        assert torch.equal(model_inputs(clips, shifted, vae, text, cpu)["time"], expected)


def test_some_steps_lower_the_loss(text: TextCache) -> None:
    model = tiny_transformer().train()
    inputs = model_inputs(batch(list(range(8))), config(), tiny_vae(), text, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = denoising_losses(model, inputs, config().flow)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_conditioning_channels_can_be_left_out_in_training(text: TextCache) -> None:
    vae = tiny_vae()
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1}
    for channels, fits in ((0, True), (4, True), (3, False)):
        chosen = TrainConfig(
            run="run",
            vae="vae",
            data=DataConfig("data", 9, 16, 16),
            masks=MASKS,
            model={**small, "mask_channels": channels},
        )
        if not fits:
            with pytest.raises(ValueError, match="model.mask_channels is 3, allowed: 4, the frames of a latent, or 0"):
                make_model(chosen, vae, text.dim, fps=10.0)
            continue
        model = make_model(chosen, vae, text.dim, fps=10.0)
        assert model.config.mask_channels == channels
        inputs = model_inputs(batch([0, 1, 2, 3]), chosen, vae, text, torch.device("cpu"))
        assert denoising_losses(model, inputs, chosen.flow)["loss"].isfinite()


def test_text_is_dropped_for_guidance(text: TextCache) -> None:
    """A share of the captions gives way to the empty prompt, or to the model's own null text, each by its position."""
    vae, positions = tiny_vae(), list(range(64))
    clips = batch(positions)
    dropping = {share: replace(config(), text_dropout=share, masks=[MaskSpec()]) for share in (0.0, 0.3, 1.0)}
    empty, captions = text[""], [text[caption] for caption in clips["caption"]]

    def dropped(share: float) -> list[bool]:
        inputs = model_inputs(clips, dropping[share], vae, text, torch.device("cpu"))
        assert not inputs["drop_text"].any()
        rows = [states[mask] for states, mask in zip(inputs["text"], inputs["text_mask"], strict=True)]
        for row, caption in zip(rows, captions, strict=True):
            assert torch.equal(row, empty) or torch.equal(row, caption)
        return [torch.equal(row, empty) for row in rows]

    assert (sum(dropped(0.0)), sum(dropped(1.0))) == (0, 64)
    some = dropped(0.3)
    assert 8 <= sum(some) <= 32
    learned = replace(dropping[0.3], model={"null_text": "learned", "text_tokens": 64})
    inputs = model_inputs(clips, learned, vae, text, torch.device("cpu"))
    assert inputs["drop_text"].tolist() == some, "then the model puts its own in place of the caption"
    assert not any(torch.equal(s[m], empty) for s, m in zip(inputs["text"], inputs["text_mask"], strict=True))
