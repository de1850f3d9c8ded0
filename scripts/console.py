"""Logging, one-line errors and progress bars for all commands."""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from scripts.standard_output import output_may_close

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Environment variable of Hydra that makes errors appear with their tracebacks."""

SINGLE_LINES = "FARSIGHT_SINGLE_LINES"
"""Environment variable of the ranks that a command starts: FULL_ERROR is the command's and not the user's."""

SECONDS_BETWEEN_LINES = 60
"""Seconds between two lines of progress where there is no terminal."""

_full_error = bool(os.environ.get(FULL_ERROR)) and not os.environ.get(SINGLE_LINES)

OUR_LOGGERS = ("farsight", "configs", "data", "kernels", "model", "scripts")
"""Loggers whose messages appear from level INFO; those of libraries appear from WARNING."""


def start_logging() -> None:
    """Sends log messages to standard error, without prefixes."""
    handler = _StandardError()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(_is_shown)
    handler.addFilter(lambda record: not getattr(record, "file_alone", False))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _is_shown(record: logging.LogRecord) -> bool:
    """Whether a message is ours, or a library's warning that the library itself does not write to standard error."""
    library = record.name.split(".")[0]
    if library in OUR_LOGGERS:
        return True
    own = any(isinstance(handler, logging.StreamHandler) for handler in logging.getLogger(library).handlers)
    return record.levelno >= logging.WARNING and not own


class _StandardError(logging.StreamHandler):
    """Writes to `sys.stderr` as it is at that time: while rich shows a bar, lines appear above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr  # setStream would flush the earlier stream, which may be closed
        super().emit(record)


def run(main: Callable[[], None]) -> None:
    """Runs a Hydra command. Hydra's own errors (an unknown key or choice) become one line, too."""
    with output_may_close():
        _run(main)


def _run(main: Callable[[], None]) -> None:
    from hydra.errors import ConfigCompositionException, MissingConfigException

    if _full_error:
        return main()
    if unknown := _explain_option():
        sys.exit(_fail(unknown))
    if unfinished := _explain_choice([argument for argument in sys.argv[1:] if argument.endswith("=base")]):
        sys.exit(_fail(unfinished))  # for Hydra, the file that the choices of a group share is one of them
    os.environ[FULL_ERROR] = os.environ[SINGLE_LINES] = "1"  # Hydra then raises its exceptions and prints none
    try:
        main()
    except MissingConfigException as error:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        options = [option for option in error.options or () if option != "base"]
        named = _explain_choice(sys.argv[1:])  # a choice with slashes (data=books/) is a part of Hydra's group
        sys.exit(_fail(named or f"{group}={choice}: must be one of {', '.join(options)}"))
    except (ConfigCompositionException, OverrideParseException) as error:
        sys.exit(_fail(_explain(error)))
    except ValueError as error:
        if not str(error).startswith("Config group override must be"):
            raise
        sys.exit(_fail(_explain_choice(sys.argv[1:]) or str(error)))
    except KeyboardInterrupt:
        sys.exit(130)  # a shell's exit status after SIGINT
    except HydraException as error:  # a job of a multirun failed
        sys.exit(_fail(str(error).splitlines()[0]))
    finally:
        for name in (FULL_ERROR, SINGLE_LINES):  # only for this call
            os.environ.pop(name, None)


def _explain(error: Exception) -> str:
    from configs.aliases import renamed

    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None:
        if renamed(cause.full_key):
            return f"{cause.full_key}: no such key; it is {renamed(cause.full_key)} now"
        if refusal := _refused_with_resume(sys.argv[1:]):
            return refusal
        known = ", ".join(sorted(str(key) for key in cause.parent_node if key != "hydra"))
        hint = _choices_with(cause.full_key) or _namesakes(cause.full_key, cause.parent_node._get_root())
        return f"{cause.full_key}: no such key; the keys here are {known or 'none'}{hint}"
    if isinstance(error, OverrideParseException):
        key, equals, _ = error.override.partition("=")
        quoted = f"; a text with quotes, brackets, commas or = needs quotes of its own: '{key}=\"...\"'"
        return f"{error.override}: must be key=value, key=a,b with -m, or 'key=[a,b]'{quoted if equals else ''}"
    if several := re.match(r"Ambiguous value for argument '((.*?)=.*)'$", str(error).splitlines()[0]):
        argument, key = several.groups()
        forms = f"a list is '{key}=[a,b]', a text with a comma '{key}=\"a, b\"', and a sweep needs -m"
        return f"{argument}: must be one value; {forms}"
    return str(error).splitlines()[0]


def _explain_option() -> str | None:
    """Returns the error for arguments that Hydra does not take, if there are any: --key value, and overrides that an
    option divides."""
    _, unknown = get_args_parser().parse_known_args()
    if not unknown:
        return None
    first = unknown[0]
    if not first.startswith("-"):
        return f"{first}: must stand beside the other settings, after all options like -m"
    key = first.lstrip("-").partition("=")[0]
    return f"{first}: no such option; settings are written {key}=VALUE, without dashes (--help lists them)"


def _refused_with_resume(arguments: Sequence[str]) -> str | None:
    """Returns the error for a key that a resumed run keeps, if there is one. The run may have keys that the default
    choices do not have."""
    from configs.errors import ConfigError
    from configs.resolve import check_kept

    try:
        if any(argument.startswith("resume=") for argument in arguments):
            check_kept(arguments)
    except ConfigError as error:
        return str(error)
    return None


