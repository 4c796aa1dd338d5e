"""The mask vocabulary: valid and leak-free for every shape, a function of the generator, and as published."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stgen.config import load_config, save_config
from stgen.data.reading import fold_seed
from stgen.masks import (
    MASKS,
    PRESETS,
    MaskSpec,
    Shape,
    draw_mixture,
    draw_spec,
    fold_mask,
    generated_cells,
    hide,
    keep_given,
)
from stgen.train import TrainConfig

ARGUMENTS = {
    "predict": {"given": [1, 12]},
    "backward": {"given": [1, 0.75]},
    "interpolate": {"given": [0.1, 0.5]},
    "random_segment": {"given": [0.2, 10]},
    "every_nth": {"n": [2, 5], "start": [0, 4]},
    "random_frames": {"p": [0.1, 0.9]},
    "combine": {"masks": [{"kind": "moving_box"}, {"kind": "predict", "args": {"given": [1, 4]}}, {"kind": "boxes"}]},
}
WHOLE_FRAMES = ["predict", "backward", "interpolate", "random_segment", "every_nth", "random_frames"]
REGIONS = ["boxes", "strokes", "moving_box", "outpaint", "combine"]
KINDS = st.sampled_from(sorted(MASKS))
SHAPES = st.tuples(st.integers(1, 3) | st.integers(1, 24), st.integers(1, 20), st.integers(1, 20))
SEEDS = st.integers(0, 2**32)


def seeded(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(fold_seed(*seed))


def draw(kind: str, shape: Shape, *seed: int) -> torch.Tensor:
    return MaskSpec(kind, args=ARGUMENTS.get(kind, {})).draw(shape, seeded(*seed))


def frames(kind: str, t: int, **args: object) -> str:
    """The frames of a mask as a string: 0 is given, 1 is generated."""
    return "".join(str(int(x)) for x in MaskSpec(kind, args=args).draw((t, 1, 1), seeded(0)).flatten())


def test_every_kind_is_tried() -> None:
    assert sorted(MASKS) == sorted(["generate_all", *WHOLE_FRAMES, *REGIONS, *PRESETS])


@given(KINDS, SHAPES, SEEDS, st.integers(0, 1000))
def test_every_mask_is_valid_for_every_shape(kind: str, shape: Shape, seed: int, index: int) -> None:
    mask = draw(kind, shape, seed, index)
    assert mask.shape == (1, *shape)
    assert mask.dtype == torch.float32
    assert ((mask == 0) | (mask == 1)).all()
    assert mask.any()  # something is left to generate
    assert torch.equal(mask, draw(kind, shape, seed, index))


@given(st.sampled_from(WHOLE_FRAMES), SHAPES, SEEDS)
def test_masks_of_whole_frames_give_at_least_one(kind: str, shape: Shape, seed: int) -> None:
    mask = draw(kind, shape, seed)[0].flatten(1)
    assert torch.equal(mask.amin(1), mask.amax(1))
    assert mask.all() == (shape[0] == 1)


@given(KINDS, SHAPES, SEEDS)
def test_hidden_pixels_cannot_leak(kind: str, shape: Shape, seed: int) -> None:
    mask = draw(kind, shape, seed)
    video = torch.randn(3, *shape, generator=seeded(seed))
    for hidden in (-video, torch.full_like(video, torch.nan), torch.full_like(video, torch.inf)):
        assert torch.equal(hide(torch.where(mask.bool(), hidden, video), mask), hide(video, mask))
    assert torch.equal(hide(video, mask), video * (1 - mask))


@given(KINDS, SHAPES, SEEDS, st.sampled_from([1, 2, 4]), st.sampled_from([1, 4, 8]))
def test_a_given_cell_has_no_hidden_pixel(kind: str, shape: Shape, seed: int, p: int, s: int) -> None:
    mask = draw(kind, shape, seed)[None]
    t, h, w = shape
    cells = generated_cells(fold_mask(mask, p, s))
    assert cells.shape == (1, 1, 1 + -(-(t - 1) // p), -(-h // s), -(-w // s))
    for frame in range(t):
        cell = 0 if frame == 0 else 1 + (frame - 1) // p
        rows, columns = mask[0, 0, frame].nonzero(as_tuple=True)
        assert cells[0, 0, cell, rows // s, columns // s].all()


@pytest.mark.parametrize("kind", [kind for kind in MASKS if kind != "generate_all"])
def test_samples_of_a_batch_differ(kind: str) -> None:
    masks = torch.stack([draw(kind, (16, 8, 8), 0, index) for index in range(16)])
    assert len(masks.flatten(1).unique(dim=0)) > 1


@pytest.mark.parametrize(
    ("kind", "t", "args", "expected"),
    [
        ("predict", 8, {}, "01111111"),
        ("predict", 8, {"given": 3}, "00011111"),
        ("predict", 8, {"given": 0}, "11111111"),
        ("predict", 8, {"given": 0.5}, "00001111"),
        ("predict", 3, {"given": 0.25}, "011"),
        ("predict", 3, {"given": 20}, "001"),
        ("predict", 1, {"given": 20}, "1"),
        ("predict", 9, {"given": [7, 0.25]}, "001111111"),
        ("predict", 100, {"given": 0.29}, "0" * 29 + "1" * 71),
        ("backward", 8, {"given": 3}, "11111000"),
        ("interpolate", 8, {"given": 3}, "00011000"),
        ("interpolate", 8, {"given": 9}, "00001000"),
        ("interpolate", 3, {}, "010"),
        ("interpolate", 2, {}, "01"),
        ("every_nth", 8, {}, "01110111"),
        ("every_nth", 8, {"n": 3, "start": 1}, "10110110"),
        ("every_nth", 2, {"n": 4, "start": 3}, "10"),
        ("random_frames", 2, {"p": 0}, "01"),
        ("combine", 6, {"masks": [{"kind": "predict"}, {"kind": "backward", "args": {"given": 2}}]}, "011100"),
        # Together these two would leave nothing to generate.
        ("combine", 4, {"masks": [{"kind": "predict", "args": {"given": 3}}, {"kind": "backward"}]}, "0001"),
    ],
)
def test_masks_give_what_they_say(kind: str, t: int, args: dict, expected: str) -> None:
    found = frames(kind, t, **args)
    assert found == expected or (kind == "random_frames" and sorted(found) == sorted(expected))


def test_amounts_are_drawn_from_the_whole_range() -> None:
    def given_frames(kind: str, **args: object) -> set[int]:
        return {int((MaskSpec(kind, args=args).draw((16, 1, 1), seeded(i)) == 0).sum()) for i in range(100)}

    assert given_frames("predict", given=[1, 0.25]) == {1, 2, 3, 4}
    assert given_frames("backward", given=[0, 3]) == {0, 1, 2, 3}
    assert given_frames("interpolate", given=[0.25, 6]) == {8, 10, 12}
    starts = {int((draw("random_segment", (4, 1, 1), i) == 0).flatten().float().argmax()) for i in range(100)}
    assert starts == {0, 1, 2, 3}


def test_regions_are_the_size_they_say() -> None:
    shape, specs = (5, 40, 60), {"boxes": {"ratio": 0.5}, "outpaint": {"size": 0.5}, "moving_box": {"size": 0.5}}
    shares = {
        kind: torch.stack([MaskSpec(kind, args=args).draw(shape, seeded(i)).mean() for i in range(50)])
        for kind, args in specs.items()
    }
    assert shares["boxes"].max() <= 0.5
    assert shares["boxes"].mean() > 0.4
    torch.testing.assert_close(shares["outpaint"], torch.full((50,), 0.75))
    torch.testing.assert_close(shares["moving_box"], torch.full((50,), 0.25))
    strokes = torch.stack([draw("strokes", shape, i) for i in range(50)])
    assert 0.05 < strokes.mean() < 0.4
    assert 0 < strokes.mean((1, 2, 3, 4)).min() < strokes.mean((1, 2, 3, 4)).max() < 0.9
    still = ("boxes", "strokes", "outpaint")
    assert all(torch.equal(m[:, :1].expand_as(m), m) for m in (draw(kind, shape, 0) for kind in still))
    moving = MaskSpec("moving_box", args={"speed": [0.1, 0.2]}).draw(shape, seeded(0))
    assert len(moving[0].flatten(1).unique(dim=0)) == 5


def test_keep_given_is_exact() -> None:
    video, generated = torch.randn(2, 1, 3, 5, 5, 5)
    mask = (torch.rand(1, 1, 5, 5, 5) > 0.5).float()
    kept = keep_given(generated, video, mask)
    assert torch.equal(kept[mask.expand_as(kept) == 0], video[mask.expand_as(kept) == 0])
    assert torch.equal(kept[mask.expand_as(kept) == 1], generated[mask.expand_as(kept) == 1])


# --- Mixtures -----------------------------------------------------------------------------------------------------


def test_mixture_follows_its_weights() -> None:
    specs = [MaskSpec("generate_all", 3), MaskSpec("predict", 1, {"given": 1})]
    generator = torch.Generator().manual_seed(0)
    share = sum(draw_mixture(specs, (4, 1, 1), generator).all().item() for _ in range(2000)) / 2000
    assert share == pytest.approx(0.75, abs=0.03)


# Probabilities of the modes by the names their authors gave them, in the order of our entries.
PUBLISHED = {
    "open_sora_1_0": {"identity": 0.7, "random": 0.15, "head": 0.05, "tail": 0.05, "head_tail": 0.05},
    "open_sora_1_1": {
        "identity": 0.75,
        **{"quarter_random": 0.025, "quarter_head": 0.025, "quarter_tail": 0.025, "quarter_head_tail": 0.05},
        **{"image_random": 0.025, "image_head": 0.025, "image_tail": 0.025, "image_head_tail": 0.05},
    },
    "open_sora_1_2": {
        **{"identity": 0.8, "random": 0.05, "interpolate": 0.005},
        **{"quarter_random": 0.005, "quarter_head": 0.005, "quarter_tail": 0.005, "quarter_head_tail": 0.005},
        **{"image_random": 0.025, "image_head": 0.05, "image_tail": 0.025, "image_head_tail": 0.025},
    },
    "vdt": {
        "spatial": 0.2,
        **dict.fromkeys(["predict", "backward", "interpolate", "unconditional", "one_frame", "frames"], 0.8 / 6),
    },
}
# What can be seen of the modes in a mask of 16 frames, from counting their draws by hand.
SEEN = {
    "open_sora_1_0": {
        "nothing": 0.7,
        "only first": 0.05 / 4 + 0.15 / 64,
        "both ends": 0.05,
    },
    "open_sora_1_1": {
        "nothing": 0.75,
        "only first": 0.025 / 4 + 0.025 / 64 + 0.025 + 0.025 / 16,
        "both ends": 0.1,
    },
    "open_sora_1_2": {
        "nothing": 0.8,
        "only first": 0.005 / 4 + 0.005 / 64 + 0.05 + 0.025 / 16,
        # Of `random`, the mean of (1 - p)^2 over p in [0.1, 0.9].
        "both ends": 0.03 + 0.05 * (0.9**3 - 0.1**3) / 3 / 0.8,
    },
    "vdt": {
        # Of `spatial` where no frame is given whole; of `frames`, in 3% of its draws all are hidden, and one is put back.
        "nothing": 0.8 / 6 + 0.2 / 16,
        "only first": 0.8 / 6 / 16 + 0.2 * 1 / 4 / 4 + 0.8 / 6 * (0.2 * 0.8**15 + 0.8**16 / 16),
        "both ends": 0.2 * 9 / 16 + 0.8 / 6 * 0.2**2,
    },
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_mixtures(name: str) -> None:
    specs, published = PRESETS[name], PUBLISHED[name]
    assert sum(published.values()) == pytest.approx(1)
    assert [spec.weight for spec in specs] == pytest.approx(list(published.values()))
    generator, n = seeded(0), 10_000
    chosen, masks = Counter(), []
    for _ in range(n):
        spec = draw_spec(specs, generator)
        chosen[specs.index(spec)] += 1
        masks.append(spec.draw((16, 2, 2), generator))
    whole = torch.stack(masks).amax((1, 3, 4)) == 0  # frames that are given whole
    seen = {
        "nothing": ~whole.any(1),
        "only first": whole[:, 0] & (whole.sum(1) == 1),
        "both ends": whole[:, 0] & whole[:, -1],
    }

    def tolerance(p: float) -> float:  # four standard deviations of a share of n draws
        return 4 * (p * (1 - p) / n) ** 0.5

    for i, p in enumerate(published.values()):
        assert chosen[i] / n == pytest.approx(p, abs=tolerance(p)), list(published)[i]
    for what, p in SEEN[name].items():
        assert seen[what].float().mean().item() == pytest.approx(p, abs=tolerance(p)), what


@given(SHAPES, SEEDS)
def test_vdt_blocks_always_hide_something_and_never_a_whole_clip(shape: Shape, seed: int) -> None:
    mask = PRESETS["vdt"][0].draw(shape, seeded(seed))[0]
    hidden = mask.flatten(1).any(1).nonzero().flatten()
    assert len(hidden) >= max(1, shape[0] - 6)
    assert torch.equal(hidden, torch.arange(hidden[0], hidden[-1] + 1))
    assert (mask[hidden] == mask[hidden[0]]).all()  # the same blocks in all frames
    assert mask.mean((1, 2)).max() <= max(0.5, 1 / (shape[1] * shape[2]))


def test_presets_and_nested_masks_load_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        """
run: run
vae: vae
data: {path: data, num_frames: 9, height: 16, width: 16}
masks:
  - {kind: open_sora_1_2, weight: 3}
  - {kind: predict, args: {given: [1, 0.25]}}
  - {kind: combine, args: {masks: [{kind: boxes, args: {ratio: [0.2, 0.5]}}, {kind: every_nth}]}}
