"""LongPPL: which tokens are key tokens, and the loss on them."""

import math

import numpy as np
import pytest

from kernels.patterns import Dense
from model.evaluation import Protocol, find_key_tokens, short_protocol, summarize_key_tokens, token_losses
from tests.model.evaluation.documents import Documents, build


def test_a_key_token_gains_enough_and_becomes_probable_enough():
    long = [np.array([0.5, 0.5, 3.0, 1.99, 2.0, 0.1])]
    short = [np.array([2.6, 2.5, 9.0, 4.00, 9.0, 0.0])]
    (chosen,) = find_key_tokens(long, short, gain=2.0, confidence=-2.0)
    # gains 2.1, 2.0 (not more), 6 (but improbable), 2.01, 7 (at the bar, not above), none
    assert chosen.tolist() == [True, False, False, True, False, False]


def test_the_loss_is_that_of_the_evaluated_model_on_those_tokens():
    losses = [np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0]), np.array([6.0])]
    chosen = [np.array([True, False, True]), np.array([False, False]), np.array([True])]
    found = summarize_key_tokens(losses, chosen)
    assert (found.tokens, found.documents, found.loss) == (3, 2, pytest.approx(10 / 3))
    assert found.perplexity == pytest.approx(math.exp(10 / 3)) and found.low < found.loss < found.high


def test_without_a_key_token_there_is_no_loss():
    found = summarize_key_tokens([np.array([1.0])], [np.array([False])])
    assert (found.tokens, found.loss, found.perplexity) == (0, None, None)


def test_tokens_within_the_short_context_never_count():
    """Both protocols read the same there, so there is nothing to gain, however low the bar."""
    network, documents = build(Dense()), Documents(80, 20)
    long = token_losses(network, documents, Protocol("whole", None, None), tokens_at_once=1)
    short = token_losses(network, documents, short_protocol(24), tokens_at_once=1)
    chosen = find_key_tokens(long, short, gain=1e-6, confidence=-100.0)
    assert not chosen[0][:24].any() and not chosen[1].any() and chosen[0][24:].any()
    assert short_protocol(24).min_context == 18
