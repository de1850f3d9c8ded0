"""trainer=auto, the default: one GPU where there is one, otherwise the CPU."""

import pytest
import torch
from omegaconf import OmegaConf

import configs
from tests.commands import compose


@pytest.fixture
def resolver():
    """The resolver of commands, in place of that of tests."""
    OmegaConf.register_new_resolver("on_gpu", configs.on_gpu, replace=True)
    yield
    OmegaConf.register_new_resolver("on_gpu", lambda gpu, cpu: cpu, replace=True)


@pytest.mark.parametrize(
    ("available", "expected"),
    [(True, ("cuda", "bf16-mixed", True, "auto")), (False, ("cpu", "32-true", False, False))],
)
def test_the_default_trainer_takes_a_gpu_where_there_is_one(available, expected, resolver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    trainer = compose()["trainer"]
    assert tuple(trainer[key] for key in ("accelerator", "precision", "compile", "cuda_graph")) == expected


def test_on_a_cpu_it_is_the_trainer_of_cpus(resolver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compose() == compose("trainer=cpu")
