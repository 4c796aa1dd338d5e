"""Diffusers' caches on our blocks: each hooks in, saves work, and leaves the model as it was."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_transformer
from diffusers import FirstBlockCacheConfig

from stgen import STGenPipeline

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from cache_speed import caches

STEPS = 8
NAMES = ["PyramidAttentionBroadcast", "FirstBlockCache", "FasterCache", "TaylorSeer", "MagCache"]


def sample(pipeline: STGenPipeline, task: str) -> torch.Tensor:
    given = {}
    if task == "prediction":
        mask = torch.ones(1, 9, 16, 16)
        mask[:, :5] = 0
        video = torch.rand(1, 9, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        given = {"video": video, "mask": mask}
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "a 3 moving up", **given, num_inference_steps=STEPS, generator=generator, output_type="latent"
    ).frames


@pytest.mark.parametrize("task", ["text", "prediction"])
@pytest.mark.parametrize("name", NAMES)
def test_caches_save_work_and_let_go(tiny_pipeline: STGenPipeline, name: str, task: str) -> None:
    pipeline = tiny_pipeline
    assert list(caches(pipeline, STEPS)) == NAMES
    pipeline.transformer = tiny_transformer(pattern="st", num_layers=4)
    projections = []
    for module in pipeline.transformer.modules():
        if type(module).__name__ == "STGenAttention":
            module.to_qkv.register_forward_hook(lambda *args: projections.append(len(args[1][0])))

    expected = sample(pipeline, task)
    work = sum(projections)
    for _ in range(2):  # the second video must not see what the first left behind
        projections.clear()
        # Steps of random weights differ by more than a trained model's.
        config = FirstBlockCacheConfig(0.8) if name == "FirstBlockCache" else caches(pipeline, STEPS)[name]()
        pipeline.transformer.enable_cache(config)
        cached = sample(pipeline, task)
        pipeline.transformer.disable_cache()
        assert sum(projections) < work
        assert cached.isfinite().all()
        assert not torch.equal(cached, expected)
        assert (cached - expected).abs().mean() < 0.7 * expected.abs().mean()
    projections.clear()
    assert torch.equal(sample(pipeline, task), expected)
    assert sum(projections) == work
