"""Long texts in chunks, to save memory.

The `tokenizers` library takes about 140 bytes for each character of a string: 1.4 GB for a text of 10 MB.
"""

import re
from collections.abc import Iterator

_BOUNDARY = re.compile("[A-Za-z](?= [A-Za-z])")


def chunks(text: str, size: int = 1 << 16) -> Iterator[str]:
    """Cuts `text` into chunks of about `size` characters that encode, one by one, to the same tokens as the whole.

    A cut lies between a letter and a space that a letter follows. The pre-tokenizers of this repository, GPT-2, GPT-4,
    Llama and Qwen cut there as well: each keeps a space with the word after it, and its cuts among the letters before
    the space do not depend on the text after it. Text without such a place stays whole.
    """
    start = 0
    while boundary := _BOUNDARY.search(text, start + size):
        yield text[start : boundary.end()]
        start = boundary.end()
    yield text[start:]
