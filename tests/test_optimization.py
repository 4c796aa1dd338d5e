"""Optimizers, schedules, and steps that are not taken because a number is not finite."""

import copy
import json
import math
import os
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import losses_of, run_training, tiny_transformer, training_arguments
from hypothesis import given
from hypothesis import strategies as st
from processes import Run
from safetensors.torch import load_file, save_file
from torch import Tensor

import stgen.train
from stgen import STGenPipeline
from stgen.checkpoint import checkpoints
from stgen.optimization import (
    OPTIMIZERS,
    FiniteSteps,
    Muon,
    OptimizerConfig,
    all_or_nothing,
    describe_optimizer,
    learning_rate,
    make_optimizer,
    muon_matrices,
    orthogonalize,
    orthogonalize_together,
    step_if_finite,
)

# --- Schedules ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2000), st.integers(0, 300), st.floats(0, 1))
def test_the_cosine_is_what_it_was_to_the_bit(samples: int, warmup: int, final: float) -> None:
    config = OptimizerConfig(lr=3e-4, warmup=warmup, final_lr=final)
    warm = min(1.0, samples / warmup) if warmup else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, samples / 1000)))
    assert learning_rate(config, samples, 1000) == 3e-4 * warm * (final + (1 - final) * cosine)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("1-sqrt", 1 - math.sqrt(0.5))])
def test_wsd_warms_up_stays_and_decays_over_the_last_share(shape: str, middle: float) -> None:
    config = OptimizerConfig(lr=1.0, schedule="wsd", warmup=100, decay=0.2, decay_shape=shape, final_lr=0.1)
    rates = [learning_rate(config, samples, 1000) for samples in (0, 50, 100, 500, 800, 900, 1000, 1100)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 0.1 + 0.9 * middle, 0.1, 0.1])
    # The longer run is the same up to where the shorter one begins to decay.
    assert all(learning_rate(config, n, 1000) == learning_rate(config, n, 2000) for n in range(0, 801, 16))


