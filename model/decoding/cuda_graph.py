"""One token of every sequence, again and again: a decoding step of fixed shapes, on a GPU replayed as one CUDA graph.

A step of a small model is hundreds of short kernels, and starting them one by one takes longer than running them. All
that changes from token to token (lengths, slots, masks, which span is full) is computed on the device from the lengths,
so the same recorded kernels serve every length up to the capacity.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoding.cache import Cache
from model.kv_cache.step import FixedStep

WARM_UP = 2
"""Runs before the recording: kernels are compiled and memory is taken then."""


def require_gpu(device: torch.device) -> None:
    """Raises ValueError where nothing can be recorded."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=true: the model is on {device.type}, and must be on cuda")


class TokenStep:
    """Reads one token of each sequence into `cache`, which may hold a text already, up to `capacity` tokens of each.

    `cuda_graph`: record the step, and replay it; else the same kernels are started one by one, on any device.
    Raises ValueError if `cuda_graph` is true and the model is on a CPU. The model's mode, and autocast, are those at
    the time of recording.
    """

    @torch.no_grad()
    def __init__(self, cache: Cache, capacity: int, cuda_graph: bool) -> None:
        device = cache.model.embed_tokens.weight.device
        if cuda_graph:
            require_gpu(device)
        cache.reserve(capacity)
        self.cache, self.capacity = cache, capacity
        self._tokens = torch.zeros(cache.batch, 1, dtype=torch.int64, device=device)
        self._new = torch.zeros(cache.batch, dtype=torch.int64, device=device)
        self._lengths = torch.tensor(cache.lengths, device=device)
        self._in_buffers = [list(cache.lengths), [0] * cache.batch]
        """The lengths and numbers of new tokens that the device's buffers hold."""
        self._graph: torch.cuda.CUDAGraph | None = None
        if cuda_graph:
            self._record()

    @torch.no_grad()
    def __call__(self, tokens: Tensor, new: Sequence[int] | None = None) -> Tensor:
        """As Cache.extend, for tokens `[batch, 1]`; a recorded step overwrites its result the next time."""
        new = [1] * self.cache.batch if new is None else list(new)
        after = self.cache.check(new)
        if max(after) > self.capacity:
            raise ValueError(f"a sequence of {max(after)} tokens: the step has room for capacity={self.capacity}")
        self._tokens.copy_(tokens)
        buffers, values = (self._lengths, self._new), (self.cache.lengths, new)
        for buffer, held, value in zip(buffers, self._in_buffers, values, strict=True):
            if held != value:
                buffer.copy_(torch.tensor(value))
        if self._graph is None:
            hidden = self._run()
        else:
            self._graph.replay()
            hidden = self._hidden
        self.cache.set_lengths(after)
        self._in_buffers = [after, new]
        return hidden

    def _run(self) -> Tensor:
        step = FixedStep(self._lengths, self._new, 1, self.cache.model.rotary)
        hidden = self.cache.run(self._tokens, step)
        self._lengths += self._new
        return hidden

    def _record(self) -> None:
        """Steps in which no sequence has a new token leave the cache as it is."""
        device = self._tokens.device
        caching = torch.is_autocast_cache_enabled()
        # What autocast keeps of the weights must not be in a recording that outlives it.
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)
        try:
            aside = torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self._run()
            torch.cuda.current_stream(device).wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._hidden = self._run()
        finally:
            torch.set_autocast_cache_enabled(caching)
