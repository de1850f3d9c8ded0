"""Opens a trained run: from a checkpoint to its config, tokenizer, model and data."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from configs.aliases import upgrade
from configs.build import ConfigError, build_data, build_model
from configs.mixture import build_source
from configs.pretrained import GROUP, PREFIX, groups_of, is_pretrained, pretrained_folder, weights_of
from configs.tokenizer import FILE, tokenizer_of, with_own_tokenizer
from data import CorpusError, DataModule, InMemoryDocuments
from data.corpus import Corpus, Split
from data.tokenizers import Bins, Tokenizer
from data.tokenizers import load as load_tokenizer
from data.units import Units, units_by_source, units_of
from model import ModelConfig, Transformer
from model.precision import DTYPES, device_of
from model.pretrained.weights import Weights
from model.training.checkpoints import CheckpointFile, load_weights
from model.training.run_folder import find_checkpoint, folder_of

log = logging.getLogger(__name__)

SIZES = ("width", "layers", "heads", "kv_heads", "head_dim", "mlp_width")
SIZES += ("tie_embeddings", "sink_logits", "qk_norm", "qkv_bias")
"""Keys of a model's config that decide which parameters it has, and their shapes."""


@dataclass(frozen=True)
class Run:
    """A trained run. Tokenizer, data and model are built when they are first used: a run whose training corpus is gone
    still has the other two.

    file: the checkpoint of the weights, or the weights of a model in Hugging Face's format.
    folder: the run's folder (`folder_of`), or that model's.
    config: the training config, under the current names of its keys.
    data_state: the data module's state in the checkpoint.
    """

    file: CheckpointFile | Weights
    folder: Path
    config: dict[str, Any]
    data_state: Mapping[str, Any]
    accelerator: str
    precision: str

    @property
    def checkpoint(self) -> Path:
        return self.file.path

    @property
    def label(self) -> str:
        """The run's name in tables and pictures."""
        which = "" if self.checkpoint.stem == "last" or isinstance(self.file, Weights) else f"/{self.checkpoint.stem}"
        return f"{self.config['name']}/{self.folder.name}{which}"

    @property
    def start(self) -> list[str]:
        """The overrides with which train.py starts from the weights of `checkpoint`."""
        if isinstance(self.file, Weights):
            return [f"model={GROUP}", f"init_from={PREFIX}{self.folder}"]
        sizes = [f"model={GROUP}"] if self.config["model"].get("name") == GROUP else []
        return [*sizes, f"init_from={self.checkpoint}"]

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence."""
        return self.config["data"]["sequence_length"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer.json; the tokenizer of its corpus where the folder has none."""
        file = self.folder / "tokenizer.json"
        return load_tokenizer(file) if file.is_file() else self.data.tokenizer

    @cached_property
    def data(self) -> DataModule:
        """The training data under the run's tokenizer, set up.

        Raises:
            ConfigError: the corpus is gone, is not the one of the training, or is unknown, as a pretrained model's.
        """
        if isinstance(self.file, Weights):
            accepted = "a run of train.py, or have documents (data=files data.path=...): its own corpus is unknown"
            raise ConfigError(f"checkpoint={PREFIX}{self.folder}: must be {accepted}")
        try:
            data = build_data(with_own_tokenizer(self.config["data"], self.folder))
            data.setup()
            data.check_unchanged(self.data_state, self.label)
        except CorpusError as error:
            raise ConfigError(
                f"checkpoint={self.checkpoint}: cannot open the corpus of its training: {error}"
            ) from None
        return data

    @cached_property
    def model(self) -> Transformer:
        """The model with the weights of `checkpoint`, on the run's device and in its precision."""
        model = build_model(self.config, self.tokenizer.vocabulary)
        if isinstance(self.file, Weights):
            self.file.load(model)
        else:
            load_weights(model, self.file)
        return model.to(device_of(self.accelerator), DTYPES.get(self.precision, torch.float32)).eval()


