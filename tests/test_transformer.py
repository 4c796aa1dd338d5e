"""The transformer: groupings, conditioning, the cache of given tokens, and what diffusers expects of a model."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import fill_zeros, tiny_transformer
from hypothesis import given, settings
from hypothesis import strategies as st

from stgen import STGenTransformer3DModel
from stgen.masks import fold_mask
from stgen.models.attention import (
    AXES,
    PREDFORMER,
    WRITTEN_OUT,
    GivenCache,
    Linear,
    Skips,
    STGenAttnProcessor,
    STGenCrossAttention,
    Windows,
    dispatch_attention,
    group_mask,
    parse_pattern,
)

# --- Groupings ----------------------------------------------------------------------------------------------------

GROUPINGS = st.one_of(
    st.sampled_from(list(AXES.values())),
    st.builds(Windows, st.tuples(*[st.integers(1, 4)] * 3), st.booleans()),
    st.builds(Skips, st.integers(1, 5), st.booleans()),
)
GRIDS = st.tuples(*[st.integers(1, 6)] * 3)


def same_group(grouping, grid: tuple[int, int, int], a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Whether two tokens attend to each other, from their coordinates alone."""
    if isinstance(grouping, Windows):
        for size, n, i, j in zip(grouping.size, grid, a, b, strict=True):
            size = min(size, n)
            first = size // 2 if grouping.shifted and size < n else size  # tokens of the first window
            if (i - first) // size != (j - first) // size:
                return False
        return True
    if isinstance(grouping, Skips):
        n = min(grouping.n, math.prod(grid))
        i, j = ((x[0] * grid[1] + x[1]) * grid[2] + x[2] for x in (a, b))
        return i // n % n == j // n % n if grouping.runs else i % n == j % n
    fixed = {"spatial": (0,), "temporal": (1, 2), "full": (), "column": (0, 2), "row": (0, 1)}[grouping.name]
    return all(a[axis] == b[axis] for axis in fixed)


@given(GROUPINGS, GRIDS, st.integers(1, 2), st.integers(1, 3))
@settings(deadline=None)
def test_groups_are_what_they_say_and_join_undoes_split(
    grouping, grid: tuple[int, int, int], b: int, heads: int
) -> None:
    tokens = math.prod(grid)
    x = torch.arange(1, b * tokens * heads + 1).view(b, *grid, heads, 1).float()
    groups = grouping.split(x)
    assert torch.equal(grouping.join(groups, grid), x)
    # Who sits with whom, and what the mask leaves of it, against the coordinates.
    mask = group_mask(grouping, grid, b, heads, None, x.device)
    seen = torch.zeros(b * tokens * heads + 1, b * tokens * heads + 1, dtype=torch.bool)
    g, length, columns, _ = groups.shape
    allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask
    allowed = allowed.expand(g, columns, length, length)
    for i, j in itertools.product(range(g), range(columns)):
        ids = groups[i, :, j, 0].long()
        seen[ids[:, None], ids[None]] |= allowed[i, j]
    coordinates = list(itertools.product(*map(range, grid)))
    for (i, p), (j, q) in itertools.islice(itertools.product(enumerate(coordinates), repeat=2), 4000):
        for clip, head in ((0, 0), (b - 1, heads - 1)):
            ids = [1 + (clip * tokens + n) * heads + head for n in (i, j)]
            assert seen[ids[0], ids[1]] == same_group(grouping, grid, p, q), (p, q)
    if b > 1:
        assert not seen[1 : 1 + tokens * heads, 1 + tokens * heads :].any()  # clips never see each other
    assert not seen[1:, 0].any()  # nor padding, which is 0


