"""Data: sources of documents -> tokens -> packed sequences with document ids.

    sources/           documents of the standard library, of code, of files, of the Hugging Face hub
    tokenizers/        text to integers and back, exactly
    preparation.py     the corpus of given settings: opened from the cache, or written once (corpus_writer.py)
    encoding.py        tokenizes documents in several processes, in ranges
    kept.py            what a preparation finished before it was killed
    corpus.py          a corpus on disk; split.py: the documents of one of its splits
    token_shards.py    files of tokens that others prepared, read in place (shard_index.py finds their documents)
    joined.py          the corpus of a mixture with token files
    in_memory.py       documents in memory, for an existing tokenizer
    packing.py         documents to sequences of one length
    best_fit.py        best-fit decreasing: which documents share a sequence
    collation.py       token arrays of sequences to a batch of tensors
    packed_splits.py   the sequences of a corpus, by split
    sampler.py         the endless order of training samples, which resumes at any sample
    permutation.py     permutations of any size; the elements of large ones are computed when they are read
    mixing.py          samples of several sources by weight
    sample_order.py    the settings that determine this order; unchanged.py: whether a resumed run finds its documents
    streamed.py        sequences of documents that are read in their files, from any position on (streamed_loader.py)
    generated.py       the endless sequences of a source that generates them
    module.py          all of this as a LightningDataModule
    recall/            sequences with questions about facts from far back
    baselines.py       gzip and a bigram model on the same documents

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
