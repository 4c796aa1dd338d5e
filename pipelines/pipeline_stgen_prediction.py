"""Prediction: the first frames are given, the rest is generated."""

from typing import Any

import torch

from stgen.config import require
from stgen.masks import predict
from stgen.pipelines.pipeline_output import STGenPipelineOutput
from stgen.pipelines.pipeline_stgen import STGenPipeline, Video


class STGenPredictionPipeline(STGenPipeline):
    """Continues a video; given one image, it is image-to-video."""

    @torch.no_grad()
    def __call__(
        self,
        video: Video,
        prompt: str | list[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        **arguments: Any,
    ) -> STGenPipelineOutput | tuple[Any]:
        """Generates the frames that follow `video`.

        Args:
            video: the given frames, one video or one for each prompt.
            prompt: what happens; nothing said by default.
            num_frames: frames of the whole result, the given ones included; by default that of the training clips.
            height, width: size of the result; by default that of `video`.
            **arguments: all others of `STGenPipeline`; guidance is off unless there is a prompt.

        Raises:
            ValueError: no frame left to generate, or what `STGenPipeline` raises.
        """
        given = self.prepare_video(video, height, width)
        k = given.shape[2]
        num_frames = self.transformer.config.sample_frames if num_frames is None else num_frames
        require(k < num_frames, "video", f"{k} given frames", f"fewer than num_frames={num_frames}")
        b, c, _, h, w = given.shape
        canvas = torch.cat([given, given.new_zeros(b, c, num_frames - k, h, w)], dim=2)
        return super().__call__(
            video=self.as_frames(canvas),
            mask=predict((num_frames, h, w), given=k),
            **self.optional_prompt(prompt, b, arguments),
        )
