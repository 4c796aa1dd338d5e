import os
import subprocess
from pathlib import Path

import pytest

from stgen.config import load_config, save_config
from stgen.train import TrainConfig, resolve_stages
from stgen.train_vae import TrainVAEConfig

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["moving_mnist_32", "moving_mnist_64"])
@pytest.mark.parametrize(("schema", "file"), [(TrainConfig, "transformer"), (TrainVAEConfig, "vae")])
def test_shipped_configurations_load_and_survive_saving(name: str, schema: type, file: str, tmp_path: Path) -> None:
    config = load_config(schema, REPOSITORY / "configs" / name / f"{file}.yaml", ["optimizer.lr=0.5", "data.workers=3"])
    assert config.optimizer.lr == 0.5
    assert config.data.workers == 3
    save_config(config, tmp_path / "config.yaml")
    assert load_config(schema, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(("file", "variable"), [("transformer", "TRANSFORMER"), ("few_steps", "FURTHER")])
def test_the_recipe_of_the_shipped_model_has_the_stages_it_says(file: str, variable: str) -> None:
    """data.sh counts the clips of stages, the YAML files those of runs."""
    told = subprocess.run(
        ["bash", "-euc", f'run=runs/two_digits; source configs/moving_mnist_64/data.sh; printf %s "${variable}"'],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name not in ("STAGES", variable)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    config = load_config(TrainConfig, REPOSITORY / "configs" / "moving_mnist_64" / f"{file}.yaml", told.split())
    stages = resolve_stages(config)
    assert len(stages) > 1
    assert stages[-1].samples == config.samples
    for begin, stage in zip([0, *(stage.samples for stage in stages)], stages, strict=False):
        assert (stage.samples - begin) % (2 * stage.batch_size) == 0  # on one process or two


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.rate=1", "rate"),
        ("samples=many", "samples"),
        ("data.workers=-1", "data.workers is -1, allowed: 0 or more"),
        ("flow.shift=0", "flow.shift is 0"),
        ("flow.objective=velocity", "flow.objective is 'velocity', allowed: flow, epsilon, v_prediction, regression"),
        ("model={learn_sigma: true}", "model.learn_sigma is True, allowed: false with flow.objective=flow"),
        ("masks=[{kind: nothing}]", "masks.kind is 'nothing'"),
        ("masks=[]", "at least one entry"),
        ("seed", "an override is written key.sub=value"),
    ],
)
def test_mistakes_are_one_line(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_config(TrainConfig, REPOSITORY / "configs" / "moving_mnist_32" / "transformer.yaml", [override])
    assert "\n" not in str(error.value)


def test_every_objective_can_be_configured(tmp_path: Path) -> None:
    file = REPOSITORY / "configs" / "moving_mnist_32" / "transformer.yaml"
    assert load_config(TrainConfig, file, ["flow.distribution=mode", "flow.dynamic_shift=true"]).flow.dynamic_shift
    choice = ["flow.objective=v_prediction", "flow.zero_terminal_snr=true", "flow.min_snr_gamma=5"]
    config = load_config(TrainConfig, file, choice)
    assert config.flow.min_snr_gamma == 5
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config
    assert load_config(TrainConfig, tmp_path / "config.yaml", ["flow.min_snr_gamma=null"]).flow.min_snr_gamma is None


def test_a_missing_file_and_missing_values_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_config(TrainConfig, tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("seed: 1\n")
    with pytest.raises(ValueError, match=r"run|vae|path"):
        load_config(TrainConfig, tmp_path / "empty.yaml")


@pytest.mark.parametrize("text", ["a: [1\nb: 2", "- 1\n", "just words"])
def test_a_file_that_is_no_configuration_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config: .*bad.yaml") as error:
        load_config(TrainConfig, tmp_path / "bad.yaml")
    assert "\n" not in str(error.value)


def test_unknown_arguments_of_the_vae_are_named() -> None:
    file = REPOSITORY / "configs" / "moving_mnist_32" / "vae.yaml"
    with pytest.raises(ValueError, match="model is 'depth', allowed: in_channels"):
        load_config(TrainVAEConfig, file, ["model.depth=3"])
