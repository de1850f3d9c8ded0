"""Tokenized documents on disk: of each split the tokens end to end, where each document starts, and its text.

corpus.py       a corpus in its folder, opened and checked
split.py        the documents of one of its splits
token_files.py  splits in files of tokens that others prepared, read in place
joined.py       the corpus of a mixture with token files
"""

from .corpus import Corpus
from .split import Split

__all__ = ["Corpus", "Split"]
