"""What an evaluation says of one model on some documents: the row of evaluation.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs.build import ConfigError, build_protocol
from configs.runs import open_run
from data import Texts
from data.baselines import bigram_bits_per_byte, gzip_bits_per_byte
from data.corpus import Corpus, Split
from data.texts import digest
from data.tokenizers import Tokenizer
from model import Transformer
from model.evaluation import find_key_tokens, short_protocol, summarize, summarize_key_tokens
from scripts.scoring import Scoring


def measure(
    model: Transformer,
    documents: Split | Texts,
    tokenizer: Tokenizer,
    sequence_length: int,
    corpus: Corpus | None,
    settings: Mapping[str, Any],
    scoring: Scoring,
    checkpoint: Path | None,
    label: str,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """(row, each document's token losses): `model` on `documents`, under the `evaluation` group's `settings`, with the
    baselines beside it.

    tokenizer: the model's. sequence_length: of its training, the default of a window. corpus: the bigram model counts
    its training split; None leaves that baseline out. checkpoint: where the weights are from, None if they are nowhere
    yet.
    """
    protocol = build_protocol(settings["protocol"], sequence_length)
    losses = scoring.token_losses(model, documents, protocol, checkpoint, label)
    row = summarize(losses, documents, protocol, long_document=settings["long_document"]).to_dict()
    row["documents_digest"] = digest(documents)
    row["tokenizer"] = tokenizer.identity()
    if settings["by_context"]["contexts"]:
        row["by_context"] = [vars(found) for found in scoring.by_context(
            model, documents, settings["by_context"], checkpoint, label
        )]  # fmt: skip
    if settings["key_tokens"]["evaluator"]:
        row["key_tokens"] = _key_tokens(losses, documents, tokenizer, sequence_length, model, settings, scoring)
    if settings["baselines"]:
        row["baselines"] = {
            "gzip_bits_per_byte": gzip_bits_per_byte(documents),
            "bigram_bits_per_byte": bigram_bits_per_byte(corpus, documents) if corpus else None,
        }
    return row, losses


def _key_tokens(
    losses: list[np.ndarray],
    documents: Split | Texts,
    tokenizer: Tokenizer,
    sequence_length: int,
    model: Transformer,
    settings: Mapping[str, Any],
    scoring: Scoring,
) -> dict[str, Any]:
    """LongPPL of the model with these `losses`, on the key tokens that the config's evaluator finds."""
    asked = settings["key_tokens"]
    evaluator = open_run(asked["evaluator"], model.embed_tokens.weight.device.type, scoring.precision)
    if evaluator.tokenizer.identity() != tokenizer.identity():
        raise ConfigError(
            f"evaluation.key_tokens.evaluator={asked['evaluator']}: has another tokenizer than the evaluated run; "
            "accepted is a run with the same one"
        )
    protocols = build_protocol(settings["protocol"], sequence_length), short_protocol(asked["short_context"])
    long, short = (
        scoring.token_losses(evaluator.model, documents, protocol, evaluator.checkpoint, f"evaluator {evaluator.label}")
        for protocol in protocols
    )
    chosen = find_key_tokens(long, short, gain=asked["gain"], confidence=asked["confidence"])
    return dict(asked) | vars(summarize_key_tokens(losses, chosen))
