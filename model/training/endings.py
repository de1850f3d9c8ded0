"""How a run ends before its time: out of memory, or with a loss that is no number any more."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

OUT_OF_MEMORY = "out of memory"
"""The `state` in summary.json of a run that ended so."""

ON_NAN = ("stop", "skip_step")

CPU_MESSAGES = ("not enough memory: you tried to allocate", "can't allocate memory")
"""What PyTorch's CPU allocator says in its RuntimeErrors."""


class RunOutOfMemoryError(RuntimeError):
    """A device's memory did not suffice for a step. One message: what was asked for, what was forecast, and what would
    lower it most."""


class DivergedError(ArithmeticError):
    """The loss or its gradient became infinite or not a number."""


@dataclass(frozen=True)
class Expectation:
    """What whoever starts a run has forecast of it.

    forecast: for summary.json; `peak_memory_bytes` among it. lower: called when memory did not suffice; which settings
    would lower the peak, and by how many bytes.
    """

    forecast: Mapping[str, Any] = field(default_factory=dict)
    lower: Callable[[], Sequence[tuple[str, int]]] = tuple


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_MESSAGES)


def out_of_memory_message(error: BaseException, step: int, device: torch.device, expected: Expectation | None) -> str:
    """One line: the allocator's own numbers, the forecast, and the settings that would lower it most."""
    parts = [f"step {step + 1}: out of memory on {_name(device)}"]
    if str(error).strip():
        parts.append(str(error).strip().splitlines()[0].partition(" See documentation")[0].rstrip("."))
    if device.type == "cuda":
        allocated, free = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[0]
        parts.append(f"PyTorch held {_size(allocated)} at most, {_size(free)} of the device are free now")
    peak = expected and expected.forecast.get("peak_memory_bytes")
    parts.append(f"the forecast was {_size(peak)}" if peak else "there was no forecast (preflight=warn makes one)")
    settings = [f"{setting} (about {_size(saves)} less)" for setting, saves in (expected.lower() if expected else ())]
    parts.append("what would lower it most: " + ", ".join(settings) if settings else "see scripts/preflight.py")
    return "; ".join(parts)


NAMED = 8
"""Documents of a batch that a message names; of more it says how many."""


def diverged_message(step: int, documents: Sequence[str], checkpoint: Path | None, skipped: int) -> str:
    """One line: the step, its documents, the last good checkpoint, and what to try."""
    parts = [f"step {step}: the loss or its gradient is not finite"]
    if skipped:
        parts.append(f"the {skipped}. such step, and trainer.max_skipped_steps allows {skipped - 1}")
    more = f" and {len(documents) - NAMED} more" if len(documents) > NAMED else ""
    parts.append(f"its batch holds {', '.join(documents[:NAMED])}{more}" if documents else "its documents are unknown")
    parts.append(f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been saved before")
    parts.append(
        "try a lower optimizer.learning_rate, a longer warm-up, a smaller trainer.gradient_clip, bf16 or 32-bit "
        "trainer.precision, or trainer.on_nan=skip_step"
    )
    return "; ".join(parts)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
