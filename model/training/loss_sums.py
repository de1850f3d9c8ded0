"""Metrics made of sums over targets: nats, scored tokens, and bytes of the text that they stand for.

`loss` is in nats per scored token; `bits_per_byte` = nats / ln 2 / bytes of text that the scored tokens stand for,
which makes runs with different tokenizers comparable; `perplexity` = exp(loss).

Where a mixture has sources of text and others, bits per byte count those of text alone (`text_sources`): the answers of
generated sequences are few bytes that other bytes of the same sequence give away.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from model.loss import IGNORE

FIRST_TOKENS = 512

PARTS = 3
"""Number of the groups of targets that every validation has: all tokens; positions < FIRST_TOKENS; the last quarter of
the sequence. The sources of a mixture come after them."""


def totals(per_token: Tensor, targets: Tensor, token_bytes: Tensor, mean_bytes: float) -> Tensor:
    """Returns the sums over the scored targets, float64 `[3]`: nats, tokens, and bytes of text.

    per_token: nats of each target `[batch, length]`. targets: int64 `[batch, length]`, IGNORE where not scored.
    token_bytes: int64 `[vocabulary]`; `mean_bytes` times it are the bytes that a token stands for.
    """
    scored = targets != IGNORE
    nats = per_token.double().where(scored, 0.0).sum()
    bytes_ = token_bytes[targets.where(scored, 0)].where(scored, 0).sum()
    return torch.stack([nats, scored.sum().double(), bytes_.double() * mean_bytes])


def train_units(
    sums: Sequence[float], text_sources: Collection[str] | None, lossy: bool, per_byte: bool
) -> dict[str, float]:
    """Returns the metrics `train/*` of a step's nats, tokens and bytes.

    text_sources: those of a mixture whose targets are text; None: all are. lossy: the tokenizer loses text, which marks
    the metrics. per_byte: whether bits per byte are among the metrics.
    """
    units = _units("train", sums, lossy, per_byte)
    if text_sources is not None:
        del units["train/bits_per_byte"]
    return units


class ValidationSums:
    """The sums of one validation over its batches.

    sources: the names of a mixture's sources; none otherwise.
    """

    def __init__(self, sources: Sequence[str], device: torch.device) -> None:
        self.sources = list(sources)
        # Rows: `_parts`. Columns: `totals`.
        self.sums = torch.zeros(PARTS + len(self.sources), 3, dtype=torch.float64, device=device)
        self.diagnostics: dict[str, list[Tensor]] = {}

    def add(
        self,
        batch: Mapping[str, Tensor],
        length: int,
        totals_of: Callable[[Tensor], Tensor],
        diagnostics: Mapping[str, Tensor],
    ) -> None:
        """Adds a batch.

        Args:
            batch: the tensors of this rank's tokens.
            length: that of the whole sequences.
            totals_of: maps targets to their `totals`.
            diagnostics: scalars of the routers.
        """
        for name, value in diagnostics.items():
            self.diagnostics.setdefault(name, []).append(value)
        for row, part in enumerate(_parts(batch, length, len(self.sources))):
            self.sums[row] += totals_of(batch["targets"].where(part, IGNORE))

    def metrics(
        self,
        over_ranks: Callable[[Tensor], Tensor],
        text_sources: Collection[str] | None,
        lossy: bool,
        per_byte: bool,
    ) -> dict[str, float]:
        """Returns the metrics `validation/*`: losses, and the mean of each diagnostic over batches.

        over_ranks: returns the sum of a tensor over all ranks. The other arguments are those of `train_units`.
        """
        metrics = _validation_units(over_ranks(self.sums).tolist(), self.sources, text_sources, lossy, per_byte)
        for name, values in self.diagnostics.items():
            sums = torch.stack([torch.stack(values).double().sum(), torch.tensor(len(values)).to(values[0]).double()])
            found, batches = over_ranks(sums).tolist()
            metrics[f"validation/routing_{name}"] = found / batches
        return metrics


def _parts(batch: Mapping[str, Tensor], length: int, sources: int) -> list[Tensor]:
    """Returns a bool mask `[batch, length]` for each group of targets: first the PARTS, then one for each of the
    `sources` of a mixture. `length`: that of the whole sequences."""
    position = batch["position"]
    parts = [position >= 0, position < FIRST_TOKENS, position >= 3 * length // 4]
    return parts + [batch["source"] == number for number in range(sources)]


def _validation_units(
    sums: Sequence[Sequence[float]],
    sources: Sequence[str],
    text_sources: Collection[str] | None,
    lossy: bool,
    per_byte: bool,
) -> dict[str, float]:
    """Returns the metrics `validation/*`.

    sums: nats, tokens and bytes of each of the `_parts`, over the whole validation. sources: the names of a mixture's.
    The other arguments are those of `train_units`.
    """
    whole, first, last, *by_source = sums
    metrics = _units("validation", whole, lossy, per_byte)
    for name, (nats, tokens, _) in {f"first_{FIRST_TOKENS}": first, "last_quarter": last}.items():
        if tokens:  # no document may be that long
            metrics[f"validation/loss_{name}"] = nats / tokens
    if text_sources is not None:
        metrics.pop("validation/bits_per_byte")
        of_text = [part for name, part in zip(sources, by_source, strict=True) if name in text_sources]
        if of_text:
            units = _units("validation", [sum(column) for column in zip(*of_text, strict=True)], lossy)
            metrics["validation/bits_per_byte"] = units["validation/bits_per_byte"]
    for name, part in zip(sources, by_source, strict=True):
        if part[1]:  # a short validation may not reach every source
            units = {f"{key}_{name}": value for key, value in _units("validation", part, False, per_byte).items()}
            if text_sources is not None and name not in text_sources:
                del units[f"validation/bits_per_byte_{name}"]
            metrics |= units
    return metrics


def _units(stage: str, sums: Sequence[float], lossy: bool, per_byte: bool = True) -> dict[str, float]:
    nats, tokens, bytes_ = sums
    loss = nats / tokens if tokens else math.nan
    return {
        f"{stage}/loss": loss,
        **({f"{stage}/bits_per_byte": nats / math.log(2) / bytes_ if bytes_ else math.nan} if per_byte else {}),
        f"{stage}/perplexity": math.exp(loss) if not loss > 700 else math.inf,
        **({f"{stage}/lossy_tokenizer": 1.0} if lossy else {}),
    }
