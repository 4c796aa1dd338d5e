"""What all of stgen's classes ask of the files that they open."""

from typing import Any

from stgen.config import require


class SafetensorsOnly:
    """Opens safetensors alone. Diffusers falls back to unpickling a `.bin`, which a downloaded folder may bring."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **arguments: Any) -> Any:
        """As diffusers' method of this name.

        Raises:
            ValueError: `use_safetensors=False` is asked for.
            OSError: the folder holds no safetensors.
        """
        asked = arguments.pop("use_safetensors", None)
        require(asked is not False, "use_safetensors", asked, "True: nothing is unpickled")
        parent: Any = super()
        return parent.from_pretrained(pretrained_model_name_or_path, use_safetensors=True, **arguments)
