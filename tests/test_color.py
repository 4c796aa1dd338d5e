"""Late conversion to RGB: as libswscale has it, whatever the encoding, and the same to the bit in any batch."""

import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace
from conftest import losses_of, run_training

from stgen.data.color import YUV420, from_planes, stack_clips, to_pixels, to_rgb
from stgen.data.reading import ClipDataset, DataConfig, clip_loader, read_clip
from stgen.data.shards import ShardWriter
from stgen.video import encode_video, read_video, read_yuv420


def natural_frames(t: int, h: int, w: int) -> np.ndarray:
    """Smooth colours of all hues with sharp edges that move, uint8 `t h w 3`."""
    y, x = np.mgrid[:h, :w] / 16
    time = np.arange(t)[:, None, None, None] / 4
    waves = np.sin(np.stack([x + y, 1.7 * x - y, 0.6 * y - 2 * x], -1)[None] + time * [1, 2, 3]) * 110 + 128
    waves[:, h // 4 : h // 2, w // 4 : w // 2] = [[[[250, 10, 30]]]]
    return waves.clip(0, 255).astype(np.uint8)


def encoded(
    frames: np.ndarray, pixels: str, space: Colorspace | None, levels: ColorRange, codec: str = "libx264"
) -> bytes:
    """A file that says these things of its colours, whatever they look like then."""
    policy = os.sched_getscheduler(0)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=Fraction(8), options={"crf": "17"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.codec_context.color_range = levels
        if space is not None:
            stream.codec_context.colorspace = space
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    # SVT-AV1 gives who calls it real-time priority, where he may have it, and so all processes that he starts afterwards.
    os.sched_setscheduler(0, policy, os.sched_param(0))
    return buffer.getvalue()


def converted(data: bytes) -> torch.Tensor:
    """`t h w c`"""
    planes = read_yuv420(data)
    assert planes is not None
    return to_rgb(from_planes(*planes)).permute(1, 2, 3, 0)


ENCODINGS = {
    "ours, BT.709": encode_video(natural_frames(6, 64, 96), 8),
    "BT.709": encoded(natural_frames(6, 64, 96), "yuv420p", Colorspace.ITU709, ColorRange.MPEG),
    "BT.601": encoded(natural_frames(6, 64, 96), "yuv420p", Colorspace.ITU601, ColorRange.MPEG),
    "full range": encoded(natural_frames(6, 64, 96), "yuv420p", Colorspace.ITU709, ColorRange.JPEG),
    "nothing said": encoded(natural_frames(6, 64, 96), "yuv420p", None, ColorRange.UNSPECIFIED),
    "HEVC": encoded(natural_frames(3, 64, 96), "yuv420p", Colorspace.ITU709, ColorRange.MPEG, "libx265"),
    "rows padded by the decoder": encode_video(natural_frames(3, 34, 42), 8),
}


@pytest.mark.parametrize("encoding", list(ENCODINGS))
def test_conversion_is_that_of_libswscale(encoding: str) -> None:
    """At most one level off, and a fiftieth of one on average."""
    expected = read_video(ENCODINGS[encoding])[0].astype(int)
    error = np.abs(converted(ENCODINGS[encoding]).numpy() - expected)
    assert error.max() <= 1
    assert error.mean() < 0.02


def test_colours_survive_what_is_written() -> None:
    """Against the pixels themselves it is as good as libswscale."""
    frames = natural_frames(6, 64, 96)
    data = encode_video(frames, 8)
    late, early = (np.square(x - frames.astype(float)).mean() for x in (converted(data).numpy(), read_video(data)[0]))
    assert late == pytest.approx(early, rel=0.01)


def test_every_level_is_converted_to_the_nearest() -> None:
    """All 256^3 triples but for a grid of 5, against the standards' own formulas in double precision."""
    grid = np.arange(0, 256, 5)
    y, u, v = (x.reshape(-1, 1, 1) for x in np.meshgrid(grid, grid, grid, indexing="ij"))
    one = np.ones((1, 2, 2))
    planes = np.concatenate([(y * one).reshape(-1, 4), u[:, :, 0], v[:, :, 0]], 1).reshape(-1, 3, 2).astype(np.uint8)
    for matrix, (kr, kb) in {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}.items():
        for full in (False, True):
            luma = y[:, 0, 0] / 255 if full else (y[:, 0, 0] - 16) / 219
            pb, pr = ((x[:, 0, 0] - 128) / (255 if full else 224) for x in (u, v))
            red, blue = luma + 2 * (1 - kr) * pr, luma + 2 * (1 - kb) * pb
            green = (luma - kr * red - kb * blue) / (1 - kr - kb)
            exact = (np.stack([red, green, blue]) * 255).clip(0, 255)
            rgb = to_rgb(from_planes(planes, matrix, full))[:, :, 0, 0].numpy()
            assert np.abs(rgb - exact).max() < 0.7  # half a level of rounding, and the coefficients' 11 bits


def test_a_batch_is_its_clips() -> None:
    """Of several matrices and ranges, in pieces of any size, and with a clip of RGB among them."""
    names = ["ours, BT.709", "BT.601", "full range", "nothing said"]
    clips = [from_planes(*read_yuv420(ENCODINGS[name])) for name in names]  # type: ignore[misc]
    batch = stack_clips(clips)
    assert isinstance(batch, YUV420)
    assert batch.planes.shape == (4, 6, 96, 96)
    alone = torch.stack([to_rgb(clip) for clip in clips])
    assert torch.equal(to_rgb(batch), alone)
    frames = torch.cat([to_rgb(YUV420(c.planes[i : i + 1], c.matrix)) for c in clips for i in range(6)], 1)
    assert torch.equal(frames, alone.transpose(0, 1).flatten(1, 2))
    assert batch.shape == alone.shape
    assert clips[0].shape == alone[0].shape
    mixed = stack_clips([clips[0], alone[1], clips[2]])
    assert isinstance(mixed, torch.Tensor)
    assert torch.equal(mixed, alone[:3])
    pixels = to_pixels(batch, "cpu")
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(pixels, alone.float() / 127.5 - 1)


@pytest.mark.parametrize(
    "data",
    [
        encode_video(natural_frames(2, 9, 16), 8),
        encode_video(natural_frames(2, 8, 16), 8, lossless=True),
        encoded(natural_frames(2, 16, 16), "yuv420p", Colorspace.SMPTE240M, ColorRange.MPEG),
        encoded(natural_frames(2, 16, 16), "yuvj420p", None, ColorRange.JPEG, "mjpeg"),
        encoded(natural_frames(2, 64, 64), "yuv420p", Colorspace.ITU709, ColorRange.MPEG, "libsvtav1"),
        encoded(natural_frames(2, 16, 16), "yuv444p", Colorspace.ITU709, ColorRange.MPEG),
        encoded(natural_frames(2, 16, 16), "yuv420p10le", Colorspace.ITU709, ColorRange.MPEG),
    ],
    ids=["odd size", "lossless", "another matrix", "MJPEG", "AV1", "4:4:4", "10 bits"],
)
def test_what_is_no_such_file_is_converted_as_before(data: bytes) -> None:
    assert read_yuv420(data) is None
    frames = read_video(data)[0]
    row = dict(zip(("num_frames", "height", "width"), frames.shape[:3], strict=True))
    clip = read_clip({"mkv": data}, row)
    assert isinstance(clip, torch.Tensor)
    np.testing.assert_array_equal(clip.permute(1, 2, 3, 0).numpy(), frames)


def test_broken_files_are_named() -> None:
    data = encode_video(natural_frames(6, 64, 96), 8)
    for broken in (b"", b"no video", data[: len(data) // 2], data[:200] + bytes(100) + data[300:]):
        with pytest.raises(ValueError, match=r"<bytes> (cannot be read as a video|is corrupt|has no)"):
            read_yuv420(broken)


def test_loaders_hand_on_planes(tmp_path: Path) -> None:
    frames = natural_frames(4, 16, 32)
    with ShardWriter(tmp_path) as writer:
        for i in range(4):
            clip = {"caption": "", "fps": 8, "num_frames": 4, "height": 16, "width": 32, "source": ""}
            writer.write(f"{i}", clip, mp4=encode_video(np.roll(frames, i, 2), 8))
    dataset = ClipDataset(DataConfig(str(tmp_path), 4, 16, 32))
    alone, helped = (next(clip_loader(dataset, 0, 4, workers))["video"] for workers in (0, 1))
    assert isinstance(alone, YUV420)
    assert isinstance(helped, YUV420)
    assert alone.planes.shape == (4, 4, 24, 32)
    assert torch.equal(to_rgb(alone), to_rgb(helped))


@pytest.mark.slow
def test_planes_are_trained_on(training_world: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "clips") as writer:
        for i in range(4):
            clip = {"caption": "a 3", "fps": 8, "num_frames": 9, "height": 16, "width": 16, "source": ""}
            writer.write(f"{i}", clip, mp4=encode_video(np.roll(natural_frames(9, 16, 16), i, 2), 8))
    rows = run_training(training_world, tmp_path / "run", f"data.path={tmp_path / 'clips'}", "samples=4")
    assert len(losses_of(rows)) == 1


def test_clips_longer_than_their_header_says() -> None:
    """Matroska says no number of frames, and room for them is made as they come."""
    frames = natural_frames(70, 16, 16)
    planes = read_yuv420(encoded(frames, "yuv420p", Colorspace.ITU709, ColorRange.MPEG))
    assert planes is not None
    assert planes[0].shape == (70, 24, 16)
    assert len({frame.tobytes() for frame in planes[0]}) > 60
