"""Requests and what they generate, on a real tiny pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stgen import STGenPipeline
from stgen.generation import Request, generate, parse_requests
from stgen.video import read_video, write_video

PREDICTION = {"id": "a", "task": "prediction", "video": "v.mp4"}


def noise(t: int, seed: int = 0) -> np.ndarray:
    """A clip `t 16 16 3` with every level of 0 to 255."""
    return np.random.default_rng(seed).permutation(np.arange(t * 16 * 16 * 3) % 256).reshape(t, 16, 16, 3).astype("u1")


def write(path: Path, frames: np.ndarray) -> str:
    write_video(path, frames, 10, lossless=True)
    return str(path)


# --- Requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"task": "dance"}, "task of request 'a' is 'dance', allowed: text, prediction"),
        ({"mask": "m.png"}, "mask of request 'a' is 'm.png', allowed: none"),
        ({"video": "v.mp4"}, "video of request 'a'"),
        ({"task": "prediction"}, "video of request 'a' is None"),
        (PREDICTION | {"last_video": "l.mp4"}, "last_video of request 'a'"),
        (PREDICTION | {"video": ""}, "video of request 'a' is ''"),
        ({"task": "interpolation", "video": "v.mp4"}, "last_video of request 'a' is None"),
        ({"task": "inpainting", "video": "v.mp4"}, "mask of request 'a' is None"),
        ({"num_frames": 0}, "num_frames of request 'a' is 0"),
        ({"height": -1}, "height of request 'a'"),
        ({"num_inference_steps": 0}, "num_inference_steps of request 'a'"),
        ({"guidance_scale": float("nan")}, "guidance_scale of request 'a'"),
        ({"guidance_scale": -1}, "guidance_scale of request 'a'"),
        ({"seed": -1}, "seed of request 'a'"),
        ({"seed": 2**63}, "seed of request 'a'"),
        ({"fps": 0}, "fps of request 'a'"),
        ({"seed": 1.0}, "seed of request 'a' is 1.0, allowed: a whole number"),
        ({"seed": True}, "seed of request 'a' is True"),
        ({"prompt": None}, "prompt of request 'a' is None, allowed: a text"),
        ({"id": 7}, "id of request 7 is 7, allowed: a text"),
        ({"id": ""}, "id is ''"),
        ({"id": "a/b"}, "id is 'a/b'"),
        ({"id": ".."}, "id is '..'"),
        ({"id": "a\n"}, r"id is 'a\\n'"),
        ({"id": "x" * 129}, "id is 'xxx"),
    ],
)
def test_refuses_wrong_fields(fields, named):
    with pytest.raises(ValueError, match=named):
        Request(**({"id": "a", "task": "text"} | fields))


def test_longest_id_is_a_file_name(tmp_path):
    request = Request(id="x" * 128, task="text")
    write_video(tmp_path / f"{request.id}.mp4", noise(1), 10)


# --- Files of requests --------------------------------------------------------------------------------------------


def test_reads_jsonl(tmp_path):
    path = tmp_path / "requests.jsonl"
    rows = [
        PREDICTION | {"seed": 3, "guidance_scale": 2, "num_frames": None},
        {"id": "b", "task": "text", "prompt": "é"},
    ]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    first, second = parse_requests(path)
    assert first == Request("a", "prediction", video=str(tmp_path / "v.mp4"), seed=3, guidance_scale=2)
    assert second == Request("b", "text", prompt="é")


def test_reads_csv(tmp_path):
    path = tmp_path / "requests.csv"
    path.write_text('id,task,prompt,video,seed,fps\na,text,"1, ""two""\nthree",,5,\n\n7,prediction,8,/v.mp4,,12.5\n')
    assert parse_requests(path) == [
        Request("a", "text", prompt='1, "two"\nthree', seed=5),
        Request("7", "prediction", prompt="8", video="/v.mp4", fps=12.5),
    ]


@pytest.mark.parametrize("absent", [None, float("nan")])
def test_reads_parquet(tmp_path, absent):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    # A column of whole numbers with gaps becomes one of floats on its way through pandas.
    columns = {"id": ["a", "b"], "task": ["text", "text"], "seed": [4.0, absent], "guidance_scale": [2.5, absent]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "r.parquet")
    assert parse_requests(tmp_path / "r.parquet") == [
        Request("a", "text", seed=4, guidance_scale=2.5),
        Request("b", "text"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("r.jsonl", "", "allowed: a file with at least one request"),
        ("r.csv", "id,task\n", "allowed: a file with at least one request"),
        ("r.txt", "id,task\n", "allowed: a file name ending in .jsonl, .csv, .parquet"),
        ("r.jsonl", '{"id": "a", "task": "text"}\n{"id": "b", "task"', "r.jsonl: line 2 is no JSON"),
        ("r.jsonl", '["a"]', "r.jsonl: line 1 is .*allowed: one JSON object a line"),
        (
            "r.jsonl",
            '{"id": "a", "task": "text", "promt": "x"}',
            "r.jsonl: line 1: column is 'promt', allowed: id, task",
        ),
        ("r.jsonl", '{"task": "text"}', "r.jsonl: line 1: id is None"),
        ("r.jsonl", '{"id": "a"}', "r.jsonl: line 1: task is None"),
        ("r.jsonl", '{"id": "a", "task": "text", "seed": "1"}', "line 1: seed of request 'a' is '1', allowed: a whole"),
        ("r.jsonl", '{"id": "a", "task": "text", "fps": NaN}', "line 1: fps of request 'a' is nan"),
        (
            "r.jsonl",
            '{"id": "a", "task": "prediction", "video": 3}',
            "line 1: video of request 'a' is 3, allowed: a text",
        ),
        (
            "r.jsonl",
            '{"id": "a", "task": "text"}\n' * 2,
            "line 2: id is 'a', allowed: another one, since line 1 has it",
        ),
        ("r.csv", "id,task,promt\na,text,x\n", "r.csv: line 2: column is 'promt'"),
        ("r.csv", "id,task,task\na,text,text\n", "r.csv: column is 'task', allowed: each column once"),
        ("r.csv", "id,task\na,text,x\n", "r.csv: line 2 has 3 cells, allowed: 2"),
        ("r.csv", "id,task,seed\na,text,1.5\n", "r.csv: line 2: seed is '1.5', allowed: a whole number"),
        ("r.csv", "id,task,fps\na,text,fast\n", "r.csv: line 2: fps is 'fast', allowed: a number"),
        ("r.csv", 'id,task\n"a,text\n', "r.csv: line 2 is no CSV"),
        ("r.csv", "id,task,prompt\na,text,\xff\n", "r.csv is not in UTF-8"),
        ("r.parquet", "id,task\n", "r.parquet: no parquet file"),
    ],
)
def test_refuses_wrong_files(tmp_path, name, text, named):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=named):
        parse_requests(tmp_path / name)


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl', allowed: a file that exists"):
        parse_requests(tmp_path / "none.jsonl")


# --- Generation ---------------------------------------------------------------------------------------------------


def generated(pipeline: STGenPipeline, request: Request) -> np.ndarray:
    """All frames of the request's video."""
    return np.concatenate(list(generate(pipeline, request)))


