"""`stgen plan` against what it speaks of: refusals of the trainers, real steps, real checkpoints."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_text_encoder, tiny_vae
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from typer.testing import CliRunner

from stgen import STGenTransformer3DModel
from stgen.cli import app
from stgen.config import load_config
from stgen.data.moving_mnist import write_moving_mnist
from stgen.data.reading import ClipDataset, clip_loader
from stgen.data.shards import ShardWriter, open_index
from stgen.data.sources import open_source
from stgen.encoding import encode_clips
from stgen.footprint import (
    STRATEGIES,
    RankMemory,
    States,
    StepFootprint,
    optimizer_bytes,
    rank_memory,
    step_footprint,
)
from stgen.optimization import OptimizerConfig, make_optimizer
from stgen.plan import make_plan, plan_data
from stgen.plan_report import Plan, report
from stgen.preflight import read_config
from stgen.rehearsal import optimizer_state_bytes
from stgen.train import TrainConfig, train

REPOSITORY = Path(__file__).parent.parent
TRAIN = str(REPOSITORY / "configs/moving_mnist_32/transformer.yaml")
TRAIN_VAE = str(REPOSITORY / "configs/moving_mnist_32/vae.yaml")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_moving_mnist(folder / "train", clips=8, size=32, digits=1)
    (folder / "text").mkdir()
    for part in tiny_text_encoder(folder):
        part.save_pretrained(folder / "text")
    tiny_vae().save_pretrained(folder / "vae")
    return folder


def overrides(world: Path, *more: str) -> list[str]:
    model = ["model.num_attention_heads=2", "model.attention_head_dim=12", "model.num_layers=2", "model.pattern=st"]
    paths = [f"run={world}/run", f"vae={world}/vae", f"data.path={world}/train", f"text_encoder={world}/text"]
    return [*paths, *model, "batch_size=2", "samples=24", *more]


@pytest.fixture(autouse=True)
def no_accelerator_is_left():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# --- A run that would start ---------------------------------------------------------------------------------------


def test_plan_of_a_transformer(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    command = ["plan", "--config", TRAIN, *overrides(world), "--processes", "2", "--json", str(out)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "the run would start" in done.output
    assert "20 x 32 x 32" in done.output
    plan = json.loads(out.read_text())
    assert plan["trainer"] == "train"
    (stage,) = plan["stages"]
    assert (stage["global_batch"], plan["steps"], stage["steps_per_epoch"]) == (4, 6, 2)
    (row,) = stage["shapes"]
    assert (row["clips"], row["batches"], row["tokens"]) == (8, 4, 6 * 8 * 8)
    assert plan["step_seconds"] > 0
    assert plan["total_seconds"] == pytest.approx(6 * plan["step_seconds"])
    assert not (world / "run").exists(), "nothing is written"


def test_plan_of_a_vae_with_every_loss(world: Path) -> None:
    losses = ["perceptual={weight: 0.1}", "discriminator={channels: 8, layers: 2}", "ping_pong_weight=0.1"]
    settings = [f"run={world}/vae_run", f"data.path={world}/train", "model.block_out_channels=[8,16,16]", *losses]
    plan = make_plan(TRAIN_VAE, [*settings, "model.latent_channels=4"])
    assert plan.problems == []
    assert plan.trainer == "train_vae"
    assert {"encoder, trained", "decoder, trained", "discriminator", "perceptual network, frozen"} <= set(
        plan.parameters
    )
    assert plan.memory["ddp"].frozen > 0
    assert plan.total_seconds is not None


# --- Refusals: all of them ----------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_listed(world: Path) -> None:
    wrong = ["optimizer.lr=-1", "data.workers=-1", "flow.nonsense=3", "masks=[{kind: nothing_known}]", "samples=0"]
    wrong += ["model.depth=3", "model.breadth=3"]
    more = ["--strategy", "fsdp", "--precision", "fp16"]
    done = CliRunner().invoke(app, ["plan", "--config", TRAIN, *overrides(world), *wrong, *more])
    assert done.exit_code == 2
    for name in (
        "optimizer.lr",
        "data.workers",
        "nonsense",
        "nothing_known",
        "samples",
        "depth",
        "breadth",
        "fsdp",
        "fp16",
    ):
        assert any(name in line and "error" in line for line in done.output.splitlines()), (name, done.output)
    assert "9 reasons" in done.output


def test_no_configuration_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ValueError, match="nowhere.yaml', allowed: a YAML file"):
        make_plan("nowhere.yaml")
    with pytest.raises(ValueError, match=r"broken.yaml: while parsing"):
        make_plan(str(tmp_path / "broken.yaml"))
    config, problems = read_config("train", str(tmp_path / "empty.yaml"), [])
    assert config is None
    assert problems == [f"config: {key} is missing" for key in ("run", "vae", "data.path")]


def test_keys_that_need_each_other_are_not_blamed() -> None:
    # Alone, learn_sigma is refused with the default objective.
    settings = ["model.learn_sigma=true", "flow.objective=epsilon", "run=a", "vae=b", "data.path=c", "samples=0"]
    config, problems = read_config("train", TRAIN, settings)
    assert config is None
    assert len(problems) == 1
    assert "samples" in problems[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vae=/nowhere", "vae is '/nowhere'"),
        ("text_encoder=/nowhere", "text_encoder is '/nowhere'"),
        ("data.path=/nowhere", "a folder of shards"),
        ("model.pattern=xyz", "xyz"),
        ("data.height=48", "fit no bucket"),
        ("model.mask_channels=3", "model.mask_channels is 3"),
    ],
)
def test_a_run_that_would_not_start(world: Path, override: str, message: str) -> None:
    plan = make_plan(TRAIN, overrides(world, override), probe_seconds=0)
    assert any(message in problem for problem in plan.problems), plan.problems


def test_a_begun_run_is_asked_for_its_configuration(world: Path) -> None:
    run = [f"run={world}/begun", "model.num_attention_heads=16", "checkpoint_every=2", "samples=8"]
    train(load_config(TrainConfig, TRAIN, overrides(world, *run)))
    plan = make_plan(TRAIN, overrides(world, *run, "samples=24"), probe_seconds=0)
    assert (plan.samples_done, plan.steps, plan.problems) == (8, 8, [])
    # Checkpoint and export are as large as was said, but for what is not tensors.
    (newest,) = sorted((world / "begun" / "checkpoints").glob("step-4"))
    files = sum(path.stat().st_size for path in newest.rglob("*"))
    assert plan.checkpoint_bytes == pytest.approx(files, rel=0.05)
    exported = sum(path.stat().st_size for path in (world / "begun" / "export").rglob("*.safetensors"))
    assert plan.export_bytes == pytest.approx(exported, rel=0.02)
    plan = make_plan(TRAIN, overrides(world, *run, "seed=9"), probe_seconds=0)
    assert any(problem.startswith("seed is 9") for problem in plan.problems)


def write_clips(folder: Path, counts: dict[tuple[int, int, int], int]) -> None:
    with ShardWriter(folder) as shards:
        for (t, h, w), count in counts.items():
            file = io.BytesIO()
            np.save(file, np.zeros((t, h, w, 3), np.uint8))
            clip = {"caption": "a", "fps": 10.0, "num_frames": t, "height": h, "width": w, "source": "zeros"}
            for i in range(count):
                shards.write(f"{t}-{h}-{w}-{i}", clip, npy=file.getvalue())


def test_buckets(tmp_path: Path, world: Path) -> None:
    """Counts, shares and batches of each; every shape that fits nowhere is named."""
    write_clips(tmp_path / "data", {(5, 16, 16): 8, (9, 16, 24): 4, (1, 16, 16): 3, (9, 32, 32): 1})
    buckets = "data.buckets=[{num_frames: 5, height: 16, width: 16, keep: 0.5}, {num_frames: 9, height: 16, width: 24}]"
    data = [f"data.path={tmp_path}/data", buckets, "data.block=4"]
    plan = make_plan(TRAIN, overrides(world, *data), probe_seconds=0)
    rows = {row.shape: row for row in plan.stages[0].shapes}
    assert {shape: row.clips for shape, row in rows.items()} == {
        **{(5, 16, 16): 8, (9, 16, 24): 4},
        **{(1, 16, 16): 3, (9, 32, 32): 1},
    }
    assert rows[5, 16, 16].share == rows[9, 16, 24].share == 0.5
    assert rows[5, 16, 16].batches == 2
    refusals = [problem for problem in plan.problems if "fit no bucket" in problem]
    assert len(refusals) == 2
    assert "3 clips of (1, 16, 16)" in refusals[0]
    assert "1-16-16-0" in refusals[0]


def test_stages_are_planned_one_by_one(world: Path, tmp_path: Path) -> None:
    write_clips(tmp_path / "small", {(5, 16, 16): 8})
    stages = f"stages=[{{samples: 8, data: {{path: {tmp_path}/small, num_frames: 5, height: 16, width: 16}}}}, {{}}]"
    plan = make_plan(TRAIN, overrides(world, stages))
    assert plan.problems == []
    small, large = plan.stages
    assert [(s.begin, s.samples, s.steps) for s in plan.stages] == [(0, 8, 4), (8, 24, 8)]
    assert [s.shapes[0].shape for s in plan.stages] == [(5, 16, 16), (20, 32, 32)]
    assert small.step_seconds < large.step_seconds
    assert plan.total_seconds == pytest.approx(4 * small.step_seconds + 8 * large.step_seconds)
    alone, both = make_plan(TRAIN, overrides(world), probe_seconds=0).memory["ddp"], plan.memory["ddp"]
    assert both.activations == alone.activations, "those of the largest stage"
    assert both.total - both.frozen == alone.total - alone.frozen


def test_stages_that_would_stop_the_run(world: Path) -> None:
    data = f"data: {{path: {world}/nowhere}}"
    stages = f"stages=[{{samples: 6, frozen: [patch_embed.*]}}, {{samples: 8, {data}}}, {{}}]"
    plan = make_plan(TRAIN, overrides(world, stages), processes=2, strategy="zero2", probe_seconds=0)
    for message in ("stages[0].samples is 6, allowed: a multiple of the 4", "nowhere", "stages[0].frozen is '2 more"):
        assert any(message in problem for problem in plan.problems), (message, plan.problems)


def test_only_what_trains_is_counted(world: Path, tmp_path: Path) -> None:
    """Frozen by patterns, or all but adapters, on weights that are there already."""
    whole = make_plan(TRAIN, overrides(world), probe_seconds=0).memory["ddp"]
    frozen = make_plan(TRAIN, overrides(world, "trainable=['transformer_blocks.0.*']"), probe_seconds=0)
    assert frozen.problems == []
    trained = sum(number for name, number in frozen.parameters.items() if name.endswith(", trained"))
    memory = frozen.memory["ddp"]
    assert (memory.gradients, memory.optimizer, memory.averages) == (4 * trained, 8 * trained, 4 * trained)
    assert memory.weights == whole.weights

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "pattern": "st", "text_dim": 16}
    sizes |= {"patch_size": (1, 2, 2), "in_channels": 4, "mask_channels": 4}
    STGenTransformer3DModel(**sizes).save_pretrained(tmp_path / "init")
    paths = [f"run={world}/lora", f"vae={world}/vae", f"data.path={world}/train", f"text_encoder={world}/text"]
    config = str(write_config(tmp_path))
    tuned = [*paths, f"init={tmp_path}/init", "lora={rank: 2, targets: [to_qkv]}", "batch_size=2", "samples=8"]
    plan = make_plan(config, tuned)
    assert plan.problems == []
    # A is 2 x 24 and B 72 x 2, in 2 blocks.
    adapters = plan.memory["ddp"].gradients // 4
    assert adapters == 2 * (2 * 24 + 2 * 72)
    assert plan.export_bytes == 2 * 4 * adapters
    assert plan.total_seconds is not None
    (tmp_path / "init" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    torn = make_plan(config, tuned, probe_seconds=0)
    assert any(problem.startswith("init: ") for problem in torn.problems), torn.problems


def write_config(folder: Path) -> Path:
    """The configuration of tests, without the model, which is that of `init`."""
    lines = ["data: {num_frames: 20, height: 32, width: 32}"]
    (folder / "tune.yaml").write_text("\n".join(lines))
    return folder / "tune.yaml"


def test_optimizers_and_averages(world: Path) -> None:
    plain = make_plan(TRAIN, overrides(world), probe_seconds=0).memory["ddp"]
    power = ["optimizer.average=power", "optimizer.snapshot_every=8"]
    plan = make_plan(TRAIN, overrides(world, *power), probe_seconds=0)
    assert plan.memory["ddp"].averages == 2 * plain.averages
    assert plan.snapshot_bytes == 4 * 2 * plain.averages, "of 8, 16 and 24 clips, and one more at most"
    for name in ("muon", "prodigy", "adamw_8bit"):
        plan = make_plan(TRAIN, overrides(world, f"optimizer.name={name}"), strategy="zero1", probe_seconds=0)
        assert f"optimizer.name is '{name}', allowed: adamw under DEEPSPEED" in plan.problems
        assert plan.memory.keys() == {"ddp"}


@pytest.mark.parametrize("name", ["muon", "adamw_8bit"])
def test_optimizer_states_are_those_of_a_real_step(name: str) -> None:
    net, config = transformer(), OptimizerConfig(name=name)
    optimizer = make_optimizer(net, config)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [
        x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor) and x.ndim
    ]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    with FakeTensorMode():
        assert optimizer_state_bytes(transformer(), config) == sum(storages.values())


@pytest.mark.parametrize("drop_pixels", [False, True])
def test_stored_latents_are_not_encoded(world: Path, tmp_path: Path, drop_pixels: bool) -> None:
    arguments = (world / "train", world / "vae", tmp_path / "encoded", str(world / "text"), 128)
    encode_clips(*arguments, drop_pixels=drop_pixels)
    masks = "masks=[{kind: generate_all}]"
    from_pixels = make_plan(TRAIN, overrides(world, masks), probe_seconds=0)
    data = f"data.path={tmp_path}/encoded"
    plan = make_plan(TRAIN, overrides(world, masks, data))
    assert plan.problems == []
    assert plan.stages[0].stored == ["latents", "text states"]
    assert "latents and text states lie with the clips" in report(plan)
    assert plan.flops_per_step < from_pixels.flops_per_step
    assert "text encoder, before training" not in plan.parameters
    boxes = make_plan(TRAIN, overrides(world, "masks=[{kind: moving_box}]", data), probe_seconds=0)
    if drop_pixels:
        assert any(problem.startswith("masks.kind is 'moving_box'") for problem in boxes.problems), boxes.problems
    else:
        assert boxes.problems == []
        assert plan.flops_per_step < boxes.flops_per_step


def test_damage_is_passed_over_as_in_training(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "train", tmp_path / "torn")
    (shard,) = (tmp_path / "torn").glob("*.tar")
    rows = sorted(open_index(open_source(str(tmp_path / "torn"))), key=lambda row: row["files"]["npy"][0])
    with shard.open("r+b") as file:
        file.truncate(min(offset for offset, _ in rows[-1]["files"].values()))  # the last clip of 8
    data = f"data.path={tmp_path}/torn"
    plan = make_plan(TRAIN, overrides(world, data, "data.max_damaged=0.2"), probe_seconds=0)
    assert (plan.problems, plan.stages[0].damaged) == ([], {"truncated": 1})
    assert "damaged clips, which are passed over: 1 truncated" in report(plan)
    plan = make_plan(TRAIN, overrides(world, data, "data.max_damaged=0.1"), probe_seconds=0)
    assert any("1 of 8 clips are damaged (1 truncated)" in problem for problem in plan.problems), plan.problems


SHAPES = [(1, 8, 8), (5, 8, 8), (5, 8, 16)]


@settings(max_examples=25, deadline=None)
@given(
    found=st.dictionaries(st.sampled_from(SHAPES), st.integers(1, 3), min_size=1),
    asked=st.lists(st.sampled_from(SHAPES), min_size=1, unique=True),
    batch=st.integers(1, 4),
)
def test_data_is_refused_exactly_when_training_would(found, asked, batch, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, found)
    buckets = [{"num_frames": t, "height": h, "width": w} for t, h, w in asked]
    settings = [
        "run=nowhere",
        "vae=nowhere",
        f"data.path={folder}",
        f"data.buckets={json.dumps(buckets)}",
        "use_encoded=false",
        "data.block=4",
    ]
    config = load_config(TrainConfig, None, [*settings, f"batch_size={batch}"])
    plan = Plan("train", "", "", "ddp", 1, "no", "")
    plan_data(plan, config, [config], None)
    try:
        clip_loader(ClipDataset(config.data), 0, batch, 0)
        refused = False
    except ValueError:
        refused = True
    assert bool(plan.problems) == refused, plan.problems


# --- Memory and FLOPs ---------------------------------------------------------------------------------------------


def transformer(**overrides) -> STGenTransformer3DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 6, "text_dim": 16, "mask_channels": 4}
    return STGenTransformer3DModel(in_channels=4, patch_size=(1, 2, 2), pattern="stf", **sizes, **overrides).train()


def step_of(net: torch.nn.Module) -> Callable[[], None]:
    def step() -> None:
        numbers = {name: torch.full((2,), 8.0) for name in ("fps", "num_frames", "height", "width")}
        text = torch.ones(2, 5, 16)
        net(torch.ones(2, 4, 3, 16, 16), torch.ones(2), text, **numbers, return_dict=False)[0].sum().backward()

    return step


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_a_fake_step_is_that_of_a_real_one(checkpointing: bool) -> None:
    """Against PyTorch's own record of what its CPU allocator gave out and took back."""
    net = transformer()
    with FakeTensorMode():
        fake = transformer()
        if checkpointing:
            net.enable_gradient_checkpointing()
            fake.enable_gradient_checkpointing()
        footprint = step_footprint(fake, step_of(fake))
    step_of(net)()  # a first use leaves things behind
    net.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step_of(net)()
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert footprint.with_gradients == pytest.approx(peak, rel=0.05)
    if checkpointing:
        assert footprint.activations < 0.5 * activations_of(transformer())


