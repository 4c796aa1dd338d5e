"""Scene cuts, measures of clips and the search for duplicates."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_shard_videos import moving

from stgen import video
from stgen.data.filters import HASH_BITS, Duplicates, measure, perceptual_hash
from stgen.data.natural import packaged_videos
from stgen.data.scenes import number_scenes

# --- Scenes -------------------------------------------------------------------------------------------------------


def cuts(source, threshold: float = 3.0) -> list[int]:
    """The first frames of all scenes but the first; checks that every frame comes out, in order."""
    numbered = [(frame.index, scene) for frame, scene in number_scenes(video.stream_frames(source), threshold)]
    assert [index for index, _ in numbered] == list(range(len(numbered)))
    return [b[0] for a, b in itertools.pairwise(numbered) if b[1] != a[1]]


def film(*scenes: np.ndarray) -> bytes:
    return video.encode_video(np.concatenate(scenes), 25)


def test_cuts_of_real_video_are_where_they_are() -> None:
    paths = {path.name: path for split in ("train", "heldout") for path, _, _ in packaged_videos(split)}
    # What PySceneDetect 0.7.2 finds with AdaptiveDetector(min_scene_len=0).
    assert cuts(paths["bikes.mp4"]) == [30, 76, 137, 187, 242]
    assert cuts(paths["carphone_pristine.mp4"]) == []
    pictures = [
        [frame.rgb(144, 176) for frame in itertools.islice(video.stream_frames(paths[name]), first, end)]
        for name, first, end in (("bikes.mp4", 35, 70), ("carphone_pristine.mp4", 20, 57), ("bikes.mp4", 190, 240))
    ]
    assert cuts(film(*map(np.stack, pictures))) == [35, 35 + 37]


def test_close_and_late_cuts_are_found_and_motion_is_none() -> None:
    assert cuts(film(moving(8, seed=1), moving(2, seed=2), moving(8, seed=3))) == [8, 10]
    assert cuts(film(moving(8, seed=1), moving(1, seed=2))) == [8]
    assert cuts(film(moving(1, seed=1), moving(8, seed=2))) == [1]
    assert cuts(film(moving(1, seed=1), moving(1, seed=2))) == [1]
    assert cuts(film(moving(1))) == []
    assert cuts(film(moving(12, speed=4))) == []
    fade = np.linspace(1, 0.2, 12)[:, None, None, None]
    assert cuts(film((moving(12) * fade).astype(np.uint8))) == []
    assert cuts(film(moving(8, seed=1), moving(8, seed=2)), threshold=1e9) == []


# --- Measures -----------------------------------------------------------------------------------------------------


def test_motion_is_the_mean_difference_of_luma() -> None:
    steps = np.array([10, 14, 11, 11])[:, None, None, None]
    clip = np.broadcast_to(steps, (4, 20, 30, 3)).astype(np.uint8)
    assert measure(clip).motion == pytest.approx((4 + 3 + 0) / 3)
    assert measure(clip[:1]).motion is None
    half = clip.copy()
    half[:, :, :15] = 0
    assert measure(half).motion == pytest.approx((4 + 3 + 0) / 6, rel=0.1)
    slow, fast = (measure(moving(8, speed=speed)).motion for speed in (1, 3))
    assert slow is not None
    assert fast is not None
    assert 1 < slow < fast


def test_black_frames_are_counted() -> None:
    clip = moving(8) // 2 + 60
    clip[:3] = 20
    clip[3] = 30
    assert measure(clip).black == 3 / 8
    clip[0, :8, :8] = 255  # more than 2% of it
    assert measure(clip).black == 2 / 8


def test_a_hash_survives_what_encoding_does_and_tells_clips_apart() -> None:
    hashes = {}
    for seed in range(12):
        clip = moving(9, 64, 96, seed)
        small = np.stack([np.asarray(Image.fromarray(f).resize((60, 40), Image.Resampling.BILINEAR)) for f in clip])
        noisy = small + np.random.default_rng(seed).normal(0, 6, small.shape) + 12
        original, again = (measure(c).hash for c in (clip, noisy.clip(0, 255).astype(np.uint8)))
        assert (original ^ again).bit_count() <= 10
        hashes[seed] = original
    assert min((a ^ b).bit_count() for a, b in itertools.combinations(hashes.values(), 2)) > 40
    assert max(hashes.values()) < 1 << HASH_BITS
    # Half of the frequencies lie above the median.
    assert perceptual_hash(np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.int16)).bit_count() == 32


@settings(max_examples=60, deadline=None)
@given(
    distance=st.integers(0, 12),
    seed=st.integers(0, 2**32),
    scenes=st.integers(1, 30),
)
def test_the_first_duplicate_is_found_as_by_comparing_all(distance: int, seed: int, scenes: int) -> None:
    rng = np.random.default_rng(seed)
    originals = [int.from_bytes(rng.bytes(HASH_BITS // 8), "big") for _ in range(4)]
    clips = []
    for _ in range(40):
        bits = originals[rng.integers(4)]
        for place in rng.integers(0, HASH_BITS, rng.integers(0, 2 * distance + 2)):
            bits ^= 1 << int(place)
        clips.append((bits, int(rng.integers(scenes))))
    index, kept = Duplicates(distance), []
    for number, (bits, scene) in enumerate(clips):
        near = [(key, (bits ^ b).bit_count(), s) for key, b, s in kept if (bits ^ b).bit_count() <= distance]
        others = [(key, d) for key, d, s in near if s != scene]
        assert index.find_or_add(bits, str(number), scene) == (others[0] if others else None)
        if not near:  # one that its own scene stands for is kept, but need not be found again
            kept.append((str(number), bits, scene))


def test_the_search_is_near_linear() -> None:
    """A quiet scene of many clips is one entry, and of strangers few are compared."""
    index = Duplicates(10)
    for i in range(2000):
        assert index.find_or_add(5, f"quiet-{i}", "scene") is None
    assert len(index._seen) == 1
    rng = np.random.default_rng(0)
    for i in range(3000):
        assert index.find_or_add(int.from_bytes(rng.bytes(HASH_BITS // 8), "big"), str(i), i) is None
    sizes = [len(members) for members in index._bands.values()]
    assert sum(size**2 for size in sizes) / len(index._seen) < 11 * 1.3, "bands have hardly more than one member"
