"""Trains a language model on long documents with sparse attention, and reports its cost and its quality.

Examples; configs/ and --help list all settings:

    python train.py                                          the default: a small model, windows, the standard library
    python train.py attention=strided data.sequence_length=8192      another pattern, longer sequences
    python train.py -m attention=dense,window,strided        one run after another
    python train.py -m sweep=patterns seed=1,2               a sweep: equal budgets, resumable, with a report
    python train.py resume=outputs/window/2026-01-31_12-00-00_000000      resume a run
"""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

log = logging.getLogger("farsight")


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    from scripts.console import user_errors

    with user_errors():
        from configs.resolve import resolve
        from model.training.run_folder import RUN_FOLDER

        run_folder = os.environ.get(RUN_FOLDER)
        settings = resolve(config, new=not run_folder and not os.environ.get("SLURM_RESTART_COUNT"))

        from lightning.pytorch.utilities import rank_zero_only

        from scripts.sweeping.worker import run_as_job

        if run_folder and rank_zero_only.rank == 0:
            sys.exit(run_as_job(settings, train))
        summary = train(settings, Path(run_folder) if run_folder else None)
        if summary["state"] == "interrupted":
            raise KeyboardInterrupt  # the run is saved; with -m no other may start


def train(config: dict[str, Any], path: Path | None = None) -> dict[str, Any]:
    """Checks a resolved config, builds the run, trains and evaluates it. Returns the run's summary.

    path: the run folder. If a run of the same config has started in it, that run resumes from its last checkpoint.
        None: the folder of `resume`, or of a requeued SLURM job, or a new one under `outputs`.
    """
    from lightning import seed_everything
    from lightning.pytorch.utilities import rank_zero_only
    from rich.console import Console

    from configs.aliases import upgrade
    from configs.build import build_loggers, build_model
    from configs.checks import check
    from configs.evaluation import evaluate_trained
    from configs.forecasting import forecast_before_training
    from configs.graphed_step import resolve_cuda_graph
    from configs.runs import start_from
    from configs.tokenizer import as_resumed
    from model.decoding import decoding_cost
    from model.precision import OF_THE_MODEL, SHARDED, describe_device
    from model.training.checkpoints import CheckpointFile, load_weights
    from model.training.fit import fit
    from model.training.module import LanguageModel
    from model.training.run_folder import (
        TEST_RESULTS,
        RunFolder,
        find_checkpoint,
        folder_of,
        new_run_path,
        telling_other_ranks,
    )  # fmt: skip
    from model.training.slurm import check_tasks, slurm_run_path
    from model.training.storage import replacing
    from scripts.console import progress_bar
    from scripts.reporting.pictures import draw_loss_by_position, draw_patterns
    from scripts.reporting.run_table import print_report

    first_rank = rank_zero_only.rank == 0
    if not first_rank:
        logging.getLogger().setLevel(logging.WARNING)  # the first rank logs it
    check_tasks(config["trainer"]["devices"], config["trainer"]["nodes"])
    if path is None and not config["resume"]:
        path = slurm_run_path(config)
    resumes = bool(config["resume"]) or (path is not None and RunFolder(path).goes_on)
    composed, resumed = config, None
    if resumes:
        start = find_checkpoint(config["resume"] or path, prefer="last")
        resumed = CheckpointFile(start)
        earlier = RunFolder(folder_of(start))
        finished = earlier.finished_as(config, upgrade(earlier.read_config()), start)
        if finished:
            log.info("nothing to do: %s has finished at step %s", folder_of(start), finished["step"])
            return finished
        composed = as_resumed(config, folder_of(start))
    checked = check(composed)
    seed_everything(config["seed"], verbose=False)
    data = checked.data
    data.setup()
    if resumed:
        data.check_unchanged(resumed.read().get("DataModule", {}), str(folder_of(resumed.path)))
    forecast, warning = forecast_before_training(composed, data, checked.plan)
    model = build_model(config, data.vocabulary, checked.plan)
    if config["init_from"] and not resumes:
        start_from(config["init_from"], model, data)
    model.train_in_fp8(config["trainer"]["fp8"])
    if config["trainer"]["compile"]:
        model.compile_layers(phases=max(1, len(checked.phases)))

    with contextlib.ExitStack() as stack:
        # The config is valid, so that the run folder can be created.
        if config["resume"]:
            folder, checkpoint = RunFolder.open(folder_of(start)), start
        elif not first_rank:
            folder, checkpoint = RunFolder.of_first_rank(path)
        else:
            folder, checkpoint = RunFolder(path or new_run_path(config["outputs"], config["name"])), None
        if first_rank:
            stack.enter_context(folder.locked())
            if path is not None and not config["resume"]:
                folder, checkpoint = RunFolder.create_or_continue(folder.path, config)
            elif not config["resume"]:
                folder = RunFolder.create(folder.path, config)
            stack.enter_context(folder.logging_to_file())
            log.info("run folder: %s", folder.path)
            log.info("device: %s", describe_device(config["trainer"]))
            if not (resumes and (folder.path / "tokenizer.json").is_file()):
                with replacing(folder.path / "tokenizer.json") as file:
                    data.tokenizer.save(Path(file.name))
        if warning:
            log.warning(warning)
        log.info(f"corpus {data.corpus.fingerprint[:12]}, {data.describe_training()}")
        module = LanguageModel(model, config["optimizer"], data.token_bytes, config)
        loggers = build_loggers(config["logger"], config, folder)
        trainer = {key: value for key, value in config["trainer"].items() if key not in OF_THE_MODEL}
        if checkpoint and not (resumed and resumed.path.absolute() == checkpoint.absolute()):
            resumed = CheckpointFile(checkpoint)  # saved by a process that held the folder until now
        resume = resumed if checkpoint else None
        with telling_other_ranks(folder):
            settings = trainer | {"phases": checked.phases, "forecast": forecast}
            settings["cuda_graph"] = resolve_cuda_graph(config, forecast, log_reason=True)
            result = fit(module, data, folder, **settings, loggers=loggers, resume=resume)
        if result.state != "finished" or not first_rank:
            return result.summary
        if config["trainer"]["strategy"] == SHARDED:  # this process holds a share of the weights, and is alone now
            model = build_model(config, data.vocabulary)
            load_weights(model, CheckpointFile(result.last))
        if data.text_sources == []:
            log.warning(
                "%s was trained on no text, and its bits per byte below are those of text; what it recalls:"
                " python scripts/evaluate.py suite=recall checkpoint=%s",
                *(config["name"], folder.path),
            )
        row = evaluate_trained(model, data, folder.path, config, progress_bar)
        marks = {"lossy_tokenizer": True} if data.tokenizer.lossy else {}
        marks |= decoding_cost(model, config["data"]["sequence_length"], config["trainer"]["precision"])
        summary = folder.write_summary(state="finished", **{key: row[key] for key in TEST_RESULTS}, **marks)
    draw_patterns(
        model.plan.patterns, config["data"]["sequence_length"], folder.report / "pattern.png", model.plan.block
    )
    draw_loss_by_position([row], [config["name"]], folder.report / "loss_by_position.png")
    print_report(Console(), row, summary, folder)
    return summary


def command() -> None:
    """Starts a sweep for `-m` with `sweep=`, and Hydra otherwise."""
    if is_sweep(sys.argv[1:]):
        from scripts.sweeping.launch import launch

        sys.exit(launch(sys.argv[1:], train))
    main()


def is_sweep(arguments: list[str]) -> bool:
    return any(flag in arguments for flag in ("-m", "--multirun")) and any(a.startswith("sweep=") for a in arguments)


if __name__ == "__main__":
    from scripts.console import run

    run(command)
