"""fit(): one training run around Lightning's loop, from a built model to a summary."""

import logging
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger

from model.precision import devices_of
from model.training.checkpoints import (
    AtomicCheckpointIO,
    CheckpointFile,
    Checkpoints,
    check_resumable,
    go_back_to,
)
from model.training.efficiency import Efficiency, FetchTimer
from model.training.failures import (
    OUT_OF_MEMORY,
    RunOutOfMemoryError,
    is_out_of_memory,
    out_of_memory_message,
)
from model.training.interrupt import Interrupt, Interrupted
from model.training.metrics import MetricsCSV, Recorder
from model.training.module import LanguageModel
from model.training.phases import Phase, Phases
from model.training.profiling import StepProfiler
from model.training.progress import Progress
from model.training.ranks import Ranks
from model.training.run_folder import RunFolder, config_hash, resume_command
from model.training.run_length import FOREVER, RunLength
from model.training.slurm import cluster_environment
from model.training.step_checks import StepChecks
from model.training.storage import StorageError
from model.training.strategies import build_strategy

log = logging.getLogger(__name__)

FILE_ALONE = {"file_alone": True}
"""Attributes of a log record for train.log alone: the command prints the same line when the run ends."""

TRAINED = "trained"
"""The `state` in summary.json of a run that is trained to its end and not evaluated yet."""


@dataclass(frozen=True)
class FitResult:
    """The end of a run that did not fail."""

    state: str  # "finished" or "interrupted" (and then resumable)
    step: int  # optimizer steps done, over all sessions
    summary: dict[str, Any]  # as in summary.json
    best: Path | None  # the checkpoint of the lowest validation loss
    last: Path | None


