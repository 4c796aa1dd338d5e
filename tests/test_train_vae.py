"""The VAE's trainer: what it feeds the model, what it measures, and runs of the launch command as processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_vae
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from test_training import succeed

import stgen.accelerator
from stgen import AutoencoderKLSTGen
from stgen.checkpoint import checkpoints
from stgen.config import load_config
from stgen.data.color import to_pixels
from stgen.data.moving_mnist import write_moving_mnist
from stgen.data.reading import ClipDataset, DataConfig
from stgen.export import export_checkpoint
from stgen.masks import MaskSpec
from stgen.models.latents import encode
from stgen.models.perceptual import PerceptualDistance
from stgen.reconstruction import mean_score, measure
from stgen.tracking import MEASURED
from stgen.train_vae import TrainVAEConfig, main, make_vae, measure_latents, prepare_batch
from stgen.vae_objective import DiscriminatorConfig, PerceptualConfig

REPOSITORY = Path(__file__).parent.parent


# --- What one forward sees ----------------------------------------------------------------------------------------


def config(**arguments) -> TrainVAEConfig:
    # The clips below are longer and smaller than this says: what arrives counts.
    base = {"masked_fraction": 0.5, "masks": [MaskSpec("random_frames", args={"p": 0.5}), MaskSpec("moving_box")]}
    return TrainVAEConfig(run="run", data=DataConfig("data", 4, 64, 64), **{**base, **arguments})


def batch(positions: list[int], t: int = 11, h: int = 10, w: int = 14) -> dict:
    generators = [torch.Generator().manual_seed(p) for p in positions]
    clips = [torch.randint(1, 255, (3, t, h, w), generator=g, dtype=torch.uint8) for g in generators]
    return {"video": torch.stack(clips), "position": positions}


def test_every_draw_is_a_function_of_seed_and_position() -> None:
    vae = tiny_vae()
    settings = config(window=[3, 9], image_fraction=0.3)
    for positions in ([0, 1], [6, 7, 8]):
        first, again = (prepare_batch(batch(positions), settings, vae) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # A clip's own draws stay its own, whoever else is in the forward.
    fixed = config(window=5)
    both, alone = prepare_batch(batch([4, 5]), fixed, vae), prepare_batch(batch([5]), fixed, vae)
    assert all(torch.equal(a[1:], b) for a, b in zip(both, alone, strict=True))
    other = prepare_batch(batch([4, 5]), replace(fixed, seed=1), vae)
    assert not torch.equal(both[2], other[2])


def test_windows_and_images_come_as_often_as_asked() -> None:
    settings = config(window=[3, 6], image_fraction=0.25)
    lengths = [settings.draw_window(11, position) for position in range(2000)]
    counts = np.bincount(lengths, minlength=7) / 2000
    np.testing.assert_allclose(counts, [0, 0.25, 0, *[0.75 / 4] * 4], atol=0.03)
    assert {settings.draw_window(4, position) for position in range(50)} == {1, 3, 4}, "no more than the clip has"
    assert {config().draw_window(t, 0) for t in (1, 7, 30)} == {1, 7, 30}
    assert config(window=[3, 6]).draw_window(1, 0) == 1, "an image among videos"
    with pytest.raises(ValueError, match=r"window is \[3, 6\], allowed: at most 2"):
        config(window=[3, 6]).draw_window(2, 0)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 11), st.sampled_from(["shown", "original"]), st.booleans())
def test_what_is_shown_and_what_is_wanted(window: int, mask_target: str, both_ways: bool) -> None:
    clips, vae = batch(list(range(12))), tiny_vae()
    settings = config(window=window, mask_target=mask_target, ping_pong_weight=float(both_ways))
    shown, target, noise = prepare_batch(clips, settings, vae)
    length = 2 * window - 1 if both_ways else window
    assert shown.shape == target.shape == (12, 3, length, 10, 14)
    assert noise.shape[1:] == vae.encode(shown[:1]).latent_dist.mean.shape[1:]
    hidden = shown == 0  # no pixel of the clips is mid-grey
    masked = hidden.flatten(1).any(1)
    assert 2 <= masked.sum() <= 10
    assert torch.equal(shown[~masked], target[~masked])
    assert torch.equal(shown, target) == (mask_target == "shown")
    assert torch.equal(shown[~hidden], target[~hidden])
    for clip, seen in zip(
        to_pixels(clips["video"]), target if mask_target == "original" else target[~masked], strict=False
    ):
        starts = range(11 - window + 1)
        if mask_target == "original":
            assert any(torch.equal(seen[:, :window], clip[:, s : s + window]) for s in starts)
    if both_ways:
        assert torch.equal(shown, shown.flip(2))
        assert torch.equal(target, target.flip(2))


def test_hidden_pixels_change_nothing_that_is_shown() -> None:
    clips, settings = batch(list(range(8))), config(mask_target="original")
    shown, target, _ = prepare_batch(clips, settings, tiny_vae())
    changed = clips | {"video": torch.where(shown == 0, 255 - clips["video"], clips["video"])}
    again, wanted, _ = prepare_batch(changed, settings, tiny_vae())
    assert torch.equal(again, shown)
    assert not torch.equal(wanted, target)


def test_single_frames_are_shown_whole() -> None:
    settings = config(image_fraction=1.0, masked_fraction=1.0, mask_target="original", ping_pong_weight=1.0)
    shown, target, _ = prepare_batch(batch([0, 1, 2]), settings, tiny_vae())
    assert shown.shape == (3, 3, 1, 10, 14)
    assert torch.equal(shown, target)
    assert not (shown == 0).any()


# --- Weights and statistics ---------------------------------------------------------------------------------------


def test_initial_weights_of_a_folder(tmp_path: Path) -> None:
    saved = tiny_vae()
    saved.save_pretrained(tmp_path)
    model = {name: value for name, value in saved.config.items() if not name.startswith(("_", "latents_"))}

    def begin(init: str, **changed) -> AutoencoderKLSTGen:
        return make_vae(TrainVAEConfig(model={**model, **changed}, init=init))

    fresh = begin(str(tmp_path))
    for name, weight in saved.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], weight), name
    assert fresh.config.latents_mean is None, "measured anew"
    with pytest.raises(
        ValueError, match=r"init: .*decoder.conv_in.weight: \(16, 4, 3, 3, 3\) there, \(16, 8, .* allowed: "
    ):
        begin(str(tmp_path), latent_channels=8)
    with pytest.raises(ValueError, match="init: .*decoder.blocks.*: no such weight there"):
        begin(str(tmp_path), layers_per_block=2)
    with pytest.raises(ValueError, match="init is '/nowhere', allowed: a folder of a saved"):
        begin("/nowhere")


def test_a_frozen_encoder_keeps_its_latents_and_their_statistics(tmp_path: Path) -> None:
    saved = tiny_vae()
    saved.save_pretrained(tmp_path)
    model = {name: value for name, value in saved.config.items() if not name.startswith(("_", "latents_"))}
    vae = make_vae(TrainVAEConfig(model=model, init=str(tmp_path), frozen=["encoder.*"]))
    assert {name.split(".")[0] for name, p in vae.named_parameters() if p.requires_grad} == {"decoder"}
    assert (vae.config.latents_mean, vae.config.latents_std) == (saved.config.latents_mean, saved.config.latents_std)
    part = make_vae(TrainVAEConfig(model=model, init=str(tmp_path), frozen=["encoder.conv_in.*"]))
    assert part.config.latents_mean is None, "measured anew"
    with pytest.raises(ValueError, match=r"frozen is 'encode\.\*', allowed: a pattern of some"):
        make_vae(TrainVAEConfig(model=model, frozen=["encode.*"]))
    with pytest.raises(ValueError, match=r"frozen is \['decoder\.\*'\], allowed: all but decoder.conv_out"):
        make_vae(TrainVAEConfig(model=model, frozen=["decoder.*"], discriminator=DiscriminatorConfig()))
    with pytest.raises(ValueError, match=r"masks is \[\], allowed: at least one"):
        TrainVAEConfig(masks=[], masked_fraction=0.5)


@dataclass
class Ranks:
    """What `measure_latents` asks of an Accelerator."""

    process_index: int
    num_processes: int
    device: str = "cpu"
    is_main_process: bool = False


def test_statistics_over_clips_of_several_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = tiny_vae(latents_mean=None, latents_std=None)
    shapes = [(9, 16, 16), (1, 12, 20), (6, 8, 8)]
    clips = [batch([i], *shape)["video"][0] for i, shape in enumerate(shapes)]
    dataset = [{"video": clip} for clip in clips]
    accelerator = Ranks(0, 1)
    mean, std = measure_latents(vae, dataset, 3, accelerator)
    with torch.no_grad():
        latents = [vae.encode(to_pixels(clip)[None]).latent_dist.mode()[0].flatten(1) for clip in clips]
    cells = torch.cat(latents, dim=1).double()
    np.testing.assert_allclose(mean, cells.mean(1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(std, cells.std(1, unbiased=False), rtol=1e-5)

    # Two ranks do it as one does, to the bit.
    class Gathering(Exception):
        pass

    def stop(found: list) -> None:
        shares.extend(found)
        raise Gathering

    shares: list = []
    monkeypatch.setattr(stgen.accelerator, "gather_object", stop)
    for rank in (0, 1):
        with pytest.raises(Gathering):
            measure_latents(vae, dataset, 3, Ranks(rank, 2))
    assert [i for i, _ in shares] == [0, 2, 1, 2], "as many calls each"
    monkeypatch.setattr(stgen.accelerator, "gather_object", lambda found: shares)
    assert measure_latents(vae, dataset, 3, Ranks(1, 2)) == (mean, std)

    vae.register_to_config(latents_mean=mean, latents_std=std)
    z = torch.cat([encode(vae, to_pixels(clip)[None])[0].detach().flatten(1) for clip in clips], dim=1)
    torch.testing.assert_close(z.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(1, unbiased=False), torch.ones(4), atol=1e-4, rtol=0)


def test_a_channel_that_never_changes_is_not_scaled() -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_out.weight[1] = 0
    accelerator = Ranks(0, 1)
    _, std = measure_latents(vae, [{"video": batch([0])["video"][0]}], 1, accelerator)
    assert std[1] == 1
    assert min(std) > 0


# --- Configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reconstruction=l2", "reconstruction is 'l2', allowed: l1 or mse or clipped_mse or charbonnier"),
        ("window=[9,3]", "window is [9, 3], allowed: a number of frames"),
        ("window=0", "window is 0, allowed"),
        ("window=2.5", "window is 2.5, allowed"),
        ("window=true", "window is True, allowed"),
        ("image_fraction=1.5", "image_fraction is 1.5, allowed: 0 to 1"),
        ("mask_target=both", "mask_target is 'both', allowed: shown or original"),
        ("ping_pong_weight=-1", "ping_pong_weight is -1.0, allowed: 0 or more"),
        ("perceptual.network=alexnet", "perceptual.network is 'alexnet', allowed: efficientnet_lite0, vgg16"),
        ("perceptual.weight=0", "perceptual.weight is 0.0, allowed: above 0"),
        ("discriminator.channels=12", "discriminator.channels is 12, allowed: a multiple of 8"),
        ("discriminator.start=-1", "discriminator.start is -1, allowed: 0 or more"),
        ("discriminator.optimizer.lr=0", "optimizer.lr is 0.0, allowed: above 0"),
        ("validation={path: x, every: 0}", "validation.every is 0, allowed: 1 or more"),
        ("model.latents_mean=[0]", "model is 'latents_mean', allowed"),
    ],
)
def test_bad_values_are_one_line(override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--config", "configs/moving_mnist_32/vae.yaml", f"run={tmp_path}", override])
    assert f"error: {message}" in capsys.readouterr().err.splitlines()[-1]


def test_optional_losses_are_off_by_default() -> None:
    loaded = load_config(TrainVAEConfig, REPOSITORY / "configs/moving_mnist_32/vae.yaml")
    assert (loaded.perceptual, loaded.discriminator, loaded.validation, loaded.init) == (None, None, None, None)
    loaded = load_config(
        TrainVAEConfig, overrides=["run=x", "data.path=y", "perceptual={}", "discriminator={start: 5}"]
    )
    assert loaded.perceptual == PerceptualConfig("efficientnet_lite0", 1.0)
    assert loaded.discriminator == DiscriminatorConfig(start=5)


# --- Runs ---------------------------------------------------------------------------------------------------------

EVERYTHING = [
    *(
        "reconstruction=charbonnier",
        "perceptual.weight=0.5",
        "ping_pong_weight=0.5",
        "window=[3,9]",
        "image_fraction=0.3",
    ),
    *("mask_target=original", "masks=[{kind: random_frames}]", "masked_fraction=0.5", "discriminator.start=16"),
    *("discriminator.channels=8", "discriminator.optimizer.warmup=0", "optimizer.warmup=0", "optimizer.lr=1e-4"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for split in ("train", "heldout"):
        write_moving_mnist(folder / split, clips=16, split=split, size=32, digits=1)
    return folder


def arguments(world: Path, run: str, *overrides: str) -> list[str]:
    paths = [f"run={world}/{run}", f"data.path={world}/train", f"validation.path={world}/heldout"]
    model = ["model.block_out_channels=[8,8,8]", "model.latent_channels=4", "validation.clips=3", "validation.every=4"]
    fixed = ["samples=40", "log_every=1", "checkpoint_every=2", "statistics_clips=4", "batch_size=2", "accumulate=2"]
    return ["--config", "configs/moving_mnist_32/vae.yaml", *paths, *model, *fixed, *EVERYTHING, *overrides]


def rows(world: Path, run: str, kind: str = "loss") -> dict[int, dict]:
    found = [json.loads(line) for line in (world / run / "metrics.jsonl").read_text().splitlines()]
    return {row["samples"]: row for row in found if kind in row}


@pytest.fixture(scope="module")
def reference(world: Path) -> Path:
    """A run of one process with every loss."""
    succeed("train_vae", "cpu", *arguments(world, "one"))
    return world / "one"


@pytest.mark.slow
def test_every_loss_is_logged_from_its_start_on(world: Path, reference: Path) -> None:
    logged = rows(world, "one")
    assert list(logged) == [4 * i for i in range(1, 11)]
    always = {"loss", "charbonnier", "perceptual", "kl", "ping_pong"}
    game = {"adversarial", "adaptive_weight", "discriminator", "real", "fake"}
    for samples, row in logged.items():
        names = row.keys() - {"step", "samples", "lr", "nonfinite", "data/skipped", *MEASURED}
        # The step that begins after 16 clips ends after 20.
        assert names == (always | game if samples >= 20 else always), samples
        assert all(np.isfinite(row[name]) for name in names)


@pytest.mark.slow
def test_validation_measures_the_averaged_weights(world: Path, reference: Path) -> None:
    validated = rows(world, "one", "validation/psnr")
    assert list(validated) == [16, 32, 40], "every 4 steps of 4 clips, and at the end"
    vae = AutoencoderKLSTGen.from_pretrained(reference / "export").eval()
    dataset = ClipDataset(DataConfig(f"{world}/heldout", 20, 32, 32), shuffle=False)
    scores, distance = [], PerceptualDistance()
    for i in range(3):
        truth = to_pixels(dataset[i]["video"])[None]
        with torch.no_grad():
            scores.append(measure(vae(truth).sample, truth, distance))
    for name, value in vars(mean_score(scores)).items():
        if name == "clips":
            continue
        assert validated[40][f"validation/{name}"] == pytest.approx(value, rel=1e-5), name
    assert validated[16]["validation/psnr"] != validated[40]["validation/psnr"]
    assert sorted(path.name for path in (reference / "samples").iterdir()) == [
        "step-10.png",
        "step-4.png",
        "step-8.png",
    ]
    with Image.open(reference / "samples" / "step-10.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    # The first true frame stands in the sheet, enlarged twice.
    frame = dataset[0]["video"][:, 0].permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
    places = np.lib.stride_tricks.sliding_window_view(pixels[..., 0], frame.shape[:2])[:300, :400]
    assert (places == frame[..., 0]).all((2, 3)).any()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_cpu", "zero2_cpu"])
def test_two_processes_equal_one_on_the_same_global_batch(world: Path, reference: Path, strategy: str) -> None:
    succeed("train_vae", strategy, *arguments(world, strategy, "accumulate=1"))
    for kind, names in (
        ("loss", ("charbonnier", "perceptual", "kl", "ping_pong", "discriminator")),
        ("validation/psnr", ("validation/psnr", "validation/perceptual_distance")),
    ):
        one, two = rows(world, "one", kind), rows(world, strategy, kind)
        assert one.keys() == two.keys()
        for samples, row in one.items():
            for name in names:
                if name in row:
                    assert two[samples][name] == pytest.approx(row[name], rel=5e-3, abs=1e-4), (samples, name)
    configs = [json.loads((world / run / "export/config.json").read_text()) for run in ("one", strategy)]
    for name in ("latents_mean", "latents_std"):
        np.testing.assert_allclose(configs[0][name], configs[1][name], rtol=5e-3, atol=1e-4)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(world: Path, reference: Path) -> None:
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command = [*accelerate, "--config_file", "configs/accelerate/cpu.yaml", "stgen/train_vae.py"]
    process = subprocess.Popen(
        [*command, *arguments(world, "killed")],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics, deadline = world / "killed" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and max(rows(world, "killed"), default=0) >= 28):  # the game is on, a step is unsaved
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    newest = checkpoints(world / "killed")[-1]
    assert int(newest.name.removeprefix("step-")) < 10
    output = succeed("train_vae", "cpu", *arguments(world, "killed"))
    assert f"resuming from {newest}" in output
    whole, cut = (load_file(world / run / "export/diffusion_pytorch_model.safetensors") for run in ("one", "killed"))
    assert all(torch.equal(cut[name], weight) for name, weight in whole.items())
    ends = [checkpoints(world / run)[-1] for run in ("one", "killed")]
    assert ends[0].name == ends[1].name == "step-10"
    weights = [load_file(end / "model.safetensors") for end in ends]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    for i in range(2):  # the discriminator and its optimizer
        states = [torch.load(end / f"custom_checkpoint_{i}.pkl", weights_only=True) for end in ends]
        assert_equal(*states)
    before, after = rows(world, "one"), rows(world, "killed")
    for samples, row in before.items():
        exact = row.keys() - set(MEASURED)
        assert {name: after[samples][name] for name in exact} == {name: row[name] for name in exact}


def assert_equal(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another(world: Path, reference: Path) -> None:
    """At a learning rate of next to nothing the averaged weights are still those of the other run."""
    still = ["samples=4", "optimizer.lr=1e-12", "discriminator=null", f"init={reference}/export"]
    succeed("train_vae", "cpu", *arguments(world, "begun", *still))
    given, export = (load_file(f / "export/diffusion_pytorch_model.safetensors") for f in (reference, world / "begun"))
    for name, weight in given.items():
        torch.testing.assert_close(export[name], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_decoder_trains_alone(world: Path, reference: Path) -> None:
    """Pipelines on the VAE's latents go on with it; and what `stgen export` makes of the checkpoint is the run's own."""
    alone = ["samples=8", "reconstruction=clipped_mse", f"init={reference}/export", "frozen=['encoder.*']"]
    succeed("train_vae", "cpu", *arguments(world, "decoder", *alone))
    given, found = (AutoencoderKLSTGen.from_pretrained(run / "export") for run in (reference, world / "decoder"))
    weights, changed = given.state_dict(), found.state_dict()
    assert {name for name in weights if torch.equal(weights[name], changed[name])} == {
        name for name in weights if name.startswith("encoder.")
    }
    assert (found.config.latents_mean, found.config.latents_std) == (
        given.config.latents_mean,
        given.config.latents_std,
    )
    export_checkpoint(world / "decoder", world / "decoder_again")
    again = AutoencoderKLSTGen.from_pretrained(world / "decoder_again")
    assert_equal(dict(again.state_dict()), dict(changed))
    assert again.config.latents_mean == given.config.latents_mean
