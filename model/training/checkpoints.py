"""Checkpoints: last.ckpt and best.ckpt, saved so that a resumed run is exact.

Lightning stores and restores weights, optimizer, schedule, loop counters and the data cursor. Its ModelCheckpoint is
not used: it saves `last` only where `best` improved, loses the best score when the folder has moved, and skips the
validation of a step at which it saved first. The callback below saves at two kinds of moments:

- after a validation: last.ckpt, and best.ckpt if the loss is the lowest so far;
- after an optimizer step, never within an accumulation: every `save_every` steps, on an interrupt, and at the end. If
  a validation is due at that step, the checkpoint holds `owes_validation`, and a resumed run validates first.

A file is written under another name in its folder, flushed to the disk and renamed, so a crash leaves the old one.
(Lightning moves a file from the system's temporary folder, which across file systems is a copy.)
"""

import copy
import errno
import logging
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from model.training.interrupt import Interrupt, Interrupted
from model.training.run_length import RunLength
from model.training.storage import make_folder, replacing

log = logging.getLogger(__name__)

PATTERNS_OWN = ".self_attn.attend."
"""Part of the name of every parameter that only models with its attention pattern have."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model."""


class CheckpointFile:
    """A checkpoint that is read once, memory-mapped. It is read again only if another file has taken its place."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._content: dict[str, Any] | None = None
        self._read_file: tuple[int, ...] = ()

    def read(self, *needed: str) -> dict[str, Any]:
        """Returns `read_checkpoint` of the file. Tensors are read from the disk when they are used."""
        present = self._identity()
        if self._content is None or self._read_file != present:
            self._content, self._read_file = read_checkpoint(self.path, *needed), present
        return self._content

    def close(self) -> None:
        """Forgets the content, so that a file that is replaced does not keep its place on the disk."""
        self._content = None

    def _identity(self) -> tuple[int, ...]:
        try:
            status = self.path.stat()
        except OSError:
            return ()
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads and writes whole files: all or nothing, and nothing but tensors and plain values.

    resume: the file that training continues from; its content is not read from the disk again.
    """

    def __init__(self, resume: CheckpointFile | None = None) -> None:
        super().__init__()
        self.resume = resume

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        make_folder(path.parent)
        # One name for every process: a kill leaves one such file at most, and the next save replaces it.
        with replacing(path, _tensor_bytes(checkpoint), path.with_name(f"{path.name}.partial")) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> dict:
        own = self.resume is not None and self.resume.path.absolute() == Path(path).absolute()
        file = self.resume if own else CheckpointFile(path)
        content = file.read()
        file.close()
        # On a CPU the optimizer keeps the tensors of its state; without a copy they would keep the replaced file, too.
        return {**content, **{key: copy.deepcopy(content[key]) for key in ("optimizer_states",) if key in content}}


def _tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested mappings and sequences."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(map(_tensor_bytes, value))


NEEDED = (
    *("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step", "epoch"),
    *("hyper_parameters", "pytorch-lightning_version"),
)
"""Keys of a checkpoint that an exact resume needs."""


def check_resumable(file: CheckpointFile, data: LightningDataModule, callbacks: Sequence[Callback]) -> None:
    """Raises CheckpointError unless a run can continue from `file`: it is undamaged, and holds the state of the
    trainer, the position in the data, and the state of `callbacks`."""
    path, checkpoint = file.path, file.read()
    with zipfile.ZipFile(path) as archive:  # PyTorch compares no checksums
        damaged = archive.testzip()
    if damaged:
        raise _unreadable(path, f"it is damaged: the checksum of {damaged} differs")
    missing = [key for key in NEEDED if checkpoint.get(key) in (None, [], {})]
    name = type(data).__qualname__
    saved = checkpoint.get(name) or {}
    missing += [f"{name}.{key}" for key in ("cursor", "stream") if key in data.state_dict() and key not in saved]
    saved = checkpoint.get("callbacks") or {}
    for callback in callbacks:
        state = saved.get(callback.state_key, {})
        keys = callback.state_dict().keys() - state.keys() - set(OPTIONAL)
        missing += [f"callbacks.{callback.state_key}.{key}" for key in sorted(keys)]
    if missing:
        raise CheckpointError(
            f"{path}: a run cannot be resumed from it: it has no {', '.join(missing)}; to start a new run from its "
            f"weights, give init_from={path}" + _alternative(path)
        )


OPTIONAL = "measured_seconds", "costs", "logged", "earlier_phases", "other_bytes"
"""Keys of callbacks that have defaults: early checkpoints do not hold them."""


def go_back_to(best: Path, last: Path) -> None:
    """Copies `best` over `last`: the run continues from there, and its later steps are dropped."""
    with replacing(last, best.stat().st_size) as file, open(best, "rb") as source:
        shutil.copyfileobj(source, file)


def read_checkpoint(path: str | Path, *needed: str) -> dict[str, Any]:
    """Returns the content of a .ckpt file: `state_dict` (the Transformer's as `model.*`), `hyper_parameters` (the whole
    resolved config, plain dicts), `global_step`, and Lightning's other keys.

    Tensors are memory-mapped: what is never used, as the optimizer's state in an evaluation, is never read. Only
    tensors and plain values are unpickled (weights_only=True).

    Args:
        needed: keys of mappings that it must hold besides `state_dict`.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or a key is missing.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except Exception as error:  # torch has a different exception for each way in which a file can be broken
        # Not `from error`: PyTorch's own message advises to load the file with weights_only=False, which runs its code.
        raise _unreadable(path, _reason(Path(path), error)) from None
    for key in ("state_dict", *needed):
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), dict):
            raise CheckpointError(f"{path} is not a checkpoint of this project: it has no {key}")
    return checkpoint


def _unreadable(path: str | Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a readable checkpoint: {reason}{_alternative(Path(path))}")


def _reason(path: Path, error: Exception) -> str:
    """Why PyTorch could not load the file, without PyTorch's advice."""
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a truncated file gives a negative offset
        return str(error.strerror)
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"it names {refused[1]}, and must hold only tensors and plain values; no code of the file was run"
    if path.stat().st_size == 0:
        return "it is empty"
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            is_start_of_zip = file.read(2) == b"PK"
        return "it is truncated" if is_start_of_zip else "it is not a file of torch.save"
    first_line = str(error).partition("\n")[0]
    return type(error).__name__ if "weights_only" in first_line else first_line or type(error).__name__