@given(GROUPINGS, GRIDS, st.integers(0, 2**32))
@settings(deadline=None)
def test_given_tokens_see_given_tokens_alone(grouping, grid: tuple[int, int, int], seed: int) -> None:
    given_tokens = torch.rand(2, *grid, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = group_mask(grouping, grid, 2, 3, given_tokens, given_tokens.device)
    places = grouping.split(given_tokens[..., None, None].expand(2, *grid, 3, 1).float())[..., 0].bool().transpose(1, 2)
    leaks = mask & places[..., :, None] & ~places[..., None, :]
    alone = ~(places[..., None, :] & torch.ones_like(mask)).any(-1, keepdim=True)
    assert not (leaks & ~alone).any()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("st", ["spatial", "temporal"]),
        ("s2t", ["spatial", "spatial", "temporal"]),
        ("[ts]2 f", ["temporal+spatial", "temporal+spatial", "full"]),
        ("hw g(1,2,3) G(4,4,4) k(2) K(3)", ["column", "row", "window", "window", "skip", "skip"]),
    ],
)
def test_pattern_grammar(pattern: str, names: list[str]) -> None:
    assert ["+".join(g.name for g in groupings) for groupings in parse_pattern(pattern)] == names


@pytest.mark.parametrize("pattern", ["", "x", "s[", "[]", "g(2,2)", "g(0,1,1)", "k", "s0", "2s", "[[s]]"])
def test_bad_patterns_are_named(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern is "):
        parse_pattern(pattern)


@pytest.mark.parametrize("name", PREDFORMER)
@torch.no_grad()
def test_predformer(name: str) -> None:
    """After each block, a token has reached exactly the tokens that the factorisation says."""
    blocks = {
        "full": "ffff",
        "factorised space-time": "sstt",
        "factorised time-space": "ttss",
        "binary space-time": "stst",
        "binary time-space": "tsts",
        "triplet space-time-space": "stss",
        "triplet time-space-time": "tstt",
        "quadruplet space-time-time-space": "stts",
        "quadruplet time-space-space-time": "tsst",
    }[name]
    grid = (3, 2, 2)
    tokens = list(itertools.product(*map(range, grid)))
    x = torch.randn(1, 4, *grid, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, :, 0, 0, 0] += 1
    reached = {(0, 0, 0)}
    for depth, letter in enumerate(blocks, start=1):
        model = tiny_transformer(
            pattern=PREDFORMER[name].format(n=2), num_layers=depth, mlp="swiglu", text_dim=None, patch_size=(1, 1, 1)
        )
        reached = {p for p in tokens if any(same_group(AXES[letter], grid, p, q) for q in reached)}
        outputs = [model(y, torch.tensor([500.0])).sample for y in (x, changed)]
        moved = (outputs[0] - outputs[1]).abs().amax(1)[0] > 0
        assert {p for p in tokens if moved[p]} == reached, depth


# --- Every form of the model --------------------------------------------------------------------------------------

FORMS = {
    "native": {},
    "windows": {"pattern": "g(2,2,2)G(2,2,2)s", "num_layers": 3},
    "skips": {"pattern": "k(3)K(2)t", "num_layers": 3},
    "axial": {"pattern": "hwt"},
    "open-sora 1.0": {
        "pattern": "[st]",
        "num_layers": 2,
        "temporal_modulation": "gated",
        "qk_norm": None,
        "rope": None,
        "time_positions": "attention",
        "space_scale": 0.5,
        "cross_norm": False,
        "mlp": "gelu-approximate",
        "null_text": "learned",
        "text_tokens": 9,
        "learn_sigma": True,
        "mask_channels": 0,
    },
    "open-sora 1.1": {
        "pattern": "[st]",
        "num_layers": 2,
        "qk_norm": "after_rotary",
        "rope": "time",
        "time_positions": None,
        "position_resolution": 512,
        "size_conditioning": "size",
        "cross_norm": False,
        "mask_channels": 0,
    },
    "open-sora 1.2": {
        "pattern": "st",
        "rope": "time",
        "time_positions": None,
        "position_resolution": 512,
        "size_conditioning": "fps",
        "cross_norm": False,
    },
    "vdt": {
        "pattern": "[ts]",
        "num_layers": 2,
        "modulation": "full",
        "temporal_modulation": "affine",
        "qk_norm": None,
        "rope": None,
        "text_dim": None,
    },
    "latte": {
        "modulation": "full",
        "qk_norm": None,
        "rope": None,
        "time_positions": "stream",
        "text_dim": None,
        "num_classes": 5,
    },
    "latte text-to-video": {
        "qk_norm": None,
        "rope": None,
        "time_positions": "stream",
        "cross_attention": ("spatial",),
        "cross_norm": False,
        "position_grid": 4,
    },
    "predformer": {"pattern": "tsst", "num_layers": 4, "mlp": "swiglu", "text_dim": None},
    "text in space": {"pattern": "st", "cross_attention": ("spatial",), "null_text": "zero"},
    "isolated": {"pattern": "stf", "isolate_given": True},
}


def inputs(b: int = 2, grid: tuple[int, int, int] = (3, 5, 3), frames: int = 5, **config) -> dict[str, torch.Tensor]:
    """Inputs of any form; the first `frames` pixel frames are given, and half of the other pixels at random."""
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(b, 1, 1 + 4 * (grid[0] - 1), 8 * grid[1], 8 * grid[2], generator=generator) > 0.5).float()
    mask[:, :, :frames] = 0
    batch = {
        "hidden_states": torch.randn(b, 4, *grid, generator=generator),
        "timestep": torch.tensor([300.0, 800.0][:b]),
        "condition_latents": torch.randn(b, 4, *grid, generator=generator),
        "condition_mask": fold_mask(mask, 4, 8),
    }
    if config.get("text_dim", 16) is not None:
        batch["encoder_hidden_states"] = torch.randn(b, 6, 16, generator=generator)
        batch["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]][:b]).bool()
    if config.get("num_classes"):
        batch["class_labels"] = torch.tensor([1, 4][:b])
    if config.get("size_conditioning"):
        for name, numbers in (("fps", [24.0, 8.0]), ("num_frames", [9.0, 9.0])):
            batch[name] = torch.tensor(numbers[:b])
    if config.get("position_resolution"):
        batch["height"], batch["width"] = torch.tensor([40.0, 40.0][:b]), torch.tensor([24.0, 24.0][:b])
    return batch


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_batch_of_one_equals_batch_of_many(form: str) -> None:
    model, batch = tiny_transformer(**FORMS[form]), inputs(**FORMS[form])
    both = model(**batch).sample
    assert both.shape == (2, model.out_channels, 3, 5, 3)
    for i in range(2):
        one = model(**{name: value[i : i + 1] for name, value in batch.items()}).sample
        torch.testing.assert_close(one, both[i : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 1, 1), (4, 3, 5)])
