"""How far the reader of `stgen.digits` can be trusted: what it finds in true clips of held-out digits.

    python tests/bench/digit_reader.py                         # 256 clips of two digits at 64x64
    python tests/bench/digit_reader.py --size 32 --digits 1    # those of configs/moving_mnist_32

Some clips cannot be read for certain, and are counted: digits that lie over each other in every frame, and first steps
within 3 degrees of the border between two directions.
"""

import argparse
import time
from dataclasses import fields

import numpy as np
import torch

from stgen.data.moving_mnist import CANVAS, DIGIT, draw_scene, make_clip
from stgen.digits import CaptionScore, DigitNet, accuracy, read_clip, score_captions


def is_on_border(path: np.ndarray) -> bool:
    dy, dx = path[1] - path[0]
    return abs(np.degrees(np.arctan2(dy, dx)) % 45 - 22.5) < 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--digits", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wrong", action="store_true", help="list the clips that are read otherwise than captioned")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    net = DigitNet.pretrained()
    print(f"single held-out digits: {accuracy(net):.1%}")
    tracks, captions, covered, border = [], [], 0, 0
    began = time.perf_counter()
    for index in range(arguments.clips):
        clip, caption = make_clip("heldout", arguments.seed, index, arguments.size, arguments.digits)
        scene, _ = draw_scene("heldout", arguments.seed, index, arguments.digits)
        read = read_clip(net, clip.astype(np.float32) / 255, arguments.digits)
        tracks.append(read)
        captions.append(caption)
        paths = np.stack([path for _, _, path in scene]) * (CANVAS - DIGIT)
        covered += len(paths) > 1 and bool(np.abs(paths[0] - paths[1]).max(-1).max() < 10)
        borders = [is_on_border(path) for _, _, path in scene]
        border += sum(borders)
        if arguments.wrong and score_captions([read], [caption]).whole < 1:
            found = [f"{t.label} {t.direction} ({t.confidence:.2f})" for t in read]
            print(f"{index}: {caption}: {', '.join(found)}{' (border)' * any(borders)}")
    seconds = (time.perf_counter() - began) / arguments.clips
    score = score_captions(tracks, captions)
    for field in fields(CaptionScore):
        print(f"{field.name:22s}{getattr(score, field.name):.1%}")
    print(f"one over the other in every frame: {covered} clips; within 3 degrees of a border: {border} digits")
    print(f"{seconds:.2f} s a clip")


if __name__ == "__main__":
    main()
