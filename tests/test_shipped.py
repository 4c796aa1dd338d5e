"""What the shipped pipelines generate is pinned: whoever changes it is told, and so are the users of the folder.

    PIN=write python -m pytest tests/test_shipped.py      # writes the pins anew, after a change that is meant

Every folder with a model_index.json under stgen/ or configs/ is shipped and needs a pin in tests/golden/pins, and so does
every VAE that comes alone; the tiny pipeline of the tests is one more case, so that the pinning itself is tested without any.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stgen import STGenPipeline, STGenPredictionPipeline
from stgen.models.latents import load_vae

REPOSITORY = Path(__file__).parent.parent
PINS = REPOSITORY / "tests" / "golden" / "pins"
SHIPPED = {
    path.parent.relative_to(REPOSITORY).as_posix().replace("/", "-"): path.parent
    for top in ("stgen", "configs")
    for path in sorted((REPOSITORY / top).rglob("model_index.json"))
}
VAES = {
    path.parent.relative_to(REPOSITORY).as_posix().replace("/", "-"): path.parent
    for path in sorted((REPOSITORY / "stgen" / "pretrained").glob("*/config.json"))
}
CONFIGS = ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
VERSIONS = ("_diffusers_version", "_name_or_path")
"""Entries of the configurations that say who wrote them, not what the model is."""
KEPT, TOLERANCE = 24, 2e-3
"""Values of a result that a pin keeps, evenly spaced; and how far they may move on other machines and libraries."""


def config_hash(path: Path) -> str:
    config = {name: value for name, value in json.loads(path.read_text()).items() if name not in VERSIONS}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def digest(values: np.ndarray) -> dict[str, Any]:
    flat = values.astype(np.float64).ravel()
    some = flat[np.linspace(0, flat.size - 1, KEPT).round().astype(int)]
    return {
        "shape": list(values.shape),
        "mean": round(float(flat.mean()), 6),
        "std": round(float(flat.std()), 6),
        "values": [round(float(x), 6) for x in some],
    }


def stripes(t: int, h: int, w: int) -> np.ndarray:
    """Stripes that move, `t h w 3` in [0, 1]."""
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    frames = np.stack([((rows + columns + 3 * i) % 32 < 8) for i in range(t)]).astype(np.float32)
    return frames[..., None].repeat(3, -1)


def take_vae_pin(folder: Path) -> dict[str, Any]:
    """The configuration of a VAE by hash, and a few numbers of the latents and the reconstruction of a fixed clip."""
    vae = load_vae(str(folder)).eval()
    video = torch.from_numpy(stripes(9, 64, 64)).permute(3, 0, 1, 2)[None] * 2 - 1
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode()
        frames = vae.decode(latents).sample
    return {
        "configs": {"config.json": config_hash(folder / "config.json")},
        "latents": digest(latents.numpy()),
        "frames": digest(frames.numpy()),
    }


def take_pin(folder: Path) -> dict[str, Any]:
    """The configurations of a pipeline by hash, and a few numbers of what it makes of fixed requests."""
    pipeline = STGenPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    config, steps = pipeline.transformer.config, 2
    latents = pipeline(
        "a 3 moving up", num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).frames
    prediction = STGenPredictionPipeline(**pipeline.components)
    prediction.set_progress_bar_config(disable=True)
    t, h, w = config.sample_frames, config.sample_height, config.sample_width
    frames = prediction(
        stripes(t // 2, h, w),
        num_frames=t,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]
    return {
        "configs": {name: config_hash(folder / name) for name in CONFIGS},
        "latents": digest(latents.numpy()),
        "frames": digest(frames[t // 2 :]),
    }


def check_pin(pin: dict[str, Any], pinned: dict[str, Any]) -> None:
    for name, found in pin["configs"].items():
        assert found == pinned["configs"][name], f"{name} is another one"
    for result in ("latents", "frames"):
        assert pin[result]["shape"] == pinned[result]["shape"], result
        for key in ("values", "mean", "std"):
            np.testing.assert_allclose(
                pin[result][key], pinned[result][key], atol=TOLERANCE, rtol=TOLERANCE, err_msg=f"{key} of {result}"
            )


def folder_of(name: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("tiny_pipeline_folder") if name == "tiny" else SHIPPED[name]


@pytest.mark.parametrize("name", ["tiny", *SHIPPED, *VAES])
def test_a_model_is_the_pinned_one(name: str, request: pytest.FixtureRequest) -> None:
    pin = take_vae_pin(VAES[name]) if name in VAES else take_pin(folder_of(name, request))
    file = PINS / f"{name}.json"
    if os.environ.get("PIN") == "write":
        PINS.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(pin, indent=2) + "\n")
    assert file.exists(), f"{name} has no pin: PIN=write python -m pytest tests/test_shipped.py"
    check_pin(pin, json.loads(file.read_text()))


def test_every_pin_has_its_model() -> None:
    assert {path.stem for path in PINS.glob("*.json")} == {"tiny", *SHIPPED, *VAES}


def test_a_change_is_seen(tiny_pipeline_folder: Path, tiny_pipeline: STGenPipeline, tmp_path: Path) -> None:
    pinned = json.loads((PINS / "tiny.json").read_text())
    with torch.no_grad():
        tiny_pipeline.transformer.transformer_blocks[0].spatial_attn.to_out[0].weight.mul_(1.5)
    tiny_pipeline.save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match="of latents"):
        check_pin(take_pin(tmp_path), pinned)
    config = json.loads((tiny_pipeline_folder / "scheduler" / "scheduler_config.json").read_text())
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "shift": 2.0}))
    with pytest.raises(AssertionError, match=r"scheduler_config\.json is another one"):
        check_pin(take_pin(tmp_path), pinned)
