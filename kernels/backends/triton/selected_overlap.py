"""Sums of one piece's slots beside the next piece's main kernel: one waits for memory, the other for its products.

Two pieces' partial results exist at once, and a second stream reads them. Kernels and their order within a sum are the
same with and without: so are the bits.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SUMS_BESIDE = False
"""Whether sums run beside the main kernels where a caller does not say."""

PRIORITY = 0
"""Of the second stream; lower goes first."""


class Sums:
    """Leads the sums of a call's pieces; a context, at whose end the current stream waits for all of them.

    So whatever the call has allocated may be freed on the current stream as if there were no other. While a CUDA graph
    is recorded everything stays on its stream.
    """

    def __init__(self, device: torch.device, pieces: int, beside: bool | None) -> None:
        beside = SUMS_BESIDE if beside is None else beside
        self.rooms = 2 if beside and pieces > 1 else 1
        """How many pieces' partial results the caller makes room for; piece i has room i % rooms."""
        two = self.rooms == 2 and device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
        self.stream = _second_stream(device, PRIORITY) if two else None
        self.done: list[torch.cuda.Event | None] = [None] * self.rooms

    def __enter__(self) -> "Sums":
        return self

    def __exit__(self, *_) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def wait_for_room(self, piece: int) -> int:
        """The room of this piece, once the sums of the last one that had it are done."""
        room = piece % self.rooms
        if self.done[room] is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(self.done[room])
        return room

    @contextmanager
    def of(self, piece: int) -> Iterator[None]:
        """Within, kernels launched run after all that the current stream has been given, and beside what comes next."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield
        self.done[piece % self.rooms] = self.stream.record_event()


@functools.cache
def _second_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=priority)
