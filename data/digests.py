"""The sha256 of files. Those of large files are remembered, so that a launch reads gigabytes only once.

A digest is remembered with the size, the dates and the number of the file's inode. The date of the inode (ctime)
changes with every write, and no program sets it. So a file that was copied, moved or written is read again.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

FILE = "digests.json"
REMEMBERED_BYTES = 16_000_000  # bytes of all files together; fewer are read each time, in about 10 ms
ANNOUNCED_BYTES = 2_000_000_000
ABANDONED_SECONDS = 3600  # the age of a partial file that no process still writes


def digests_of(files: Sequence[Path], memory: Path | None) -> list[str]:
    """Returns the sha256 of the content of each file.

    memory: the file of remembered digests, which other processes may write at the same time; None for none.
    """
    states = [file.stat() for file in files]
    large = sum(state.st_size for state in states) >= REMEMBERED_BYTES
    known = _read(memory) if memory and large else {}
    keys = [[state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino] for state in states]
    names = [str(file.absolute()) for file in files]
    entries = [known.get(name, [None]) for name in names]
    digests = [entry[-1] if entry[:-1] == key else None for entry, key in zip(entries, keys, strict=True)]
    unread = sum(state.st_size for state, digest in zip(states, digests, strict=True) if digest is None)
    if unread >= ANNOUNCED_BYTES:
        log.info(f"reading {unread / 1e9:.1f} GB once, to check whether the files changed")
    started = time.time_ns()
    for index, file in enumerate(files):
        if digests[index] is None:
            with open(file, "rb") as stream:
                digests[index] = hashlib.file_digest(stream, "sha256").hexdigest()
            if keys[index][2] < started - 2_000_000_000:  # a later write could have the same dates
                known[names[index]] = [*keys[index], digests[index]]
    if memory and large and unread:
        _write(known, memory)
    return digests


def _read(memory: Path) -> dict[str, list]:
    try:
        return json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}


def _write(known: dict[str, list], memory: Path) -> None:
    part = memory.with_name(f"{memory.name}.{os.getpid()}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        for leftover in memory.parent.glob(f"{memory.name}.*"):  # of processes that were killed
            if time.time() - leftover.stat().st_mtime > ABANDONED_SECONDS:
                leftover.unlink()
        part.write_text(json.dumps(known))
        os.replace(part, memory)
    except OSError as error:  # a cache that is only read
        log.info(f"{memory}: cannot be written ({error.strerror}), so the files are read again next time")
        with contextlib.suppress(OSError):
            part.unlink()
