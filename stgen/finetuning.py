"""Training that begins with given weights, and training of some of them: whole, frozen in part, or by low-rank adapters;
and words that a trained model confuses, told apart again.

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
import torch.nn.functional as F
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from torch import Tensor

from stgen.config import require
from stgen.models.attention import STGenCrossAttention
from stgen.models.loading import load_every_tensor
from stgen.models.transformer import STGenTransformer3DModel
from stgen.models.widening import widened
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
    that its output is that of the saved model whatever is given. One with twice the heads takes them `widened`.

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
    if model.config.num_attention_heads == 2 * saved.config.num_attention_heads:
        saved = widened(saved)
    weights = saved.state_dict()
    channels = model.config.in_channels + model.config.mask_channels
    if model.config.mask_channels and not saved.config.mask_channels:
        # The conditioning channels stand behind those of the latents.
        columns = channels * prod(model.config.patch_size)
        weights["patch_embed.weight"] = F.pad(weights["patch_embed.weight"], (0, columns))
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


# --- Words that it confuses ---------------------------------------------------------------------------------------


@torch.no_grad()
def separate_words(model: STGenTransformer3DModel, states: Tensor, kept: int, norm: float, seed: int = 0) -> None:
    """Gives words that the text projection has let fall together codes far apart; what the model makes of them is as before.

    What is learned first takes the projection over. In `moving_mnist_64`, after 709,000 images and 179,000 whole clips, its
    output had 99.99% of its variance in 9 of 128 directions, and 3 and 5 came out of it 1.6 apart where 0 and 1 were 50,
    though the text encoder has them 10 and 11 apart. Keys and values learn of words in proportion to such distances.

    The new projection has the old output in the `kept` directions of most energy. In the others, which keys and values
    are made blind to, it has random features of the states (Rahimi & Recht 2007), from which they can learn anew. Freeze
    it in the training that follows (`frozen=['text_embed.*']`): large steps would wear the new codes down.

    Args:
        states: `n d`, those of all tokens of captions as in training and of the null prompt (`STGenPipeline.encode_prompt`).
        kept: directions of the output that stay, and hidden units.
        norm: mean length of the new part of the output.

    Raises:
        ValueError: the model knows no text, or `kept` directions or units are too few to say what it says now.
    """
    projection = model.text_embed
    if projection is None:
        raise ValueError("model.text_embed is None, allowed: a model that is told text")
    layers = (projection.linear_1, projection.linear_2)
    dim = projection.linear_2.out_features
    require(1 <= kept < dim, "kept", kept, f"1 to {dim - 1}")
    require(norm > 0, "norm", norm, "above 0")
    generator, fresh = torch.Generator().manual_seed(seed), dim - kept
    x = states.double().cpu()
    w1, b1, w2, b2 = (weight.double().cpu() for layer in layers for weight in layer.parameters())

    hidden = projection.act_1(x @ w1.T + b1)
    old = hidden @ w2.T + b2
    free = torch.linalg.eigh(old.T @ old).eigenvectors[:, :fresh]  # the least energy first
    units: list[int] = []  # the hidden units from which the others follow best
    unexplained = torch.linalg.qr(hidden - hidden.mean(0)).R
    for _ in range(kept):
        energy = unexplained.square().sum(0)
        energy[units] = -1
        units.append(int(energy.argmax()))
        axis = F.normalize(unexplained[:, units[-1]], dim=0)
        unexplained = unexplained - axis[:, None] * (axis @ unexplained)

    # The first components of states say where in a caption a word stands more than which it is: half whitened.
    variance, axes = torch.linalg.eigh(torch.cov(x.T))
    some = variance > 1e-6 * variance.max()
    axes = (axes[:, some] * variance[some] ** -0.25)[:, -fresh:]
    turned = F.normalize(torch.randn(fresh, axes.shape[1], generator=generator).double()) @ axes.T
    turned *= 1.5 / (x @ turned.T).std(0)[:, None]
    bias = 0.5 * torch.randn(fresh, generator=generator).double() - turned @ x.mean(0)
    w1, b1 = torch.cat([w1[units], turned]), torch.cat([b1[units], bias])

    hidden = projection.act_1(x @ w1.T + b1)
    mean, target = hidden.mean(0), old - old @ free @ free.T
    hidden = hidden - mean
    ridge = 1e-6 * hidden.square().sum(0).mean() * torch.eye(dim).double()  # else huge weights that cancel out
    w2 = torch.linalg.solve(hidden.T @ hidden + ridge, hidden.T @ (target - target.mean(0))).T
    error = float((hidden @ w2.T + target.mean(0) - old).norm() / old.norm())
    require(error < 1e-3, "kept", kept, f"more: the old output would change by {error:.2g} of its length")
    w2[:, kept:] += norm / hidden[:, kept:].norm(dim=1).mean() * free
    b2 = target.mean(0) - w2 @ mean

    for layer, weight, bias in zip(layers, (w1, w2), (b1, b2), strict=True):
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    for module in model.modules():
        if isinstance(module, STGenCrossAttention):
            unread = free.to(module.to_kv.weight)
            module.to_kv.weight.sub_(module.to_kv.weight @ unread @ unread.T)


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
