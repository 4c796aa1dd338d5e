"""Latents and text states computed once: `stgen data encode`, and what training reads of them.

The folder that it writes is the source's shards with further files in each sample, `KEY.latent.safetensors` and
`KEY.text.safetensors`, beside the clip or in its place:

    index.jsonl          as of any data folder, with the further files; written last
    encode.json          `Encoding`: what was stored, and fingerprints of the models that made it; written first
    encode.safetensors   the text states of the empty prompt, a `TextCache`
    skipped.jsonl        clips that could not be decoded and are left out, if there are any
    .lock                held while a job runs
    .SHARD.damaged.jsonl what was left out of a shard, for who goes on with the job

Latents are moments, mean and logarithm of the variance, on the VAE's own scale, so that training can take the mode or draw.
A shard is written under another name and renamed, so the same command goes on with those that are missing, whatever died.
Its bytes depend on the source, the models and the kind of hardware, not on who wrote it.

Shapes: t frames, h height, w width; video `b c t h w`; latents `b z t' h' w'`; text states `n d`.
"""

import hashlib
import itertools
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.utils import cached_file

from stgen.config import require
from stgen.data.color import stack_clips, to_pixels, to_rgb
from stgen.data.reading import DamagedSample, Stored, clip_shape, fold_seed, read_clip, read_files
from stgen.data.shards import (
    CLIP_FILES,
    ENCODED_FILES,
    ENCODING,
    INDEX,
    LATENT,
    SKIPPED,
    TEXT,
    Damage,
    Index,
    open_index,
    open_tar,
    write_index,
)
from stgen.data.sources import Source, open_source
from stgen.durable import only_job
from stgen.jobs import Pool
from stgen.masks import MaskSpec, Shape, draw_mixture, given_latents_are_exact
from stgen.models.latents import (
    VideoVAE,
    compression_ratios,
    encode_moments_stream,
    latent_shape,
    load_vae,
    temporal_reach,
)
from stgen.pretrained import find_pretrained
from stgen.text import TextCache, encode_distinct, encode_text, load_text_encoder, text_encoder_folder
from stgen.tracking import progress_bar

EMPTY_PROMPT = "encode.safetensors"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_PIECE_PIXELS = 2**23
"""Pixels that are floats at one time while a long clip is encoded."""
_DRAWS = 256
"""Masks of each kind that are looked at to find out whether it needs pixels."""


# --- Models by fingerprint ----------------------------------------------------------------------------------------


_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.txt", "vocab.json", "merges.txt")
_DECODER = ("decoder.", "post_quant_conv.")
_VOLATILE = ("_name_or_path", "_diffusers_version", "transformers_version")


def fingerprint(folder: str | Path) -> str:
    """SHA-256 of a saved model: configuration, weights but a decoder's, which encode nothing, and, of a text encoder,
    tokenizer; not of who saved it when."""
    digest = hashlib.sha256()
    for path in sorted(Path(find_pretrained(folder)).iterdir()):
        if path.name == "config.json":
            config = {name: value for name, value in json.loads(path.read_text()).items() if name not in _VOLATILE}
            digest.update(json.dumps(config, sort_keys=True).encode())
        elif path.suffix == ".safetensors":
            digest.update(path.name.encode())
            with safe_open(path, "pt") as weights:
                for name in sorted(weights.keys()):
                    if name.startswith(_DECODER):
                        continue
                    tensor = weights.get_tensor(name)
                    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif path.name in _TOKENIZER_FILES:
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _text_fingerprint(name: str) -> str:
    """That of an encoder which is named as `load_text_encoder` takes it."""
    folder = Path(text_encoder_folder(name))
    if not folder.is_dir():
        load_text_encoder(name)  # from the hub to its cache, or refused
        folder = Path(cached_file(name, "config.json", local_files_only=True)).parent
    return fingerprint(folder)


# --- Which clips are decoded all the same -------------------------------------------------------------------------


