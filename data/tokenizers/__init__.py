"""Tokenizers: text to integers and back, exactly.

    byte_tokens.py   Bytes: a token for each byte
    bins.py          Bins: a token for each bin of numbers
    token_ids.py     TokenIds: numbers of tokens whose text is unknown
    fixed.py         the base class of Bytes, Bins and TokenIds
    bpe.py           BPE: byte-pair encoding, learned from the training documents
    saved.py         Saved: a lossless tokenizer.json that exists already
    byte_level.py    the base class of BPE and Saved
    byte_fallback.py tokenizers like those of Llama 2 and Mistral 7B
    pieces.py        the pieces into which our tokenizers cut a text
    chunks.py        long texts in chunks that encode as the whole does
    hugging_face.py  the tokenizer files of an exported model

A tokenizer is lossless: `decode(encode(text)) == text` for any text. A tokenizer.json of others is refused if its
settings lose text, and each document that it encodes is decoded and compared (`encode_checked`); `lossy=allow` accepts
and marks it (`Tokenizer.lossy`). The tokenizers of some pretrained models write a few characters in another form of
Unicode (`normalized`); documents with such characters are a warning. A token stands for a fixed number of bytes, so a
loss in nats per token converts to bits per byte exactly. `bos` is the only special token. It begins a document and
stands for no bytes; text never encodes to it, not even text that spells it.

A tokenizer is defined by its settings (`identity`), is ready after `fit` (only BPE learns from the text), and is saved
with the corpus as tokenizer.json. A new tokenizer is a subclass of `Tokenizer` (base.py) that a config names as
`data.tokenizer._target_`.
"""

from .base import Tokenizer
from .bins import Bins
from .bpe import BPE
from .byte_tokens import Bytes
from .hugging_face import hugging_face_files
from .saved import Saved, load
from .token_ids import TokenIds

__all__ = ["BPE", "Bins", "Bytes", "Saved", "TokenIds", "Tokenizer", "hugging_face_files", "load"]
