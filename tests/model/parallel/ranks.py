"""Runs a function on several ranks: processes of this machine that communicate through gloo, or GPUs through NCCL."""

import datetime
import faulthandler
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

LIMIT_S = 600
"""How long the ranks of one call may take. Those that hang then write where they are, and end."""


def run_on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, backend: str = "gloo") -> list[Any]:
    """What `function(*arguments)` returns on each of `ranks` ranks; in it, the default process group is theirs.

    The function must be importable, and its result must be one that torch.load(weights_only=True) accepts.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Ranks are forked from a server that has imported what they need: each would take seconds for that. It begins
        # with the first call of all tests, which may be of a module that needs less.
        torch.multiprocessing.set_forkserver_preload([function.__module__, "datasets", "lightning.pytorch"])
        # A process that is forked should have one thread: pyarrow's allocator starts another one unless told not to.
        os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
        arguments = (function, ranks, folder, arguments, backend)
        try:
            torch.multiprocessing.start_processes(_run, arguments, ranks, start_method="forkserver")
        except torch.multiprocessing.ProcessExitedException as error:
            for path in sorted(Path(folder).glob("*.crash")):
                error.add_note(f"rank {path.stem}: {path.read_text().partition('Extension modules')[0] or 'no crash'}")
            raise
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _run(rank: int, function: Callable[..., Any], ranks: int, folder: str, arguments: tuple, backend: str) -> None:
    crash = os.open(f"{folder}/{rank}.crash", os.O_CREAT | os.O_WRONLY)
    faulthandler.enable(crash)
    faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=crash)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    torch.save(function(*arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that no other process of this machine gets while inside: one of ours may listen at it."""
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the listener sets it, after our bind
        yield holder.getsockname()[1]
