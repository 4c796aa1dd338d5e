"""How the one sampling loop drives any of diffusers' schedulers: those of flow matching and those of DDPM."""

import inspect
import math
from typing import Any, TypeAlias

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from stgen.config import require


class RegressionScheduler(SchedulerMixin, ConfigMixin):
    """One step without noise: the model's output is the result. For a transformer of `flow.objective=regression`.

    Args:
        num_train_timesteps: the timestep that the model was trained at, and is told.
    """

    order = 1
    init_noise_sigma = 0.0
    """What the pipeline multiplies its noise by."""

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.timesteps = torch.tensor([float(num_train_timesteps)])

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Takes one step, and refuses others, which would change nothing.

        Raises:
            ValueError: another number of steps.
        """
        allowed = "1, since this model was trained to give its result at once"
        require(num_inference_steps == 1, "num_inference_steps", num_inference_steps, allowed)
        self.timesteps = torch.tensor([float(self.config.num_train_timesteps)], device=device)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The result is `model_output`, whatever the sample."""
        return SchedulerOutput(prev_sample=model_output) if return_dict else (model_output,)


Scheduler: TypeAlias = (
    FlowMatchEulerDiscreteScheduler
    | FlowMatchHeunDiscreteScheduler
    | UniPCMultistepScheduler
    | DPMSolverMultistepScheduler
    | DDIMScheduler
    | DDPMScheduler
    | RegressionScheduler
)
"""The schedulers that the tests run. A union of classes, since diffusers compares components with exact types."""


def set_timesteps(scheduler: Scheduler, num_inference_steps: int, device: torch.device, shift: float) -> None:
    """Sets the schedule, shifted by `shift` (stgen.flow.dynamic_shift) where the scheduler has `use_dynamic_shifting`.

    Diffusers calls that shift `mu`, or its logarithm under the exponential `time_shift_type`. FlowMatchHeun knows no
    `mu` and DPM++ only the exponential one, so they get the same shift through their static one, for this schedule only.
    """
    if not scheduler.config.get("use_dynamic_shifting", False):
        scheduler.set_timesteps(num_inference_steps, device=device)
    elif isinstance(scheduler, FlowMatchHeunDiscreteScheduler | DPMSolverMultistepScheduler):
        name = "shift" if isinstance(scheduler, FlowMatchHeunDiscreteScheduler) else "flow_shift"
        before = scheduler.config[name]
        scheduler.register_to_config(**{name: shift})
        scheduler.set_timesteps(num_inference_steps, device=device)
        scheduler.register_to_config(**{name: before})
    else:
        dynamic: Any = scheduler
        mu = shift if scheduler.config.time_shift_type == "linear" else math.log(shift)
        dynamic.set_timesteps(num_inference_steps, device=device, mu=mu)
    if hasattr(scheduler, "set_begin_index"):
        # Else the first step is looked up by its timestep, and where rounding made the first two equal, the second wins.
        scheduler.set_begin_index(0)


def scale_model_input(scheduler: Scheduler, latents: Tensor, t: Tensor) -> Tensor:
    """The latents as the model is to see them: flow-matching schedulers have them so already."""
    return scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents


def step_arguments(
    scheduler: Scheduler, generator: torch.Generator | list[torch.Generator] | None, eta: float
) -> dict[str, Any]:
    """Of `generator` and `eta`, those that the scheduler's step takes.

    Raises:
        ValueError: eta out of range, or other than 0 for a scheduler without it.
    """
    taken = inspect.signature(scheduler.step).parameters
    if "eta" not in taken:
        require(eta == 0, "eta", eta, f"0 with {type(scheduler).__name__}, whose step takes none")
    require(0 <= eta <= 1, "eta", eta, "0 to 1")
    return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in taken}


def takes_variance(scheduler: Scheduler) -> bool:
    """Whether the scheduler's step wants the learned variance behind the prediction: only DDPM, if told so.

    DPM++ has the option too, but its code cuts the output to 3 channels, so it is refused.

    Raises:
        ValueError: DPM++ with a `variance_type`.
    """
    kind = scheduler.config.get("variance_type")
    if isinstance(scheduler, DDPMScheduler):
        require(kind != "learned", "scheduler.variance_type", kind, "learned_range, or a fixed one")
        return kind == "learned_range"
    learned = isinstance(scheduler, DPMSolverMultistepScheduler) and kind in ("learned", "learned_range")
    require(
        not learned, "scheduler.variance_type", kind, "None with DPMSolverMultistepScheduler, for pixels of RGB only"
    )
    return False
