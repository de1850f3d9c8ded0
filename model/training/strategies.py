"""Data-parallel training: what each device holds, and how a checkpoint holds whole tensors.

    ddp     Each rank holds the whole model. Gradients are averaged in buckets while the backward pass runs.
    fsdp2   Each rank holds its rows of every parameter, gradient and optimizer state. A layer's parameters are gathered
            before the layer runs, and its gradients are reduced to their rows after it (PyTorch's `fully_shard`).

A checkpoint of a sharded run is the file that one process writes: rank 0 gathers whole tensors, one after another, in
the CPU's memory. So it resumes on any number of ranks, and every command reads it.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from model.precision import SHARDED
from model.training.ranks import Launcher, Ranks

SUPERSEDED = ("fsdp", "fsdp_cpu_offload", "model_parallel")
"""Lightning's names that fail here: FSDP1 flattens the matrices that Muon needs, and the last needs our `shard`."""


COLLECTIVE_SECONDS = 60.0
"""gloo and NCCL wait this much longer than `trainer.rank_timeout`: their messages are for developers, and ranks.py
reports a hanging rank before."""


def build_strategy(name: str, ranks: Ranks | None = None) -> Strategy | str:
    """The strategy that `trainer.strategy` names, as Lightning's Trainer takes it: one of ours, or Lightning's name.

    ranks: the watch over the ranks of a run; None if no run starts.
    """
    if name == "ddp":
        return ReplicatedStrategy(ranks)
    return FullyShardedStrategy(ranks) if name == SHARDED else name


class WatchedRanks(ParallelStrategy):
    """Base class: starts ranks that end together (ranks.py)."""

    ranks: Ranks | None

    def _configure_launcher(self) -> None:
        if self.ranks is None:
            return super()._configure_launcher()
        self._launcher = Launcher(self.ranks, self.cluster_environment, self.num_processes, self.num_nodes)

    @staticmethod
    def timeout(ranks: Ranks | None) -> dict[str, datetime.timedelta]:
        """Returns the time limit of all groups of ranks, as keyword arguments. PyTorch's own limits are 10 minutes with
        NCCL and 30 minutes with gloo, whatever `trainer.rank_timeout` is."""
        return {} if ranks is None else {"timeout": datetime.timedelta(seconds=ranks.timeout + COLLECTIVE_SECONDS)}


class ReplicatedStrategy(WatchedRanks, DDPStrategy):
    """DDP, whose gradients are views of the buckets in which they are averaged."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        super().__init__(gradient_as_bucket_view=True, find_unused_parameters=False, **self.timeout(ranks))
        self.ranks = ranks

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        # Lightning wraps the model on a stream of its own. There, gradients would be accumulated apart from the
        # backward pass, with a synchronization for each of them, and PyTorch warns.
        ddp = DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)
        # No buffer changes in training (rotations' frequencies, bytes of tokens), so no step sends them. The argument
        # of DDP's constructor has another name in each of the PyTorch versions that the project supports.
        ddp.broadcast_buffers = False
        return ddp


class FullyShardedStrategy(WatchedRanks, ModelParallelStrategy):
    """FSDP2 over all ranks, with checkpoints that hold whole tensors."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        super().__init__(save_distributed_checkpoint=False, **self.timeout(ranks))
        self.ranks = ranks

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        for timeout in self.timeout(self.ranks).values():
            for group in self.device_mesh.get_all_groups():
                _set_pg_timeout(timeout, group)

    def shard(self, model: nn.Module) -> None:
        """Shards a Transformer: each of its layers, and the embedding, last norm and head together.

        Under `bf16-mixed` a layer's parameters are gathered in bf16, in which autocast computes; gradients are summed
        in float32.
        """
        if isinstance(model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        dtype = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False
        )
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)  # in float32: the residual stream keeps the dtype of the embedding
        register_fsdp_forward_method(model, "loss")

    # Checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = ParallelStrategy.optimizer_state(self, optimizer)
        return state | {"state": {key: self._gathered(values) for key, values in state["state"].items()}}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        weights = {key: _sharded(value, own.get(key)) for key, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(weights, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            keys = [key for group in saved["param_groups"] for key in group["params"]]
            state = {
                key: {name: _sharded(value, parameter) for name, value in saved["state"][key].items()}
                for key, parameter in zip(keys, parameters, strict=True)
                if key in saved["state"]
            }
            optimizer.load_state_dict(dict(saved) | {"state": state})

    def _gathered(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Whole tensors on rank 0, in the CPU's memory; nothing on other ranks, which take part in the gathering."""
        gathered = {}
        for key, value in values.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if self.is_global_zero:
                gathered[key] = whole.cpu() if isinstance(whole, Tensor) else whole
        return gathered


def _sharded(value: Any, like: Tensor | None) -> Any:
    """This rank's rows of a whole tensor that belongs to a sharded parameter; every other value as it is."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        # Each rank has read the whole tensor: nothing is sent.
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value
