"""Long texts in chunks that encode, one by one, to the tokens of the whole.

The `tokenizers` library encodes a string in one thread and takes about 140 bytes for each of its characters: 1.4 GB for
a text of 10 MB. So a long text is encoded in chunks. They end where the tokenizer itself ends a piece ("pre-token"),
because no merge crosses the end of a piece.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .byte_characters import byte_characters
from .pieces import LONGEST_PIECE, LONGEST_RUN, pre_tokenizer, split

if TYPE_CHECKING:
    import tokenizers

CHUNK = 1 << 16  # characters that are encoded at once
CONTEXT = 128  # characters on each side of a place that decide whether the tokenizer cuts there
REACH = 4096  # characters that are searched before one of our own tokenizers is cut at the end of any piece
TRIES = 16  # places that are tried before the search goes on a chunk later

_END_OF_WORD = re.compile(r"[^\W_](?=[\W_])")
_SAMPLE = "several words, 1 number.\nAnother line"


class Cutter:
    """Cuts texts for one tokenizer.

    Candidates for a cut are the positions between a letter or digit and white space or punctuation. A candidate is
    accepted if the tokenizer ends a piece there, that is, if the characters around it give the same pieces and the same
    tokens with the cut as without it. For a tokenizer without pieces, no token of the vocabulary may contain the two
    characters next to each other.

    If a text for one of our own tokenizers (pieces.py) has no such position within REACH characters, it is cut at the
    end of a piece; pieces have at most LONGEST_PIECE characters. A text for any other tokenizer is not cut before the
    next accepted position. Its tokens are exact, but one thread encodes all of it and needs 140 bytes of memory for
    each character.
    """

    def __init__(self, library: "tokenizers.Tokenizer"):
        settings = json.loads(library.to_str())
        added = [token["content"] for token in settings["added_tokens"] if not token["special"]]
        ours = json.loads(pre_tokenizer().__getstate__())
        self.has_bounded_pieces = settings["pre_tokenizer"] == ours and not added and settings["normalizer"] is None
        self._library = library
        self._context = max(CONTEXT, 2 * max(map(len, added), default=0))
        self._split = split()
        self._cuts = library.pre_tokenizer is not None and len(self._pieces(_SAMPLE)) > 1
        keeps = settings["normalizer"] is None or settings["normalizer"]["type"] in ("NFC", "Replace")
        self._is_bpe = settings["model"]["type"] == "BPE" and keeps
        self._neighbours = _neighbours(settings["model"]["vocab"]) if self._is_bpe and not self._cuts else set()
        self._writes_bytes = '"ByteLevel"' in json.dumps(settings["pre_tokenizer"])

    def chunks(self, text: str, size: int = CHUNK) -> Iterator[str]:
        """Yields the text in chunks. A chunk has at least `size` characters, and more up to the next possible cut."""
        start = 0
        while (end := self._next(text, start, size)) < len(text):
            yield text[start:end]
            start = end
        yield text[start:]

    def _next(self, text: str, start: int, size: int) -> int:
        """Returns the index of the next cut, at least `size` characters after `start`, which is a cut or 0."""
        earliest = start + size
        if earliest >= len(text):
            return len(text)
        latest = min(len(text), earliest + REACH) if self.has_bounded_pieces else len(text)
        place, tries = earliest - 1, 0
        while found := _END_OF_WORD.search(text, place, latest):
            place, tries = found.end(), tries + 1
            if self._is_cut(text, place):
                return place
            if tries % TRIES == 0:
                place += size
        return self._end_of_piece(text, start, size) if self.has_bounded_pieces else len(text)

    def _is_cut(self, text: str, place: int) -> bool:
        after = text[place]
        if not after.isspace() and unicodedata.category(after)[0] not in "PS":  # unassigned ones may become letters
            return False
        left, right = text[max(0, place - self._context) : place], text[place : place + self._context]
        if self._cuts:
            if self._pieces(left) + self._pieces(right) != self._pieces(left + right):
                return False
        elif not self._is_bpe or self._symbols(left[-1])[-1] + self._symbols(right[0])[0] in self._neighbours:
            return False
        return self._tokens(left) + self._tokens(right) == self._tokens(left + right)

    def _end_of_piece(self, text: str, start: int, size: int) -> int:
        """As `_next`, for pieces of our own.

        A match of their expression depends only on what follows the match before it. So the pieces of a window that
        starts at a cut are those of the whole text, but for the piece across the window's end, in whose place others
        may stand. It begins in the last LONGEST_PIECE characters.
        """
        even = -(-size // LONGEST_RUN) * LONGEST_RUN
        run = text[start : start + even]
        if len(run) == even and ((run.isalpha() and _all(run, r"\p{L}")) or (run.isdecimal() and _all(run, r"\p{N}"))):
            return start + even  # pieces of LONGEST_RUN letters or of two digits
        window = text[start : start + size + 2 * LONGEST_PIECE]
        if start + len(window) == len(text):
            return len(text)
        ends = (end for _, (_, end) in self._split.pre_tokenize_str(window))
        return start + max(end for end in ends if end <= size + LONGEST_PIECE)

    def _pieces(self, text: str) -> list[str]:
        return [piece for piece, _ in self._library.pre_tokenizer.pre_tokenize_str(text)]

    def _tokens(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def _symbols(self, character: str) -> str:
        """The symbols of the vocabulary with which the model writes a character."""
        if self._writes_bytes:
            return "".join(map(byte_characters().__getitem__, character.encode()))
        return character.replace(" ", "▁")


def _all(text: str, kind: str) -> bool:
    """Whether all characters of the text are of a kind for the library, whose Unicode version is not that of Python."""
    from tokenizers import Regex, pre_tokenizers

    return not pre_tokenizers.Split(Regex(kind), behavior="removed").pre_tokenize_str("".join(set(text)))


def _neighbours(tokens: dict[str, int]) -> set[str]:
    """Returns each two symbols that stand side by side in a token."""
    return {token[i : i + 2] for token in tokens for i in range(len(token) - 1)}
