"""Our own tokenizers: lossless on any text, exact in bytes, the same in every process."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from data import CorpusError
from data.tokenizers import BPE, Bins, Bytes, Saved, hugging_face_files, load
from tests.data.tokenizers.material import any_text


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


@settings(max_examples=200, deadline=None)
@given(text=any_text)
def test_round_trip_and_bytes_are_exact(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text and tokenizer.decode_bytes([tokenizer.bos, *tokens]) == text.encode()
    assert tokenizer.token_bytes[tokens.astype(np.int64)].sum() == len(text.encode())
    assert tokenizer.bos not in tokens  # not even where the text spells it


@pytest.mark.parametrize("longest", [1000, 70_000], ids=["short", "with a long one"])
def test_many_texts_at_once_have_the_tokens_of_each(tokenizer, code, longest):
    texts = ["", code[:999], "<|bos|>", "", "é 1\n", "word " * (longest // 5), ""]
    tokens, counts = tokenizer.encode_all(list("abcdefg"), texts)
    each = [tokenizer.encode(text).tolist() for text in texts]
    assert tokens.tolist() == [token for tokens in each for token in tokens] and counts.tolist() == list(map(len, each))
    assert tokenizer.encode_all(["a"], [""])[1].tolist() == [0]


def test_vocabulary_is_what_was_asked(tokenizer):
    assert tokenizer.vocabulary == len(tokenizer.token_bytes) in (257, 600)
    assert tokenizer.token_bytes[tokenizer.bos] == 0
    assert tokenizer.token_bytes.sum() == tokenizer.token_bytes[tokenizer.token_bytes > 0].sum()
    assert tokenizer.token_bytes.dtype == np.int64


def test_training_is_deterministic_across_processes_and_threads(bpe, code, tmp_path):
    text, out = tmp_path / "text", tmp_path / "tokenizer.json"
    text.write_text(code)
    program = (
        "import sys, pathlib; from data.tokenizers import BPE\n"
        "b = BPE(vocabulary=600); b.fit([pathlib.Path(sys.argv[1]).read_text()]); b.save(pathlib.Path(sys.argv[2]))"
    )
    environment = {"PYTHONHASHSEED": "3", "RAYON_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, "-c", program, text, out], check=True, env=environment)
    bpe.save(tmp_path / "here.json")
    assert out.read_text() == (tmp_path / "here.json").read_text()


def test_indentation_is_few_tokens():
    tokenizer = BPE(vocabulary=300)
    tokenizer.fit(["def f(x):\n        return x\n" * 50])
    assert len(tokenizer.encode("):\n        ")) == 1


def test_a_word_without_end_is_learned_in_bounded_pieces():
    """The time to learn grows with the square of a piece, and a token is never longer than its piece."""
    tokenizer = BPE(vocabulary=300)
    tokenizer.fit(["a" * 5_000])
    assert tokenizer.token_bytes.max() == 256
    assert len(tokenizer.encode("a" * 1_000)) == 3 + len(tokenizer.encode("a" * (1_000 - 3 * 256)))


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


def test_a_tokenizer_without_a_form_in_the_library_is_not_exported():
    class Own(Bins):
        pass

    own = rf"data\.tokenizer\._target_={Own.__module__}\.\S+\.Own"
    for tokenizer, origin in ((Bins(9, 4.0), "data/tokenizer=bins"), (Own(9, 4.0), own)):
        with pytest.raises(CorpusError, match=rf"^{origin}: must be bytes, bpe or saved, "):
            hugging_face_files(tokenizer, 1000)
