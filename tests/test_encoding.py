"""Stored latents and text states: what is stored, that training from it is training from pixels, and jobs that die."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from accelerate.state import AcceleratorState
from conftest import tiny_text_encoder, tiny_vae
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from test_batch import kill, ray_processes, wait_for
from test_latents import VAES, make

import stgen.text
from stgen import train
from stgen.cli import main
from stgen.data.color import to_pixels
from stgen.data.reading import ClipDataset, DataConfig, clip_loader, collate
from stgen.data.shards import LATENT, TEXT, ShardWriter, write_index
from stgen.encoding import EMPTY_PROMPT, encode_clips, find_stored, fingerprint
from stgen.masks import MASKS, MaskSpec, fold_mask, generated_cells, given_latents_are_exact
from stgen.models.latents import encode, encode_moments, temporal_reach
from stgen.text import TextCache
from stgen.train import TrainConfig, model_inputs

CAPTIONS = ["a 3 moving up", "the digit 7 moves left and down", "a 1", "a 2 moving right"]
SHAPE = (10, 16, 12)
ARGUMENTS = {"combine": {"masks": [{"kind": "moving_box"}, {"kind": "predict", "args": {"given": 5}}]}}
KINDS = [MaskSpec(kind, args=ARGUMENTS.get(kind, {})) for kind in MASKS]
KINDS += [MaskSpec("predict", args={"given": g}) for g in ([1, 9], 5, 6, 9)] + [
    MaskSpec("interpolate", args={"given": 3})
]
CPU = torch.device("cpu")


def write_clips(folder: Path, clips: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Path:
    random = np.random.default_rng(seed)
    with ShardWriter(folder, clips_per_shard=5) as writer:
        for i in range(clips):
            frames = random.integers(0, 256, (*shape, 3), np.uint8)
            fields = dict(zip(("num_frames", "height", "width"), shape, strict=True))
            clip = {"caption": CAPTIONS[i % 4], "fps": 10, "source": "noise", **fields}
            writer.write(f"{seed}-{i:04d}", clip, npy=npy(frames))
    return folder


def npy(frames: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, frames)
    return file.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, a VAE, a text encoder, and the clips encoded in float32 and float16."""
    folder = tmp_path_factory.mktemp("world")
    write_clips(folder / "pixels", 12)
    tiny_vae().save_pretrained(folder / "vae")
    (folder / "text").mkdir()
    for part in tiny_text_encoder(folder / "text"):
        part.save_pretrained(folder / "text")
    for dtype in ("float32", "float16"):
        encode_clips(folder / "pixels", folder / "vae", folder / dtype, str(folder / "text"), 64, dtype, batch_size=4)
    return folder


def config(world: Path, data: str, *masks: MaskSpec, **overrides) -> TrainConfig:
    chosen = {"text_encoder": str(world / "text"), "max_text_length": 64, "text_dropout": 0.4, "seed": 3}
    chosen["vae"] = str(world / "vae")
    return TrainConfig(
        run=str(world / "run"),
        data=DataConfig(str(world / data), *SHAPE),
        masks=list(masks or KINDS),
        **(chosen | overrides),
    )


def opened(config: TrainConfig, vae=None, shuffle: bool = True) -> ClipDataset:
    """The clips as the trainer opens them."""
    moments = ("mean", "logvar") if config.sample_posterior else ("mean",)
    find = partial(find_stored, vae or tiny_vae(), config.data.shapes, config.masks, config.seed, moments)
    return ClipDataset(config.data, config.seed, shuffle, find)


def inputs(config: TrainConfig, positions: range, vae=None) -> tuple[dict, dict[str, torch.Tensor]]:
    """A batch as the trainer reads it, and what it makes of it."""
    folder, dataset = Path(config.data.path), opened(config, vae)
    if dataset.stored is not None and dataset.stored.text_dim is not None:
        text = TextCache(folder / EMPTY_PROMPT)
    else:
        TextCache.build(folder.parent / "cache.safetensors", config.text_encoder, ["", *CAPTIONS], 64)
        text = TextCache(folder.parent / "cache.safetensors")
    batch = collate([dataset[position] for position in positions])
    return batch, model_inputs(batch, config, vae or tiny_vae(), text, CPU)


