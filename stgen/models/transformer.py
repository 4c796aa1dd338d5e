"""STGenTransformer3DModel: one spatial-temporal diffusion transformer for every task.

Shapes: b batch, c channels, t h w the latent grid; after patching, tokens `b t s d` with s = h w and d = heads * head;
n text tokens; p the mask's channels (frames of one latent).

The model is a stack of blocks, each attention, cross-attention to the text and MLP, modulated by the timestep
(AdaLN-single). What makes a block spatial, temporal or full is only how its attention groups the same tokens.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from stgen.config import require
from stgen.masks import generated_cells
from stgen.models.loading import SafetensorsOnly

# --- Positions ----------------------------------------------------------------------------------------------------


def sincos_positions(length: int, dim: int, device: torch.device) -> Tensor:
    """Sine-cosine embedding of positions 0 .. length - 1, `length dim` (Vaswani et al. 2017, arXiv:1706.03762)."""
    frequency = 10000.0 ** (-torch.arange(dim // 2, device=device) / (dim // 2))
    angle = torch.arange(length, device=device)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def position_embedding(t: int, h: int, w: int, dim: int, device: torch.device) -> Tensor:
    """Absolute positions added to the tokens, `t s d`: 2D sin-cos in space plus 1D sin-cos in time, as in Latte."""
    half = dim // 2
    rows, columns = sincos_positions(h, half, device), sincos_positions(w, dim - half, device)
    space = torch.cat([rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)], dim=2)
    return sincos_positions(t, dim, device)[:, None] + space.flatten(0, 1)


def rotary_embedding(t: int, h: int, w: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 3D rotary positions, each `t s 1 (dim / 2)` (RoFormer, arXiv:2104.09864; axes as in Wan 2.1).

    Height and width take a third of the head's pairs each, time the rest.
    """
    pairs = dim // 2
    space = pairs // 3
    angles = []
    for length, count, view in ((t, pairs - 2 * space, (t, 1, 1)), (h, space, (1, h, 1)), (w, space, (1, 1, w))):
        frequency = 10000.0 ** (-torch.arange(count, device=device) / max(count, 1))
        angle = torch.arange(length, device=device)[:, None] * frequency
        angles.append(angle.view(*view, count).expand(t, h, w, count))
    angle = torch.cat(angles, dim=-1).view(t, h * w, 1, pairs)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the two halves of each head, `b t s heads head`, by the positions' angles."""
    cos, sin = (table.to(x.dtype) for table in rotary)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


# --- Attention as grouping ----------------------------------------------------------------------------------------

GROUPINGS = {
    "s": "b t s heads head -> (b t) s heads head",  # spatial: the tokens of a frame
    "t": "b t s heads head -> (b s) t heads head",  # temporal: one place through time
    "f": "b t s heads head -> b (t s) heads head",  # full 3D
}
"""How attention groups tokens into sequences, by the letter that stands for it in a pattern string."""


class STGenAttnProcessor:
    """Projects, groups and attends through diffusers' attention dispatcher, so that every backend of it works here."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "STGenAttention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        _, t, s, _ = hidden_states.shape
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)))
        k = attn.norm_k(attn.to_k(context).unflatten(-1, (attn.heads, -1)))
        v = attn.to_v(context).unflatten(-1, (attn.heads, -1))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        grouping = GROUPINGS[attn.grouping]
        if encoder_hidden_states is None:
            q, k, v = rearrange(q, grouping), rearrange(k, grouping), rearrange(v, grouping)
        else:
            q = rearrange(q, grouping)
        out = dispatch_attention_fn(q, k, v, attn_mask=attention_mask, backend=self._attention_backend)
        inverse = " -> ".join(reversed(grouping.split(" -> ")))
        out = rearrange(out, inverse, t=t, s=s).flatten(-2)
        return attn.to_out[1](attn.to_out[0](out))


class STGenAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention with RMS-normalised queries and keys, over one grouping of the tokens `b t s d`.

    With `cross_dim` it is cross-attention from all tokens to `b n cross_dim`.
    """

    _default_processor_cls = STGenAttnProcessor
    _available_processors = [STGenAttnProcessor]

    def __init__(self, dim: int, heads: int, grouping: str, cross_dim: int | None = None) -> None:
        super().__init__()
        self.heads, self.grouping = heads, grouping
        self.is_cross_attention = cross_dim is not None
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(cross_dim or dim, dim)
        self.to_v = nn.Linear(cross_dim or dim, dim)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Identity()])  # the shape that diffusers' LoRA expects
        self.set_processor(STGenAttnProcessor())

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, rotary)


