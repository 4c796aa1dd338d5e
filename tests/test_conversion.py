"""Converted checkpoints against the original code, whose outputs on random weights lie in tests/golden.

Each golden file holds the original's random weights (`weights/*`), its inputs and the outputs of its cases; the json
beside it says which class, how it was built and which inputs a case takes. Differences are relative to the largest
output: max |ours - theirs| / max |theirs|, in fp32.
"""

import functools
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_text_encoder, tiny_vae
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LatteTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from stgen import STGenPipeline, STGenPredictionPipeline, STGenTransformer3DModel
from stgen.cli import convert as convert_command
from stgen.cli import main
from stgen.conversion import Settings, convert, convert_transformer
from stgen.generation import saved_pipeline

GOLDEN = Path(__file__).parent / "golden"

# The golden files, the source that each is converted from, and what their tiny models don't share with the published.
MODELS: dict[str, tuple[str, list[str]]] = {
    "open-sora-1.0": ("open-sora-1.0", ["num_attention_heads=2"]),
    "open-sora-1.1": ("open-sora-1.1", []),
    "open-sora-1.2": ("open-sora-1.2", []),
    "vdt": ("vdt", ["num_attention_heads=2"]),
    "latte": ("latte", ["num_attention_heads=2"]),
    "latte-class": ("latte", ["num_attention_heads=2"]),
    "latte-t2v": ("latte", ["num_attention_heads=2", "position_grid=4"]),
}
CASES = [(name, case) for name in MODELS for case in json.loads((GOLDEN / f"{name}.json").read_text())["cases"]]


@functools.cache
def golden(name: str) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "inputs": {}, "outputs": {}}
    for key, tensor in load_file(GOLDEN / f"{name}.safetensors").items():
        part, _, rest = key.partition("/")
        parts[part][rest] = tensor
    return parts


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The original state dicts as checkpoints; read only."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in MODELS:
        save_file(golden(name)["weights"], folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in MODELS}


@pytest.fixture(scope="module")
def converted(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that `stgen convert` wrote; read only."""
    folder = tmp_path_factory.mktemp("converted")
    for name, (source, settings) in MODELS.items():
        convert_command(source, str(checkpoints[name]), str(folder / name), settings=settings)
    return {name: folder / name for name in MODELS}


def our_inputs(name: str, arguments: dict[str, str]) -> dict[str, Any]:
    """A case's inputs under the names of our transformer."""
    theirs = {argument: golden(name)["inputs"][tensor] for argument, tensor in arguments.items()}
    x = theirs.pop("x", theirs.pop("hidden_states", None))
    if name in ("vdt", "latte", "latte-class"):
        x = x.transpose(1, 2)
    ours: dict[str, Any] = {"hidden_states": x, "timestep": theirs.pop("t", theirs.pop("timestep", None))}
    if name == "latte-class":
        ours["class_labels"] = theirs.pop("y")
    if "y" in theirs:
        ours["encoder_hidden_states"] = theirs.pop("y").squeeze(1)
    if "x_mask" in theirs:  # given frames hold their clean latents in x itself
        mask = theirs.pop("x_mask")[:, None, :, None, None].float()
        ours |= {"condition_latents": x, "condition_mask": mask.expand(-1, 1, -1, *x.shape[3:])}
    if "mask" in theirs:
        ours["encoder_attention_mask"] = theirs.pop("mask").bool()
    if "encoder_attention_mask" in theirs:
        ours["encoder_attention_mask"] = theirs.pop("encoder_attention_mask").bool()
    theirs.pop("ar", None)  # computed from height and width
    return ours | theirs


def compared(name: str, case: str, ours: Tensor) -> tuple[Tensor, Tensor]:
    """Our output and the original's, where it has a meaning."""
    theirs = golden(name)["outputs"][case]
    if name in ("vdt", "latte", "latte-class"):
        theirs = theirs.transpose(1, 2)
    if name == "open-sora-1.2":  # data - noise, and a second half that is never read
        theirs = -theirs.chunk(2, dim=1)[0]
    if "x_mask" in case:
        # The originals modulate given frames twice in the last layer, so that their output there means nothing.
        generated = golden(name)["inputs"]["x_mask"]
        assert 0 < generated.sum() < generated.numel()
        ours, theirs = ours.transpose(1, 2)[generated], theirs.transpose(1, 2)[generated]
    return ours, theirs


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(("name", "case"), CASES)
@torch.no_grad()
def test_same_output_as_the_original(name: str, case: str, converted: dict[str, Path]) -> None:
    model = STGenTransformer3DModel.from_pretrained(converted[name] / "transformer").eval()
    arguments = json.loads((GOLDEN / f"{name}.json").read_text())["cases"][case]
    ours, theirs = compared(name, case, model(**our_inputs(name, arguments)).sample)
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("frames", [1, 4])
@torch.no_grad()
def test_same_output_as_diffusers_latte(frames: int) -> None:
    torch.manual_seed(3)
    theirs = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=20,
        video_length=frames,
    ).eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.2)
    settings = Settings(num_attention_heads=2, position_grid=4)
    ours, _ = convert_transformer("latte", theirs.state_dict(), settings, "diffusers' Latte")
    assert ours.config.null_text == "prompt"  # diffusers keeps no y_embedding, and nothing reads it

    x, text, t = torch.randn(2, 4, frames, 6, 8), torch.randn(2, 5, 20), torch.tensor([10.0, 700.0])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    # Frame by frame: diffusers doesn't repeat the mask over frames itself.
    bias = (~mask[:, None]).float().repeat_interleave(frames, dim=0) * -10000.0
    expected = theirs(x, t, text, bias).sample
    assert relative(ours(x, t, text, encoder_attention_mask=mask).sample, expected) < 1e-5


