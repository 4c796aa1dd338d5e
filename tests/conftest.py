"""Tiny real components: the project's own classes and a transformers BERT, at sizes that run in milliseconds."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import BertConfig, BertModel, BertTokenizerFast, PreTrainedTokenizerBase

from stgen import AutoencoderKLSTGen, STGenPipeline, STGenTransformer3DModel

torch.set_num_threads(1)

WORDS = "a the digit moving moves right left up down and zero one two three 0 1 2 3 4 5 6 7 8 9".split()  # noqa: SIM905


def fill_zeros(model: torch.nn.Module) -> None:
    """Random weights for the layers that begin at zero, so that a test of equality says something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)


def tiny_vae(**overrides) -> AutoencoderKLSTGen:
    torch.manual_seed(0)
    arguments = {
        "latent_channels": 4,
        "block_out_channels": (8, 16, 16),
        "temporal_downsample": (True, True),
        "spatial_downsample": (True, False),
        "patch_size": 2,
        "latents_mean": [0.1, -0.2, 0.0, 0.3],
        "latents_std": [0.5, 0.6, 0.7, 0.8],
    }
    model = AutoencoderKLSTGen(**(arguments | overrides)).eval()
    fill_zeros(model)
    return model


def tiny_transformer(**overrides) -> STGenTransformer3DModel:
    torch.manual_seed(1)
    arguments = {
        "in_channels": 4,
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 3,
        "pattern": "stf",
        "text_dim": 16,
        "mask_channels": 4,
        "sample_frames": 9,
        "sample_height": 16,
        "sample_width": 16,
    }
    model = STGenTransformer3DModel(**(arguments | overrides)).eval()
    fill_zeros(model)
    return model


def tiny_text_encoder(folder: Path, hidden_size: int = 16) -> tuple[PreTrainedTokenizerBase, BertModel]:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=64)
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    return tokenizer, BertModel(config).eval()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos", type=float, metavar="MINUTES", help="kill and rerun for so long (test_chaos.py)")


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved STGenPipeline: 9 frames of 16x16 pixels by default. Read only."""
    folder = tmp_path_factory.mktemp("tiny_pipeline")
    tokenizer, text_encoder = tiny_text_encoder(tmp_path_factory.mktemp("tokenizer"))
    pipeline = STGenPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_vae(),
        transformer=tiny_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_pipeline(tiny_pipeline_folder: Path) -> STGenPipeline:
    pipeline = STGenPipeline.from_pretrained(tiny_pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- A world to train in ------------------------------------------------------------------------------------------


def write_clips(folder: Path, shapes: list[tuple[int, int, int]], clips: int, seed: int = 0) -> None:
    """Shards of bars that move over a background, `clips` of each shape (t, h, w), with captions of `WORDS`."""
    from stgen.data.shards import ShardWriter, write_index

    random = np.random.default_rng(seed)
    for shape in shapes:
        t, h, w = shape
        with ShardWriter(folder / "x".join(map(str, shape))) as writer:
            for i in range(clips):
                video = np.full((t, h, w, 3), random.integers(0, 80), np.uint8)
                for frame in range(t):
                    left = (2 * i + frame) % w
                    video[frame, :, left : left + 3] = random.integers(150, 255, 3)
                buffer = io.BytesIO()
                np.save(buffer, video)
                fields = {"num_frames": t, "height": h, "width": w, "fps": 10.0, "source": f"{shape} {i}"}
                writer.write(f"{i:04d}", {"caption": f"a {i % 10} moving right", **fields}, npy=buffer.getvalue())
    write_index(folder)


@pytest.fixture(scope="session")
def training_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training needs, at tiny size: `train/` and `heldout/` (9 frames of 16x16), `joint/` (those and images), `small/`
    (5 frames of 8x8), `vae/`, `text/`, and `base/`, a pipeline folder. Read only, runs in folders of their own."""
    folder = tmp_path_factory.mktemp("training_world")
    write_clips(folder / "train", [(9, 16, 16)], clips=12)
    write_clips(folder / "heldout", [(9, 16, 16)], clips=4, seed=1)
    write_clips(folder / "joint", [(9, 16, 16), (1, 16, 16)], clips=8)
    write_clips(folder / "small", [(5, 8, 8)], clips=8, seed=2)
    tiny_vae().save_pretrained(folder / "vae")
    (folder / "text").mkdir()
    tokenizer, encoder = tiny_text_encoder(folder)
    tokenizer.save_pretrained(folder / "text")
    encoder.save_pretrained(folder / "text")
    pipeline = STGenPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=tiny_vae(),
        transformer=tiny_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.save_pretrained(folder / "base")
    return folder


def training_settings(world: Path, run: Path, *overrides: str) -> list[str]:
    """A run of `stgen/train.py` on the tiny world: 6 steps of 4 clips, of one process."""
    model = "model={num_attention_heads: 2, attention_head_dim: 12, num_layers: 2, pattern: st, patch_size: [1, 2, 2]}"
    config = [
        *(f"run={run}", f"vae={world}/vae", f"text_encoder={world}/text", f"data.path={world}/train"),
        *("data.num_frames=9", "data.height=16", "data.width=16", "samples=24", "batch_size=4", "log_every=1"),
        *("checkpoint_every=2", "optimizer.warmup=0", "optimizer.lr=1e-3", "optimizer.ema_decay=0.9"),
        "masks=[{kind: generate_all}, {kind: predict, weight: 2, args: {given: [1, 0.5]}}, {kind: moving_box}]",
    ]
    own = [] if any(override.startswith("init=") for override in overrides) else [model]
    return [*config, *own, *overrides]


def training_arguments(world: Path, run: Path, *overrides: str) -> list[str]:
    """The same as a command line."""
    (run.parent / "empty.yaml").write_text("{}")
    return ["--config", str(run.parent / "empty.yaml"), *training_settings(world, run, *overrides)]


def train_here(entry: Callable[[Any], None], config: object) -> list[dict]:
    """Trains in this process as the entry point does; the rows of metrics.jsonl."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "0")  # chosen by somebody, so that training keeps to the one thread of tests
        try:
            entry(config)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    return [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]


def run_training(world: Path, run: Path, *overrides: str, saves: int | None = None) -> list[dict]:
    """Trains the transformer in this process; the rows of metrics.jsonl.

    Args:
        saves: dies when it would save for the next time after so many, as by SIGKILL.
    """
    from stgen import loop
    from stgen.config import load_config
    from stgen.train import TrainConfig, train

    class Killed(Exception):
        pass

    original, left = loop.save_checkpoint, [saves]

    def save_or_die(*arguments: Any) -> None:
        if left == [0]:
            raise Killed
        original(*arguments)
        left[0] = None if saves is None else left[0] - 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_or_die)
        config = load_config(TrainConfig, None, training_settings(world, run, *overrides))
        if saves is None:
            return train_here(train, config)
        with pytest.raises(Killed):
            train_here(train, config)
        return []


def losses_of(rows: list[dict]) -> dict[int, float]:
    """The training loss by the clips seen."""
    return {row["samples"]: row["loss"] for row in rows if "loss" in row}
