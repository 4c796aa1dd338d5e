"""Configuration: dataclass <- YAML file <- `key.sub=value` on the command line.

Each module owns the dataclass of its own arguments and checks them in `__post_init__`. Unknown keys, wrong types and
values out of range raise `ValueError` with the key in the message; nothing reads a configuration through defaults
scattered in the code. The resolved configuration is saved in the run folder, and is itself a valid `--config`.
"""

import argparse
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stgen.durable import write_durably

ConfigT = TypeVar("ConfigT")


def load_config(schema: type[ConfigT], path: str | Path | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Builds `schema` from its defaults, then the YAML file at `path`, then `overrides` like `optimizer.lr=1e-4`.

    Raises:
        ValueError: the file is missing or no mapping, a key is unknown, or a value has the wrong type or range.
    """
    layers = [OmegaConf.structured(schema)]
    try:
        if path is not None:
            if not Path(path).is_file():
                raise ValueError(f"config: no such file: {path}")
            layers.append(OmegaConf.load(path))
        for override in overrides:
            if "=" not in override:
                raise ValueError(f"config: an override is written key.sub=value, not {override!r}")
        layers.append(OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_object(OmegaConf.merge(*layers))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        # OmegaConf's message spans lines (key, reference type); the first line and the full key say it all.
        reason = str(error).splitlines()[0]
        where = f" (key {error.full_key})" if getattr(error, "full_key", None) else ""
        raise ValueError(f"config: {path}: {reason}{where}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is no YAML: {' '.join(str(error).split())}") from error
    except TypeError as error:
        raise ValueError(f"config: {path}: {error}") from error


def override(config: ConfigT, values: Mapping[str, Any], name: str) -> ConfigT:
    """A copy of `config` with nested `values` in place of its own, checked as a whole. Lists are replaced, not joined.

    Args:
        name: what the refusal calls the values.

    Raises:
        ValueError: a key is unknown, or a value has the wrong type or range.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), values))  # type: ignore[return-value]
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ValueError(f"{name}: {str(error).splitlines()[0]}") from error


def under(key: str, names: Iterable[str]) -> bool:
    """Whether a key of `flatten_config` is one of `names` or a part of it: `masks[0].kind` is a part of `masks`."""
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in names)


def save_config(config: object, path: str | Path) -> None:
    """Writes the resolved configuration, every field spelled out, as YAML."""
    write_durably(Path(path), OmegaConf.to_yaml(OmegaConf.structured(config)))


def flatten_config(config: Any) -> dict[str, Any]:
    """A configuration, a mapping, or the YAML file of one, as `{"data.path": ..., "masks[0].kind": ...}`."""
    loaded = OmegaConf.load(config) if isinstance(config, Path) else OmegaConf.create(config)

    def walk(value: Any, key: str) -> dict[str, Any]:
        if isinstance(value, dict) and value:
            pairs = [(f"{key}.{name}" if key else str(name), child) for name, child in value.items()]
        elif isinstance(value, list) and value:
            pairs = [(f"{key}[{i}]", child) for i, child in enumerate(value)]
        else:
            return {key: value}
        return {k: v for name, child in pairs for k, v in walk(child, name).items()}

    return walk(OmegaConf.to_container(loaded), "")


def parse_command_line(schema: type[ConfigT], description: str, argv: Sequence[str] | None = None) -> ConfigT:
    """The command line of the training entry points: `--config FILE [key.sub=value ...]`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="YAML file of the run's configuration")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces one value of the file")
    arguments = parser.parse_args(argv)
    return load_config(schema, arguments.config, arguments.overrides)


def require(condition: bool, argument: str, value: object, allowed: str) -> None:
    """Raises the `ValueError` that all of stgen's refusals are: the argument, its value, and what is allowed."""
    if not condition:
        raise ValueError(f"{argument} is {value!r}, allowed: {allowed}")


def require_arguments(
    function: Callable[..., Any], given: Iterable[str], name: str, excluded: Sequence[str] = ()
) -> None:
    """Raises `ValueError` if `given` names an argument that `function` doesn't take, or one of `excluded`."""
    allowed = [argument for argument in inspect.signature(function).parameters if argument not in excluded]
    for argument in given:
        require(argument in allowed, name, argument, ", ".join(allowed) or "no arguments")
