"""What comes with stgen is found by its name, small enough to ship, and documented."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import REPOSITORY

from stgen.pretrained import PIPELINE, find_pretrained, shipped
from stgen.video import read_video

LIMITS = {"moving_mnist_64": 30, "natural_64": 20}
"""MB (10^6 bytes) that each folder may take."""


def test_names_stand_for_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, folder in shipped().items():
        assert find_pretrained(name) == str(folder)
    assert find_pretrained(f"{PIPELINE}/vae") == str(shipped()[PIPELINE] / "vae")
    for other in ("runs/demo", "/absolute/folder", "hub/name", "", "."):
        assert find_pretrained(other) == other
    monkeypatch.chdir(tmp_path)
    Path(PIPELINE).mkdir()  # the user's own goes before ours
    assert find_pretrained(PIPELINE) == PIPELINE


@pytest.mark.parametrize("name", shipped())
def test_a_folder_is_small_and_has_a_card(name: str) -> None:
    folder = shipped()[name]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMITS[name] * 1e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".png", ".gif"}
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n"), "metadata, as model hubs read it"
    for word in ("configs/", "clips", "hours", "cores", "accelerate launch"):
        assert word in card, word


@pytest.mark.slow
def test_the_first_minute(tmp_path: Path) -> None:
    """`stgen generate` without a pipeline, in a fresh process and another folder, makes the shipped one's video."""
    command = [sys.executable, "-m", "stgen.cli", "generate", "--prompt", "a 3 moving up and a 7 moving left"]
    subprocess.run([*command, "--out", "video.mp4"], cwd=tmp_path, check=True)
    frames, _ = read_video(tmp_path / "video.mp4")
    assert frames.shape == (20, 64, 64, 3)
    assert 0.001 < (frames > 128).mean() < 0.3, "bright strokes on black"
    assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 1, "they move"


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path) -> None:
    """The Python of README.md, as it stands there, in a fresh process and another folder."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    code = "\n".join(blocks[:2])
    assert "STGenPipeline.from_pretrained" in code
    assert "write_video" in code
    check = "assert len(frames) == 20 and frames[0].size == (64, 64)"
    subprocess.run([sys.executable, "-c", f"{code}\n{check}"], cwd=tmp_path, check=True)
    assert read_video(tmp_path / "long.mp4")[0].shape == (40, 64, 64, 3)


def test_every_folder_is_packaged() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()  # tomllib came with Python 3.11
    assert '"stgen.pretrained" = ["*/**"]' in text
    assert re.search(r'^packages = \[.*"stgen.pretrained"', text, re.MULTILINE)
