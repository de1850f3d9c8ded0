"""How much memory this process may take: the machine's, or less where a container or a service is given less.

Linux limits a process by control groups, which are folders in a mounted file system: a limit holds for all groups
below. Where that file system is mounted, /proc/self/mountinfo says, and which group the process is in,
/proc/self/cgroup (man 7 cgroups; version 1 has a file system a resource, version 2 one for all).
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

LIMITS = {"cgroup2": "memory.max", "cgroup": "memory.limit_in_bytes"}
"""The file in a group's folder that holds its limit in bytes, by the type of the file system; "max" is none."""


def memory_limit() -> int | None:
    """Bytes that this process may have resident, with all that shares a limit with it; None where nothing says."""
    limits = [limit for limit in (machine_bytes(), cgroup_limit()) if limit is not None]
    return min(limits, default=None)


def machine_bytes() -> int | None:
    """This machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def cgroup_limit(root: Path = Path("/")) -> int | None:
    """The least of the limits of this process's control group and of those above it; None where there is none."""
    found = [limit for folder, file in _groups(root) if (limit := _read(folder / file)) is not None]
    return min(found, default=None)


def _groups(root: Path) -> Iterator[tuple[Path, str]]:
    """(folder, the limit's file name) of every group that this process is in, as far as they can be seen from here."""
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
    """`group` as it is found under a mount of `top`. A container may see its own group alone, as the mount's top."""
    if ".." in group.parts or not group.is_relative_to(top):
        return PurePosixPath()
    return group.relative_to(top)


def _read(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
