"""Evaluation of trained models on whole documents: held-out loss, and recall of distant facts.

    documents.py        the interface of documents
    protocol.py         how a document is cut for scoring
    scoring.py          the loss of each token, document by document
    loss_store.py       losses on disk, so that a killed evaluation continues
    scorer.py           scoring with the settings of one command: batch size, precision, progress
    perplexity.py       from token losses to a row of evaluation.json
    context.py          the loss of the same tokens with shorter and longer context
    key_tokens.py       the tokens whose loss long context lowers, and the loss on them alone
    comparison.py       the paired difference of two runs on the same documents
    recall.py           whether a model answers a batch of questions
    recall_suite.py     cases of the recall suite, and their summary
    replacement.py      another pattern in some layers or KV heads of a dense model, under the same weights
    layer_probe.py      the loss when one layer or KV head of a dense model attends by another pattern
    distance_mass.py    the share of dense attention at each distance
    layer_schedules.py  schedules that keep the most important layers dense, their losses and their costs
    statistics.py       confidence intervals over documents
    evaluation_file.py  the rows of evaluation.json

configs/evaluation.py, configs/recall.py and configs/probing.py build these from a config, with the data.
"""

from model.evaluation.comparison import Difference, compare
from model.evaluation.context import ContextLoss, losses_by_context
from model.evaluation.documents import Documents
from model.evaluation.evaluation_file import add_row
from model.evaluation.key_tokens import KeyTokens, find_key_tokens, short_protocol, summarize_key_tokens
from model.evaluation.loss_store import LossStore
from model.evaluation.perplexity import Evaluation, summarize
from model.evaluation.protocol import Protocol
from model.evaluation.recall import Answer, answer, effective_length
from model.evaluation.scorer import Scorer
from model.evaluation.scoring import token_losses

__all__ = [
    "Answer",
    "ContextLoss",
    "Difference",
    "Documents",
    "Evaluation",
    "KeyTokens",
    "LossStore",
    "Protocol",
    "Scorer",
    "add_row",
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
