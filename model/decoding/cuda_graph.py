"""Decoding steps of one token per sequence, in fixed shapes; on a GPU a step is replayed as one CUDA graph.

A step of a small model consists of hundreds of short kernels, and starting them one by one takes longer than running
them. Everything that differs between tokens (lengths, slots, masks, full spans) is computed on the device from the
lengths, so one recording serves every length up to the capacity.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoding.cache import Cache
from model.kv_cache.step import FixedStep

WARM_UP = 2
"""Number of runs before the recording; they compile kernels and allocate memory."""


def require_gpu(device: torch.device) -> None:
    """Raises ValueError for a device that cannot record CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=true: the model is on {device.type}, and must be on cuda")


class TokenStep:
    """Adds one token of each sequence to `cache`, up to `capacity` tokens per sequence.
    The cache may hold tokens already.

    `cuda_graph`: record the step once and replay it; otherwise the same kernels are started one by one, on any device.
    Raises ValueError if `cuda_graph` is true and the model is on a CPU. A recording keeps the model's mode (training or
    evaluation) and the autocast settings.
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
        """The values in the buffers `_lengths` and `_new` on the device."""
        self._graph: torch.cuda.CUDAGraph | None = None
        if cuda_graph:
            self._record()

    @torch.no_grad()
    def __call__(self, tokens: Tensor, new: Sequence[int] | None = None) -> Tensor:
        """As Cache.extend, for tokens `[batch, 1]`. The next recorded step overwrites the result."""
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
        step = FixedStep(self._lengths, self._new, 1)
        hidden = self.cache.run(self._tokens, step)
        self._lengths += self._new
        return hidden

    def _record(self) -> None:
        """Records a step. `_new` is 0 meanwhile, so that the steps do not change the cache."""
        device = self._tokens.device
        caching = torch.is_autocast_cache_enabled()
        # Autocast's cached copies of the weights are freed at its end, so the recording must not read them.
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