def draw_mask(masks: Sequence[MaskSpec], seed: int, position: int, shape: Shape) -> tuple[Tensor, torch.Generator]:
    """The mask `1 t h w` of the clip at a position, and the generator of all further draws for it."""
    generator = torch.Generator().manual_seed(fold_seed(seed, position))
    return draw_mixture(masks, shape, generator), generator


@dataclass(frozen=True)
class PixelNeeds:
    """Which clips of a training are decoded, `Stored.needs_pixels`: those whose mask the stored latents don't answer."""

    masks: tuple[MaskSpec, ...]
    """The mixture."""
    seed: int
    """Of the run, as in `draw_mask`."""
    temporal_factor: int
    """Frames of a latent."""
    reach: str
    """`stgen.models.latents.temporal_reach` of the VAE."""
    shapes: tuple[Shape, ...]
    """Of the clips."""

    def __call__(self, position: int, shape: Shape) -> bool:
        return shape not in self._never and not self._exact(draw_mask(self.masks, self.seed, position, shape)[0])

    def require_none(self, folder: str) -> None:
        """Raises `ValueError` for a kind of masks that needs pixels in one of 256 draws for a shape."""
        for spec, shape in itertools.product(self.masks, self.shapes):
            exact = all(self._exact(spec.draw(shape, torch.Generator().manual_seed(i))) for i in range(_DRAWS))
            given = "that give whole latents from the beginning, or nothing as generate_all does"
            kinds = f"kinds {given}, since {folder} has no pixels to encode anew"
            require(exact, "masks.kind", f"{spec.kind} {spec.args or ''}".strip(), kinds)

    @cached_property
    def _never(self) -> set[Shape]:
        """Shapes for which every mask of the mixture is the same at each draw, and exact: there is nothing to draw."""
        fixed = {shape: [spec.fixed(shape) for spec in self.masks] for shape in self.shapes}
        return {shape for shape, masks in fixed.items() if all(m is not None and self._exact(m) for m in masks)}

    def _exact(self, mask: Tensor) -> bool:
        return bool(given_latents_are_exact(mask[None], self.temporal_factor, self.reach))


# --- What was stored ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoding:
    """What `stgen data encode` stored in a folder; its encode.json."""

    source: str
    """SHA-256 of the index of the clips."""
    vae: str
    """Fingerprint."""
    text: str | None
    """Fingerprint of the text encoder; None if no text was stored."""
    text_dim: int | None
    """Width of its states."""
    max_text_length: int | None
    """Tokens of a caption."""
    dtype: str
    """Of all that was stored."""
    batch_size: int
    """Clips encoded together."""
    pixels: bool
    """Whether the clips lie beside their latents."""

    def check(self, vae: str, text_encoder: str, max_text_length: int) -> None:
        """Raises `ValueError` if the folders, or the name, are not those of the models that encoded."""
        other = "or encode the clips anew with `stgen data encode`, or set use_encoded=false"
        allowed = f"the VAE with which the data was encoded, of fingerprint {self.vae[:12]}; {other}"
        require(fingerprint(vae) == self.vae, "vae", vae, allowed)
        if self.text is not None:
            allowed = f"the encoder with which the captions were encoded, of fingerprint {self.text[:12]}; {other}"
            require(_text_fingerprint(text_encoder) == self.text, "text_encoder", text_encoder, allowed)
            allowed = f"{self.max_text_length}, with which the captions were encoded; {other}"
            require(max_text_length == self.max_text_length, "max_text_length", max_text_length, allowed)


def read_encoding(source: Source, rows: Index) -> Encoding | None:
    """What was stored with the clips of a data folder, or None if that are pixels alone.

    Raises:
        ValueError: the clips have latents and there is no encode.json, or a corrupt one.
        SourceError: the source fails.
    """
    if not any(LATENT in files for files in rows.layouts):
        return None
    try:
        return Encoding(**json.loads(source.read(ENCODING, 0, 2**16)))
    except FileNotFoundError as error:
        raise ValueError(_is_missing(ENCODING, source)) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{ENCODING} of data {source.url} is corrupt: {error}") from error


