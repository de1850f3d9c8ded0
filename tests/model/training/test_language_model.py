"""Losses and gradients are exact sums over scored tokens, however these are cut into batches."""

import math
from types import SimpleNamespace

import pytest
import torch
from stand_ins import OPTIMIZER, TOKEN_BYTES, TRAINER, Sequences, TinyData, TinyModel, new_module, run_folder, train
from torch.utils.data import DataLoader

from model.training.failures import DivergedError, LayoutOverflowError
from model.training.fit import fit
from model.training.metrics import read_rows


def test_accumulation_weighs_every_token_the_same(tmp_path):
    """accumulate=3 with ragged padding is one batch three times as long: same weights, same logged loss."""
    weights, rows = [], []
    for name, batch_size, accumulate in (("one", 6, 1), ("three", 2, 3)):
        torch.manual_seed(0)
        module = new_module(model=TinyModel(dropout=0.0))
        settings = TRAINER | dict(accumulate=accumulate, max_steps=5, gradient_clip=0.3)
        fit(module, TinyData(batch_size), run_folder(tmp_path / name), **settings)
        weights.append(torch.cat([p.flatten() for p in module.model.parameters()]))
        rows.append([row for row in read_rows(tmp_path / name / "metrics.csv")[1] if row["train/loss"]])
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    for one, three in zip(*rows, strict=True):
        for key in ("train/loss", "train/bits_per_byte", "train/gradient_norm", "train/learning_rate"):
            assert float(one[key]) == pytest.approx(float(three[key]), rel=1e-4)


class WithLossOfItsOwn(TinyModel):
    """A sum over queries that is no part of the nats, as a router's loss is."""

    def loss(self, tokens, *arguments):
        out = super().loss(tokens, *arguments)
        return type(out)(**vars(out) | {"auxiliary": torch.tanh(self.hidden(self.embed(tokens))).square().sum()})


def test_a_layers_own_loss_trains_weighs_alike_and_is_in_no_reported_loss(tmp_path):
    weights, rows = [], []
    for name, model, batch_size, accumulate in (
        ("one", WithLossOfItsOwn, 6, 1),
        ("three", WithLossOfItsOwn, 2, 3),
        ("without", TinyModel, 6, 1),
    ):
        torch.manual_seed(0)
        module = new_module(model=model(dropout=0.0))
        settings = TRAINER | dict(accumulate=accumulate, max_steps=3, validate_every=3)
        fit(module, TinyData(batch_size), run_folder(tmp_path / name), **settings)
        weights.append(torch.cat([p.flatten() for p in module.model.parameters()]))
        rows.append(read_rows(tmp_path / name / "metrics.csv")[1])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)
    assert (weights[0] - weights[2]).abs().max() > 1e-3, "it trains"
    first_losses = [next(float(row["train/loss"]) for row in each if row["train/loss"]) for each in rows]
    assert first_losses[0] == pytest.approx(first_losses[2], rel=1e-6), "of equal weights, the same nats"


def test_gradient_is_that_of_the_mean_over_scored_tokens(tmp_path):
    """The logged norm, unclipped, against plain PyTorch."""
    module = new_module(model=TinyModel(dropout=0.0))
    data = TinyData(batch_size=4)
    data.trainer = SimpleNamespace(max_steps=1, accumulate_grad_batches=1)
    batch = next(iter(data.train_dataloader()))
    out = module.model.loss(batch["tokens"], batch["targets"], batch["position"], [16])
    (out.total / out.count).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in module.model.parameters()]).item()
    module.zero_grad()
    fit(module, TinyData(batch_size=4), run_folder(tmp_path), **TRAINER | dict(max_steps=1, gradient_clip=None))
    row = read_rows(tmp_path / "metrics.csv")[1][0]
    assert float(row["train/gradient_norm"]) == pytest.approx(expected, rel=1e-5)
    assert float(row["train/loss"]) == pytest.approx((out.total / out.count).item(), rel=1e-6)


def test_validation_sums_over_all_tokens(tmp_path):
    """Batches of 2, 2 and 1 sequences with unequal padding; parts by position within the document."""
    module = new_module()
    result = fit(module, TinyData(), run_folder(tmp_path), **TRAINER | dict(max_steps=2))
    batch = next(iter(DataLoader(Sequences(5, 2), 5)))
    module.eval()
    with torch.no_grad():
        out = module.model.loss(batch["tokens"], batch["targets"], batch["position"], [16])
    scored = batch["targets"] != -100
    bytes_ = TOKEN_BYTES[batch["targets"][scored]].sum().item()
    assert result.summary["validation_loss"] == pytest.approx(out.total.item() / scored.sum().item(), rel=1e-6)
    assert result.summary["validation_bits_per_byte"] == pytest.approx(
        out.total.item() / math.log(2) / bytes_, rel=1e-6
    )
    assert result.summary["validation_perplexity"] == pytest.approx(math.exp(result.summary["validation_loss"]))
    assert result.summary["validation_loss_first_512"] == pytest.approx(result.summary["validation_loss"])
    assert "loss_last_quarter" not in result.summary  # no document of this corpus reaches position 12