"""
    )
    config = load_config(TrainConfig, tmp_path / "config.yaml")
    assert [spec.kind for spec in config.masks] == ["open_sora_1_2", "predict", "combine"]
    for i in range(20):
        assert draw_mixture(config.masks, (9, 16, 16), seeded(i)).shape == (1, 9, 16, 16)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(TrainConfig, tmp_path / "saved.yaml") == config


# --- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "predicts"}, "masks.kind is 'predicts', allowed: generate_all"),
        ({"kind": "predict", "args": {"frames": 2}}, "masks.args of predict is 'frames', allowed: given"),
        ({"kind": "vdt", "args": {"given": 2}}, "masks.args of vdt is 'given', allowed: no arguments"),
        ({"weight": 0.0}, "masks.weight"),
        *(
            ({"kind": "interpolate", "args": {"given": bad}}, "masks.args of interpolate: given is")
            for bad in (-1, 1.0, 1.5, 0.0, "3", None, [5, 2], [0.5, 0.1], [1, 2, 3], [1], [1, "x"], [[1, 2], 3])
        ),
        ({"kind": "every_nth", "args": {"n": 1}}, "n is 1, allowed: an integer from 2"),
        ({"kind": "every_nth", "args": {"n": 2.5}}, "n is 2.5, allowed: an integer from 2"),
        ({"kind": "random_frames", "args": {"p": [0.9, 0.1]}}, r"p is \[0.9, 0.1\], allowed: a number from 0 to 1"),
        ({"kind": "random_frames", "args": {"p": 2}}, "p is 2, allowed: a number from 0 to 1"),
        ({"kind": "boxes", "args": {"ratio": 1.1}}, "ratio is 1.1"),
        ({"kind": "moving_box", "args": {"size": [0.5, 2]}}, r"size is \[0.5, 2\]"),
        ({"kind": "strokes", "args": {"count": 0}}, "count is 0"),
        ({"kind": "combine"}, "masks is"),
        ({"kind": "combine", "args": {"masks": [{"kind": "predict", "weight": 2}]}}, "allowed: {kind"),
        ({"kind": "combine", "args": {"masks": [{"kind": "predicts"}]}}, "combine: masks.kind is 'predicts'"),
    ],
)
def test_bad_specs_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskSpec(**arguments)


@pytest.mark.parametrize("kind", sorted(MASKS.keys() - PRESETS.keys() - {"generate_all"}))
def test_nothing_is_drawn_from_the_global_generator(kind: str) -> None:
    with pytest.raises(ValueError, match="generator is None, allowed: a torch.Generator"):
        MASKS[kind]((8, 4, 4), **ARGUMENTS.get(kind, {}))
