"""Training that begins with given weights, and training of some of them: whole, frozen in part, or by low-rank adapters.

A folder of weights is any that stgen writes: a pipeline, its `transformer/`, a run's export, or what `stgen convert` made
of a published checkpoint.
"""

import copy
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from torch import Tensor

from stgen.config import require
from stgen.models.loading import load_every_tensor
from stgen.models.transformer import STGenTransformer3DModel
from stgen.pipelines import STGenPipeline
from stgen.pretrained import find_pretrained

# --- Given weights ------------------------------------------------------------------------------------------------


def transformer_folder(folder: str | Path) -> Path:
    """Where a folder of weights has its transformer: in `transformer/`, or at its top.

    Raises:
        ValueError: there is none.
    """
    folder = Path(find_pretrained(folder))
    found = folder / "transformer" if (folder / "transformer").is_dir() else folder
    try:
        name = json.loads((found / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        allowed = "a pipeline folder, its transformer/, or a run's export"
        raise ValueError(f"init is {str(folder)!r}, allowed: {allowed}: {error}") from error
    require(name == STGenTransformer3DModel.__name__, f"init: _class_name in {found}", name, "STGenTransformer3DModel")
    return found


def saved_architecture(folder: str | Path) -> dict[str, Any]:
    """The arguments that the saved transformer was made with, as its config.json has them."""
    config = json.loads((transformer_folder(folder) / "config.json").read_text())
    return {name: value for name, value in config.items() if not name.startswith("_")}


def begin_with(model: STGenTransformer3DModel, folder: str | Path) -> None:
    """Puts saved weights into `model`: every tensor of both, or none.

    A model with conditioning channels takes weights of one without: the new columns of its `patch_embed` begin at zero, so
    that its output is that of the saved model whatever is given.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; one line lists all that are.
    """
    found = transformer_folder(folder)
    try:
        saved, report = STGenTransformer3DModel.from_pretrained(found, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"init: {found}: {str(error).splitlines()[0]}") from error
    for problem in ("missing_keys", "unexpected_keys"):
        allowed = "none: its config.json and its safetensors belong together"
        require(not report[problem], f"init: {problem} of {found}", sorted(report[problem]), allowed)
    weights = saved.state_dict()
    channels = model.config.in_channels + model.config.mask_channels
    if model.config.mask_channels and not saved.config.mask_channels:
        # The conditioning channels stand behind those of the latents.
        columns = channels * prod(model.config.patch_size)
        weights["patch_embed.weight"] = torch.nn.functional.pad(weights["patch_embed.weight"], (0, columns))
    load_every_tensor(model, weights, f"init: {found}")


# --- Which of them train ------------------------------------------------------------------------------------------


def _matching(names: Sequence[str], patterns: Iterable[str], argument: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        some = {name for name in names if fnmatchcase(name, pattern)}
        require(len(some) > 0, argument, pattern, f"a pattern of some parameter's name, such as {names[0]!r}")
        found |= some
    return found


def names_to_train(model: torch.nn.Module, frozen: Sequence[str] = (), trainable: Sequence[str] = ()) -> set[str]:
    """The names of the parameters that train: all but those that `frozen` matches, or those that `trainable` matches.

    Args:
        frozen, trainable: patterns as a shell has them, such as `patch_embed.*` or `*_attn.to_out.*`; one of the two at most.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    if trainable:
        return _matching(names, trainable, "trainable")
    left = set(names) - _matching(names, frozen, "frozen")
    require(len(left) > 0, "frozen", list(frozen), "patterns that leave something to train")
    return left


# --- Low-rank adapters --------------------------------------------------------------------------------------------


@dataclass
class LoRAConfig:
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W x + (alpha / rank) B A x, where A and B alone train."""

    rank: int = 16
    """Rows of A."""
    alpha: int = 16
    """`rank` times the scale of what the adapters add."""
    targets: list[str] = field(default_factory=lambda: ["to_qkv", "to_q", "to_kv", "to_out.0"])
    """Linear layers that get adapters, by the end of their names; by default those of all attentions."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "lora.rank", self.rank, "1 or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "above 0")
        require(len(self.targets) > 0, "lora.targets", self.targets, "at least one layer")
        require(find_spec("peft") is not None, "lora", vars(self), "null without stgen's extra `lora`")


def add_lora(model: STGenTransformer3DModel, config: LoRAConfig, seed: int) -> None:
    """Adds adapters, which change nothing yet (B = 0), and freezes all else.

    Raises:
        ValueError: a target names no linear layer.
    """
    from peft import LoraConfig

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in config.targets:
        known = any(f".{name}".endswith(f".{target}") for name in linear)
        ends = sorted({re.sub(r"^transformer_blocks\.\d+\.", "", name) for name in linear})
        require(known, "lora.targets", target, f"the end of a linear layer's name: {', '.join(ends)}")
    torch.manual_seed(seed)  # for A; every later draw has a generator of its own
    model.add_adapter(LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets)))


def lora_weights(model: STGenTransformer3DModel) -> dict[str, Tensor]:
    """The adapters by the names of diffusers' format, without a component's prefix."""
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def save_lora(model: STGenTransformer3DModel, folder: str | Path, variant: str | None = None) -> None:
    """Writes the adapters, rank and alpha included, as `pipeline.load_lora_weights` takes them: to the file that it looks for,
    or with a variant `raw` to pytorch_lora_weights.raw.safetensors beside it."""
    STGenPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=lora_weights(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        weight_name=LORA_WEIGHT_NAME_SAFE if variant is None else f"pytorch_lora_weights.{variant}.safetensors",
    )


def merged(model: STGenTransformer3DModel) -> STGenTransformer3DModel:
    """A copy of the model whose weights are W + (alpha / rank) B A, without adapters."""
    plain = copy.deepcopy(model)
    plain.fuse_lora()
    plain.unload_lora()
    return plain
