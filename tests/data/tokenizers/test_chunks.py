"""A text in chunks has the tokens of the whole, however its tokenizer cuts, and no chunk is long."""

import random
import sysconfig
from pathlib import Path

import pytest

from data import BPE
from data.tokenizers.chunks import REACH, Cutter
from data.tokenizers.pieces import LONGEST_PIECE

LIBRARY = Path(sysconfig.get_path("stdlib"))
HARD = [  # what cuts in one tokenizer and not in another
    " a", "  a", "\n", "\n\n   ", "\r\n", "\t", "):\n        ", "don't", "I'LL", "x's ", "_name", "=" * 7, "-" * 300,
    "123456", "3.14, 2.71", "½Ⅷ²", "漢字", "漢字\uff0c漢字。", "ไทย", "e\u0301", "\u0301", "한국어 ", "Straße ", "ǅ",
    "🦉", "👩\u200d👩", "\u2028", "\xa0", "\u3000", "\0", "<|bos|>", "ACGT" * 80, " " * 300, "\n" * 300, "\U000e0fff",
]  # fmt: skip
LINE = "It isn't 1 word: 漢字\uff0c漢字 in “quotes” (x_y=12)…\n    e\u0301 🦉  two\n"

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (  # GPT-4o's: marks and contractions belong to words
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(pre_tokenizer, text: str, normalizer=None, added: tuple[str, ...] = (), vocabulary: int = 500):
    """Returns a byte-level tokenizer of the library."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    if normalizer:
        tokenizer.normalizer = normalizer
    return tokenizer


def expression(pattern: str):
    from tokenizers import Regex, pre_tokenizers

    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), bytes_only])


@pytest.fixture(scope="module")
def text() -> str:
    return (LIBRARY / "argparse.py").read_text()[:20_000] + LINE * 50


@pytest.fixture(scope="module")
def ours(text, tmp_path_factory):
    from tokenizers import Tokenizer

    tokenizer = BPE(vocabulary=500)
    tokenizer.fit([text])
    file = tmp_path_factory.mktemp("ours") / "tokenizer.json"
    tokenizer.save(file)
    library = Tokenizer.from_file(str(file))
    library.encode_special_tokens = True
    return library


@pytest.fixture(
    scope="module",
    params=["ours", "GPT-2", "GPT-4", "GPT-4o", "single digits", "NFC", "added", "no pieces", "lines", "Llama 2"],
)
def tokenizer(request, ours, text):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    no_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if request.param == "ours":
        return ours
    if request.param == "Llama 2":  # merges cross words, but not every pair of characters
        tokenizer = Tokenizer(models.BPE(unk_token="?"))
        trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=["?"], show_progress=False)
        tokenizer.train_from_iterator([line.replace(" ", "▁") for line in text.splitlines(keepends=True)], trainer)
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        return tokenizer
    return {
        "GPT-2": lambda: trained(gpt2, text),
        "GPT-4": lambda: trained(expression(GPT4), text),
        "GPT-4o": lambda: trained(expression(O200K), text),
        "single digits": lambda: trained(expression(GPT4.replace("{1,3}", "")), text),
        "NFC": lambda: trained(expression(GPT4), text, normalizers.NFC()),
        "added": lambda: trained(gpt2, text, added=("word: 漢", "quotes” (x", "a 3.14, 2")),
        "no pieces": lambda: trained(no_regex, text),
        "lines": lambda: trained(expression(r"[^\n]*\n"), text),
    }[request.param]()


def encoded(tokenizer, texts) -> list[int]:
    return [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False).ids]


def test_chunks_have_the_tokens_of_the_whole(tokenizer):
    choice, cuts = random.Random(0), 0
    for size in (1, 3, 40, 200):
        hard = "".join(choice.choices(HARD, k=12))
        for text in (hard, LINE + hard + LINE):
            chunks = list(Cutter(tokenizer).chunks(text, size))
            assert "".join(chunks) == text
            assert encoded(tokenizer, chunks) == encoded(tokenizer, [text])
            cuts += len(chunks) - 1
    assert cuts > 20 or tokenizer.pre_tokenizer.pre_tokenize_str("one, two") == [("one,Ġtwo", (0, 8))]


@pytest.mark.parametrize("unit", ["ACGT", "漢", "31", "=", " ", "\n", "\U0001f989", "\u0301", "x=\n  "])
def test_text_without_words_is_cut_and_keeps_its_tokens(ours, unit):
    letters = random.Random(0)
    text = "a: " + "".join(letters.choice(unit) for _ in range(20_000)) + "\tend"
    for start in (0, 3):
        chunks = list(Cutter(ours).chunks(text[start:], 1000))
        assert max(map(len, chunks)) <= 1000 + REACH + 2 * LONGEST_PIECE
        assert encoded(ours, chunks) == encoded(ours, [text[start:]])
