"""DDP and FSDP2 on several ranks, against one process that trains on the same sequences."""

import pytest
import torch

from model.training.checkpoints import read_checkpoint
from tests.commands import compose
from tests.model.parallel import training
from tests.model.parallel.ranks import reserved_port, run_on_ranks
from tests.scripts.runs import SMALL, write_books
from train import train

SETTINGS: dict[str, dict] = {
    **{family: dict(family=family) for family in training.PATTERNS},
    "float32": dict(dtype=torch.float32),
    "fp8": dict(dtype=torch.float32, in_fp8="mlp_and_head"),
    "compiled": dict(compile=True, family="routed"),
    "adamw": dict(optimizer="adamw", sizes=dict(tie_embeddings=False, sink_logits=True)),
    "frozen": dict(family="routed", freeze=["embed_tokens.*", "layers.0.*", "!layers.0.mlp.*"]),
    "indexers_first": dict(family="routed", indexer_alone=2),
    "accumulate": dict(accumulate=2, sizes=dict(activation_checkpointing=True)),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Of each setting, what one process measures."""
    return {name: training.train(tmp_path_factory.mktemp(name) / "run", **case) for name, case in SETTINGS.items()}


CASES = [(2, strategy, name) for strategy in ("ddp", "fsdp2") for name in SETTINGS]
CASES = [case for case in CASES if case[1] == "fsdp2" or case[2] not in ("hierarchical", "float32", "fp8", "adamw")]
CASES += [(4, "ddp", "accumulate"), (4, "fsdp2", "native_sparse")]
"""FSDP2 shards parameters and the optimizer's state, which are of each setting's kind; DDP averages gradients alone."""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Of each case, what the first rank measures."""
    found = {}
    for ranks in (2, 4):
        settings = {f"{s}_{name}": SETTINGS[name] | dict(strategy=s) for r, s, name in CASES if r == ranks}
        root = str(tmp_path_factory.mktemp("runs"))
        results = run_on_ranks(training.train_on_ranks, ranks, settings, root)[0]
        found |= {(ranks, *case.split("_", 1)): rows for case, rows in results.items()}
    return found


@pytest.mark.parametrize(("ranks", "strategy", "name"), CASES)
def test_losses_and_gradient_norms_are_those_of_one_process(alone, together, ranks, strategy, name):
    expected = torch.tensor(alone[name], dtype=torch.float64)
    assert len(expected) >= 4 and expected.isfinite().sum() >= 7
    found = torch.tensor(together[ranks, strategy, name], dtype=torch.float64)
    # In fp8, what differs by float32's rounding may be rounded to neighbours, which are 1/8 apart.
    tolerance = {"float32": 1e-6, "fp8": 1e-3}.get(name, 1e-9)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_step_has_no_barrier_and_no_broadcast(tmp_path, strategy):
    """At a barrier the host waits for the device, and in a broadcast of buffers each device for the first one."""
    for short, long in run_on_ranks(training.count_waits, 2, strategy, str(tmp_path)):
        assert short == long


def test_all_groups_of_ranks_wait_as_long_as_rank_timeout_allows(tmp_path):
    """gloo's own limit is half an hour, which a larger trainer.rank_timeout must lengthen."""
    for limits in run_on_ranks(training.time_limits_of_groups, 2, "ddp", 7200, str(tmp_path)):
        assert limits and all(limit > 7200 for limit in limits)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run folder, and what its runs measure: 4 sharded ranks, then one process, then 2 sharded ranks."""
    root, settings = tmp_path_factory.mktemp("resumed"), dict(sizes=dict(tie_embeddings=False), validate_every=None)
    sharded = settings | dict(strategy="fsdp2")
    run_on_ranks(training.train_on_ranks, 4, {"run": sharded | dict(max_steps=2)}, str(root))
    training.train(root / "run", resume=True, max_steps=4, **settings)
    cases = {"run": sharded | dict(resume=True, max_steps=6)}
    rows = run_on_ranks(training.train_on_ranks, 2, cases, str(root))[0]["run"]
    straight = training.train(root / "straight", max_steps=6, **settings)
    return root, rows, straight


def test_a_sharded_run_resumes_on_another_number_of_ranks(resumed):
    _, rows, straight = resumed
    assert len(rows) == 6
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(straight), rtol=0, atol=1e-9, equal_nan=True)


def test_a_checkpoint_of_a_sharded_run_is_that_of_one_process(resumed):
    root, _, _ = resumed
    ours, theirs = (read_checkpoint(root / name / "checkpoints/last.ckpt") for name in ("run", "straight"))
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=1e-9)
    (own,), (other,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert own["param_groups"] == other["param_groups"]
    torch.testing.assert_close(own["state"], other["state"], rtol=0, atol=1e-9)


def test_train_py_with_a_sharded_model(tmp_path):
    """A sharded run ends with its evaluation, and other commands read its checkpoint."""
    from scripts.evaluate import evaluate

    books = write_books(tmp_path / "books")
    settings = (*SMALL, "data=files", f"data.path={books}", f"data.cache={tmp_path / 'cache'}", "evaluation=chunked")
    trainer = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.compile=false")
    trainer += ("trainer.devices=2", "trainer.max_steps=2", "trainer.validate_every=2", "optimizer=muon")
    summaries = run_on_ranks(training.run_train_py, 2, compose(*settings, *trainer), str(tmp_path / "run"))
    assert summaries[0]["state"] == "finished"
    row = evaluate(
        compose(
            f"checkpoint={tmp_path / 'run' / 'last'}", "accelerator=cpu", "evaluation=chunked", config_name="evaluate"
        )
    )
    assert row["loss"] == pytest.approx(summaries[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_several_nodes_of_a_slurm_job_train_one_model(tmp_path, strategy):
    books = write_books(tmp_path / "books")
    settings = (*SMALL, "data=files", f"data.path={books}", f"data.cache={tmp_path / 'cache'}", "evaluation=chunked")
    settings += ("trainer=cpu", "trainer.max_steps=2", "trainer.validate_every=2", "evaluation.baselines=false")
    alone = train(compose(*settings, "data.batch_size=2"), tmp_path / "alone")
    nodes = (f"outputs={tmp_path}", "name=nodes", "trainer.nodes=2", f"trainer.strategy={strategy}")
    nodes += ("trainer.rank_timeout=60",)
    with reserved_port() as port:
        summary = run_on_ranks(training.run_train_py_as_slurm_does, 2, compose(*settings, *nodes), port)[0]
    assert len(list((tmp_path / "nodes").iterdir())) == 1, "one run folder"
    assert (summary["state"], summary["devices"]) == ("finished", 2)
    assert summary["train_tokens"] == alone["train_tokens"]
    for key in ("validation_loss", "loss"):
        assert summary[key] == pytest.approx(alone[key], rel=1e-5), key
