"""Attention as grouping: every mixer of the transformer attends within groups of the same tokens.

Shapes: b batch, t h w the token grid, d = heads * head the width, n text tokens. Queries, keys and values are
`b t h w heads head`; a grouping splits them into `g l heads' head`, g groups of l tokens. Where a grouping leaves other
axes than its own side by side in memory they are counted as heads (heads' = w heads, ...), so that no copy is made.

A pattern string names the groupings block by block and is cycled over the depth:

    s t f         spatial (within a frame), temporal (one place through time), full 3D
    h w           axial: one column of a frame, one row of a frame
    g(2,4,4)      windows of 2 frames x 4 rows x 4 columns; G(2,4,4) the same, shifted by half a window (Swin, Open-Sora 1.3)
    k(4)          every 4th token, 4 interleaved groups; K(4) runs of 4 tokens, every 4th run (Open-Sora-Plan's Skiparse)
    [ts]          several attentions that share one MLP (VDT)
    s4 [ts]2      a number repeats what stands before it
"""

import copy
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from einops import rearrange
from torch import Tensor, nn

from stgen.config import require

Grid = tuple[int, int, int]
"""Tokens in t, h, w."""


# --- Groupings ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """Groups along whole axes: one einops equation."""

    name: str
    equation: str
    axes: str
    """Those of t, h, w that a group lies along."""

    @property
    def across_frames(self) -> bool:
        """Whether a token attends to other frames than its own; then queries and keys may have different frames."""
        return "t" in self.axes

    @property
    def apart(self) -> str:
        """Axes of b, t, h, w along which groups may be cut from each other."""
        return "".join(axis for axis in "bthw" if axis not in self.axes)

    def split(self, x: Tensor) -> Tensor:
        """`b t h w heads head -> g l heads' head`, a view wherever the memory layout of `x` allows."""
        return rearrange(x, self.equation)

    def join(self, x: Tensor, grid: Grid) -> Tensor:
        """The inverse of `split`."""
        t, h, w = grid
        known = {"b": 1, "t": t, "h": h, "w": w}
        left, right = self.equation.split(" -> ")
        grouped = {name: size for name, size in known.items() if name != "b"}
        return rearrange(x, f"{right} -> {left}", **grouped)

    def padded(self, grid: Grid) -> bool:
        """Whether `split` adds tokens."""
        return False