# --- What is stored -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 1e-3)])
def test_shards_hold_moments_and_states_beside_the_clip(world: Path, dtype: str, tolerance: float) -> None:
    vae, names = tiny_vae(), [path.name for path in sorted((world / "pixels").glob("*.tar"))]
    assert (
        [path.name for path in sorted((world / dtype).glob("*.tar"))]
        == names
        == [f"shard-00000{i}.tar" for i in range(3)]
    )
    TextCache.build(world / "cache.safetensors", str(world / "text"), ["", *CAPTIONS], 64)
    text = TextCache(world / "cache.safetensors")
    for name in names:
        before, after = (
            list(wds.WebDataset(str(world / folder / name), shardshuffle=False)) for folder in ("pixels", dtype)
        )
        for old, new in zip(before, after, strict=True):
            latents, states = load(new.pop(LATENT)), load(new.pop(TEXT))
            for part in (old, new):
                part.pop("__url__"), part.pop("__local_path__", None)
            assert old == new
            frames = torch.from_numpy(np.load(io.BytesIO(old["npy"]))).permute(3, 0, 1, 2)
            moments = encode_moments(vae, to_pixels(frames)[None])
            for stored, computed in ((latents["mean"], moments.mean[0]), (latents["logvar"], moments.logvar[0])):
                assert str(stored.dtype) == f"torch.{dtype}"
                torch.testing.assert_close(stored.float(), computed, rtol=tolerance, atol=tolerance + 1e-5)
            caption = json.loads(old["json"])["caption"]
            torch.testing.assert_close(states["states"].float(), text[caption], rtol=tolerance, atol=tolerance + 1e-6)


def test_the_index_is_that_of_the_source_with_further_files(world: Path) -> None:
    before, after = (
        [json.loads(line) for line in (world / folder / "index.jsonl").read_text().splitlines()]
        for folder in ("pixels", "float16")
    )
    for old, new in zip(before, after, strict=True):
        assert new["files"].keys() - old["files"].keys() == {LATENT, TEXT}
        assert {**old, "files": 0} == {**new, "files": 0}
    index = (world / "float16" / "index.jsonl").read_bytes()
    write_index(world / "float16")  # as `stgen data index` does
    assert (world / "float16" / "index.jsonl").read_bytes() == index


def test_a_caption_is_encoded_once_a_shard(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = stgen.text.encode_text
    monkeypatch.setattr(
        stgen.text, "encode_text", lambda t, e, prompts, n: seen.append(list(prompts)) or original(t, e, prompts, n)
    )
    encode_clips(world / "pixels", world / "vae", tmp_path, str(world / "text"), 64)
    assert [sorted(prompts) for prompts in seen] == [
        [""],
        sorted(CAPTIONS),
        sorted(CAPTIONS),
        ["a 1", "a 2 moving right"],
    ]


def test_an_encoded_folder_is_one_of_pixels_to_all_others(world: Path) -> None:
    for shuffle in (True, False):
        plain, rich = (
            ClipDataset(DataConfig(str(world / folder), *SHAPE), 1, shuffle) for folder in ("pixels", "float16")
        )
        for position in range(12):
            old, new = plain[position], rich[position]
            assert old.keys() == new.keys()
            assert torch.equal(old["video"], new["video"])


# --- Training from it is training from pixels ---------------------------------------------------------------------


@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: f"{spec.kind}{spec.args or ''}")
def test_inputs_are_those_from_pixels(world: Path, spec: MaskSpec) -> None:
    """Every kind of masks; what the model sees of the target, the condition, the text and the sizes."""
    positions = range(8)
    pixels, expected = inputs(config(world, "pixels", spec), positions)
    assert "latents" not in pixels
    for dtype, tolerance in (("float32", 1e-5), ("float16", 2e-2)):
        batch, got = inputs(config(world, dtype, spec), positions)
        assert got.keys() == expected.keys()
        for name in got:
            close = name in ("latents", "condition_latents", "text")
            allowed = tolerance if close else 0
            torch.testing.assert_close(
                got[name], expected[name], rtol=allowed, atol=allowed, msg=lambda m, n=name: f"{n}: {m}"
            )
        generated = generated_cells(got["condition_mask"])
        assert len(batch["video"]) == int(batch["has_video"].sum())
        if spec.kind == "generate_all":
            assert len(batch["video"]) == 0
        if spec.kind in ("moving_box", "interpolate", "combine"):
            assert len(batch["video"]) == len(positions)
        # What is given is the very target, where no pixels were read.
        same = got["condition_latents"] == got["latents"]
        assert (same | generated)[~batch["has_video"]].all()


