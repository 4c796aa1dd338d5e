"""STGenTransformer3DModel: one spatial-temporal diffusion transformer for every task.

Shapes: b batch, c channels; latents `b c t h w`; after patching, tokens `b t h w d` on the token grid, with
d = heads * head; n text tokens; p the mask's channels (frames of one latent).

The model is a stack of blocks, each one or more attentions, cross-attention to the text and an MLP, modulated by the
timestep. What makes an attention spatial, temporal or full is only how it groups the same tokens (see attention.py).
Open-Sora's STDiT, VDT, Latte and PredFormer are settings of it (see conversion.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from stgen.config import require
from stgen.masks import generated_cells
from stgen.models.attention import (
    CHUNK,
    Axes,
    GivenCache,
    Grouping,
    Linear,
    STGenAttention,
    STGenCrossAttention,
    by_chunks,
    group_mask,
    hooked,
    parse_pattern,
    probe_backend,
    rotary_embedding,
)
from stgen.models.embeddings import ScalarEmbedding, SizeEmbedding, resolution_step, sincos, space_positions
from stgen.models.loading import SafetensorsOnly

# --- Modulation ---------------------------------------------------------------------------------------------------

EPS = 1e-6


def adaptive_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) (1 + scale) + shift  (adaptive layer norm, Peebles & Xie 2022, arXiv:2212.09748).

    Args:
        x: `b t h w d`.
        shift, scale: broadcastable to it. On a CPU, where they are one row a clip, they become the norm's own weight and
            bias, which saves two passes over the tokens, unless clips are so small that calls cost more.
    """
    d = x.shape[-1]
    if x.device.type == "cpu" and shift[0].numel() == d and x[0].numel() >= CHUNK // 4 * d:
        rows = [F.layer_norm(y, (d,), 1 + a.view(d), b.view(d), EPS) for y, a, b in zip(x, scale, shift, strict=True)]
        return rows[0][None] if len(rows) == 1 else torch.stack(rows)
    return torch.addcmul(shift, F.layer_norm(x, (d,), eps=EPS), 1 + scale)


