import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fill_zeros, tiny_transformer
from PIL import Image
from safetensors.torch import load_file

from stgen import (
    AutoencoderKLSTGen,
    STGenInpaintPipeline,
    STGenInterpolationPipeline,
    STGenPipeline,
    STGenPredictionPipeline,
    STGenTransformer3DModel,
)
from stgen.masks import moving_box, predict
from stgen.models.latents import latent_shape
from stgen.text import encode_text


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def video(t: int = 9, h: int = 16, w: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (t, h, w, 3)).astype(np.uint8)


def as_float(frames: np.ndarray) -> np.ndarray:
    return frames.astype(np.float32) / 255


def as_uint8(frames: np.ndarray) -> np.ndarray:
    return (frames * 255).round().astype(np.uint8)


def sibling(cls: type, pipeline: STGenPipeline) -> STGenPipeline:
    made = cls(**pipeline.components)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(("t", "h", "w"), [(1, 16, 16), (6, 17, 15), (9, 8, 20)])
def test_any_size(tiny_pipeline: STGenPipeline, t: int, h: int, w: int) -> None:
    call = {"num_frames": t, "height": h, "width": w, "num_inference_steps": 2, "output_type": "np"}
    frames = tiny_pipeline("a 3", generator=seeded(), **call).frames
    assert frames.shape == (1, t, h, w, 3)
    assert np.isfinite(frames).all()
    assert frames.std() > 0


def test_given_pixels_come_back_exactly(tiny_pipeline: STGenPipeline) -> None:
    clip = video()
    predicted = sibling(STGenPredictionPipeline, tiny_pipeline)(
        as_float(clip[:4]), num_inference_steps=2, output_type="np"
    ).frames[0]
    np.testing.assert_array_equal(as_uint8(predicted[:4]), clip[:4])

    between = sibling(STGenInterpolationPipeline, tiny_pipeline)(
        as_float(clip[:2]), as_float(clip[-2:]), num_inference_steps=2, output_type="np"
    ).frames[0]
    np.testing.assert_array_equal(as_uint8(between[[0, 1, -2, -1]]), clip[[0, 1, -2, -1]])

    mask = moving_box((9, 16, 16), seeded())
    filled = sibling(STGenInpaintPipeline, tiny_pipeline)(
        [Image.fromarray(frame) for frame in clip], mask, num_inference_steps=2, output_type="np"
    ).frames[0]
    given = mask[0].numpy() == 0
    np.testing.assert_array_equal(as_uint8(filled)[given], clip[given])
    assert (as_uint8(filled)[~given] != clip[~given]).any()


def test_hidden_pixels_change_nothing(tiny_pipeline: STGenPipeline) -> None:
    """Leak-freedom, end to end: every input of the model is bit-identical whatever lies under the mask."""
    mask = moving_box((9, 16, 16), seeded())
    hidden = mask[0].numpy() == 1
    seen: list[list[torch.Tensor]] = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen[-1] += [x.clone() for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)]

    tiny_pipeline.transformer.register_forward_pre_hook(record, with_kwargs=True)
    for fill in (0, 1, -1, math.nan):
        clip = as_float(video())
        clip[hidden] = fill
        seen.append([])
        tiny_pipeline("a 3", video=clip, mask=mask, num_inference_steps=2, generator=seeded())
    for other in seen[1:]:
        assert len(seen[0]) == len(other) > 0
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_siblings_are_the_same_loop_under_a_mask(tiny_pipeline: STGenPipeline) -> None:
    clip = as_float(video())
    mask = np.ones((9, 16, 16), np.float32)
    mask[:4] = 0
    call = {"num_inference_steps": 3, "output_type": "np"}
    base = tiny_pipeline("", video=clip, mask=mask, guidance_scale=1.0, generator=seeded(), **call).frames
    predicted = sibling(STGenPredictionPipeline, tiny_pipeline)(clip[:4], generator=seeded(), **call).frames
    np.testing.assert_allclose(predicted, base, atol=1e-6)


