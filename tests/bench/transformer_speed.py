"""Speed of the transformer beside diffusers' Latte and Wan at the same width and tokens, as fractions of the GEMM rate.

    python tests/bench/transformer_speed.py                     # forward, 4,096 tokens, one CPU thread
    python tests/bench/transformer_speed.py --train             # forward + backward, 512 tokens
    python tests/bench/transformer_speed.py --memory            # peak memory of a forward, each in a process of its own
    python tests/bench/transformer_speed.py --device cuda --dtype bfloat16 --backends native,flash,xformers

All models run in turns within one process, round after round, and the best time of each counts: other work on the machine
then hurts all alike. `fraction` is the model's matrix FLOPs over its time, over the rate of one big matrix product
(2048^3 on a CPU, 8192^3 on a GPU) timed in the same rounds. `x Latte` is Latte's time over the model's.
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import LatteTransformer3DModel, WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from stgen import STGenTransformer3DModel
from stgen.models.attention import GivenCache

HEADS, HEAD, LAYERS, TEXT, CHANNELS = 6, 64, 12, 64, 4
WIDTH = HEADS * HEAD
SHARED = {
    "in_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
    "num_layers": LAYERS,
    "text_dim": WIDTH,
    "mask_channels": 0,
}
OPEN_SORA = {"rope": "time", "time_positions": None, "cross_norm": False}
LATTE = {
    "qk_norm": None,
    "rope": None,
    "time_positions": "stream",
    "cross_norm": False,
    "cross_attention": ("spatial",),
}

Forward = Callable[[], torch.Tensor]


class Stgen:
    """One of our models, with what its forward takes."""

    def __init__(self, grid: tuple[int, int, int], given: float = 0.0, cached: bool = False, **config) -> None:
        self.model = STGenTransformer3DModel(**SHARED, **config, isolate_given=cached)
        t, h, w = grid
        self.batch = {
            "hidden_states": torch.randn(1, CHANNELS, t, h, w),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, TEXT, WIDTH),
        }
        if given:
            mask = torch.ones(1, 1, t, h, w)
            mask[:, :, : round(given * t)] = 0
            self.batch |= {"condition_latents": torch.randn(1, CHANNELS, t, h, w), "condition_mask": mask}
        self.cache = GivenCache() if cached else None

    def __call__(self) -> torch.Tensor:
        return self.model(**self.batch, given_cache=self.cache).sample


class Latte:
    def __init__(self, grid: tuple[int, int, int]) -> None:
        t, h, w = grid
        self.model = LatteTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=LAYERS // 2,  # each a spatial and a temporal block
            cross_attention_dim=WIDTH,
            attention_bias=True,
            sample_size=h,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=WIDTH,
            video_length=t,
        )
        self.batch = {
            "hidden_states": torch.randn(1, CHANNELS, t, h, w),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, TEXT, WIDTH),
        }

    def __call__(self) -> torch.Tensor:
        return self.model(**self.batch).sample


class Wan:
    def __init__(self, grid: tuple[int, int, int]) -> None:
        self.model = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=HEADS,
            attention_head_dim=HEAD,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=WIDTH,
            freq_dim=256,
            ffn_dim=4 * WIDTH,
            num_layers=LAYERS,
        )
        self.batch = {
            "hidden_states": torch.randn(1, CHANNELS, *grid),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, TEXT, WIDTH),
        }

    def __call__(self) -> torch.Tensor:
        return self.model(**self.batch).sample


def candidates(grid: tuple[int, int, int], train: bool) -> dict[str, Callable[[], Stgen | Latte | Wan]]:
    models: dict[str, Callable[[], Stgen | Latte | Wan]] = {
        "diffusers Latte": lambda: Latte(grid),
        "diffusers Wan": lambda: Wan(grid),
        "stgen, Latte's form": lambda: Stgen(grid, **LATTE),
        "stgen, Open-Sora 1.2's form": lambda: Stgen(grid, **OPEN_SORA),
        "stgen, default form": lambda: Stgen(grid),
        "stgen, Open-Sora 1.2's form, half given": lambda: Stgen(grid, 0.5, **OPEN_SORA),
    }
    if not train:
        for share, words in ((0.25, "a quarter"), (0.5, "half"), (0.75, "three quarters")):
            name = f"stgen, Open-Sora 1.2's form, {words} given, cached"
            models[name] = lambda share=share: Stgen(grid, share, cached=True, **OPEN_SORA)
    return models


def prepare(model: Stgen | Latte | Wan, device: str, dtype: torch.dtype, train: bool) -> Forward:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.parameters():  # what begins at zero must not make the work easier
            if not parameter.any():
                parameter.normal_(std=0.02)
    model.model.to(device, dtype).train(train)
    for name, value in model.batch.items():
        model.batch[name] = value.to(device) if name == "timestep" else value.to(device, dtype)

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return model()

    def step() -> torch.Tensor:
        out = model()
        out.square().mean().backward()
        model.model.zero_grad()
        return out

    return step if train else forward


def count_flops(forward: Forward) -> float:
    """Matrix FLOPs of one forward, attention included."""

    def sdpa(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    def linear(x, weight, *args, out_shape=None, **kwargs) -> int:
        return 2 * math.prod(x) * weight[0]

    own = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa,
        torch.ops.mkldnn._linear_pointwise: linear,
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        forward()
    return counter.get_total_flops()


def seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_kib() -> int:
    """The most memory that this process has had. Not `ru_maxrss`, which begins as the parent's."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def peak_memory(name: str, grid: tuple[int, int, int]) -> float:
    """MiB above the loaded model that one forward takes, measured in a process of its own."""
    run = [sys.executable, __file__, "--memory-of", name, "--grid", ",".join(map(str, grid))]
    return float(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--grid", help="latent t,h,w; 16,32,32 by default, 8,16,16 with --train")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backends", default="", help="attention backends to compare on the first of our models")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    grid = tuple(map(int, (arguments.grid or ("8,16,16" if arguments.train else "16,32,32")).split(",")))
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    models = candidates(grid, arguments.train)

    if arguments.memory_of:
        forward = prepare(models[arguments.memory_of](), device, dtype, False)
        before = peak_kib()
        forward()
        print((peak_kib() - before) / 1024)
        return
    if arguments.memory:
        for name in models:
            print(f"{name:55s} {peak_memory(name, grid):8.0f} MiB")
        return

    works, flops = {}, {}
    for name, make in models.items():
        model = make()
        works[name] = prepare(model, device, dtype, arguments.train)
        # A cached step does less; the first call, which fills the cache, is not what is timed.
        works[name]()
        flops[name] = (3 if arguments.train else 1) * count_flops(prepare(model, device, dtype, False))
        model.model.train(arguments.train)
        for backend in filter(None, arguments.backends.split(",") if name == "stgen, Open-Sora 1.2's form" else []):
            other = make()
            works[f"{name}, {backend}"] = prepare(other, device, dtype, arguments.train)
            other.model.set_attention_backend(backend)
            flops[f"{name}, {backend}"] = flops[name]
    side = 8192 if device == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = dict.fromkeys(works, float("inf"))
    product = float("inf")
    for _ in range(arguments.rounds):
        product = min(product, *(seconds(lambda: a @ a, device) for _ in range(3)))
        for name, work in works.items():
            best[name] = min(best[name], seconds(work, device))
    rate = 2 * side**3 / product
    kind = "forward + backward" if arguments.train else "forward"
    print(
        f"{kind}, latents {grid}, {arguments.dtype} on {device}, {arguments.threads} thread(s); GEMM {rate / 1e9:.0f} GFLOP/s"
    )
    print(f"{'':55s} {'ms':>8s} {'GFLOP':>8s} {'fraction':>8s} {'x Latte':>8s}")
    for name, took in best.items():
        ratio = best["diffusers Latte"] / took
        print(f"{name:55s} {took * 1e3:8.1f} {flops[name] / 1e9:8.1f} {flops[name] / took / rate:8.2f} {ratio:8.2f}")


if __name__ == "__main__":
    main()
