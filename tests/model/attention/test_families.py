"""A new family needs a pattern, a core, a cache and one entry in the registry: then it trains and decodes."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kernels.layout.cost import AttentionCost, DecodeCost, causal_pairs
from kernels.patterns import Dense, Hierarchical, NativeSparse, Pattern, Window
from model import Transformer
from model.attention import AttentionCore, Family, LayerCache, family_of
from model.attention.families import FAMILIES
from model.attention.native_sparse.core import NativeSparseAttention
from model.decoding import expected_bytes
from model.forecasting.fake_layouts import tensors_of
from tests.kernels.oracle import packing
from tests.model.decoding.test_parity import cached_logits, full_logits, native_sparse, random_tokens, routed
from tests.model.small import config, lively, plan, positions_of


@dataclass(frozen=True)
class RunningMean(Pattern):
    """Each token receives the mean of all values so far."""

    is_mask: ClassVar[bool] = False

    def decode_cost(self, context: int, group: int = 1) -> DecodeCost:
        return DecodeCost(stored=1, read=1)


@dataclass(frozen=True, eq=False)
class RunningMeanLayout:
    batch: int
    queries: int
    overflow: ClassVar[None] = None

    def cost(self, batch: int, heads: int, head_dim: int) -> AttentionCost:
        pairs = batch * heads * self.queries
        return AttentionCost(pairs, pairs, causal_pairs(self.queries, self.queries) * batch * heads, pairs * head_dim)


def per_head(values: torch.Tensor, heads: int) -> torch.Tensor:
    return values.repeat_interleave(heads // values.shape[1], 1)


class RunningMeanAttention(AttentionCore):
    @classmethod
    def build_layout(cls, pattern, tokens, block, fixed=False):
        return RunningMeanLayout(tokens.batch, tokens.length)

    def forward(self, inputs, layout):
        count = torch.arange(1, layout.queries + 1)[:, None]
        return per_head(inputs.v_BKTD.cumsum(2) / count, self.heads), None


class RunningMeanPlanner:
    def __init__(self, pattern, batch, rotary):
        pass


class RunningMeanCache(LayerCache):
    planner_class = RunningMeanPlanner

    def __init__(self, planner):
        self.stores, self.total = [], 0

    def attend(self, inputs, core):
        total = self.total + inputs.v_BKTD.cumsum(2)
        self.total = total[:, :, -1:]
        count = self.step.position[:, None, :, None] + 1
        return per_head(total / count, core.heads), None

    def tensors(self):
        return [self.total]


@pytest.fixture
def mixed(monkeypatch) -> Transformer:
    """A model whose layers alternate between the new family and windows."""
    monkeypatch.setitem(FAMILIES, RunningMean, Family(RunningMeanAttention, RunningMeanCache))
    schedule = plan({"mean": RunningMean(), "local": Window(9)}, ["mean", "local"])
    return lively(Transformer(config(), schedule)).double()


def test_a_registered_family_trains(mixed):
    tokens, position = random_tokens(2, 31), torch.arange(30).expand(2, -1)
    optimizer, losses = torch.optim.SGD(mixed.parameters(), lr=1e-3), []
    for _ in range(3):
        loss = mixed.loss(tokens[:, :-1], tokens[:, 1:], position, mixed.build_layouts(None, 30)).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    assert mixed.layers[0].self_attn.v_proj.weight.grad.any()


def test_a_registered_family_decodes(mixed):
    tokens = random_tokens(2, 40)
    whole = full_logits(mixed.eval(), tokens)
    for chunk in (1, 7, 17):
        assert (cached_logits(mixed, tokens, chunk) - whole).abs().max() <= 1e-12


def test_a_registered_family_counts_its_cost(mixed):
    cost = mixed.cost(mixed.build_layouts(None, 30), batch=2).attention
    window = sum(min(i + 1, 9) for i in range(30))
    assert cost.visible_pairs == 2 * 4 * (30 + window)
    assert expected_bytes(mixed, 100, 1)[1] == 2 * 2 * 8 * 8 * (1 + 8)  # k and v, KV heads, head_dim, bytes; keys


EVERY_FAMILY = {
    "masked": Window(9),
    "hierarchical": Hierarchical(window=9, spans=(4, 8), reaches=(20,), pooling="learned"),
    "routed": routed(router="indexer", top_k=2),
    "native_sparse": native_sparse(router="indexer", combine="gates"),
}
OWN_PARAMETERS = {
    "masked": set(),
    "hierarchical": {"pool.query"},
    "routed": {"indexer.q_proj.weight", "indexer.k_proj.weight"},
    "native_sparse": {"indexer.q_proj.weight", "indexer.k_proj.weight", "pool.query", "gates.weight"},
}


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_parameters_of_a_family_keep_their_names_in_checkpoints(name):
    model = Transformer(config(layers=1), plan(EVERY_FAMILY[name]))
    prefix = "layers.0.self_attn.attend."
    assert {key.removeprefix(prefix) for key in model.state_dict() if key.startswith(prefix)} == OWN_PARAMETERS[name]
    assert model.cores == [model.layers[0].self_attn.core]


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_a_training_step_does_not_change_a_layout(name):
    model = lively(Transformer(config(), plan(EVERY_FAMILY[name]))).train()
    document = packing([37, 6, 52], [80, 15, 0])
    layouts, tokens = model.build_layouts(document, 95), random_tokens(2, 95)
    before, names = copy.deepcopy([tensors_of(layout) for layout in layouts]), [sorted(vars(each)) for each in layouts]
    out = model.loss(tokens, tokens, positions_of(document), layouts)
    (out.total if out.auxiliary is None else out.total + out.auxiliary).backward()
    assert [sorted(vars(each)) for each in layouts] == names
    for was, layout in zip(before, layouts, strict=True):
        assert len(was) > 5 and all(torch.equal(a, b) for a, b in zip(was, tensors_of(layout), strict=True))


def test_a_pattern_without_a_family_is_refused():
    with pytest.raises(ValueError, match=r"pattern=RunningMean\(\): must be a mask over the tokens .*patterns\.Routed"):
        family_of(RunningMean())


def test_a_subclass_has_the_family_of_its_nearest_base_class():
    """NativeSparse is a Routed, and a subclass of it is no less a NativeSparse."""

    class Changed(NativeSparse):
        pass

    assert family_of(Changed(**vars(native_sparse()))).core is NativeSparseAttention
    assert family_of((Dense(), Window(3))) == family_of(Dense()) != family_of(native_sparse())
