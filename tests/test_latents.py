"""Every VAE that the pipeline takes, with random tiny weights: any shape, its own scale, no leak, through the pipeline."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill_zeros, tiny_text_encoder, tiny_transformer, tiny_vae
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
)
from safetensors.torch import load_file

from stgen import STGenPipeline, STGenPredictionPipeline
from stgen.data.reading import DataConfig
from stgen.evaluation import reconstruct
from stgen.masks import MaskSpec, fold_mask, moving_box
from stgen.models.latents import (
    VideoVAE,
    compression_ratios,
    decode,
    decode_stream,
    encode,
    latent_channels,
    latent_shape,
    load_vae,
)
from stgen.objective import denoising_losses
from stgen.text import TextCache
from stgen.train import TrainConfig, make_model, model_inputs

FOUR = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "norm_num_groups": 2, "layers_per_block": 1}
COGVIDEOX = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "scaling_factor": 0.7,
}
WAN = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.4],
    "latents_std": [0.5, 0.6, 0.7, 0.8],
}
WAN22 = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
LTX = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "scaling_factor": 1.5,
}
LTX091 = {  # the decoder that denoises
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "decoder_inject_noise": (True, True, False, False),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
IMAGE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.4,
    "shift_factor": 0.1,
}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [0.5, 0.6, 0.7, 0.8]}

VAES: dict[str, Callable[[], VideoVAE]] = {
    "stgen": tiny_vae,
    "cogvideox": lambda: AutoencoderKLCogVideoX(**FOUR, **COGVIDEOX),
    "wan2.1": lambda: AutoencoderKLWan(**WAN),
    "wan2.2": lambda: AutoencoderKLWan(**WAN, **WAN22),
    "ltx": lambda: AutoencoderKLLTXVideo(**LTX),
    "ltx0.9.1": lambda: AutoencoderKLLTXVideo(**(LTX | LTX091)),
    "hunyuan": lambda: AutoencoderKLHunyuanVideo(**FOUR, scaling_factor=0.6),
    "image": lambda: AutoencoderKL(**FOUR, **IMAGE),
    "image with statistics": lambda: AutoencoderKL(**FOUR, **(IMAGE | STATISTICS | {"shift_factor": None})),
}
RATIOS = {"stgen": (4, 4), "wan2.2": (4, 16), "ltx": (8, 32), "ltx0.9.1": (8, 32)}
RATIOS |= {"image": (1, 8), "image with statistics": (1, 8)}  # all others (4, 8)
TASK_VAES = [name for name in VAES if name not in ("stgen", "image with statistics")]


def make(name: str) -> VideoVAE:
    torch.manual_seed(0)
    vae = VAES[name]().eval().requires_grad_(False)
    fill_zeros(vae)
    if isinstance(vae, AutoencoderKLLTXVideo):
        vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.4]))
        vae.latents_std.copy_(torch.tensor([0.5, 0.6, 0.7, 0.8]))
    return vae


def clip(t: int = 9, h: int = 16, w: int = 16, b: int = 1) -> torch.Tensor:
    return torch.rand(b, 3, t, h, w, generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- The functions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VAES)
def test_any_shape(name: str) -> None:
    vae = make(name)
    p, s = compression_ratios(vae)
    assert (p, s) == RATIOS.get(name, (4, 8))
    sizes = [(1, 16, 16), (2, 17, 9), (5, 8, 23), (9, 33, 8), (10, 1, 8), (13, 8, 8), (18, 8, 8), (25, 8, 8)]
    for t, h, w in sizes:
        video = clip(t, h, w)
        latents = encode(vae, video)
        assert latents.shape[1:] == latent_shape(vae, t, h, w) == (4, 1 + -(-(t - 1) // p), -(-h // s), -(-w // s))
        decoded = decode(vae, latents, (t, h, w))
        assert decoded.shape == video.shape
        assert decoded.isfinite().all()
        assert fold_mask(video[:, :1], p, s).shape[1:] == (p, *latents.shape[2:])


@pytest.mark.parametrize("name", VAES)
def test_latents_have_the_scale_that_the_config_says(name: str) -> None:
    vae, video = make(name), clip(9, 64, 32)
    if name.startswith("image"):
        raw = torch.stack([vae.encode(frame).latent_dist.mode() for frame in video.unbind(2)], dim=2)
    else:
        raw = vae.encode(video).latent_dist.mode()
    mean = torch.tensor([0.1, -0.2, 0.3, 0.4]).view(1, 4, 1, 1, 1)
    std = torch.tensor([0.5, 0.6, 0.7, 0.8]).view(1, 4, 1, 1, 1)
    expected = {
        "stgen": (raw - torch.tensor([0.1, -0.2, 0.0, 0.3]).view(1, 4, 1, 1, 1)) / std,
        "cogvideox": raw * 0.7,
        "wan2.1": (raw - mean) / std,
        "wan2.2": (raw - mean) / std,
        "ltx": (raw - mean) * 1.5 / std,
        "ltx0.9.1": (raw - mean) * 1.5 / std,
        "hunyuan": raw * 0.6,
        "image": (raw - 0.1) * 0.4,
        "image with statistics": (raw - mean) * 0.4 / std,
    }[name]
    latents = encode(vae, video)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-4)
    if name not in ("ltx0.9.1", "image", "image with statistics"):
        plain = vae.decode(raw).sample
        torch.testing.assert_close(decode(vae, latents, (9, 64, 32)), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("t", [6, 10, 14])
def test_a_latent_stands_for_the_frames_that_the_mask_folds_into_it(name: str, t: int) -> None:
    vae = make(name)
    p, _ = compression_ratios(vae)
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            # The one thing in CogVideoX and Hunyuan that looks ahead in time.
            module.forward = lambda x: x
    video = clip(t)
    latents = encode(vae, video)
    decoded = decode(vae, latents, (t, 16, 16))
    for i in range(latents.shape[2]):
        first, end = max(0, 1 + p * (i - 1)), 1 + p * i  # frames of latent i
        for frame in range(first, min(end, t)):
            changed = video.clone()
            changed[:, :, frame] *= -1
            difference = (encode(vae, changed) != latents).flatten(3).any(3).any(1)[0]
            assert difference[i]
            assert not difference[:i].any()
        changed = latents.clone()
        changed[:, :, i] += 1
        difference = (decode(vae, changed, (t, 16, 16)) != decoded).flatten(3).any(3).any(1)[0]
        assert difference[first:end].all()
        if not name.startswith("ltx"):  # LTX's decoder looks ahead by design
            assert not difference[:first].any()


def test_ltx_decodes_the_same_twice() -> None:
    vae = make("ltx0.9.1")
    latents = torch.randn(2, *latent_shape(vae, 9, 32, 32), generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    first = decode(vae, latents, (9, 32, 32))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(decode(vae, latents, (9, 32, 32)), first)


TILES = {
    "cogvideox": {"tile_sample_min_height": 48, "tile_sample_min_width": 40},
    "wan2.1": dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width"), 32)
    | dict.fromkeys(("tile_sample_stride_height", "tile_sample_stride_width"), 16),
    "ltx": dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width"), 64)
    | dict.fromkeys(("tile_sample_stride_height", "tile_sample_stride_width"), 32),
    "image": {},  # tiles of sample_size, 32 pixels
}
TILES["hunyuan"] = TILES["wan2.1"]


@pytest.mark.parametrize("name", VAES)
def test_slices_and_tiles_of_the_vae_work(name: str) -> None:
    vae, video = make(name), clip(2, 90, 42, b=2)
    latents = encode(vae, video)
    decoded = decode(vae, latents, (2, 90, 42))
    vae.enable_slicing()
    torch.testing.assert_close(encode(vae, video), latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decode(vae, latents, (2, 90, 42)), decoded, atol=1e-4, rtol=1e-4)
    if name in TILES:
        vae.enable_tiling(**TILES[name])
        assert encode(vae, video).shape == latents.shape
        tiled = decode(vae, latents, (2, 90, 42))
        assert tiled.shape == decoded.shape
        assert not torch.equal(tiled, decoded)


@pytest.mark.parametrize("name", ["stgen", "stgen, compiled", "stgen, sliced", "wan2.1", "image"])
def test_a_stream_is_the_video(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours comes a few frames at a time, wrapped or sliced too, diffusers' whole; latents that don't fit are refused."""
    vae = make(name.split(",")[0])
    latents = encode(vae, clip(10, 17, 9, b=2))
    decoded = decode(vae, latents, (10, 17, 9))
    monkeypatch.setattr("stgen.models.autoencoder._CHUNK_PIXELS", {"cpu": 1})
    batches = []
    if name == "stgen, sliced":
        vae.enable_slicing()
        vae.decoder.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[1]))
    streamed = torch.compile(vae) if name == "stgen, compiled" else vae
    chunks = list(decode_stream(streamed, latents, (10, 17, 9)))
    assert [chunk.shape[2] for chunk in chunks] == ([1, 4, 4, 1] if name.startswith("stgen") else [10])
    assert batches == ([1] * 8 if name == "stgen, sliced" else [])
    assert {chunk.dtype for chunk in chunks} == {torch.float32}
    torch.testing.assert_close(torch.cat(chunks, dim=2), decoded, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="shape of latents"):
        next(decode_stream(streamed, latents, (99, 17, 9)))


