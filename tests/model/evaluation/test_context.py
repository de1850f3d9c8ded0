"""The loss of the same tokens under shorter and longer context, against passes written out by hand."""

import numpy as np
import pytest
import torch

from kernels.patterns import Dense, Window
from model.evaluation import LossStore, losses_by_context
from model.evaluation.context import default_contexts
from tests.model.evaluation.documents import Documents, build


@torch.no_grad()
def last_tokens_loss(network, tokens: np.ndarray, context: int, targets: int) -> np.ndarray:
    """Nats of the last `targets` tokens, `context` tokens before the first of them being all that the model reads."""
    piece = torch.from_numpy(tokens[len(tokens) - targets - context :].astype(np.int64))[None]
    length = piece.shape[1] - 1
    hidden = network(piece[:, :-1], torch.arange(length)[None], network.build_layouts(None, length))
    nats = -network.logits(hidden)[0].log_softmax(-1).gather(1, piece[0, 1:, None])[:, 0]
    return nats[-targets:].numpy()


def test_equals_passes_over_what_may_be_read():
    network, documents = build(Dense()), Documents(60, 33, 41, 40)
    rows = losses_by_context(network, documents, [8, 16, 32, "whole"], 9, tokens_at_once=100)
    assert [row.context for row in rows] == [8, 16, 32, "whole"]
    for row in rows:
        assert (row.documents, row.tokens) == (2, 18)  # 41 = 32 + 9 tokens reach it, 40 do not
        nats = [
            last_tokens_loss(network, tokens, len(tokens) - 9 if row.context == "whole" else row.context, 9)
            for tokens in (documents.tokens(0), documents.tokens(2))
        ]
        assert row.loss == pytest.approx(np.concatenate(nats).mean(), abs=1e-9)
        half = 12.706 * abs(nats[0].mean() - nats[1].mean()) / 2  # Student's t with one degree of freedom
        assert (row.low, row.high) == pytest.approx((row.loss - half, row.loss + half), 1e-3)
    assert len({round(row.loss, 6) for row in rows}) == 4


def test_context_beyond_what_the_pattern_reaches_changes_nothing():
    """Two layers of windows of 4 reach 7 tokens back: with context for the first target's reach, all is there."""
    network, documents = build(Window(4)), Documents(80)
    reached, more, less = losses_by_context(network, documents, [7, 30, 3], 9, tokens_at_once=100)
    assert reached.loss == pytest.approx(more.loss, abs=1e-7)  # other positions, whose rotations are float32
    assert abs(less.loss - reached.loss) > 1e-5


def test_no_document_is_long_enough():
    assert losses_by_context(build(), Documents(20), [16], 9, tokens_at_once=100) == []


def test_a_context_beyond_the_model_is_refused():
    with pytest.raises(
        ValueError, match=r"by_context\.contexts=\[40\] needs sequences of 48 tokens: the model takes 30"
    ):
        losses_by_context(build(max_length=30), Documents(60), [40], 9, tokens_at_once=100)


def test_finished_documents_are_kept_by_context(tmp_path, monkeypatch):
    network, documents, store = build(), Documents(60, 50), LossStore(tmp_path)
    first = losses_by_context(network, documents, [8, 16], 9, tokens_at_once=1, store=store)
    monkeypatch.setattr(network, "loss", lambda *_: pytest.fail("scored again"))
    told = []
    again = losses_by_context(network, documents, [8, 16], 9, tokens_at_once=1, store=store, progress=told.append)
    assert again == first and sum(told) == 2 * 2 * 9


def test_the_change_with_more_context_is_paired_by_document():
    network, documents = build(Dense()), Documents(60, 50)
    short, longer = losses_by_context(network, documents, [8, 32], 9, tokens_at_once=100)
    assert short.change is None
    assert longer.change == pytest.approx(longer.loss - short.loss)
    changes = [
        (last_tokens_loss(network, tokens, 32, 9) - last_tokens_loss(network, tokens, 8, 9)).mean()
        for tokens in (documents.tokens(0), documents.tokens(1))
    ]
    half = 12.706 * abs(changes[0] - changes[1]) / 2  # Student's t with one degree of freedom
    assert (longer.change_low, longer.change_high) == pytest.approx((longer.change - half, longer.change + half), 1e-3)


def test_what_context_saves_is_paired_with_the_first_context():
    network, documents = build(Dense()), Documents(60, 50)
    short, longer, longest = losses_by_context(network, documents, [8, 16, 32], 9, tokens_at_once=100)
    assert short.gain is None
    assert longest.gain == pytest.approx(short.loss - longest.loss) and longer.gain == pytest.approx(-longer.change)
    assert (longer.gain_low, longer.gain_high) == pytest.approx((-longer.change_high, -longer.change_low))


def test_several_places_of_a_document_are_scored():
    """Of 60 tokens with 9 targets, the first place may begin at 16; 41 tokens have room for two."""
    network, documents = build(Dense()), Documents(60, 41)
    (row,) = losses_by_context(network, documents, [16], 9, places=4, tokens_at_once=100)
    long, short = documents.tokens(0), documents.tokens(1)
    ends = [(long, end) for end in (25, 36, 48, 60)] + [(short, end) for end in (25, 41)]
    nats = [last_tokens_loss(network, tokens[:end], 16, 9) for tokens, end in ends]
    assert (row.documents, row.tokens) == (2, 6 * 9)
    assert row.loss == pytest.approx(np.concatenate(nats).mean(), abs=1e-9)
    (control,) = losses_by_context(network, documents, [8], 9, places=4, least=25, tokens_at_once=100)
    nats = [last_tokens_loss(network, tokens[:end], 8, 9) for tokens, end in ends]
    assert control.loss == pytest.approx(np.concatenate(nats).mean(), abs=1e-9)  # the same tokens


def test_a_short_model_is_scored_on_the_documents_of_a_longer_one():
    network, documents = build(Dense()), Documents(60, 33, 41)
    (row,) = losses_by_context(network, documents, [8], 9, tokens_at_once=100, least=41)
    (among,) = losses_by_context(network, documents, [8], 9, tokens_at_once=100)
    assert (row.documents, among.documents) == (2, 3)
    assert row.loss == losses_by_context(network, documents, [8, 32], 9, tokens_at_once=100)[0].loss


@pytest.mark.parametrize(
    ("length", "contexts"), [(700, []), (768, [512]), (4096, [512, 1024, 2048, 3840]), (1280, [512, 1024])]
)
def test_contexts_double_up_to_the_length_of_training(length, contexts):
    assert default_contexts(length, 256) == contexts
