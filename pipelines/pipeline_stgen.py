"""STGenPipeline: text, a mask, and the one sampling loop of all tasks.

Shapes: b prompts times videos per prompt; video `b c t h w` in [-1, 1]; mask `b 1 t h w`, 1 = generate, 0 = given;
latents `b z t' h' w'`.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stgen.config import require
from stgen.flow import dynamic_shift
from stgen.masks import fold_mask, hide, keep_given
from stgen.models.attention import GivenCache
from stgen.models.latents import VideoVAE, compression_ratios, decode_stream, encode, latent_shape, require_vae
from stgen.models.loading import SafetensorsOnly
from stgen.models.transformer import STGenTransformer3DModel
from stgen.pipelines.pipeline_output import STGenPipelineOutput
from stgen.pipelines.scheduling import Scheduler, scale_model_input, set_timesteps, step_arguments, takes_variance
from stgen.text import encode_text

Video = Tensor | np.ndarray | list[PIL.Image.Image] | list[list[PIL.Image.Image]]
"""One video or a batch, as diffusers' VideoProcessor takes it: images, arrays `[b] t h w c` or tensors `[b] t c h w` in [0, 1]."""


class STGenPipeline(SafetensorsOnly, CogVideoXLoraLoaderMixin, DiffusionPipeline):
    """Generates videos from text and, through a mask, from any part of a video.

    LoRA weights of the transformer are loaded and saved in diffusers' format by the mixin that CogVideoX brought.

    Prediction, interpolation and inpainting are thin siblings of this class that build the mask from friendlier
    arguments; all share this loop, these components and one saved folder.

    Args:
        tokenizer, text_encoder: any transformers text encoder; its per-token states condition the transformer. None for a
            transformer without text.
        vae: ours, or any of diffusers' that `stgen.models.latents.VideoVAE` lists.
        transformer: predicts the velocity of the generated cells, or their noise or v, with `learn_sigma` the variance
            of each step too.
        scheduler: one of diffusers' that samples from what the transformer predicts. A trained folder holds a fit one
            (FlowMatchEuler for the velocity, else DDIM), and any other is made from its configuration, such as
            `UniPCMultistepScheduler.from_config(pipeline.scheduler.config, prediction_type="flow_prediction",
            use_flow_sigmas=True, flow_shift=pipeline.scheduler.config.shift)`; DPMSolverMultistep likewise.
            FlowMatchHeun, and for noise or v all of them, need no further argument.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder"]
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        vae: VideoVAE,
        transformer: STGenTransformer3DModel,
        scheduler: Scheduler,
    ) -> None:
        super().__init__()
        if vae is not None:  # diffusers builds pipelines without one, to encode prompts alone
            require_vae(vae)
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        # Factor 1: sizes are padded inside the VAE, so the processor must not round them.
        self.video_processor = VideoProcessor(vae_scale_factor=1)
        # One that normalises takes the whole video for normalised once any pixel, were it hidden, is below 0.
        self._input_processor = VideoProcessor(vae_scale_factor=1, do_normalize=False)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._current_timestep: Tensor | None = None
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # --- Inputs ---------------------------------------------------------------------------------------------------

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int = 128,
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Encodes the prompts, or takes embeddings as they are.

        Returns:
            prompt_embeds, negative_prompt_embeds `b n d` (the second None without guidance), and their masks bool
            `b n`, true for tokens.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            assert prompts is not None
            missing = "None, since there is no text encoder; prompt_embeds are taken"
            require(self.text_encoder is not None, "prompt", prompt, missing)
            prompt_embeds, prompt_attention_mask = encode_text(
                self.tokenizer, self.text_encoder, prompts, max_sequence_length, device
            )
        batch_size = prompt_embeds.shape[0]
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            missing = "given with guidance, since there is no text encoder"
            require(self.text_encoder is not None, "negative_prompt_embeds", None, missing)
            negative = negative_prompt or ""
            negatives = [negative] * batch_size if isinstance(negative, str) else negative
            negative_prompt_embeds, negative_prompt_attention_mask = encode_text(
                self.tokenizer, self.text_encoder, negatives, max_sequence_length, device
            )

        def finish(embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask
            dtype = embeds.dtype if self.transformer is None else self.transformer.dtype
            embeds = embeds.to(device, dtype).repeat_interleave(num_videos_per_prompt, dim=0)
            return embeds, mask.to(device).bool().repeat_interleave(num_videos_per_prompt, dim=0)

        prompt_embeds, prompt_attention_mask = finish(prompt_embeds, prompt_attention_mask)
        if do_classifier_free_guidance:
            negative_prompt_embeds, negative_prompt_attention_mask = finish(
                negative_prompt_embeds, negative_prompt_attention_mask
            )
        return prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        guidance_scale: float,
        num_inference_steps: int,
        num_videos_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end_tensor_inputs: list[str],
        output_type: str,
        class_labels: int | list[int] | None = None,
        videos: int = 1,
    ) -> int:
        """Raises `ValueError` for whatever doesn't fit together; returns the number of prompts.

        A transformer without text has as many as there are class labels, or else `videos`, the batch of the given video.
        """
        if self.transformer.config.text_dim is None:
            for name, value in (
                ("prompt", prompt),
                ("prompt_embeds", prompt_embeds),
                ("negative_prompt", negative_prompt),
            ):
                require(value is None, name, value, "None, since this transformer takes no text")
        else:
            one_of = (prompt is None) != (prompt_embeds is None)
            require(one_of, "prompt", prompt, "exactly one of prompt and prompt_embeds")
        require(isinstance(prompt, str | list | None), "prompt", prompt, "a str or a list of str")
        require(not isinstance(prompt, list) or len(prompt) > 0, "prompt", prompt, "at least one prompt")
        one_of = negative_prompt is None or negative_prompt_embeds is None
        require(one_of, "negative_prompt", negative_prompt, "at most one of negative_prompt and negative_prompt_embeds")
        labels = [class_labels] if isinstance(class_labels, int) else class_labels
        if labels is not None:
            classes = self.transformer.config.num_classes
            require(classes is not None, "class_labels", class_labels, "None, since this transformer has no classes")
            known = len(labels) > 0 and all(isinstance(label, int) and 0 <= label < classes for label in labels)
            require(known, "class_labels", class_labels, f"numbers from 0 to {classes - 1}")
        if prompt is None and prompt_embeds is None:
            prompts = videos if labels is None else len(labels)
        else:
            prompts = 1 if isinstance(prompt, str) else len(prompt) if prompt is not None else len(prompt_embeds)
            fits = labels is None or len(labels) in (1, prompts)
            require(fits, "class_labels", class_labels, f"one, or one for each of {prompts} prompts")
        for name, value in (("negative_prompt", negative_prompt), ("negative_prompt_embeds", negative_prompt_embeds)):
            if value is not None and not isinstance(value, str):
                require(len(value) == prompts, name, f"a batch of {len(value)}", f"one for each of {prompts} prompts")
        embedded = prompt_embeds is not None and negative_prompt_embeds is not None
        if embedded and prompt_embeds.shape[0] != negative_prompt_embeds.shape[0]:
            shapes = f"{tuple(prompt_embeds.shape)} and {tuple(negative_prompt_embeds.shape)}"
            raise ValueError(f"prompt_embeds and negative_prompt_embeds have shapes {shapes}, allowed: equal batches")
        require(guidance_scale >= 0, "guidance_scale", guidance_scale, "0 or more; 1 or less switches guidance off")
        require(num_inference_steps >= 1, "num_inference_steps", num_inference_steps, "1 or more")
        require(num_videos_per_prompt >= 1, "num_videos_per_prompt", num_videos_per_prompt, "1 or more")
        if isinstance(generator, list):
            b = prompts * num_videos_per_prompt
            require(
                len(generator) == b, "generator", f"a list of {len(generator)}", f"one, or one for each of {b} videos"
            )
        for name in callback_on_step_end_tensor_inputs:
            allowed = self._callback_tensor_inputs
            require(name in allowed, "callback_on_step_end_tensor_inputs", name, ", ".join(allowed))
        output_types = ("pil", "np", "pt", "latent", "stream")
        require(output_type in output_types, "output_type", output_type, ", ".join(output_types))
        return prompts

    def prepare_video(self, video: Video, height: int | None, width: int | None) -> Tensor:
        """A video or a batch of them, in any form, as `b c t h w` in [-1, 1], resized only if another size is asked for:
        bicubic and antialiased like the training clips, without leaving the range of the pixels.

        Raises:
            ValueError: a size below 1.
        """
        pixels = self._input_processor.preprocess_video(video).to(self._execution_device, torch.float32)
        for name, value in (("height", height), ("width", width)):
            require(value is None or value >= 1, name, value, "1 or more")
        size = tuple(
            own if asked is None else asked for asked, own in zip((height, width), pixels.shape[3:], strict=True)
        )
        if size != tuple(pixels.shape[3:]):
            darkest, brightest = pixels.nan_to_num(0).aminmax()
            frames = rearrange(pixels, "b c t h w -> (b t) c h w")
            frames = F.interpolate(frames, size, mode="bicubic", antialias=True).clamp(darkest, brightest)
            pixels = rearrange(frames, "(b t) c h w -> b c t h w", b=len(pixels))
        return 2 * pixels - 1

    @staticmethod
    def as_frames(video: Tensor) -> Tensor:
        """`b c t h w` in [-1, 1] as the argument `video` takes it: `b t c h w` in [0, 1]."""
        return (video / 2 + 0.5).transpose(1, 2)

    def optional_prompt(
        self, prompt: str | list[str] | None, batch_size: int, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """Arguments for a task that shows what it wants: no prompt is one empty prompt a video, without guidance."""
        if prompt is not None or arguments.get("prompt_embeds") is not None or self.transformer.config.text_dim is None:
            return {"prompt": prompt, **arguments}
        return {"prompt": [""] * batch_size, "guidance_scale": 1.0, **arguments}

    def prepare_mask(
        self, mask: Tensor | np.ndarray, shape: torch.Size, prompts: int, num_videos_per_prompt: int
    ) -> Tensor:
        """A mask `[b] [1] t h w` of zeros and ones as `b 1 t h w`.

        Raises:
            ValueError: another shape than the video's, or values other than 0 and 1.
        """
        mask = torch.as_tensor(mask, dtype=torch.float32, device=self._execution_device)
        mask = mask[None, None] if mask.ndim == 3 else mask[None] if mask.ndim == 4 else mask
        fits = mask.ndim == 5 and mask.shape[1] == 1 and mask.shape[2:] == shape[2:] and mask.shape[0] in (1, shape[0])
        require(fits, "mask.shape", tuple(mask.shape), f"(b, 1, t, h, w) = {(shape[0], 1, *shape[2:])}")
        require(bool(((mask == 0) | (mask == 1)).all()), "mask", "other values", "only 1 (generate) and 0 (given)")
        return self._repeat(mask, prompts, num_videos_per_prompt, "mask")

    @staticmethod
    def _repeat(x: Tensor, prompts: int, num_videos_per_prompt: int, name: str) -> Tensor:
        """Repeats a batch of 1 or of the prompts to one of prompts times videos per prompt."""
        allowed = f"one, or one for each prompt ({prompts} in all)"
        require(len(x) in (1, prompts), name, f"a batch of {len(x)}", allowed)
        return x.repeat_interleave(prompts * num_videos_per_prompt // len(x), dim=0)

    def prepare_latents(
        self,
        batch_size: int,
        num_frames: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise `b z t' h' w'`, or the given latents after a check of their shape."""
        shape = (batch_size, *latent_shape(self.vae, num_frames, height, width))
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        require(tuple(latents.shape) == shape, "latents.shape", tuple(latents.shape), f"{shape}")
        return latents.to(self._execution_device, torch.float32)

    # --- The loop -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        video: Video | None = None,
        mask: Tensor | np.ndarray | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        class_labels: int | list[int] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.0,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int = 128,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> STGenPipelineOutput | tuple[Any]:
        """Generates videos.

        Args:
            prompt: what to generate; the empty prompt is allowed.
            negative_prompt: what to guide away from; the empty prompt by default.
            video: where pixels are given: one video, or one for each prompt. Its hidden pixels are never looked at,
                unless it is resized.
            mask: which pixels of `video` to generate: `[b] [1] t h w`, 1 = generate, 0 = given. The given pixels come
                back exactly.
            height, width: of a frame in pixels; any size. By default that of `video`, else that of the training clips.
                A `video` of another size is resized.
            num_frames: any number; by default that of `video`, else that of the training clips.
            num_inference_steps: steps of the scheduler. One of second order runs the model twice in each but the first.
            guidance_scale: of classifier-free guidance (arXiv:2207.12598); 1 or less switches it off, and so does a
                transformer that is told of neither text nor class.
            num_videos_per_prompt: videos for each prompt; those of one prompt follow each other.
            eta: share of fresh noise in each step of DDIM (arXiv:2010.02502, eq. 16), 0 to 1; 0 with other schedulers.
            generator: one, or one for each video; each makes its result reproducible.
            latents: initial noise `b z t' h' w'` instead of fresh one.
            prompt_embeds, negative_prompt_embeds: text states `b n d` in place of the prompts, with their
                attention masks bool `b n`; no mask means that all are tokens.
            max_sequence_length: tokens of a prompt; longer ones are cut with a warning.
            output_type: `pil`, `np`, `pt`, `latent`, or `stream`: what `np` gives as an iterator of chunks `b n h w c`,
                each decoded when it is asked for, so that a long video is never held whole (the given `video` is; a VAE
                of diffusers' makes one chunk). Stop early by `.close()`. Under CPU offload the VAE is on the device from
                the first chunk to the end or the stop; the next call must wait for that.
            return_dict: whether to return an `STGenPipelineOutput` or a tuple.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after each step; the tensors
                that it returns replace the loop's.
            callback_on_step_end_tensor_inputs: names of the tensors it gets.

        Returns:
            The videos, `.frames`.

        Raises:
            ValueError: arguments that don't fit together, each named with its value.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        pixels = None if video is None else self.prepare_video(video, height, width)
        prompts = self.check_inputs(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            guidance_scale,
            num_inference_steps,
            num_videos_per_prompt,
            generator,
            list(callback_on_step_end_tensor_inputs),
            output_type,
            class_labels,
            1 if pixels is None else len(pixels),
        )
        self._guidance_scale = guidance_scale
        self._interrupt = False
        device, b = self._execution_device, prompts * num_videos_per_prompt

        # The mask and what it leaves of the video: all that the model ever sees of it.
        require(
            (video is None) == (mask is None),
            "mask",
            "missing" if mask is None else "given",
            "given exactly when video is",
        )
        if pixels is not None and mask is not None:
            fits = num_frames is None or num_frames == pixels.shape[2]
            require(fits, "num_frames", num_frames, f"{pixels.shape[2]}, the frames of video")
            pixel_mask: Tensor | None = self.prepare_mask(mask, pixels.shape, prompts, num_videos_per_prompt)
            pixels = self._repeat(pixels, prompts, num_videos_per_prompt, "video")
            num_frames, height, width = pixels.shape[2:]
            masked = hide(pixels, pixel_mask)
            in_range = bool((masked.abs() <= 1 + 1e-3).all())  # false for NaN too
            require(in_range, "video", "given pixels outside", "images, or arrays and tensors of floats in [0, 1]")
            condition_latents: Tensor | None = encode(self.vae, masked)
            condition_mask = fold_mask(pixel_mask, *compression_ratios(self.vae))
        else:
            num_frames = self.transformer.config.sample_frames if num_frames is None else num_frames
            height = self.transformer.config.sample_height if height is None else height
            width = self.transformer.config.sample_width if width is None else width
            pixel_mask = condition_latents = condition_mask = None
        require(fps is None or fps > 0, "fps", fps, "above 0")
        for name, value in (("num_frames", num_frames), ("height", height), ("width", width)):
            require(value >= 1, name, value, "1 or more")

        takes = self.transformer.config
        if takes.text_dim is None and class_labels is None:
            self._guidance_scale = 1.0  # there is nothing to guide to, and both halves would be the same
        fps = takes.sample_fps if fps is None else fps
        sizes = {"fps": fps, "num_frames": num_frames, "height": height, "width": width}
        positive = {name: torch.full((b,), float(value), device=device) for name, value in sizes.items()}
        negative = dict(positive)
        if takes.text_dim is not None:
            # What says nothing is either the encoded empty prompt or, in the transformer, its own null text.
            own_null = takes.null_text != "prompt" and negative_prompt is None and negative_prompt_embeds is None
            prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask = (
                self.encode_prompt(
                    prompt,
                    negative_prompt,
                    self.do_classifier_free_guidance and not own_null,
                    num_videos_per_prompt,
                    prompt_embeds,
                    negative_prompt_embeds,
                    prompt_attention_mask,
                    negative_prompt_attention_mask,
                    max_sequence_length,
                    device,
                )
            )
            if own_null:
                positive["drop_text"] = torch.zeros(b, dtype=torch.bool, device=device)
                negative["drop_text"] = torch.ones(b, dtype=torch.bool, device=device)
        if takes.num_classes is not None:
            labels = takes.num_classes if class_labels is None else class_labels
            classes = torch.tensor([labels] if isinstance(labels, int) else labels, device=device)
            positive["class_labels"] = self._repeat(classes, prompts, num_videos_per_prompt, "class_labels")
            negative["class_labels"] = torch.full_like(positive["class_labels"], takes.num_classes)
        use_cache = takes.isolate_given and condition_mask is not None and not self.transformer.is_cache_enabled
        given_cache = GivenCache() if use_cache else None
        latents = self.prepare_latents(b, num_frames, height, width, generator, latents)

        shift = dynamic_shift(height, width, latents.shape[2])
        set_timesteps(self.scheduler, num_inference_steps, device, shift)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow-matching schedulers have none
        extra = step_arguments(self.scheduler, generator, eta)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                prediction = self._guided_prediction(
                    scale_model_input(self.scheduler, latents, t),
                    t,
                    prompt_embeds,
                    negative_prompt_embeds,
                    prompt_attention_mask,
                    negative_prompt_attention_mask,
                    condition_latents,
                    condition_mask,
                    positive,
                    negative,
                    given_cache,
                )
                latents = self.scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
                if callback_on_step_end is not None:
                    known = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    guided = self.do_classifier_free_guidance
                    passed = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, i, t, passed)
                    other_text = "prompt_embeds" in returned or "negative_prompt_embeds" in returned
                    if given_cache is not None and (other_text or guided != self.do_classifier_free_guidance):
                        given_cache = GivenCache()  # given tokens see the text too
                    latents = returned.pop("latents", latents)
                    prompt_embeds = returned.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = returned.pop("negative_prompt_embeds", negative_prompt_embeds)
                progress_bar.update()
        self._current_timestep = None

        if condition_latents is not None and condition_mask is not None:
            latents = self.transformer.insert_given(latents, condition_latents, condition_mask)
        chunks = self._decode(latents, (num_frames, height, width), pixels, pixel_mask)
        if output_type == "latent":
            frames: Any = latents
        elif output_type == "stream":
            frames = self._stream(chunks)  # decodes nothing yet, so that what follows frees no VAE that is at work
        else:
            frames = self.video_processor.postprocess_video(torch.cat(list(chunks), dim=2), output_type=output_type)
        self.maybe_free_model_hooks()
        return STGenPipelineOutput(frames=frames) if return_dict else (frames,)

    def _guided_prediction(
        self,
        latents: Tensor,
        t: Tensor,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        prompt_attention_mask: Tensor | None,
        negative_prompt_attention_mask: Tensor | None,
        condition_latents: Tensor | None,
        condition_mask: Tensor | None,
        conditions: dict[str, Tensor],
        negative_conditions: dict[str, Tensor],
        given_cache: GivenCache | None,
    ) -> Tensor:
        """f = f_negative + scale (f_prompt - f_negative) (arXiv:2207.12598), both in one forward of twice the batch.

        Returns:
            What the scheduler's step takes: `b z t' h' w'`, or with a learned variance that it wants `b 2z t' h' w'`;
            guidance leaves the variance as the prompt has it, as in DiT (arXiv:2212.09748).
        """
        copies = 2 if self.do_classifier_free_guidance else 1
        if copies == 2 and negative_prompt_embeds is not None:
            longest = max(prompt_embeds.shape[1], negative_prompt_embeds.shape[1])
            pad = [longest - negative_prompt_embeds.shape[1], longest - prompt_embeds.shape[1]]
            both = zip((negative_prompt_embeds, prompt_embeds), pad, strict=True)
            prompt_embeds = torch.cat([torch.nn.functional.pad(x, (0, 0, 0, k)) for x, k in both])
            both = zip((negative_prompt_attention_mask, prompt_attention_mask), pad, strict=True)
            prompt_attention_mask = torch.cat([torch.nn.functional.pad(x, (0, k)) for x, k in both])
        elif copies == 2 and prompt_embeds is not None:  # the transformer puts its null text in the first half
            prompt_embeds, prompt_attention_mask = prompt_embeds.repeat(2, 1, 1), prompt_attention_mask.repeat(2, 1)

        def repeat(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.cat([x.to(self.transformer.dtype)] * copies)

        batch = {
            "hidden_states": repeat(latents),
            "timestep": t.expand(copies * len(latents)),
            "encoder_hidden_states": prompt_embeds,
            "encoder_attention_mask": prompt_attention_mask,
            "condition_latents": repeat(condition_latents),
            "condition_mask": repeat(condition_mask),
            **{
                name: torch.cat([negative_conditions[name], value]) if copies == 2 else value
                for name, value in conditions.items()
            },
        }
        # Both halves in one forward and by name: diffusers' caches look for the names and cut what they find in two.
        batch = {name: value for name, value in batch.items() if value is not None}
        with self.transformer.cache_context("cond_uncond"):
            prediction = self.transformer(**batch, given_cache=given_cache, return_dict=False)[0].float()
        variance = None
        if self.transformer.config.learn_sigma:
            prediction, variance = prediction.chunk(2, dim=1)
        if self.do_classifier_free_guidance:
            negative, positive = prediction.chunk(2)
            prediction = negative + self.guidance_scale * (positive - negative)
        if variance is None or not takes_variance(self.scheduler):
            return prediction
        return torch.cat([prediction, variance[-len(prediction) :]], dim=1)

    @torch.no_grad()
    def _decode(
        self, latents: Tensor, size: tuple[int, int, int], pixels: Tensor | None, pixel_mask: Tensor | None
    ) -> Iterator[Tensor]:
        """Chunks `b c n h w` of the video of this size (t, h, w), with the given pixels put back."""
        start = 0
        for chunk in decode_stream(self.vae, latents, size):
            frames = slice(start, start + chunk.shape[2])
            start = frames.stop
            if pixels is not None and pixel_mask is not None:
                chunk = keep_given(chunk, pixels[:, :, frames], pixel_mask[:, :, frames])
            yield chunk

    def _stream(self, chunks: Iterable[Tensor]) -> Generator[np.ndarray, None, None]:
        """The chunks as arrays `b n h w c` in [0, 1]; offloads the VAE at the end, or when the consumer stops."""
        try:
            for chunk in chunks:
                yield self.video_processor.postprocess_video(chunk, output_type="np")
        finally:
            self.maybe_free_model_hooks()
