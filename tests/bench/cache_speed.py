"""Speed and fidelity of diffusers' caches on a trained pipeline: `python tests/bench/cache_speed.py --pipeline DIR`.

The same clips are generated from the same noise with and without each cache, in turns, and the best time of each counts.
PSNR is that of the cached frames against the uncached ones, in dB over all pixels.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from stgen import STGenPipeline
from stgen.models.latents import decode


def caches(pipeline: STGenPipeline, steps: int) -> dict[str, Callable[[], Any]]:
    """A configuration of each cache, as its documentation begins."""
    now = {"current_timestep_callback": lambda: pipeline.current_timestep}
    batched = ["hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask", "condition_latents"]
    batched += ["condition_mask", "class_labels", "drop_text", "fps", "num_frames", "height", "width"]
    return {
        "PyramidAttentionBroadcast": lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=3,
            spatial_attention_timestep_skip_range=(100, 900),
            cross_attention_timestep_skip_range=(100, 900),
            **now,
        ),
        "FirstBlockCache": lambda: FirstBlockCacheConfig(threshold=0.1),
        "FasterCache": lambda: FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 900),
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(-1, 900),
            attention_weight_callback=lambda module: 0.5,
            tensor_format="BCFHW",
            _unconditional_conditional_input_kwargs_identifiers=batched,
            **now,
        ),
        "TaylorSeer": lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=3, max_order=1),
        "MagCache": lambda: MagCacheConfig(
            num_inference_steps=steps, threshold=0.06, retention_ratio=0.2, mag_ratios=torch.ones(steps)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--prompt", default="a 3 moving up left")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = STGenPipeline.from_pretrained(arguments.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    configs = caches(pipeline, arguments.steps)

    def sample() -> tuple[float, np.ndarray]:
        begin = time.perf_counter()
        latents = pipeline(
            arguments.prompt,
            num_inference_steps=arguments.steps,
            num_videos_per_prompt=arguments.videos,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames
        took = time.perf_counter() - begin
        config = pipeline.transformer.config
        size = (config.sample_frames, config.sample_height, config.sample_width)
        return took, (decode(pipeline.vae, latents, size).clamp(-1, 1) / 2 + 0.5).detach().numpy()

    _, truth = sample()
    best, psnr = dict.fromkeys(["none", *configs], float("inf")), {}
    for _ in range(arguments.rounds):
        best["none"] = min(best["none"], sample()[0])
        for name, make in configs.items():
            pipeline.transformer.enable_cache(make())
            took, video = sample()
            pipeline.transformer.disable_cache()
            best[name] = min(best[name], took)
            psnr[name] = -10 * np.log10(max(float(((video - truth) ** 2).mean()), 1e-12))
    print(f"{arguments.steps} steps, {arguments.videos} videos with guidance, {arguments.threads} thread(s)")
    for name, took in best.items():
        fidelity = f"{psnr[name]:6.1f} dB" if name in psnr else ""
        print(f"{name:28s} {took:7.2f} s   x {best['none'] / took:4.2f}   {fidelity}")


if __name__ == "__main__":
    main()
