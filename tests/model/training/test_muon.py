import copy

import pytest
import torch
from stand_ins import TinyModel
from torch import nn

from model.training import muon
from model.training.muon import Muon, orthogonalize
from model.training.optimizer import build_optimizer

SHAPES = [(16, 48), (48, 16), (24, 24), (16, 48), (24, 24), (16, 48), (1, 5)]
SETTINGS = dict(lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
JORDAN, STEPS = (3.4445, -4.7750, 2.0315), 5


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def update(optimizer: torch.optim.Optimizer, steps: range = range(4)) -> None:
    """One step for each seed, with gradients whose sizes differ from matrix to matrix."""
    for seed in steps:
        generator = torch.Generator().manual_seed(1000 + seed)
        for scale, parameter in enumerate(optimizer.param_groups[0]["params"], 1):
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.01**scale
        optimizer.step()


def distance(ours: torch.Tensor, theirs: torch.Tensor, start: torch.Tensor) -> float:
    """Of two updates, as a share of the norm of one."""
    return ((ours - theirs).norm() / (theirs - start).norm()).item()


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (2, 9, 9)])
def test_orthogonalization_maps_singular_values_by_the_polynomial(shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, s, right = torch.linalg.svd(stack, full_matrices=False)
    s = s / s.square().sum(1, keepdim=True).sqrt()
    for _ in range(STEPS):
        s = JORDAN[0] * s + JORDAN[1] * s**3 + JORDAN[2] * s**5
    torch.testing.assert_close(orthogonalize(stack, JORDAN, STEPS, 1e-7), left @ s.diag_embed() @ right)


def test_a_zero_gradient_is_no_update():
    stack = torch.stack([torch.zeros(4, 6), torch.ones(4, 6)])
    assert torch.equal(orthogonalize(stack, JORDAN, STEPS, 1e-7)[0], torch.zeros(4, 6))


@pytest.mark.parametrize("change", [{}, dict(nesterov=False), dict(adjust_lr_fn="original"), dict(ns_steps=3)], ids=str)
def test_the_update_is_torchs_up_to_rounding_in_bf16(change):
    """bf16 rounds to 2^-9, and the iteration multiplies what it rounds by up to 3.4 in each of its steps: two orders of
    the same sums may differ by 2 % of an update. Another formula differs by more than 10 %."""
    start, ours, theirs = matrices(), matrices(), matrices()
    own, torchs = Muon(ours, **SETTINGS | change), torch.optim.Muon(theirs, **SETTINGS | change)
    update(own)
    update(torchs)
    for values in zip(ours, theirs, start, strict=True):
        assert distance(*values) < 0.03
    for parameter, twin in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.state[parameter]["momentum_buffer"], torchs.state[twin]["momentum_buffer"])


def test_a_stack_has_a_largest_size(monkeypatch):
    """Matrices in stacks of one are updated as in one stack."""
    start, stacked, apart = matrices(), matrices(), matrices()
    update(Muon(stacked, **SETTINGS))
    sizes = []
    monkeypatch.setattr(muon, "STACK_BYTES", 2 * 2 * 16 * 48)
    optimizer = Muon(apart, **SETTINGS)
    optimizer.orthogonalize = lambda stack, **settings: sizes.append(stack.shape) or orthogonalize(stack, **settings)
    update(optimizer, range(1))
    assert sorted(sizes) == [(1, 1, 5), (1, 16, 48), (1, 48, 16), (2, 16, 48), (2, 24, 24)]
    update(optimizer, range(1, 4))
    for values in zip(stacked, apart, start, strict=True):
        assert distance(*values) < 0.03


def test_parameters_without_gradients_stay():
    parameters = matrices()
    frozen = parameters[3].detach().clone()
    optimizer = Muon(parameters, **SETTINGS)
    parameters[3].requires_grad = False
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    assert torch.equal(parameters[3], frozen) and parameters[3] not in optimizer.state


def test_state_of_torchs_muon_is_continued():
    """Checkpoints of before this class hold its state, and are continued as torch would."""
    ours = matrices()
    torchs = torch.optim.Muon(ours, **SETTINGS)
    update(torchs)
    start, theirs = copy.deepcopy(ours), copy.deepcopy(ours)
    state = copy.deepcopy(torchs.state_dict())
    torchs, own = torch.optim.Muon(theirs, **SETTINGS), Muon(ours, **SETTINGS)
    torchs.load_state_dict(state)
    own.load_state_dict(copy.deepcopy(state))
    update(torchs, range(4, 6))
    update(own, range(4, 6))
    for values in zip(ours, theirs, start, strict=True):
        assert distance(*values) < 0.03
    assert torchs.state_dict().keys() == own.state_dict().keys()
    assert torchs.state_dict()["param_groups"] == own.state_dict()["param_groups"]


def test_a_resumed_optimizer_continues_bitwise():
    straight, stopped = matrices(), matrices()
    update(Muon(straight, **SETTINGS), range(6))
    first = Muon(stopped, **SETTINGS)
    update(first, range(3))
    second = Muon(stopped, **SETTINGS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    update(second, range(3, 6))
    for own, resumed in zip(straight, stopped, strict=True):
        assert torch.equal(own, resumed)


def test_muon_and_adamw_side_by_side():
    settings = dict(learning_rate=0.01, weight_decay=0.1, betas=[0.9, 0.95], epsilon=1e-8)
    model = TinyModel()
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    combined = build_optimizer(model, name="muon", momentum=0.95, **settings)
    parts = (
        torch.optim.Muon([twin.hidden.weight], 0.01, 0.1, 0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([twin.lm_head.weight], 0.01, (0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW([twin.embed.weight, twin.norm.weight, twin.hidden.bias], 0.01, (0.9, 0.95), weight_decay=0.0),
    )
    for seed in range(4):
        for each in (model, twin):
            generator = torch.Generator().manual_seed(seed)
            for parameter in each.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        combined.step()
        for part in parts:
            part.step()
    for name, parameter in model.named_parameters():
        other = twin.get_parameter(name)
        if name == "hidden.weight":
            assert distance(parameter, other, start.get_parameter(name)) < 0.03
        else:
            torch.testing.assert_close(parameter, other)
