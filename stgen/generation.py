"""One request, one video: what `stgen generate` and the batch job share.

Frames are uint8 `t h w 3`: t frames, h height and w width in pixels.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import numpy as np
import torch

from stgen.config import require
from stgen.pipelines import (
    STGenInpaintPipeline,
    STGenInterpolationPipeline,
    STGenPipeline,
    STGenPredictionPipeline,
)
from stgen.pretrained import find_pretrained
from stgen.tables import read_table
from stgen.video import Frames, read_video

TASKS: dict[str, tuple[type[STGenPipeline], tuple[str, ...]]] = {
    "text": (STGenPipeline, ()),
    "prediction": (STGenPredictionPipeline, ("video",)),
    "interpolation": (STGenInterpolationPipeline, ("video", "last_video")),
    "inpainting": (STGenInpaintPipeline, ("video", "mask")),
}
"""For each task its pipeline, and the input files that it takes, all of which it needs."""


# --- Saved pipelines ----------------------------------------------------------------------------------------------


def saved_pipeline(folder: str | Path) -> Path:
    """The absolute path of a saved pipeline, or of one that comes with stgen, after a check that needs no weights.

    Raises:
        ValueError: there is no model_index.json, it names no pipeline of stgen's, or a component's folder is missing.
    """
    folder = Path(find_pretrained(folder)).absolute()
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"pipeline is {str(folder)!r}, allowed: a folder saved by STGenPipeline: {error}") from error
    allowed = [kind.__name__ for kind, _ in TASKS.values()]
    name = index.get("_class_name") if isinstance(index, dict) else None
    require(name in allowed, f"_class_name in {folder}/model_index.json", name, ", ".join(allowed))
    for name in component_names(folder):
        require((folder / name).is_dir(), f"{name} of pipeline {folder}", "missing", "a folder")
    return folder


def component_names(folder: Path) -> list[str]:
    """The components that a saved pipeline's model_index.json lists; a pipeline without text has no text encoder."""
    index = json.loads((folder / "model_index.json").read_text())
    return [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]


# --- Requests -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Request:
    """What to generate, checked as far as it can be without reading the inputs.

    Raises:
        ValueError: a field has a wrong type or range, the task needs a file that isn't named or takes no such file.
    """

    id: str
    """Names the result: 1 to 128 of the characters `A-Z a-z 0-9 . _ -`, the first a letter, a digit or `_`."""
    task: str
    """`text`, `prediction`, `interpolation` or `inpainting`."""
    prompt: str = ""
    """What happens. Without one, the tasks that show what they want run without guidance."""
    negative_prompt: str = ""
    """What to guide away from."""
    video: str | None = None
    """A video or an image: for prediction the given first frames, for interpolation likewise, for inpainting all."""
    last_video: str | None = None
    """Interpolation: a video or an image with the given last frames, as many as the first."""
    mask: str | None = None
    """Inpainting: a video with as many frames as the result, or an image that holds for all of them, of the result's
    size. White is generated, black is given. Pixels of 128 and more count as white, since compression greys edges."""
    num_frames: int | None = None
    """Of the whole result, the given ones included. By default that of the training clips; inpainting: of `video`."""
    height: int | None = None
    """Of a frame in pixels; by default that of `video`, else that of the training clips. Other videos are resized."""
    width: int | None = None
    """Likewise."""
    num_inference_steps: int = 20
    """Steps of the scheduler, 1 or more."""
    guidance_scale: float | None = None
    """Of classifier-free guidance, 0 or more; 1 or less switches it off. By default the pipeline's own for the task."""
    seed: int = 0
    """Of all noise, 0 to 2^63 - 1. Requests that are equal but for their ids give the same video."""
    fps: float = 10.0
    """Of the file that is written, in frames/s, 0.01 to 1000."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, (kind, optional) = getattr(self, field.name), _kind(field)
            # JSON writes the number 10.0 as 10.
            fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
            self._require(field.name, fits or (optional and value is None), _KINDS[kind])
        good_id = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", self.id) is not None
        require(good_id, "id", self.id, "1 to 128 of A-Z a-z 0-9 . _ -, the first a letter, a digit or _")
        self._require("task", self.task in TASKS, ", ".join(TASKS))
        for name in ("video", "last_video", "mask"):
            if name in TASKS[self.task][1]:
                self._require(name, bool(getattr(self, name)), f"a file, since task {self.task} needs one")
            else:
                self._require(name, getattr(self, name) is None, f"none, since task {self.task} takes none")
        for name in ("num_frames", "height", "width", "num_inference_steps"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more")
        scale = self.guidance_scale
        self._require("guidance_scale", scale is None or 0 <= scale < math.inf, "0 or more")
        self._require("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1")
        self._require("fps", 0.01 <= self.fps <= 1000, "0.01 to 1000 frames/s")

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        require(condition, f"{name} of request {self.id!r}", getattr(self, name), allowed)


_FIELDS = {field.name: field for field in dataclasses.fields(Request)}
_KINDS = {str: "a text", int: "a whole number", float: "a number"}


def _kind(field: dataclasses.Field) -> tuple[type, bool]:
    """The type of a field's values, and whether None is one too."""
    kinds = get_args(field.type) or (field.type,)
    return kinds[0], NoneType in kinds


