"""CudaRecorder on a stand-in for what PyTorch 2.11 keeps of a capture: which memory is the graph's, and whether the
random generator is captured. A capture that fails leaves both as in its middle."""

import contextlib
import weakref
from types import SimpleNamespace

import pytest
import torch

from kernels.shapes import require
from model.training.step_graph import CudaRecorder

ENDED = "operation failed due to a previous error during capture"


class Cuda:
    """The functions of torch.cuda that a CudaRecorder calls."""

    def __init__(self) -> None:
        self.pools: list[tuple[int, int]] = []
        """Pools that the allocator takes memory of captures from."""
        self.owned: list[tuple[int, int]] = []
        self.generator_is_captured = self.invalid = False
        self.made = self.allocated = 0

    def graph_pool_handle(self) -> tuple[int, int]:
        self.made += 1
        return (0, self.made)

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.pools.append(pool)
        self.owned.append(pool)
        self.generator_is_captured, self.invalid = True, False
        try:
            yield
        finally:
            if self.invalid:
                raise RuntimeError(ENDED)
            self.pools.remove(pool)
            self.generator_is_captured = False

    def synchronizing(self) -> None:
        self.invalid = True
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def end_allocate_to_pool(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)

    def release_pool(self, device: int, pool: tuple[int, int]) -> None:
        self.owned.remove(pool)


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    cuda, stream = Cuda(), SimpleNamespace(device_index=0)
    fakes = dict(
        Stream=lambda device: stream,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
        graph=cuda.graph,
        graph_pool_handle=cuda.graph_pool_handle,
        stream=lambda stream: contextlib.nullcontext(),
        synchronize=lambda device: None,
        empty_cache=lambda: None,
        memory_reserved=lambda device: 100 + cuda.allocated,
        memory_allocated=lambda device: 100,
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocate_to_pool, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", cuda.release_pool, raising=False)
    return cuda


def test_a_capture_that_fails_gives_its_own_error_and_leaves_nothing_begun(cuda):
    recorder, alive = CudaRecorder(torch.device("cpu")), []

    def step():
        activations = torch.ones(3)
        alive.append(weakref.ref(activations))
        cuda.synchronizing()

    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing") as caught:
        recorder.capture(step)
    assert caught.value.__cause__ is None and not cuda.generator_is_captured
    assert cuda.pools == [] and (0, 1) not in cuda.owned
    del caught
    assert alive[0]() is None, "the error was all that held the step's tensors"


def test_an_error_of_python_ends_a_capture_as_it_should(cuda):
    recorder = CudaRecorder(torch.device("cpu"))
    with pytest.raises(ValueError, match="wrong"):
        recorder.capture(lambda: require(False, "wrong"))
    assert not cuda.pools and not cuda.generator_is_captured


def test_memory_of_a_graph_is_counted_until_another_one_takes_its_place(cuda):
    recorder = CudaRecorder(torch.device("cpu"))

    def step(size: int) -> str:
        cuda.allocated += size
        return "results"

    results, _ = recorder.capture(lambda: step(10**15))
    assert (results, recorder.idle_bytes) == ("results", 10**15) and recorder.earlier_peak < 10**15
    recorder.release()
    assert recorder.idle_bytes == 0 and recorder.earlier_peak > 10**15
    recorder.capture(lambda: step(5))
    assert recorder.idle_bytes == 5 and recorder.earlier_peak > 10**15