# --- Block --------------------------------------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift: adaptive layer norm (Peebles & Xie 2022, arXiv:2212.09748)."""
    return x * (1 + scale) + shift


class STGenTransformerBlock(nn.Module):
    """Attention over one grouping, cross-attention to the text, MLP; AdaLN-single (PixArt-alpha, arXiv:2310.00426)."""

    def __init__(self, dim: int, heads: int, grouping: str, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.self_attn = STGenAttention(dim, heads, grouping)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = STGenAttention(dim, heads, "f", cross_dim=dim)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu")
        # Shift, scale and gate of the attention, then of the MLP, added to what the timestep asks of every block.
        self.scale_shift_table = nn.Parameter(torch.zeros(6, dim))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: "TokenModulation",
        rotary: tuple[Tensor, Tensor],
        encoder_attention_mask: Tensor | None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.for_tokens(self.scale_shift_table)
        x = hidden_states
        x = x + gate1 * self.self_attn(modulate(self.norm1(x), shift1, scale1), rotary=rotary)
        x = x + self.cross_attn(self.norm2(x), encoder_hidden_states, encoder_attention_mask)
        return x + gate2 * self.ff(modulate(self.norm3(x), shift2, scale2))


class TokenModulation:
    """What the timestep asks of each token: its own for generated tokens, that of t = 0 for given ones (Open-Sora 1.1)."""

    def __init__(self, at_time: Tensor, at_zero: Tensor | None, given: Tensor | None) -> None:
        """Args: at_time, at_zero: `b k d`; given: bool `b t s`, or None when every token is generated."""
        self.at_time, self.at_zero, self.given = at_time, at_zero, given

    def for_tokens(self, table: Tensor) -> tuple[Tensor, ...]:
        """The k modulations plus `table` `k d`, each broadcastable to `b t s d`."""
        table = table.to(self.at_time.dtype)  # the table is kept in fp32 when the rest is loaded in half precision
        at_time = (self.at_time + table)[:, :, None, None].unbind(1)
        if self.given is None or self.at_zero is None:
            return at_time
        at_zero = (self.at_zero + table)[:, :, None, None].unbind(1)
        given = self.given[..., None]
        return tuple(torch.where(given, zero, time) for zero, time in zip(at_zero, at_time, strict=True))


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
        pattern: groupings of the blocks' attention, cycled over the depth: `s` spatial, `t` temporal, `f` full.
        mlp_ratio: width of the MLP relative to d.
        text_dim: width of the text encoder's states.
        mask_channels: channels of the folded mask, which is the VAE's temporal compression; 0 switches the
            conditioning channels off.
        sample_frames, sample_height, sample_width: frames and pixels of the clips it was trained on, the pipelines'
            default size.

    Raises:
        ValueError: `pattern` has an unknown letter, or the head is too small for 3D rotary positions.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["STGenTransformerBlock"]
    _repeated_blocks = ["STGenTransformerBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "time_embed", "text_embed", "norm"]
    _keep_in_fp32_modules = ["time_embed", "scale_shift_table"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        patch_size: Sequence[int] = (1, 2, 2),
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        num_layers: int = 12,
        pattern: str = "st",
        mlp_ratio: float = 4.0,
        text_dim: int = 384,
        mask_channels: int = 4,
        sample_frames: int = 16,
        sample_height: int = 256,
        sample_width: int = 256,
    ) -> None:
        super().__init__()
        known = len(pattern) > 0 and set(pattern) <= set(GROUPINGS)
        require(known, "pattern", pattern, f"letters of {', '.join(GROUPINGS)}")
        fits = attention_head_dim >= 6 and attention_head_dim % 2 == 0
        require(fits, "attention_head_dim", attention_head_dim, "an even number of 6 or more, for 3D rotary positions")
        dim = num_attention_heads * attention_head_dim
        conditioning = in_channels + mask_channels if mask_channels else 0
        self.patch_embed = nn.Linear((in_channels + conditioning) * math.prod(patch_size), dim)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, dim)
        self.time_modulation = nn.Linear(dim, 6 * dim)
        self.text_embed = PixArtAlphaTextProjection(text_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            STGenTransformerBlock(dim, num_attention_heads, pattern[i % len(pattern)], mlp_ratio)
            for i in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        self.proj_out = nn.Linear(dim, in_channels * math.prod(patch_size))
        self.gradient_checkpointing = False
        self._initialize()

    def _initialize(self) -> None:
        """Every block begins as the identity and the model as zero (AdaLN-zero, Peebles & Xie 2022)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        zero = [self.time_modulation, self.proj_out, *(block.cross_attn.to_out[0] for block in self.transformer_blocks)]
        for linear in zero:
            nn.init.zeros_(linear.weight)

    def _patch(self, x: Tensor) -> Tensor:
        """`b c t h w -> b t (h w) (c pt ph pw)`, padded at the end to whole patches by repeating the border."""
        pt, ph, pw = self.config.patch_size
        t, h, w = x.shape[2:]
        if t % pt or h % ph or w % pw:
            x = F.pad(x, (0, -w % pw, 0, -h % ph, 0, -t % pt), mode="replicate")
        return rearrange(x, "b c (t pt) (h ph) (w pw) -> b t (h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)

    @staticmethod
    def insert_given(latents: Tensor, condition_latents: Tensor, condition_mask: Tensor) -> Tensor:
        """Puts the clean latents of the given cells in place of whatever `latents` `b c t h w` hold there."""
        return torch.where(generated_cells(condition_mask), latents, condition_latents)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        condition_latents: Tensor | None = None,
        condition_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts the velocity of the generated cells.

        Args:
            hidden_states: noisy latents `b c t h w`. Given cells may hold anything: the model sees
                `condition_latents` there.
            timestep: `b`, in [0, 1000], of the generated cells.
            encoder_hidden_states: text states `b n text_dim`.
            encoder_attention_mask: bool `b n`, true for real text tokens; None means all.
            condition_latents: latents of the masked video, `b c t h w`; None means that nothing is given.
            condition_mask: folded mask `b p t h w` in [0, 1], 0 = given; together with `condition_latents`.

        Returns:
            velocity `b c t h w`; its values at given cells have no meaning.

        Raises:
            ValueError: only one of the two conditions is passed, or a shape does not fit.
        """
        b, c, t, h, w = hidden_states.shape
        require(
            c == self.config.in_channels, "hidden_states.shape", (b, c, t, h, w), f"{self.config.in_channels} channels"
        )
        both = (condition_latents is None) == (condition_mask is None)
        require(both, "condition_mask", condition_mask, "given exactly when condition_latents is")
        p = self.config.mask_channels

        given = None
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
        if p:
            hidden_states = torch.cat([hidden_states, condition_latents, condition_mask.to(hidden_states.dtype)], dim=1)

        x = self._patch(hidden_states)
        pt, ph, pw = self.config.patch_size
        frames, rows, columns = x.shape[1], -(-h // ph), -(-w // pw)
        heads, head = self.config.num_attention_heads, self.config.attention_head_dim
        x = self.patch_embed(x)
        x = x + position_embedding(frames, rows, columns, heads * head, x.device).to(x.dtype)
        rotary = rotary_embedding(frames, rows, columns, head, x.device)

        # The frequencies are computed in fp32 whatever the weights' dtype; t = 0 is embedded once for given tokens.
        times = torch.stack([timestep.float(), torch.zeros_like(timestep, dtype=torch.float32)], dim=1)
        emb = self.time_embed(self.time_proj(times.flatten()).to(self.time_embed.linear_1.weight.dtype))
        emb = emb.to(x.dtype).view(b, 2, -1)
        per_block = self.time_modulation(F.silu(emb)).unflatten(-1, (6, -1))
        modulation = TokenModulation(per_block[:, 0], per_block[:, 1], given)

        text = self.text_embed(encoder_hidden_states)
        text_mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()[:, None, None, :]

        for block in self.transformer_blocks:
            arguments = (x, text, modulation, rotary, text_mask)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, *arguments)
            else:
                x = block(*arguments)

        final = TokenModulation(emb[:, :1].expand(-1, 2, -1), emb[:, 1:].expand(-1, 2, -1), given)
        shift, scale = final.for_tokens(self.scale_shift_table)
        x = self.proj_out(modulate(self.norm_out(x), shift, scale))
        x = rearrange(x, "b t (h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)", h=rows, w=columns, pt=pt, ph=ph, pw=pw)[
            :, :, :t, :h, :w
        ]
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)
