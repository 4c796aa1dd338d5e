"""Speed, exactness and memory of the VAE beside diffusers' Wan and CogVideoX, at equal channels and compression.

    python tests/bench/vae_speed.py                  # 17x64x64 pixels, one CPU thread, fp32
    python tests/bench/vae_speed.py --exactness [--vae DIR --video FILE]    # chunks and tiles against the whole
    python tests/bench/vae_speed.py --memory         # peak memory by number of frames, each in a process of its own
    python tests/bench/vae_speed.py --device cuda --dtype bfloat16 --clip 33,256,256

All models run in turns within one process, round after round, and the best time of each counts: other work on the machine
then hurts all alike. `fraction` is the convolution and matrix FLOPs over the time, over the rate of one big matrix product
(2048^3 on a CPU, 8192^3 on a GPU) timed in the same rounds. Widths are 32, 64, 128, 128 and compression 4x8x8 throughout.
"""

import argparse
import itertools
import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformer_speed import peak_kib, seconds

from stgen import AutoencoderKLSTGen
from stgen.data.color import to_pixels
from stgen.video import stream_video

WIDTHS = (32, 64, 128, 128)


def wan() -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=32, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2)


def cogvideox() -> AutoencoderKLCogVideoX:
    stage = ("CogVideoXDownBlock3D",) * 4, ("CogVideoXUpBlock3D",) * 4
    return AutoencoderKLCogVideoX(
        down_block_types=stage[0],
        up_block_types=stage[1],
        block_out_channels=WIDTHS,
        layers_per_block=2,
        latent_channels=16,
    )


def stgen(**arguments) -> AutoencoderKLSTGen:
    depth = {"layers_per_block": 2, "decoder_layers_per_block": 3}
    return AutoencoderKLSTGen(block_out_channels=WIDTHS, latent_channels=16, **depth, mid_attention=True, **arguments)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "diffusers Wan": wan,
    "diffusers CogVideoX": cogvideox,
    "stgen": stgen,
    "stgen, time halved late": lambda: stgen(temporal_downsample=(False, True, True)),
    "stgen, strided convolutions": lambda: stgen(resample="conv"),
}
"""Of about equal parameters, attention in the middle where Wan has it. Wan halves time in its last two steps, CogVideoX
and we in the first two."""


