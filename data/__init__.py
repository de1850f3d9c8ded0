"""Sources -> tokens -> packed sequences with document ids.

    sources.py      documents, from the standard library, from files, from the hub
    tokenizers.py   text <-> integers, exactly
    preparation.py  documents -> a tokenised corpus on disk, once
    corpus.py       that corpus, opened in a moment
    texts.py        documents in memory, under a tokenizer that exists already
    packing.py      documents -> sequences of one length
    stream.py       the endless order of training samples, resumable at a cursor
    module.py       all of it as a LightningDataModule
    recall/         sequences that can be answered only from far back
    baselines.py    gzip and a bigram model on the same documents: what any model must beat

Nothing here knows about attention or models: a batch is plain tensors (packing.py says which).
"""

from importlib import import_module

from .errors import CorpusError

# Loaded on first use: a command that only wants a name or an error must not wait for torch and datasets.
_WHERE = {
    "BPE": "tokenizers",
    "Bytes": "tokenizers",
    "Corpus": "corpus",
    "DataModule": "module",
    "Files": "sources",
    "Hub": "sources",
    "Texts": "texts",
    "StandardLibrary": "sources",
    "prepare": "preparation",
}
__all__ = ["CorpusError", *sorted(_WHERE)]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
