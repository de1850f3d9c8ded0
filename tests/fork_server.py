"""Forks processes that run commands, from one that has imported the libraries that take seconds to import.

The server imports no module of this repository: a command imports them itself, with the arguments, environment, working
folder and import path of a new interpreter. tests/commands.py starts the server and sends it requests.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import socket
import sys
from pathlib import Path

LIBRARIES = ("datasets", "hydra.main", "lightning.pytorch", "torch._dynamo")


def serve(path: str) -> str:
    """Forks a process for every connection to the socket at `path`, until standard input is closed.

    A connection brings the files of standard output and standard error, and a line with the command, the working folder
    and the environment. It gets the process's number, and later its exit status.

    Returns the script to run, in each of the forked processes alone.
    """
    # Without this file's folder, whose subfolders are called as packages may be, and without the repository.
    libraries_path = [entry for entry in sys.path[1:] if entry not in os.environ.get("PYTHONPATH", "").split(":")]
    sys.path[:] = libraries_path
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # a collection in a forked process would copy the memory of all these objects
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    os.write(1, b"ready\n")
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            os._exit(0)
        connection = listener.accept()[0]
        with contextlib.suppress(ChildProcessError):  # those that waited for earlier commands
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork():
            connection.close()
            continue
        listener.close()
        files = socket.recv_fds(connection, 1, 2)[1]
        command, folder, environment = json.loads(connection.makefile().readline())
        process = os.fork()
        if process == 0:
            break
        os.setpgid(process, process)
        for file in files:
            os.close(file)
        connection.sendall(f"{process}\n".encode())
        connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}\n".encode())
        os._exit(0)
    connection.close()
    os.setpgid(0, 0)  # here and there: whichever of the two processes runs first
    for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files]):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = command
    own_path = filter(None, environment.get("PYTHONPATH", "").split(":"))
    sys.path[:] = [str(Path(command[0]).resolve().parent), *own_path, *libraries_path]
    return command[0]


if __name__ == "__main__":
    # Outside of `serve`, so that the interpreter ends as after any script: with its exit status, or with a traceback.
    runpy.run_path(serve(sys.argv[1]), run_name="__main__")
