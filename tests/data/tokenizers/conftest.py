import sysconfig
from pathlib import Path

import pytest

from data.tokenizers import BPE

LIBRARY = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def code() -> str:
    return "".join((LIBRARY / name).read_text() for name in ("argparse.py", "ast.py", "decimal.py", "heapq.py"))


@pytest.fixture(scope="module")
def bpe(code) -> BPE:
    tokenizer = BPE(vocabulary=600)
    tokenizer.fit([code])
    return tokenizer
