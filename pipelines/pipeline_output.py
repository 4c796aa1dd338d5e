"""What the pipelines return."""

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class STGenPipelineOutput(BaseOutput):
    """Generated videos.

    Args:
        frames: by `output_type`: `pil` a list of lists of images, one list a video; `np` float32 `b t h w c` in
            [0, 1]; `pt` the same as a tensor `b t c h w`; `latent` the latents `b z t' h' w'`, normalised; `stream` a
            generator of the chunks `b n h w c` of what `np` gives, each decoded when it is asked for.
    """

    frames: torch.Tensor | np.ndarray | list[list[PIL.Image.Image]] | Generator[np.ndarray, None, None]