def _alternative(path: Path) -> str:
    """The other checkpoint of the same run, where it can be read, as the end of a message."""
    if path.parent.name != "checkpoints" or path.name not in ("last.ckpt", "best.ckpt"):
        return ""
    other = path.with_name("best.ckpt" if path.name == "last.ckpt" else "last.ckpt")
    try:
        step = torch.load(other, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception:  # missing, or broken as well
        return ""
    return f"; the run's other checkpoint can be read: {path.parent.parent / other.stem}, of step {step}"


def load_weights(model: nn.Module, file: CheckpointFile) -> None:
    """Loads a Transformer's weights, and nothing else, from a checkpoint (`init_from`). The pattern may differ: weights
    that belong to a pattern alone (`*.self_attn.attend.*`: pools of summaries, ...) are left out where the model has
    none, and keep their initial value where the checkpoint has none; the log names them.

    Raises:
        CheckpointError: names every other parameter that is missing or unknown, and all of another shape.
    """
    path, state = file.path, file.read()["state_dict"]
    weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    own = model.state_dict()
    for key in sorted(key for key in weights.keys() ^ own.keys() if PATTERNS_OWN in key):
        if key in own:
            weights[key] = own[key]
            log.info("%s is not in %s: it keeps its initial value", key, path)
        else:
            del weights[key]
            log.info("%s of %s is left out: this pattern has none", key, path)
    check_keys(model, weights, str(path))
    model.load_state_dict(weights)
    file.close()
    log.info("weights from %s", path)


def check_keys(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Raises CheckpointError unless `weights` fit `model` exactly."""
    own = model.state_dict()
    problems = [f"the model has no {key}" for key in weights.keys() - own.keys()]
    problems += [f"the checkpoint has no {key}" for key in own.keys() - weights.keys()]
    problems += [
        f"{key} is {list(weights[key].shape)} in the checkpoint and {list(own[key].shape)} in the model"
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{source}: the checkpoint does not fit the model: {shown}")


class Checkpoints(Checkpoint):
    """Saves last.ckpt and best.ckpt into `folder`.

    Args:
        validate_every: optimizer steps between validations; None where there are none.
        save_every: optimizer steps between further saves of last.ckpt; None for none.
    """

    def __init__(
        self,
        folder: Path,
        interrupt: Interrupt,
        run_length: RunLength,
        validate_every: int | None,
        save_every: int | None,
    ):
        self.last, self.best = folder / "last.ckpt", folder / "best.ckpt"
        self.interrupt, self.run_length = interrupt, run_length
        self.validate_every, self.save_every = validate_every, save_every
        self.best_loss = float("inf")
        self.best_step: int | None = None
        self.owes_validation = False
        # The state before a validation or a stop, which the next training batch needs: every data iterator that
        # Lightning makes in between draws a seed from PyTorch's generator.
        self.random_state: dict[str, Any] | None = None

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if not module.stepped:
            return
        step, at_end = trainer.global_step, self.run_length.over
        if at_end:
            trainer.should_stop = True  # Lightning then validates after this step in any case
        interrupted = not at_end and self.interrupt.requested(module)  # the last step is saved anyway
        due = bool(self.validate_every) and (step % self.validate_every == 0 or at_end)
        if due:
            self.random_state = _random_state()
        if interrupted or at_end or (self.save_every and step % self.save_every == 0 and not due):
            self.owes_validation = due
            self._save(trainer, module, self.last)
        if interrupted:
            raise Interrupted(f"{self.interrupt.received or 'another process'} at step {step}")

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        within_fit = trainer.state.fn == "fit" and not self.run_length.over
        if within_fit and self.interrupt.requested(module):
            self.owes_validation = True
            self._save(trainer, module, self.last)
            raise Interrupted(
                f"{self.interrupt.received or 'another process'} in the validation of step {trainer.global_step}"
            )

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        self.owes_validation = False
        loss = module.validation_metrics["validation/loss"]
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, trainer.global_step
            self._save(trainer, module, self.best)
        self._save(trainer, module, self.last)

    def _save(self, trainer: Trainer, module: LightningModule, path: Path) -> None:
        module.checks.check()  # an older checkpoint is better than one of NaNs
        trainer.save_checkpoint(path, weights_only=False)

    # Resuming

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.owes_validation:  # all of it, as Lightning runs its sanity check
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False
            trainer.validating = True
            validation.run()
            trainer.training = True

    def on_train_batch_start(self, *_: Any) -> None:
        if self.random_state is not None:
            _set_random_state(self.random_state)
            self.random_state = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "owes_validation": self.owes_validation,
            "random_state": self.random_state or _random_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss, self.best_step = state_dict["best_loss"], state_dict["best_step"]
        self.owes_validation, self.random_state = state_dict["owes_validation"], state_dict["random_state"]


def _random_state() -> dict[str, Any]:
    """The state of PyTorch's generators, which dropout uses; the data have seeds of their own."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
