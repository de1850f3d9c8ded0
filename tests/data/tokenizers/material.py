"""Texts, and tokenizer.json files of others: of pretrained models, and with settings that lose text."""

import json
from pathlib import Path

from hypothesis import strategies as st

from data.tokenizers import BPE, Tokenizer, load

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
