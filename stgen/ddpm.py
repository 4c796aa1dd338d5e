"""The discrete-time diffusion of the older weights (Open-Sora 1.0, VDT, Latte): epsilon and v-prediction, learned sigma.

Pure functions, each under its equation. Steps are counted k = 0 .. T - 1 from the data to the noise, as in diffusers,
where the papers count t = 1 .. T; `alpha_bar` is the cumulative product of 1 - beta up to a step, diffusers'
`alphas_cumprod`. Shapes: `b c t h w`; one value a clip, `b`.
"""

import math

import torch
from torch import Tensor

from stgen.flow import per_clip


def add_noise(x: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_k = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) e  (Ho et al. 2020, arXiv:2006.11239, eq. 4).

    Args:
        x, noise: `b c t h w`.
        alpha_bar: `b`, in [0, 1].
    """
    alpha_bar = per_clip(alpha_bar, x)
    return alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise


def v_target(x: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """v = sqrt(alpha_bar) e - sqrt(1 - alpha_bar) x  (Salimans and Ho 2022, arXiv:2202.00512, sec. 4)."""
    alpha_bar = per_clip(alpha_bar, x)
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x


def predicted_clean(objective: str, noisy: Tensor, prediction: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latents that a prediction stands for, `b c t h w`.

        epsilon        x = (x_k - sqrt(1 - alpha_bar) e) / sqrt(alpha_bar)    (arXiv:2006.11239, eq. 15)
        v_prediction   x = sqrt(alpha_bar) x_k - sqrt(1 - alpha_bar) v        (arXiv:2202.00512, app. D)

    Args:
        objective: `epsilon` or `v_prediction`. The first says nothing at alpha_bar = 0.
    """
    alpha_bar = per_clip(alpha_bar, noisy)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if objective == "epsilon":
        return (noisy - sigma * prediction) / signal
    return signal * noisy - sigma * prediction


def ddpm_snr(alpha_bar: Tensor) -> Tensor:
    """SNR = alpha_bar / (1 - alpha_bar)  (arXiv:2303.09556, sec. 3.1): 0 at the last step of zero-terminal-SNR betas."""
    return alpha_bar / (1 - alpha_bar)


def step_variances(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What one reverse step from k to k - 1 is made of, each `T`, float64.

        beta       = 1 - alpha_bar_k / alpha_bar_{k-1}                                  (with alpha_bar_{-1} = 1)
        beta~      = (1 - alpha_bar_{k-1}) / (1 - alpha_bar_k) beta                     (arXiv:2006.11239, eq. 7)
        mean_scale = sqrt(alpha_bar_{k-1}) beta / (1 - alpha_bar_k), the weight of x in the posterior's mean   (ibid.)

    Returns:
        log beta, log beta~ and mean_scale. beta~ is 0 at k = 0 and takes the value at k = 1 there, as in the code of
        Nichol and Dhariwal, so that its logarithm exists.
    """
    alpha_bar = alphas_cumprod.double()
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    posterior = (1 - before) / (1 - alpha_bar) * beta
    posterior[0] = posterior[1]
    return beta.log(), posterior.log(), before.sqrt() * beta / (1 - alpha_bar)


def variational_bound(
    x: Tensor, predicted_x: Tensor, interpolation: Tensor, alphas_cumprod: Tensor, step: Tensor
) -> Tensor:
    """L_k of the variational bound in bits, for a learned variance  (Nichol and Dhariwal 2021, arXiv:2102.09672).

        Sigma = exp(f log beta + (1 - f) log beta~),  f = (interpolation + 1) / 2                      (eq. 15)
        L_k   = KL(q(x_{k-1} | x_k, x) || N(mu, Sigma))                                                (eq. 4 and 6)
              = (log Sigma - log beta~ - 1 + (beta~ + |mu~ - mu|^2) / Sigma) / 2
        L_0   = -log N(x; mu, Sigma) = (log(2 pi Sigma) + |x - mu|^2 / Sigma) / 2

    Both means weigh x_k alike, so mu~ - mu = mean_scale (x - x'). f is centred as in the authors' code and diffusers'
    `learned_range`. L_0 is the density and not the paper's discretised one, which is for pixels of 8 bits: latents have no bins.

    Args:
        x: clean latents `b c t h w`.
        predicted_x: those of the model; detach them, since only the variance is to learn from this term (sec. 3.1).
        interpolation: second half of the model's output, `b c t h w`; -1 means beta~ and 1 means beta.
        alphas_cumprod: `T`.
        step: k of each clip, int64 `b`.

    Returns:
        `b c t h w`.
    """
    log_beta, log_posterior, mean_scale = (
        per_clip(table[step.to(table.device)].to(x.device, torch.float32), x)
        for table in step_variances(alphas_cumprod)
    )
    fraction = (interpolation.float() + 1) / 2
    log_variance = fraction * log_beta + (1 - fraction) * log_posterior
    distance = (mean_scale * (x - predicted_x)).square() * torch.exp(-log_variance)
    divergence = log_variance - log_posterior - 1 + torch.exp(log_posterior - log_variance) + distance
    likelihood = math.log(2 * math.pi) + log_variance + distance
    return torch.where(per_clip(step.to(x.device), x) == 0, likelihood, divergence) / (2 * math.log(2))
