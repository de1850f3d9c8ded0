"""Reads weights: one safetensors file, or several (shards) with an index. Files are memory-mapped."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.pretrained.errors import PretrainedError
from model.pretrained.names import HEAD, from_hugging_face, to_hugging_face
from model.training.checkpoints import PATTERNS_OWN

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
"""Files that PyTorch unpickles; a pickle can run code."""

DTYPES = ("BF16", "F16", "F32")
"""The dtypes of weights, as safetensors names them; all become that of the model."""

COMPUTED = ".rotary_emb.inv_freq"
"""End of the name of a buffer in early Llama checkpoints, which follows from config.json."""

EMBEDDING = "embed_tokens.weight"


class Stored(NamedTuple):
    """A tensor of a safetensors file, under its `name` there. `dtype`: as safetensors names it."""

    file: Path
    name: str
    shape: list[int]
    dtype: str


class Weights:
    """The weights of a model in Hugging Face's format.

    Raises:
        PretrainedError: a file is missing or damaged, or a tensor is not a parameter of our model.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.stored: dict[str, Stored] = {}
        """Our name of each parameter -> its tensor."""
        for file, names in files_of(folder).items():
            with reading(file) as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (it has no iterator)
                found = [Stored(file, name, each.get_shape(), each.get_dtype()) for name, each in slices.items()]
            missing = sorted(names - slices.keys())
            if missing:
                raise PretrainedError(f"{file}: must hold {missing[0]}, as {INDEX} lists it")
            for tensor in found:
                self._add(tensor)

    def _add(self, tensor: Stored) -> None:
        if tensor.name.endswith(COMPUTED):
            return
        own, where = from_hugging_face(tensor.name), f"{tensor.file}: {tensor.name}"
        if own is None:
            raise PretrainedError(f"{where}: must be a parameter of Qwen3, Qwen2, Llama or Mistral")
        if own in self.stored:
            raise PretrainedError(f"{where}: must be in one file, and is in {self.stored[own].file.name} as well")
        if tensor.dtype not in DTYPES:
            raise PretrainedError(f"{where} has the dtype {tensor.dtype}: must be one of {', '.join(DTYPES)}")
        self.stored[own] = tensor

    @property
    def path(self) -> Path:
        """The file that stands for all: the single file, or the index of the shards."""
        single = self.folder / SINGLE_FILE
        return single if single.is_file() else self.folder / INDEX

    def check(self, model: nn.Module) -> None:
        """Raises PretrainedError unless every parameter of `model` is stored with its shape, and nothing else is.
        Parameters of an attention pattern need not be. Reads no weights; the model may be on the meta device."""
        own = dict(model.named_parameters())
        tied = {HEAD} - own.keys()  # a head that is tied may be stored besides
        for name in sorted(self.stored.keys() - own.keys() - tied):
            file, theirs, *_ = self.stored[name]
            raise PretrainedError(f"{file}: {theirs}: must be a parameter of the model, by its config.json and model.*")
        for name, parameter in own.items():
            if name in self.stored:
                file, theirs, shape, _ = self.stored[name]
                if shape != list(parameter.shape):
                    accepted = f"{list(parameter.shape)}, by its config.json and model.*"
                    raise PretrainedError(f"{file}: {theirs} has the shape {shape}: must be {accepted}")
            elif PATTERNS_OWN not in name:
                raise PretrainedError(f"{self.folder}: must hold {to_hugging_face(name) or name} in a safetensors file")

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        """Copies the weights into `model` and converts them to its dtype. Parameters of attention patterns that
        the file cannot hold, such as an indexer's, keep their initial values.

        Raises:
            PretrainedError: as `check`; or the head of a model with tied embeddings is stored and differs from them.
        """
        self.check(model)
        own = dict(model.named_parameters())
        for file in dict.fromkeys(tensor.file for tensor in self.stored.values()):
            with reading(file) as handle:
                for name, tensor in self.stored.items():
                    if tensor.file == file and name in own:
                        own[name].copy_(handle.get_tensor(tensor.name))
        if HEAD not in own and HEAD in self.stored:
            head, embedding = self._tensor(HEAD), self._tensor(EMBEDDING)
            if not torch.equal(head, embedding):
                raise PretrainedError(
                    f"{self.stored[HEAD].file}: {HEAD}: must equal the embedding, as tie_word_embeddings=true has it"
                )
        log.info("weights from %s", self.folder)
        for name in sorted(own.keys() - self.stored.keys()):
            log.info("%s is not in %s: it keeps its initial value", name, self.folder)

    def _tensor(self, name: str) -> Tensor:
        with reading(self.stored[name].file) as handle:
            return handle.get_tensor(self.stored[name].name)


def files_of(folder: Path) -> dict[Path, set[str]]:
    """Returns each safetensors file of `folder` with the names that its index lists, none for a single file.

    Raises:
        PretrainedError: a file is missing.
    """
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: set()}
    index = folder / INDEX
    if not index.is_file():
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles:
            raise PretrainedError(
                f"{folder / pickles[0]}: must be converted to safetensors, since a pickle can run code: "
                "AutoModelForCausalLM.from_pretrained(FOLDER, weights_only=True).save_pretrained(NEW_FOLDER) in "
                "transformers"
            )
        raise PretrainedError(f"{folder}: must hold {SINGLE_FILE}, or {INDEX} and its shards")
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, set[str]] = {}
        for name, file in places.items():
            files.setdefault(folder / Path(file).name, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PretrainedError(f"{index}: must be JSON with weight_map: a file for each name") from None
    for file in files:
        if not file.is_file():
            raise PretrainedError(f"{file}: must exist, as {INDEX} lists it, and is missing")
    return files


@contextmanager
def reading(file: Path) -> Iterator[Any]:
    """Opens a safetensors file, whose tensors are read from the disk when they are used."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise PretrainedError(f"{file}: must be a whole safetensors file: {reason}") from None
    with opened as handle:
        yield handle
