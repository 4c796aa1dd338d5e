"""The VAE: shapes, causality, exact chunks, tiles, bottlenecks, images, diffusers' interface, refusals."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from conftest import fill_zeros, tiny_vae
from diffusers.hooks.group_offloading import ModuleGroup
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from stgen import AutoencoderKLSTGen
from stgen.models.bottleneck import FiniteScalarQuantizer
from stgen.models.latents import latent_shape
from stgen.models.layers import (
    CausalConv3d,
    CausalState,
    ConvUpsample3d,
    ShuffleDownsample3d,
    ShuffleUpsample3d,
    patchify,
    unpatchify,
)

FORMS = {
    "default": {},
    "haar": {"patch": "haar", "patch_size": 4, "spatial_downsample": (True, False)},
    "wan": {"resample": "conv", "mid_attention": True, "conv_norm_out": True, "decoder_layers_per_block": 2},
    "stable diffusion": {
        "resample": "conv",
        "norm": "group",
        "mid_attention": True,
        "conv_norm_out": True,
        "use_post_quant_conv": True,
        "patch_size": 1,
        "temporal_downsample": (False, True),
    },
    "fsq": {"bottleneck": "fsq", "fsq_levels": (8, 5, 4, 3), "latents_mean": None, "latents_std": None},
    "images only": {"temporal_downsample": (False, False)},
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def whole(vae: AutoencoderKLSTGen, video: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of a clip in one piece, which is how clips are worked on where gradients are."""
    with torch.enable_grad():
        z = vae.encode(video).latent_dist.mode()
        return z.detach(), vae.decode(z, sample_size=tuple(video.shape[2:])).sample.detach()


# --- Shapes -------------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(FORMS)), st.integers(1, 14), st.integers(1, 20), st.integers(1, 20))
@example("stable diffusion", 1, 1, 1)
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_any_clip_comes_back_in_its_exact_shape(form: str, t: int, h: int, w: int) -> None:
    vae = tiny_vae(**FORMS[form])
    video = noise(1, 3, t, h, w)
    assert vae.encode(video).latent_dist.mode().shape[1:] == latent_shape(vae, t, h, w)
    assert vae(video).sample.shape == video.shape


@pytest.mark.parametrize(
    ("time", "space", "patch", "ratios"),
    [
        ((True, True, False), (True, True, True), 1, (4, 8)),
        ((True, True, False), (True, True, True), 2, (4, 16)),
        ((True, True, True), (True, True, True), 1, (8, 8)),
        ((True, False, False), (True, True, True), 1, (2, 8)),
        ((False, False, False), (True, True, True), 1, (1, 8)),
        ((True, True, True), (True, True, True), 4, (8, 32)),
    ],
)
@pytest.mark.parametrize("resample", ["shuffle", "conv"])
@torch.no_grad()
def test_compression_is_chosen_by_stage(time, space, patch, ratios, resample: str) -> None:
    vae = AutoencoderKLSTGen(
        block_out_channels=(8, 8, 16, 16),
        temporal_downsample=time,
        spatial_downsample=space,
        patch_size=patch,
        resample=resample,
    )
    p, s = ratios
    assert (vae.temporal_compression_ratio, vae.spatial_compression_ratio) == ratios
    z = vae.encode(noise(1, 3, 1 + p, 2 * s, s)).latent_dist.mode()
    assert z.shape == (1, 16, 2, 2, 1)
    assert vae.decode(z).sample.shape == (1, 3, 1 + p, 2 * s, s)