def fetch_empty_prompt(source: Source, path: Path) -> None:
    """Copies the `TextCache` of the empty prompt that was stored with the clips of a data folder.

    Raises:
        ValueError: there is none.
        SourceError: the source fails.
    """
    try:
        source.fetch(EMPTY_PROMPT, path)
    except FileNotFoundError as error:
        raise ValueError(_is_missing(EMPTY_PROMPT, source)) from error


def _is_missing(name: str, source: Source) -> str:
    allowed = "the one that `stgen data encode` writes beside the shards, or use_encoded=false"
    return f"{name} of data {source.url} is missing, allowed: {allowed}"


def find_stored(
    vae: VideoVAE,
    shapes: Sequence[Shape],
    masks: Sequence[MaskSpec],
    seed: int,
    moments: Sequence[str],
    source: Source,
    rows: Index,
) -> Stored | None:
    """What a training with these masks reads of each clip of a folder; None if there is nothing but pixels.

    Args:
        shapes: (t, h, w) of the clips.
        seed: of the run.
        moments: of the latents: `mean`, and `logvar` where the posterior is sampled.

    Raises:
        ValueError: as `read_encoding`, or a kind of masks needs pixels and there are clips that have none.
        SourceError: the source fails.
    """
    encoding = read_encoding(source, rows)
    if encoding is None:
        return None
    needs = PixelNeeds(tuple(masks), seed, compression_ratios(vae)[0], temporal_reach(vae), tuple(shapes))
    if not all(set(files) & set(CLIP_FILES) for files in rows.layouts):
        needs.require_none(source.url)
    latent_shapes = {shape: latent_shape(vae, *shape) for shape in shapes}
    return Stored(latent_shapes, tuple(moments), encoding.text_dim, needs)


# --- The job ------------------------------------------------------------------------------------------------------


