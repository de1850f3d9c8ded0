"""The settings that determine the order of a run's training samples, with which alone a checkpoint can resume."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CorpusError
from .permutation import EXPLICIT


@dataclass(frozen=True)
class SampleOrder:
    """The order of a run's training samples. Settings without a description are those of DataModule.

    content: the sha256 of the training tokens.
    lengths: (first optimizer step, sequence length) of each phase, if sequences grow.
    weights, tokens_at_a_time: of a mixture.
    streams: their number, if documents are streamed.
    samples: of a pass, the most in any phase; None if documents are streamed.
    generating: the settings of the sources that generate sequences, by name.
    """

    content: str
    packing: str
    sequence_length: int
    seed: int
    document_mask: bool
    length_weights: Mapping[int, int]
    lengths: Sequence[tuple[int, int]]
    weights: Mapping[str, int] | None
    tokens_at_a_time: int | None
    streams: int | None
    samples: int | None
    generating: Mapping[str, Mapping[str, Any]]

    @property
    def large(self) -> bool:
        """Whether the permutation of a pass is computed lazily. Earlier versions had another one of so many samples."""
        return self.samples is not None and self.samples > EXPLICIT

    @property
    def number(self) -> int:
        """A hash of all settings. What earlier versions did not have is left out of it while it has its default."""
        settings = f"{self.content} {self.packing} {self.sequence_length} {self.seed}"
        if not self.document_mask:
            settings += " document_mask=false"
        if self.length_weights:
            settings += f" length_weights={sorted(self.length_weights.items())}"
        if self.lengths:
            settings += f" {list(self.lengths)}"
        if self.weights is not None:
            settings += f" {dict(self.weights)}"
            if self.tokens_at_a_time:
                settings += f" {self.tokens_at_a_time}"
        if self.streams is not None:
            settings += f" streams={self.streams}"
        if self.large:
            settings += " lazy"
        if self.generating:  # "" names a source that is in no mixture
            settings += f" {json.dumps(self.generating.get('', self.generating))}"
        return int(hashlib.sha256(settings.encode()).hexdigest()[:15], 16)

    def refusal(self, consumed: int) -> CorpusError:
        """Returns the error of a checkpoint that counted `consumed` samples in another order."""
        more = "" if self.weights is None else ", data.source.tokens_at_a_time, the weights of data.source.sources"
        more += ", the tasks of data.source" if self.generating else ""
        more += "" if self.streams is None else ", data.source.streams"
        large = f"; earlier versions read passes of more than {EXPLICIT:,} samples in another order"
        return CorpusError(
            f"data.packing={self.packing}, data.document_mask={str(self.document_mask).lower()},"
            f" data.length_weights={self.length_weights or 'null'}, data.sequence_length={self.sequence_length},"
            f" data.seed={self.seed}{more}: must be those of the checkpoint, as must the corpus and the tokenizer,"
            f" because the checkpoint counts the samples that it consumed ({consumed}) in their order; or start from"
            f" its weights with init_from{large if self.large and not self.generating else ''}"
        )
