"""The memory that a process may take, from files as Linux has them in containers and outside."""

import pytest
import torch

from model.forecasting import memory_limit as limits
from model.forecasting.memory_limit import cgroup_limit, machine_bytes, memory_limit
from model.forecasting.peak_memory import device_bytes

V1_UNLIMITED = 9223372036854771712
"""What version 1 says where there is no limit."""


def mount(top, place, kind="cgroup2", options="rw"):
    return f"31 23 0:28 {top} {place} rw,relatime shared:9 - {kind} {kind} {options}\n"


def system(root, group, mounts, limits):
    for name, text in {"proc/self/cgroup": group, "proc/self/mountinfo": mounts, **limits}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


ROOT_DISK = "30 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
MEMORY = mount("/", "/sys/fs/cgroup/memory", "cgroup", "rw,memory")
CPU = mount("/", "/sys/fs/cgroup/cpu", "cgroup", "rw,cpu,cpuacct")

SYSTEMS = {
    "version 2, a container's own name space": (
        "0::/\n",
        ROOT_DISK + mount("/", "/sys/fs/cgroup"),
        {"sys/fs/cgroup/memory.max": "2000000000\n"},
        2_000_000_000,
    ),
    "version 2, the lowest on the way up": (
        "0::/user.slice/job.scope\n",
        ROOT_DISK + mount("/", "/sys/fs/cgroup"),
        {
            "sys/fs/cgroup/user.slice/job.scope/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/memory.max": "3000\n",
            "sys/fs/cgroup/other.slice/memory.max": "1000\n",
        },
        3000,
    ),
    "version 2, no limit": (
        "0::/user.slice\n",
        mount("/", "/sys/fs/cgroup"),
        {"sys/fs/cgroup/user.slice/memory.max": "max\n"},
        None,
    ),
    "version 2, a process outside its name space": (
        "0::/../elsewhere\n",
        mount("/", "/sys/fs/cgroup"),
        {"sys/fs/cgroup/memory.max": "4000\n", "sys/fs/elsewhere/memory.max": "10\n"},
        4000,
    ),
    "version 1, its own group": (
        "5:cpu,cpuacct:/\n4:memory:/slurm/job\n0::/\n",
        ROOT_DISK + CPU + MEMORY + mount("/", "/sys/fs/cgroup/unified"),
        {
            "sys/fs/cgroup/memory/slurm/job/memory.limit_in_bytes": "5000\n",
            "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": f"{V1_UNLIMITED}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{V1_UNLIMITED}\n",
            "sys/fs/cgroup/cpu/slurm/job/memory.limit_in_bytes": "1\n",
        },
        5000,
    ),
    "version 1, a container that sees its group as the top": (
        "4:memory:/docker/0123/job\n",
        mount("/docker/0123", "/sys/fs/cgroup/memory", "cgroup", "rw,memory"),
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "7000\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "6000\n",
        },
        6000,
    ),
    "version 1, a group that is mounted nowhere": (
        "4:memory:/elsewhere\n",
        mount("/docker/0123", "/sys/fs/cgroup/memory", "cgroup", "rw,memory"),
        {"sys/fs/cgroup/memory/memory.limit_in_bytes": "7000\n"},
        7000,
    ),
}


@pytest.mark.parametrize(("group", "mounts", "files", "limit"), SYSTEMS.values(), ids=SYSTEMS)
def test_a_control_groups_limit_is_found(tmp_path, group, mounts, files, limit):
    assert cgroup_limit(system(tmp_path, group, mounts, files)) == limit


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert cgroup_limit(tmp_path) is None


def test_a_run_may_have_the_least_of_all(monkeypatch):
    for machine, group, least in ((8, 5, 5), (8, V1_UNLIMITED, 8), (8, None, 8), (None, 5, 5), (None, None, None)):
        monkeypatch.setattr(limits, "machine_bytes", lambda machine=machine: machine)
        monkeypatch.setattr(limits, "cgroup_limit", lambda group=group: group)
        assert memory_limit() == device_bytes(torch.device("cpu")) == least


def test_this_process_has_some():
    assert 100e6 < memory_limit() <= machine_bytes()