def encode_clips(
    data: str | Path,
    vae: str | Path,
    out: str | Path,
    text_encoder: str | None = None,
    max_text_length: int = 128,
    dtype: str = "float16",
    drop_pixels: bool = False,
    batch_size: int = 8,
    max_damaged: float = 0.01,
    device: str | None = None,
    pool: Pool | None = None,
) -> list[Damage]:
    """Writes the clips of the data folder `data` with their latents, and with text states if an encoder is given.

    A shard is encoded once, and so is a caption within it. What is finished is kept when the command is rerun.

    Args:
        data: local, or of any source (`stgen.data.sources`).
        vae: folder of a saved VAE, of any class of `stgen.models.latents.VideoVAE`.
        out: the folder to write: new, or of the same job.
        text_encoder, max_text_length: as the training takes them.
        dtype: of what is stored: float16, bfloat16 or float32.
        drop_pixels: leaves the clips out. Training then has no masks but those whose given latents the stored ones are.
        batch_size: clips of one shape that follow each other in a shard and are encoded together.
        max_damaged: share of the clips that may turn out damaged, 0 to 1; they are left out.
        device: of a job without `pool`; None is the CPU.
        pool: Ray actors that share the shards; None works in this process. A cluster's machines need this machine's
            paths.

    Returns:
        What is damaged, as it stands in `out/skipped.jsonl`.
    Raises:
        ValueError: an argument is none of these, `out` holds something else, a shard cannot be encoded, or more clips than
            `max_damaged` are damaged. All other shards are finished first.
        RuntimeError: a worker can't load the models.
    """
    require(dtype in DTYPES, "dtype", dtype, ", ".join(DTYPES))
    require(batch_size >= 1, "batch_size", batch_size, "1 or more")
    require(max_text_length >= 1, "max_text_length", max_text_length, "1 or more")
    require(0 <= max_damaged <= 1, "max_damaged", max_damaged, "0 to 1")
    # Workers may have another working directory.
    source, out = open_source(str(Path(data).absolute() if Path(data).exists() else data)), Path(out).absolute()
    rows = open_index(source)
    bare = [files for files in rows.layouts if not set(files) & set(CLIP_FILES)]
    require(not bare, f"data {data}", f"clips of {', '.join(bare[0]) if bare else ''} alone", "clips with pixels")
    fits = pool is None or device is None
    require(fits, "device", device, "none with actors, which work on GPUs if gpus_per_actor is above 0")
    try:
        load_vae(vae)  # refuses what is none, before anything is written
    except OSError as error:
        raise ValueError(f"vae is {str(vae)!r}, allowed: one in safetensors: {str(error).splitlines()[0]}") from error
    empty = None if text_encoder is None else encode_text(*load_text_encoder(text_encoder), [""], max_text_length)[0]
    encoding = Encoding(
        source=rows.digest(),
        vae=fingerprint(vae),
        text=None if text_encoder is None else _text_fingerprint(text_encoder),
        text_dim=None if empty is None else empty.shape[-1],
        max_text_length=None if text_encoder is None else max_text_length,
        dtype=dtype,
        batch_size=batch_size,
        pixels=not drop_pixels,
    )
    require(not out.exists() or out.is_dir(), "out", str(out), "a folder, or nothing yet")
    out.mkdir(parents=True, exist_ok=True)
    with only_job(out):
        _claim(out, encoding)
        if text_encoder is not None:
            TextCache.build(out / EMPTY_PROMPT, text_encoder, [""], max_text_length)
        for torn in out.rglob(".*.tar.*.tmp"):  # what killed workers left
            torn.unlink()
        shards, clips = [out / name for name in rows.shards], np.bincount(rows.shard).tolist()
        todo = [number for number, path in enumerate(shards) if not path.exists()]
        if todo:
            (out / INDEX).unlink(missing_ok=True)  # of shards that somebody took away since
        worker = (source, out, str(vae), text_encoder, encoding, (device or "cpu") if pool is None else pool.device)
        with progress_bar(len(rows), len(rows) - sum(clips[number] for number in todo), True, "encode") as bar:
            failures = _encode(worker, todo, clips, bar.update, pool) if todo else []
        if failures:
            raise ValueError(f"{len(failures)} of {len(shards)} shards failed; {failures[0]}")
        notes = [_damage_of(path) for path in shards if _damage_of(path).exists()]
        found = [Damage(**json.loads(line)) for path in notes for line in path.read_text().splitlines()]
        if len(found) > max_damaged * len(rows):
            first = "; ".join(f"{damage.key} of {damage.shard}: {damage.reason}" for damage in found[:20])
            share = f"a share of max_damaged={max_damaged}"
            raise ValueError(f"data {data}: {len(found)} of {len(rows)} clips are damaged, allowed: {share}: {first}")
        if not (out / INDEX).exists():
            damaged = write_index(out, shards)
            assert not damaged, damaged  # they were written just now
        if found:
            (out / SKIPPED).write_text("".join(json.dumps(damage._asdict()) + "\n" for damage in found))
    return found


def _damage_of(shard: Path) -> Path:
    """Where it stands what was left out of a shard."""
    return shard.with_name(f".{shard.name}.damaged.jsonl")


def _claim(out: Path, encoding: Encoding) -> None:
    """Notes what is stored here; refuses a folder of something else."""
    path = out / ENCODING
    if path.exists():
        before, now = json.loads(path.read_text()), asdict(encoding)
        for name in now:
            allowed = f"{before.get(name)!r}, with which {out} was begun; another folder takes another value"
            require(now[name] == before.get(name), f"{name} of the encoding", now[name], allowed)
        return
    strangers = sorted(file.name for file in out.iterdir() if file.name != ".lock")
    require(not strangers, "out", str(out), f"a new or empty folder, not one with {strangers[:1]}")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(encoding), indent=1) + "\n")
    temporary.replace(path)


def _encode(
    arguments: tuple[Any, ...], todo: list[int], clips: list[int], update: Callable[[int], Any], pool: Pool | None
) -> list[str]:
    """Writes the shards of these numbers, which have so many clips; returns why some could not be written."""
    failures = []
    if pool is None:
        encoder = _Encoder(*arguments)
        for shard in todo:
            try:
                encoder.run(shard, update)
            except ValueError as error:
                failures.append(str(error))
        return failures
    with pool.start():
        for shard, _, failure in pool.map(_Encoder, arguments, todo, "the models"):
            update(clips[shard])
            failures += [failure] if failure else []
    return failures


