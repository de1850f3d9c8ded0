"""Running the project's commands in tests, as a user would, and composing their configs without running them."""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf, open_dict

ROOT = Path(__file__).parent.parent


def compose(*overrides: str, config_name: str = "train") -> dict[str, Any]:
    """The config that a command line composes, as plain dicts."""
    return OmegaConf.to_container(_unresolved(config_name, overrides), resolve=True)


@functools.cache
def _unresolved(config_name: str, overrides: tuple[str, ...]) -> DictConfig:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        return compose(config_name, overrides=list(overrides))


def resolved(*overrides: str) -> dict[str, Any]:
    """What train.py makes of a command line."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    from configs.resolve import resolve

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        config = compose("train", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    try:
        with open_dict(config):
            del config["hydra"]
        return resolve(config)
    finally:
        HydraConfig.instance().cfg = None


def run(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python <arguments>` in the repository's root, offline, on one thread, without a GPU; fails the test with its
    output. It starts an interpreter: `run_forked` is seconds faster."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=_quiet(environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or result.returncode == 0, f"{arguments}:\n{result.stdout}\n{result.stderr}"
    return result


def run_forked(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """As `run`, in a process that is forked from one which has imported torch and Lightning."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = ForkedProcess(arguments, _quiet(environment), output, errors)
        try:
            process.wait(timeout=300)
        finally:
            process.kill()
        streams = [(file.seek(0), file.read())[1] for file in (output, errors)]
    assert not check or process.returncode == 0, f"{arguments}:\n{streams[0]}\n{streams[1]}"
    return subprocess.CompletedProcess(arguments, process.returncode, *streams)


@contextlib.contextmanager
def started(*arguments: str | Path, **environment: str) -> Iterator["ForkedProcess"]:
    """`python <arguments>` as `run_forked` runs it, while it runs. Its group ends with the block; what it writes to
    standard error is in `stderr`."""
    read, write = os.pipe()
    with open(read) as stderr, open(os.devnull, "w") as output:
        with open(write, "w") as errors:
            process = ForkedProcess(list(map(str, arguments)), _quiet(environment), output, errors)
        process.stderr = stderr
        try:
            yield process
            process.wait(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def read_log(process: "ForkedProcess", words: str) -> None:
    """Reads the standard error of a `started` process up to the line that holds `words`."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if words in line:
            return
    raise AssertionError("".join(lines))


class Signalled:
    """A process that is sent signals only while it runs, so that no signal reaches another one of its number."""

    pid: int

    def poll(self) -> int | None:
        """The exit status, or None while the process runs."""
        raise NotImplementedError

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkedProcess(Signalled):
    """A process that the fork server starts, the leader of a group; with the methods of subprocess.Popen in use."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: IO, errors: IO):
        self.returncode: int | None = None
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(_fork_server())
        socket.send_fds(self.connection, [b"\n"], [output.fileno(), errors.fileno()])
        self.connection.sendall(json.dumps([command, str(ROOT), environment]).encode() + b"\n")
        self.answers = self.connection.makefile()
        self.pid = int(self.answers.readline())

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} has run for {timeout} s")
            self.returncode = int(self.answers.readline())
            self.answers.close()
            self.connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(TimeoutError):
            self.wait(timeout=0)
        return self.returncode


@functools.cache
def _fork_server() -> str:
    """Starts the fork server of this process. Returns the path of its socket."""
    folder = tempfile.TemporaryDirectory()
    command = [sys.executable, str(ROOT / "tests/fork_server.py"), f"{folder.name}/socket"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # Not the hashes of this process: what follows from the order of a set differs between a command and a test.
    environment = _quiet({"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"})
    server = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    assert server.stdout.readline() == b"ready\n"

    @atexit.register
    def stop() -> None:
        server.stdin.close()
        server.wait()
        folder.cleanup()

    return f"{folder.name}/socket"


def _quiet(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a command that a test starts."""
    quiet = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "WANDB_SILENT": "true",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | quiet | dict(environment)
