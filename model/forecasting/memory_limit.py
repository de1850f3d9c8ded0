"""The memory that this process may use: the machine's, or the limit of its container or service.

Linux limits processes by control groups, which are folders of a mounted file system; a group's limit holds for all
groups below it. /proc/self/mountinfo lists where the file system is mounted, /proc/self/cgroup the group of this
process (man 7 cgroups; version 1 has one file system per resource, version 2 one for all).
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

LIMITS = {"cgroup2": "memory.max", "cgroup": "memory.limit_in_bytes"}
"""The file with a group's limit in bytes, by file system type. The limit "max" means no limit."""


def memory_limit() -> int | None:
    """Returns the bytes that may be resident, for this process and all that share its limit; None where unknown."""
    limits = [limit for limit in (machine_bytes(), cgroup_limit()) if limit is not None]
    return min(limits, default=None)


def machine_bytes() -> int | None:
    """Returns this machine's memory in bytes; None where the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def cgroup_limit(root: Path = Path("/")) -> int | None:
    """Returns the smallest limit of this process's control group and the groups above it; None where there is none."""
    found = [limit for folder, file in _groups(root) if (limit := _read(folder / file)) is not None]
    return min(found, default=None)


def _groups(root: Path) -> Iterator[tuple[Path, str]]:
    """Yields (folder, file name of the limit) of every control group of this process that is visible."""
    try:
        ours = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # no Linux
        return
    groups = {}
    for line in ours:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            groups["cgroup2"] = group
        elif "memory" in controllers.split(","):
            groups["cgroup"] = group
    for line in mounts:
        place, _, rest = line.partition(" - ")
        top, mounted = place.split()[3:5]
        kind, _, options = rest.split()[:3]
        if kind not in groups or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        top_folder = root / mounted.lstrip("/")
        below = _below(PurePosixPath(groups[kind]), PurePosixPath(top))
        for folder in (below, *below.parents):
            yield top_folder / folder, LIMITS[kind]


def _below(group: PurePosixPath, top: PurePosixPath) -> PurePosixPath:
    """Returns `group` relative to a mount of `top`. In a container the mount may show its own group alone."""
    if ".." in group.parts or not group.is_relative_to(top):
        return PurePosixPath()
    return group.relative_to(top)


def _read(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
