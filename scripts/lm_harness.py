"""Runs tasks of EleutherAI's lm-evaluation-harness (RULER, LongBench, ...) on a trained run.

    pip install 'farsight[lm-eval]'
    python -m scripts.lm_harness run --model farsight --model_args checkpoint=RUN_DIR --tasks TASK --output_path out/
    python -m scripts.lm_harness run --model farsight --model_args checkpoint=RUN_DIR,precision=bf16-mixed --tasks TASK

The arguments after `python -m scripts.lm_harness` are those of the harness (`lm-eval --help`). The keys of model_args:

    checkpoint, precision, accelerator    as in scripts/evaluate.py
    tokens_at_once    tokens that are read at once
    truncate          True cuts the beginning of a request that is too long for the model; otherwise it is an error
    trust             classes outside this repository that the run names, joined by +: trust=my_package.MyPattern
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import this repository's packages, not files of this folder or installed namesakes
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import ConfigError
from data.tokenizers import Tokenizer
from model import Sampling, Transformer, generate
from model.decoding.streaming import TextStream
from model.evaluation import Answer, answer
from model.evaluation.protocol import Segment
from model.evaluation.scoring import score_segments
from model.loss import IGNORE

log = logging.getLogger("farsight")

GENERATION = {"until": [], "max_gen_toks": 256, "do_sample": False, "temperature": 0.0, "top_k": None, "top_p": 1.0}
"""The settings of generation that a task may have, with the harness's defaults."""


class Requests:
    """Answers the harness's three kinds of requests with a model and its tokenizer.

    tokens_at_once: the most tokens of a batch of requests; a longer text is read in chunks.
    truncate: whether to cut the beginning of a request that is longer than the model's maximum. Otherwise the request
        raises ValueError.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, tokens_at_once: int, truncate: bool) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.tokens_at_once, self.truncate = tokens_at_once, truncate

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Returns, for each pair (context, continuation), the continuation's log-probability in nats and whether greedy
        decoding gives it."""
        encoded = [self._fit(*encode_pair(self.tokenizer.encode, *pair), self.tokenizer.bos) for pair in pairs]
        found: list[Answer] = [Answer(True, 0.0, 0)] * len(pairs)  # of an empty continuation
        asked = [index for index, (_, continuation) in enumerate(encoded) if continuation]
        for batch in _batches(asked, [len(context) + len(rest) for context, rest in encoded], self.tokens_at_once):
            rows = _padded([encoded[index] for index in batch])
            for index, each in zip(batch, answer(self.model, rows, self.tokenizer.vocabulary), strict=True):
                found[index] = each
        return [(-each.nll, each.exact) for each in found]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Returns the log-probability of each text in nats. A text longer than the model's maximum is scored in the
        segments of `rolling_segments`."""
        documents = [np.array([self.tokenizer.bos, *self.tokenizer.encode(text)]) for text in texts]
        work = [
            (index, segment)
            for index, document in enumerate(documents)
            for segment in rolling_segments(len(document), self.model.config.max_length)
        ]
        found = [0.0] * len(texts)
        scored = score_segments(self.model, _Documents(documents), work, self.tokens_at_once, lambda tokens: None)
        for index, _, nats in scored:
            found[index] -= float(nats.sum())
        return found

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Returns the generated continuation of each text, up to the first of its strings `until`."""
        return [self._generate(text, settings) for text, settings in requests]

    def _generate(self, text: str, asked: Mapping[str, Any]) -> str:
        unknown = [key for key in asked if key not in GENERATION]
        if unknown:
            raise ValueError(f"{unknown[0]}={asked[unknown[0]]}: generation takes {', '.join(GENERATION)}")
        settings = GENERATION | asked
        until = [settings["until"]] if isinstance(settings["until"], str) else settings["until"]
        new = settings["max_gen_toks"]
        prompt, _ = self._fit(list(map(int, self.tokenizer.encode(text))), [], self.tokenizer.bos, room=new)
        stream = TextStream(self.tokenizer.decode, [stop for stop in until if stop])

        def on_token(_: int, token: int) -> bool:
            if token == self.tokenizer.bos:  # the next document begins
                return True
            stream.add(token)
            return stream.ended

        temperature = settings["temperature"] if settings["do_sample"] else 0.0
        sampling = Sampling(temperature=temperature, top_k=settings["top_k"], top_p=settings["top_p"], seed=0)
        arguments = dict(new_tokens=new, sampling=sampling, prefill_chunk=self.tokens_at_once, on_token=on_token)
        generate(self.model, [prompt], **arguments, vocabulary=self.tokenizer.vocabulary)
        stream.flush()
        return stream.text

    def _fit(self, context: list[int], rest: list[int], bos: int, room: int = 1) -> tuple[list[int], list[int]]:
        """Returns ([bos] + context, rest), with the beginning of the context cut so that it fits the model together
        with `rest` and with `room` new tokens. The last token is only predicted, and takes no room."""
        context, limit = [bos, *context], self.model.config.max_length
        excess = len(context) + max(len(rest), room) - 1 - limit
        if excess <= 0:
            return context, rest
        if not self.truncate or excess >= len(context):
            raise ValueError(
                f"a request of {limit + excess} tokens: the model takes {limit} (model.max_length); truncate=True cuts "
                "its beginning"
            )
        log.warning("a request of %d tokens: its first %d are cut", limit + excess, excess)
        return context[excess:], rest


