"""The house's shape: who may import whom, names that must not shadow, and what a saved folder says."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from stgen import STGenPipeline

REPOSITORY = Path(__file__).parent.parent

# Each module may import from its own layer's earlier entries and from all layers above it in this list.
LAYERS = [
    {"durable"},
    {"config", "pretrained"},
    {"masks", "flow", "video", "tables", "optimization", "jobs", "averaging", "footprint"},
    {"models", "text", "data", "ddpm"},
    {"pipelines", "tracking", "objective", "vae_objective"},
    {"accelerator", "checkpoint", "generation", "reconstruction", "encoding", "finetuning", "digits"},
    {"loop", "validation"},
    {"train", "train_vae", "evaluation", "batch", "conversion"},
    {"preflight", "rehearsal"},
    {"plan_report"},
    {"export", "plan"},
    {"cli"},
]
FORBIDDEN = [("data", "models"), ("data", "text"), ("models", "text"), ("models", "data"), ("pipelines", "data")]


def imports_of(path: Path) -> set[str]:
    """The parts of stgen that a file imports at its top, as `config`, `models`, ...; imports inside verbs are lazy."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stgen":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def part_of(path: Path) -> str:
    relative = path.relative_to(REPOSITORY)
    return "pipelines" if relative.parts[0] == "pipelines" else relative.parts[1].removesuffix(".py")


def test_imports_run_one_way() -> None:
    layer = {part: i for i, parts in enumerate(LAYERS) for part in parts}
    files = [*REPOSITORY.glob("stgen/**/*.py"), *REPOSITORY.glob("pipelines/*.py")]
    seen = set()
    for path in files:
        part = part_of(path)
        if part == "__init__":
            continue
        seen.add(part)
        for other in imports_of(path) - {part}:
            if other.startswith("STGen") or other.startswith("Autoencoder"):
                other = "pipelines"
            assert layer[other] <= layer[part], f"{path} imports {other}, which stands above {part}"
            assert (part, other) not in FORBIDDEN, f"{path} imports {other}"
    assert seen == set(layer)


def test_no_module_shadows_a_library() -> None:
    # `accelerate launch stgen/train.py` puts stgen/ first on sys.path.
    taken = set(sys.stdlib_module_names) | {
        "ray",
        "webdataset",
        "datasets",
        "torch",
        "diffusers",
        "evaluate",
        "requests",
    }
    ours = {path.stem for path in (REPOSITORY / "stgen").iterdir()} - {"__init__", "__pycache__"}
    assert not ours & taken


def test_import_is_light() -> None:
    code = (
        "import sys, stgen; print(sorted({'torch', 'diffusers', 'ray', 'deepspeed', 'webdataset'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_training_does_without_what_writes_shards() -> None:
    code = "import sys; sys.modules['webdataset'] = None; import stgen.train, stgen.train_vae, stgen.plan"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys; sys.modules['skimage'] = None; from stgen.cli import main; main()"
    command = [sys.executable, "-c", code, "evaluate", "--pipeline", "moving_mnist_64", "--data", "x", "--out", "y"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "one of stgen's extras brings it" in run.stderr.splitlines()[-1]


def test_golden_model_index(tiny_pipeline_folder: Path) -> None:
    # Module paths are an on-disk format: folders saved today must open tomorrow.
    index = json.loads((tiny_pipeline_folder / "model_index.json").read_text())
    assert index.pop("_diffusers_version")
    assert index == {
        "_class_name": "STGenPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "BertModel"],
        "tokenizer": ["transformers", "BertTokenizer"],
        "transformer": ["stgen.models.transformer", "STGenTransformer3DModel"],
        "vae": ["stgen.models.autoencoder", "AutoencoderKLSTGen"],
    }


@pytest.mark.parametrize(
    "load",
    [
        "from stgen import STGenPipeline; p = STGenPipeline.from_pretrained(sys.argv[1])",
        "import stgen.pipelines; from diffusers import DiffusionPipeline; p = DiffusionPipeline.from_pretrained(sys.argv[1])",
    ],
)
def test_fresh_process_gives_the_same_video(
    load: str, tiny_pipeline: STGenPipeline, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    import numpy as np
    import torch

    call = (
        "p('a 3 moving up', num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type='np').frames"
    )
    code = f"import sys, torch, numpy; torch.set_num_threads(1); {load}; numpy.save(sys.argv[2], {call})"
    out = tmp_path / "frames.npy"
    subprocess.run([sys.executable, "-c", code, str(tiny_pipeline_folder), str(out)], check=True, capture_output=True)
    frames = tiny_pipeline(
        "a 3 moving up", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
    ).frames
    np.testing.assert_allclose(np.load(out), frames, atol=1e-6)
