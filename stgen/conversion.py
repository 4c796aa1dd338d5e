"""Checkpoints of Open-Sora 1.0, 1.1 and 1.2, VDT and Latte as stgen folders, of the same output.

The tables below are the whole map: an original module or parameter, ours, and how its tensors change where they do,
`original [+ original] -> ours [: change]` with a function of this file. `{i}` counts blocks from 0, so do `{2i}` and
`{2i+1}`; ours is `-` for what the transformer computes itself (a checkpoint's copy must agree) or never reads. Every
tensor of a checkpoint is used and every parameter of ours is set, or the conversion fails with the name of the tensor.

Only at given frames do outputs differ, where they have no meaning: Open-Sora 1.1 and 1.2 modulate them twice in the last
layer.

Originals: github.com/hpcaitech/Open-Sora at v1.0.0 (opensora/models/stdit/stdit.py), v1.1.0 (stdit2.py) and v1.2.0
(stdit3.py); github.com/RERV/VDT (models.py); github.com/Vchitect/Latte (models/latte.py and latte_t2v.py).

Shapes: d width, n tokens of a text or of a table, c channels of the latents, pt ph pw the patch.
"""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stgen.config import load_config, require
from stgen.models.embeddings import sincos, space_positions
from stgen.models.latents import latent_channels, load_vae
from stgen.models.transformer import STGenTransformer3DModel
from stgen.objective import FlowConfig, make_scheduler
from stgen.pipelines import STGenPipeline
from stgen.text import load_text_encoder

# --- The map ------------------------------------------------------------------------------------------------------

OPEN_SORA = """
    x_embedder.proj                     -> patch_embed : patches
    t_embedder.mlp.0                    -> time_embed.mlp.linear_1
    t_embedder.mlp.2                    -> time_embed.mlp.linear_2
    t_block.1                           -> time_modulation
    y_embedder.y_proj.fc1               -> text_embed.linear_1
    y_embedder.y_proj.fc2               -> text_embed.linear_2
    y_embedder.y_embedding              -> null_text_embedding
    final_layer.scale_shift_table       -> scale_shift_table
"""

OPEN_SORA_BLOCK = """
    blocks.{i}.attn.qkv                 -> transformer_blocks.{i}.spatial_attn.to_qkv : heads_first
    blocks.{i}.attn.proj                -> transformer_blocks.{i}.spatial_attn.to_out.0
    blocks.{i}.attn_temp.qkv            -> transformer_blocks.{i}.temporal_attn.to_qkv : heads_first
    blocks.{i}.attn_temp.proj           -> transformer_blocks.{i}.temporal_attn.to_out.0
    blocks.{i}.cross_attn.q_linear      -> transformer_blocks.{i}.cross_attn.to_q
    blocks.{i}.cross_attn.kv_linear     -> transformer_blocks.{i}.cross_attn.to_kv : heads_first
    blocks.{i}.cross_attn.proj          -> transformer_blocks.{i}.cross_attn.to_out.0
    blocks.{i}.mlp.fc1                  -> transformer_blocks.{i}.ff.net.0.proj
    blocks.{i}.mlp.fc2                  -> transformer_blocks.{i}.ff.net.2
    final_layer.linear                  -> proj_out : channels_first
"""

OPEN_SORA_1_0 = f"""{OPEN_SORA}{OPEN_SORA_BLOCK}
    blocks.{{i}}.scale_shift_table      -> transformer_blocks.{{i}}.scale_shift_table : gate_twice
    pos_embed                           -> - : same_positions
    pos_embed_temporal                  -> - : same_times
"""

