"""The forward pass, loss and backward pass of a training batch, captured once in a CUDA graph and replayed.

A step of a small model consists of more than a thousand short kernels. To launch them one by one takes the host longer
than it takes the device to run them; a graph is launched at once.

    first WARM_UP batches of one shape    run kernel by kernel: layers are compiled, caches are filled
    next batch                            captured, and replayed
    later batches                         batch --copy--> inputs of the graph --replay--> results and gradients

A replay runs the same kernels on the same addresses, and none of the Python code. So everything that changes from batch
to batch must be a tensor that is computed from the batch's tensors. Other work of a step stays outside of the graph:
the position in the data, the sums that are logged, clipping, the optimizer. Settings that change rarely, such as
patterns or which parameters train, are the `stage`: a batch of another stage or another shape is captured anew.

Memory. A graph has memory of its own for activations, gradients and results. The warm-ups free as much before the
capture; but nothing else, such as the optimizer's stacks or a validation, can use the graph's memory between replays.
"""

import abc
import gc
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from kernels.layout.lru_cache import cached_values, forget_all_but
from model.training.failures import is_out_of_memory, size
from model.training.memory_use import peak_memory_bytes, reset_peak_memory

log = logging.getLogger(__name__)

WARM_UP = 2
"""Batches of one shape that run kernel by kernel, before the capture."""

Results = TypeVar("Results")
Batch = Mapping[str, Tensor | None]


class CaptureError(RuntimeError):
    """A training step could not be captured in a CUDA graph."""


