"""The pieces into which our tokenizers cut a text before they merge bytes: a merge never crosses two pieces."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers

# The largest number of consecutive letters, marks or spaces in one piece. Without a limit, a DNA sequence or a Chinese
# text without punctuation would be one piece of megabytes, and the time to learn merges grows with the square of the
# length of a piece. Python's standard library has no run of 256 such characters, so the limit does not change its
# tokens. The number is even because digits are cut in pairs.
LONGEST_RUN = 256

# The regular expression that cuts text. It follows GPT-4's, with three changes. The end of a line and the indentation
# of the next line form one piece, together with punctuation before them ("):\n        " can become one token), which
# saves 6 % of the tokens of Python. Digits are cut in pairs, because a small vocabulary has no room for all triples.
# A piece is bounded. The expression has no look-ahead and no look-behind, which `chunks.py` depends on: a match
# depends only on the characters from the end of the match before it on.
PIECES = (
    r"(?:[^\s\p{L}\p{N}]| )?\p{L}{1,256}"  # a word, with one space or mark before it: " self", ".append", "_name"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]{1,256}(?:\s{0,256}\n[ \t]{0,256})?"  # marks, with the end of the line and the next indentation
    r"|\s{0,256}\n[ \t]{0,256}"
    r"|\s{1,256}"
)
LONGEST_PIECE = 3 * LONGEST_RUN + 2
"""Characters of the longest match of PIECES: one space, a run of marks, a run of spaces, a newline, a run of spaces."""


def pre_tokenizer() -> "pre_tokenizers.PreTokenizer":
    """Returns the pre-tokenizer of our byte-level tokenizers, as tokenizer.json stores it."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([split(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def split() -> "pre_tokenizers.PreTokenizer":
    """Returns the step of `pre_tokenizer` that cuts, without the one that writes bytes as characters."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
