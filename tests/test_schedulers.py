"""The one sampling loop under every scheduler of diffusers that it is meant for."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_transformer
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from stgen import STGenInpaintPipeline, STGenPipeline, STGenTransformer3DModel
from stgen.flow import dynamic_shift, shift_time
from stgen.masks import moving_box
from stgen.models.latents import latent_shape
from stgen.objective import FlowConfig, denoising_losses, make_scheduler

FLOW, SHIFTED, DYNAMIC = FlowConfig(), FlowConfig(shift=3.0), FlowConfig(dynamic_shift=True)
EPSILON, V = FlowConfig(objective="epsilon"), FlowConfig(objective="v_prediction")
V_ZERO = FlowConfig(objective="v_prediction", zero_terminal_snr=True)
AS_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# A solver of diffusers that rounds its timesteps down, to 1 / 1000, misjudges the noise by as much.
EXACT, ROUNDED = 1e-4, 5e-3
# DPM++ and UniPC take alpha_bar = 2^-24 for 0, and with it sqrt(2^-24) of the data for none.
NEARLY = 2e-3

SCHEDULERS = [
    (FlowMatchEulerDiscreteScheduler, FLOW, {}, EXACT),
    (FlowMatchEulerDiscreteScheduler, SHIFTED, {}, EXACT),
    (FlowMatchEulerDiscreteScheduler, DYNAMIC, {}, EXACT),
    (FlowMatchHeunDiscreteScheduler, FLOW, {}, EXACT),
    (FlowMatchHeunDiscreteScheduler, DYNAMIC, {}, EXACT),
    (UniPCMultistepScheduler, FLOW, AS_FLOW, ROUNDED),
    (UniPCMultistepScheduler, SHIFTED, AS_FLOW | {"flow_shift": 3.0}, ROUNDED),
    (UniPCMultistepScheduler, DYNAMIC, AS_FLOW, ROUNDED),
    (DPMSolverMultistepScheduler, FLOW, AS_FLOW, ROUNDED),
    (DPMSolverMultistepScheduler, DYNAMIC, AS_FLOW, ROUNDED),
    (DDIMScheduler, EPSILON, {}, EXACT),
    (DDIMScheduler, V, {}, EXACT),
    (DDIMScheduler, V_ZERO, {}, EXACT),
    (DPMSolverMultistepScheduler, EPSILON, {}, EXACT),
    (DPMSolverMultistepScheduler, V_ZERO, {}, NEARLY),
    (UniPCMultistepScheduler, EPSILON, {}, EXACT),
    (UniPCMultistepScheduler, V_ZERO, {}, NEARLY),
    (DDPMScheduler, EPSILON, {}, EXACT),
    (DDPMScheduler, V_ZERO, {}, EXACT),
]
NAMES = [f"{kind.__name__}-{i}" for i, (kind, *_) in enumerate(SCHEDULERS)]
every_scheduler = pytest.mark.parametrize(("kind", "config", "changes", "tolerance"), SCHEDULERS, ids=NAMES)


class Oracle(STGenTransformer3DModel):
    """Knows the clean latents, and so the true prediction for any noisy ones."""

    truth: torch.Tensor
    objective: FlowConfig

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        truth = self.truth.expand_as(hidden_states)
        if self.objective.objective == "flow":
            return ((hidden_states - truth) / (timestep.float() / 1000).view(-1, 1, 1, 1, 1),)
        alpha_bar = make_scheduler(self.objective).alphas_cumprod[timestep.long()].view(-1, 1, 1, 1, 1)
        noise = (hidden_states - alpha_bar.sqrt() * truth) / (1 - alpha_bar).sqrt()
        if self.objective.objective == "epsilon":
            prediction = noise
        else:
            prediction = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * truth
        if self.config.get("learn_sigma"):
            variance = torch.linspace(-1, 1, len(hidden_states)).view(-1, 1, 1, 1, 1)
            prediction = torch.cat([prediction, variance.expand_as(prediction)], dim=1)
        return (prediction,)


def with_scheduler(pipeline: STGenPipeline, kind: type, config: FlowConfig, changes: dict) -> STGenPipeline:
    """What users do: begin with the exported scheduler, and swap it for one made from its configuration."""
    pipeline.scheduler = make_scheduler(config)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
    return pipeline


def with_oracle(pipeline: STGenPipeline, config: FlowConfig) -> STGenPipeline:
    oracle = Oracle(**{k: v for k, v in tiny_transformer().config.items() if not k.startswith("_")})
    oracle.truth = torch.randn(1, *latent_shape(pipeline.vae, 9, 16, 16), generator=torch.Generator().manual_seed(9))
    oracle.objective = config
    pipeline.transformer = oracle
    return pipeline


@every_scheduler
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_an_oracle_is_sampled_to_the_truth(
    tiny_pipeline: STGenPipeline, kind: type, config: FlowConfig, changes: dict, tolerance: float, steps: int
) -> None:
    pipeline = with_oracle(with_scheduler(tiny_pipeline, kind, config, changes), config)
    seen = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"][0].item()), with_kwargs=True
    )
    latents = pipeline(
        "a 3", num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).frames
    torch.testing.assert_close(latents, pipeline.transformer.truth, atol=tolerance, rtol=0)
    calls = 2 * steps - 1 if kind is FlowMatchHeunDiscreteScheduler else steps
    assert len(seen) == pipeline.num_timesteps == calls
    # From the noise on; DPM++ begins at sigma 0.999, which a shift below 1 moves further from 1.
    assert seen[0] == max(seen) >= (980 if kind is DPMSolverMultistepScheduler and config is DYNAMIC else 998)
    assert min(seen) >= 0


@every_scheduler
def test_given_pixels_come_back_under_every_scheduler(
    tiny_pipeline: STGenPipeline, kind: type, config: FlowConfig, changes: dict, tolerance: float
) -> None:
    pipeline = with_scheduler(tiny_pipeline, kind, config, changes)
    clip = np.random.default_rng(0).random((9, 16, 16, 3)).astype(np.float32)
    mask = moving_box((9, 16, 16), torch.Generator().manual_seed(0))
    call = {"video": clip, "mask": mask, "num_inference_steps": 4, "output_type": "np"}
    frames = [pipeline("a 3", generator=torch.Generator().manual_seed(1), **call).frames[0] for _ in range(2)]
    given = mask[0].numpy() == 0
    np.testing.assert_allclose(frames[0][given], clip[given], atol=1e-6)
    assert np.isfinite(frames[0]).all()
    assert frames[0][~given].std() > 0
    np.testing.assert_array_equal(*frames)  # the generator decides, whatever state the first call left behind


@every_scheduler
def test_saved_folders_and_siblings_keep_the_scheduler(
    tiny_pipeline: STGenPipeline, tmp_path: Path, kind: type, config: FlowConfig, changes: dict, tolerance: float
) -> None:
    pipeline = with_scheduler(tiny_pipeline, kind, config, changes)
    call = {"num_inference_steps": 2, "output_type": "latent"}
    expected = pipeline("a 3", generator=torch.Generator().manual_seed(1), **call).frames
    pipeline.save_pretrained(tmp_path)  # after a call, which must leave no trace in the configuration
    loaded = STGenPipeline.from_pretrained(tmp_path)
    for other in (loaded, STGenPipeline.from_pipe(pipeline), STGenInpaintPipeline.from_pipe(pipeline)):
        assert type(other.scheduler) is kind
        other.set_progress_bar_config(disable=True)
        again = STGenPipeline.__call__(other, "a 3", generator=torch.Generator().manual_seed(1), **call).frames
        assert torch.equal(again, expected)


@pytest.mark.parametrize(("kind", "changes"), [(k, c) for k, config, c, _ in SCHEDULERS if config is DYNAMIC])
def test_sampling_is_shifted_as_training_is(tiny_pipeline: STGenPipeline, kind: type, changes: dict) -> None:
    """The times of a scheduler with dynamic shifting are those without it, shifted by the clip's r."""
    for size in ({"num_frames": 1, "height": 8, "width": 8}, {"num_frames": 9, "height": 16, "width": 24}):
        times = {}
        for name, config in (("plain", FLOW), ("shifted", DYNAMIC)):
            pipeline = with_scheduler(tiny_pipeline, kind, config, changes)
            before = dict(pipeline.scheduler.config)
            pipeline("a 3", num_inference_steps=5, output_type="latent", **size)
            assert dict(pipeline.scheduler.config) == before
            times[name] = pipeline.scheduler.sigmas[:-1]
        latent_frames = latent_shape(pipeline.vae, *size.values())[1]
        shift = dynamic_shift(size["height"], size["width"], latent_frames)
        torch.testing.assert_close(times["shifted"], shift_time(times["plain"], shift), atol=2e-4, rtol=1e-4)


