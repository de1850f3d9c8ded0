"""Generated sequences: each is a function of (seed, split, number), alone and in a mixture, whatever was stopped."""

import json
import re
from itertools import islice

import pytest
import torch

from data import CorpusError, Files
from data.collation import NO_TARGET
from data.sequences.generated import Generated
from data.sources import MixedSource, Mixture, Recall
from tests.data.test_module import train

TASKS = {
    "scattered": {"weight": 2, "spacing": [128, 200]},
    "passkey": {"weight": 1},
    "associative_recall": {"weight": 1, "pairs": [2, 3]},
    "copy": {"weight": 1, "cue": [4], "size": [8]},
}
LENGTH = 256


@pytest.fixture
def recall(make, books):
    """recall(...) -> a DataModule of recall tasks alone, set up."""

    def build(lengths=(), tasks=TASKS, targets="answers", **changes):
        settings = dict(source=Recall(tasks, targets), sequence_length=LENGTH, validation_sequences=4) | changes
        data = make(**settings)
        data.lengths = lengths
        data.setup()
        return data

    return build


@pytest.fixture
def mixed(make, books):
    """mixed(...) -> a DataModule on one sequence of books for each two of recall, set up."""

    def build(lengths=(), path=None, **changes):
        parts = [
            MixedSource("books", Files("text"), str(books), 1),
            MixedSource("recall", Recall(TASKS, "answers"), path, 2),
        ]
        settings = dict(source=Mixture(parts), path=None, sequence_length=LENGTH, validation_sequences=4) | changes
        data = make(**settings)
        data.lengths = lengths
        data.setup()
        return data

    return build


def sequences(loader, count) -> list[list[int]]:
    """The tokens of the first sequences, with the last target."""
    rows = (row for batch in loader for row in torch.cat([batch["tokens"], batch["targets"][:, -1:]], 1).tolist())
    return list(islice(rows, count))


def facts(data, row) -> tuple[tuple[str, str], ...]:
    """The keys and numbers of a sequence, in the order of the text."""
    found = re.findall(r"\n(?:The special number for )?([\w ]+?) (?:=|is) (\d{5})", data.tokenizer.decode(row))
    return tuple(dict.fromkeys(found))


def test_a_sequence_depends_on_seed_and_number_alone(recall):
    whole = sequences(recall().train_dataloader(), 24)
    for settings in (dict(batch_size=3), dict(workers=2)):
        assert sequences(recall(**settings).train_dataloader(), 24) == whole
    later = recall()
    later.cursor = 17
    assert sequences(later.train_dataloader(), 7) == whole[17:]
    assert not {*map(tuple, whole)} & {*map(tuple, sequences(recall(seed=8).train_dataloader(), 24))}
    many = sequences(recall(batch_size=10).train_dataloader(), 500)
    assert len({*map(tuple, many)}) == 500 and {len(row) for row in many} == {LENGTH + 1}


def test_validation_asks_for_other_facts_in_other_text(recall):
    data = recall(validation_sequences=100, batch_size=10)
    trained, held_out = sequences(data.train_dataloader(), 500), sequences(data.val_dataloader(), 100)
    assert held_out == sequences(recall(validation_sequences=100, seed=8).val_dataloader(), 100)
    known = {facts(data, row) for row in trained}
    assert sum(map(len, known)) > 500
    several = [each for row in held_out if len(each := facts(data, row)) > 1]
    assert len(several) > 30 and not known & {*several}
    # A model that remembers every answer of the training knows no more of these than one that guesses.
    pairs = {pair for each in known for pair in each}
    asked = [pair for each in several for pair in each]
    assert sum(pair in pairs for pair in asked) < 0.05 * len(asked)
    text = data.tokenizer.decode(data.corpus.splits["validation"].flat)
    assert sum(data.tokenizer.decode(row[1:9]) in text for row in held_out) > 50  # others begin with a fact


