"""Checks `trainer.fp8`: the device, the precision, and the sizes of the matrices."""

from configs import schema
from configs.errors import refused
from kernels.fp8 import MULTIPLE

CAPABILITY = (8, 9)
"""The first compute capability with products of e4m3 numbers (Ada Lovelace)."""


def check_fp8(config: schema.Train) -> None:
    """Raises ConfigError where the products that `trainer.fp8` names cannot be computed in 8 bits."""
    import torch

    products, trainer, model = config.trainer.fp8, config.trainer, config.model
    if not products:
        return
    if trainer.accelerator == "cpu" or not torch.cuda.is_available():
        raise refused("trainer.fp8", products, "false on a CPU")
    if torch.cuda.get_device_capability() < CAPABILITY:
        accepted = f"false on {torch.cuda.get_device_name()}: it needs compute capability 8.9 or higher"
        raise refused("trainer.fp8", products, accepted)
    if not trainer.precision.startswith("bf16"):
        raise refused("trainer.precision", trainer.precision, f"bf16-mixed or bf16-true with trainer.fp8={products}")
    for key in ("width", "mlp_width", *(["vocabulary"] if products == "mlp_and_head" else [])):
        size = getattr(model, key)
        if size is not None and size % MULTIPLE:  # a vocabulary of null becomes a multiple of 64
            raise refused(f"model.{key}", size, f"a multiple of {MULTIPLE} with trainer.fp8={products}")
