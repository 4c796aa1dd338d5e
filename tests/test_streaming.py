"""Videos that are decoded while they are written: from the latents over the pipelines to the file."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from conftest import tiny_vae

from stgen import STGenInpaintPipeline, STGenInterpolationPipeline, STGenPipeline, STGenPredictionPipeline
from stgen.generation import Request, generate
from stgen.masks import moving_box
from stgen.models.latents import decode_stream, latent_shape
from stgen.video import read_video, write_video


@pytest.fixture(autouse=True)
def one_latent_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 frames come as 1, 4 and 4."""
    monkeypatch.setattr("stgen.models.autoencoder._CHUNK_PIXELS", {"cpu": 1})


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def sibling(cls: type, pipeline: STGenPipeline) -> STGenPipeline:
    made = cls(**pipeline.components)
    made.set_progress_bar_config(disable=True)
    return made


CLIP = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3)).astype(np.uint8)
PIXELS = CLIP.astype(np.float32) / 255
MASK = moving_box((9, 16, 16), seeded())
TASKS: dict[str, tuple[type[STGenPipeline], dict, np.ndarray]] = {
    # pipeline, its arguments, and which pixels t h w are given
    "text": (STGenPipeline, {"prompt": ["a 3", "the 7"]}, np.zeros((9, 16, 16), bool)),
    "prediction": (STGenPredictionPipeline, {"video": PIXELS[:3]}, (np.arange(9) < 3)[:, None, None]),
    "interpolation": (
        STGenInterpolationPipeline,
        {"video": PIXELS[:2], "last_video": PIXELS[-2:]},
        np.isin(np.arange(9), (0, 1, 7, 8))[:, None, None],
    ),
    "inpainting": (STGenInpaintPipeline, {"video": PIXELS, "mask": MASK}, MASK[0].numpy() == 0),
}


# --- The pipelines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_chunks_are_the_video(tiny_pipeline: STGenPipeline, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, arguments, given = TASKS[task]
    pipeline = sibling(kind, tiny_pipeline)
    call = {**arguments, "num_inference_steps": 2}
    chunks = list(pipeline(**call, generator=seeded(), output_type="stream").frames)
    (again,) = pipeline(**call, generator=seeded(), output_type="stream", return_dict=False)
    assert [(c.dtype, c.shape[1:]) for c in chunks] == [(np.float32, (n, 16, 16, 3)) for n in (1, 4, 4)]
    frames = np.concatenate(chunks, axis=1)
    np.testing.assert_array_equal(np.concatenate(list(again), axis=1), frames)
    monkeypatch.undo()  # whole, from here on
    whole = pipeline(**call, generator=seeded(), output_type="np").frames
    np.testing.assert_allclose(frames, whole, atol=1e-5, rtol=0)
    given = np.broadcast_to(given, (9, 16, 16))
    np.testing.assert_array_equal((frames[0] * 255).round().astype(np.uint8)[given], CLIP[given])
    assert not np.allclose(frames[0][~given], PIXELS[~given], atol=0.01)


