"""Failures of training: no memory left, a layout with too little room, a loss or gradient that is not finite.

Imports no PyTorch until a failure is examined: commands that refuse a setting import the errors alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OUT_OF_MEMORY = "out of memory"
"""The `state` in summary.json of a run that ran out of memory."""

ON_NAN = ("stop", "skip_step")
"""The values of trainer.on_nan."""

CPU_MESSAGES = ("not enough memory: you tried to allocate", "can't allocate memory")
"""Parts of the messages of PyTorch's CPU allocator, which raises plain RuntimeErrors."""


MEMORY_ADVICE = (
    "to lower it: a smaller data.batch_size with a larger trainer.accumulate, a shorter data.sequence_length, "
    "model.activation_checkpointing=true, trainer.precision=bf16-mixed, or on a GPU trainer.cuda_graph=false"
)


OVERFLOW = (
    "the documents of a batch need more different mask tiles than a layout of fixed size has room for "
    "(kernels.layout.tiles.MASKS_PER_ROW). checkpoints/last.ckpt is from before that. The pattern's blocks "
    "and strides must be multiples of attention.block, align must be sequence, or documents must be longer"
)
"""The message of a LayoutOverflowError."""


class RunOutOfMemoryError(RuntimeError):
    """A device had too little memory for a step. The message is that of `out_of_memory_message`.

    reported: another rank has printed its error (ranks.py)
    """

    def __init__(self, message: str, reported: bool = False):
        super().__init__(message)
        self.reported = reported


class LayoutOverflowError(RuntimeError):
    """A layout of fixed sizes had too little room, so that a step attended to other tokens than its pattern's."""


class DivergedError(ArithmeticError):
    """The loss or its gradient became infinite or not a number."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a GPU or CPU ran out of memory."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_MESSAGES)


def out_of_memory_message(
    error: BaseException, step: int, device: "torch.device", forecast: Mapping[str, Any] | None
) -> str:
    """Returns one line: the allocator's numbers, the forecast, and the settings that lower memory."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    parts = [f"step {step + 1}: out of memory on {name}"]
    if str(error).strip():
        parts.append(str(error).strip().splitlines()[0].partition(" See documentation")[0].rstrip("."))
    if device.type == "cuda":
        allocated, free = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[0]
        parts.append(f"PyTorch held {size(allocated)} at most, {size(free)} of the device are free now")
    peak = forecast and forecast.get("peak_memory_bytes")
    parts.append(f"the forecast was {size(peak)}" if peak else "there was no forecast (preflight=warn makes one)")
    parts.append(MEMORY_ADVICE)
    return "; ".join(parts)


NAMED = 8
"""Largest number of documents that a message names; the others are counted."""


def diverged_message(step: int, documents: Sequence[str], checkpoint: Path | None, skipped: int) -> str:
    """Returns one line: the step, its documents, the last good checkpoint, and settings to try."""
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


def size(count: int) -> str:
    """Formats a number of bytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