def test_text_is_the_pipeline_at_that_seed(tiny_pipeline):
    frames = generated(tiny_pipeline, Request("a", "text", "one digit", seed=5, num_inference_steps=2))
    generator = torch.Generator().manual_seed(5)
    images = tiny_pipeline("one digit", num_inference_steps=2, generator=generator).frames[0]
    np.testing.assert_array_equal(frames, np.stack([np.asarray(image) for image in images]))
    assert frames.dtype == np.uint8
    assert frames.shape == (9, 16, 16, 3)


def test_depends_on_nothing_but_the_request(tiny_pipeline, tmp_path):
    requests = [
        Request("a", "text", "a digit", "down", num_frames=5, height=15, width=17, num_inference_steps=2),
        Request("b", "prediction", "a digit", video=write(tmp_path / "v.mkv", noise(2)), num_inference_steps=2),
    ]
    first = [generated(tiny_pipeline, request) for request in requests]
    torch.manual_seed(99)
    again = [generated(tiny_pipeline, request) for request in reversed(requests)][::-1]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert first[0].shape == (5, 15, 17, 3)


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"prompt": "zero"}, {"guidance_scale": 2}, {"negative_prompt": "up"}, {"num_inference_steps": 3}],
)
def test_every_field_counts(tiny_pipeline, changed):
    base = {"id": "a", "task": "text", "prompt": "one", "num_inference_steps": 2}
    assert (generated(tiny_pipeline, Request(**base)) != generated(tiny_pipeline, Request(**(base | changed)))).any()


def test_prediction_keeps_the_given_frames(tiny_pipeline, tmp_path):
    given = noise(4)
    video = write(tmp_path / "v.mkv", given)
    frames = generated(tiny_pipeline, Request("a", "prediction", video=video, num_frames=7, num_inference_steps=2))
    assert frames.shape == (7, 16, 16, 3)
    np.testing.assert_array_equal(frames[:4], given)


