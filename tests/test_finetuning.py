"""Training that begins with given weights, of all of them, of parts and of adapters, and what is exported of it."""

from pathlib import Path

import pytest
import torch
from conftest import losses_of, run_training, tiny_transformer, training_arguments
from processes import Run, in_a_fresh_process
from safetensors.torch import load_file, save_file
from test_validation import read, same_latents, sampled, save_sampled, validation

from stgen import STGenPipeline, STGenTransformer3DModel
from stgen.config import load_config
from stgen.export import export_checkpoint
from stgen.finetuning import LoRAConfig, add_lora, begin_with, names_to_train, separate_words
from stgen.train import TrainConfig

LORA = "lora={rank: 2, alpha: 6, targets: [to_qkv, ff.net.2]}"  # alpha is not rank, which a lost alpha would be


def transformer(folder: Path, **arguments: str) -> dict[str, torch.Tensor]:
    return STGenTransformer3DModel.from_pretrained(folder / "transformer", **arguments).state_dict()


def inputs(given: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    batch = {"hidden_states": random(2, 4, 3, 4, 4), "timestep": torch.tensor([500.0, 900.0])}
    batch["encoder_hidden_states"] = random(2, 5, 16)
    if given:
        mask = torch.ones(2, 4, 3, 4, 4)
        mask[:, :, 0] = 0
        mask[:, :2, 1] = 0.5
        batch |= {"condition_latents": random(2, 4, 3, 4, 4), "condition_mask": mask}
    return batch


# --- Given weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["", "transformer"])
def test_weights_of_any_folder(training_world: Path, inner: str) -> None:
    saved, model = tiny_transformer(), tiny_transformer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    begin_with(model, training_world / "base" / inner)
    for name, weight in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize("given", [False, True])
def test_new_mask_channels_change_nothing_yet(tmp_path: Path, given: bool) -> None:
    published = tiny_transformer(mask_channels=0)
    published.save_pretrained(tmp_path)
    widened = STGenTransformer3DModel.from_config({**published.config, "mask_channels": 4}).eval()
    begin_with(widened, tmp_path)
    with torch.no_grad():
        expected, found = published(**inputs(given)).sample, widened(**inputs(given)).sample
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        widened.patch_embed.weight[:, published.patch_embed.in_features :].normal_()  # what they will come to say
        assert not torch.allclose(widened(**inputs(given)).sample, expected, atol=1e-3)


def test_every_tensor_that_differs_is_named(training_world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights of this model's names and shapes") as error:
        begin_with(tiny_transformer(text_dim=8, num_layers=2), training_world / "base")
    message = str(error.value)
    assert "\n" not in message
    assert "text_embed.linear_1.weight: (24, 16) there, (24, 8) in this model" in message
    for name, weight in tiny_transformer().state_dict().items():
        if name.startswith("transformer_blocks.2."):
            assert f"{name}: {tuple(weight.shape)} there, no such weight in this model" in message
    tiny_transformer().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for change, problem in (
        ({"extra": torch.zeros(1)}, r"unexpected_keys of .* is \['extra'\]"),
        ({"proj_out.bias": None}, r"missing_keys of .* is \['proj_out.bias'\]"),
        ({"proj_out.bias": torch.zeros(3)}, "proj_out.bias expected shape"),
    ):
        save_file({name: x for name, x in (weights | change).items() if x is not None}, file)
        with pytest.raises(ValueError, match=problem):
            begin_with(tiny_transformer(), tmp_path)


def test_full_training_goes_on_from_the_folder(training_world: Path, tmp_path: Path) -> None:
    base = f"init={training_world}/base"
    rows = run_training(training_world, tmp_path / "tuned", base, "optimizer.lr=1e-4", "samples=8")
    again = run_training(
        training_world, tmp_path / "again", f"init={tmp_path}/tuned/export", "optimizer.lr=1e-30", "samples=4"
    )
    fresh = run_training(training_world, tmp_path / "fresh", base, "optimizer.lr=1e-30", "samples=4")
    first = losses_of(rows)[4]
    assert losses_of(fresh)[4] == first
    assert losses_of(again)[4] not in (first, pytest.approx(first, rel=1e-6))
    assert load_config(TrainConfig, tmp_path / "tuned" / "config.yaml").model["pattern"] == "stf"  # the folder's own
    start, end = transformer(training_world / "base"), transformer(tmp_path / "tuned" / "export")
    assert sum(not torch.equal(start[name], end[name]) for name in start) > 0.9 * len(start)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["init=/nowhere"], "init is '/nowhere', allowed: a pipeline folder"),
        (["init={base}", "model.num_layers=2"], "transformer_blocks.2.*no such weight in this model"),
        (["init={base}", "frozen=[patch_embed.*, nothing.*]"], "frozen is 'nothing.*', allowed: a pattern of some"),
        (["init={base}", "trainable=[nothing]"], "trainable is 'nothing'"),
        (["frozen=['*']"], "frozen is .* leave something to train"),
        (["frozen=[patch_embed.*]", "trainable=[patch_embed.*]"], "trainable is .* empty together with frozen"),
        (["lora={rank: 2}"], "lora is .* null without init"),
        (["init={base}", "lora={rank: 2}", "frozen=[patch_embed.*]"], "frozen or trainable is .* empty with lora"),
        (["init={base}", "lora={rank: 0}"], "lora.rank is 0, allowed: 1 or more"),
        (["init={base}", "lora={targets: [to_magic]}"], "lora.targets is 'to_magic', allowed: the end of .*to_qkv"),
        (["init={base}", "lora={rank: 2}", "model.mask_channels=0"], "model.mask_channels is 0, allowed: 4, as"),
    ],
)
def test_bad_settings_are_named(training_world: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    settings = [setting.replace("{base}", f"{training_world}/base") for setting in settings]
    with pytest.raises(ValueError, match=message) as error:
        run_training(training_world, tmp_path / "bad", *settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bad" / "checkpoints").exists()


# --- Parts --------------------------------------------------------------------------------------------------------


def test_names_to_train() -> None:
    model = tiny_transformer()
    names = {name for name, _ in model.named_parameters()}
    assert names_to_train(model) == names
    frozen = names_to_train(model, frozen=["patch_embed.*", "*.cross_attn.*"])
    assert frozen == {name for name in names if not name.startswith("patch_embed") and ".cross_attn." not in name}
    assert names_to_train(model, trainable=["patch_embed.*"]) == {"patch_embed.weight", "patch_embed.bias"}


def test_frozen_parts_stay_to_the_bit(training_world: Path, tmp_path: Path) -> None:
    settings = (f"init={training_world}/base", "frozen=['*_attn.*', patch_embed.*]", "samples=8")
    run_training(training_world, tmp_path / "run", *settings)
    start = transformer(training_world / "base")
    for variant in (None, "raw"):
        end = transformer(tmp_path / "run" / "export", variant=variant)
        for name, weight in start.items():
            frozen = "_attn." in name or name.startswith("patch_embed.")
            assert torch.equal(weight, end[name]) == frozen, name
    averages = load_file(next((tmp_path / "run" / "checkpoints").glob("*/averages/exponential.safetensors")))
    assert not [name for name in averages if "_attn." in name]


# --- Words that it confuses ---------------------------------------------------------------------------------------


def confused() -> tuple[STGenTransformer3DModel, torch.Tensor]:
    """A model whose text projection has 4 different hidden units of 24, and token states."""
    model = tiny_transformer()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
        first = model.text_embed.linear_1
        first.weight.copy_(first.weight[:4].repeat(6, 1))
        first.bias.copy_(first.bias[:4].repeat(6))
    return model, torch.randn(400, 16, generator=generator)


def projected(model: STGenTransformer3DModel, states: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.text_embed(states)


def test_separated_words_change_nothing_yet() -> None:
    model, states = confused()
    batch = inputs(given=True) | {"encoder_hidden_states": states[:10].view(2, 5, 16)}
    other = batch | {"encoder_hidden_states": states[10:20].view(2, 5, 16)}
    with torch.no_grad():
        before = model(**batch).sample
    nearest = torch.nn.functional.pdist(projected(model, states)).min()
    rank = torch.linalg.matrix_rank(projected(model, states), rtol=1e-4)
    separate_words(model, states, kept=6, norm=30.0)
    with torch.no_grad():
        after, told_other = model(**batch).sample, model(**other).sample
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert (told_other - after).abs().max() > 0.01  # it hears text at all
    assert torch.nn.functional.pdist(projected(model, states)).min() > 3 * nearest
    assert 5 >= rank < torch.linalg.matrix_rank(projected(model, states), rtol=1e-4)


def test_keys_and_values_learn_of_separated_words() -> None:
    model, states = confused()
    batch = inputs(given=False) | {"encoder_hidden_states": states[:10].view(2, 5, 16)}
    weight = model.transformer_blocks[0].cross_attn.to_kv.weight

    def directions_learned() -> int:
        model.zero_grad()
        model(**batch).sample.square().sum().backward()
        return int(torch.linalg.matrix_rank(weight.grad, rtol=1e-4))

    before = directions_learned()
    separate_words(model, states, kept=6, norm=30.0)
    # 4 hidden units and the bias; then a direction for each of the 10 tokens
    assert (before, directions_learned()) == (5, 10)


def test_words_that_nothing_confuses_stay() -> None:
    model = tiny_transformer()
    states = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"kept is 6, allowed: more"):
        separate_words(model, states, kept=6, norm=30.0)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    with pytest.raises(ValueError, match=r"kept is 24, allowed: 1 to 23"):
        separate_words(model, states, kept=24, norm=30.0)
    with pytest.raises(ValueError, match="a model that is told text"):
        separate_words(tiny_transformer(text_dim=None), states, kept=6, norm=30.0)


# --- Adapters -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(training_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("adapted") / "run"
    steps = ("samples=16", "optimizer.lr=0.01")
    run_training(training_world, run, f"init={training_world}/base", LORA, validation(training_world, every=4), *steps)
    return run


def test_adapters_begin_as_nothing_and_train_alone() -> None:
    model, plain = tiny_transformer(), tiny_transformer()
    add_lora(model, LoRAConfig(rank=2, targets=["to_qkv"]), seed=0)
    with torch.no_grad():
        assert torch.equal(model(**inputs(True)).sample, plain(**inputs(True)).sample)
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())


def test_lora_files_hold_adapters_alone(adapted: Path, training_world: Path) -> None:
    assert {path.name for path in (adapted / "export").iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights.raw.safetensors",
    }
    averaged, raw = (load_file(path) for path in sorted((adapted / "export").iterdir(), reverse=True))
    assert all(name.startswith("transformer.transformer_blocks.") and "lora_" in name for name in averaged)
    assert any(not torch.equal(averaged[name], raw[name]) for name in averaged)
    checkpoint = next((adapted / "checkpoints").iterdir())
    kept = load_file(checkpoint / "model.safetensors")
    for name, weight in transformer(training_world / "base").items():
        inner = name.rsplit(".", 1)
        assert torch.equal(kept.get(name, kept.get(".base_layer.".join(inner))), weight), name


@pytest.mark.slow
def test_a_fresh_process_reproduces_both_forms(adapted: Path, training_world: Path, tmp_path: Path) -> None:
    export_checkpoint(adapted, tmp_path / "merged", merge=True)
    base = training_world / "base"
    in_a_fresh_process(save_sampled, base, adapted, tmp_path / "lora.safetensors", adapted / "export")
    in_a_fresh_process(save_sampled, tmp_path / "merged", adapted, tmp_path / "merged.safetensors")
    expected = load_file(adapted / "samples" / "step-4.safetensors")
    for form in ("lora", "merged"):
        same_latents(load_file(tmp_path / f"{form}.safetensors"), expected)
    unadapted = sampled(STGenPipeline.from_pretrained(training_world / "base"), adapted)
    assert not torch.allclose(unadapted["text/0"], expected["text/0"], atol=1e-3)


# --- Resuming, and several processes ------------------------------------------------------------------------------

KINDS = {"full": [], "frozen": ["frozen=['*.cross_attn.*', patch_embed.*]"], "lora": [LORA]}


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_exact(training_world: Path, tmp_path: Path, kind: str) -> None:
    settings = (f"init={training_world}/base", *KINDS[kind])
    whole = run_training(training_world, tmp_path / "whole", *settings)
    run_training(training_world, tmp_path / "cut", *settings, saves=1)
    assert losses_of(run_training(training_world, tmp_path / "cut", *settings)) == losses_of(whole)
    for path in (tmp_path / "whole" / "export").rglob("*.safetensors"):
        ours, theirs = load_file(path), load_file(tmp_path / "cut" / path.relative_to(tmp_path / "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), path


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategy"), [("frozen", "ddp_cpu"), ("lora", "zero2_cpu"), ("lora", "zero3_cpu")])
def test_two_processes_equal_one(training_world: Path, tmp_path: Path, kind: str, strategy: str) -> None:
    settings = (f"init={training_world}/base", *KINDS[kind], "samples=12")
    run = tmp_path / "two"
    arguments = training_arguments(training_world, run, *settings, "batch_size=2")
    Run("train", arguments, tmp_path / "log", strategy, 2).succeed()
    one = run_training(training_world, tmp_path / "one", *settings)
    assert losses_of(read(run)) == pytest.approx(losses_of(one), rel=2e-4)
    export_checkpoint(run, tmp_path / "out")
    for path in (run / "export").rglob("*.safetensors"):
        ours, theirs = load_file(path), load_file(tmp_path / "out" / path.relative_to(run / "export"))
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(theirs[name], weight, atol=1e-6, rtol=1e-5)
