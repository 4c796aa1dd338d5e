"""What `stgen plan` says a rank's memory will be, beside what real training processes then take.

    python tests/bench/plan_accuracy.py [--models deep,wide] [--strategies ddp,zero1,zero2,zero3] [--precision bf16]

Each row launches two training processes on this CPU: the transformer, objective, optimizer and averaged weights of
`stgen.train`, three optimizer steps on real clips. Measured is the peak resident memory of rank 0 above that before its
model was made (`VmHWM`, which the kernel keeps), so allocations that nothing writes to do not count; the planner's rows for a
CPU count the same. Every tensor of 64 KiB or more is mapped by itself, so that what is freed is gone from the measure.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformer_speed import peak_kib

STEPS = 3
MODELS = {
    "deep": ["model.num_attention_heads=8", "model.attention_head_dim=64", "model.num_layers=8", "batch_size=2"],
    "wide": ["model.num_attention_heads=16", "model.attention_head_dim=64", "model.num_layers=3", "batch_size=1"],
}


def resident_kib() -> int:
    """Memory of this process now; `peak_kib` is the most it ever had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def train_steps(config_file: str, result: str) -> None:
    """One rank: a few optimizer steps as `stgen.train` and `stgen.loop` do them."""
    from stgen.accelerator import make_accelerator
    from stgen.averaging import AveragedWeights
    from stgen.config import load_config
    from stgen.data.reading import ClipDataset, clip_loader
    from stgen.models.latents import load_vae
    from stgen.objective import denoising_losses
    from stgen.optimization import make_optimizer
    from stgen.text import TextCache
    from stgen.train import TrainConfig, make_model, model_inputs

    config = load_config(TrainConfig, config_file)
    vae = load_vae(config.vae).requires_grad_(False)
    accelerator = make_accelerator(Path(config.run), config.batch_size, 1, config.optimizer.max_grad_norm)
    torch.set_num_threads(1)
    dataset = ClipDataset(config.data, config.seed)
    # What a first use leaves behind (thread pools, kernels' code, the text encoder) belongs to the baseline.
    warm = torch.nn.Linear(64, 64)
    warm(torch.randn(8, 64)).sum().backward()
    cache = Path(config.run) / "text.safetensors"
    if accelerator.is_main_process:
        TextCache.build(cache, config.text_encoder, ["", *dataset.captions()], config.max_text_length)
    accelerator.wait_for_everyone()
    text = TextCache(cache)
    if accelerator.state.deepspeed_plugin:
        import deepspeed.runtime.engine  # noqa: F401
    phases, before = {}, resident_kib()

    def note(name: str) -> None:
        phases[name] = (resident_kib() - before) / 1024

    net = make_model(config, vae, text.dim, 10.0)
    if config.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    note("model")
    wrapped, optimizer = accelerator.prepare(net, make_optimizer(net, config.optimizer))
    note("prepared")
    averaged = AveragedWeights(net)
    note("averages")
    batches = clip_loader(dataset, 0, config.batch_size, 0, accelerator.process_index, accelerator.num_processes)
    clips = config.batch_size * accelerator.num_processes
    for step in range(STEPS):
        with accelerator.accumulate(wrapped):
            inputs = model_inputs(next(batches), config, vae, text, accelerator.device)
            note(f"{step} inputs")
            loss = denoising_losses(wrapped, inputs, config.flow)["loss"]
            note(f"{step} forward")
            accelerator.backward(loss)
            note(f"{step} backward")
            accelerator.clip_grad_norm_(wrapped.parameters(), config.optimizer.max_grad_norm)
            optimizer.step()
            note(f"{step} step")
            optimizer.zero_grad()
        averaged.update(step + 1, (step + 1) * clips, clips)
    note("end")
    if accelerator.is_main_process:
        measured = (peak_kib() - before) * 1024
        Path(result).write_text(json.dumps({"peak": measured, "phases": phases, "tokens": inputs["latents"].shape}))
    accelerator.end_training()


def launch(strategy: str, precision: str, config_file: Path, result: Path) -> dict:
    """Two processes of `train_steps` under the strategy."""
    name = "ddp_cpu" if strategy == "ddp" else "zero2_cpu"
    stage = [] if strategy == "ddp" else ["--zero_stage", strategy[-1]]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", f"configs/accelerate/{name}.yaml", "--main_process_port", "0", *stage]
    command += ["--mixed_precision", precision]
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    environment |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    here = Path(__file__).resolve()
    run = subprocess.run(
        [*command, str(here), "--train", str(config_file), str(result)],
        cwd=here.parent.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise SystemExit(run.stdout[-2000:] + run.stderr[-6000:])
    return json.loads(result.read_text())


def world(folder: Path) -> dict[str, str]:
    """Clips and a VAE to train on: the data and the latents of `moving_mnist_64`."""
    from stgen import AutoencoderKLSTGen
    from stgen.data.moving_mnist import write_moving_mnist

    write_moving_mnist(folder / "data", clips=16, size=64, digits=2)
    torch.manual_seed(0)
    stages = {"temporal_downsample": (True, True), "spatial_downsample": (True, False), "patch_size": 4}
    AutoencoderKLSTGen(latent_channels=16, block_out_channels=(16, 32, 32), **stages).save_pretrained(folder / "vae")
    return {"run": str(folder / "run"), "vae": str(folder / "vae"), "data.path": str(folder / "data")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--strategies", default="ddp,zero1,zero2,zero3")
    parser.add_argument("--precision", default="no", help="no or bf16")
    parser.add_argument("--out", type=Path, help="JSON of all numbers")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train_steps(*arguments.train)
        return

    from stgen.config import load_config, save_config
    from stgen.plan import make_plan
    from stgen.train import TrainConfig

    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [f"{key}={value}" for key, value in world(folder).items()]
        print(f"{'':6s}{'':15s}{'':7s}{'predicted MiB':>14s}{'measured MiB':>14s}{'off':>8s}")
        for model, checkpointing in itertools.product(arguments.models.split(","), (False, True)):
            fixed = ["model.patch_size=[1,1,1]", "model.pattern=st", f"gradient_checkpointing={checkpointing}"]
            config = load_config(TrainConfig, "configs/moving_mnist_64/transformer.yaml", MODELS[model] + fixed + paths)
            save_config(config, folder / "config.yaml")
            plan = make_plan(str(folder / "config.yaml"), processes=2, precision=arguments.precision, probe_seconds=0)
            for strategy in arguments.strategies.split(","):
                memory = plan.memory[strategy]
                predicted = memory.total - memory.frozen
                measured = launch(strategy, arguments.precision, folder / "config.yaml", folder / "result.json")["peak"]
                found.append([model, checkpointing, strategy, predicted, measured])
                kind = "checkpointing" if checkpointing else ""
                sizes = f"{predicted / 2**20:14.1f}{measured / 2**20:14.1f}{predicted / measured - 1:8.1%}"
                print(f"{model:6s}{kind:15s}{strategy:7s}{sizes}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
