"""LanguageModel: next-token training of a Transformer as a LightningModule.

    batch --build_layouts--> one layout a layer --loss--> nats of every scored token --sums--> loss, bits per byte

The units of metrics are those of loss_sums.py. Sums are kept in float64 and divided once at the end, so a validation
loss is exact over its tokens and no mean of batch means.

Weights under accumulation. Micro-batches (and ranks) may hold different numbers of scored tokens, and in a mean of
their means a token of a micro-batch with fewer of them would weigh more. Here each micro-batch back-propagates its
*sum* of nats over a constant (the number of positions), and `configure_gradient_clipping` multiplies the accumulated
gradient by positions / scored tokens of all micro-batches on all ranks. The gradient is then that of the mean over
every scored token of the step, whatever the split: accumulate=3 equals one batch three times as long. A layer's own
loss (a router's) is a sum over queries and is added to the nats: it trains, weighted alike, and is in no reported loss.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.layout.cost import AttentionCost
from model.parallel.context import Context, context_group
from model.parallel.ranges import take
from model.training.checkpoints import check_keys
from model.training.failures import size
from model.training.freezing import IndexersFirst, freeze_parameters
from model.training.loss_sums import ValidationSums, totals, train_units
from model.training.optimizer import build_optimizer, build_schedule, set_rates
from model.training.step_checks import StepChecks
from model.training.step_graph import CudaRecorder, GraphRecorder, StepGraph
from model.training.strategies import FullyShardedStrategy, WatchedRanks
from model.transformer import ModelCost

log = logging.getLogger(__name__)


class BatchResults(NamedTuple):
    """The results of a training batch besides its loss.

    totals: float64 `[3]`: nats, scored tokens and bytes. overflow: as Transformer.overflow. layouts, diagnostics: those
    of each layer. tokens: number of positions.
    """

    totals: Tensor
    overflow: Tensor | None
    layouts: list
    tokens: int
    diagnostics: list[dict[str, Tensor]]


class LanguageModel(lightning.LightningModule):
    """Trains `model` on the batches of data.DataModule.

    Args:
        model: a Transformer (build_layouts, loss, cost; see model/transformer.py). Its weights are saved as `model.*`.
        optimizer: the mapping of configs/optimizer/*.yaml, as plain dicts.
        token_bytes: int64 [vocabulary], bytes of text that a token stands for (0 for the beginning-of-document token);
            float64 for a lossy tokenizer, which marks the metrics. Where all are 0, no metric is per byte.
        config: the whole resolved config, as plain dicts. Saved in every checkpoint under `hyper_parameters`, so that
            a checkpoint alone is enough to rebuild its model.
    """

    def __init__(self, model: nn.Module, optimizer: dict[str, Any], token_bytes: Tensor, config: dict[str, Any]):
        super().__init__()
        self.model = model
        self.optimizer_settings = dict(optimizer)
        # Before the strategy wraps the model: DDP and FSDP2 read which parameters have gradients.
        frozen = freeze_parameters(model, self.optimizer_settings.pop("freeze"))
        if frozen:
            log.info("%s of %s parameters are frozen", f"{frozen:,}", f"{sum(p.numel() for p in model.parameters()):,}")
        self.indexers_first = IndexersFirst(model)
        self.per_byte = bool(token_bytes.any())
        self.lossy = token_bytes.dtype == torch.float64
        # A count of tokens and their mean: a buffer of floats would be rounded to the precision of the weights.
        self.mean_bytes = token_bytes.max().item() if self.lossy else 1
        self.register_buffer("token_bytes", (token_bytes > 0 if self.lossy else token_bytes).long(), persistent=False)
        self.save_hyperparameters(config)
        self.stepped = True  # whether the optimizer has stepped since the last training_step
        self.layouts: list = []  # of the latest training batch, whose cost is logged
        self.batch_size = self.batch_tokens = 0  # sequences and positions in it
        self.learning_rate = 0.0
        self.validation_metrics: dict[str, float] = {}
        self.progress: Callable[[], float] | None = None  # what schedules follow instead of steps (run_length.py)
        self.ends: list[float | None] = []  # max_steps and max_seconds of this session
        self.saved_ends: list[float | None] | None = None  # of the session that saved the checkpoint
        self.checks = StepChecks()  # fit() sets those of its settings
        self.context_parallel = 1  # ranks that share each sequence; fit() sets it
        self.context_group: dist.ProcessGroup | None = None  # of this rank and those that share its sequences
        self.hosts: dist.ProcessGroup | None = None  # of all ranks, in the memory of their hosts
        self.bytes_sent: float | None = None  # a rank's mean bytes sent in the layers of a batch; None: not counted yet
        self.cuda_graph: bool | str = False  # true, or "auto": replay steps from a CUDA graph; fit() sets it
        self.graph: StepGraph[BatchResults] | None = None
        self.recorder: GraphRecorder | None = None  # of the graph; it counts the graph's memory after the training, too

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            self.trainer.strategy.shard(self.model)

    def configure_optimizers(self) -> dict[str, Any]:
        settings = dict(self.optimizer_settings)
        schedule = settings.pop("schedule")
        optimizer = build_optimizer(self.model, **settings)
        first = self.indexers_first.steps
        scheduler = build_schedule(optimizer, self.trainer.max_steps, self.progress, first, **schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Training

    def on_fit_start(self) -> None:
        strategy = self.trainer.strategy
        limit = strategy.timeout(strategy.ranks) if isinstance(strategy, WatchedRanks) else {}
        if self.trainer.world_size > 1:
            self.hosts = dist.new_group(backend="gloo", **limit)
        if self.context_parallel > 1:
            self.context_group = context_group(self.context_parallel, self.device, **limit)
        self.checks.start(self.device, getattr(self.trainer.datamodule, "document_names", None))
        # Plain tensors and not buffers: Lightning's bf16-true precision would cast a float64 buffer.
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # nats, scored tokens, bytes of this step
        self.gradient_norm = torch.zeros((), device=self.device)
        if self.cuda_graph:
            accumulate, required = self.trainer.accumulate_grad_batches, self.cuda_graph is True
            parameters = list(self.model.parameters())
            self.recorder = self._recorder()
            self.graph = StepGraph(self._compute, parameters, self.recorder, accumulate, required)

    def _recorder(self) -> GraphRecorder:
        return CudaRecorder(self.device)

    def on_train_end(self) -> None:
        self.graph = None  # its memory serves what follows the training

    def on_train_start(self) -> None:
        """Sets the learning rate of the first step from this session's schedule. The checkpoint holds the rate of the
        previous session, which may have had another end. With an unchanged end in seconds the saved rate stays, because
        the schedule reads the time of an earlier step (run_length.py)."""
        if self.progress is not None and self.saved_ends == self.ends:
            return
        for config in self.trainer.lr_scheduler_configs:
            set_rates(config.scheduler)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        first = self.stepped
        if first:
            self.sums.zero_()
            self.stepped = False
        # The cursor moves here and not in on_train_batch_end: callbacks run before that hook, and would save it late.
        begun = self.trainer.datamodule.cursor
        self.trainer.datamodule.advance(len(batch["tokens"]))
        self.checks.begin_batch(self.trainer.global_step + 1, begun, self.trainer.datamodule.cursor)

        self.model.set_step(self.trainer.global_step)
        self.indexers_first.set_step(self.trainer.global_step, self.trainer.world_size)
        if self.graph is None:
            loss, results = self._compute(batch)
        else:
            # The sizes of a graph are fixed: it computes the logits of all tokens, whatever the count of targets.
            batch = {name: x for name, x in batch.items() if name != "scored"}
            loss, results = self.graph.run(batch, (self.model.stage, self.indexers_first.alone), first)
        self.layouts, self.model.layer_diagnostics = results.layouts, results.diagnostics
        if results.overflow is not None:
            self.checks.overflowed |= results.overflow
        self.batch_size, self.batch_tokens = len(batch["tokens"]), results.tokens
        if self.context_group is not None and self.bytes_sent is None:
            self._log_traffic(batch["tokens"].shape[1])
        self.sums += results.totals
        self.checks.watch(loss)
        return loss

    def _compute(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, BatchResults]:
        """Returns the loss of a training batch, with gradients, and its other results. A CUDA graph replays this
        function: it reads no Python value that changes from batch to batch, and has no side effects."""
        out, layouts = self._forward(batch)
        tokens = out.per_token.numel()
        loss = (out.total if out.auxiliary is None else out.total + out.auxiliary) / tokens
        totals = self._totals(out.per_token, self._own(batch)["targets"])
        diagnostics = [
            {name: value.detach() for name, value in layer.items()} for layer in self.model.layer_diagnostics
        ]
        return loss, BatchResults(totals, self.model.overflow(layouts), layouts, tokens, diagnostics)

    def backward(self, loss: Tensor, *arguments: Any, **settings: Any) -> None:
        """With a CUDA graph, `training_step` has computed the gradients."""
        if self.graph is None:
            super().backward(loss, *arguments, **settings)
        else:
            self.graph.attach_gradients()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Scales the accumulated gradient by scored tokens (see the top of the file), measures its norm, and clips
        it."""
        trainer = self.trainer
        self.indexers_first.drop_gradients()
        positions = self.batch_tokens * trainer.accumulate_grad_batches * trainer.world_size
        # A layout that is too small on one rank stops all ranks, at the same step.
        _, scored, _, overflowed = self._over_ranks(torch.cat([self.sums, self.checks.overflowed.double()[None]]))
        self.checks.overflowed = overflowed > 0
        scale = positions / scored.clamp(min=1)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # A rank's own rows of FSDP2's gradients: operations on DTensors take the host too long.
        sharded = bool(gradients) and hasattr(gradients[0], "to_local")
        gradients = [gradient.to_local() for gradient in gradients] if sharded else gradients
        _multiply(gradients, scale)
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = self._over_ranks(norm.square()).sqrt() if sharded else norm
        if self.checks.can_skip and self._is_broken(norm):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # neither it nor its state moves; the schedule goes on
            self.checks.skip()
            gradient_clip_val = None
        if gradient_clip_val:  # as torch.nn.utils.clip_grad_norm_
            _multiply(gradients, (gradient_clip_val / (norm + 1e-6)).clamp(max=1.0))
        self.gradient_norm = norm
        self.checks.watch(norm)
        self.learning_rate = optimizer.param_groups[0]["lr"]  # of this step; the schedule moves on before logging
        self.stepped = True

    def train_metrics(self) -> dict[str, float]:
        """Returns the metrics of the last step. It waits for the device, so it is called only for logged steps."""
        self.checks.check()
        sums = self._over_ranks(self.sums).tolist()
        return {
            **train_units(sums, self._text_sources(), self.lossy, self.per_byte),
            "train/learning_rate": self.learning_rate,
            "train/gradient_norm": self.gradient_norm.item(),
            **({"train/skipped_steps": self.checks.skipped_steps} if self.checks.can_skip else {}),
            **{f"train/routing_{name}": value for name, value in self._routing_metrics().items()},
        }

    def _routing_metrics(self) -> dict[str, float]:
        """Returns the latest diagnostics of the routers; if ranks share sequences, their mean over all ranks."""
        diagnostics = self.model.diagnostics()
        if self.context_group is not None and diagnostics:
            means = self._over_ranks(torch.stack(list(diagnostics.values())).double()) / self.trainer.world_size
            diagnostics = dict(zip(diagnostics, means, strict=True))
        return {name: value.item() for name, value in diagnostics.items()}

    def _is_broken(self, norm: Tensor) -> bool:
        """Whether this step's loss or gradient is not finite, on any rank; waits for the device."""
        sound = torch.stack([self.sums[0].isfinite(), norm.isfinite()]).all()
        return bool(self._over_ranks((~sound).double()))

    # Validation

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == "fit":
            self.checks.check()
        self.validation_sums = ValidationSums(getattr(self.trainer.datamodule, "source_names", []), self.device)
        self.model.collect_diagnostics(True)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        out, _ = self._forward(batch)
        own, length = self._own(batch), batch["tokens"].shape[1]
        self.validation_sums.add(own, length, partial(self._totals, out.per_token), self.model.diagnostics())

    def on_validation_epoch_end(self) -> None:
        self.model.collect_diagnostics(False)
        self.validation_metrics = self.validation_sums.metrics(
            self._over_ranks, self._text_sources(), self.lossy, self.per_byte
        )
        # For callbacks that monitor something; metrics.py writes the float64 values out.
        self.log_dict(self.validation_metrics, logger=False, sync_dist=True)

    def _text_sources(self) -> list[str] | None:
        """The sources whose targets are text; None if all are."""
        return getattr(self.trainer.datamodule, "text_sources", None)

    def step_cost(self) -> tuple[ModelCost, int]:
        """Returns the cost of the latest training batch, and its number of tokens; summed over all ranks if they share
        sequences."""
        cost = self.model.cost(self.layouts, self.batch_size)
        if self.context_group is None:
            return cost, self.batch_tokens
        counts = [*dataclasses.astuple(cost.attention), cost.flops, cost.dense_flops, self.batch_tokens]
        counts = self._over_ranks(torch.tensor(counts, dtype=torch.float64, device=self.device)).tolist()
        *attention, flops, dense_flops, tokens = map(int, counts)
        return ModelCost(AttentionCost(*attention), flops, dense_flops), tokens

    def _log_traffic(self, length: int) -> None:
        """Logs the bytes that the ranks that share sequences send one another, for each kind of layer."""
        device, context = self.device.type, self._context(length)
        dtype = self.model.embed_tokens.weight.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        sent = torch.tensor(self.model.bytes_sent(self.layouts, self.batch_size, dtype.itemsize)).double()
        sent = self._over_ranks(sent.to(self.device)).tolist()
        self.bytes_sent = sum(map(sum, sent)) / self.trainer.world_size
        order = "contiguous" if len(context.own) == 1 else "interleaved"
        log.info("%d ranks share each sequence of %s tokens, in %s parts", self.context_parallel, f"{length:,}", order)
        for pattern, (forward, backward) in dict(zip(self.model.patterns, sent, strict=True)).items():
            log.info("a layer sends %s forward and %s backward a batch: %s", size(forward), size(backward), pattern)

    # Shared

    def _forward(self, batch: Mapping[str, Tensor]) -> tuple[Any, list]:
        length = batch["tokens"].shape[1]
        context = self._context(length)
        layouts = self.model.build_layouts(batch["document"], length, *([] if context is None else [context]))
        own = self._own(batch)
        out = self.model.loss(own["tokens"], own["targets"], own["position"], layouts, batch.get("scored"))
        return out, layouts

    def _context(self, length: int) -> Context | None:
        """Returns how ranks share sequences of `length` tokens; None if each rank has its own sequences."""
        return None if self.context_group is None else self.model.share_sequences(self.context_group, length)

    def _own(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tokens of a batch of whole sequences that this rank computes."""
        context = self._context(batch["tokens"].shape[1])
        if context is None:
            return batch
        return {name: take(x, context.own) for name, x in batch.items() if isinstance(x, Tensor)}

    def _totals(self, per_token: Tensor, targets: Tensor) -> Tensor:
        return totals(per_token, targets, self.token_bytes, self.mean_bytes)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """The sum over all ranks. Lightning's `reduce` sends a barrier first, at which the host waits for the device.
        The device then idles until the host has launched the next kernels."""
        if self.trainer.world_size > 1:
            sums = sums.clone()
            dist.all_reduce(sums)
        return sums

    def over_hosts(self, value: float) -> float:
        """Returns the sum over all ranks of a number in the hosts' memory. No rank waits for its device."""
        if self.hosts is None:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total, group=self.hosts)
        return total.item()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped_steps"], checkpoint["ends"] = self.checks.skipped_steps, self.ends

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_keys(self, checkpoint["state_dict"], "resume")
        self.checks.skipped_steps, self.saved_ends = checkpoint.get("skipped_steps", 0), checkpoint.get("ends")


def _multiply(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies tensors in place, in few kernels."""
    for dtype in {tensor.dtype for tensor in tensors}:
        torch._foreach_mul_([tensor for tensor in tensors if tensor.dtype == dtype], factor.to(dtype))
