"""evaluate.py suite=recall as a whole: what is asked and written, and that a model which knows is found to."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configs.errors import ConfigError
from configs.recall import recall_cases
from data.collation import NO_TARGET
from kernels.patterns import Hierarchical
from model.evaluation import Answer, recall_suite
from model.evaluation.recall_suite import default_lengths
from scripts.evaluate import evaluate
from tests.commands import compose
from tests.scripts.runs import make_run, write_books

PRECISIONS = ((), ("precision=64-true",), ("precision=32-true",))
DISTANCES = (90, 200, 400)
SMALL = ("suite=recall", "accelerator=cpu", "recall.samples=2", "recall.tasks.common_words=null")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recall")
    books = write_books(folder / "books")
    settings = ("data.sequence_length=512", "attention.patterns.local.width=48")
    return make_run(folder / "outputs", books, *settings, name="window")


def recall(*overrides: str) -> list[dict]:
    return evaluate(compose(*SMALL, *overrides, config_name="evaluate"))


def test_every_task_is_asked_at_every_length_depth_and_distance(run):
    (result,) = recall(f"checkpoint={run}", "recall.lengths=[300,512]")
    rows = result["rows"]
    assert {row["length"] for row in rows} == {300, 512} and not (run / "evaluation.partial").exists()
    tasks = compose(*SMALL, config_name="evaluate")["recall"]["tasks"]
    assert {row["task"] for row in rows} == {name for name, entry in tasks.items() if entry}
    for length in (300, 512):
        passkeys = [row for row in rows if (row["task"], row["length"]) == ("passkey", length)]
        assert [row["depth"] for row in passkeys] == [0.0, 0.25, 0.5, 0.75, 1.0]
        distances = [row["distance"] for row in rows if (row["task"], row["length"]) == ("copy", length)]
        # both sides of the window of 48 and of the reach of two layers of it, the middle and the end
        assert distances == sorted({48, 49, 96, 97, length // 2, length - 24})
    assert {row["answers"] for row in rows} == {2, 8, 16}
    assert all(row["nll"] > row["nll_per_token"] > 0 for row in rows)
    assert json.loads((run / "recall.json").read_text())["rows"] == rows
    assert (run / "report/recall_passkey.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_knows_is_found_to_know(run, monkeypatch):
    """Answers are taken from an oracle that knows those within 400 tokens: the effective length is 400."""
    known = lambda model, batch, _: [Answer(batch["tokens"].shape[1] <= 400, 1.0, 5)] * len(batch["tokens"])  # noqa: E731
    monkeypatch.setattr("model.evaluation.recall_suite.answer", known)
    (result,) = recall(f"checkpoint={run}", "recall.lengths=[300,400,512]")
    assert set(result["effective_length"].values()) == {400}
    assert result["exact_match"]["passkey"] == {300: 1.0, 400: 1.0, 512: 0.0}


def test_answers_have_the_precision_of_the_training_by_default(tmp_path, capsys):
    in_training = ("data.sequence_length=512", "trainer.accelerator=cpu", "trainer.precision=64-true")
    double = make_run(tmp_path, write_books(tmp_path / "books"), *in_training)
    settings = (f"checkpoint={double}", "recall.lengths=[300]", "recall.samples=1", "recall.tasks.copy=null")
    (by_default,), (in_double,), (in_single,) = (recall(*settings, *own) for own in PRECISIONS)
    assert by_default == in_double and by_default["protocol"]["precision"] == "64-true"
    assert "exact answers by length, 64-true" in " ".join(capsys.readouterr().out.split())
    assert in_single["protocol"]["precision"] == "32-true"
    assert [row["nll"] for row in in_single["rows"]] != [row["nll"] for row in by_default["rows"]]


def test_lengths_are_by_default_those_that_the_run_was_trained_on(run):
    (result,) = recall(f"checkpoint={run}", "recall.tasks.copy=null", "recall.samples=1")
    assert {row["length"] for row in result["rows"]} == {512}


def test_the_same_questions_are_asked_every_time(run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "model.evaluation.recall_suite.answer",
        lambda model, batch, _: seen.append(batch["tokens"]) or [Answer(True, 1.0, 1)],
    )
    for _ in range(2):
        recall(f"checkpoint={run}", "recall.lengths=[300]", "recall.tokens_at_once=1")
    half = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    assert not torch.equal(seen[0], seen[1])


def test_finished_cases_are_not_asked_again_after_an_interruption(run, monkeypatch):
    settings = ("recall.lengths=[300]", "recall.tasks.copy=null")
    (whole,) = recall(f"checkpoint={run}", *settings)
    asked, cases = [], recall_suite.ask

    def interrupted(model, case, *rest, **others):
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append(case)
        return cases(model, case, *rest, **others)

    monkeypatch.setattr("configs.recall.ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recall(f"checkpoint={run}", *settings)
    monkeypatch.setattr("configs.recall.ask", lambda *args, **rest: asked.append(args[1]) or cases(*args, **rest))
    (resumed,) = recall(f"checkpoint={run}", *settings)
    assert resumed == whole and len({*map(str, asked)}) == len(asked) == len(whole["rows"])
    (other,) = recall(f"checkpoint={run}", *settings, "seed=2")
    assert len(asked) == 2 * len(whole["rows"]) and other["rows"] != whole["rows"]


def test_the_default_suite_reads_at_most_22_million_tokens_at_65536():
    """Of the patterns, hierarchical attention has the most edges."""
    pattern = Hierarchical(window=512, spans=(16, 128, 1024), reaches=(4096, 16384), pooling="mean")
    plan = SimpleNamespace(patterns={"hierarchy": pattern})
    model = SimpleNamespace(plan=plan, config=SimpleNamespace(layers=8, max_length=1 << 20))
    settings = compose(config_name="evaluate")["recall"]
    cases = list(recall_cases(settings, SimpleNamespace(model=model, sequence_length=65_536)))
    assert sorted({case.length for case in cases}) == [1024, 4096, 16_384, 65_536]
    assert settings["samples"] * sum(case.length for case in cases) < 22_000_000
    assert default_lengths(32_768) == [1024, 4096, 16_384, 32_768] and default_lengths(512) == [512]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recall.lengths=[0]"], r"recall.lengths=\[0\]: must be a list .*, each an integer >= 1"),
        (["recall.lengths=[2000000]"], r"recall.lengths=\[2000000\]: must be at most the model's limit"),
        (
            ["recall.depths=[2.0]"],
            r"recall.depths=\[2.0\]: must be a list .*, each a number >= 0 and <= 1",
        ),
        (["recall.samples=0"], "recall.samples=0: must be an integer >= 1"),
        (
            ["recall.tasks.passkey._target_=data.recall.text.pass_key"],
            r"recall.tasks.passkey._target_=.*must be a function like",
        ),
        (["recall.lengths=[20]", "recall.tasks.copy=null"], r"length=20: must be at least \d+ tokens"),
    ],
)
def test_what_cannot_be_is_one_line(run, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        recall(f"checkpoint={run}", *overrides)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="must be null for several runs"):
        recall(f"checkpoint=[{run}]", "output=x.json")


RETRIEVAL = ("suite=recall", "recall=retrieval", "accelerator=cpu", "recall.tasks.retrieval.passage=8")


def test_recall_at_one_by_distance_has_confidence_intervals(run, monkeypatch, capsys):
    """Answers are taken from an oracle that knows documents within 200 tokens, and every other one farther away."""

    def known(model, batch, _):
        tokens, targets = batch["tokens"][0], batch["targets"][0]
        answer = tokens[(targets != NO_TARGET).nonzero()[0] + 1 :]
        (distance,) = [d for d in DISTANCES if torch.equal(tokens[-len(answer) - d :][: len(answer)], answer)]
        asked[distance] = asked.get(distance, 0) + 1
        return [Answer(distance <= 200 or asked[distance] % 2 == 0, 1.0, len(answer))]

    asked: dict[int, int] = {}
    monkeypatch.setattr("model.evaluation.recall_suite.answer", known)
    settings = ("recall.lengths=[512]", "recall.samples=10", "recall.tokens_at_once=1")
    distances = f"recall.distances={list(DISTANCES)}"
    (result,) = evaluate(compose(f"checkpoint={run}", *RETRIEVAL, *settings, distances, config_name="evaluate"))
    shares = {row["distance"]: row["exact_match"] for row in result["rows"]}
    assert shares == {90: 1.0, 200: 1.0, 400: 0.5}
    assert result["rows"][-1]["interval"] == pytest.approx([0.2366, 0.7634], abs=1e-4)  # Wilson's interval of 5 in 10
    assert "50.0% (23.7% to 76.3%)" in " ".join(capsys.readouterr().out.split())


def test_distances_of_retrieval_are_octaves(run):
    settings = ("recall.samples=1", "recall.lengths=[400]")
    (result,) = evaluate(compose(f"checkpoint={run}", *RETRIEVAL, *settings, config_name="evaluate"))
    *nearer, longest = (row["distance"] for row in result["rows"])
    assert longest > 350 and nearer == [longest // 4, longest // 2]
    with pytest.raises(ConfigError, match=r"^recall\.lengths=40: must be long enough for recall\.tasks\.retrieval"):
        evaluate(compose(f"checkpoint={run}", *RETRIEVAL, "recall.lengths=[40]", config_name="evaluate"))


def test_a_task_that_does_not_fit_is_refused_before_the_others_are_asked(run, caplog):
    settings = (f"checkpoint={run}", "recall.lengths=[300]", "recall.tasks.needle_multivalue.values=40")
    with caplog.at_level("INFO"), pytest.raises(ConfigError, match=r"needle_multivalue at recall\.lengths=300: "):
        recall(*settings)
    assert "answers" not in caplog.text
