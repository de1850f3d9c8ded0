"""Held-out loss of whole documents, under protocols that say exactly what was scored.

    protocol.py    how a document is cut for scoring
    scoring.py     each token's loss, document by document, stoppable at any moment
    perplexity.py  from token losses to the row of evaluation.json
    context.py     the loss of the same tokens under shorter and longer context
    key_tokens.py  the tokens that long context helps, and the loss on them alone
    comparison.py  runs on the same documents, paired
    recall.py      whether questions are answered, and the longest length at which they are
    statistics.py  confidence intervals over documents

Everything but scoring.py, context.py and recall.py is arithmetic on token losses.
"""

from model.evaluation.comparison import Difference, compare
from model.evaluation.context import ContextLoss, losses_by_context
from model.evaluation.key_tokens import KeyTokens, find_key_tokens, short_protocol, summarize_key_tokens
from model.evaluation.perplexity import Evaluation, summarize
from model.evaluation.protocol import Protocol
from model.evaluation.recall import Answer, answer, effective_length
from model.evaluation.scoring import Documents, LossStore, token_losses

__all__ = [
    "Answer",
    "ContextLoss",
    "Difference",
    "Documents",
    "Evaluation",
    "KeyTokens",
    "LossStore",
    "Protocol",
    "answer",
    "compare",
    "effective_length",
    "find_key_tokens",
    "losses_by_context",
    "short_protocol",
    "summarize",
    "summarize_key_tokens",
    "token_losses",
]
