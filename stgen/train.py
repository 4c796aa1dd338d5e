"""Trains the transformer: `accelerate launch stgen/train.py --config FILE [key.sub=value ...]`.

The same command resumes. The run folder gets config.yaml, metrics.jsonl, checkpoints/, samples/ (of validation) and export/: a
diffusers folder that `STGenPipeline.from_pretrained` opens, averaged (EMA) weights by default and the last ones as
`variant="raw"`; or of a LoRA run the adapters, which `pipeline.load_lora_weights` takes.
"""

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from stgen.accelerator import alone_in, end_training, full_weights, make_accelerator, stop_on_value_error
from stgen.averaging import AveragedWeights
from stgen.config import flatten_config, override, parse_command_line, require, require_arguments, under
from stgen.data.color import to_pixels
from stgen.data.reading import ClipDataset, fold_seed
from stgen.encoding import draw_mask, fetch_empty_prompt, find_stored, read_encoding
from stgen.finetuning import (
    LoRAConfig,
    add_lora,
    begin_with,
    merged,
    names_to_train,
    save_lora,
    saved_architecture,
)
from stgen.loop import ARCHITECTURE, LoopConfig, Stage, begin_run, check_stages, fit, stage_at
from stgen.masks import MaskSpec, fold_mask, given_latents_are_exact, hide
from stgen.models.latents import (
    Moments,
    VideoVAE,
    compression_ratios,
    encode_moments,
    latent_channels,
    latent_shape,
    load_vae,
    normalise,
    temporal_reach,
)
from stgen.models.transformer import STGenTransformer3DModel
from stgen.objective import FlowConfig, denoising_losses, make_scheduler
from stgen.pipelines import STGenPipeline
from stgen.text import TextCache, load_text_encoder, pad_states
from stgen.validation import ValidationConfig, Validator

DERIVED = ("in_channels", "text_dim", "sample_frames", "sample_height", "sample_width", "sample_fps")
"""Arguments of the transformer that follow from VAE, text encoder and data."""

STAGE_MAY_CHANGE = (
    *("samples", "data", "masks", "batch_size", "accumulate", "text_dropout", "optimizer.lr", "frozen", "trainable"),
    *("flow.distribution", "flow.mean", "flow.std", "flow.mode_scale", "flow.shift", "flow.dynamic_shift"),
    "flow.min_snr_gamma",
)
"""What a stage may say anew. All else is the model, the objective, or the run as a whole."""


@dataclass
class TrainConfig(LoopConfig):
    """A transformer training run."""

    vae: str = "???"
    """Folder of a trained VAE: an AutoencoderKLSTGen or another of `stgen.models.latents.VideoVAE`."""
    text_encoder: str = "all-MiniLM-L6-v2"
    """A transformers text encoder, by folder or name; its per-token states condition the model. At scale: a T5."""
    max_text_length: int = 128
    """Tokens of a caption; longer ones are cut with a warning."""
    text_dropout: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    init: str | None = None
    """Folder of the weights that the run begins with: a pipeline, its `transformer/`, a run's export, what `stgen convert`
    made; null draws them from `seed`. `model` then needs to say only what shall differ: `mask_channels`, whose new input
    channels begin at zero, or twice the `num_attention_heads`, for a wider model that does what the saved one does
    (`stgen.models.widening`)."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of STGenTransformer3DModel; those that follow from VAE, text encoder and data are filled in."""
    frozen: list[str] = field(default_factory=list)
    """Parameters that do not train, by patterns of their names as a shell has them: `["patch_embed.*", "*.cross_attn.*"]`."""
    trainable: list[str] = field(default_factory=list)
    """The other way round: only these train."""
    lora: LoRAConfig | None = None
    """Trains low-rank adapters of `init` in place of its weights; the export is then a LoRA file."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """A curriculum: what each stage says anew, of `STAGE_MAY_CHANGE`. `samples` is its length in clips; the last stage says
    none and goes on to the run's `samples`."""
    validation: ValidationConfig | None = None
    """Loss and samples on held-out clips; null for none."""
    masks: list[MaskSpec] = field(default_factory=lambda: [MaskSpec()])
    """Mixture of masks; each clip draws its own."""
    use_encoded: bool = True
    """Takes latents and text states that `stgen data encode` stored with the clips in place of encoding; false ignores them."""
    sample_posterior: bool = False
    """Draws the latents to learn from the VAE's posterior, as latent diffusion does, instead of taking its mode. Given ones
    are modes always, as in the pipelines."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    gradient_checkpointing: bool = False
    """Trades compute for memory: activations are computed again in the backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.frozen and self.trainable), "trainable", self.trainable, "empty together with frozen")
        if self.lora is not None:
            require(self.init is not None, "lora", vars(self.lora), "null without init, whose weights it adapts")
            patterns = self.frozen + self.trainable
            require(not patterns, "frozen or trainable", patterns, "empty with lora, whose adapters alone train")
        require(self.max_text_length >= 1, "max_text_length", self.max_text_length, "1 or more")
        require(0 <= self.text_dropout <= 1, "text_dropout", self.text_dropout, "0 to 1")
        require(len(self.masks) > 0, "masks", self.masks, "at least one entry")
        # Rectified flow is an ODE without a variance to learn, and its schedulers take none; a regression has no steps.
        objective = self.flow.objective
        require(
            not (self.learn_sigma and objective in ("flow", "regression")),
            "model.learn_sigma",
            self.learn_sigma,
            f"false with flow.objective={objective}; epsilon and v_prediction have a variance to learn",
        )
        no_labels = ("num_classes",)  # clips have captions
        require_arguments(STGenTransformer3DModel, self.model, "model", excluded=DERIVED + no_labels)

    def with_architecture(self) -> "TrainConfig":
        """The same with all of `model` spelled out, where it follows from the folder that `init` names."""
        if self.init is None:
            return self
        saved = saved_architecture(self.init)
        given = {name: value for name, value in saved.items() if name not in DERIVED}
        if given.get("num_classes") is None:
            given.pop("num_classes", None)
        if self.lora is not None:
            for name, value in self.model.items():
                allowed = f"{saved.get(name)!r}, as {self.init} has it: the adapters must fit it"
                require(value == saved.get(name), f"model.{name}", value, allowed)
        return replace(self, model={**given, **self.model})

    @property
    def learn_sigma(self) -> bool:
        """Whether the model predicts the variance of its steps too."""
        return bool(self.model.get("learn_sigma", False))


