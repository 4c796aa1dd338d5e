"""Optimizer and learning rate, counted in samples."""

import math
from dataclasses import dataclass

import torch

from stgen.config import require


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101), warm-up and cosine decay, averaged weights."""

    lr: float = 1e-4
    """Highest learning rate."""
    beta2: float = 0.99
    """Decay of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay; 1D parameters (norms, biases) are not decayed."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm once an optimizer step."""
    warmup: int = 1000
    """Samples over which the learning rate rises linearly from 0."""
    final_lr: float = 0.0
    """Learning rate that the cosine ends at, relative to `lr`."""
    ema_decay: float = 0.9999
    """Highest decay of the averaged weights; it is warmed up as 1 - (1 + step)^(-3/4)."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", self.lr, "above 0")
        require(0 < self.beta2 < 1, "optimizer.beta2", self.beta2, "between 0 and 1")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(self.max_grad_norm > 0, "optimizer.max_grad_norm", self.max_grad_norm, "above 0")
        require(self.warmup >= 0, "optimizer.warmup", self.warmup, "0 or more")
        require(0 <= self.final_lr <= 1, "optimizer.final_lr", self.final_lr, "0 to 1")
        require(0 <= self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "0 up to, not including, 1")


def make_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, betas=(0.9, config.beta2))


def learning_rate(config: OptimizerConfig, samples: int, total: int) -> float:
    """The rate after `samples` of `total` samples: a pure function, so there is no scheduler state to resume."""
    warm = min(1.0, samples / config.warmup) if config.warmup else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, samples / total)))
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * cosine)
