"""One token of every sequence, again and again: a decoding step of fixed shapes, on a GPU replayed as one CUDA graph.

A step of a small model is hundreds of short kernels, and starting them one by one takes longer than running them. All
that changes from token to token (lengths, slots, masks, which span is full) is computed on the device from the lengths,
so the same recorded kernels serve every length up to the capacity.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoding.cache import Cache
from model.decoding.step import FixedStep

COMPILER = "inductor"

WARM_UP = 2
"""Runs before the recording: kernels are compiled and memory is taken then."""


def require_gpu(device: torch.device) -> None:
    """Raises ValueError where nothing can be recorded."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=true: the model is on {device.type}, and must be on cuda")


class TokenStep:
    """Reads one token of each sequence into `cache`, which may hold a text already, up to `capacity` tokens of each.

    `cuda_graph`: record the step, and replay it; else the same kernels are started one by one, on any device.
    `compiled`: by torch.compile, as one graph, which fuses all that lies around products and attention: about a minute
    of work, for a step of a fraction of the kernels; of masks over tokens alone (Inductor of torch 2.11 fails on the
    pooling of summaries). Raises ValueError where a layer's family has no such step, or a graph is wanted and the model
    is on a CPU. The model's mode, and autocast, are those at the time of
    recording.
    """

    @torch.no_grad()
    def __init__(self, cache: Cache, capacity: int, cuda_graph: bool, compiled: bool = False) -> None:
        device = cache.model.embed_tokens.weight.device
        if cuda_graph:
            require_gpu(device)
        cache.reserve(capacity, compiled)
        self.cache, self.capacity = cache, capacity
        self._tokens = torch.zeros(cache.batch, 1, dtype=torch.int64, device=device)
        self._new = torch.zeros(cache.batch, dtype=torch.int64, device=device)
        self._lengths = torch.tensor(cache.lengths, device=device)
        self._told = [list(cache.lengths), [0] * cache.batch]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._step = self._run
        if compiled:
            self._run()  # no sequence has a new token: kernels check themselves, memory is taken, no more
            compile_one = torch.compile(self._run, backend=COMPILER, fullgraph=True, dynamic=False)
            self._step = torch.compiler.set_stance("default")(compile_one)  # also within model.inference.evaluating
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
        for buffer, told, wanted in zip((self._lengths, self._new), self._told, (self.cache.lengths, new), strict=True):
            if told != wanted:
                buffer.copy_(torch.tensor(wanted))
        if self._graph is None:
            hidden = self._step()
        else:
            self._graph.replay()
            hidden = self._hidden
        self.cache.settle(after)
        self._told = [after, new]
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
                    self._step()
            torch.cuda.current_stream(device).wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._hidden = self._step()
        finally:
            torch.set_autocast_cache_enabled(caching)