@torch.no_grad()
def test_any_grid(form: str, grid: tuple[int, int, int]) -> None:
    model = tiny_transformer(**{**FORMS[form], "patch_size": (2, 2, 2)})
    batch = inputs(grid=grid, frames=1, **FORMS[form])
    out = model(**batch).sample
    assert out.shape == (2, model.out_channels, *grid)
    assert out.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_gives_the_same_gradients(form: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny_transformer(**FORMS[form]).train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        batch = inputs(**FORMS[form])
        if model.null_text_embedding is not None:
            batch["drop_text"] = torch.tensor([True, False])
        model(**batch).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_what_the_model_is_told_it_uses(form: str) -> None:
    model, batch = tiny_transformer(**FORMS[form]), inputs(**FORMS[form])
    expected = model(**batch).sample
    for name, value in batch.items():
        if (
            name in ("encoder_attention_mask", "condition_mask", "num_frames")
            and model.config.size_conditioning != "size"
        ):
            continue
        changed = value.flip(0) if value.dtype in (torch.bool, torch.int64) else value * 0.7
        if name == "condition_mask":
            changed = (value > 0.6).float()
        moved = (model(**{**batch, name: changed}).sample - expected).abs().max()
        assert moved > 1e-6, name


@pytest.mark.parametrize("form", FORMS)
def test_config_and_weights_survive_saving(form: str, tmp_path: Path) -> None:
    model = tiny_transformer(**FORMS[form])
    model.save_pretrained(tmp_path)
    again = STGenTransformer3DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs(**FORMS[form])).sample, model(**inputs(**FORMS[form])).sample)


