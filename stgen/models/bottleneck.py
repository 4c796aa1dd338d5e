"""The bottlenecks of the VAE: a Gaussian (KL), diffusers' `DiagonalGaussianDistribution`, or a finite set of codes (FSQ).

Shapes: latents `b z t h w`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stgen.config import require


class FiniteScalarCodes:
    """What `encode(x).latent_dist` is with FSQ: one certain value, under the names that a Gaussian has."""

    def __init__(self, codes: Tensor) -> None:
        self.mean = codes
        self.std = torch.zeros_like(codes)

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.mean


class FiniteScalarQuantizer(nn.Module):
    """Rounds each latent channel to one of a few levels in [-1, 1] (FSQ, Mentzer et al. 2023, arXiv:2309.15505).

    The codebook is the product of the levels: (8, 8, 8, 5, 5, 5) are 64,000 codes, about 16 bits, without a codebook to
    learn or to collapse.

    Args:
        levels: of each channel, 2 or more.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        require(len(levels) > 0 and min(levels) >= 2, "fsq_levels", tuple(levels), "numbers of 2 or more")
        self.levels = tuple(levels)
        self.codebook_size = math.prod(self.levels)

    def _per_channel(self, values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Any `b z t h w` -> codes; the gradient goes straight through the rounding.

        code = round(tanh(z + shift) (L - 1) / 2 - offset) / floor(L / 2), with offset 1/2 for even L, so that there are L
        levels, and shift such that 0 stays 0 before rounding. In float32, since bfloat16 has no 1.001 (L - 1) / 2.
        """
        dtype, z = z.dtype, z.float()
        half = self._per_channel([(level - 1) * (1 + 1e-3) / 2 for level in self.levels], z)
        offset = self._per_channel([0.5 if level % 2 == 0 else 0.0 for level in self.levels], z)
        bounded = (z + torch.atanh(offset / half)).tanh() * half - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        return (rounded / self._per_channel([level // 2 for level in self.levels], z)).to(dtype)

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Codes `b z t h w` -> their numbers `b t h w`, int64 from 0 to `codebook_size - 1`."""
        numbers = torch.zeros_like(codes[:, 0], dtype=torch.int64)
        for level, code in zip(self.levels, codes.unbind(1), strict=True):
            numbers = numbers * level + (code * (level // 2)).round().long() + level // 2
        return numbers

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The inverse of `codes_to_indices`, in float32.

        Raises:
            ValueError: a number is not in the codebook.
        """
        low, high = int(indices.min()), int(indices.max())
        known = low >= 0 and high < self.codebook_size
        require(known, "indices", (low, high), f"numbers from 0 to {self.codebook_size - 1}")
        codes = []
        for level in reversed(self.levels):
            codes.append((indices % level - level // 2).float() / (level // 2))
            indices = indices // level
        return torch.stack(codes[::-1], dim=1)
