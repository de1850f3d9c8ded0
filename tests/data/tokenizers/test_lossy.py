"""Tokenizers that lose text: refused, unless data.tokenizer.lossy=allow."""

import hashlib
import json
import pickle

import pytest

from data import CorpusError, InMemoryDocuments
from data.preparation import prepare
from data.sources import Files
from data.tokenizers import Saved, hugging_face_files, load
from tests.data.tokenizers.material import (
    SPACES,
    changed,
    like_llama,
    like_qwen,
    with_a_token_that_strips,
    with_bos_as_text,
    with_dropout,
    without_a_byte,
    without_spaces,
    words,
    written,
)


def test_tokenizers_of_strangers_that_lose_text_are_refused(bpe, code, tmp_path):
    lower = like_qwen(bpe, tmp_path) | {"normalizer": {"type": "Lowercase"}}
    llama = like_llama(code)
    lacks_a_byte = llama | {"model": llama["model"] | {"vocab": dict(llama["model"]["vocab"])}}
    lacks_a_byte["model"]["vocab"].pop("<0x7F>")
    strips = llama | {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Strip", "strip_left": True, "strip_right": True}, SPACES],
        }
    }
    for name, content in {"lower": lower, "lacks": lacks_a_byte, "strips": strips}.items():
        with pytest.raises(CorpusError, match=rf"^data\.tokenizer\.path=\S+{name}\.json: must be lossless"):
            written(content, tmp_path / f"{name}.json")


@pytest.mark.parametrize("change", [without_a_byte, with_dropout, with_bos_as_text])
def test_a_tokenizer_whose_settings_lose_text_is_refused(bpe, tmp_path, change):
    with pytest.raises(CorpusError, match=rf"^data\.tokenizer\.path={tmp_path}/tokenizer\.json: must "):
        Saved(changed(bpe, tmp_path, change))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("change", [without_spaces, with_a_token_that_strips])
def test_a_tokenizer_that_loses_text_of_a_document_is_refused(bpe, books, tmp_path, monkeypatch, change, processes):
    if processes > 1:
        monkeypatch.setattr("data.preparation.encoding.PARALLEL_BYTES", 1)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    (books / "train" / "00.txt").write_text("a stone !")
    for file in set(books.rglob("*.txt")) - {books / "train" / "00.txt"}:
        file.write_text("text-" * (1 + int(file.stem)))
    kept = {without_spaces: 7, with_a_token_that_strips: 7}[change]
    message = rf"^data\.tokenizer\.path=\S+: must be lossless, .*00\.txt \({kept} of 9 bytes\); .*lossy"
    with pytest.raises(CorpusError, match=message):
        prepare(Files("text"), str(books), Saved(changed(bpe, tmp_path, change)), 0, tmp_path / "cache", "error")
    with pytest.raises(CorpusError, match=message):
        InMemoryDocuments.load(Files("text"), str(books), Saved(changed(bpe, tmp_path, change)), "error", "test")


def test_a_cached_corpus_that_was_not_checked_is_prepared_again(bpe, books, tmp_path, monkeypatch):
    def corpus():
        tokenizer = Saved(changed(bpe, tmp_path, without_spaces))
        return prepare(Files("text"), str(books), tokenizer, 0, tmp_path / "cache", "error")

    with monkeypatch.context() as unchecked:
        unchecked.setattr(Saved, "always_lossless", True)
        cached = corpus()
    metadata = json.loads((cached.folder / "metadata.json").read_text())
    assert metadata["made_from"]["tokenizer"].pop("round_trip") is True
    made_from = json.dumps(metadata["made_from"], sort_keys=True).encode()
    metadata["fingerprint"] = hashlib.sha256(made_from).hexdigest()[:32]
    (cached.folder / "metadata.json").write_text(json.dumps(metadata))
    cached.folder.rename(cached.folder.with_name(metadata["fingerprint"]))
    with pytest.raises(CorpusError, match=r"^data\.tokenizer\.path=\S+: must be lossless"):
        corpus()


def test_a_lossless_tokenizer_of_others_is_accepted(bpe, books, tmp_path):
    (books / "train" / "00.txt").write_text("text that spells <|bos|> \0 \u20ac")
    tokenizer = Saved(changed(bpe, tmp_path, lambda settings: None))
    corpus = prepare(Files("text"), str(books), tokenizer, 0, tmp_path / "cache", "error")
    assert corpus.tokenizer.decode(corpus.splits["train"].tokens(0)) == "text that spells <|bos|> \0 \u20ac"


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_a_lossy_tokenizer_is_accepted_where_it_is_allowed(bpe, books, tmp_path, caplog, kind):
    """The bytes are those of the original text, and whatever is made of the tokenizer is marked."""
    path = words(tmp_path) if kind == "words" else changed(bpe, tmp_path, without_spaces)
    for file in books.rglob("*.txt"):
        file.write_text("Text  stone é text\n" * (1 + int(file.stem)))
    with pytest.raises(CorpusError, match=r"^data\.tokenizer\.path=\S+: must .*data\.tokenizer\.lossy=allow"):
        prepare(Files("text"), str(books), Saved(path), 0, tmp_path / "cache", "error")
    tokenizer = Saved(path, lossy="allow")
    corpus = prepare(Files("text"), str(books), tokenizer, 0, tmp_path / "cache", "error")
    split = corpus.splits["train"]
    assert split.bytes.tolist() == [20 * (1 + number) for number in range(12)]
    assert split.text(0) == "Text  stone é text\n"
    assert "train: the lossy tokenizer gives another text back for 12 of 12 documents" in caplog.text
    corpus.tokenizer.save(tmp_path / "again.json")
    for marked in (corpus.tokenizer, load(tmp_path / "again.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert marked.lossy and marked.identity() == tokenizer.identity() and marked.identity()["lossy"] == "allow"
        assert marked.encode("Text é").tolist() == tokenizer.encode("Text é").tolist()
    own = InMemoryDocuments.load(Files("text"), str(books), tokenizer, "error", "test")
    assert own.total_bytes == sum(file.stat().st_size for file in books.rglob("*.txt"))
    if kind == "words":
        assert corpus.tokenizer.decode(split.tokens(0)[1:]) == "text stone é text"
        exported = type(tokenizer.to_library()).from_str(hugging_face_files(tokenizer, 1000)["tokenizer.json"])
        assert exported.decode(split.tokens(0)[1:].tolist()) == "text stone é text"


@pytest.mark.parametrize("change", [with_dropout, with_bos_as_text])
def test_a_lossy_tokenizer_still_has_one_encoding_and_a_bos_of_its_own(bpe, tmp_path, change):
    with pytest.raises(CorpusError, match=rf"^data\.tokenizer\.path={tmp_path}/tokenizer\.json: must "):
        Saved(changed(bpe, tmp_path, change), lossy="allow")


def test_a_lossy_policy_that_does_not_exist(bpe, tmp_path):
    with pytest.raises(CorpusError, match=r"^data\.tokenizer\.lossy=maybe: must be refuse or allow"):
        Saved(changed(bpe, tmp_path, lambda settings: None), lossy="maybe")


def test_a_lossless_tokenizer_is_not_marked(bpe, tmp_path):
    tokenizer = Saved(changed(bpe, tmp_path, lambda settings: None))
    assert not tokenizer.lossy and "lossy" not in tokenizer.identity()
