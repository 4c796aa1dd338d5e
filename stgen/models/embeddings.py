"""What the transformer's tokens and its modulation are told: positions, sizes, the text.

Shapes: b batch, t h w the token grid, d the width, n text tokens.
"""

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from stgen.config import require

# --- Positions ----------------------------------------------------------------------------------------------------


def sincos(positions: Tensor, dim: int) -> Tensor:
    """Sine-cosine embedding `n dim` of positions `n` (Vaswani et al. 2017, arXiv:1706.03762)."""
    frequency = 10000.0 ** (-torch.arange(dim // 2, device=positions.device) / (dim // 2))
    angle = positions[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def space_positions(h: int, w: int, dim: int, row_step: float, column_step: float, device: torch.device) -> Tensor:
    """2D sine-cosine positions `h w dim`, the column in the first half of the channels, as in MAE, DiT and Latte.

    Args:
        row_step, column_step: distance of neighbouring tokens. Open-Sora 1.2 shrinks it as the resolution grows.
    """
    rows = sincos(torch.arange(h, device=device) * row_step, dim // 2)
    columns = sincos(torch.arange(w, device=device) * column_step, dim // 2)
    return torch.cat([columns[None].expand(h, w, -1), rows[:, None].expand(h, w, -1)], dim=2)


def resolution_step(h: int, w: int, height: float, width: float, base: int) -> tuple[float, float]:
    """Steps that put clips of all sizes on one map: sqrt(h w) / (h scale), scale = sqrt(height width) / base.

    Open-Sora 1.1 and 1.2's `PositionEmbedding2D`: the grid is stretched to a square of equal area, and a clip of twice
    the pixels covers the same positions in finer steps.

    Args:
        h, w: tokens.
        height, width: pixels.
        base: pixels at which the scale is 1.
    """
    scale = (height * width) ** 0.5 / base
    side = round((h * w) ** 0.5)
    return side / (h * scale), side / (w * scale)


# --- Sizes --------------------------------------------------------------------------------------------------------


class ScalarEmbedding(nn.Module):
    """Sinusoidal embedding and MLP of one number a clip, `b -> b d`: of the timestep (DiT), the fps or a size."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.frequencies = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(256, dim)

    def forward(self, x: Tensor) -> Tensor:
        # The frequencies are computed in fp32 whatever the weights' dtype.
        return self.mlp(self.frequencies(x.float()).to(self.mlp.linear_1.weight.dtype))


class SizeEmbedding(nn.Module):
    """What the modulation is told of a clip's size.

    `fps` is Open-Sora 1.2's: the rate, added to the time embedding. `size` is 1.1's: height, width and aspect ratio for
    whatever works within a frame, the number of frames and their rate for temporal attention.
    """

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.fps = ScalarEmbedding(dim)
        if kind == "size":
            require(dim % 3 == 0, "size_conditioning", kind, f"'fps', or a width divisible by 3 instead of {dim}")
            self.side = ScalarEmbedding(dim // 3)
            self.aspect = ScalarEmbedding(dim // 3)
            self.frames = ScalarEmbedding(dim)

    def forward(self, sizes: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """Embeddings `b d` for spatial and for temporal layers.

        Args:
            sizes: `b` numbers by name: fps in frames/s, and for `size` also num_frames, height and width in pixels.

        Raises:
            ValueError: one of them is missing.
        """
        for name in ("fps", "height", "width", "num_frames") if self.kind == "size" else ("fps",):
            require(
                sizes[name] is not None, name, None, f"a number for each clip, since size_conditioning is {self.kind!r}"
            )
        rate = self.fps(sizes["fps"])
        if self.kind == "fps":
            return rate, rate
        height, width = sizes["height"], sizes["width"]
        space = torch.cat([self.side(height), self.side(width), self.aspect(height / width)], dim=1)
        return space, self.frames(sizes["num_frames"]) + rate