def resolve_stages(config: TrainConfig) -> list[TrainConfig]:
    """The configuration of each stage, whose `samples` is where it ends, counted from the beginning of the run.

    Each stage counts its positions from 0, and all but the first fold their number into the seed, so that order, masks,
    times and noise of one do not come again in another.

    Raises:
        ValueError: a stage changes what it may not, has a value out of range, or begins where the run has ended.
    """
    resolved, begin = [], 0
    for i, values in enumerate(config.stages):
        name, last = f"stages[{i}]", i == len(config.stages) - 1
        for key, value in (flatten_config(values) if values else {}).items():
            require(under(key, STAGE_MAY_CHANGE), f"{name}.{key}", value, f"one of {', '.join(STAGE_MAY_CHANGE)}")
        length, left = values.get("samples"), config.samples - begin
        allowed = f"none in the last stage, which goes on to samples={config.samples}" if last else f"1 to {left - 1}"
        require(length is None if last else length in range(1, left), f"{name}.samples", length, allowed)
        begin = config.samples if last else begin + length
        plain = replace(config, stages=[], seed=fold_seed(config.seed, i) if i else config.seed)
        resolved.append(override(plain, {**values, "samples": begin}, name))
    return resolved or [config]


def make_model(config: TrainConfig, vae: VideoVAE, text_dim: int, fps: float) -> STGenTransformer3DModel:
    """The transformer that fits this VAE, text encoder and data, with weights drawn from `config.seed`."""
    p = compression_ratios(vae)[0]
    mask_channels = config.model.get("mask_channels", p)
    require(
        mask_channels in (0, p), "model.mask_channels", mask_channels, f"{p}, the frames of a latent, or 0 for none"
    )
    torch.manual_seed(config.seed)  # for the initial weights; every later draw has a generator of its own
    return STGenTransformer3DModel(
        in_channels=latent_channels(vae),
        text_dim=text_dim,
        sample_frames=config.data.num_frames,
        sample_height=config.data.height,
        sample_width=config.data.width,
        sample_fps=fps,
        **{**config.model, "mask_channels": mask_channels},
    )


