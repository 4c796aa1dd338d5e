"""The critic of adversarial VAE training: which patches of a video are real.

Shapes: b batch, c channels, t frames, h height, w width; video `b c t h w` in [-1, 1].
"""

from itertools import pairwise

from torch import Tensor, nn

from stgen.config import require


class PatchDiscriminator3d(nn.Module):
    """PatchGAN (Isola et al. 2016, arXiv:1611.07004) over space and time, as video autoencoders have it since MAGVIT
    (arXiv:2212.05199) and TATS (arXiv:2204.03638).

    Strided convolutions halve height and width `layers` times, and time as often as a clip has frames for; each score
    judges the patch below it. A video of one frame is judged like any other. Group norm sees one clip at a time:
    batch norm's statistics, which PatchGAN had, depend on how a batch is spread over processes.

    Args:
        channels: width of the first layer, a multiple of 8; it doubles, up to 8 times as wide.
        layers: how often height and width are halved.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [_halving(in_channels, channels), nn.LeakyReLU(0.2)]
        for narrow, wide in pairwise(widths[:-1]):
            blocks += [_halving(narrow, wide), nn.GroupNorm(wide // 8, wide), nn.LeakyReLU(0.2)]
        blocks += [nn.Conv3d(widths[-2], widths[-1], 3, padding=1), nn.GroupNorm(widths[-1] // 8, widths[-1])]
        blocks += [nn.LeakyReLU(0.2), nn.Conv3d(widths[-1], 1, 3, padding=1)]
        self.layers, self.smallest = nn.Sequential(*blocks), 2**layers
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, video: Tensor) -> Tensor:
        """Scores `b 1 t' h' w'`, higher for what looks real.

        Raises:
            ValueError: frames too small to be halved so often.
        """
        fits = min(video.shape[3:]) >= self.smallest
        require(fits, "video.shape", tuple(video.shape), f"height and width of {self.smallest} or more pixels")
        return self.layers(video)


def _halving(in_channels: int, out_channels: int) -> nn.Conv3d:
    # Kernel 3 in time keeps one frame one frame; kernel 4 in space, as PatchGAN's, meets every pixel equally often.
    return nn.Conv3d(in_channels, out_channels, (3, 4, 4), stride=2, padding=1)