def prepare(name: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().to(device, dtype).eval().requires_grad_(False)
    for parameter in model.parameters():  # what begins at zero must not make the work easier, nor blow the values up
        if not parameter.any():
            parameter.normal_(std=0.02)
    return model


def encode(model: torch.nn.Module, x: Tensor) -> Tensor:
    return model.encode(x).latent_dist.mode()


def decode(model: torch.nn.Module, z: Tensor) -> Tensor:
    return model.decode(z).sample


def speed(clip: tuple[int, int, int], rounds: int, device: str, dtype: torch.dtype, threads: int) -> None:
    video = (torch.rand(1, 3, *clip, device=device) * 2 - 1).to(dtype)
    works: dict[tuple[str, str], Callable[[], object]] = {}
    flops, parameters = {}, {}
    for name in MODELS:
        model = prepare(name, device, dtype)
        latents = encode(model, video)
        for kind, work, argument in (("encode", encode, video), ("decode", decode, latents)):
            with FlopCounterMode(display=False) as counter:
                work(model, argument)
            works[name, kind] = lambda work=work, model=model, argument=argument: work(model, argument)
            flops[name, kind] = counter.get_total_flops()
        parameters[name] = sum(p.numel() for p in model.parameters())
    side = 8192 if device == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    best, product = dict.fromkeys(works, float("inf")), float("inf")
    for _ in range(rounds):
        product = min(product, *(seconds(lambda: a @ a, device) for _ in range(3)))
        for key, work in works.items():
            best[key] = min(best[key], seconds(work, device))
    rate = 2 * side**3 / product
    print(f"{clip} pixels, {dtype} on {device}, {threads} thread(s); GEMM {rate / 1e9:.0f} GFLOP/s")
    print(f"{'':30s} {'':8s} {'M param.':>8s} {'GFLOP':>8s} {'ms':>8s} {'frames/s':>8s} {'fraction':>8s} {'x Wan':>8s}")
    for (name, kind), took in best.items():
        row = (parameters[name] / 1e6, flops[name, kind] / 1e9, took * 1e3, clip[0] / took)
        fraction, ratio = flops[name, kind] / took / rate, best["diffusers Wan", kind] / took
        print(f"{name:30s} {kind:8s} " + "".join(f"{x:8.1f} " for x in row) + f"{fraction:8.2f} {ratio:8.2f}")


def exactness(clip: tuple[int, int, int], vae: str | None, path: str | None) -> None:
    """Largest difference of chunks and of tiles from the whole, relative to the largest value of the whole.

    Of random weights and pixels; or of a trained VAE and a video's first frames, its centre as large as `clip`.
    """
    video = torch.rand(1, 3, *clip) * 2 - 1
    if path:
        frames = torch.from_numpy(np.stack(list(itertools.islice(stream_video(path), clip[0]))))
        top, left = ((n - m) // 2 for n, m in zip(frames.shape[1:3], clip[1:], strict=True))
        video = to_pixels(frames.movedim(3, 0))[None, :, :, top : top + clip[1], left : left + clip[2]]
    model = AutoencoderKLSTGen.from_pretrained(vae).eval() if vae else prepare("stgen", "cpu", torch.float32)
    with torch.enable_grad():  # with gradients, clips are worked on whole
        latents = encode(model, video).detach()
        sample = decode(model, latents).detach()
    print(f"{tuple(video.shape[2:])} pixels, largest difference from the whole, relative")
    for chunk in (1, 2, 3):
        pieces = torch.cat(list(model.encode_stream(video, chunk)), dim=2)
        frames = torch.cat(list(model.decode_stream(latents, chunk=chunk)), dim=2)
        print(f"stgen, chunks of {chunk}: encode {off(pieces, latents):.1e}, decode {off(frames, sample):.1e}")
    for tile, stride in itertools.product((64, 128), (0.5, 0.75)):
        model.enable_tiling(tile, tile, int(tile * stride), int(tile * stride))
        pieces, frames = encode(model, video), decode(model, latents)
        psnr = -10 * math.log10(((frames - sample).clamp(-2, 2) / 2).square().mean().item())
        print(
            f"stgen, tiles of {tile}, stride {stride}: encode {off(pieces, latents):.1e}, "
            f"decode {off(frames, sample):.1e} ({psnr:.1f} dB)"
        )
    other = prepare("diffusers CogVideoX", "cpu", torch.float32)
    z = encode(other, video)
    frames = decode(other, z)
    other.num_latent_frames_batch_size = other.num_sample_frames_batch_size = clip[0]
    print(
        f"CogVideoX, its chunks: encode {off(z, encode(other, video)):.1e}, decode {off(frames, decode(other, z)):.1e}"
    )


def off(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def peak_memory(name: str, kind: str, clip: tuple[int, int, int]) -> float:
    """MiB above the model and its input that one call takes, measured in a process of its own.

    The stream is read to its end, and what it gives is dropped, as one that writes to disk does.
    """
    model = prepare(name, "cpu", torch.float32)
    t, h, w = clip
    x = (
        torch.zeros(1, 3, t, h, w)
        if kind.startswith("encode")
        else torch.zeros(1, 16, 1 + (t - 1) // 4, h // 8, w // 8)
    )
    with torch.inference_mode():
        before = peak_kib()
        result = getattr(model, kind)(x)
        if kind.endswith("stream"):
            for _ in result:
                pass
        return (peak_kib() - before) / 1024


def memory(lengths: tuple[int, ...], size: tuple[int, int]) -> None:
    print(f"{size} pixels, MiB above weights and input by number of frames {lengths}")
    for name, kind in itertools.product(MODELS, ("encode", "encode_stream", "decode", "decode_stream")):
        if kind.endswith("stream") and not name.startswith("stgen"):
            continue
        used = []
        for length in lengths:
            run = [sys.executable, __file__, "--memory-of", name, kind, f"{length},{size[0]},{size[1]}"]
            used.append(float(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()[-1]))
        print(f"{name:30s} {kind:14s} " + "".join(f"{x:8.0f}" for x in used), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", help="t,h,w in pixels; 17,64,64 by default, 17,192,192 with --exactness")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--exactness", action="store_true")
    parser.add_argument("--vae", help="with --exactness: folder of a trained VAE instead of random weights")
    parser.add_argument("--video", help="with --exactness: a video instead of random pixels")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clip = tuple(map(int, (arguments.clip or ("17,192,192" if arguments.exactness else "17,64,64")).split(",")))
    if arguments.memory_of:
        name, kind, shape = arguments.memory_of
        print(peak_memory(name, kind, tuple(map(int, shape.split(",")))))
    elif arguments.memory:
        memory((9, 17, 65, 257), clip[1:])
    else:
        with torch.no_grad():
            if arguments.exactness:
                exactness(clip, arguments.vae, arguments.video)
            else:
                speed(clip, arguments.rounds, arguments.device, getattr(torch, arguments.dtype), arguments.threads)


if __name__ == "__main__":
    main()