def test_the_first_step_is_the_first_where_rounding_makes_two_equal(tiny_pipeline: STGenPipeline) -> None:
    changes = AS_FLOW | {"flow_shift": 30.0}
    pipeline = with_oracle(with_scheduler(tiny_pipeline, UniPCMultistepScheduler, FLOW, changes), FLOW)
    indices: list[int] = []

    def record(pipe: STGenPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        indices.append(pipe.scheduler.step_index)
        return {}

    pipeline("a 3", num_inference_steps=60, callback_on_step_end=record, output_type="latent")
    assert pipeline.scheduler.timesteps[0] == pipeline.scheduler.timesteps[1]
    assert indices == list(range(1, 61))


@pytest.mark.parametrize(("kind", "config", "changes"), [(k, c, ch) for k, c, ch, _ in SCHEDULERS if c is V_ZERO])
def test_the_variance_half_is_dropped(tiny_pipeline: STGenPipeline, kind: type, config: FlowConfig, changes: dict):
    pipeline = with_oracle(with_scheduler(tiny_pipeline, kind, config, changes), config)
    pipeline.transformer.register_to_config(learn_sigma=True)
    latents = pipeline("a 3", num_inference_steps=5, output_type="latent").frames
    torch.testing.assert_close(latents, pipeline.transformer.truth, atol=EXACT, rtol=0)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_ddpm_steps_with_the_learned_variance(tiny_pipeline: STGenPipeline, guidance_scale: float) -> None:
    """With all of f = 1, the variance is beta: the prompt's half says 1 and the other half -1."""
    noise = torch.randn(1, *latent_shape(tiny_pipeline.vae, 9, 16, 16), generator=torch.Generator().manual_seed(3))
    samples = {}
    for variance_type in ("learned_range", "fixed_large", "fixed_small"):
        changes = {"variance_type": variance_type}
        pipeline = with_oracle(with_scheduler(tiny_pipeline, DDPMScheduler, EPSILON, changes), EPSILON)
        pipeline.transformer.register_to_config(learn_sigma=True)
        b = 2 if guidance_scale == 1 else 1  # the oracle's variance runs from -1 to 1 over the batch
        states = []
        pipeline(
            ["a 3"] * b,
            latents=noise.repeat(b, 1, 1, 1, 1),
            num_inference_steps=20,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(1) for _ in range(b)],
            output_type="latent",
            callback_on_step_end=lambda pipe, i, t, tensors, states=states: states.append(tensors["latents"]) or {},
        )
        samples[variance_type] = states[9][-1]
    torch.testing.assert_close(samples["learned_range"], samples["fixed_large"], atol=1e-3, rtol=1e-3)
    assert (samples["learned_range"] - samples["fixed_small"]).abs().max() > 1e-2