def activations_of(net: torch.nn.Module) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step_of(net)()
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def test_flops_are_those_of_pytorchs_counter() -> None:
    with FakeTensorMode():
        fake = transformer()
        ours = step_footprint(fake, step_of(fake)).flops
    # Which has no formula for attention on a CPU, but for the same of a GPU.
    cpu, gpu = "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"
    aten = torch.ops.aten
    own = {getattr(aten, cpu + end): flop_registry[getattr(aten, gpu + end)] for end in ("", "_backward")}
    for formula in own.values():
        formula._get_raw = True  # it has been wrapped already
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        step_of(transformer())()
    assert ours == counter.get_total_flops()


def test_values_that_are_known_are_answered() -> None:
    """Positions scale with the clips' height and width, which the forward pass asks for."""
    with FakeTensorMode():
        fake = transformer(position_resolution=64)
        assert step_footprint(fake, step_of(fake)).flops > 0


def test_optimizer_states_are_found() -> None:
    net = transformer()
    with FakeTensorMode():
        fake = transformer()
        found = optimizer_bytes(make_optimizer(fake, OptimizerConfig()))
    assert found == 8 * sum(p.numel() for p in net.parameters()), "AdamW's two moments"


GIB = 2**30
STATES = States(
    weights=4 * GIB, trainable=4 * GIB, elements=GIB, optimizer=8 * GIB, averages=4 * GIB, largest_unit=GIB // 10
)
STEP = StepFootprint(flops=1, activations=2 * GIB, with_gradients=5 * GIB)