class GraphRecorder(abc.ABC):
    """Captures a function and replays it. Subclasses: CudaRecorder, and a stand-in for tests on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.idle_bytes = 0
        """Bytes of the latest graph's memory pool that are free between replays, and that nothing else can use."""
        self.earlier_peak = 0
        """Peak memory in bytes before the latest graph was captured, including the `idle_bytes` of earlier graphs."""

    def peak_memory_bytes(self) -> int:
        """Peak memory of the training so far, including what its graphs kept to themselves."""
        return max(self.earlier_peak, peak_memory_bytes(self.device) + self.idle_bytes)

    def release(self) -> None:
        """Counts the memory of the latest graph as free from now on."""
        self.earlier_peak = self.peak_memory_bytes()
        self.idle_bytes = 0

    @abc.abstractmethod
    def run(self, function: Callable[[], Results]) -> Results:
        """Runs `function` once, on the stream on which it would be captured."""

    @abc.abstractmethod
    def capture(self, function: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """Returns the results of `function`, which hold no values yet, and a function that computes their values.
        Raises the error of `function` if it fails."""


class CudaRecorder(GraphRecorder):
    """Captures on a stream of its own, on which warm-ups run too: autograd and cuBLAS keep state by stream."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)

    def run(self, function: Callable[[], Results]) -> Results:
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            results = function()
        caller.wait_stream(self.stream)
        return results

    def capture(self, function: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # the graph's memory takes the place of that of the warm-ups
        before = self._idle()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        _unfinished.append(graph)
        failure: Exception | None = None
        try:
            with self._capturing(graph, pool):
                try:
                    results = function()
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:  # the end of a failed capture raises an error of its own, which hides the cause
            failure = failure or error
        if failure is not None:
            self._end_failed(pool)
            try:
                raise failure
            finally:
                failure = None  # its traceback refers to this frame, and would keep the step's tensors in memory
        _unfinished.remove(graph)
        self.release()
        self.idle_bytes = self._idle() - before
        reset_peak_memory(self.device)  # `idle_bytes` counts from now on what the warm-ups' peak has counted
        return results, graph.replay

    @contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
        # The outer context restores the caller's stream even if the capture fails, where the inner one does not.
        # thread_local: a loader's thread may allocate pinned memory meanwhile, which a global capture forbids.
        with torch.cuda.stream(self.stream), torch.cuda.graph(graph, pool, self.stream, "thread_local"):
            yield

    def _end_failed(self, pool: Any) -> None:
        """Completes the end of a failed capture, which PyTorch 2.11 to 2.13 leaves incomplete. Otherwise the allocator
        returns no more memory to the device, and drawing a random number on it is an error."""
        device = self.stream.device_index
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
        except RuntimeError:  # PyTorch has ended the allocation itself
            pass
        else:
            torch._C._cuda_releasePool(device, pool)
        # A capture that ends well resets the random generator.
        with self._capturing(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()):
            torch.zeros(1, device=self.device)

    def _idle(self) -> int:
        return torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)


_unfinished: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture has failed. PyTorch's allocators may refer to them until the process ends."""


class StepGraph(Generic[Results]):
    """Computes the gradients of batches. From the third batch of one shape on, it replays a CUDA graph.

    Args:
        compute: maps a batch to (loss, results): a scalar with gradients, and tensors in any structure, without. It may
            read nothing else that changes, and must change nothing.
        accumulate: batches whose gradients are added. The loss of each is divided by it, as Lightning does.
        required: raise CaptureError if a step cannot be captured; otherwise warn, and run kernel by kernel.
    """

    def __init__(
        self,
        compute: Callable[[Batch], tuple[Tensor, Results]],
        parameters: Sequence[nn.Parameter],
        recorder: GraphRecorder,
        accumulate: int = 1,
        required: bool = True,
    ) -> None:
        self.compute, self.parameters, self.recorder = compute, list(parameters), recorder
        self.accumulate, self.required = accumulate, required
        self.gradients: dict[nn.Parameter, Tensor] = {}
        """Parameter -> the sum of its gradients over the batches of the current optimizer step."""
        self.fails = False
        self._key: Hashable = None
        self._forget()

    def release(self) -> None:
        """Frees the graph and its memory."""
        self._forget()
        self.recorder.release()

    def _forget(self) -> None:
        self.runs = 0  # of the present shape and stage
        self._replay: Callable[[], None] | None = None
        self._captured: Any = None
        self._inputs: Batch = {}
        self._cached: list[Any] = []

    def run(self, batch: Batch, stage: Hashable, first: bool) -> tuple[Tensor, Results]:
        """Returns (loss, results) of a batch, which the next call may overwrite, and computes its gradients, which
        `attach_gradients` gives to the parameters.

        stage: what else the results depend on. first: this is the first batch of an optimizer step.
        """
        shapes = {name: None if x is None else (x.shape, x.dtype) for name, x in batch.items()}
        key = stage, tuple(shapes.items())
        earlier = {} if first else self.gradients
        self.gradients = {}
        if key != self._key:
            self.release()
            self._key = key
        if self._replay is None and self.runs >= WARM_UP and not self.fails:
            self._capture(batch)
        if self._replay is None:
            outputs, gradients = self.recorder.run(lambda: self._run(batch))
        else:
            for name, tensor in batch.items():
                if tensor is not None:
                    self._inputs[name].copy_(tensor)
            self._take_gradients()  # those that an optimizer may set to zero are the graph's
            self._replay()
            outputs, gradients = self._captured
        self.runs += 1
        self.gradients = self._accumulated(earlier, gradients)
        return outputs

    def attach_gradients(self) -> None:
        """Sets the gradients of all parameters to the sums over the batches of this step so far, also if they were set
        to None since `run`, as the optimizer's `zero_grad` does."""
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient

    def _run(self, batch: Batch) -> tuple[tuple[Tensor, Results], dict[nn.Parameter, Tensor]]:
        self._take_gradients()
        # A graph must not read its copies of weights, which are freed; and a capture that failed has computed none.
        torch.clear_autocast_cache()
        loss, results = self.compute(batch)
        torch.clear_autocast_cache()  # its copies of weights would stay in memory during the backward pass
        with torch.autocast(loss.device.type, enabled=False):
            (loss / self.accumulate).backward()
        return (loss.detach(), results), self._take_gradients()

    def _take_gradients(self) -> dict[nn.Parameter, Tensor]:
        """Returns the gradients of the parameters, which have none afterwards."""
        gradients = {p: p.grad for p in self.parameters if p.grad is not None}
        for parameter in gradients:
            parameter.grad = None
        return gradients

    def _capture(self, batch: Batch) -> None:
        inputs = {name: None if x is None else x.clone() for name, x in batch.items()}
        cached = cached_values()
        try:
            self._captured, self._replay = self.recorder.capture(lambda: self._run(inputs))
        except Exception as error:  # CUDA, PyTorch and Triton have an exception each for what they cannot capture
            forget_all_but(cached)  # what the capture has added to caches was not computed
            if self.required and is_out_of_memory(error):
                raise
            reason = next(iter(str(error).splitlines()), "")
            message = f"a training step cannot be captured in a CUDA graph: {type(error).__name__}: {reason}"
            if self.required:
                raise CaptureError(f"trainer.cuda_graph=true: must be false or auto: {message}") from error
            log.warning("trainer.cuda_graph=auto: %s. Steps run without one.", message)
            self.fails = True
            return
        self._inputs = inputs
        # The graph reads their tensors by address: they must outlive their place in a cache.
        self._cached = cached_values()
        log.info(
            "training steps are replayed from a CUDA graph; it keeps %s between them", size(self.recorder.idle_bytes)
        )

    def _accumulated(
        self, earlier: dict[nn.Parameter, Tensor], gradients: dict[nn.Parameter, Tensor]
    ) -> dict[nn.Parameter, Tensor]:
        """Adds the gradients of a batch to those of earlier batches of the same step."""
        if self.accumulate == 1:
            return gradients
        if not earlier:  # the next replay overwrites those of a graph
            return gradients if self._replay is None else {p: x.clone() for p, x in gradients.items()}
        assert earlier.keys() == gradients.keys(), "the batches of a step train the same parameters"
        torch._foreach_add_([earlier[p] for p in gradients], list(gradients.values()))
        return earlier
