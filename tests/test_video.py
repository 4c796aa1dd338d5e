"""Video files in and out, judged on real files."""

import io
import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stgen import video


def gradient(t: int, h: int, w: int) -> np.ndarray:
    """A coloured clip `t h w 3` without symmetries: red falls along x, green rises along y, blue along t."""
    y, x, i = np.linspace(0, 1, h)[:, None], np.linspace(0, 1, w), np.linspace(0, 1, t)[:, None, None]
    clip = np.stack(np.broadcast_arrays(220 - 150 * x + 0 * i + 0 * y, 30 + 200 * y + 0 * i, 60 + 120 * i), axis=-1)
    return clip.round().astype(np.uint8)


def noise(t: int, h: int, w: int, c: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (t, h, w, c), dtype=np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


def write(path: Path, frames: np.ndarray, codec: str, pixels: str, source: str = "rgb24", rate=10, sound: bool = False):
    """A foreign file, written with bare PyAV, perhaps with a second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        audio = container.add_stream("aac", rate=44100) if sound else None
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=source)))
        container.mux(stream.encode())
        if audio is not None:
            write_silence(container, audio)


def write_silence(container, audio) -> None:
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
    silence.rate = 44100
    container.mux(audio.encode(silence))
    container.mux(audio.encode())


def turn(mp4: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An mp4 with another display matrix, x' = a x + c y and y' = b x + d y for `matrix` = a, b, c, d."""

    def box(a: int, b: int, c: int, d: int) -> bytes:  # fixed point, 16.16 bits and in the last column 2.30
        numbers = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
        return b"".join(n.to_bytes(4, "big", signed=True) for n in numbers)

    at = mp4.index(box(1, 0, 0, 1), mp4.index(b"tkhd"))
    return mp4[:at] + box(*matrix) + mp4[at + 36 :]


# --- Reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mkv", "libx264", "yuv444p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.mp4", "libx264", "yuv420p10le"),
        ("a.mov", "qtrle", "rgb24"),
    ],
)
@pytest.mark.parametrize("t", [7, 1])
def test_reads_foreign_files(tmp_path, name, codec, pixels, t):
    clip = gradient(t, 48, 64)
    write(tmp_path / name, clip, codec, pixels, rate=Fraction(30000, 1001))
    frames, fps = video.read_video(tmp_path / name)
    assert frames.dtype == np.uint8
    # FFmpeg writes full-range and untagged files here, so its own conversion sets the limit.
    assert psnr(frames, clip) > 30
    assert fps == pytest.approx(30000 / 1001)
    again, fps_of_bytes = video.read_video((tmp_path / name).read_bytes())
    assert np.array_equal(frames, again)
    assert fps == fps_of_bytes == video.frame_rate(tmp_path / name)
    assert np.array_equal(frames, np.stack(list(video.stream_video(str(tmp_path / name)))))


