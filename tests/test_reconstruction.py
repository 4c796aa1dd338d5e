"""The measures of a reconstruction, by hand and against scikit-image."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from stgen.reconstruction import (
    Score,
    mean_score,
    measure,
    psnr,
    reconstruction_sheet,
    ssim,
    temporal_difference_error,
    to_frames,
)


def random_videos(b: int = 2, t: int = 3, h: int = 9, w: int = 11, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A truth and something near it, `b 3 t h w` in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(b, 3, t, h, w, generator=generator) * 2 - 1
    return (truth + 0.3 * torch.randn(truth.shape, generator=generator)).clamp(-1, 1), truth


def test_psnr_by_hand() -> None:
    truth = torch.zeros(3, 3, 2, 8, 8)
    off = truth.clone()
    off[0] += 0.2  # a tenth of the range: 20 dB
    off[1, :, 0] += 0.2  # in half of the frames: 10 log10(2) more
    assert psnr(off, truth).tolist() == pytest.approx([20, 20 + 10 * np.log10(2), 10 * np.log10(255**2 * 12)])
    assert psnr(truth, truth).max() == pytest.approx(58.92, abs=0.01), "no better than rounding to 8 bits"


def test_temporal_difference_error_by_hand() -> None:
    truth = torch.zeros(2, 3, 3, 8, 8)
    truth[1] += torch.tensor([0.0, 0.2, 0.4])[:, None, None]  # it brightens by 0.2 a frame ...
    still = torch.zeros_like(truth)
    still[0] += 0.5  # an offset of all frames is no flicker
    assert temporal_difference_error(still, truth).tolist() == pytest.approx(
        [0, 0.2 * 127.5]
    )  # ... and this stands still
    flicker = truth.clone()
    flicker[0, :, 1] += 2 / 255  # one level up and down again
    assert temporal_difference_error(flicker, truth)[0].item() == pytest.approx(1)
    with pytest.raises(ValueError, match="frames of a clip is 1"):
        temporal_difference_error(truth[:, :, :1], truth[:, :, :1])


def test_measures_are_those_of_scikit_image() -> None:
    guess, truth = random_videos()
    a, b = (x.permute(0, 2, 3, 4, 1).numpy() / 2 + 0.5 for x in (guess, truth))
    expected = [peak_signal_noise_ratio(y, x, data_range=1.0) for x, y in zip(a, b, strict=True)]
    assert psnr(guess, truth).tolist() == pytest.approx(expected, abs=1e-4)
    expected = [
        np.mean([structural_similarity(x, y, channel_axis=-1, data_range=1.0) for x, y in zip(*pair, strict=True)])
        for pair in zip(a, b, strict=True)
    ]
    assert ssim(guess, truth).tolist() == pytest.approx(expected, abs=1e-4)
    assert ssim(truth, truth).tolist() == pytest.approx([1, 1])


@given(st.integers(2, 5), st.integers(1, 4), st.data())
@settings(max_examples=15, deadline=None)
def test_scores_of_batches_add_up(b: int, t: int, data: st.DataObject) -> None:
    guess, truth = random_videos(b, t, 8, 7, seed=b * t)
    distance = lambda x, y: (x - y).abs().flatten(1).amax(1)  # noqa: E731
    whole = measure(guess, truth, distance)
    cut = data.draw(st.integers(1, b - 1))
    parts = [measure(guess[s], truth[s], distance) for s in (slice(cut), slice(cut, None))]
    together = mean_score(parts)
    assert together.clips == whole.clips == b
    for name, value in vars(whole).items():
        if value is None:
            assert t == 1
            assert name == "temporal_difference_error"
            assert getattr(together, name) is None
        else:
            assert getattr(together, name) == pytest.approx(value)


def test_a_reconstruction_is_cut_to_the_range_and_a_perfect_one_scores_so() -> None:
    truth = torch.ones(1, 3, 2, 8, 8)
    score = measure(truth + 0.7, truth, lambda x, y: (x - y).flatten(1).mean(1))
    assert score == Score(1, pytest.approx(58.92, abs=0.01), 1.0, 0.0, 0.0)
    assert measure(truth, truth).perceptual_distance is None


def test_refuses() -> None:
    guess, truth = random_videos()
    for arguments, message in [
        ((guess[:1], truth), "reconstruction.shape is"),
        ((guess[0], truth[0]), "truth.shape is"),
        ((guess, truth * 2), "values in"),
        ((guess, torch.full_like(truth, float("nan"))), "truth is 'nan to nan'"),
        ((torch.full_like(guess, float("nan")), truth), "reconstruction is 'NaN or infinite'"),
        ((guess[..., :6], truth[..., :6]), "frames is '9x6', allowed: 7x7"),
        ((guess, truth, lambda x, y: (x - y).mean()), "shape of distance is"),
    ]:
        with pytest.raises(ValueError, match=message):
            measure(*arguments)
    with pytest.raises(ValueError, match="scores is"):
        mean_score([])
    score = measure(guess, truth)
    with pytest.raises(ValueError, match="perceptual_distance is 'missing in some"):
        mean_score([score, replace(score, perceptual_distance=1.0)])


def test_frames_round_trip() -> None:
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(3, 2, 16, 16)
    back = to_frames(frames.float() / 127.5 - 1)
    assert back.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(back, frames.permute(1, 2, 3, 0).numpy())
    assert to_frames(torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 2)).ravel().tolist() == [0, 255]


def test_sheet_shows_truth_reconstruction_and_difference(tmp_path: Path) -> None:
    truth = torch.full((2, 3, 4, 12, 12), -1.0)
    guess = truth.clone()
    guess[1] += torch.tensor([10, 20, 30])[:, None, None, None] / 127.5
    reconstruction_sheet(tmp_path / "sheet.png", truth, {"VAE": guess}, ["black", "nearly"], "a title", columns=2)
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    counts = [int((picture == colour).all(-1).sum()) for colour in ([10, 20, 30], [40, 80, 120])]
    assert counts == [2 * 144, 2 * 144], "two frames of the reconstruction, two of its brightened difference"
    with pytest.raises(ValueError, match="labels is"):
        reconstruction_sheet(tmp_path / "sheet.png", truth, {"VAE": guess}, ["one"])
    with pytest.raises(ValueError, match="shape of VAE is"):
        reconstruction_sheet(tmp_path / "sheet.png", truth, {"VAE": guess[:1]}, ["one", "two"])
