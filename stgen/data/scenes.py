"""Where a video cuts from one scene to another: PySceneDetect's adaptive detector, on small pictures, as a stream.

PySceneDetect (Castellano, BSD-3) itself needs the OpenCV wheel, 60 MB, for what is a mean of absolute differences; so its
definition is followed here, as Open-Sora's data pipeline uses it (`AdaptiveDetector`, threshold 3). Three things differ:
a change is compared with the median of those around it, so that two cuts close together do not hide each other; at the
ends of a video, where the window is cut off, cuts are found too; and no scene is too short, since what is shorter than a
clip gives none. Dissolves and fades are not found.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from statistics import median

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stgen.video import DecodedFrame

THRESHOLD = 3.0
"""PySceneDetect's default of `adaptive_threshold`: how many times as much a cut changes as the frames around it do."""

SMALLEST_CHANGE = 15.0
"""Its `min_content_val`: what changes less than this is no cut, of 255."""

WINDOW = 2
"""Its `window_width`: frames before and after a change that it is compared with."""

PIXELS = 128
"""The longer side of the picture that is looked at."""


def content(frame: DecodedFrame) -> NDArray[np.int16]:
    """What is compared: hue (0 to 179), saturation and value (0 to 255) of the frame made small, `h w 3`."""
    scale = min(1.0, PIXELS / max(frame.height, frame.width))
    rgb = frame.rgb(max(1, round(frame.height * scale)), max(1, round(frame.width * scale)))
    hsv = np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).convert("HSV"), np.int16)
    hsv[..., 0] = hsv[..., 0] * 180 // 256  # Pillow's circle has 256 degrees, OpenCV's, and the thresholds, 180
    return hsv


def number_scenes(frames: Iterable[DecodedFrame], threshold: float = THRESHOLD) -> Iterator[tuple[DecodedFrame, int]]:
    """Each frame with the number of its scene, 0, 1, ..., `WINDOW` frames after it was read.

    A frame begins a scene if it differs from the one before by `SMALLEST_CHANGE` or more, and by `threshold` times the
    median change of the `WINDOW` frames before and after it.
    """
    scene, before = 0, None
    changes: deque[float] = deque(maxlen=2 * WINDOW + 1)
    waiting: deque[DecodedFrame] = deque()

    def begins(i: int) -> bool:
        around = [c for j, c in enumerate(changes) if j != i and abs(j - i) <= WINDOW and not math.isnan(c)]
        return changes[i] >= SMALLEST_CHANGE and changes[i] >= threshold * (median(around) if around else 0)

    for frame in frames:
        now = content(frame)
        changes.append(math.nan if before is None else float(np.abs(now - before).mean()))
        before = now
        waiting.append(frame)
        if len(waiting) > WINDOW:
            scene += begins(len(changes) - 1 - WINDOW)
            yield waiting.popleft(), scene
    for left in range(len(waiting), 0, -1):
        scene += begins(len(changes) - left)
        yield waiting.popleft(), scene