# --- Causality ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_frames_reach_no_earlier_latent_and_latents_no_earlier_frame(form: str) -> None:
    vae = tiny_vae(**FORMS[form])
    p = vae.temporal_compression_ratio
    video = noise(1, 3, 1 + 4 * p, 16, 16)
    z, sample = whole(vae, video)
    for latent in range(z.shape[2]):
        changed = video.clone()
        changed[:, :, 1 + (latent - 1) * p if latent else 0 :] *= -0.9
        other = whole(vae, changed)[0]
        assert torch.equal(z[:, :, :latent], other[:, :, :latent])
        assert not torch.equal(z[:, :, latent], other[:, :, latent])
        later = z.clone()
        later[:, :, latent:] += 1
        with torch.enable_grad():
            frames = vae.decode(later).sample.detach()
        first = 1 + (latent - 1) * p if latent else 0
        assert torch.equal(sample[:, :, :first], frames[:, :, :first])
        assert not torch.equal(sample[:, :, first], frames[:, :, first])


@pytest.mark.parametrize("form", FORMS)
def test_an_image_is_the_first_frame_of_any_clip(form: str) -> None:
    vae = tiny_vae(**FORMS[form])
    video = noise(2, 3, 9, 12, 16)
    z, sample = whole(vae, video)
    image_z, image = whole(vae, video[:, :, :1])
    torch.testing.assert_close(image_z, z[:, :, :1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(image, sample[:, :, :1], atol=1e-5, rtol=1e-5)


@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(0, 4), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_causal_convolution_is_conv3d_behind_zeros(kernel: int, p: int, s: int, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    conv = CausalConv3d(3, 5, (kernel, 3, 3), stride=(p, s))
    x = noise(2, 3, 1 + groups * p, 8, 6, seed=seed)
    padded = F.pad(x, (1, 1, 1, 1, kernel - 1, 0) if s == 1 else (0, 1, 0, 1, kernel - 1, 0))
    expected = F.conv3d(padded, conv.weight, conv.bias, (p, s, s))
    torch.testing.assert_close(conv(x.movedim(2, 0)).movedim(0, 2), expected, atol=1e-5, rtol=1e-5)


def test_resampling_shortcuts_average_and_repeat() -> None:
    down, up = ShuffleDownsample3d(8, 16, 2, 2), ShuffleUpsample3d(16, 8, 2, 2)
    for layer in (down, up):
        torch.nn.init.zeros_(layer.proj.weight)
        torch.nn.init.zeros_(layer.proj.bias)
    constant = noise(1, 1, 8, 1, 1).expand(5, 1, 8, 4, 6)  # every place and time the same
    low = down(constant)
    assert low.shape == (3, 1, 16, 2, 3)
    torch.testing.assert_close(low, constant[:3, :, :, :2, :3].repeat(1, 1, 2, 1, 1))
    torch.testing.assert_close(up(low), constant)
    nearest = ConvUpsample3d(3, 3, 2, 2)
    torch.nn.init.dirac_(nearest.conv.weight[:, :, -1:])
    torch.nn.init.zeros_(nearest.conv.bias)
    nearest.conv.weight.data[:, :, :-1] = 0
    x = noise(2, 1, 3, 2, 2)
    expected = x.repeat_interleave(2, 0).repeat_interleave(2, 3).repeat_interleave(2, 4)[1:]
    torch.testing.assert_close(nearest(x), expected)


@pytest.mark.parametrize("wavelet", [False, True])
def test_patches_lose_nothing(wavelet: bool) -> None:
    x = noise(2, 1, 3, 16, 8)
    patches = patchify(x, 4, wavelet)
    assert patches.shape == (2, 1, 48, 4, 2)
    torch.testing.assert_close(unpatchify(patches, 4, wavelet), x)
    torch.testing.assert_close(patches.square().sum(), x.square().sum())  # orthonormal
    if wavelet:  # a constant picture is one coefficient a colour: the mean times the side
        flat = patchify(torch.ones_like(x), 4, True)
        torch.testing.assert_close(flat[:, :, :3], torch.full_like(flat[:, :, :3], 4.0))
        assert not flat[:, :, 3:].any()


# --- Chunks -------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(FORMS)),
    st.integers(1, 19),
    st.integers(1, 5),
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
)
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_chunks_are_the_whole(form: str, t: int, chunk: int, pieces: list[int]) -> None:
    """Whatever the chunks, and in whatever pieces frames and latents come."""
    vae = tiny_vae(**FORMS[form])
    video = noise(2, 3, t, 10, 12)
    z, sample = whole(vae, video)
    latents = list(vae.encode_stream(cut(video, pieces), chunk))
    assert [x.shape[2] for x in latents[:-1]] == [chunk] * (len(latents) - 1)
    torch.testing.assert_close(torch.cat(latents, dim=2), z, atol=1e-5, rtol=1e-5)
    frames = torch.cat(list(vae.decode_stream(cut(z, pieces), (t, 10, 12), chunk)), dim=2)
    assert frames.shape == video.shape
    torch.testing.assert_close(frames, sample, atol=1e-5 * sample.abs().max().item(), rtol=1e-5)


def cut(x: Tensor, pieces: list[int]):
    """Pieces of `x` along time, of these lengths in turn."""
    begin = 0
    for length in itertools.cycle(pieces):
        if begin >= x.shape[2]:
            return
        yield x[:, :, begin : begin + length]
        begin += length


@torch.no_grad()
def test_without_gradients_clips_are_worked_on_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = tiny_vae()
    monkeypatch.setattr("stgen.models.autoencoder._CHUNK_PIXELS", {"cpu": 1})
    seen: list[int] = []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    video = noise(1, 3, 9, 12, 16)
    z, sample = whole(vae, video)
    assert seen == [9, 3]
    torch.testing.assert_close(vae.encode(video).latent_dist.mode(), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(z).sample, sample, atol=1e-4, rtol=1e-5)
    assert seen[2:] == [1, 4, 4, 1, 1, 1]


@torch.no_grad()
def test_the_first_frames_come_before_the_last_latents_are_asked_for() -> None:
    vae = tiny_vae()
    taken: list[int] = []

    def latents():
        for i in range(5):
            taken.append(i)
            yield noise(1, 4, 1, 2, 2, seed=i)

    frames = vae.decode_stream(latents(), chunk=1)
    assert next(frames).shape[2] == 1
    assert taken == [0]
    assert next(frames).shape[2] == 4
    assert taken == [0, 1]


@torch.no_grad()
def test_the_state_holds_a_few_frames_however_long_the_clip() -> None:
    layer, state = CausalConv3d(3, 3, 3), CausalState()
    for _ in range(5):
        layer(noise(7, 1, 3, 4, 4), state)
        assert {module: len(frames) for module, frames in state.frames.items()} == {layer: 2}
        assert state.frames[layer].untyped_storage().nbytes() == 2 * 3 * 4 * 4 * 4  # and no whole chunk behind them


# --- Tiles --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_tile_that_holds_the_frame_is_the_whole() -> None:
    vae = tiny_vae()
    video = noise(1, 3, 5, 24, 20)
    z, sample = whole(vae, video)
    vae.enable_tiling(24, 24)
    torch.testing.assert_close(vae.encode(video).latent_dist.mode(), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(z, sample_size=(5, 24, 20)).sample, sample, atol=1e-4, rtol=1e-5)


@given(st.integers(9, 40), st.integers(9, 40), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_tiles_of_what_is_local_are_the_whole(h: int, w: int, tile: int, chunk: int) -> None:
    """With kernels of 1 in space nothing reaches over a tile's border, so tiles and their weights must vanish, in the
    middle of a stream as well."""
    vae = tiny_vae(patch_size=2, spatial_downsample=(False, False))
    for module in vae.modules():
        if isinstance(module, CausalConv3d) and module.kernel_size[1] == 3:
            module.weight.data[..., [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    video = noise(1, 3, 6, h, w)
    z, sample = whole(vae, video)
    vae.enable_tiling(4 * tile, 4 * tile, 2 * tile, 4 * tile)
    latents = torch.cat(list(vae.encode_stream(video, chunk)), dim=2)
    torch.testing.assert_close(latents, z, atol=1e-5, rtol=1e-4)
    frames = torch.cat(list(vae.decode_stream(z, (6, h, w), chunk)), dim=2)
    torch.testing.assert_close(frames, sample, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_no_seam_is_sharper_than_the_picture() -> None:
    """A tile sees nothing beyond its border, so it differs from the whole there; blended, the difference has no step."""
    vae = tiny_vae()
    z = 0.3 * noise(1, 4, 2, 32, 32)
    sample = vae.decode(z).sample
    s = vae.spatial_compression_ratio
    vae.enable_tiling(16 * s, 16 * s, 8 * s, 8 * s)
    blended = vae.decode(z).sample
    vae.enable_tiling(16 * s, 16 * s, 16 * s, 16 * s)
    abrupt = vae.decode(z).sample
    seam = 16 * s

    def step(video: Tensor) -> float:
        error = video - sample
        return (error[..., seam] - error[..., seam - 1]).abs().mean().item()

    assert step(blended) < 0.2 * step(abrupt)
    # Far from every border of a tile it is the whole's.
    corner = 4 * s
    torch.testing.assert_close(blended[..., :corner, :corner], sample[..., :corner, :corner], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_tiles_and_chunks_at_once_are_the_tiles() -> None:
    vae = tiny_vae(mid_attention=True)
    video = noise(2, 3, 13, 30, 26)
    vae.enable_tiling(16, 16, 12, 8)
    z = vae.encode(video).latent_dist.mode()
    sample = vae.decode(z, sample_size=(13, 30, 26)).sample
    for chunk in (1, 2, 3):
        latents = torch.cat(list(vae.encode_stream(video, chunk)), dim=2)
        torch.testing.assert_close(latents, z, atol=1e-5, rtol=1e-5)
        frames = torch.cat(list(vae.decode_stream(z, (13, 30, 26), chunk)), dim=2)
        torch.testing.assert_close(frames, sample, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_slices_are_the_batch() -> None:
    vae = tiny_vae()
    video = noise(3, 3, 5, 12, 16)
    z, sample = whole(vae, video)
    vae.enable_slicing()
    torch.testing.assert_close(vae.encode(video).latent_dist.mode(), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(z).sample, sample, atol=1e-4, rtol=1e-5)


def test_tiles_stay_as_they_were_set() -> None:
    vae = tiny_vae()
    assert (vae.tile_size, vae.tile_stride) == ((256, 256), (192, 192))
    vae.enable_tiling(64, 32, 32)
    vae.disable_tiling()
    assert not vae.use_tiling
    vae.enable_tiling()
    assert vae.use_tiling
    assert (vae.tile_size, vae.tile_stride) == ((64, 32), (32, 24))
    vae.enable_tiling(tile_sample_min_height=128)
    assert (vae.tile_size, vae.tile_stride) == ((128, 32), (96, 24))
    odd = tiny_vae(patch_size=3)  # compression 6
    odd.enable_tiling()
    assert (odd.tile_size, odd.tile_stride) == ((258, 258), (192, 192))


def test_checkpointing_of_tiles_in_chunks_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stgen.models.autoencoder._CHUNK_PIXELS", {"cpu": 1})
    gradients = []
    for checkpointing in (False, True):
        vae = tiny_vae().train()
        vae.enable_tiling(16, 16, 8, 8)
        if checkpointing:
            vae.enable_gradient_checkpointing()
        vae(noise(1, 3, 9, 20, 16)).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in vae.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient)


# --- Bottlenecks --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_fsq_has_exactly_its_levels(levels: list[int], seed: int) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    z = torch.randn(2, len(levels), 2, 40, 40, generator=torch.Generator().manual_seed(seed)) * 4
    codes = quantizer(z)
    for level, channel in zip(levels, codes.unbind(1), strict=True):
        assert channel.unique().numel() == level
        assert channel.abs().max() <= 1
    indices = quantizer.codes_to_indices(codes)
    assert indices.min() >= 0
    assert indices.max() < quantizer.codebook_size
    torch.testing.assert_close(quantizer.indices_to_codes(indices), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fsq_has_its_levels_in_half_precision(dtype: torch.dtype) -> None:
    quantizer = FiniteScalarQuantizer((2, 3, 8, 16))
    z = torch.randn(1, 4, 1, 60, 60, generator=torch.Generator().manual_seed(0)) * 5
    codes = quantizer(z.to(dtype))
    assert codes.dtype == dtype
    assert [channel.unique().numel() for channel in codes.unbind(1)] == [2, 3, 8, 16]


def test_fsq_numbers_every_code_once() -> None:
    quantizer = FiniteScalarQuantizer((3, 4, 5))
    numbers = torch.arange(60).view(1, 1, 1, 60)
    codes = quantizer.indices_to_codes(numbers)
    assert len({tuple(code.tolist()) for code in codes[0, :, 0, 0].T}) == 60
    assert torch.equal(quantizer.codes_to_indices(codes), numbers)
    with pytest.raises(ValueError, match=r"indices is \(0, 60\), allowed: numbers from 0 to 59"):
        quantizer.indices_to_codes(torch.tensor([[[[0, 60]]]]))


def test_fsq_passes_the_gradient_and_keeps_zero() -> None:
    quantizer = FiniteScalarQuantizer((8, 5))
    z = torch.zeros(1, 2, 1, 1, 1, requires_grad=True)
    codes = quantizer(z)
    assert not codes.any()
    codes.sum().backward()
    assert (z.grad > 0.5).all()


def test_fsq_latents_are_certain() -> None:
    posterior = tiny_vae(**FORMS["fsq"]).encode(noise(1, 3, 5, 8, 8)).latent_dist
    assert torch.equal(posterior.sample(), posterior.mode())
    assert not posterior.std.any()


def test_kl_begins_with_a_narrow_posterior() -> None:
    posterior = AutoencoderKLSTGen(block_out_channels=(8, 8, 8, 8)).encode(noise(1, 3, 5, 16, 16)).latent_dist
    assert posterior.std.max() < 0.2


# --- Diffusers ----------------------------------------------------------------------------------------------------


def test_saved_weights_open_in_a_fresh_process(tmp_path: Path) -> None:
    video = noise(1, 3, 6, 10, 12)
    tensors = {"video": video}
    for form, arguments in FORMS.items():
        vae = tiny_vae(**arguments)
        vae.save_pretrained(tmp_path / form)
        with torch.no_grad():
            tensors[form] = vae(video).sample.contiguous()
    save_file(tensors, tmp_path / "tensors.safetensors")
    code = (
        "import sys, torch; from safetensors.torch import load_file; from stgen import AutoencoderKLSTGen\n"
        "torch.set_num_threads(1); torch.set_grad_enabled(False)\n"
        "tensors = load_file(sys.argv[1] + '/tensors.safetensors'); video = tensors.pop('video')\n"
        "for form, expected in tensors.items():\n"
        "    vae = AutoencoderKLSTGen.from_pretrained(sys.argv[1] + '/' + form).eval()\n"
        "    torch.testing.assert_close(vae(video).sample, expected, atol=1e-4, rtol=1e-5)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.parametrize("form", ["default", "wan", "fsq"])
def test_gradient_checkpointing_gives_the_same_gradients(form: str) -> None:
    video = noise(1, 3, 5, 12, 12)
    gradients = []
    for checkpointing in (False, True):
        vae = tiny_vae(**FORMS[form]).train()
        if checkpointing:
            vae.enable_gradient_checkpointing()
        vae(video).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in vae.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-6)


@torch._dynamo.config.patch(recompile_limit=64)  # a variant for each width and resolution; by default 8
def test_regional_compilation_gives_the_same_video() -> None:
    vae = tiny_vae()
    video = noise(1, 3, 5, 8, 8)
    _, expected = whole(vae, video)
    vae.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(vae, video)[1], expected)
    with torch.no_grad():  # one chunk
        torch.testing.assert_close(vae(video).sample, expected, atol=1e-4, rtol=1e-5)
    torch._dynamo.reset()
    vae = tiny_vae()
    vae.compile_repeated_blocks(backend="eager")  # what is remembered between chunks breaks the graph
    z = torch.cat(list(vae.encode_stream(video, 1)), dim=2)
    frames = torch.cat(list(vae.decode_stream(z, (5, 8, 8), 1)), dim=2)
    torch.testing.assert_close(frames, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_sequential_offload_and_layerwise_casting(form: str) -> None:
    """Both bring the weights of a layer when that layer is called, so no layer's weights may be read from outside."""
    video = noise(1, 3, 5, 12, 16)
    expected = tiny_vae(**FORMS[form])(video).sample
    vae = cpu_offload(tiny_vae(**FORMS[form]), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in vae.parameters())
    torch.testing.assert_close(vae(video).sample, expected)
    vae = tiny_vae(**FORMS[form])
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert vae.decoder.conv_in.weight.dtype == torch.float8_e4m3fn
    assert (vae(video).sample - expected).abs().mean() < 0.5 * expected.abs().mean()


@pytest.mark.parametrize("form", ["default", "stable diffusion"])
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@torch.no_grad()
def test_group_offload_brings_every_weight(form: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`encode` and `decode` are no `forward`, at which diffusers would bring what belongs to no block."""
    vae = tiny_vae(**FORMS[form])
    vae.enable_group_offload(torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
    brought: set[torch.nn.Parameter] = set()
    monkeypatch.setattr(
        ModuleGroup,
        "onload_",
        lambda self: brought.update(self.parameters, *(module.parameters() for module in self.modules)),
    )
    vae.decode(vae.encode(noise(1, 3, 5, 12, 16)).latent_dist.mode())
    assert not [name for name, parameter in vae.named_parameters() if parameter not in brought]


@torch.no_grad()
def test_half_precision_runs_and_is_close() -> None:
    vae = tiny_vae(**FORMS["wan"])
    video = noise(1, 3, 5, 12, 16)
    expected = vae(video).sample
    half = vae.to(torch.bfloat16)(video.bfloat16()).sample
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().mean() < 0.05 * expected.abs().mean()


# --- Refusals -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 1, 2, 8, 8), r"x.shape is \(1, 1, 2, 8, 8\), allowed: \(b, 3, t, h, w\)"),
        (torch.zeros(1, 3, 0, 8, 8), r"x.shape is \(1, 3, 0, 8, 8\)"),
        (torch.zeros(3, 2, 8, 8), "x.shape"),
        (torch.full((1, 3, 2, 8, 8), float("nan")), r"range of x is \(nan, nan\), allowed: finite pixels in \[-1, 1\]"),
        (torch.zeros(1, 3, 2, 8, 8).index_fill(2, torch.tensor(1), torch.inf), "range of x"),
        (torch.full((1, 3, 2, 8, 8), 255.0), r"range of x is \(255.0, 255.0\)"),
    ],
)
def test_what_is_no_video_is_refused(video: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_vae().encode(video)
    with pytest.raises(ValueError, match=message):
        list(tiny_vae().encode_stream(iter([video])))


@torch.no_grad()
def test_what_are_no_latents_is_refused() -> None:
    vae = tiny_vae()
    with pytest.raises(ValueError, match=r"z.shape is \(1, 5, 2, 4, 4\), allowed: \(b, 4, t, h, w\)"):
        vae.decode(torch.zeros(1, 5, 2, 4, 4))
    with pytest.raises(ValueError, match="z.shape"):
        list(vae.decode_stream(torch.zeros(1, 5, 2, 4, 4)))
    with pytest.raises(ValueError, match=r"sample_size is \(9, 16, 16\), allowed: that of a video with latents"):
        vae.decode(torch.zeros(1, 4, 2, 4, 4), sample_size=(9, 16, 16))
    with pytest.raises(ValueError, match="frames is 'no clip', allowed: at least one frame"):
        list(vae.encode_stream(iter([])))
    with pytest.raises(ValueError, match="latents is 'no latents', allowed: at least one"):
        list(vae.decode_stream(iter([])))
    with pytest.raises(ValueError, match="chunk is 0"):
        list(vae.decode_stream(torch.zeros(1, 4, 2, 4, 4), chunk=0))


@pytest.mark.parametrize("chunk", [1, 4])
def test_pieces_that_do_not_fit_are_refused(chunk: int) -> None:
    vae = tiny_vae()
    with pytest.raises(ValueError, match=r"x.shape is \(1, 3, 4, 12, 8\), allowed: .* of other pieces in all but t"):
        list(vae.encode_stream(iter([noise(1, 3, 5, 8, 8), noise(1, 3, 4, 12, 8)]), chunk))
    with pytest.raises(ValueError, match=r"z.shape is \(2, 4, 1, 4, 4\), allowed: .* of other pieces in all but t"):
        list(vae.decode_stream(iter([noise(1, 4, 2, 4, 4), noise(2, 4, 1, 4, 4)]), chunk=chunk))
    for size in ((4, 16, 16), (10, 16, 16), (9, 20, 16), (9, 16, -3)):  # of a video of 6 to 9 frames, 16x16
        with pytest.raises(ValueError, match="sample_size is"):
            list(vae.decode_stream(iter([noise(1, 4, 3, 4, 4)]), size, chunk))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temporal_downsample": (True,)}, r"temporal_downsample is \(True,\), allowed: 2 values"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"bottleneck": "vq"}, "bottleneck is 'vq', allowed: kl or fsq"),
        ({"bottleneck": "fsq"}, "fsq_levels is None, allowed: 4 numbers of levels"),
        ({"bottleneck": "fsq", "fsq_levels": (8, 8, 8, 1)}, "fsq_levels is"),
        ({"fsq_levels": (8, 8, 8, 8)}, "fsq_levels is"),
        ({"resample": "stride"}, "resample is 'stride', allowed: shuffle or conv"),
        ({"norm": "batch"}, "norm is 'batch', allowed: rms or group"),
        ({"norm": "group", "block_out_channels": (8, 48, 16)}, "block_out_channels"),
        ({"patch": "haar", "patch_size": 3}, "patch_size is 3, allowed: a power of 2"),
        ({"block_out_channels": (8, 24, 16)}, r"block_out_channels is \(8, 24, 16\), allowed: 8 \* 8 a multiple of 24"),
        ({"layers_per_block": 0}, "layers_per_block is 0"),
        ({"decoder_layers_per_block": 0}, "decoder_layers_per_block is 0"),
    ],
)
def test_a_nonsense_configuration_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_vae(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((30, 32), "tile_sample_min_height is 30, allowed: a multiple of 4"),
        ((32, 32, 40, 32), "tile_sample_stride_height is 40, allowed: a multiple of 4 up to 32"),
        ((32, 32, 16, 6), "tile_sample_stride_width is 6"),
        ((0, 32), "tile_sample_min_height is 0"),
    ],
)
def test_nonsense_tiles_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_vae().enable_tiling(*arguments)


def test_random_weights_of_the_tests_are_no_special_case() -> None:
    """What `fill_zeros` fills is what begins at zero: without it every block is its shortcut."""
    vae = AutoencoderKLSTGen(block_out_channels=(8, 8, 8, 8))
    assert any(not parameter.any() for name, parameter in vae.named_parameters() if name.endswith("weight"))
    fill_zeros(vae)
    assert all(parameter.any() for parameter in vae.parameters())