def test_other_vaes_are_refused(tiny_pipeline: STGenPipeline) -> None:
    other = AutoencoderKLMochi.__new__(AutoencoderKLMochi)
    message = "vae is 'AutoencoderKLMochi', allowed: AutoencoderKLSTGen, AutoencoderKLCogVideoX, AutoencoderKLWan"
    with pytest.raises(ValueError, match=message):
        STGenPipeline(**tiny_pipeline.components | {"vae": other})
    with pytest.raises(ValueError, match=message):
        compression_ratios(other)


def test_a_config_that_says_another_shape_is_refused() -> None:
    vae = AutoencoderKLWan(**WAN | {"temperal_downsample": [False, False, True]}, scale_factor_temporal=2)
    with pytest.raises(ValueError, match=r"shape of latents of AutoencoderKLWan is \(4, 1, 1, 1\), allowed: \(4, 2"):
        encode(vae, clip(3, 8, 8))
    with pytest.raises(ValueError, match="shape of latents"):
        decode(make("wan2.1"), torch.zeros(1, 4, 3, 2, 2), (5, 16, 16))


@pytest.mark.parametrize("name", VAES)
def test_saved_vaes_open_by_their_class(name: str, tmp_path: Path) -> None:
    vae = make(name)
    vae.save_pretrained(tmp_path)
    loaded = load_vae(tmp_path).requires_grad_(False)
    assert type(loaded) is type(vae)
    assert not loaded.training
    assert torch.equal(encode(loaded, clip(5)), encode(vae, clip(5)))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_vae(tmp_path)