def test_pixels_are_read_only_where_a_mask_needs_them(world: Path) -> None:
    # Frame 0 is a latent, and so are frames 1-4, 5-8 and 9.
    for given_frames, needed in ((1, 0), (2, 8), (5, 0), (6, 8), (9, 0)):
        batch, _ = inputs(config(world, "float32", MaskSpec("predict", args={"given": given_frames})), range(8))
        assert len(batch["video"]) == needed, given_frames
    mixture = (MaskSpec("generate_all", 2), MaskSpec("predict", 1, {"given": 5}), MaskSpec("moving_box"))
    batch, _ = inputs(config(world, "float32", *mixture), range(32))
    assert 2 <= len(batch["video"]) <= 20


REACH = {"stgen": "past", "wan2.1": "past", "wan2.2": "past", "ltx": "past", "ltx0.9.1": "past", "image": "frame"}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.sampled_from([(1, 8, 8), (2, 9, 8), (6, 8, 9), (9, 8, 8)]))
def test_exact_latents_are_those_of_the_hidden_video(spec: MaskSpec, seed: int, shape: tuple[int, int, int]) -> None:
    """What `given_latents_are_exact` says is so, and what it denies is not."""
    generator, vae = torch.Generator().manual_seed(seed), tiny_vae()
    mask = spec.draw(shape, generator)[None]
    video = torch.rand(1, 3, *shape, generator=generator) * 2 - 1
    other = torch.where(mask.bool(), torch.rand(1, 3, *shape, generator=generator) * 2 - 1, video)
    with torch.no_grad():
        whole, hidden, changed = encode(vae, video), encode(vae, torch.where(mask.bool(), 0, video)), encode(vae, other)
    some_given = (fold_mask(mask, 4, 4).amin(1, keepdim=True) < 1).expand_as(whole)
    if given_latents_are_exact(mask, 4, "past"):
        torch.testing.assert_close(whole[some_given], hidden[some_given], atol=1e-5, rtol=1e-5)
        assert torch.equal(whole[some_given], changed[some_given])  # to the bit: there is no leak
    else:
        assert not torch.allclose(whole[some_given], hidden[some_given], atol=1e-4)


@pytest.mark.parametrize("name", VAES)
def test_vaes_reach_as_far_as_is_said(name: str) -> None:
    vae, shape = make(name), (9, 32, 32)
    video = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        first, whole = (encode(vae, x) for x in (torch.cat([video[:, :, :1], -video[:, :, 1:]], 2), video))
        moments = encode_moments(vae, video)
    assert temporal_reach(vae) == REACH.get(name.removesuffix(" with statistics"), "clip")
    assert torch.equal(first[:, :, 0], whole[:, :, 0]) == (temporal_reach(vae) != "clip")
    assert moments.logvar.shape == moments.mean.shape == whole.shape


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox", "ltx", "image"])
def test_any_vae_encodes(name: str, world: Path, tmp_path: Path) -> None:
    vae = make(name)
    vae.save_pretrained(tmp_path / "vae")
    encode_clips(world / "pixels", tmp_path / "vae", tmp_path / "encoded", dtype="float32")
    masks = [
        MaskSpec("generate_all", 3),
        MaskSpec("predict", 2, {"given": [1, 9]}),
        MaskSpec("moving_box"),
        MaskSpec("backward"),
    ]
    chosen = {"vae": str(tmp_path / "vae")}
    _, expected = inputs(config(world, "pixels", *masks, **chosen), range(8), vae)
    moved = config(tmp_path, "encoded", *masks, **chosen, text_encoder=str(world / "text"))
    batch, got = inputs(moved, range(8), vae)
    for key in got:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-4)
    assert "text" not in batch
    assert len(batch["video"]) < 8


