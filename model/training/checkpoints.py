"""Checkpoints: last.ckpt and best.ckpt, and what makes resuming exact.

Lightning stores and restores weights, optimizer, schedule, loop counters and the data cursor. Its ModelCheckpoint is
not used, for it saves `last` only where `best` improved, forgets the best score when the folder has moved, and loses
the validation of a step at which it saved before validating. The callback below saves at two kinds of moments:

- after a validation: last.ckpt, and best.ckpt where the loss is the lowest so far;
- after an optimizer step, never within an accumulation: every `save_every` steps, on an interrupt, and at the end. If
  a validation belongs to that step, the checkpoint says that it is still owed, and the resumed run does it first.

A file is written beside its place, flushed to the disk and renamed: a crash leaves the old one. (Lightning writes to
the system's temporary folder and moves the file from there, which across file systems is a plain copy.)
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from model.training.horizon import Horizon
from model.training.interrupt import Interrupt, Interrupted

log = logging.getLogger(__name__)

PATTERNS_OWN = ".self_attn.attend."
"""In the name of every parameter that belongs to an attention pattern, and not to every model of these sizes."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads and writes whole files: all or nothing, and nothing but tensors and plain values."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> dict:
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a .ckpt file. Only tensors and plain values are unpickled (weights_only=True).

    Keys: `state_dict` (the Transformer's as `model.*`), `hyper_parameters` (the whole resolved config, plain dicts),
    `global_step`, and Lightning's other ones.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except Exception as error:  # torch has a different exception for each way in which a file can be broken
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is not a readable checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is not a checkpoint of this project: it has no state_dict")
    return checkpoint


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a Transformer's weights, and nothing else, from a checkpoint (`init_from`). The pattern may differ: what
    belongs to a pattern alone (`*.self_attn.attend.*`: pools of summaries, ...) is left out where the model has none,
    and keeps its initial value where the checkpoint has none; the log names it.

    Raises:
        CheckpointError: names every other parameter that is missing or unknown, and all of another shape.
    """
    state = read_checkpoint(path)["state_dict"]
    weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    own = model.state_dict()
    for key in sorted(key for key in weights.keys() ^ own.keys() if PATTERNS_OWN in key):
        if key in own:
            weights[key] = own[key]
            log.info("%s is not in %s: it starts anew", key, path)
        else:
            del weights[key]
            log.info("%s of %s is left out: this pattern has none", key, path)
    check_keys(model, weights, str(path))
    model.load_state_dict(weights)
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
        horizon: Horizon,
        validate_every: int | None,
        save_every: int | None,
    ):
        self.last, self.best = folder / "last.ckpt", folder / "best.ckpt"
        self.interrupt, self.horizon = interrupt, horizon
        self.validate_every, self.save_every = validate_every, save_every
        self.best_loss = float("inf")
        self.best_step: int | None = None
        self.owes_validation = False
        # For the next training batch. Kept from before a validation or a stop, since every data iterator that Lightning
        # makes in between draws a seed from PyTorch's generator.
        self.random_state: dict[str, Any] | None = None

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if not module.stepped:
            return
        step, at_end = trainer.global_step, self.horizon.over
        if at_end:
            trainer.should_stop = True  # Lightning then validates after this step, even if it is off the beat
        interrupted = not at_end and self.interrupt.requested(trainer)  # at the end there is nothing left to interrupt
        due = bool(self.validate_every) and (step % self.validate_every == 0 or at_end)
        if due:
            self.random_state = _random_state()
        if interrupted or at_end or (self.save_every and step % self.save_every == 0 and not due):
            self.owes_validation = due
            self._save(trainer, module, self.last)
        if interrupted:
            raise Interrupted(f"{self.interrupt.received or 'another process'} at step {step}")

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        within_fit = trainer.state.fn == "fit" and not self.horizon.over
        if within_fit and self.interrupt.requested(trainer):
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
        module.check_sound()  # a checkpoint of NaNs would be worse than an older one
        trainer.save_checkpoint(path, weights_only=False)

    # Resuming

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.owes_validation:  # the whole of it, by the means of Lightning's own sanity check
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
    """Of PyTorch, for dropout and the like; the data have their own seeds."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