def _choices_with(key: str) -> str:
    """Returns, as the end of a sentence, the choices that have a key of this name: those of the innermost group around
    the key of which one has it (data/tokenizer before data, for data.tokenizer.path)."""
    *around, name = key.split(".")
    named = re.compile(rf"^[^#]*\b{re.escape(name)}:", re.MULTILINE)
    for depth in range(len(around), 0, -1):
        group = "/".join(around[:depth])
        files = sorted((CONFIGS / group).glob("*.yaml"))
        choices = [file.stem for file in files if file.stem != "base" and named.search(file.read_text())]
        if choices:
            return f"; {group}={' or '.join(choices)} has it"
    return ""


def _namesakes(key: str, config: DictConfig) -> str:
    """Returns, as the end of a sentence, the keys elsewhere in the config whose name is that of `key` or similar."""
    elsewhere: dict[str, list[str]] = {}
    groups = [("", OmegaConf.to_container(config))]
    while groups:
        prefix, group = groups.pop()
        for name, value in group.items():
            if prefix or name != "hydra":
                elsewhere.setdefault(str(name), []).append(f"{prefix}{name}")
                if isinstance(value, dict):
                    groups.append((f"{prefix}{name}.", value))
    similar = get_close_matches(key.rpartition(".")[2], elsewhere, n=1, cutoff=0.8)
    return f"; similar: {', '.join(sorted(elsewhere[similar[0]]))}" if similar else ""


def _explain_choice(arguments: Sequence[str]) -> str | None:
    """Returns the error for an override that sets a config group to something that is not one of its choices. Hydra has
    no clear error for nan, null or 3, which it parses as values, and accepts base."""
    for argument in arguments:
        group, _, choice = argument.partition("=")
        options = sorted(file.stem for file in (CONFIGS / group).glob("*.yaml") if file.stem != "base")
        if choice and options and choice not in options:
            return f"{argument}: must be one of {', '.join(options)}"
    return None


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors that a user can correct into one line on standard error and exit status 2.

    With `-m` the job fails after the line, and the next job starts. HYDRA_FULL_ERROR=1 shows the traceback instead.
    """
    start_logging()
    try:
        yield
    except Exception as error:
        if not _full_error and getattr(error, "reported", False):  # by another rank
            sys.exit(2)
        if _full_error or not is_for_users(error):
            raise
        line = one_line(error)
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            job = " ".join(HydraConfig.get().overrides.task)
            _fail(f"{line}  (job {job}; the other jobs continue)")
            raise HydraException(line) from None
        sys.exit(_fail(line))


def one_line(error: BaseException) -> str:
    """Returns the error's message in one line."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: must be set{_comment_on(error.full_key)}"
    from model.training.storage import StorageError

    if not isinstance(error, StorageError) and isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error).partition("\n")[0] or type(error).__name__


def _comment_on(key: str) -> str:
    """Returns the comment of a mandatory key in the YAML file that asks for it, which tells what is accepted."""
    if not HydraConfig.initialized():
        return ""
    hydra = HydraConfig.get()
    *around, name = key.split(".")
    groups = ["/".join(around[:depth]) for depth in range(len(around), 0, -1)]
    files = [f"{group}/{hydra.runtime.choices[group]}" for group in groups if group in hydra.runtime.choices]
    asked = re.compile(rf"^ *{re.escape(name)}: \?\?\? *# *(.*)", re.MULTILINE)
    for file in [*files, hydra.job.config_name]:
        if found := asked.search((CONFIGS / f"{file}.yaml").read_text()):
            return f": {found[1].rstrip(' ;')}"
    return ""


def is_for_users(error: BaseException) -> bool:
    """Whether a user can correct the error: a wrong setting, or a file that the file system refuses."""
    if isinstance(error, OmegaConfBaseException):
        return True
    from configs.errors import ConfigError
    from data import CorpusError
    from model.training.run_folder import RunFolderError
    from model.training.storage import REFUSALS, StorageError

    if isinstance(error, (ConfigError, CorpusError, RunFolderError, StorageError)):
        return True
    return isinstance(error, errors_after_pytorch()) or (isinstance(error, OSError) and error.errno in REFUSALS)


def errors_after_pytorch() -> tuple[type[Exception], ...]:
    """Returns those errors with a message for users whose modules import PyTorch."""
    from model.pretrained.errors import PretrainedError
    from model.training.checkpoints import CheckpointError
    from model.training.failures import DivergedError, LayoutOverflowError, RunOutOfMemoryError
    from model.training.ranks import RankLostError
    from model.training.slurm import SlurmError
    from model.training.step_graph import CaptureError

    ours = CheckpointError, PretrainedError, DivergedError, LayoutOverflowError, CaptureError, SlurmError
    return *ours, RunOutOfMemoryError, RankLostError


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on standard error, and yields a function that advances it. The bar disappears at the end.

    Where standard error is no terminal, as in a log file, a line each minute takes its place.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _logged_progress(label, total)
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda more: bar.advance(task, more)


def _logged_progress(label: str, total: int) -> Callable[[int], None]:
    done, started = 0, time.monotonic()
    logged = started

    def advance(more: int) -> None:
        nonlocal done, logged
        done, now = done + more, time.monotonic()
        if done and now - logged >= SECONDS_BETWEEN_LINES:
            logged = now
            left = timedelta(seconds=round((now - started) * (total - done) / done))
            log.info("%s: %.0f%%  ETA %s", label, 100 * done / total, left)

    return advance


def counted(number: int, noun: str) -> str:
    """Returns "1 document", "2 documents"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