def test_quantised_latents_have_no_variance(world: Path, tmp_path: Path) -> None:
    vae = tiny_vae(bottleneck="fsq", fsq_levels=(8, 8, 5, 5))
    vae.save_pretrained(tmp_path / "vae")
    encode_clips(world / "pixels", tmp_path / "vae", tmp_path / "encoded", str(world / "text"), 64)
    chosen = config(tmp_path, "encoded", MaskSpec())
    batch, got = inputs(chosen, range(4), vae)
    assert list(batch["latents"]) == ["mean"]
    _, expected = inputs(config(world, "pixels", MaskSpec()), range(4), vae)
    torch.testing.assert_close(got["latents"], expected["latents"], atol=1e-3, rtol=1e-3)  # its levels, in float16
    with pytest.raises(ValueError, match="sample_posterior is True, allowed: false with this VAE"):
        inputs(config(world, "pixels", MaskSpec(), sample_posterior=True), range(4), vae)


def test_the_posterior_can_be_sampled(world: Path) -> None:
    mode, drawn, stored = (
        inputs(config(world, data, MaskSpec("predict", args={"given": 5}), sample_posterior=sample), range(8))[1]
        for data, sample in (("pixels", False), ("pixels", True), ("float32", True))
    )
    for name in mode:  # all other draws are the same
        assert torch.equal(mode[name], drawn[name]) == (name != "latents"), name
        torch.testing.assert_close(stored[name], drawn[name], atol=1e-5, rtol=1e-5)
    batch, _ = inputs(config(world, "float32", MaskSpec(), sample_posterior=True), range(8))
    std = torch.tensor([0.5, 0.6, 0.7, 0.8]).view(1, 4, 1, 1, 1)  # of the tiny VAE's latents
    normal = (drawn["latents"] - mode["latents"]) * std / (0.5 * batch["latents"]["logvar"]).exp()
    assert abs(normal.mean().item()) < 0.05
    assert abs(normal.std().item() - 1) < 0.05


def test_workers_read_what_one_process_reads(world: Path) -> None:
    chosen = config(world, "float16", MaskSpec("predict", args={"given": [1, 6]}))
    dataset = opened(chosen)
    for (alone, helped), _ in zip(
        zip(*(clip_loader(dataset, 4, 4, n) for n in (0, 2)), strict=True), range(3), strict=False
    ):
        assert torch.equal(alone["video"], helped["video"])
        assert torch.equal(alone["latents"]["mean"], helped["latents"]["mean"])
        assert all(torch.equal(a, b) for a, b in zip(alone["text"], helped["text"], strict=True))