def open_run(checkpoint: str | Path, accelerator: str, precision: str) -> Run:
    """Opens the run of a checkpoint, and loads its weights; a run folder stands for its last checkpoint.

    Args:
        checkpoint: as model.training.run_folder.find_checkpoint takes it, or `hf:NAME` (configs/pretrained.py).
        accelerator, precision: as Lightning's Trainer takes them; `auto` is a precision, too (`precision_of`).

    Raises:
        CheckpointError: the file cannot be read, or its weights do not fit the model of its config.
        PretrainedError: the same of a model in Hugging Face's format.
    """
    if is_pretrained(checkpoint):
        return open_pretrained(str(checkpoint), accelerator, precision)
    file = CheckpointFile(find_checkpoint(checkpoint, prefer="last"))
    saved = file.read("hyper_parameters")
    config = upgrade(saved["hyper_parameters"])
    precision = precision_of(config, accelerator) if precision == "auto" else precision
    run = Run(file, folder_of(file.path), config, saved.get("DataModule", {}), accelerator, precision)
    run.model  # noqa: B018  (raises the error about weights that do not fit)
    return run


def open_pretrained(name: str, accelerator: str, precision: str) -> Run:
    """As `open_run`, for `hf:NAME`. It has no corpus, and its sequences are as long as the model's longest."""
    groups, folder = groups_of(name), pretrained_folder(name)
    if not (folder / FILE).is_file():
        raise ConfigError(f"checkpoint={name}: must have a {FILE} ({folder / FILE} is missing)")
    config = {"name": "hf", **groups, "data": {"sequence_length": groups["model"]["max_length"]}}
    precision = precision_of(config, accelerator) if precision == "auto" else precision
    run = Run(weights_of(name), folder, config, {}, accelerator, precision)
    run.model  # noqa: B018  (raises the error about weights that do not fit)
    return run


def precision_of(config: Mapping[str, Any], accelerator: str) -> str:
    """Returns the precision in which a run is evaluated by default: that of its training, in which train.py evaluates
    it. It is float32 for pretrained models, and on a CPU for a run that was trained in 16 bits on a GPU."""
    trainer = config.get("trainer", {})
    precision = trainer.get("precision", "32-true")
    elsewhere = device_of(accelerator).type == "cpu" and trainer.get("accelerator") != "cpu"
    return "32-true" if elsewhere and "16" in precision else precision


def start_from(start: str, model: Transformer, data: DataModule) -> None:
    """Loads the weights that `init_from` names into `model`. Warns where they were trained with another tokenizer, and
    tells where they were trained on the same text in the same order."""
    if is_pretrained(start):
        weights_of(start).load(model)
    else:
        file = CheckpointFile(find_checkpoint(start))
        if _same_order(file.read(), data):
            log.info(
                f"init_from={start}: was trained on the same text, and this run begins with what it read first;"
                f" data.seed={data.seed + 1} reads the text in another order"
            )
        _check_rows(start, model.config, file.read())
        load_weights(model, file)
    before = tokenizer_of(start)
    try:
        same = not before.is_file() or load_tokenizer(before).identity() == data.tokenizer.identity()
    except CorpusError:  # not lossless, so the run has another one
        same = False
    if not same:
        log.warning("init_from=%s: its weights were trained with another tokenizer", start)


def check_sizes(start: str, ours: ModelConfig) -> None:
    """Raises ConfigError where the run `start` has other sizes than `ours`, with their keys and values."""
    theirs = upgrade(CheckpointFile(find_checkpoint(start)).read("hyper_parameters")["hyper_parameters"])["model"]
    differ = [
        f"model.{key}={getattr(ours, key)}, there {theirs[key]}"
        for key in SIZES
        if key in theirs and theirs[key] != getattr(ours, key)
    ]
    if differ:
        raise ConfigError(
            f"init_from={start}: must be a run with the sizes of this model: {'; '.join(differ)}; model=hf"
            " attention=... has those of the run"
        )


