"""A training step outside of training: on random clips, and on fake tensors (`stgen.footprint`) or real ones.

What it is made of is the trainers' own code: model, objective, optimizer. Random are the clips, and the masks hide as much of
each as the run's masks ever make the trainer encode anew.

Shapes: video `b c t h w`; latents `b z t' h' w'`; text states `b n d`.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode, unset_fake_temporarily

from stgen.averaging import WIDTHS
from stgen.data.reading import Stored
from stgen.encoding import PixelNeeds
from stgen.footprint import States, StepFootprint, optimizer_bytes, step_footprint
from stgen.loop import LoopConfig
from stgen.masks import fold_mask
from stgen.models.latents import VideoVAE, compression_ratios, encode_moments, latent_shape, normalise, temporal_reach
from stgen.objective import denoising_losses
from stgen.optimization import OptimizerConfig, make_optimizer
from stgen.train import TrainConfig, make_model, prepare_training, resolve_stages
from stgen.train_vae import TrainVAEConfig
from stgen.vae_objective import Adversary, VAEObjective

# --- The work of a step -------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What a trainer runs in a step, on random clips."""

    model: nn.Module
    """What is trained, or some of it."""
    beside: list[nn.Module]
    """What is run and not trained with it."""
    run: Callable[[Any, int, tuple[int, int, int]], None]
    """Forward and backward of so many clips of a shape; takes the model as it is called under mixed precision."""
    unknown: float = 1.0
    """What a value is taken for that fake tensors are asked and do not have; see `StepLedger`."""


@dataclass(frozen=True)
class Encoding:
    """What of a clip the VAE encodes in a step of the transformer."""

    clip: bool
    """The whole clip; not where its latents are stored."""
    masked: bool
    """What a mask leaves of it, where the latents of the whole do not serve."""
    given: str
    """What the masks give: nothing, frames (whole ones) or parts of frames."""


def encoding_of(config: TrainConfig, vae: VideoVAE, stored: Stored | None) -> Encoding:
    """The most that some draws of each kind of the mixture take."""
    small, shapes = (5, 8, 8), tuple(config.data.shapes)  # small is enough to tell frames from parts
    drawn = [spec.draw(small, torch.Generator().manual_seed(seed)) for spec in config.masks for seed in range(8)]
    if all(bool((mask == 1).all()) for mask in drawn):
        given = "nothing"
    else:
        given = "frames" if all(bool((mask == mask[..., :1, :1]).all()) for mask in drawn) else "parts"
    kinds = [
        PixelNeeds((spec,), config.seed, compression_ratios(vae)[0], temporal_reach(vae), shapes)
        for spec in config.masks
    ]
    masked = any(kind(position, shape) for kind in kinds for shape in shapes for position in range(8))
    return Encoding(stored is None, masked, given)


def build_transformer(
    whole: TrainConfig, stage: TrainConfig, vae: VideoVAE, text_dim: int, device: torch.device
) -> nn.Module:
    """The model of a run as it is trained: of the last stage's sizes, with adapters, and frozen what never trains."""
    last = resolve_stages(whole)[-1]
    last = dataclasses.replace(last, seed=whole.seed, model=stage.model)
    with device:
        net = make_model(last, vae, text_dim, 10.0)
    prepare_training(dataclasses.replace(whole, model=stage.model), net)
    if whole.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    return net.train()


