"""A wider model that does what a narrow one does."""

from pathlib import Path

import pytest
import torch
from conftest import run_training, tiny_transformer
from test_finetuning import inputs

from stgen import STGenTransformer3DModel
from stgen.models.widening import widened

FLAT = {"space_scale": 1e9, "time_scale": 1e9}
"""All positions are 0, where the copies of a channel have the same."""


@pytest.mark.parametrize(
    "architecture",
    [
        {},
        {"modulation": "full", "mlp": "swiglu", "qk_norm": "after_rotary"},
        {
            "num_classes": 3,
            "temporal_modulation": "affine",
            "cross_norm": False,
            "null_text": "learned",
            "text_tokens": 5,
        },
        {"size_conditioning": "size", "qk_norm": None, "learn_sigma": True, "mask_channels": 0},
        {"text_dim": None, "temporal_modulation": "gated", "time_positions": "attention", "patch_size": (1, 1, 1)},
    ],
)
def test_it_does_what_the_narrow_one_does(architecture: dict) -> None:
    model = tiny_transformer(**FLAT, **architecture)
    wide = widened(model)
    assert wide.config.num_attention_heads == 2 * model.config.num_attention_heads
    assert not wide.training
    batch = inputs(given=model.config.mask_channels > 0)
    if model.config.text_dim is None:
        del batch["encoder_hidden_states"]
    sizes = {"fps": 8.0, "num_frames": 9.0, "height": 16.0, "width": 24.0}
    batch |= {name: torch.full((2,), value) for name, value in sizes.items()}
    with torch.no_grad():
        expected, found = model(**batch).sample, wide(**batch).sample
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_positions_change_little() -> None:
    model = tiny_transformer()
    with torch.no_grad():
        expected, found = model(**inputs(given=True)).sample, widened(model)(**inputs(given=True)).sample
    assert (found - expected).square().mean() < 0.01 * expected.square().mean()


def test_copies_learn_different_things() -> None:
    """Without the noise both copies of a channel, a head and a hidden unit would have the same gradient."""
    wide = widened(tiny_transformer(**FLAT))
    wide(**inputs(given=False)).sample.square().sum().backward()
    block = wide.transformer_blocks[2]
    units = block.ff.net[0].proj.weight.grad
    heads = block.full_attn.to_qkv.weight.grad.unflatten(0, (2, 2, -1)).transpose(0, 1)
    for name, first, second in (("units", units[::2], units[1::2]), ("heads", heads[0], heads[1])):
        assert (first - second).norm() > 0.1 * first.norm(), name


def test_a_width_that_is_not_doubled() -> None:
    with pytest.raises(ValueError, match=r"ff.net.0.proj.bias: \(62,\) there, \(63,\) in this model"):
        widened(tiny_transformer(mlp_ratio=1.3125))


def test_a_run_begins_wider(training_world: Path, tmp_path: Path) -> None:
    base = training_world / "base"
    arguments = (f"init={base}", "model.num_attention_heads=4", "optimizer.lr=1e-30", "samples=4")
    run_training(training_world, tmp_path / "run", *arguments)
    narrow, wide = (
        STGenTransformer3DModel.from_pretrained(folder / "transformer")
        for folder in (base, tmp_path / "run" / "export")
    )
    for name, weight in widened(narrow).state_dict().items():
        assert torch.equal(wide.state_dict()[name], weight), name
