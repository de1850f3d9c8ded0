"""Forecast and end of runs on a real GPU."""

import json

import pytest
import torch

from model.training.failures import OUT_OF_MEMORY, RunOutOfMemoryError
from model.training.run_folder import RunFolder
from tests.commands import compose, run
from tests.scripts.runs import write_books

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Some 60,000 tokens, and a few sequences of 4,096 to validate with."""
    return write_books(tmp_path_factory.mktemp("gpu") / "books", words=4000)


def settings(books, outputs):
    """About 17 million parameters on 16,384 tokens a step."""
    files = ("data=files", f"data.path={books}", f"data.cache={books.parent / 'cache'}", f"outputs={outputs}")
    data = ("data.tokenizer.vocabulary=300", "data.sequence_length=4096", "data.batch_size=4")
    return [*files, *data, "model=tiny", "trainer=gpu", "trainer.compile=false", "trainer.cuda_graph=false"]


@pytest.mark.parametrize(
    "chosen",
    [("attention=window",), ("attention=routed",), ("trainer.compile=true", "trainer.fp8=mlp_and_head")],
    ids=" ".join,
)
def test_the_forecast_is_within_a_tenth_of_the_allocators_peak(books, tmp_path, chosen):
    overrides = (*settings(books, tmp_path), *chosen)
    result = run("scripts/benchmark.py", "memory", "--one", "--overrides", *overrides, CUDA_VISIBLE_DEVICES="0")
    row = json.loads(result.stdout.splitlines()[-1])
    assert row["measured_mb"] > 500, "too small a run to say anything"
    assert row["forecast_mb"] == pytest.approx(row["measured_mb"], rel=0.1), row


@pytest.fixture
def half_a_gigabyte():
    """This process may take so much more of the GPU than it holds now."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 500e6) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_a_run_that_exceeds_the_memory_says_what_was_forecast_and_what_would_help(books, tmp_path, half_a_gigabyte):
    from train import train

    with pytest.raises(RunOutOfMemoryError) as caught:
        train(compose(*settings(books, tmp_path), "name=too_large", "trainer.max_steps=3"))
    message = str(caught.value)
    assert "\n" not in message
    assert f": out of memory on {torch.cuda.get_device_name()}; " in message
    assert "Tried to allocate" in message and "PyTorch held" in message
    (folder,) = (tmp_path / "too_large").iterdir()
    summary = RunFolder.open(folder).read_summary()
    assert summary["state"] == OUT_OF_MEMORY and summary["step"] == 0
    forecast = summary["forecast"]["peak_memory_bytes"]
    assert forecast > 1e9 and f"the forecast was {forecast / 1e9:.2f} GB" in message
    assert "data.sequence_length" in message and "model.activation_checkpointing" in message
