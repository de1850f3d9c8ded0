"""A NaN embedding of a later token or of another document reaches no hidden state that does not see it."""

import pytest
import torch

from model import Transformer
from tests.model.attention.test_routed import native_sparse, routed
from tests.model.small import config, lively, plan
from tests.model.test_causality import DOCUMENTS, FIRST, LAST, LENGTH, PLANS, POSITIONS, both_backends, random_tokens

ROUTED = {
    "routed": routed(),
    "indexer": routed(router="indexer"),
    "native_sparse": native_sparse(),
    "native_sparse_by_gates": native_sparse(combine="gates", pooling="mean"),
}
ALL = PLANS | {name: plan(pattern) for name, pattern in ROUTED.items()}


def states_and_gradients(model: Transformer, poisoned: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `[rows, width]`, and the gradients of their sum with respect to the embeddings `[length, width]`;
    the embeddings of `poisoned` tokens (booleans `[length]`) are NaN."""
    embeddings = []

    def poison(module, inputs, output):
        embeddings.append(torch.where(poisoned[:, None], torch.nan, output).detach().requires_grad_())
        return embeddings[0]

    handle = model.embed_tokens.register_forward_hook(poison)
    hidden = model(random_tokens(0), POSITIONS, model.build_layouts(DOCUMENTS, LENGTH))[0, rows]
    handle.remove()
    hidden.sum().backward()
    return hidden.detach(), embeddings[0].grad[0]


@both_backends
@pytest.mark.parametrize("name", ALL)
def test_a_nan_reaches_only_what_sees_it(name, backend):
    chosen = plan(ALL[name].patterns, ALL[name].schedule, backend)
    model = lively(Transformer(config(layers=3), chosen).double())
    index = torch.arange(LENGTH)
    document, query = slice(FIRST, LAST + 1), 64
    hidden, grads = states_and_gradients(model, torch.zeros(LENGTH, dtype=torch.bool), document)
    others = (index < FIRST) | (index > LAST)
    without_others, of_document = states_and_gradients(model, others, document)
    torch.testing.assert_close(without_others, hidden, rtol=0, atol=1e-11)
    torch.testing.assert_close(of_document[document], grads[document], rtol=0, atol=1e-8)
    without_later, _ = states_and_gradients(model, index > query, document)
    assert without_later[query + 1 - FIRST :].isnan().all()
    torch.testing.assert_close(without_later[: query + 1 - FIRST], hidden[: query + 1 - FIRST], rtol=0, atol=1e-11)