# Positions are not those of a table from here on; the original's loader drops a table that training began with.
OPEN_SORA_1_1 = f"""{OPEN_SORA}{OPEN_SORA_BLOCK}
    t_block_temp.1                      -> time_modulation_temporal
    csize_embedder.mlp.0                -> size_embed.side.mlp.linear_1
    csize_embedder.mlp.2                -> size_embed.side.mlp.linear_2
    ar_embedder.mlp.0                   -> size_embed.aspect.mlp.linear_1
    ar_embedder.mlp.2                   -> size_embed.aspect.mlp.linear_2
    fl_embedder.mlp.0                   -> size_embed.frames.mlp.linear_1
    fl_embedder.mlp.2                   -> size_embed.frames.mlp.linear_2
    fps_embedder.mlp.0                  -> size_embed.fps.mlp.linear_1
    fps_embedder.mlp.2                  -> size_embed.fps.mlp.linear_2
    blocks.{{i}}.attn.q_norm            -> transformer_blocks.{{i}}.spatial_attn.norm_q
    blocks.{{i}}.attn.k_norm            -> transformer_blocks.{{i}}.spatial_attn.norm_k
    blocks.{{i}}.attn_temp.q_norm       -> transformer_blocks.{{i}}.temporal_attn.norm_q
    blocks.{{i}}.attn_temp.k_norm       -> transformer_blocks.{{i}}.temporal_attn.norm_k
    blocks.{{i}}.scale_shift_table + blocks.{{i}}.scale_shift_table_temporal \
                                        -> transformer_blocks.{{i}}.scale_shift_table : insert_temporal
    rope.freqs                          -> - : same_rotary
    pos_embed                           -> - : unused
    pos_embed_temporal                  -> - : unused
"""

OPEN_SORA_1_2 = f"""{OPEN_SORA}
    fps_embedder.mlp.0                             -> size_embed.fps.mlp.linear_1
    fps_embedder.mlp.2                             -> size_embed.fps.mlp.linear_2
    spatial_blocks.{{i}}.attn.qkv                  -> transformer_blocks.{{2i}}.spatial_attn.to_qkv : heads_first
    spatial_blocks.{{i}}.attn.q_norm               -> transformer_blocks.{{2i}}.spatial_attn.norm_q
    spatial_blocks.{{i}}.attn.k_norm               -> transformer_blocks.{{2i}}.spatial_attn.norm_k
    spatial_blocks.{{i}}.attn.proj                 -> transformer_blocks.{{2i}}.spatial_attn.to_out.0
    spatial_blocks.{{i}}.cross_attn.q_linear       -> transformer_blocks.{{2i}}.cross_attn.to_q
    spatial_blocks.{{i}}.cross_attn.kv_linear      -> transformer_blocks.{{2i}}.cross_attn.to_kv : heads_first
    spatial_blocks.{{i}}.cross_attn.proj           -> transformer_blocks.{{2i}}.cross_attn.to_out.0
    spatial_blocks.{{i}}.mlp.fc1                   -> transformer_blocks.{{2i}}.ff.net.0.proj
    spatial_blocks.{{i}}.mlp.fc2                   -> transformer_blocks.{{2i}}.ff.net.2
    spatial_blocks.{{i}}.scale_shift_table         -> transformer_blocks.{{2i}}.scale_shift_table
    temporal_blocks.{{i}}.attn.qkv                 -> transformer_blocks.{{2i+1}}.temporal_attn.to_qkv : heads_first
    temporal_blocks.{{i}}.attn.q_norm              -> transformer_blocks.{{2i+1}}.temporal_attn.norm_q
    temporal_blocks.{{i}}.attn.k_norm              -> transformer_blocks.{{2i+1}}.temporal_attn.norm_k
    temporal_blocks.{{i}}.attn.proj                -> transformer_blocks.{{2i+1}}.temporal_attn.to_out.0
    temporal_blocks.{{i}}.cross_attn.q_linear      -> transformer_blocks.{{2i+1}}.cross_attn.to_q
    temporal_blocks.{{i}}.cross_attn.kv_linear     -> transformer_blocks.{{2i+1}}.cross_attn.to_kv : heads_first
    temporal_blocks.{{i}}.cross_attn.proj          -> transformer_blocks.{{2i+1}}.cross_attn.to_out.0
    temporal_blocks.{{i}}.mlp.fc1                  -> transformer_blocks.{{2i+1}}.ff.net.0.proj
    temporal_blocks.{{i}}.mlp.fc2                  -> transformer_blocks.{{2i+1}}.ff.net.2
    temporal_blocks.{{i}}.scale_shift_table        -> transformer_blocks.{{2i+1}}.scale_shift_table
    final_layer.linear                             -> proj_out : noise_minus_data
    rope.freqs                                     -> - : same_rotary
    pos_embed                                      -> - : unused
    pos_embed_temporal                             -> - : unused
"""