def test_an_interrupted_stream_is_the_interrupted_video(tiny_pipeline: STGenPipeline) -> None:
    """The interrupt ends the sampling; what was sampled is decoded, as with every output type."""
    steps = []

    def interrupt(pipeline: STGenPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        steps.append(step)
        pipeline._interrupt = True
        return {}

    def run(output_type: str, callback: Callable | None):
        call = {"num_inference_steps": 3, "generator": seeded(), "callback_on_step_end": callback}
        return tiny_pipeline("a 3", output_type=output_type, **call).frames

    frames = np.concatenate(list(run("stream", interrupt)), axis=1)
    assert steps == [0]
    np.testing.assert_allclose(frames, run("np", interrupt), atol=1e-5, rtol=0)
    assert not np.allclose(frames, run("np", None), atol=1e-2)


@pytest.mark.parametrize("read", ["all", "first", "none"])
def test_offload_waits_for_the_reader(tiny_pipeline: STGenPipeline, read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under CPU offload the VAE comes onto the device before the first chunk, and leaves after the last that is read."""
    tiny_pipeline.enable_model_cpu_offload(device="cpu")
    events: list[str] = []
    tiny_pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: events.append("decode"))

    def note(name: str, event: str) -> None:
        original = getattr(CpuOffload, name)

        def noted(self: CpuOffload, module: torch.nn.Module, *args, **kwargs):
            if module is tiny_pipeline.vae:
                events.append(event)
            return original(self, module, *args, **kwargs)

        monkeypatch.setattr(CpuOffload, name, noted)

    note("pre_forward", "onto the device")
    note("init_hook", "off")
    frames = tiny_pipeline("a 3", num_inference_steps=1, output_type="stream").frames
    assert set(events) == {"off"}
    events.clear()
    if read == "all":
        assert sum(chunk.shape[1] for chunk in frames) == 9
    elif read == "first":
        assert next(frames).shape[1] == 1
        assert events == ["onto the device", "decode"]
        frames.close()
    else:
        frames.close()
    calls = {"all": 3, "first": 1, "none": 0}[read]
    assert events[: calls + 1] == (["onto the device"] + ["decode"] * calls if calls else [])
    assert set(events[calls + 1 :]) == ({"off"} if calls else set())
    assert tiny_pipeline("a 3", num_inference_steps=1, output_type="np").frames.shape == (1, 9, 16, 16, 3)


def test_a_stream_needs_no_gradients_where_it_is_read(tiny_pipeline: STGenPipeline) -> None:
    decoded = []
    tiny_pipeline.vae.decoder.register_forward_hook(lambda module, args, out: decoded.append(out.requires_grad))
    with torch.enable_grad():
        for _ in tiny_pipeline("a 3", num_inference_steps=1, output_type="stream").frames:
            assert torch.is_grad_enabled()
    assert decoded == [False] * 3


# --- Files --------------------------------------------------------------------------------------------------------


def test_the_file_is_that_of_the_whole_video(tiny_pipeline: STGenPipeline, tmp_path: Path) -> None:
    request = Request("a", "text", "a 3", num_inference_steps=2)
    chunks = list(generate(tiny_pipeline, request))
    assert [len(chunk) for chunk in chunks] == [1, 4, 4]
    write_video(tmp_path / "streamed.mp4", generate(tiny_pipeline, request), 10)
    write_video(tmp_path / "whole.mp4", np.concatenate(chunks), 10)
    assert (tmp_path / "streamed.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_chunk_that_is_not_finite_leaves_no_file(tiny_pipeline: STGenPipeline, tmp_path: Path) -> None:
    calls = []

    def break_the_last(module: torch.nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return out * float("nan") if len(calls) == 3 else out

    tiny_pipeline.vae.decoder.register_forward_hook(break_the_last)
    with pytest.raises(ValueError, match="the video of request 'a' is 'not finite'"):
        write_video(tmp_path / "a.mp4", generate(tiny_pipeline, Request("a", "text", num_inference_steps=1)), 10)
    assert len(calls) == 3
    assert not list(tmp_path.iterdir())


def test_frames_are_on_disk_before_the_last_latent_is_decoded(tmp_path: Path) -> None:
    vae, size = tiny_vae(), (33, 64, 64)
    latents = torch.randn(1, *latent_shape(vae, *size), generator=seeded())
    written = []  # bytes in the folder, at each call of the decoder
    vae.decoder.register_forward_pre_hook(
        lambda module, args: written.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
    )
    frames = (as_uint8(chunk) for chunk in decode_stream(vae, latents, size))
    write_video(tmp_path / "a.mkv", frames, 10, lossless=True)
    assert len(written) == latents.shape[2] == 9
    assert written[0] == 0
    assert written[-1] > (tmp_path / "a.mkv").stat().st_size / 2
    assert read_video(tmp_path / "a.mkv")[0].shape == (*size, 3)


def as_uint8(chunk: torch.Tensor) -> np.ndarray:
    """A chunk `1 c n h w` in [-1, 1] as frames `n h w c`."""
    return ((chunk[0].clamp(-1, 1) / 2 + 0.5) * 255).round().byte().movedim(0, -1).numpy()


def peak_memory(folder: str) -> Iterator[float]:
    """Peak memory of this process in MiB after 65 frames were written, after 513, and after 513 were decoded whole."""
    vae = tiny_vae()
    for t, whole in ((65, False), (513, False), (513, True)):
        size = (t, 128, 128)
        latents = torch.randn(1, *latent_shape(vae, *size), generator=seeded())
        chunks = decode_stream(vae, latents, size)
        if whole:
            chunks = iter([torch.cat(list(chunks), dim=2)])
        write_video(Path(folder) / f"{t}.mp4", map(as_uint8, chunks), 10)
        # Not resource's ru_maxrss, which a new process inherits from the one that started it.
        status = Path("/proc/self/status").read_text()
        yield int(status.split("VmHWM:")[1].split()[0]) / 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_streaming as t\n"
    code += f"print(*t.peak_memory({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    short, long, whole = map(float, done.stdout.split())
    assert len(read_video(tmp_path / "513.mp4")[0]) == 513
    # Latents grow by 7 MiB at most where they are copied; 448 frames more are 84 MiB in float32.
    assert long - short < 16
    assert whole - long > 84
