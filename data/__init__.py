"""Data: sources of documents -> tokens -> packed sequences with document ids.

    sources/        documents of the standard library, of code, of files, of the Hugging Face hub
    tokenizers/     text to integers and back, exactly
    corpus/         tokenized documents on disk
    preparation/    from documents to a corpus, once
    sequences/      the documents of a corpus, packed to sequences of one length
    ordering/       the order in which training reads them, which resumes at any sample
    streaming/      training on documents that are read in their files, instead of a corpus
    module.py       all of this as a LightningDataModule
    unchanged.py    whether a resumed run finds the documents that it was trained on
    recall/         sequences with questions about facts from far back
    in_memory.py    documents in memory, for an existing tokenizer
    excerpts.py     a part of many documents, on which models are evaluated
    baselines.py    gzip and a bigram model on the same documents
    collation.py    the tensors of a sequence and of a batch
    units.py        the units of losses: bits per byte, bits per base, nats per value
    digests.py      sha256 of files, remembered; worker.py: what a process that loads batches sets first

This package imports nothing of attention or models. A batch is a dict of tensors (collation.py).
"""

from importlib import import_module

from .errors import CorpusError

# Imported on first use, so that a command that needs only a name or an error does not wait for torch and datasets.
_WHERE = {
    "BPE": "tokenizers",
    "Bytes": "tokenizers",
    "Code": "sources",
    "Corpus": "corpus",
    "DataModule": "module",
    "Files": "sources",
    "Hub": "sources",
    "InMemoryDocuments": "in_memory",
    "StandardLibrary": "sources",
    "prepare": "preparation",
}
__all__ = ["CorpusError", *sorted(_WHERE)]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
