"""A wider transformer that does what a trained one does, to train on with: a small model learns much in little time, and
a larger one begins where it ended.

Shapes: o and i the rows and columns of a weight, h heads of e channels, p projections of each head (query, key, value).
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

from stgen.models.loading import load_every_tensor
from stgen.models.transformer import STGenTransformer3DModel

NOISE = 0.5
"""By how much the weights of two copies differ, in root mean squares of the weight."""

PROJECTIONS = {"to_qkv": 3, "to_kv": 2, "to_q": 1}
"""Rows ordered (heads, so many, head)."""

READ_TOKENS = {"to_qkv", "to_q", "proj", "proj_out"}
FIRST = 0.75
"""Share of the first copy of a channel in what these layers read."""


@torch.no_grad()
def widened(model: STGenTransformer3DModel, seed: int = 0) -> STGenTransformer3DModel:
    """A copy of twice the width, with twice the heads, that has every channel twice (Net2Net, Chen et al. 2016,
    arXiv:1511.05641; of transformers HyperCloning, Samragh et al. 2024, arXiv:2409.12903).

    What reads two copies has weights that add up to the old one and differ at random, else both would have the same
    gradient forever. All is as before but for the positions that are added to the tokens: of the copies of a channel
    the first has its frequency and the second one that the narrow model has not, so the first is read more.

    Args:
        seed: of the differences.

    Returns:
        In float32, on the CPU.

    Raises:
        ValueError: `mlp_ratio` makes an MLP of a width that isn't doubled with the model's.
    """
    generator = torch.Generator().manual_seed(seed)
    head = model.config.attention_head_dim
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    wide = STGenTransformer3DModel(**{**config, "num_attention_heads": 2 * model.config.num_attention_heads})

    def apart(weight: Tensor, first: float) -> Tensor:
        """`o i -> o i 2`, which add up to `weight`."""
        noise = NOISE * weight.square().mean().sqrt() * torch.randn(weight.shape, generator=generator)
        return torch.stack([first * weight + noise, (1 - first) * weight - noise], dim=-1)

    weights = {}
    for name, saved in model.state_dict().items():
        weight, layers = saved.float().cpu(), set(name.split("."))
        if not layers.isdisjoint({"norm_q", "norm_k", "null_text_embedding"}):  # as wide as a head, and as the text
            weights[name] = weight
            continue
        if not layers.isdisjoint({"scale_shift_table", "class_embed"}):
            weights[name] = repeat(weight, "o i -> o (i two)", two=2)
            continue
        wider, projection = weight, layers & PROJECTIONS.keys()
        if projection:
            wider = repeat(wider, "(h p e) ... -> (h two p e) ...", two=2, p=PROJECTIONS[projection.pop()], e=head)
        elif "proj_out" not in layers:
            wider = repeat(wider, "o ... -> (o two) ...", two=2)
        if weight.ndim == 2 and layers.isdisjoint({"patch_embed", "linear_1"}):  # which read what is no wider
            pair = apart(wider, 0.5 if layers.isdisjoint(READ_TOKENS) else FIRST)
            e = head if "to_out" in layers else 1  # heads are copied whole
            wider = rearrange(pair, "o (h e) two -> o (h two e)", e=e)
        weights[name] = wider
    load_every_tensor(wide, weights, "the narrow model, widened")
    return wide.train(model.training)
