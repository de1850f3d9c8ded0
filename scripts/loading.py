"""A trained run, opened: what every command needs that works with a checkpoint."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.build import ConfigError, build_data, build_model
from data import DataModule, Texts
from data.corpus import Split
from data.tokenizers import Tokenizer
from data.tokenizers import load as load_tokenizer
from model import Transformer
from model.precision import DTYPES, device_of
from model.training.checkpoints import load_weights, read_checkpoint
from model.training.run_folder import find_checkpoint

log = logging.getLogger("farsight")


@dataclass(frozen=True)
class Run:
    """`checkpoint`: the file, and `folder` where it lies (`folder_of`). `config`: what the run was trained with. `data`
    is set up; `model` is on the device that was asked for."""

    checkpoint: Path
    folder: Path
    config: dict[str, Any]
    data: DataModule
    model: Transformer

    @property
    def label(self) -> str:
        """How a table or a picture calls it."""
        which = "" if self.checkpoint.stem == "last" else f"/{self.checkpoint.stem}"
        return f"{self.config['name']}/{self.folder.name}{which}"


def open_run(checkpoint: str | Path, accelerator: str, precision: str) -> Run:
    """The run that `checkpoint` means (model/training/run_folder.find_checkpoint), its last weights loaded."""
    file = find_checkpoint(checkpoint, prefer="last")
    config = read_checkpoint(file)["hyper_parameters"]
    data = build_data(config["data"])
    data.setup()
    return Run(file, folder_of(file), config, data, _model(file, config, data.tokenizer, accelerator, precision))


def open_model(checkpoint: str | Path, accelerator: str, precision: str) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of a run, for who needs none of its documents: they may be gone."""
    file = find_checkpoint(checkpoint, prefer="last")
    saved = folder_of(file) / "tokenizer.json"
    if not saved.is_file():
        run = open_run(checkpoint, accelerator, precision)
        return run.model, run.data.tokenizer
    tokenizer = load_tokenizer(saved)
    return _model(file, read_checkpoint(file)["hyper_parameters"], tokenizer, accelerator, precision), tokenizer


def _model(
    file: Path, config: Mapping[str, Any], tokenizer: Tokenizer, accelerator: str, precision: str
) -> Transformer:
    model = build_model(config, tokenizer.vocabulary)
    load_weights(model, file)
    return model.to(device_of(accelerator), DTYPES.get(precision, torch.float32)).eval()


def folder_of(checkpoint: Path) -> Path:
    """The run that a checkpoint lies in, or its own folder where it was moved out of one."""
    checkpoint = checkpoint.absolute()
    run = checkpoint.parent.parent
    return run if (run / "config.yaml").is_file() else checkpoint.parent


def open_documents(run: Run, split: str, data: Mapping[str, Any] | None) -> tuple[Split | Texts, str]:
    """What to evaluate `run` on, and its name: one's own documents (a composed `data` group), or the run's split."""
    if data:
        return Texts.load(data, run.data.tokenizer), str(data["path"])
    splits = run.data.corpus.splits
    if split not in splits:
        raise ConfigError(f"evaluation.split={split}: must be one of {', '.join(splits)}")
    return splits[split], split


def retokenize(documents: Split | Texts, name: str, first: Run, run: Run) -> Split | Texts:
    """`documents` of `first` for another run: under that run's tokenizer, where it has another."""
    if run.data.corpus.fingerprint != first.data.corpus.fingerprint:
        log.warning(
            "%s was trained on another corpus: it may have seen documents of %s's %s", run.label, first.label, name
        )
    if same_tokenizer(run, first):
        return documents
    rows = [{"name": str(document), "text": documents.text(document)} for document in range(len(documents))]
    return Texts(rows, run.data.tokenizer)


def same_tokenizer(run: Run, other: Run) -> bool:
    return run.data.tokenizer.identity() == other.data.tokenizer.identity()
