"""Byte-pair encoding, learned from the training documents."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import CorpusError
from .byte_level import BOS, ByteLevel
from .chunks import Cutter
from .pieces import PIECES, pre_tokenizer

log = logging.getLogger(__name__)

SMALLEST_VOCABULARY = 257  # every byte, and bos
TRAINING_CHARACTERS = 200_000_000  # BPE learns from at most this many: more would change few merges and take minutes


class BPE(ByteLevel):
    """Byte-pair encoding (Sennrich et al. 2016) on bytes, as in GPT-2, trained on the training documents.

    vocabulary: the number of tokens, the 256 bytes and bos included.
    """

    origin = "data/tokenizer=bpe"
    always_lossless = True

    def __init__(self, vocabulary: int):
        if vocabulary < SMALLEST_VOCABULARY:
            least = f"at least {SMALLEST_VOCABULARY} (256 bytes and bos)"
            raise CorpusError(f"data.tokenizer.vocabulary={vocabulary}: must be {least}")
        self.wanted = vocabulary

    def identity(self) -> dict:
        return {"tokenizer": "bpe", "vocabulary": self.wanted, "pieces": PIECES, "characters": TRAINING_CHARACTERS}

    def fit(self, texts: Iterable[str]) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizer()
        trainer = trainers.BpeTrainer(
            vocab_size=self.wanted,
            special_tokens=[BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        cutter = Cutter(Tokenizer.from_str(tokenizer.to_str()))  # a copy: the one that is trained is locked
        chunks = (chunk for text in _at_most(TRAINING_CHARACTERS, texts) for chunk in cutter.chunks(text))
        tokenizer.train_from_iterator(chunks, trainer)
        self._use(tokenizer)
        if self.vocabulary < self.wanted:
            log.warning(f"data.tokenizer.vocabulary={self.wanted}: the text gives only {self.vocabulary} tokens")

    def reopen(self, file: Path) -> bool:
        from tokenizers import Tokenizer

        self._use(Tokenizer.from_file(str(file)))
        return True


def _at_most(characters: int, texts: Iterable[str]) -> Iterator[str]:
    """Yields the first texts, up to the text with which they reach `characters`."""
    seen = 0
    for text in texts:
        if seen >= characters:
            log.info(f"BPE learns from the first {seen:,} characters of the training documents")
            return
        seen += len(text)
        yield text