def encode_pair(encode: Callable[[str], Sequence[int]], context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Returns the tokens of the context and of the continuation, divided as the harness divides them: spaces at the end
    of the context belong to the continuation, whose tokens are those of the whole text after as many as the context
    has."""
    end = len(context) - len(context.rstrip())
    if end:
        context, continuation = context[:-end], context[-end:] + continuation
    whole, first = list(map(int, encode(context + continuation))), len(encode(context))
    return whole[:first], whole[first:]


def rolling_segments(tokens: int, window: int) -> list[Segment]:
    """Returns the windows in which the harness scores a document of `tokens` tokens, bos included. They are disjoint,
    except for the last one: it begins earlier, so that it is as long as the others, and scores only the tokens that no
    other window scores."""
    last, segments, scored = tokens - 1, [], 1
    while scored <= last:
        stop = min(scored - 1 + window, last)
        segments.append(Segment(max(0, stop - window), stop, scored))
        scored = stop + 1
    return segments


class _Documents:
    """Implements model.evaluation.Documents for tokens without text."""

    def __init__(self, documents: Sequence[np.ndarray]) -> None:
        self._documents = documents
        self.bytes = self.words = [0] * len(documents)

    def __len__(self) -> int:
        return len(self._documents)

    def tokens(self, document: int) -> np.ndarray:
        return self._documents[document]


def _batches(asked: Sequence[int], lengths: Sequence[int], tokens_at_once: int) -> list[list[int]]:
    """Returns the indices `asked` in batches of at most `tokens_at_once` tokens, or of one request. The longest come
    first, so that the requests of a batch have about equal lengths."""
    batches: list[list[int]] = []
    for index in sorted(asked, key=lambda index: -lengths[index]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens_at_once:
            batches.append([])
        batches[-1].append(index)
    return batches


def _padded(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Returns a batch for model.evaluation.answer from the token ids of contexts and their continuations. Shorter rows
    are padded at the end: attention is causal, so no token attends to the padding, and it is not scored."""
    length = max(len(context) + len(rest) for context, rest in rows) - 1
    tokens = torch.zeros(len(rows), length + 1, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORE)
    for row, (context, rest) in enumerate(rows):
        end = len(context) + len(rest)
        tokens[row, :end] = torch.tensor([*context, *rest])
        targets[row, len(context) - 1 : end - 1] = torch.tensor(rest)
    return {"tokens": tokens[:, :-1], "targets": targets, "position": torch.arange(length).expand(len(rows), -1)}


def register() -> type:
    """Registers the harness's model "farsight" and returns its class. Raises ConfigError if lm-eval is not
    installed."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import MODEL_REGISTRY, register_model
    except ImportError as error:
        raise ConfigError(f"lm-eval cannot be imported ({error}): pip install 'farsight[lm-eval]'") from None
    if "farsight" in MODEL_REGISTRY:
        return MODEL_REGISTRY["farsight"]

    @register_model("farsight")
    class Farsight(LM):
        def __init__(
            self,
            checkpoint: str,
            precision: str = "32-true",
            accelerator: str | None = None,
            tokens_at_once: int = 16384,
            truncate: bool = False,
            device: str | None = None,
            batch_size: object = None,
            max_batch_size: object = None,
            trust: str = "",
        ) -> None:
            from configs.group_checks import check_device
            from configs.runs import open_run
            from configs.trust import trust as trust_classes
            from model.precision import autocast

            super().__init__()
            # lm-evaluation-harness passes device="cuda" by default, also on a machine without a GPU.
            accelerator = accelerator or ("cpu" if device == "cpu" else "auto")
            check_device(accelerator, precision)
            trust_classes(trust.split("+") if trust else None)
            run = open_run(checkpoint, accelerator, precision)
            model = run.model
            self._requests = Requests(model, run.tokenizer, int(tokens_at_once), truncate)
            self._autocast = lambda: autocast(model, precision)
            self._device = model.embed_tokens.weight.device

        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
            return self._ask(self._requests.loglikelihood, [request.args for request in requests])

        def loglikelihood_rolling(self, requests: list) -> list[float]:
            return self._ask(self._requests.loglikelihood_rolling, [request.args[0] for request in requests])

        def generate_until(self, requests: list) -> list[str]:
            return self._ask(self._requests.generate_until, [request.args for request in requests])

        def _ask(self, kind: Callable[[Sequence], list], arguments: Sequence) -> list:
            try:
                with self._autocast():
                    return kind(arguments)
            except ValueError as error:
                raise ConfigError(str(error)) from None

    return Farsight


def main() -> None:
    from scripts.console import user_errors

    with user_errors():
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()


if __name__ == "__main__":
    from scripts.standard_output import output_may_close

    with output_may_close():
        main()