def test_bf16_runs() -> None:
    for config in FORMS.values():
        model = tiny_transformer(**config).to(torch.bfloat16)
        batch = {
            k: v.bfloat16() if v.dtype == torch.float32 and k != "timestep" else v for k, v in inputs(**config).items()
        }
        assert model(**batch).sample.dtype == torch.bfloat16


@torch.no_grad()
def test_packed_text_equals_padded_text() -> None:
    model, batch = tiny_transformer(), inputs()
    expected = model(**batch).sample
    states, mask = batch["encoder_hidden_states"], batch["encoder_attention_mask"]
    packed = {**batch, "encoder_hidden_states": states[mask][None], "encoder_attention_mask": mask.sum(1)}
    torch.testing.assert_close(model(**packed).sample, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_null_text() -> None:
    for null in ("learned", "zero"):
        model, batch = tiny_transformer(null_text=null, text_tokens=6), inputs()
        dropped = model(**batch, drop_text=torch.tensor([True, False])).sample
        states = batch["encoder_hidden_states"].clone()
        states[0] = 0 if model.null_text_embedding is None else model.null_text_embedding[:6]
        torch.testing.assert_close(model(**{**batch, "encoder_hidden_states": states}).sample, dropped)
    with pytest.raises(ValueError, match="encoder_hidden_states is '6 tokens', allowed: at most 4"):
        tiny_transformer(null_text="learned", text_tokens=4)(**inputs(), drop_text=torch.tensor([True, True]))


@pytest.mark.parametrize("chunk", [1, 5, 9, 40])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_pieces_are_the_whole(form: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What inference on a CPU does in pieces, whatever their size: lines, frames, clips."""
    model, batch = tiny_transformer(**FORMS[form]), inputs(**FORMS[form])
    whole = torch.ones_like(batch["condition_mask"])
    whole[:, :, 0] = 0
    for mask in (batch["condition_mask"], whole):
        batch["condition_mask"] = mask
        monkeypatch.undo()
        expected = model(**batch).sample
        monkeypatch.setattr("stgen.models.attention.CHUNK", chunk)
        monkeypatch.setattr("stgen.models.transformer.CHUNK", chunk)
        torch.testing.assert_close(model(**batch).sample, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "dim", "out"), [(512, 384, 256), (40, 7, 5)])
def test_onednn_multiplies_as_blas_does(tokens: int, dim: int, out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Linear(dim, out)
    x = torch.randn(1, 3, tokens, 2, dim)[:, 1:]  # not contiguous
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    calls = []
    monkeypatch.setattr("stgen.models.attention.F.linear", lambda *args: calls.append(args) or expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
        large = tokens > 100 and torch.backends.mkldnn.is_available()
        assert len(calls) == (0 if large else 1)
        with torch.autocast("cpu"):
            layer(x)
    layer(x)  # with gradients
    assert len(calls) == (2 if large else 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_trains_in_half_precision_on_a_cpu_attends_in_float32(dtype: torch.dtype) -> None:
    """bfloat16 with more keys than are written out."""
    q, k, v = (torch.randn(2, n, 2, 8, dtype=dtype) for n in (6, WRITTEN_OUT + 1, WRITTEN_OUT + 1))
    at_least = torch.promote_types(dtype, torch.float32)
    rows = (x.to(at_least).transpose(1, 2) for x in (q, k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(*rows).transpose(1, 2).to(dtype)
    with torch.autocast("cpu", enabled=dtype != torch.float64):
        assert torch.equal(dispatch_attention(q, k, v, None, None), exact)


@pytest.mark.parametrize("masked", [False, True])
def test_what_trains_in_bfloat16_on_a_cpu_is_attention(masked: bool) -> None:
    """Written out: the same values and gradients up to rounding, of queries and keys in whatever dtype."""
    inputs = [torch.randn(2, n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (6, 5, 5)]
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])[:, None, None] if masked else None
    exact = dispatch_attention(*inputs, mask, None)
    upstream = torch.randn_like(exact)
    q, k, v = inputs[0].float(), inputs[1].float(), inputs[2].bfloat16()
    with torch.autocast("cpu"):
        out = dispatch_attention(q, k, v, mask, "native")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, atol=0.02, rtol=0.02)
    gradients = torch.autograd.grad(out, inputs, upstream.bfloat16())
    for ours, theirs in zip(gradients, torch.autograd.grad(exact, inputs, upstream), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)
    if mask is not None:  # what is masked out has no part in it
        assert not gradients[2][1, [1, 3, 4]].any()


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_folded_cross_attention_is_cross_attention(masked: bool) -> None:
    """Text no longer than a head is wide: two products instead of four, unless something hangs on the layers."""
    attn = STGenCrossAttention(24, 2, qk_norm=False)
    x, text = torch.randn(2, 4, 16, 16, 24), torch.randn(2, 5, 24)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]]) if masked else None
    with torch.enable_grad():
        expected = attn(x, text, mask)
    calls = []
    assert attn.foldable(x)
    torch.testing.assert_close(attn(x, text, mask), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attn(x, text, mask, x), x + expected, atol=1e-5, rtol=1e-5)
    attn.to_q.register_forward_hook(lambda *_: calls.append(True))
    assert not attn.foldable(x)
    torch.testing.assert_close(attn(x, text, mask), expected, atol=1e-5, rtol=1e-5)
    assert calls
    attn = STGenCrossAttention(24, 2, qk_norm=False)
    attn.to_out[0] = torch.nn.Linear(24, 24)  # another kind of layer, as LoRA puts there
    assert not attn.foldable(x)


@pytest.mark.parametrize("name", ["spatial_attn", "temporal_attn", "cross_attn", "ff"])
@torch.no_grad()
def test_what_hangs_on_a_module_sees_all_tokens_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stgen.models.attention.CHUNK", 4)
    model, batch, shapes = tiny_transformer(), inputs(), []
    expected = model(**batch).sample
    for block in model.transformer_blocks:
        if hasattr(block, name):
            getattr(block, name).register_forward_hook(lambda _, args, out: shapes.append((args[0].shape, out.shape)))
    torch.testing.assert_close(model(**batch).sample, expected, atol=1e-5, rtol=1e-5)
    assert len(shapes) == sum(hasattr(block, name) for block in model.transformer_blocks)
    b, t = batch["hidden_states"].shape[0], batch["hidden_states"].shape[2]
    assert all(shape[:2] == (b, t) for pair in shapes for shape in pair)


@torch.no_grad()
def test_a_processor_of_ones_own_sees_all_frames() -> None:
    class First(STGenAttnProcessor):
        """Every frame attends to the first, as in text-to-video without training."""

        def __call__(self, attn, hidden_states, *args):
            shapes.append(hidden_states.shape)
            return super().__call__(attn, hidden_states[:, :1].expand_as(hidden_states), *args)

    shapes: list[torch.Size] = []
    model, batch = tiny_transformer(), inputs(grid=(3, 64, 64))
    attn = model.transformer_blocks[0].spatial_attn
    attn.set_processor(First())
    model(**batch)
    assert [shape[1] for shape in shapes] == [3]


@torch.no_grad()
def test_per_frame_modulation_equals_per_token_modulation() -> None:
    model, batch = tiny_transformer(), inputs()
    whole = torch.ones_like(batch["condition_mask"])
    whole[:, :, 0] = 0  # whole frames, the same in every clip: the fast path
    once = model(**{**batch, "condition_mask": whole}).sample
    odd = whole.clone()
    odd[1, :, 2] = 0  # another clip's mask; the first clip must not notice
    part = odd.clone()
    part[1, :, 2, 2:] = 1
    for mask in (odd, part):
        torch.testing.assert_close(model(**{**batch, "condition_mask": mask}).sample[0], once[0], atol=1e-6, rtol=1e-5)


# --- The mask ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_transformer_does_not_see_what_it_must_not() -> None:
    model, batch = tiny_transformer(), inputs()
    expected = model(**batch).sample
    assert expected.shape == batch["hidden_states"].shape
    # Noise in given cells, padding text, and condition latents of wholly hidden cells change nothing.
    given = (batch["condition_mask"].amax(1, keepdim=True) == 0).expand_as(batch["hidden_states"])
    hidden = (batch["condition_mask"].amin(1, keepdim=True) == 1).expand_as(batch["hidden_states"])
    batch["hidden_states"] = torch.where(given, torch.full_like(batch["hidden_states"], 9.0), batch["hidden_states"])
    batch["condition_latents"] = torch.where(hidden, batch["condition_latents"] + 5, batch["condition_latents"])
    batch["encoder_hidden_states"][1, 2:] = 7.0
    assert torch.equal(model(**batch).sample, expected)


@torch.no_grad()
def test_transformer_sees_what_it_should() -> None:
    model, batch = tiny_transformer(), inputs()
    expected = model(**batch).sample
    for name in ("hidden_states", "timestep", "encoder_hidden_states", "condition_latents"):
        changed = dict(batch)
        changed[name] = batch[name] * 0.5
        assert not torch.allclose(model(**changed).sample, expected, atol=1e-4), name


@torch.no_grad()
def test_no_condition_equals_everything_hidden() -> None:
    model, batch = tiny_transformer(), inputs()
    batch["condition_mask"] = torch.ones_like(batch["condition_mask"])
    expected = model(**batch).sample
    del batch["condition_mask"], batch["condition_latents"]
    torch.testing.assert_close(model(**batch).sample, expected, atol=1e-5, rtol=1e-5)


def test_transformer_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="pattern is 'sx', allowed: letters of s, t, f, h, w"):
        tiny_transformer(pattern="sx")
    batch = inputs()
    del batch["condition_mask"]
    with pytest.raises(ValueError, match="condition_mask"):
        tiny_transformer()(**batch)


# --- Given tokens cost nothing ------------------------------------------------------------------------------------


def frame_mask(b: int, grid: tuple[int, int, int], given_frames: list[int]) -> torch.Tensor:
    mask = torch.ones(b, 4, *grid)
    mask[:, :, given_frames] = 0
    return mask


@pytest.mark.parametrize("pattern", ["st", "f", "[ts]", "hwt", "g(2,2,2)G(2,2,2)", "k(3)K(2)", "tg(3,1,2)f"])
@pytest.mark.parametrize("frames", [[0, 1], [0, 4], [2], [0, 1, 2, 3]])
@pytest.mark.parametrize("chunk", [512, 6])
@torch.no_grad()
def test_cached_steps_equal_uncached_steps(
    pattern: str, frames: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stgen.models.attention.CHUNK", chunk)
    grid = (5, 5, 3)
    model = tiny_transformer(pattern=pattern, num_layers=3, isolate_given=True, time_positions="input")
    batch = {**inputs(grid=grid), "condition_mask": frame_mask(2, grid, frames)}
    generated = [i for i in range(grid[0]) if i not in frames]
    cache = GivenCache()
    for step, time in enumerate((900.0, 500.0, 100.0)):
        noise = torch.randn(2, 4, *grid, generator=torch.Generator().manual_seed(step))
        now = {**batch, "hidden_states": noise, "timestep": torch.full((2,), time)}
        expected = model(**now).sample[:, :, generated]
        torch.testing.assert_close(
            model(**now, given_cache=cache).sample[:, :, generated], expected, atol=1e-5, rtol=1e-5
        )
    assert cache.frames is not None
    assert cache.frames[0].tolist() == frames


@torch.no_grad()
def test_cache_under_masks_that_are_no_whole_frames() -> None:
    model, batch = tiny_transformer(isolate_given=True), inputs()
    batch["condition_mask"][0, :, 2, 2:4, :2] = 0
    cache = GivenCache()
    for _ in range(2):
        assert torch.equal(model(**batch, given_cache=cache).sample, model(**batch).sample)
    assert not cache.keys_values


@torch.no_grad()
def test_isolated_given_tokens_do_not_see_noise() -> None:
    batch = inputs(grid=(5, 4, 4), frames=9)
    for isolate in (True, False):
        model = tiny_transformer(isolate_given=isolate)
        noisy = {**batch, "hidden_states": batch["hidden_states"] + 1, "timestep": batch["timestep"] / 2}
        before, after = model(**batch).sample, model(**noisy).sample
        tokens = batch["condition_mask"].amax(1, keepdim=True)
        assert tokens[:, :, :3].max() == 0
        assert torch.equal(before[:, :, :3], after[:, :, :3]) == isolate
        assert not torch.allclose(before[:, :, 3:], after[:, :, 3:])


@torch.no_grad()
def test_cache_of_another_mask_is_refused() -> None:
    model, batch, cache = tiny_transformer(isolate_given=True), inputs(grid=(5, 4, 4)), GivenCache()
    model(**{**batch, "condition_mask": frame_mask(2, (5, 4, 4), [0])}, given_cache=cache)
    with pytest.raises(ValueError, match=r"given_cache was filled with frames \[0\], allowed: one mask a cache"):
        model(**{**batch, "condition_mask": frame_mask(2, (5, 4, 4), [0, 1])}, given_cache=cache)
    with torch.enable_grad(), pytest.raises(ValueError, match="given_cache is .*, allowed: None where gradients"):
        model(**batch, given_cache=GivenCache())


def test_cache_needs_isolation() -> None:
    with pytest.raises(ValueError, match="given_cache is .*, allowed: only with isolate_given"):
        tiny_transformer()(**inputs(), given_cache=GivenCache())


# --- A citizen of diffusers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["xformers", "flash", "sage", "nonsense", "_native_cudnn", "flex"])
def test_backend_that_cannot_run_is_refused_when_set(backend: str) -> None:
    model = tiny_transformer()
    with pytest.raises(ValueError, match=f"backend is '{backend}'") as refused:
        model.set_attention_backend(backend)
    assert "\n" not in str(refused.value)
    model(**inputs())  # and the model works on


@torch.no_grad()
def test_backends_agree() -> None:
    model, batch = tiny_transformer(), inputs()
    expected = model(**batch).sample
    model.set_attention_backend("flex")  # which on a CPU has no backward, and was refused above
    torch.testing.assert_close(model(**batch).sample, expected, atol=1e-5, rtol=1e-5)
    for config in (FORMS["native"], FORMS["windows"]):
        model, batch = tiny_transformer(**config), inputs()
        model.set_attention_backend("native")
        expected = model(**batch).sample
        for backend in ("_native_math", "native"):  # the last one stays, since diffusers keeps it for the whole process
            model.set_attention_backend(backend)
            torch.testing.assert_close(model(**batch).sample, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_masks_without_a_backend_for_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_transformer(), inputs()
    expected = model(**batch).sample
    monkeypatch.setattr("stgen.models.attention.TAKE_A_MASK", ())
    torch.testing.assert_close(model(**batch).sample, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["native", "windows", "open-sora 1.1", "vdt", "isolated"])
@torch.no_grad()
def test_compiles_without_graph_breaks(form: str) -> None:
    model, batch = tiny_transformer(**{**FORMS[form], "num_layers": 2}), inputs(**FORMS[form])
    expected = model(**batch).sample
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).sample, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_regional_compilation() -> None:
    model, batch = tiny_transformer(), inputs()
    expected = model(**batch).sample
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(**batch).sample, expected, atol=1e-5, rtol=1e-4)


def test_lora_in_a_fresh_process(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = tiny_transformer()
    model.save_pretrained(tmp_path / "model")
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_qkv", "to_q", "to_kv", "to_out.0"]))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora" in name for name in trainable)
    fill_zeros(model)
    model.save_lora_adapter(tmp_path / "lora")
    batch = inputs()
    expected = model(**batch).sample
    from safetensors.torch import load_file, save_file

    save_file({name: value.contiguous() for name, value in batch.items()}, tmp_path / "batch.safetensors")
    code = (
        "import sys, torch; from safetensors.torch import load_file, save_file; from stgen import STGenTransformer3DModel as M;"
        "torch.set_num_threads(1); m = M.from_pretrained(sys.argv[1] + '/model').eval();"
        "b = load_file(sys.argv[1] + '/batch.safetensors'); plain = m(**b).sample.detach().contiguous();"
        "m.load_lora_adapter(sys.argv[1] + '/lora', prefix=None);"
        "save_file({'plain': plain, 'lora': m(**b).sample.detach().contiguous()}, sys.argv[1] + '/out.safetensors')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    out = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(out["lora"], expected.detach(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out["plain"], out["lora"], atol=1e-3)


@torch.no_grad()
def test_layerwise_casting_and_group_offload() -> None:
    batch = inputs()
    expected = tiny_transformer()(**batch).sample
    model = tiny_transformer()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model.transformer_blocks[0].ff.net[2].weight.dtype == torch.bfloat16
    out = model(**batch).sample
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()
    model = tiny_transformer()
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(model(**batch).sample, expected)


def test_config_is_readable(tmp_path: Path) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pattern"] == "stf"
    assert config["_class_name"] == "STGenTransformer3DModel"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mlp": "relu"}, "mlp is 'relu', allowed: gelu"),
        ({"rope": "2d"}, "rope is '2d', allowed: 3d, time, None"),
        ({"attention_head_dim": 4}, "attention_head_dim is 4, allowed: an even number of 6 or more"),
        ({"pattern": "s", "time_positions": "stream"}, "time_positions is 'stream'"),
        ({"null_text": "learned"}, "text_tokens is None"),
        ({"size_conditioning": "size", "modulation": "full"}, "size_conditioning is 'size'"),
        ({"cross_attention": ("window",)}, "cross_attention is .'window',., allowed: some of full, spatial, temporal"),
        ({"cross_attention": ()}, "cross_attention is .., allowed: some of"),
        ({"size_conditioning": "size", "pattern": "f"}, "size_conditioning is 'size', allowed: another value"),
        ({"pattern": "sst", "num_layers": 2, "time_positions": "stream"}, "time_positions is 'stream'"),
        ({"num_layers": 0}, "num_layers is 0, allowed: 1 or more"),
        ({"mask_channels": -1}, "mask_channels is -1"),
        ({"patch_size": (2, 2)}, "patch_size is"),
        ({"space_scale": 0.0}, "space_scale is 0.0, allowed: above 0"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_transformer(**arguments)


@pytest.mark.parametrize("missing", ["fps", "height", "encoder_hidden_states"])
def test_missing_inputs_are_named(missing: str) -> None:
    batch = inputs(**FORMS["open-sora 1.2"])
    del batch[missing]
    batch.pop("encoder_attention_mask") if missing == "encoder_hidden_states" else None
    with pytest.raises(ValueError, match=f"{missing} is None"):
        tiny_transformer(**FORMS["open-sora 1.2"])(**batch)