@dataclass
class Conditioning:
    """What modulates the tokens: that of the timestep for generated ones, that of t = 0 for given ones (Open-Sora 1.1).

    Index 0 of the axis of size 2 is the timestep's, index 1 that of t = 0; there is no index 1 when nothing is given.
    """

    given: Tensor | None
    """Which tokens are given, bool broadcastable to `b t h w 1`; None when none is."""
    time_positions: Tensor
    """`t 1 1 d`, for the first temporal attention, where that is the place they enter at."""
    embedding: Tensor | None = None
    """Full AdaLN: SiLU of the time embedding, `b 1|2 d`."""
    attention: Tensor | None = None
    """AdaLN-single: shift, scale and gate of every attention, `b 1|2 3 d`."""
    temporal: Tensor | None = None
    """AdaLN-single: those of temporal attention, which are others where it is told of other sizes."""
    mlp: Tensor | None = None
    """AdaLN-single: those of every MLP."""

    def per_token(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows `b 1|2 k d` as k tensors broadcastable to `b t h w d`."""
        at_time, *at_zero = rows[:, :, :, None, None, None].unbind(1)
        if self.given is None or not at_zero:
            return at_time.unbind(1)
        return tuple(
            torch.where(self.given, zero, time)
            for zero, time in zip(at_zero[0].unbind(1), at_time.unbind(1), strict=True)
        )


# --- Block --------------------------------------------------------------------------------------------------------

MODULATION_ROWS = {"adaptive": 3, "gated": 1, "affine": 0}
"""How an attention is modulated, and by how many rows: shift, scale and gate; the gate alone; nothing."""


class STGenTransformerBlock(nn.Module):
    """One or more attentions, cross-attention to the text, MLP.

    Args:
        groupings: one for each attention.
        modulation: `single`, a table added to what all blocks share (AdaLN-single, PixArt-alpha, arXiv:2310.00426); or
            `full`, a projection of the block's own (AdaLN, DiT and VDT).
        temporal: how temporal attention is modulated, a key of `MODULATION_ROWS`.
        time_positions: `stream` or `attention`, where the first temporal attention adds them; None in other blocks.
        rope: `3d`, `time` or None; `time` says nothing within a frame and is left out there.
        cross: whether the block attends to text.
        cross_norm: layer norm before that, and RMS norm of its queries and keys (Wan).
        mlp: `gelu`, `gelu-approximate` or `swiglu`, as diffusers names them.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        groupings: tuple[Grouping, ...],
        modulation: str,
        temporal: str,
        time_positions: str | None,
        rope: str | None,
        qk_norm: str | None,
        cross: bool,
        cross_norm: bool,
        mlp: str,
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        self.time_positions, self.rope = time_positions, rope
        names = [grouping.name for grouping in groupings]
        # Diffusers' cache hooks find attention by names that end in `attn`.
        self.names = [
            f"{name}_{names[:i].count(name) + 1}_attn" if name in names[:i] else f"{name}_attn"
            for i, name in enumerate(names)
        ]
        self.kinds = [temporal if name == "temporal" else "adaptive" for name in names]
        for name, kind, grouping in zip(self.names, self.kinds, groupings, strict=True):
            self.add_module(name, STGenAttention(dim, heads, grouping, qk_norm))
            if kind == "affine":
                self.add_module(f"{name}_norm", nn.LayerNorm(dim, eps=1e-5))
        self.cross_norm = nn.LayerNorm(dim, eps=EPS) if cross and cross_norm else nn.Identity()
        self.cross_attn = STGenCrossAttention(dim, heads, cross_norm and qk_norm is not None) if cross else None
        self.ff = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn=mlp)
        self.ff.net[0].proj, self.ff.net[2] = Linear.of(self.ff.net[0].proj), Linear.of(self.ff.net[2])
        rows = sum(MODULATION_ROWS[kind] for kind in self.kinds) + 3
        self.scale_shift_table = nn.Parameter(torch.zeros(rows, dim)) if modulation == "single" else None
        self.modulation = nn.Linear(dim, rows * dim) if modulation == "full" else None

    def _modulation(self, conditioning: Conditioning) -> Tensor:
        """The rows of this block, `b 1|2 k d`."""
        if self.modulation is not None:
            return self.modulation(conditioning.embedding).unflatten(-1, (-1, conditioning.embedding.shape[-1]))
        shared = []
        for name, kind in zip(self.names, self.kinds, strict=True):
            rows = conditioning.temporal if name.startswith("temporal") else conditioning.attention
            shared.append(rows[:, :, 3 - MODULATION_ROWS[kind] :])
        shared.append(conditioning.mlp)
        # The table is kept in fp32 when the rest is loaded in half precision.
        return torch.cat(shared, dim=2) + self.scale_shift_table.to(conditioning.mlp.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        conditioning: Conditioning,
        rotary: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        attention_masks: dict[Grouping, Tensor] | None = None,
        cache: GivenCache | None = None,
    ) -> Tensor:
        x, row = hidden_states, iter(conditioning.per_token(self._modulation(conditioning)))
        for name, kind in zip(self.names, self.kinds, strict=True):
            attn: STGenAttention = getattr(self, name)
            grouping = attn.grouping
            first = self.time_positions if grouping.name == "temporal" else None
            if first == "stream" and x.shape[1] == 1:  # a single image has no place in time, as in Latte
                first = None
            positions = None if first is None else conditioning.time_positions[None]
            table = rotary[None] if rotary is not None and (self.rope == "3d" or grouping.across_frames) else None
            mask = (attention_masks or {}).get(grouping)
            modulation = [None] * (3 - MODULATION_ROWS[kind]) + [next(row) for _ in range(MODULATION_ROWS[kind])]
            known = (None, None) if cache is None else cache.known(attn)
            attend = partial(self._attend, name, first, mask, cache)
            own = (x, positions, table, *modulation, *known)
            fills = cache is not None and grouping.across_frames and known[0] is None
            if mask is None and not fills and not hooked(attn):
                x = by_chunks(attend, *own, apart=grouping.apart)
            else:
                x = attend(*own)
        if self.cross_attn is not None:
            told = (self.cross_norm(x), encoder_hidden_states, encoder_attention_mask)
            x = x + self.cross_attn(*told) if hooked(self.cross_attn) else self.cross_attn(*told, x)
        if hooked(self.ff):
            return self._feed_forward(x, *row)
        return by_chunks(self._feed_forward, x, *row)

    def _attend(
        self,
        name: str,
        first: str | None,
        mask: Tensor | None,
        cache: GivenCache | None,
        x: Tensor,
        positions: Tensor | None,
        rotary: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        gate: Tensor | None,
        known_k: Tensor | None,
        known_v: Tensor | None,
    ) -> Tensor:
        """One attention and its residual, over whole groups."""
        if first == "stream":
            x = x + positions
        y = x
        if scale is not None:
            y = by_chunks(adaptive_norm, x, shift, scale)
        elif gate is None:
            y = getattr(self, f"{name}_norm")(x)
        if first == "attention":
            y = y + positions
        attn: STGenAttention = getattr(self, name)
        if cache is not None and known_k is not None and known_v is not None:
            cache = cache.of(attn, known_k, known_v)
        y = attn(y, None if rotary is None else rotary[0], mask, cache)
        return x + y if gate is None else torch.addcmul(x, gate, y)

    def _feed_forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(x, gate, self.ff(adaptive_norm(x, shift, scale)))


