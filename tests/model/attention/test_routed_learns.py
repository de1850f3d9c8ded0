"""Learning, not only wiring: routers find keys and values that lie beyond the reach of all windows together.

Two layers. First they learn associative recall in short sequences, which a window and one block hold whole; then with
every key at least 66 tokens before its question, where windows of at most 31 tokens in two layers reach 62.
"""

import pytest
import torch

from kernels.patterns import NativeSparse, Routed
from kernels.patterns.routed import LocalWindow
from model import Transformer
from model.attention.routed.indexer import IndexerTraining
from model.training.optimizer import build_optimizer
from tests.model.attention.test_routed import BRANCHES, SETTINGS
from tests.model.small import config, plan
from tests.model.synthetic_recall import associative_recall

WINDOW, BLOCK, VOCABULARY, LENGTH, DISTANCE = 16, 16, 64, 120, 66
SHORT_STEPS, STEPS, WARM_UP = 200, 500, 225
ROUTED = SETTINGS | dict(window=WINDOW, block=BLOCK, top_k=2, indexer_dim=16)
INDEXER = dict(router="indexer")
TRAINING = IndexerTraining(indexer_loss=1.0, indexer_warmup=WARM_UP, indexer_gradient=False)

MEAN_KEY = Routed(**ROUTED)
"""By keys' means; seed 1 shows it early, others take longer. GATED proves that an indexer and native_sparse learn."""

GATED = NativeSparse(**ROUTED | BRANCHES | INDEXER | dict(pooling="mean", combine="gates"))
"""By an indexer: under gates, `mean_key` finds the block by a lucky seed alone (see NativeSparse)."""


def build(pattern, seed: int) -> Transformer:
    torch.manual_seed(seed)
    sizes = dict(width=64, heads=2, kv_heads=2, head_dim=32, mlp_width=64, vocabulary=VOCABULARY)
    model = Transformer(config(**sizes), plan(pattern, indexer=TRAINING))
    with torch.no_grad():
        # Tokens that share a direction: what heads need to look at a place and not at a content (the key next to a
        # value). It would come by itself, in many more steps.
        model.embed_tokens.weight += 0.5 * model.embed_tokens.weight.std() * torch.randn(64)
    return model


def short(generator, batch=32):
    return associative_recall(batch, 32, pairs=6, vocabulary=VOCABULARY, generator=generator)


def far(generator, batch=16):
    return associative_recall(
        batch, LENGTH, pairs=12, vocabulary=VOCABULARY, generator=generator, min_distance=DISTANCE
    )


@torch.no_grad()
def accuracy(model: Transformer, batch: dict[str, torch.Tensor]) -> float:
    """The share of questions whose value has the largest logit."""
    layouts = model.eval().build_layouts(None, batch["tokens"].shape[1])
    best = model.logits(model(batch["tokens"], batch["position"], layouts)).argmax(-1)
    model.train()
    asked = batch["targets"] >= 0
    return float((best == batch["targets"])[asked].float().mean())


def train(model: Transformer, seed: int, after: int) -> None:
    """Up to STEPS steps; stops where the far questions of a fresh batch are answered, `after` so many steps."""
    settings = dict(name="muon", learning_rate=0.005, weight_decay=0.0, betas=(0.9, 0.95), epsilon=1e-8, momentum=0.95)
    optimizer = build_optimizer(model, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 40) * max(0.05, 1 - s / STEPS))
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        model.set_step(step)
        batch = (short if step < SHORT_STEPS else far)(generator)
        out = model.loss(
            batch["tokens"],
            batch["targets"],
            batch["position"],
            model.build_layouts(None, batch["tokens"].shape[1]),
        )
        loss = out.total / out.count
        if out.auxiliary is not None:
            loss = loss + out.auxiliary / batch["tokens"].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step > after and step % 25 == 0 and accuracy(model, far(generator, 64)) >= 0.997:
            print(f"stops at step {step}")
            return


def held_out():
    return far(torch.Generator().manual_seed(1000), 256)


def test_the_task_lies_beyond_all_windows():
    layers, widest = 2, WINDOW + BLOCK - 1
    batch = far(torch.Generator().manual_seed(0), 64)
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        for place, value in enumerate(targets):
            if value >= 0:
                assert place - tokens.index(tokens[place]) > layers * widest


@pytest.mark.slow
def test_routing_solves_recall_beyond_the_windows_reach():
    model = build(MEAN_KEY, seed=1)
    train(model, seed=1, after=SHORT_STEPS)
    found = accuracy(model, held_out())
    print(f"mean_key: {found:.2%} of {256 * 12} questions")
    assert found >= 0.99


@torch.no_grad()
def gates_at_questions(model: Transformer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Means over the questions, `[layers, branches (window, chosen blocks, summaries), heads]`."""
    seen = []
    hooks = [
        layer.self_attn.core.gates.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        for layer in model.layers
    ]
    accuracy(model, batch)
    for hook in hooks:
        hook.remove()
    return torch.stack([logits[batch["targets"] >= 0].sigmoid().mean(0).view(3, -1) for logits in seen])


@pytest.mark.slow
def test_gated_branches_solve_it_too_and_the_gates_learn_which_one_holds_the_answer():
    model = build(GATED, seed=2)
    train(model, seed=2, after=WARM_UP + 50)  # the gates go on moving apart
    found, gates = accuracy(model, held_out()), gates_at_questions(model, held_out())
    window, chosen, _ = gates[-1]
    print(f"native_sparse, gated: {found:.2%} of {256 * 12} questions; gates of the last layer {gates[-1].tolist()}")
    assert found >= 0.99
    # Constant gates would do for the task; where they began, all were 0.5.
    assert (chosen > 0.6).all() and (chosen - window > 0.4).all()


def test_a_window_alone_can_do_no_better_than_chance():
    """No logit of a question depends on the key before it and its value, and values are drawn independently. With
    routing, some do."""
    batch, largest = far(torch.Generator().manual_seed(0), 4), {}
    row, place = (batch["targets"] >= 0).nonzero().T
    for name, pattern in (("window", LocalWindow(WINDOW, BLOCK)), ("routed", MEAN_KEY)):
        model, embedded = build(pattern, seed=1).double(), []
        model.embed_tokens.register_forward_hook(lambda *call, kept=embedded: kept.append(call[-1]))
        hidden = model(batch["tokens"], batch["position"], model.build_layouts(None, LENGTH))
        (gradient,) = torch.autograd.grad(hidden[row, place].sum(), embedded)
        largest[name] = gradient[:, : 1 + 2 * 12].abs().amax()  # the keys and values
    assert largest["window"] == 0 and largest["routed"] > 1e-6