DIT = """
    x_embedder.proj                     -> patch_embed : patches
    t_embedder.mlp.0                    -> time_embed.mlp.linear_1
    blocks.{i}.mlp.fc1                  -> transformer_blocks.{i}.ff.net.0.proj
    blocks.{i}.mlp.fc2                  -> transformer_blocks.{i}.ff.net.2
    blocks.{i}.adaLN_modulation.1       -> transformer_blocks.{i}.modulation
    final_layer.adaLN_modulation.1      -> out_modulation
    final_layer.linear                  -> proj_out : channels_first
    pos_embed                           -> - : same_positions
"""

VDT = f"""{DIT}
    t_embedder.mlp.2 + y_embedder.embedding_table -> time_embed.mlp.linear_2 : add_class_0
    blocks.{{i}}.attn.qkv               -> transformer_blocks.{{i}}.spatial_attn.to_qkv : heads_first
    blocks.{{i}}.attn.proj              -> transformer_blocks.{{i}}.spatial_attn.to_out.0
    blocks.{{i}}.temporal_norm1         -> transformer_blocks.{{i}}.temporal_attn_norm
    blocks.{{i}}.temporal_attn.qkv      -> transformer_blocks.{{i}}.temporal_attn.to_qkv : heads_first
    blocks.{{i}}.temporal_attn.proj + blocks.{{i}}.temporal_fc \
                                        -> transformer_blocks.{{i}}.temporal_attn.to_out.0 : compose
    time_embed                          -> - : same_times
"""

LATTE = f"""{DIT}
    t_embedder.mlp.2                    -> time_embed.mlp.linear_2
    y_embedder.embedding_table          -> class_embed
    blocks.{{2i}}.attn.qkv              -> transformer_blocks.{{2i}}.spatial_attn.to_qkv : heads_first
    blocks.{{2i}}.attn.proj             -> transformer_blocks.{{2i}}.spatial_attn.to_out.0
    blocks.{{2i+1}}.attn.qkv            -> transformer_blocks.{{2i+1}}.temporal_attn.to_qkv : heads_first
    blocks.{{2i+1}}.attn.proj           -> transformer_blocks.{{2i+1}}.temporal_attn.to_out.0
    temp_embed                          -> - : same_times
"""

# The text-to-video model keeps diffusers' layout. It never reads y_embedding: no text is the empty prompt, encoded.
LATTE_TEXT = """
    pos_embed.proj                                   -> patch_embed : patches
    adaln_single.emb.timestep_embedder.linear_1      -> time_embed.mlp.linear_1
    adaln_single.emb.timestep_embedder.linear_2      -> time_embed.mlp.linear_2
    adaln_single.linear                              -> time_modulation
    caption_projection.linear_1                      -> text_embed.linear_1
    caption_projection.linear_2                      -> text_embed.linear_2
    transformer_blocks.{i}.attn1.to_q + transformer_blocks.{i}.attn1.to_k + transformer_blocks.{i}.attn1.to_v \
                                                     -> transformer_blocks.{2i}.spatial_attn.to_qkv : heads_first
    transformer_blocks.{i}.attn1.to_out.0            -> transformer_blocks.{2i}.spatial_attn.to_out.0
    transformer_blocks.{i}.attn2.to_q                -> transformer_blocks.{2i}.cross_attn.to_q
    transformer_blocks.{i}.attn2.to_k + transformer_blocks.{i}.attn2.to_v \
                                                     -> transformer_blocks.{2i}.cross_attn.to_kv : heads_first
    transformer_blocks.{i}.attn2.to_out.0            -> transformer_blocks.{2i}.cross_attn.to_out.0
    transformer_blocks.{i}.ff.net.0.proj             -> transformer_blocks.{2i}.ff.net.0.proj
    transformer_blocks.{i}.ff.net.2                  -> transformer_blocks.{2i}.ff.net.2
    transformer_blocks.{i}.scale_shift_table         -> transformer_blocks.{2i}.scale_shift_table
    temporal_transformer_blocks.{i}.attn1.to_q + temporal_transformer_blocks.{i}.attn1.to_k \
        + temporal_transformer_blocks.{i}.attn1.to_v -> transformer_blocks.{2i+1}.temporal_attn.to_qkv : heads_first
    temporal_transformer_blocks.{i}.attn1.to_out.0   -> transformer_blocks.{2i+1}.temporal_attn.to_out.0
    temporal_transformer_blocks.{i}.ff.net.0.proj    -> transformer_blocks.{2i+1}.ff.net.0.proj
    temporal_transformer_blocks.{i}.ff.net.2         -> transformer_blocks.{2i+1}.ff.net.2
    temporal_transformer_blocks.{i}.scale_shift_table -> transformer_blocks.{2i+1}.scale_shift_table
    scale_shift_table                                -> scale_shift_table
    proj_out                                         -> proj_out : channels_first
    caption_projection.y_embedding                   -> - : unused
    pos_embed.pos_embed                              -> - : same_positions
    temp_pos_embed                                   -> - : same_times
"""


