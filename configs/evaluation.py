"""The evaluation that a composed `evaluation` group describes: a model's row of evaluation.json, with its baselines."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from configs.build import ConfigError, build_plan, build_protocol
from configs.runs import Run, open_corpus, open_run
from data import DataModule, InMemoryDocuments
from data.baselines import (
    MARKOV_ORDER,
    MARKOV_SYMBOLS,
    bigram_bits_per_byte,
    gzip_bits_per_byte,
    markov_bits_per_byte,
    symbols_of,
)
from data.corpus import Corpus, Split
from data.excerpts import default_limit, excerpts, sizes_of
from data.in_memory import count_copies, digest
from data.tokenizers import Tokenizer
from data.units import BITS, Units, quality_in, units_by_source
from model import Transformer
from model.evaluation import Scorer, add_row, find_key_tokens, short_protocol, summarize, summarize_key_tokens
from model.evaluation.context import default_contexts
from model.evaluation.perplexity import summarize_sources
from model.evaluation.replacement import with_plan
from model.evaluation.scorer import ProgressBar
from model.precision import device_of

log = logging.getLogger(__name__)


def under_attention(run: Run, attention: Mapping[str, Any]) -> Transformer:
    """Returns the model of `run`, with the same weights, under another composed `attention` group.

    Raises:
        ConfigError: the patterns need parameters that the run lacks, or do not fit its heads.
    """
    plan = build_plan(attention)
    try:
        return with_plan(run.model, plan)
    except ValueError as error:
        raise ConfigError(f"attention={attention['name']}: {error}") from None


def measure_run(
    run: Run,
    documents: Split | InMemoryDocuments,
    settings: Mapping[str, Any],
    scorer: Scorer,
    units: Units,
    sources: Mapping[str, Units],
    model: Transformer | None = None,
    label: str | None = None,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Returns `measure` of a trained run.

    units: those of losses on the documents (`units_on`).
    sources: those of the documents (`sources_on`), which may be of another run than this one.
    model, label: the run's weights under another attention, and the name of its row; by default the run's own.
    """
    corpus = open_corpus(run) if settings["baselines"] else None
    own = isinstance(documents, InMemoryDocuments)
    if corpus and own and (copies := count_copies(documents, corpus.splits["train"])):
        log.warning("%d of %d documents are in the training split of %s", copies, len(documents), run.label)
    return measure(
        model or run.model,
        documents,
        settings,
        scorer,
        tokenizer=run.tokenizer,
        units=units,
        sequence_length=run.sequence_length,
        corpus=corpus,
        checkpoint=run.checkpoint,
        label=label or run.label,
        sources=sources,
    )