def test_prediction_takes_an_image(tiny_pipeline, tmp_path):
    Image.fromarray(noise(1)[0]).save(tmp_path / "v.png")
    request = Request("a", "prediction", video=str(tmp_path / "v.png"), num_inference_steps=2)
    np.testing.assert_array_equal(generated(tiny_pipeline, request)[:1], noise(1))


def test_interpolation_keeps_both_ends(tiny_pipeline, tmp_path):
    first, last = noise(2, seed=1), noise(2, seed=2)
    ends = {"video": write(tmp_path / "v.mkv", first), "last_video": write(tmp_path / "l.mkv", last)}
    frames = generated(tiny_pipeline, Request("a", "interpolation", **ends, num_inference_steps=2))
    assert len(frames) == 9
    np.testing.assert_array_equal(frames[:2], first)
    np.testing.assert_array_equal(frames[-2:], last)


@pytest.mark.parametrize("mask_frames", [1, 5])
def test_inpainting_generates_where_the_mask_is_white(tiny_pipeline, tmp_path, mask_frames):
    given = noise(5)
    white = np.zeros((mask_frames, 16, 16, 1), bool)
    for i in range(mask_frames):
        white[i, 3 + i : 10 + i, 2:9] = True
    # 127 and 128 are the darkest white and the brightest black.
    write_video(tmp_path / "m.mkv", np.where(white, 128, 127).astype(np.uint8), 10, lossless=True)
    files = {"video": write(tmp_path / "v.mkv", given), "mask": str(tmp_path / "m.mkv")}
    frames = generated(tiny_pipeline, Request("a", "inpainting", **files, num_inference_steps=2))
    hidden = np.broadcast_to(white, given.shape)
    np.testing.assert_array_equal(frames[~hidden], given[~hidden])
    assert (frames != given)[hidden].mean() > 0.9


def test_mask_survives_mp4(tiny_pipeline, tmp_path):
    given, white = noise(5), np.zeros((5, 16, 16, 1), bool)
    white[:, 3:12, 5:12] = True
    write_video(tmp_path / "m.mp4", white.astype(np.uint8) * 255, 10)
    assert set(np.unique(read_video(tmp_path / "m.mp4")[0])) - {0, 255}
    files = {"video": write(tmp_path / "v.mkv", given), "mask": str(tmp_path / "m.mp4")}
    frames = generated(tiny_pipeline, Request("a", "inpainting", **files, num_inference_steps=2))
    hidden = np.broadcast_to(white, given.shape)
    np.testing.assert_array_equal(frames[~hidden], given[~hidden])
    assert (frames != given)[hidden].mean() > 0.9


@pytest.mark.parametrize(("frames", "height", "named"), [(4, 16, r"mask\.shape"), (5, 14, r"mask\.shape")])
def test_refuses_a_mask_that_does_not_fit(tiny_pipeline, tmp_path, frames, height, named):
    mask = write(tmp_path / "m.mkv", noise(frames)[:, :height])
    request = Request("a", "inpainting", video=write(tmp_path / "v.mkv", noise(5)), mask=mask)
    with pytest.raises(ValueError, match=named):
        generated(tiny_pipeline, request)


def test_refuses_a_missing_input(tiny_pipeline):
    with pytest.raises(ValueError, match=r"/none\.mp4 cannot be read as a video"):
        generated(tiny_pipeline, Request("a", "prediction", video="/none.mp4"))


def test_refuses_to_call_nan_a_video(tiny_pipeline):
    torch.nn.init.constant_(next(tiny_pipeline.transformer.parameters()), float("nan"))
    with pytest.raises(ValueError, match="the video of request 'a' is 'not finite'"):
        generated(tiny_pipeline, Request("a", "text", num_inference_steps=1))


def test_leaves_the_pipeline_as_it_is(tiny_pipeline, tmp_path, capfd):
    tiny_pipeline.text_encoder.to(torch.bfloat16)
    request = Request("a", "prediction", video=write(tmp_path / "v.mkv", noise(1)), num_inference_steps=1)
    capfd.readouterr()
    generated(tiny_pipeline, request)
    assert tiny_pipeline.text_encoder.dtype == torch.bfloat16
    assert tiny_pipeline.transformer.dtype == torch.float32
    assert "1/1" not in capfd.readouterr().err  # the progress bar that was switched off
