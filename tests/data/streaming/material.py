"""Files of documents, and the plainest reading of them as streams."""

import gzip
import json
import random
from itertools import count, islice

import pyarrow
import pyarrow.parquet

from data.ordering.permutation import permutation
from data.tokenizers import Bytes
from tests.data.conftest import random_text

LENGTH, SEED, FILES, STREAMS, HELD_OUT = 64, 7, 5, 4, 3


def texts_of_file(number: int) -> list[str]:
    """Short and long documents, an empty one, and one of several sequences."""
    sizes = random.Random(number)
    texts = [random_text(sizes.randint(1, 150), seed=100 * number + each) for each in range(14)]
    return [*texts[:9], "", random_text(400, seed=100 * number + 50), *texts[9:]]


TEXTS = [texts_of_file(number) for number in range(FILES)]
HELD_OUT_TEXTS = [TEXTS[number][0] for number in range(FILES)] + [TEXTS[0][1]]  # a document of each file in turn
TEXTS[2][5] = HELD_OUT_TEXTS[1]  # a copy of a held-out document, in another file
TEXTS[4][3] = "münchen 日本"


def write_files(folder, kind=".jsonl", texts=TEXTS):
    folder.mkdir()
    for number, rows in enumerate(texts):
        name = folder / f"part-{number}{kind}"
        if kind == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": rows}), name, row_group_size=4)
        else:
            lines = "\n".join(json.dumps({"text": text}) for text in rows).replace("\n", "\n\n", 1).encode()
            name.write_bytes(gzip.compress(lines) if kind.endswith(".gz") else lines)
    return folder


def read(datamodule, batches: int) -> list[dict]:
    """Trains on so many batches. Returns them."""
    taken = []
    for batch in islice(datamodule.train_dataloader(), batches):
        taken.append(datamodule.on_before_batch_transfer(batch, 0))
        datamodule.advance(len(batch["tokens"]))
    return taken


def rows_of(batches, key="tokens") -> list[list[int]]:
    return [row for batch in batches for row in batch[key].tolist()]


def expected_documents(stream: int, texts=TEXTS, held_out=HELD_OUT_TEXTS, shortest=2):
    """The documents of a stream, without end, read in the plainest way. shortest: tokens, bos included."""
    for of_pass in count():
        for number in permutation(len(texts), SEED, of_pass)[stream::STREAMS]:
            yield from (text for text in texts[number] if len(text.encode()) >= shortest - 1 and text not in held_out)


def expected_tokens(sequences: int, *arguments, **changes) -> list[list[int]]:
    """The first sequences of a stream of `expected_documents`."""
    tokens = []
    for text in expected_documents(*arguments, **changes):
        tokens += [Bytes.bos, *text.encode()]
        if len(tokens) >= sequences * LENGTH:
            return [tokens[number * LENGTH :][:LENGTH] for number in range(sequences)]