def measure(
    model: Transformer,
    documents: Split | InMemoryDocuments,
    settings: Mapping[str, Any],
    scorer: Scorer,
    *,
    tokenizer: Tokenizer,
    units: Units,
    sequence_length: int,
    corpus: Corpus | None,
    checkpoint: Path | None,
    label: str,
    sources: Mapping[str, Units],
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Evaluates a model. Returns its row of evaluation.json, and the token losses of each document.

    Args:
        settings: the `evaluation` group of the config.
        tokenizer: the model's.
        units: of losses on these documents; the row keeps them.
        sequence_length: of the model's training, the default window of the protocol.
        corpus: the bigram and Markov baselines are counted on its training split; None leaves them out.
        checkpoint: the file of the weights, or None if there is none yet.
        label: name of the model in progress bars.
        sources: the units of the losses on each source of a mixture, which gets a summary; empty for other documents.
    """
    protocol = build_protocol(settings["protocol"], sequence_length)
    whole, limit = documents, limit_of(settings, sequence_length)
    if limit is not None:
        documents = excerpts(whole, limit, tokenizer, list(sources))
    evaluator = _open_evaluator(settings["key_tokens"], tokenizer, model, scorer)
    by_context, long_document, per_byte = settings["by_context"], settings["long_document"], BITS in units
    with _errors():
        losses = scorer.token_losses(model, documents, protocol, checkpoint, label)
        row = summarize(losses, documents, protocol, long_document=long_document, per_byte=per_byte).to_dict()
        row["units"] = dict(units)
        row["documents_digest"] = digest(documents)
        row["excerpt_of"] = None if documents is whole else _whole(whole, limit)
        row["tokenizer"] = tokenizer.identity()
        if sources:
            found = summarize_sources(losses, documents, documents.names, list(sources), per_byte=per_byte)
            row["by_source"] = {name: each | {"units": dict(sources[name])} for name, each in found.items()}
        if isinstance(whole, InMemoryDocuments) and any(whole.left_out.values()):
            row["documents_left_out"] = whole.left_out
        contexts, targets, places, least = map(by_context.get, ("contexts", "targets", "places", "least_tokens"))
        contexts = default_contexts(sequence_length, targets) if contexts is None else contexts
        if contexts:
            found = scorer.losses_by_context(model, documents, contexts, targets, checkpoint, label, places, least)
            row["by_context"] = [vars(each) for each in found]
        if evaluator:
            key_tokens = settings["key_tokens"]
            long, short = (
                scorer.token_losses(
                    evaluator.model, documents, each, evaluator.checkpoint, f"evaluator {evaluator.label}"
                )
                for each in (protocol, short_protocol(key_tokens["short_context"]))
            )
            chosen = find_key_tokens(long, short, gain=key_tokens["gain"], confidence=key_tokens["confidence"])
            row["key_tokens"] = dict(key_tokens) | vars(summarize_key_tokens(losses, chosen))
    if settings["baselines"] and tokenizer.has_text:
        row["baselines"] = _baselines(documents, corpus, units, row["tokens_scored"])
    return row, losses


def _baselines(
    documents: Split | InMemoryDocuments, corpus: Corpus | None, units: Units, tokens: int
) -> dict[str, float | int | None]:
    """Returns the baselines in the unit of the model's quality: {gzip, bigram, markov}_{bits_per_byte or loss}.
    `tokens`: the number of scored tokens."""
    quality = quality_in(units)
    scale = 1 if quality == BITS else math.log(2) * documents.total_bytes / tokens
    found = {
        "gzip": gzip_bits_per_byte(documents),
        "bigram": bigram_bits_per_byte(corpus, documents) if corpus else None,
    }
    order = {}
    if corpus and symbols_of(corpus) <= MARKOV_SYMBOLS:
        bits = markov_bits_per_byte(corpus, documents, MARKOV_ORDER)
        found["markov"], order = min(bits), {"markov_order": bits.index(min(bits))}
    return {f"{name}_{quality}": bits and scale * bits for name, bits in found.items()} | order


def evaluate_trained(
    model: Transformer, data: DataModule, folder: Path, config: Mapping[str, Any], progress_bar: ProgressBar
) -> dict[str, Any]:
    """Evaluates the model at the end of its training as its config describes. Adds the row to evaluation.json in the
    run's folder and returns it."""
    settings, trainer = config["evaluation"], config["trainer"]
    split = settings["split"]
    scorer = Scorer(settings["tokens_at_once"], trainer["precision"], folder, progress_bar)
    model.to(device_of(trainer["accelerator"]))
    measured, _ = measure(
        model,
        data.corpus.splits[split],
        settings,
        scorer,
        tokenizer=data.tokenizer,
        units=data.units,
        sequence_length=data.sequence_length,
        corpus=data.corpus,
        checkpoint=None,
        label=config["name"],
        sources=units_by_source(data.tokenizer, data.source),
    )
    place = {"checkpoint": "checkpoints/last.ckpt", "documents_from": split, "split": split}
    row = place | {"precision": trainer["precision"]} | measured
    add_row(folder / "evaluation.json", row)
    scorer.finish()
    return row


def limit_of(settings: Mapping[str, Any], sequence_length: int) -> int | None:
    """Returns the limit of an `evaluation` group, for a model that was trained on sequences of this length."""
    return default_limit(sequence_length) if settings["limit"] == "auto" else settings["limit"]


def _whole(documents: Split | InMemoryDocuments, limit: int) -> dict[str, int]:
    """Returns what a limit was applied to, for evaluation.json."""
    unit = "bytes" if documents.total_bytes else "tokens"
    return {"limit": limit, "documents": len(documents), unit: int(sizes_of(documents).sum())}


def shared_settings(settings: Mapping[str, Any], first: Run) -> dict[str, Any]:
    """Returns an `evaluation` group for several runs: a protocol window of null, and a limit of auto, are those of the
    first run."""
    protocol = dict(settings["protocol"])
    if protocol["window"] is None and protocol["name"] != "whole":
        protocol["window"] = first.sequence_length
        log.info(
            f"evaluation.protocol.window={protocol['window']}, the length of the training sequences of {first.label}"
        )
    return {**settings, "protocol": protocol, "limit": limit_of(settings, first.sequence_length)}


def _open_evaluator(
    key_tokens: Mapping[str, Any], tokenizer: Tokenizer, model: Transformer, scorer: Scorer
) -> Run | None:
    """The run that finds the key tokens; None where the config names none."""
    if not key_tokens["evaluator"]:
        return None
    evaluator = open_run(key_tokens["evaluator"], model.embed_tokens.weight.device.type, scorer.precision)
    if evaluator.tokenizer.identity() != tokenizer.identity():
        raise ConfigError(
            f"evaluation.key_tokens.evaluator={key_tokens['evaluator']}: must be a run with the tokenizer of "
            "the evaluated run, and has another"
        )
    return evaluator


@contextmanager
def _errors() -> Iterator[None]:
    """Turns the scoring functions' ValueErrors, which name the key within the group, into ConfigErrors."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"evaluation: {error}") from None