def test_folders_without_a_known_vae_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allowed: a folder with a VAE's config.json"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="is 'UNet2DModel', allowed: AutoencoderKLSTGen, "):
        load_vae(tmp_path)


# --- The pipeline and the trainer ---------------------------------------------------------------------------------


def with_vae(pipeline: STGenPipeline, vae: VideoVAE) -> STGenPipeline:
    p, _ = compression_ratios(vae)
    transformer = tiny_transformer(in_channels=latent_channels(vae), mask_channels=p)
    made = STGenPipeline(**pipeline.components | {"vae": vae, "transformer": transformer})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("name", TASK_VAES)
def test_the_pipeline_runs_with_it(name: str, tiny_pipeline: STGenPipeline) -> None:
    pipeline = with_vae(tiny_pipeline, make(name))
    call = {"num_inference_steps": 2, "output_type": "np"}
    frames = pipeline("a 3", num_frames=6, height=17, width=15, **call).frames
    assert frames.shape == (1, 6, 17, 15, 3)
    assert np.isfinite(frames).all()

    given = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    predict = STGenPredictionPipeline.from_pipe(pipeline)
    assert predict.vae is pipeline.vae
    frames = predict(given.astype(np.float32) / 255, num_frames=10, **call).frames[0]
    assert frames.shape == (10, 16, 16, 3)
    np.testing.assert_array_equal((frames[:4] * 255).round().astype(np.uint8), given)

    clips, hidden = np.random.default_rng(0).random((2, 6, 9, 9, 3), np.float32), np.ones((2, 6, 9, 9), bool)
    hidden[:, :3] = False
    ceiling = reconstruct(pipeline, clips, hidden)
    np.testing.assert_allclose(ceiling[:, :3], clips[:, :3], atol=1e-6)
    assert (ceiling[:, 3:] != clips[:, 3:]).any()


