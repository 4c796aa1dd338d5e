"""Averaged weights: their arithmetic, and what each process holds and saves of them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import run_training, tiny_transformer
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stgen import STGenPipeline, averaging
from stgen.averaging import (
    AveragedWeights,
    power_decay,
    power_gamma,
    reconstruct_average,
    snapshots,
    write_average,
)
from stgen.cli import app


def walk(model: torch.nn.Module, step: int) -> None:
    """A step of random weights, a function of its number alone."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def test_the_exponential_average_is_diffusers_to_the_bit() -> None:
    model = tiny_transformer()
    averaged = AveragedWeights(model, decay=0.9)
    reference = EMAModel(model.parameters(), decay=0.9, use_ema_warmup=True, power=0.75, foreach=True)
    for step in range(1, 40):
        walk(model, step)
        averaged.update(step, 4 * step, 4)
        reference.step(model.parameters())
    for value, expected in zip(averaged.state_dict().values(), reference.shadow_params, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_a_power_average_has_the_width_it_is_named_by(width: float) -> None:
    """The weights that the updates give to 1, 2, ... n, against the standard deviation that is asked for."""
    n, gamma = 20_000, power_gamma(width)
    weights = torch.zeros(n, dtype=torch.float64)
    for t in range(1, n + 1):
        decay = power_decay(3 * t, 3, gamma)
        weights[: t - 1] *= decay
        weights[t - 1] = 1 - decay
    times = torch.arange(n) / n
    mean = (weights * times).sum()
    assert weights.sum() == pytest.approx(1)
    assert (weights * (times - mean) ** 2).sum().sqrt() == pytest.approx(width, rel=1e-3)


def test_widths_out_of_range_are_refused() -> None:
    for width in (0.0, 0.3):
        with pytest.raises(ValueError, match=f"width is {width}, allowed: above 0"):
            power_gamma(width)
    with pytest.raises(ValueError, match="profile is 'cosine'"):
        AveragedWeights(torch.nn.Linear(2, 2), "cosine")


def test_frozen_parameters_are_not_averaged() -> None:
    model = tiny_transformer()
    model.proj_out.requires_grad_(False)
    averaged = AveragedWeights(model)
    assert averaged.state_dict().keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("proj_out") for name in averaged.state_dict())


def test_applied_averages_give_the_weights_back() -> None:
    model = tiny_transformer()
    averaged = AveragedWeights(model)
    for step in (1, 2, 3):
        walk(model, step)
        averaged.update(step, step, 1)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with suppress(KeyboardInterrupt), averaged.applied():
        for name, value in averaged.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
            assert not torch.equal(own[name], value)
        raise KeyboardInterrupt
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_low_precision_weights_are_averaged_in_float32() -> None:
    """A step of 2^-9 is lost in a bfloat16 average, which would stand still."""
    model = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    averaged = AveragedWeights(model, decay=0.999)
    averaged.averages["exponential"][0].fill_(1 - 2**-9)
    for _ in range(5000):
        averaged.update(10**6, 1, 1)
    assert averaged.state_dict()["weight"].dtype == torch.float32
    torch.testing.assert_close(averaged.state_dict()["weight"], torch.ones(4, 4), atol=1e-4, rtol=0)
    averaged.copy_to()
    assert model.weight.dtype == torch.bfloat16


def test_a_step_not_taken_leaves_the_averages_and_one_taken_is_as_ever() -> None:
    model, other = tiny_transformer(), tiny_transformer()
    averaged, gated = AveragedWeights(model), AveragedWeights(other)
    for step in range(1, 6):
        walk(model, step)
        walk(other, step)
        averaged.update(step, step, 1)
        gated.update(step, step, 1, torch.tensor(1.0))
    before = [value.clone() for value in gated.averages["exponential"]]
    walk(other, 6)
    gated.update(6, 6, 1, torch.tensor(0.0))
    for now, then, expected in zip(
        gated.averages["exponential"], before, averaged.averages["exponential"], strict=True
    ):
        assert torch.equal(now, then)
        assert torch.equal(now, expected)


@pytest.mark.parametrize("profile", ["exponential", "power"])
def test_saved_averages_go_on_where_they_were(profile: str, tmp_path: Path) -> None:
    model = tiny_transformer()
    averaged = AveragedWeights(model, profile)
    for step in (1, 2):
        walk(model, step)
        averaged.update(step, 8 * step, 8)
    averaged.save(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"{name}.safetensors" for name in averaged.averages}
    resumed = AveragedWeights(model, profile)
    resumed.load(tmp_path)
    walk(model, 3)
    for each in (averaged, resumed):
        each.update(3, 24, 8)
    for name in averaged.averages:
        assert load_file(tmp_path / f"{name}.safetensors").keys() == dict(model.named_parameters()).keys()
        expected = averaged.state_dict(name)
        assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict(name).items())


