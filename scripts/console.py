"""What every command shares: how it speaks, and how it fails."""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

if TYPE_CHECKING:
    from rich.console import Console

    from model.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Hydra's own switch: the user sets it to see whole tracebacks."""

_full_error = bool(os.environ.get(FULL_ERROR))

OUR_LOGGERS = ("farsight", "configs", "data", "kernels", "model", "scripts")
"""Loggers whose messages reach the screen from level INFO on; libraries speak from WARNING on."""


def start_logging() -> None:
    """Our messages, bare, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.split(".")[0] in OUR_LOGGERS)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def run(main: Callable[[], None]) -> None:
    """Runs a Hydra command. What Hydra itself refuses (an unknown key, an unknown choice) becomes one line, too."""
    from hydra.errors import ConfigCompositionException, MissingConfigException

    if _full_error:
        return main()
    os.environ[FULL_ERROR] = "1"  # Hydra then raises its exceptions instead of printing them
    try:
        main()
    except MissingConfigException as error:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        options = [option for option in error.options or () if option != "base"]
        sys.exit(_fail(f"{group}={choice}: no such choice; accepted are {', '.join(options)}"))
    except (ConfigCompositionException, OverrideParseException) as error:
        sys.exit(_fail(_explain(error)))
    except ValueError as error:
        if not str(error).startswith("Config group override must be"):
            raise
        sys.exit(_fail(_explain_choice(sys.argv[1:]) or str(error)))
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell says it
    except HydraException as error:  # a job of a sweep failed, and has said why
        sys.exit(_fail(str(error).splitlines()[0]))
    finally:
        os.environ.pop(FULL_ERROR, None)  # for this call alone: processes that start later print single lines


def _explain(error: Exception) -> str:
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None:
        accepted = ", ".join(sorted(str(key) for key in cause.parent_node if key != "hydra"))
        parent = cause.full_key.rpartition(".")[0]
        return f"{cause.full_key}: no such key; " + (
            f"accepted are {accepted}" if accepted else f"{parent} has none here"
        )
    if isinstance(error, OverrideParseException):
        form = "accepted are key=value, key=a,b under -m, and 'key=[a,b]', with quotes around what the shell would read"
        return f"{error.override}: cannot be read as an override; {form}"
    return str(error).splitlines()[0]


def _explain_choice(arguments: Sequence[str]) -> str | None:
    """Which of the overrides gives a config group what is no name (Hydra reads nan, null and 3 as values)."""
    for argument in arguments:
        group, _, choice = argument.partition("=")
        options = sorted(file.stem for file in (CONFIGS / group).glob("*.yaml") if file.stem != "base")
        if choice and options and choice not in options:
            return f"{argument}: no such choice; accepted are {', '.join(options)}"
    return None


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


@contextmanager
def user_errors() -> Iterator[None]:
    """Errors that a user can mend become one line on standard error and exit status 2; HYDRA_FULL_ERROR=1 shows all of
    it.

    Under `-m` the line is printed and the job fails, and the sweep goes on with the next one.
    """
    start_logging()
    try:
        yield
    except Exception as error:
        if _full_error or not is_for_users(error):
            raise
        line = one_line(error)
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            job = " ".join(HydraConfig.get().overrides.task)
            _fail(f"{line}  (job {job}; the sweep goes on)")
            raise HydraException(line) from None
        sys.exit(_fail(line))


def one_line(error: BaseException) -> str:
    """What it says, in a line."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: must be set"
    from model.training.storage import StorageError

    if not isinstance(error, StorageError) and isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error).partition("\n")[0] or type(error).__name__


def is_for_users(error: BaseException) -> bool:
    """Whether the error's own line is enough: a wrong setting, or a file system that refuses a file."""
    from model.training.storage import REFUSALS, StorageError

    return isinstance(error, (StorageError, *user_error_types())) or (
        isinstance(error, OSError) and error.errno in REFUSALS
    )


def user_error_types() -> tuple[type[Exception], ...]:
    """The errors that carry a line for the user. Imported late: most runs end without one."""
    from configs.build import ConfigError
    from data import CorpusError
    from model.training.checkpoints import CheckpointError
    from model.training.endings import DivergedError, RunOutOfMemoryError
    from model.training.module import LayoutOverflowError
    from model.training.run_folder import RunFolderError
    from model.training.slurm import SlurmError

    ours = ConfigError, CorpusError, CheckpointError, RunFolderError, DivergedError, LayoutOverflowError
    return *ours, SlurmError, RunOutOfMemoryError, OmegaConfBaseException


MOVABLE = ("data.path", "data.cache", "data.workers")
"""Settings of the data that a resumed run may change: where the same documents lie, and how they are read."""


