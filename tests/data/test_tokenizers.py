"""Lossless on any text, exact in bytes, the same from chunks as from the whole, the same in every process."""

import hashlib
import json
import pickle
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import CorpusError, InMemoryDocuments
from data.preparation import prepare
from data.sources import Files
from data.tokenizers import BPE, Bins, Bytes, Saved, Tokenizer, hugging_face_files, load

LIBRARY = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def code() -> str:
    return "".join((LIBRARY / name).read_text() for name in ("argparse.py", "ast.py", "decimal.py", "heapq.py"))


@pytest.fixture(scope="module")
def bpe(code) -> BPE:
    tokenizer = BPE(vocabulary=600)
    tokenizer.fit([code])
    return tokenizer


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
    environment = {"PYTHONHASHSEED": "3", "RAYON_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
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


# Tokenizers of pretrained models


def written(settings: dict, file: Path) -> Tokenizer:
    file.write_text(json.dumps(settings))
    return load(file)


def like_qwen(bpe: BPE, folder: Path) -> dict:
    """A byte-level tokenizer.json that normalizes to NFC."""
    bpe.save(folder / "bytes.json")
    return json.loads((folder / "bytes.json").read_text()) | {"normalizer": {"type": "NFC"}}


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LLAMA = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES]}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def like_llama(code: str) -> dict:
    """The tokenizer.json of a BPE on characters with a token for every byte, which puts a space before the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = [*map(chr, range(33, 127)), "▁"]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, limit_alphabet=96, show_progress=False
    )
    tokenizer.train_from_iterator([code], trainer)
    settings = json.loads(tokenizer.to_str())
    vocabulary = settings["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    return settings | {"normalizer": LLAMA, "pre_tokenizer": None}


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


def test_a_tokenizer_without_a_form_in_the_library_is_not_exported():
    class Own(Bins):
        pass

    own = rf"data\.tokenizer\._target_={Own.__module__}\.\S+\.Own"
    for tokenizer, origin in ((Bins(9, 4.0), "data/tokenizer=bins"), (Own(9, 4.0), own)):
        with pytest.raises(CorpusError, match=rf"^{origin}: must be bytes, bpe or saved, "):
            hugging_face_files(tokenizer, 1000)


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


def without_spaces(settings: dict) -> None:
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, settings["pre_tokenizer"]]}


def with_a_token_that_strips(settings: dict) -> None:
    number = max(settings["model"]["vocab"].values()) + 1
    token = {"id": number, "content": "stone", "single_word": False, "lstrip": True, "rstrip": True}
    settings["added_tokens"].append({**token, "normalized": False, "special": False})


def without_a_byte(settings: dict) -> None:
    del settings["model"]["vocab"]["Ā"]  # the byte 0


def with_dropout(settings: dict) -> None:
    settings["model"]["dropout"] = 0.1


def with_bos_as_text(settings: dict) -> None:
    settings["added_tokens"][0]["special"] = False


def changed(bpe: BPE, folder: Path, change) -> str:
    """Writes the tokenizer.json of `bpe` with a change, and returns its path."""
    bpe.save(folder / "tokenizer.json")
    settings = json.loads((folder / "tokenizer.json").read_text())
    change(settings)
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    return str(folder / "tokenizer.json")


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


# Tokenizers that lose text, where data.tokenizer.lossy=allow


def words(folder: Path) -> str:
    """Writes a tokenizer.json of whole lower-case words, and returns its path."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "text": 2, "stone": 3, "é": 4}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "words.json"))
    return str(folder / "words.json")


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