def test_averages_of_another_model_are_refused(tmp_path: Path) -> None:
    AveragedWeights(torch.nn.Linear(3, 2)).save(tmp_path)
    with pytest.raises(ValueError, match=r"shape of weight is \(2, 3\), allowed: \(2, 4\)"):
        AveragedWeights(torch.nn.Linear(4, 2)).load(tmp_path)
    with pytest.raises(ValueError, match=r"averaged weights is \['bias'\]"):
        AveragedWeights(torch.nn.Linear(3, 2, bias=False)).load(tmp_path)
    with pytest.raises(ValueError, match=r"power-0.050.safetensors"):
        AveragedWeights(torch.nn.Linear(3, 2), "power").load(tmp_path)


# --- Averages of any width, afterwards ----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.03, 0.06, 0.08, 0.12, 0.2])
def test_snapshots_add_up_to_the_average_of_any_width(width: float, tmp_path: Path) -> None:
    """A random walk of weights, in steps of two sizes: the average rebuilt from 34 snapshots beside one that was kept."""
    model = torch.nn.Linear(8, 8)
    averaged, gamma, batch, samples, snapshots = AveragedWeights(model, "power"), power_gamma(width), 4, 0, 0
    kept = torch.zeros(8, 8, dtype=torch.float64)
    for step in range(1, 700):
        walk(model, step)
        batch = 4 if samples < 1024 else 2  # another batch size from there on
        samples += batch
        averaged.update(step, samples, batch)
        kept += (1 - power_decay(samples, batch, gamma)) * (model.weight.detach() - kept)
        if averaged.is_due(samples, batch, every=56, total=10**6):
            averaged.snapshot(tmp_path, samples)
            snapshots, expected, end = snapshots + 1, kept.clone(), samples
    assert snapshots == samples // 56 == 34
    rebuilt = reconstruct_average(tmp_path, width)["weight"]
    assert rebuilt.dtype == torch.float32
    error = (rebuilt - expected).norm() / expected.norm()
    assert error < 3e-4, (width, error)
    with pytest.raises(ValueError, match=r"samples is 5, allowed: one of the run's snapshots: 56, 112"):
        reconstruct_average(tmp_path, width, 5)
    earlier = reconstruct_average(tmp_path, width, end - 56)["weight"]
    assert (earlier - expected).norm() > 10 * (rebuilt - expected).norm()


def test_too_few_snapshots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run is .*, allowed: one with snapshots in averages/"):
        reconstruct_average(tmp_path, 0.08)
    averaged = AveragedWeights(torch.nn.Linear(2, 2), "power")
    averaged.snapshot(tmp_path, 8)
    with pytest.raises(
        ValueError, match=r"width is 0.2, allowed: those that 1 snapshots add up to; this one is \d+% off"
    ):
        reconstruct_average(tmp_path, 0.2)


def test_snapshots_after_the_checkpoint_are_made_again(training_world: Path, tmp_path: Path) -> None:
    """Killed at 16 clips, the run goes on from 8 with other distances between snapshots."""
    run, power = tmp_path / "run", "optimizer.average=power"
    run_training(training_world, run, power, "optimizer.snapshot_every=4", saves=1)
    assert list(snapshots(run)) == [4, 8, 12, 16]
    shutil.copytree(run / "averages" / "samples-16", run / "averages" / "samples-20.tmp")
    run_training(training_world, run, power, "optimizer.snapshot_every=6")
    assert list(snapshots(run)) == [4, 8, 12, 20, 24]
    assert not list((run / "averages").glob("*.tmp"))


