"""Files of tokens that other programs wrote, read in place through memory maps.

    nanoGPT                   .bin: uint16 tokens and nothing else
    llm.c, modded-nanogpt     .bin: a header of 256 int32 (magic number, version, number of tokens, 0, ...), then the
                              tokens. They are uint16 if the magic number is 20240520 and the version 1 (GPT-2's
                              tokenizer), and uint32 if these are 20240801 and 7 (Llama 3's)
    OLMo                      .npy: uint16 or uint32 tokens and nothing else, in spite of the name
    NumPy                     .npy: one dimension of unsigned integers, after NumPy's own header

A separator token is the first token of the document after it, whether it was written before or after each document. The
files of a split are concatenated to one stream in the order of their names, so a document may continue in the next
file, as in llm.c's shards.
"""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import CorpusError
from ..tokenizers import Tokenizer
from .split import Split, SplitMetadata

HEADER = 256  # int32
DTYPE_OF_HEADER = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
"""The dtype by the magic number and the version."""


@dataclass(frozen=True)
class Shard:
    """A file of `tokens` tokens, which begin `offset` bytes after its start."""

    path: str
    dtype: str
    offset: int
    tokens: int

    def open(self) -> np.ndarray:
        """Returns the tokens, memory-mapped.

        Raises:
            CorpusError: the file is gone, or shorter than it was.
        """
        try:
            return np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,))
        except (OSError, ValueError) as error:
            raise CorpusError(f"data.path: {self.path}: must hold {self.tokens:,} tokens: {error}") from error


def read_shard(file: Path, dtype: str) -> Shard:
    """Returns the format of a file. `dtype`: of the tokens, if the file has no header.

    Raises:
        CorpusError: the file is not of one of the formats, or was cut off.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(4 * HEADER)
        if start.startswith(b"\x93NUMPY"):
            stream.seek(0)
            return _numpy_shard(file, stream, size)
    header = np.frombuffer(start[: len(start) // 4 * 4], "<i4")
    offset, counted = 0, None
    if len(header) == HEADER and (kind := (int(header[0]), int(header[1]))) in DTYPE_OF_HEADER:
        dtype, offset, counted = DTYPE_OF_HEADER[kind], len(start), int(header[2])
    tokens, rest = divmod(size - offset, np.dtype(dtype).itemsize)
    if rest or tokens != (tokens if counted is None else counted):
        expected = f"{counted:,} tokens" if counted is not None else "a whole number of tokens"
        raise CorpusError(f"data.path: {file}: must hold {expected} of {dtype}, and has {size:,} bytes")
    return Shard(str(file.absolute()), dtype, offset, tokens)


def _numpy_shard(file: Path, stream, size: int) -> Shard:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if len(shape) != 1 or dtype.kind not in "ui" or dtype.itemsize > 4:
        raise CorpusError(
            f"data.path: {file}: must be an array of one dimension, of uint16 or uint32, and is {dtype} {list(shape)}"
        )
    if size != stream.tell() + shape[0] * dtype.itemsize:
        raise CorpusError(f"data.path: {file}: must hold {shape[0]:,} tokens of {dtype}, and has {size:,} bytes")
    return Shard(str(file.absolute()), dtype.str, stream.tell(), shape[0])


class Stream:
    """The concatenated tokens of several shards."""

    def __init__(self, shards: Sequence[Shard]):
        self.shards = shards
        self.starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._bounds = self.starts.tolist()  # faster to search than the array

    @cached_property
    def maps(self) -> list[np.ndarray]:
        return [np.asarray(shard.open()) for shard in self.shards]  # a slice of an array takes a fraction of the time

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "maps"}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the tokens `start` <= n < `stop`: a view, if they lie in one file."""
        first = bisect(self._bounds, start) - 1
        parts = []
        for number in range(first, len(self.shards)):
            begin, end = self._bounds[number : number + 2]
            if stop <= end and not parts:
                return self.maps[number][start - begin : stop - begin]
            if begin >= stop:
                break
            parts.append(self.maps[number][max(start, begin) - begin : min(stop, end) - begin])
        return np.concatenate(parts)


class SplitOfFiles(Split):
    """A split with several files of tokens, each of whole documents."""

    def __init__(self, folder: Path, metadata: SplitMetadata, shards: Sequence[Shard]):
        super().__init__(folder, metadata, shards[0].dtype)
        self.stream = Stream(shards)

    @property
    def texts(self) -> Split:
        raise CorpusError(
            f"data.path: must hold at most {self.stream.shards[0].tokens:,} tokens in {self.folder.name} for generated"
            " sequences, which take their text from one file"
        )

    def tokens(self, document: int) -> np.ndarray:
        return self.stream.read(int(self.offsets[document]), int(self.offsets[document + 1]))

    def head(self, tokens: int) -> np.ndarray:
        return self.stream.read(0, min(tokens, self.total_tokens))

    @property
    def flat(self) -> np.ndarray:
        """The concatenated tokens of all documents, which are copied into memory."""
        return self.head(self.total_tokens)

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"stream": self.stream}


class ShardedSplit(SplitOfFiles):
    """A split whose tokens stay in the token files. Its folder has these files:

    starts.npy     int64 [documents], the index in the stream at which each document starts
    offsets.npy    int64 [documents + 1], the tokens before each document of the split
    bytes.npy      int64 [documents], UTF-8 bytes of each text, without its first token; 0 if the tokens have no text
    """

    def __init__(self, folder: Path, metadata: SplitMetadata, shards: Sequence[Shard], tokenizer: Tokenizer):
        super().__init__(folder, metadata, shards)
        self.tokenizer = tokenizer

    def tokens(self, document: int) -> np.ndarray:
        """Returns the document's tokens, integers `[tokens]`. The first one is the separator, except in the first
        document of a stream that does not begin with a separator."""
        start = int(self.starts[document])
        return self.stream.read(start, start + int(self.lengths[document]))

    def text(self, document: int) -> str:
        """Returns the decoded tokens, without the first one."""
        return self.tokenizer.decode(self.tokens(document)[1:])

    def raw(self, document: int) -> bytes:
        return self.tokenizer.decode_bytes(self.tokens(document)[1:])

    def head(self, tokens: int) -> np.ndarray:
        count = int(np.searchsorted(self.offsets, tokens))
        return np.concatenate([self.tokens(document) for document in range(min(count, len(self)))])[:tokens]

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 `[documents]`: the place of each document in the stream."""
        return np.load(self.folder / "starts.npy", allow_pickle=False)

    @cached_property
    def words(self) -> list[int]:
        if not self.tokenizer.has_text:
            return [0] * len(self)
        return [len(self.text(document).split()) for document in range(len(self))]

    @cached_property
    def names(self) -> list[str]:
        """`file:index` of the first token of each document."""
        number = np.searchsorted(self.stream.starts, self.starts, side="right") - 1
        places = self.starts - self.stream.starts[number]
        files = [Path(shard.path).name for shard in self.stream.shards]
        return [f"{files[each]}:{place}" for each, place in zip(number, places, strict=True)]

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"tokenizer": self.tokenizer}
