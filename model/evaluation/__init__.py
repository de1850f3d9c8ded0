"""Held-out loss of whole documents, under protocols that say exactly what was scored."""

from model.evaluation.perplexity import Evaluation, evaluate
from model.evaluation.protocol import Protocol

__all__ = ["Evaluation", "Protocol", "evaluate"]
