"""Which order of attentions learns best in equal compute: our patterns and diffusers' Latte through the same trainer.

    python tests/bench/patterns.py --data runs/demo/data/train --heldout runs/demo/data/heldout \
        --vae runs/demo/vae/export --out runs/patterns

or with data that `stgen data encode` made, whose latents are then not encoded again.

Every model sees the same clips, masks, noise and times in the same order, with the same width, depth, optimizer and number
of steps; only the initial weights and the data's order change with the seed. Latte takes our masks as further input channels
(the given cells' latents, the masked video's, the mask), since its blocks have one timestep for all tokens. Seeds take
turns, so that an interrupted run is a fair one of fewer seeds, and the same command goes on. What stands in the table:

- validation loss: the training objective on held-out clips with their own fixed masks, noise and times, averaged weights;
- MSE: of the latents of prediction (10 frames given), one sample of 10 Euler steps, over the generated cells;
- GFLOPs: matrix products and attention of one clip, forward and backward; and the time of both for a batch of 8 clips,
  the best of five rounds in which all models take turns.

The spread is the standard deviation over seeds. Further arguments `key.sub=value` go to the training configuration.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler, LatteTransformer3DModel
from torch import Tensor, nn
from transformer_speed import count_flops, seconds

from stgen.accelerator import make_accelerator
from stgen.config import load_config
from stgen.data.color import stack_clips
from stgen.data.reading import ClipDataset
from stgen.loop import Stage, begin_run, fit
from stgen.masks import MaskSpec, generated_cells
from stgen.models.latents import VideoVAE, compression_ratios, latent_shape, load_vae
from stgen.objective import TRAIN_TIMESTEPS, denoising_losses
from stgen.text import TextCache
from stgen.train import TrainConfig, make_model, model_inputs, open_stage

PATTERNS = ("st", "ts", "tsst", "f")
LATTE = "Latte (diffusers)"
BATCH = 8


class MaskedLatte(nn.Module):
    """Latte with our conditioning: given cells hold their clean latents, masked latents and mask are input channels."""

    def __init__(self, config: TrainConfig, vae: VideoVAE, text_dim: int) -> None:
        super().__init__()
        z, t, h, w = latent_shape(vae, config.data.num_frames, config.data.height, config.data.width)
        assert h == w, "Latte's positions are those of a square"
        heads, head = config.model["num_attention_heads"], config.model["attention_head_dim"]
        patch = tuple(config.model["patch_size"])
        assert patch == (1, patch[1], patch[1]), "Latte's patches are square and of one frame"
        assert config.model["num_layers"] % 2 == 0, "Latte's blocks come in pairs, spatial and temporal"
        torch.manual_seed(config.seed)
        self.net = LatteTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head,
            in_channels=2 * z + compression_ratios(vae)[0],
            out_channels=z,
            num_layers=config.model["num_layers"] // 2,
            cross_attention_dim=heads * head,
            attention_bias=True,
            sample_size=h,
            patch_size=patch[1],
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=TRAIN_TIMESTEPS,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=text_dim,
            video_length=t,
        )

    def forward(
        self,
        noisy: Tensor,
        timestep: Tensor,
        text: Tensor,
        encoder_attention_mask: Tensor,
        condition_latents: Tensor,
        condition_mask: Tensor,
        return_dict: bool = False,
        **unused: Tensor,
    ) -> tuple[Tensor]:
        latents = torch.where(generated_cells(condition_mask), noisy, condition_latents)
        hidden = torch.cat([latents, condition_latents, condition_mask.to(noisy.dtype)], dim=1)
        # One text serves all frames of a clip; Latte repeats its states for them, and leaves the mask to its caller.
        mask = encoder_attention_mask.repeat_interleave(noisy.shape[2], dim=0)
        return (self.net(hidden, timestep, text, mask, return_dict=False)[0],)


class World:
    """What all models share: data, VAE, texts, held-out clips with their own masks, noise and times."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        config = self.config(PATTERNS[0], 0)
        self.vae = load_vae(config.vae).requires_grad_(False)
        data, captions = open_stage(config, self.vae, check=False)
        self.fps = float(data.rows[0]["fps"])
        cache = arguments.out / "text.safetensors"
        TextCache.build(cache, config.text_encoder, ["", *captions], config.max_text_length)
        self.text = TextCache(cache)
        held_config = self.config(PATTERNS[0], 1234)
        held_config.data.path = str(arguments.heldout)
        self.held = ClipDataset(held_config.data, shuffle=False)
        self.validation = self._held_inputs(held_config)
        held_config.masks = [MaskSpec("predict", 1, {"given": config.data.num_frames // 2})]
        self.prediction = self._held_inputs(held_config)

    def config(self, name: str, seed: int) -> TrainConfig:
        run = self.arguments.out / f"{name.split()[0]}-{seed}"
        pattern = [] if name == LATTE else [f"model.pattern={name}"]
        paths = [f"run={run}", f"vae={self.arguments.vae}", f"data.path={self.arguments.data}", f"seed={seed}"]
        return load_config(TrainConfig, self.arguments.config, [*self.arguments.overrides, *paths, *pattern])

    def model(self, name: str, config: TrainConfig) -> nn.Module:
        if name == LATTE:
            return MaskedLatte(config, self.vae, self.text.dim)
        return make_model(config, self.vae, self.text.dim, self.fps)

    def inputs(self, batch: dict[str, Any], config: TrainConfig) -> dict[str, Tensor]:
        return model_inputs(batch, config, self.vae, self.text, torch.device("cpu"))

    def _held_inputs(self, config: TrainConfig) -> list[dict[str, Tensor]]:
        found = []
        for first in range(0, self.arguments.clips, BATCH):
            positions = list(range(first, min(first + BATCH, self.arguments.clips)))
            items = [self.held[i] for i in positions]
            batch = {
                "video": stack_clips([item["video"] for item in items]),
                "caption": [""] * len(items),
                "fps": torch.tensor([float(item["fps"]) for item in items]),
                "position": positions,
            }
            found.append(self.inputs(batch, config))
        return found


@torch.no_grad()
def validate(model: nn.Module, config: TrainConfig, batches: list[dict[str, Tensor]]) -> float:
    losses = [denoising_losses(model, inputs, config.flow)["loss"].item() for inputs in batches]
    return statistics.mean(losses)


@torch.no_grad()
def predict_mse(model: nn.Module, config: TrainConfig, batches: list[dict[str, Tensor]], steps: int = 10) -> float:
    """Mean squared error of the generated latent cells, one sample of each clip."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=config.flow.shift)
    errors = []
    for inputs in batches:
        known = {k: v for k, v in inputs.items() if k not in ("latents", "noise", "time", "text", "text_mask")}
        x, generated = inputs["noise"], generated_cells(inputs["condition_mask"])
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            time_of_all = t.expand(len(x))
            arguments = {"encoder_attention_mask": inputs["text_mask"], **known, "return_dict": False}
            velocity = model(x, time_of_all, inputs["text"], **arguments)[0]
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
        square = (x - inputs["latents"]).square().mean(1, keepdim=True)[generated]
        errors.append(square.mean().item())
    return statistics.mean(errors)


def run_one(world: World, name: str, seed: int) -> dict[str, float]:
    config = world.config(name, seed)
    run = Path(config.run)
    if (run / "result.json").exists():
        return json.loads((run / "result.json").read_text())
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(run, config.batch_size, config.accumulate, config.optimizer.max_grad_norm)
    torch.set_num_threads(world.arguments.threads)
    begin_run(config)
    model = world.model(name, config)
    averaged = fit(
        accelerator,
        config,
        [Stage(config, open_stage(config, world.vae, check=False)[0])],
        model,
        lambda net, batch, samples: denoising_losses(net, world.inputs(batch, config), config.flow),
    )
    averaged.copy_to()
    model.eval()
    result = {
        "validation_loss": validate(model, config, world.validation),
        "prediction_mse": predict_mse(model, config, world.prediction),
    }
    (run / "result.json").write_text(json.dumps(result))
    return result


def costs(world: World, names: list[str], rounds: int = 5) -> dict[str, dict[str, float]]:
    """Parameters, GFLOPs of one clip and seconds of a batch, forward and backward. All models take turns, and the best time
    of each counts: other work on the machine then hurts all alike."""
    inputs, found, steps = world.validation[0], {}, {}
    for name in names:
        config = world.config(name, 0)
        model = world.model(name, config).train()

        def step(rows: dict[str, Tensor], model: nn.Module = model, config: TrainConfig = config) -> Tensor:
            loss = denoising_losses(model, rows, config.flow)["loss"]
            loss.backward()
            model.zero_grad()
            return loss

        one = {key: value[:1] for key, value in inputs.items()}
        flops = count_flops(partial(step, one))
        found[name] = {"parameters": sum(p.numel() for p in model.parameters()), "gflops": flops / 1e9}
        steps[name] = partial(step, inputs)
    times = [{name: seconds(step, "cpu") for name, step in steps.items()} for _ in range(rounds)]
    return {name: {**cost, "seconds": min(row[name] for row in times)} for name, cost in found.items()}


def table(results: dict[str, list[dict[str, float]]], cost: dict[str, dict[str, float]]) -> str:
    def spread(rows: list[dict[str, float]], key: str) -> str:
        values = [row[key] for row in rows]
        return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")

    lines = [
        "| | seeds | parameters | GFLOPs | s a batch | validation loss | MSE of prediction |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        of = cost[name]
        fixed = f"{len(rows)} | {of['parameters'] / 1e6:.2f} M | {of['gflops']:.2f} | {of['seconds']:.3f}"
        lines.append(f"| {name} | {fixed} | {spread(rows, 'validation_loss')} | {spread(rows, 'prediction_mse')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--heldout", required=True, type=Path)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--config", default="configs/moving_mnist_32/transformer.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=64, help="held-out clips")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default=",".join([*PATTERNS, LATTE.split()[0]]))
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", default=[])
    arguments = parser.parse_intermixed_args()
    names = [name for name in (*PATTERNS, LATTE) if name.split()[0] in arguments.only.split(",")]
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    world = World(arguments)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in range(arguments.seeds):
        for name in names:
            results[name].append(run_one(world, name, seed))
            print(f"{name}, seed {seed}: {results[name][-1]}", flush=True)
    text = table(results, costs(world, names))
    (arguments.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
