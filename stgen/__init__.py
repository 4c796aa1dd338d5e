"""stgen: video generation with one spatial-temporal diffusion transformer, one 3D causal VAE and one mask.

Public names are loaded on first use, so that `import stgen` is light. Any of them brings `stgen.pipelines` along, since
diffusers resolves the parts of a saved folder only from modules that are already imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stgen.models.autoencoder import AutoencoderKLSTGen
    from stgen.models.transformer import STGenTransformer3DModel
    from stgen.pipelines import (
        STGenInpaintPipeline,
        STGenInterpolationPipeline,
        STGenPipeline,
        STGenPredictionPipeline,
    )

__all__ = [
    "AutoencoderKLSTGen",
    "STGenInpaintPipeline",
    "STGenInterpolationPipeline",
    "STGenPipeline",
    "STGenPredictionPipeline",
    "STGenTransformer3DModel",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'stgen' has no attribute {name!r}")
    return getattr(importlib.import_module("stgen.pipelines"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