@dataclass(frozen=True)
class Windows:
    """Groups of neighbouring tokens (Swin, arXiv:2103.14030; in video: arXiv:2106.13230).

    Windows at the border are cut, not wrapped around: what Swin computes by a cyclic shift and a mask. A window that is
    larger than the grid is the grid, and is not shifted.
    """

    size: Grid
    shifted: bool
    name: str = "window"
    across_frames: bool = True
    apart: str = "b"

    def _padding(self, grid: Grid) -> tuple[Grid, list[int], list[int]]:
        """The windows' size in this grid, and the padding before and after each axis."""
        size = tuple(min(window, n) for window, n in zip(self.size, grid, strict=True))
        before = [
            window - window // 2 if self.shifted and window < n else 0 for window, n in zip(size, grid, strict=True)
        ]
        before = [p % window for p, window in zip(before, size, strict=True)]
        after = [-(n + p) % window for n, p, window in zip(grid, before, size, strict=True)]
        return (size[0], size[1], size[2]), before, after

    def split(self, x: Tensor) -> Tensor:
        size, before, after = self._padding((x.shape[1], x.shape[2], x.shape[3]))
        if any(before + after):
            pads = [0, 0, 0, 0]
            for axis in (2, 1, 0):
                pads += [before[axis], after[axis]]
            x = F.pad(x, pads)
        equation = "b (nt t) (nh h) (nw w) n e -> (b nt nh nw) (t h w) n e"
        return rearrange(x, equation, t=size[0], h=size[1], w=size[2])

    def join(self, x: Tensor, grid: Grid) -> Tensor:
        size, before, after = self._padding(grid)
        counts = [(n + p + q) // s for n, p, q, s in zip(grid, before, after, size, strict=True)]
        x = rearrange(
            x,
            "(b nt nh nw) (t h w) n e -> b (nt t) (nh h) (nw w) n e",
            **dict(zip(("nt", "nh", "nw"), counts, strict=True)),
            **dict(zip("thw", size, strict=True)),
        )
        t, h, w = (slice(p, p + n) for p, n in zip(before, grid, strict=True))
        return x[:, t, h, w]

    def padded(self, grid: Grid) -> bool:
        _, before, after = self._padding(grid)
        return any(before + after)


@dataclass(frozen=True)
class Skips:
    """Groups of every n-th token, or of every n-th run of n tokens, in raster order (Open-Sora-Plan, arXiv:2412.00131)."""

    n: int
    runs: bool
    name: str = "skip"
    across_frames: bool = True
    apart: str = "b"

    def _sizes(self, grid: Grid) -> tuple[int, int, int]:
        """Groups, tokens of a run and padding in this grid."""
        total = grid[0] * grid[1] * grid[2]
        n = min(self.n, total)
        run = n if self.runs else 1
        return n, run, -total % (n * run)

    def split(self, x: Tensor) -> Tensor:
        groups, run, pad = self._sizes((x.shape[1], x.shape[2], x.shape[3]))
        x = x.flatten(1, 3)
        x = F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x
        return rearrange(x, "b (l g r) n e -> (b g) (l r) n e", g=groups, r=run)

    def join(self, x: Tensor, grid: Grid) -> Tensor:
        groups, run, _ = self._sizes(grid)
        x = rearrange(x, "(b g) (l r) n e -> b (l g r) n e", g=groups, r=run)
        t, h, w = grid
        return x[:, : t * h * w].unflatten(1, (t, h, w))

    def padded(self, grid: Grid) -> bool:
        return self._sizes(grid)[2] > 0


Grouping = Axes | Windows | Skips


def group_mask(
    grouping: Grouping, grid: Grid, b: int, heads: int, given: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which keys each query may see: bool, broadcastable to `g heads' l l`; None where all are seen.

    Args:
        given: bool `b t h w`, tokens that see given tokens alone; None when there is no such rule.
    """
    mask = None
    if grouping.padded(grid):
        tokens = grouping.split(torch.ones(b, *grid, 1, 1, device=device)).bool()
        mask = tokens[:, None, None, :, 0, 0]
    if given is not None:
        places = (
            grouping.split(given[..., None, None].float())[..., 0].bool().transpose(1, 2)
        )  # g heads' l, of one head
        if places.shape[1] > 1:
            places = places.repeat_interleave(heads, dim=1)
        isolated = ~places[..., None] | places[..., None, :]
        mask = isolated if mask is None else isolated & mask
    # Padding attends to whatever there is, since a softmax over nothing would be NaN.
    return None if mask is None else mask | ~mask.any(dim=-1, keepdim=True)


AXES = {
    "s": Axes("spatial", "b t h w n e -> (b t) (h w) n e", axes="hw"),
    "t": Axes("temporal", "b t h w n e -> b t (h w n) e", axes="t"),
    "f": Axes("full", "b t h w n e -> b (t h w) n e", axes="thw"),
    "h": Axes("column", "b t h w n e -> (b t) h (w n) e", axes="h"),
    "w": Axes("row", "b t h w n e -> (b t h) w n e", axes="w"),
}
"""Groupings without arguments, by their letter."""

PREDFORMER = {
    "full": "f",
    "factorised space-time": "s{n}t{n}",
    "factorised time-space": "t{n}s{n}",
    "binary space-time": "st",
    "binary time-space": "ts",
    "triplet space-time-space": "sts",
    "triplet time-space-time": "tst",
    "quadruplet space-time-time-space": "stts",
    "quadruplet time-space-space-time": "tsst",
}
"""The nine factorisations of PredFormer (arXiv:2410.04733, fig. 3) as patterns; n is half of the depth."""


def parse_pattern(pattern: str) -> list[tuple[Grouping, ...]]:
    """The blocks that a pattern string names, each with its groupings.

    Raises:
        ValueError: it doesn't follow the grammar at the top of this file.
    """
    allowed = "letters of s, t, f, h, w, windows g(t,h,w) or G(t,h,w), skips k(n) or K(n), [..] around several, counts"
    unit = r"[stfhw]|[gG]\(\d+,\d+,\d+\)|[kK]\(\d+\)"
    text = pattern.replace(" ", "") if isinstance(pattern, str) else ""
    require(re.fullmatch(rf"(?:(?:{unit}|\[(?:{unit})+\])\d*)+", text) is not None, "pattern", pattern, allowed)
    blocks: list[tuple[Grouping, ...]] = []
    for item, count in re.findall(rf"({unit}|\[(?:{unit})+\])(\d*)", text):
        groupings = []
        for name in re.findall(unit, item):
            numbers = [int(number) for number in re.findall(r"\d+", name)]
            require(0 not in numbers, "pattern", pattern, "sizes of 1 or more")
            if name[0] in AXES:
                groupings.append(AXES[name[0]])
            elif name[0] in "gG":
                groupings.append(Windows((numbers[0], numbers[1], numbers[2]), shifted=name[0] == "G"))
            else:
                groupings.append(Skips(numbers[0], runs=name[0] == "K"))
        blocks += [tuple(groupings)] * int(count or 1)
    require(len(blocks) > 0, "pattern", pattern, allowed)
    return blocks


# --- Rotary positions ---------------------------------------------------------------------------------------------


def rotary_embedding(grid: Grid, head: int, axes: str, device: torch.device) -> Tensor:
    """Rotary positions as complex numbers of modulus 1, complex64 `t h w 1 (head / 2)` (RoFormer, arXiv:2104.09864).

    Args:
        axes: `3d` gives a third of the pairs each to height and width and the rest to time, as in Wan 2.1; `time` gives
            time all of them, as in Open-Sora 1.2.
    """
    pairs = head // 2
    space = pairs // 3 if axes == "3d" else 0
    angles = []
    for axis, count in enumerate((pairs - 2 * space, space, space)):
        frequency = 10000.0 ** (-torch.arange(count, device=device) / max(count, 1))
        angle = torch.arange(grid[axis], device=device)[:, None] * frequency
        shape = [1, 1, 1, count]
        shape[axis] = grid[axis]
        angles.append(angle.view(shape).expand(*grid, count))
    angle = torch.cat(angles, dim=-1)[:, :, :, None]
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotates neighbouring pairs of `b t h w heads head` by the positions' angles, in fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)


# --- Given tokens that attend to given tokens alone ---------------------------------------------------------------


class GivenCache:
    """Keys and values of given tokens, which attend to given tokens alone and so don't change between steps.

    Pass the same object to every step of one batch of clips: one mask, one text. The first step fills it, and it saves
    work where whole frames are given, the same ones in every clip of the batch; under other masks each step computes
    everything, to the same result.
    """

    def __init__(self) -> None:
        self.frames: tuple[Tensor, Tensor] | None = None
        """Indices of the given and of the generated frames; None under masks that say more than which frames."""
        self.keys_values: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        """By attention, those of the given frames, `b t h w heads head`."""
        self.filling = True
        """Whether the pass that runs is the one over the given frames."""

    def known(self, attn: "STGenAttention") -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Keys and values that only add to those at hand, `b t h w heads head`, and may be cut along `apart`."""
        adds = isinstance(attn.grouping, Axes) and attn.grouping.across_frames and not self.filling
        return self.keys_values[attn] if adds else (None, None)

    def of(self, attn: "STGenAttention", k: Tensor, v: Tensor) -> "GivenCache":
        """The filled cache of a piece of the tokens."""
        piece = copy.copy(self)
        piece.keys_values = {attn: (k, v)}
        return piece

    def gather(
        self, attn: "STGenAttention", q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What attends to what when only the given or only the generated frames are at hand.

        Returns:
            queries, keys, values, and which frames of the result are wanted, None for all.
        """
        if not attn.grouping.across_frames:
            return q, k, v, None
        assert self.frames is not None
        if self.filling:
            self.keys_values[attn] = (k.contiguous(), v.contiguous())  # not views that keep the queries alive
        else:
            known_k, known_v = self.keys_values[attn]
            k, v = torch.cat([known_k, k], dim=1), torch.cat([known_v, v], dim=1)
        if isinstance(attn.grouping, Axes):  # a set of keys, whatever their order
            return q, k, v, None
        # Windows and skips are about places: all frames stand in theirs, those that are not at hand as zeros.
        given, generated = self.frames
        own = given if self.filling else generated
        order = torch.cat([given, generated])
        places = given if self.filling else order
        q, k, v = (
            x.new_zeros(x.shape[0], len(order), *x.shape[2:]).index_copy(1, where, x)
            for x, where in ((q, own), (k, places), (v, places))
        )
        return q, k, v, own


# --- Token by token -----------------------------------------------------------------------------------------------


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; large ones in fp32 inference on a CPU by oneDNN instead of PyTorch's BLAS.

    With MKL as that BLAS, on an AMD EPYC, oneDNN is 5 to 10% faster. Sums are taken in another order. Backward,
    autocast, compilation and weights that are no plain tensors (quantised ones) take the usual way.
    """
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= 2**25  # multiplications; below, the call itself costs more than it saves
        and type(weight) in (Tensor, nn.Parameter)
        and torch.backends.mkldnn.is_available()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` by `product`."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "Linear":
        """The same layer with the same parameters, for one that diffusers built."""
        with torch.device("meta"):
            own = cls(linear.in_features, linear.out_features, linear.bias is not None)
        own.weight, own.bias = linear.weight, linear.bias
        return own

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


CHUNK = 512
"""Tokens whose MLP states stay in a CPU core's cache at the usual widths."""


def by_chunks(function: Callable[..., Any], x: Tensor, *rows: Tensor | None, apart: str = "bthw") -> Any:
    """`function(x, *rows)`, in inference on a CPU about `CHUNK` tokens at a time.

    Of a whole clip the MLP's states are tens of megabytes, and writing and reading those costs a third of its matrix
    products. The numbers are the same.

    Args:
        function: returns a tensor or a tuple of tensors, each `b t h w ...`.
        x: `b t h w d`.
        rows: each broadcastable to `b t h w ...`, or None.
        apart: the axes along which the function does not look, and `x` may be cut; all where it works token by token.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return function(x, *rows)
    whole = x.shape[:4]
    steps, tokens = list(whole), math.prod(whole)
    for axis, name in enumerate("bthw"):
        if name in apart and tokens > CHUNK:
            others = tokens // steps[axis]
            steps[axis] = max(1, CHUNK // others)
            tokens = others * steps[axis]
    if steps == list(whole):
        return function(x, *rows)
    out: tuple[Tensor, ...] | None = None
    for starts in itertools.product(*(range(0, n, step) for n, step in zip(whole, steps, strict=True))):
        # An axis that isn't cut stays as long as each row has it: known keys have other frames than `x`.
        piece = tuple(
            slice(start, start + step) if step < n else slice(None)
            for n, step, start in zip(whole, steps, starts, strict=True)
        )
        own = (
            None
            if row is None
            else row[tuple(s if n > 1 else slice(None) for n, s in zip(row.shape, piece, strict=False))]
            for row in rows
        )
        result = function(x[piece], *own)
        parts = result if isinstance(result, tuple) else (result,)
        out = out or tuple(x.new_empty(*whole, *part.shape[4:]) for part in parts)
        for target, part in zip(out, parts, strict=True):
            target[piece] = part
    assert out is not None
    return out if isinstance(result, tuple) else out[0]


def hooked(module: nn.Module) -> bool:
    """Whether something hangs on a module that expects one call a forward: a cache, an offload, a processor, a hook."""
    if isinstance(module, AttentionModuleMixin) and type(module.processor) is not module._default_processor_cls:
        return True
    return any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in module.modules())


# --- Attention ----------------------------------------------------------------------------------------------------


WRITTEN_OUT = 1024
"""Keys up to which scores are kept for backward: of four heads of 32 then about as much memory as a block's other states."""


def written_out_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head)) v as two matrix products of the dtype of `v`."""
    q = q * q.shape[-1] ** -0.5
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def dispatch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str | None) -> Tensor:
    """diffusers' `dispatch_attention_fn`, but for what is trained in half precision on a CPU.

    The backward of torch's fused attention in bfloat16 takes some 6 ms a call more there than in float32, however few the
    tokens. bfloat16 has it written out as two products up to `WRITTEN_OUT` keys, which is faster than either
    (tests/bench/half_precision.py). More keys, and float16, attend in float32.

    Args:
        q, k, v: `b l heads head`, l of the queries and of the keys.
        mask: bool, broadcastable to `b heads l l`, true for what is attended to; None means all.

    Returns:
        `b l heads head`, of the dtype of `v`.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)
    with torch.autocast("cpu", enabled=False):
        native = (backend or _AttentionBackendRegistry.get_active_backend()[0]) == AttentionBackendName.NATIVE
        if native and v.dtype == torch.bfloat16 and k.shape[1] <= WRITTEN_OUT:
            return written_out_attention(q, k, v, mask)
        single = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        out = dispatch_attention_fn(*single, attn_mask=mask, backend=backend)
    return out.to(v.dtype)


class STGenAttnProcessor:
    """Projects, groups and attends through diffusers' attention dispatcher, so that every backend of it works here."""

    _attention_backend = None

    def __call__(
        self,
        attn: "STGenAttention",
        hidden_states: Tensor,
        rotary: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: GivenCache | None = None,
    ) -> Tensor:
        rows = () if rotary is None else (rotary[None],)
        # A bare projection is one matrix product, better done at once.
        bare = attn.qk_norm is None and rotary is None
        q, k, v = attn.project(hidden_states) if bare else by_chunks(attn.project, hidden_states, *rows)
        frames = None
        if cache is not None:
            q, k, v, frames = cache.gather(attn, q, k, v)
        split = attn.grouping.split
        out = dispatch_attention(split(q), split(k), split(v), attention_mask, self._attention_backend)
        out = attn.grouping.join(out, (q.shape[1], q.shape[2], q.shape[3])).flatten(-2)
        out = out if frames is None else out[:, frames]
        return attn.to_out[1](attn.to_out[0](out))


class STGenAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention over one grouping of the tokens `b t h w d`.

    Query, key and value come from one projection whose rows are ordered (heads, 3, head): then each of the three is a
    view in which space and heads are neighbours, and temporal attention needs no copy.

    Args:
        qk_norm: RMS norm of each head's queries and keys `before_rotary` (Open-Sora 1.2), `after_rotary` (Open-Sora 1.1),
            or None.
    """

    _default_processor_cls = STGenAttnProcessor
    _available_processors = [STGenAttnProcessor]
    _supports_qkv_fusion = False  # they are one projection already
    is_cross_attention = False

    def __init__(self, dim: int, heads: int, grouping: Grouping, qk_norm: str | None) -> None:
        super().__init__()
        self.heads, self.grouping, self.qk_norm = heads, grouping, qk_norm
        self.to_qkv = Linear(dim, 3 * dim)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([Linear(dim, dim), nn.Identity()])  # the shape that diffusers' LoRA expects
        self.set_processor(STGenAttnProcessor())

    def project(self, x: Tensor, rotary: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `b t h w heads head` of tokens `b t h w d`; rotary `1 t h w 1 (head / 2)`."""
        q, k, v = self.to_qkv(x).unflatten(-1, (self.heads, 3, -1)).unbind(-2)
        if rotary is None:
            return self.norm_q(q), self.norm_k(k), v
        if self.qk_norm == "after_rotary":
            return self.norm_q(rotate(q, rotary)), self.norm_k(rotate(k, rotary)), v
        return rotate(self.norm_q(q), rotary), rotate(self.norm_k(k), rotary), v

    def forward(
        self,
        hidden_states: Tensor,
        rotary: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: GivenCache | None = None,
    ) -> Tensor:
        """Args: hidden_states `b t h w d`; rotary `t h w 1 (head / 2)`; attention_mask as `group_mask` gives it."""
        return self.processor(self, hidden_states, rotary, attention_mask, cache)


class STGenCrossAttnProcessor:
    """Attends from all tokens to the text."""

    _attention_backend = None

    def __call__(
        self,
        attn: "STGenCrossAttention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        k, v = attn.to_kv(encoder_hidden_states).unflatten(-1, (attn.heads, 2, -1)).unbind(-2)
        k = attn.norm_k(k)
        backend = self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        mask = None if attention_mask is None else attention_mask[:, None, None]

        def attend(x: Tensor, residual: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            q = attn.norm_q(attn.to_q(x).unflatten(-1, (attn.heads, -1)))
            out = dispatch_attention(q.flatten(1, 3), k, v, mask, backend)
            out = attn.to_out[1](attn.to_out[0](out.view(q.shape).flatten(-2)))
            return out if residual is None else residual + out

        masked = mask is not None and backend not in TAKE_A_MASK
        small = hidden_states[0].numel() <= CHUNK * hidden_states.shape[-1]
        if (small or hidden_states.device.type != "cpu") and not masked:
            return attend(hidden_states, residual, k, v, mask)
        folds = k.shape[1] <= k.shape[-1] and backend == AttentionBackendName.NATIVE and attn.foldable(hidden_states)
        clips = []
        for i, x in enumerate(hidden_states.split(1)):
            own = slice(i, i + 1)
            work: Callable[..., Tensor] = partial(attend, k=k[own], v=v[own], mask=None if mask is None else mask[own])
            if masked:  # each clip with its own tokens alone
                work = partial(attend, k=k[own, attention_mask[i]], v=v[own, attention_mask[i]], mask=None)
            elif folds:
                work = attn.fold(k[i], v[i], None if attention_mask is None else attention_mask[i])
            clips.append(by_chunks(work, x, None if residual is None else residual[own]))
        return clips[0] if len(clips) == 1 else torch.cat(clips)


class STGenCrossAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention from the tokens `b t h w d` to text `b n d`; `to_kv`'s rows are ordered (heads, 2, head)."""

    _default_processor_cls = STGenCrossAttnProcessor
    _available_processors = [STGenCrossAttnProcessor]
    _supports_qkv_fusion = False
    is_cross_attention = True

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(dim, dim)
        self.to_kv = Linear(dim, 2 * dim)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([Linear(dim, dim), nn.Identity()])
        self.set_processor(STGenCrossAttnProcessor())

    def foldable(self, x: Tensor) -> bool:
        """Whether keys may be multiplied into `to_q` and values into `to_out`, once a clip instead of once a token."""
        layers = (self.to_q, self.to_out[0])
        plain = all(type(layer) is Linear and type(layer.weight) is nn.Parameter for layer in layers)
        here = x.device.type == "cpu" and x.dtype == self.to_q.weight.dtype == torch.float32
        quiet = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        pays = x[0].numel() >= x.shape[-1] ** 2  # more tokens than channels
        return pays and plain and here and quiet and isinstance(self.norm_q, nn.Identity) and not hooked(self)

    def fold(self, k: Tensor, v: Tensor, mask: Tensor | None) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Attention to one clip's keys and values `n heads head` as softmax between two matrix products.

        With at most as many text tokens as a head is wide, two products of `d x heads n` are less work than `to_q`, `q k`,
        `p v` and `to_out`: (W_q x + b) k = (k W_q) x + k b, and W_o (p v) = (W_o v) p.
        """
        n, heads, head = k.shape
        query = self.to_q.weight.unflatten(0, (heads, head))
        weight = torch.einsum("nhe,hed->hnd", k * head**-0.5, query).flatten(0, 1)
        bias = torch.einsum("nhe,he->hn", k * head**-0.5, self.to_q.bias.view(heads, head))
        bias = bias if mask is None else bias.masked_fill(~mask, -math.inf)
        out = torch.einsum("dhe,nhe->dhn", self.to_out[0].weight.unflatten(1, (heads, head)), v).flatten(1)

        def attend(x: Tensor, residual: Tensor | None) -> Tensor:
            scores = product(x, weight, bias.flatten()).unflatten(-1, (heads, n))
            y = product(scores.softmax(dim=-1).flatten(-2), out, self.to_out[0].bias)
            return y if residual is None else residual + y

        return attend

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Args: attention_mask: bool `b n`, true for tokens, at least one a clip; None means all. residual `b t h w d`."""
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, residual)


# --- Backends -----------------------------------------------------------------------------------------------------

TAKE_A_MASK = (
    AttentionBackendName.NATIVE,
    AttentionBackendName.FLEX,
    AttentionBackendName._NATIVE_CUDNN,
    AttentionBackendName._NATIVE_EFFICIENT,
    AttentionBackendName._NATIVE_MATH,
    # Not xformers: diffusers hands it a boolean mask as a bias of ones and zeros.
)
"""Backends of diffusers' dispatcher that take a boolean mask; some of the others drop it without a word."""


def probe_backend(backend: str, heads: int, head: int, masked: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Runs a backend once on a few tokens, so that one which cannot run here is refused before it is used.

    With gradients enabled it must also run backward; set it under `torch.no_grad()` for inference alone.

    Raises:
        ValueError: the backend is unknown, not installed, cannot run with this device, dtype, head size or mask, or
            disagrees with PyTorch's own attention.
    """
    known = [name.value for name in AttentionBackendName]
    require(backend in known, "backend", backend, ", ".join(known))
    name = AttentionBackendName(backend)
    require(not masked or name in TAKE_A_MASK, "backend", backend, "one that takes masks, which this pattern needs")
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 128, heads, head, generator=generator).to(device, dtype)
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool, device=device).tril() if masked else None
    try:
        out = dispatch_attention_fn(q.requires_grad_(torch.is_grad_enabled()), k, v, attn_mask=mask, backend=name)
        if out.requires_grad:
            out.sum().backward()
        out = out.detach()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"backend is {backend!r}, which cannot run here ({device}, {dtype}): {reason}") from error
    q, k, v = (x.detach().transpose(1, 2).float() for x in (q, k, v))
    reference = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    off = (out.float() - reference).abs().max().item()
    require(off < 3e-2, "backend", backend, f"one that agrees with PyTorch's attention here; it is off by {off:.2g}")