# FirstBlockCache, MagCache and the like find the tokens in a block's arguments and output by this.
TransformerBlockRegistry.register(STGenTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))


# --- Model --------------------------------------------------------------------------------------------------------


class STGenTransformer3DModel(SafetensorsOnly, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin):
    """Spatial-temporal diffusion transformer with mask conditioning, in the line of Open-Sora's STDiT, VDT and Latte.

    The mask enters in two ways. Given cells carry their clean latents at timestep 0, token by token; and the latents of
    the masked video and the folded mask are concatenated to the input channels, unless `mask_channels` is 0, which
    leaves the plain model. Latents of any t, h, w: padded to whole patches inside, cropped outside.

    Args:
        in_channels: latent channels of the VAE; the output has as many.
        patch_size: latent cells of one token in (t, h, w).
        num_attention_heads, attention_head_dim: their product is the width d.
        num_layers: number of blocks.
        pattern: groupings of the blocks' attention, cycled over the depth; its grammar stands in attention.py.
        mlp: `gelu`, `gelu-approximate` (tanh; four times slower on a CPU) or `swiglu` (PredFormer's gated block).
        mlp_ratio: width of the MLP relative to d.
        modulation: `single` (AdaLN-single: one projection of the timestep for all blocks and a table in each) or `full`
            (AdaLN: a projection in each).
        temporal_modulation: of temporal attention: `adaptive` as all others, `gated` without a norm (Open-Sora 1.0), or
            `affine`, an ordinary layer norm and no gate (VDT).
        qk_norm: RMS norm of queries and keys, `before_rotary` or `after_rotary` (Open-Sora 1.1), or None.
        rope: rotary positions `3d`, `time` or None.
        time_positions: where 1D sine-cosine positions in time are added: to the `input` tokens (VDT), to the `stream` at
            the first temporal attention (Latte), to the input of that `attention` alone (Open-Sora 1.0), or None.
        space_scale, time_scale: positions are divided by these.
        position_resolution: pixels of a side at which the step of the 2D positions is 1 and with which it scales
            (Open-Sora 1.1 and 1.2); None leaves the step alone.
        position_grid: tokens of a side to which the 2D positions are stretched (PixArt-alpha, Latte's text-to-video).
        size_conditioning: what else modulates: `fps` (Open-Sora 1.2), `size` (1.1: height, width, aspect ratio, frames
            and fps), or None.
        num_classes: class labels; one more class, the last, says nothing. None for none.
        text_dim: width of the text encoder's states; None for no text.
        cross_attention: names of groupings (`spatial`, ...) whose blocks attend to the text; None means every block.
        cross_norm: layer norm before cross-attention, and `qk_norm` in it.
        null_text: what stands for no text: the empty `prompt` encoded, a `learned` embedding, or `zero`.
        text_tokens: length of the learned one, the most tokens that a text may then have.
        mask_channels: channels of the folded mask, which is the VAE's temporal compression; 0 switches the
            conditioning channels off.
        isolate_given: given tokens attend to given tokens alone, so that a `GivenCache` can keep their keys and values.
        learn_sigma: the output has twice the channels, the second half about the variance (arXiv:2102.09672).
        sample_frames, sample_height, sample_width, sample_fps: frames, pixels and frames/s of the clips it was trained
            on, the pipelines' defaults.

    Raises:
        ValueError: an argument is not among those named here, or two don't go together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["STGenTransformerBlock"]
    _repeated_blocks = ["STGenTransformerBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "time_embed", "size_embed", "class_embed", "text_embed", "norm"]
    _keep_in_fp32_modules = ["time_embed", "size_embed", "scale_shift_table"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        patch_size: Sequence[int] = (1, 2, 2),
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        num_layers: int = 12,
        pattern: str = "st",
        mlp: str = "gelu",
        mlp_ratio: float = 4.0,
        modulation: str = "single",
        temporal_modulation: str = "adaptive",
        qk_norm: str | None = "before_rotary",
        rope: str | None = "3d",
        time_positions: str | None = "input",
        space_scale: float = 1.0,
        time_scale: float = 1.0,
        position_resolution: int | None = None,
        position_grid: int | None = None,
        size_conditioning: str | None = None,
        num_classes: int | None = None,
        text_dim: int | None = 384,
        cross_attention: Sequence[str] | None = None,
        cross_norm: bool = True,
        null_text: str = "prompt",
        text_tokens: int | None = None,
        mask_channels: int = 4,
        isolate_given: bool = False,
        learn_sigma: bool = False,
        sample_frames: int = 16,
        sample_height: int = 256,
        sample_width: int = 256,
        sample_fps: float = 24.0,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("mlp", mlp, ("gelu", "gelu-approximate", "swiglu")),
            ("modulation", modulation, ("single", "full")),
            ("temporal_modulation", temporal_modulation, tuple(MODULATION_ROWS)),
            ("qk_norm", qk_norm, ("before_rotary", "after_rotary", None)),
            ("rope", rope, ("3d", "time", None)),
            ("time_positions", time_positions, ("input", "stream", "attention", None)),
            ("size_conditioning", size_conditioning, ("fps", "size", None)),
            ("null_text", null_text, ("prompt", "learned", "zero")),
        ):
            require(value in allowed, name, value, ", ".join(str(choice) for choice in allowed))
        dim = num_attention_heads * attention_head_dim
        require(dim % 4 == 0, "num_attention_heads * attention_head_dim", dim, "a multiple of 4, for 2D positions")
        least = {"3d": 6, "time": 2, None: 1}[rope]
        fits = attention_head_dim >= least and (rope is None or attention_head_dim % 2 == 0)
        require(fits, "attention_head_dim", attention_head_dim, f"an even number of {least} or more, for rope {rope!r}")
        fits = size_conditioning != "size" or modulation == "single"
        require(fits, "size_conditioning", size_conditioning, "'fps' or None with full modulation")
        fits = null_text != "learned" or text_tokens is not None
        require(fits, "text_tokens", text_tokens, "a number of tokens, since null_text is 'learned'")
        fits = sum(option is not None for option in (position_resolution, position_grid)) + (space_scale != 1) <= 1
        require(fits, "position_grid", position_grid, "at most one of position_resolution, position_grid, space_scale")
        for name, number, least_number in (
            ("in_channels", in_channels, 1),
            ("num_layers", num_layers, 1),
            ("mask_channels", mask_channels, 0),
        ):
            require(number >= least_number, name, number, f"{least_number} or more")
        for name, factor in (("mlp_ratio", mlp_ratio), ("space_scale", space_scale), ("time_scale", time_scale)):
            require(factor > 0, name, factor, "above 0")
        fits = len(patch_size) == 3 and min(patch_size) >= 1
        require(fits, "patch_size", tuple(patch_size), "three numbers of 1 or more, in t, h, w")
        cycle = parse_pattern(pattern)
        blocks = [cycle[i % len(cycle)] for i in range(num_layers)]
        self.groupings = {grouping for groupings in blocks for grouping in groupings}
        self.only_axes = all(isinstance(grouping, Axes) for grouping in self.groupings)
        names = {grouping.name for grouping in self.groupings}
        for name, value in (("time_positions", time_positions), ("size_conditioning", size_conditioning)):
            fits = value not in ("stream", "attention", "size") or "temporal" in names
            require(fits, name, value, f"another value, since {num_layers} blocks of {pattern!r} have no t")
        fits = cross_attention is None or (len(cross_attention) > 0 and set(cross_attention) <= names)
        require(
            fits, "cross_attention", cross_attention, f"some of {', '.join(sorted(names))}, or None for every block"
        )

        conditioning = in_channels + mask_channels if mask_channels else 0
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.patch_embed = nn.Linear((in_channels + conditioning) * math.prod(patch_size), dim)
        self.time_embed = ScalarEmbedding(dim)
        self.size_embed = SizeEmbedding(dim, size_conditioning) if size_conditioning else None
        self.class_embed = nn.Embedding(num_classes + 1, dim) if num_classes is not None else None
        self.time_modulation = nn.Linear(dim, 6 * dim) if modulation == "single" else None
        self.time_modulation_temporal = nn.Linear(dim, 3 * dim) if size_conditioning == "size" else None
        self.text_embed = PixArtAlphaTextProjection(text_dim, dim) if text_dim is not None else None
        learned = null_text == "learned" and text_dim is not None
        self.null_text_embedding = (
            nn.Parameter(torch.randn(text_tokens, text_dim) * text_dim**-0.5) if learned else None
        )

        self.transformer_blocks = nn.ModuleList()
        placed = time_positions not in ("stream", "attention")
        for groupings in blocks:
            mine = {grouping.name for grouping in groupings}
            here = not placed and "temporal" in mine
            placed = placed or here
            block = STGenTransformerBlock(
                dim,
                num_attention_heads,
                groupings,
                modulation=modulation,
                temporal=temporal_modulation,
                time_positions=time_positions if here else None,
                rope=rope,
                qk_norm=qk_norm,
                cross=text_dim is not None and (cross_attention is None or not mine.isdisjoint(cross_attention)),
                cross_norm=cross_norm,
                mlp=mlp,
                mlp_ratio=mlp_ratio,
            )
            self.transformer_blocks.append(block)

        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim)) if modulation == "single" else None
        self.out_modulation = nn.Linear(dim, 2 * dim) if modulation == "full" else None
        self.proj_out = nn.Linear(dim, self.out_channels * math.prod(patch_size))
        self.gradient_checkpointing = False
        self._initialize()

    def _initialize(self) -> None:
        """Every block begins as the identity and the model as zero (AdaLN-zero, Peebles & Xie 2022)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # Query, key and value are drawn like three square matrices.
                gain = (sum(module.weight.shape) / (2 * module.in_features)) ** 0.5 if name.endswith("kv") else 1.0
                nn.init.xavier_uniform_(module.weight, gain)
                nn.init.zeros_(module.bias)
        zero = [self.proj_out, self.time_modulation, self.time_modulation_temporal, self.out_modulation]
        for block in self.transformer_blocks:
            zero += [block.modulation, block.cross_attn.to_out[0] if block.cross_attn is not None else None]
            pairs = zip(block.names, block.kinds, strict=True)
            zero += [getattr(block, name).to_out[0] for name, kind in pairs if kind == "affine"]
        for linear in zero:
            if linear is not None:
                nn.init.zeros_(linear.weight)

    def set_attention_backend(self, backend: str) -> None:
        """As diffusers' method of this name, after running the backend once on this device and dtype.

        Raises:
            ValueError: it cannot run here, or takes no mask where the pattern or `isolate_given` needs one.
        """
        masked = self.config.isolate_given or not self.only_axes
        heads, head = self.config.num_attention_heads, self.config.attention_head_dim
        probe_backend(backend, heads, head, masked, self.device, self.dtype)
        super().set_attention_backend(backend)

    # --- Inputs ---------------------------------------------------------------------------------------------------

    def _patch(self, x: Tensor, padding: float = 0.0) -> Tensor:
        """`b c t h w -> b t h w (c pt ph pw)`, padded at the end to whole patches."""
        pt, ph, pw = self.config.patch_size
        t, h, w = x.shape[2:]
        if t % pt or h % ph or w % pw:
            x = F.pad(x, (0, -w % pw, 0, -h % ph, 0, -t % pt), value=padding)
        return rearrange(x, "b c (t pt) (h ph) (w pw) -> b t h w (c pt ph pw)", pt=pt, ph=ph, pw=pw)

    @staticmethod
    def insert_given(latents: Tensor, condition_latents: Tensor, condition_mask: Tensor) -> Tensor:
        """Puts the clean latents of the given cells in place of whatever `latents` `b c t h w` hold there."""
        return torch.where(generated_cells(condition_mask), latents, condition_latents)

    def _tokens(
        self, hidden_states: Tensor, condition_latents: Tensor | None, condition_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Embedded tokens `b t h w d`, and which are given, bool `b t h w`."""
        b, _, t, h, w = hidden_states.shape
        p, given = self.config.mask_channels, None
        if condition_latents is not None and condition_mask is not None:
            fits = condition_latents.shape == hidden_states.shape
            require(fits, "condition_latents.shape", tuple(condition_latents.shape), f"{tuple(hidden_states.shape)}")
            fits = condition_mask.shape == (b, p or condition_mask.shape[1], t, h, w)
            require(fits, "condition_mask.shape", tuple(condition_mask.shape), f"{(b, p, t, h, w)}")
            generated = generated_cells(condition_mask)
            hidden_states = self.insert_given(hidden_states, condition_latents, condition_mask)
            # Wholly hidden cells say nothing, the same nothing that stands for "no condition" below.
            hidden = condition_mask.amin(dim=1, keepdim=True) >= 1
            condition_latents = condition_latents.masked_fill(hidden, 0)
            # A token is given when all of its cells are.
            given = ~self._patch(generated.to(hidden_states.dtype)).amax(-1).bool()
        elif p:
            condition_latents = torch.zeros_like(hidden_states)
            condition_mask = hidden_states.new_ones(b, p, t, h, w)
        x = self._patch(hidden_states)
        if p:
            # Cells of padding are hidden ones. The channels stand behind those of the latents: c, c, p.
            pair = [self._patch(condition_latents), self._patch(condition_mask.to(x.dtype), 1.0)]
            x = torch.cat([x, *pair], dim=-1)
        return self.patch_embed(x), given

    def _positions(self, x: Tensor, height: Tensor | None, width: Tensor | None) -> tuple[Tensor, Tensor]:
        """Absolute positions in space `h w d` and in time `t 1 1 d`."""
        _, t, h, w, d = x.shape
        steps = (1 / self.config.space_scale, 1 / self.config.space_scale)
        if self.config.position_resolution is not None:
            sizes = [("height", height), ("width", width)]
            for name, value in sizes:
                require(value is not None, name, None, "pixels of the clips, since positions scale with them")
            steps = resolution_step(h, w, float(height[0]), float(width[0]), self.config.position_resolution)
        if self.config.position_grid is not None:
            steps = (self.config.position_grid / h, self.config.position_grid / w)
        space = space_positions(h, w, d, *steps, x.device)
        time = sincos(torch.arange(t, device=x.device) / self.config.time_scale, d)
        return space.to(x.dtype), time.to(x.dtype)[:, None, None]

    def _conditioning(
        self,
        timestep: Tensor,
        given: Tensor | None,
        class_labels: Tensor | None,
        sizes: dict[str, Tensor | None],
        time_positions: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Conditioning, Tensor]:
        """What modulates the blocks, and what modulates the output, `b 1|2 2 d`."""
        times = timestep.float()[:, None]
        if given is not None:
            times = torch.cat([times, torch.zeros_like(times)], dim=1)
        b, k = times.shape
        emb = self.time_embed(times.flatten()).to(dtype).view(b, k, -1)
        if self.class_embed is not None:
            null = torch.full((b,), self.config.num_classes, device=times.device)
            emb = emb + self.class_embed(null if class_labels is None else class_labels)[:, None]
        space = time = emb
        if self.size_embed is not None:
            extra_space, extra_time = (x.to(dtype)[:, None] for x in self.size_embed(sizes))
            space, time = emb + extra_space, emb + extra_time
            if self.config.size_conditioning == "fps":
                emb = space
        if given is not None:
            # Whole frames are the common case, in which modulations are per frame and not per token.
            given = (given[:, :, :1, :1] if self._whole_frames(given) else given)[..., None]
        if self.out_modulation is not None:
            blocks = Conditioning(given, time_positions, embedding=F.silu(space))
            return blocks, self.out_modulation(F.silu(emb)).unflatten(-1, (2, -1))
        assert self.time_modulation is not None
        assert self.scale_shift_table is not None
        attention, mlp = self.time_modulation(F.silu(space)).unflatten(-1, (6, -1)).chunk(2, dim=2)
        temporal = attention
        if self.time_modulation_temporal is not None:
            temporal = self.time_modulation_temporal(F.silu(time)).unflatten(-1, (3, -1))
        blocks = Conditioning(given, time_positions, attention=attention, temporal=temporal, mlp=mlp)
        return blocks, emb[:, :, None] + self.scale_shift_table.to(dtype)

    def _text(
        self, states: Tensor | None, mask: Tensor | None, drop: Tensor | None, b: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Projected text `b n d` and its mask bool `b n`."""
        if self.text_embed is None:
            return None, None
        require(states is not None, "encoder_hidden_states", None, "text states `b n text_dim`")
        if mask is not None and mask.ndim == 1:
            # Packed: the tokens of all clips follow each other, and the mask says how many each has.
            fits = states.shape[0] == 1 and len(mask) == b and int(mask.sum()) == states.shape[1]
            require(fits, "encoder_attention_mask", mask.tolist(), f"{b} lengths that add up to {states.shape[1]}")
            rows = states[0].split(mask.tolist())
            states = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            mask = torch.arange(states.shape[1], device=mask.device) < mask[:, None]
        if drop is not None and self.config.null_text != "prompt":
            null = torch.zeros_like(states[:1])
            if self.null_text_embedding is not None:
                n, longest = states.shape[1], len(self.null_text_embedding)
                require(
                    n <= longest, "encoder_hidden_states", f"{n} tokens", f"at most {longest}, those of the null text"
                )
                null = self.null_text_embedding[None, :n].to(states.dtype)
            states = torch.where(drop[:, None, None], null, states)
        return self.text_embed(states), None if mask is None else mask.bool()

    # --- Forward --------------------------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        condition_latents: Tensor | None = None,
        condition_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        drop_text: Tensor | None = None,
        fps: Tensor | None = None,
        num_frames: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        given_cache: GivenCache | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts the velocity, or what the objective asks for, of the generated cells.

        Args:
            hidden_states: noisy latents `b c t h w`. Given cells may hold anything: the model sees
                `condition_latents` there.
            timestep: `b`, in [0, 1000], of the generated cells.
            encoder_hidden_states: text states `b n text_dim`; or packed, `1 sum(n) text_dim`.
            encoder_attention_mask: bool `b n`, true for real text tokens, None means all; for packed states the lengths,
                integers `b`.
            condition_latents: latents of the masked video, `b c t h w`; None means that nothing is given.
            condition_mask: folded mask `b p t h w` in [0, 1], 0 = given; together with `condition_latents`.
            class_labels: integers `b` in [0, num_classes]; None means the class that says nothing.
            drop_text: bool `b`, clips whose text is replaced by the null text; without one of its own (`null_text` is
                `prompt`) the model leaves that to the caller.
            fps, num_frames, height, width: `b` numbers, frames/s, frames and pixels, where the configuration asks for
                them. Positions scale with the first clip's height and width, as in Open-Sora.
            given_cache: kept over the steps of one batch with one text and one mask when `isolate_given`.

        Returns:
            prediction `b c t h w` (`b 2c t h w` with `learn_sigma`); its values at given cells have no meaning.

        Raises:
            ValueError: only one of the two conditions is passed, a shape does not fit, or something is missing.
        """
        b, c, t, h, w = hidden_states.shape
        shape = (b, c, t, h, w)
        require(c == self.config.in_channels, "hidden_states.shape", shape, f"{self.config.in_channels} channels")
        both = (condition_latents is None) == (condition_mask is None)
        require(both, "condition_mask", condition_mask, "given exactly when condition_latents is")
        caching = given_cache is not None
        require(not caching or self.config.isolate_given, "given_cache", given_cache, "only with isolate_given")
        fits = not caching or not self.is_cache_enabled
        require(fits, "given_cache", given_cache, "None while another cache is enabled")
        require(not caching or not torch.is_grad_enabled(), "given_cache", given_cache, "None where gradients are kept")
        require(tuple(timestep.shape) == (b,), "timestep.shape", tuple(timestep.shape), f"{(b,)}, one a clip")

        x, given = self._tokens(hidden_states, condition_latents, condition_mask)
        grid = (x.shape[1], x.shape[2], x.shape[3])
        space, time = self._positions(x, height, width)
        x = x + space
        if self.config.time_positions == "input":
            x = x + time
        rotary = None
        if self.config.rope is not None:
            rotary = rotary_embedding(grid, self.config.attention_head_dim, self.config.rope, x.device)
        sizes = {"fps": fps, "num_frames": num_frames, "height": height, "width": width}
        conditioning, out_rows = self._conditioning(timestep, given, class_labels, sizes, time, x.dtype)
        text, text_mask = self._text(encoder_hidden_states, encoder_attention_mask, drop_text, b)

        isolated = given if self.config.isolate_given else None
        if given_cache is not None and isolated is not None:
            x = self._blocks_with_cache(x, text, text_mask, conditioning, rotary, isolated, given_cache)
        else:
            x = self._blocks(x, text, text_mask, conditioning, rotary, self._masks(grid, b, isolated, x.device))

        shift, scale = conditioning.per_token(out_rows)
        x = self.proj_out(adaptive_norm(x, shift, scale))
        pt, ph, pw = self.config.patch_size
        x = rearrange(x, "b t h w (c pt ph pw) -> b c (t pt) (h ph) (w pw)", pt=pt, ph=ph, pw=pw)[:, :, :t, :h, :w]
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)

    def _masks(
        self, grid: tuple[int, int, int], b: int, given: Tensor | None, device: torch.device
    ) -> dict[Grouping, Tensor | None]:
        """The mask of each grouping; `given` bool `b t h w` are tokens that attend to given ones alone."""
        heads = self.config.num_attention_heads
        # Where whole frames are given, no frame holds tokens of both kinds.
        mixed = given is not None and not self._whole_frames(given)
        return {
            grouping: group_mask(grouping, grid, b, heads, given if mixed or grouping.across_frames else None, device)
            for grouping in self.groupings
        }

    @staticmethod
    def _whole_frames(given: Tensor) -> bool:
        """Whether frames of `b t h w` are given wholly or not at all; in a compiled graph, where asking breaks it, no."""
        return not torch.compiler.is_compiling() and bool((given == given[:, :, :1, :1]).all())

    def _blocks(
        self,
        x: Tensor,
        text: Tensor | None,
        text_mask: Tensor | None,
        conditioning: Conditioning,
        rotary: Tensor | None,
        masks: dict[Grouping, Tensor | None],
        cache: GivenCache | None = None,
    ) -> Tensor:
        for block in self.transformer_blocks:
            arguments = (x, text, conditioning, rotary, text_mask, masks, cache)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, *arguments)
            else:
                x = block(*arguments)
        return x

    def _blocks_with_cache(
        self,
        x: Tensor,
        text: Tensor | None,
        text_mask: Tensor | None,
        conditioning: Conditioning,
        rotary: Tensor | None,
        given: Tensor,
        cache: GivenCache,
    ) -> Tensor:
        """The blocks over the generated frames alone, after one pass over the given ones that fills the cache.

        The result has zeros in the given frames.
        """
        b, frames, h, w, _ = x.shape
        whole = given[:1, :, :1, :1]
        if cache.frames is None:
            some = 0 < int(whole.sum()) < frames
            if not some or not bool((given == whole).all()):  # not the same whole frames in every clip
                masks = self._masks((frames, h, w), b, given, x.device)
                return self._blocks(x, text, text_mask, conditioning, rotary, masks)
        elif not torch.equal(whole.flatten().nonzero()[:, 0], cache.frames[0]):
            raise ValueError(
                f"given_cache was filled with frames {cache.frames[0].tolist()}, allowed: one mask a cache"
            )

        def over(frames_: Tensor, isolated: Tensor | None) -> Tensor:
            """The blocks over some frames; windows and skips see all places, and along axes there are no others."""
            masks = {} if self.only_axes else self._masks((frames, h, w), b, isolated, x.device)
            masks = {grouping: mask for grouping, mask in masks.items() if not isinstance(grouping, Axes)}
            known = None if isolated is None or conditioning.given is None else conditioning.given[:, frames_]
            some = replace(conditioning, given=known, time_positions=conditioning.time_positions[frames_])
            turn = None if rotary is None else rotary[frames_]
            return self._blocks(x[:, frames_], text, text_mask, some, turn, masks, cache)

        if cache.frames is None:
            cache.frames = (whole.flatten().nonzero()[:, 0], (~whole).flatten().nonzero()[:, 0])
            cache.filling = True
            over(cache.frames[0], given)
            cache.filling = False
        generated = cache.frames[1]
        return torch.zeros_like(x).index_copy(1, generated, over(generated, None))
