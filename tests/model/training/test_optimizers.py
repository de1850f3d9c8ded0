import copy

import pytest
import torch
from stand_ins import TinyModel
from torch import nn

from model.training.optimizer import SCHEDULES, build_optimizer, build_schedule, cosine, warmup_stable_decay

ADAMW = dict(name="adamw", learning_rate=0.01, weight_decay=0.1, betas=[0.9, 0.95], epsilon=1e-8)
MUON = ADAMW | dict(name="muon", momentum=0.95)


def names(model, optimizer, decayed):
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_id[id(p)] for g in optimizer.param_groups if (g["weight_decay"] > 0) == decayed for p in g["params"]}


@pytest.mark.parametrize("settings", [ADAMW, MUON])
def test_decay_pulls_on_matrices_only(settings):
    model = TinyModel()
    optimizer = build_optimizer(model, **settings)
    assert names(model, optimizer, True) == {"hidden.weight", "lm_head.weight"}
    assert names(model, optimizer, False) == {"embed.weight", "norm.weight", "hidden.bias"}


@pytest.mark.parametrize("settings", [ADAMW, MUON])
def test_a_tied_head_is_the_token_table(settings):
    model = TinyModel()
    model.lm_head.weight = model.embed.weight
    optimizer = build_optimizer(model, **settings)
    assert names(model, optimizer, True) == {"hidden.weight"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    model = TinyModel()
    model.embed.weight.requires_grad = False
    assert "embed.weight" not in names(model, build_optimizer(model, **ADAMW), False)


class Routed(nn.Module):
    """A matrix beside the parameters of an indexer, one of which is no matrix."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 4, bias=False)
        self.attend = nn.ModuleDict({"indexer": nn.Linear(4, 4)})


@pytest.mark.parametrize("settings", [ADAMW, MUON])
def test_indexers_may_have_a_learning_rate_of_their_own(settings):
    model = Routed()
    for own in (None, 0.5):
        optimizer = build_optimizer(model, **settings, indexer_learning_rate=own)
        rates = {
            id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
        }
        of_indexer = own or 0.01
        indexer = model.attend["indexer"]
        assert rates[id(model.hidden.weight)] == (0.01, 0.1)
        assert rates[id(indexer.weight)] == (of_indexer, 0.1) and rates[id(indexer.bias)] == (of_indexer, 0.0)


def test_each_stage_has_a_whole_schedule():
    settings = dict(name="cosine", warmup_fraction=0.2, final_fraction=0.1)
    factor, *_ = build_schedule(build_optimizer(Routed(), **ADAMW), 30, None, 10, **settings).lr_lambdas
    shares = {key: value for key, value in settings.items() if key != "name"}
    expected = [
        *(cosine(step, 10, **shares) for step in range(10)),
        *(cosine(step, 20, **shares) for step in range(20)),
    ]
    assert [factor(step) for step in range(30)] == expected
    plain, *_ = build_schedule(build_optimizer(Routed(), **ADAMW), 30, **settings).lr_lambdas
    assert [plain(step) for step in range(30)] == [cosine(step, 30, **shares) for step in range(30)]


def test_muon_state_survives_saving(tmp_path):
    model = TinyModel()
    optimizer = build_optimizer(model, **MUON)
    schedule = build_schedule(optimizer, 10, name="cosine", warmup_fraction=0.3, final_fraction=0.0)
    steps(model, optimizer, schedule, range(3))
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, tmp_path / "state.pt")
    twin = copy.deepcopy(model)
    steps(model, optimizer, schedule, range(3, 6))

    other = build_optimizer(twin, **MUON)
    other_schedule = build_schedule(other, 10, name="cosine", warmup_fraction=0.3, final_fraction=0.0)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(saved["optimizer"])
    other_schedule.load_state_dict(saved["schedule"])
    steps(twin, other, other_schedule, range(3, 6))
    for own, resumed in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own, resumed)
    assert len({group["lr"] for group in other.param_groups}) == 1


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def steps(model, optimizer, schedule, seeds):
    for seed in seeds:
        fill_gradients(model, seed)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(name="sgd"), "optimizer.name='sgd' is unknown; choose adamw or muon"),
        (dict(momentum=0.9), "optimizer.momentum=0.9 belongs to optimizer=muon"),
        (dict(name="muon"), "optimizer=muon needs optimizer.momentum"),
    ],
)
def test_impossible_settings(change, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(TinyModel(), **ADAMW | change)


def test_cosine():
    factors = [cosine(step, 100, warmup_fraction=0.1, final_fraction=0.2) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.6) and factors[100] == pytest.approx(0.2)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_warmup_stable_decay():
    shares = dict(warmup_fraction=0.1, decay_fraction=0.2, final_fraction=0.0)
    factors = [warmup_stable_decay(step, 100, **shares) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert set(factors[9:81]) == {1.0}
    assert factors[90] == pytest.approx(0.5) and factors[100] == 0.0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("max_steps", [1, 2, 7])
def test_schedules_on_very_short_runs(name, max_steps):
    settings = dict(warmup_fraction=0.0, decay_fraction=0.0, final_fraction=0.0)
    keys = {"cosine": ("warmup_fraction", "final_fraction"), "constant": ("warmup_fraction",)}.get(name, settings)
    for step in range(max_steps):
        assert 0 < SCHEDULES[name](step, max_steps, **{key: settings[key] for key in keys}) <= 1
