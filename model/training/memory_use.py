"""The memory in use: that of PyTorch's allocator on a GPU, and that of this process on a CPU."""

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak memory. CUDA: the most bytes that PyTorch's allocator held for tensors since the latest
    `reset_peak_memory`. CPU: the most resident bytes of this process (VmHWM), with libraries and data; on Linux since
    the reset, elsewhere since the start of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Returns the resident bytes of this process; the most since its start where the system has no present number."""
    return _status("VmRSS") if STATUS.exists() else peak_memory_bytes(torch.device("cpu"))


def reset_peak_memory(device: torch.device) -> None:
    """Starts the peak of `peak_memory_bytes` anew, at the bytes that are held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            (STATUS.parent / "clear_refs").write_text("5")


def bytes_of_others(device: torch.device) -> int | None:
    """Returns the bytes of a GPU's memory that PyTorch's allocator does not hold in this process: those of other
    processes, and those of CUDA and its libraries in this one. None where the device has no memory of its own."""
    if device.type != "cuda" or torch.cuda.get_device_properties(device).is_integrated:
        return None
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device))


def give_back_free_memory() -> bool:
    """Returns freed memory of this process to the system, which only glibc's heap can do. Returns whether that heap is
    in use."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
    return trim is not None


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
