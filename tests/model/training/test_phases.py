"""A run whose sequences and windows grow: its shapes, its log, its costs, and an exact resumption around a border."""

import json
import logging

import lightning
import pytest
import stand_ins
import torch
from test_exact_resume import StopAfter, assert_equal, costs, logged

from configs.build import build_model
from configs.checks import check
from model.training.checkpoints import CheckpointFile
from model.training.fit import fit
from model.training.metrics import read_rows
from model.training.module import LanguageModel
from tests.commands import compose
from tests.scripts.runs import SMALL, write_books

PHASES = (
    "phases=[{step: 0, data.sequence_length: 16, attention.patterns.local.width: 8},"
    "{step: 3, data.sequence_length: 32}, {step: 5, data.sequence_length: 64, attention.patterns.local.width: 24}]"
)
SHAPES = [(4, 16), (4, 16), (4, 16), (2, 32), (2, 32), (1, 64), (1, 64)]
CONSTANT = stand_ins.OPTIMIZER | dict(schedule=dict(name="constant", warmup_fraction=0.0))


class Watch(lightning.Callback):
    """Keeps the shape of every training batch, and the window of the model with it."""

    def __init__(self):
        self.shapes, self.widths, self.validated = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.shapes.append(tuple(batch["tokens"].shape))
        self.widths.append(module.model.patterns[0].width)

    def on_validation_batch_end(self, trainer, module, outputs, batch, *_):
        self.validated.append((batch["tokens"].shape[1], module.model.patterns[0].width))


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    return write_books(tmp_path_factory.mktemp("phases") / "books", documents=3, words=20)


@pytest.fixture
def session(books, tmp_path):
    """session(name, *overrides, seed=0, ...) trains in the folder `name`, from its last checkpoint if it has one."""

    def run(name, *overrides, seed=0, callbacks=(), **changes):
        place = f"data.path={books}", f"data.cache={books.parent / 'cache'}", "data/tokenizer=bytes"
        small = [each for each in SMALL if "vocabulary" not in each]
        widths = "attention.patterns.local.width=24", "data.validation_sequences=2"
        config = compose(*small, "data=files", *place, *widths, *(overrides or [PHASES]))
        checked = check(config)
        checked.data.setup()
        torch.manual_seed(seed)
        module = LanguageModel(build_model(config, checked.data.vocabulary, checked.plan), CONSTANT,
                               checked.data.token_bytes, config)  # fmt: skip
        folder = stand_ins.run_folder(tmp_path / name)
        last = folder.checkpoints / "last.ckpt"
        resume = CheckpointFile(last) if last.exists() else None
        settings = stand_ins.TRAINER | dict(max_steps=7, validate_every=None, phases=checked.phases) | changes
        return fit(module, checked.data, folder, resume=resume, callbacks=callbacks, **settings)

    return run


def assert_same_end(one, other):
    assert logged(one) == logged(other)
    assert costs(one) == costs(other)
    a, b = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (one, other))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "DataModule", "global_step"):
        assert_equal(a[part], b[part], part)


def test_stopped_inside_and_at_the_borders_of_phases(session, tmp_path):
    """By a signal, by the number of steps and by the time: weights, optimizer, cursor, losses and costs end as without
    a stop."""
    settings = dict(accumulate=2, max_steps=8)
    session("straight", **settings)
    assert session("stopped", **settings, callbacks=[StopAfter(2)]).step == 2
    assert session("stopped", **settings | dict(max_steps=3), seed=1).step == 3
    in_time = session("stopped", **settings | dict(max_steps=None, max_seconds=1e-9), seed=2)
    assert (in_time.state, in_time.step) == ("finished", 7), "the first steps of a session and of a phase do not count"
    session("stopped", **settings, seed=3)
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")


def test_shapes_windows_rows_and_costs_of_the_phases(session, tmp_path, caplog):
    watch = Watch()
    with caplog.at_level(logging.INFO):
        session("run", callbacks=[watch], log_every=4, validate_every=4)
    assert watch.shapes == SHAPES
    assert watch.widths == [8, 8, 8, 8, 8, 24, 24]
    assert set(watch.validated) == {(64, 24)}, "validations are of the last phase"
    begun = [record.getMessage() for record in caplog.records if record.getMessage().startswith("phase ")]
    assert [line.split(":")[0] for line in begun] == [
        "phase 1 of 3, from step 0",
        "phase 2 of 3, from step 3",
        "phase 3 of 3, from step 5",
    ]
    rows = [row for row in read_rows(tmp_path / "run/metrics.csv")[1] if row["flops_per_token"]]
    flops = {int(row["step"]): float(row["flops_per_token"]) for row in rows}
    assert list(flops) == [3, 4, 5, 7], "the last step of each phase is logged"
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    expected = (3 * flops[3] + 2 * (flops[4] + flops[5]) / 2 + 2 * flops[7]) / 7  # steps of each phase
    assert summary["flops_per_token"] == pytest.approx(expected, rel=1e-12)
    assert flops[3] < 0.99 * flops[7]


def test_windows_may_grow_alone_and_then_the_data_stay_as_they_are(session, tmp_path):
    session("plain", "data.packing=whole", max_steps=2, save_every=1)
    grown = "phases=[{step: 0, attention.patterns.local.width: 8}, {step: 1, attention.patterns.local.width: 24}]"
    watch = Watch()
    session("grown", "data.packing=whole", grown, max_steps=2, callbacks=[watch])
    assert watch.widths == [8, 24]
    states = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("plain", "grown")]
    assert states[0]["DataModule"] == states[1]["DataModule"]
