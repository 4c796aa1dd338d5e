"""What all of stgen's classes ask of the files that they open."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from torch import Tensor

from stgen.config import require
from stgen.pretrained import find_pretrained


class SafetensorsOnly:
    """Opens safetensors alone. Diffusers falls back to unpickling a `.bin`, which a downloaded folder may bring."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **arguments: Any) -> Any:
        """As diffusers' method of this name; the name of a model that comes with stgen (`stgen.pretrained`) will do too.

        Raises:
            ValueError: `use_safetensors=False` is asked for.
            OSError: the folder holds no safetensors.
        """
        parent: Any = super()
        return parent.from_pretrained(find_pretrained(pretrained_model_name_or_path), **_safetensors(arguments))

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, **arguments: Any) -> None:
        """As diffusers' method of this name, from a tensor dict, a file or a folder that `save_lora_adapter` wrote."""
        parent: Any = super()
        parent.load_lora_adapter(pretrained_model_name_or_path_or_dict, **_named_weights(arguments))

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: Any, *names: str, **arguments: Any) -> None:
        """As diffusers' method of this name, from a tensor dict, a file or a folder that `save_lora_weights` wrote."""
        parent: Any = super()
        parent.load_lora_weights(pretrained_model_name_or_path_or_dict, *names, **_named_weights(arguments))


def _safetensors(arguments: dict[str, Any]) -> dict[str, Any]:
    asked = arguments.pop("use_safetensors", None)
    require(asked is not False, "use_safetensors", asked, "True: nothing is unpickled")
    return {**arguments, "use_safetensors": True}


def _named_weights(arguments: dict[str, Any]) -> dict[str, Any]:
    # Without a name diffusers asks the hub for one, and offline it falls back to a pickle; so it does by another name.
    name = arguments.get("weight_name", LORA_WEIGHT_NAME_SAFE)
    require(str(name).endswith(".safetensors"), "weight_name", name, "a .safetensors file: nothing is unpickled")
    return {"weight_name": LORA_WEIGHT_NAME_SAFE, **_safetensors(arguments)}


def load_every_tensor(model: torch.nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads `weights` into `model`: each of them, and each of the model's.

    Args:
        source: what the refusal calls them.

    Raises:
        ValueError: names or shapes differ; one line lists all that do.
    """
    own = model.state_dict()

    def shape(tensors: Mapping[str, Tensor], name: str) -> str:
        return str(tuple(tensors[name].shape)) if name in tensors else "no such weight"

    names = sorted(name for name in own.keys() | weights.keys() if shape(own, name) != shape(weights, name))
    found = ", ".join(f"{name}: {shape(weights, name)} there, {shape(own, name)} in this model" for name in names)
    require(not names, source, found, "weights of this model's names and shapes")
    model.load_state_dict(weights)
