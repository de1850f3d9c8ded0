"""Speed of a training step of train.py (forward, backward and update), by pattern and length.

Precision, compilation, optimizer and gradient clipping come from the config. Each step of a measurement has documents
of its own, and builds their layouts. Patterns and lengths take turns in each round, so that a drift of the machine's
speed affects all of them alike; the median of the rounds is reported.

`mfu` is the share of the fastest matrix product that this device was measured to reach in the same run, in bf16 with
`trainer.fp8` too. Its FLOPs, and `density_pairs`, are means over the steps of a measurement.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

PROFILED = 10
"""Steps of a profile. The device waits for the host in the first one alone."""

BUSY = 0.9
"""Share of a step below which the host's operators are profiled, too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--attention", nargs="+", default=["dense", "window"], help="choices of configs/attention")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384], help="tokens a sequence"
    )
    parser.add_argument(
        "--backends", nargs="+", default=[None], help="values of attention.backend, in turn; the config's without it"
    )
    parser.add_argument(
        "--fp8", nargs="+", default=[None], help="values of trainer.fp8, in turn; the config's without it"
    )
    parser.add_argument(
        "--cuda-graph", nargs="+", default=[None], help="values of trainer.cuda_graph, in turn; the config's without it"
    )
    parser.add_argument("--model", default="nano", help="a choice of configs/model")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a step: shorter sequences are batched")
    parser.add_argument("--documents", type=int, help="mean length of packed documents; without it one a sequence")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the training config, as for train.py")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind; the median counts")
    parser.add_argument(
        "--steps", type=int, default=1, help="steps a measurement; on a GPU several, so that it never waits"
    )
    parser.add_argument("--profile", action="store_true", help="print the time by kernel of each")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/training.json"))


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table, writes the JSON."""
    from scripts.benchmarks.results import markdown, write

    if min(arguments.lengths) < 1:
        raise SystemExit(f"error: --lengths {min(arguments.lengths)}: must be at least 1 token")
    sides = arguments.backends, arguments.fp8, arguments.cuda_graph
    kinds = itertools.starmap(Kind, itertools.product(arguments.attention, arguments.lengths, *sides))
    steps = {kind: TrainingStep(kind, arguments) for kind in kinds}
    first = {key: step.seconds(1) for key, step in steps.items()}  # compiles, and allocates memory
    for step in steps.values():
        step.seconds(2)
    seconds: dict[Kind, list[float]] = {key: [] for key in steps}
    for _ in range(arguments.rounds):
        for key, step in steps.items():
            seconds[key].append(step.seconds(arguments.steps) / arguments.steps)
    device = next(iter(steps.values())).device
    ceiling = matrix_product_rate(device, next(iter(steps.values())).dtype)
    rows = []
    for kind, times in seconds.items():
        step, median = steps[kind], statistics.median(times)
        density, flops = step.density_and_flops()
        rows.append(
            {
                **{name: value for name, value in kind._asdict().items() if value},
                **({} if step.device.type == "cpu" else {"cuda_graph": "true" if step.is_replayed else "false"}),
                "density_pairs": round(density, 4),
                "tokens_per_second": round(step.tokens / median),
                "microseconds_per_token": round(1e6 * median / step.tokens, 3),
                "mfu": round(flops / median / ceiling, 3),
                "peak_memory_gb": round(step.peak_memory() / 1e9, 2),
                "first_step_seconds": round(first[kind], 1),
                "loss": round(step.loss, 4),
            }
        )
    for row in rows:
        row["ceiling_tflops"] = round(ceiling / 1e12, 3)
    write(arguments, rows)
    print(markdown(rows))
    print(f"\nwritten to {arguments.output}")
    if arguments.profile:
        for kind, step in steps.items():
            print(f"\n{kind}\n{step.profile()}")


class Kind(NamedTuple):
    """A case: a choice of configs/attention, tokens per sequence, and settings; None stands for the config's value."""

    attention: str
    length: int
    backend: str | None = None
    fp8: str | None = None
    cuda_graph: str | None = None

    def __str__(self) -> str:
        settings = [f"{name}={value}" for name, value in self._asdict().items() if value]
        return ", ".join(settings)

    def overrides(self) -> list[str]:
        """The overrides of the training config."""
        keys = {"attention.backend": self.backend, "trainer.fp8": self.fp8, "trainer.cuda_graph": self.cuda_graph}
        return [f"attention={self.attention}", *(f"{key}={value}" for key, value in keys.items() if value)]