def test_eta_and_what_no_scheduler_takes(tiny_pipeline: STGenPipeline) -> None:
    call = {"num_inference_steps": 3, "output_type": "latent"}
    with pytest.raises(ValueError, match="eta is 0.5, allowed: 0 with FlowMatchEulerDiscreteScheduler"):
        tiny_pipeline("a 3", eta=0.5, **call)
    pipeline = with_scheduler(tiny_pipeline, DDIMScheduler, EPSILON, {})
    with pytest.raises(ValueError, match="eta is 2, allowed: 0 to 1"):
        pipeline("a 3", eta=2, **call)
    results = [pipeline("a 3", eta=eta, generator=torch.Generator().manual_seed(0), **call).frames for eta in (0, 1, 1)]
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[1])
    changes = {"variance_type": "learned_range"}
    pipeline = with_oracle(with_scheduler(pipeline, DPMSolverMultistepScheduler, EPSILON, changes), EPSILON)
    pipeline.transformer.register_to_config(learn_sigma=True)
    with pytest.raises(ValueError, match="scheduler.variance_type is 'learned_range', allowed: None with DPMSolver"):
        pipeline("a 3", **call)


def test_initial_noise_is_scaled_to_the_scheduler(tiny_pipeline: STGenPipeline) -> None:
    """EulerDiscrete, whose sigmas are not variance preserving, begins with noise of sigma_max and scales the input."""
    from diffusers import EulerDiscreteScheduler

    pipeline = with_oracle(with_scheduler(tiny_pipeline, EulerDiscreteScheduler, EPSILON, {}), EPSILON)
    seen = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].std().item()), with_kwargs=True
    )
    noise = torch.Generator().manual_seed(0)
    latents = pipeline("a 3", num_inference_steps=10, generator=noise, output_type="latent").frames
    assert pipeline.scheduler.init_noise_sigma > 10
    assert seen[0] == pytest.approx(1, abs=0.15)
    torch.testing.assert_close(latents, pipeline.transformer.truth, atol=EXACT, rtol=0)


