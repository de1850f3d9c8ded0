"""Files of tokens, and the corpus that opens them."""

from pathlib import Path

import numpy as np

from data import prepare
from data.corpus import Corpus
from data.sources import TokenShards
from tests.data.conftest import random_text

TEXTS = [random_text(20 + 17 * number, seed=number) + "é" for number in range(12)]


def encoded(tokenizer, texts, first: bool) -> np.ndarray:
    """The tokens of texts, with the separator before each (`first`) or after it."""
    separator = [tokenizer.bos]
    parts = [[separator, tokenizer.encode(text)] if first else [tokenizer.encode(text), separator] for text in texts]
    return np.concatenate([part for pair in parts for part in pair])


def header(tokens: int, magic: int = 20240520, version: int = 1) -> bytes:
    numbers = np.zeros(256, "<i4")
    numbers[:3] = magic, version, tokens
    return numbers.tobytes()


def llm_c(folder: Path, tokenizer) -> None:
    """Documents go on in the next file."""
    train = encoded(tokenizer, TEXTS[:9], first=True).astype("<u2")
    for number, part in enumerate(np.array_split(train, 4)):
        (folder / f"fineweb_train_{number:06}.bin").write_bytes(header(len(part)) + part.tobytes())
    held_out = encoded(tokenizer, TEXTS[9:], first=True).astype("<u4")
    (folder / "fineweb_val_000000.bin").write_bytes(header(len(held_out), 20240801, 7) + held_out.tobytes())


def source(dtype: str = "uint16") -> TokenShards:
    return TokenShards((".bin", ".npy"), dtype)


def opened(shards, tokenizer, dtype: str = "uint16", minimum_tokens: int = 0) -> Corpus:
    return prepare(source(dtype), str(shards), tokenizer, minimum_tokens, shards.parent / "cache", "error")
