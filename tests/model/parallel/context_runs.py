"""Small training runs whose sequences several ranks share; for run_on_ranks, or in one process."""

import contextlib
import csv
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.build import build_data
from kernels.patterns import Dense, Hierarchical, Pattern, Routed, Window
from model import Transformer
from model.training.checkpoints import CheckpointFile
from model.training.fit import fit
from model.training.module import LanguageModel
from model.training.phases import Phase
from model.training.run_folder import RunFolder
from tests.commands import compose
from tests.model import small
from tests.model.parallel.training import join_ranks
from tests.model.small import config, lively, plan

ROUTED: dict[str, Any] = dict(window=16, block=16, top_k=1, router="indexer", share="group", first_block=False)
ROUTED |= dict(indexer_dim=8)
PATTERNS: dict[str, dict[str, Pattern]] = {
    "interleaved": {"near": Window(16), "far": Dense()},
    "contiguous": {"summaries": Hierarchical(16, (4, 16), (32,), "learned"), "routed": Routed(**ROUTED)},
    "growing": {"near": Window(16), "far": Dense()},
}
EARLIER: dict[str, dict[str, Pattern]] = {"growing": {"near": Window(5), "far": Dense()}}
"""Those of the first two steps, whose sequences have half as many tokens."""
OPTIMIZER = dict(name="adamw", learning_rate=0.01, weight_decay=0.1, betas=[0.9, 0.95], epsilon=1e-8)
OPTIMIZER |= dict(freeze=[], schedule=dict(name="constant", warmup_fraction=0.0))
TRAINER = small.TRAINER | dict(max_steps=4, accumulate=2, gradient_clip=0.5, validate_every=2)
COLUMNS = (
    *("train/loss", "train/bits_per_byte", "train/gradient_norm", "density_pairs", "density_tiles", "flops_per_token"),
    *("validation/loss", "validation/loss_first_512", "validation/loss_last_quarter"),
)


def data_settings(books: Path, batch_size: int) -> dict[str, Any]:
    settings = ("data=files", f"data.path={books}", f"data.cache={books.parent / 'cache'}", "data/tokenizer=bytes")
    return compose(*settings, "data.sequence_length=128", f"data.batch_size={batch_size}")["data"]


def train(
    path: Path,
    books: Path,
    family: str,
    context_parallel: int,
    resume: bool = False,
    overflows: bool = False,
    **changes: Any,
) -> dict:
    """Trains on sequences of 128 tokens, two of them a batch over all ranks, in the run folder `path`. overflows: the
    layouts of this rank are too small.

    Returns the COLUMNS of each row of metrics.csv, the tokens that summary.json counts, and what was logged.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(0)
    data = build_data(data_settings(books, 2 * context_parallel // ranks))
    data.setup()
    sizes = config(vocabulary=320, sink_logits=True, activation_checkpointing=True)
    model = lively(Transformer(sizes, plan(PATTERNS[family]))).double()
    if overflows:
        model.overflow = lambda layouts: torch.tensor(True)
    saved = {"name": "tiny", "seed": 0}
    module = LanguageModel(model, OPTIMIZER, data.token_bytes, saved)
    folder = RunFolder(path)
    if not resume and (ranks == 1 or dist.get_rank() == 0):
        folder = RunFolder.create(path, saved)
    phases = []
    if family in EARLIER:
        data.lengths = [(0, 64), (2, 128)]
        plans = plan(EARLIER[family]), model.plan
        phases = [Phase(step, length, each, "") for (step, length), each in zip(data.lengths, plans, strict=True)]
    settings = TRAINER | dict(phases=phases) | dict(devices=ranks, strategy="ddp" if ranks > 1 else "auto") | changes
    last = CheckpointFile(folder.checkpoints / "last.ckpt") if resume else None
    with messages("model.training.module") as logged:
        fit(module, data, folder, resume=last, **settings | dict(context_parallel=context_parallel))
    if ranks > 1 and dist.get_rank():
        return {}
    with open(folder.metrics_file) as file:
        rows = [[float(row.get(column) or "nan") for column in COLUMNS] for row in csv.DictReader(file)]
    summary = json.loads((path / "summary.json").read_text())
    return {"rows": rows, "train_tokens": summary["train_tokens"], "log": logged}


@contextlib.contextmanager
def messages(name: str) -> Iterator[list[str]]:
    """What a logger is told in the block, by rank 0."""
    logger, logged = logging.getLogger(name), []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield logged
    logger.removeHandler(handler)
    logger.setLevel(level)


def train_on_ranks(cases: Mapping[str, Sequence[Mapping[str, Any]]], root: str, books: str) -> dict[str, dict]:
    """Name -> what the last of its sessions returns."""
    join_ranks()
    found = {}
    for name, sessions in cases.items():
        for number, session in enumerate(sessions):
            found[name] = train(Path(root) / name, Path(books), resume=number > 0, **session)
            dist.barrier()
    return found


def one_rank_overflows(root: str, books: str) -> str:
    """The error that ends a run on this rank where the layouts of the last rank are too small."""
    join_ranks()
    try:
        is_last = dist.get_rank() == dist.get_world_size() - 1
        train(Path(root) / "run", Path(books), "interleaved", dist.get_world_size(), overflows=is_last)
    except Exception as error:
        return type(error).__name__
    return "none"