def test_reads_the_pictures_of_a_file_with_sound(tmp_path):
    clip = gradient(5, 32, 32)
    write(tmp_path / "a.mp4", clip, "libx264", "yuv420p", sound=True)
    frames, fps = video.read_video(tmp_path / "a.mp4")
    assert psnr(frames, clip) > 30
    assert fps == 10


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_frames_come_out_upright(tmp_path, quarters, mirrored):
    """`quarters` is how often the picture is to be turned clockwise: 1 is a phone held upright."""
    clip = gradient(2, 32, 48)
    write(tmp_path / "a.mp4", clip, "libx264", "yuv444p")
    matrix = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][quarters]
    upright = np.rot90(clip, -quarters, axes=(1, 2))
    if mirrored:  # left and right change places after turning: x' = -x'
        matrix, upright = (-matrix[0], matrix[1], -matrix[2], matrix[3]), upright[:, :, ::-1]
    frames, _ = video.read_video(turn((tmp_path / "a.mp4").read_bytes(), matrix))
    assert psnr(frames, upright) > 30


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_frames_that_are_made_smaller_are_upright_too(tmp_path, degrees):
    clip = gradient(2, 32, 48)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv444p"
        stream.set_display_rotation(degrees)  # counter-clockwise
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    upright = np.rot90(clip, degrees // 90, axes=(1, 2))
    assert psnr(video.read_video(tmp_path / "a.mp4")[0], upright) > 30
    h, w = upright.shape[1] // 2, upright.shape[2] // 4
    for frame, expected in zip(video.stream_frames(tmp_path / "a.mp4"), upright, strict=True):
        assert (frame.height, frame.width) == upright.shape[1:3]
        assert frame.aspect == Fraction(upright.shape[2], upright.shape[1])
        small = Image.fromarray(expected).resize((w, h), Image.Resampling.BICUBIC)
        assert psnr(frame.rgb(h, w), np.asarray(small)) > 30


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_frames_are_made_smaller_as_pillow_does(tmp_path, pixels):
    write(tmp_path / "a.mp4", np.repeat(noise(2, 12, 16), 8, axis=1).repeat(8, axis=2), "libx264", pixels)
    for frame in video.stream_frames(tmp_path / "a.mp4"):
        whole = frame.rgb()
        assert whole.shape == (96, 128, 3)
        for h, w in ((72, 96), (31, 40), (48, 128)):
            small = np.asarray(Image.fromarray(whole).resize((w, h), Image.Resampling.BICUBIC))
            assert psnr(frame.rgb(h, w), small) > (35 if pixels == "yuv444p" else 28)  # chroma is interpolated once
        assert psnr(frame.rgb(192, 256), np.asarray(Image.fromarray(whole).resize((256, 192), 3))) > 24


def pq(nits: np.ndarray) -> np.ndarray:
    """The signal, 0 to 1, of a luminance: SMPTE ST 2084."""
    y = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


@pytest.mark.parametrize("transfer", [16, pytest.param(18, marks=pytest.mark.slow)], ids=["PQ", "HLG"])
def test_hdr_is_tone_mapped(tmp_path, transfer):
    signal = pq(np.array([0, 5, 50, 203, 1000.0])) if transfer == 16 else np.array([0, 0.12, 0.38, 0.75, 1])
    luma = (64 + 876 * signal).round().astype(np.uint16).repeat(16)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 16, 80, "yuv420p10le"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = 9, 9, transfer, 1
        for _ in range(2):
            frame = av.VideoFrame(80, 16, "yuv420p10le")
            for i, plane in enumerate(frame.planes):
                values = np.full((plane.height, plane.line_size // 2), 512, np.uint16)
                if i == 0:
                    values[:, :80] = luma
                plane.update(values.tobytes())
            frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range = 9, 9, transfer, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames, _ = video.read_video(tmp_path / "a.mp4")
    levels = frames[:, 8, 8::16].astype(int)
    assert np.ptp(levels, axis=2).max() <= 3, "grey stays grey"
    black, dark, grey, white, bright = levels[0, :, 1]
    # White of a page, 203 nits (ITU-R BT.2408), is bright, and highlights are above it: unmapped PQ has it at 148 and 5
    # nits at 77, which is the washed out look of HDR shown as if it were not.
    assert black <= 2
    assert 20 < dark < 60 < grey < 140 < white < bright <= 255
    *_, last = video.stream_frames(tmp_path / "a.mp4")
    assert abs(last.rgb(8, 40)[4, 4::8, 1] - levels[0, :, 1]).max() < 9


def test_times_are_those_of_the_file_and_always_rise(tmp_path):
    times = [100, 130, 170, 400, 1000]
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 8, 8, "bgr0"
        stream.codec_context.time_base = Fraction(1, 1000)
        for at, picture in zip(times, noise(5, 8, 8), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = list(video.stream_frames(tmp_path / "a.mkv"))
    assert [frame.time * 1000 for frame in frames] == [0, 30, 70, 300, 900]
    assert [frame.index for frame in frames] == list(range(5))
    # A raw stream has no times: they follow from the rate.
    with av.open(str(tmp_path / "a.h264"), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        for picture in noise(5, 16, 16):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    times = [frame.time for frame in video.stream_frames(tmp_path / "a.h264")]
    assert all(b > a for a, b in itertools.pairwise(times))
    assert len(times) == 5


def test_headers_and_packets(tmp_path):
    write(tmp_path / "a.mp4", gradient(7, 32, 32), "libx264", "yuv420p", rate=Fraction(30000, 1001), sound=True)
    header = video.read_header(tmp_path / "a.mp4")
    assert (header.num_frames, header.fps) == (7, pytest.approx(30000 / 1001))
    assert header.duration == pytest.approx(7 * 1001 / 30000, rel=1e-3)
    write(tmp_path / "a.mkv", gradient(7, 32, 32), "libx264", "yuv420p")
    assert video.read_header(tmp_path / "a.mkv").num_frames is None
    assert video.count_packets(tmp_path / "a.mkv") == video.count_packets(tmp_path / "a.mp4") == 7
    with pytest.raises(ValueError, match="No such file"):
        video.read_header(tmp_path / "b.mp4")


def test_interlaced_pictures_are_told(tmp_path):
    for name, options in (("a.mkv", {"x264-params": "tff=1"}), ("b.mkv", {})):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", rate=25, options=options)
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
            for picture in gradient(3, 32, 32):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    assert all(frame.interlaced for frame in video.stream_frames(tmp_path / "a.mkv"))
    assert not any(frame.interlaced for frame in video.stream_frames(tmp_path / "b.mkv"))


def test_transparency_lies_on_black(tmp_path):
    clip = np.concatenate([noise(3, 8, 8), np.full((3, 8, 8, 1), 255, np.uint8)], axis=-1)
    clip[:, :4, :, 3] = 0
    clip[:, 4, :, 3] = 128
    write(tmp_path / "a.mkv", clip, "ffv1", "bgra", source="rgba")
    frames, _ = video.read_video(tmp_path / "a.mkv")
    assert (frames[:, :4] == 0).all()
    assert np.array_equal(frames[:, 4], (clip[:, 4, :, :3] * (128 / 255)).round().astype(np.uint8))
    assert np.array_equal(frames[:, 5:], clip[:, 5:, :, :3])


def test_average_rate_of_a_gif_with_uneven_delays(tmp_path):
    images = [Image.fromarray(f) for f in noise(4, 8, 8)]
    delays = [100, 100, 100, 700]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=delays)
    assert video.frame_rate(tmp_path / "a.gif") == pytest.approx(4.0)


def broken_files(folder: Path) -> dict[str, Path | bytes]:
    clip = noise(40, 64, 64)
    mp4 = video.encode_video(clip, 10)
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty.mp4").touch()
    (folder / "torn.mp4").write_bytes(mp4[: len(mp4) * 2 // 3])
    write(folder / "torn.avi", clip, "mpeg4", "yuv420p")
    avi = (folder / "torn.avi").read_bytes()
    (folder / "torn.avi").write_bytes(avi[: len(avi) * 2 // 3])
    with av.open(str(folder / "sound.mp4"), "w") as container:
        write_silence(container, container.add_stream("aac", rate=44100))
    with av.open(str(folder / "song.mp3"), "w") as container:
        sound, cover = container.add_stream("libmp3lame", rate=44100), container.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic.value
        container.mux(cover.encode(av.VideoFrame.from_ndarray(clip[0, :16, :16].copy(), format="rgb24")))
        container.mux(cover.encode())
        write_silence(container, sound)
    (folder / "whole.mp4").write_bytes(mp4)
    (folder / "playlist.mp4").write_text("ffconcat version 1.0\nfile whole.mp4\n")
    files = {p.name: p for p in folder.iterdir() if p.name != "whole.mp4"}
    return files | {"missing": folder / "missing.mp4", "folder": folder, "bytes": b"not a video"}


def test_broken_files_are_refused_in_one_line_with_their_name(tmp_path):
    for what, source in broken_files(tmp_path).items():
        with pytest.raises(ValueError, match="<bytes>" if what == "bytes" else str(source)) as error:
            video.read_video(source)
        assert "\n" not in str(error.value), what
    for name in ("sound.mp4", "song.mp3"):
        with pytest.raises(ValueError, match="no video stream"):
            video.frame_rate(tmp_path / name)
    with pytest.raises(ValueError, match="No such file"):
        next(video.stream_video(tmp_path / "missing.mp4"))


# --- Writing ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(t=st.integers(1, 4), h=st.integers(1, 40), w=st.integers(1, 40), c=st.sampled_from([1, 3]))
def test_lossless_is_exact_and_lossy_keeps_the_size(t, h, w, c):
    clip = noise(t, h, w, c)
    frames, fps = video.read_video(video.encode_video(clip, 12.5, lossless=True))
    assert np.array_equal(frames, np.repeat(clip, 3 // c, axis=-1))
    assert fps == 12.5
    frames, fps = video.read_video(video.encode_video(clip, 12.5))
    assert frames.shape == (t, h, w, 3)
    assert fps == 12.5


@pytest.mark.parametrize("size", [(64, 64), (47, 64), (64, 31), (33, 35)])
def test_h264_is_close(size):
    clip = gradient(6, *size)
    frames, _ = video.read_video(video.encode_video(clip, 10))
    assert psnr(frames, clip) > 43.5, "42.5 is what FFmpeg's default conversion to RGB reaches"
    frames, _ = video.read_video(video.encode_video(clip[..., :1], 10))
    assert psnr(frames, np.repeat(clip[..., :1], 3, axis=-1)) > 48


@pytest.mark.parametrize("fps", [0.5, 8, 24000 / 1001, 29.97, 60])
@pytest.mark.parametrize("lossless", [False, True])
def test_rates_are_kept(fps, lossless):
    assert video.read_video(video.encode_video(noise(4, 8, 8), fps, lossless))[1] == pytest.approx(fps, rel=1e-6)


def test_mp4_plays_everywhere_and_bytes_repeat(tmp_path):
    clip = gradient(4, 32, 32)
    data = video.encode_video(clip, 10)
    assert data == video.encode_video(clip, 10)
    assert data.index(b"moov") < data.index(b"mdat"), "the index must come first, for browsers"
    with av.open(io.BytesIO(data)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_range) == (1, 1), "BT.709, limited range"
    assert video.encode_video(clip, 10, lossless=True) == video.encode_video(clip, 10, lossless=True)
    video.write_video(tmp_path / "new" / "a: b.mp4", clip, 10)
    assert (tmp_path / "new" / "a: b.mp4").read_bytes() == data
    video.write_video(tmp_path / "a.mkv", clip, 10, lossless=True)
    assert np.array_equal(video.read_video(tmp_path / "a.mkv")[0], clip)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"path": "a.mkv"}, "path is 'a.mkv', allowed: a file name ending in .mp4"),
        ({"path": "a.mp4", "lossless": True}, "ending in .mkv"),
        ({"frames": np.zeros((2, 4, 4, 3), np.float32)}, "frames is 'float32"),
        ({"frames": np.zeros((2, 4, 4, 4), np.uint8)}, "uint8 t h w 3"),
        ({"frames": np.zeros((4, 4, 3), np.uint8)}, "uint8 t h w 3"),
        ({"frames": np.zeros((0, 4, 4, 3), np.uint8)}, "not empty"),
        ({"frames": iter(())}, "frames is an iterator without chunks, allowed: at least one chunk"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
    ],
)
def test_write_video_refuses(tmp_path, monkeypatch, kwargs, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        video.write_video(**{"path": "a.mp4", "frames": noise(2, 4, 4), "fps": 10, **kwargs})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["while encoding", "before the rename"])
def test_a_torn_write_leaves_what_was_there(tmp_path, monkeypatch, moment):
    target = tmp_path / "a.mkv"
    target.write_bytes(b"before")
    mux = av.container.OutputContainer.mux

    def dies(*args):
        if moment == "while encoding":
            mux(*args)
        if any(p != target for p in tmp_path.iterdir()):
            raise OSError("disk full")

    if moment == "while encoding":
        monkeypatch.setattr(av.container.OutputContainer, "mux", dies)
    else:
        monkeypatch.setattr("os.replace", dies)
    with pytest.raises(OSError, match="disk full"):
        video.write_video(target, noise(40, 16, 16), 10, lossless=True)
    assert target.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mkv"]


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("lengths", [[7], [1] * 7, [3, 1, 3]])
def test_chunks_make_the_file_of_the_whole(lengths, lossless):
    clip = gradient(7, 16, 18)
    chunks = (chunk.copy() for chunk in np.split(clip, np.cumsum(lengths)[:-1]))
    assert video.encode_video(chunks, 10, lossless) == video.encode_video(clip, 10, lossless)


def test_a_chunk_is_encoded_before_the_next_is_asked_for(tmp_path, monkeypatch):
    events = []
    reformat = av.VideoFrame.from_ndarray

    def noted(*args, **kwargs):
        events.append("encoded")
        return reformat(*args, **kwargs)

    def chunks():
        for _ in range(3):
            events.append("asked")
            yield noise(2, 8, 8)

    monkeypatch.setattr(video.av, "VideoFrame", type("VideoFrame", (), {"from_ndarray": staticmethod(noted)}))
    video.write_video(tmp_path / "a.mp4", chunks(), 10)
    assert events == ["asked", "encoded", "encoded"] * 3


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize(
    ("before", "last", "message"),
    [
        (0, OSError("no more"), "no more"),
        (1, OSError("no more"), "no more"),
        (60, OSError("no more"), "no more"),
        (1, noise(1, 8, 6), r"size of frames is \(8, 6\), allowed: that of the first chunk, \(8, 8\)"),
        (60, noise(1, 8, 8)[0], "uint8 t h w 3"),
        (1, np.zeros((1, 8, 8, 3)), "frames is 'float64"),
    ],
)
def test_chunks_that_end_in_an_error_leave_no_file(tmp_path, before, last, message, lossless):
    def chunks():
        yield from (noise(1, 8, 8) for _ in range(before))
        if isinstance(last, Exception):
            raise last
        yield last

    target = tmp_path / ("a.mkv" if lossless else "a.mp4")
    target.write_bytes(b"before")
    with pytest.raises((OSError, ValueError), match=message):
        video.write_video(target, chunks(), 10, lossless)
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("c", [1, 3])
def test_gif(tmp_path, c):
    clip = noise(6, 5, 7, 1) if c == 1 else gradient(6, 5, 7)
    video.write_gif(tmp_path / "a.gif", clip, fps=30, scale=3)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.size == (21, 15)
        assert image.info["loop"] == 0
    frames, fps = video.read_video(tmp_path / "a.gif")
    enlarged = np.repeat(clip, 3 // c, -1).repeat(3, axis=1).repeat(3, axis=2)
    if c == 1:
        assert np.array_equal(frames, enlarged), "every level of grey is kept"
    else:
        assert psnr(frames, enlarged) > 30
    assert fps == pytest.approx(30)
    with pytest.raises(ValueError, match="fps is 60"):
        video.write_gif(tmp_path / "b.gif", clip, fps=60)
    with pytest.raises(ValueError, match=r"ending in \.gif"):
        video.write_gif(tmp_path / "b.mp4", clip, fps=10)
    with pytest.raises(ValueError, match="scale is 0"):
        video.write_gif(tmp_path / "b.gif", clip, fps=10, scale=0)
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


# --- Looking ------------------------------------------------------------------------------------------------------


def sheet(path: Path, rows, **kwargs) -> np.ndarray:
    video.contact_sheet(rows, path, **kwargs)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def holds(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(-1).sum())


def test_sheet_size_and_label(tmp_path):
    black = np.zeros((5, 24, 40, 3), np.uint8)
    path = tmp_path / "a.png"
    one, two = sheet(path, [("label", black[:4])]), sheet(path, [("label", black)])
    assert two.shape[1] - one.shape[1] == 40 + 2 * video._BORDER + video._GAP
    taller = sheet(path, [("label", black), ("label", black[..., :1])])
    assert taller.shape[0] - two.shape[0] == 24 + 2 * video._BORDER + video._GAP
    assert holds(one, (0, 0, 0)) >= 4 * 24 * 40
    assert holds(one, video._PLAIN) > 0, "black frames are set apart"
    left = one[:, : one.shape[1] - video._MARGIN - 4 * (40 + 2 * video._BORDER + video._GAP)]
    assert (left < 128).any(), "the label can be seen"
    assert not (sheet(path, [("", black[:4])])[:, : video._MARGIN] < 255).any()
    assert sheet(path, [("label", black)], title="A title").shape[0] > two.shape[0]
    assert sheet(path, [("a caption of many words " * 4, black[:1])]).shape[0] > one.shape[0]
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_sheet_shows_the_frames_enlarged_and_chosen(tmp_path):
    clip, short = noise(9, 6, 8), noise(3, 6, 8, 1)
    picture = sheet(tmp_path / "a.png", [("clip", clip), ("short", short)], scale=2, columns=3)

    def shown(frame: np.ndarray) -> bool:
        frame = np.broadcast_to(frame, (6, 8, 3)).repeat(2, 0).repeat(2, 1)
        windows = np.lib.stride_tricks.sliding_window_view(picture, (12, 16, 3))[:, :, 0]
        return bool((windows[..., 0, 0, 0] == frame[0, 0, 0]).any()) and any(
            np.array_equal(windows[y, x], frame) for y, x in np.argwhere(windows[..., 0, 0, 0] == frame[0, 0, 0])
        )

    assert [i for i, frame in enumerate(clip) if shown(frame)] == [0, 4, 8]
    assert [i for i, frame in enumerate(short) if shown(frame)] == [0], "columns are the same frame in every row"


def test_sheet_marks_given_frames(tmp_path):
    clip, given_frames = noise(4, 6, 8), np.array([True, False, False, False])
    plain = sheet(tmp_path / "a.png", [("clip", clip)])
    marked = sheet(tmp_path / "a.png", [("clip", clip, given_frames)])
    assert not holds(plain, video._GIVEN)
    assert not holds(plain, video._GENERATED)
    border = holds(plain, video._PLAIN) // 4
    legend = 11 * 11 - 5 * 5
    assert holds(marked, video._GIVEN) == border + legend
    assert holds(marked, video._GENERATED) == 3 * border + legend


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        ([], {}, "at least one row"),
        ([("a", noise(2, 4, 4), np.ones(3, bool))], {}, "given is"),
        ([("a", noise(2, 4, 4), np.ones(2))], {}, "given is"),
        ([("a", noise(2, 4, 4).astype(float))], {}, "frames is"),
        ([("a", noise(2, 4, 4))], {"columns": 0}, "columns is 0"),
        ([("a", noise(2, 4, 4))], {"scale": 0}, "scale is 0"),
    ],
)
def test_sheet_refuses(tmp_path, rows, kwargs, message):
    with pytest.raises(ValueError, match=message):
        video.contact_sheet(rows, tmp_path / "a.png", **kwargs)
    with pytest.raises(ValueError, match=r"ending in \.png"):
        video.contact_sheet(rows, tmp_path / "a.jpg", **kwargs)


def test_difference():
    a, b = noise(2, 4, 4), noise(4, 4, 4)[2:]
    assert np.array_equal(video.difference(a, b), np.abs(a.astype(int) - b).astype(np.uint8))
    assert not video.difference(a[..., :1], np.repeat(a[..., :1], 3, axis=-1)).any()
    with pytest.raises(ValueError, match="the shape of a"):
        video.difference(a, b[:1])


def test_h264_of_one_quality() -> None:
    clip = gradient(9, 33, 48)
    clips, sizes = zip(*(video.encode_h264(clip, 25, crf) for crf in (0, 20.5, 40, 51)), strict=True)
    assert all(decoded.shape == clip.shape for decoded in clips)
    qualities = [psnr(decoded, clip) for decoded in clips]
    assert sorted(qualities, reverse=True) == qualities
    assert qualities[0] > 45
    assert sorted(sizes, reverse=True) == list(sizes)
    assert sizes[-1] < 300, "without the hundreds of bytes in which x264 describes itself"
    assert len(video.encode_h264(clip[:1], 25, 51)[0]) == 1
    with pytest.raises(ValueError, match="crf is 52"):
        video.encode_h264(clip, 25, 52)