class TrainingStep:
    """The training step of one config on random tokens, whose documents differ from step to step."""

    def __init__(self, kind: Kind, arguments: argparse.Namespace) -> None:
        import torch

        from configs.build import build_model
        from configs.checks import check_types
        from configs.errors import ConfigError
        from configs.fp8 import check_fp8
        from configs.graphed_step import resolve_cuda_graph
        from model.precision import AUTOCAST, device_of
        from model.training.freezing import freeze_parameters
        from model.training.optimizer import build_optimizer
        from model.training.step_graph import CudaRecorder, StepGraph
        from scripts.benchmarks.models import composed

        attention, *settings = kind.overrides()
        self.config = config = composed(attention, f"model={arguments.model}", *arguments.overrides, *settings)
        try:
            check_fp8(check_types(config))
            in_graph = resolve_cuda_graph(config)
        except ConfigError as error:
            raise SystemExit(f"error: {error}") from None
        self.device = device_of(config["trainer"]["accelerator"])
        self.dtype = AUTOCAST.get(config["trainer"]["precision"], torch.float32)
        torch.manual_seed(0)
        self.model = build_model(config, config["data"]["tokenizer"]["vocabulary"]).to(self.device).train()
        self.model.train_in_fp8(config["trainer"]["fp8"])
        if config["trainer"]["compile"]:
            self.model.compile_layers()
        freeze_parameters(self.model, config["optimizer"]["freeze"])
        settings = {key: value for key, value in config["optimizer"].items() if key not in ("schedule", "freeze")}
        self.optimizer = build_optimizer(self.model, **settings)
        self.graph: StepGraph[torch.Tensor] | None = None
        if in_graph:
            parameters, required = list(self.model.parameters()), in_graph is True
            self.graph = StepGraph(self._compute, parameters, CudaRecorder(self.device), required=required)
        self.length, self.batch = kind.length, max(1, arguments.tokens // kind.length)
        self.tokens = self.batch * self.length
        self.generator = torch.Generator().manual_seed(0)
        self.mean_document = arguments.documents
        # Drawing the batches is not measured. Each measurement takes all of them.
        self.batches = [self._batch() for _ in range(arguments.steps)]
        self.count = 0

    def _batch(self) -> "dict[str, torch.Tensor | None]":
        """Returns tokens `[batch, length + 1]`, and position and document `[batch, length]` or None, on the device."""
        import torch

        shape = self.batch, self.length
        tokens = torch.randint(self.model.config.vocabulary, (self.batch, self.length + 1), generator=self.generator)
        position = torch.arange(self.length).expand(shape)
        document = None
        if self.mean_document:
            begins = torch.rand(shape, generator=self.generator) < 1 / self.mean_document
            begins[:, 0] = True
            document = begins.int().cumsum(1, dtype=torch.int32)
            position = position - torch.where(begins, position, 0).cummax(1).values
            document = document.to(self.device)
        return dict(tokens=tokens.to(self.device), position=position.to(self.device), document=document)

    def seconds(self, steps: int) -> float:
        """Runs so many steps and returns how long they took."""
        self._wait()
        started = time.perf_counter()
        for _ in range(steps):
            loss = self._step()
        self._wait()
        elapsed = time.perf_counter() - started
        self.loss = loss.item()
        return elapsed

    def _step(self) -> "torch.Tensor":
        import torch

        batch = self.batches[self.count % len(self.batches)]
        self.count += 1
        if self.graph is None:
            loss, reported = self._compute(batch)
            loss.backward()
        else:
            _, reported = self.graph.run(batch, None, first=True)
            self.graph.attach_gradients()
        clip = self.config["trainer"]["gradient_clip"]
        if clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return reported

    def _compute(self, batch: "Mapping[str, torch.Tensor | None]") -> "tuple[torch.Tensor, torch.Tensor]":
        """Returns (the loss that is differentiated, the loss that is reported) of a batch."""
        import torch

        tokens, position, document = batch["tokens"], batch["position"], batch["document"]
        assert tokens is not None and position is not None
        layouts = self.model.build_layouts(document, self.length)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.model.loss(tokens[:, :-1], tokens[:, 1:], position, layouts)
        total = out.total if out.auxiliary is None else out.total + out.auxiliary
        return total / out.count, (out.total / out.count).detach()

    def density_and_flops(self) -> tuple[float, float]:
        """Returns (visible pairs over those of dense causal attention, FLOPs of a step), as means over the batches."""
        layouts = (self.model.build_layouts(batch["document"], self.length) for batch in self.batches)
        costs = [self.model.cost(each, self.batch) for each in layouts]
        density = statistics.mean(cost.attention.density_pairs for cost in costs)
        return density, statistics.mean(cost.flops for cost in costs)

    def peak_memory(self) -> int:
        """Returns the most bytes that tensors held during one more step; on a CPU, that this process has held so
        far."""
        from model.training.memory_use import peak_memory_bytes, reset_peak_memory

        if self.device.type == "cuda":
            reset_peak_memory(self.device)
            self.seconds(1)
        return peak_memory_bytes(self.device) + (self.graph.recorder.idle_bytes if self.graph else 0)

    @property
    def is_replayed(self) -> bool:
        """Whether steps are replayed from a CUDA graph; under `auto`, a capture may have failed."""
        return self.graph is not None and not self.graph.fails

    def profile(self) -> str:
        """Returns a table of the device's time by kernel over PROFILED steps, with the share of time in which it was
        busy. If the device waits for the host, also returns a table of the host's time by operator, over as many
        further steps."""
        from model.training.profiling import host_table, record, step_profile

        with record() as profiler:
            elapsed = self.seconds(PROFILED)
        profile = step_profile(profiler, elapsed, PROFILED)
        report = f"{profile}\n\n{profile.table()}"
        if profile.busy >= BUSY * profile.step:
            return report
        with record(on_host=True) as profiler:
            elapsed = self.seconds(PROFILED)
        return f"{report}\n\n{host_table(profiler, elapsed, PROFILED)}"

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()


def matrix_product_rate(device: "torch.device", dtype: "torch.dtype") -> float:
    """Returns the FLOP/s of a large square matrix product on this device, the median of several."""
    import torch

    size, repeats = (8192, 20) if device.type == "cuda" else (1024, 5)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times: list[float] = []
    for _ in range(repeats + 3):
        started: Any = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[3:])
