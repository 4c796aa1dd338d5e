"""Interpolation: the first and the last frames are given, those between are generated."""

from typing import Any

import torch

from stgen.config import require
from stgen.masks import interpolate
from stgen.pipelines.pipeline_output import STGenPipelineOutput
from stgen.pipelines.pipeline_stgen import STGenPipeline, Video


class STGenInterpolationPipeline(STGenPipeline):
    """Connects the beginning of a video to its end."""

    @torch.no_grad()
    def __call__(
        self,
        video: Video,
        last_video: Video,
        prompt: str | list[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        **arguments: Any,
    ) -> STGenPipelineOutput | tuple[Any]:
        """Generates the frames between `video` and `last_video`.

        Args:
            video: the first frames, one video or one for each prompt.
            last_video: the last frames, likewise; as many as in `video`.
            prompt: what happens; nothing said by default.
            num_frames: frames of the whole result, the given ones included; by default that of the training clips.
            height, width: size of the result; by default that of `video`.
            **arguments: all others of `STGenPipeline`; guidance is off unless there is a prompt.

        Raises:
            ValueError: the two ends don't fit each other, no frame is left to generate, or what `STGenPipeline` raises.
        """
        first = self.prepare_video(video, height, width)
        last = self.prepare_video(last_video, *first.shape[3:])
        require(first.shape == last.shape, "last_video", tuple(last.shape), f"the shape of video, {tuple(first.shape)}")
        k = first.shape[2]
        num_frames = self.transformer.config.sample_frames if num_frames is None else num_frames
        require(
            2 * k < num_frames, "video", f"{k} given frames at each end", f"fewer than half of num_frames={num_frames}"
        )
        b, c, _, h, w = first.shape
        canvas = torch.cat([first, first.new_zeros(b, c, num_frames - 2 * k, h, w), last], dim=2)
        return super().__call__(
            video=self.as_frames(canvas),
            mask=interpolate((num_frames, h, w), given=k),
            **self.optional_prompt(prompt, b, arguments),
        )