def test_batches_are_what_singles_are(tiny_pipeline: STGenPipeline) -> None:
    call = {"num_inference_steps": 2, "output_type": "np"}
    prompts = ["a 3 moving up", "the digit 7"]
    both = tiny_pipeline(prompts, num_videos_per_prompt=2, generator=[seeded(i) for i in range(4)], **call).frames
    for i in range(4):
        one = tiny_pipeline(prompts[i // 2], generator=seeded(i), **call).frames[0]
        np.testing.assert_allclose(both[i], one, atol=1e-4)


def test_latents_embeddings_and_callback_are_used(tiny_pipeline: STGenPipeline) -> None:
    call = {"num_inference_steps": 2, "output_type": "latent"}
    noise = torch.randn(1, *latent_shape(tiny_pipeline.vae, 9, 16, 16), generator=seeded(5))
    expected = tiny_pipeline("a 3", generator=seeded(5), **call).frames
    assert torch.equal(tiny_pipeline("a 3", latents=noise, **call).frames, expected)
    embeds, _, mask, _ = tiny_pipeline.encode_prompt("a 3", do_classifier_free_guidance=False)
    again = tiny_pipeline(prompt_embeds=embeds, prompt_attention_mask=mask, latents=noise, **call).frames
    assert torch.equal(again, expected)
    steps = []

    def zero(pipeline: STGenPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert not tiny_pipeline("a 3", callback_on_step_end=zero, **call).frames.any()
    assert steps == [0, 1]
    assert not torch.equal(tiny_pipeline("a 3", latents=noise, guidance_scale=1.0, **call).frames, expected)


CONDITIONED = {
    "class": {"num_classes": 4},
    "fps": {"size_conditioning": "fps"},
    "null text": {"null_text": "zero"},
    "isolated": {"isolate_given": True},
}


@pytest.mark.parametrize("change", ["guidance ends", "another text"])
@pytest.mark.parametrize("form", CONDITIONED)
def test_callbacks_that_change_what_the_model_is_told(
    tiny_pipeline: STGenPipeline, form: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_pipeline.transformer = tiny_transformer(**CONDITIONED[form])
    sizes = []
    tiny_pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )

    def callback(pipeline: STGenPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if change == "guidance ends":
            pipeline._guidance_scale = 1.0
            return {}
        return {"prompt_embeds": tensors["prompt_embeds"].flip(1)}

    def run() -> torch.Tensor:
        return tiny_pipeline(
            "a 3",
            video=as_float(video()),
            mask=predict((9, 16, 16), given=5),
            class_labels=1 if form == "class" else None,
            num_inference_steps=3,
            generator=seeded(),
            output_type="latent",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        ).frames

    latents = run()
    assert latents.shape[0] == 1
    assert sizes == [2, 1, 1] if change == "guidance ends" else [2, 2, 2]
    monkeypatch.setattr("stgen.pipelines.pipeline_stgen.GivenCache", lambda: None)
    torch.testing.assert_close(run(), latents, atol=1e-5, rtol=1e-5)  # kept keys are never stale


def test_nothing_to_guide_to_runs_once(tiny_pipeline: STGenPipeline) -> None:
    for config, labels, expected in (({}, None, 1), ({"num_classes": 4}, None, 1), ({"num_classes": 4}, 2, 2)):
        tiny_pipeline.transformer = tiny_transformer(text_dim=None, **config)
        sizes = []
        tiny_pipeline.transformer.register_forward_pre_hook(
            lambda module, args, kwargs, sizes=sizes: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        frames = tiny_pipeline(class_labels=labels, num_inference_steps=1, output_type="np").frames
        assert (len(frames), sizes) == (1, [expected])


def test_text_encoder_that_an_offload_hook_moves(tiny_pipeline: STGenPipeline) -> None:
    """Under CPU offload the encoder is moved when it is called: its states are elsewhere than it was before."""
    encoder = tiny_pipeline.text_encoder

    def moved(module: torch.nn.Module, args: tuple, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.to("meta")
        return output

    encoder.register_forward_hook(moved)
    states, mask = encode_text(tiny_pipeline.tokenizer, encoder, ["a 3"], 8)
    assert states.device == mask.device == torch.device("meta")


def test_text_encoder_whose_weights_come_when_it_is_called(tiny_pipeline: STGenPipeline) -> None:
    """Under sequential CPU offload they are on the meta device before, where token ids would be lost."""
    encoder, arguments = tiny_pipeline.text_encoder, {"do_classifier_free_guidance": False}
    expected = tiny_pipeline.encode_prompt("a 3", **arguments)[0]
    weights, buffers = encoder.state_dict(), dict(encoder.named_buffers())

    def bring(module: torch.nn.Module, *given: Any) -> None:
        module.to_empty(device="cpu")
        module.load_state_dict(weights)
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])

    encoder.to("meta").register_forward_pre_hook(bring, with_kwargs=True)
    assert torch.equal(tiny_pipeline.encode_prompt("a 3", device=torch.device("cpu"), **arguments)[0], expected)


def test_prompts_are_encoded_without_the_other_parts(tiny_pipeline: STGenPipeline, tiny_pipeline_folder: Path) -> None:
    alone = STGenPipeline.from_pretrained(tiny_pipeline_folder, transformer=None, vae=None)
    for ours, expected in zip(alone.encode_prompt("a 3"), tiny_pipeline.encode_prompt("a 3"), strict=True):
        assert torch.equal(ours, expected)
    without = STGenPipeline.from_pretrained(tiny_pipeline_folder, text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="prompt is 'a 3', allowed: None, since there is no text encoder"):
        without("a 3", guidance_scale=1.0)


def test_given_videos_are_resized_as_training_clips_are(tiny_pipeline: STGenPipeline) -> None:
    """In whatever form: bicubic and antialiased, like Pillow's; a checkerboard turns grey, and no pixel leaves the range."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)
    frames[1] = 255 * (np.indices((32, 48)).sum(0) % 2)[..., None]
    small = [Image.fromarray(frame).resize((24, 16), Image.Resampling.BICUBIC) for frame in frames]
    expected = torch.from_numpy(np.stack(small)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    for form in (
        as_float(frames),
        torch.from_numpy(as_float(frames)).movedim(-1, 1),
        [Image.fromarray(x) for x in frames],
    ):
        resized = tiny_pipeline.prepare_video(form, 16, 24)
        torch.testing.assert_close(resized, expected, atol=0.02, rtol=0)
        assert resized.abs().max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prompt is None, allowed: exactly one of prompt and prompt_embeds"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt is 'a batch of 1'"),
        ({"prompt": ["a", "b"], "generator": [torch.Generator()]}, "generator is 'a list of 1'"),
        ({"prompt": "a", "mask": torch.ones(9, 16, 16)}, "given exactly when video is"),
        ({"prompt": "a", "video": as_float(video()), "mask": torch.ones(8, 16, 16)}, "mask.shape"),
        ({"prompt": "a", "video": as_float(video()), "mask": torch.full((9, 16, 16), 0.5)}, "only 1"),
        ({"prompt": ["a"] * 3, "video": np.stack([as_float(video())] * 2), "mask": torch.ones(9, 16, 16)}, "video is"),
        ({"prompt": ["a"] * 4, "video": np.stack([as_float(video())] * 2), "mask": torch.ones(9, 16, 16)}, "video is"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"prompt": "a", "num_frames": 0}, "num_frames is 0, allowed: 1 or more"),
        ({"prompt": "a", "height": 0}, "height is 0"),
        ({"prompt": "a", "fps": 0}, "fps is 0, allowed: above 0"),
        ({"prompt": "a", "class_labels": 1}, "class_labels is 1, allowed: None, since this transformer has no classes"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 2, 2, 2)}, "latents.shape"),
        ({"prompt": "a", "output_type": "tensor"}, "output_type"),
    ],
)
def test_what_does_not_fit_is_named(tiny_pipeline: STGenPipeline, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(**arguments)


def test_pixels_that_are_no_pixels_are_refused(tiny_pipeline: STGenPipeline) -> None:
    mask = np.ones((9, 16, 16), np.float32)
    mask[:4] = 0
    for bad in (video(), as_float(video()) * 2, np.full((9, 16, 16, 3), np.nan, np.float32)):
        with pytest.raises(ValueError, match="given pixels outside"):
            tiny_pipeline("a", video=bad, mask=mask)
    hidden = as_float(video())
    hidden[4:] = np.nan  # never looked at
    frames = tiny_pipeline("a", video=hidden, mask=mask, num_inference_steps=2, output_type="np").frames
    assert np.isfinite(frames).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(tiny_pipeline: STGenPipeline, tiny_pipeline_folder: Path, dtype: torch.dtype) -> None:
    half = STGenPipeline.from_pretrained(tiny_pipeline_folder, dtype=dtype)
    half.set_progress_bar_config(disable=True)
    mask = moving_box((9, 16, 16), seeded())
    call = {"video": as_float(video()), "mask": mask, "num_inference_steps": 2, "output_type": "np"}
    frames, expected = (p("a 3", generator=seeded(), **call).frames for p in (half, tiny_pipeline))
    assert half.transformer.patch_embed.weight.dtype == dtype
    assert np.abs(frames - expected).mean() < 0.02


@pytest.mark.parametrize("component", ["vae", "transformer"])
def test_pickles_are_not_read(tiny_pipeline_folder: Path, tmp_path: Path, component: str) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_pipeline_folder, folder)
    weights = folder / component / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    kind = {"vae": AutoencoderKLSTGen, "transformer": STGenTransformer3DModel}[component]
    with pytest.raises(OSError, match="safetensors"):
        STGenPipeline.from_pretrained(folder)
    with pytest.raises(OSError, match="safetensors"):
        kind.from_pretrained(folder / component)
    with pytest.raises(ValueError, match="use_safetensors is False"):
        kind.from_pretrained(folder / component, use_safetensors=False)


def test_more_given_frames_than_frames(tiny_pipeline: STGenPipeline) -> None:
    with pytest.raises(ValueError, match="fewer than num_frames=9"):
        sibling(STGenPredictionPipeline, tiny_pipeline)(as_float(video(12)))
    with pytest.raises(ValueError, match="fewer than half of num_frames=9"):
        sibling(STGenInterpolationPipeline, tiny_pipeline)(as_float(video(5)), as_float(video(5)))


def test_lora_of_the_pipeline(tiny_pipeline: STGenPipeline, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file

    def latents(pipeline: STGenPipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a 3", num_inference_steps=2, generator=generator, output_type="latent").frames

    plain = latents(tiny_pipeline)
    tiny_pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_qkv", "to_out.0"]))
    fill_zeros(tiny_pipeline.transformer)
    adapted = latents(tiny_pipeline)
    layers = get_peft_model_state_dict(tiny_pipeline.transformer)
    STGenPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    names = list(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    assert all(name.startswith("transformer.transformer_blocks.") for name in names)

    again = STGenPipeline.from_pretrained(tiny_pipeline_folder)
    with pytest.raises(ValueError, match="weight_name is 'evil.bin', allowed: a .safetensors file"):
        again.load_lora_weights(tmp_path, weight_name="evil.bin")
    again.load_lora_weights(tmp_path)
    torch.testing.assert_close(latents(again), adapted, atol=1e-4, rtol=1e-4)
    again.unload_lora_weights()
    torch.testing.assert_close(latents(again), plain, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(adapted, plain, atol=1e-2)
