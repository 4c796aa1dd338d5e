"""What is measured of a clip, and the search for clips that were seen before.

Clips are uint8 `t h w 3`: t frames, h height and w width in pixels. All measures are of the clip as it will be trained
on, its luma made small, so that they depend on neither the file's size nor its codec.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SMALL = 32  # pixels: the side of the picture that motion and blackness are measured on

KEY_FRAMES = 3
HASH_BITS = 64 * KEY_FRAMES


@dataclass(frozen=True)
class ClipMeasures:
    motion: float | None
    """Mean absolute difference of luma from frame to frame, 0 to 255; None for a single frame."""
    black: float
    """Share of frames that are black, 0 to 1: those of which 98% of the places are darker than 10% of white, FFmpeg's
    blackdetect."""
    hash: int
    """`HASH_BITS` bits: the perceptual hashes of the first, the middle and the last frame."""


def measure(clip: NDArray[np.uint8]) -> ClipMeasures:
    """Motion, blackness and perceptual hash of a clip `t h w 3`."""
    size, box = (_SMALL, _SMALL), Image.Resampling.BOX
    luma = np.stack([np.asarray(Image.fromarray(f).convert("L").resize(size, box), np.int16) for f in clip])
    motion = float(np.abs(np.diff(luma, axis=0)).mean()) if len(clip) > 1 else None
    dark = (luma < 0.1 * 255).mean(axis=(1, 2))
    bits = 0
    for i in (0, (len(clip) - 1) // 2, len(clip) - 1):
        bits = bits << 64 | perceptual_hash(luma[i])
    return ClipMeasures(motion, float((dark >= 0.98).mean()), bits)


_COSINES = np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(_SMALL) + 1) / (2 * _SMALL))


def perceptual_hash(luma: NDArray[np.int16]) -> int:
    """64 bits of a picture `32 32`: which of its 8x8 lowest frequencies (DCT-II) lie above their median.

    Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", with the median of the ImageHash
    library. On 42 clips of 4 videos, halved in size and encoded again at crf 36, at most 8 of 192 bits changed, where 12
    is the nearest that two clips of one video come; the difference hash of gradients has 16 and 7.
    """
    frequencies = (_COSINES @ luma @ _COSINES.T).round(3).ravel()  # beyond that, arithmetic differs between machines
    return int.from_bytes(np.packbits(frequencies > np.median(frequencies)).tobytes(), "big")


class Duplicates:
    """Hashes seen so far; finds the first within a Hamming distance without looking at all of them.

    Cut into `distance` + 1 bands, two hashes within that distance agree in one band at least, so only those that share a
    band are compared (Manku, Jain, Das Sarma 2007, doi:10.1145/1242572.1242592).
    """

    def __init__(self, distance: int) -> None:
        self.distance = distance
        self._bands: dict[tuple[int, int], list[int]] = {}
        self._seen: list[tuple[int, str, object]] = []

    def find_or_add(self, bits: int, key: str, group: object) -> tuple[str, int] | None:
        """The key of the first clip of another group within the distance, and its distance; None if there is none.

        Clips of one group, a scene, are not each other's duplicates: a quiet scene looks the same all the time. Such a
        clip is not added either if one of its scene stands for it, so that an endless quiet scene is searched fast.
        """
        bands = list(self._cut(bits))
        represented = False
        for i in sorted({i for band in bands for i in self._bands.get(band, ())}):
            other, other_key, other_group = self._seen[i]
            distance = (bits ^ other).bit_count()
            if distance <= self.distance:
                if other_group != group:
                    return other_key, distance
                represented = True
        if not represented:
            for band in bands:
                self._bands.setdefault(band, []).append(len(self._seen))
            self._seen.append((bits, key, group))
        return None

    def _cut(self, bits: int) -> Iterator[tuple[int, int]]:
        count = self.distance + 1
        edges = [HASH_BITS * i // count for i in range(count + 1)]
        for i, (low, high) in enumerate(itertools.pairwise(edges)):
            yield i, bits >> low & (1 << high - low) - 1
