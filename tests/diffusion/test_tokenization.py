"""Tokenizers: training, ids, cutting of long prompts, and what transformers makes of the files."""

import json
import shutil
import unicodedata
import warnings

import numpy as np
import pytest
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, CLIPTokenizer

from megjax.diffusion.tokenization import END, START, load_tokenizer, save_tokenizer, tokenize, train_tokenizer

LIMIT = 12
SUBJECTS = ("house", "tree", "boat", "mountain")
CAPTIONS = [f"a {colour} {thing} by night" for colour in ("red", "green", "golden") for thing in SUBJECTS] * 20
ANY_TEXT = ("naïve café", "日本語 の 家", "🙂🏠", "tab\tand\nline", "e\u0301 \u200d\x07", "x" * 9, "<|weird|> 50% ½")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CAPTIONS, folder, vocab_size=700, max_tokens=LIMIT)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_ids_are_padded_between_marks(tokenizer):
    ids = tokenize(tokenizer, ["a red house", ""])
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    words = tokenizer.convert_tokens_to_ids(["a</w>", "red</w>", "house</w>"])
    assert ids.dtype == np.int32
    assert start != end
    assert ids.tolist() == [[start, *words, *[end] * (LIMIT - 4)], [start, *[end] * (LIMIT - 1)]]


def test_frequent_words_are_one_token(tokenizer):
    for caption in CAPTIONS[:12]:
        assert tokenizer.tokenize(caption) == [word + "</w>" for word in caption.split()]


@pytest.mark.parametrize("text", ANY_TEXT)
def test_any_text_survives(tokenizer, text):
    ids = tokenizer(text, truncation=False)["input_ids"]
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    # CLIP lowercases, composes (NFC) and splits at spaces, punctuation and digits, which decoding marks with spaces.
    expected = unicodedata.normalize("NFC", text).lower()
    assert "".join(decoded.split()) == "".join(expected.split())
    assert max(ids) < len(tokenizer)
    assert tokenizer.unk_token_id not in ids[1:-1]


def test_every_byte_is_known(tokenizer):
    vocabulary = tokenizer.get_vocab()
    for letter in ByteLevel.alphabet():
        assert letter in vocabulary
        assert letter + "</w>" in vocabulary
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))


def test_case_does_not_matter(tokenizer):
    assert np.array_equal(tokenize(tokenizer, ["A Red HOUSE"]), tokenize(tokenizer, ["a red house"]))


def test_long_prompt_is_cut_with_a_warning_as_diffusers_does(tokenizer):
    prompts = ["a red house by night a green tree by night a golden boat", "a boat"]
    with pytest.warns(UserWarning, match=r"cut at 12; lost: .*golden boat"):
        ids = tokenize(tokenizer, prompts)
    # diffusers' StableDiffusionPipeline.encode_prompt makes exactly this call.
    reference = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="np"
    ).input_ids
    assert np.array_equal(ids, reference)
    assert ids[0, -1] == tokenizer.eos_token_id


def test_a_prompt_of_just_the_limit_is_not_cut(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = tokenize(tokenizer, [" ".join(["red"] * (LIMIT - 2))])
    assert (ids[0, 1:-1] == tokenizer.convert_tokens_to_ids("red</w>")).all()


@pytest.mark.parametrize("prompts", [[], "a house", ["a house", 3], [None]])
def test_bad_prompts(tokenizer, prompts, unchecked):
    with pytest.raises(ValueError, match="prompt.*must be a") as error:
        tokenize(tokenizer, prompts)
    assert "\n" not in str(error.value)


def test_training_again_gives_the_same_files(folder, tmp_path):
    train_tokenizer(iter(CAPTIONS), tmp_path, vocab_size=700, max_tokens=LIMIT)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


@pytest.mark.parametrize("keep", ["all", "vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("opener", [CLIPTokenizer.from_pretrained, AutoTokenizer.from_pretrained, load_tokenizer])
def test_saved_files_open_in_both_layouts(tokenizer, tmp_path, keep, opener):
    save_tokenizer(tokenizer, tmp_path)
    if keep == "vocab.json":  # as transformers 4 wrote them
        (tmp_path / "tokenizer.json").unlink()
    if keep == "tokenizer.json":  # as transformers 5 does
        (tmp_path / "vocab.json").unlink()
        (tmp_path / "merges.txt").unlink()
    opened = opener(tmp_path)
    prompts = [*CAPTIONS[:3], "", "it's 12 o'clock", *ANY_TEXT[:2]]
    options = {"padding": "max_length", "max_length": 64}
    assert opened(prompts, **options)["input_ids"] == tokenizer(prompts, **options)["input_ids"]
    assert opened.model_max_length == LIMIT


def test_missing_files(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere: missing"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"missing.*vocab\.json.*merges\.txt"):
        load_tokenizer(tmp_path)
    shutil.copy(folder / "vocab.json", tmp_path)
    with pytest.raises(ValueError, match=r"missing is \['merges\.txt'\]"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[1]"),
        ("vocab.json", json.dumps({"a": 0})),
        ("merges.txt", "#version: 0.2\nqqq rrr\n"),
        ("merges.txt", "a b c d\n"),
        ("tokenizer_config.json", "{"),
    ],
)
def test_damaged_files(folder, tmp_path, name, content):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="holds no readable CLIP tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_learned_word_of_several_vectors_stands_for_all_of_them(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<many>", "<many>_1", "<many>_2", "<many>_4", "<one>"])
    prompts = ["a <many> house", "<many>,<one>,<many>", "a red house", "<many>_1 alone"]
    spelled = [*TextualInversionLoaderMixin().maybe_convert_prompt(prompts[:3], tokenizer), prompts[3]]
    assert spelled[0] == "a <many> <many>_1 <many>_2 house"
    expected = tokenizer(spelled, padding="max_length", max_length=LIMIT)["input_ids"]
    np.testing.assert_array_equal(tokenize(tokenizer, prompts), expected)
