"""Training in bfloat16 on a CPU, and Muon's iteration, as ratios to a training step in float32.

    python tests/bench/half_precision.py                         # the model that comes with stgen, 16 clips of one latent frame
    python tests/bench/half_precision.py --frames 6 --batch 4    # whole clips of it

Forward and backward run in turns within one process, round after round, and the best time of each counts: in float32, under
bfloat16's autocast, and under it with attention in float32, and with torch's own in bfloat16. bfloat16 may gain where the processor
multiplies it (`avx512_bf16`, AMX), though not on each of these, and is emulated elsewhere. `Muon` is the iteration for all
matrices in either, what a process alone adds to each of its steps; N processes do 1/N each.
"""

import argparse
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from stgen import STGenTransformer3DModel
from stgen.optimization import muon_matrices, orthogonalize_together
from stgen.pretrained import find_pretrained


def torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str | None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return dispatch_attention_fn(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, backend=backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1, help="latent frames")
    parser.add_argument("--batch", type=int, default=16, help="clips")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, b = find_pretrained("moving_mnist_64"), options.batch
    model = STGenTransformer3DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
    latents = torch.randn(b, 16, options.frames, 8, 8)
    batch = {
        "hidden_states": latents,
        "timestep": 1000 * torch.rand(b),
        "encoder_hidden_states": torch.randn(b, 20, 384),
        "encoder_attention_mask": torch.ones(b, 20, dtype=torch.bool),
        "condition_latents": torch.zeros_like(latents),
        "condition_mask": torch.ones(b, 4, options.frames, 8, 8),
    }

    def step(half: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = model(**batch).sample
        output.float().square().mean().backward()

    def step_in_float32() -> None:
        with patch("stgen.models.attention.WRITTEN_OUT", 0):
            step(half=True)

    def step_by_torch() -> None:
        with patch("stgen.models.attention.dispatch_attention", torch_attention):
            step(half=True)

    def muon(half: bool) -> None:
        orthogonalize_together([w.grad for w in muon_matrices(model).values()], (3.4445, -4.775, 2.0315), 5, half)

    runs: dict[str, Callable[[], None]] = {
        "float32": lambda: step(half=False),
        "bfloat16": lambda: step(half=True),
        "attention in float32": step_in_float32,
        "torch's in bfloat16": step_by_torch,
        "Muon": lambda: muon(half=False),
        "Muon in bfloat16": lambda: muon(half=True),
    }
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(options.rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begin)
    for name, seconds in best.items():
        print(f"{name:26} {1000 * seconds:8.1f} ms   {seconds / best['float32']:.2f} of float32")


if __name__ == "__main__":
    main()