def test_metrics_of_a_lossy_tokenizer_are_marked_and_take_the_mean_bytes_of_a_token(tmp_path, monkeypatch):
    monkeypatch.setattr("stand_ins.TOKEN_BYTES", torch.full_like(TOKEN_BYTES, 2.7, dtype=torch.float64))
    summary = train(tmp_path, max_steps=1, precision="bf16-true").summary
    nats_per_byte = summary["validation_loss"] / 2.7
    assert summary["validation_bits_per_byte"] == pytest.approx(nats_per_byte / math.log(2), rel=1e-6)
    assert summary["validation_lossy_tokenizer"] == 1
    row = read_rows(tmp_path / "metrics.csv")[1][0]
    assert float(row["train/lossy_tokenizer"]) == 1


def test_no_metric_is_per_byte_if_tokens_have_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr("stand_ins.TOKEN_BYTES", torch.zeros_like(TOKEN_BYTES))
    module = new_module()
    summary = fit(module, TwoSources(), run_folder(tmp_path), **TRAINER | dict(max_steps=1)).summary
    columns, rows = read_rows(tmp_path / "metrics.csv")
    assert not [key for key in (*summary, *columns) if "byte" in key and "memory" not in key and "read" not in key]
    assert math.isfinite(summary["validation_loss_even"]) and math.isfinite(float(rows[0]["train/loss"]))


class TwoSources(TinyData):
    """Validates on sequences of two sources; the third one has none."""

    source_names = ("even", "odd", "none")

    def val_dataloader(self):
        sequences = [Sequences(5, 2)[n] | {"source": torch.full((16,), n % 2)} for n in range(5)]
        return DataLoader(sequences, 2)


def test_validation_sums_apart_for_each_source(tmp_path):
    module = new_module()
    summary = fit(module, TwoSources(), run_folder(tmp_path), **TRAINER | dict(max_steps=2)).summary
    module.eval()
    for first, name in enumerate(("even", "odd")):
        batch = next(iter(DataLoader([Sequences(5, 2)[n] for n in range(first, 5, 2)], 5)))
        with torch.no_grad():
            out = module.model.loss(batch["tokens"], batch["targets"], batch["position"], [16])
        bytes_ = TOKEN_BYTES[batch["targets"][batch["targets"] != -100]].sum().item()
        assert summary[f"validation_loss_{name}"] == pytest.approx((out.total / out.count).item(), rel=1e-6)
        assert summary[f"validation_bits_per_byte_{name}"] == pytest.approx(out.total.item() / math.log(2) / bytes_)
    assert "validation_loss_none" not in summary


@pytest.mark.parametrize("text", [["even"], []])
def test_bits_per_byte_count_the_sources_of_text_alone(tmp_path, text):
    class Answers(TwoSources):
        text_sources = text

    summary = fit(new_module(), Answers(), run_folder(tmp_path), **TRAINER | dict(max_steps=2)).summary
    bits = {key: value for key, value in summary.items() if "bits_per_byte" in key}
    assert set(bits) == ({"validation_bits_per_byte", "validation_bits_per_byte_even"} if text else set())
    assert len(set(bits.values())) == len(text)
    assert summary["validation_loss"] != summary["validation_loss_even"] and "validation_loss_odd" in summary
    columns, _ = read_rows(tmp_path / "metrics.csv")
    assert "train/loss" in columns and "train/bits_per_byte" not in columns


def test_checkpoint_alone_says_how_to_rebuild_the_model(tmp_path):
    result = train(tmp_path, max_steps=2)
    checkpoint = torch.load(result.last, weights_only=True)
    assert checkpoint["hyper_parameters"] == {
        "name": "tiny",
        "seed": 3,
        "model": {"width": 8},
        "betas": [0.9, 0.95],
        "none": None,
    }
    assert type(checkpoint["hyper_parameters"]["model"]) is dict
    assert "model.embed.weight" in checkpoint["state_dict"] and "token_bytes" not in checkpoint["state_dict"]


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, log_every):
    class Exploding(TinyModel):
        def loss(self, *arguments):
            out = super().loss(*arguments)
            self.calls = getattr(self, "calls", 0) + self.training
            return out if self.calls < 6 else type(out)(**vars(out) | {"total": out.total * math.inf})

    folder = run_folder(tmp_path)
    settings = TRAINER | dict(max_steps=12, log_every=log_every, save_every=2, validate_every=None)
    with pytest.raises(DivergedError, match=r"step 6: .*learning_rate"):
        fit(new_module(model=Exploding()), TinyData(), folder, **settings)
    assert folder.read_summary()["state"] == "failed"
    saved = torch.load(folder.checkpoints / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4 and all(v.isfinite().all() for v in saved["state_dict"].values())


def test_learns(tmp_path):
    optimizer = OPTIMIZER | dict(learning_rate=0.05)
    result = fit(
        new_module(optimizer, TinyModel(0.0)),
        TinyData(batch_size=4),
        run_folder(tmp_path),
        **TRAINER | dict(max_steps=60, validate_every=20),
    )
    assert result.summary["validation_loss"] < 0.5 < math.log(11)


def test_an_incomplete_layout_stops_the_run_before_anything_is_saved(tmp_path):
    """The flag is read where something is logged, validated or saved: no checkpoint holds what came of it."""
    module = new_module()
    steps = []

    def overflow(layouts):
        steps.append(module.global_step)
        return torch.tensor(module.global_step == 4)

    module.model.overflow = overflow
    settings = TRAINER | dict(max_steps=12, validate_every=None, save_every=2, log_every=100)
    with pytest.raises(LayoutOverflowError, match="more different mask tiles"):
        fit(module, TinyData(), run_folder(tmp_path), **settings)
    assert 4 in steps and max(steps) < 6
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
