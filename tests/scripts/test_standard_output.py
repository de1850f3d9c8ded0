"""A command whose standard output is closed, as by `| head`, ends without a traceback."""

import os
import signal
import socket
import tempfile

import pytest
from rich.console import Console

from scripts.standard_output import output_may_close
from tests.commands import ROOT, ForkedProcess, _quiet

COMMANDS = sorted(
    file.relative_to(ROOT).as_posix()
    for file in [ROOT / "train.py", *(ROOT / "scripts").glob("*.py")]
    if "__main__" in file.read_text(encoding="utf-8")
)


def into_closed_pipe(*arguments: str) -> tuple[int, str]:
    """Runs a command into a pipe that nobody reads. Returns its exit status and its standard error."""
    read, write = os.pipe()
    os.close(read)
    with tempfile.TemporaryFile("w+") as errors, open(write, "w") as output:
        process = ForkedProcess(arguments, _quiet({}), output, errors)
        status = process.wait(timeout=100)
        errors.seek(0)
        return status, errors.read()


@pytest.mark.parametrize("command", [each for each in COMMANDS if "lm_harness" not in each])
def test_help_into_a_closed_pipe_ends_without_a_traceback(command):
    status, errors = into_closed_pipe(command, "--help")
    ignored = {0} if os.environ.get("PYTHONUNBUFFERED") else set()  # argparse ignores a write that fails at once
    assert not errors and status in {128 + signal.SIGPIPE} | ignored


def test_the_commands_are_all():
    assert {"train.py", "scripts/evaluate.py", "scripts/benchmark.py", "scripts/lm_harness.py"} <= set(COMMANDS)
    for command in COMMANDS:
        text = (ROOT / command).read_text(encoding="utf-8")
        assert "with output_may_close():" in text or "from scripts.console import run\n" in text, command


@pytest.mark.parametrize("write", [print, lambda text: Console().print(text)], ids=["print", "rich"])
def test_every_way_of_writing_ends_with_the_same_status(write, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        with pytest.raises(SystemExit) as end, output_may_close():
            write("text")
        monkeypatch.undo()
    assert end.value.code == 128 + signal.SIGPIPE


def test_a_command_without_a_standard_output_ends_as_usual(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)  # as Python sets it after `>&-`
    with output_may_close():
        print("text")
    with pytest.raises(SystemExit) as end, output_may_close():
        raise SystemExit(2)
    assert end.value.code == 2


def test_an_error_of_the_command_or_of_another_pipe_stays():
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(BrokenPipeError), output_may_close():
        ours.send(b"text")
    with pytest.raises(SystemExit) as end, output_may_close():
        raise SystemExit(2)
    assert end.value.code == 2