# --- Files of requests --------------------------------------------------------------------------------------------


def parse_requests(path: str | Path) -> list[Request]:
    """Reads and checks a file of requests: `.jsonl`, `.csv` with a header, or `.parquet`, in UTF-8.

    Columns are the fields of `Request`, of which only `id` and `task` are needed. An empty cell, null, or in parquet
    NaN stands for the default. Paths of inputs are relative to the file's folder.

    Returns:
        The requests in the file's order, with absolute paths.
    Raises:
        ValueError: there is no such file, it has no requests, or one of them is malformed, wrong or has the id of
            another; the message names the file, the line or row, and the field.
    """
    path = Path(path)
    requests: list[Request] = []
    seen: dict[str, str] = {}
    for where, row in read_table(path, "requests"):
        try:
            request = _request(_typed(row, path.suffix), path.parent.resolve())
            require(request.id not in seen, "id", request.id, f"another one, since {seen.get(request.id)} has it")
        except ValueError as error:
            raise ValueError(f"{path}: {where}: {error}") from error
        seen[request.id] = where
        requests.append(request)
    require(len(requests) > 0, "requests", str(path), "a file with at least one request")
    return requests


def _typed(row: dict[str, Any], suffix: str) -> dict[str, Any]:
    """The values that the cells of a csv spell, and the whole numbers that pandas writes to parquet as floats."""
    typed = dict(row)
    for name in row.keys() & _FIELDS.keys():
        value, (kind, _) = row[name], _kind(_FIELDS[name])
        if suffix == ".csv" and value is not None:
            try:
                typed[name] = kind(value)
            except ValueError as error:
                raise ValueError(f"{name} is {value!r}, allowed: {_KINDS[kind]}") from error
        elif suffix == ".parquet" and kind is int and isinstance(value, float) and value.is_integer():
            typed[name] = int(value)
    return typed


def _request(row: dict[str, Any], folder: Path) -> Request:
    """The request of a row whose paths are relative to `folder`; None is a cell left empty."""
    for name in row:
        require(name in _FIELDS, "column", name, ", ".join(_FIELDS))
    given = {name: value for name, value in row.items() if value is not None}
    for name in ("id", "task"):
        require(name in given, name, None, "a text")
    for name in ("video", "last_video", "mask"):
        if given.get(name) and isinstance(given[name], str):
            given[name] = str(folder / given[name])
    return Request(**given)


# --- Generation ---------------------------------------------------------------------------------------------------


def generate(pipeline: STGenPipeline, request: Request) -> Iterator[Frames]:
    """Generates one video, which depends on nothing but the pipeline and the request.

    The frames come as they are decoded: memory holds the latents and the inputs that are given whole, never all frames.

    Args:
        pipeline: any of stgen's pipelines; its components are used as they are, where they are.

    Yields:
        Frames uint8 `n h w 3`, in order. Given pixels of inputs that need no resizing come back exactly.
    Raises:
        ValueError: an input cannot be read or doesn't fit, before the first frames; or frames are not finite, in their
            place.
    """
    kind, _ = TASKS[request.task]
    # Not from_pipe, which casts all components to one dtype.
    task_pipeline = kind(**pipeline.components)
    task_pipeline.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    takes_text = pipeline.transformer.config.text_dim is not None
    arguments: dict[str, Any] = {
        # None is what the other pipelines take for no prompt, and then they run without guidance; and a transformer
        # without text takes nothing else.
        "prompt": request.prompt if request.task == "text" and takes_text else request.prompt or None,
        "negative_prompt": request.negative_prompt or None,
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "num_inference_steps": request.num_inference_steps,
        "generator": torch.Generator().manual_seed(request.seed),
        "output_type": "stream",
    }
    if request.guidance_scale is not None:
        arguments["guidance_scale"] = request.guidance_scale
    if request.video is not None:
        arguments["video"] = read_video(request.video)[0].astype(np.float32) / 255
    if request.last_video is not None:
        arguments["last_video"] = read_video(request.last_video)[0].astype(np.float32) / 255
    if request.mask is not None:
        arguments["mask"] = _read_mask(request.mask, len(arguments["video"]))
    name, allowed = f"the video of request {request.id!r}", "finite pixels: weights or dtype are broken"
    with closing(task_pipeline(**arguments).frames) as chunks:
        for (frames,) in chunks:
            require(bool(np.isfinite(frames).all()), name, "not finite", allowed)
            yield (frames * 255).round().astype(np.uint8)


def _read_mask(path: str, num_frames: int) -> np.ndarray:
    """A mask file as float32 `t h w`, 1 where it is white; one picture is repeated for all frames."""
    pixels = read_video(path)[0]
    white = pixels.sum(axis=-1, dtype=np.uint16) >= 3 * 128
    return np.broadcast_to(white, (num_frames if len(white) == 1 else len(white), *white.shape[1:])).astype(np.float32)