@dataclass(frozen=True)
class Source:
    """An original: its map, the settings of our transformer that it is, and whether it samples by rectified flow.

    Settings that tensors can tell (depth, widths, ...) are read from them. `sample_*` are those of the original's own
    sampling configuration, with the 8 pixels of Stable Diffusion's VAE to a latent cell.
    """

    table: str
    settings: dict[str, Any]
    flow: bool = False


PLAIN = {"mlp": "gelu-approximate", "mask_channels": 0, "num_attention_heads": None, "qk_norm": None, "rope": None}
TEXT = {**PLAIN, "cross_norm": False}
OPEN_SORA_1_X = {**TEXT, "null_text": "learned", "rope": "time", "time_positions": None, "position_resolution": 512}
SAMPLE_16 = {"sample_frames": 16, "sample_height": 256, "sample_width": 256, "sample_fps": 8.0}

SOURCES = {
    "open-sora-1.0": Source(
        OPEN_SORA_1_0,
        {
            **TEXT,
            **SAMPLE_16,
            "sample_height": 512,
            "sample_width": 512,
            "null_text": "learned",
            "pattern": "[st]",
            "temporal_modulation": "gated",
            "time_positions": "attention",
            "space_scale": 1.0,
            "time_scale": 1.0,
        },
    ),
    "open-sora-1.1": Source(
        OPEN_SORA_1_1,
        {
            **OPEN_SORA_1_X,
            **SAMPLE_16,
            "sample_height": 240,
            "sample_width": 426,
            "pattern": "[st]",
            "qk_norm": "after_rotary",
            "size_conditioning": "size",
        },
    ),
    "open-sora-1.2": Source(
        OPEN_SORA_1_2,
        {
            **OPEN_SORA_1_X,
            "sample_frames": 51,
            "sample_height": 240,
            "sample_width": 426,
            "sample_fps": 24.0,
            "pattern": "st",
            "qk_norm": "before_rotary",
            "size_conditioning": "fps",
        },
        flow=True,
    ),
    "vdt": Source(
        VDT,
        {
            **PLAIN,
            **SAMPLE_16,
            "pattern": "[ts]",
            "modulation": "full",
            "temporal_modulation": "affine",
            "time_positions": "input",
            "text_dim": None,
        },
    ),
    "latte": Source(
        LATTE,
        {
            **PLAIN,
            **SAMPLE_16,
            "pattern": "st",
            "modulation": "full",
            "time_positions": "stream",
            "text_dim": None,
        },
    ),
}

LATTE_TEXT_TO_VIDEO = Source(
    LATTE_TEXT,
    {
        **TEXT,
        **SAMPLE_16,
        "sample_height": 512,
        "sample_width": 512,
        "pattern": "st",
        "time_positions": "stream",
        "cross_attention": ("spatial",),
        "position_grid": 32,
    },
)
"""What `latte` is when the checkpoint has its keys. `position_grid` is sample_size / patch / max(sample_size // 64, 1)."""

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1872: 26}
"""Heads of the published models by width, where nothing in the checkpoint tells."""


@dataclass
class Settings:
    """What tensors may leave open, `--set name=value`; by default what they do tell, or the published model's value."""

    num_attention_heads: int | None = None
    space_scale: float | None = None
    time_scale: float | None = None
    position_resolution: int | None = None
    position_grid: int | None = None
    sample_frames: int | None = None
    sample_height: int | None = None
    sample_width: int | None = None
    sample_fps: float | None = None


