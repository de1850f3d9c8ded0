import logging
import re

import pytest

from configs.build import ConfigError
from configs.graphed_step import check_cuda_graph, resolve_cuda_graph
from tests.commands import compose


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["trainer=cpu"], "on a CPU"),
        (["trainer.devices=2"], "on several devices"),
        (["trainer.devices=auto"], "on several devices"),
        (["trainer.strategy=ddp"], "with trainer.strategy=ddp"),
        (["trainer.precision=16-mixed"], "with trainer.precision=16-mixed"),
        (["attention.backend=flex"], "with attention.backend=flex, and true with auto, triton, hopper"),
        (
            ["model.activation_checkpointing=selective", "trainer.compile=false"],
            "with model.activation_checkpointing and trainer.compile=false",
        ),
        (
            ["model.head_dim=48"],
            "where Triton's kernels cannot run: head_dim 48: must be one of 32, 64, 96, 128, 192, 256",
        ),
        (
            ["trainer.precision=64-true"],
            "where Triton's kernels cannot run: dtype torch.float64: must be one of torch.bfloat16, torch.float16, "
            "torch.float32",
        ),
    ],
)
def test_where_a_step_cannot_be_replayed_true_is_refused_and_auto_is_false(overrides, reason, monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    settings = ("trainer=gpu", *overrides)
    message = f"trainer.cuda_graph=true: must be false or auto {reason}"
    for refuse in (check_cuda_graph, resolve_cuda_graph):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            refuse(compose(*settings, "trainer.cuda_graph=true"))
    check_cuda_graph(compose(*settings, "trainer.cuda_graph=auto"))
    with caplog.at_level(logging.INFO):
        assert resolve_cuda_graph(compose(*settings, "trainer.cuda_graph=auto"), log_reason=True) is False
    lines = [f"trainer.cuda_graph=auto: false, as always {reason}"] if "on a CPU" not in reason else []
    assert [record.message for record in caplog.records] == lines


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [
        ((7, 5), True, "compute capability 7.5: must be 8.0 or later"),
        ((9, 0), False, "the package triton is not installed"),
    ],
)
def test_without_kernels_that_can_be_captured_no_step_is(capability, triton, reason, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("configs.graphed_step.has_triton", lambda: triton)
    with pytest.raises(ConfigError, match=f"where Triton's kernels cannot run: {re.escape(reason)}$"):
        check_cuda_graph(compose("trainer=gpu", "trainer.cuda_graph=true"))


@pytest.mark.parametrize(("trainer", "value"), [("gpu", "auto"), ("ddp", False), ("fsdp", False)])
def test_by_default_one_gpu_replays_steps_and_several_do_not(trainer, value, monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    caplog.set_level(logging.INFO)
    assert resolve_cuda_graph(compose(f"trainer={trainer}"), log_reason=True) == value
    assert not caplog.records, "nothing to say to a user who has not set it"


@pytest.mark.parametrize("value", [True, "auto"])
def test_a_step_is_replayed_on_one_gpu(value, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    for more in ([], ["model.activation_checkpointing=true"], ["trainer.on_nan=skip_step"], ["attention=routed"]):
        config = compose("trainer=gpu", f"trainer.cuda_graph={str(value).lower()}", *more)
        check_cuda_graph(config)
        assert resolve_cuda_graph(config) == value
