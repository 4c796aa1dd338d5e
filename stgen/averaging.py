"""Averaged weights of a run: running averages that each process keeps of the part of the weights it holds.

A rank's part of a parameter is all of it under DDP and ZeRO-1 and -2, its slice of the flattened parameter under ZeRO-3, and
its local tensor under FSDP2. Averaging is elementwise, so no step gathers anything; only what leaves the run is whole.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from stgen.config import require
from stgen.durable import sync

# --- Profiles -----------------------------------------------------------------------------------------------------


def exponential_decay(step: int, highest: float) -> float:
    """min(highest, 1 - step^(-3/4)), the share of the old average at optimizer step `step`, from 1: an exponential
    average that is warmed up as in diffusers' EMAModel, whose first value is the weights themselves."""
    return min(highest, 1 - step**-0.75)


def power_gamma(width: float) -> float:
    """The gamma of a power-function average, whose weights grow as t^gamma, that is `width` wide.

    EDM2 (Karras et al. 2024, arXiv:2312.02696), section 3.1: the standard deviation of the profile, as a fraction of the run
    so far, is sigma_rel = ((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))^(1/2). Solved for the gamma above -1/2 that falls as
    the width rises.

    Args:
        width: sigma_rel, above 0 up to 0.28, just below that of the plain mean (gamma = 0, 12^(-1/2)).
    """
    require(0 < width <= 0.28, "width", width, "above 0, up to 0.28, a fraction of the run")
    # (g + 2)^2 (g + 3) - (g + 1) / width^2 = 0 in g; its largest real root.
    roots = torch.linalg.eigvals(
        torch.tensor([[-7.0, -(16 - width**-2), -(12 - width**-2)], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    )
    return float(roots.real.max())


def power_decay(samples: int, batch: int, gamma: float) -> float:
    """(1 - batch / samples)^(gamma + 1), the share of the old average at the step that ends after `samples`: EDM2's
    beta_t = (1 - 1/t)^(gamma + 1) in a unit of time that other batch sizes leave alone."""
    return (1 - batch / samples) ** (gamma + 1)


PROFILES = ("exponential", "power")
WIDTHS = (0.05, 0.10)
"""sigma_rel of the averages that the profile `power` keeps: two, as EDM2 does."""

SNAPSHOTS = "averages"
"""Folder of a run with the snapshots of its averages."""


def power_name(width: float) -> str:
    """What the average of this width is called in files."""
    return f"power-{width:.3f}"


# --- The part of a parameter that this process holds --------------------------------------------------------------


def is_zero3(parameter: Any) -> bool:
    """Whether DeepSpeed has split the parameter itself over the processes."""
    return hasattr(parameter, "ds_id")


def local_part(parameter: Any) -> Tensor:
    """What this process holds of the parameter; writing to it writes to the parameter."""
    if is_zero3(parameter):
        return parameter.ds_tensor.data
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()


def whole(part: Tensor, parameter: Any) -> Tensor:
    """The full tensor, `part` being this process's of it. All processes call it."""
    if is_zero3(parameter):
        group = parameter.ds_process_group
        flat = part.new_empty(part.numel() * dist.get_world_size(group))
        dist.all_gather_into_tensor(flat, part.contiguous(), group=group)
        return flat[: parameter.ds_numel].view(parameter.ds_shape)  # the last slices are padded
    if isinstance(parameter, DTensor):
        mesh, placements, shape, stride = (
            parameter.device_mesh,
            parameter.placements,
            parameter.shape,
            parameter.stride(),
        )
        return DTensor.from_local(part, mesh, placements, shape=shape, stride=stride).full_tensor()
    return part


def part_of(full: Tensor, parameter: Any) -> Tensor:
    """This process's part of a full tensor that is shaped as the parameter."""
    if is_zero3(parameter):
        size, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
        own = full.reshape(-1)[rank * size : (rank + 1) * size]
        return torch.nn.functional.pad(own, (0, size - own.numel()))
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device)
        return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    return full


def is_first() -> bool:
    """Whether this process has rank 0, or is the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of the parameter as the model was made."""
    return tuple(parameter.ds_shape if is_zero3(parameter) else parameter.shape)


# --- The averages -------------------------------------------------------------------------------------------------


class AveragedWeights:
    """float32 running averages of a model's trainable parameters.

    Frozen parameters and buffers stay as they are in the model. What an update does is a function of the step alone, so
    the averages are all there is to save.

    Args:
        model: as it is trained: after `accelerator.prepare`, which is what splits or replaces parameters.
        profile: exponential; or power (EDM2), which keeps one average for each of `WIDTHS`.
        decay: highest decay of the exponential average.
    """

    def __init__(self, model: torch.nn.Module, profile: str = "exponential", decay: float = 0.9999) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.decays: dict[str, Callable[[int, int, int], float]]
        """By the name of each average: its decay at (step, samples, batch)."""
        if profile == "exponential":
            self.decays = {"exponential": lambda step, samples, batch: exponential_decay(step, decay)}
        else:
            require(profile in PROFILES, "profile", profile, ", ".join(PROFILES))
            self.decays = {power_name(width): self._power(width) for width in WIDTHS}
        self.averages = {name: [part.float().clone() for part in self._parts()] for name in self.decays}
        self.exported = list(self.decays)[-1]
        """The average that the model gets; of several, the widest."""

    @staticmethod
    def _power(width: float) -> Callable[[int, int, int], float]:
        gamma = power_gamma(width)
        return lambda step, samples, batch: power_decay(samples, batch, gamma)

    def _parts(self) -> list[Tensor]:
        # Asked for anew each time: DeepSpeed may put another tensor behind a parameter.
        return [local_part(parameter) for parameter in self.parameters.values()]

    @torch.no_grad()
    def update(self, step: int, samples: int, batch: int, taken: bool | Tensor = True) -> None:
        """Takes in the weights after optimizer step number `step`, from 1, of `batch` samples, which brought the run to
        `samples`. Nothing is gathered, and a GPU is not waited for.

        Args:
            taken: False for a step that was skipped, which leaves the averages as they are; or 1.0 or 0.0 on the device,
                for one of which this process does not know yet.
        """
        if taken is False:
            return
        parts = self._parts()
        for name, average in self.averages.items():
            difference = torch._foreach_sub(average, parts)
            if isinstance(taken, Tensor):
                torch._foreach_mul_(difference, taken)
            torch._foreach_sub_(average, difference, alpha=1 - self.decays[name](step, samples, batch))

    @torch.no_grad()
    def copy_to(self) -> None:
        """Puts the average in the place of the model's weights."""
        self._write(self.averages[self.exported])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average within, and its own weights again afterwards, to the bit. All processes enter it."""
        own = [part.cpu() if part.is_cuda else part.clone() for part in self._parts()]
        self.copy_to()
        try:
            yield
        finally:
            with torch.no_grad():
                self._write(own)

    def _write(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._parts(), values)
        # ZeRO-3 keeps small parameters gathered; what it gathered is the weights of before.
        parameters: list[Any] = list(self.parameters.values())
        gathered = [p for p in parameters if is_zero3(p) and p.ds_status.name == "AVAILABLE"]
        if gathered:
            gathered[0].partition(gathered)
            gathered[0].all_gather(gathered)

    # --- Saving ---------------------------------------------------------------------------------------------------

    def state_dict(self, name: str | None = None) -> dict[str, Tensor]:
        """The full float32 tensors of an average, by parameter, on the CPU of rank 0; empty elsewhere. All processes call it.

        Args:
            name: one of `averages`; None is the one that `copy_to` takes.
        """
        state = {}
        for (key, parameter), part in zip(self.parameters.items(), self.averages[name or self.exported], strict=True):
            full = whole(part, parameter)
            if is_first():
                state[key] = full.cpu()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], name: str | None = None) -> None:
        """Takes this process's parts from the full tensors, however many processes saved them.

        Raises:
            ValueError: a parameter is missing, unknown, or of another shape.
        """
        unlike = sorted(state.keys() ^ self.parameters.keys())
        require(not unlike, "averaged weights", unlike[:3], "those of the trainable parameters")
        for (key, parameter), part in zip(self.parameters.items(), self.averages[name or self.exported], strict=True):
            full, shape = state[key], full_shape(parameter)
            require(tuple(full.shape) == shape, f"averaged weights: shape of {key}", tuple(full.shape), f"{shape}")
            part.copy_(part_of(full, parameter))

    def save(self, folder: str | Path) -> None:
        """Writes `folder/NAME.safetensors` for each average. All processes call it, and rank 0 writes."""
        for name in self.averages:
            state = self.state_dict(name)
            if is_first():
                Path(folder).mkdir(parents=True, exist_ok=True)
                save_file(
                    {key: value.contiguous() for key, value in state.items()}, Path(folder) / f"{name}.safetensors"
                )

    def load(self, folder: str | Path) -> None:
        """Reads what `save` wrote; the number of processes may be another.

        Raises:
            ValueError: a file is missing, or holds other parameters.
        """
        for name in self.averages:
            path = Path(folder) / f"{name}.safetensors"
            require(path.is_file(), "averaged weights", str(path), "a file that the checkpoint holds")
            with safe_open(path, "pt") as file:
                self.load_state_dict({key: file.get_tensor(key) for key in file.keys()}, name)  # noqa: SIM118

    @staticmethod
    def is_due(samples: int, batch: int, every: int, total: int) -> bool:
        """Whether the step that ends after `samples` is the first after another `every` samples, or the last of `total`."""
        return every > 0 and (samples // every > (samples - batch) // every or samples >= total)

    def snapshot(self, run: str | Path, samples: int) -> None:
        """Saves the averages as `run/averages/samples-N`, whole under that name. All processes call it."""
        final = Path(run) / SNAPSHOTS / f"samples-{samples}"
        temporary = final.with_name(final.name + ".tmp")
        if is_first():
            shutil.rmtree(temporary, ignore_errors=True)
        self.save(temporary)
        if is_first():
            for path in temporary.iterdir():
                sync(path)
            sync(temporary)
            temporary.rename(final)
            sync(final.parent)

    def register(self, accelerator: Accelerator) -> None:
        """Has the averages saved and loaded with every checkpoint of the accelerator, as `averages/` in its folder."""
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: self.save(Path(folder) / "averages"))
        accelerator.register_load_state_pre_hook(lambda models, folder: self.load(Path(folder) / "averages"))


# --- Averages of any width, afterwards ----------------------------------------------------------------------------


def profile_products(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """Inner products `n m` of power profiles, each given as its times and gammas, float64 `n` and `m`.

    The profile of an average at time T is p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on [0, T], so with the earlier time T1 and
    the later T2, whose gamma is G: <p_a, p_b> = (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) (T1 / T2)^G / T2.
    """
    (time_a, gamma_a), (time_b, gamma_b) = (a[0][:, None], a[1][:, None]), b
    later = torch.maximum(time_a, time_b)
    ratio = torch.minimum(time_a, time_b) / later
    decay = ratio ** torch.where(time_a < time_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * decay / later


def snapshot_weights(times: Tensor, gammas: Tensor, time: float, gamma: float) -> tuple[Tensor, float]:
    """How much of each snapshot the average of `gamma` at `time` is: the x that brings sum x_i p_i closest to its profile in
    the square, A x = b with the inner products A of the snapshots' profiles and b with the wanted one (EDM2, section 3.2).

    Args:
        times: of the snapshots, float64 `n`, above 0 up to `time`.
        gammas: float64 `n`.

    Returns:
        x, float64 `n`, and the norm of what is left of the wanted profile, relative to its own.
    """
    kept = times / time, gammas  # shares of the run are well scaled, samples are not
    wanted = times.new_ones(1), times.new_tensor([gamma])
    products, targets = profile_products(kept, kept), profile_products(kept, wanted)[:, 0]
    # Profiles that lie close together are nearly the same; least squares takes the smallest of many solutions.
    x = torch.linalg.lstsq(products, targets[:, None], driver="gelsd").solution[:, 0]
    left = profile_products(wanted, wanted).item() + (x @ products @ x - 2 * x @ targets).item()
    return x, (max(0.0, left) / profile_products(wanted, wanted).item()) ** 0.5


def snapshots(run: str | Path) -> dict[int, Path]:
    """The folders of a run's snapshots by their samples, earliest first."""
    found = {path.name.removeprefix("samples-"): path for path in (Path(run) / SNAPSHOTS).glob("samples-*")}
    return {int(samples): found[samples] for samples in sorted((s for s in found if s.isdigit()), key=int)}


def rewind_snapshots(run: str | Path, samples: int) -> None:
    """Removes those after `samples`, which the run that goes on from there makes again, perhaps elsewhere."""
    for later, folder in snapshots(run).items():
        if later > samples:
            shutil.rmtree(folder)
    for torn in (Path(run) / SNAPSHOTS).glob("*.tmp"):
        shutil.rmtree(torn)


def reconstruct_average(run: str | Path, width: float, samples: int | None = None) -> dict[str, Tensor]:
    """The weights, by parameter in float32, of the power-function average of any width, from a run's snapshots.

    Args:
        width: sigma_rel, as a fraction of the samples seen; best no narrower than the narrowest that was kept.
        samples: where in the run, at one of its snapshots; None is the last one.

    Raises:
        ValueError: the run has no such snapshot, the width is out of range, or the snapshots are too few for it: the profile
            that they add up to is more than a tenth off.
    """
    gamma, found = power_gamma(width), snapshots(run)
    require(
        len(found) > 0, "run", str(run), f"one with snapshots in {SNAPSHOTS}/, as optimizer.average=power leaves them"
    )
    end = list(found)[-1] if samples is None else samples
    require(end in found, "samples", end, f"one of the run's snapshots: {', '.join(map(str, found))}")
    names = {power_name(kept): power_gamma(kept) for kept in WIDTHS}
    used = [
        (time, found[time] / f"{name}.safetensors", g) for time in found if time <= end for name, g in names.items()
    ]
    times, gammas = (torch.tensor([row[i] for row in used], dtype=torch.float64) for i in (0, 2))
    weights, error = snapshot_weights(times, gammas, end, gamma)
    require(
        error < 0.1, "width", width, f"those that {len(used) // 2} snapshots add up to; this one is {error:.0%} off"
    )
    total: dict[str, Tensor] = {}
    for (_, path, _), weight in zip(used, weights.tolist(), strict=True):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                value = file.get_tensor(key).double() * weight  # the weights alternate, and their sum is 1
                total[key] = total[key] + value if key in total else value
    return {key: value.float() for key, value in total.items()}


def write_average(run: str | Path, width: float, out: str | Path, samples: int | None = None) -> None:
    """Writes `run/export` anew as `out`, with the weights of `reconstruct_average` in the place of its averaged ones.

    Everything else is copied: the weights of the variant `raw`, other components, the statistics of a VAE's latents.

    Raises:
        ValueError: there is no export, `out` is not empty, or the export is of another model.
    """
    export, out = Path(run) / "export", Path(out)
    require(export.is_dir(), "run", str(run), "one that has its export/")
    require(not out.exists() or not any(out.iterdir()), "out", str(out), "a new or empty folder")
    # A VAE is trained inside its objective.
    average = {key.removeprefix("vae."): value for key, value in reconstruct_average(run, width, samples).items()}
    # Under another name until it is whole: half of it would open as a pipeline with other weights.
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    shutil.copytree(export, partial)
    trained = partial / "transformer" if (partial / "transformer").is_dir() else partial
    for path in sorted(trained.glob("diffusion_pytorch_model*.safetensors")):
        if ".raw" in path.name:
            continue
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for key in tensors.keys() & average.keys():
            value = average.pop(key)
            require(
                value.shape == tensors[key].shape, f"shape of {key}", tuple(value.shape), f"{tuple(tensors[key].shape)}"
            )
            tensors[key] = value.to(tensors[key].dtype)
        save_file(tensors, path, metadata)
    if average:
        shutil.rmtree(partial)
    require(not average, f"averaged weights of {run}", sorted(average)[:3], f"those of {export}")
    if out.exists():
        out.rmdir()
    partial.rename(out)