# --- Changes ------------------------------------------------------------------------------------------------------

Module = dict[str, Tensor]
"""Tensors by their name within a module, `weight` and `bias`; a parameter that is none of a module's is `""`."""


class Form(NamedTuple):
    """What changes need to know of the model."""

    heads: int
    channels: int
    """Of the latents; the output may have twice as many."""
    patch: tuple[int, int, int]
    config: dict[str, Any]


def each(change: Callable[[Tensor], Tensor], module: Module) -> Module:
    return {name: change(tensor) for name, tensor in module.items()}


def patches(form: Form, conv: Module) -> Module:
    """The kernel `d c [pt] ph pw` of a convolution over patches as a matrix, `d (c pt ph pw)`."""
    return {"weight": conv["weight"].flatten(1), "bias": conv["bias"]}


def heads_first(form: Form, *projections: Module) -> Module:
    """Rows of queries, keys, values, (k heads head), in one projection or in several -> (heads k head)."""
    joined = {name: torch.cat([module[name] for module in projections]) for name in projections[0]}
    d = joined["weight"].shape[1]
    return each(lambda x: rearrange(x, "(k n e) ... -> (n k e) ...", n=form.heads, e=d // form.heads), joined)


def channels_first(form: Form, linear: Module) -> Module:
    """Rows of the output, (pt ph pw c) -> (c pt ph pw)."""
    pt, ph, pw = form.patch
    return each(lambda x: rearrange(x, "(pt ph pw c) ... -> (c pt ph pw) ...", pt=pt, ph=ph, pw=pw), linear)


def noise_minus_data(form: Form, linear: Module) -> Module:
    """`channels_first`; and Open-Sora 1.2 predicts data - noise, ours is noise - data as in diffusers' schedulers.

    It also has twice the channels, and never reads the second half.
    """
    rows = form.channels * form.patch[0] * form.patch[1] * form.patch[2]
    return each(lambda x: -x[:rows], channels_first(form, linear))


def gate_twice(form: Form, table: Module) -> Module:
    """Temporal attention has the gate of spatial attention: the table's row 2 again."""
    return {"": table[""][[0, 1, 2, 2, 3, 4, 5]]}


def insert_temporal(form: Form, table: Module, temporal: Module) -> Module:
    """The rows of temporal attention between those of spatial attention and of the MLP."""
    return {"": torch.cat([table[""][:3], temporal[""], table[""][3:]])}


def compose(form: Form, first: Module, second: Module) -> Module:
    """Two linear layers after each other as one."""
    w, b = second["weight"].double(), second["bias"].double()
    merged = {"weight": w @ first["weight"].double(), "bias": w @ first["bias"].double() + b}
    return each(lambda x: x.to(first["weight"].dtype), merged)


def add_class_0(form: Form, linear: Module, table: Module) -> Module:
    """VDT adds class 0 to every time embedding, whatever the clip."""
    return {"weight": linear["weight"], "bias": linear["bias"] + table["weight"][0]}


def same_positions(form: Form, table: Module) -> None:
    """Checks 2D positions `[1] n d`."""
    token_grid(table[""], form.config)


def same_times(form: Form, table: Module) -> None:
    """Checks positions in time `[1] n d`."""
    rows = table[""].flatten(0, -2).float()
    ours = sincos(torch.arange(len(rows)) / form.config.get("time_scale", 1.0), rows.shape[1])
    _require_small("positions in time", rows - ours)


def same_rotary(form: Form, frequencies: Module) -> None:
    """Checks the frequencies of rotary positions, one a pair of channels."""
    pairs = len(frequencies[""])
    _require_small("rope.freqs", frequencies[""].float() - 10000.0 ** (-torch.arange(pairs) / pairs))


def unused(form: Form, module: Module) -> None:
    """The original doesn't read it."""


def _require_small(name: str, difference: Tensor) -> None:
    # Loose enough for tables kept in half precision, and far below the step between neighbours.
    off = float(difference.abs().max())
    require(
        off < 5e-3, f"the checkpoint's table of {name}", f"off by {off:.2g}", "the sine-cosine table of the original"
    )


def token_grid(table: Tensor, config: dict[str, Any]) -> tuple[int, int]:
    """(h, w) of a table of 2D positions `[1] n d`.

    Raises:
        ValueError: it isn't what our transformer computes for any h and w.
    """
    rows = table.flatten(0, -2).float()
    n, d = rows.shape
    differences = {}
    for h in (h for h in range(1, n + 1) if n % h == 0):
        w, grid = n // h, config.get("position_grid")
        steps = (grid / h, grid / w) if grid is not None else (1 / config.get("space_scale", 1.0),) * 2
        differences[h] = rows - space_positions(h, w, d, *steps, rows.device).flatten(0, 1)
    h = min(differences, key=lambda h: float(differences[h].abs().max()))
    _require_small("positions in space", differences[h])
    return h, n // h


def scale_of(table: Tensor) -> float:
    """What positions are divided by: 1 over the angle of the second row at frequency 1, `[1] n d` from 0 on."""
    row = table.flatten(0, -2)[1].double()
    angle = torch.atan2(row[0], row[len(row) // 2])
    # Scales are fractions such as 1/2 and 2/3; rounding takes away what precision added.
    return float(Fraction(float(1 / angle)).limit_denominator(12))


CHANGES: dict[str, Callable[..., Module | None]] = {
    change.__name__: change
    for change in (
        patches,
        heads_first,
        channels_first,
        noise_minus_data,
        gate_twice,
        insert_temporal,
        compose,
        add_class_0,
        same_positions,
        same_times,
        same_rotary,
        unused,
    )
}


# --- Reading ------------------------------------------------------------------------------------------------------

REWRITE = (
    "import sys, torch, safetensors.torch as s; "
    "d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "d = next((d[k] for k in ('ema', 'model', 'state_dict') if k in d), d); "
    "s.save_file({k: v.clone().contiguous() for k, v in d.items()}, sys.argv[2])"
)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a folder with one or with shards and their index.

    Raises:
        ValueError: there is none; for a pickle with the command by which its owner may rewrite it.
    """
    require(path.exists(), "checkpoint", str(path), "a file or folder that exists")
    files = [path]
    if path.is_dir():
        indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
        if indices:
            try:
                files = sorted({path / name for name in json.loads(indices[0].read_text())["weight_map"].values()})
            except (KeyError, AttributeError, ValueError) as error:
                raise ValueError(f"checkpoint: {indices[0]} is no index of shards: {error!r}") from error
        files = files or sorted(file for end in ("bin", "pt", "pth", "ckpt") for file in path.glob(f"*.{end}"))
        require(len(files) == 1 or bool(indices), "checkpoint", str(path), "a folder with one model.safetensors")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.suffix != ".safetensors":
            rewritten = shlex.join(["python", "-c", REWRITE, str(file), str(file.with_suffix(".safetensors"))])
            raise ValueError(f"checkpoint is {str(file)!r}, allowed: safetensors, nothing is unpickled. {rewritten}")
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"checkpoint is {str(file)!r}, allowed: safetensors: {error}") from error
    return tensors


# --- Conversion ---------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of a map for one block."""

    originals: list[str]
    ours: str
    change: str


def rows_of(table: str, num_layers: int) -> list[Row]:
    """The lines of a map, those with `{i}` once for each block."""
    found = []
    for line in filter(str.strip, table.splitlines()):
        left, _, right = line.partition("->")
        ours, _, change = right.partition(":")
        for i in range(num_layers if "{" in line else 1):
            originals = [_numbered(name.strip(), i) for name in left.split(" + ")]
            found.append(Row(originals, _numbered(ours.strip(), i), change.strip()))
    return found


def _numbered(name: str, i: int) -> str:
    return name.replace("{i}", str(i)).replace("{2i}", str(2 * i)).replace("{2i+1}", str(2 * i + 1))


def module_of(tensors: dict[str, Tensor], name: str) -> Module:
    """The tensors of a module, or a parameter itself; empty if there is none."""
    if name in tensors:
        return {"": tensors[name]}
    return {end: tensors[f"{name}.{end}"] for end in ("weight", "bias") if f"{name}.{end}" in tensors}


def config_of(source: Source, tensors: dict[str, Tensor], settings: Settings, what: str) -> dict[str, Any]:
    """The configuration of our transformer: the source's, what the tensors tell, and what the user sets.

    Args:
        what: how messages call the checkpoint.
    """
    asked = {name: value for name, value in vars(settings).items() if value is not None}
    for name in asked:
        allowed = [name for name in vars(settings) if name in source.settings]
        require(name in allowed, "set", name, ", ".join(allowed))

    blocks = {found[0] for key in tensors if (found := re.match(r"\w*blocks\.\d+\.", key))}
    originals: dict[str, str] = {}
    for row in rows_of(source.table, 2):
        originals.setdefault(row.ours, row.originals[0])

    def shape(ours: str) -> torch.Size:
        original = originals[ours]
        found = tensors.get(original, tensors.get(f"{original}.weight"))
        require(found is not None, "checkpoint", what, f"one with {original}.weight")
        assert found is not None
        return found.shape

    config = dict(source.settings)
    kernel = shape("patch_embed")
    require(len(kernel) in (4, 5), f"{originals['patch_embed']} of checkpoint {what}", tuple(kernel), "a convolution")
    d, c, *patch = kernel
    patch = [1, *patch] if len(patch) == 2 else patch
    config |= {"in_channels": c, "patch_size": tuple(patch), "num_layers": len(blocks)}
    config["mlp_ratio"] = shape("transformer_blocks.0.ff.net.0.proj")[0] / d
    if not source.flow:
        config["learn_sigma"] = shape("proj_out")[0] == 2 * c * patch[0] * patch[1] * patch[2]
    if "text_embed.linear_1" in originals:
        config["text_dim"] = shape("text_embed.linear_1")[1]
    if "null_text_embedding" in originals:
        config["text_tokens"] = shape("null_text_embedding")[0]
    if "class_embed" in originals and module_of(tensors, originals["class_embed"]):
        config["num_classes"] = shape("class_embed")[0] - 1

    heads = HEADS.get(d)
    if config["qk_norm"] is not None:
        heads = d // shape("transformer_blocks.0.spatial_attn.norm_q")[0]
    config["num_attention_heads"] = heads
    tables = {row.change: tensors[row.originals[0]] for row in rows_of(source.table, 1) if row.originals[0] in tensors}
    if (time := tables.get("same_times")) is not None:
        config["sample_frames"] = time.shape[-2] * patch[0]
        if "time_scale" in config and time.shape[-2] > 1:
            config["time_scale"] = scale_of(time)
    if (space := tables.get("same_positions")) is not None:
        if "space_scale" in config and space.shape[-2] > 1:
            half = space[..., : d // 2] if space.flatten(0, -2)[1, 0] != 0 else space[..., d // 2 :]  # one column
            config["space_scale"] = scale_of(half)
        h, w = token_grid(space, config | asked)
        config |= {"sample_height": 8 * h * patch[1], "sample_width": 8 * w * patch[2]}
    config |= asked
    heads = config["num_attention_heads"]
    fits = isinstance(heads, int) and heads > 0 and d % heads == 0
    require(fits, "num_attention_heads", heads, f"a divisor of the width {d}, by --set num_attention_heads=N")
    return config | {"attention_head_dim": d // heads}


def convert_transformer(
    name: str, tensors: dict[str, Tensor], settings: Settings, what: str
) -> tuple[STGenTransformer3DModel, Source]:
    """Our transformer with an original's weights.

    Args:
        name: a key of `SOURCES`.
        tensors: the original's state dict.
        what: how messages call the checkpoint.

    Returns:
        The transformer, and the source that the checkpoint turned out to be.
    Raises:
        ValueError: a tensor is missing, left over or of another shape, or a setting is missing or doesn't belong.
    """
    require(name in SOURCES, "from", name, ", ".join(SOURCES))
    source = SOURCES[name]
    if name == "latte" and any(key.startswith("temporal_transformer_blocks.") for key in tensors):
        source = LATTE_TEXT_TO_VIDEO
    # The original's loader drops these tables and believes its configuration; so is the user believed.
    scaled = {"pos_embed": settings.space_scale, "pos_embed_temporal": settings.time_scale}
    tensors = {key: tensor for key, tensor in tensors.items() if scaled.get(key) is None}
    config = config_of(source, tensors, settings, what)
    with torch.device("meta"):
        model = STGenTransformer3DModel(**config)
    expected = model.state_dict()
    form = Form(config["num_attention_heads"], config["in_channels"], config["patch_size"], config)

    left, state = set(tensors), dict[str, Tensor]()
    for row in rows_of(source.table, config["num_layers"]):
        modules = [module_of(tensors, original) for original in row.originals]
        wanted = module_of(expected, row.ours)
        if not any(modules) and not wanted:
            continue  # beyond the last block, or a part that this checkpoint has not
        for original, module in zip(row.originals, modules, strict=True):
            for end in wanted if original == row.originals[0] else ():
                key = f"{original}.{end}" if end else original
                require(end in module, "checkpoint", what, f"a checkpoint of {name}, which has {key}")
            require(len(module) > 0, "checkpoint", what, f"a checkpoint of {name}, which has {original}")
            left -= {f"{original}.{end}" if end else original for end in module}
        try:
            made = CHANGES[row.change](form, *modules) if row.change else modules[0]
        except (RuntimeError, KeyError, IndexError) as error:  # einops' error is a RuntimeError
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"checkpoint {what}: {row.originals[0]} is not that of {name}: {reason}") from error
        state |= {f"{row.ours}.{end}" if end else row.ours: x.contiguous() for end, x in (made or {}).items()}

    surplus = ", ".join(sorted(left)[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
    require(not left, "checkpoint", what, f"a checkpoint of {name}, which has no {surplus}")
    for key, tensor in expected.items():
        require(key in state, "checkpoint", what, f"a checkpoint of {name}, which has what becomes {key}")
        shapes = tuple(state[key].shape), tuple(tensor.shape)
        require(shapes[0] == shapes[1], f"{key} of checkpoint {what}", shapes[0], f"{shapes[1]}")
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval(), source


def convert(
    source: str,
    checkpoint: str | Path,
    out: str | Path,
    vae: str | Path | None = None,
    text_encoder: str | None = None,
    settings: Sequence[str] = (),
) -> None:
    """Writes `out/transformer` and `out/scheduler`; with a VAE and a text encoder a whole pipeline.

    The original's sampler is not converted: the scheduler is diffusers' of the same process. For the models that
    predict the noise that is DDIM over IDDPM's 1,000 linear betas, and for Open-Sora 1.2 rectified flow with the shift
    by resolution and latent frames (`stgen.flow.dynamic_shift`).

    Args:
        source: a key of `SOURCES`.
        checkpoint: safetensors, as `read_checkpoint` takes them.
        out: a new or empty folder.
        vae, text_encoder: both or neither, or for models without text the VAE alone.
        settings: `name=value`, fields of `Settings`.

    Raises:
        ValueError: whatever does not fit, before anything is written.
    """
    out = Path(out)
    require(source in SOURCES, "from", source, ", ".join(SOURCES))
    require(not out.exists() or (out.is_dir() and not any(out.iterdir())), "out", str(out), "a new or empty folder")
    parsed = load_config(Settings, overrides=settings)
    tensors = read_checkpoint(Path(checkpoint))
    model, made_from = convert_transformer(source, tensors, parsed, str(checkpoint))
    has_text = model.config.text_dim is not None
    if has_text:
        require((vae is None) == (text_encoder is None), "vae", vae, "given exactly when text_encoder is")
    require(has_text or text_encoder is None, "text_encoder", text_encoder, f"none, since this {source} has no text")

    scheduler = make_scheduler(FlowConfig(dynamic_shift=True))
    if not made_from.flow:
        # `linspace` is IDDPM's own spacing of fewer steps, first and last included.
        scheduler = DDIMScheduler(
            beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, timestep_spacing="linspace"
        )
    if vae is None:
        model.save_pretrained(out / "transformer")
        scheduler.save_pretrained(out / "scheduler")
        return
    autoencoder = load_vae(vae)
    channels = latent_channels(autoencoder)
    require(channels == model.config.in_channels, "latent channels of vae", channels, f"{model.config.in_channels}")
    tokenizer = encoder = None
    if text_encoder is not None:
        tokenizer, encoder = load_text_encoder(text_encoder)
        width = encoder.config.hidden_size
        require(width == model.config.text_dim, "width of text_encoder", width, f"{model.config.text_dim}")
    pipeline = STGenPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=autoencoder, transformer=model, scheduler=scheduler
    )
    pipeline.save_pretrained(out)
