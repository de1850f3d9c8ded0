"""Documents and models for evaluation tests, and the naive loop that scoring is held against."""

import math

import numpy as np
import torch

import model.attention.masked.core as attention_module
from kernels import Axis
from kernels.patterns import Pattern, Window
from model import Transformer
from model.evaluation import Evaluation, Protocol, summarize, token_losses
from tests.kernels.oracle import brute_force_mask, dense_attention
from tests.model.small import config, lively, plan


class Documents:
    """Random documents of the given lengths, the beginning-of-document token included: 3 bytes a token, 2 tokens a
    word."""

    def __init__(self, *lengths: int) -> None:
        generator = np.random.default_rng(0)
        self.documents = [generator.integers(1, 64, n).astype(np.uint16) for n in lengths]
        for document in self.documents:
            document[:1] = 0
        self.bytes = [max(3 * (n - 1), 0) for n in lengths]
        self.words = [n // 2 for n in lengths]

    def __len__(self) -> int:
        return len(self.documents)

    def tokens(self, document: int) -> np.ndarray:
        return self.documents[document]


def build(pattern: Pattern | None = None, **changes) -> Transformer:
    return lively(Transformer(config(**changes), plan(pattern or Window(9, 2))).double())


def run(model, documents, protocol, tokens_at_once=64, **arguments) -> Evaluation:
    losses = token_losses(model, documents, protocol, tokens_at_once=tokens_at_once, **arguments)
    return summarize(losses, documents, protocol, long_document=1024)


def first_token_read(protocol: Protocol, token: int) -> int:
    """Where the window begins from which `token` is to be predicted: the definition, once more."""
    if protocol.name == "whole":
        return 0
    if protocol.name == "chunked":
        return (token - 1) // protocol.window * protocol.window
    return max(0, math.ceil((token - protocol.window) / protocol.stride)) * protocol.stride


@torch.no_grad()
def naive(model: Transformer, documents: Documents, protocol: Protocol, monkeypatch) -> list[np.ndarray]:
    """Nats of every token: each from a pass of its own over just the tokens that it may be predicted from."""
    losses = []
    with monkeypatch.context() as patch:
        oracle = lambda q, k, v, mask, **_: dense_attention(q, k, v, mask, q.shape[-1] ** -0.5)[0]  # noqa: E731
        patch.setattr(attention_module, "attention", oracle)
        for d in range(len(documents)):
            tokens, nats = torch.from_numpy(documents.tokens(d).astype(np.int64)), []
            for token in range(1, len(tokens)):
                context = tokens[first_token_read(protocol, token) : token][None]
                axis = Axis.tokens(context.shape[1])
                masks = [brute_force_mask(model.plan.pattern(layer, 2), axis) for layer in range(2)]
                hidden = model(context, torch.arange(context.shape[1])[None], masks)[0, -1]
                nats.append(-float(model.logits(hidden).log_softmax(-1)[tokens[token]]))
            losses.append(np.array(nats))
    return losses


PROTOCOLS = {
    "whole": Protocol("whole", None, None),
    "sliding": Protocol("sliding", 12, 5),
    "sliding_by_one": Protocol("sliding", 7, 1),
    "chunked": Protocol("chunked", 12, None),
}
