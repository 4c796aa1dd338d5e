"""Averaged weights: their arithmetic, and what each process holds and saves of them."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import tiny_transformer
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from stgen.averaging import AveragedWeights, power_decay, power_gamma


def walk(model: torch.nn.Module, step: int) -> None:
    """A step of random weights, a function of its number alone."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def test_the_exponential_average_is_diffusers_to_the_bit() -> None:
    model = tiny_transformer()
    averaged = AveragedWeights(model, decay=0.9)
    reference = EMAModel(model.parameters(), decay=0.9, use_ema_warmup=True, power=0.75, foreach=True)
    for step in range(1, 40):
        walk(model, step)
        averaged.update(step, 4 * step, 4)
        reference.step(model.parameters())
    for value, expected in zip(averaged.state_dict().values(), reference.shadow_params, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_a_power_average_has_the_width_it_is_named_by(width: float) -> None:
    """The weights that the updates give to 1, 2, ... n, against the standard deviation that is asked for."""
    n, gamma = 20_000, power_gamma(width)
    weights = torch.zeros(n, dtype=torch.float64)
    for t in range(1, n + 1):
        decay = power_decay(3 * t, 3, gamma)
        weights[: t - 1] *= decay
        weights[t - 1] = 1 - decay
    times = torch.arange(n) / n
    mean = (weights * times).sum()
    assert weights.sum() == pytest.approx(1)
    assert (weights * (times - mean) ** 2).sum().sqrt() == pytest.approx(width, rel=1e-3)


def test_widths_out_of_range_are_refused() -> None:
    for width in (0.0, 0.3):
        with pytest.raises(ValueError, match=f"width is {width}, allowed: above 0"):
            power_gamma(width)
    with pytest.raises(ValueError, match="profile is 'cosine'"):
        AveragedWeights(torch.nn.Linear(2, 2), "cosine")


def test_frozen_parameters_are_not_averaged() -> None:
    model = tiny_transformer()
    model.proj_out.requires_grad_(False)
    averaged = AveragedWeights(model)
    assert averaged.state_dict().keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("proj_out") for name in averaged.state_dict())


def test_applied_averages_give_the_weights_back() -> None:
    model = tiny_transformer()
    averaged = AveragedWeights(model)
    for step in (1, 2, 3):
        walk(model, step)
        averaged.update(step, step, 1)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with suppress(KeyboardInterrupt), averaged.applied():
        for name, value in averaged.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
            assert not torch.equal(own[name], value)
        raise KeyboardInterrupt
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_low_precision_weights_are_averaged_in_float32() -> None:
    """A step of 2^-9 is lost in a bfloat16 average, which would stand still."""
    model = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    averaged = AveragedWeights(model, decay=0.999)
    averaged.averages["exponential"][0].fill_(1 - 2**-9)
    for _ in range(5000):
        averaged.update(10**6, 1, 1)
    assert averaged.state_dict()["weight"].dtype == torch.float32
    torch.testing.assert_close(averaged.state_dict()["weight"], torch.ones(4, 4), atol=1e-4, rtol=0)
    averaged.copy_to()
    assert model.weight.dtype == torch.bfloat16


def test_a_step_not_taken_leaves_the_averages_and_one_taken_is_as_ever() -> None:
    model, other = tiny_transformer(), tiny_transformer()
    averaged, gated = AveragedWeights(model), AveragedWeights(other)
    for step in range(1, 6):
        walk(model, step)
        walk(other, step)
        averaged.update(step, step, 1)
        gated.update(step, step, 1, torch.tensor(1.0))
    before = [value.clone() for value in gated.averages["exponential"]]
    walk(other, 6)
    gated.update(6, 6, 1, torch.tensor(0.0))
    for now, then, expected in zip(
        gated.averages["exponential"], before, averaged.averages["exponential"], strict=True
    ):
        assert torch.equal(now, then)
        assert torch.equal(now, expected)


@pytest.mark.parametrize("profile", ["exponential", "power"])
def test_saved_averages_go_on_where_they_were(profile: str, tmp_path: Path) -> None:
    model = tiny_transformer()
    averaged = AveragedWeights(model, profile)
    for step in (1, 2):
        walk(model, step)
        averaged.update(step, 8 * step, 8)
    averaged.save(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"{name}.safetensors" for name in averaged.averages}
    resumed = AveragedWeights(model, profile)
    resumed.load(tmp_path)
    walk(model, 3)
    for each in (averaged, resumed):
        each.update(3, 24, 8)
    for name in averaged.averages:
        assert load_file(tmp_path / f"{name}.safetensors").keys() == dict(model.named_parameters()).keys()
        expected = averaged.state_dict(name)
        assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict(name).items())


def test_averages_of_another_model_are_refused(tmp_path: Path) -> None:
    AveragedWeights(torch.nn.Linear(3, 2)).save(tmp_path)
    with pytest.raises(ValueError, match=r"shape of weight is \(2, 3\), allowed: \(2, 4\)"):
        AveragedWeights(torch.nn.Linear(4, 2)).load(tmp_path)
    with pytest.raises(ValueError, match=r"averaged weights is \['bias'\]"):
        AveragedWeights(torch.nn.Linear(3, 2, bias=False)).load(tmp_path)
    with pytest.raises(ValueError, match=r"power-0.050.safetensors"):
        AveragedWeights(torch.nn.Linear(3, 2), "power").load(tmp_path)