@pytest.mark.parametrize("name", TASK_VAES)
def test_hidden_pixels_change_no_input_of_the_model(name: str, tiny_pipeline: STGenPipeline) -> None:
    pipeline = with_vae(tiny_pipeline, make(name))
    mask = moving_box((10, 40, 40), torch.Generator().manual_seed(0))
    seen: list[list[torch.Tensor]] = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen[-1] += [x.clone() for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)]

    pipeline.transformer.register_forward_pre_hook(record, with_kwargs=True)
    given = np.random.default_rng(0).random((10, 40, 40, 3), np.float32)
    for fill in (0.0, 1.0, np.nan):
        video = np.where(mask[0].numpy()[..., None] == 1, fill, given).astype(np.float32)
        seen.append([])
        noise = torch.Generator().manual_seed(0)
        pipeline("a 3", video=video, mask=mask, num_inference_steps=1, generator=noise, output_type="latent")
    assert len(seen[0]) > 0
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextCache:
    folder = tmp_path_factory.mktemp("text")
    tokenizer, encoder = tiny_text_encoder(folder)
    tokenizer.save_pretrained(folder)
    encoder.save_pretrained(folder)
    TextCache.build(folder / "cache.safetensors", str(folder), ["", "a 3"], 64)
    return TextCache(folder / "cache.safetensors")


@pytest.mark.parametrize("name", TASK_VAES)
def test_the_trainer_runs_with_it(name: str, text: TextCache) -> None:
    vae = make(name)
    p, _ = compression_ratios(vae)
    shape = (10, 40, 40)
    net = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "pattern": "f"}
    masks = [MaskSpec("moving_box"), MaskSpec("predict", args={"given": 5})]
    config = TrainConfig(run="run", vae="vae", data=DataConfig("data", *shape), masks=masks, model=net)
    videos = torch.randint(256, (3, 3, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = {"video": videos, "caption": ["a 3"] * 3, "fps": torch.full((3,), 10.0), "position": [0, 1, 2]}
    inputs = model_inputs(batch, config, vae, text, torch.device("cpu"))
    assert inputs["latents"].shape[1:] == latent_shape(vae, *shape)
    assert inputs["condition_mask"].shape == (3, p, *inputs["latents"].shape[2:])
    losses = denoising_losses(make_model(config, vae, text.dim, fps=10.0), inputs, config.flow)
    assert losses["loss"].isfinite()

    # What lies under wholly hidden cells: of frames 1 + p k to p (k + 1), and of the first.
    hidden = (inputs["condition_mask"].amin(1) == 1)[:, (torch.arange(shape[0]) + p - 1) // p]
    hidden = torch.nn.functional.interpolate(hidden.float(), scale_factor=compression_ratios(vae)[1])[..., :40, :40]
    changed = batch | {"video": torch.where(hidden[:, None] == 1, 255 - videos, videos)}
    again = model_inputs(changed, config, vae, text, torch.device("cpu"))
    for key in ("condition_latents", "condition_mask", "text", "text_mask", "time", "noise"):
        assert torch.equal(inputs[key], again[key]), key
    assert hidden.any()
    assert not torch.equal(inputs["latents"], again["latents"])


def test_a_saved_pipeline_opens_in_a_fresh_process(tiny_pipeline: STGenPipeline, tmp_path: Path) -> None:
    pipeline = with_vae(tiny_pipeline, make("wan2.1"))
    pipeline.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"]
    call = "('a 3', num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type='np').frames"
    code = (
        "import sys, torch, numpy; from stgen import STGenPipeline; from diffusers import DiffusionPipeline; "
        "torch.set_num_threads(1); pipelines = [kind.from_pretrained(sys.argv[1]) for kind in "
        f"(STGenPipeline, DiffusionPipeline)]; numpy.save(sys.argv[2], [p{call} for p in pipelines])"
    )
    out = tmp_path / "frames.npy"
    arguments = [sys.executable, "-c", code, str(tmp_path / "saved"), str(out)]
    result = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert "vae" not in result.stderr  # no warning about its type
    frames = pipeline("a 3", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="np").frames
    np.testing.assert_allclose(np.load(out), np.stack([frames, frames]), atol=1e-6)