def _check_rows(start: str, ours: ModelConfig, checkpoint: Mapping[str, Any]) -> None:
    """Raises ConfigError where the embedding of a checkpoint has another number of rows."""
    rows = len(checkpoint["state_dict"]["model.embed_tokens.weight"])
    if rows != ours.vocabulary:
        raise ConfigError(
            f"init_from={start}: must have an embedding of {ours.vocabulary} rows, and has {rows}; leave out "
            f"data/tokenizer=..., which chooses another tokenizer than the weights have, or set model.vocabulary={rows}"
        )


def _same_order(checkpoint: Mapping[str, Any], data: DataModule) -> bool:
    """Returns whether the run of a checkpoint read the sequences of `data` in the same order."""
    return checkpoint.get("DataModule", {}).get("stream") == data.state_dict()["stream"]


def open_documents(run: Run, split: str, data: Mapping[str, Any] | None) -> tuple[Split | InMemoryDocuments, str]:
    """Returns (documents to evaluate `run` on, their name): those of a composed `data` group, or the run's split."""
    if data:
        source, path, policy = build_source(data), data["path"], data["on_bad_document"]
        return InMemoryDocuments.load(source, path, run.tokenizer, policy, split), str(path)
    try:
        splits = run.data.corpus.splits
    except ConfigError as error:
        raise ConfigError(f"{error}; own documents are evaluated with data=files data.path=...") from None
    if split not in splits:
        raise ConfigError(f"evaluation.split={split}: must be one of {', '.join(splits)}")
    return splits[split], split


def units_on(run: Run, data: Mapping[str, Any] | None) -> Units:
    """Returns the units of the losses of `run` on the documents that `open_documents` returns."""
    return units_of(run.tokenizer, build_source(data) if data else run.data.source)


def sources_on(run: Run, data: Mapping[str, Any] | None) -> dict[str, Units]:
    """Returns the units of the losses on each source of a mixture, by its name; {} for a single source. The names of
    the documents that `open_documents` returns begin with the name of their source."""
    return units_by_source(run.tokenizer, build_source(data) if data else run.data.source)


def open_corpus(run: Run) -> Corpus | None:
    """Returns the training corpus of `run`; None, with a warning, where it changed or is gone."""
    try:
        return run.data.corpus
    except ConfigError as error:
        reason = "its training corpus is unknown" if isinstance(run.file, Weights) else error
        log.warning("%s has no bigram baseline: %s", run.label, reason)
        return None


def retokenize(documents: Split | InMemoryDocuments, name: str, first: Run, run: Run) -> Split | InMemoryDocuments:
    """Returns the `documents` of the run `first` under the tokenizer of another run."""
    if isinstance(documents, Split) and not same_corpus(run, first):
        log.warning(
            "%s was trained on another corpus: it may have seen documents of %s's %s", run.label, first.label, name
        )
    if same_tokenizer(run, first):
        return documents
    if isinstance(run.tokenizer, Bins) or isinstance(first.tokenizer, Bins):
        raise ConfigError(
            f"checkpoint={run.checkpoint}: must have the tokenizer of {first.label}: bins of other numbers"
        )
    rows = []
    for number, each in enumerate(documents.names):
        rows.append({"name": each, "text": documents.text(number)})
        if rows[-1]["text"].encode() != documents.raw(number):
            accepted = f"the tokenizer of {first.label}, whose document {each} is not UTF-8: it has no other tokens"
            raise ConfigError(f"checkpoint={run.checkpoint}: must have {accepted}")
    return InMemoryDocuments(rows, run.tokenizer)


def same_corpus(run: Run, other: Run) -> bool:
    """Whether both were trained on the same documents under the same tokenizer. For early checkpoints, which hold no
    fingerprint, the fingerprint of their present corpus is compared. The corpus of a pretrained model is unknown."""
    if isinstance(run.file, Weights) or isinstance(other.file, Weights):
        return False
    contents = [each.data_state.get("contents") or each.data.corpus.contents for each in (run, other)]
    return contents[0] == contents[1]


def same_tokenizer(run: Run, other: Run) -> bool:
    """Whether both runs turn text into the same tokens."""
    return run.tokenizer.identity() == other.tokenizer.identity()
