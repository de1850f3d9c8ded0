"""Training steps that are replayed from a CUDA graph give the results of steps without one. On a CPU, a stand-in takes
the place of the graph."""

import copy
import math
import signal
from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
from stand_ins import TRAINER, Capture, StandInRecorder, Stream, TinyData, TinyModel, new_module, run_folder
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from kernels.layout.lru_cache import LRUCache, cached_values
from model.training.checkpoints import CheckpointFile
from model.training.failures import DivergedError
from model.training.fit import fit
from model.training.metrics import read_rows
from model.training.module import LanguageModel
from model.training.step_graph import WARM_UP, CaptureError, StepGraph


class Layouts(TinyModel):
    """Layouts of tensors, as those of real models are."""

    def build_layouts(self, document: Tensor, length: int) -> list:
        return [torch.full((), length), document.double().mean()]

    def cost(self, layouts: list, batch: int = 1) -> Any:
        return super().cost([layout.item() for layout in layouts], batch)


class OddBatches(TinyData):
    """Every fifth batch has one sequence instead of two."""

    def train_dataloader(self) -> DataLoader:
        loader = super().train_dataloader()

        class Batches(BatchSampler):
            def __iter__(self):
                indices = iter(self.sampler)
                for number in range(len(self)):
                    yield [next(indices) for _ in range(1 if number % 5 == 4 else 2)]

        stream = loader.sampler
        assert isinstance(stream, Stream)
        return DataLoader(loader.dataset, batch_sampler=Batches(stream, 2, drop_last=False))


def trained(path, monkeypatch, *, graph: bool, model: Callable = Layouts, data=None, resume=False, seed=0, **changes):
    """(weights, rows of metrics.csv, summary, stand-in) of a run."""
    recorder = StandInRecorder()
    monkeypatch.setattr(LanguageModel, "_recorder", lambda self: recorder)
    torch.manual_seed(seed)
    module, folder = new_module(model=model()), run_folder(path)
    checkpoint = CheckpointFile(folder.checkpoints / "last.ckpt") if resume else None
    settings = TRAINER | dict(validate_every=5, gradient_clip=0.3, cuda_graph=graph) | changes
    result = fit(module, data or TinyData(), folder, resume=checkpoint, **settings)
    weights = copy.deepcopy(module.model.state_dict())
    rows = read_rows(folder.metrics_file)[1]
    kept = [{k: v for k, v in row.items() if k.startswith(("train/", "validation/", "density"))} for row in rows]
    return weights, kept, result.summary, recorder


def assert_same(one, other) -> None:
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name
    assert one[1] == other[1]


class Counted(TinyData):
    """Counts the targets of each batch, as data.DataModule does."""

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return batch | {"scored": int((batch["targets"] != -100).sum())}


