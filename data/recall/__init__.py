"""Recall tasks: sequences in which the model must repeat facts from far back.

    text.py       the tasks
    retrieval.py  a task of many documents, of which one is asked for
    haystack.py   real text with inserted facts and questions

A batch has the tensors of a DataModule's batch (data/collation.py). Only the tokens of answers are targets; all other
targets are -100.
"""
