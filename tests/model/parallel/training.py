"""Small training runs that every rank of a process group takes part in, or one process alone."""

import contextlib
import csv
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.ordering.sampler import ResumableSampler
from data.units import OF_TEXT
from kernels import Axis
from kernels.patterns import Dense, Hierarchical, NativeSparse, Routed, Window
from model import Transformer
from model.attention import build_layouts
from model.training import muon
from model.training.checkpoints import CheckpointFile
from model.training.fit import fit
from model.training.module import LanguageModel
from model.training.run_folder import RUN_FOLDER, RunFolder
from tests.model import small
from tests.model.small import INDEXER, config, plan

LENGTH, BATCH, VOCABULARY = 64, 4, 64
ROUTED: dict[str, Any] = dict(window=16, block=16, top_k=1, router="indexer", share="group", first_block=False)
ROUTED |= dict(indexer_dim=8)
PATTERNS = {
    "window_dense": {"local": Window(16), "full": Dense()},
    "hierarchical": {"only": Hierarchical(window=16, spans=[4, 16], reaches=[32], pooling="learned")},
    "routed": {"only": Routed(**ROUTED)},
    "native_sparse": {
        "only": NativeSparse(**ROUTED | dict(first_block=True), summary_span=8, pooling="learned", combine="gates")
    },
}
OPTIMIZER: dict[str, Any] = dict(learning_rate=0.01, weight_decay=0.1, betas=[0.9, 0.95], epsilon=1e-8)
OPTIMIZER |= dict(freeze=[], schedule=dict(name="constant", warmup_fraction=0.0))
OPTIMIZERS = {
    "adamw": OPTIMIZER | dict(name="adamw"),
    "muon": OPTIMIZER | dict(name="muon", momentum=0.9),
}
TRAINER = small.TRAINER | dict(max_steps=3, gradient_clip=0.5, validate_every=3)


class Sequences(Dataset):
    """Sequences of two documents, whose end, padding and so number of scored tokens differ."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(1, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))
        end, padding = 10 + 7 * (index % 6), 6 * (index % 8)
        document = (torch.arange(LENGTH) > end).int()
        targets = (tokens * 5 + 2) % VOCABULARY
        targets[end] = -100
        targets[LENGTH - padding :] = -100
        position = torch.arange(LENGTH, dtype=torch.int32) - (end + 1) * document
        return dict(tokens=tokens, targets=targets, document=document, position=position)


class Data(lightning.LightningDataModule):
    """Each step trains on the same BATCH sequences, on however many ranks."""

    units = OF_TEXT
    tokens_per_pass = None

    def __init__(self) -> None:
        super().__init__()
        self.cursor = 0

    @property
    def batch_size(self) -> int:
        return BATCH // self.trainer.world_size

    def advance(self, samples: int) -> None:
        self.cursor += samples * self.trainer.world_size

    def train_dataloader(self) -> DataLoader:
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        sampler = ResumableSampler(Sequences(), 0, 1000, lambda: self.cursor, rank, ranks)
        return DataLoader(Sequences(), self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(Sequences(), self.batch_size, sampler=range(rank, 8, ranks))

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cursor = state["cursor"]


def train(
    path: Path,
    strategy: str = "auto",
    family: str = "window_dense",
    optimizer: str = "muon",
    freeze: Sequence[str] = (),
    indexer_alone: int = 0,
    sizes: Mapping[str, Any] | None = None,
    resume: bool = False,
    compile: bool = False,
    dtype: torch.dtype = torch.float64,
    in_fp8: str | bool = False,
    **changes: Any,
) -> list[list[float]]:
    """Trains on all ranks of the default process group, or in this process alone, in the run folder `path`.

    dtype: of the weights and of all computation, where `precision` is 32-true. Muon orthogonalizes in it, too: it
        amplifies rounding in those directions of a gradient that are zero but for rounding.

    Returns:
        The loss and the norm of the gradient of every step of the run, and the validation loss where there is one.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(0)
    with computing_in(dtype):
        indexer = replace(INDEXER, indexer_warmup=indexer_alone, indexer_warmup_alone=indexer_alone > 0)
        attention = plan(PATTERNS[family], indexer=indexer)
        model = Transformer(config(vocabulary=VOCABULARY, **(sizes or {})), attention)
    model.train_in_fp8(in_fp8)
    if compile:
        # Layouts of fixed sizes, as on a GPU; and no compiler behind the tracing, which takes minutes on a CPU.
        model.build_layouts = lambda document, length, context=None: build_layouts(
            [core.layout_pattern for core in model.cores],
            *(Axis.tokens(length, document), model.plan.block, True, context),
        )
        with mock.patch("torch.compile", functools.partial(torch.compile, backend="eager")):
            model.compile_layers()
    settings = OPTIMIZERS[optimizer] | {"freeze": freeze}
    module = LanguageModel(model, settings, torch.ones(VOCABULARY), {"name": "tiny", "seed": 0})
    folder = RunFolder(path)
    if not resume and rank_zero_only.rank == 0:
        folder = RunFolder.create(path, {"name": "tiny"})
    settings = TRAINER | dict(devices=ranks, strategy=strategy) | changes
    with computing_in(dtype), mock.patch("kernels.fp8.EMULATE", True):
        fit(
            module,
            Data(),
            folder,
            resume=CheckpointFile(folder.checkpoints / "last.ckpt") if resume else None,
            **settings,
        )
    with open(folder.metrics_file) as file:
        rows = list(csv.DictReader(file))
    columns = "train/loss", "train/gradient_norm", "validation/loss"
    return [[float(row.get(column) or "nan") for column in columns] for row in rows]


