"""Tiny real components: the project's own classes and a transformers BERT, at sizes that run in milliseconds."""

from pathlib import Path

import pytest
import torch
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
