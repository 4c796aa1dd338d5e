"""The text encoder of a closed domain is the whole one, for its words."""

from pathlib import Path

import pytest
import torch

from stgen.data.moving_mnist import make_clip
from stgen.text import MINILM, TextCache, encode_text, load_text_encoder, shrink_text_encoder

CAPTIONS = [make_clip("train", 0, index)[1] for index in range(200)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    shrink_text_encoder(MINILM, CAPTIONS, layers=2, max_length=64, out=folder)
    return folder


def test_states_are_those_of_the_whole_encoder_after_so_many_layers(small: Path) -> None:
    prompts = [*CAPTIONS[:8], ""]
    tokenizer, encoder = load_text_encoder(MINILM)
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    whole = encoder(**tokens, output_hidden_states=True).hidden_states[2] * tokens.attention_mask[..., None]
    states, mask = encode_text(*load_text_encoder(str(small)), prompts, max_length=64)
    assert torch.equal(mask, tokens.attention_mask.bool())
    torch.testing.assert_close(states, whole, atol=1e-6, rtol=0)


def test_it_is_small_and_spells_words_that_it_does_not_know(small: Path) -> None:
    tokenizer, _ = load_text_encoder(str(small))
    assert (small / "model.safetensors").stat().st_size < 16e6
    assert tokenizer.tokenize("a Zebra moving!") == ["a", "z", "##e", "##b", "##r", "##a", "moving", "!"]


def test_a_prompt_longer_than_the_positions_is_cut_with_a_warning(
    small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Words that are spelled are long; max_length is of the caller, who may not know the encoder."""
    states, mask = encode_text(*load_text_encoder(str(small)), ["zebra " * 30], max_length=128)
    assert states.shape == (1, 64, 384)
    assert mask.all()
    assert "a prompt of 152 tokens is cut to the first 64: 'zebra zebra" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 7}, "layers is 7, allowed: 1 to 6"),
        ({"max_length": 4}, "max_length is 4, allowed: [0-9]+ or more, the tokens of"),
        ({"max_length": 513}, "max_length is 513, allowed: 2 or more tokens"),
        ({"texts": []}, "texts is .*, allowed: at least one"),
    ],
)
def test_refusals(arguments: dict, message: str, tmp_path: Path) -> None:
    given = {"texts": CAPTIONS, "layers": 2, "max_length": 64} | arguments
    with pytest.raises(ValueError, match=message):
        shrink_text_encoder(MINILM, out=tmp_path, **given)


def test_states_of_an_encoder_in_half_precision_are_trained_with_in_full(small: Path, tmp_path: Path) -> None:
    tokenizer, encoder = load_text_encoder(str(small))
    for part in (tokenizer, encoder.half()):
        part.save_pretrained(tmp_path / "half")
    assert load_text_encoder(str(tmp_path / "half"))[1].dtype == torch.float16
    TextCache.build(tmp_path / "cache.safetensors", str(tmp_path / "half"), ["", *CAPTIONS[:4]], 64)
    states, _ = TextCache(tmp_path / "cache.safetensors")(["", *CAPTIONS[:4]])
    assert states.dtype == torch.float32
