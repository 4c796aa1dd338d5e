import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stgen.masks import MASKS, MaskSpec, draw_mixture, fold_mask, generated_cells, hide, keep_given

ARGUMENTS = {"predict": {"given": [1, 12]}, "interpolate": {"given": [1, 6]}}
KINDS = st.sampled_from(sorted(MASKS))
SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 20), st.integers(1, 20))


def draw(kind: str, shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    return MaskSpec(kind, args=ARGUMENTS.get(kind, {})).draw(shape, torch.Generator().manual_seed(seed))


@given(KINDS, SHAPES, st.integers(0, 2**32))
def test_every_mask_is_valid_for_every_shape(kind: str, shape: tuple[int, int, int], seed: int) -> None:
    mask = draw(kind, shape, seed)
    assert mask.shape == (1, *shape)
    assert ((mask == 0) | (mask == 1)).all()
    assert mask.any()  # something is left to generate
    assert torch.equal(mask, draw(kind, shape, seed))


@given(KINDS, SHAPES, st.integers(0, 2**32), st.sampled_from([1, 2, 4]), st.sampled_from([1, 4, 8]))
def test_a_given_cell_has_no_hidden_pixel(kind: str, shape: tuple[int, int, int], seed: int, p: int, s: int) -> None:
    mask = draw(kind, shape, seed)[None]
    t, h, w = shape
    cells = generated_cells(fold_mask(mask, p, s))
    assert cells.shape == (1, 1, 1 + -(-(t - 1) // p), -(-h // s), -(-w // s))
    for frame in range(t):
        cell = 0 if frame == 0 else 1 + (frame - 1) // p
        rows, columns = mask[0, 0, frame].nonzero(as_tuple=True)
        assert cells[0, 0, cell, rows // s, columns // s].all()


def test_prediction_and_interpolation_give_what_they_say() -> None:
    mask = draw("predict", (8, 2, 2), 0)
    assert not MASKS["predict"]((8, 2, 2), given=3)[0, :3].any()
    assert MASKS["predict"]((8, 2, 2), given=3)[0, 3:].all()
    assert MASKS["interpolate"]((8, 2, 2), given=3)[0, :, 0, 0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert mask[0, -1].all()


def test_hidden_pixels_cannot_leak_even_as_nan() -> None:
    video = torch.full((1, 3, 2, 2, 2), torch.nan)
    assert torch.equal(hide(video, torch.ones(1, 1, 2, 2, 2)), torch.zeros_like(video))


def test_keep_given_is_exact() -> None:
    video, generated = torch.randn(2, 1, 3, 5, 5, 5)
    mask = (torch.rand(1, 1, 5, 5, 5) > 0.5).float()
    kept = keep_given(generated, video, mask)
    assert torch.equal(kept[mask.expand_as(kept) == 0], video[mask.expand_as(kept) == 0])
    assert torch.equal(kept[mask.expand_as(kept) == 1], generated[mask.expand_as(kept) == 1])


def test_mixture_follows_its_weights() -> None:
    specs = [MaskSpec("generate_all", 3), MaskSpec("predict", 1, {"given": 1})]
    generator = torch.Generator().manual_seed(0)
    share = sum(draw_mixture(specs, (4, 1, 1), generator).all().item() for _ in range(2000)) / 2000
    assert share == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "predicts"}, "masks.kind is 'predicts', allowed: generate_all"),
        ({"kind": "predict", "args": {"frames": 2}}, "masks.args of predict is 'frames', allowed: given"),
        ({"weight": 0.0}, "masks.weight"),
    ],
)
def test_bad_specs_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskSpec(**arguments)
