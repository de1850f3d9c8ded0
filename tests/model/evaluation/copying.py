"""A model whose answer is known: one KV head of one layer copies a token from the start of the document.

A document is [bos, mark, filler ..., ask, mark, filler ..., ask, mark, ...]: `ask` is followed by the mark of its
document, which no token nearby tells. Layer COPIES attends in its KV head 0 from every `ask` to the marks before it,
and writes the mark that comes next. All other weights are small and random.
"""

import numpy as np
import torch

from model import Transformer
from tests.model.small import config, plan

LAYERS, COPIES = 4, 2
MARKS, ASK, FILLERS = range(1, 9), 9, range(10, 32)
OUTPUT = 32
"""The dimensions of the residual stream from which the head predicts a mark."""


def copying_model() -> Transformer:
    """A dense model in float64, in which layer COPIES alone needs more than a window."""
    sizes = dict(width=64, layers=LAYERS, heads=2, kv_heads=2, head_dim=8, vocabulary=32, rope_theta=1e8)
    model = Transformer(config(**sizes, tie_embeddings=False), plan()).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.02, generator=generator)
        model.embed_tokens.weight.copy_(torch.eye(32, 64))
        model.lm_head.weight.zero_()
        attention = model.layers[COPIES].self_attn
        for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
            matrix.weight[:8] = 0  # KV head 0
        attention.o_proj.weight[:, :8] = 0
        # The last two pairs of a head's dimensions turn by less than a degree in a document. Dimension 3 is that of
        # asks and marks, and 2 that of all others: a query attends to the keys of its own kind.
        for matrix, distant in ((attention.q_proj, [ASK]), (attention.k_proj, list(MARKS))):
            matrix.weight[2, :32] = 1.0
            matrix.weight[2, distant] = 0.0
            matrix.weight[3, distant] = 1.0
        attention.q_norm.weight.fill_(10.0)
        for index, mark in enumerate(MARKS):
            attention.v_proj.weight[index, mark] = 1 / 8
            attention.o_proj.weight[OUTPUT + index, index] = 1.0
            model.lm_head.weight[mark, OUTPUT + index] = 3.0
    return model.eval()


class MarkedDocuments:
    """Documents of the given lengths in tokens; the asks are `distance` tokens apart."""

    def __init__(self, *lengths: int, distance: int = 30) -> None:
        generator = np.random.default_rng(0)
        self.documents = []
        for length in lengths:
            tokens = generator.choice(FILLERS, length).astype(np.uint16)
            mark = generator.choice(MARKS)
            tokens[:2] = 0, mark
            asks = np.arange(distance, length - 1, distance)
            tokens[asks], tokens[asks + 1] = ASK, mark
            self.documents.append(tokens)
        self.bytes, self.words = list(lengths), list(lengths)

    def __len__(self) -> int:
        return len(self.documents)

    def tokens(self, document: int) -> np.ndarray:
        return self.documents[document]
