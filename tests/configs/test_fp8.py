import pytest

from configs.build import ConfigError
from configs.checks import check_types
from configs.fp8 import check_fp8
from tests.commands import compose


@pytest.mark.parametrize(
    ("capability", "overrides", "message"),
    [
        ((8, 6), [], r"^trainer\.fp8=mlp: must be false on A GPU: it needs compute capability 8\.9 or higher$"),
        ((9, 0), ["trainer.precision=32-true"], r"^trainer\.precision=32-true: must be bf16-mixed or bf16-true with "),
        ((9, 0), ["model.width=136"], r"^model\.width=136: must be a multiple of 16 with trainer\.fp8=mlp$"),
        ((8, 9), ["model.mlp_width=1000"], r"^model\.mlp_width=1000: must be a multiple of 16 with trainer\.fp8=mlp$"),
        (
            (10, 0),
            ["model.vocabulary=5001", "trainer.fp8=mlp_and_head"],
            r"^model\.vocabulary=5001: must be a multiple of 16 with trainer\.fp8=mlp_and_head$",
        ),
    ],
)
def test_where_fp8_cannot_run_it_is_refused(capability, overrides, message, monkeypatch):
    for name, value in dict(is_available=True, get_device_capability=capability, get_device_name="A GPU").items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    with pytest.raises(ConfigError, match=message):
        check_fp8(check_types(compose("trainer=gpu", "trainer.fp8=mlp", *overrides)))
    check_fp8(check_types(compose("trainer=gpu", *overrides, "trainer.fp8=false")))


def test_fp8_is_accepted_on_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 9))
    check_fp8(check_types(compose("trainer=gpu", "trainer.fp8=mlp_and_head")))