def test_constant_is_constant() -> None:
    config = OptimizerConfig(lr=0.3, schedule="constant", warmup=10)
    assert [learning_rate(config, n, 100) for n in (5, 10, 100)] == [0.15, 0.3, 0.3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "sgd"}, "optimizer.name is 'sgd', allowed: adamw, adamw_8bit, muon, prodigy"),
        ({"schedule": "step"}, "optimizer.schedule is 'step', allowed: cosine, constant, wsd"),
        ({"schedule": "wsd"}, "optimizer.decay is 0.0, allowed: above 0, up to 1, with schedule wsd"),
        ({"decay": 0.1}, "optimizer.decay is 0.1, allowed: 0 with schedule cosine"),
        ({"decay_shape": "1-sqrt"}, "optimizer.decay_shape is '1-sqrt', allowed: linear without wsd"),
        ({"average": "mean"}, "optimizer.average is 'mean', allowed: exponential, power"),
        ({"average": "power"}, "optimizer.snapshot_every is 0, allowed: 1 or more with power"),
        ({"snapshot_every": 8}, "optimizer.snapshot_every is 8, allowed: 0 with exponential"),
        ({"max_nonfinite": 0}, "optimizer.max_nonfinite is 0, allowed: 1 or more"),
    ],
)
def test_bad_settings_are_one_line(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        OptimizerConfig(**values)


# --- Optimizers ---------------------------------------------------------------------------------------------------


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    """Steps towards the output of another model; the last loss."""
    for i in steps:
        generator = torch.Generator().manual_seed(i)
        loss = sum(
            (p - torch.randn(p.shape, generator=generator) * 0.1 - 1).square().mean() for p in model.parameters()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    config = OptimizerConfig(name=name, lr=1.0 if name == "prodigy" else 1e-2, weight_decay=0.01)
    model = tiny_transformer(num_attention_heads=2, attention_head_dim=32)  # matrices large enough for 8 bits
    optimizer = make_optimizer(model, config)
    first = train(model, optimizer, range(1))
    train(model, optimizer, range(1, 10))
    other = copy.deepcopy(model)
    resumed = make_optimizer(other, config)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    last = train(model, optimizer, range(10, 40))
    assert train(other, resumed, range(10, 40)) == last < 0.9 * first
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_default_is_adamw_as_it_was() -> None:
    model, other = tiny_transformer(), tiny_transformer()
    groups = [
        {"params": [p for p in other.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in other.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    train(other, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98)), range(5))
    train(model, make_optimizer(model, OptimizerConfig(lr=1e-2, beta2=0.98, weight_decay=0.1)), range(5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_muon_has_the_linear_layers_of_blocks_and_text_and_adamw_the_rest() -> None:
    model = tiny_transformer()
    names = set(muon_matrices(model))
    assert "transformer_blocks.0.spatial_attn.to_qkv.weight" in names
    assert "transformer_blocks.2.ff.net.2.weight" in names
    assert "text_embed.linear_1.weight" in names
    assert len(names) == 3 * 7 + 2
    outside = ("patch_embed", "proj_out", "time_embed", "time_modulation", "scale_shift_table")
    assert not [name for name in names if any(part in name for part in outside)]
    other = copy.deepcopy(model)
    optimizer = make_optimizer(model, OptimizerConfig(name="muon", lr=1e-2))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len(list(model.parameters()))
    train(model, optimizer, range(3))
    # The rest goes as AdamW alone would have it; a matrix moves by an orthogonal step of AdamW's size.
    train(other, make_optimizer(other, OptimizerConfig(lr=1e-2)), range(3))
    adamw = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, adamw[name]) == (name not in names), name
    text = describe_optimizer(model, OptimizerConfig(name="muon"))
    assert text.startswith("muon on 23 hidden matrices (cross_attn.to_kv, ")
    # Convolutions are no matrices of a block.
    with pytest.raises(ValueError, match="optimizer.name is 'muon', allowed: adamw for a model without linear layers"):
        make_optimizer(torch.nn.Sequential(torch.nn.Linear(2, 2)), OptimizerConfig(name="muon"))


def test_muon_steps_are_orthogonal_and_of_the_size_of_adamw() -> None:
    model = tiny_transformer()
    optimizer = make_optimizer(model, OptimizerConfig(name="muon", lr=1.0))
    weight = model.transformer_blocks[0].spatial_attn.to_qkv.weight
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    values = torch.linalg.svdvals(weight.detach() - before) / (0.2 * math.sqrt(72))  # its longer side
    assert 0.5 < values.min() < values.max() < 1.3, "Newton-Schulz brings all singular values near 1"


@pytest.mark.parametrize("half", [False, True])
def test_muon_is_that_of_torch(half: bool) -> None:
    """Momentum and decay included: to the bit in bfloat16, in float32 but for what torch's rounding adds."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((8, 24), (24, 8), (16, 16))]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    groups = [[{"params": weights, "weight_decay": 0.1}] for weights in (ours, theirs)]
    optimizers = [
        Muon(groups[0], lr=0.1, half=half),
        torch.optim.Muon(groups[1], lr=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = other.grad = torch.randn(mine.shape)
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        moved = (mine - before).norm()
        assert moved > 0.1
        assert (mine - other).norm() <= (0 if half else 0.02 * moved)


NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)


def some_matrices(count: int) -> list[Tensor]:
    shapes = [(8, 24), (24, 8), (16, 16), (4, 4), (32, 8)][:count]
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]


def orthogonalize_as(rank: int, world: int, count: int, folder: Path) -> None:
    """One of several processes: saves what it gets, and how much of that was its own work."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    with patch("stgen.optimization.orthogonalize", wraps=orthogonalize) as work:
        results = orthogonalize_together(some_matrices(count), NEWTON_SCHULZ, 5)
    halves = orthogonalize_together(some_matrices(count), NEWTON_SCHULZ, 5, half=True)
    torch.distributed.destroy_process_group()
    named = {str(i): result.contiguous() for i, result in enumerate(results)}
    named |= {f"half {i}": result.contiguous() for i, result in enumerate(halves)}
    save_file({**named, "done": torch.tensor(work.call_count)}, folder / f"{rank}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("world", "count"), [(2, 5), (3, 2)])
def test_processes_share_the_work_of_muon(world: int, count: int, tmp_path: Path) -> None:
    """Each matrix is done by one of them, and all get the bits of a single process; some may have nothing to do."""
    torch.multiprocessing.spawn(orthogonalize_as, (world, count, tmp_path), world)
    results = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(world)]
    done = [int(result.pop("done")) for result in results]
    assert sum(done) == count
    assert max(done) < count
    for result in results:
        for i, matrix in enumerate(some_matrices(count)):
            assert torch.equal(result[str(i)], orthogonalize(matrix, NEWTON_SCHULZ, 5))
            assert torch.equal(result[f"half {i}"], orthogonalize(matrix.bfloat16(), NEWTON_SCHULZ, 5))


def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("muon", "prodigy", "adamw_8bit"):
        with pytest.raises(ValueError, match=f"optimizer.name is '{name}', allowed: adamw under DEEPSPEED$"):
            make_optimizer(tiny_transformer(), OptimizerConfig(name=name), DistributedType.DEEPSPEED)
    monkeypatch.setattr("stgen.optimization.find_spec", lambda package: None)
    with pytest.raises(ValueError, match="allowed: adamw without the package bitsandbytes"):
        make_optimizer(tiny_transformer(), OptimizerConfig(name="adamw_8bit"))


# --- Steps that are not taken -------------------------------------------------------------------------------------


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [x for entry in optimizer.state_dict()["state"].values() for x in entry.values() if torch.is_tensor(x)]
    return [x.detach().clone() for x in (*model.parameters(), *state)]


@pytest.mark.parametrize("name", [*OPTIMIZERS, "fused"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(name: str, bad: float) -> None:
    """`fused` is what a GPU runs: the kernel, here a CPU's, skips by itself."""
    model = tiny_transformer()
    if name == "fused":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    else:
        optimizer = make_optimizer(model, OptimizerConfig(name=name))
    finite = FiniteSteps(optimizer, limit=3)
    taken = []
    for step, factor in enumerate([1.0, bad, 1.0, bad, bad, 1.0], 1):
        sum(p.square().sum() for p in model.parameters()).backward()
        next(model.parameters()).grad[0, 0] *= factor
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = state_of(model, optimizer)
        taken.append(bool(finite.take(norm, step, 8 * step, 8)))
        after = state_of(model, optimizer)
        optimizer.zero_grad()
        same = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert same == (factor != 1.0), step
    assert taken == [True, False, True, False, False, True]
    assert finite.count() == 3
    assert finite.count() == 0
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_too_many_in_a_row_end_the_run_with_a_line_that_names_them(fused: bool) -> None:
    model = torch.nn.Linear(2, 2)
    finite = FiniteSteps(torch.optim.AdamW(model.parameters(), fused=fused), limit=2)
    state = None
    for step, norm in enumerate([math.inf, 1.0, math.nan], 1):
        model(torch.ones(1, 2)).sum().backward()
        finite.take(torch.tensor(norm), step, 8 * (step - 1), 8)
    state = finite.state_dict()
    assert state == {"skipped": 2, "in_a_row": 1}
    resumed = FiniteSteps(finite.optimizer, limit=2)
    resumed.load_state_dict(state)
    message = (
        "the loss or its gradient was not finite in 2 optimizer steps in a row (optimizer.max_nonfinite), "
        "last in step 4, samples 24 to 31"
    )

    def go_on() -> None:  # where the kernel skips, the verdict is read with the next step or row
        resumed.take(torch.tensor(math.nan), 4, 24, 8)
        resumed.count()

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        go_on()


def test_a_loss_that_is_not_finite_has_no_finite_gradient() -> None:
    """Infinity as a constant has the gradient 0, which would be a step like any other."""
    weight = torch.ones(3, requires_grad=True)
    all_or_nothing(weight.sum() + math.inf).backward()
    assert weight.grad.isnan().all()
    weight.grad = None
    all_or_nothing(weight.square().sum()).backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
    assert step_if_finite(torch.optim.AdamW([weight]), torch.tensor(math.nan)) is False


def poison(forwards: set[int], rank: int | None = None) -> None:
    """From now on these forwards of training (from 1; of one rank) have a loss of NaN."""
    original, count = stgen.train.denoising_losses, 0

    def losses(*args, **kwargs) -> dict[str, Tensor]:
        nonlocal count
        found = original(*args, **kwargs)
        count += torch.is_grad_enabled()
        if count in forwards and rank in (None, int(os.environ.get("RANK", 0))):
            found["loss"] = found["loss"] * math.nan
        return found

    stgen.train.denoising_losses = losses


@pytest.fixture
def poisonable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stgen.train, "denoising_losses", stgen.train.denoising_losses)


@pytest.fixture(scope="module")
def poisoned(training_world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A run of one process whose steps 2 and 4 of 6 are not finite."""
    run = tmp_path_factory.mktemp("poisoned") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stgen.train, "denoising_losses", stgen.train.denoising_losses)
        poison({2, 4})
        return run, run_training(training_world, run, "checkpoint_every=1", "keep_checkpoints=6")


@pytest.mark.slow
def test_a_run_skips_counts_and_goes_on(
    poisoned: tuple[Path, list[dict]], training_world: Path, tmp_path: Path
) -> None:
    run, rows = poisoned
    assert [row["nonfinite"] for row in rows] == [0, 1, 0, 1, 0, 0]
    assert [row["loss"] is None for row in rows] == [False, True, False, True, False, False]
    clean = losses_of(run_training(training_world, tmp_path / "clean"))
    assert losses_of(rows)[4] == clean[4]
    # The weights of step 3 are averaged once: step 4 did not reach the averages.
    three, four, five = (
        (run / "checkpoints" / f"step-{step}" / "averages" / "exponential.safetensors").read_bytes()
        for step in (3, 4, 5)
    )
    assert three == four != five
    weights = STGenPipeline.from_pretrained(run / "export").transformer.state_dict()
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.slow
def test_one_bad_forward_of_two_skips_the_whole_step(
    poisoned: tuple[Path, list[dict]], training_world: Path, tmp_path: Path, poisonable: None
) -> None:
    poison({4, 7})
    accumulated = run_training(training_world, tmp_path / "run", "batch_size=2", "accumulate=2")
    assert [row["nonfinite"] for row in accumulated] == [0, 1, 0, 1, 0, 0]
    one, two = losses_of(poisoned[1]), losses_of(accumulated)
    assert {n: two[n] for n in (4, 12, 20, 24)} == pytest.approx({n: one[n] for n in (4, 12, 20, 24)}, rel=2e-4)


@pytest.mark.slow
def test_a_run_that_is_never_finite_stops_with_one_line(
    training_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, poisonable: None
) -> None:
    poison(set(range(3, 99)))
    with pytest.raises(ValueError, match=r"2 optimizer steps in a row .*, last in step 4, samples 12 to 15$"):
        run_training(training_world, tmp_path / "run", "optimizer.max_nonfinite=2")


def poisoned_training(arguments: list[str]) -> None:
    poison({2, 4}, rank=1)
    stgen.train.main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_cpu", "zero2_cpu", "zero3_cpu"])
def test_a_loss_that_is_not_finite_on_one_process_is_no_step_on_any(
    poisoned: tuple[Path, list[dict]],
    training_world: Path,
    tmp_path: Path,
    strategy: str,
) -> None:
    run = tmp_path / "run"
    arguments = training_arguments(training_world, run, "batch_size=2")
    Run(poisoned_training, arguments, tmp_path / "log", strategy, 2).succeed()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["nonfinite"] for row in rows] == [0, 1, 0, 1, 0, 0]
    assert all(row["loss"] is not None for row in rows), "that of the other process is told"
    one, two = losses_of(poisoned[1]), losses_of(rows)
    assert {n: two[n] for n in (4, 12, 20, 24)} == pytest.approx({n: one[n] for n in (4, 12, 20, 24)}, rel=2e-4)
    exports = [load_file(f / "export/transformer/diffusion_pytorch_model.safetensors") for f in (run, poisoned[0])]
    for name, weight in exports[1].items():
        torch.testing.assert_close(exports[0][name], weight, atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_muon_trains_matrices_alone(training_world: Path, tmp_path: Path) -> None:
    """LoRA's are all in the blocks, so nothing is left for AdamW."""
    rows = run_training(
        training_world, tmp_path / "run", f"init={training_world}/base", "lora={rank: 2}", "optimizer.name=muon"
    )
    assert len(losses_of(rows)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "prodigy", "adamw_8bit"])
def test_runs_with_other_optimizers_resume_to_the_bit(name: str, training_world: Path, tmp_path: Path) -> None:
    settings = (f"optimizer.name={name}", "optimizer.schedule=constant", "optimizer.lr=1e-2")
    run_training(training_world, tmp_path / "whole", *settings)
    run_training(training_world, tmp_path / "cut", *settings, "samples=12")
    run_training(training_world, tmp_path / "cut", *settings)
    whole, cut = (load_file(checkpoints(tmp_path / run)[-1] / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(cut[key], value) for key, value in whole.items())
