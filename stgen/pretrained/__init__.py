"""What comes with stgen, trained by its own commands: a folder a model, whose README.md is its card.

A folder's name is taken wherever a saved model is asked for: `STGenPipeline.from_pretrained("moving_mnist_64")`, `stgen
generate --pipeline moving_mnist_64`, `vae=moving_mnist_64/vae` and `init=moving_mnist_64` of a training. A folder of that
name in the working directory goes before it, as it does before a name of a hub.
"""

from pathlib import Path

PIPELINE = "moving_mnist_64"
"""What `stgen generate` uses unless it is told otherwise."""


def shipped() -> dict[str, Path]:
    """The folders of the models that come with stgen, by name."""
    return {path.name: path for path in sorted(Path(__file__).parent.iterdir()) if (path / "README.md").exists()}


def find_pretrained(name: str | Path) -> str:
    """The folder that `name`, or `NAME/COMPONENT`, stands for: that of a model that comes with stgen, else `name` itself."""
    top, *inner = Path(name).parts or ("",)
    known = shipped()
    return str(known[top].joinpath(*inner)) if top in known and not Path(name).exists() else str(name)
