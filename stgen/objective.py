"""What the transformer learns: the objective's configuration, its loss, and the scheduler that samples from it.

Shapes: latents `b c t h w`; mask folded to the latent grid `b p t h w`; one value a clip, `b`.
"""

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from stgen import ddpm, flow
from stgen.config import require
from stgen.masks import generated_cells
from stgen.pipelines.scheduling import RegressionScheduler

OBJECTIVES = ("flow", "epsilon", "v_prediction", "regression")
DISTRIBUTIONS = ("logit_normal", "uniform", "mode")

TRAIN_TIMESTEPS = 1000
"""Steps of the discrete objectives, and the scale on which the transformer takes its timestep."""

VLB_WEIGHT = 0.001 * TRAIN_TIMESTEPS
"""lambda = 0.001 (arXiv:2102.09672, sec. 3.1) times the T terms of the bound, of which each clip draws one."""


@dataclass
class FlowConfig:
    """The objective, how noisy its inputs are, and how the noise levels weigh."""

    objective: str = "flow"
    """`flow` predicts the velocity of rectified flow; `epsilon` and `v_prediction` are DDPM's, for the older weights.
    `regression` predicts the clean latents at once and without noise, as deterministic video predictors do (PredFormer,
    arXiv:2410.04733): a baseline for what follows from the given frames. Of the settings below it takes none."""
    distribution: str = "logit_normal"
    """Of the times in [0, 1]: `logit_normal`, `uniform` (as the older weights had it) or `mode` (arXiv:2403.03206)."""
    mean: float = 0.0
    """logit_normal: mean of the normal before the sigmoid."""
    std: float = 1.0
    """logit_normal: its standard deviation."""
    mode_scale: float = 1.29
    """mode: weight of the middle, -1 to 1.75."""
    shift: float = 1.0
    """flow: above 1 moves times towards noise, in training and in the exported scheduler alike."""
    dynamic_shift: bool = False
    """flow: the shift follows from each clip's size and length, sqrt(H W / 512^2) sqrt(T), there and here too."""
    min_snr_gamma: float | None = None
    """Weighs clips by min(SNR, gamma) in the error of the clean latents (arXiv:2303.09556, where it is 5); none by default."""
    zero_terminal_snr: bool = False
    """v_prediction: rescales the betas so that the last step is pure noise (arXiv:2305.08891)."""

    def __post_init__(self) -> None:
        require(self.objective in OBJECTIVES, "flow.objective", self.objective, ", ".join(OBJECTIVES))
        require(self.distribution in DISTRIBUTIONS, "flow.distribution", self.distribution, ", ".join(DISTRIBUTIONS))
        require(self.std > 0, "flow.std", self.std, "above 0; uniform times are flow.distribution=uniform")
        low, high = flow.MODE_SCALES
        require(low <= self.mode_scale <= high, "flow.mode_scale", self.mode_scale, f"{low:g} to {high:.4g}")
        require(self.shift > 0, "flow.shift", self.shift, "above 0")
        gamma = self.min_snr_gamma
        require(gamma is None or gamma > 0, "flow.min_snr_gamma", gamma, "above 0, or null for no weighting")
        # The discrete schedulers have no shift, so training with one would not be what sampling does.
        discrete = self.objective != "flow"
        reason = f"with flow.objective={self.objective}, whose scheduler has no shift"
        require(not (discrete and self.shift != 1), "flow.shift", self.shift, f"1 {reason}")
        require(not (discrete and self.dynamic_shift), "flow.dynamic_shift", self.dynamic_shift, f"false {reason}")
        both = self.dynamic_shift and self.shift != 1
        require(not both, "flow.shift", self.shift, "1 with flow.dynamic_shift, which computes it")
        unweighted = self.objective != "regression" or gamma is None
        require(unweighted, "flow.min_snr_gamma", gamma, "null with flow.objective=regression, which has no noise")
        reason = {
            "flow": "whose last step is pure noise anyway",
            "epsilon": "since the noise of pure noise says nothing of the data; v_prediction takes it",
            "regression": "which has no noise",
        }.get(self.objective, "")
        allowed = self.objective == "v_prediction" or not self.zero_terminal_snr
        name = "flow.zero_terminal_snr"
        require(allowed, name, self.zero_terminal_snr, f"false with flow.objective={self.objective}, {reason}")

    def draw_time(self, generator: torch.Generator) -> Tensor:
        """One time in [0, 1], float32 `1`, not shifted yet."""
        if self.distribution == "mode":
            return flow.mode_time(1, self.mode_scale, generator)
        if self.distribution == "uniform":
            return flow.uniform_time(1, generator)
        return flow.logit_normal_time(1, self.mean, self.std, generator)

    def shifted(self, time: Tensor, height: int, width: int, latent_frames: int) -> Tensor:
        """Times of clips of `height` by `width` pixels and `latent_frames` latent frames, shifted as in sampling."""
        shift = flow.dynamic_shift(height, width, latent_frames) if self.dynamic_shift else self.shift
        return flow.shift_time(time, shift)


