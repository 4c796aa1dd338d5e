"""Which order of attentions learns best in equal compute: our patterns and diffusers' Latte through the same trainer.

    python tests/bench/patterns.py --data runs/demo/data/train --heldout runs/demo/data/heldout \
        --vae runs/demo/vae/export --out runs/patterns

Every model sees the same clips, masks, noise and times in the same order, with the same width, depth, optimizer and number
of steps; only the initial weights and the data's order change with the seed. Latte takes our masks as further input channels
(the given cells' latents, the masked video's, the mask), since its blocks have one timestep for all tokens. Seeds take
turns, so that an interrupted run is a fair one of fewer seeds, and the same command goes on. What stands in the table:

- validation loss: the training objective on held-out clips with their own fixed masks, noise and times, averaged weights;
- MSE: of the latents of prediction (10 frames given), one sample of 10 Euler steps, over the generated cells;
- GFLOPs: matrix products and attention of one clip, forward and backward; and the time of both for a batch of 8 clips,
  the best of five, measured alone.

The spread is the standard deviation over seeds. Further arguments `key.sub=value` go to the training configuration.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler, LatteTransformer3DModel
from torch import Tensor, nn
from transformer_speed import count_flops

from stgen.accelerator import make_accelerator
from stgen.config import load_config
from stgen.data.reading import ClipDataset
from stgen.loop import begin_run, fit
from stgen.masks import MaskSpec, generated_cells
from stgen.models.latents import VideoVAE, compression_ratios, latent_shape, load_vae
from stgen.objective import TRAIN_TIMESTEPS, denoising_losses
from stgen.text import TextCache
from stgen.train import TrainConfig, make_model, model_inputs

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


def build(name: str, config: TrainConfig, vae: VideoVAE, text_dim: int, fps: float) -> nn.Module:
    return MaskedLatte(config, vae, text_dim) if name == LATTE else make_model(config, vae, text_dim, fps)


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


def cost(model: nn.Module, config: TrainConfig, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """GFLOPs of one clip and seconds of one step of `BATCH` clips, forward and backward; the best of five."""

    def step(rows: dict[str, Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = denoising_losses(model, rows, config.flow)["loss"]
            loss.backward()
            model.zero_grad()
            return loss

        return run

    model.train()
    flops = count_flops(step({name: value[:1] for name, value in inputs.items()}))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        step(inputs)()
        seconds.append(time.perf_counter() - begin)
    return flops / 1e9, min(seconds)


def run_one(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    run = arguments.out / f"{name.split()[0]}-{seed}"
    if (run / "result.json").exists():
        return json.loads((run / "result.json").read_text())
    pattern = [] if name == LATTE else [f"model.pattern={name}"]
    paths = [f"run={run}", f"vae={arguments.vae}", f"data.path={arguments.data}", f"seed={seed}"]
    config = load_config(TrainConfig, arguments.config, [*arguments.overrides, *paths, *pattern])
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(run, config.batch_size, config.accumulate, config.optimizer.max_grad_norm)
    torch.set_num_threads(arguments.threads)
    data = ClipDataset(config.data, config.seed)
    vae = load_vae(config.vae).requires_grad_(False)
    held_config = load_config(
        TrainConfig, arguments.config, [*arguments.overrides, *paths, "text_dropout=1", "seed=1234"]
    )
    held_config.data.path = str(arguments.heldout)
    held = ClipDataset(held_config.data, shuffle=False)
    begin_run(config)
    cache = arguments.out / "text.safetensors"
    TextCache.build(cache, config.text_encoder, ["", *data.captions()], config.max_text_length)
    text = TextCache(cache)
    model = build(name, config, vae, text.dim, float(data.rows[0]["fps"]))
    began = time.perf_counter()
    ema = fit(
        accelerator,
        config,
        data,
        model,
        lambda net, batch, samples: denoising_losses(
            net, model_inputs(batch, config, vae, text, accelerator.device), config.flow
        ),
    )
    trained = time.perf_counter() - began
    ema.copy_to(model.parameters())

    def inputs(spec: list[MaskSpec]) -> list[dict[str, Tensor]]:
        held_config.masks = spec
        groups = [range(i, min(i + BATCH, arguments.clips)) for i in range(0, arguments.clips, BATCH)]
        found = []
        for group in groups:
            items = [held[i] for i in group]
            batch = {
                "video": torch.stack([item["video"] for item in items]),
                "caption": [""] * len(items),
                "fps": torch.tensor([float(item["fps"]) for item in items]),
                "position": list(group),
            }
            found.append(model_inputs(batch, held_config, vae, text, torch.device("cpu")))
        return found

    validation = inputs(config.masks)
    model.eval()
    half = config.data.num_frames // 2
    result = {
        "validation_loss": validate(model, config, validation),
        "prediction_mse": predict_mse(model, config, inputs([MaskSpec("predict", 1, {"given": half})])),
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "trained_seconds": trained,
    }
    result["gflops"], result["step_seconds"] = cost(model, config, validation[0])
    (run / "result.json").write_text(json.dumps(result))
    return result


def table(results: dict[str, list[dict[str, float]]]) -> str:
    def spread(rows: list[dict[str, float]], key: str) -> str:
        values = [row[key] for row in rows]
        return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")

    lines = [
        "| | seeds | parameters | GFLOPs | s a step | validation loss | MSE of prediction |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        step = min(row["step_seconds"] for row in rows)
        fixed = f"{len(rows)} | {rows[0]['parameters'] / 1e6:.2f} M | {rows[0]['gflops']:.2f} | {step:.3f}"
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
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in range(arguments.seeds):
        for name in names:
            results[name].append(run_one(name, seed, arguments))
            print(f"{name}, seed {seed}: {results[name][-1]}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