@pytest.mark.slow
def test_a_run_leaves_what_any_average_of_it_is_made_of(
    training_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`optimizer.average=power`, then `stgen average`: a folder that opens."""
    power = ("optimizer.average=power", "optimizer.snapshot_every=4", "samples=64", "log_every=100")
    run_training(training_world, tmp_path / "whole", *power)
    names = [path.name for path in snapshots(tmp_path / "whole").values()]
    assert names == [f"samples-{n}" for n in range(4, 65, 4)]
    out = tmp_path / "out"
    app(["average", "--run", f"{tmp_path}/whole", "--width", "0.1", "--out", f"{out}"], standalone_mode=False)
    rebuilt, kept = (
        STGenPipeline.from_pretrained(f).transformer.state_dict() for f in (out, tmp_path / "whole/export")
    )
    raw = STGenPipeline.from_pretrained(out, variant="raw").transformer.state_dict()
    off = {name: (rebuilt[name] - kept[name]).norm() / (raw[name] - kept[name]).norm().clamp(min=1e-9) for name in kept}
    assert max(off.values()) < 1e-3, "the width that was kept and exported"
    write_average(tmp_path / "whole", 0.2, tmp_path / "wide")
    wide = STGenPipeline.from_pretrained(tmp_path / "wide").transformer.state_dict()
    assert any(not torch.equal(wide[name], rebuilt[name]) for name in wide)
    with pytest.raises(ValueError, match="a new or empty folder"):
        write_average(tmp_path / "whole", 0.1, out)
    monkeypatch.setattr(averaging, "reconstruct_average", lambda *arguments: {"another.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"averaged weights of .* is \['another.weight'\], allowed: those of .*export"):
        write_average(tmp_path / "whole", 0.1, tmp_path / "other")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("other")], "nothing that could be opened"


# --- Weights that are split over processes ------------------------------------------------------------------------
# What follows the line of `main` runs as two processes of `torch.distributed.run`, on this very file.


def small_model() -> torch.nn.Module:
    """Sizes that two processes split unevenly."""
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.SiLU(), torch.nn.Linear(7, 3))


def zero3(model: torch.nn.Module) -> tuple[Callable[[Tensor], None], Callable[[], dict[str, Tensor]]]:
    """A training step under DeepSpeed ZeRO-3, and a look at the full weights."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Biases stay gathered (persistent), matrices do not.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 10}
    settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]

    def step(x: Tensor) -> None:
        engine.backward(engine(x).square().mean())
        engine.step()

    def weights() -> dict[str, Tensor]:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: p.detach().clone() for name, p in model.named_parameters()}

    return step, weights


def fsdp2(model: torch.nn.Module) -> tuple[Callable[[Tensor], None], Callable[[], dict[str, Tensor]]]:
    """The same under FSDP2."""
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)  # as Accelerate has it
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)

    def step(x: Tensor) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def weights() -> dict[str, Tensor]:
        return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}

    return step, weights


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name, split in {"zero3": zero3, "fsdp2": fsdp2}.items():
        model = small_model()
        step, weights = split(model)
        averaged, resumed = AveragedWeights(model, "power"), AveragedWeights(model, "power")
        whole = small_model()  # the averages of the full weights, without any splitting
        reference = AveragedWeights(whole, "power")
        held = sum(part.numel() for part in averaged.averages["power-0.050"])
        assert held < 0.65 * sum(p.numel() for p in whole.parameters()), "a process averages more than its part"
        for n in range(1, 6):
            step(torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * n + rank)))
            whole.load_state_dict(weights())
            for each in (averaged, reference):
                each.update(n, 8 * n, 8)
        averaged.save(folder / name)
        for average in averaged.averages:
            full, expected = averaged.state_dict(average), reference.state_dict(average)
            assert full.keys() == (expected.keys() if rank == 0 else set())
            for key, value in full.items():
                assert torch.equal(value, expected[key]), (name, average, key)
        own, x = weights(), torch.ones(1, 5)
        with averaged.applied(), reference.applied(), torch.no_grad():
            within, now = weights(), model(x)
            assert all(torch.equal(within[key], value) for key, value in whole.state_dict().items()), name
            torch.testing.assert_close(now, whole(x))
        assert all(torch.equal(value, own[key]) for key, value in weights().items()), name
        with torch.no_grad():
            torch.testing.assert_close(model(x), whole(x))

        # Written by one process, in the test, for two.
        dist.barrier()
        resumed.load(folder / "single")
        for average in resumed.averages:
            saved = load_file(folder / "single" / f"{average}.safetensors")
            assert all(torch.equal(value, saved[key]) for key, value in resumed.state_dict(average).items())
    dist.destroy_process_group()


@pytest.mark.slow
def test_split_weights_are_averaged_in_place_and_saved_whole(tmp_path: Path) -> None:
    """ZeRO-3 and FSDP2 on two processes: averages to the bit those of full weights, read by one process, and back."""
    model = small_model()
    single = AveragedWeights(model, "power")
    walk(model, 1)
    single.update(1, 8, 8)
    walk(model, 2)
    single.update(2, 16, 8)
    single.save(tmp_path / "single")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for name in ("zero3", "fsdp2"):
        single.load(tmp_path / name)
        assert single.state_dict()["0.weight"].shape == (7, 5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