def test_dynamic_shift_takes_the_exponential_form_too(tiny_pipeline: STGenPipeline) -> None:
    times = []
    for time_shift_type in ("linear", "exponential"):
        changes = {"time_shift_type": time_shift_type}
        pipeline = with_scheduler(tiny_pipeline, FlowMatchEulerDiscreteScheduler, DYNAMIC, changes)
        pipeline("a 3", num_inference_steps=3, output_type="latent")
        times.append(pipeline.scheduler.sigmas)
    torch.testing.assert_close(*times)
    assert times[0][0] == pytest.approx(1)
    assert math.isfinite(times[0].sum())


# --- Regression: one step without noise ---------------------------------------------------------------------------


def test_a_regression_is_the_model_s_one_answer(tiny_pipeline: STGenPipeline, tmp_path: Path) -> None:
    tiny_pipeline.scheduler = make_scheduler(FlowConfig(objective="regression"))
    tiny_pipeline.save_pretrained(tmp_path)
    code = (
        "import sys, torch, numpy; torch.set_num_threads(1); from stgen import STGenPipeline; "
        "p = STGenPipeline.from_pretrained(sys.argv[1]); "
        "numpy.save(sys.argv[2], p('a 3', num_inference_steps=1, output_type='latent').frames)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(tmp_path / "latents.npy")], check=True)
    asked: dict[str, torch.Tensor] = {}
    tiny_pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: asked.update(kwargs), with_kwargs=True
    )
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        call = {"num_inference_steps": 1, "guidance_scale": 4.0, "output_type": "latent", "generator": generator}
        latents = tiny_pipeline("a 3", **call).frames
        torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "latents.npy")), latents, atol=1e-6, rtol=0)
    assert not asked["hidden_states"].any()
    assert asked["timestep"].tolist() == [1000, 1000]
    with pytest.raises(ValueError, match="num_inference_steps is 2, allowed: 1"):
        tiny_pipeline("a 3", num_inference_steps=2)


def test_a_regression_learns_clean_latents_without_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 2, 4, 3, 2, 2, generator=generator)
    mask = torch.ones(2, 1, 3, 2, 2)
    mask[:, :, 0] = 0
    seen = []

    def model(noisy: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        seen.append((noisy, timestep))
        return (x + 0.5 * (mask == 1) + 9 * (mask == 0),)

    inputs = {"latents": x, "noise": noise, "time": torch.tensor([0.2, 0.7]), "condition_mask": mask}
    inputs |= {"text": torch.zeros(2, 1, 4), "text_mask": torch.ones(2, 1, dtype=torch.bool)}
    losses = denoising_losses(model, inputs, FlowConfig(objective="regression"))  # type: ignore[arg-type]
    assert losses["loss"].item() == pytest.approx(0.25)
    ((noisy, timestep),) = seen
    assert not noisy.any()
    assert timestep.tolist() == [1000, 1000]
    for name, value in (("shift", 2.0), ("dynamic_shift", True), ("min_snr_gamma", 5.0), ("zero_terminal_snr", True)):
        with pytest.raises(ValueError, match=f"flow.{name} is {value}.*regression"):
            FlowConfig(objective="regression", **{name: value})
