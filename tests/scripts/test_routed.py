"""A run with a router, from train.py to a saved selection that the benchmark can read."""

import csv
import json

import torch

from kernels import Selection
from tests.commands import run_forked
from tests.scripts.runs import write_books

SMALL = [
    *("attention=routed", "attention.block=32", "name=router"),
    *(f"attention.patterns.routed.{setting}" for setting in ("window=32", "block=32", "top_k=2", "router=indexer")),
    *("attention.patterns.routed.indexer_warmup=1", "attention.patterns.routed.indexer_warmup_alone=true"),
    *(f"model.{size}" for size in ("width=32", "layers=2", "heads=4", "kv_heads=2", "head_dim=8", "mlp_width=64")),
    *("data=files", "data.tokenizer.vocabulary=512", "data.sequence_length=256", "data.batch_size=2"),
    *("data.validation_sequences=2", "data.workers=0", "trainer.max_steps=3", "trainer.validate_every=3"),
    *("trainer.accumulate=2", "trainer.log_every=1", "evaluation=chunked", "evaluation.long_document=1024"),
    "model.activation_checkpointing=true",
]


def test_a_router_trains_is_logged_and_its_choice_is_saved(tmp_path):
    books = write_books(tmp_path / "books", documents=24, words=1500)
    run_forked("train.py", *SMALL, f"data.path={books}", f"data.cache={tmp_path / 'cache'}", f"outputs={tmp_path}")
    (folder,) = (tmp_path / "router").iterdir()
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (folder / "train.log").read_text().count("step 1: from now on all parameters train") == 1
    for name in ("entropy", "never_chosen", "age", "indexer_loss"):
        assert all(float(row[f"train/routing_{name}"]) >= 0 for row in rows if row["train/loss"])
    assert 0 < float(rows[-1]["validation/routing_recall"]) <= 1 + 1e-5

    file = tmp_path / "selection.pt"
    shared = tmp_path / "sharing.json"
    command = "scripts/save_selection.py", str(folder), "--tokens", "512", "--output", str(file)
    run_forked(*command, "--sharing", str(shared), PYTHONPATH=".")
    assert [0.5 <= row["2 queries"] <= 1 for row in json.loads(shared.read_text())["rows"]] == [True, True]
    saved = torch.load(file, weights_only=True)
    assert (
        saved["chosen"].shape == (2, 2, 512, 2) and saved["document_start"].shape == (2, 512) and saved["block"] == 32
    )
    selection = Selection.from_chosen(saved["chosen"], 512, 32, saved["document_start"])
    assert (selection.chosen >= 0).any() and int(selection.pairs().sum()) > 0
    query = torch.arange(512)[:, None]
    assert ((selection.chosen + 1) * 32 <= query - 31 + 32).all(), "whole blocks before the window"

    wrong = run_forked("scripts/save_selection.py", str(folder), "--tokens", "99999999", check=False, PYTHONPATH=".")
    assert wrong.returncode == 2 and "--tokens 99999999" in wrong.stderr
    wrong = run_forked("scripts/save_selection.py", str(folder), "--split", "tset", check=False, PYTHONPATH=".")
    assert wrong.returncode == 2 and "--split tset: must be one of train" in wrong.stderr
