"""Bytes per process by strategy, beside theory, and clips a second on one process and two: `python tests/bench/memory_speed.py`.

A transformer is trained on toy clips on CPUs, as `stgen/train.py` does. Bytes are those of all tensors that Python knows just
after the optimizer's step, with the gradients still there, less what lived before the optimizer was made except the weights.
Theory, in bytes a parameter (ZeRO, arXiv:1910.02054, section 3, in float32): 4 of weights, 4 of gradients, 8 of AdamW's
moments, 4 of averaged weights, and under DeepSpeed 4 of its own copy of the weights. ZeRO-1 divides moments and copy by the
processes, ZeRO-2 the gradients too, and ZeRO-3 everything but a buffer of 2^25 numbers for reducing. Activations are freed by
then; what DDP keeps in C++ is not seen.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from processes import Run, toy_arguments, toy_training

import stgen.loop
from stgen import train
from stgen.averaging import local_part

PROCESSES = {"cpu": 1, "ddp_cpu": 2, "zero1_cpu": 2, "zero2_cpu": 2, "zero3_cpu": 2}


def theory(strategy: str, parameters: int) -> float:
    """Bytes of a process."""
    n, stage = PROCESSES[strategy], int(strategy[4]) if strategy.startswith("zero") else 0
    optimizer = (12 if stage else 8) / (n if stage else 1)
    gradients = 4 / (n if stage >= 2 else 1)
    weights_and_averages = 8 / (n if stage == 3 else 1)
    return parameters * (optimizer + gradients + weights_and_averages) + (4 * 2**25 if stage == 3 else 0)


def live_bytes() -> int:
    """Bytes of all tensors that Python knows; memory that several share counts once."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def measured_run(arguments: list[str]) -> None:
    """Trains and writes `run/bytes.json`: of the first process, after its first step."""
    make, found = stgen.loop.make_optimizer, {}

    def make_watched(model: torch.nn.Module, *more: object) -> torch.optim.Optimizer:
        before, optimizer = live_bytes() - sum(p.nbytes for p in model.parameters()), make(model, *more)
        step = optimizer.step

        def watched(*given: object) -> None:
            step(*given)
            if not found:
                moments = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
                found["total"] = live_bytes() - before
                found["weights"] = sum(local_part(p).nbytes for p in model.parameters())
                found["moments"] = sum(t.nbytes for t in moments)
                found["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())

        optimizer.step = watched
        return optimizer

    stgen.loop.make_optimizer = make_watched
    train.main(arguments)
    if os.environ.get("RANK", "0") == "0":
        run = next(a.removeprefix("run=") for a in arguments if a.startswith("run="))
        (Path(run) / "bytes.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help="width of the transformer, of 6 blocks")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    print("| | weights | moments | all | theory | all / theory | clips/s |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        world = toy_training(Path(folder))
        for strategy, processes in PROCESSES.items():
            model = [f"model.attention_head_dim={options.width // 2}", "model.num_layers=6", "model.pattern=f"]
            size = [f"samples={8 * options.steps}", f"batch_size={8 // processes}", "checkpoint_every=1000"]
            arguments = toy_arguments(world, strategy, *model, *size)
            Run(measured_run, arguments, world / f"{strategy}.log", strategy, processes).succeed()
            found = json.loads((world / strategy / "bytes.json").read_text())
            rows = [json.loads(line) for line in (world / strategy / "metrics.jsonl").read_text().splitlines()]
            speed = sorted(row["samples_per_second"] for row in rows)[len(rows) // 2]
            expected = theory(strategy, found["parameters"])
            sizes = [f"{found[key] / 2**20:.1f}" for key in ("weights", "moments", "total")]
            shown = [*sizes, f"{expected / 2**20:.1f}", f"{found['total'] / expected:.3f}", f"{speed:.1f}"]
            print(f"| {strategy} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
