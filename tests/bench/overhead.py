"""What averaging, finite steps, logging and the console cost, as a share of a training step.

    python tests/bench/overhead.py                       # a transformer of 7 M parameters, one CPU thread, fp32
    python tests/bench/overhead.py --average power       # two averages instead of one
    python tests/bench/overhead.py --device cuda --dim 1152 --layers 28 --batch 8 --grid 5,32,32

Two loops take turns on one model, optimizer and batch, a step each: the bare one (forward, backward, clip, step) and the one
of stgen/loop.py, with everything that it does around them: averaged weights, skipped steps that are counted, means of
losses, throughput with MFU, the row of metrics.jsonl every `--log-every` steps, and the bar. What it does beyond the bare one
is timed by itself, and `overhead` is its share of a bare step (medians, and the mean over all). The FLOPs that are counted in
the first forward of a shape are outside of the steps that count.
"""

import argparse
import io
import statistics
import tempfile
import time
from contextlib import redirect_stderr
from pathlib import Path

import torch
from accelerate import Accelerator

from stgen import STGenTransformer3DModel
from stgen.averaging import PROFILES, AveragedWeights
from stgen.optimization import FiniteSteps, OptimizerConfig, all_or_nothing, make_optimizer
from stgen.tracking import JsonlTracker, LossLog, Throughput, progress_bar, show_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--grid", default="5,16,16", help="latent frames, height and width of a clip")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--average", default="exponential", choices=PROFILES)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    t, h, w = map(int, options.grid.split(","))
    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision="no" if options.device == "cpu" else "bf16")
    device = accelerator.device
    plain = STGenTransformer3DModel(
        in_channels=16, num_attention_heads=options.dim // 64, attention_head_dim=64, num_layers=options.layers,
        text_dim=384, mask_channels=0, patch_size=(1, 2, 2),
    )  # fmt: skip
    model, optimizer = accelerator.prepare(plain, make_optimizer(plain, OptimizerConfig()))
    batch = {
        "hidden_states": torch.randn(options.batch, 16, t, h, w, device=device),
        "timestep": torch.full((options.batch,), 500.0, device=device),
        "encoder_hidden_states": torch.randn(options.batch, 32, 384, device=device),
    }
    averaged = AveragedWeights(plain, options.average)
    finite, log = FiniteSteps(optimizer, 20), LossLog(accelerator)
    speed = Throughput(accelerator, plain, peak=1e12, tokens=lambda shape: t * (h // 2) * (w // 2))
    seen = {"position": list(range(options.batch)), "shape": (4 * t, 8 * h, 8 * w)}

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()  # other work on the machine does not count

    def forward() -> torch.Tensor:
        return model(**batch, return_dict=False)[0].float().square().mean()

    def bare() -> float:
        begin = wait()
        accelerator.backward(forward())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return wait() - begin

    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        tracker, bar = JsonlTracker(Path(folder)), progress_bar(10**6, 0, True, "overhead")

        def whole(step: int) -> float:
            """A step of the loop: the time of what is not in the bare one."""
            begin = wait()
            speed.start()
            speed.see(seen)
            own = wait() - begin
            loss = forward()
            begin = wait()
            poisoned = all_or_nothing(loss)
            own += wait() - begin
            accelerator.backward(poisoned)
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            begin = wait()
            optimizer_step = optimizer.step
            optimizer.step = lambda: None  # the step itself is the bare loop's
            taken = finite.take(norm, step, step * options.batch, options.batch)
            own += wait() - begin
            optimizer.step = optimizer_step
            optimizer.step()
            optimizer.zero_grad()
            begin = wait()
            log.add({"loss": loss})
            averaged.update(step, step * options.batch, options.batch, taken)
            bar.update(options.batch)
            if step % options.log_every == 0:
                row = log.take() | {"nonfinite": finite.count()} | speed.take()
                tracker.log(row, step)
                show_row(bar, row)
            speed.stop()
            return own + wait() - begin

        for step in (1, 2):
            bare(), whole(step)
        times = [(bare(), whole(step)) for step in range(options.log_every + 1, options.log_every + options.steps + 1)]
        bar.close()
    steps, own = zip(*times, strict=True)
    size = sum(p.numel() for p in plain.parameters())
    print(f"{size / 1e6:.0f} M parameters, {t * (h // 2) * (w // 2) * options.batch} tokens, {device}")
    print(f"bare step {1e3 * statistics.median(steps):.0f} ms, around it {1e3 * statistics.median(own):.1f} ms")
    print(
        f"overhead {statistics.median(own) / statistics.median(steps):.2%} (median), {sum(own) / sum(steps):.2%} (mean)"
    )


if __name__ == "__main__":
    main()