@contextlib.contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have this dtype, and Muon orthogonalizes in it."""
    before = torch.get_default_dtype(), muon.STACK_DTYPE
    torch.set_default_dtype(dtype)
    muon.STACK_DTYPE = dtype
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        muon.STACK_DTYPE = before[1]


def join_ranks() -> None:
    """Makes Lightning find the ranks of the default process group, as it finds torchrun's."""
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, GROUP_RANK="0")
    os.environ |= dict(TORCHELASTIC_RUN_ID="tests", MASTER_ADDR="localhost", MASTER_PORT="0")
    rank_zero_only.rank = dist.get_rank()  # Lightning sets it when it is imported


def train_on_ranks(cases: Mapping[str, Mapping[str, Any]], root: str) -> dict[str, list[list[float]]]:
    """Name -> what `train` returns; for run_on_ranks."""
    join_ranks()
    return {name: train(Path(root) / name, **case) for name, case in cases.items()}


def count_waits(strategy: str, root: str) -> list[int]:
    """Barriers and broadcasts of a run of 2 steps and of one of 4 steps; for run_on_ranks."""
    join_ranks()
    found = []
    for steps in (2, 4):
        with (
            mock.patch.object(dist, "barrier", wraps=dist.barrier) as barrier,
            mock.patch.object(dist, "_broadcast_coalesced", wraps=dist._broadcast_coalesced) as broadcast,
        ):
            train(Path(root) / f"steps_{steps}", strategy, max_steps=steps, validate_every=None)
        found.append(barrier.call_count + broadcast.call_count)
    return found


def time_limits_of_groups(strategy: str, rank_timeout: float, root: str) -> list[float]:
    """Seconds that the groups that a run makes wait for a rank; for run_on_ranks."""
    join_ranks()
    with mock.patch.object(dist, "new_group", wraps=dist.new_group) as new_group:
        train(Path(root) / "run", strategy, max_steps=1, validate_every=None, rank_timeout=rank_timeout)
    return [call.kwargs["timeout"].total_seconds() for call in new_group.call_args_list]


def run_train_py(settings: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Runs train.py's `train` on every rank, in one run folder, and returns the summary of the run."""
    from train import train as train_py

    join_ranks()
    os.environ[RUN_FOLDER] = path
    return train_py(dict(settings), Path(path))


def run_train_py_as_slurm_does(settings: Mapping[str, Any], port: int) -> dict[str, Any]:
    """Runs train.py's `train` on every rank, each of which stands for a node, as srun starts it.

    port: where they meet.
    """
    from train import train as train_py

    rank, nodes = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()  # Lightning makes another one from the variables
    task = dict(JOB_ID=os.getppid(), JOB_NAME="train", STEP_ID=0, NODELIST="127.0.0.1", LOCALID=0, NTASKS_PER_NODE=1)
    task |= dict(NTASKS=nodes, STEP_NUM_TASKS=nodes, NNODES=nodes, PROCID=rank, NODEID=rank)
    os.environ |= {f"SLURM_{key}": str(value) for key, value in task.items()}
    os.environ["MASTER_PORT"] = str(port)
    rank_zero_only.rank = rank
    return train_py(dict(settings))
