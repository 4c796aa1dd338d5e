"""The measures of a reconstruction, by hand and against scikit-image; what it is compared with; the report."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_vae
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from stgen import video
from stgen.cli import main
from stgen.data.shards import ShardWriter
from stgen.models.latents import decode, encode
from stgen.reconstruction import (
    Score,
    best_h264,
    bicubic_shapes,
    latent_bits,
    mean_score,
    measure,
    psnr,
    reconstruct,
    reconstruction_sheet,
    report_reconstruction,
    resample,
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


# --- What the VAE is compared with --------------------------------------------------------------------------------


def test_latent_bits_by_hand() -> None:
    vae = tiny_vae()  # 4 channels, 4x4x4 compression
    assert latent_bits(vae, 17, 64, 30) == 16 * 4 * (5 * 16 * 8)
    vae.register_to_config(fsq_levels=[8, 8, 4, 4])
    assert latent_bits(vae, 17, 64, 30) == 10 * (5 * 16 * 8)


@given(st.integers(1, 33), st.integers(8, 128), st.integers(8, 128), st.floats(0.001, 1))
@settings(max_examples=200, deadline=None)
def test_bicubic_shapes_keep_no_fewer_values_and_hardly_more(t: int, h: int, w: int, share: float) -> None:
    values = math.ceil(3 * t * h * w * share)
    shapes = bicubic_shapes(values, t, h, w)
    assert len({frames for frames, _, _ in shapes}) == len(shapes)
    for frames, rows, columns in shapes:
        assert 1 <= frames <= t
        assert 1 <= rows <= h
        assert 1 <= columns <= w
        assert 3 * frames * rows * columns >= values
        assert 3 * frames * rows * (columns - 1) < values, "one column fewer would be too few"


def test_bicubic_shapes_of_the_usual_clip() -> None:
    # 16 x 5 x 8 x 8 = 5,120 values.
    assert bicubic_shapes(5120, 17, 64, 64) == [
        (17, 10, 11),
        (9, 14, 14),
        (5, 18, 19),
        (3, 24, 24),
        (2, 29, 30),
        (1, 41, 42),
    ]


def test_resampling() -> None:
    _, clip = random_videos(2, 5, 12, 10)
    torch.testing.assert_close(resample(clip, (5, 12, 10)), clip)
    flat = torch.full((1, 3, 5, 12, 10), 0.3)
    torch.testing.assert_close(resample(resample(flat, (2, 5, 3)), (5, 12, 10)), flat)
    # A ramp in time is followed through fewer frames; its ends bend.
    ramp = torch.linspace(-1, 1, 17)[None, None, :, None, None].expand(1, 3, 17, 8, 8)
    back = resample(resample(ramp, (5, 8, 8)), (17, 8, 8))
    assert (back - ramp)[:, :, 4:-4].abs().max() < 0.02
    # Frames do not mix while their number stays.
    other = clip.clone()
    other[:, :, 3] = 0
    small = [resample(c, (5, 6, 5)) for c in (clip, other)]
    assert torch.equal(small[0][:, :, :3], small[1][:, :, :3])


@pytest.fixture(scope="module")
def moving_clip() -> np.ndarray:
    """A coloured wave that runs to the right, uint8 `9 32 32 3`."""
    x, t = np.arange(32) / 5, np.arange(9)[:, None, None] / 2
    wave = np.stack([np.sin(x + t + phase + 0 * x[:, None]) for phase in (0, 1, 2)], axis=-1)
    return ((wave + 1) * 127.5).round().astype(np.uint8)


def test_h264_is_the_best_that_fits(moving_clip: np.ndarray) -> None:
    frames, size = best_h264(moving_clip, 10, 1000)
    assert size <= 1000
    assert frames.shape == moving_clip.shape
    sizes = {crf / 8: video.encode_h264(moving_clip, 10, crf / 8)[1] for crf in range(0, 409, 8)}
    assert size >= max(s for s in sizes.values() if s <= 1000), "no whole crf comes closer"
    assert best_h264(moving_clip, 10, 10)[1] == sizes[51.0] > 10, "the smallest there is says that it does not fit"
    assert best_h264(moving_clip, 10, 10**9)[1] == sizes[0.0]


def test_reconstruction_goes_through_half_precision() -> None:
    vae, (_, clip) = tiny_vae(), random_videos(1, 5, 9, 10)
    latents = encode(vae, clip)
    torch.testing.assert_close(reconstruct(vae, clip), decode(vae, latents.half().float(), (5, 9, 10)))
    assert not torch.equal(reconstruct(vae, clip), decode(vae, latents, (5, 9, 10)))


# --- The report ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, moving_clip: np.ndarray) -> tuple[str, str]:
    """A saved VAE, and shards of five clips from two sources."""
    folder = tmp_path_factory.mktemp("reconstruction")
    tiny_vae().save_pretrained(folder / "vae")
    clip = {"caption": "", "fps": 10.0, "num_frames": 9, "height": 32, "width": 32}
    with ShardWriter(folder / "data") as writer:
        for i in range(5):
            data = video.encode_video(np.roll(moving_clip, 3 * i, axis=1), 10, lossless=True)
            writer.write(f"{i}", {**clip, "source": ("one", "two/b.mp4")[i % 2]}, mkv=data)
    return str(folder / "vae"), str(folder / "data")


def test_report(folders: tuple[str, str], tmp_path: Path) -> None:
    distance = lambda x, y: (x - y).abs().flatten(1).mean(1)  # noqa: E731
    scores = report_reconstruction(*folders, str(tmp_path), clips=0, distance=distance)
    # 4 x 3 x 8 x 8 = 768 values, 1,536 bytes.
    shapes = [f"bicubic {t}x{h}x{w}" for t, h, w in bicubic_shapes(768, 9, 32, 32)]
    assert {source: {name: s.clips for name, s in methods.items()} for source, methods in scores.items()} == {
        source: dict.fromkeys(("VAE", *shapes, "H.264"), clips)
        for source, clips in (("all", 5), ("one", 3), ("two/b.mp4", 2))
    }
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["facts"]["latent_values"] == 768
    assert report["facts"]["latent_bytes"] == 1536
    assert report["facts"]["h264_bytes_mean"] <= 1536
    assert report["facts"]["h264_over_budget"] == 0
    best = report["facts"]["bicubic_best"]
    assert scores["all"][best].psnr == max(scores["all"][name].psnr for name in shapes)
    assert report["scores"]["one"]["VAE"]["psnr"] == pytest.approx(scores["one"]["VAE"].psnr)
    # All is the mean over clips, three of one source and two of the other.
    together = (3 * scores["one"]["VAE"].ssim + 2 * scores["two/b.mp4"]["VAE"].ssim) / 5
    assert scores["all"]["VAE"].ssim == pytest.approx(together)
    text = (tmp_path / "report.md").read_text()
    assert f"BEHIND the best bicubic, {best}," in text, "a VAE that nobody trained"
    assert "BEHIND the bicubic of as many frames, bicubic 3x" in text
    assert "| perceptual |" in text
    assert "| two/b.mp4 | 2 |" in text
    for name in ("sheet-00-one.png", "sheet-01-two_b_mp4.png", "side_by_side.gif"):
        assert (tmp_path / name).stat().st_size > 0
    frames, _ = video.read_video(tmp_path / "side_by_side.gif")
    assert frames.shape == (9, 2 * 128, 4 * 128, 3), "two sources, truth and three methods, enlarged four times"


def test_the_verb(folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    arguments = ["--vae", folders[0], "--data", folders[1], "--out", str(tmp_path / "out"), "--clips", "1"]
    for more in ([], ["--perceptual", "efficientnet_lite0"]):
        monkeypatch.setattr("sys.argv", ["stgen", "reconstruct", *arguments, *more])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        text = capsys.readouterr().out
        assert "# Reconstruction of held-out clips" in text
        assert ("perceptual |" in text) == bool(more)
    for changes, message in [
        (["--clips", "6"], "clips is 6, allowed: 0 (all) to 5"),
        (["--clips", "-1"], "clips is -1"),
        (["--perceptual", "none"], "perceptual.network is 'none'"),
        (["--data", str(tmp_path / "none")], "allowed: a folder of shards"),
        (["--vae", str(tmp_path)], "allowed: a folder with a VAE's config.json"),
    ]:
        monkeypatch.setattr("sys.argv", ["stgen", "reconstruct", *arguments, *changes])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