def run_training(world: Path, run: str, data: str, *overrides: str) -> list[float]:
    fixed = ["samples=24", "batch_size=4", "log_every=1", "checkpoint_every=100", "optimizer.warmup=0", "seed=3"]
    model = ["model.num_attention_heads=2", "model.attention_head_dim=12", "model.num_layers=2", "model.pattern=st"]
    paths = [f"run={world}/{run}", f"vae={world}/vae", f"data.path={world}/{data}", f"text_encoder={world}/text"]
    size = [f"data.{name}={n}" for name, n in zip(("num_frames", "height", "width"), SHAPE, strict=True)]
    (world / "train.yaml").write_text(
        "{max_text_length: 64, text_dropout: 0.3, masks: [{kind: generate_all}, {kind: moving_box}, "
        "{kind: predict, weight: 2, args: {given: [1, 9]}}]}"
    )
    try:
        train.main(["--config", str(world / "train.yaml"), *paths, *size, *model, *fixed, *overrides])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(1)
    return [json.loads(line)["loss"] for line in (world / run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_losses_are_those_of_training_from_pixels(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = run_training(world, "from-pixels", "float16", "use_encoded=false")
    assert len(pixels) == 6
    monkeypatch.setattr(train, "export", lambda *_: "nowhere")  # which alone needs the encoder
    monkeypatch.setattr("stgen.text.load_text_encoder", lambda name: pytest.fail("the text encoder was loaded"))
    # To the bit where clips are encoded in the same company; else a matrix product of another size rounds elsewhere.
    assert run_training(world, "float32-run", "float32") == pytest.approx(pixels, rel=1e-6)
    assert run_training(world, "float16-run", "float16") == pytest.approx(pixels, rel=3e-4)


# --- What is refused ----------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture, call: Callable[[], object]) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["stgen", "data", "encode", *arguments])
    main()


def trained(folder: Path, data: Path, *overrides: str) -> Callable[[], object]:
    return partial(run_training, folder, "refused", data.name, f"data.path={data}", *overrides)


def test_training_refuses_what_other_models_encoded(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = tiny_vae()
    with torch.no_grad():
        other.encoder.conv_out.bias.add_(0.01)
    other.save_pretrained(tmp_path / "vae")
    encoder = shutil.copytree(world / "text", tmp_path / "text")
    vocabulary = json.loads((encoder / "tokenizer.json").read_text())
    (encoder / "tokenizer.json").write_text(json.dumps(vocabulary | {"normalizer": None}))
    for override, named in (
        (f"vae={tmp_path}/vae", f"vae is '{tmp_path}/vae', allowed: the VAE with which the data was encoded"),
        (f"text_encoder={encoder}", f"text_encoder is '{encoder}', allowed: the encoder with which the captions"),
        ("max_text_length=32", "max_text_length is 32, allowed: 64, with which the captions were encoded"),
    ):
        assert named in refusal(capsys, trained(world, world / "float16", override))
    # Whoever saved it again, under whatever name and with whatever decoder.
    again = tiny_vae()
    with torch.no_grad():
        again.decoder.conv_out.bias.add_(0.01)
    again.save_pretrained(tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(world / "vae") != fingerprint(tmp_path / "vae")


def test_training_refuses_folders_that_are_not_whole(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    half = shutil.copytree(world / "float16", tmp_path / "half")
    (half / "index.jsonl").unlink()
    assert "half is half encoded: the same `stgen data encode` again goes on" in refusal(capsys, trained(world, half))

    for name in ("encode.json", EMPTY_PROMPT):
        lacking = shutil.copytree(world / "float16", tmp_path / f"without_{name}")
        (lacking / name).unlink()
        said = f"{name} of data {lacking} is missing, allowed: the one that `stgen data encode` writes"
        assert said in refusal(capsys, trained(world, lacking))

    # Shards of both kinds in one folder.
    mixed = shutil.copytree(world / "float16", tmp_path / "mixed")
    shutil.copy(world / "pixels" / "shard-000001.tar", mixed)
    write_index(mixed)
    assert "5 of 12 clips have no latent.safetensors, such as 0-0005; encode all clips" in refusal(
        capsys, trained(world, mixed)
    )


def rewrite(folder: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Changes the files of every sample of the first shard."""
    samples = list(wds.WebDataset(str(folder / "shard-000000.tar"), shardshuffle=False))
    with wds.TarWriter(str(folder / "shard-000000.tar"), encoder=False) as tar:
        for sample in samples:
            sample = {name: data for name, data in sample.items() if not name.startswith("__") or name == "__key__"}
            change(sample)
            tar.write(sample)
    write_index(folder)
    return folder


@pytest.mark.parametrize(
    ("extension", "tensors", "named"),
    [
        (
            LATENT,
            {"mean": (4, 4, 3, 3)},
            "wrong shape: mean of latent.safetensors is (4, 4, 3, 3), of this VAE (4, 4, 4, 3)",
        ),
        (LATENT, {"logvar": (4, 4, 4, 3)}, "incomplete: latent.safetensors holds ['logvar'], not mean"),
        (TEXT, {"states": (7, 15)}, "wrong shape: text.safetensors is (7, 15), of this encoder (n, 16)"),
        (TEXT, {"pooled": (7, 16)}, "incomplete: text.safetensors holds ['pooled'], not states"),
        (LATENT, None, "undecodable: latent.safetensors: "),
    ],
)
def test_a_sample_with_other_tensors_is_damaged(
    world: Path, tmp_path: Path, extension: str, tensors: dict[str, tuple] | None, named: str
) -> None:
    data = b"torn" if tensors is None else save({name: torch.zeros(shape) for name, shape in tensors.items()})
    shutil.copytree(world / "float16", tmp_path / "data")
    rewrite(
        tmp_path / "data", lambda sample: sample.update({extension: data}) if sample["__key__"] == "0-0003" else None
    )
    chosen = config(tmp_path, "data", MaskSpec(), vae=str(world / "vae"), text_encoder=str(world / "text"))
    with pytest.raises(ValueError, match=re.escape(f"sample 0-0003 of shard-000000.tar: {named}")):
        [opened(chosen, shuffle=False)[i] for i in range(12)]
    # In training another clip stands in for it, as for any that is damaged.
    batch, _ = inputs(chosen, range(12))
    assert {damage.key for damage in batch["damaged"]} == {"0-0003"}
    assert batch["damaged"][0].reason.startswith(named)


def test_a_torn_clip_with_whole_latents_is_used_where_no_pixels_are_needed(world: Path, tmp_path: Path) -> None:
    """Whatever else a process has read before, or the order of samples would depend on ranks, workers and resuming."""
    shutil.copytree(world / "float16", tmp_path / "data")
    rewrite(tmp_path / "data", lambda sample: sample.update(npy=b"torn") if sample["__key__"] == "0-0003" else None)
    masks = (MaskSpec(), MaskSpec("moving_box"))
    chosen = config(tmp_path, "data", *masks, vae=str(world / "vae"), text_encoder=str(world / "text"))
    long_read, positions = opened(chosen), range(36)
    found = [[damage.key for damage in long_read[position]["damaged"]] for position in positions]
    assert found == [[damage.key for damage in opened(chosen)[position]["damaged"]] for position in positions]
    asked = [p for p in positions if long_read.row(p)["key"] == "0-0003"]
    assert {bool(found[p]) for p in asked} == {False, True}
    assert [bool(found[p]) for p in asked] == [long_read.stored.needs_pixels(p, SHAPE) for p in asked]


def test_without_pixels(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "latents"
    encode_clips(world / "pixels", world / "vae", out, str(world / "text"), 64, "float32", drop_pixels=True)
    rows = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert all(row["files"].keys() == {"json", LATENT, TEXT} for row in rows)
    chosen = (MaskSpec(), MaskSpec("predict", args={"given": 5}))
    _, got = inputs(config(tmp_path, "latents", *chosen, vae=str(world / "vae")), range(8))
    _, expected = inputs(config(world, "pixels", *chosen), range(8))
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5)

    for kind, named in (
        ("{kind: predict, args: {given: [1, 2]}}", "predict {'given': [1, 2]}"),
        ("{kind: open_sora_1_2}", "open_sora_1_2"),
        ("{kind: moving_box}", "moving_box"),
    ):
        line = refusal(capsys, trained(world, out, f"masks=[{{kind: generate_all}}, {kind}]"))
        assert f'masks.kind is "{named}"' in line or f"masks.kind is '{named}'" in line
        assert f"since {out} has no pixels to encode anew" in line
    with pytest.raises(
        ValueError, match="12 of 12 clips have no pixels, such as 0-0000; `stgen data encode --drop-pixels` left"
    ):
        ClipDataset(DataConfig(str(out), *SHAPE))  # as train_vae, evaluate and reconstruct open it
    with pytest.raises(
        ValueError, match=r"is 'clips of json, latent.safetensors, text.safetensors alone', allowed: clips with"
    ):
        encode_clips(out, world / "vae", tmp_path / "again")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"--data": "nowhere"}, "data is 'nowhere'|data is .*nowhere"),
        ({"--vae": "nowhere"}, "vae is 'nowhere', allowed: a folder with a VAE's config.json"),
        ({"--text-encoder": "full"}, "text_encoder is 'full', allowed: a text encoder in safetensors"),
        ({"--dtype": "int8"}, "dtype is 'int8', allowed: float16, bfloat16, float32"),
        ({"--batch-size": "0"}, "batch_size is 0, allowed: 1 or more"),
        ({"--actors": "0"}, "actors is 0, allowed: 1 or more"),
        ({"--out": "full"}, "out is .*full', allowed: a new or empty folder, not one with \\['mine'\\]"),
        ({"--dtype": "float32"}, "dtype of the encoding is 'float32', allowed: 'float16', with which .* was begun"),
        ({"--drop-pixels": None}, "pixels of the encoding is False, allowed: True"),
    ],
)
def test_encoding_refuses(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict,
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/mine").write_text("mine")
    shutil.copytree(world / "float16", "encoded")
    chosen = {"--data": f"{world}/pixels", "--vae": f"{world}/vae", "--out": "encoded", "--batch-size": "4"}
    chosen |= {"--text-encoder": f"{world}/text", "--max-text-length": "64"} | changed
    arguments = [word for pair in chosen.items() for word in pair if word is not None]
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    line = refusal(capsys, lambda: command(monkeypatch, *arguments))
    assert re.search(named, line), line
    assert {
        path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file() and path.name != ".lock"
    } == {path: data for path, data in before.items() if path.name != ".lock"}


def test_damaged_clips_are_left_out_up_to_a_share(world: Path, tmp_path: Path) -> None:
    data, out = shutil.copytree(world / "pixels", tmp_path / "data"), tmp_path / "out"
    rewrite(data, lambda sample: sample.update(npy=b"torn" if sample["__key__"] == "0-0003" else sample["npy"]))
    for _ in range(2):
        with pytest.raises(
            ValueError, match="1 of 12 clips are damaged, allowed: .*=0.01: 0-0003 of shard-000000.tar: undecod"
        ):
            encode_clips(data, world / "vae", out)
        assert not (out / "index.jsonl").exists()
    written = contents(out)
    (damage,) = encode_clips(data, world / "vae", out, max_damaged=0.1)
    assert (damage.shard, damage.key) == ("shard-000000.tar", "0-0003")
    assert json.loads((out / "skipped.jsonl").read_text()) == damage._asdict()
    keys = [json.loads(line)["key"] for line in (out / "index.jsonl").read_text().splitlines()]
    assert keys == [f"0-{i:04d}" for i in range(12) if i != 3]
    assert written.items() <= contents(out).items()  # no shard was written again


# --- Jobs that die ------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.slow
def test_whoever_dies_the_bytes_are_those_of_one_process(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for name, shape, seed in (("wide", (33, 48, 64), 1), ("long", (49, 32, 32), 2)):
        write_clips(tmp_path / "data" / name, 20, seed, shape)
        (tmp_path / "data" / name / "index.jsonl").unlink()
    write_index(tmp_path / "data")
    arguments = [str(tmp_path / "data"), str(world / "vae")]
    texts = [str(world / "text"), 64]
    encode_clips(*arguments, tmp_path / "alone", *texts)

    out = tmp_path / "together"
    program = (
        "import torch; torch.set_num_threads(1); from stgen.encoding import encode_clips; from stgen.jobs import Pool; "
        f"encode_clips(*{[*arguments, str(out), *texts]}, pool=Pool(actors=2))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("w")
    driver = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=log)
    workers = []
    try:
        wait_for(lambda: list(out.rglob(".*.tmp")) or driver.poll() is not None)
        assert driver.poll() is None, (tmp_path / "log").read_text()[-2000:]
        kill(ray_processes("ray::_Encoder"))  # in the middle of a shard
        wait_for(lambda: list(out.rglob("shard*.tar")))
        workers = ray_processes("ray::_Encoder")
        for worker in workers:
            worker.suspend()
        with pytest.raises(ValueError, match="a folder that no other job is writing to"):
            encode_clips(*arguments, out, *texts)
    finally:
        kill(workers)  # those that are suspended would outlive the job
        driver.kill()  # the whole job
        driver.wait()
        kill(ray_processes())
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("shard*.tar")}
    assert 0 < len(finished) < 8
    assert not (out / "index.jsonl").exists()

    encode_clips(*arguments, out, *texts)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # not written again
    assert contents(out) == contents(tmp_path / "alone")
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    encode_clips(*arguments, out, *texts)  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == written