def resolve(config: DictConfig) -> dict[str, Any]:
    """The composed config as plain dicts, every interpolation resolved.

    Under `resume`, the config is the run's own, except for what the command line sets: a run that goes on is the same
    run, and classes of others that it names are called only if `trust` names them (configs/trust.py). Other groups
    (another pattern, other data) are a ConfigError: that is what `init_from` is for. The same corpus may lie elsewhere
    (`MOVABLE`); train.py checks its fingerprint.
    """
    from configs.aliases import upgrade
    from configs.build import ConfigError
    from configs.checks import check_types
    from configs.tokenizer import inherit_tokenizer
    from configs.trust import trust, trust_named

    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    check_types(plain)
    if not plain["resume"]:
        own = trust_named(plain)
        return inherit_tokenizer(own, HydraConfig.get().overrides.task) if own["init_from"] else own
    trust(plain.pop("trust", None))  # the run's own config trusts nothing
    from model.training.run_folder import RunFolder, find_checkpoint, folder_of

    run = RunFolder.open(folder_of(find_checkpoint(plain["resume"], prefer="last")))
    saved = with_later_keys(upgrade(run.read_config()), plain)
    for override in HydraConfig.get().overrides.task:
        key, _, value = override.lstrip("+~").partition("=")
        kept = ("attention", "model", "data", "optimizer", "experiment", "seed")
        if re.split("[./@]", key)[0] in kept and key not in MOVABLE:
            raise ConfigError(
                f"{key}={value}: a resumed run keeps its own; to start anew from its weights, give init_from"
            )
        if key == "init_from" and plain["init_from"]:
            raise ConfigError(f"{key}={value}: a run that resumes has weights already; give resume or init_from")
        if key == "trainer.accumulate" and OmegaConf.select(config, key) != saved.trainer.accumulate:
            raise ConfigError(
                f"{key}={value}: must be {saved.trainer.accumulate}, as when the run began: its checkpoint counts "
                "micro-batches, and validations would fall on other steps; to change it, start anew with init_from"
            )
        OmegaConf.update(saved, key, OmegaConf.select(config, key))
    resumed = OmegaConf.to_container(saved, resolve=True)
    resumed.pop("trust", None)
    return resumed


def with_later_keys(saved: Mapping[str, Any], composed: Mapping[str, Any]) -> DictConfig:
    """A run's own config, with the keys that there were none of when the run began: how it is judged in the end, and
    how it may end, may have grown; what it trains on has not."""
    endings = {key: composed["trainer"][key] for key in ("max_seconds", "on_nan", "max_skipped_steps")}
    later = {"evaluation": composed["evaluation"], "preflight": composed["preflight"], "trainer": endings}
    return OmegaConf.merge(later, saved)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error that goes when it is done; call what it gives with how much more was done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda more: bar.advance(task, more)


def print_report(
    console: "Console", row: dict[str, Any], summary: dict[str, Any] | None = None, folder: "RunFolder | None" = None
) -> None:
    """The table that an evaluation ends with, and, with its summary and folder, a run."""
    from rich.table import Table

    documents = f"{row['documents_from']}: {row['documents']} documents, {row['bytes']:,} bytes"
    table = Table(title=f"{documents}, protocol {row['protocol']['name']}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in report_rows(row, summary or {}):
        table.add_row(name, value)
    console.print(table)
    if folder:
        console.print(f"run folder: {folder.path}", soft_wrap=True)


def report_rows(row: dict[str, Any], summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of everything that the table says; what was not measured is left out."""
    baselines = row.get("baselines", {})
    cells = [
        ("loss", row["loss"], "{:.4f} nats/token"),
        ("bits per byte", row["bits_per_byte"], "{:.4f}"),
        ("  gzip -9, per document", baselines.get("gzip_bits_per_byte"), "{:.4f}"),
        ("  bigram model, same tokens", baselines.get("bigram_bits_per_byte"), "{:.4f}"),
        ("perplexity", row["perplexity"], "{:.2f}"),
        ("perplexity per word", row["word_perplexity"], "{:,.1f}"),
        ("loss of a document's first 512 tokens", row["loss_first_512"], "{:.4f}"),
        ("loss of its last quarter", row["loss_last_quarter"], "{:.4f}"),
        ("loss of its last 2,048 tokens", (row["trailing"] or {}).get("loss"), "{:.4f}"),
        *((f"  last tokens, given {c['context']}", c["loss"], "{:.4f}") for c in row.get("by_context", [])),
        ("perplexity on key tokens (LongPPL)", row.get("key_tokens", {}).get("perplexity"), "{:.2f}"),
        ("training speed", summary.get("tokens_per_second"), "{:,.0f} tokens/s"),
        ("attention density, pairs", summary.get("density_pairs"), "{:.1%}"),
        ("attention density, tiles", summary.get("density_tiles"), "{:.1%}"),
        ("peak memory", _peak(summary), "{}"),
        ("parameters", summary.get("parameters"), "{:,}"),
        ("trained on", summary.get("train_tokens"), "{:,} tokens"),
        ("training time", summary.get("train_seconds"), "{:,.0f} s"),
    ]
    return [(name, form.format(value)) for name, value, form in cells if value is not None]


def _peak(summary: dict[str, Any]) -> str | None:
    measured, forecast = summary.get("peak_memory_bytes"), summary.get("forecast", {}).get("peak_memory_bytes")
    if measured is None:
        return None
    return f"{measured / 1e9:.2f} GB" + (f" (forecast {forecast / 1e9:.2f})" if forecast else "")
