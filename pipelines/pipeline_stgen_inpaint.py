"""Inpainting: whatever a mask says is generated, the rest is given."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stgen.pipelines.pipeline_output import STGenPipelineOutput
from stgen.pipelines.pipeline_stgen import STGenPipeline, Video


class STGenInpaintPipeline(STGenPipeline):
    """Fills the hidden part of a video, in space, time or both."""

    @torch.no_grad()
    def __call__(
        self,
        video: Video,
        mask: Tensor | np.ndarray,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        **arguments: Any,
    ) -> STGenPipelineOutput | tuple[Any]:
        """Generates the pixels of `video` where `mask` is 1.

        Args:
            video: one video or one for each prompt; its hidden pixels are never looked at.
            mask: `[b] [1] t h w`, 1 = generate (white is repainted, as in diffusers), 0 = given.
            prompt: what happens; nothing said by default.
            height, width: size of the result; by default that of `video`.
            **arguments: all others of `STGenPipeline`; guidance is off unless there is a prompt.

        Raises:
            ValueError: the mask doesn't fit the video, or what `STGenPipeline` raises.
        """
        pixels = self.prepare_video(video, height, width)
        return super().__call__(
            video=self.as_frames(pixels), mask=mask, **self.optional_prompt(prompt, len(pixels), arguments)
        )
