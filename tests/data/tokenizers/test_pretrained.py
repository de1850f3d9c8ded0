"""Tokenizers of pretrained models: their own tokens, and the normalized text back from them."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import InMemoryDocuments
from data.preparation import prepare
from data.sources import Files
from data.tokenizers import Saved, Tokenizer, hugging_face_files, load
from tests.data.tokenizers.material import METASPACE, any_text, changed, like_llama, like_qwen, written


@pytest.fixture(scope="module", params=["NFC", "Llama 2", "Metaspace"])
def pretrained(request, bpe, code, tmp_path_factory) -> tuple[Tokenizer, dict]:
    """(a tokenizer, the tokenizer.json that it was read from)."""
    folder = tmp_path_factory.mktemp("pretrained")
    settings = like_qwen(bpe, folder) if request.param == "NFC" else like_llama(code)
    if request.param == "Metaspace":
        settings |= {"normalizer": None, "pre_tokenizer": METASPACE}
    return written(settings, folder / "tokenizer.json"), settings


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(any_text, st.sampled_from(["e\u0301 a\u0308", "a▁b", "  two  spaces ", "<s> </s> <0x41>"])))
def test_tokens_of_a_pretrained_tokenizer_give_the_normalized_text_back(pretrained, text):
    tokenizer, _ = pretrained
    tokens, normalized = tokenizer.encode(text), tokenizer.normalized(text)
    assert tokenizer.decode(tokens) == normalized
    assert tokenizer.token_bytes[tokens.astype(np.int64)].sum() == len(normalized.encode())
    assert tokenizer.bos not in tokens and tokenizer.token_bytes[tokenizer.bos] == 0
    if text.isascii():
        assert normalized == text


def test_a_pretrained_tokenizer_gives_its_own_tokens_after_the_first_word(pretrained, code):
    """The tokens of the library, which puts a space before the text, for a text that begins with one."""
    from tokenizers import Tokenizer as Library

    tokenizer, settings = pretrained
    prefix = "" if settings["pre_tokenizer"] and settings["pre_tokenizer"]["type"] == "Sequence" else " "
    library = Library.from_str(json.dumps(settings))
    expected = library.encode(code, add_special_tokens=False).ids
    assert tokenizer.encode(prefix + code).tolist() == expected
    assert len(list(tokenizer.chunks(prefix + code, 1 << 16))) > 2


def test_a_pretrained_tokenizer_is_exported_with_its_tokens_and_their_text(pretrained, code):
    from tokenizers import Tokenizer as Library

    tokenizer, _ = pretrained
    library = Library.from_str(hugging_face_files(tokenizer, 1000)["tokenizer.json"])
    for text in (code[:5000], " a", "a  b\u00e9 ", "\U0001f989\n"):
        encoded = library.encode(text, add_special_tokens=False)
        assert encoded.ids == tokenizer.encode(text).tolist()
        assert library.decode(encoded.ids) == text
        assert library.encode(text).ids[0] == tokenizer.bos


def test_a_pretrained_tokenizer_stays_itself_when_it_is_saved_and_pickled(pretrained, tmp_path):
    tokenizer, _ = pretrained
    tokenizer.save(tmp_path / "again.json")
    text = "def f(x): # e\u0301 <s>\n"
    for other in (load(tmp_path / "again.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.identity() == tokenizer.identity()
        assert other.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert other.normalized(text) == tokenizer.normalized(text)


def test_a_corpus_that_the_tokenizer_normalizes_is_a_warning(bpe, tmp_path, caplog):
    tokenizer = written(like_qwen(bpe, tmp_path), tmp_path / "tokenizer.json")
    rows = [{"name": "a", "text": "e\u0301"}, {"name": "b", "text": "\u00e9"}]
    assert InMemoryDocuments(rows[1:], tokenizer) and not caplog.messages
    InMemoryDocuments(rows, tokenizer)
    assert len(caplog.messages) == 1 and "1 of 2 documents" in caplog.messages[0]
    for split, texts in {
        "train": ["cafe\u0301", "caf\u00e9"],
        "validation": ["caf\u00e9"],
        "test": ["cafe\u0301"],
    }.items():
        (tmp_path / "books" / split).mkdir(parents=True)
        for number, text in enumerate(texts):
            (tmp_path / "books" / split / f"{number}.txt").write_text(text)
    caplog.clear()
    prepare(Files("text"), str(tmp_path / "books"), tokenizer, 0, tmp_path / "cache", "error")
    warned = [message for message in caplog.messages if "normalizes" in message]
    assert [line.partition(":")[0] for line in warned] == ["train", "test"]
    assert "1 of 2 documents" in warned[0] and "1 of 1 documents" in warned[1]


def test_a_text_that_a_tokenizer_of_others_cannot_cut_is_a_warning(bpe, books, tmp_path, monkeypatch, caplog):
    def with_unbounded_pieces(settings: dict) -> None:
        pattern = settings["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        pattern["Regex"] = pattern["Regex"].replace("{1,256}", "+")

    monkeypatch.setattr("data.preparation.encoding.SECTION", 1000)
    (books / "train" / "00.txt").write_text("ACGT" * 501)
    prepare(Files("text"), str(books), bpe, 0, tmp_path / "cache", "error")
    assert "without a place to cut" not in caplog.text
    tokenizer = Saved(changed(bpe, tmp_path, with_unbounded_pieces))
    corpus = prepare(Files("text"), str(books), tokenizer, 0, tmp_path / "cache", "error")
    (warning,) = [message for message in caplog.messages if "without a place to cut" in message]
    assert "00.txt has 2,004 characters" in warning and str(tmp_path) in warning
    assert corpus.splits["train"].text(0) == "ACGT" * 501
