"""Video files in and out: mp4, bit-exact mkv, GIF, and contact sheets to look at.

Frames are uint8 arrays `t h w c`: t frames, h height and w width in pixels, c = 3 for RGB or, where frames come in, 1
for grey. Rates are in frames/s. PyAV's wheel carries FFmpeg, so no program needs to be on the PATH. Every file is
written under a temporary name in its folder and renamed, so a torn file never bears the final name.

Read frames are upright (the display matrix is applied, as by players), 8 bits a colour, with transparency on black. HDR
(PQ, HLG) is tone mapped to BT.709 by libswscale. Sound is ignored, and interlaced pictures stay as they are.
"""

import functools
import io
import itertools
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from stgen.config import require
from stgen.durable import replacing

Frames = NDArray[np.uint8]

# FFmpeg's default conversion of YUV 4:2:0 to RGB truncates: it darkens every channel by about one level of 255, and
# costs 3 to 5 dB against these flags of libswscale: bilinear, full chroma out, full chroma in, accurate rounding. PyAV
# has names for them from version 18 on. One thread, since starting more takes longer than converting a small frame.
_EXACT: dict[str, Any] = {"interpolation": 0x2 | 0x2000 | 0x4000 | 0x40000, "threads": 1}
# The same with bicubic interpolation, antialiased where it shrinks, and without instructions that differ by machine:
# 53 dB from Pillow's bicubic of the converted frame, in a fiftieth of its time.
_RESIZE: dict[str, Any] = {"interpolation": 0x4 | 0x2000 | 0x4000 | 0x40000 | 0x80000, "threads": 1}
_HDR = (16, 18)  # transfer characteristics of SMPTE ST 2084 (PQ) and ARIB STD-B67 (HLG), as ITU-T H.273 numbers them


# --- Reading ------------------------------------------------------------------------------------------------------


def read_video(source: str | Path | bytes) -> tuple[Frames, float]:
    """All frames of a video file, or of a file's bytes, and its average rate.

    Returns:
        Frames uint8 `t h w 3`, upright, with transparency on black and the pixel grid as stored; frames/s.
    Raises:
        ValueError: there is no such file, it has no video stream, or a part of it cannot be decoded.
    """
    with _open_video(source) as (container, stream):
        frames = [frame.rgb() for frame in _decode(container, stream, source)]
        return np.stack(frames), _average_rate(container, stream)


def stream_video(source: str | Path | bytes) -> Iterator[Frames]:
    """The same frames one by one, `h w 3`, for videos too long for memory. Raises as `read_video`, while it runs."""
    return (frame.rgb() for frame in stream_frames(source))


def stream_frames(source: str | Path | bytes) -> Iterator["DecodedFrame"]:
    """The frames one by one, with their times, not yet converted to RGB. Raises as `read_video`, while it runs."""
    with _open_video(source) as (container, stream):
        yield from _decode(container, stream, source)


def frame_rate(source: str | Path | bytes) -> float:
    """The average rate in frames/s, from the file's header. Raises as `read_video`."""
    with _open_video(source) as (container, stream):
        return _average_rate(container, stream)


@dataclass(frozen=True)
class VideoHeader:
    """What a file says of itself. Headers may lie; only decoding tells."""

    fps: float
    """Average rate in frames/s."""
    duration: float | None
    """Seconds; None if it says nothing."""
    num_frames: int | None
    """None if it says nothing."""


def read_header(source: str | Path | bytes) -> VideoHeader:
    """The header, without decoding. Raises as `read_video`."""
    with _open_video(source) as (container, stream):
        duration = None if container.duration is None else container.duration / av.time_base
        if stream.duration is not None and stream.time_base is not None:
            duration = float(stream.duration * stream.time_base)
        return VideoHeader(_average_rate(container, stream), duration, stream.frames or None)


def count_packets(source: str | Path | bytes) -> int:
    """The number of coded pictures, from reading the file without decoding it. Raises as `read_video`."""
    with _open_video(source) as (container, stream):
        return sum(packet.size > 0 for packet in container.demux(stream))


def _name(source: str | Path | bytes) -> str:
    return "<bytes>" if isinstance(source, bytes) else str(source)


