"""Clips as the planes that decoders give, YUV 4:2:0, and their conversion to RGB, late: on the device that trains.

Conversion and copying are more than half of what it costs to read a small clip with FFmpeg, and planes are half the bytes.
All arithmetic is of multiples of 2^-14 small enough for float32 to hold, so RGB is the same to the bit on every device and
in any batch. Of libswscale with its most careful flags (`stgen.video.read_video`), 99% of the values are the same and none is
more than one level off.

Shapes: b clips, c = 3 channels, t frames, h height and w width in pixels, even; r = 3 h / 2 rows of planes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MATRICES = ("bt601", "bt709")
"""Coefficients (kr, kb) of ITU-R BT.601 and BT.709 in `_KR_KB`, by the number that a clip's `matrix` is twice of."""
_KR_KB = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
_SCALE = (
    2048  # of coefficients: the largest sum is 4.9e6 of luma and 4.5e6 of chroma, below the 2^24 that float32 holds
)


class YUV420(NamedTuple):
    """A clip, or a batch of clips of one shape."""

    planes: Tensor
    """uint8 `t r w` or `b t r w`: h rows of luma, then both planes of chroma, h/2 by w/2, one behind the other (I420)."""
    matrix: Tensor
    """uint8, a number or `b`: twice the place in MATRICES, plus 1 where levels are full (0..255, not 16..235)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the RGB which it becomes, `c t h w` or `b c t h w`."""
        *b, t, r, w = self.planes.shape
        return *b, 3, t, 2 * r // 3, w

    def to(self, device: torch.device | str | None) -> "YUV420":
        return YUV420(self.planes.to(device), self.matrix.to(device))


def from_planes(planes: np.ndarray, matrix: str, full_range: bool) -> YUV420:
    """What `stgen.video.read_yuv420` gives, as tensors."""
    return YUV420(torch.from_numpy(planes), torch.tensor(2 * MATRICES.index(matrix) + full_range, dtype=torch.uint8))


def _coefficients(device: torch.device) -> Tensor:
    """For each number of `YUV420.matrix`: of luma; of V in R, U in G, V in G, U in B; and the level of black."""
    rows = []
    for name in MATRICES:
        kr, kb = _KR_KB[name]
        kg = 1 - kr - kb
        for luma, chroma, black in ((255 / 219, 255 / 224, 16), (1.0, 1.0, 0)):
            red, blue = 2 * (1 - kr) * chroma, 2 * (1 - kb) * chroma
            factors = (luma, red, -blue * kb / kg, -red * kr / kg, blue)
            rows.append([*(round(factor * _SCALE) / _SCALE for factor in factors), black])
    return torch.tensor(rows, dtype=torch.float32, device=device)


def to_rgb(clip: Tensor | YUV420) -> Tensor:
    """uint8 `c t h w` or `b c t h w` of a clip or batch; RGB is returned as it is.

    Chroma lies on the left of each pair of columns and between both rows of each pair, as in MPEG-2 and H.264, and is
    interpolated bilinearly.
    """
    if isinstance(clip, Tensor):
        return clip
    planes, matrix = clip
    if planes.ndim == 3:
        return to_rgb(YUV420(planes[None], matrix[None]))[0]
    b, t, r, w = planes.shape
    frames = planes.reshape(b * t, r, w)
    factors = _coefficients(planes.device)[matrix.long()].repeat_interleave(t, 0)
    rgb = torch.empty(b, 3, t, 2 * r // 3, w, dtype=torch.uint8, device=planes.device)
    # A processor converts what its cache holds at a time, a GPU what fills it.
    size = max(1, (2**18 if planes.device.type == "cpu" else 2**24) // (w * r))
    for clip_of, first in ((i, j) for i in range(b) for j in range(0, t, size)):
        part = slice(clip_of * t + first, clip_of * t + min(first + size, t))
        rgb[clip_of, :, first : first + size] = _convert(frames[part], factors[part, :, None, None])
    return rgb


def _convert(frames: Tensor, factors: Tensor) -> Tensor:
    """Frames `n r w` and their coefficients `n 6 1 1` to levels `c n h w`, float32 in 0..255, to be cut to integers."""
    n, r, w = frames.shape
    h = 2 * r // 3
    luma, v_red, u_green, v_green, u_blue, black = factors.unbind(1)
    u, v = frames[:, h:].reshape(n, 2, h // 2, w // 2).float().sub_(128).unbind(1)
    # Each channel's share of chroma is added up before it is enlarged. Rows are 1/4 and 3/4 of their two neighbours ...
    chroma = torch.stack([v * v_red, u * u_green + v * v_green, u * u_blue])
    chroma *= 0.25
    rows = (3 * chroma)[:, :, :, None].repeat(1, 1, 1, 2, 1)
    above, below = rows.unbind(3)
    above[:, :, 1:] += chroma[:, :, :-1]
    above[:, :, :1] += chroma[:, :, :1]
    below[:, :, :-1] += chroma[:, :, 1:]
    below[:, :, -1:] += chroma[:, :, -1:]
    rows = rows.view(3, n, h, w // 2)
    # ... and columns are their chroma, or halfway to the next.
    levels = torch.empty(3, n, h, w // 2, 2, device=frames.device)
    levels[..., 0] = rows
    levels[..., -1, 1] = rows[..., -1]
    rows *= 0.5
    torch.add(rows[..., :-1], rows[..., 1:], out=levels[..., :-1, 1])
    levels = levels.view(3, n, h, w)
    levels += (frames[:, :h].float() - black).mul_(luma).add_(0.5)  # so that cutting rounds
    return levels.clamp_(0, 255)


def to_pixels(clip: Tensor | YUV420, device: torch.device | str | None = None) -> Tensor:
    """A clip or batch as float32 RGB in [-1, 1], `c t h w` or `b c t h w`, moved to `device` before it is converted."""
    return to_rgb(clip.to(device)).float() / 127.5 - 1


def stack_clips(clips: Sequence[Tensor | YUV420]) -> Tensor | YUV420:
    """Clips of one shape as a batch: planes if all are planes, else RGB."""
    planes = [clip for clip in clips if isinstance(clip, YUV420)]
    if len(planes) == len(clips):
        return YUV420(torch.stack([p.planes for p in planes]), torch.stack([p.matrix for p in planes]))
    return torch.stack([to_rgb(clip) for clip in clips])
