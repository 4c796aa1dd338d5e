import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from stgen.evaluation import BASELINES, PROTOCOLS, linear_blend, mean_given, measure, nearest_given, write_report


def line(values: list[float]) -> np.ndarray:
    """A clip of one pixel, `1 t 1 1 1`."""
    return np.array(values, np.float32)[None, :, None, None, None]


def hide(pattern: str) -> np.ndarray:
    return np.array([c == "?" for c in pattern])[None, :, None, None]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("all black", [0, 0, 0, 0, 0, 0]),
        ("copy last given", [1, 1, 1, 1, 5, 5]),
        ("nearest given", [1, 1, 1, 5, 5, 5]),
        ("linear blend", [1, 1, 2, 3, 5, 5]),
        ("mean of given", [3, 3, 3, 3, 3, 3]),
    ],
)
def test_baselines_by_hand(name: str, expected: list[float]) -> None:
    clip, hidden = line([9, 1, 9, 9, 5, 9]), hide("?.??.?")
    filled = np.where(hidden[..., None], BASELINES[name](clip, hidden), line(expected))[0, :, 0, 0, 0]
    if name == "linear blend":
        expected = [1, 1, 1 + 4 / 3, 1 + 8 / 3, 5, 5]
    np.testing.assert_allclose(filled, expected, rtol=1e-6)


def test_a_pixel_that_is_never_given_is_black() -> None:
    clip, hidden = line([3, 4]), hide("??")
    for baseline in (mean_given, nearest_given, linear_blend):
        assert not baseline(clip, hidden).any()


@given(st.integers(1, 8), st.integers(0, 2**32), st.sampled_from(sorted(BASELINES)))
@settings(max_examples=40, deadline=None)
def test_no_baseline_looks_under_the_mask(t: int, seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    clips = rng.random((2, t, 3, 4, 3), np.float32)
    hidden = rng.random((2, t, 3, 4)) < 0.5
    other = np.where(hidden[..., None], rng.random(clips.shape, np.float32), clips)
    np.testing.assert_array_equal(BASELINES[name](clips, hidden), BASELINES[name](other, hidden))


def test_measures_by_hand() -> None:
    truth = np.zeros((2, 3, 8, 8, 3), np.float32)
    guess = truth.copy()
    guess[0, 2] = 0.5  # one frame of the first clip is off by a half everywhere
    hidden = np.zeros((2, 3, 8, 8), bool)
    hidden[:, 1:] = True
    score = measure(guess, truth, hidden)
    assert score.mse == pytest.approx((64 * 0.25 / 2) / 2)  # mean over two generated frames, then two clips
    assert score.mae == pytest.approx((64 * 0.5 / 2) / 2)
    assert score.psnr == pytest.approx(10 * np.log10(64 / score.mse))
    off = structural_similarity(guess[0, 2].mean(-1), truth[0, 2].mean(-1), data_range=1.0)
    assert score.ssim == pytest.approx((3 + off) / 4)
    assert measure(truth, truth, hidden).psnr == float("inf")


def test_protocols_give_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = {name: draw((20, 8, 8), generator)[0] for name, (_, draw) in PROTOCOLS.items()}
    assert masks["prediction"][:, 0, 0].tolist() == [0] * 10 + [1] * 10
    assert masks["interpolation"][:, 0, 0].tolist() == [0] * 5 + [1] * 10 + [0] * 5
    assert masks["inpainting"].amax((1, 2)).all()
    assert not masks["inpainting"].amin((1, 2)).any()


def test_the_report_says_when_it_is_behind() -> None:
    truth = np.random.default_rng(0).random((3, 4, 8, 8, 3), np.float32)
    hidden = np.zeros((3, 4, 8, 8), bool)
    hidden[:, 2:] = True
    rows = {"stgen, one sample": measure(1 - truth, truth, hidden)}
    rows |= {name: measure(baseline(truth, hidden), truth, hidden) for name, baseline in BASELINES.items()}
    assert "stgen, one sample: BEHIND a baseline" in write_report({"prediction": rows}, {}, ["a 3"])
    rows["stgen, one sample"] = measure(truth, truth, hidden)
    assert "stgen, one sample: ahead of every baseline" in write_report({"prediction": rows}, {}, ["a 3"])
