"""Lossless on any text, exact in bytes, the same from chunks as from the whole, the same in every process."""

import pickle
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import CorpusError
from data.tokenizers import BPE, Bytes, Saved, load
from data.tokenizers.chunks import chunks

LIBRARY = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def code() -> str:
    return "".join((LIBRARY / name).read_text() for name in ("argparse.py", "ast.py", "decimal.py", "heapq.py"))


@pytest.fixture(scope="module")
def bpe(code) -> BPE:
    tokenizer = BPE(vocabulary=600)
    tokenizer.fit([code])
    return tokenizer


@pytest.fixture(scope="module")
def whole(bpe, tmp_path_factory):
    """Encodes a text with `bpe` as one string."""
    from tokenizers import Tokenizer

    file = tmp_path_factory.mktemp("whole") / "tokenizer.json"
    bpe.save(file)
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module", params=["bytes", "bpe", "reloaded", "pickled"])
def tokenizer(request, bpe, tmp_path_factory):
    if request.param == "bytes":
        return Bytes()
    if request.param == "bpe":
        return bpe
    if request.param == "pickled":
        return pickle.loads(pickle.dumps(bpe))
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.save(file)
    return load(file)


any_text = st.one_of(
    st.text(max_size=200),
    st.lists(
        st.sampled_from(
            [
                "<|bos|>",
                "def f(x):\n",
                "    ",
                "\n",
                "\t",
                " ",
                "123456",
                "é",
                "漢字",
                "🦉",
                "\u0301",
                "\r\n",
                "x_y",
                "):",
            ]
        ),
        max_size=40,
    ).map("".join),
)


@settings(max_examples=200, deadline=None)
@given(text=any_text)
def test_round_trip_and_bytes_are_exact(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.token_bytes[tokens.astype(np.int64)].sum() == len(text.encode())
    assert tokenizer.bos not in tokens  # not even where the text spells it


def test_vocabulary_is_what_was_asked(tokenizer):
    assert tokenizer.vocabulary == len(tokenizer.token_bytes) in (257, 600)
    assert tokenizer.token_bytes[tokenizer.bos] == 0
    assert tokenizer.token_bytes.sum() == tokenizer.token_bytes[tokenizer.token_bytes > 0].sum()
    assert tokenizer.token_bytes.dtype == np.int64


@settings(max_examples=200, deadline=None)
@given(text=any_text, words=st.lists(st.sampled_from(["a b", "word word", "x = y", "  in  ", "'s s", ".a b", "\n a"])))
def test_chunks_encode_to_the_same_tokens_as_the_whole(whole, text, words):
    text = "".join(words[:4]) + text + "".join(words)
    parts = list(chunks(text, size=3))
    assert "".join(parts) == text
    assert [number for part in parts for number in whole(part)] == whole(text)


def test_a_long_document_encodes_in_chunks_as_the_whole(bpe, whole, code):
    assert len(list(chunks(code))) > 2
    assert bpe.encode(code).tolist() == whole(code)


def test_chunks_suit_the_expressions_of_others(code):
    """GPT-2's and GPT-4's pre-tokenizers, whose look-ahead makes most other places unsafe to cut at."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    gpt4 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for cut in (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(gpt4), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    ):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = cut
        whole = [piece for piece, _ in cut.pre_tokenize_str(code[:50_000])]
        parts = [piece for part in chunks(code[:50_000], size=100) for piece, _ in cut.pre_tokenize_str(part)]
        assert parts == whole


def test_training_is_deterministic_across_processes_and_threads(bpe, code, tmp_path):
    text, out = tmp_path / "text", tmp_path / "tokenizer.json"
    text.write_text(code)
    program = (
        "import sys, pathlib; from data.tokenizers import BPE\n"
        "b = BPE(vocabulary=600); b.fit([pathlib.Path(sys.argv[1]).read_text()]); b.save(pathlib.Path(sys.argv[2]))"
    )
    environment = {"PYTHONHASHSEED": "3", "RAYON_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program, text, out], check=True, env=environment)
    bpe.save(tmp_path / "here.json")
    assert out.read_text() == (tmp_path / "here.json").read_text()


def test_indentation_is_few_tokens():
    tokenizer = BPE(vocabulary=300)
    tokenizer.fit(["def f(x):\n        return x\n" * 50])
    assert len(tokenizer.encode("):\n        ")) == 1


def test_a_vocabulary_that_cannot_hold_all_bytes():
    with pytest.raises(CorpusError, match=r"^data\.tokenizer\.vocabulary=256: must be at least 257\b"):
        BPE(vocabulary=256)


def test_saved_tokenizers_that_do_not_fit(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    def refused(name):
        return pytest.raises(CorpusError, match=rf"^data\.tokenizer\.path={tmp_path / name}: must ")

    with refused("none.json"):
        Saved(str(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text("{}")
    with refused("broken.json"):
        Saved(str(tmp_path / "broken.json"))
    words = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    with refused("words.json"):
        Saved(str(tmp_path / "words.json"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.model = models.BPE()
    words.save(str(tmp_path / "no_bos.json"))
    with refused("no_bos.json"):
        Saved(str(tmp_path / "no_bos.json"))