@torch.no_grad()
def model_inputs(
    batch: dict[str, Any], config: TrainConfig, vae: VideoVAE, text: TextCache, device: torch.device
) -> dict[str, Tensor]:
    """Everything the loss needs, from a batch of clips; every draw is a function of (seed, position) alone.

    The masked video is encoded by itself, so nothing that the model sees depends on a hidden pixel; but where causality
    makes the latents of the given cells those of the whole clip (`given_latents_are_exact`), these are taken. What the
    batch has stored (`stgen data encode`) is not encoded again.

    Returns:
        latents, noise, condition_latents (0 in wholly hidden cells) `b c t h w`; condition_mask `b p t h w`; time `b`; text
        `b n d`, text_mask and drop_text `b`; fps, num_frames, height, width `b`.
    """
    video = to_pixels(batch["video"], device)
    sizes = dict(zip(("num_frames", "height", "width"), video.shape[2:], strict=True))
    own_null = config.model.get("null_text", "prompt") != "prompt"  # the transformer has a null text of its own
    masks, states, dropped, times, seeds = [], [], [], [], []
    for i, (position, caption) in enumerate(zip(batch["position"], batch["caption"], strict=True)):
        mask, generator = draw_mask(config.masks, config.seed, position, tuple(video.shape[2:]))
        masks.append(mask)
        drop = bool(torch.rand((), generator=generator) < config.text_dropout)
        stored_text = "text" in batch and not (drop and not own_null)
        states.append(batch["text"][i].float() if stored_text else text["" if drop and not own_null else caption])
        dropped.append(drop and own_null)
        times.append(config.flow.draw_time(generator))
        seeds.append(generator)
    text_states, text_mask = pad_states(states)

    mask = torch.stack(masks).to(device)
    (p, factor), reach = compression_ratios(vae), temporal_reach(vae)
    folded = fold_mask(mask, p, factor)
    has_video = torch.ones(len(mask), dtype=torch.bool, device=device)
    if "latents" in batch:
        moments = Moments(**{name: x.to(device).float() for name, x in batch["latents"].items()})
        has_video = batch["has_video"].to(device)
    else:
        moments = encode_moments(vae, video)
    mean, logvar = moments.mean, moments.logvar
    # The masked video is encoded by itself where it must be, up to the last latent that has anything given.
    anew = ~given_latents_are_exact(mask, p, reach)
    hidden = folded.amin(1, keepdim=True) >= 1
    condition = mean.clone()
    if anew.any():
        some_given = (~hidden[anew]).amax((0, 1, 3, 4))
        last = mean.shape[2] if reach == "clip" else 1 + int(some_given.nonzero().max())
        masked = hide(video[anew[has_video]], mask[anew])[:, :, : 1 + (last - 1) * p]
        condition[anew, :, :last] = encode_moments(vae, masked).mean
    # What the model sees of wholly hidden cells is nothing, whatever a VAE makes of grey there.
    condition = normalise(vae, condition).masked_fill(hidden, 0)
    noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in seeds])
    if config.sample_posterior:
        require(logvar is not None, "sample_posterior", True, "false with this VAE, whose latents are certain")
        drawn = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in seeds])
        mean = mean + (0.5 * logvar).exp() * drawn.to(device)
    latents = normalise(vae, mean)
    return {
        "latents": latents,
        "noise": noise.to(device),
        "time": config.flow.shifted(torch.cat(times), sizes["height"], sizes["width"], latents.shape[2]).to(device),
        "condition_latents": condition,
        "condition_mask": folded,
        "text": text_states.to(device),
        "text_mask": text_mask.to(device),
        "drop_text": torch.tensor(dropped, device=device),
        "fps": batch["fps"].to(device),
        **{name: torch.full((len(mask),), float(n), device=device) for name, n in sizes.items()},
    }


def export(
    config: TrainConfig,
    model: STGenTransformer3DModel,
    averaged: AveragedWeights,
    vae: VideoVAE,
    accelerator: Accelerator,
    folder: Path,
    merge: bool = False,
) -> None:
    """Writes what was trained, with the averaged weights, and beside them the last ones: a diffusers folder and its variant
    `raw`, or LoRA files. All processes call it.

    Args:
        merge: writes the pipeline in place of LoRA files, with the adapters merged into its weights.
    """
    if config.lora is None or merge:
        tokenizer, text_encoder = load_text_encoder(config.text_encoder)
        scheduler = make_scheduler(resolve_stages(config)[-1].flow)

    def save(variant: str | None) -> None:
        if config.lora is not None and not merge:
            save_lora(model, folder, variant)
            return
        transformer = model if config.lora is None else merged(model)
        if variant is None:
            pipeline = STGenPipeline(tokenizer, text_encoder, vae, transformer, scheduler)
            pipeline.save_pretrained(folder)
        else:
            transformer.save_pretrained(folder / "transformer", variant=variant)

    for variant, weights in (("raw", nullcontext()), (None, averaged.applied())):
        with weights, full_weights(model):
            if accelerator.is_main_process:
                save(variant)
    accelerator.print(f"the {'pipeline' if config.lora is None or merge else 'LoRA'} is in {folder}")
    accelerator.wait_for_everyone()


def prepare_training(config: TrainConfig, model: STGenTransformer3DModel) -> None:
    """Adds adapters if there are any, and leaves open to training what trains in some stage."""
    if config.lora is not None:
        add_lora(model, config.lora, config.seed)
    else:
        trained = set().union(*(names_to_train(model, s.frozen, s.trainable) for s in resolve_stages(config)))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)