def test_the_same_index_holds_other_facts_for_another_seed_or_split(recall):
    data = recall(tasks={"associative_recall": {"weight": 1, "pairs": [3]}})
    found = {
        (split, seed): [
            facts(data, Generated(data.source, documents, data.tokenizer, LENGTH, seed)[n]["tokens"]) for n in range(5)
        ]
        for split, documents in data.corpus.splits.items()
        for seed in (7, 8)
    }
    train, other = found["train", 7], found["train", 8]
    assert len({*train, *other}) == 10
    assert found["validation", 7] == found["validation", 8] and len({*train, *other, *found["validation", 7]}) == 15


def test_the_text_is_that_of_a_column(recall, tmp_path):
    rows = [{"id": number, "body": f"text {number} " * 30} for number in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = recall(source=Recall(TASKS, "answers", text_column="body"), path=str(tmp_path / "rows.jsonl"))
    texts = {split.text(n) for split in data.corpus.splits.values() for n in range(len(split))}
    assert texts == {row["body"] for row in rows}


def test_answers_alone_are_targets_unless_all_are_asked_for(recall):
    answers, everything = (recall(targets=targets) for targets in ("answers", "all"))
    one, other = (next(iter(data.train_dataloader())) for data in (answers, everything))
    assert torch.equal(one["tokens"], other["tokens"]) and (other["targets"] != NO_TARGET).all()
    assert torch.equal(other["targets"][:, :-1], other["tokens"][:, 1:])
    scored = one["targets"] != NO_TARGET
    assert 0 < scored.double().mean() < 0.5 and torch.equal(one["targets"][scored], other["targets"][scored])
    assert answers.text_sources == [] and "endless generated sequences" in answers.describe_training()
    assert one["document"].dtype == one["position"].dtype == torch.int32


def test_it_resumes_exactly(recall, tmp_path):
    whole, weight = train(recall(), tmp_path / "whole", 16)
    read, resumed_weight = train(recall(), tmp_path / "more", 16, resume=tmp_path / "whole" / "step_8.ckpt")
    assert read == whole[8:] and resumed_weight == weight
    other = recall(tasks=TASKS | {"copy": None})
    with pytest.raises(CorpusError, match=r"the tasks of data\.source: must be those of the checkpoint"):
        train(other, tmp_path / "other", 16, resume=tmp_path / "whole" / "step_8.ckpt")


def test_a_mixture_has_its_shares_of_text_and_generated_sequences(mixed, make):
    data = mixed(batch_size=1)
    text = make()
    text.setup()
    assert data.corpus.contents == text.corpus.contents, "recall adds no documents"
    assert data.text_sources == ["books"]
    assert data.describe_training().endswith(" tokens to train on beside generated sequences")
    batches = list(islice(data.train_dataloader(), 60))
    generated = [bool((batch["targets"][0, :20] == NO_TARGET).all()) for batch in batches]
    assert all(sum(generated[start : start + 3]) == 2 for start in range(0, 60, 3))
    rows = [
        tuple(batch["tokens"][0].tolist()) for batch, is_recall in zip(batches, generated, strict=True) if is_recall
    ]
    assert len(set(rows)) == 40
    data.cursor = 31
    assert all(
        map(torch.equal, [b["tokens"] for b in islice(data.train_dataloader(), 9)], [b["tokens"] for b in batches[31:]])
    )
    names = [data.document_names(sample, sample + 1) for sample in range(9)]
    assert [not each for each in names] == generated[:9]
    (batch,) = list(mixed(batch_size=4).val_dataloader())
    assert batch["source"][:, 0].tolist() == [0, 0, 1, 1]
    assert (batch["targets"][:, :20] == NO_TARGET).all(1).tolist() == [False, False, True, True]


def test_the_targets_of_a_batch_are_counted(recall):
    batch = next(iter(recall().train_dataloader()))
    scored = recall().on_before_batch_transfer(batch, 0)["scored"]
    assert type(scored) is int
    assert 0 < scored == (batch["targets"] != NO_TARGET).sum() < 0.5 * batch["targets"].numel()


@pytest.mark.parametrize("kind", ["recall", "mixed"])
def test_growing_lengths_have_new_sequences_and_resume_exactly(kind, request, tmp_path):
    build = request.getfixturevalue(kind)
    growing = [(0, 128), (3, 256)]
    tasks = dict(tasks=TASKS | {"scattered": None}) if kind == "recall" else {}
    data = build(lengths=growing, **tasks)
    batches = list(islice(data.train_dataloader(), 12))
    assert [tuple(batch["tokens"].shape) for batch in batches] == 3 * [(4, 128)] + 9 * [(2, 256)]
    rows = [tuple(row) for batch in batches for row in batch["tokens"].tolist()]
    assert len(set(rows)) == len(rows)
    whole, weight = train(build(lengths=growing, **tasks), tmp_path / "whole", 16)
    read, resumed = train(build(lengths=growing, **tasks), tmp_path / "more", 16, tmp_path / "whole" / "step_8.ckpt")
    assert read == whole[8:] and resumed == weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tasks={}), r"^data\.source\.tasks=\{\}: must have one of passkey, "),
        (dict(tasks={"pass_key": {"weight": 1}}), r"^data\.source\.tasks\.pass_key: must be one of passkey, "),
        (dict(tasks={"passkey": {"depth": [0.5]}}), r"^data\.source\.tasks\.passkey\.weight: missing"),
        (dict(tasks={"copy": {"weight": 1, "cue": [8]}}), r"^data\.source\.tasks\.copy\.size: missing"),
        (dict(tasks={"passkey": {"weight": 1, "dept": [0]}}), r"\.passkey\.dept=\[0\]: must be left out; .* depth$"),
        (dict(tasks={"scattered": {"weight": 1, "spacing": 64}}), r"\.scattered\.spacing=64: must be a list"),
        (dict(tasks={"scattered": {"weight": 1, "spacing": [64, 0]}}), r"\.scattered\.spacing: 0 must be greater"),
        (dict(tasks={"copy": {"weight": 1, "cue": [8], "size": [1.5]}}), r"\.copy\.size: 1\.5 must be a valid integer"),
        (dict(sequence_length=64), r"^data\.source\.tasks\.\w+=\{\S+\}: must fit into 90% of data\.sequence_length=64"),
        (dict(validation_sequences=None), r"^data\.validation_sequences=null: must be a number"),
        (dict(path="/nowhere"), r"^data\.path=/nowhere: must be "),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_line(recall, change, message):
    with pytest.raises(CorpusError, match=message) as error:
        recall(**change)
    assert "\n" not in str(error.value)