class _Encoder:
    """The models, and what they do with a shard; or what an actor is: a process with the models in it."""

    def __init__(
        self, source: Source, out: Path, vae: str, text_encoder: str | None, encoding: Encoding, device: str
    ) -> None:
        self.source, self.out, self.encoding, self.device = source, out, encoding, torch.device(device)
        self.rows = open_index(source)
        self.vae = load_vae(vae).requires_grad_(False).to(self.device)
        self.text = None
        if text_encoder is not None:
            tokenizer, encoder = load_text_encoder(text_encoder)
            self.text = tokenizer, encoder.to(self.device)

    def ready(self) -> None:
        """Returns as soon as the worker has started."""

    def run(self, shard: int, update: Callable[[int], Any] = lambda clips: None) -> None:
        """Writes the shard of this number in the index, and tells how many clips are done as it goes."""
        path = self.out / self.rows.shards[shard]
        if path.exists():  # a worker before this one died between finishing it and saying so
            return
        rows = [self.rows[int(i)] for i in np.flatnonzero(self.rows.shard == shard)]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            damaged: list[Damage] = []
            with temporary.open("wb") as file:
                with open_tar(file) as tar:
                    for sample in self._samples(rows, damaged):
                        tar.write(sample)
                        update(1)
                file.flush()
                os.fsync(file.fileno())
            if damaged:
                _damage_of(path).write_text("".join(json.dumps(damage._asdict()) + "\n" for damage in damaged))
            temporary.replace(path)
            update(len(damaged))
        finally:
            temporary.unlink(missing_ok=True)

    def _samples(self, rows: list[dict[str, Any]], damaged: list[Damage]) -> Iterator[dict[str, Any]]:
        texts = self._texts(sorted({row["caption"] for row in rows}))
        for _, alike in itertools.groupby(rows, clip_shape):
            run = list(alike)
            for first in range(0, len(run), self.encoding.batch_size):
                yield from self._batch(run[first : first + self.encoding.batch_size], texts, damaged)

    def _texts(self, captions: list[str]) -> dict[str, bytes]:
        if self.text is None:
            return {}
        states = encode_distinct(*self.text, captions, self.encoding.max_text_length or 0)
        pairs = zip(captions, states, strict=True)
        return {caption: self._bytes(f"text states of {caption!r}", states=row) for caption, row in pairs}

    def _batch(
        self, rows: list[dict[str, Any]], texts: dict[str, bytes], damaged: list[Damage]
    ) -> Iterator[dict[str, Any]]:
        whole, samples, clips = [], [], []
        left_out = ENCODED_FILES if self.encoding.pixels else (*ENCODED_FILES, *CLIP_FILES)
        for row in rows:
            try:
                files = read_files(self.source, row, row["files"])
                clips.append(read_clip(files, row))
            except DamagedSample as error:
                damaged.append(Damage(row["shard"], row["key"], str(error)))
                continue
            whole.append(row)
            samples.append({name: data for name, data in files.items() if name not in left_out})
        if not clips:
            return
        video = to_rgb(stack_clips(clips))
        length = max(1, _PIECE_PIXELS // (len(clips) * video[0, 0, 0].numel()))
        pieces = (to_pixels(piece.to(self.device)) for piece in video.split(length, dim=2))
        moments = encode_moments_stream(self.vae, pieces)
        for i, (row, files) in enumerate(zip(whole, samples, strict=True)):
            parts = {name: x[i] for name, x in vars(moments).items() if x is not None}
            files[LATENT] = self._bytes(f"latents of {row['key']}", **parts)
            if self.text is not None:
                files[TEXT] = texts[row["caption"]]
            yield {"__key__": row["key"], **files}

    def _bytes(self, name: str, **tensors: Tensor) -> bytes:
        stored = {key: tensor.to("cpu", DTYPES[self.encoding.dtype]).contiguous() for key, tensor in tensors.items()}
        finite = all(bool(tensor.isfinite().all()) for tensor in stored.values())
        require(finite, "dtype", self.encoding.dtype, f"one in which {name} are finite")
        return save(stored)