def make_scheduler(config: FlowConfig) -> FlowMatchEulerDiscreteScheduler | DDIMScheduler | RegressionScheduler:
    """The scheduler that samples from a model of this objective, and that holds the betas it is trained with.

    The betas are linear from 1e-4 to 0.02 over 1000 steps, those of Ho et al. (arXiv:2006.11239), which Open-Sora 1.0,
    VDT and Latte kept. Trailing spacing begins at the last step, without which zero-terminal SNR is in vain.
    """
    if config.objective == "flow":
        if config.dynamic_shift:
            return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
        return FlowMatchEulerDiscreteScheduler(shift=config.shift)
    if config.objective == "regression":
        return RegressionScheduler(num_train_timesteps=TRAIN_TIMESTEPS)
    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type=config.objective,
        rescale_betas_zero_snr=config.zero_terminal_snr,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def denoising_losses(
    model: torch.nn.Module, inputs: dict[str, Tensor], config: FlowConfig, learn_sigma: bool = False
) -> dict[str, Tensor]:
    """The loss over generated cells, the mean over those of each clip and then over clips.

        flow           E w |u(x_t, t) - (e - x)|^2                           (arXiv:2209.03003)
        epsilon        E w |e(x_k, k) - e|^2                                 (arXiv:2006.11239, eq. 14)
        v_prediction   E w |v(x_k, k) - v|^2                                 (arXiv:2202.00512)
        learn_sigma    the same + lambda L_vlb                               (arXiv:2102.09672, eq. 16)

    with w = 1 or min-SNR's. A discrete step is k = floor(1000 t).

    Args:
        model: takes noisy latents, timesteps in [0, 1000] and text states, like STGenTransformer3DModel.
        inputs: latents, noise, condition_latents `b c t h w`; condition_mask `b p t h w`; time `b` in [0, 1]; text
            `b n d` and text_mask `b n`; whatever else there is goes to the model by its name.
        learn_sigma: the model's output is `b 2c t h w`, the prediction and the interpolation of the variance.

    Returns:
        `loss`, and with `learn_sigma` its two terms `mse` and `vlb` (bits per cell and channel, of one step).
    """
    x, noise, time = inputs["latents"], inputs["noise"], inputs["time"]
    generated = generated_cells(inputs["condition_mask"])
    if config.objective == "flow":
        noisy, target = flow.interpolant(x, noise, time), flow.velocity(x, noise)
        timestep, snr = TRAIN_TIMESTEPS * time, flow.flow_snr(time)
    elif config.objective == "regression":
        # The same place in the model's world as the first step of sampling, with the noise taken out.
        noisy, target = torch.zeros_like(x), x
        timestep, snr = torch.full_like(time, TRAIN_TIMESTEPS), torch.zeros_like(time)
    else:
        alphas_cumprod = make_scheduler(config).alphas_cumprod.to(x.device)
        timestep = (TRAIN_TIMESTEPS * time).long().clamp(max=TRAIN_TIMESTEPS - 1)
        alpha_bar = alphas_cumprod[timestep]
        noisy, snr = ddpm.add_noise(x, noise, alpha_bar), ddpm.ddpm_snr(alpha_bar)
        target = noise if config.objective == "epsilon" else ddpm.v_target(x, noise, alpha_bar)
    prediction = model(
        noisy,
        timestep,
        inputs["text"],
        encoder_attention_mask=inputs["text_mask"],
        **{
            name: value
            for name, value in inputs.items()
            if name not in ("latents", "noise", "time", "text", "text_mask")
        },
        return_dict=False,
    )[0]
    gamma = config.min_snr_gamma
    weight = None if gamma is None else flow.min_snr_weight(config.objective, snr, gamma)
    if not learn_sigma:
        return {"loss": flow.masked_mse(prediction, target, generated, weight)}
    prediction, interpolation = prediction.chunk(2, dim=1)
    mse = flow.masked_mse(prediction, target, generated, weight)
    predicted_x = ddpm.predicted_clean(config.objective, noisy, prediction.detach().float(), alpha_bar)
    bound = ddpm.variational_bound(x, predicted_x, interpolation, alphas_cumprod, timestep)
    vlb = flow.masked_mean(bound, generated).mean()
    return {"loss": mse + VLB_WEIGHT * vlb, "mse": mse, "vlb": vlb}
