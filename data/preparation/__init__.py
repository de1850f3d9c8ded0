"""From documents to a corpus, once for the same documents and settings.

prepare.py         the corpus of given settings: opened from the cache, or written
corpus_writer.py   writes a corpus: documents of a source, a tokenizer that learns from them, their tokens
encoding.py        tokenizes documents in several processes, in ranges
kept.py            what a preparation finished before it was killed
shard_index.py     where the documents begin in files of tokens that others prepared
arrays.py          saves an array; cache_errors.py: what the file system refuses, in one line
"""

from .prepare import prepare

__all__ = ["prepare"]
