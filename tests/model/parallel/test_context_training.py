"""Training with sequences that several ranks share, against one process that trains on the same sequences."""

import pytest
import torch

from tests.commands import compose
from tests.model.parallel import context_runs, training
from tests.model.parallel.context_runs import COLUMNS, EARLIER, PATTERNS
from tests.model.parallel.ranks import run_on_ranks
from tests.scripts.runs import SMALL, write_books
from train import train

INTERLEAVED, CONTIGUOUS, GROWING = ({"family": family} for family in PATTERNS)
CASES: dict[int, dict[str, list[dict]]] = {
    2: {
        "interleaved": [INTERLEAVED | {"context_parallel": 2}],
        "fsdp2": [CONTIGUOUS | {"context_parallel": 2, "strategy": "fsdp2"}],
        "resumed": [CONTIGUOUS | {"context_parallel": 2, "max_steps": 2}, CONTIGUOUS | {"context_parallel": 2}],
    },
    4: {
        "data parallelism beside": [INTERLEAVED | {"context_parallel": 2}],
        "contiguous": [CONTIGUOUS | {"context_parallel": 4}],
        "growing": [GROWING | {"context_parallel": 2}],
    },
}
"""Number of ranks -> name -> the sessions of a run."""


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    return write_books(tmp_path_factory.mktemp("corpus") / "books")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, books):
    root = tmp_path_factory.mktemp("alone")
    return {family: context_runs.train(root / family, books, family, context_parallel=1) for family in PATTERNS}


@pytest.fixture(scope="module", params=CASES)
def together(request, tmp_path_factory, books, alone):
    """Of each case of a number of ranks, its family and what rank 0 measured."""
    cases = CASES[request.param]
    folders = str(tmp_path_factory.mktemp("runs")), str(books)
    found = run_on_ranks(context_runs.train_on_ranks, request.param, cases, *folders)[0]
    return [(sessions[0]["family"], found[name]) for name, sessions in cases.items()]


def assert_same(found: dict, expected: dict) -> None:
    truth = torch.tensor(expected["rows"], dtype=torch.float64)
    finite = dict(zip(COLUMNS, truth.isfinite().sum(0).tolist(), strict=True))
    assert all(finite.values()) and finite["train/loss"] == 4 and finite["validation/loss"] == 2
    rows = torch.tensor(found["rows"], dtype=torch.float64)
    torch.testing.assert_close(rows, truth, rtol=1e-9, atol=0, equal_nan=True)
    assert found["train_tokens"] == expected["train_tokens"] == 4 * 2 * 2 * 128


def test_metrics_are_those_of_one_process(alone, together):
    """Of every step, and of a run that was stopped and resumed."""
    for family, result in together:
        assert_same(result, alone[family])


def test_the_bytes_of_each_kind_of_layer_are_logged_once_a_phase(together):
    for family, result in together:
        lines = [line for line in result["log"] if "forward and" in line]
        patterns = [*EARLIER.get(family, {}).values(), *PATTERNS[family].values()]
        assert [line.split(": ", 1)[1] for line in lines] == [str(pattern) for pattern in patterns]


def test_a_layout_that_is_too_small_on_one_rank_ends_the_run_on_all(tmp_path, books):
    """No rank waits for one that has stopped."""
    assert run_on_ranks(context_runs.one_rank_overflows, 2, str(tmp_path), str(books)) == ["LayoutOverflowError"] * 2


def test_train_py_on_two_ranks(tmp_path, books):
    """Each rank trains on its part of the sequences, and the first evaluates the whole model."""
    settings = (*SMALL, "data=files", f"data.path={books}", f"data.cache={tmp_path / 'cache'}", "evaluation=chunked")
    settings += ("trainer.max_steps=2", "trainer.validate_every=2", "attention=hierarchical")
    settings += tuple(f"attention.patterns.hierarchy.{each}" for each in ("window=20", "spans=[4,16]", "reaches=[40]"))
    alone = train(compose(*settings), tmp_path / "alone")
    shared = ("trainer.devices=2", "trainer.strategy=ddp", "trainer.context_parallel=2")
    summary = run_on_ranks(training.run_train_py, 2, compose(*settings, *shared), str(tmp_path / "shared"))[0]
    assert summary["state"] == "finished" and summary["train_tokens"] == alone["train_tokens"]
    for key in ("validation_loss", "density_pairs", "loss"):
        assert summary[key] == pytest.approx(alone[key], rel=1e-5), key