def transformer_work(
    net: nn.Module, config: TrainConfig, vae: VideoVAE, text: tuple[int, int], encoding: Encoding, device: torch.device
) -> Work:
    """The work of `stgen.train`.

    Args:
        text: tokens of the longest caption and width of their states.
    """

    def run(model: Any, batch: int, shape: tuple[int, int, int]) -> None:
        mask = torch.ones(batch, 1, *shape, device=device)
        if encoding.given != "nothing":
            t, h, _ = shape
            mask[:, :, : (t + 1) // 2, : (h + 1) // 2 if encoding.given == "parts" else h] = 0
        means = torch.randn(batch, *latent_shape(vae, *shape), device=device)
        with torch.no_grad():
            video = torch.rand(batch, 3, *shape, device=device) if encoding.clip or encoding.masked else means
            if encoding.clip:
                means = encode_moments(vae, video).mean
            condition = normalise(vae, encode_moments(vae, video.clone()).mean if encoding.masked else means)
            latents = normalise(vae, means)
        full = partial(torch.full, (batch,), device=device)
        inputs = {
            "latents": latents,
            "noise": torch.randn_like(latents),
            "time": torch.rand(batch, device=device),
            "condition_latents": condition,
            "condition_mask": fold_mask(mask, *compression_ratios(vae)),
            "text": torch.randn(batch, *text, device=device),
            "text_mask": torch.ones(batch, text[0], dtype=torch.bool, device=device),
            "drop_text": full(False, dtype=torch.bool),
            "fps": full(10.0),
            **{name: full(float(n)) for name, n in zip(("num_frames", "height", "width"), shape, strict=True)},
        }
        denoising_losses(model, inputs, config.flow, config.learn_sigma)["loss"].backward()

    # The transformer asks whether frames are given wholly or not at all.
    return Work(net, [vae], run, unknown=float(encoding.given != "parts"))


def vae_work(
    config: TrainVAEConfig, vae: Any, distance: Any, adversary: Adversary | None, device: torch.device
) -> Work:
    """The work of `stgen.train_vae`, on its longest windows, with all of its losses in play."""
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    # The network of the perceptual loss is handed over, since it is read from a file, which fake tensors cannot be.
    objective = VAEObjective(vae, config.reconstruction, config.kl_weight, config.ping_pong_weight, None, adversary)
    objective.perceptual = distance
    objective.perceptual_weight = config.perceptual.weight if config.perceptual else 0.0

    def run(model: Any, batch: int, shape: tuple[int, int, int]) -> None:
        frames = config.window_of(shape[0])[1]
        frames = 2 * frames - 1 if config.ping_pong_weight else frames
        shown = torch.rand(batch, 3, frames, *shape[1:], device=device)
        noise = torch.randn(batch, *latent_shape(vae, frames, *shape[1:]), device=device)
        model(shown, shown, noise, config.samples)["loss"].backward()
        if adversary is not None:
            adversary.step(config.samples)

    nets = [distance.network if distance else None, adversary.net if adversary else None]
    return Work(objective.train(), [net for net in nets if net is not None], run)


# --- On fake tensors ----------------------------------------------------------------------------------------------


@contextmanager
def fake_tensors(device: torch.device) -> Iterator[Callable[[Any], Any]]:
    """Within, new modules and tensors take no memory; gives what makes a real module, or one on the meta device, into such a
    one, on `device`."""
    mode = FakeTensorMode()

    def faked(thing: Any) -> Any:
        with unset_fake_temporarily(), FakeCopyMode(mode):
            found = deepcopy(thing)
        # Not `module.to`, which swaps tensors, and fake ones cannot be.
        for module in found.modules() if isinstance(found, nn.Module) else ():
            for name, x in module._parameters.items():
                if x is not None and x.device.type == "meta":
                    module._parameters[name] = nn.Parameter(torch.empty_like(x, device=device), x.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type == "meta":
                    module._buffers[name] = torch.empty_like(buffer, device=device)
        return found

    with mode:
        yield faked


def under_precision(model: nn.Module, dtype: torch.dtype) -> Any:
    """The model as Accelerate calls it, and DeepSpeed as `stgen.accelerator` sets it up: under autocast, with float32 weights."""
    if dtype == torch.float32:
        return model

    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(model.parameters()).device.type, dtype):
            return convert_outputs_to_fp32(model.forward)(*args, **kwargs)

    return autocast


def optimizer_state_bytes(model: nn.Module, config: OptimizerConfig) -> int:
    """What the optimizer keeps of a model on fake tensors."""
    if config.name != "adamw_8bit":
        return optimizer_bytes(make_optimizer(model, config))
    # bitsandbytes works on pointers, which fake tensors lack. Two moments: of tensors of 4096 elements or more 8 bits each
    # and a float32 scale for each block of 256, of others float32; and two tables of 256 float32 for all.
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    blocks = sum(-(-n // 256) for n in sizes if n >= 4096)
    return 2 * sum(n if n >= 4096 else 4 * n for n in sizes) + 8 * blocks + 2 * 256 * 4


def fake_step(
    make: Callable[[Callable[[Any], Any]], Work],
    batch: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    optimizer: OptimizerConfig | None = None,
) -> tuple[Work, StepFootprint, int]:
    """One forward and backward of `batch` clips on fake tensors, and the bytes that an optimizer would keep.

    Args:
        make: the work, from what makes modules fake.
    """
    with fake_tensors(device) as faked:
        work = make(faked)
        model = under_precision(work.model, dtype)
        footprint = step_footprint(work.model, lambda: work.run(model, batch, shape), work.beside, work.unknown)
        return work, footprint, optimizer_state_bytes(work.model, optimizer) if optimizer else 0


def count(model: nn.Module, trained: bool = False) -> int:
    """Its parameters, or those that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


def states_of(model: nn.Module, optimizer: int, average: str) -> States:
    """`States` of a model whose optimizer keeps so many bytes, with averages of a profile (`stgen.averaging`)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    elements = sum(p.numel() for p in trained)
    units = [weight_bytes(child) for part in model.modules() if isinstance(part, nn.ModuleList) for child in part]
    return States(
        weights=weight_bytes(model),
        trainable=sum(p.numel() * p.element_size() for p in trained),
        elements=elements,
        optimizer=optimizer,
        averages=4 * elements * (len(WIDTHS) if average == "power" else 1),
        largest_unit=max(units, default=weight_bytes(model)),
    )


# --- In real time --------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def available_memory(device: torch.device) -> int:
    """Bytes of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here, the better of two."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / min(seconds(lambda: a @ a, device) for _ in range(2))


@dataclass(frozen=True)
class Probe:
    """What was timed: `batch` clips, by a model of `layers` blocks (0: the whole model)."""

    batch: int
    layers: int


def probe_candidates(config: LoopConfig, layers: int) -> list[Probe]:
    """From the step itself down to ever smaller ones."""
    found = [Probe(config.batch_size, 0), Probe(1, 0)]
    while layers > 1:
        layers //= 2
        found.append(Probe(1, layers))
    return list(dict.fromkeys(found))


def real_step(
    work: Work, config: LoopConfig, batch: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> Callable[[], None]:
    """An optimizer step of `batch` clips."""
    model = under_precision(work.model, dtype)
    optimizer = make_optimizer(work.model, config.optimizer, half=dtype == torch.bfloat16)

    def step() -> None:
        work.run(model, batch, shape)
        nn.utils.clip_grad_norm_(work.model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step
