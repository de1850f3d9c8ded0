"""Recall tasks: sequences whose scored tokens can be known only from one place far back.

    synthetic.py   tasks in token ids alone: to train small models on, and to probe what a pattern can carry
    text.py        tasks in text, under a tokenizer: for models that were trained on text

A batch is what a DataModule's is (data/packing.py): {"tokens": int64, "targets": int64, "document": int32,
"position": int32}, each `[batch, length]`; only answers are targets, everything else is -100.
"""

from .synthetic import Samples, alphabet, associative_recall, copy, needle

__all__ = ["Samples", "alphabet", "associative_recall", "copy", "needle"]