@contextmanager
def _open_video(source: str | Path | bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first moving picture; FFmpeg's errors inside the block become one `ValueError`."""
    try:
        # FFmpeg gets an open file and no protocol, so a playlist in a video's clothes cannot make it open other files.
        with (
            io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file,
            av.open(file, "r", metadata_errors="ignore", options={"protocol_whitelist": "none"}) as container,
        ):
            # The cover of a song is a video stream to FFmpeg.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise ValueError(f"{_name(source)} has no video stream")
            yield container, streams[0]
    except (OSError, av.FFmpegError) as error:
        raise ValueError(f"{_name(source)} cannot be read as a video: {error.strerror}") from error


def _average_rate(container: InputContainer, stream: VideoStream) -> float:
    # FFmpeg guesses a GIF's average from its first few delays; the header scan has counted all of them.
    if container.format.name == "gif" and stream.frames and stream.duration and stream.time_base:
        return float(stream.frames / (stream.duration * stream.time_base))
    # A transport stream of one frame has no average. What has no rate at all is a still picture.
    return float(stream.average_rate or stream.guessed_rate or 1)


def _decode(container: InputContainer, stream: VideoStream, source: str | Path | bytes) -> Iterator["DecodedFrame"]:
    first, time, period = None, Fraction(0), Fraction(1 / _average_rate(container, stream))
    converter = _Converter()
    for index, frame in enumerate(container.decode(stream)):
        # FFmpeg would rather show an invented picture than none; a model should not learn from one.
        if frame.is_corrupt:
            raise ValueError(f"{_name(source)} is corrupt at frame {index}")
        stamp = None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base
        if first is None:
            origin = stamp
        else:
            # Raw streams have no timestamps, and broken ones may stand still or run backward.
            later = None if stamp is None or origin is None else stamp - origin
            time = later if later is not None and later > time else time + period
        decoded = DecodedFrame(frame, index, time, stream.sample_aspect_ratio, converter)
        size = decoded.height, decoded.width, 3
        first = size if first is None else first
        if size != first:
            raise ValueError(f"{_name(source)} changes its frame size at frame {index}: {first} to {size}")
        yield decoded
    if first is None:
        raise ValueError(f"{_name(source)} has no frames")


class DecodedFrame:
    """A frame as it comes from the decoder; to convert it to RGB often costs more than decoding, so that waits.

    Attributes:
        index: number of the frame in its file.
        time: seconds since the file's first frame, exact; strictly increasing.
        height, width: upright, in pixels as stored.
        aspect: width by height as it is to be shown, which takes pixels that are not square into account.
        interlaced: whether the picture holds two fields of different times.
    """

    def __init__(
        self, frame: av.VideoFrame, index: int, time: Fraction, pixel_aspect: Fraction | None, converter: "_Converter"
    ) -> None:
        self._frame, self._converter = frame, converter
        self.index, self.time, self.interlaced = index, time, frame.interlaced_frame
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        self._matrix = None if matrix is None else np.frombuffer(matrix, np.int32)
        self._turned = self._matrix is not None and abs(int(self._matrix[1])) > abs(int(self._matrix[0]))
        self.height, self.width = (frame.width, frame.height) if self._turned else (frame.height, frame.width)
        shown = Fraction(frame.width, frame.height) * (pixel_aspect or 1)
        self.aspect = 1 / shown if self._turned else shown

    def rgb(self, height: int | None = None, width: int | None = None) -> Frames:
        """The picture, uint8 `h w 3`, as stored or brought to `height` x `width`: bicubic, antialiased."""
        h, w = height or self.height, width or self.width
        picture = self._converter.rgb(self._frame, *((w, h) if self._turned else (h, w)))
        return picture if self._matrix is None else _upright(picture, self._matrix)


class _Converter:
    """Converts the frames of one file to RGB. Tables for a size and a format are computed once."""

    def __init__(self) -> None:
        self._scalers: dict[tuple[int, int], VideoReformatter] = {}

    def rgb(self, frame: av.VideoFrame, height: int, width: int) -> Frames:
        """uint8 `h w 3`, not yet turned."""
        if frame.color_trc in _HDR:
            frame = _to_sdr(frame)
        if any(component.is_alpha for component in frame.format.components):
            rgba = frame.to_ndarray(format="rgba", **_EXACT).astype(np.uint16)
            blended = ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(blended, format="rgb24")
        if (height, width) == (frame.height, frame.width):
            return frame.to_ndarray(format="rgb24", **_EXACT).astype(np.uint8, copy=False)
        scaler = self._scalers.setdefault((height, width), VideoReformatter())
        return scaler.reformat(frame, width, height, "rgb24", **_RESIZE).to_ndarray().astype(np.uint8, copy=False)


def _to_sdr(frame: av.VideoFrame) -> av.VideoFrame:
    graph = _tone_mapping(frame.width, frame.height, frame.format.name, frame.color_trc)
    graph.push(frame)
    mapped = graph.pull()
    assert isinstance(mapped, av.VideoFrame)
    return mapped


@functools.lru_cache(maxsize=4)  # libswscale takes 5 s to fill its table of colours, for each size anew
def _tone_mapping(width: int, height: int, pixel_format: str, transfer: int) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat(pixel_format), time_base=Fraction(1, 1000)
    )
    scale = graph.add("scale", "out_transfer=bt709:out_primaries=bt709:intent=perceptual")
    rgb, sink = graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")
    source.link_to(scale)
    scale.link_to(rgb)
    rgb.link_to(sink)
    graph.configure()
    return graph