def test_folder_says_what_it_is(converted: dict[str, Path]) -> None:
    for name, folder in converted.items():
        kind = FlowMatchEulerDiscreteScheduler if name == "open-sora-1.2" else DDIMScheduler
        scheduler = kind.from_pretrained(folder / "scheduler")
        config = STGenTransformer3DModel.load_config(folder / "transformer")
        assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == kind.__name__
        if kind is DDIMScheduler:
            assert scheduler.config.prediction_type == "epsilon"
            assert not scheduler.config.clip_sample
            assert (scheduler.config.beta_start, scheduler.config.beta_end) == (1e-4, 0.02)
        assert config["learn_sigma"] == (name != "open-sora-1.2")
    config = STGenTransformer3DModel.load_config(converted["open-sora-1.0"] / "transformer")
    assert (config["space_scale"], config["time_scale"]) == (0.5, 1.0)  # read from the tables
    assert (config["sample_frames"], config["sample_height"], config["sample_width"]) == (4, 48, 32)


def test_scales_without_their_tables(checkpoints: dict[str, Path]) -> None:
    weights = {key: x for key, x in load_file(checkpoints["open-sora-1.0"]).items() if "pos_embed" not in key}
    settings = Settings(num_attention_heads=2, space_scale=0.5, time_scale=2 / 3)
    model, _ = convert_transformer("open-sora-1.0", weights, settings, "weights")
    assert (model.config.space_scale, model.config.time_scale) == (0.5, 2 / 3)
    model, _ = convert_transformer("open-sora-1.0", weights, Settings(num_attention_heads=2), "weights")
    assert (model.config.space_scale, model.config.time_scale) == (1, 1)
    # What is set counts, as in the original, where the tables of a checkpoint are dropped.
    settings = Settings(num_attention_heads=2, space_scale=0.75)
    model, _ = convert_transformer("open-sora-1.0", load_file(checkpoints["open-sora-1.0"]), settings, "weights")
    assert (model.config.space_scale, model.config.time_scale) == (0.75, 1)
    # The table of the published 64x512x512 model's time_scale.
    d = 24
    angles = torch.arange(5)[:, None] / (2 / 3) / 10000 ** (torch.arange(d // 2) / (d / 2))
    weights["pos_embed_temporal"] = torch.cat([angles.sin(), angles.cos()], dim=1)[None]
    model, _ = convert_transformer("open-sora-1.0", weights, Settings(num_attention_heads=2), "weights")
    assert (model.config.time_scale, model.config.sample_frames) == (2 / 3, 5)


def test_tables_that_the_original_drops(checkpoints: dict[str, Path]) -> None:
    weights = {**load_file(checkpoints["open-sora-1.2"]), "pos_embed": torch.zeros(1, 6, 24)}
    model, _ = convert_transformer("open-sora-1.2", weights, Settings(), "weights")
    assert (model.config.sample_frames, model.config.sample_height, model.config.sample_width) == (51, 240, 426)


def test_shards_and_half_precision(tmp_path: Path) -> None:
    weights = {key: x.half() for key, x in golden("open-sora-1.2")["weights"].items()}
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: weights[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    convert("open-sora-1.2", tmp_path, tmp_path / "out")
    kept = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in kept.values()} == {torch.float16}


# --- Whole pipelines ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A VAE and a text encoder of the golden files' width, as folders."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "text").mkdir()
    tokenizer, encoder = tiny_text_encoder(folder / "text", hidden_size=20)
    tokenizer.save_pretrained(folder / "text")
    encoder.save_pretrained(folder / "text")
    tiny_vae().save_pretrained(folder / "vae")
    return {"vae": str(folder / "vae"), "text_encoder": str(folder / "text")}


@pytest.mark.parametrize("name", MODELS)
def test_converted_pipeline_generates(
    name: str, checkpoints: dict[str, Path], parts: dict[str, str], tmp_path: Path
) -> None:
    source, settings = MODELS[name]
    has_text = name not in ("vdt", "latte", "latte-class")
    mine = parts if has_text else {"vae": parts["vae"]}
    convert(source, checkpoints[name], tmp_path / "pipeline", **mine, settings=settings)
    pipeline = STGenPipeline.from_pretrained(saved_pipeline(tmp_path / "pipeline"))
    pipeline.set_progress_bar_config(disable=True)
    flow = name == "open-sora-1.2"
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler if flow else DDIMScheduler)
    call = {
        "num_frames": 5,
        "height": 16,
        "width": 24,
        "num_inference_steps": 2,
        "output_type": "np",
        **({"prompt": "a 3 moving up"} if has_text else {}),
        **({"class_labels": 1} if name == "latte-class" else {}),
    }
    frames = pipeline(**call, generator=torch.Generator().manual_seed(0)).frames
    assert frames.shape == (1, 5, 16, 24, 3)
    assert frames.std() > 1e-3
    if name.startswith("open-sora"):
        # Guided away from the null text, and told of the rate.
        assert pipeline.transformer.null_text_embedding is not None
        other = pipeline(**call, negative_prompt="a 3", generator=torch.Generator().manual_seed(0)).frames
        assert abs(other - frames).max() > 1e-4
    if name in ("open-sora-1.1", "open-sora-1.2"):
        slow = pipeline(**call, fps=4, generator=torch.Generator().manual_seed(0)).frames
        assert abs(slow - frames).max() > 1e-4


def test_prediction_without_text(checkpoints: dict[str, Path], parts: dict[str, str], tmp_path: Path) -> None:
    convert("vdt", checkpoints["vdt"], tmp_path, vae=parts["vae"], settings=MODELS["vdt"][1])
    pipeline = STGenPredictionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    video = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    frames = pipeline(video, num_frames=5, num_inference_steps=2, output_type="pt").frames
    assert frames.shape == (2, 5, 3, 16, 16)
    torch.testing.assert_close(frames[:, :3], video, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="prompt is 'a 3', allowed: None, since this transformer takes no text"):
        pipeline(video, prompt="a 3", num_frames=5)


def test_parts_that_do_not_fit(checkpoints: dict[str, Path], parts: dict[str, str], tmp_path: Path) -> None:
    for name, wrong, message in (
        ("vdt", parts, "text_encoder is .* since this vdt has no text"),
        ("latte", {"text_encoder": parts["text_encoder"]}, "text_encoder is .* since this latte has no text"),
        ("open-sora-1.2", {"vae": parts["vae"]}, "vae is .* given exactly when text_encoder is"),
        ("open-sora-1.2", {**parts, "vae": parts["text_encoder"]}, "_class_name"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(MODELS[name][0], checkpoints[name], tmp_path / "out", **wrong, settings=MODELS[name][1])
        assert not (tmp_path / "out").exists()


# --- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_pickles_are_refused_and_can_be_rewritten(
    wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = golden("latte")["weights"]
    pickle = tmp_path / "it's a model.pt"
    torch.save({"ema": weights, "opt": {}} if wrapped else weights, pickle)
    with pytest.raises(ValueError, match="checkpoint is .* allowed: safetensors, nothing is unpickled") as refusal:
        convert("latte", pickle, tmp_path / "out")
    command = shlex.split(str(refusal.value).partition("unpickled. ")[2])
    assert command[:2] == ["python", "-c"]
    assert "weights_only=True" in command[2]
    monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
    exec(command[2], {})
    rewritten = load_file(pickle.with_suffix(".safetensors"))
    assert rewritten.keys() == weights.keys()
    assert all(torch.equal(rewritten[key], weights[key]) for key in weights)


def test_a_folder_of_pickles_is_refused_alike(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin.* allowed: safetensors, nothing is unpickled"):
        convert("vdt", tmp_path, tmp_path / "out")


def test_command_line(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--from", "vdt", "--checkpoint", str(checkpoints["vdt"]), "--out", str(tmp_path / "out")]
    for more, status in (([], 2), (["--set", "num_attention_heads=2", "--set", "sample_fps=12"], 0)):
        monkeypatch.setattr(sys, "argv", ["stgen", "convert", *arguments, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == status
    out, error = capsys.readouterr()
    assert out.splitlines()[-1] == str(tmp_path / "out")
    assert error.startswith("error: num_attention_heads is None, allowed: a divisor of the width 24")
    assert len(error.splitlines()) == 1
    assert STGenTransformer3DModel.load_config(tmp_path / "out" / "transformer")["sample_fps"] == 12


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_counts(name: str) -> None:
    """Any tensor that is taken away, added or of another shape is named; tables that we compute may be missing."""
    source, settings = MODELS[name]
    given = {key: int(value) for key, value in (item.split("=") for item in settings)}
    weights = golden(name)["weights"]
    computed = (
        "pos_embed",
        "pos_embed_temporal",
        "time_embed",
        "temp_embed",
        "rope.freqs",
        "y_embedder",
        "y_embedding",
    )
    for key in list(weights)[:: 1 + len(weights) // 40]:
        if key.startswith(computed) or (name == "latte-t2v" and key.endswith("y_embedding")):
            continue
        with pytest.raises(ValueError, match=r"checkpoint|norm_q"):
            convert_transformer(source, {k: x for k, x in weights.items() if k != key}, Settings(**given), "weights")
        cut = {**weights, key: weights[key][:-1].clone()}
        with pytest.raises(ValueError, match=r"checkpoint|num_attention_heads|norm_|positions"):
            convert_transformer(source, cut, Settings(**given), "weights")
    for key in ("blocks.0.attn.rel_pos", "blocks.7.attn.proj.weight", "lora_A"):
        with pytest.raises(ValueError, match=f"checkpoint is 'weights', allowed: .*{key.split('.')[0]}"):
            convert_transformer(source, {**weights, key: torch.zeros(1)}, Settings(**given), "weights")


@pytest.mark.parametrize(
    ("name", "source", "settings", "message"),
    [
        ("vdt", "dit", [], "from is 'dit', allowed: open-sora-1.0, "),
        ("vdt", "open-sora-1.2", [], "checkpoint is .*, allowed: "),
        ("open-sora-1.1", "open-sora-1.0", ["num_attention_heads=2"], "which has no ar_embedder"),
        ("open-sora-1.0", "open-sora-1.1", [], "one with blocks.0.attn.q_norm"),
        ("open-sora-1.2", "open-sora-1.1", [], "one with blocks.0.mlp.fc1"),
        ("latte", "vdt", ["num_attention_heads=2"], "which has temporal|which has y_embedder"),
        ("vdt", "vdt", [], "num_attention_heads is None, allowed: a divisor of the width 24, by --set"),
        ("vdt", "vdt", ["num_attention_heads=5"], "num_attention_heads is 5, allowed: a divisor of the width 24"),
        ("vdt", "vdt", ["position_resolution=512"], "set is 'position_resolution', allowed: num_attention_heads, "),
        ("vdt", "vdt", ["depth=2"], "depth"),
    ],
)
def test_refusals(
    name: str, source: str, settings: list[str], message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        convert(source, checkpoints[name], tmp_path / "out", settings=settings)
    assert len(str(refusal.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_other_tables_and_files_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name, key in (
        ("open-sora-1.2", "rope.freqs"),
        ("open-sora-1.0", "pos_embed"),
        ("open-sora-1.0", "pos_embed_temporal"),
        ("vdt", "pos_embed"),
        ("vdt", "time_embed"),
        ("latte", "temp_embed"),
    ):
        weights = golden(name)["weights"]
        settings = Settings(num_attention_heads=2)
        with pytest.raises(ValueError, match="the checkpoint's table of .* is 'off by"):
            convert_transformer(name, {**weights, key: weights[key] * 1.1}, settings, "weights")
    (tmp_path / "model.safetensors").write_text("not one")
    with pytest.raises(ValueError, match="allowed: safetensors: "):
        convert("vdt", tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="out is .*, allowed: a new or empty folder"):
        convert("vdt", checkpoints["vdt"], tmp_path)
    with pytest.raises(ValueError, match="checkpoint is .*, allowed: a file or folder that exists"):
        convert("vdt", tmp_path / "nothing", tmp_path / "out")