def open_stage(config: TrainConfig, vae: VideoVAE, check: bool) -> tuple[ClipDataset, list[str]]:
    """The clips of a stage, and those captions whose text states are not stored with them.

    Args:
        check: whether VAE and text encoder are compared with those that encoded, which reads them whole.
    """
    moments = ("mean", "logvar") if config.sample_posterior else ("mean",)
    find = partial(find_stored, vae, config.data.shapes, config.masks, config.seed, moments)
    dataset = ClipDataset(config.data, config.seed, find_stored=find if config.use_encoded else None)
    encoding = read_encoding(dataset.source, dataset.rows) if config.use_encoded and check else None
    if encoding is not None:
        encoding.check(config.vae, config.text_encoder, config.max_text_length)
    return dataset, [] if dataset.stored is not None and dataset.stored.text_dim is not None else dataset.captions()


def train(config: TrainConfig) -> None:
    """Trains to `config.samples` clips, from the newest checkpoint of the run if there is one, and exports."""
    config = config.with_architecture()
    configs = resolve_stages(config)
    last = configs[-1]
    accelerator = make_accelerator(
        Path(config.run), last.batch_size, last.accumulate, config.optimizer.max_grad_norm, config.trackers
    )
    with alone_in(config.run, accelerator):
        _train(config, configs, accelerator)
    end_training(accelerator)


def _train(config: TrainConfig, configs: list[TrainConfig], accelerator: Accelerator) -> None:
    run, last, device = Path(config.run), configs[-1], accelerator.device
    vae = load_vae(config.vae).requires_grad_(False).to(device)
    opened = [open_stage(stage, vae, accelerator.is_main_process) for stage in configs]
    cache = run / "cache" / "text.safetensors"
    validation = config.validation
    held_out = validation.open(last.data) if validation else None
    prompts = ["", *itertools.chain(*(captions for _, captions in opened)), *(held_out.captions() if held_out else [])]
    if accelerator.is_main_process:
        begin_run(config)
        stored = opened[0][0].stored
        if set(prompts) == {""} and stored is not None and stored.text_dim is not None:  # the others lie with the clips
            cache.parent.mkdir(parents=True, exist_ok=True)
            fetch_empty_prompt(opened[0][0].source, cache)
        else:
            TextCache.build(cache, config.text_encoder, prompts, config.max_text_length)
    accelerator.wait_for_everyone()
    text = TextCache(cache)

    largest = (last.data.num_frames, last.data.height, last.data.width)
    rows = opened[-1][0].rows
    fps = float(np.median(rows.fps[(rows.shapes == largest).all(1)]))
    net = make_model(replace(last, seed=config.seed), vae, text.dim, fps)
    if config.init is not None:
        begin_with(net, config.init)
    if accelerator.is_main_process:
        net.save_config(run / ARCHITECTURE)
    prepare_training(config, net)
    if config.gradient_checkpointing:
        net.enable_gradient_checkpointing()

    stages: list[Stage] = []
    for stage, (dataset, _) in zip(configs, opened, strict=True):
        begin = stages[-1].config.samples if stages else 0
        trained = None if config.lora else names_to_train(net, stage.frozen, stage.trainable)
        trainable = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        frozen = [p for name, p in trainable if trained is not None and name not in trained]
        stages.append(Stage(stage, dataset, begin, frozen))
    check_stages(stages, accelerator)

    def compute_losses(model: torch.nn.Module, batch: dict[str, Any], samples: int) -> dict[str, Tensor]:
        stage = configs[stage_at(stages, samples)]
        inputs = model_inputs(batch, stage, vae, text, device)
        return denoising_losses(model, inputs, stage.flow, stage.learn_sigma)

    def validation_inputs(batch: dict[str, Any], mask: MaskSpec, prompted: bool, seed: int) -> dict[str, Tensor]:
        fixed = replace(last, masks=[mask], text_dropout=0.0 if prompted else 1.0, sample_posterior=False, seed=seed)
        return model_inputs(batch, fixed, vae, text, device)

    validator = None
    if validation is not None and held_out is not None:
        pipeline = STGenPipeline(None, None, vae, net, make_scheduler(last.flow))
        validator = Validator(validation, run, held_out, pipeline, text, validation_inputs, last.flow, accelerator)

    def after_step(averaged: AveragedWeights, step: int, samples: int) -> float | None:
        if validator is None or validation is None or (step % validation.every and samples < config.samples):
            return None
        with averaged.applied():
            score = validator(step, samples)
        return score

    def tokens(shape: tuple[int, int, int]) -> int:
        cells = latent_shape(vae, *shape)[1:]
        return math.prod(-(-n // p) for n, p in zip(cells, net.config.patch_size, strict=True))

    averaged = fit(accelerator, config, stages, net, compute_losses, after_step=after_step, tokens=tokens)
    export(config, net, averaged, vae, accelerator, run / "export")


def main(argv: Sequence[str] | None = None) -> None:
    with stop_on_value_error():
        train(parse_command_line(TrainConfig, __doc__, argv))


if __name__ == "__main__":
    main()
