"""CLIP tokenizers: reading one from a folder, training one on captions, prompts to padded ids."""

import itertools
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from megjax.configs import require, write_json
from megjax.files import require_content, write_text

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
WORDS = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""CLIP's words: letters, single digits, or runs of anything else that is not a space."""


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer saved in `folder`; ValueError if its files are missing or damaged."""
    absent = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    whole = not absent or (folder / "tokenizer.json").is_file()
    require(whole, f"tokenizer folder {folder}: missing", absent, "no file, or tokenizer.json in their place")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        if (folder / name).is_file():
            require_content(folder / name)
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many kinds for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder} holds no readable CLIP tokenizer: {reason}") from error


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Int[np.ndarray, "b l"]:
    """Ids of `prompts`, padded to the tokenizer's limit, int32.

    A word that textual inversion has given several vectors, "<word>", "<word>_1", ..., stands for all of them. A longer
    prompt is cut there with a warning that quotes what is lost, as diffusers does. Raises ValueError if
    `prompts` is empty, a single string, or holds something that is not a string.
    """
    require(not isinstance(prompts, str), "prompts", prompts, "a list of strings, not one string")
    require(isinstance(prompts, Sequence | np.ndarray), "prompts", prompts, "a list of strings")
    require(len(prompts) > 0, "prompts", list(prompts), "a list of at least one string")
    for prompt in prompts:
        require(isinstance(prompt, str), "prompt", prompt, "a string")
        whole = not any("\ud800" <= letter <= "\udfff" for letter in prompt)
        require(whole, "prompt", prompt, "text without half of a surrogate pair, which is no character")
    limit, spelled = tokenizer.model_max_length, [_with_all_vectors(tokenizer, prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, tokenizer(spelled, truncation=False, verbose=False)["input_ids"], strict=True):
        if len(ids) > limit:
            lost = tokenizer.decode(ids[limit - 1 : -1])
            warnings.warn(
                f"prompt of {len(ids)} tokens cut at {limit}; lost: {lost!r} of {prompt[:40]!r}", stacklevel=3
            )
    padded = tokenizer(spelled, padding="max_length", max_length=limit, truncation=True)
    return np.asarray(padded["input_ids"], np.int32)


def _with_all_vectors(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """The prompt with the added tokens "<word>_1", "<word>_2", ... after "<word>", as diffusers puts them there."""
    added = tokenizer.added_tokens_encoder
    for word in {token for token in tokenizer.tokenize(prompt) if f"{token}_1" in added}:
        more = itertools.takewhile(added.__contains__, (f"{word}_{i}" for i in itertools.count(1)))
        whole = " ".join([word, *more])
        prompt = re.sub(re.escape(word) + r"(?!_\d)", lambda _, whole=whole: whole, prompt)
    return prompt


def train_tokenizer(captions: Iterable[str], folder: Path, *, vocab_size: int, max_tokens: int) -> CLIPTokenizer:
    """Train a byte-level BPE in CLIP's format on `captions` and write it to `folder`.

    Every byte is in the vocabulary, inside and at the end of a word, so any text can be encoded. Frequent words become
    one token each.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix=END_OF_WORD, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    words = [*alphabet, *(letter + END_OF_WORD for letter in alphabet), *("".join(merge) for merge in merges)]
    vocabulary = {word: i for i, word in enumerate([*dict.fromkeys(words), START, END])}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_tokens, "do_lower_case": True, **special},
    )
    return load_tokenizer(folder)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the tokenizer to `folder` in the layouts of transformers 4 (vocab.json, merges.txt) and 5."""
    tokenizer.save_pretrained(str(folder))
    tokenizer.backend_tokenizer.model.save(str(folder))