def _upright(picture: Frames, matrix: NDArray[np.int32]) -> Frames:
    """Turns and mirrors `h w 3` by quarters as a display matrix says: x' = a x + c y, y' = b x + d y."""
    a, b, _, c, d = (int(m) for m in matrix[:5])
    if abs(b) > abs(a):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


# Their chroma lies left of the middle unless a file says otherwise, which PyAV does not tell; that of MJPEG lies in it, and
# for libswscale that of VP9 and AV1 too.
_LEFT_CHROMA = ("h264", "hevc")
# As ITU-T H.273 numbers them; 2 is unspecified, which libswscale takes for BT.601.
_MATRIX = {1: "bt709", 2: "bt601", 5: "bt601", 6: "bt601"}


def read_yuv420(source: str | Path | bytes) -> tuple[Frames, str, bool] | None:
    """The frames of a video file as they are coded, without the conversion to RGB, which costs more than decoding does.

    Returns:
        uint8 `t r w`, r = 3 h / 2: h rows of luma, then both planes of chroma (I420); the matrix, bt601 or bt709; and whether
        levels are full, 0..255. None of a file that is not H.264 or HEVC in YUV 4:2:0 of 8 bits, even height and
        width and one of these matrices, or is to be turned or tone mapped before it is looked at.
    Raises:
        ValueError: as `read_video`.
    """
    clip, full, matrix, count = np.empty((0, 0, 0), np.uint8), False, 0, 0
    with _open_video(source) as (container, stream):
        if stream.codec_context.codec.canonical_name not in _LEFT_CHROMA:
            return None
        stream.codec_context.thread_count = 1  # starting threads takes longer than decoding a small clip
        for index, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise ValueError(f"{_name(source)} is corrupt at frame {index}")
            h, w, pixels = frame.height, frame.width, frame.format.name
            if index == 0:
                matrix, full = int(frame.colorspace), pixels == "yuvj420p" or frame.color_range == ColorRange.JPEG
                plain = int(frame.color_trc) not in (16, 18) and frame.side_data.get("DISPLAYMATRIX") is None  # PQ, HLG
                if not plain or matrix not in _MATRIX or h % 2 or w % 2:
                    return None
                clip = np.empty((min(stream.frames or 32, 256), h * 3 // 2, w), np.uint8)  # headers may lie
            if pixels not in ("yuv420p", "yuvj420p") or clip.shape[1:] != (h * 3 // 2, w):
                return None
            if index == len(clip):
                clip = np.concatenate([clip, np.empty_like(clip)])
            begin = 0
            for plane, (rows, columns) in zip(frame.planes, ((h, w), (h // 2, w // 2), (h // 2, w // 2)), strict=True):
                coded = np.frombuffer(plane, np.uint8).reshape(rows, plane.line_size)  # type: ignore[call-overload]
                end = begin + rows * columns
                clip[index].reshape(-1)[begin:end].reshape(rows, columns)[:] = coded[:, :columns]
                begin = end
            count = index + 1
    if count == 0:
        raise ValueError(f"{_name(source)} has no frames")
    return clip[:count], _MATRIX[matrix], full


# --- Writing ------------------------------------------------------------------------------------------------------


def write_video(path: str | Path, frames: Frames | Iterable[Frames], fps: float, lossless: bool = False) -> None:
    """Writes an mp4 for any player, or with `lossless` an mkv that reads back bit for bit.

    mp4 is H.264 at crf 17, BT.709, with its index first. Its colours are halved in both directions (yuv420p), which
    only even sizes allow; a clip of odd height or width keeps its exact size with full colours (yuv444p), which players
    built on FFmpeg show and many hardware decoders do not. mkv is FFV1 in RGB.

    Args:
        frames: uint8 `t h w 3`, or `t h w 1` for grey; or its chunks in order, each encoded before the next is asked
            for, so that the clip need not fit into memory. The file does not depend on how it is cut.
        fps: frames/s, 0.01 to 1000, stored as a fraction with a denominator of at most 1001.
    Raises:
        ValueError: frames or fps are none of these, or the path does not end in .mp4 (.mkv if lossless).
        Exception: what the iterator of chunks raises. No file is left then.
    """
    suffix = ".mkv" if lossless else ".mp4"
    require(Path(path).suffix.lower() == suffix, "path", str(path), f"a file name ending in {suffix}")
    rate, (size, pictures) = _rate(fps), _pictures(frames)
    with replacing(path) as temporary:
        _encode(temporary, size, pictures, rate, lossless)


def encode_video(frames: Frames | Iterable[Frames], fps: float, lossless: bool = False) -> bytes:
    """The bytes of the file that `write_video` writes: the same clip gives the same, on any number of cores."""
    rate, (size, pictures) = _rate(fps), _pictures(frames)
    # A real file, since FFmpeg moves the index to the front by opening what it has written once more.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        _encode(path, size, pictures, rate, lossless)
        return path.read_bytes()


def _rate(fps: float) -> Fraction:
    require(0.01 <= fps <= 1000, "fps", fps, "0.01 to 1000 frames/s")
    return Fraction(float(fps)).limit_denominator(1001)


def _pictures(frames: Frames | Iterable[Frames]) -> tuple[tuple[int, int], Iterator[Frames]]:
    """The size (h, w) and the pictures `h w 3` of a clip or of its chunks, of which only the first is asked for here."""
    chunks = map(_as_rgb, [frames] if isinstance(frames, np.ndarray) else frames)
    first = next(chunks, None)
    if first is None:
        raise ValueError("frames is an iterator without chunks, allowed: at least one chunk")
    return first.shape[1:3], itertools.chain.from_iterable(itertools.chain([first], chunks))


def _encode(path: Path, size: tuple[int, int], pictures: Iterable[Frames], rate: Fraction, lossless: bool) -> None:
    h, w = size
    if lossless:
        # Level 1 has no slices; those of level 3 refuse a clip one pixel wide.
        container_format, codec, pixel_format, options = "matroska", "ffv1", "bgr0", {"level": "1"}
    else:
        # One thread: x264's output depends on their number. With its macroblock tree, which spreads bits over time, 57 of
        # 9,850 encodings of the same small clips had other bytes than the rest; without it, none of 6,818.
        container_format, codec, options = "mp4", "libx264", {"crf": "17", "threads": "1", "mbtree": "0"}
        pixel_format = "yuv420p" if h % 2 == w % 2 == 0 else "yuv444p"
    # Without bitexact Matroska writes a random identifier. "file:" keeps FFmpeg from reading a protocol out of a name.
    flags = {"fflags": "+bitexact"} if lossless else {"fflags": "+bitexact", "movflags": "+faststart"}
    with av.open(f"file:{path}", "w", format=container_format, options=flags) as container:
        _encode_into(container, size, pictures, rate, codec, pixel_format, options)


def _encode_into(
    container: OutputContainer,
    size: tuple[int, int],
    pictures: Iterable[Frames],
    rate: Fraction,
    codec: str,
    pixel_format: str,
    options: dict[str, str],
) -> None:
    stream = container.add_stream(codec, rate=rate, options=options)
    assert isinstance(stream, VideoStream)
    stream.height, stream.width = size
    stream.pix_fmt = pixel_format
    context, in_yuv = stream.codec_context, pixel_format.startswith("yuv")
    if in_yuv:
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    for picture in pictures:
        # FFmpeg would scale it.
        require(picture.shape[:2] == size, "size of frames", picture.shape[:2], f"that of the first chunk, {size}")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        if in_yuv:
            frame = frame.reformat(
                format=pixel_format, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, **_EXACT
            )
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def encode_h264(frames: Frames, fps: float, crf: float) -> tuple[Frames, int]:
    """What H.264 makes of a clip at one quality: libx264, full colours (yuv444p), preset slow, tuned for PSNR.

    Args:
        frames: uint8 `t h w 3`, or `t h w 1` for grey.
        crf: 0 (near lossless) to 51, in steps of any size.

    Returns:
        The decoded frames, uint8 `t h w 3`, and the bytes of the stream: parameter sets and pictures, without the
        container and without the text in which x264 notes its own settings.
    Raises:
        ValueError: an argument is none of these.
    """
    rate, (size, pictures) = _rate(fps), _pictures(frames)
    require(0 <= crf <= 51, "crf", crf, "0 to 51")
    options = {"crf": f"{crf:.3f}", "preset": "slow", "tune": "psnr", "threads": "1"}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="h264") as container:
        _encode_into(container, size, pictures, rate, "libx264", "yuv444p", options)
    # NAL units (ITU-T H.264, 7.3.1 and B.1) begin with 00 00 01; type 6 is supplemental information, not a picture.
    units = buffer.getvalue().split(b"\0\0\1")[1:]
    stream = b"".join(b"\0\0\1" + unit for unit in units if unit[0] & 31 != 6)
    return read_video(stream)[0], len(stream)


def write_gif(path: str | Path, frames: Frames, fps: float, scale: int = 1) -> None:
    """Writes a GIF that loops for ever, enlarged `scale` times without smoothing.

    Grey clips keep every level; colours are reduced to 256 a frame. A frame equal to the one before it is stored as a
    longer delay. GIF counts time in 1/100 s: the delays differ by that much, and their sum is right.

    Args:
        frames: uint8 `t h w 3`, or `t h w 1` for grey.
        fps: frames/s, 0.01 to 50: players slow down what is faster.
    Raises:
        ValueError: an argument is none of these, or the path does not end in .gif.
    """
    require(Path(path).suffix.lower() == ".gif", "path", str(path), "a file name ending in .gif")
    require(0.01 <= fps <= 50, "fps", fps, "0.01 to 50 frames/s")
    frames = _enlarge(_as_rgb(frames), scale)
    if (frames == frames[..., :1]).all():
        frames = frames[..., 0]
    delays = np.diff((np.arange(len(frames) + 1) * 100 / fps).round()).astype(int) * 10  # milliseconds
    first, *rest = [Image.fromarray(f) for f in frames]
    with replacing(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=rest, duration=delays.tolist(), loop=0)


def _as_rgb(frames: Frames) -> Frames:
    """Checks frames and repeats grey: uint8 `t h w 1|3` -> `t h w 3`."""
    good = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] in (1, 3) and 0 not in frames.shape
    require(good, "frames", f"{frames.dtype} {frames.shape}", "uint8 t h w 3 (RGB) or t h w 1 (grey), not empty")
    return np.broadcast_to(frames, (*frames.shape[:3], 3))


def _enlarge(frames: Frames, scale: int) -> Frames:
    require(scale >= 1, "scale", scale, "1 or more")
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


# --- Looking ------------------------------------------------------------------------------------------------------


_MARGIN, _GAP, _BORDER, _LEGEND_WIDTH = 10, 3, 3, 170  # pixels
_PLAIN, _GIVEN, _GENERATED = (150, 150, 150), (0, 150, 60), (240, 130, 0)
_LABEL_LETTERS = 28  # longer labels, such as captions, are wrapped

Row = tuple[str, Frames] | tuple[str, Frames, NDArray[np.bool_]]
"""A label, its frames uint8 `t h w 3` or `t h w 1`, and perhaps bool `t`: which frames were given."""


def contact_sheet(
    rows: Sequence[Row], path: str | Path, title: str = "", scale: int = 1, columns: int | None = None
) -> None:
    """Writes one PNG with a clip a row, its label on the left and the frames' numbers above.

    A column is the same frame number in every row, so clips can be compared; the longest sets the columns, and shorter
    ones end early. Rows that say which frames were given have them framed in green and the generated ones in orange.

    Args:
        scale: enlarges the frames this many times without smoothing.
        columns: shows at most this many frames, evenly spaced from the first to the last; None shows all.
    Raises:
        ValueError: no rows, frames of another kind, `given` of another length, or the path does not end in .png.
    """
    require(Path(path).suffix.lower() == ".png", "path", str(path), "a file name ending in .png")
    require(len(rows) > 0, "rows", rows, "at least one row")
    require(columns is None or columns >= 1, "columns", columns, "1 or more, or None for all frames")
    clips = [_enlarge(_as_rgb(row[1]), scale) for row in rows]
    givens = [row[2] if len(row) == 3 else None for row in rows]
    for clip, given in zip(clips, givens, strict=True):
        if given is not None:
            good = given.dtype == bool and given.shape == (len(clip),)
            require(good, "given", f"{given.dtype} {given.shape}", f"bool {(len(clip),)}, one for each frame")
    longest = max(map(len, clips))
    numbers = np.linspace(0, longest - 1, min(columns or longest, longest)).round().astype(int).tolist()

    title_font, label_font, number_font = (ImageFont.load_default(size) for size in (20, 16, 12))
    labels = ["\n".join(textwrap.fill(line, _LABEL_LETTERS) for line in row[0].splitlines()) for row in rows]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [measure.multiline_textbbox((0, 0), label, font=label_font) for label in labels]
    has_legend = any(given is not None for given in givens)
    cell = max(*(clip.shape[2] for clip in clips), round(number_font.getlength(str(longest)))) + 2 * _BORDER + _GAP
    heights = [max(c.shape[1] + 2 * _BORDER, round(box[3])) + _GAP for c, box in zip(clips, boxes, strict=True)]
    left = _MARGIN + max(round(box[2]) for box in boxes) + _MARGIN
    width = max(left + cell * len(numbers), _MARGIN + round(title_font.getlength(title)), _LEGEND_WIDTH * has_legend)
    top = _MARGIN + 30 * bool(title) + 20 * has_legend + 16
    sheet = Image.new("RGB", (width + _MARGIN, top + sum(heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)

    draw.text((_MARGIN, _MARGIN), title, "black", title_font)
    if has_legend:
        y = _MARGIN + 30 * bool(title)
        for x, word, colour in ((_MARGIN, "given", _GIVEN), (_MARGIN + 70, "generated", _GENERATED)):
            draw.rectangle((x, y + 2, x + 10, y + 12), outline=colour, width=_BORDER)
            draw.text((x + 16, y), word, "black", number_font)
    for column, number in enumerate(numbers):
        x = left + column * cell
        draw.text((x + (cell - _GAP) / 2, top - 3), str(number), "black", number_font, anchor="ms")
    for label, clip, given, height in zip(labels, clips, givens, heights, strict=True):
        _, h, w, _ = clip.shape
        draw.multiline_text((_MARGIN, top), label, "black", label_font)
        for column, number in enumerate(n for n in numbers if n < len(clip)):
            x = left + column * cell
            colour = _PLAIN if given is None else _GIVEN if given[number] else _GENERATED
            draw.rectangle((x, top, x + w + 2 * _BORDER - 1, top + h + 2 * _BORDER - 1), outline=colour, width=_BORDER)
            sheet.paste(Image.fromarray(clip[number]), (x + _BORDER, top + _BORDER))
        top += height
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")


def difference(a: Frames, b: Frames) -> Frames:
    """How far two clips of the same size lie apart, |a - b|, as frames uint8 `t h w 3` for a sheet."""
    a, b = _as_rgb(a), _as_rgb(b)
    require(a.shape == b.shape, "b", b.shape, f"the shape of a, {a.shape}")
    return np.maximum(a, b) - np.minimum(a, b)
