"""The forecast of what an operator allocates while it runs, against what its own code allocates."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from configs.build import build_model
from kernels.selection import indexer_loss
from model.forecasting.memory_estimate import LAYOUTS, estimate_step
from model.forecasting.memory_tracker import MemoryTracker
from model.forecasting.workspace import workspace_bytes
from tests.kernels.selection.test_indexer_loss import OPERATORS, QUERIES, SUMMARIES

COMPUTED = {"chosen": indexer_loss.chosen_blocks, "dense": indexer_loss.eligible_blocks}


@pytest.fixture
def small_slices(monkeypatch):
    """Several slices, of equal sizes in the first test: 10 queries (a chosen target) or one (a dense target)."""
    monkeypatch.setitem(indexer_loss.SCORES_AT_ONCE, "cpu", 160)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", OPERATORS)
def test_an_indexers_loss_allocates_what_is_forecast_byte_by_byte(target, dtype, small_slices):
    operator, arguments = OPERATORS[target]
    cast = lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    arguments = [cast(each) for each in (QUERIES, SUMMARIES.contiguous(), *arguments)]
    tracker = MemoryTracker(granularity=1, workspace=lambda *_: 0)
    with tracker:
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                tracker.track(argument)
        given = tracker.total
        results = COMPUTED[target](*arguments)
    allocated = tracker.peak[""] - given - sum(each.nbytes for each in results)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        assert workspace_bytes(operator, tuple(fakes)) == allocated > 0


def test_the_forecast_runs_as_many_operators_for_longer_sequences(composed, small_slices, monkeypatch):
    router = ("router=indexer", "window=16", "block=16", "indexer_warmup=9")
    config, data = composed("attention=routed", *(f"attention.patterns.routed.{each}" for each in router))
    model = build_model(config, data.vocabulary)
    counts, dispatch = [], MemoryTracker.__torch_dispatch__

    def counted(tracker, *arguments):
        counts[-1] += 1
        return dispatch(tracker, *arguments)

    monkeypatch.setattr(MemoryTracker, "__torch_dispatch__", counted)
    for length in (64, 256):
        counts.append(0)
        estimate_step(model, model.build_layouts(None, length), 1, length, config, torch.device("cpu"))
    assert counts[0] == counts[1]


def test_a_warm_up_of_indexers_alone_is_forecast_by_the_stage_in_which_all_parameters_train(composed):
    def bytes_with(*settings: str) -> dict[str, int]:
        router = ("router=indexer", "window=16", "block=16", *settings)
        config, data = composed("attention=routed", *(f"attention.patterns.routed.{each}" for each in router))
        model = build_model(config, data.vocabulary)
        model.set_step(model.indexers_alone)
        step = estimate_step(model, model.build_layouts(None, 128), 1, 128, config, torch.device("cpu"))
        return {part: size for part, size in step.parts.items() if part != LAYOUTS}

    warmed = ("indexer_warmup=9", "indexer_warmup_alone=true")
    assert bytes_with(*warmed) == bytes_with()