def fit(
    module: LanguageModel,
    datamodule: LightningDataModule,
    folder: RunFolder,
    *,
    max_steps: int | None,
    max_seconds: float | None,
    accumulate: int,
    gradient_clip: float | None,
    validate_every: int | None,
    save_every: int | None,
    log_every: int,
    precision: str,
    accelerator: str,
    devices: int | str,
    nodes: int,
    strategy: str,
    context_parallel: int,
    rank_timeout: float,
    on_nan: str,
    max_skipped_steps: int,
    cuda_graph: bool | str = False,
    profile: int | None = None,
    phases: Sequence[Phase] = (),
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
    resume: CheckpointFile | None = None,
    forecast: Mapping[str, Any] | None = None,
) -> FitResult:
    """Trains `module` until `max_steps` or `max_seconds`, or until SIGTERM, SIGUSR1 or Ctrl-C. The run can be continued
    in each case.

    Args:
        datamodule: batches, the units of their losses and the tokens of a pass, as data.DataModule has them.
        folder: the run's folder; metrics.csv, summary.json and checkpoints/ are written there.
        max_steps: optimizer steps of the whole run, and the end of the learning-rate schedule; None for no limit.
        max_seconds: measured seconds of training of the whole run (run_length.py), which the schedule then follows;
            None for no limit. The limit that is reached first ends the run.
        accumulate: micro-batches per step; their gradients are weighted by scored tokens (module.py).
        gradient_clip: largest norm of the gradient; None for no clipping.
        validate_every: optimizer steps between validations, which also follow the last step; None for no validation.
        save_every: optimizer steps between further saves of last.ckpt, besides those after validations; None for none.
        log_every: optimizer steps between rows of metrics.csv.
        precision, accelerator, devices, strategy: as Lightning's Trainer takes them; `ddp` and `fsdp2` are those of
            strategies.py, and `auto` is `ddp` on several devices.
        nodes: machines with `devices` each.
        context_parallel: ranks that share each sequence, a divisor of the number of ranks. `datamodule` must then give
            the same batch to ranks that share one.
        rank_timeout: seconds without a finished batch after which a run on several ranks ends (ranks.py).
        on_nan: "stop" ends the run at a loss or gradient that is not finite. "skip_step" leaves weights and optimizer
            unchanged and continues; each step then waits for the device.
        max_skipped_steps: largest number of skipped steps in the whole run.
        cuda_graph: replay forward and backward passes from a CUDA graph (step_graph.py), on one GPU. "auto": steps that
            cannot be captured run kernel by kernel, with a warning.
        profile: steps to profile (profiling.py); None for none.
        phases: those of a run whose sequences or windows grow (phases.py); `datamodule` must give the sequences.
        loggers, callbacks: further ones (wandb, ...).
        resume: a checkpoint to continue from, exactly. Rows of metrics.csv and the best score are kept, and the
            folder's config.yaml becomes the module's config.
        forecast: the run's memory forecast, for summary.json and for the message of an out-of-memory error.

    Raises:
        CaptureError: `cuda_graph` is true, and a step cannot be captured; the state in summary.json is `failed`.
        CheckpointError: `resume` does not fit the model, or a run cannot continue from it. No file has changed.
        DivergedError: the loss or gradient is not finite; the state in summary.json is `failed`.
        RankLostError: another rank was killed, has failed or hangs; the state in summary.json is that rank's.
        RunOutOfMemoryError: a device ran out of memory; the state in summary.json is `out of memory`.
        StorageError: a file cannot be written; the state in summary.json is `failed`, and last.ckpt is the last whole
            one.
    """
    module.checks = StepChecks(on_nan, max_skipped_steps, folder.checkpoints / "last.ckpt")
    module.context_parallel, module.cuda_graph = context_parallel, cuda_graph
    if context_parallel > 1:
        datamodule.ranks_per_sequence = context_parallel
    quieten_lightning()
    fetch_timer, interrupt, ranks = FetchTimer(), Interrupt(), Ranks(folder, rank_timeout)
    efficiency = Efficiency(fetch_timer)
    run_length = RunLength(max_steps, max_seconds, efficiency)
    progress = Progress(run_length, datamodule.units)
    module.ends = [max_steps, max_seconds]
    if max_seconds is not None:
        module.progress = lambda: run_length.progress
    metrics = MetricsCSV(folder.metrics_file)
    growth = Phases(phases, efficiency) if phases else None
    recorder = Recorder(log_every, metrics, efficiency, run_length, progress, growth)
    checkpoints = Checkpoints(folder.checkpoints, interrupt, run_length, validate_every, save_every)
    several = devices_of({"accelerator": accelerator, "devices": devices, "nodes": nodes}) > 1
    trainer = Trainer(
        max_steps=max_steps or FOREVER,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=gradient_clip,
        val_check_interval=(validate_every or 1) * accumulate,  # Lightning counts micro-batches here
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if validate_every else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=log_every,  # for further callbacks; ours are logged by metrics.Recorder
        precision=precision,
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=build_strategy("ddp" if strategy == "auto" and several else strategy, ranks),
        # The order matters: a step is measured, logged, shown, and saved last, so that a checkpoint holds all of these.
        callbacks=[
            interrupt,
            efficiency,
            run_length,
            recorder,
            progress,
            *callbacks,
            *([StepProfiler(profile, folder.path, efficiency)] if profile else []),
            *([growth] if growth else []),
            checkpoints,
            ranks,
        ],
        logger=[metrics, *loggers],
        plugins=[AtomicCheckpointIO(resume), *cluster_environment()],
        profiler=fetch_timer,
        use_distributed_sampler=False,  # the DataModule gives each rank its share of one seeded stream
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder.path,
    )

    rank_zero = trainer.is_global_zero
    if resume:
        check_resumable(resume, datamodule, [efficiency, recorder, checkpoints])
        if rank_zero:
            folder.replace_config(dict(module.hparams))
            if checkpoints.best.exists() and resume.path.samefile(checkpoints.best):
                go_back_to(checkpoints.best, checkpoints.last)
    if rank_zero:
        entry = {"forecast": dict(forecast)} if forecast else {}
        entry |= {"units": dict(datamodule.units), "tokens_per_pass": datamodule.tokens_per_pass}
        folder.start_summary(state="running", **_facts(module, trainer), **entry)
    state, short = "failed", None
    try:
        with interrupt:
            path = resume.path if resume else None
            trainer.fit(module, datamodule=datamodule, ckpt_path=path, weights_only=True if path else None)
        state = "finished"
        if validate_every and not module.validation_metrics:  # resumed after its last step, where no validation ran
            trainer.validate(module, datamodule=datamodule, verbose=False)
    except Interrupted as request:
        state = "interrupted"
        if rank_zero:
            log.warning("interrupted by %s; continue with: %s", request, resume_command(folder.path))
    except Exception as error:
        lost = ranks.lost(error)
        if lost is not None:
            state = lost.state
            raise lost from None
        if not is_out_of_memory(error):
            raise
        state, step = OUT_OF_MEMORY, trainer.global_step
        short = error.with_traceback(None)  # whose frames hold the step's tensors
    except SystemExit as stop:  # Lightning's answer to KeyboardInterrupt, and the end of a Hydra sweep
        raise KeyboardInterrupt from stop
    finally:
        ranks.stop(failed=state not in ("finished", "interrupted"))
        # Without a step in this session, the numbers of an earlier session stay.
        measured = efficiency.summary() if efficiency.session_steps else {}
        written = TRAINED if state == "finished" else state  # "finished" means trained and evaluated
        summary = measured | _quality(module) | {"state": written, "step": trainer.global_step}
        if module.bytes_sent is not None:
            summary["context_bytes_sent"] = module.bytes_sent
        if module.checks.skipped_steps:
            summary["skipped_steps"] = module.checks.skipped_steps
        if rank_zero:
            summary = _write_summary(folder, summary)
    if short is not None:
        message = out_of_memory_message(short, step, trainer.strategy.root_device, forecast)
        if rank_zero:
            log.error(message, extra=FILE_ALONE)
        raise RunOutOfMemoryError(message, reported=getattr(short, "reported", False))
    return FitResult(
        state=state,
        step=trainer.global_step,
        summary=summary,
        best=checkpoints.best if checkpoints.best.exists() else None,
        last=checkpoints.last if checkpoints.last.exists() else None,
    )


def _write_summary(folder: RunFolder, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the run's end to summary.json. Where that fails, the run is marked as failed; a run that failed before
    raises its own error instead of this one."""
    try:
        return folder.write_summary(**summary)
    except StorageError as error:
        folder.mark_failed()
        if summary["state"] in (TRAINED, "interrupted"):
            raise
        log.error(str(error))
        return dict(summary)


def _facts(module: LanguageModel, trainer: Trainer) -> dict[str, Any]:
    device, config = trainer.strategy.root_device, dict(module.hparams)
    return {
        "seed": config.get("seed"),
        "config_hash": config_hash(config),
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "devices": trainer.world_size,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
    }


def _quality(module: LanguageModel) -> dict[str, float]:
    """The latest validation, for summary.json: validation_loss, validation_bits_per_byte, ..."""
    return {key.replace("/", "_"): value for key, value in module.validation_metrics.items()}


def quieten_lightning() -> None:
    """Silences Lightning's tips and hardware lists, and those of its warnings that are wrong for these runs."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # packed tokens are read from a memory map
        ".*dataloader is not resumable.*",  # the DataModule is, by its cursor
        ".*is smaller than the logging interval.*",  # the last step is always logged
        ".*LeafSpec.* is deprecated.*",  # Lightning's own code
    ):
        warnings.filterwarnings("ignore", message)
