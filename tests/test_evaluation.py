import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from stgen.cli import main
from stgen.data.moving_mnist import write_moving_mnist
from stgen.data.shards import ShardWriter
from stgen.evaluation import (
    BASELINES,
    CEILING,
    PROTOCOLS,
    best_sample,
    compare_reports,
    evaluate,
    frame_errors,
    linear_blend,
    mean_given,
    measure,
    nearest_given,
    parse_beside,
    verdict,
)
from stgen.objective import FlowConfig, make_scheduler
from stgen.pipelines import STGenPipeline
from stgen.reconstruction import report_reconstruction
from stgen.video import encode_video, frame_rate


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
    # Only the step into the last frame is off, by a half; frame 1 after the given frame 0 counts too.
    assert score.temporal_difference_error == pytest.approx(127.5 / 2 / 2)
    assert measure(truth, truth, hidden).psnr == float("inf")
    errors = frame_errors(guess, truth, hidden)
    for rows in errors.values():
        assert np.isnan(rows[:, 0]).all()
        assert not np.isnan(rows[:, 1:]).any()
    assert errors["mse"][0].tolist()[1:] == [0, 16]
    assert np.isnan(measure(guess[:, 2:], truth[:, 2:], hidden[:, 2:]).temporal_difference_error)


def test_the_best_sample_is_the_best_where_it_counts() -> None:
    truth = np.zeros((2, 2, 8, 8, 1), np.float32)
    hidden = np.zeros((2, 2, 8, 8), bool)
    hidden[:, 1] = True
    samples = np.zeros((2, 3, 2, 8, 8, 1), np.float32)
    for clip, errors in enumerate(([0.3, 0.1, 0.2], [0.2, 0.4, 0.3])):
        samples[clip, :, 1] = np.array(errors)[:, None, None, None]
    samples[:, 0, 0] = 9  # what is given does not count
    best = best_sample(samples, truth, hidden)
    np.testing.assert_array_equal(best[0], samples[0, 1])
    np.testing.assert_array_equal(best[1], samples[1, 0])


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
    assert verdict("stgen, one sample", rows).count("BEHIND a baseline in") == 2
    rows["stgen, one sample"] = measure(truth, truth, hidden)
    assert verdict("stgen, one sample", rows).count("ahead of every baseline in") == 2


