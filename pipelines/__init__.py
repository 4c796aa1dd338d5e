"""Diffusers pipelines of stgen, installed as `stgen.pipelines`.

Importing this package registers the public classes on `diffusers`, so that `DiffusionPipeline.from_pretrained(folder)`
finds the class that a saved folder's model_index.json names, with no flags.
"""

import diffusers

from stgen.models.autoencoder import AutoencoderKLSTGen
from stgen.models.transformer import STGenTransformer3DModel
from stgen.pipelines.pipeline_output import STGenPipelineOutput
from stgen.pipelines.pipeline_stgen import STGenPipeline
from stgen.pipelines.pipeline_stgen_inpaint import STGenInpaintPipeline
from stgen.pipelines.pipeline_stgen_interpolation import STGenInterpolationPipeline
from stgen.pipelines.pipeline_stgen_prediction import STGenPredictionPipeline

__all__ = [
    "AutoencoderKLSTGen",
    "STGenInpaintPipeline",
    "STGenInterpolationPipeline",
    "STGenPipeline",
    "STGenPipelineOutput",
    "STGenPredictionPipeline",
    "STGenTransformer3DModel",
]

for _public in (STGenPipeline, STGenPredictionPipeline, STGenInterpolationPipeline, STGenInpaintPipeline):
    setattr(diffusers, _public.__name__, _public)