@given(strategy=st.sampled_from(STRATEGIES), processes=st.integers(1, 64), touched=st.booleans())
def test_more_processes_never_take_more_each(strategy: str, processes: int, touched: bool) -> None:
    one, more = (rank_memory(strategy, n, STATES, STEP, GIB, touched) for n in (processes, processes + 1))
    if strategy != "ddp":  # whose buckets begin with the second process
        assert more.total <= one.total
    parts = [getattr(more, f.name) for f in dataclasses.fields(RankMemory) if f.name != "total"]
    assert max(parts) <= more.total <= sum(parts) + 4 * GIB


def test_each_stage_divides_what_it_says() -> None:
    """Table 1 of the ZeRO paper, with float32 throughout."""
    memory = {strategy: rank_memory(strategy, 8, STATES, STEP, 0, True) for strategy in STRATEGIES}
    assert [memory[s].weights // GIB for s in ("ddp", "zero1", "zero2")] == [4, 4, 4]
    assert [memory[s].gradients // GIB for s in ("ddp", "zero1")] == [4, 4]
    assert memory["zero2"].gradients == memory["zero3"].gradients == memory["fsdp"].gradients == GIB // 2
    assert memory["zero3"].weights == memory["fsdp"].weights == GIB // 2
    # DeepSpeed's own copy of the weights, and two moments.
    assert memory["zero1"].optimizer == memory["zero3"].optimizer == 12 * GIB // 8
    assert memory["ddp"].optimizer == 8 * GIB


# --- Half precision -----------------------------------------------------------------------------------------------


def test_bf16_is_autocast_under_every_strategy(world: Path) -> None:
    # Large enough for the transformer to take more than the VAE.
    wide = overrides(world, "model.num_attention_heads=16", "model.num_layers=4", "masks=[{kind: generate_all}]")
    full, half = (make_plan(TRAIN, wide, precision=p, probe_seconds=0).memory for p in ("no", "bf16"))
    for strategy in ("ddp", "zero2"):
        assert half[strategy].weights == full[strategy].weights, "autocast leaves weights alone"
        assert half[strategy].activations < full[strategy].activations
    assert half["zero2"].activations == half["ddp"].activations
    plan = make_plan(TRAIN, overrides(world), strategy="zero1", precision="fp16", probe_seconds=0)
    assert "mixed_precision is 'fp16', allowed: bf16 or no under DeepSpeed" in plan.problems
    assert not plan.memory.keys() & {"zero1", "zero2", "zero3"}