def test_pipelines_beside() -> None:
    assert parse_beside([]) == []
    assert parse_beside(["a=x", "b c:prediction,inpainting=y/z=1"]) == [
        ("a", list(PROTOCOLS), "x"),
        ("b c", ["prediction", "inpainting"], "y/z=1"),
    ]
    for text, message in (
        ("x", "beside is 'x'"),
        ("=x", "beside is '=x'"),
        ("a:text=x", "protocol of beside a is 'text'"),
        ("all black=x", "name of beside is 'all black'"),
        ("stgen, one sample=x", "name of beside"),
        (f"{CEILING}=x", "name of beside"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_beside([text])
    with pytest.raises(ValueError, match="name of beside is 'a'"):
        parse_beside(["a=x", "a=y"])


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heldout")
    write_moving_mnist(folder, clips=2, split="heldout", size=32, digits=1)
    return folder


def test_a_whole_evaluation(
    tiny_pipeline: STGenPipeline,
    tiny_pipeline_folder: Path,
    heldout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A random model beside a regression, in every table that the report has."""
    tiny_pipeline.scheduler = make_scheduler(FlowConfig(objective="regression"))
    tiny_pipeline.save_pretrained(tmp_path / "regression")
    beside = [f"regression:prediction={tmp_path / 'regression'}"]
    settings = {"clips": 2, "samples": 2, "steps": 2, "batch": 1, "text_samples": 2, "text_steps": 3, "beside": beside}
    steps, call = [], STGenPipeline.__call__

    def counted(self: STGenPipeline, *arguments: Any, **named: Any) -> Any:
        steps.append(named["num_inference_steps"])
        return call(self, *arguments, **named)

    monkeypatch.setattr(STGenPipeline, "__call__", counted)
    result = evaluate(str(tiny_pipeline_folder), str(heldout), str(tmp_path / "report"), **settings)
    # Two clips in each protocol, those of the prediction by the regression too, whose answer takes one step; then the text.
    assert steps == [2, 1, 2, 1] + 4 * [2] + 2 * [3]
    assert list(result.scores) == list(PROTOCOLS)
    for name, protocol in result.protocols.items():
        ours = ["stgen, one sample", "stgen, best of 2 samples", "stgen, mean of 2 samples"]
        others = ["regression"] if name == "prediction" else []
        assert list(protocol.scores) == [*ours, *others, *BASELINES, CEILING]
        assert protocol.scores[ours[1]].mse <= protocol.scores[ours[0]].mse
        assert protocol.given_error < 0.01
        assert protocol.errors["all black"]["mse"].shape == (2, 20)
        assert len(protocol.tracks) == 2
    reading = result.reading
    assert list(reading)[:3] == ["stgen, 2 of each caption", "true clips (ceiling)", CEILING]
    assert reading["true clips (ceiling)"].both == 1
    assert reading["stgen, 2 of each caption"].digits < 1  # a random model
    report = (tmp_path / "report" / "report.md").read_text()
    assert "given pixels come back exactly" in report
    assert "| regression |" in report
    saved = json.loads((tmp_path / "report" / "report.json").read_text())
    assert saved["reading"]["true clips (ceiling)"]["digits"] == 1
    assert saved["frames"]["prediction"]["all black"]["mse"][:10] == [None] * 10
    black = saved["frames"]["prediction"]["all black"]["mse"][10:]
    assert np.mean(black) == pytest.approx(saved["scores"]["prediction"]["all black"]["mse"])
    table = [
        row.split(" | ")
        for row in compare_reports({"one": tmp_path / "report", "two": tmp_path / "report"}).splitlines()
    ]
    assert table[0] == ["|", "one", "two |"]
    rows = {row[0]: row[1:] for row in table}
    one = result.scores["inpainting"]["stgen, one sample"].ssim
    assert rows["| inpainting, SSIM"] == [f"{one:.3f}", f"{one:.3f} |"]
    best = max(result.scores["inpainting"][name].ssim for name in BASELINES)
    assert rows["| inpainting, SSIM of the best naive baseline"][0] == f"{best:.3f}"
    assert rows["| text-to-video, digits of the caption"][0] == f"{reading['stgen, 2 of each caption'].digits:.1%}"
    with pytest.raises(ValueError, match="report three is 'nowhere', allowed: a folder of stgen evaluate"):
        compare_reports({"three": "nowhere"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text('{"scores": {"all": {}}}')  # as stgen reconstruct writes
    with pytest.raises(ValueError, match="report four is .*/other', allowed: a folder of stgen evaluate"):
        compare_reports({"four": tmp_path / "other"})
    pictures = ("contact_sheet", "per_frame", "text-to-video", *PROTOCOLS)
    assert all((tmp_path / "report" / f"{name}.png").stat().st_size > 0 for name in pictures)


def test_clips_of_another_kind_are_not_read(tiny_pipeline_folder: Path, heldout: Path, tmp_path: Path) -> None:
    for path in heldout.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes().replace(b"moving-mnist", b"another-kind"))
    settings = {"clips": 1, "samples": 1, "steps": 1}
    result = evaluate(str(tiny_pipeline_folder), str(tmp_path), str(tmp_path / "report"), **settings)
    assert result.reading == {}
    assert "digits" not in (tmp_path / "report" / "report.md").read_text().split("## text-to-video")[1].splitlines()[2]


def test_clips_of_any_name_caption_and_rate_are_evaluated(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    """A file of somebody's in a folder that is called moving-mnist, faster than a GIF can be."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    fields = {"num_frames": 5, "height": 32, "width": 32, "fps": 60.0, "source": "moving-mnist/cat.mp4"}
    with ShardWriter(tmp_path / "data") as writer:
        writer.write("0", {"caption": "a cat, and 3 dogs moving", **fields}, mp4=encode_video(frames, 60))
    settings = {"clips": 1, "samples": 1, "steps": 1}
    result = evaluate(str(tiny_pipeline_folder), str(tmp_path / "data"), str(tmp_path / "report"), **settings)
    assert result.reading == {}
    assert frame_rate(tmp_path / "report" / "prediction.mp4") == 60


def test_clips_of_several_shapes_are_refused(training_world: Path, tmp_path: Path) -> None:
    folder = str(training_world / "joint")
    for call in (evaluate, report_reconstruction):
        with pytest.raises(
            ValueError, match=r"joint is 'clips of \(1, 16, 16\), \(9, 16, 16\)', allowed: .* one shape"
        ):
            call("no pipeline", folder, str(tmp_path / "report"), clips=4)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:99"], "device is 'cuda:99', allowed: cpu, or cuda with a GPU"),
        (["--device", "gpu"], "device is 'gpu', allowed: cpu, or cuda"),
        (["--clips", "0"], "clips is 0, allowed: 1 to 2"),
        (["--guidance-scale", "-1"], "guidance_scale is -1.0, allowed: 0 or more"),
        (["--out", "{file}"], "File exists: "),
    ],
)
def test_the_command_refuses_in_one_line(
    tiny_pipeline_folder: Path, heldout: Path, tmp_path: Path, monkeypatch, capsys, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    given = [
        "--pipeline",
        str(tiny_pipeline_folder),
        "--data",
        str(heldout),
        "--out",
        str(tmp_path / "out"),
        "--clips=1",
    ]
    arguments = [argument.format(file=tmp_path / "file") for argument in arguments]
    monkeypatch.setattr("sys.argv", ["stgen", "evaluate", *given, *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_given_pixel_that_changes_is_an_error(
    tiny_pipeline_folder: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stgen.pipelines.pipeline_stgen.keep_given", lambda video, given, mask: video)
    with pytest.raises(AssertionError, match="given pixels came back"):
        evaluate(str(tiny_pipeline_folder), str(heldout), str(tmp_path), clips=1, samples=1, steps=1)
