"""A tiny model and a tiny DataModule with the interfaces of the real ones, so that these tests take seconds.

Run as a program it trains, slowly, until it is done or told to stop: python stand_ins.py RUN_DIR MAX_STEPS
"""

import math
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, Sampler

from data.units import OF_TEXT
from model.training.checkpoints import CheckpointFile
from model.training.fit import FitResult, fit
from model.training.module import LanguageModel
from model.training.run_folder import RunFolder
from model.training.step_graph import GraphRecorder
from tests.model import small

VOCABULARY, LENGTH, WIDTH = 11, 16, 8
TOKEN_BYTES = torch.arange(VOCABULARY)  # token 0 is the beginning of a document, and stands for no text
OPTIMIZER = dict(
    name="adamw",
    learning_rate=0.01,
    weight_decay=0.1,
    betas=[0.9, 0.95],
    epsilon=1e-8,
    freeze=[],
    schedule=dict(name="cosine", warmup_fraction=0.2, final_fraction=0.1),
)
TRAINER = small.TRAINER | dict(max_steps=12, gradient_clip=1.0, validate_every=4)


class TinyModel(nn.Module):
    """Embedding, norm, a hidden matrix and dropout (so that the random state matters), and a head."""

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.RMSNorm(WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.layer_diagnostics: list[dict[str, Tensor]] = []

    def build_layouts(self, document: Tensor, length: int) -> list:
        return [length, document.double().mean().item()]

    def overflow(self, layouts: list) -> Tensor | None:
        return None

    def loss(
        self, tokens: Tensor, targets: Tensor, position: Tensor, layouts: list, scored: int | None = None
    ) -> SimpleNamespace:
        x = self.norm(self.embed(tokens))
        x = x + self.dropout(torch.tanh(self.hidden(x)))
        nats = nn.functional.cross_entropy(self.lm_head(x).flatten(0, 1), targets.flatten(), reduction="none")
        return SimpleNamespace(
            total=nats.sum(), per_token=nats.detach().view_as(targets), count=(targets != -100).sum(), auxiliary=None
        )

    indexers_alone = 0
    stage = None

    def set_step(self, step: int) -> None:
        """Nothing here has a schedule of its own."""

    def collect_diagnostics(self, collect: bool) -> None:
        """Nothing here is watched."""

    def diagnostics(self) -> dict[str, Tensor]:
        return {}

    def cost(self, layouts: list, batch: int = 1) -> SimpleNamespace:
        tokens = batch * layouts[0]
        attention = SimpleNamespace(density_pairs=0.25 + layouts[1] / 4, density_tiles=0.5, flops=12 * tokens)
        return SimpleNamespace(attention=attention, flops=100 * tokens, dense_flops=400 * tokens)


class Sequences(Dataset):
    """Sequence `index` of a seeded corpus, with a document's end and some padding at index-dependent places."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + index)
        tokens = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        targets = (tokens * 3 + 1) % VOCABULARY
        end, padding = 4 + index % 7, index % 5
        targets[end] = -100
        targets[LENGTH - padding :] = -100
        document = (torch.arange(LENGTH) > end).int()
        position = torch.arange(LENGTH, dtype=torch.int32) - (end + 1) * document
        return dict(tokens=tokens, targets=targets, document=document, position=position)


class Stream(Sampler):
    """Endless: a new seeded permutation each pass, from a cursor on; its length is that of the whole run."""

    def __init__(self, count: int, seed: int, cursor: int, length: int):
        self.count, self.seed, self.cursor, self.length = count, seed, cursor, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        position = self.cursor
        while True:
            generator = torch.Generator().manual_seed(self.seed + position // self.count)
            yield int(torch.randperm(self.count, generator=generator)[position % self.count])
            position += 1


def outlive_sigterm(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class TinyData(lightning.LightningDataModule):
    units = OF_TEXT
    tokens_per_pass = None

    def __init__(self, batch_size: int = 2, workers: int = 0, sequences: int = 7, seed: int = 1):
        super().__init__()
        self.batch_size, self.workers, self.sequences, self.seed = batch_size, workers, sequences, seed
        self.cursor = 0

    def advance(self, samples: int) -> None:
        self.cursor += samples

    def train_dataloader(self) -> DataLoader:
        data = Sequences(self.sequences, self.seed)
        length = self.trainer.max_steps * self.trainer.accumulate_grad_batches * self.batch_size
        stream = Stream(self.sequences, self.seed, self.cursor, length)
        return DataLoader(
            data, self.batch_size, sampler=stream, num_workers=self.workers, worker_init_fn=outlive_sigterm
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Sequences(5, self.seed + 1), self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]


class BestAt(lightning.Callback):
    """Makes the validation loss lowest at one step."""

    def __init__(self, step: int):
        self.step = step

    def on_validation_end(self, trainer: lightning.Trainer, module: LanguageModel) -> None:
        module.validation_metrics["validation/loss"] = float(abs(trainer.global_step - self.step))


class Capture(TorchDispatchMode):
    """Raises RuntimeError where the host reads a value of a tensor, or copies numbers to one, which no capture permits.
    It does not see into operators of our own.

    read: the memory that the captured operators read and did not allocate, which each replay reads again.
    """

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "lift_fresh", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, StorageWeakRef] = {}
        self.allocated: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        name, indices = operator.overloadpacket.__name__, tensors_in(list(arguments[1:]))
        masked = name.startswith("index") and any(each.dtype == torch.bool for each in indices)
        if name in self.FORBIDDEN or (masked and name in ("index", "index_put", "index_put_")):
            raise RuntimeError(f"{operator}: not permitted in a capture")
        results = operator(*arguments, **(settings or {}))
        given = [StorageWeakRef(each.untyped_storage()) for each in tensors_in([*arguments, settings or {}])]
        self.read |= {each.cdata: each for each in given if each.cdata not in self.allocated}
        made = [StorageWeakRef(each.untyped_storage()) for each in tensors_in([results])]
        self.allocated |= {each.cdata: each for each in made if each.cdata not in self.read}
        return results


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested sequences and mappings."""
    if isinstance(value, Tensor):
        return [value]
    value = list(value.values()) if isinstance(value, dict) else value
    return [tensor for each in value for tensor in tensors_in(each)] if isinstance(value, list | tuple) else []


class StandInRecorder(GraphRecorder):
    """Captures and replays on a CPU as a CUDA graph does: a capture gives no values; a replay computes them from the
    values that the inputs of the capture have then, into the tensors of the capture. Numbers stay as captured. A replay
    raises RuntimeError if memory that it reads has been freed, where a CUDA graph would read other numbers.

    undo: undoes the side effects of the Python code, which a graph does not run; those on `.grad` are undone here.
    """

    def __init__(self, undo: Callable[[], None] = lambda: None) -> None:
        super().__init__(torch.device("cpu"))
        self.captures = self.replays = self.runs = 0
        self.undo = undo

    def run(self, function: Callable[[], Any]) -> Any:
        self.runs += 1
        return function()

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.captures += 1
        random, capture = torch.get_rng_state(), Capture()
        with capture:
            captured = function()
        torch.set_rng_state(random)
        self.idle_bytes = 10**15
        _refresh(captured, None)

        def replay() -> None:
            self.replays += 1
            if any(storage.expired() for storage in capture.read.values()):
                raise RuntimeError("a replay reads memory that has been freed")
            own = {parameter: parameter.grad for parameter in captured[1]}
            _refresh(captured, function())
            for parameter, gradient in own.items():
                parameter.grad = gradient
            self.undo()

        return captured, replay


def _refresh(captured: Any, new: Any) -> None:
    """Copies the tensors of `new` into those of `captured`, or NaN and -1 where `new` is None. Objects that hold
    tensors, such as layouts, are replaced in their list."""
    if isinstance(captured, Tensor):
        nothing = torch.full_like(captured, math.nan if captured.is_floating_point() else -1)
        captured.copy_(nothing if new is None else new)
    elif isinstance(captured, dict):
        for key, value in captured.items():
            _refresh(value, None if new is None else new[key])
    elif isinstance(captured, list) and not all(isinstance(each, Tensor | dict) for each in captured):
        captured[:] = [None] * len(captured) if new is None else new
    elif isinstance(captured, list | tuple):
        for value, other in zip(captured, [None] * len(captured) if new is None else new, strict=True):
            _refresh(value, other)


def new_module(optimizer: dict | None = None, model: nn.Module | None = None, seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    config = {"name": "tiny", "seed": 3, "model": {"width": WIDTH}, "betas": [0.9, 0.95], "none": None}
    return LanguageModel(model or TinyModel(), optimizer or OPTIMIZER, TOKEN_BYTES, config)


def run_folder(path: Path) -> RunFolder:
    folder = RunFolder(path)
    return RunFolder.open(path) if folder.config_file.exists() else RunFolder.create(path, {"name": "tiny"})


def train(
    path: Path,
    *,
    resume: bool | Path = False,
    workers: int = 0,
    optimizer: dict | None = None,
    seed: int = 0,
    data: TinyData | None = None,
    **changes: Any,
) -> FitResult:
    """One session in the folder `path`. resume: from its last checkpoint, or from a file."""
    folder = run_folder(path)
    checkpoint = folder.checkpoints / "last.ckpt" if resume is True else resume or None
    return fit(
        new_module(optimizer, seed=seed),
        data or TinyData(workers=workers),
        folder,
        resume=CheckpointFile(checkpoint) if checkpoint else None,
        **(TRAINER | changes),
    )


if __name__ == "__main__":
    import logging
    import time

    class Slow(lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            time.sleep(0.01)  # a step takes longer than the batches that workers have fetched ahead

    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    result = train(Path(sys.argv[1]), max_steps=int(sys.argv[2]), accumulate=8, workers=2, callbacks=[Slow()])
    logging.info("state %s", result.state)
