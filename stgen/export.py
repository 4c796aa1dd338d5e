"""Turns a checkpoint of a run into what is meant for others: a diffusers folder, or LoRA files, in safetensors.

Any checkpoint of either trainer will do, from one process, DDP or DeepSpeed. The weights of one process and of DDP are
safetensors, and so are all averaged ones. DeepSpeed's are pickles, which its own tool unpickles: export runs of your own, as
you resume runs of your own.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from stgen import train, train_vae
from stgen.averaging import AveragedWeights
from stgen.checkpoint import ENGINE, best_of, checkpoints, fault, whole_until
from stgen.config import flatten_config, load_config, require
from stgen.data.reading import ClipDataset
from stgen.loop import ARCHITECTURE
from stgen.models.autoencoder import AutoencoderKLSTGen
from stgen.models.latents import load_vae
from stgen.models.loading import load_every_tensor
from stgen.models.transformer import STGenTransformer3DModel
from stgen.vae_objective import VAEObjective


def find_checkpoint(run: Path, step: str | None) -> Path:
    """A whole checkpoint of the run: the newest for None, that of the lowest validation score (`best_of`) for `best`, or by its
    step.

    Raises:
        ValueError: there is none such, or it is not whole.
    """
    found = {folder.name.removeprefix("step-"): folder for folder in checkpoints(run)}
    require(len(found) > 0, "run", str(run), "a run folder with checkpoints")
    if step == "best":
        best = best_of(whole_until(run))
        require(best is not None, "step", step, f"{', '.join(found)}, since no checkpoint has a validation's score")
        assert best is not None
        step = best.name.removeprefix("step-")
    chosen = list(found)[-1] if step is None else step
    require(chosen in found, "step", chosen, f"{', '.join(found)} or best")
    reason = fault(found[chosen])
    require(reason is None, f"checkpoint {found[chosen]}", reason, "a whole one")
    return found[chosen]


def last_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights in training at a checkpoint, in float32 where DeepSpeed kept such a copy."""
    if not (checkpoint / ENGINE).is_dir():
        return load_file(checkpoint / "model.safetensors")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=ENGINE))


def _load(model: torch.nn.Module, checkpoint: Path) -> AveragedWeights:
    """Puts the last weights of the checkpoint into the model; returns its averaged ones."""
    load_every_tensor(model, last_weights(checkpoint), f"checkpoint: {checkpoint}")
    profile = "exponential" if (checkpoint / "averages" / "exponential.safetensors").exists() else "power"
    averaged = AveragedWeights(model, profile)
    averaged.load(checkpoint / "averages")
    return averaged


def export_checkpoint(run: str | Path, out: str | Path, step: str | None = None, merge: bool = False) -> Path:
    """Writes `out`: averaged weights by default, the last ones as variant `raw`. Returns the checkpoint that was taken.

    A VAE's latent statistics are measured anew on the run's data, unless its encoder was frozen.

    Args:
        step: a number, `best`, or None for the newest.
        merge: of a LoRA run, writes the pipeline with the adapters merged into its weights in place of LoRA files.

    Raises:
        ValueError: there is no such checkpoint, it is not whole, or `out` holds something.
    """
    run, out = Path(run), Path(out)
    require(not out.exists() or (out.is_dir() and not any(out.iterdir())), "out", str(out), "a new or empty folder")
    checkpoint = find_checkpoint(run, step)
    saved = run / "config.yaml"
    is_vae = "vae" not in flatten_config(saved)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if is_vae:
        require(not merge, "merge", merge, "false for a VAE's run")
        config = load_config(train_vae.TrainVAEConfig, saved)
        vae = train_vae.freeze(
            AutoencoderKLSTGen.from_config(AutoencoderKLSTGen.load_config(run / ARCHITECTURE)), config
        )
        averaged = _load(VAEObjective(vae, config.reconstruction, config.kl_weight), checkpoint)
        dataset = ClipDataset(config.data, config.seed)
        train_vae.export(config, vae.to(accelerator.device), averaged, dataset, accelerator, out)
        return checkpoint
    settings = load_config(train.TrainConfig, saved)
    require(not merge or settings.lora is not None, "merge", merge, f"false: {run} has no adapters to merge")
    model = STGenTransformer3DModel.from_config(STGenTransformer3DModel.load_config(run / ARCHITECTURE))
    train.prepare_training(settings, model)
    averaged = _load(model, checkpoint)
    train.export(settings, model, averaged, load_vae(settings.vae), accelerator, out, merge)
    return checkpoint