def test_a_mixture_needs_text_and_gives_it_to_the_generated_sequences(mixed):
    with pytest.raises(CorpusError, match=r"^data\.source\.sources: recall: path=x: must be left out"):
        mixed(path="x")
    alone = MixedSource("recall", Recall(TASKS, "answers"), None, 1)
    with pytest.raises(CorpusError, match=r"^data\.source\.sources: must have a source of text for recall$"):
        Mixture([alone])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_retrieval_reads_the_documents_of_its_split(recall, split):
    data = recall(tasks={"retrieval": {"weight": 1, "excerpt": [30], "passage": [6]}}, validation_sequences=5)
    own = [data.corpus.splits[split].text(index) for index in range(len(data.corpus.splits[split]))]
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    for row in sequences(loader, 5):
        texts = re.split(r"\nDocument \d{5}:\n|\nThe passage\n", data.tokenizer.decode(row))[1:-1]
        assert len(texts) > 3
        for text in texts:  # those that are cut may end in 16 characters of a header
            assert any(text[:-16] in document for document in own)


def test_a_passage_that_does_not_fit_is_named(recall):
    with pytest.raises(CorpusError, match=r"^data\.source\.tasks\.retrieval=\{excerpt:30,passage:31\}: must fit"):
        recall(tasks={"retrieval": {"weight": 1, "excerpt": [30], "passage": [6, 31]}})
