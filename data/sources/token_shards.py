"""Files of tokens that other programs prepared, as a source."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..digests import FILE as DIGESTS
from ..digests import digests_of
from ..errors import CorpusError
from ..tokenizers.bpe import BPE
from .bad_documents import BadDocuments
from .base import Extensions, Paths, Source
from .file_rows import COMPRESSED
from .file_search import find_files
from .files import UNDIVIDED, name_of, root_of
from .splits import SPLIT_NAMES, with_test_split

if TYPE_CHECKING:
    from datasets import Dataset

    from ..tokenizers import Tokenizer

NAMES = SPLIT_NAMES | {"val": "validation"}
_SPLIT_IN_NAME = re.compile(rf"(?<![a-z])({'|'.join(NAMES)})(?![a-z])", re.IGNORECASE)
"""The word in the name of a file below `data.path` that names its split."""


class TokenShards(Source):
    """Files of tokens in the formats of ../corpus/token_files.py, which are read in place. The tokenizer is the one
    that wrote them, and its `bos` separates documents.

    A file belongs to the split that a word of its name, or of a folder of it below `path`, names: train, val (valid,
    validation) or test. If no file has such a word, a hash of each document's tokens decides.

    dtype: of the tokens in files without a header.
    """

    skips = False
    several_paths = True

    def __init__(self, extensions: Extensions, dtype: Literal["uint16", "uint32"]):
        self.extensions = tuple(extensions)
        self.dtype = dtype

    def check(self, path: Paths) -> None:
        if not path:
            raise CorpusError("data.path=null: must be a folder, a file or a glob of token files, for example shards/")
        self.find(path)

    def check_evaluated(self) -> None:
        raise CorpusError("data=tokens: must be a source of texts here: files of tokens are for training alone")

    def use_tokenizer(self, tokenizer: "Tokenizer") -> None:
        if isinstance(tokenizer, BPE):
            raise CorpusError(
                f"{tokenizer.origin}: must be the one that wrote the token files, which is not learned again:"
                " data/tokenizer=saved data.tokenizer.path=tokenizer.json, or token_ids without it"
            )

    def identity(self, path: Paths, cache: Path | None = None) -> dict:
        # With the paths: the corpus has the places of the files, which it does not copy.
        named = [(split, file) for split, files in self.find(path).items() for file in files]
        digests = digests_of([file for _, file in named], cache and cache / DIGESTS)
        files = [[split, str(file.absolute()), each] for (split, file), each in zip(named, digests, strict=True)]
        return {"source": "token_shards", "dtype": self.dtype, "files": files}

    def find(self, path: Paths) -> dict[str, list[Path]]:
        """Returns the files of each split; all under UNDIVIDED if no file's name has one.

        Raises:
            CorpusError: there is no file, a file is compressed, or only some files are of a split.
        """
        splits: dict[str, list[Path]] = {}
        for file in find_files(path, self.extensions).files:
            if file.suffix.lower() in COMPRESSED:
                raise CorpusError(f"data.path={path}: must hold files that are not compressed, and holds {file}")
            words = _SPLIT_IN_NAME.findall(name_of(file, root_of(path)))
            splits.setdefault(NAMES[words[-1].lower()] if words else UNDIVIDED, []).append(file)
        if UNDIVIDED in splits and len(splits) > 1:
            raise CorpusError(
                f"data.path={path}: must hold files that all have train, val or test in their name, or none, and"
                f" {splits[UNDIVIDED][0].name} has none of them"
            )
        return splits if UNDIVIDED in splits else with_test_split(splits, str(path))

    def load(self, path: Paths, arrow_cache: Path, bad: BadDocuments) -> "dict[str, Dataset]":
        raise AssertionError("files of tokens are read in place")