@pytest.mark.parametrize("graph", [False, True])
def test_the_loss_gets_the_number_of_targets_except_in_a_graph(graph, tmp_path, monkeypatch):
    """The number differs from batch to batch, and a graph's sizes do not."""
    given = []

    class Counting(Layouts):
        def loss(self, tokens, targets, position, layouts, scored=None):
            given.append((self.training, scored, int((targets != -100).sum())))
            return super().loss(tokens, targets, position, layouts)

    monkeypatch.setattr(Capture, "FORBIDDEN", ())  # this model reads its targets
    trained(tmp_path, monkeypatch, graph=graph, model=Counting, data=Counted(), max_steps=5)
    training, validation = ([(n, targets) for state, n, targets in given if state == kind] for kind in (True, False))
    assert {n is None for n, _ in training} == {graph}
    assert all(n == targets for n, targets in validation + ([] if graph else training))
    assert len({targets for _, targets in training}) > 1 and validation


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_replayed_steps_have_the_bits_of_the_others(accumulate, tmp_path, monkeypatch):
    """Weights, losses, norms, densities: batches that differ, dropout, clipping, validations in between."""
    settings = dict(accumulate=accumulate, max_steps=12)
    plain = trained(tmp_path / "plain", monkeypatch, graph=False, **settings)
    replayed = trained(tmp_path / "graph", monkeypatch, graph=True, **settings)
    assert_same(plain, replayed)
    assert plain[3].runs == plain[3].captures == 0, "without a graph, nothing takes its way"
    recorder = replayed[3]
    assert (recorder.captures, recorder.runs, recorder.replays) == (1, WARM_UP, 12 * accumulate - WARM_UP)
    assert plain[2]["peak_memory_bytes"] < 10**15 < replayed[2]["peak_memory_bytes"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_smaller_batch_runs_without_the_graph_which_is_then_captured_anew(accumulate, tmp_path, monkeypatch):
    settings = dict(accumulate=accumulate, max_steps=10)
    plain = trained(tmp_path / "plain", monkeypatch, graph=False, data=OddBatches(), **settings)
    replayed = trained(tmp_path / "graph", monkeypatch, graph=True, data=OddBatches(), **settings)
    assert_same(plain, replayed)
    odd = 2 * accumulate
    recorder = replayed[3]
    assert (recorder.captures, recorder.runs) == (odd, odd * (WARM_UP + 1))
    assert plain[2]["peak_memory_bytes"] < 10**15 < replayed[2]["peak_memory_bytes"], "the last graph is freed"


class StopAfter(lightning.Callback):
    """Presses Ctrl-C in the second micro-batch of step 7."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 6 and batch_idx % 2:
            signal.raise_signal(signal.SIGINT)


def test_a_resumed_run_captures_again_and_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    settings = dict(graph=True, accumulate=2, max_steps=12)
    whole = trained(tmp_path / "whole", monkeypatch, **settings)
    first = trained(tmp_path / "parts", monkeypatch, callbacks=[StopAfter()], **settings)
    assert first[2]["state"] == "interrupted" and first[2]["step"] == 7
    parts = trained(tmp_path / "parts", monkeypatch, resume=True, seed=5, **settings)
    assert_same(whole, parts)
    assert (parts[3].captures, parts[3].replays) == (1, 10 - WARM_UP)


def test_a_step_that_is_not_finite_is_skipped_or_stops_the_run(tmp_path, monkeypatch):
    class Exploding(Layouts):
        """Infinite at the batches whose first document ends at the fifth token."""

        def loss(self, tokens, targets, position, layouts, scored=None):
            out = super().loss(tokens, targets, position, layouts)
            broken = (position[:, 5] == 0).any() & self.training
            return type(out)(**vars(out) | {"total": out.total * torch.where(broken, math.inf, 1.0)})

    settings = dict(max_steps=12, model=Exploding, validate_every=None)
    skipping = settings | dict(on_nan="skip_step", max_skipped_steps=12)
    plain, replayed = (trained(tmp_path / str(g), monkeypatch, graph=g, **skipping) for g in (False, True))
    assert_same(plain, replayed)
    assert 0 < plain[2]["skipped_steps"] == replayed[2]["skipped_steps"] < 12
    messages = []
    for graph in (False, True):
        with pytest.raises(DivergedError, match="step") as caught:
            trained(tmp_path / f"stop{graph}", monkeypatch, graph=graph, **settings)
        messages.append(str(caught.value).partition(":")[0])
    assert messages[0] == messages[1]


def weight_and_loss() -> tuple[torch.nn.Parameter, Callable]:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    return weight, lambda batch: ((weight * batch["x"]).sum(), {"double": 2 * batch["x"]})


def test_another_stage_is_captured_anew():
    weight, compute = weight_and_loss()
    recorder = StandInRecorder()
    graph = StepGraph(compute, [weight], recorder)
    for number in range(8):
        stage = number >= 4
        loss, results = graph.run({"x": torch.tensor([float(number)])}, stage, first=True)
        weight.grad = None  # as zero_grad
        graph.attach_gradients()
        assert (loss.item(), weight.grad.item(), results["double"].item()) == (2 * number, number, 2 * number)
        assert not loss.requires_grad
    assert (recorder.captures, recorder.runs, recorder.replays) == (2, 4, 4)
    graph.release()
    assert recorder.idle_bytes == 0


class Refusing(StandInRecorder):
    def capture(self, function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


def test_a_step_that_cannot_be_captured_is_one_line_or_runs_without_a_graph(caplog):
    weight, compute = weight_and_loss()
    graph = StepGraph(compute, [weight], Refusing(), required=False)
    for number in range(WARM_UP + 3):
        loss, _ = graph.run({"x": torch.tensor([float(number)])}, None, first=True)
        graph.attach_gradients()
        assert (loss.item(), weight.grad.item()) == (2 * number, number)
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith("trainer.cuda_graph=auto: a training step cannot be captured") and "\n" not in warning
    graph = StepGraph(compute, [weight], Refusing(), required=True)
    with pytest.raises(
        CaptureError, match=r"^trainer\.cuda_graph=true: must be false or auto: .*not permitted.*capturing$"
    ):
        for number in range(WARM_UP + 1):
            graph.run({"x": torch.tensor([float(number)])}, None, first=True)


def test_a_capture_without_enough_memory_says_so(caplog):
    """`auto` trains on: the batches before it had enough."""

    class Full(StandInRecorder):
        def capture(self, function):
            raise torch.OutOfMemoryError("CUDA out of memory")

    weight, compute = weight_and_loss()
    graphs = [StepGraph(compute, [weight], Full(), required=required) for required in (True, False)]
    batches = [{"x": torch.tensor([float(number)])} for number in range(WARM_UP + 2)]
    with pytest.raises(torch.OutOfMemoryError):
        for batch in batches:
            graphs[0].run(batch, None, first=True)
    for number, batch in enumerate(batches):
        assert graphs[1].run(batch, None, first=True)[0].item() == 2 * number
    (warning,) = [record.message for record in caplog.records]
    assert "OutOfMemoryError: CUDA out of memory. Steps run without one" in warning


def test_a_failed_capture_leaves_nothing_that_it_has_not_computed():
    """Neither autocast's copies of weights nor values in caches: the batch runs on, as if it had not been captured."""
    weight, cache = torch.nn.Parameter(torch.ones(2, 2)), LRUCache[Tensor](size=8)
    captured: list[bool] = []

    class Failing(StandInRecorder):
        def capture(self, function):
            before = weight.detach().clone()
            weight.data.fill_(math.nan)  # no kernel runs: what depends on the weight holds no number
            captured.append(True)
            try:
                return function()
            finally:
                weight.data.copy_(before)

    def compute(batch):
        kept = cache.get("kept", lambda: torch.ones(()))
        scale = cache.get("new", lambda: weight.detach().mean()) if captured else kept
        loss = torch.nn.functional.linear(batch["x"], weight).float().sum() * scale
        if len(captured) == 1:
            captured.append(True)
            raise RuntimeError("operation not permitted when stream is capturing")
        return loss, {}

    graph = StepGraph(compute, [weight], Failing(), required=False)
    with torch.autocast("cpu", torch.bfloat16):
        for number in range(WARM_UP + 2):
            loss, _ = graph.run({"x": torch.full((1, 2), float(number))}, None, first=True)
            graph.attach_gradients()
            assert loss.item() == 4 * number and weight.grad.eq(number).all()
    assert len(captured) == 2 and list(cache.values) == ["kept", "new"]


def test_gradients_that_the_optimizer_sets_to_zero_in_place_are_not_those_of_the_next_step():
    """Between `run` and `attach_gradients`, as in Lightning's closure."""
    weight, compute = weight_and_loss()
    recorder = StandInRecorder()
    graph, optimizer = StepGraph(compute, [weight], recorder), torch.optim.SGD([weight], lr=0.0)
    for number in range(1, 6):
        graph.run({"x": torch.tensor([float(number)])}, None, first=True)
        optimizer.zero_grad(set_to_none=False)
        graph.attach_gradients()
        assert weight.grad.item() == number
    assert recorder.replays == 3


def test_a_replay_reads_what_caches_have_forgotten_and_the_stand_in_knows_freed_memory():
    cache, held = LRUCache[Tensor](size=1), [torch.tensor(3.0)]
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    compute = lambda batch: ((weight * batch["x"] * cache.get("a", lambda: torch.ones(()) * 5)).sum() * held[0], {})  # noqa: E731
    graph = StepGraph(compute, [weight], StandInRecorder())
    run = lambda: graph.run({"x": torch.tensor([1.0])}, None, first=True)[0].item()  # noqa: E731
    assert [run() for _ in range(4)] == [30.0] * 4
    cache.get("b", lambda: torch.ones(()))
    assert [run() for _ in range(2)] == [30.0] * 2
    held[0] = torch.tensor(4.0)
    with pytest.raises(RuntimeError, match="a replay reads memory that has been freed"):
        run()


def test_a_graph_keeps_what_caches_may_forget():
    cache: LRUCache[object] = LRUCache(size=1)
    kept = cache.get("a", object)
    found = cached_values()
    cache.get("b", object)
    assert any(each is kept for each in found) and not any(each is kept for each in cached_values())
